//! What a status shows of the store: cheap to ask for, however much it holds.

use redb::{ReadableDatabase, ReadableTableMetadata};

use super::runs::{run_end, watermark};
use super::schema::{ACKNOWLEDGED, EVENT_LOG, Entry, LateRead, MARKS, QUARANTINE};
use super::{Store, StoreError, lock, log};

/// Entries not acknowledged that are looked through for the oldest that waits, at most.
const LOOKED_THROUGH: usize = 5_000;

impl Store {
    /// The oldest entry that is not acknowledged.
    pub fn oldest_waiting(&self) -> Result<Option<Entry>, StoreError> {
        self.oldest_waiting_but(|_| false)
    }

    /// The oldest that is not acknowledged and not `left_out`; `None` also if very many before it are.
    pub fn oldest_waiting_but(&self, left_out: impl Fn(&Entry) -> bool) -> Result<Option<Entry>, StoreError> {
        let read = self.db.begin_read()?;
        let acknowledged = read.open_table(ACKNOWLEDGED)?;
        let watermark = watermark(&read.open_table(MARKS)?)?;
        let log = read.open_table(EVENT_LOG)?;
        let (mut entries, mut looked_through) = (log::entries(&log, watermark..u64::MAX)?, 0);
        while let Some(entry) = entries.next() {
            let (position, entry) = entry?;
            if let Some(end) = run_end(&acknowledged, position)? {
                // One that is left out holds the watermark, however much is acknowledged behind it.
                entries = log::entries(&log, end..u64::MAX)?;
                continue;
            }
            if !left_out(&entry) {
                return Ok(Some(entry));
            }
            looked_through += 1;
            if looked_through == LOOKED_THROUGH {
                break;
            }
        }
        Ok(None)
    }

    /// The last entries, at most `limit`, the newest first.
    pub fn newest(&self, limit: usize) -> Result<Vec<Entry>, StoreError> {
        let read = self.db.begin_read()?;
        let log = read.open_table(EVENT_LOG)?;
        log::entries(&log, 0..u64::MAX)?.rev().take(limit).map(|entry| Ok(entry?.1)).collect()
    }

    /// How many logs that did not decode are kept.
    pub fn quarantined_len(&self) -> Result<u64, StoreError> {
        Ok(self.db.begin_read()?.open_table(QUARANTINE)?.len()?)
    }

    /// All late reads under way, in the order of their turns.
    pub fn late_reads(&self) -> Vec<LateRead> {
        lock(&self.late_reads).values().cloned().collect()
    }
}
