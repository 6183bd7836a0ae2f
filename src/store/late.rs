//! History read once more: for signatures added to the configuration, and for escrows that became known late.
//!
//! A late read goes over blocks that were accepted before, from its first one up to the cursor, beside the reading of new
//! ones. Where it stands is committed together with what it found, so that after a crash nothing of it is read twice
//! or left out.

use std::collections::{BTreeMap, HashMap};

use alloy::primitives::{Address, B256};
use redb::{Database, ReadableDatabase, ReadableTable, ReadableTableMetadata, Table, WriteTransaction};

use super::lanes::Lanes;
use super::schema::{
    COUNTS_FROM, EVENT_LOG, Escrow, IDENTITY, Identity, LATE_READS, LateRead, Life, MARKS, META, Progress,
    QUARANTINE, Quarantined, REGISTRY, STANDING, decode, encode,
};
use super::standing::{Standing, digest_at};
use super::{Store, StoreError, lock, log, quarantine, write_progress};
use crate::event::{BlockRef, Event};

/// What to do about signatures the configuration has and the store has not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Added {
    /// Read the history once more for them.
    Read,
    /// Relay their events from the next block on; earlier ones never.
    FromNow,
    /// Nothing: whoever opens the store only looks.
    Leave,
}

/// Blocks of the past, read once more.
#[derive(Debug, Default)]
pub struct LateStretch {
    /// Escrows that were not registered, with the block that announced each.
    pub announced: Vec<(Address, BlockRef)>,
    /// Escrows that are watched, with a block that announced them before the one they are known from.
    pub announced_earlier: Vec<(Address, BlockRef)>,
    /// Events in the order of [`Event::order`].
    pub events: Vec<Event>,
    /// Logs that do not decode.
    pub quarantined: Vec<Quarantined>,
    /// The first block not read.
    pub next: u64,
}

/// What an import did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Imported {
    /// Escrows that were not registered before.
    pub new: usize,
    /// Escrows that were, and stay as they are.
    pub known: usize,
}

type LateReads<'txn> = Table<'txn, u64, &'static [u8]>;

pub(super) fn load(db: &Database) -> Result<BTreeMap<u64, LateRead>, StoreError> {
    let mut all = BTreeMap::new();
    for row in db.begin_read()?.open_table(LATE_READS)?.iter()? {
        let (id, value) = row?;
        all.insert(id.value(), decode("late_reads", value.value())?);
    }
    Ok(all)
}

/// Takes added signatures into the identity and, if asked to, notes that their history has to be read.
pub(super) fn add_signatures(
    db: &Database,
    life: &mut Life,
    progress: &Progress,
    asked: &Identity,
    asked_for: Vec<String>,
    history: bool,
) -> Result<(), StoreError> {
    life.identity = asked.clone();
    let transaction = db.begin_write()?;
    if let (true, Some((to, _))) = (history, progress.cursor) {
        let read = LateRead { signatures: asked_for.clone(), next: progress.start_block, to };
        append(&mut transaction.open_table(LATE_READS)?, &read)?;
    }
    if let (false, Some((cursor, _))) = (history, progress.cursor) {
        let mut marks = transaction.open_table(MARKS)?;
        for signature in &asked_for {
            marks.insert(format!("{COUNTS_FROM}{signature}").as_str(), cursor + 1)?;
        }
    }
    transaction.open_table(META)?.insert(IDENTITY, encode(life)?.as_slice())?;
    transaction.commit()?;
    Ok(())
}

/// What was found late goes to the ends of its lanes. An event that stands already stays as it is.
pub(super) fn put_late(
    transaction: &WriteTransaction,
    lanes: &mut Lanes<'_>,
    progress: &mut Progress,
    id: u64,
    stretch: &LateStretch,
) -> Result<usize, StoreError> {
    // Also one that was new when it was found may have come to be read meanwhile, from a later block on.
    for (escrow, block) in stretch.announced.iter().chain(&stretch.announced_earlier) {
        lanes.announce_earlier(*escrow, *block, id)?;
    }
    let mut log = transaction.open_table(EVENT_LOG)?;
    let mut log = log::Appender::new(&mut log, progress.next_position);
    let mut standing = transaction.open_table(STANDING)?;
    let mut standing = Standing::of(&mut standing);
    let (before, mut entries) = (progress.next_position, lanes.entries());
    for event in &stretch.events {
        let key = (event.block.number, event.log_index);
        if standing.has(key)? {
            continue;
        }
        standing.put(key, event.digest)?;
        let sequence = lanes.number(event)?;
        log.append(&entries.entry(event, sequence, true))?;
    }
    progress.next_position = log.finish()?;
    standing.finish()?;
    let mut odd = transaction.open_table(QUARANTINE)?;
    if !odd.is_empty()? {
        // What decodes by now is odd no more.
        for event in &stretch.events {
            odd.remove((event.block.number, event.log_index))?;
        }
    }
    drop(odd);
    quarantine(transaction, &stretch.quarantined)?;
    Ok((progress.next_position - before) as usize)
}

pub(super) fn append(table: &mut LateReads<'_>, read: &LateRead) -> Result<u64, StoreError> {
    let id = table.last()?.map_or(0, |(id, _)| id.value() + 1);
    table.insert(id, encode(read)?.as_slice())?;
    Ok(id)
}

/// After a fork what was read above it is read again: by the late read for escrows that join, and by the scanner,
/// which knows the added signatures, for all that are watched.
pub(super) fn go_back(
    transaction: &WriteTransaction,
    lanes: &mut Lanes<'_>,
    uncovered: Vec<Address>,
    above: u64,
) -> Result<(), StoreError> {
    for escrow in uncovered {
        lanes.cover(escrow, above)?;
    }
    let mut table = transaction.open_table(LATE_READS)?;
    let mut changed = Vec::new();
    for row in table.iter()? {
        let (id, value) = row?;
        let mut read: LateRead = decode("late_reads", value.value())?;
        if read.next > above || read.to >= above {
            read.next = read.next.min(above);
            read.to = read.to.min(above.saturating_sub(1));
            changed.push((id.value(), read));
        }
    }
    for (id, read) in changed {
        table.insert(id, encode(&read)?.as_slice())?;
    }
    Ok(())
}

impl Store {
    /// The late read to go on with, and its number.
    pub fn late_read(&self) -> Option<(u64, LateRead)> {
        lock(&self.late_reads).first_key_value().map(|(id, read)| (*id, read.clone()))
    }

    /// Those whose turn comes after that one.
    pub fn late_reads_after(&self, id: u64) -> Vec<LateRead> {
        lock(&self.late_reads).range(id + 1..).map(|(_, read)| read.clone()).collect()
    }

    /// Whether another log was accepted where one of these stands, in a block that may have left the chain: then the node is on
    /// another fork than what was read, and what it says of an escrow's announcement would never be withdrawn.
    pub fn is_of_another_fork(&self, stretch: &LateStretch) -> Result<bool, StoreError> {
        let finalized = lock(&self.progress).finalized;
        let read = self.db.begin_read()?;
        let standing = read.open_table(STANDING)?;
        for event in stretch.events.iter().filter(|event| Some(event.block.number) > finalized) {
            let accepted = digest_at(&standing, (event.block.number, event.log_index))?;
            if accepted.is_some_and(|digest| digest != event.digest) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Commits what a late read found and where it stands. `true`: it is done, and its escrows are watched.
    pub fn accept_late(&self, id: u64, stretch: &LateStretch) -> Result<bool, StoreError> {
        let _writing = lock(&self.writer);
        let mut late_reads = lock(&self.late_reads).clone();
        let read = late_reads.get_mut(&id).expect("a late read that is stored");
        let mut progress = lock(&self.progress).clone();
        let transaction = self.db.begin_write()?;
        let (changed, done) = {
            let mut lanes = Lanes::open(self, &transaction)?;
            put_late(&transaction, &mut lanes, &mut progress, id, stretch)?;
            read.next = stretch.next;
            let registry = self.registry();
            let found = stretch.announced.iter().map(|(escrow, _)| *escrow);
            let joining: Vec<Address> = registry.joining(id).map(|(escrow, _)| escrow).chain(found).collect();
            let found = stretch.announced_earlier.iter().map(|(escrow, _)| *escrow);
            let uncovered: Vec<Address> =
                registry.uncovered().map(|(escrow, _)| escrow).chain(found).collect();
            // The lanes look into it, too.
            drop(registry);
            let mut done = read.next > read.to;
            for escrow in uncovered {
                done &= lanes.cover_upto(escrow, read.next)?;
            }
            done &= joining.is_empty() || read.next >= next_block(&progress);
            let mut table = transaction.open_table(LATE_READS)?;
            if done {
                for escrow in joining {
                    lanes.joined(escrow)?;
                }
                table.remove(id)?;
            } else {
                table.insert(id, encode(read)?.as_slice())?;
            }
            write_progress(&transaction, &progress)?;
            (lanes.close()?, done)
        };
        transaction.commit()?;
        if done {
            late_reads.remove(&id);
        }
        *lock(&self.late_reads) = late_reads;
        self.moved(progress, changed, 0);
        Ok(done)
    }

    /// Registers escrows whose events count from block `from` on, which must not lie beyond the next block to read. Their
    /// history up to there is read before they are watched. For a store that nobody reads into meanwhile.
    pub fn import(&self, escrows: &[Address], from: u64) -> Result<Imported, StoreError> {
        let imported = self.register(escrows, from, true)?;
        Ok(imported.unwrap_or_else(|| panic!("block {from} was not reached")))
    }

    /// The same beside a scanner: only between two of its steps may an escrow come to be watched, so the late read does that
    /// also where there is no history. `None`: a fork has just taken the store back below `from`.
    pub fn import_beside(&self, escrows: &[Address], from: u64) -> Result<Option<Imported>, StoreError> {
        self.register(escrows, from, false)
    }

    fn register(
        &self,
        escrows: &[Address],
        from: u64,
        nobody_reads: bool,
    ) -> Result<Option<Imported>, StoreError> {
        let _writing = lock(&self.writer);
        let progress = lock(&self.progress).clone();
        let next_block = next_block(&progress);
        if from > next_block {
            return Ok(None);
        }
        let at_once = nobody_reads && from == next_block;
        let block = BlockRef { number: from, hash: B256::ZERO };
        let transaction = self.db.begin_write()?;
        let mut new = 0;
        let changed = {
            let read = LateRead { signatures: Vec::new(), next: from, to: 0 };
            let id = append(&mut transaction.open_table(LATE_READS)?, &read)?;
            let mut lanes = Lanes::open(self, &transaction)?;
            for escrow in escrows {
                if lanes.join(*escrow, block, id)? {
                    new += 1;
                    if at_once {
                        lanes.joined(*escrow)?;
                    }
                }
            }
            if new == 0 || at_once {
                transaction.open_table(LATE_READS)?.remove(id)?;
            }
            lanes.close()?
        };
        transaction.commit()?;
        *lock(&self.late_reads) = load(&self.db)?;
        self.moved(progress, changed, 0);
        Ok(Some(Imported { new, known: escrows.len() - new }))
    }

    /// The registry's rows of these escrows.
    pub fn escrows_of(&self, addresses: &[Address]) -> Result<HashMap<Address, Escrow>, StoreError> {
        let read = self.db.begin_read()?;
        let table = read.open_table(REGISTRY)?;
        let mut rows = HashMap::new();
        for address in addresses {
            if let Some(row) = table.get(&*address.0)? {
                rows.insert(*address, Escrow::decode(row.value())?);
            }
        }
        Ok(rows)
    }

    /// At most `limit` escrows, those first whose events were stored last.
    pub fn recent_escrows(&self, limit: usize) -> Result<Vec<Address>, StoreError> {
        let read = self.db.begin_read()?;
        let mut recent = Vec::new();
        // Each may have many events: a bounded look back has to do.
        for entry in log::entries(&read.open_table(EVENT_LOG)?, 0..u64::MAX)?.rev().take(20 * limit) {
            let (_, entry) = entry?;
            if recent.len() < limit && !recent.contains(&entry.escrow) {
                recent.push(entry.escrow);
            }
        }
        Ok(recent)
    }

    /// Every row of the registry, by address.
    pub fn escrows(&self) -> Result<Vec<(Address, Escrow)>, StoreError> {
        let mut rows = Vec::new();
        for row in self.db.begin_read()?.open_table(REGISTRY)?.iter()? {
            let (address, value) = row?;
            rows.push((Address::from(*address.value()), Escrow::decode(value.value())?));
        }
        Ok(rows)
    }
}

fn next_block(progress: &Progress) -> u64 {
    progress.cursor.map_or(progress.start_block, |(number, _)| number + 1)
}
