//! One lane: the messages of one escrow, in order.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use alloy::primitives::Address;
use tokio::time::Instant;

use super::Message;
use super::orders::Replaying;
use crate::backoff::Backoff;
use crate::config::Ordering;
use crate::store::Entry;

/// How often a refused message is offered again (jitter doubles it at most): someone has to change something first.
const BLOCKED_PAUSE: Duration = Duration::from_secs(30);

/// Which lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum LaneId {
    Escrow(Address),
    Bucket(u32),
    /// A sink with one order for everything.
    All,
}

impl LaneId {
    pub fn of(entry: &Entry, ordering: Ordering, sequential: bool) -> Self {
        match ordering {
            _ if sequential => Self::All,
            Ordering::Bucket(buckets) => Self::Bucket(bucket(&entry.escrow, buckets.get())),
            Ordering::Escrow | Ordering::None => Self::Escrow(entry.escrow),
        }
    }
}

impl fmt::Display for LaneId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Escrow(address) => write!(f, "{address:#x}"),
            Self::Bucket(number) => write!(f, "escrow-{number}"),
            Self::All => f.write_str("all"),
        }
    }
}

/// The key Pub/Sub orders by.
pub(super) fn ordering_key(escrow: &Address, ordering: Ordering) -> String {
    match ordering {
        Ordering::Escrow => format!("{escrow:#x}"),
        Ordering::Bucket(buckets) => format!("escrow-{}", bucket(escrow, buckets.get())),
        Ordering::None => String::new(),
    }
}

/// Addresses are the tail of a hash already: their last bytes spread evenly.
fn bucket(escrow: &Address, buckets: u32) -> u32 {
    let [.., a, b, c, d] = escrow.into_array();
    u32::from_be_bytes([a, b, c, d]) % buckets
}

/// The end of a lane's trouble.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Recovered {
    /// Its message had been refused.
    Unblocked,
    /// The sink had been unavailable to it.
    Reached,
}

/// A message in its lane.
#[derive(Debug)]
pub(super) struct Item {
    /// Its place in the log.
    pub position: u64,
    pub message: Arc<Message>,
    /// It was acknowledged before, and is sent again on request.
    pub replaying: Option<Replaying>,
}

/// The messages of a lane from the first unacknowledged on.
#[derive(Debug, Default)]
pub(super) struct Lane {
    queue: VecDeque<Item>,
    /// Messages at the front under way now.
    under_way: usize,
    /// Messages at the front that were handed over and may have been stored.
    outstanding: usize,
    /// How many of these the run under way, or the last one, handed over for the first time.
    added: usize,
    /// After a failure messages go singly, to find the one at fault; then in growing runs again.
    run_limit: Option<usize>,
    /// Since the first failed attempt after the last success.
    backoff: Option<Backoff>,
    paused: bool,
    blocked: Option<String>,
    sent_at: Option<Instant>,
}

impl Lane {
    pub fn push(&mut self, item: Item) {
        self.queue.push_back(item);
    }

    pub fn len(&self) -> usize {
        self.queue.len()
    }

    /// The position of the first message.
    pub fn front(&self) -> Option<u64> {
        self.queue.front().map(|item| item.position)
    }

    /// The first message, where nothing of the lane is under way.
    pub fn resting_front(&self) -> Option<&Item> {
        self.queue.front().filter(|_| self.under_way == 0)
    }

    /// Lets go of the first message, which was refused; whether it may have been stored all the same.
    pub fn give_up_front(&mut self) -> (Option<Item>, bool) {
        assert_eq!(self.under_way, 0, "what is under way is not given up");
        let was_outstanding = self.outstanding > 0;
        self.outstanding -= usize::from(was_outstanding);
        self.blocked = None;
        self.paused = false;
        (self.queue.pop_front(), was_outstanding)
    }

    /// Takes out what is only sent again; how much of it may be stored by now.
    pub fn take_replays(&mut self) -> (Vec<Item>, usize) {
        assert_eq!(self.under_way, 0, "what is under way is not given up");
        let (mut taken, mut kept, mut stored) = (Vec::new(), VecDeque::new(), 0);
        for (place, item) in std::mem::take(&mut self.queue).into_iter().enumerate() {
            match item.replaying.is_some() {
                true => {
                    stored += usize::from(place < self.outstanding);
                    taken.push(item);
                }
                false => kept.push_back(item),
            }
        }
        self.queue = kept;
        self.outstanding -= stored;
        (taken, stored)
    }

    /// Neither under way nor waiting to try again.
    pub fn is_resting(&self) -> bool {
        self.under_way == 0 && !self.paused
    }

    /// Ends a pause. The first message, if there is one.
    pub fn rest(&mut self) -> Option<u64> {
        self.paused = false;
        self.front()
    }

    pub fn is_blocked(&self) -> bool {
        self.blocked.is_some()
    }

    pub fn blocked(&self) -> Option<&str> {
        self.blocked.as_deref()
    }

    pub fn outstanding(&self) -> usize {
        self.outstanding
    }

    pub fn under_way_for(&self) -> Option<Duration> {
        self.sent_at.map(|at| at.elapsed())
    }

    /// How many messages may go now, with `room` for new ones and at most `share` of the room for this lane. What
    /// was handed over before takes no new room.
    pub fn may_send(&self, room: usize, share: usize) -> usize {
        let new = room.min(share.saturating_sub(self.outstanding));
        self.queue.len().min(self.outstanding + new).min(self.run_limit.unwrap_or(usize::MAX))
    }

    /// Takes the first messages, at most `limit` and `bytes` (but at least one).
    pub fn start_run(&mut self, limit: usize, bytes: usize) -> Vec<Arc<Message>> {
        let mut size = 0;
        let fits = |item: &&Item| {
            size += item.message.size();
            size <= bytes
        };
        let count = self.queue.iter().take(limit).take_while(fits).count();
        let run: Vec<_> =
            self.queue.iter().take(count.max(1)).map(|item| Arc::clone(&item.message)).collect();
        self.under_way = run.len();
        self.added = run.len().saturating_sub(self.outstanding);
        self.outstanding += self.added;
        self.sent_at = Some(Instant::now());
        run
    }

    /// Removes the acknowledged messages.
    pub fn finish_run(&mut self, acknowledged: usize) -> Vec<Item> {
        assert!(acknowledged <= self.under_way, "more acknowledged than sent");
        self.added = self.added.min(self.under_way - acknowledged);
        self.under_way = 0;
        self.sent_at = None;
        self.outstanding -= acknowledged;
        self.queue.drain(..acknowledged).collect()
    }

    /// What trouble is over, if there was any.
    pub fn succeeded(&mut self) -> Option<Recovered> {
        let failed = self.backoff.take().is_some();
        self.run_limit = self.run_limit.map(|limit| limit * 2).filter(|limit| *limit < super::RUN_MESSAGES);
        match self.blocked.take() {
            Some(_) => Some(Recovered::Unblocked),
            None => failed.then_some(Recovered::Reached),
        }
    }

    /// What the last run handed over for the first time was refused, so it is not outstanding; how much that was.
    pub fn forget_added(&mut self) -> usize {
        let added = std::mem::take(&mut self.added);
        self.outstanding -= added;
        added
    }

    /// What was handed over counts no more; how much that was.
    pub fn forget_all(&mut self) -> usize {
        self.added = 0;
        std::mem::take(&mut self.outstanding)
    }

    /// The pause before the next attempt, and whether the lane is blocked from now on. Only a message refused
    /// when it was sent `alone` is known to be the one at fault.
    pub fn refused(&mut self, reason: &str, alone: bool) -> (Duration, bool) {
        self.run_limit = Some(1);
        self.paused = true;
        if !alone {
            return (Duration::ZERO, false);
        }
        let newly = self.blocked.replace(reason.to_owned()).is_none();
        (Backoff::steady(BLOCKED_PAUSE).pause(), newly)
    }

    /// The pause before the next attempt, and whether this trouble is new.
    pub fn unavailable(&mut self) -> (Duration, bool) {
        self.run_limit = Some(1);
        self.paused = true;
        let newly = self.backoff.is_none();
        (self.backoff.get_or_insert_with(Backoff::growing).pause(), newly)
    }
}
