use std::collections::VecDeque;
use std::io;
use std::num::{NonZeroU32, NonZeroUsize};
use std::sync::Mutex;

use alloy::json_abi::Event as AbiEvent;
use alloy::primitives::{Address, B256};
use proptest::prelude::*;
use redb::StorageBackend;
use redb::backends::InMemoryBackend;

use super::*;
use crate::event::{BlockRef, Log, Recognised, Role, Signatures};
use crate::permit::Moment;
use crate::store::{Added, Groups, Identity, Stretch};

/// What the sink does with its next run.
#[derive(Clone, Copy, Debug)]
enum Act {
    Take,
    /// Takes the first part, then fails.
    TakeThenFail(usize),
    /// Stores all of it, and the answer is lost.
    LoseAnswer,
    Fail,
    /// Gone for good.
    Close,
}

/// A sink that follows a script, then takes everything; refuses what it is told to refuse.
struct Script {
    acts: Mutex<VecDeque<Act>>,
    refused: Mutex<HashSet<String>>,
    down: Mutex<bool>,
    /// How long it takes over a run.
    takes: Duration,
    /// Of these lanes it takes longer.
    slow: Mutex<HashMap<String, Duration>>,
    /// Each attempt: keys and sequences of its run.
    attempts: Mutex<Vec<Vec<String>>>,
    /// What arrived, in order.
    stored: Mutex<Vec<(String, Arc<Message>)>>,
}

impl Default for Script {
    fn default() -> Self {
        Self {
            acts: Mutex::default(),
            refused: Mutex::default(),
            down: Mutex::default(),
            takes: Duration::from_millis(20),
            slow: Mutex::default(),
            attempts: Mutex::default(),
            stored: Mutex::default(),
        }
    }
}

fn name_of(message: &Message) -> String {
    let attribute = |wanted| message.attributes.iter().find(|(name, _)| *name == wanted).unwrap().1.as_str();
    format!("{}:{}", &attribute("escrow")[..4], attribute("sequence"))
}

impl Script {
    fn store(&self, run: &[Arc<Message>]) {
        let named = run.iter().map(|message| (name_of(message), Arc::clone(message)));
        self.stored.lock().unwrap().extend(named);
    }

    fn stored(&self) -> Vec<String> {
        self.stored.lock().unwrap().iter().map(|(name, _)| name.clone()).collect()
    }
}

impl Sink for Script {
    async fn publish(&self, run: Vec<Arc<Message>>) -> Receipt {
        self.attempts.lock().unwrap().push(run.iter().map(|message| name_of(message)).collect());
        let slow = self.slow.lock().unwrap().get(&name_of(&run[0])[..4]).copied();
        tokio::time::sleep(slow.unwrap_or(self.takes)).await;
        let fail = |acknowledged, failure| Receipt { acknowledged, failure: Some(failure) };
        let unavailable = || SinkError::Unavailable("down".into());
        if *self.down.lock().unwrap() {
            return fail(0, unavailable());
        }
        let refused = self.refused.lock().unwrap().clone();
        if run.iter().any(|message| refused.contains(&name_of(message))) {
            return fail(0, SinkError::Refused("too odd".into()));
        }
        let act = self.acts.lock().unwrap().pop_front().unwrap_or(Act::Take);
        match act {
            Act::Take => {
                self.store(&run);
                Receipt { acknowledged: run.len(), failure: None }
            }
            Act::TakeThenFail(part) if part < run.len() => {
                self.store(&run[..part]);
                fail(part, unavailable())
            }
            Act::LoseAnswer => {
                self.store(&run);
                fail(0, unavailable())
            }
            Act::TakeThenFail(_) | Act::Fail => fail(0, unavailable()),
            Act::Close => fail(0, SinkError::Closed("full".into())),
        }
    }

    fn is_sequential(&self) -> bool {
        false
    }

    fn name(&self) -> &'static str {
        "script"
    }
}

fn escrow(number: u8) -> Address {
    Address::repeat_byte(number)
}

/// A store in which these escrows have an announcement and, in this order, these approvals wait.
fn store(escrows: &[u8], approvals: &[u8]) -> Arc<Store> {
    let store = open(InMemoryBackend::new());
    append(&store, escrows, approvals);
    Arc::new(store)
}

fn open(backend: impl StorageBackend) -> Store {
    let identity = Identity {
        chain_id: 1,
        factory: Address::repeat_byte(0xFA),
        signatures: vec![],
        sink: "script".into(),
        ordering: "escrow".into(),
    };
    Store::open_backend(backend, identity, Some(1), Added::Read).unwrap()
}

/// What a store is in outlives it.
#[derive(Clone, Debug)]
struct Disk(Arc<InMemoryBackend>);

impl StorageBackend for Disk {
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write(offset, data)
    }
}

fn append(store: &Store, escrows: &[u8], approvals: &[u8]) {
    append_and(store, escrows, approvals, false);
}

/// `more`: blocks behind these are about to be read.
fn append_and(store: &Store, escrows: &[u8], approvals: &[u8], more: bool) {
    let parse = |text: &str| vec![AbiEvent::parse(text).unwrap()];
    let (deployed, approved) =
        ("EscrowDeployed(address indexed escrow)", "Approved(address indexed approver)");
    let signatures = Signatures::new(&parse(deployed), "escrow", &parse(approved), &[]).unwrap();
    let number = store.next_block();
    let block = BlockRef { number, hash: B256::left_padding_from(&number.to_be_bytes()) };
    let announced = escrows.iter().map(|number| (*number, true));
    let all = announced.chain(approvals.iter().map(|number| (*number, false)));
    let events = all.enumerate().map(|(index, (number, announces))| {
        let (role, signature) =
            if announces { (Role::Announcement, deployed) } else { (Role::Lifecycle, approved) };
        let log = Log {
            address: escrow(number),
            topics: vec![AbiEvent::parse(signature).unwrap().selector(), escrow(number).into_word()],
            data: Default::default(),
            block,
            transaction_hash: B256::ZERO,
            transaction_index: 0,
            log_index: index as u64,
            block_timestamp: None,
        };
        match signatures.recognise(role, &log) {
            Recognised::Known(decoded) => decoded.event(1, &log, 0),
            other => panic!("{other:?}"),
        }
    });
    let announced = escrows.iter().map(|number| (escrow(*number), block)).collect();
    let events = events.collect();
    let (blocks, finalized) = (vec![block], Some(number));
    store.accept(&Stretch { announced, events, blocks, finalized, more, ..Stretch::default() }).unwrap();
}

fn settings(max_outstanding: usize) -> config::Sink {
    config::Sink {
        kind: config::SinkKind::Stdout,
        ordering: config::Ordering::Escrow,
        timeout: Duration::from_secs(15),
        max_outstanding: NonZeroUsize::new(max_outstanding).unwrap(),
    }
}

/// Steps until nothing but blocked lanes is left; gives up after this many steps.
async fn drain(publisher: &mut Publisher<Script>) {
    for _ in 0..10_000 {
        match publisher.step().await.unwrap() {
            Step::Progress => {}
            Step::Idle | Step::Wait(_) if publisher.is_drained() => return,
            Step::Idle => panic!("idle with {} waiting", publisher.store.waiting()),
            Step::Wait(pause) => tokio::time::sleep(pause).await,
        }
        assert!(publisher.outstanding <= publisher.max_outstanding, "the bound on what may be repeated");
    }
    panic!("no end");
}

/// Names in the order of first arrival, by lane.
fn firsts(stored: &[String]) -> HashMap<String, Vec<String>> {
    let mut seen = HashSet::new();
    let mut lanes: HashMap<String, Vec<String>> = HashMap::new();
    for name in stored.iter().filter(|name| seen.insert((*name).clone())) {
        lanes.entry(name[..4].to_owned()).or_default().push(name.clone());
    }
    lanes
}

#[tokio::test(start_paused = true)]
async fn a_lanes_messages_go_in_one_run_and_what_was_acknowledged_is_committed() {
    let store = store(&[1, 2], &[1, 2, 1]);
    let sink = Arc::new(Script::default());
    let mut publisher = Publisher::new(Arc::clone(&sink), Arc::clone(&store), &settings(1000));
    drain(&mut publisher).await;
    let attempts = sink.attempts.lock().unwrap().clone();
    assert_eq!(attempts, vec![vec!["0x01:1", "0x01:2", "0x01:3"], vec!["0x02:1", "0x02:2"]]);
    assert_eq!((store.waiting(), store.watermark().unwrap()), (0, 5));
    assert!(publisher.lanes.is_empty() && publisher.held == 0 && publisher.outstanding == 0);
}

#[tokio::test(start_paused = true)]
async fn acknowledgements_share_a_commit_and_wait_for_others_no_longer_than_a_moment() {
    let store = store(&[1, 2, 3], &[]);
    let sink = Arc::new(Script::default());
    let slow = [("0x02", sink.takes + FOLD / 2), ("0x03", Duration::from_secs(10))];
    sink.slow.lock().unwrap().extend(slow.map(|(lane, takes)| (lane.to_owned(), takes)));
    let mut publisher = Publisher::new(Arc::clone(&sink), Arc::clone(&store), &settings(1000));
    let (began, mut seen) = (Instant::now(), vec![(3, Duration::ZERO)]);
    while store.waiting() > 0 {
        publisher.step().await.unwrap();
        if store.waiting() != seen.last().unwrap().0 {
            seen.push((store.waiting(), began.elapsed()));
        }
    }
    let [_, (two, then), (all, at_last)] = seen[..] else { panic!("{seen:?}") };
    assert_eq!((two, all), (1, 0));
    assert!((sink.takes + FOLD..sink.takes + 2 * FOLD).contains(&then), "{then:?}");
    assert!((Duration::from_secs(10)..Duration::from_secs(10) + FOLD).contains(&at_last), "{at_last:?}");
}

/// Steps until nothing is left to be done before entries are appended; when it had to wait for time to pass, for how long.
async fn settle(publisher: &mut Publisher<Script>) -> Option<Duration> {
    loop {
        match publisher.step().await.unwrap() {
            Step::Progress => {}
            Step::Idle => return None,
            Step::Wait(pause) => return Some(pause),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn what_a_catch_up_brings_waits_for_more_of_the_same_escrows_until_it_is_over() {
    let store = store(&[], &[]);
    let sink = Arc::new(Script::default());
    let mut publisher = Publisher::new(Arc::clone(&sink), Arc::clone(&store), &settings(1000));
    append_and(&store, &[1, 2], &[], true);
    let pause = settle(&mut publisher).await.expect("it does not wait for ever");
    assert_eq!((pause, sink.attempts.lock().unwrap().len()), (GATHER, 0));
    append_and(&store, &[], &[2, 1], true);
    assert!(settle(&mut publisher).await.is_some());
    // Blocks without events end it, too.
    append(&store, &[], &[]);
    drain(&mut publisher).await;
    let mut attempts = sink.attempts.lock().unwrap().clone();
    attempts.sort();
    assert_eq!(attempts, vec![vec!["0x01:1", "0x01:2"], vec!["0x02:1", "0x02:2"]]);
}

#[tokio::test(start_paused = true)]
async fn what_waits_for_a_catch_up_does_not_wait_longer_than_a_second() {
    let store = store(&[], &[]);
    let sink = Arc::new(Script::default());
    let mut publisher = Publisher::new(Arc::clone(&sink), Arc::clone(&store), &settings(1000));
    for escrow in [1, 2] {
        append_and(&store, &[escrow], &[], true);
        let began = Instant::now();
        drain(&mut publisher).await;
        assert_eq!(sink.stored().len(), escrow as usize);
        assert!((GATHER..GATHER * 2).contains(&began.elapsed()), "{:?}", began.elapsed());
    }
}

#[tokio::test(start_paused = true)]
async fn what_fills_a_group_waits_for_no_more() {
    let store = store(&[], &[]);
    store.group_by(Groups { backlog: 3, entries: 4, bytes: 1 << 20 });
    let sink = Arc::new(Script::default());
    let mut publisher = Publisher::new(Arc::clone(&sink), Arc::clone(&store), &settings(1000));
    append_and(&store, &[1, 2], &[1, 2, 1], true);
    let began = Instant::now();
    settle(&mut publisher).await;
    assert_eq!((sink.stored().len(), began.elapsed() < GATHER), (4, true));
}

#[tokio::test(start_paused = true)]
async fn where_a_request_is_not_of_one_escrow_a_catch_up_is_published_as_it_comes() {
    let buckets = config::Ordering::Bucket(NonZeroU32::new(2).unwrap());
    for ordering in [config::Ordering::None, buckets] {
        let store = store(&[], &[]);
        let sink = Arc::new(Script::default());
        let settings = config::Sink { ordering, ..settings(1000) };
        let mut publisher = Publisher::new(Arc::clone(&sink), Arc::clone(&store), &settings);
        append_and(&store, &[1], &[], true);
        assert_eq!(settle(&mut publisher).await, None, "{ordering:?}");
        assert_eq!(sink.stored().len(), 1, "{ordering:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn after_a_failure_messages_go_singly_and_nothing_overtakes() {
    let store = store(&[1, 2], &[1, 1, 1]);
    let sink = Arc::new(Script::default());
    sink.acts.lock().unwrap().extend([Act::TakeThenFail(1), Act::Take, Act::Fail]);
    let mut publisher = Publisher::new(Arc::clone(&sink), Arc::clone(&store), &settings(1000));
    drain(&mut publisher).await;
    let attempts = sink.attempts.lock().unwrap().clone();
    assert_eq!(attempts[0].len(), 4);
    assert_eq!(attempts[2], vec!["0x01:2"], "from the first unacknowledged, alone");
    assert_eq!(attempts[3], vec!["0x01:2"], "the same again");
    assert_eq!(firsts(&sink.stored())["0x01"], ["0x01:1", "0x01:2", "0x01:3", "0x01:4"]);
    assert_eq!(store.waiting(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_refused_message_blocks_its_lane_only_and_goes_first_when_it_is_taken() {
    let store = store(&[1, 2], &[1, 1, 2]);
    let sink = Arc::new(Script::default());
    sink.refused.lock().unwrap().insert("0x01:2".into());
    let mut publisher = Publisher::new(Arc::clone(&sink), Arc::clone(&store), &settings(1000));
    drain(&mut publisher).await;
    assert_eq!(firsts(&sink.stored())["0x02"], ["0x02:1", "0x02:2"]);
    assert_eq!(firsts(&sink.stored())["0x01"], ["0x01:1"]);
    let blocked = publisher.blocked();
    assert_eq!(blocked.len(), 1);
    assert_eq!(blocked[0].1, "too odd");
    assert_eq!(store.waiting(), 2);

    append(&store, &[], &[2, 1]);
    for _ in 0..20 {
        publisher.step().await.unwrap();
    }
    assert_eq!(firsts(&sink.stored())["0x02"].len(), 3, "the others go on");
    sink.refused.lock().unwrap().clear();
    tokio::time::sleep(Duration::from_secs(120)).await;
    drain(&mut publisher).await;
    assert_eq!(firsts(&sink.stored())["0x01"], ["0x01:1", "0x01:2", "0x01:3", "0x01:4"]);
    assert_eq!((store.waiting(), publisher.blocked().len()), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn in_an_outage_one_probe_at_a_time_goes_out_and_then_all_resume() {
    let escrows: Vec<u8> = (1..=50).collect();
    let store = store(&escrows, &[]);
    let sink = Arc::new(Script::default());
    *sink.down.lock().unwrap() = true;
    let mut publisher = Publisher::new(Arc::clone(&sink), Arc::clone(&store), &settings(10));
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(60) {
        if let Step::Wait(pause) = publisher.step().await.unwrap() {
            tokio::time::sleep(pause).await;
        }
    }
    let attempts = sink.attempts.lock().unwrap().len();
    assert!((11..=25).contains(&attempts), "ten before it was an outage, then a few probes: {attempts}");
    *sink.down.lock().unwrap() = false;
    drain(&mut publisher).await;
    assert_eq!((sink.stored().len(), store.waiting()), (50, 0));
}

#[tokio::test(start_paused = true)]
async fn blocked_lanes_that_were_unreachable_before_leave_the_room_to_the_others() {
    for ordering in [config::Ordering::Escrow, config::Ordering::None] {
        let store = store(&[1, 2], &[1, 2, 1, 2]);
        let sink = Arc::new(Script::default());
        sink.acts.lock().unwrap().extend([Act::Fail, Act::Fail]);
        let settings = config::Sink { ordering, ..settings(4) };
        let mut publisher = Publisher::new(Arc::clone(&sink), Arc::clone(&store), &settings);
        // Two lanes fill the window and fail; then their first messages are refused.
        for _ in 0..4 {
            publisher.step().await.unwrap();
        }
        assert_eq!(publisher.outstanding, 4);
        append(&store, &[3], &[3, 3]);
        sink.refused.lock().unwrap().extend(["0x01:1".to_owned(), "0x02:1".to_owned()]);
        drain(&mut publisher).await;
        assert_eq!(firsts(&sink.stored())["0x03"].len(), 3, "{ordering:?}");
        assert_eq!(publisher.blocked().len(), 2);
        sink.refused.lock().unwrap().clear();
        tokio::time::sleep(Duration::from_secs(120)).await;
        drain(&mut publisher).await;
        assert_eq!((store.waiting(), publisher.outstanding, publisher.held), (0, 0, 0), "{ordering:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_blocked_lane_that_holds_all_that_may_be_held_stops_publishing_and_that_is_known() {
    for (ordering, max_outstanding) in
        [(config::Ordering::Escrow, 4), (config::Ordering::Escrow, 32), (config::Ordering::None, 32)]
    {
        let store = store(&[1], &[1].repeat(12 * max_outstanding));
        store.group_by(Groups { backlog: 40, ..Groups::default() });
        let sink = Arc::new(Script::default());
        sink.refused.lock().unwrap().insert("0x01:1".into());
        let settings = config::Sink { ordering, ..settings(max_outstanding) };
        let vitals = Arc::new(Vitals::default());
        let publisher = Publisher::new(Arc::clone(&sink), Arc::clone(&store), &settings);
        let mut publisher = publisher.reporting_to(&vitals);
        drain(&mut publisher).await;
        assert!(vitals.now_known().publishing_stopped, "{ordering:?}, {max_outstanding}");
        let most = 11 * max_outstanding;
        assert!((most - max_outstanding / 16..=most).contains(&publisher.held), "{}", publisher.held);
        sink.refused.lock().unwrap().clear();
        tokio::time::sleep(Duration::from_secs(120)).await;
        drain(&mut publisher).await;
        assert_eq!(store.waiting(), 0);
        assert!(!vitals.now_known().publishing_stopped);
    }
}

#[tokio::test(start_paused = true)]
async fn of_a_backlog_a_blocked_escrow_holds_up_no_other_one() {
    let approvals: Vec<u8> = [1, 1, 1, 2].repeat(300);
    let store = store(&[1, 2], &approvals);
    store.group_by(Groups { backlog: 40, ..Groups::default() });
    let sink = Arc::new(Script::default());
    sink.refused.lock().unwrap().insert("0x01:1".into());
    let mut publisher = Publisher::new(Arc::clone(&sink), Arc::clone(&store), &settings(16));
    drain(&mut publisher).await;
    // Less than 11 times 16 of the blocked one stand before these.
    assert!(firsts(&sink.stored())["0x02"].len() >= 120, "{:?}", firsts(&sink.stored())["0x02"].len());
}

#[tokio::test(start_paused = true)]
async fn beside_a_blocked_lane_the_only_other_one_that_fails_is_an_outage() {
    for refused in [&["0x01:1"][..], &["0x01:1", "0x02:1"]] {
        let store = store(&[1], &[]);
        let sink = Arc::new(Script::default());
        sink.refused.lock().unwrap().extend(refused.iter().map(|name| (*name).to_owned()));
        let mut publisher = Publisher::new(Arc::clone(&sink), Arc::clone(&store), &settings(10));
        drain(&mut publisher).await;
        append(&store, &[2], &[]);
        drain(&mut publisher).await;
        assert_eq!(publisher.blocked().len(), refused.len());
        append(&store, &[3], &[]);
        *sink.down.lock().unwrap() = true;
        for _ in 0..20 {
            if let Step::Wait(pause) = publisher.step().await.unwrap() {
                tokio::time::sleep(pause).await;
            }
        }
        assert!(publisher.outage.is_some(), "{refused:?}");
        *sink.down.lock().unwrap() = false;
        drain(&mut publisher).await;
        assert!(publisher.outage.is_none() && publisher.failing.is_empty());
        assert_eq!(store.waiting(), refused.len() as u64);
    }
}

#[tokio::test(start_paused = true)]
async fn a_lane_that_failed_and_is_blocked_now_makes_no_outage_with_another() {
    let store = store(&[1, 2, 3], &[]);
    let sink = Arc::new(Script::default());
    let mut publisher = Publisher::new(Arc::clone(&sink), Arc::clone(&store), &settings(10));
    // The first fails, and is refused then: that the sink answers.
    sink.refused.lock().unwrap().extend(["0x02:1".to_owned(), "0x03:1".to_owned()]);
    sink.acts.lock().unwrap().push_back(Act::Fail);
    for _ in 0..6 {
        publisher.step().await.unwrap();
    }
    assert_eq!(publisher.failing.len(), 1);
    sink.refused.lock().unwrap().insert("0x01:1".to_owned());
    drain(&mut publisher).await;
    assert_eq!((publisher.blocked().len(), publisher.failing.len()), (3, 0));
}

#[tokio::test(start_paused = true)]
async fn a_permit_that_returns_is_noticed_while_something_is_under_way() {
    let store = store(&[1], &[]);
    let sink = Arc::new(Script { takes: Duration::from_secs(3600), ..Script::default() });
    let lasts = Duration::from_secs(1);
    let permit = Arc::new(Permit::confirmed(Moment::now(), lasts));
    let publisher = Publisher::new(Arc::clone(&sink), Arc::clone(&store), &settings(10));
    let mut publisher = publisher.permitted_by(Arc::clone(&permit));
    let handed = || sink.attempts.lock().unwrap().len();
    let watching = async {
        tokio::time::sleep(2 * lasts).await;
        append(&store, &[2], &[]);
        tokio::time::sleep(2 * lasts).await;
        assert_eq!((handed(), permit.holds()), (1, false));
        permit.confirm(Moment::now());
        tokio::time::sleep(lasts).await;
        assert_eq!(handed(), 2);
    };
    let stepping = async {
        loop {
            publisher.step().await.unwrap();
        }
    };
    tokio::select! {
        () = watching => {}
        () = stepping => {}
    }
}

#[tokio::test(start_paused = true)]
async fn a_blocked_lane_is_tried_again_after_an_outage_in_its_midst() {
    let store = store(&[1], &[]);
    let sink = Arc::new(Script::default());
    sink.refused.lock().unwrap().insert("0x01:1".into());
    let mut publisher = Publisher::new(Arc::clone(&sink), Arc::clone(&store), &settings(4));
    drain(&mut publisher).await;
    sink.refused.lock().unwrap().clear();
    *sink.down.lock().unwrap() = true;
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(200) {
        if let Step::Wait(pause) = publisher.step().await.unwrap() {
            tokio::time::sleep(pause).await;
        }
    }
    *sink.down.lock().unwrap() = false;
    for _ in 0..20 {
        match publisher.step().await.unwrap() {
            Step::Wait(pause) => tokio::time::sleep(pause).await,
            Step::Progress | Step::Idle => {}
        }
    }
    assert_eq!((sink.stored(), store.waiting()), (vec!["0x01:1".to_owned()], 0));
}

#[tokio::test(start_paused = true)]
async fn what_arrives_while_others_are_under_way_does_not_wait_for_them() {
    let store = store(&[1], &[]);
    let sink = Arc::new(Script::default());
    let mut publisher = Publisher::new(Arc::clone(&sink), Arc::clone(&store), &settings(1000));
    let appending = async {
        tokio::time::sleep(Duration::from_millis(5)).await;
        append(&store, &[2], &[]);
    };
    let stepping = async {
        loop {
            publisher.step().await.unwrap();
        }
    };
    // A run takes 20 ms.
    let stepping = tokio::time::timeout(Duration::from_millis(15), stepping);
    assert!(tokio::join!(appending, stepping).1.is_err());
    assert_eq!(sink.attempts.lock().unwrap().len(), 2, "handed over before the first one was answered");
}

#[tokio::test(start_paused = true)]
async fn what_a_sink_took_before_it_was_gone_is_committed() {
    let store = store(&[1, 2, 3], &[1, 2, 3]);
    let sink = Arc::new(Script::default());
    sink.acts.lock().unwrap().extend([Act::Take, Act::Close, Act::Take]);
    let mut publisher = Publisher::new(Arc::clone(&sink), Arc::clone(&store), &settings(100));
    let ended = loop {
        if let Err(error) = publisher.step().await {
            break error;
        }
    };
    assert_eq!(ended.to_string(), "the sink is gone: full");
    assert_eq!(sink.stored().len(), 4);
    assert_eq!(store.waiting(), 2, "all that was taken is committed");
}

#[tokio::test(start_paused = true)]
async fn draining_finishes_what_is_under_way_and_starts_nothing() {
    let store = store(&[1, 2], &[1, 1]);
    let sink = Arc::new(Script::default());
    let mut publisher = Publisher::new(Arc::clone(&sink), Arc::clone(&store), &settings(2));
    let first = tokio::time::timeout(Duration::from_millis(10), async {
        loop {
            publisher.step().await.unwrap();
        }
    });
    assert!(first.await.is_err());
    let handed = sink.attempts.lock().unwrap().iter().map(Vec::len).sum::<usize>();
    publisher.drain().await.unwrap();
    assert_eq!(sink.stored().len(), handed);
    assert_eq!(store.waiting(), 4 - handed as u64);
}

#[test]
fn a_bucket_keeps_an_escrow_always_on_the_same_key() {
    let buckets = config::Ordering::Bucket(NonZeroU32::new(64).unwrap());
    let address: Address = "0x00000000000000000000000000000000000000c5".parse().unwrap();
    assert_eq!(lane::ordering_key(&address, buckets), "escrow-5");
    assert_eq!(lane::ordering_key(&address, config::Ordering::None), "");
}

fn acts() -> impl Strategy<Value = Act> {
    prop_oneof![
        3 => Just(Act::Take),
        1 => Just(Act::Fail),
        1 => Just(Act::LoseAnswer),
        1 => (0usize..5).prop_map(Act::TakeThenFail),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever the sink does: everything arrives, first occurrences in order, repeats identical, never more under
    /// way than may be.
    #[test]
    fn whatever_the_sink_does_all_arrive_in_order_and_repeats_are_the_same_bytes(
        script in prop::collection::vec(acts(), 0..40),
        approvals in prop::collection::vec(1u8..5, 0..60),
        max_outstanding in 1usize..12,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let store = store(&[1, 2, 3, 4], &approvals);
            let sink = Arc::new(Script { acts: Mutex::new(script.into()), ..Script::default() });
            let mut publisher = Publisher::new(Arc::clone(&sink), Arc::clone(&store), &settings(max_outstanding));
            drain(&mut publisher).await;
            assert_eq!(store.waiting(), 0);
            let stored = sink.stored.lock().unwrap();
            let mut bytes: HashMap<&str, &Arc<Message>> = HashMap::new();
            for (name, message) in stored.iter() {
                assert_eq!(*bytes.entry(name).or_insert(message), message, "a repeat is the same");
            }
            let names: Vec<String> = stored.iter().map(|(name, _)| name.clone()).collect();
            for number in 1u8..5 {
                let lane = format!("0x0{number}");
                let count = 1 + approvals.iter().filter(|it| **it == number).count();
                let expected: Vec<String> = (1..=count).map(|sequence| format!("{lane}:{sequence}")).collect();
                assert_eq!(&firsts(&names)[&lane], &expected);
            }
        });
    }
}

/// The process is killed: what it had under way on the disk may still get there.
async fn killed(publisher: Publisher<Script>, mut store: Arc<Store>) {
    drop(publisher);
    while let Err(busy) = Arc::try_unwrap(store) {
        store = busy;
        tokio::task::yield_now().await;
    }
}

/// Messages handed over, ever, whose acknowledgement is not committed.
fn in_doubt(sink: &Script, store: &Store) -> usize {
    let attempts = sink.attempts.lock().unwrap();
    let handed: HashSet<&String> = attempts.iter().flatten().collect();
    let page = store.entries_from(0, usize::MAX).unwrap();
    let acknowledged = store.acknowledged().unwrap();
    let waiting = page.entries.iter().filter(|claimed| !acknowledged.contains(claimed.position));
    waiting
        .filter(|claimed| {
            handed.contains(&name_of(&Message::of(claimed.entry.clone(), 1, config::Ordering::Escrow)))
        })
        .count()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    /// A backlog goes out escrow by escrow, and the process is killed again and again while it does, or stopped, and while more
    /// is appended and what is done is pruned: all arrive, in order, and what may be repeated never grows beyond the bound.
    #[test]
    fn however_often_it_is_killed_no_more_is_in_doubt_than_may_be_and_all_arrive_in_order(
        script in prop::collection::vec(acts(), 0..20),
        lives in prop::collection::vec((0usize..40, prop::collection::vec(1u8..7, 0..40), any::<bool>()), 1..6),
        max_outstanding in prop_oneof![1usize..9, 30usize..40],
        (backlog, entries) in (1u64..20, 1u64..40),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let disk = Disk(Arc::default());
            let groups = Groups { backlog, entries, ..Groups::default() };
            let sink = Arc::new(Script { acts: Mutex::new(script.into()), ..Script::default() });
            let begin = || {
                let store = Arc::new(open(disk.clone()));
                store.group_by(groups);
                let publisher = Publisher::new(Arc::clone(&sink), Arc::clone(&store), &settings(max_outstanding));
                (store, publisher)
            };
            let (store, _) = begin();
            append(&store, &[1, 2, 3, 4, 5, 6], &[]);
            drop(store);
            let mut counts = [1; 6];
            for (steps, approvals, stops) in lives {
                let (store, mut publisher) = begin();
                approvals.iter().for_each(|number| counts[usize::from(*number) - 1] += 1);
                append(&store, &[], &approvals);
                for _ in 0..steps {
                    if let Step::Wait(pause) = publisher.step().await.unwrap() {
                        tokio::time::sleep(pause).await;
                    }
                    store.prune(0, 3).unwrap();
                    let in_doubt = in_doubt(&sink, &store);
                    assert!(in_doubt <= max_outstanding, "{in_doubt} of at most {max_outstanding}");
                }
                if stops {
                    publisher.drain().await.unwrap();
                }
                killed(publisher, store).await;
            }
            let (store, mut publisher) = begin();
            drain(&mut publisher).await;
            assert_eq!(store.waiting(), 0);
            let firsts = firsts(&sink.stored());
            for (number, count) in (1u8..).zip(counts) {
                let lane = format!("0x0{number}");
                let expected: Vec<String> = (1..=count).map(|sequence| format!("{lane}:{sequence}")).collect();
                assert_eq!(firsts[&lane], expected);
            }
        });
    }
}

#[tokio::test(start_paused = true)]
async fn a_backlog_goes_out_escrow_by_escrow_and_what_follows_it_in_order() {
    let approvals: Vec<u8> = (1..=4).cycle().take(40).collect();
    let store = store(&[1, 2, 3, 4], &approvals);
    store.group_by(Groups { backlog: 20, ..Groups::default() });
    let sink = Arc::new(Script::default());
    let mut publisher = Publisher::new(Arc::clone(&sink), Arc::clone(&store), &settings(30));
    drain(&mut publisher).await;
    let runs: Vec<(String, usize)> =
        sink.attempts.lock().unwrap().iter().map(|run| (run[0].clone(), run.len())).collect();
    let of = |name: &str, count| (name.to_owned(), count);
    // The third and the fourth are cut by the bound on what may be repeated.
    let [first, second, ..] = &runs[..] else { panic!("{runs:?}") };
    assert_eq!((first, second, runs.len()), (&of("0x01:1", 11), &of("0x02:1", 11), 6), "{runs:?}");
    append(&store, &[], &[4, 3, 2, 1]);
    let before = sink.stored().len();
    drain(&mut publisher).await;
    assert_eq!(sink.stored()[before..], ["0x04:12", "0x03:12", "0x02:12", "0x01:12"]);
}

/// How the process before ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Before {
    /// It had nothing handed over.
    Idle,
    Stopped,
    /// The sink had all of it, and no answer had come.
    StoppedUnanswered,
    /// After all it had handed over was acknowledged.
    Killed,
    /// The same; then another one was stopped that had not got through what that one left.
    KilledThenStopped,
}

#[tokio::test(start_paused = true)]
async fn a_backlog_that_is_found_goes_out_escrow_by_escrow_unless_some_of_it_may_have_gone_out_before() {
    use Before::{Idle, Killed, KilledThenStopped, Stopped, StoppedUnanswered};
    for before in [Idle, Stopped, StoppedUnanswered, Killed, KilledThenStopped] {
        let disk = Disk(Arc::default());
        let sink = Arc::new(Script::default());
        let begin = || {
            let store = Arc::new(open(disk.clone()));
            store.group_by(Groups { backlog: 20, ..Groups::default() });
            let publisher = Publisher::new(Arc::clone(&sink), Arc::clone(&store), &settings(6));
            (store, publisher)
        };
        let (store, mut publisher) = begin();
        append(&store, &[1, 2, 3, 4, 5, 6], &[]);
        match before {
            Idle => {}
            StoppedUnanswered => {
                *sink.acts.lock().unwrap() = [Act::LoseAnswer; 6].into();
                while sink.stored().is_empty() {
                    publisher.step().await.unwrap();
                }
            }
            Stopped | Killed | KilledThenStopped => drain(&mut publisher).await,
        }
        append(&store, &[], &(1..=6).cycle().take(30).collect::<Vec<_>>());
        if matches!(before, Stopped | StoppedUnanswered) {
            publisher.drain().await.unwrap();
        }
        killed(publisher, store).await;
        if before == KilledThenStopped {
            let (store, mut publisher) = begin();
            assert_eq!(publisher.step().await.unwrap(), Step::Progress);
            publisher.drain().await.unwrap();
            killed(publisher, store).await;
        }
        let handed = sink.attempts.lock().unwrap().len();
        drain(&mut begin().1).await;
        let attempts = sink.attempts.lock().unwrap();
        let first = attempts[handed].clone();
        // An escrow has at most half of what may be repeated.
        let expected: &[&str] = match before {
            Idle => &["0x01:1", "0x01:2", "0x01:3"],
            Stopped => &["0x01:2", "0x01:3", "0x01:4"],
            StoppedUnanswered => &["0x01:1"],
            Killed | KilledThenStopped => &["0x01:2"],
        };
        assert_eq!(first, expected, "{before:?}");
    }
}

/// A publisher that takes orders.
fn ordered(
    sink: &Arc<Script>,
    store: &Arc<Store>,
    max_outstanding: usize,
) -> (Publisher<Script>, mpsc::Sender<Order>) {
    let (orders, taken) = mpsc::channel(ORDERS);
    let publisher = Publisher::new(Arc::clone(sink), Arc::clone(store), &settings(max_outstanding));
    (publisher.taking(taken), orders)
}

fn replay(store: &Store) -> (Order, mpsc::UnboundedReceiver<Replayed>) {
    let (told, outcomes) = mpsc::unbounded_channel();
    let entries = store.entries_from(0, 100).unwrap().entries;
    (Order::Replay { entries, told }, outcomes)
}

fn outcomes(mut told: mpsc::UnboundedReceiver<Replayed>) -> Vec<Replayed> {
    std::iter::from_fn(|| told.try_recv().ok()).collect()
}

#[tokio::test(start_paused = true)]
async fn what_is_sent_again_is_marked_goes_in_order_within_the_bound_and_is_not_acknowledged_twice() {
    let store = store(&[1, 2], &[1, 2, 1]);
    let sink = Arc::new(Script::default());
    let (mut publisher, orders) = ordered(&sink, &store, 2);
    drain(&mut publisher).await;
    let before = sink.stored().len();
    let (order, told) = replay(&store);
    append(&store, &[], &[1]);
    orders.send(order).await.unwrap();
    drain(&mut publisher).await;
    assert_eq!(outcomes(told), vec![Replayed::Acknowledged; 5]);
    let stored = sink.stored.lock().unwrap().clone();
    let marked = |message: &Message| message.attributes.contains(&("replay", "true".to_owned()));
    let again: Vec<String> =
        stored.iter().filter(|(_, message)| marked(message)).map(|(name, _)| name.clone()).collect();
    assert_eq!(firsts(&again)["0x01"], ["0x01:1", "0x01:2", "0x01:3"]);
    assert_eq!(firsts(&again)["0x02"], ["0x02:1", "0x02:2"]);
    let new: Vec<&String> =
        stored[before..].iter().filter(|(_, message)| !marked(message)).map(|(name, _)| name).collect();
    assert_eq!(new, ["0x01:4"]);
    assert_eq!((store.waiting(), store.watermark().unwrap()), (0, 6));
    assert!(publisher.lanes.is_empty() && publisher.held == 0 && publisher.outstanding == 0);
}

#[tokio::test(start_paused = true)]
async fn a_lane_that_becomes_blocked_or_is_blocked_lets_go_of_what_is_only_sent_again() {
    let store = store(&[1], &[]);
    let sink = Arc::new(Script::default());
    let (mut publisher, orders) = ordered(&sink, &store, 10);
    drain(&mut publisher).await;
    append(&store, &[], &[1]);
    sink.refused.lock().unwrap().insert("0x01:2".into());
    let entries = store.entries_from(0, 1).unwrap().entries;
    // The first comes while the new message is under way, the second when it is refused.
    publisher.step().await.unwrap();
    for _ in 0..2 {
        let (told, outcomes_of_it) = mpsc::unbounded_channel();
        orders.send(Order::Replay { entries: entries.clone(), told }).await.unwrap();
        drain(&mut publisher).await;
        let left = outcomes(outcomes_of_it);
        assert!(matches!(&left[..], [Replayed::Left(0, why)] if why.contains("too odd")), "{left:?}");
    }
    assert_eq!((publisher.held, publisher.outstanding, publisher.blocked().len()), (1, 0, 1));
}

#[tokio::test(start_paused = true)]
async fn a_message_is_given_up_only_between_two_attempts_and_its_lane_goes_on_behind_it() {
    for ordering in [config::Ordering::Escrow, config::Ordering::None] {
        let store = store(&[1], &[1, 1]);
        let sink = Arc::new(Script::default());
        sink.refused.lock().unwrap().insert("0x01:1".into());
        let (orders, taken) = mpsc::channel(ORDERS);
        let settings = config::Sink { ordering, ..settings(10) };
        let mut publisher = Publisher::new(Arc::clone(&sink), Arc::clone(&store), &settings).taking(taken);
        let mut steps = 0;
        while !publisher.is_drained() {
            publisher.step().await.unwrap();
            steps += 1;
            assert!(steps < 100, "no end");
        }
        let (told, mut retried) = tokio::sync::oneshot::channel();
        orders.send(Order::Retry { only: None, told }).await.unwrap();
        let (told, mut given_up) = tokio::sync::oneshot::channel();
        orders.send(Order::GiveUp { position: 0, told }).await.unwrap();
        let (told, mut not_blocked) = tokio::sync::oneshot::channel();
        orders.send(Order::GiveUp { position: 1, told }).await.unwrap();
        let mut steps = 0;
        while store.waiting() > 0 || !publisher.is_drained() {
            publisher.step().await.unwrap();
            steps += 1;
            assert!(steps < 100, "no end");
        }
        assert_eq!(retried.try_recv().unwrap(), 1);
        assert!(given_up.try_recv().unwrap() && !not_blocked.try_recv().unwrap());
        let sequences: Vec<String> =
            sink.stored().iter().map(|name| name.rsplit(':').next().unwrap().to_owned()).collect();
        assert_eq!(sequences, ["2", "3"], "{ordering:?}");
        assert!(publisher.lanes.is_empty() && publisher.held == 0 && publisher.outstanding == 0);
    }
}
