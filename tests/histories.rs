//! Random histories of a chain, of nodes that fail and lie, of a sink that loses answers, and of crashes: whatever
//! happens, what was published less what was withdrawn is the chain, each escrow's messages are in order and numbered
//! without gaps, and nothing comes again but what was under way. In some of them nodes leave out logs, too, without a
//! word: what was missed comes late, and in the end stands all the same.
//!
//! The reader, the store and the publisher are the real ones, on a fake chain behind real HTTP. A history is made from a
//! number: `HISTORY=17 cargo test --test histories` tells number 17 alone, `HISTORIES=1000` so many.

mod common;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::time::{Duration, Instant};

use alloy::primitives::{Address, keccak256};
use common::fakechain::{self, Block, Emitted, FakeChain};
use common::relay::faults::{Fault, Faults};
use redb::StorageBackend;
use relayer::config::{Config, Sources};
use relayer::publish::{self, Message, Publisher, Receipt, Sink, SinkError};
use relayer::rpc::Rpc;
use relayer::scan::{self, Auditor, Scanner, Until};
use relayer::store::{Added, Store};
use tokio::task::JoinSet;

const FACTORY: Address = Address::repeat_byte(0xFA);
const DEPLOYED: &str = "EscrowDeployed(address)";
const APPROVED: &str = "Approved(address)";
const RELEASED: &str = "EscrowReleased(address)";
/// How many histories are told unless asked for more, and how many at once.
const HISTORIES: u64 = 48;
const AT_ONCE: usize = 12;
/// What one may take.
const PATIENCE: Duration = Duration::from_secs(120);
/// The longest pause a loop keeps between two steps: what the real ones leave a node in peace.
const PAUSE: Duration = Duration::from_millis(15);

/// Numbers that look random; the same for the same seed.
#[derive(Clone)]
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }

    fn one_of(&mut self, in_so_many: u64) -> bool {
        self.below(in_so_many) == 0
    }
}

/// What a process wrote is there after it was killed; what a killed one still tries to write is not.
#[derive(Clone, Debug)]
struct Disk {
    image: Arc<RwLock<Vec<u8>>>,
    gone: Arc<AtomicBool>,
}

impl Disk {
    fn new() -> Disk {
        Disk { image: Arc::default(), gone: Arc::default() }
    }

    /// For the next process.
    fn next_life(&self) -> Disk {
        Disk { image: Arc::clone(&self.image), gone: Arc::default() }
    }

    fn kill(&self) {
        // Waits for a write under way.
        let _image = self.image.write().expect("no panic while held");
        self.gone.store(true, Ordering::SeqCst);
    }

    fn write_with(&self, change: impl FnOnce(&mut Vec<u8>)) -> io::Result<()> {
        let mut image = self.image.write().expect("no panic while held");
        if self.gone.load(Ordering::SeqCst) {
            return Err(io::Error::other("killed"));
        }
        change(&mut image);
        Ok(())
    }
}

impl StorageBackend for Disk {
    fn len(&self) -> io::Result<u64> {
        Ok(self.image.read().expect("no panic while held").len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let image = self.image.read().expect("no panic while held");
        if self.gone.load(Ordering::SeqCst) {
            return Err(io::Error::other("killed"));
        }
        out.copy_from_slice(&image[offset as usize..offset as usize + out.len()]);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.write_with(|image| image.resize(len as usize, 0))
    }

    fn sync_data(&self) -> io::Result<()> {
        self.write_with(|_| ())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.write_with(|image| image[offset as usize..offset as usize + data.len()].copy_from_slice(data))
    }
}

/// A message that arrived.
#[derive(Clone, Debug)]
struct Arrival {
    life: usize,
    /// Whether the publisher was told.
    acknowledged: bool,
    message: Message,
}

/// Where messages go.
struct Broker {
    arrivals: Mutex<Vec<Arrival>>,
    dice: Mutex<Dice>,
    /// Of a thousand requests, how many go wrong.
    trouble: AtomicUsize,
    life: AtomicUsize,
}

impl Broker {
    fn arrive(&self, run: &[Arc<Message>], acknowledged: usize) {
        let life = self.life.load(Ordering::SeqCst);
        let arrived = run.iter().enumerate().map(|(place, message)| Arrival {
            life,
            acknowledged: place < acknowledged,
            message: Message::clone(message),
        });
        self.arrivals.lock().expect("no panic while held").extend(arrived);
    }
}

impl Sink for Broker {
    async fn publish(&self, run: Vec<Arc<Message>>) -> Receipt {
        let (trouble, kind, stored, told, pause) = {
            let mut dice = self.dice.lock().expect("no panic while held");
            let trouble = dice.below(1000) < self.trouble.load(Ordering::SeqCst) as u64;
            let stored = dice.below(run.len() as u64 + 1) as usize;
            (trouble, dice.below(3), stored, dice.below(stored as u64 + 1) as usize, dice.below(12))
        };
        tokio::time::sleep(Duration::from_millis(pause)).await;
        let (stored, told) = match (trouble, kind) {
            (false, _) => (run.len(), run.len()),
            (true, 0) => (0, 0),
            // Stored, and the answer is lost.
            (true, 1) => (run.len(), 0),
            (true, _) => (stored, told),
        };
        self.arrive(&run[..stored], told);
        let failure = trouble.then(|| SinkError::Unavailable("the history says so".into()));
        Receipt { acknowledged: told, failure }
    }

    fn is_sequential(&self) -> bool {
        false
    }

    fn name(&self) -> &'static str {
        "the broker"
    }
}

/// One process: reads and publishes until it is killed.
struct Life {
    store: Arc<Store>,
    disk: Disk,
    tasks: JoinSet<()>,
}

impl Life {
    fn begin(config: &Config, disk: Disk, broker: &Arc<Broker>, audited: bool) -> Life {
        let signatures = Arc::new(relayer::signatures(config).expect("they make a set"));
        let identity = relayer::identity(config, &signatures);
        let opened = Store::open_backend(disk.clone(), identity, Some(0), Added::Read);
        let store = Arc::new(opened.expect("whatever happened, the file can be opened"));
        let rpc = Arc::new(Rpc::new(config.chain.id, &config.rpc).expect("a client can be made"));
        let auditor = Auditor::new(Arc::clone(&rpc), Arc::clone(&store), Arc::clone(&signatures), config);
        let scanner = Scanner::new(rpc, Arc::clone(&store), signatures, config, Until::Forever);
        let publisher = Publisher::new(Arc::clone(broker), Arc::clone(&store), &config.sink);
        let mut tasks = JoinSet::new();
        tasks.spawn(read(scanner));
        tasks.spawn(publish(publisher));
        if audited {
            tasks.spawn(audit(auditor.expect("it is configured")));
        }
        Life { store, disk, tasks }
    }

    async fn kill(mut self) -> Disk {
        self.disk.kill();
        self.tasks.shutdown().await;
        self.disk.next_life()
    }
}

async fn read(mut scanner: Scanner<Rpc>) {
    loop {
        match scanner.step().await {
            Ok(scan::Step::Progress) => {}
            Ok(scan::Step::Idle | scan::Step::Done) => match scanner.step_late().await {
                Ok(scan::Step::Progress) => {}
                Ok(_) => tokio::time::sleep(PAUSE).await,
                Err(error) => return assert!(error.to_string().contains("killed"), "reading ended: {error}"),
            },
            Ok(scan::Step::Wait(pause)) => tokio::time::sleep(pause.min(PAUSE)).await,
            Err(error) => return assert!(error.to_string().contains("killed"), "reading ended: {error}"),
        }
    }
}

async fn audit(mut auditor: Auditor<Rpc>) {
    loop {
        match auditor.step().await {
            Ok(scan::Step::Progress) => tokio::time::sleep(PAUSE / 5).await,
            Ok(_) => tokio::time::sleep(PAUSE).await,
            Err(error) => return assert!(error.to_string().contains("killed"), "the audit ended: {error}"),
        }
    }
}

async fn publish(mut publisher: Publisher<Broker>) {
    loop {
        match publisher.step().await {
            Ok(publish::Step::Progress) => {}
            Ok(publish::Step::Idle) => publisher.woken().await,
            Ok(publish::Step::Wait(pause)) => tokio::time::sleep(pause.min(PAUSE)).await,
            Err(error) => return assert!(error.to_string().contains("killed"), "publishing ended: {error}"),
        }
    }
}

fn config(url: String, dice: &mut Dice) -> Config {
    let max_outstanding = (1 + dice.below(20)).to_string();
    let confirmations = dice.below(3).to_string();
    let max_range = (1 + dice.below(30)).to_string();
    let max_batch = (1 + dice.below(30)).to_string();
    let max_addresses = (1 + dice.below(6)).to_string();
    let settings = [
        ("chain.id", "1"),
        ("chain.confirmations", &confirmations),
        ("chain.max_retractions_per_minute", "1000000"),
        ("factory.address", "0xfafafafafafafafafafafafafafafafafafafafa"),
        ("factory.events", "EscrowDeployed(address indexed escrow)"),
        ("escrow.events", "[\"Approved(address indexed by)\", \"EscrowReleased(address indexed to)\"]"),
        ("escrow.terminal", "EscrowReleased"),
        ("rpc.urls", &url),
        ("rpc.timeout", "300ms"),
        ("rpc.requests_per_second", "100000"),
        ("rpc.burst", "100000"),
        ("rpc.max_range", &max_range),
        ("rpc.max_batch", &max_batch),
        ("rpc.max_addresses", &max_addresses),
        ("sink.max_outstanding", &max_outstanding),
        ("audit.calls_per_hour", "1000000000"),
    ];
    let overrides = settings.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
    let sources = Sources { overrides, directory: PathBuf::from("/nonexistent"), ..Sources::default() };
    Config::load(&sources).expect("it is right").0
}

/// One of nine contracts; one of them is the factory itself.
fn contract(number: u64) -> Address {
    if number == 8 { FACTORY } else { Address::repeat_byte(number as u8 + 1) }
}

/// The logs of a block: escrows announced before, after and between their own logs; strangers that look alike.
fn logs(dice: &mut Dice) -> Vec<Emitted> {
    let mut logs = vec![];
    for transaction in 0..dice.below(4) {
        let subject = contract(dice.below(9));
        for _ in 0..1 + dice.below(3) {
            let (address, event) = match dice.below(7) {
                0 | 1 => (FACTORY, DEPLOYED),
                2 => (contract(dice.below(8)), DEPLOYED),
                3 => (subject, RELEASED),
                4 => (Address::repeat_byte(0xEE), APPROVED),
                _ => (subject, APPROVED),
            };
            let topics = vec![keccak256(event), subject.into_word()];
            logs.push(Emitted { address, topics, transaction, ..Emitted::default() });
        }
    }
    logs
}

/// What must stand in the end.
fn truth(blocks: &[Block]) -> BTreeMap<String, Vec<String>> {
    let lifecycle = [keccak256(APPROVED), keccak256(RELEASED)];
    fakechain::truth(blocks, FACTORY, &[keccak256(DEPLOYED)], &lifecycle)
}

/// What was published less what was withdrawn, per lane; panics where order, numbering or repeats are not as promised. Where
/// some of it came `late`, it has no order.
fn standing(arrivals: &[Arrival], max_outstanding: usize, late: bool) -> BTreeMap<String, Vec<String>> {
    let mut lanes: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut first: HashMap<(String, u64), &Arrival> = HashMap::new();
    let mut last: HashMap<String, u64> = HashMap::new();
    let mut told: HashMap<(String, u64), usize> = HashMap::new();
    let mut repeated: HashMap<usize, BTreeSet<(String, u64)>> = HashMap::new();
    for arrival in arrivals {
        let body: serde_json::Value = serde_json::from_slice(&arrival.message.data).expect("JSON");
        let (key, sequence) = (arrival.message.ordering_key.clone(), body["sequence"].as_u64().expect("one"));
        let before = last.insert(key.clone(), sequence).unwrap_or(0);
        assert!(sequence <= before + 1, "{key}: {sequence} after {before}");
        let id = (key.clone(), sequence);
        if let Some(life) = told.get(&id) {
            assert!(*life < arrival.life, "{id:?} was acknowledged, and came again in the same life");
            repeated.entry(arrival.life).or_default().insert(id.clone());
        }
        if arrival.acknowledged {
            told.insert(id.clone(), arrival.life);
        }
        if let Some(first) = first.insert(id, arrival) {
            assert_eq!(first.message, arrival.message, "what comes again is the same");
            continue;
        }
        let lane = lanes.entry(key.clone()).or_default();
        match body["retracts"].as_str() {
            None => lane.push(body["event_id"].as_str().expect("an id").to_owned()),
            Some(retracted) if late => {
                let place = lane.iter().position(|id| id == retracted);
                lane.remove(place.unwrap_or_else(|| panic!("{key}: {retracted} was never there")));
            }
            Some(retracted) => assert_eq!(lane.pop().as_deref(), Some(retracted), "{key}: newest first"),
        }
    }
    for (life, repeats) in repeated {
        assert!(
            repeats.len() <= max_outstanding,
            "life {life}: what was acknowledged came again: {repeats:?}"
        );
    }
    lanes.retain(|_, lane| !lane.is_empty());
    lanes
}

/// What is missing, and what is there that should not be.
fn differences(
    stands: &BTreeMap<String, Vec<String>>,
    truth: &BTreeMap<String, Vec<String>>,
    blocks: &[Block],
) -> Vec<String> {
    let all = |lanes: &BTreeMap<String, Vec<String>>| -> BTreeSet<(String, String)> {
        let ids = lanes.iter().flat_map(|(key, ids)| ids.iter().map(|id| (key.clone(), id.clone())));
        ids.collect()
    };
    let (stands, truth) = (all(stands), all(truth));
    let height =
        |id: &str| blocks.iter().find(|block| id.contains(&block.hash.to_string())).map(|it| it.number);
    let missing = truth.difference(&stands).map(|(key, id)| format!("{key} lacks {id} of {:?}", height(id)));
    let extra = stands.difference(&truth).map(|(key, id)| format!("{key} has {id} of {:?}", height(id)));
    missing.chain(extra).collect()
}

/// Faults of a node, so many of a thousand requests.
fn trouble(faults: &Faults, seed: u64, of_a_thousand: u64, lag: u64) {
    faults.on_request(move |number, _| {
        let mut dice = Dice(seed ^ (number as u64) << 20);
        dice.below(7);
        if dice.below(1000) < of_a_thousand {
            return match dice.below(9) {
                0 => Fault::Status(503, "", "no"),
                1 => Fault::Status(429, "", "slow down"),
                2 => Fault::Body("<html>"),
                3 => Fault::Truncated,
                4 => Fault::Reset,
                5 => Fault::Errors(-32000, "query exceeds max results 20000"),
                6 => Fault::Errors(-32005, "the tide is out"),
                7 => Fault::OneError(-32000, "batch too large"),
                _ => Fault::Hang,
            };
        }
        match dice.below(4) {
            _ if lag == 0 => Fault::Pass,
            0 => Fault::Behind(1 + dice.below(lag)),
            1 => Fault::SomeBehind(1 + dice.below(lag)),
            _ => Fault::Pass,
        }
    });
}

/// Of so many answers by block hash one leaves out so many of its logs.
fn leave_out(faults: &Faults, seed: u64, one_of: u64) {
    faults.on_request(move |number, calls| {
        let mut dice = Dice(seed ^ (number as u64) << 20);
        dice.below(7);
        let by_hash = calls.iter().any(|call| call["params"][0]["blockHash"].is_string());
        if !by_hash || !dice.one_of(one_of) {
            return Fault::Pass;
        }
        Fault::edited(move |_, answers| {
            let mut dice = dice.clone();
            for answer in answers {
                if let Some(logs) = answer["result"].as_array_mut() {
                    logs.retain(|_| dice.one_of(2));
                }
            }
        })
    });
}

async fn tell(seed: u64, audited: bool) {
    let mut dice = Dice(seed);
    dice.below(3);
    let chain = Arc::new(FakeChain::new(1));
    let faults = Faults::fake(Arc::clone(&chain)).await;
    let config = config(faults.url(), &mut dice);
    let broker = Arc::new(Broker {
        arrivals: Mutex::default(),
        dice: Mutex::new(Dice(seed + 1)),
        trouble: AtomicUsize::new(0),
        life: AtomicUsize::new(0),
    });
    let mut life = Life::begin(&config, Disk::new(), &broker, audited);
    let mut lost: Vec<Vec<Block>> = vec![];
    for _ in 0..30 + dice.below(60) {
        match dice.below(16) {
            0..=5 => chain.extend(logs(&mut dice)),
            6 => (0..dice.below(25)).for_each(|_| chain.extend(logs(&mut dice))),
            7 | 8 => {
                lost.push(chain.fork(1 + dice.below(6)));
                (0..dice.below(8)).for_each(|_| chain.extend(logs(&mut dice)));
            }
            // The chain is again what it was.
            9 => lost.iter().rev().take(1 + dice.below(3) as usize).for_each(|branch| chain.restore(branch)),
            10 => trouble(&faults, seed, dice.below(120), dice.below(5)),
            11 => faults.heal(),
            12 => broker.trouble.store(dice.below(250) as usize, Ordering::SeqCst),
            13 => {
                let disk = life.kill().await;
                broker.life.fetch_add(1, Ordering::SeqCst);
                life = Life::begin(&config, disk, &broker, audited);
            }
            14 if audited => leave_out(&faults, seed, 1 + dice.below(3)),
            _ => tokio::time::sleep(Duration::from_millis(dice.below(60))).await,
        }
        if dice.one_of(3) {
            tokio::time::sleep(Duration::from_millis(dice.below(25))).await;
        }
    }
    faults.heal();
    broker.trouble.store(0, Ordering::SeqCst);
    // Beyond what could pass for a node that lags.
    (0..9).for_each(|_| chain.extend(vec![]));
    if audited {
        // What is final is asked for again after 64 blocks, and stored with the next one.
        (0..80).for_each(|_| chain.extend(vec![]));
        while life.store.cursor().is_none_or(|cursor| cursor.number + 3 < chain.blocks().len() as u64) {
            tokio::time::sleep(PAUSE).await;
        }
        tokio::time::sleep(20 * PAUSE).await; // a poll that finds nothing new
        chain.extend(vec![]);
    }
    let blocks = chain.blocks();
    let accepted = &blocks[..blocks.len() - config.chain.confirmations as usize];
    let head = accepted.last().expect("there are blocks").hash;
    let began = Instant::now();
    let is_audited = || {
        let unaudited = life.store.unaudited(1).expect("it can be read");
        !audited || unaudited.is_none() && life.store.late_read().is_none()
    };
    let is_read = || life.store.cursor().is_some_and(|cursor| cursor.hash == head);
    while !(is_read() && is_audited() && life.store.waiting() == 0) {
        assert!(began.elapsed() < PATIENCE / 2, "history {seed}: never done: {:?}", life.store.cursor());
        assert_eq!(life.tasks.len(), 2 + usize::from(audited), "history {seed}: a loop ended");
        assert!(life.tasks.try_join_next().is_none(), "history {seed}: a loop ended");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let arrivals = broker.arrivals.lock().expect("no panic while held").clone();
    let max_outstanding = config.sink.max_outstanding;
    let (mut stands, mut truth) =
        (standing(&arrivals, NonZeroUsize::get(max_outstanding), audited), truth(accepted));
    if audited {
        stands.values_mut().chain(truth.values_mut()).for_each(|lane| lane.sort());
    }
    let wrong = differences(&stands, &truth, &blocks);
    assert!(stands == truth, "history {seed}: what stands is not the chain: {wrong:#?}");
    life.kill().await;
}

/// Tells them all, some at once.
async fn tell_all(audited: bool, many: u64) {
    let asked = |name| std::env::var(name).ok().map(|number| number.parse().expect("a number"));
    let many = 0..asked("HISTORIES").unwrap_or(many);
    let mut untold = asked("HISTORY").map_or(many, |seed: u64| seed..seed + 1);
    let mut telling = JoinSet::new();
    loop {
        while telling.len() < AT_ONCE
            && let Some(seed) = untold.next()
        {
            telling.spawn(async move {
                let told = tokio::time::timeout(PATIENCE, tokio::spawn(tell(seed, audited))).await;
                told.unwrap_or_else(|_| panic!("history {seed} has no end"))
                    .unwrap_or_else(|error| panic!("history {seed}: {error}"));
            });
        }
        match telling.join_next().await {
            Some(told) => told.expect("see above: HISTORY=… cargo test --test histories tells it again"),
            None => return,
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_happens_what_stands_is_the_chain_in_order_and_nothing_else_comes_again() {
    tell_all(false, HISTORIES).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_is_left_out_near_the_head_stands_in_the_end() {
    tell_all(true, HISTORIES / 2).await;
}
