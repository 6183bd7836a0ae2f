//! What a fork takes with it, and what cannot leave the chain.

use std::collections::HashSet;

use redb::{ReadableTable, Table};

use super::schema::{Entry, Kind, Remembered, decode};
use super::{StoreError, log};
use crate::event::BlockRef;

/// Keeps the hashes of unfinal blocks, and of the newest final one: every fork begins at or after it.
pub(super) fn forget_final(
    blocks: &mut Table<'_, u64, &'static [u8]>,
    finalized: Option<u64>,
) -> Result<(), StoreError> {
    if let Some(newest) = newest_final(blocks, finalized)? {
        blocks.retain_in(..newest, |_, _| false)?;
    }
    Ok(())
}

/// The newest remembered block that cannot leave the chain.
pub(super) fn newest_final(
    blocks: &impl ReadableTable<u64, &'static [u8]>,
    finalized: Option<u64>,
) -> Result<Option<u64>, StoreError> {
    let Some(finalized) = finalized else {
        return Ok(None);
    };
    let newest = blocks.range(..=finalized)?.next_back().transpose()?;
    Ok(newest.map(|(number, _)| number.value()))
}

/// Entries of blocks after `ancestor` stand at or after this position.
pub(super) fn log_end(
    blocks: &Table<'_, u64, &'static [u8]>,
    ancestor: Option<BlockRef>,
) -> Result<u64, StoreError> {
    let Some(ancestor) = ancestor else {
        return Ok(0);
    };
    let row = blocks.get(ancestor.number)?;
    let remembered: Option<Remembered> = row.map(|row| decode("blocks", row.value())).transpose()?;
    let remembered = remembered.filter(|remembered| remembered.hash == ancestor.hash);
    Ok(remembered.expect("an ancestor is one of the remembered blocks").log_end)
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Fate {
    Retract,
    Drop,
}

/// The events of blocks from `above` on that are still standing, newest first, and what becomes of each.
pub(super) fn doomed(
    table: &Table<'_, u64, &'static [u8]>,
    log_end: u64,
    above: u64,
    seen_below: u64,
) -> Result<Vec<(u64, Entry, Fate)>, StoreError> {
    let mut doomed = Vec::new();
    let mut retracted = HashSet::new();
    // Lanes with an entry that stays: what lies before it keeps its number, so it cannot be dropped.
    let mut kept = HashSet::new();
    for entry in log::entries(table, log_end..u64::MAX)?.rev() {
        let (position, entry) = entry?;
        match entry.kind {
            Kind::Retraction { of } => {
                retracted.insert(of);
                kept.insert(entry.escrow);
            }
            Kind::Event if entry.block_number < above || retracted.contains(&position) => {
                kept.insert(entry.escrow);
            }
            Kind::Event if position >= seen_below && !kept.contains(&entry.escrow) => {
                doomed.push((position, entry, Fate::Drop));
            }
            Kind::Event => {
                kept.insert(entry.escrow);
                doomed.push((position, entry, Fate::Retract));
            }
        }
    }
    Ok(doomed)
}
