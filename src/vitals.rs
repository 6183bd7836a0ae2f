//! What the loops of a running relayer know and its store does not: whether they turn, how far the chain is, what
//! keeps the sink, what went wrong last.
//!
//! Whoever knows a fact tells it here, in passing; whoever shows it reads it here. No lock is held across an await, and
//! nothing is told for each event.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

/// A loop that has not turned for so long hangs: nothing it legitimately waits for without saying so takes as long.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often a loop that waits says so.
const BEAT: Duration = Duration::from_secs(1);
/// Faults remembered, and the characters of each.
const FAULTS: usize = 20;
const FAULT_CHARACTERS: usize = 400;
/// The throughput is that of so many seconds.
const WINDOW_SECONDS: u64 = 60;
/// In the place of a time: that loop is not expected to turn.
const AT_REST: u64 = u64::MAX;

/// One of the loops a relayer consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loop {
    /// Reads the chain.
    Scan,
    /// Publishes.
    Publish,
}

impl fmt::Display for Loop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Scan => "scan",
            Self::Publish => "publish",
        })
    }
}

/// How far a relayer is in its own life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Stage {
    /// Its store is being opened or restored.
    #[default]
    Starting,
    /// Another one relays; this one takes over when that ends.
    Standby,
    /// Its loops turn.
    Relaying,
    /// It finishes what is under way.
    Stopping,
}

/// A head that was seen.
#[derive(Clone, Copy, Debug)]
pub struct Head {
    /// Its number.
    pub number: u64,
    /// When it was seen last, also if it was the same.
    pub seen: Instant,
}

/// A lane whose first message is refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockedLane {
    /// Which: an escrow's address, or a bucket of them.
    pub lane: String,
    /// What the sink says.
    pub reason: String,
    /// Since when, in seconds since 1970.
    pub since: u64,
}

/// What the audit came to since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Audited {
    /// Blocks read again.
    pub blocks: u64,
    /// Events found that had been missed.
    pub missed: u64,
    /// Events relayed that were not found again.
    pub extra: u64,
}

/// Something that went wrong, as the log said it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// When, in seconds since 1970.
    pub at: u64,
    /// Whether it was an error, and not a warning only.
    pub error: bool,
    /// What.
    pub text: String,
}

/// All facts at one moment.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// How far the relayer is in its own life.
    pub stage: Stage,
    /// While it stands by: who holds the lease.
    pub lease_holder: Option<String>,
    /// The newest block the node has shown.
    pub head: Option<Head>,
    /// The highest block that may be read now.
    pub horizon: Option<u64>,
    /// There is no contract at the factory's address.
    pub factory_without_code: bool,
    /// A fork waits because it would withdraw more than may be withdrawn.
    pub retractions_stopped: bool,
    /// Since when the sink answers nobody, in seconds since 1970.
    pub outage_since: Option<u64>,
    /// Blocked lanes hold as many messages as may be held: nothing is published behind them.
    pub publishing_stopped: bool,
    /// Lanes whose first message is refused.
    pub blocked: BTreeMap<String, BlockedLane>,
    /// Of so many entries of the log nothing is left to publish but what blocked lanes hold up.
    pub all_blocked_upto: Option<u64>,
    /// What the audit came to.
    pub audited: Audited,
    /// The last faults, the newest first.
    pub faults: VecDeque<Fault>,
    /// Events published a second, over the last minute.
    pub events_per_second: f64,
}

/// The facts of one relayer. Shared by all of its parts.
#[derive(Debug)]
pub struct Vitals {
    began: Instant,
    started_at: u64,
    patience: Duration,
    /// Of each loop: when it turned last, in milliseconds since `began`.
    turned: [AtomicU64; 2],
    facts: Mutex<Facts>,
    published: Mutex<Rate>,
}

impl Default for Vitals {
    fn default() -> Self {
        Self::patient_for(PATIENCE)
    }
}

impl Vitals {
    /// Of a relayer that starts now. A loop hangs if it does not turn for so long.
    pub fn patient_for(patience: Duration) -> Self {
        Self {
            began: Instant::now(),
            started_at: unix_seconds(),
            patience,
            turned: [AtomicU64::new(AT_REST), AtomicU64::new(AT_REST)],
            facts: Mutex::default(),
            published: Mutex::default(),
        }
    }

    /// When the relayer started, in seconds since 1970.
    pub fn started_at(&self) -> u64 {
        self.started_at
    }

    /// How long ago that is.
    pub fn uptime(&self) -> Duration {
        self.began.elapsed()
    }

    /// From now on that loop is expected to turn, until what is returned is dropped.
    pub fn begin(self: &Arc<Self>, of: Loop) -> Turning {
        self.slot(of).store(self.now(), Ordering::Relaxed);
        Turning { vitals: Arc::clone(self), of }
    }

    /// It turned, or waits for something that may take its time.
    pub fn turned(&self, of: Loop) {
        let now = self.now();
        // One that has ended stays so.
        let _ = self
            .slot(of)
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |last| (last != AT_REST).then_some(now));
    }

    /// Waits for what may take its time, and says so meanwhile.
    pub async fn while_waiting<T>(&self, of: Loop, wait: impl Future<Output = T>) -> T {
        let mut wait = pin!(wait);
        loop {
            self.turned(of);
            tokio::select! {
                biased;
                done = &mut wait => {
                    self.turned(of);
                    return done;
                }
                () = tokio::time::sleep(BEAT) => {}
            }
        }
    }

    /// Loops that should have turned, and for how long they have not.
    pub fn hanging(&self) -> Vec<(Loop, Duration)> {
        let silent = |of: Loop| {
            let last = self.slot(of).load(Ordering::Relaxed);
            let silent = Duration::from_millis(self.now().saturating_sub(last));
            (last != AT_REST && silent > self.patience).then_some((of, silent))
        };
        [Loop::Scan, Loop::Publish].into_iter().filter_map(silent).collect()
    }

    /// The relayer has come so far.
    pub fn entered(&self, stage: Stage) {
        let mut facts = self.facts();
        facts.stage = stage;
        facts.lease_holder = None;
    }

    /// It stands by: that one holds the lease.
    pub fn stands_by(&self, holder: String) {
        let mut facts = self.facts();
        facts.stage = Stage::Standby;
        facts.lease_holder = Some(holder);
    }

    /// The node showed its head.
    pub fn saw_head(&self, number: u64) {
        self.facts().head = Some(Head { number, seen: Instant::now() });
    }

    /// Blocks up to this one may be read.
    pub fn may_read_upto(&self, horizon: u64) {
        self.facts().horizon = Some(horizon);
    }

    /// Whether there is no contract at the factory's address.
    pub fn factory_without_code(&self, without: bool) {
        self.facts().factory_without_code = without;
    }

    /// Whether a fork waits because it would withdraw too much.
    pub fn retractions_stopped(&self, stopped: bool) {
        self.facts().retractions_stopped = stopped;
    }

    /// Whether the sink answers nobody.
    pub fn outage(&self, is: bool) {
        let since = &mut self.facts().outage_since;
        *since = is.then(|| since.unwrap_or_else(unix_seconds));
    }

    /// Whether blocked lanes hold as much as may be held.
    pub fn publishing_stopped(&self, stopped: bool) {
        self.facts().publishing_stopped = stopped;
    }

    /// Of so many entries nothing is left to publish but what blocked lanes hold up; `None`: there is.
    pub fn all_blocked_upto(&self, entries: Option<u64>) {
        self.facts().all_blocked_upto = entries;
    }

    /// Whether that is so of so many.
    pub fn is_all_blocked(&self, entries: u64) -> bool {
        self.facts().all_blocked_upto == Some(entries)
    }

    /// The lanes whose first message is refused.
    pub fn blocked_lanes(&self) -> Vec<BlockedLane> {
        self.facts().blocked.values().cloned().collect()
    }

    /// The first message of a lane is refused.
    pub fn lane_blocked(&self, lane: String, reason: &str) {
        let blocked = BlockedLane { lane: lane.clone(), reason: shortened(reason), since: unix_seconds() };
        self.facts().blocked.insert(lane, blocked);
    }

    /// It was taken after all.
    pub fn lane_unblocked(&self, lane: &str) {
        self.facts().blocked.remove(lane);
    }

    /// Whether its first message is refused.
    pub fn is_blocked(&self, lane: &str) -> bool {
        self.facts().blocked.contains_key(lane)
    }

    /// Events were acknowledged.
    pub fn published(&self, events: usize) {
        let second = self.began.elapsed().as_secs();
        self.published.lock().expect("no code that panics runs under this lock").add(second, events as u64);
    }

    /// Blocks were read again.
    pub fn audited(&self, blocks: u64, missed: usize, extra: usize) {
        let audited = &mut self.facts().audited;
        audited.blocks += blocks;
        audited.missed += missed as u64;
        audited.extra += extra as u64;
    }

    /// Something went wrong.
    pub fn fault(&self, error: bool, text: &str) {
        let fault = Fault { at: unix_seconds(), error, text: shortened(text) };
        let faults = &mut self.facts().faults;
        faults.truncate(FAULTS - 1);
        faults.push_front(fault);
    }

    /// All facts, as they are now.
    pub fn now_known(&self) -> Facts {
        let mut facts = self.facts().clone();
        let second = self.began.elapsed().as_secs();
        let published = self.published.lock().expect("no code that panics runs under this lock");
        facts.events_per_second = published.per_second(second);
        facts
    }

    fn facts(&self) -> MutexGuard<'_, Facts> {
        self.facts.lock().expect("no code that panics runs under this lock")
    }

    fn slot(&self, of: Loop) -> &AtomicU64 {
        &self.turned[of as usize]
    }

    fn now(&self) -> u64 {
        self.began.elapsed().as_millis() as u64
    }
}

/// While this lives its loop is expected to turn.
#[derive(Debug)]
pub struct Turning {
    vitals: Arc<Vitals>,
    of: Loop,
}

impl Turning {
    /// It turned.
    pub fn turned(&self) {
        self.vitals.turned(self.of);
    }

    /// Waits for what may take its time, and says so meanwhile.
    pub async fn while_waiting<T>(&self, wait: impl Future<Output = T>) -> T {
        self.vitals.while_waiting(self.of, wait).await
    }
}

impl Drop for Turning {
    fn drop(&mut self) {
        self.vitals.slot(self.of).store(AT_REST, Ordering::Relaxed);
    }
}

/// What happened in each of the last seconds.
#[derive(Debug)]
struct Rate {
    /// A second, and what happened in it; at the place of the second in the window.
    seconds: [(u64, u64); WINDOW_SECONDS as usize],
}

impl Default for Rate {
    fn default() -> Self {
        Self { seconds: [(0, 0); WINDOW_SECONDS as usize] }
    }
}

impl Rate {
    fn add(&mut self, second: u64, count: u64) {
        let slot = &mut self.seconds[(second % WINDOW_SECONDS) as usize];
        if slot.0 != second {
            *slot = (second, 0);
        }
        slot.1 += count;
    }

    /// Over the window, or what there has been of it.
    fn per_second(&self, now: u64) -> f64 {
        let recent = self.seconds.iter().filter(|(second, _)| second + WINDOW_SECONDS > now);
        let count: u64 = recent.map(|(_, count)| count).sum();
        count as f64 / (now + 1).min(WINDOW_SECONDS) as f64
    }
}

/// Seconds since 1970.
pub(crate) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn shortened(text: &str) -> String {
    match text.char_indices().nth(FAULT_CHARACTERS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn pass(seconds: u64) {
        tokio::time::advance(Duration::from_secs(seconds)).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_loop_hangs_if_it_began_and_neither_turns_nor_waits_nor_has_ended() {
        let vitals = Arc::new(Vitals::default());
        pass(3600).await;
        assert_eq!(vitals.hanging(), [], "none has begun");
        let (scan, publish) = (vitals.begin(Loop::Scan), vitals.begin(Loop::Publish));
        pass(59).await;
        publish.turned();
        assert_eq!(vitals.hanging(), []);
        pass(2).await;
        assert_eq!(vitals.hanging(), [(Loop::Scan, Duration::from_secs(61))]);
        scan.turned();
        assert_eq!(vitals.hanging(), []);
        pass(59).await;
        assert_eq!(vitals.hanging(), [(Loop::Publish, Duration::from_secs(61))]);
        drop(publish);
        vitals.turned(Loop::Publish);
        assert_eq!(vitals.hanging(), [], "one that has ended is not expected to turn");
    }

    #[tokio::test(start_paused = true)]
    async fn a_loop_that_waits_turns_however_long_it_waits() {
        let vitals = Arc::new(Vitals::default());
        let scan = vitals.begin(Loop::Scan);
        let waiting = scan.while_waiting(tokio::time::sleep(Duration::from_secs(3600)));
        let looking = async {
            for _ in 0..3599 {
                tokio::time::sleep(Duration::from_secs(1)).await;
                assert_eq!(vitals.hanging(), []);
            }
        };
        tokio::join!(waiting, looking);
    }

    #[test]
    fn the_throughput_is_that_of_the_last_minute_or_of_the_time_there_was() {
        let mut rate = Rate::default();
        assert_eq!(rate.per_second(0), 0.0);
        rate.add(0, 10);
        rate.add(1, 20);
        assert_eq!((rate.per_second(1), rate.per_second(59)), (15.0, 0.5));
        rate.add(60, 30);
        assert_eq!(rate.per_second(60), 50.0 / 60.0, "the first second is over");
        assert_eq!(rate.per_second(1_000), 0.0);
    }

    #[test]
    fn the_last_faults_are_remembered_newest_first_and_each_is_bounded() {
        let vitals = Vitals::default();
        for number in 0..FAULTS + 5 {
            vitals.fault(number % 2 == 0, &format!("{number} {}", "ä".repeat(10_000)));
        }
        let faults = vitals.now_known().faults;
        assert_eq!(faults.len(), FAULTS);
        assert!(faults[0].text.starts_with("24 ") && faults[0].error && !faults[1].error);
        assert!(faults.iter().all(|fault| fault.text.chars().count() == FAULT_CHARACTERS + 1));
    }
}
