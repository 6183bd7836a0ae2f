//! Looking at the store page by page: what commands show, beside a run or on a file. Nothing here changes anything, and no
//! page holds more than it was asked for.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use alloy::primitives::Address;
use redb::ReadableDatabase;

use super::audit::Place;
use super::schema::{EVENT_LOG, MARKS, PRUNED_BLOCK, QUARANTINE, REGISTRY, STANDING, UNAUDITED, decode};
use super::standing::{count_in, digest_at, standing_in};
use super::{Acknowledged, Claimed, Escrow, Kind, Quarantined, Store, StoreError, log};
use crate::event::BlockRange;

/// Bodies in one page, at most, in bytes, unless one alone has more.
const PAGE_BYTES: usize = 4 << 20;

/// Some entries of the log, and where to look on; `None`: that was all.
#[derive(Debug)]
pub struct Page {
    /// In log order.
    pub entries: Vec<Claimed>,
    /// The position after the last one looked at.
    pub next: Option<u64>,
}

impl Store {
    /// At most `limit` entries of the log from a position on.
    pub fn entries_from(&self, position: u64, limit: usize) -> Result<Page, StoreError> {
        let read = self.db.begin_read()?;
        let log = read.open_table(EVENT_LOG)?;
        let (mut entries, mut bytes, mut next) = (Vec::new(), 0, None);
        for found in log::entries(&log, position..u64::MAX)? {
            let (position, entry) = found?;
            if entries.len() == limit || bytes >= PAGE_BYTES {
                next = Some(position);
                break;
            }
            bytes += entry.body.len();
            entries.push(Claimed { position, entry });
        }
        Ok(Page { entries, next })
    }

    /// What is acknowledged now.
    pub fn acknowledged(&self) -> Result<Acknowledged, StoreError> {
        Acknowledged::among(&self.db.begin_read()?, 0..u64::MAX)
    }

    /// At most `limit` rows of the registry, by address, after that one.
    pub fn escrows_after(
        &self,
        after: Option<Address>,
        limit: usize,
    ) -> Result<Vec<(Address, Escrow)>, StoreError> {
        let read = self.db.begin_read()?;
        let table = read.open_table(REGISTRY)?;
        let after = after.map(|address| *address.0);
        let from = after.as_ref().map_or(Bound::Unbounded, Bound::Excluded);
        let mut rows = Vec::new();
        for row in table.range::<&[u8; 20]>((from, Bound::Unbounded))?.take(limit) {
            let (address, value) = row?;
            rows.push((Address::from(*address.value()), Escrow::decode(value.value())?));
        }
        Ok(rows)
    }

    /// At most `limit` logs that did not decode, in chain order, after that place.
    pub fn quarantined_after(
        &self,
        after: Option<Place>,
        limit: usize,
    ) -> Result<Vec<Quarantined>, StoreError> {
        let read = self.db.begin_read()?;
        let table = read.open_table(QUARANTINE)?;
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let mut rows = Vec::new();
        for row in table.range((from, Bound::Unbounded))?.take(limit) {
            rows.push(decode("quarantine", row?.1.value())?);
        }
        Ok(rows)
    }

    /// The first stretch of `blocks` that was read one way: whether that was by hash and not by range again since.
    pub fn read_one_way(&self, blocks: BlockRange) -> Result<(BlockRange, bool), StoreError> {
        let read = self.db.begin_read()?;
        let (from, to) = (blocks.from(), blocks.to());
        let mut by_hash = None;
        for run in read.open_table(UNAUDITED)?.range(..=to)?.rev() {
            let (start, end) = run?;
            if end.value() <= from {
                break;
            }
            by_hash = Some((start.value(), end.value()));
        }
        let (last, is_by_hash) = match by_hash {
            None => (to, false),
            Some((start, _)) if start > from => (start - 1, false),
            Some((_, end)) => (to.min(end - 1), true),
        };
        Ok((BlockRange::new(from, last).expect("the first of the blocks is in it"), is_by_hash))
    }

    /// Events that stand in these blocks, and whose messages the log lacks, though they are of blocks of which nothing was
    /// pruned: that is damage. Two numbers say that there are none; only if they differ these events are looked for.
    pub fn unkept(&self, blocks: BlockRange) -> Result<Vec<Place>, StoreError> {
        let read = self.db.begin_read()?;
        let pruned = read.open_table(MARKS)?.get(PRUNED_BLOCK)?.map(|mark| mark.value());
        let Some(blocks) = blocks.tail(pruned.map_or(0, |block| block + 1)) else {
            return Ok(Vec::new());
        };
        let (log, standing) = (read.open_table(EVENT_LOG)?, read.open_table(STANDING)?);
        let mut balance = count_in(&standing, blocks)? as i64;
        let each = |look: &mut dyn FnMut(Place, Kind)| -> Result<(), StoreError> {
            for found in log::entries(&log, 0..u64::MAX)? {
                let (_, entry) = found?;
                if blocks.contains(entry.block_number) {
                    look((entry.block_number, entry.log_index), entry.kind);
                }
            }
            Ok(())
        };
        each(&mut |_, kind| match kind {
            Kind::Event => balance -= 1,
            Kind::Retraction { .. } => balance += 1,
        })?;
        if balance == 0 {
            return Ok(Vec::new());
        }
        let mut kept = BTreeSet::new();
        each(&mut |place, kind| match kind {
            Kind::Event => drop(kept.insert(place)),
            Kind::Retraction { .. } => drop(kept.remove(&place)),
        })?;
        let standing = standing_in(&standing, blocks)?;
        Ok(standing.into_iter().map(|(place, _)| place).filter(|place| !kept.contains(place)).collect())
    }

    /// The places among these where an event stands, its message kept or not.
    pub fn standing_among(&self, places: &[Place]) -> Result<BTreeSet<Place>, StoreError> {
        let read = self.db.begin_read()?;
        let table = read.open_table(STANDING)?;
        let mut standing = BTreeSet::new();
        for place in places {
            if digest_at(&table, *place)?.is_some() {
                standing.insert(*place);
            }
        }
        Ok(standing)
    }

    /// The events that stand at these places, as far as the log still has them.
    pub fn standing_at(&self, places: &[Place]) -> Result<BTreeMap<Place, Claimed>, StoreError> {
        let mut standing = BTreeMap::new();
        let mut next = (!places.is_empty()).then_some(0);
        while let Some(position) = next {
            let page = self.entries_from(position, 10_000)?;
            for claimed in page.entries {
                let place = (claimed.entry.block_number, claimed.entry.log_index);
                if places.contains(&place) {
                    match claimed.entry.kind {
                        Kind::Event => standing.insert(place, claimed),
                        Kind::Retraction { .. } => standing.remove(&place),
                    };
                }
            }
            next = page.next;
        }
        Ok(standing)
    }
}
