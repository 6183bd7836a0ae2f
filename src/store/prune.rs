//! Pruning: entries that nobody needs any more.

use redb::{ReadableDatabase, ReadableTable};

use super::claims::stored_group;
use super::opening::now_micros;
use super::runs::watermark;
use super::schema::{EVENT_LOG, MARKS, PRUNED_BLOCK};
use super::{Store, StoreError, lock, log};

impl Store {
    /// Removes the oldest entries, at most `limit`, as far as they are acknowledged, final, and older than `retention`
    /// seconds. Returns how many.
    ///
    /// A fork looks at entries of blocks after the newest final one only, and a late read at none: both go on without
    /// these. Positions are not used again.
    pub fn prune(&self, retention: u64, limit: usize) -> Result<usize, StoreError> {
        let Some(finalized) = self.finalized() else {
            return Ok(0);
        };
        // Nothing that a publisher of this process still has to pass.
        let mut upto = lock(&self.claims).next;
        let stored_before = (now_micros() / 1_000_000).saturating_sub(retention);
        let read = self.db.begin_read()?;
        let watermark = watermark(&read.open_table(MARKS)?)?;
        // Nor of a group that is handed out: where its escrows begin says in which order.
        if let Some(group) = stored_group(&read)?.filter(|group| group.contains(&watermark)) {
            upto = upto.min(group.start);
        }
        let (mut end, mut count, mut newest_block, mut newest_seen) = (None, 0, 0, 0);
        let mut looked_at = 0;
        for entry in log::entries(&read.open_table(EVENT_LOG)?, 0..watermark.min(upto))?.take(limit) {
            let (position, entry) = entry?;
            if entry.block_number > finalized {
                break;
            }
            looked_at += 1;
            newest_seen = newest_seen.max(entry.block_number);
            // One that seems young was stored before those after it: the clock was ahead then.
            if entry.stored_at <= stored_before {
                (end, count, newest_block) = (Some(position + 1), looked_at, newest_seen);
            }
        }
        drop(read);
        let Some(end) = end else {
            return Ok(0);
        };
        let transaction = self.db.begin_write()?;
        log::remove_below(&mut transaction.open_table(EVENT_LOG)?, end)?;
        {
            let mut marks = transaction.open_table(MARKS)?;
            let before = marks.get(PRUNED_BLOCK)?.map_or(0, |mark| mark.value());
            marks.insert(PRUNED_BLOCK, newest_block.max(before))?;
        }
        transaction.commit()?;
        Ok(count)
    }

    /// The first block whose events are all still in the log: some of earlier ones were pruned.
    pub fn whole_from(&self) -> Result<u64, StoreError> {
        let read = self.db.begin_read()?;
        let pruned = read.open_table(MARKS)?.get(PRUNED_BLOCK)?.map(|mark| mark.value());
        Ok(pruned.map_or(0, |block| block + 1).max(self.start_block()))
    }
}
