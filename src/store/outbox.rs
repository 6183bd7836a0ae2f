//! What does not get out by itself: messages that the sink refuses, and logs that do not decode. Which messages these are
//! is kept in the store, so that they can be named, and given up, also while no relayer runs.

use std::sync::atomic::Ordering;

use redb::{ReadableDatabase, ReadableTable, ReadableTableMetadata, WriteTransaction};

use super::audit::Place;
use super::lanes::Lanes;
use super::late::{LateStretch, append, load, put_late};
use super::opening::now_micros;
use super::runs::{acknowledge, run_end, watermark};
use super::schema::{
    ACKNOWLEDGED, BLOCKED, LATE_READS, LateRead, MARKS, QUARANTINE, Refusal, decode, encode,
};
use super::{Claimed, Quarantined, Store, StoreError, lock, write_progress};
use crate::event::{BlockRef, event_id};

/// Which log: its block, and its index in there.
pub type LogId = (BlockRef, u64);

/// A message that is refused.
#[derive(Clone, Debug)]
pub struct Blocked {
    /// The message.
    pub claimed: Claimed,
    /// Why it is.
    pub refusal: Refusal,
}

impl Store {
    /// Records what became of messages: `acknowledged` ones are done, `refused` ones block their lanes.
    pub fn settle(
        &self,
        mut acknowledged: Vec<u64>,
        refused: &[(u64, String, String)],
    ) -> Result<(), StoreError> {
        if acknowledged.is_empty() && refused.is_empty() {
            return Ok(());
        }
        let transaction = self.db.begin_write()?;
        // First: what was refused may have been taken since.
        for (position, lane, reason) in refused {
            if is_acknowledged(&transaction, *position)? {
                continue;
            }
            let mut table = transaction.open_table(BLOCKED)?;
            let before: Option<Refusal> =
                table.get(position)?.map(|row| decode("blocked", row.value())).transpose()?;
            let since = before.map_or(now_micros() / 1_000_000, |before| before.since);
            let refusal = Refusal { lane: lane.clone(), reason: reason.clone(), since };
            table.insert(position, encode(&refusal)?.as_slice())?;
        }
        acknowledge(&transaction, &mut acknowledged)?;
        unblock(&transaction, &acknowledged)?;
        transaction.commit()?;
        self.waiting.fetch_sub(acknowledged.len() as u64, Ordering::AcqRel);
        self.measure(None);
        Ok(())
    }

    /// What `look` takes of the messages that are refused, oldest first. One at a time is in memory: they may be large.
    pub fn blocked<T>(&self, mut look: impl FnMut(Blocked) -> Option<T>) -> Result<Vec<T>, StoreError> {
        let read = self.db.begin_read()?;
        let mut taken = Vec::new();
        for row in read.open_table(BLOCKED)?.iter()? {
            let (position, value) = row?;
            let refusal = decode("blocked", value.value())?;
            let entry = self.entries_from(position.value(), 1)?.entries.pop();
            // It may have been given up meanwhile, and pruned.
            if let Some(claimed) = entry.filter(|claimed| claimed.position == position.value()) {
                taken.extend(look(Blocked { claimed, refusal }));
            }
        }
        Ok(taken)
    }

    /// How many messages are refused.
    pub fn blocked_len(&self) -> Result<u64, StoreError> {
        Ok(self.db.begin_read()?.open_table(BLOCKED)?.len()?)
    }

    /// Gives up a message that is refused: it counts as done, though nobody has it. `false`: it is refused no more. Whoever
    /// publishes must have let go of it.
    pub fn give_up(&self, position: u64) -> Result<bool, StoreError> {
        let transaction = self.db.begin_write()?;
        if transaction.open_table(BLOCKED)?.remove(position)?.is_none() {
            return Ok(false);
        }
        acknowledge(&transaction, &mut [position])?;
        transaction.commit()?;
        self.waiting.fetch_sub(1, Ordering::AcqRel);
        self.measure(None);
        Ok(true)
    }

    /// Drops a log that did not decode. `false`: it is not there.
    pub fn drop_quarantined(&self, log: LogId) -> Result<bool, StoreError> {
        let _writing = lock(&self.writer);
        let transaction = self.db.begin_write()?;
        let dropped = take_quarantined(&transaction, log)?;
        transaction.commit()?;
        Ok(dropped)
    }

    /// Stores as late what logs say that decode by now, and removes these from the quarantine: together. `logs`: which these
    /// are, those whose event stands already included. Escrows that they announce are read from block `found.next` on.
    /// Returns how many events are new, or `None` if one of the logs is there no more: a fork took it.
    pub fn release(&self, found: &LateStretch, logs: &[LogId]) -> Result<Option<usize>, StoreError> {
        let _writing = lock(&self.writer);
        let mut progress = lock(&self.progress).clone();
        let transaction = self.db.begin_write()?;
        for log in logs {
            if !take_quarantined(&transaction, *log)? {
                return Ok(None);
            }
        }
        let (changed, new) = {
            let mut lanes = Lanes::open(self, &transaction)?;
            let read = LateRead { signatures: Vec::new(), next: found.next, to: 0 };
            let read_on = !found.announced.is_empty() || !found.announced_earlier.is_empty();
            let id = match read_on {
                true => append(&mut transaction.open_table(LATE_READS)?, &read)?,
                false => 0,
            };
            let new = put_late(&transaction, &mut lanes, &mut progress, id, found)?;
            write_progress(&transaction, &progress)?;
            (lanes.close()?, new)
        };
        transaction.commit()?;
        *lock(&self.late_reads) = load(&self.db)?;
        self.moved(progress, changed, 0);
        Ok(Some(new))
    }
}

impl Quarantined {
    /// Which log it is, as the message of its event would have said.
    pub fn event_id(&self, chain_id: u64) -> String {
        event_id(chain_id, &self.block.1, self.log_index)
    }

    /// Which log it is.
    pub fn id(&self) -> LogId {
        (BlockRef { number: self.block.0, hash: self.block.1 }, self.log_index)
    }

    /// Where it stands.
    pub fn place(&self) -> Place {
        (self.block.0, self.log_index)
    }
}

/// Whether an entry was acknowledged before.
fn is_acknowledged(transaction: &WriteTransaction, position: u64) -> Result<bool, StoreError> {
    let watermark = watermark(&transaction.open_table(MARKS)?)?;
    Ok(position < watermark || run_end(&transaction.open_table(ACKNOWLEDGED)?, position)?.is_some())
}

/// Takes a log out of the quarantine. `false`: at its place there is none, or one of another fork's block.
fn take_quarantined(transaction: &WriteTransaction, log: LogId) -> Result<bool, StoreError> {
    let (block, log_index) = log;
    let mut table = transaction.open_table(QUARANTINE)?;
    let kept: Option<Quarantined> =
        table.get((block.number, log_index))?.map(|row| decode("quarantine", row.value())).transpose()?;
    let same = kept.is_some_and(|kept| kept.id() == log);
    if same {
        table.remove((block.number, log_index))?;
    }
    Ok(same)
}

/// What was acknowledged is refused no more.
fn unblock(transaction: &WriteTransaction, acknowledged: &[u64]) -> Result<(), StoreError> {
    let mut table = transaction.open_table(BLOCKED)?;
    if !table.is_empty()? {
        for position in acknowledged {
            table.remove(position)?;
        }
    }
    Ok(())
}
