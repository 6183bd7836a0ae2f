//! Publishing: from the event log to the sink, in order per lane, and what was acknowledged back into the store.
//!
//! Constraints it keeps:
//!
//! 1. A lane (one escrow, or one bucket of them) has one run of messages under way at a time, and the next begins
//!    where the acknowledged part of the last one ended: nothing overtakes.
//! 2. Messages handed to the sink whose acknowledgement is not committed number at most `sink.max_outstanding`:
//!    after a crash no more than those are sent again. What may be handed over is the first so many entries whose
//!    acknowledgement is not committed (blocked lanes aside), in the order in which the store gives them, which it keeps
//!    through restarts: so a second crash, before they came again, adds none.
//!    Without ordering keys, what a lane had handed over behind a message that is refused then may be stored all the
//!    same, and is not counted while it waits: kept in the count it would leave no room to the other lanes.
//!    What a catch-up brings may be left in the store for a moment: that is not written down, so a crash ends it.
//! 3. An entry counts as done only after the sink acknowledged it *and* the store committed that.
//! 4. A refused message blocks its own lane only; what looks like an outage is probed by one run at a time.

mod lane;
mod orders;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, VecDeque};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use foldhash::{HashMap, HashMapExt, HashSet, HashSetExt};
use thiserror::Error;
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinError, JoinSet};
use tokio::time::Instant;
use tracing::{error, info, warn};

use crate::backoff::Backoff;
use crate::config;
use crate::permit::Permit;
use crate::store::{Appended, Claimed, Entry, Store, StoreError, on_disk};
use crate::telemetry::metrics;
use crate::vitals::{Loop, Vitals};
use lane::{Item, Lane, LaneId, Recovered};
pub use orders::{ORDERS, Order, Replayed};

/// Messages of a lane handed over at once, at most: what one Pub/Sub request takes.
const RUN_MESSAGES: usize = 1000;
/// Bytes of a lane handed over at once, unless one message alone is larger.
const RUN_BYTES: usize = 8 << 20;
/// Blocked lanes may hold this many times `sink.max_outstanding` messages before claiming stops.
const BLOCKED_WINDOWS: usize = 10;
/// That part of `sink.max_outstanding` is for what makes an escrow's messages complete.
const COMPLETING: usize = 16;
/// What a catch-up brings is left in the store so long, counted from when the publisher would have taken it, for more of the
/// same escrows: in one request they cost little more than one does.
const GATHER: Duration = Duration::from_secs(1);
/// Acknowledgements are committed together: while more is under way, that part of `sink.max_outstanding` is waited for, but
/// not for longer than this. A commit of many takes hardly longer than one of a few.
const FOLDED: usize = 4;
const FOLD: Duration = Duration::from_millis(5);
/// Until it is looked again whether something may be handed over.
const UNPERMITTED: Duration = Duration::from_millis(200);

/// One message, complete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Messages with one key are delivered in order; empty: no order.
    pub ordering_key: String,
    /// What travels beside the body.
    pub attributes: Vec<(&'static str, String)>,
    /// The body.
    pub data: Bytes,
}

impl Message {
    /// The message that an entry of the log is.
    pub fn of(entry: Entry, chain_id: u64, ordering: config::Ordering) -> Self {
        Self {
            ordering_key: lane::ordering_key(&entry.escrow, ordering),
            attributes: entry.attributes(chain_id).pairs(),
            data: entry.body.into(),
        }
    }

    /// Its size on the wire, in bytes, without framing.
    pub fn size(&self) -> usize {
        let attributes: usize = self.attributes.iter().map(|(name, value)| name.len() + value.len()).sum();
        self.ordering_key.len() + attributes + self.data.len()
    }
}

/// Why a sink did not acknowledge.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum SinkError {
    /// This message will not be taken as it is: too large, invalid. Provably not stored.
    #[error("refused: {0}")]
    Refused(String),
    /// Nothing can be said about the message: no connection, no permission, no answer in time.
    #[error("unavailable: {0}")]
    Unavailable(String),
    /// The sink is gone for good.
    #[error("{0}")]
    Closed(String),
}

/// What a sink made of a run: the first `acknowledged` messages are safe; the failure is of the one after them.
#[derive(Debug)]
pub struct Receipt {
    /// How many, from the front.
    pub acknowledged: usize,
    /// Why not all.
    pub failure: Option<SinkError>,
}

/// Where messages go.
pub trait Sink: Send + Sync + 'static {
    /// Hands over messages of one lane, in order. Makes one bounded attempt; returns when nothing of it is under
    /// way any more.
    fn publish(&self, run: Vec<Arc<Message>>) -> impl Future<Output = Receipt> + Send;

    /// Whether messages keep one order altogether instead of one per escrow.
    fn is_sequential(&self) -> bool;

    /// Its name in logs: `Pub/Sub`.
    fn name(&self) -> &'static str;
}

/// What a step came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Something was handed over, acknowledged or committed: step again.
    Progress,
    /// Nothing to do until entries are appended.
    Idle,
    /// Nothing to do for this long, unless entries are appended.
    Wait(Duration),
}

/// What ends publishing.
#[derive(Debug, Error)]
pub enum PublishError {
    /// The store cannot go on.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The sink is gone.
    #[error("the sink is gone: {0}")]
    Closed(String),
}

/// The lane an entry travels on, as logs and statuses name it. `sequential`: see [`Sink::is_sequential`].
pub fn lane_of(entry: &Entry, ordering: config::Ordering, sequential: bool) -> String {
    LaneId::of(entry, ordering, sequential).to_string()
}

type Finished = (LaneId, usize, Receipt);
/// What is under way on the disk, if something is, and how many messages it is about.
type OnDisk<T> = Option<(usize, Pin<Box<dyn Future<Output = Result<T, StoreError>> + Send>>)>;

/// Publishes the event log, one step at a time.
pub struct Publisher<S> {
    sink: Arc<S>,
    store: Arc<Store>,
    ordering: config::Ordering,
    max_outstanding: usize,
    /// A run that takes longer than this is worth a warning.
    patience: Duration,
    complain_at: Instant,
    lanes: HashMap<LaneId, Lane>,
    /// Lanes with a message to send now, by the position of that message.
    ready: BTreeSet<(u64, LaneId)>,
    /// Lanes waiting to try again.
    retries: BTreeSet<(Instant, LaneId)>,
    in_flight: JoinSet<Finished>,
    /// Messages handed over and neither committed as acknowledged nor provably refused.
    outstanding: usize,
    /// Messages claimed and not acknowledged.
    held: usize,
    acknowledged: Vec<u64>,
    /// When the first of these was.
    acknowledged_at: Option<Instant>,
    /// Messages refused for the first time, to be noted in the store: position, lane and reason.
    refused: Vec<(u64, String, String)>,
    /// Whether it publishes only what it is ordered to send again, and not what waits.
    only_ordered: bool,
    /// Entries that are being read.
    claiming: OnDisk<Vec<(LaneId, Item)>>,
    orders: Option<mpsc::Receiver<Order>>,
    /// Orders that wait for room, or for their lane to rest.
    pending: VecDeque<Order>,
    /// Acknowledgements that are being committed.
    committing: OnDisk<()>,
    outage: Option<Outage>,
    /// Lanes whose first message is refused.
    blocked: HashSet<LaneId>,
    /// Lanes whose last attempt found the sink unavailable.
    failing: HashSet<LaneId>,
    appended: watch::Receiver<Appended>,
    /// Until when entries are left in the store for more to join them.
    gathering_until: Option<Instant>,
    said_full: bool,
    vitals: Arc<Vitals>,
    permit: Arc<Permit>,
}

/// The sink answers nobody: one probe at a time.
struct Outage {
    since: Instant,
    resume_at: Instant,
    backoff: Backoff,
}

impl<S: Sink> Publisher<S> {
    /// A publisher that continues at the store's watermark.
    pub fn new(sink: Arc<S>, store: Arc<Store>, config: &config::Sink) -> Self {
        Self {
            appended: store.appended(),
            sink,
            store,
            ordering: config.ordering,
            max_outstanding: config.max_outstanding.get(),
            patience: config.timeout * 2,
            complain_at: Instant::now() + config.timeout * 2,
            lanes: HashMap::new(),
            ready: BTreeSet::new(),
            retries: BTreeSet::new(),
            in_flight: JoinSet::new(),
            outstanding: 0,
            held: 0,
            acknowledged: Vec::new(),
            acknowledged_at: None,
            refused: Vec::new(),
            only_ordered: false,
            claiming: None,
            orders: None,
            pending: VecDeque::new(),
            committing: None,
            outage: None,
            blocked: HashSet::new(),
            failing: HashSet::new(),
            gathering_until: None,
            said_full: false,
            permit: Arc::new(Permit::forever()),
            vitals: Arc::default(),
        }
    }

    /// Hands something over only while that permit holds.
    pub fn permitted_by(mut self, permit: Arc<Permit>) -> Self {
        self.permit = permit;
        self
    }

    /// Tells there what keeps the sink, and what it took.
    pub fn reporting_to(mut self, vitals: &Arc<Vitals>) -> Self {
        self.vitals = Arc::clone(vitals);
        self
    }

    /// Hands over what can be handed over, and follows up one thing that happened.
    pub async fn step(&mut self) -> Result<Step, PublishError> {
        let stepped = self.try_step().await;
        if matches!(stepped, Err(PublishError::Closed(_))) {
            // What it took before it was gone must not come again.
            self.drain().await?;
        }
        stepped
    }

    async fn try_step(&mut self) -> Result<Step, PublishError> {
        // Before what waits, which would leave them no room for as long as there is more of it.
        self.obey().await?;
        self.start_claim();
        self.wake(Instant::now());
        let permitted = self.permit.holds();
        if permitted {
            self.hand_over();
        }
        let folding = self.fold_until().filter(|_| permitted);
        if folding.is_none() {
            self.start_commit();
        }
        let gathering = self.gathering_until.filter(|until| *until > Instant::now());
        let next_try = [self.next_try(), gathering, folding].into_iter().flatten().min();
        if self.is_at_rest() {
            return Ok(match next_try {
                _ if !permitted => Step::Wait(UNPERMITTED),
                _ if gathering.is_none() && self.has_more() && self.has_room() => Step::Progress,
                Some(at) => Step::Wait(at.saturating_duration_since(Instant::now())),
                None => Step::Idle,
            });
        }
        // Without the permit nothing may be tried, however long its pause is over.
        let next_try = next_try.filter(|_| permitted);
        let room = self.has_room();
        // The sink may take its time; a commit may not.
        let patient = self.committing.is_none() && self.claiming.is_none();
        let beat = async { self.vitals.while_waiting(Loop::Publish, std::future::pending::<()>()).await };
        tokio::select! {
            Some(finished) = self.in_flight.join_next() => self.finished(finished)?,
            () = beat, if patient => {}
            (_, claimed) = ended(&mut self.claiming) => self.claimed(claimed?),
            (count, committed) = ended(&mut self.committing) => self.committed(count, committed)?,
            changed = self.appended.changed(), if room => changed.expect("the store outlives its publisher"),
            order = Self::next_order(&mut self.orders) => self.pending.push_back(order),
            () = tokio::time::sleep_until(next_try.unwrap_or_else(Instant::now)), if next_try.is_some() => {}
            () = tokio::time::sleep(UNPERMITTED), if !permitted => {}
            () = tokio::time::sleep_until(self.complain_at) => self.complain(),
        }
        Ok(Step::Progress)
    }

    /// Whether nothing is under way, at the sink or on the disk.
    fn is_at_rest(&self) -> bool {
        self.in_flight.is_empty() && self.claiming.is_none() && self.committing.is_none()
    }

    /// Whether entries wait that it has not claimed.
    fn has_more(&self) -> bool {
        !self.only_ordered && !self.store.all_claimed()
    }

    /// Whether nothing is left to publish but what blocked lanes hold.
    pub fn is_drained(&self) -> bool {
        let done = self.acknowledged.is_empty() && self.refused.is_empty() && self.pending.is_empty();
        self.is_at_rest()
            && done
            && self.blocked.len() == self.lanes.len()
            && (!self.has_more() || self.said_full)
    }

    /// Lanes whose first message is refused, with the reason.
    pub fn blocked(&self) -> Vec<(String, String)> {
        let reason = |id: &LaneId| self.lanes[id].blocked().map(str::to_owned);
        self.blocked.iter().filter_map(|id| Some((id.to_string(), reason(id)?))).collect()
    }

    /// Lets what is under way finish and commits its acknowledgements, for good: hands over nothing more.
    pub async fn drain(&mut self) -> Result<(), PublishError> {
        loop {
            self.start_commit();
            if self.is_at_rest() {
                break;
            }
            tokio::select! {
                Some(finished) = self.in_flight.join_next() => self.finished(finished)?,
                (_, claimed) = ended(&mut self.claiming) => drop(claimed?),
                (count, committed) = ended(&mut self.committing) => self.committed(count, committed)?,
            }
        }
        if self.outstanding == 0 {
            on_disk(&self.store, Store::note_nothing_in_doubt).await?;
        }
        Ok(())
    }

    /// Claims entries from the log while there is room for them in memory. What is under way goes on meanwhile.
    fn start_claim(&mut self) {
        if self.claiming.is_some() {
            return;
        }
        if !self.has_more() {
            self.gathering_until = None;
            return;
        }
        // Where a lane is an escrow, what has piled up goes out escrow by escrow: many messages in one request.
        let (ordering, sequential) = (self.ordering, self.sink.is_sequential());
        let by_escrow = ordering == config::Ordering::Escrow && !sequential;
        let room = self.has_room();
        if by_escrow && self.gathers() || !room {
            return;
        }
        let limit = self.window().saturating_sub(self.uncommitted()).clamp(1, RUN_MESSAGES);
        let (more, max_outstanding) = (self.completing(), self.max_outstanding);
        let claim = move |store: &Store| {
            let claimed = match by_escrow {
                true => store.claim_by_escrow(limit, more, max_outstanding),
                false => store.claim(limit),
            };
            let chain_id = store.identity().chain_id;
            let item = |Claimed { position, entry }| {
                let id = LaneId::of(&entry, ordering, sequential);
                let message = Arc::new(Message::of(entry, chain_id, ordering));
                (id, Item { position, message, replaying: None })
            };
            Ok(claimed?.into_iter().map(item).collect())
        };
        self.claiming = Some((limit, Box::pin(on_disk(&self.store, claim))));
    }

    fn claimed(&mut self, items: Vec<(LaneId, Item)>) {
        items.into_iter().for_each(|(id, item)| self.enqueue(id, item));
    }

    /// Whether what waits is left in the store, so that more of the same escrows joins it.
    fn gathers(&mut self) -> bool {
        if !self.store.gathers() {
            self.gathering_until = None;
            return false;
        }
        *self.gathering_until.get_or_insert_with(|| Instant::now() + GATHER) > Instant::now()
    }

    /// Messages claimed, or being claimed, whose acknowledgement is not committed.
    fn uncommitted(&self) -> usize {
        fn under_way<T>(work: &OnDisk<T>) -> usize {
            work.as_ref().map_or(0, |(count, _)| *count)
        }
        self.held + self.acknowledged.len() + under_way(&self.claiming) + under_way(&self.committing)
    }

    /// How many these may be at most when more are claimed: beside what blocked lanes keep from moving, and what is kept for
    /// [`Self::completing`].
    fn window(&self) -> usize {
        self.window_beside(self.blocked.iter().map(|id| self.lanes[id].len()).sum())
    }

    /// The same where blocked lanes hold so many.
    fn window_beside(&self, stuck: usize) -> usize {
        self.max_outstanding + stuck.min(BLOCKED_WINDOWS * self.max_outstanding) - self.completing()
    }

    /// How many may be claimed on top, to make an escrow's messages complete.
    fn completing(&self) -> usize {
        self.max_outstanding / COMPLETING
    }

    fn has_room(&mut self) -> bool {
        let uncommitted = self.uncommitted();
        // Without blocked lanes the window is the same for all: no need to count.
        let room = uncommitted < self.window_beside(0) || uncommitted < self.window();
        let full = !room && self.held >= self.window_beside(usize::MAX);
        if full && !std::mem::replace(&mut self.said_full, true) {
            self.vitals.publishing_stopped(true);
            error!(
                held = self.held,
                "Blocked lanes hold as many messages as may be held: publishing stops behind them"
            );
        }
        if self.said_full && !full {
            self.said_full = false;
            self.vitals.publishing_stopped(false);
        }
        room
    }

    /// Lanes whose pause is over are ready again.
    fn wake(&mut self, now: Instant) {
        while let Some(&(at, id)) = self.retries.first()
            && at <= now
        {
            self.retries.pop_first();
            if let Some(front) = self.lanes.get_mut(&id).and_then(Lane::rest) {
                self.ready.insert((front, id));
            }
        }
    }

    fn next_try(&self) -> Option<Instant> {
        match &self.outage {
            None => self.retries.first().map(|(at, _)| *at),
            // The probe goes out when the outage's own pause is over, with whichever lane is first.
            Some(_) if self.ready.is_empty() && self.retries.is_empty() => None,
            Some(outage) if self.in_flight.is_empty() => Some(outage.resume_at),
            Some(_) => None,
        }
    }

    fn hand_over(&mut self) {
        let now = Instant::now();
        if self.in_flight.is_empty() && self.outage.as_ref().is_some_and(|outage| outage.resume_at <= now) {
            self.probe();
        }
        if self.outage.is_some() {
            return;
        }
        let mut starved = Vec::new();
        while let Some((front, id)) = self.ready.pop_first() {
            let limit = self.may_send(&id);
            if limit > 0 {
                self.send(id, limit);
                continue;
            }
            starved.push((front, id));
            // Without room only lanes that failed may go on; unless something is under way that will make room.
            if self.outstanding == self.max_outstanding && !self.in_flight.is_empty() {
                break;
            }
        }
        self.ready.extend(starved);
    }

    /// In an outage: one message of the first lane that may send, ready ones before those that failed lately.
    fn probe(&mut self) {
        let ready = self.ready.iter().map(|(_, id)| *id);
        let failed = self.retries.iter().map(|(_, id)| *id);
        let fit = |id: &LaneId| !self.lanes[id].is_blocked() && self.may_send(id) > 0;
        let Some(id) = ready.chain(failed).find(fit) else {
            // Only blocked lanes are left: each has its own pause.
            return self.end_outage();
        };
        self.ready.retain(|(_, ready)| *ready != id);
        self.retries.retain(|(_, failed)| *failed != id);
        self.lanes.get_mut(&id).expect("a ready lane exists").rest();
        self.send(id, 1);
    }

    /// How many messages of a lane may go now, within the bound on what may be repeated. One of many has at most half
    /// of it, so that one that fails leaves room for the others.
    fn may_send(&self, id: &LaneId) -> usize {
        let room = self.max_outstanding - self.outstanding;
        let share = if self.sink.is_sequential() { self.max_outstanding } else { self.max_outstanding / 2 };
        self.lanes[id].may_send(room, share.max(1))
    }

    fn send(&mut self, id: LaneId, limit: usize) {
        let lane = self.lanes.get_mut(&id).expect("a ready lane exists");
        let before = lane.outstanding();
        let run = lane.start_run(limit.min(RUN_MESSAGES), RUN_BYTES);
        self.outstanding += lane.outstanding() - before;
        let (sink, sent) = (Arc::clone(&self.sink), run.len());
        self.in_flight.spawn(async move {
            let began = Instant::now();
            let receipt = sink.publish(run).await;
            metrics::publish_took(began.elapsed());
            (id, sent, receipt)
        });
    }

    fn finished(&mut self, finished: Result<Finished, JoinError>) -> Result<(), PublishError> {
        let (id, sent, receipt) = match finished.map_err(JoinError::try_into_panic) {
            Ok(finished) => finished,
            Err(Ok(panicked)) => std::panic::resume_unwind(panicked),
            // The process ends, and nothing was heard of the run.
            Err(Err(_)) => return Ok(()),
        };
        let lane = self.lanes.get_mut(&id).expect("a lane with a run under way exists");
        let done = lane.finish_run(receipt.acknowledged);
        self.held -= done.len();
        for item in done {
            match item.replaying {
                None => {
                    self.acknowledged.push(item.position);
                    self.acknowledged_at.get_or_insert_with(Instant::now);
                }
                // Of that the store knows already.
                Some(replaying) => {
                    self.outstanding -= 1;
                    replaying.acknowledged();
                }
            }
        }
        if receipt.acknowledged > 0 {
            match lane.succeeded() {
                Some(Recovered::Unblocked) => {
                    info!(lane = %id, "Lane unblocked: its message was taken");
                    self.blocked.remove(&id);
                    self.vitals.lane_unblocked(&id.to_string());
                    self.measure();
                }
                // The end of an outage is said once for all.
                Some(Recovered::Reached) if self.outage.is_none() => {
                    info!(lane = %id, "The lane is published again")
                }
                Some(Recovered::Reached) | None => {}
            }
            self.failing.clear();
            self.end_outage();
        }
        let lane = self.lanes.get_mut(&id).expect("still there");
        match receipt.failure {
            None => {}
            Some(SinkError::Closed(reason)) => return Err(PublishError::Closed(reason)),
            Some(SinkError::Refused(reason)) => {
                // A refused request was not stored: what it added cannot come twice. With a key, nothing behind a
                // message that is refused alone can ever have been stored; without one, see constraint 2.
                let alone = sent - receipt.acknowledged == 1;
                self.outstanding -= if alone { lane.forget_all() } else { lane.forget_added() };
                // The sink answers, whatever it says.
                self.failing.remove(&id);
                if !(alone && self.leave_refused(id, &reason)) {
                    self.refused(id, &reason, alone);
                    return Ok(());
                }
            }
            Some(SinkError::Unavailable(reason)) => {
                let (pause, newly) = lane.unavailable();
                self.retries.insert((Instant::now() + pause, id));
                // A blocked lane has its own pause; the others tell whether there is an outage.
                if !lane.is_blocked() {
                    self.failing.insert(id);
                    self.suspect_outage(id, newly, &reason);
                }
                return Ok(());
            }
        }
        match self.lanes.get_mut(&id).expect("still there").rest() {
            Some(front) => {
                self.ready.insert((front, id));
            }
            None => {
                self.lanes.remove(&id);
            }
        }
        Ok(())
    }

    /// The run was refused; `alone`: it was one message, which blocks its lane.
    fn refused(&mut self, id: LaneId, reason: &str, alone: bool) {
        let lane = self.lanes.get_mut(&id).expect("a lane that was refused exists");
        let (pause, newly) = lane.refused(reason, alone);
        let front = lane.front().expect("a refused message stays");
        if newly {
            self.blocked.insert(id);
            error!(lane = %id, %reason, "Lane blocked: its message is refused; the others go on");
            self.vitals.lane_blocked(id.to_string(), reason);
            self.refused.push((front, id.to_string(), reason.to_owned()));
            self.measure();
        }
        if alone {
            self.leave_replays(id, reason);
        }
        self.retries.insert((Instant::now() + pause, id));
    }

    /// Several lanes failing, or the only one that is not blocked, looks like an outage.
    fn suspect_outage(&mut self, id: LaneId, newly: bool, reason: &str) {
        let now = Instant::now();
        if let Some(outage) = &mut self.outage {
            // Runs that were under way when it began fail together: they are one step of the backoff.
            if outage.resume_at <= now {
                outage.resume_at = now + outage.backoff.pause();
            }
            return;
        }
        let unblocked = self.lanes.len() - self.blocked.len();
        if self.failing.len() >= 2 || self.failing.len() == unblocked {
            warn!(sink = self.sink.name(), %reason, waiting = self.store.waiting(),
                "{} is unavailable: messages wait in order until it answers", self.sink.name());
            let mut backoff = Backoff::growing();
            self.outage = Some(Outage { since: now, resume_at: now + backoff.pause(), backoff });
            self.measure();
        } else if newly {
            warn!(sink = self.sink.name(), lane = %id, %reason, "A lane could not be published: trying again");
        }
    }

    fn end_outage(&mut self) {
        let Some(outage) = self.outage.take() else {
            return;
        };
        self.measure();
        let seconds = outage.since.elapsed().as_secs_f64();
        info!(sink = self.sink.name(), seconds, "{} answers again after {seconds:.1} s", self.sink.name());
        let waiting: Vec<(Instant, LaneId)> = self.retries.iter().copied().collect();
        for (at, id) in waiting {
            let lane = self.lanes.get_mut(&id).expect("a waiting lane exists");
            if lane.is_blocked() {
                continue;
            }
            self.retries.remove(&(at, id));
            if let Some(front) = lane.rest() {
                self.ready.insert((front, id));
            }
        }
    }

    fn measure(&self) {
        metrics::sink(self.blocked.len(), self.outage.is_some());
        self.vitals.outage(self.outage.is_some());
    }

    /// Until when acknowledgements are left for others to join them; `None`: no longer.
    fn fold_until(&self) -> Option<Instant> {
        let few = self.acknowledged.len() < self.max_outstanding / FOLDED && self.refused.is_empty();
        let until = self.acknowledged_at.filter(|_| few && !self.in_flight.is_empty())? + FOLD;
        (until > Instant::now()).then_some(until)
    }

    /// Acknowledgements that came in during one commit share the next.
    fn start_commit(&mut self) {
        if self.committing.is_some() || self.acknowledged.is_empty() && self.refused.is_empty() {
            return;
        }
        self.acknowledged_at = None;
        let positions = std::mem::take(&mut self.acknowledged);
        let refused = std::mem::take(&mut self.refused);
        let (count, began) = (positions.len(), Instant::now());
        let committing = on_disk(&self.store, move |store| store.settle(positions, &refused));
        let commit = async move {
            let committed = committing.await;
            metrics::commit_took("acknowledgements", began.elapsed());
            committed
        };
        self.committing = Some((count, Box::pin(commit)));
    }

    fn committed(&mut self, count: usize, committed: Result<(), StoreError>) -> Result<(), PublishError> {
        committed?;
        if count == 0 {
            return Ok(());
        }
        self.outstanding -= count;
        metrics::published(count);
        self.vitals.published(count);
        info!(events = count, "Published {count} events to {}", self.sink.name());
        Ok(())
    }

    /// A run that neither succeeds nor fails: said, never sent again while the sink may still hold it.
    fn complain(&mut self) {
        self.complain_at = Instant::now() + self.patience;
        for (id, lane) in &self.lanes {
            if let Some(elapsed) = lane.under_way_for().filter(|elapsed| *elapsed > self.patience) {
                let seconds = elapsed.as_secs();
                warn!(lane = %id, seconds, "A publish has neither succeeded nor failed: waiting for it");
            }
        }
    }
}

/// What came of it, and how many messages it was about; pends for ever if nothing is under way.
async fn ended<T>(work: &mut OnDisk<T>) -> (usize, Result<T, StoreError>) {
    let Some((count, under_way)) = work else {
        return std::future::pending().await;
    };
    let done = (*count, under_way.await);
    *work = None;
    done
}
