//! Which events stand, and what each says: a row for each block, since a row costs more than the bytes in it.
//!
//! A row holds one event at least: of each its log index and its digest, eight bytes little-endian each, ascending by log
//! index.

use redb::{ReadableTable, Table};

use super::schema::{VALUE_VERSION, damaged};
use super::{Place, StoreError};
use crate::event::BlockRange;

/// Of an event in a row, in bytes.
const WIDTH: usize = 16;

/// An event's log index and digest.
type Said = (u64, u64);
type StandingTable<'txn> = Table<'txn, u64, &'static [u8]>;

/// Changes what stands. What was changed is there once [`finish`](Self::finish) was called; cheapest block after block.
pub(super) struct Standing<'a, 'txn> {
    table: &'a mut StandingTable<'txn>,
    /// The block at hand, and its events.
    block: Option<u64>,
    events: Vec<Said>,
    changed: bool,
}

impl<'a, 'txn> Standing<'a, 'txn> {
    pub fn of(table: &'a mut StandingTable<'txn>) -> Self {
        Self { table, block: None, events: Vec::new(), changed: false }
    }

    /// Whether an event stands there.
    pub fn has(&mut self, (block, index): Place) -> Result<bool, StoreError> {
        self.turn_to(block)?;
        Ok(self.find(index).is_ok())
    }

    /// Notes that an event stands there, and what it says.
    pub fn put(&mut self, (block, index): Place, digest: u64) -> Result<(), StoreError> {
        self.turn_to(block)?;
        self.changed = true;
        match self.find(index) {
            Ok(found) => self.events[found].1 = digest,
            Err(place) => self.events.insert(place, (index, digest)),
        }
        Ok(())
    }

    /// Forgets that one stands there.
    pub fn remove(&mut self, (block, index): Place) -> Result<(), StoreError> {
        self.turn_to(block)?;
        if let Ok(found) = self.find(index) {
            self.changed = true;
            self.events.remove(found);
        }
        Ok(())
    }

    /// Where the event is, or belongs. Most come in order.
    fn find(&self, index: u64) -> Result<usize, usize> {
        match self.events.last() {
            Some((last, _)) if *last >= index => {
                self.events.binary_search_by_key(&index, |(index, _)| *index)
            }
            Some(_) | None => Err(self.events.len()),
        }
    }

    fn turn_to(&mut self, block: u64) -> Result<(), StoreError> {
        if self.block == Some(block) {
            return Ok(());
        }
        self.write()?;
        self.events.clear();
        if let Some(row) = self.table.get(block)? {
            self.events.extend(unpack(block, row.value())?);
        }
        self.block = Some(block);
        Ok(())
    }

    fn write(&mut self) -> Result<(), StoreError> {
        let Some(block) = self.block.filter(|_| std::mem::take(&mut self.changed)) else {
            return Ok(());
        };
        if self.events.is_empty() {
            self.table.remove(block)?;
            return Ok(());
        }
        let mut row = self.table.insert_reserve(block, 1 + WIDTH * self.events.len())?;
        let (version, events) = row.as_mut().split_first_mut().expect("it has a first byte");
        *version = VALUE_VERSION;
        for (place, (index, digest)) in events.chunks_exact_mut(WIDTH).zip(&self.events) {
            let (of_index, of_digest) = place.split_at_mut(WIDTH / 2);
            of_index.copy_from_slice(&index.to_le_bytes());
            of_digest.copy_from_slice(&digest.to_le_bytes());
        }
        Ok(())
    }

    /// Writes what is not written yet.
    pub fn finish(mut self) -> Result<(), StoreError> {
        self.write()
    }
}

/// The events of a row.
fn unpack(block: u64, row: &[u8]) -> Result<impl Iterator<Item = Said>, StoreError> {
    let events = match row {
        [VALUE_VERSION, events @ ..] if !events.is_empty() && events.len().is_multiple_of(WIDTH) => events,
        _ => return Err(damaged("standing", format!("the row of block {block} has {} bytes", row.len()))),
    };
    let number = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
    Ok(events
        .chunks_exact(WIDTH)
        .map(move |event| (number(&event[..WIDTH / 2]), number(&event[WIDTH / 2..]))))
}

/// What the event says that stands there; `None`: none does.
pub(super) fn digest_at(
    table: &impl ReadableTable<u64, &'static [u8]>,
    (block, index): Place,
) -> Result<Option<u64>, StoreError> {
    let Some(row) = table.get(block)? else {
        return Ok(None);
    };
    Ok(unpack(block, row.value())?.find(|(at, _)| *at == index).map(|(_, digest)| digest))
}

/// How many events stand in these blocks.
pub(super) fn count_in(
    table: &impl ReadableTable<u64, &'static [u8]>,
    blocks: BlockRange,
) -> Result<u64, StoreError> {
    let mut count = 0;
    for row in table.range(blocks.from()..=blocks.to())? {
        let (block, row) = row?;
        count += unpack(block.value(), row.value())?.count() as u64;
    }
    Ok(count)
}

/// The events that stand in these blocks, in order, and what each says.
pub(super) fn standing_in(
    table: &impl ReadableTable<u64, &'static [u8]>,
    blocks: BlockRange,
) -> Result<Vec<(Place, u64)>, StoreError> {
    let mut events = Vec::new();
    for row in table.range(blocks.from()..=blocks.to())? {
        let (block, row) = row?;
        let block = block.value();
        events.extend(unpack(block, row.value())?.map(|(index, digest)| ((block, index), digest)));
    }
    Ok(events)
}
