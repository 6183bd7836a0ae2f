//! The registry in memory: which addresses are watched, and which will be once their history is read.

use std::collections::{BTreeMap, BTreeSet};

use alloy::primitives::Address;
use alloy::primitives::map::{AddressMap, AddressSet};
use redb::ReadableTable;
use serde::{Deserialize, Serialize};

use super::StoreError;
use super::schema::{Escrow, EscrowState};
use crate::event::Addresses;

/// Addresses kept together as one list: with the factory as many as geth takes in one filter.
pub const CHUNK: usize = 999;

/// Escrows by their state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Census {
    /// Asked for at each new block.
    pub watched: usize,
    /// Known late: their history is being read.
    pub joining: usize,
    /// Long at their end, not asked for.
    pub archived: usize,
    /// Their announcement left the chain.
    pub withdrawn: usize,
}

/// Every escrow registered, an address once.
#[derive(Debug, Default)]
pub struct Registry {
    /// Place of each that is watched: which of `chunks`, and where in it.
    places: AddressMap<u32>,
    /// All are full but the last.
    chunks: Vec<Addresses>,
    /// Watched since the store was opened, in the order in which they came, after the first `forgotten`.
    arrived: Vec<Address>,
    forgotten: u64,
    /// Long at their end: nobody asks for them, but what they emit counts.
    archived: AddressSet,
    /// Their announcement left the chain: few, and kept to be counted.
    withdrawn: AddressSet,
    /// Watched ones by the block that ended them; also some that have gone on since.
    ended: BTreeSet<(u64, Address)>,
    /// Escrows that are joining: the late read that reads them, and the first block of theirs that counts.
    joining: BTreeMap<Address, (u64, u64)>,
    /// Watched escrows whose earlier announcement was found late: its block, and the first block that was read.
    uncovered: BTreeMap<Address, (u64, u64)>,
    /// Escrows that were imported: the first block of theirs that counts, which no announcement says.
    imported: BTreeMap<Address, u64>,
}

impl Registry {
    pub(super) fn load(
        table: &impl ReadableTable<&'static [u8; 20], &'static [u8]>,
    ) -> Result<Self, StoreError> {
        let rows = usize::try_from(table.len()?).unwrap_or(0);
        let mut registry = Self::default();
        // Grown step by step it would leave as much behind as it takes.
        registry.places.reserve(rows);
        registry.chunks.reserve(rows.div_ceil(CHUNK));
        for row in table.iter()? {
            let (address, value) = row?;
            registry.set(Address::from(*address.value()), Some(&Escrow::decode(value.value())?));
            registry.forget_arrivals();
        }
        Ok(registry)
    }

    /// Makes memory agree with a row that was committed.
    pub(super) fn set(&mut self, address: Address, row: Option<&Escrow>) {
        match row.filter(|escrow| escrow.is_imported()) {
            Some(escrow) => self.imported.insert(address, escrow.covered_from),
            None => self.imported.remove(&address),
        };
        match row.filter(|it| it.state == EscrowState::Active && it.announced.0 < it.covered_from) {
            Some(escrow) => self.uncovered.insert(address, (escrow.announced.0, escrow.covered_from)),
            None => self.uncovered.remove(&address),
        };
        match row.map(|escrow| (escrow.state, escrow.covered_from)) {
            Some((EscrowState::Joining { late_read }, from)) => {
                self.joining.insert(address, (late_read, from));
            }
            Some((EscrowState::Active | EscrowState::Withdrawn | EscrowState::Archived, _)) | None => {
                self.joining.remove(&address);
            }
        }
        match row.is_some_and(|escrow| escrow.state == EscrowState::Archived) {
            true => self.archived.insert(address),
            false => self.archived.remove(&address),
        };
        match row.is_some_and(|escrow| escrow.state == EscrowState::Withdrawn) {
            true => self.withdrawn.insert(address),
            false => self.withdrawn.remove(&address),
        };
        let active = row.filter(|escrow| escrow.state == EscrowState::Active);
        self.ended.extend(active.and_then(|escrow| escrow.ended).map(|block| (block, address)));
        match (active.is_some(), self.places.get(&address).copied()) {
            (true, None) => self.watch(address),
            (false, Some(place)) => self.unwatch(address, place as usize),
            (true, Some(_)) | (false, None) => {}
        }
    }

    fn watch(&mut self, address: Address) {
        self.places.insert(address, self.places.len() as u32);
        if self.chunks.last().is_none_or(|chunk| chunk.len() == CHUNK) {
            self.chunks.push(Vec::with_capacity(CHUNK).into());
        }
        let last = self.chunks.last_mut().expect("just made");
        last.change(|list| list.push(address));
        self.arrived.push(address);
    }

    /// The last one takes its place.
    fn unwatch(&mut self, address: Address, place: usize) {
        let mut moved = None;
        let last = self.chunks.last_mut().expect("whoever has a place is in a chunk");
        last.change(|list| moved = list.pop());
        if last.is_empty() {
            self.chunks.pop();
        }
        self.places.remove(&address);
        let moved = moved.expect("no chunk is empty");
        if moved != address {
            self.places.insert(moved, place as u32);
            self.chunks[place / CHUNK].change(|list| list[place % CHUNK] = moved);
        }
    }

    /// Whether the address is registered and joins no more.
    pub fn contains(&self, address: &Address) -> bool {
        self.places.contains_key(address) || self.archived.contains(address)
    }

    /// Whether it is asked for.
    pub fn is_watched(&self, address: &Address) -> bool {
        self.places.contains_key(address)
    }

    /// Whether nobody asks for it, since its end is long final.
    pub fn is_archived(&self, address: &Address) -> bool {
        self.archived.contains(address)
    }

    /// Whether the registry has a row for it, in whatever state.
    pub(super) fn has_row(&self, address: &Address) -> bool {
        self.contains(address) || self.is_joining(address) || self.withdrawn.contains(address)
    }

    /// Whether a log of this address in this block is an event of a registered escrow.
    pub fn counts(&self, address: &Address, block: u64) -> bool {
        self.contains(address) && self.imported.get(address).is_none_or(|from| block >= *from)
    }

    /// Whether the address is registered, and its history is still being read.
    pub fn is_joining(&self, address: &Address) -> bool {
        self.joining.contains_key(address)
    }

    /// The escrows whose history that late read fetches, each with the first block of its that counts.
    pub fn joining(&self, late_read: u64) -> impl Iterator<Item = (Address, u64)> {
        let of_it = self.joining.iter().filter(move |(_, (read, _))| *read == late_read);
        of_it.map(|(address, (_, from))| (*address, *from))
    }

    /// Watched escrows with blocks that a late read has yet to read: the first of these, and the first one after them.
    pub fn uncovered(&self) -> impl Iterator<Item = (Address, (u64, u64))> {
        self.uncovered.iter().map(|(address, blocks)| (*address, *blocks))
    }

    /// How many are registered.
    pub fn len(&self) -> usize {
        self.places.len() + self.archived.len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many are watched: registered and not archived.
    pub fn watched_len(&self) -> usize {
        self.places.len()
    }

    /// How many there are in each state.
    pub fn census(&self) -> Census {
        Census {
            watched: self.places.len(),
            joining: self.joining.len(),
            archived: self.archived.len(),
            withdrawn: self.withdrawn.len(),
        }
    }

    /// All that are watched, in lists of [`CHUNK`], shared: as they were when asked.
    pub fn chunks(&self) -> &[Addresses] {
        &self.chunks
    }

    /// All that are watched.
    pub fn watched(&self) -> impl Iterator<Item = Address> {
        self.chunks.iter().flat_map(|chunk| chunk.list().iter().copied())
    }

    /// All that are registered.
    pub fn registered(&self) -> impl Iterator<Item = Address> {
        self.watched().chain(self.archived.iter().copied())
    }

    /// One of those that are watched.
    pub fn nth_watched(&self, nth: usize) -> Address {
        self.chunks[nth / CHUNK].list()[nth % CHUNK]
    }

    /// How many have come to be watched since the store was opened.
    pub fn arrivals(&self) -> u64 {
        self.forgotten + self.arrived.len() as u64
    }

    /// Those that came after the first `count`.
    pub fn arrived_after(&self, count: u64) -> &[Address] {
        let known = usize::try_from(count.saturating_sub(self.forgotten)).unwrap_or(usize::MAX);
        self.arrived.get(known..).unwrap_or_default()
    }

    /// Nobody will ask for those that have come so far.
    pub(super) fn forget_arrivals(&mut self) {
        self.forgotten = self.arrivals();
        // A few come again soon; the room that many took is given back.
        if self.arrived.capacity() > CHUNK {
            self.arrived = Vec::new();
        }
        self.arrived.clear();
    }

    /// Watched escrows that ended in block `last` or before, at most `limit`; some may have gone on since.
    pub(super) fn ended_upto(&self, last: u64, limit: usize) -> Vec<(u64, Address)> {
        self.ended.iter().take_while(|(block, _)| *block <= last).take(limit).copied().collect()
    }

    /// These need not be looked at again.
    pub(super) fn forget_ended(&mut self, ended: &[(u64, Address)]) {
        for it in ended {
            self.ended.remove(it);
        }
    }
}
