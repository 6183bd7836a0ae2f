//! What a publisher is given to publish, and in which order.
//!
//! A publisher that keeps up is given the log as it is. What has piled up it may have escrow by escrow instead, in groups:
//! then many messages of an escrow go out in one request, where the log has them far apart. While a catch-up goes on it is
//! told to let them pile up.
//!
//! Constraints it keeps:
//!
//! 1. Each entry is handed out once per opening of the store, and those of one escrow in log order.
//! 2. What was handed out and is not acknowledged is handed out again first, in whatever order that was: a group is stored
//!    before the first of its entries leaves, and its order depends on its entries alone, of which none is pruned before
//!    all are acknowledged. So a second crash repeats nothing that the first one did not; beside lanes that are blocked,
//!    which is not known at first, it may.
//! 3. What a group holds in memory is bounded.
//! 4. Before entries leave in log order it is written down that such ones may be in doubt, until it is known that none is.
//!    While it is, a backlog that a process before left begins with as many entries in log order as can be in doubt.

use std::collections::VecDeque;
use std::ops::Range;

use alloy::primitives::map::AddressMap;
use redb::{ReadTransaction, ReadableDatabase};

use super::runs::{Acknowledged, watermark};
use super::schema::{EVENT_LOG, GROUP_END, GROUP_START, IN_DOUBT, MARKS};
use super::{Entry, Store, StoreError, lock, log};

/// When a group is made, and how large it becomes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Groups {
    /// So many entries are a backlog: fewer are soon handed out as they are.
    pub backlog: u64,
    /// What a group holds at most: entries, and bytes of their bodies (unless one alone is larger).
    pub entries: u64,
    pub bytes: usize,
}

impl Default for Groups {
    fn default() -> Self {
        Self { backlog: 2_048, entries: 32_768, bytes: 32 << 20 }
    }
}

/// So many messages of an escrow stand together in a group, at most: one that is blocked does not hold up all the others.
const TOGETHER: u64 = 128;

/// An entry handed to the publisher.
#[derive(Clone, Debug)]
pub struct Claimed {
    /// Its place in the log.
    pub position: u64,
    /// The message.
    pub entry: Entry,
}

/// What publishers have been given.
#[derive(Debug)]
pub(super) struct Claims {
    /// The next position to look at.
    pub next: u64,
    /// Every entry below it may have been handed to the sink, by this process or one before.
    pub seen_below: u64,
    pub groups: Groups,
    /// What is left of the group that is handed out.
    group: VecDeque<Claimed>,
    /// The end of the log when it was opened, if it was written down then that some entries may be in doubt; otherwise 0.
    doubtful_below: u64,
    /// Entries handed out in log order since it was opened, after the last group that was stored then.
    in_order: u64,
    /// A group was made since: nothing behind it can have been handed out before.
    settled: bool,
    /// What is written down: entries that the sink was handed in log order may lack their acknowledgement.
    in_doubt: bool,
}

impl Claims {
    /// Beginning at the watermark, with a log of so many entries.
    pub fn load(read: &ReadTransaction, end: u64) -> Result<Self, StoreError> {
        let marks = read.open_table(MARKS)?;
        let in_doubt = marks.get(IN_DOUBT)?.is_none_or(|mark| mark.value() != 0);
        Ok(Self {
            next: watermark(&marks)?,
            seen_below: end,
            groups: Groups::default(),
            group: VecDeque::new(),
            doubtful_below: if in_doubt { end } else { 0 },
            in_order: 0,
            settled: false,
            in_doubt,
        })
    }

    fn in_log_order(
        &mut self,
        read: &ReadTransaction,
        limit: usize,
        end: u64,
    ) -> Result<Vec<Claimed>, StoreError> {
        let mut claimed = Vec::new();
        // Some may have been acknowledged before, some dropped: there is more to look for behind them.
        while claimed.is_empty() && self.next < end {
            let upto = end.min(self.next.saturating_add(limit as u64));
            claimed = unacknowledged(read, self.next..upto)?;
            self.next = upto;
        }
        self.in_order += claimed.len() as u64;
        self.seen_below = self.seen_below.max(self.next);
        Ok(claimed)
    }

    /// Whether nothing from the next entry on can have been handed out before in log order, blocked lanes aside.
    fn is_settled(&self, max_outstanding: usize) -> bool {
        self.settled || self.next >= self.doubtful_below || self.in_order >= max_outstanding as u64
    }

    fn begin_group(&mut self, group: Group) {
        self.group = group.entries.into();
        self.next = group.end;
        self.seen_below = self.seen_below.max(group.end);
        self.in_order = 0;
    }
}

impl Store {
    /// The next entries to publish, at most `limit`, in log order.
    pub fn claim(&self, limit: usize) -> Result<Vec<Claimed>, StoreError> {
        let mut claims = lock(&self.claims);
        let (read, end) = self.claimable(&mut claims)?;
        claims.in_log_order(&read, limit, end)
    }

    /// The same, but a backlog escrow by escrow, and then at most `more` entries that make the last escrow's complete.
    /// `max_outstanding`: what a process before can have handed over in log order without an acknowledgement; unless there is
    /// nothing such, so much is handed out in that order again before a group is made.
    pub fn claim_by_escrow(
        &self,
        limit: usize,
        more: usize,
        max_outstanding: usize,
    ) -> Result<Vec<Claimed>, StoreError> {
        let mut claims = lock(&self.claims);
        while claims.group.is_empty() {
            let (read, end) = self.claimable(&mut claims)?;
            let next = claims.next;
            let upto = match stored_group(&read)? {
                Some(group) if group.contains(&next) => {
                    claims.begin_group(Group::read(&read, group, next, usize::MAX)?);
                    continue;
                }
                Some(group) if next < group.start => group.start,
                Some(_) | None => end,
            };
            let is_backlog = upto == end && end - next >= claims.groups.backlog;
            if is_backlog && claims.is_settled(max_outstanding) {
                let Groups { entries, bytes, .. } = claims.groups;
                let most = next..end.min(next + entries);
                let group = Group::read(&read, most, next, bytes)?;
                self.store_group(next..group.end)?;
                claims.settled = true;
                claims.begin_group(group);
                continue;
            }
            let claimed = claims.in_log_order(&read, limit, upto)?;
            if !claimed.is_empty() && !claims.in_doubt {
                self.mark_in_doubt(&mut claims, true)?;
            }
            if !claimed.is_empty() || claims.next >= end {
                return Ok(claimed);
            }
        }
        let group = &mut claims.group;
        let escrow = |place: usize| group.get(place).map(|claimed| claimed.entry.escrow);
        let (last, rest) = (escrow(limit.saturating_sub(1)), (limit..).take(more));
        let complete = rest.take_while(|place| last.is_some() && escrow(*place) == last).count();
        let count = (limit + complete).min(group.len());
        Ok(group.drain(..count).collect())
    }

    /// To be called when the sink has acknowledged, or refused, all that it was handed in this opening of the store, and when
    /// nothing more of what is claimed is handed to it. That is written down, unless a process before left something in doubt
    /// that is not acknowledged yet.
    pub fn note_nothing_in_doubt(&self) -> Result<(), StoreError> {
        let mut claims = lock(&self.claims);
        if claims.in_doubt && self.watermark()? >= claims.doubtful_below {
            self.mark_in_doubt(&mut claims, false)?;
        }
        Ok(())
    }

    fn mark_in_doubt(&self, claims: &mut Claims, in_doubt: bool) -> Result<(), StoreError> {
        let transaction = self.db.begin_write()?;
        transaction.open_table(MARKS)?.insert(IN_DOUBT, u64::from(in_doubt))?;
        transaction.commit()?;
        claims.in_doubt = in_doubt;
        Ok(())
    }

    /// Whether what is to be handed out is fewer than a group takes, and about to become more.
    pub fn gathers(&self) -> bool {
        let claims = lock(&self.claims);
        let unclaimed = lock(&self.progress).next_position.saturating_sub(claims.next);
        claims.group.is_empty() && unclaimed < claims.groups.entries && self.appended.borrow().more
    }

    /// Whether every entry has been handed out.
    pub fn all_claimed(&self) -> bool {
        let claims = lock(&self.claims);
        claims.group.is_empty() && claims.next >= lock(&self.progress).next_position
    }

    #[cfg(test)]
    pub(crate) fn group_by(&self, groups: Groups) {
        lock(&self.claims).groups = groups;
    }

    /// A view of the tables, and the end of the log in it.
    fn claimable(&self, claims: &mut Claims) -> Result<(ReadTransaction, u64), StoreError> {
        // Taken before the tables are read: what is appended in between lies beyond it, and is not counted as waiting yet.
        let end = lock(&self.progress).next_position;
        let read = self.db.begin_read()?;
        // The watermark may have passed runs acknowledged in an earlier life: their rows no longer say so.
        claims.next = claims.next.max(watermark(&read.open_table(MARKS)?)?);
        Ok((read, end.max(claims.next)))
    }

    /// Of one group before it nothing is kept: what is left of that was handed out, all of it, so its order is of no matter.
    fn store_group(&self, group: Range<u64>) -> Result<(), StoreError> {
        let transaction = self.db.begin_write()?;
        {
            let mut marks = transaction.open_table(MARKS)?;
            marks.insert(GROUP_START, group.start)?;
            marks.insert(GROUP_END, group.end)?;
        }
        Ok(transaction.commit()?)
    }
}

/// The group that is handed out, or was last. Its entries are there as long as one of them is not acknowledged.
pub(super) fn stored_group(read: &ReadTransaction) -> Result<Option<Range<u64>>, StoreError> {
    let marks = read.open_table(MARKS)?;
    let mark = |name| Ok::<_, StoreError>(marks.get(name)?.map(|mark| mark.value()));
    Ok(mark(GROUP_START)?.zip(mark(GROUP_END)?).map(|(start, end)| start..end))
}

/// Entries that are handed out escrow by escrow: the one whose first entry is the oldest comes first, so that what is
/// acknowledged stands together in the log, too.
struct Group {
    /// Those that are not acknowledged.
    entries: Vec<Claimed>,
    /// One past the last position.
    end: u64,
}

impl Group {
    /// Of these positions as far as the bodies of all entries have no more than so many bytes (but one at least); what stands
    /// before `next` is done.
    fn read(
        read: &ReadTransaction,
        positions: Range<u64>,
        next: u64,
        at_most: usize,
    ) -> Result<Self, StoreError> {
        let mut first: AddressMap<u64> = AddressMap::default();
        let (mut entries, mut bytes, mut end) = (Vec::new(), 0, positions.end);
        let acknowledged = Acknowledged::among(read, positions.clone())?;
        for entry in log::entries(&read.open_table(EVENT_LOG)?, positions.clone())? {
            let (position, entry) = entry?;
            bytes += entry.body.len();
            if bytes > at_most && position > positions.start {
                end = position;
                break;
            }
            // Of acknowledged ones, too: the order must not change when more of them are.
            first.entry(entry.escrow).or_insert(position);
            if position >= next && !acknowledged.contains(position) {
                entries.push(Claimed { position, entry });
            }
        }
        // Those of an escrow stay in log order, in which its sequence grows.
        entries.sort_by_cached_key(|Claimed { entry, .. }| (entry.sequence / TOGETHER, first[&entry.escrow]));
        Ok(Self { entries, end })
    }
}

/// The entries at these positions that are not acknowledged.
fn unacknowledged(read: &ReadTransaction, positions: Range<u64>) -> Result<Vec<Claimed>, StoreError> {
    let acknowledged = Acknowledged::among(read, positions.clone())?;
    let mut claimed = Vec::new();
    for entry in log::entries(&read.open_table(EVENT_LOG)?, positions)? {
        let (position, entry) = entry?;
        if !acknowledged.contains(position) {
            claimed.push(Claimed { position, entry });
        }
    }
    Ok(claimed)
}
