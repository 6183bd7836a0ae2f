//! Numbering: the escrows one transaction touches, and the entries of their lanes.

use std::sync::{MutexGuard, RwLock};

use alloy::primitives::map::AddressMap;
use alloy::primitives::{Address, B256};
use redb::{ReadableTable, Table, WriteTransaction};

use super::opening::now_micros;
use super::schema::{Entry, Escrow, EscrowState, Kind, NewEntry, REGISTRY};
use super::{Registry, Store, StoreError, lock, read};
use crate::event::{BlockRef, Event, Retraction, event_id};

/// Rows of the registry that were written lately, as they stand: an escrow's events come together, and to read a row again
/// costs as much as to write it.
#[derive(Debug, Default)]
pub(super) struct Recent(AddressMap<Escrow>);

/// How many of them, at most.
const RECENT: usize = 16_384;

impl Recent {
    /// Follows a commit.
    pub fn follow(&mut self, changed: &AddressMap<Option<Escrow>>) {
        if self.0.len() + changed.len() > RECENT {
            self.0.clear();
        }
        self.0.reserve(changed.len().min(RECENT - self.0.len()));
        for (address, row) in changed {
            match row {
                Some(escrow) if self.0.len() < RECENT => drop(self.0.insert(*address, escrow.clone())),
                // One that stayed behind would be wrong.
                Some(_) | None => drop(self.0.remove(address)),
            }
        }
    }
}

/// The escrows touched by one transaction: read once, numbered on, written once.
pub(super) struct Lanes<'txn> {
    table: Table<'txn, &'static [u8; 20], &'static [u8]>,
    recent: MutexGuard<'txn, Recent>,
    /// As it was before the transaction. Locked for each look only: others wait for it, too.
    registry: &'txn RwLock<Registry>,
    touched: AddressMap<Option<Escrow>>,
    epoch: u64,
    now: u64,
}

/// Entries of one transaction.
pub(super) struct Entries {
    /// The message of the last one.
    body: Vec<u8>,
    epoch: u64,
    now: u64,
}

impl Entries {
    /// The entry of an event; `late`: outside the order of its lane.
    pub fn entry<'a>(&'a mut self, event: &'a Event, sequence: u64, late: bool) -> NewEntry<'a> {
        event.body.finish_into(&mut self.body, sequence);
        NewEntry {
            kind: Kind::Event,
            name: &event.name,
            announces: event.announces,
            emitter: event.emitter,
            escrow: event.escrow,
            block_number: event.block.number,
            block_hash: event.block.hash,
            log_index: event.log_index,
            sequence,
            epoch: self.epoch,
            late,
            stored_at: self.now,
            body: &self.body,
        }
    }
}

impl<'txn> Lanes<'txn> {
    pub fn open(store: &'txn Store, transaction: &'txn WriteTransaction) -> Result<Self, StoreError> {
        let (table, recent) = (transaction.open_table(REGISTRY)?, lock(&store.recent));
        let (epoch, now) = (store.epoch, now_micros() / 1_000_000);
        let registry = &store.registry;
        Ok(Self { table, recent, registry, touched: AddressMap::default(), epoch, now })
    }

    fn touch(&mut self, address: Address) -> Result<&mut Option<Escrow>, StoreError> {
        use std::collections::hash_map::Entry;
        match self.touched.entry(address) {
            Entry::Occupied(occupied) => Ok(occupied.into_mut()),
            Entry::Vacant(vacant) => {
                if let Some(escrow) = self.recent.0.get(&address) {
                    return Ok(vacant.insert(Some(escrow.clone())));
                }
                if !read(self.registry).has_row(&address) {
                    return Ok(vacant.insert(None));
                }
                let row = self.table.get(&*address.0)?;
                let escrow = row.map(|row| Escrow::decode(row.value())).transpose()?;
                Ok(vacant.insert(escrow))
            }
        }
    }

    /// The row of an escrow that has a lane.
    fn lane(&mut self, address: Address) -> Result<&mut Escrow, StoreError> {
        let escrow = self.touch(address)?.as_mut();
        Ok(escrow.unwrap_or_else(|| panic!("an entry for {address}, which was never announced")))
    }

    /// Registers an escrow that is seen in its turn. If it became known late meanwhile, it stays as it is: its history, these
    /// blocks included, is still to be read.
    pub fn discover(&mut self, address: Address, block: BlockRef) -> Result<(), StoreError> {
        match self.touch(address)?.as_ref().map(|escrow| escrow.state) {
            Some(EscrowState::Active | EscrowState::Joining { .. } | EscrowState::Archived) => Ok(()),
            Some(EscrowState::Withdrawn) | None => self.announce(address, block),
        }
    }

    /// Registers an escrow; one that was withdrawn comes back and is numbered on.
    fn announce(&mut self, address: Address, block: BlockRef) -> Result<(), StoreError> {
        let slot = self.touch(address)?;
        let last_sequence = slot.as_ref().map_or(0, |escrow| escrow.last_sequence);
        *slot = Some(Escrow {
            announced: (block.number, Escrow::mark(&block.hash)),
            covered_from: block.number,
            last_sequence,
            ended: None,
            state: EscrowState::Active,
        });
        Ok(())
    }

    /// Registers an escrow whose history a late read fetches before it is watched. `false`: it is registered already.
    pub fn join(&mut self, address: Address, block: BlockRef, late_read: u64) -> Result<bool, StoreError> {
        let known = self.touch(address)?.as_ref().map(|escrow| escrow.state);
        match known {
            Some(EscrowState::Active | EscrowState::Joining { .. } | EscrowState::Archived) => {
                return Ok(false);
            }
            Some(EscrowState::Withdrawn) | None => self.announce(address, block)?,
        }
        self.lane(address)?.state = EscrowState::Joining { late_read };
        Ok(true)
    }

    /// An earlier announcement of an escrow that is read already was found: what it emitted in between has yet to be read.
    /// Where a fork has taken the later one since, the late read reads all of it. Of one that was imported, whoever did it
    /// said from where on it counts.
    pub fn announce_earlier(
        &mut self,
        address: Address,
        block: BlockRef,
        late_read: u64,
    ) -> Result<(), StoreError> {
        if self.join(address, block, late_read)? {
            return Ok(());
        }
        let escrow = self.lane(address)?;
        let is_read = matches!(escrow.state, EscrowState::Active | EscrowState::Archived);
        if is_read && !escrow.is_imported() && block.number < escrow.announced.0 {
            escrow.state = EscrowState::Active;
            escrow.announced = (block.number, Escrow::mark(&block.hash));
        }
        Ok(())
    }

    /// The escrow's logs were read from that block on, or from its announcement on where that is later.
    pub fn cover(&mut self, address: Address, from: u64) -> Result<(), StoreError> {
        let escrow = self.lane(address)?;
        escrow.covered_from = escrow.covered_from.min(from.max(escrow.announced.0));
        Ok(())
    }

    /// A late read has read all blocks below `next`. `true`: none of the escrow's is missing any more.
    pub fn cover_upto(&mut self, address: Address, next: u64) -> Result<bool, StoreError> {
        let escrow = self.lane(address)?;
        let covered = next >= escrow.covered_from;
        if covered {
            escrow.covered_from = escrow.announced.0;
        }
        Ok(covered)
    }

    /// From now on the escrow is watched.
    pub fn joined(&mut self, address: Address) -> Result<(), StoreError> {
        self.lane(address)?.state = EscrowState::Active;
        Ok(())
    }

    /// Forgets an end of life in blocks that left the chain.
    pub fn reopen(&mut self, address: Address, above: u64) -> Result<(), StoreError> {
        let escrow = self.lane(address)?;
        escrow.ended = escrow.ended.filter(|block| *block < above);
        Ok(())
    }

    /// Asks for the escrow no more, if that block ended it.
    pub fn archive(&mut self, address: Address, ended: u64) -> Result<bool, StoreError> {
        let Some(escrow) = self.touch(address)? else {
            return Ok(false);
        };
        let archived = escrow.state == EscrowState::Active && escrow.ended == Some(ended);
        if archived {
            escrow.state = EscrowState::Archived;
        }
        Ok(archived)
    }

    /// Takes an escrow out of the registry if this block is the one that announced it.
    pub fn withdraw(&mut self, address: Address, block_hash: B256) -> Result<bool, StoreError> {
        let escrow = self.lane(address)?;
        let announced_there =
            escrow.announced.1 == Escrow::mark(&block_hash) && escrow.state != EscrowState::Withdrawn;
        if announced_there {
            escrow.state = EscrowState::Withdrawn;
        }
        Ok(announced_there)
    }

    /// The place of an event in its escrow's life.
    pub fn number(&mut self, event: &Event) -> Result<u64, StoreError> {
        let escrow = self.lane(event.escrow)?;
        escrow.last_sequence += 1;
        if escrow.state == EscrowState::Archived {
            // It goes on after its end. Until that is long final again, it is asked for.
            escrow.state = EscrowState::Active;
            escrow.ended = Some(event.block.number);
        }
        if event.ends {
            escrow.ended.get_or_insert(event.block.number);
        }
        Ok(escrow.last_sequence)
    }

    /// Makes entries of events that are numbered.
    pub fn entries(&self) -> Entries {
        Entries { body: Vec::new(), epoch: self.epoch, now: self.now }
    }

    pub fn retraction(&mut self, of: u64, entry: &Entry, chain_id: u64) -> Result<Entry, StoreError> {
        let (epoch, now) = (self.epoch, self.now);
        let escrow = self.lane(entry.escrow)?;
        escrow.last_sequence += 1;
        let retraction = Retraction {
            retracts: &event_id(chain_id, &entry.block_hash, entry.log_index),
            retracted_event: &entry.body,
            sequence: escrow.last_sequence,
            chain_id,
            emitter: entry.emitter,
        };
        let body = retraction.encode().map_err(|error| StoreError::Damaged {
            what: format!("table event_log: the body at position {of} is not JSON: {error}"),
        })?;
        let kind = Kind::Retraction { of };
        Ok(Entry { kind, sequence: escrow.last_sequence, epoch, stored_at: now, body, ..entry.clone() })
    }

    /// Frees the number of an entry that is dropped; always the lane's last.
    pub fn take_back(&mut self, entry: &Entry) -> Result<(), StoreError> {
        let escrow = self.lane(entry.escrow)?;
        assert_eq!(escrow.last_sequence, entry.sequence, "only the end of a lane is dropped");
        escrow.last_sequence -= 1;
        Ok(())
    }

    /// Writes the rows back. An escrow withdrawn before anything of it could be published leaves no trace.
    pub fn close(mut self) -> Result<AddressMap<Option<Escrow>>, StoreError> {
        // In the table's own order.
        let mut rows: Vec<(&Address, &mut Option<Escrow>)> = self.touched.iter_mut().collect();
        rows.sort_unstable_by_key(|(address, _)| **address);
        for (address, slot) in rows {
            let forgotten = slot
                .as_ref()
                .is_some_and(|escrow| escrow.state == EscrowState::Withdrawn && escrow.last_sequence == 0);
            if forgotten {
                *slot = None;
            }
            match slot {
                Some(escrow) => self.table.insert(&*address.0, escrow.encode()?.as_slice())?,
                None => self.table.remove(&*address.0)?,
            };
        }
        Ok(self.touched)
    }
}
