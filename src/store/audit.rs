//! What an audit asks and says: which blocks to read again, how what the chain says compares with what stands, and what
//! was missed.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use alloy::primitives::Address;
use redb::{ReadableDatabase, ReadableTable};

use super::fork::newest_final;
use super::lanes::Lanes;
use super::late::{LateStretch, append, load, put_late};
use super::runs::take_run;
use super::schema::{
    BLOCKS, COUNTS_FROM, DIGESTS_FROM, EVENT_LOG, EscrowState, Kind, LATE_READS, LateRead, MARKS, QUARANTINE,
    REGISTRY, Remembered, STANDING, UNAUDITED, decode,
};
use super::standing::standing_in;
use super::{Escrow, Store, StoreError, lock, log, write_progress};
use crate::event::{BlockRange, BlockRef};

/// Block and log index: which log of the chain.
pub type Place = (u64, u64);

/// An event's place, and what it says.
type Seen = (Place, u64);

/// The events of some blocks as they were read again, against those that stand.
#[derive(Debug, Default)]
pub struct Comparison {
    /// Events that were never stored.
    pub missed: Vec<Place>,
    /// Logs that do not decode and were not kept aside.
    pub odd: Vec<Place>,
    /// Events that stand and were not among those read again.
    pub extra: Vec<Place>,
    /// Events that stand with another log index: a node that corrected itself.
    pub renumbered: usize,
}

impl Store {
    /// The oldest blocks that were read while they could leave the chain and are final now, at most `blocks` of them.
    pub fn unaudited(&self, blocks: u64) -> Result<Option<BlockRange>, StoreError> {
        let Some(finalized) = self.finalized() else {
            return Ok(None);
        };
        let read = self.db.begin_read()?;
        let first = read.open_table(UNAUDITED)?.first()?.map(|(start, end)| (start.value(), end.value()));
        Ok(first.and_then(|(start, end)| BlockRange::starting_at(start, blocks, finalized.min(end - 1))))
    }

    /// The first block that can be compared: what earlier layouts pruned left no trace.
    pub fn comparable_from(&self) -> Result<u64, StoreError> {
        let read = self.db.begin_read()?;
        let mark = read.open_table(MARKS)?.get(DIGESTS_FROM)?.map_or(0, |mark| mark.value());
        Ok(mark.max(self.start_block()))
    }

    /// The newest block whose hash is known and that cannot leave the chain.
    pub fn newest_final_block(&self) -> Result<Option<BlockRef>, StoreError> {
        let read = self.db.begin_read()?;
        let blocks = read.open_table(BLOCKS)?;
        let Some(number) = newest_final(&blocks, self.finalized())? else {
            return Ok(None);
        };
        let row = blocks.get(number)?.map(|row| decode::<Remembered>("blocks", row.value())).transpose()?;
        Ok(row.map(|remembered| BlockRef { number, hash: remembered.hash }))
    }

    /// Signatures whose events count from a block on only, as in [`Identity::signatures`](super::Identity::signatures).
    pub fn signatures_from(&self) -> Result<HashMap<String, u64>, StoreError> {
        let read = self.db.begin_read()?;
        let mut from = HashMap::new();
        for row in read.open_table(MARKS)?.iter()? {
            let (name, block) = row?;
            if let Some(signature) = name.value().strip_prefix(COUNTS_FROM) {
                from.insert(signature.to_owned(), block.value());
            }
        }
        Ok(from)
    }

    /// Compares what was read again of these blocks with what stands. `seen`: events with their digests; `malformed`: logs that
    /// do not decode.
    pub fn compare(
        &self,
        blocks: BlockRange,
        seen: &[Seen],
        malformed: Vec<Place>,
    ) -> Result<Comparison, StoreError> {
        let read = self.db.begin_read()?;
        let standing = standing_in(&read.open_table(STANDING)?, blocks)?;
        let mut standing: BTreeMap<Place, u64> = standing.into_iter().collect();
        let mut comparison = Comparison::default();
        let is_there =
            |(key, digest): &&Seen| standing.get(key).is_some_and(|stands| *stands == 0 || stands == digest);
        let (there, strangers): (Vec<&Seen>, Vec<_>) = seen.iter().partition(is_there);
        for (key, _) in there {
            standing.remove(key);
        }
        for (key, digest) in strangers {
            let mut of_block = standing.range((key.0, 0)..=(key.0, u64::MAX));
            match of_block.find(|(_, stands)| *stands == digest).map(|(key, _)| *key) {
                Some(elsewhere) => {
                    standing.remove(&elsewhere);
                    comparison.renumbered += 1;
                }
                None => comparison.missed.push(*key),
            }
        }
        comparison.extra = standing.into_keys().collect();
        let kept = read.open_table(QUARANTINE)?;
        for key in malformed {
            if kept.get(key)?.is_none() {
                comparison.odd.push(key);
            }
        }
        Ok(comparison)
    }

    /// Stores what an audit found: events that were missed, as late, and escrows whose history has to be read once more from
    /// block `found.next` on. `blocks`, if any, need no audit any more. Returns how many events are new.
    ///
    /// Between the reading of what was found and this the scanner may have accepted blocks: what these brought counts.
    pub fn accept_audited(
        &self,
        blocks: Option<BlockRange>,
        found: &LateStretch,
    ) -> Result<usize, StoreError> {
        let _writing = lock(&self.writer);
        let mut progress = lock(&self.progress).clone();
        let transaction = self.db.begin_write()?;
        let (changed, missed) = {
            if let Some(blocks) = blocks {
                take_run(&mut transaction.open_table(UNAUDITED)?, blocks.from(), blocks.to() + 1)?;
            }
            let mut lanes = Lanes::open(self, &transaction)?;
            let read_on = !found.announced.is_empty() || !found.announced_earlier.is_empty();
            let id = match read_on {
                true => {
                    let read = LateRead { signatures: Vec::new(), next: found.next, to: 0 };
                    append(&mut transaction.open_table(LATE_READS)?, &read)?
                }
                false => 0,
            };
            let missed = put_late(&transaction, &mut lanes, &mut progress, id, found)?;
            write_progress(&transaction, &progress)?;
            (lanes.close()?, missed)
        };
        transaction.commit()?;
        *lock(&self.late_reads) = load(&self.db)?;
        self.moved(progress, changed, 0);
        Ok(missed)
    }

    /// Escrows that stand and were announced in block `last` or before.
    pub fn registered_upto(&self, last: u64) -> Result<u64, StoreError> {
        let read = self.db.begin_read()?;
        let mut count = 0;
        for row in read.open_table(REGISTRY)?.iter()? {
            let escrow = Escrow::decode(row?.1.value())?;
            count += u64::from(escrow.state != EscrowState::Withdrawn && escrow.announced.0 <= last);
        }
        Ok(count)
    }

    /// How many events of each name stand for these escrows in blocks up to `last`. Of escrows announced before
    /// [`whole_from`](Self::whole_from) some were pruned: these are left out.
    pub fn events_upto(
        &self,
        escrows: &BTreeSet<Address>,
        last: u64,
    ) -> Result<BTreeMap<Address, BTreeMap<String, u64>>, StoreError> {
        let whole_from = self.whole_from()?;
        let rows = self.escrows_of(&escrows.iter().copied().collect::<Vec<_>>())?;
        let whole = rows.iter().filter(|(_, row)| row.announced.0 >= whole_from && !row.is_imported());
        let mut counts: BTreeMap<Address, BTreeMap<String, u64>> =
            whole.map(|(address, _)| (*address, BTreeMap::new())).collect();
        let read = self.db.begin_read()?;
        let mut first = None;
        for entry in log::entries(&read.open_table(EVENT_LOG)?, 0..u64::MAX)? {
            let (position, entry) = entry?;
            let first = *first.get_or_insert(position);
            if entry.block_number > last || entry.announces {
                continue;
            }
            let Some(events) = counts.get_mut(&entry.escrow) else { continue };
            let count = events.entry(entry.name).or_default();
            match entry.kind {
                Kind::Event => *count += 1,
                Kind::Retraction { of } if of >= first => *count -= 1,
                // What it withdraws was pruned, and is not counted.
                Kind::Retraction { .. } => {}
            }
        }
        Ok(counts)
    }
}
