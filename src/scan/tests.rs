mod audit;
mod fork;
mod late;

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::num::NonZeroU64;
use std::sync::{Condvar, Mutex};

use alloy::json_abi::Event as AbiEvent;
use alloy::primitives::{Address, B256, keccak256};
use proptest::prelude::*;
use redb::StorageBackend;
use redb::backends::InMemoryBackend;
use tokio::sync::Notify;

use super::ahead::RANGES;
use super::*;
use crate::event::Log;
use crate::store::{Added, Entry, Identity, Kind};

const FACTORY: Address = Address::repeat_byte(0xFA);
const DEPLOYED: &str = "EscrowDeployed(address indexed escrow)";
const APPROVED: &str = "Approved(address indexed approver)";

fn escrow(number: u8) -> Address {
    Address::repeat_byte(number)
}

#[derive(Clone)]
struct Block {
    header: Header,
    logs: Vec<Log>,
}

/// A chain in memory that forks, lags and refuses as told.
#[derive(Default)]
struct Fake {
    blocks: Mutex<Vec<Block>>,
    /// How many of the newest blocks the node answering does not have.
    lag: Mutex<usize>,
    refusals: Mutex<VecDeque<Refused>>,
    finality: Option<u64>,
    /// The most blocks there ever were.
    highest: Mutex<usize>,
    no_code: Mutex<bool>,
    /// Each round trip with its calls.
    asked: Mutex<Vec<Vec<Call>>>,
    salt: Mutex<u64>,
    /// Another provider of the same chain: what it says of any call.
    other: Mutex<Option<Other>>,
    turned_away: Mutex<usize>,
    /// A block the node says it has not.
    hidden: Mutex<Option<u64>>,
    /// Which logs the node leaves out without a word, and of which spans.
    left_out: Mutex<Option<LeftOut>>,
    /// What it refuses.
    refuses: Mutex<Option<Refuses>>,
    /// What contracts say they counted.
    counted: Mutex<u64>,
    /// Announces heads, if it is there.
    announcer: Option<watch::Sender<Option<Header>>>,
    /// How often announcements were missed.
    missed: Mutex<usize>,
    /// Keeps the answer of the first request for logs from that block on until it is told to go on.
    held: Mutex<Option<(u64, Arc<Notify>)>>,
}

type Refuses = fn(&Call) -> bool;
type LeftOut = Box<dyn Fn(&Log, Span) -> bool + Send>;

type Other = Box<dyn Fn(&Fake, &Call) -> Result<Answer, Refused> + Send>;

impl Fake {
    fn new(finality: Option<u64>) -> Arc<Self> {
        let fake = Self { finality, ..Self::default() };
        fake.extend(&[], &[]);
        Arc::new(fake)
    }

    /// A block with these announcements, then these approvals, all in one transaction.
    fn extend(&self, announced: &[u8], approved: &[u8]) {
        let announced = announced.iter().map(|it| (FACTORY, DEPLOYED, *it));
        let approved = approved.iter().map(|it| (escrow(*it), APPROVED, *it));
        self.extend_with(&announced.chain(approved).collect::<Vec<_>>());
    }

    /// A block with these logs: emitter, signature and the escrow in the only argument.
    fn extend_with(&self, logs: &[(Address, &str, u8)]) {
        let mut blocks = self.blocks.lock().unwrap();
        let mut salt = self.salt.lock().unwrap();
        *salt += 1;
        let number = blocks.len() as u64;
        let block = BlockRef { number, hash: keccak256(salt.to_be_bytes()) };
        let parent_hash = blocks.last().map_or(B256::ZERO, |block| block.header.block.hash);
        let logs = logs.iter().enumerate().map(|(index, (address, signature, it))| Log {
            address: *address,
            topics: vec![AbiEvent::parse(signature).unwrap().selector(), escrow(*it).into_word()],
            data: Default::default(),
            block,
            transaction_hash: B256::ZERO,
            transaction_index: 0,
            log_index: index as u64,
            block_timestamp: None,
        });
        blocks.push(Block {
            header: Header { block, parent_hash, timestamp: number * 12 },
            logs: logs.collect(),
        });
    }

    /// Takes off the newest blocks, never one that has ever been final.
    fn drop_newest(&self, depth: usize) {
        let mut blocks = self.blocks.lock().unwrap();
        let mut highest = self.highest.lock().unwrap();
        *highest = (*highest).max(blocks.len());
        let keep = blocks
            .len()
            .saturating_sub(depth)
            .max(highest.saturating_sub(self.finality.unwrap_or(0) as usize).max(1));
        blocks.truncate(keep);
    }

    fn set_lag(&self, lag: usize) {
        *self.lag.lock().unwrap() = lag;
    }

    fn forget(&self) {
        self.asked.lock().unwrap().clear();
    }

    /// Per round trip: headers and logs asked for.
    fn asked(&self) -> Vec<(usize, usize)> {
        let asked = self.asked.lock().unwrap();
        let count = |calls: &Vec<Call>| {
            let logs = calls.iter().filter(|call| matches!(call, Call::Logs(_))).count();
            (calls.len() - logs, logs)
        };
        asked.iter().map(count).collect()
    }

    fn answer(&self, call: &Call) -> Result<Answer, Refused> {
        if self.refuses.lock().unwrap().is_some_and(|refuses| refuses(call)) {
            return Err(Refused::FewerAddresses("please specify an address".into()));
        }
        let blocks = self.blocks.lock().unwrap();
        let visible = &blocks[..blocks.len().saturating_sub(*self.lag.lock().unwrap()).max(1)];
        let hidden = *self.hidden.lock().unwrap();
        let at = |number: u64| {
            visible.get(number as usize).map(|block| block.header).filter(|_| hidden != Some(number))
        };
        let head = visible.len() as u64 - 1;
        Ok(match call {
            Call::Read { .. } => {
                Answer::Output(B256::left_padding_from(&self.counted.lock().unwrap().to_be_bytes()).into())
            }
            Call::Code(_) => Answer::Code(!*self.no_code.lock().unwrap()),
            Call::Header(BlockTag::Number(number)) => Answer::Header(at(*number)),
            Call::Header(BlockTag::Latest) => Answer::Header(at(head)),
            Call::Header(BlockTag::Safe | BlockTag::Finalized) => {
                let finality = self.finality.ok_or_else(|| Refused::UnknownTag("finalized".into()))?;
                Answer::Header(at(head.saturating_sub(finality)))
            }
            Call::Logs(filter) => {
                let left_out = self.left_out.lock().unwrap();
                let is_told = |log: &&Log| left_out.as_ref().is_none_or(|it| !it(log, filter.span));
                let logs = |in_span: &dyn Fn(&Header) -> bool| {
                    let logs =
                        visible.iter().filter(|block| in_span(&block.header)).flat_map(|block| &block.logs);
                    let fits = |log: &&Log| {
                        (filter.addresses.is_empty() || filter.addresses.list().contains(&log.address))
                            && filter.topics.contains(&log.topics[0])
                    };
                    Answer::Logs(logs.filter(fits).filter(is_told).cloned().collect())
                };
                match filter.span {
                    // As nodes that are behind do: no error, just nothing.
                    Span::Range(range) => logs(&|header| range.contains(header.block.number)),
                    Span::Block(hash) if !visible.iter().any(|block| block.header.block.hash == hash) => {
                        return Err(Refused::Behind("unknown block".into()));
                    }
                    Span::Block(hash) => logs(&|header| header.block.hash == hash),
                }
            }
        })
    }
}

impl Chain for Fake {
    async fn ask(&self, calls: Vec<Call>) -> Result<Vec<Answer>, Refused> {
        self.asked.lock().unwrap().push(calls.clone());
        let held = self.held.lock().unwrap().take_if(|(block, _)| asks_from(&calls, *block));
        if let Some((_, go_on)) = held {
            go_on.notified().await;
        }
        if let Some(refused) = self.refusals.lock().unwrap().pop_front() {
            return Err(refused);
        }
        calls.iter().map(|call| self.answer(call)).collect()
    }

    async fn ask_another(&self, calls: Vec<Call>) -> Option<Result<Vec<Answer>, Refused>> {
        let other = self.other.lock().unwrap();
        other.as_ref().map(|other| calls.iter().map(|call| other(self, call)).collect())
    }

    fn heads(&self) -> Option<watch::Receiver<Option<Header>>> {
        self.announcer.as_ref().map(watch::Sender::subscribe)
    }

    fn heads_are_missing(&self) {
        *self.missed.lock().unwrap() += 1;
    }

    async fn ask_ahead(&self, calls: Vec<Call>) -> Option<Vec<Answer>> {
        self.ask(calls).await.ok()
    }

    async fn ask_once(&self, calls: Vec<Call>) -> Result<Vec<Answer>, Refused> {
        self.ask(calls).await
    }

    fn turn_away(&self) {
        *self.turned_away.lock().unwrap() += 1;
    }
}

/// Whether there is a call for the logs of a range that begins with that block.
fn asks_from(calls: &[Call], block: u64) -> bool {
    let begins = |call: &Call| matches!(call, Call::Logs(LogFilter { span: Span::Range(range), .. }) if range.from() == block);
    calls.iter().any(begins)
}

fn config(settings: &[(&str, &str)]) -> config::Config {
    let base = [
        ("chain.id", "1"),
        ("chain.confirmations", "0"),
        ("factory.address", "0xfafafafafafafafafafafafafafafafafafafafa"),
        ("factory.events", DEPLOYED),
        ("escrow.events", APPROVED),
        ("escrow.terminal", "[]"),
        ("rpc.urls", "http://localhost"),
    ];
    let overrides =
        base.iter().chain(settings).map(|(key, value)| (key.to_string(), value.to_string())).collect();
    let directory = std::path::PathBuf::from("/nonexistent");
    config::Config::load(&config::Sources { overrides, directory, ..Default::default() }).unwrap().0
}

fn open_store() -> Arc<Store> {
    open_store_on(InMemoryBackend::new())
}

fn open_store_on(backend: impl StorageBackend) -> Arc<Store> {
    let identity = Identity {
        chain_id: 1,
        factory: FACTORY,
        signatures: vec![],
        sink: "none".into(),
        ordering: "escrow".into(),
    };
    Arc::new(Store::open_backend(backend, identity, Some(0), Added::Read).unwrap())
}

fn scanner(chain: &Arc<Fake>, store: &Arc<Store>, settings: &[(&str, &str)], until: Until) -> Scanner<Fake> {
    let config = config(settings);
    let signatures = Arc::new(crate::signatures(&config).unwrap());
    Scanner::new(Arc::clone(chain), Arc::clone(store), signatures, &config, until)
}

/// Steps until there is nothing to do.
async fn settle(scanner: &mut Scanner<Fake>) {
    settle_seeing(scanner, || ()).await;
}

/// The same, and looks after each step that read something.
async fn settle_seeing(scanner: &mut Scanner<Fake>, mut see: impl FnMut()) {
    for _ in 0..1000 {
        match scanner.step().await.unwrap() {
            Step::Idle | Step::Done => return,
            Step::Progress => see(),
            Step::Wait(pause) => tokio::time::sleep(pause).await,
        }
    }
    panic!("never settles");
}

/// Until nothing more happens by itself: paused time goes on only then.
async fn idle() {
    tokio::time::sleep(Duration::from_millis(1)).await;
}

/// Every entry of the log, by position. Claims them.
fn entries(store: &Store) -> Vec<Entry> {
    store.claim(usize::MAX).unwrap().into_iter().map(|claimed| claimed.entry).collect()
}

/// Per escrow the events standing: published and not withdrawn, as (block hash, log index).
fn standing(entries: &BTreeMap<u64, Entry>) -> BTreeMap<Address, Vec<(B256, u64)>> {
    let mut lanes: BTreeMap<Address, Vec<(B256, u64)>> = BTreeMap::new();
    for entry in entries.values() {
        let lane = lanes.entry(entry.escrow).or_default();
        match entry.kind {
            Kind::Event => lane.push((entry.block_hash, entry.log_index)),
            Kind::Retraction { of } => {
                let withdrawn = &entries[&of];
                assert_eq!(lane.pop(), Some((withdrawn.block_hash, withdrawn.log_index)), "newest first");
            }
        }
    }
    lanes.retain(|_, lane| !lane.is_empty());
    lanes
}

#[tokio::test(start_paused = true)]
async fn an_idle_poll_is_one_call_and_a_new_block_two_whatever_the_confirmations() {
    for confirmations in ["0", "2"] {
        let chain = Fake::new(Some(64));
        chain.extend(&[1, 2, 3], &[]);
        (0..5).for_each(|_| chain.extend(&[], &[]));
        let store = open_store();
        let mut scanner = scanner(&chain, &store, &[("chain.confirmations", confirmations)], Until::Forever);
        settle(&mut scanner).await;
        for _ in 0..3 {
            chain.extend(&[], &[1]);
            settle(&mut scanner).await;
        }
        chain.forget();
        assert_eq!(scanner.step().await.unwrap(), Step::Idle);
        assert_eq!(chain.asked(), [(1, 0)], "idle with {confirmations} confirmations");
        chain.forget();
        chain.extend(&[], &[2]);
        assert_eq!(scanner.step().await.unwrap(), Step::Progress);
        assert_eq!(chain.asked(), [(1, 0), (0, 1)], "a block with {confirmations} confirmations");
    }
}

/// A chain that announces its heads, read to its head.
async fn announcing(confirmations: &str) -> (Arc<Fake>, Arc<Store>, Scanner<Fake>) {
    let fake = Fake { finality: Some(64), announcer: Some(watch::Sender::new(None)), ..Fake::default() };
    fake.extend(&[], &[]);
    fake.extend(&[1, 2], &[]);
    (0..5).for_each(|_| fake.extend(&[], &[]));
    let (chain, store) = (Arc::new(fake), open_store());
    let mut scanner = scanner(&chain, &store, &[("chain.confirmations", confirmations)], Until::Forever);
    settle(&mut scanner).await;
    (chain, store, scanner)
}

fn announce(chain: &Fake) {
    let head = chain.blocks.lock().unwrap().last().unwrap().header;
    chain.announcer.as_ref().unwrap().send_replace(Some(head));
}

#[tokio::test(start_paused = true)]
async fn an_announced_block_is_one_round_trip_and_what_was_not_announced_is_found_by_polling() {
    for confirmations in ["0", "2"] {
        let (chain, store, mut scanner) = announcing(confirmations).await;
        for _ in 0..3 {
            chain.extend(&[], &[1]);
            announce(&chain);
            chain.forget();
            assert_eq!(scanner.step().await.unwrap(), Step::Progress);
            assert_eq!(scanner.step().await.unwrap(), Step::Idle);
            assert_eq!(chain.asked(), [(0, 1)], "the logs, by the hash that was announced, and no poll");
        }
        // Two blocks, and only the second is announced.
        chain.extend(&[], &[1]);
        chain.extend(&[], &[2]);
        announce(&chain);
        chain.forget();
        settle(&mut scanner).await;
        assert_eq!(chain.asked(), [(1, 0), (0, 2)], "the header between, and logs");
        chain.extend(&[], &[1]);
        settle(&mut scanner).await;
        let head = chain.blocks.lock().unwrap().len() as u64 - 1;
        assert_eq!(store.next_block(), head + 1 - confirmations.parse::<u64>().unwrap());
    }
}

#[tokio::test(start_paused = true)]
async fn a_head_that_is_announced_while_another_is_read_and_may_be_of_a_fork_is_polled_for_at_once() {
    let (chain, _, mut scanner) = announcing("0").await;
    chain.extend(&[], &[1]);
    announce(&chain);
    assert_eq!(scanner.step().await.unwrap(), Step::Progress);
    // Before the scanner looks again: a sibling.
    chain.drop_newest(1);
    chain.extend(&[], &[2]);
    announce(&chain);
    chain.forget();
    let step = scanner.step().await.unwrap();
    assert!(matches!(step, Step::Wait(_)), "it saw the fork, and looks once more: {step:?}");
    assert_eq!(chain.asked()[0], (1, 0), "by a poll");
}

#[tokio::test(start_paused = true)]
async fn however_fast_blocks_are_announced_a_poll_now_and_then_shows_whether_they_come_late() {
    let (chain, _, mut scanner) = announcing("0").await;
    let mut polls = 0;
    for _ in 0..60 {
        chain.extend(&[], &[]);
        announce(&chain);
        chain.forget();
        settle(&mut scanner).await;
        polls += chain.asked().iter().filter(|asked| **asked == (1, 0)).count();
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    assert!((5..=20).contains(&polls), "{polls} polls in 60 s, with an interval of 4 s");
}

#[tokio::test(start_paused = true)]
async fn a_fork_that_is_announced_is_followed_and_an_announcement_that_leads_nowhere_harms_nothing() {
    let (chain, store, mut scanner) = announcing("0").await;
    chain.extend(&[], &[1, 1]);
    announce(&chain);
    settle(&mut scanner).await;
    chain.drop_newest(1);
    chain.extend(&[], &[2]);
    announce(&chain);
    settle(&mut scanner).await;
    chain.extend(&[], &[2]);
    announce(&chain);
    settle(&mut scanner).await;
    let stray = Header { parent_hash: B256::repeat_byte(7), ..chain.blocks.lock().unwrap()[3].header };
    let block = BlockRef { number: 900, hash: B256::repeat_byte(8) };
    chain.announcer.as_ref().unwrap().send_replace(Some(Header { block, ..stray }));
    scanner.step().await.unwrap();
    chain.extend(&[], &[1]);
    announce(&chain);
    settle(&mut scanner).await;
    let seen: BTreeMap<u64, Entry> =
        store.claim(99).unwrap().into_iter().map(|it| (it.position, it.entry)).collect();
    let counts: Vec<usize> = standing(&seen).values().map(Vec::len).collect();
    assert_eq!(counts, [2, 3], "the announcement and one approval, the announcement and two");
    let head = chain.blocks.lock().unwrap().last().unwrap().header.block;
    assert_eq!(store.cursor(), Some(head));
}

#[tokio::test(start_paused = true)]
async fn an_absurd_announcement_makes_nothing_final() {
    let fake = Fake { announcer: Some(watch::Sender::new(None)), ..Fake::default() };
    (0..40).for_each(|_| fake.extend(&[], &[]));
    let (chain, store) = (Arc::new(fake), open_store());
    let settings = [("chain.finality_depth", "10"), ("rpc.max_range", "1")];
    let mut scanner = scanner(&chain, &store, &settings, Until::Forever);
    settle(&mut scanner).await;
    chain.extend(&[], &[]);
    let head = chain.blocks.lock().unwrap().last().unwrap().header;
    let block = BlockRef { number: 90, hash: B256::repeat_byte(8) };
    chain.announcer.as_ref().unwrap().send_replace(Some(Header { block, ..head }));
    settle(&mut scanner).await;
    assert_eq!(store.cursor(), Some(head.block));
    assert!(store.finalized() <= Some(30), "{:?} is final", store.finalized());
    chain.drop_newest(1);
    (0..3).for_each(|_| chain.extend(&[], &[]));
    settle(&mut scanner).await;
    settle(&mut scanner).await;
    assert_eq!(store.cursor(), Some(chain.blocks.lock().unwrap().last().unwrap().header.block));
}

#[tokio::test(start_paused = true)]
async fn an_absurd_announcement_confirms_nothing() {
    for (reading, above) in [("linked", 20), ("linked", 1), ("ranged", 20), ("ranged", 1), ("linked", 900)] {
        let fake = Fake { finality: Some(64), announcer: Some(watch::Sender::new(None)), ..Fake::default() };
        (0..40).for_each(|_| fake.extend(&[], &[]));
        let (chain, store) = (Arc::new(fake), open_store());
        let settings = [("chain.confirmations", "2"), ("chain.reading", reading)];
        let mut scanner = scanner(&chain, &store, &settings, Until::Forever);
        settle(&mut scanner).await;
        chain.extend(&[], &[]);
        let head = chain.blocks.lock().unwrap().last().unwrap().header;
        let block = BlockRef { number: head.block.number + above, hash: B256::repeat_byte(8) };
        let lie = Header { block, parent_hash: B256::repeat_byte(7), timestamp: 0 };
        chain.announcer.as_ref().unwrap().send_replace(Some(lie));
        settle(&mut scanner).await;
        let cursor = store.cursor().unwrap().number;
        assert_eq!(cursor, head.block.number - 2, "{reading}, {above} above the head");
        chain.extend(&[], &[]);
        announce(&chain);
        settle(&mut scanner).await;
        assert_eq!(store.cursor().unwrap().number, cursor + 1, "{reading}, {above}: and goes on");
    }
}

#[tokio::test(start_paused = true)]
async fn an_announcement_whose_chain_is_not_the_one_read_by_range_confirms_nothing() {
    let fake = Fake { finality: Some(64), announcer: Some(watch::Sender::new(None)), ..Fake::default() };
    (0..40).for_each(|_| fake.extend(&[], &[]));
    let (chain, store) = (Arc::new(fake), open_store());
    let settings = [("chain.confirmations", "1"), ("chain.reading", "ranged")];
    let mut scanner = scanner(&chain, &store, &settings, Until::Forever);
    settle(&mut scanner).await;
    // The last block is another one where the announcement comes from, and so is the next.
    let mut block = chain.blocks.lock().unwrap().last().unwrap().header.block;
    scanner.see_head(Header {
        block: BlockRef { number: block.number, hash: B256::repeat_byte(7) },
        parent_hash: store.cursor().unwrap().hash,
        timestamp: 0,
    });
    block = BlockRef { number: block.number + 1, hash: B256::repeat_byte(8) };
    let next = Header { block, parent_hash: B256::repeat_byte(7), timestamp: 0 };
    chain.announcer.as_ref().unwrap().send_replace(Some(next));
    settle(&mut scanner).await;
    assert_eq!(store.cursor().unwrap().number, block.number - 2);
}

#[tokio::test(start_paused = true)]
async fn a_subscription_that_announces_no_more_is_noticed() {
    let (chain, _, mut scanner) = announcing("0").await;
    announce(&chain);
    for _ in 0..2 * UNANNOUNCED {
        chain.extend(&[], &[]);
        settle(&mut scanner).await;
    }
    assert_eq!(*chain.missed.lock().unwrap(), 2);
    announce(&chain);
    settle(&mut scanner).await;
    chain.extend(&[], &[]);
    announce(&chain);
    settle(&mut scanner).await;
    assert_eq!(*chain.missed.lock().unwrap(), 2);
}

/// Eight empty blocks, each read and what is final asked for anew.
async fn go_on(chain: &Fake, reader: &mut Scanner<Fake>) {
    for _ in 0..8 {
        chain.extend(&[], &[]);
        reader.finality.asked_at = None;
        settle(reader).await;
    }
}

#[tokio::test(start_paused = true)]
async fn escrows_long_at_their_end_are_asked_for_no_more_and_come_back_if_they_go_on() {
    let settings =
        [("escrow.terminal", "Approved"), ("escrow.archive_after", "3"), ("rpc.filter", "addresses")];
    let chain = Fake::new(Some(2));
    chain.extend(&[1, 2, 3], &[1]);
    let store = open_store();
    let mut reader = scanner(&chain, &store, &settings, Until::Forever);
    go_on(&chain, &mut reader).await;
    assert_eq!((store.registry().len(), store.registry().watched_len()), (3, 2));
    chain.forget();
    chain.extend(&[], &[2]);
    settle(&mut reader).await;
    let asked = |chain: &Fake| -> BTreeSet<Address> {
        let asked = chain.asked.lock().unwrap();
        let filters = asked.iter().flatten().filter_map(|call| match call {
            Call::Logs(filter) => Some(filter.addresses.list().to_vec()),
            Call::Header(_) | Call::Code(_) | Call::Read { .. } => None,
        });
        filters.flatten().collect()
    };
    assert_eq!(asked(&chain), BTreeSet::from([FACTORY, escrow(2), escrow(3)]));

    // Without addresses in the filter its logs are seen, and count.
    let settings = [settings[0], settings[1], ("rpc.filter", "topics")];
    let mut reader = scanner(&chain, &store, &settings, Until::Forever);
    chain.extend(&[], &[1]);
    settle(&mut reader).await;
    assert_eq!((store.registry().len(), store.registry().watched_len()), (3, 3));
    let of_one = entries(&store).into_iter().filter(|entry| entry.escrow == escrow(1)).count();
    assert_eq!(of_one, 3, "announced, approved, approved");
    go_on(&chain, &mut reader).await;
    assert_eq!(store.registry().watched_len(), 1, "one has never ended");
}

#[tokio::test(start_paused = true)]
async fn an_archived_escrow_that_is_announced_again_amid_a_catch_up_is_asked_for_in_the_ranges_behind() {
    let settings = [
        ("escrow.terminal", "Approved"),
        ("escrow.archive_after", "3"),
        ("rpc.filter", "addresses"),
        ("rpc.max_range", "40"),
        ("chain.horizon", "finalized"),
    ];
    let chain = Fake::new(Some(2));
    chain.extend(&[1, 2], &[1]);
    let store = open_store();
    let mut reader = scanner(&chain, &store, &settings, Until::Forever);
    go_on(&chain, &mut reader).await;
    assert_eq!((store.registry().len(), store.registry().watched_len()), (2, 1));
    for number in 0..400 {
        match number {
            210 => chain.extend(&[1], &[]),
            215 => chain.extend(&[], &[1]),
            250 => chain.extend(&[], &[1, 2]),
            _ => chain.extend(&[], &[]),
        }
    }
    reader.finality.asked_at = None;
    settle(&mut reader).await;
    let of_one = entries(&store).into_iter().filter(|entry| entry.escrow == escrow(1)).count();
    assert_eq!(of_one, 5, "announced, approved, announced, approved in the same range and in the next");
}

#[tokio::test(start_paused = true)]
async fn while_catching_up_an_escrow_that_ended_is_asked_for_as_long_as_at_the_head() {
    let settings = [
        ("escrow.terminal", "Approved"),
        ("escrow.archive_after", "20"),
        ("rpc.filter", "addresses"),
        ("rpc.max_range", "1"),
    ];
    let chain = Fake::new(Some(2));
    chain.extend(&[1, 2], &[1]);
    (0..12).for_each(|_| chain.extend(&[], &[]));
    chain.extend(&[], &[1]);
    (0..60).for_each(|_| chain.extend(&[], &[]));
    let store = open_store();
    settle(&mut scanner(&chain, &store, &settings, Until::Forever)).await;
    let of_one = entries(&store).into_iter().filter(|entry| entry.escrow == escrow(1)).count();
    assert_eq!(of_one, 3, "announced, approved, approved");
    assert_eq!(store.registry().watched_len(), 1, "and then no more");
}

#[tokio::test(start_paused = true)]
async fn many_escrows_are_asked_for_by_topics_alone_unless_that_is_refused() {
    for refuses in [false, true] {
        let chain = Fake::new(Some(3));
        chain.extend(&(1..=40).collect::<Vec<u8>>(), &[1, 2]);
        (0..30).for_each(|number| chain.extend(&[], &[1 + number]));
        let store = open_store();
        let mut scanner =
            scanner(&chain, &store, &[("rpc.max_addresses", "5"), ("rpc.max_range", "4")], Until::Forever);
        let without = |call: &Call| matches!(call, Call::Logs(filter) if filter.addresses.is_empty());
        *chain.refuses.lock().unwrap() = refuses.then_some(without);
        settle(&mut scanner).await;
        let sizes: Vec<usize> = chain
            .asked
            .lock()
            .unwrap()
            .iter()
            .flatten()
            .filter_map(|call| match call {
                Call::Logs(filter) => Some(filter.addresses.len()),
                Call::Header(_) | Call::Code(_) | Call::Read { .. } => None,
            })
            .collect();
        assert!(sizes.contains(&0), "the cheaper way: {sizes:?}");
        let refused = sizes.iter().filter(|size| **size == 0).count();
        // Those under way when the first is refused are, too.
        assert!(!refuses || refused <= RANGES && *sizes.last().unwrap() > 0, "{sizes:?}");
        assert_eq!(entries(&store).len(), 40 + 2 + 30);
    }
}

#[tokio::test(start_paused = true)]
async fn blocks_that_came_between_two_polls_cost_one_batch_of_headers_and_one_of_logs() {
    let chain = Fake::new(Some(64));
    let store = open_store();
    let mut scanner = scanner(&chain, &store, &[], Until::Forever);
    settle(&mut scanner).await;
    (0..7).for_each(|_| chain.extend(&[], &[]));
    chain.forget();
    assert_eq!(scanner.step().await.unwrap(), Step::Progress);
    assert_eq!(chain.asked(), [(1, 0), (6, 0), (0, 7)]);
}

#[tokio::test(start_paused = true)]
async fn a_new_store_asks_for_final_blocks_in_several_ranges_at_once_where_calls_are_plenty() {
    for (calls_a_second, blocks, expected) in [
        ("25", 241, &[241][..]),
        ("50", 241, &[121, 120]),
        ("1000", 241, &[61, 60, 60, 60]),
        ("1000", 64, &[32, 32]),
        ("1000", 63, &[63]),
    ] {
        let chain = Fake::new(Some(5));
        (1..blocks + 5).for_each(|_| chain.extend(&[], &[]));
        let settings = [("chain.horizon", "finalized"), ("rpc.requests_per_second", calls_a_second)];
        let store = open_store();
        let mut scanner = scanner(&chain, &store, &settings, Until::Forever);
        let mut ranges = async || {
            chain.forget();
            scanner.step().await.unwrap();
            let under_way = chain.asked.lock().unwrap().len() - 1;
            settle(&mut scanner).await;
            let range = |call: &Call| match call {
                Call::Logs(LogFilter { span: Span::Range(range), .. }) => Some(range.blocks()),
                Call::Logs(_) | Call::Header(_) | Call::Code(_) | Call::Read { .. } => None,
            };
            let asked = chain.asked.lock().unwrap();
            let ranges: Vec<u64> = asked.iter().filter_map(|calls| calls.iter().find_map(range)).collect();
            (ranges, under_way)
        };
        assert_eq!(ranges().await, (expected.to_vec(), expected.len()), "{calls_a_second} calls a second");
        assert_eq!(store.cursor().unwrap().number, blocks - 1);
        // Later ones are one.
        (0..blocks).for_each(|_| chain.extend(&[], &[]));
        assert_eq!(ranges().await, (vec![blocks], 1));
    }
}

#[tokio::test(start_paused = true)]
async fn ranges_that_are_there_together_are_committed_together_as_far_as_each_follows_the_one_before() {
    let settings = [("chain.horizon", "finalized"), ("rpc.requests_per_second", "1000")];
    // Four ranges: 0 to 60, 61 to 120, 121 to 180, 181 to 240.
    for broken in [None, Some(61), Some(121), Some(181)] {
        let chain = Fake::new(Some(5));
        let mut expected = Vec::new();
        for number in 1..246 {
            let (announced, approved): (&[u8], &[u8]) = match number {
                10 => (&[1], &[]),
                70 => (&[2], &[1]),
                121 => (&[3], &[2]),
                181 => (&[], &[1, 2, 3]),
                _ => (&[], &[]),
            };
            chain.extend(announced, approved);
            expected.extend(announced.iter().chain(approved).map(|it| (number, escrow(*it))));
        }
        let change_parent = |block: u64| {
            let parent = &mut chain.blocks.lock().unwrap()[block as usize].header.parent_hash;
            *parent = !*parent;
        };
        broken.into_iter().for_each(change_parent);
        let store = open_store();
        let mut scanner = scanner(&chain, &store, &settings, Until::Forever);
        assert_eq!(scanner.step().await.unwrap(), Step::Progress);
        assert_eq!(store.cursor().unwrap().number, broken.map_or(240, |block| block - 1));
        let upto =
            |last: u64| expected.iter().copied().filter(|(block, _)| *block <= last).collect::<Vec<_>>();
        let mut events: Vec<(u64, Address)> = Vec::new();
        let mut claim = || {
            events.extend(entries(&store).iter().map(|entry| (entry.block_number, entry.escrow)));
            events.clone()
        };
        assert_eq!(claim(), upto(store.cursor().unwrap().number));
        if let Some(block) = broken {
            let before = store.cursor();
            assert_ne!(scanner.step().await.unwrap(), Step::Progress, "block {block} does not follow");
            assert_eq!(store.cursor(), before);
            change_parent(block);
        }
        settle(&mut scanner).await;
        assert_eq!((store.cursor().unwrap().number, claim()), (240, upto(240)), "broken at {broken:?}");
    }
}

/// Ten final blocks, with escrow 1 created in the first of them and 2 in the last, and five unfinal ones in which both, and
/// 3, do something.
fn final_and_unfinal_blocks() -> Arc<Fake> {
    let chain = Fake::new(Some(5));
    chain.extend(&[1], &[]);
    (2..10).for_each(|_| chain.extend(&[], &[]));
    chain.extend(&[2], &[]);
    (0..5).for_each(|_| chain.extend(&[], &[1, 2, 3]));
    chain
}

#[tokio::test(start_paused = true)]
async fn unfinal_blocks_are_asked_for_while_the_final_ones_are_committed_with_all_who_were_announced_there() {
    for (calls_a_second, expected) in [
        // The poll; the final blocks and the headers of the others, but for the head; who was announced; times; the logs.
        ("1000", [(3, 0), (1, 1), (4, 0), (1, 1), (2, 0), (0, 5)]),
        // Where calls are scarce, nobody waits behind what is not needed yet.
        ("5", [(3, 0), (1, 1), (1, 1), (2, 0), (4, 0), (0, 5)]),
    ] {
        let (chain, store) = (final_and_unfinal_blocks(), open_store());
        let settings = [("rpc.requests_per_second", calls_a_second)];
        let mut scanner = scanner(&chain, &store, &settings, Until::Forever);
        assert_eq!(scanner.step().await.unwrap(), Step::Progress);
        idle().await;
        assert_eq!((chain.asked(), store.cursor().unwrap().number), (expected.to_vec(), 10));
        chain.forget();
        settle(&mut scanner).await;
        assert_eq!(chain.asked(), [(1, 0)], "it only polls");
        let logs = |escrow: Address| entries(&store).iter().filter(|entry| entry.escrow == escrow).count();
        assert_eq!((logs(escrow(1)), store.cursor().unwrap().number), (6, 15));
    }
}

/// A disk that takes its time from when it is told to: a sync then waits until it may go on, for so long at most.
#[derive(Debug, Default)]
struct Slow {
    disk: InMemoryBackend,
    gate: Arc<Gate>,
}

#[derive(Debug, Default)]
struct Gate {
    closed: Mutex<bool>,
    opened: Condvar,
    /// Told when a sync waits.
    waits: Notify,
}

impl StorageBackend for Slow {
    fn len(&self) -> io::Result<u64> {
        self.disk.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.disk.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.disk.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        let closed = self.gate.closed.lock().unwrap();
        if *closed {
            self.gate.waits.notify_one();
            let at_most = Duration::from_secs(20);
            drop(self.gate.opened.wait_timeout_while(closed, at_most, |closed| *closed).unwrap());
        }
        self.disk.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.disk.write(offset, data)
    }
}

/// Reads the first range, blocks 0 and 1, from a node that keeps what comes behind it until that range is committed, on a disk
/// that waits `until` something of it was seen. What was, and the cursor then.
async fn read_amid_commit(
    chain: &Arc<Fake>,
    mut until: impl FnMut() -> bool,
) -> (Arc<Store>, Scanner<Fake>, (bool, Option<BlockRef>)) {
    let (disk, go_on) = (Slow::default(), Arc::<Notify>::default());
    let gate = Arc::clone(&disk.gate);
    let store = open_store_on(disk);
    let settings = [("rpc.requests_per_second", "1000"), ("rpc.max_range", "2")];
    let mut scanner = scanner(chain, &store, &settings, Until::Forever);
    *chain.held.lock().unwrap() = Some((2, Arc::clone(&go_on)));
    *gate.closed.lock().unwrap() = true;
    let has_ended = Cell::new(false);
    let reading = async {
        let step = scanner.step().await.unwrap();
        has_ended.set(true);
        step
    };
    let meanwhile = async {
        gate.waits.notified().await;
        go_on.notify_one();
        // Else the disk goes on by itself after a while.
        while !until() && !has_ended.get() {
            tokio::task::yield_now().await;
        }
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        let seen = (until(), store.cursor());
        *gate.closed.lock().unwrap() = false;
        gate.opened.notify_all();
        seen
    };
    let (step, seen) = tokio::join!(reading, meanwhile);
    assert_eq!(step, Step::Progress);
    (store, scanner, seen)
}

#[tokio::test(start_paused = true)]
async fn what_comes_while_a_range_is_committed_is_followed_up_at_once_with_all_who_were_announced_there() {
    let chain = Fake::new(Some(0));
    chain.extend(&[1], &[]);
    chain.extend(&[], &[1]);
    chain.extend(&[2], &[1, 2]);
    let follow_ups = || {
        let of_both = |call: &&Call| matches!(call, Call::Logs(filter) if filter.addresses.list() == [escrow(1), escrow(2)]);
        let asked = chain.asked.lock().unwrap();
        asked.iter().filter(|calls| asks_from(calls, 2)).flatten().filter(of_both).count()
    };
    let (store, mut scanner, seen) = read_amid_commit(&chain, || follow_ups() > 0).await;
    assert_eq!(seen, (true, None));
    settle(&mut scanner).await;
    assert_eq!(follow_ups(), 1, "it was enough");
    let escrows: Vec<Address> = entries(&store).iter().map(|entry| entry.escrow).collect();
    assert_eq!(
        escrows,
        [1, 1, 2, 1, 2].map(escrow),
        "announced, and an approval; announced, and one of either"
    );
}

#[tokio::test(start_paused = true)]
async fn after_one_that_is_not_answered_while_a_range_is_committed_ranges_are_asked_for_one_at_a_time() {
    let chain = Fake::new(Some(0));
    chain.extend(&[1], &[]);
    (2..10).for_each(|_| chain.extend(&[], &[1]));
    let is_refused = Cell::new(false);
    let refused = || {
        if !is_refused.replace(true) {
            chain.refusals.lock().unwrap().push_back(Refused::Unknown("busy".into()));
        }
        chain.refusals.lock().unwrap().is_empty()
    };
    let (store, mut scanner, seen) = read_amid_commit(&chain, refused).await;
    assert_eq!(seen, (true, None));
    chain.forget();
    assert_eq!(scanner.step().await.unwrap(), Step::Progress);
    let ranges =
        |from: u64| chain.asked.lock().unwrap().iter().filter(|calls| asks_from(calls, from)).count();
    assert_eq!([2, 4].map(ranges), [1, 0]);
    settle(&mut scanner).await;
    assert_eq!(entries(&store).len(), 9);
}

#[tokio::test(start_paused = true)]
async fn whoever_came_to_be_watched_since_unfinal_blocks_were_asked_for_is_asked_for_again() {
    let (chain, store) = (final_and_unfinal_blocks(), open_store());
    let settings = [("rpc.requests_per_second", "1000"), ("rpc.filter", "addresses")];
    let mut scanner = scanner(&chain, &store, &settings, Until::Forever);
    assert_eq!(scanner.step().await.unwrap(), Step::Progress);
    idle().await;
    assert_eq!(store.import(&[escrow(3)], 11).unwrap().new, 1);
    chain.forget();
    settle(&mut scanner).await;
    assert_eq!(chain.asked()[0], (0, 5), "of the one that was imported");
    let mut events: BTreeMap<Address, usize> = BTreeMap::new();
    entries(&store).iter().for_each(|entry| *events.entry(entry.escrow).or_default() += 1);
    assert_eq!(events, BTreeMap::from([(escrow(1), 6), (escrow(2), 6), (escrow(3), 5)]));
}

#[tokio::test(start_paused = true)]
async fn unfinal_blocks_that_leave_the_chain_after_they_were_asked_for_are_taken_back_or_never_accepted() {
    // As after a poll; or as after a pause, because too much waits for the sink.
    for (pause, taken_back) in [(0, 8), (3, 0)] {
        let (chain, store) = (final_and_unfinal_blocks(), open_store());
        let settings = [("rpc.requests_per_second", "1000")];
        let mut scanner = scanner(&chain, &store, &settings, Until::Forever);
        assert_eq!(scanner.step().await.unwrap(), Step::Progress);
        idle().await;
        chain.drop_newest(4);
        (0..8).for_each(|_| chain.extend(&[], &[2]));
        tokio::time::sleep(Duration::from_secs(pause)).await;
        let mut seen: BTreeMap<u64, Entry> = BTreeMap::new();
        let claim = || store.claim(usize::MAX).unwrap().into_iter().map(|it| (it.position, it.entry));
        for _ in 0..3 {
            settle_seeing(&mut scanner, || seen.extend(claim())).await;
        }
        let retracted = seen.values().filter(|entry| matches!(entry.kind, Kind::Retraction { .. })).count();
        assert_eq!(retracted, taken_back, "after {pause} s");
        let blocks = chain.blocks.lock().unwrap();
        assert_eq!(store.cursor(), blocks.last().map(|block| block.header.block));
        let logs = blocks.iter().flat_map(|block| &block.logs);
        let of_two = logs.filter(|log| log.address == escrow(2)).map(|log| (log.block.hash, log.log_index));
        assert_eq!(standing(&seen)[&escrow(2)][1..], of_two.collect::<Vec<_>>());
    }
}

#[tokio::test(start_paused = true)]
async fn logs_of_a_new_escrow_in_its_own_block_are_read_by_one_more_call_for_it_alone() {
    for finality in [0, 64] {
        let chain = Fake::new(Some(finality));
        chain.extend(&[1], &[1]);
        let store = open_store();
        let mut scanner = scanner(&chain, &store, &[], Until::Forever);
        settle(&mut scanner).await;
        chain.forget();
        chain.extend(&[2], &[2, 1, 2, 9]);
        settle(&mut scanner).await;
        let filters: Vec<(Vec<Address>, usize)> = chain
            .asked
            .lock()
            .unwrap()
            .iter()
            .flatten()
            .filter_map(|call| match call {
                Call::Logs(filter) => Some((filter.addresses.list().to_vec(), filter.topics.len())),
                Call::Header(_) | Call::Code(_) | Call::Read { .. } => None,
            })
            .collect();
        assert_eq!(filters, [(vec![FACTORY, escrow(1)], 2), (vec![escrow(2)], 1)]);
        let names: Vec<_> = entries(&store).into_iter().map(|entry| (entry.escrow, entry.sequence)).collect();
        let (one, two) = (escrow(1), escrow(2));
        assert_eq!(names, [(one, 1), (one, 2), (two, 1), (two, 2), (one, 3), (two, 3)]);
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_of_a_node_that_is_behind_is_thrown_away() {
    for (finality, reading) in [(0, "linked"), (64, "linked"), (64, "ranged")] {
        let chain = Fake::new(Some(finality));
        let store = open_store();
        let mut scanner = scanner(&chain, &store, &[("chain.reading", reading)], Until::Forever);
        settle(&mut scanner).await;
        (0..5).for_each(|_| chain.extend(&[], &[]));
        chain.extend(&[1], &[]);
        // The head is known, and then another node answers.
        scanner.poll(store.next_block()).await.unwrap();
        chain.set_lag(3);
        for _ in 0..3 {
            scanner.step().await.unwrap();
            assert!(entries(&store).is_empty());
        }
        chain.set_lag(0);
        settle(&mut scanner).await;
        assert_eq!(entries(&store).len(), 1, "finality {finality}, {reading}");
        chain.set_lag(2);
        settle(&mut scanner).await;
        assert_eq!(store.cursor().unwrap().number, 6, "a node behind is no fork");
    }
}

#[tokio::test(start_paused = true)]
async fn a_range_that_ends_otherwise_than_the_final_block_was_told_to_be_is_asked_for_again() {
    let chain = Fake::new(Some(5));
    (0..30).for_each(|_| chain.extend(&[], &[]));
    let (store, settings) = (open_store(), [("rpc.max_range", "20"), ("rpc.requests_per_second", "5")]);
    let mut scanner = scanner(&chain, &store, &settings, Until::Forever);
    assert_eq!(scanner.step().await.unwrap(), Step::Progress);
    assert_eq!(store.cursor().unwrap().number, 19);
    assert_eq!(scanner.told_final.map(|block| block.number), Some(25));
    // As if the poll had been told that, or as if the end of the range were a lie.
    scanner.told_final = Some(BlockRef { number: 25, hash: B256::repeat_byte(0xDD) });
    assert!(matches!(scanner.step().await.unwrap(), Step::Wait(_)));
    assert_eq!(store.cursor().unwrap().number, 19);
    settle(&mut scanner).await;
    assert_eq!(store.cursor(), chain.blocks.lock().unwrap().last().map(|block| block.header.block));
}

#[tokio::test(start_paused = true)]
async fn a_last_final_block_that_the_blocks_behind_it_do_not_follow_is_not_accepted() {
    let (chain, store) = (final_and_unfinal_blocks(), open_store());
    let change = |by: u8| {
        let mut blocks = chain.blocks.lock().unwrap();
        blocks[10].header.block.hash[0] ^= by;
        let block = blocks[10].header.block;
        blocks[10].logs.iter_mut().for_each(|log| log.block = block);
    };
    change(1);
    let mut scanner = scanner(&chain, &store, &[("rpc.requests_per_second", "1000")], Until::Forever);
    assert!(matches!(scanner.step().await.unwrap(), Step::Wait(_)));
    assert_eq!(store.cursor(), None);
    change(1);
    settle(&mut scanner).await;
    assert_eq!(store.cursor(), chain.blocks.lock().unwrap().last().map(|block| block.header.block));
}

#[tokio::test(start_paused = true)]
async fn refusals_change_the_plan_and_nothing_is_skipped() {
    let cap = NonZeroU64::new(3).unwrap();
    let table = [
        vec![Refused::Cap(cap)],
        vec![Refused::Halve("dense".into()), Refused::Halve("dense".into())],
        vec![Refused::Use(BlockRange::new(0, 1).unwrap())],
        vec![Refused::FewerAddresses("many".into()); 3],
        vec![Refused::Unknown("what?".into()); 12],
        vec![Refused::Behind("head".into()); 2],
        vec![Refused::HistoryGone("pruned".into())],
    ];
    for refusals in table {
        let chain = Fake::new(Some(0));
        chain.extend(&[1, 2, 3], &[1]);
        (0..20).for_each(|_| chain.extend(&[], &[1, 2, 3]));
        let store = open_store();
        let mut scanner = scanner(&chain, &store, &[("rpc.max_range", "10")], Until::Forever);
        scanner.poll(0).await.unwrap();
        chain.refusals.lock().unwrap().extend(refusals.clone());
        settle(&mut scanner).await;
        assert_eq!(entries(&store).len(), 3 + 1 + 60, "{refusals:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn reading_goes_on_when_finality_is_no_longer_told() {
    let chain = Fake::new(Some(5));
    (0..20).for_each(|_| chain.extend(&[], &[]));
    let store = open_store();
    let mut scanner = scanner(&chain, &store, &[], Until::Forever);
    settle(&mut scanner).await;
    // Finality is due again, and the provider turned to does not know the tag.
    (0..70).for_each(|_| chain.extend(&[], &[]));
    settle(&mut scanner).await;
    chain.extend(&[], &[]);
    chain.refusals.lock().unwrap().push_back(Refused::UnknownTag("finalized".into()));
    settle(&mut scanner).await;
    assert_eq!(store.cursor().unwrap().number, 91);
}

#[tokio::test(start_paused = true)]
async fn an_absurd_head_is_forgotten_with_the_next_answer() {
    let chain = Fake::new(None);
    (0..30).for_each(|_| chain.extend(&[], &[]));
    let store = open_store();
    let mut scanner = scanner(&chain, &store, &[("chain.finality_depth", "10")], Until::Forever);
    settle(&mut scanner).await;
    scanner.note_finality(u64::MAX, None);
    chain.drop_newest(1);
    chain.extend(&[], &[]);
    chain.extend(&[], &[]);
    settle(&mut scanner).await;
    settle(&mut scanner).await;
    let head = chain.blocks.lock().unwrap().last().unwrap().header.block;
    assert_eq!((store.cursor(), store.finalized()), (Some(head), Some(head.number - 10)));
}

#[tokio::test(start_paused = true)]
async fn two_logs_that_claim_one_place_are_not_believed() {
    let chain = Fake::new(Some(64));
    chain.extend(&[1], &[1]);
    let mut harvest = harvest::Harvest::default();
    let block = chain.blocks.lock().unwrap()[1].clone();
    let range = BlockRange::new(1, 1).unwrap();
    harvest.gather(block.logs.clone(), range, &block.header).unwrap();
    harvest.gather(block.logs.clone(), range, &block.header).unwrap();
    let wrong = || vec![Log { log_index: 0, ..block.logs[1].clone() }];
    assert!(matches!(harvest.gather(wrong(), range, &block.header), Err(Trouble::Disagreement(_))));
    // The same once events were made of them.
    let scanner = scanner(&chain, &open_store(), &[], Until::Forever);
    let mut harvest = harvest.prepare(&*chain, &scanner.decoder, false, |_| false).await.unwrap();
    assert!(harvest.logs().all(|log| log.topics.is_empty()), "they were made");
    harvest.gather(block.logs.clone(), range, &block.header).unwrap();
    assert!(matches!(harvest.gather(wrong(), range, &block.header), Err(Trouble::Disagreement(_))));
}

#[tokio::test(start_paused = true)]
async fn a_provider_that_wants_addresses_gets_chunks_of_them() {
    let chain = Fake::new(Some(64));
    chain.extend(&[1, 2, 3, 4, 5], &[]);
    let store = open_store();
    let mut scanner = scanner(&chain, &store, &[("rpc.max_addresses", "2")], Until::Forever);
    settle(&mut scanner).await;
    chain.extend(&[], &[1, 5]);
    scanner.poll(store.next_block()).await.unwrap();
    chain.refusals.lock().unwrap().push_back(Refused::FewerAddresses("name some".into()));
    settle(&mut scanner).await;
    assert_eq!(entries(&store).len(), 7);
    assert_eq!(chain.asked().last(), Some(&(1, 0)), "and then an idle poll");
    assert!(chain.asked().contains(&(0, 3)), "the factory and five escrows, two at a time");
}

#[tokio::test(start_paused = true)]
async fn a_tag_that_was_answered_once_is_waited_for_and_never_replaced_by_depth() {
    let chain = Fake::new(Some(5));
    (0..20).for_each(|_| chain.extend(&[], &[]));
    let store = open_store();
    let mut scanner = scanner(&chain, &store, &[("chain.horizon", "finalized")], Until::Forever);
    settle(&mut scanner).await;
    chain.extend(&[], &[]);
    chain.refusals.lock().unwrap().extend(vec![Refused::UnknownTag("finalized".into()); 10]);
    for _ in 0..10 {
        assert!(matches!(scanner.step().await.unwrap(), Step::Wait(_)));
    }
    assert_eq!(store.cursor().unwrap().number, 15);
    settle(&mut scanner).await;
    assert_eq!(store.cursor().unwrap().number, 16);
}

#[tokio::test(start_paused = true)]
async fn a_node_without_tags_counts_depth_and_waits_are_for_what_is_missing() {
    let chain = Fake::new(None);
    *chain.no_code.lock().unwrap() = true;
    (0..30).for_each(|_| chain.extend(&[], &[]));
    let store = open_store();
    let mut scanner = scanner(&chain, &store, &[("chain.finality_depth", "10")], Until::Head);
    settle(&mut scanner).await;
    assert_eq!(store.cursor(), None, "no factory yet");
    *chain.no_code.lock().unwrap() = false;
    settle(&mut scanner).await;
    assert_eq!(store.cursor().unwrap().number, 30);
    assert_eq!(store.finalized(), Some(20));
    assert_eq!(scanner.step().await.unwrap(), Step::Done);
}

#[tokio::test(start_paused = true)]
async fn until_a_block_reads_that_block_and_not_one_more() {
    let chain = Fake::new(Some(64));
    (0..9).for_each(|_| chain.extend(&[], &[]));
    let store = open_store();
    let mut scanner = scanner(&chain, &store, &[], Until::Block(12));
    settle(&mut scanner).await;
    assert_eq!(store.cursor().unwrap().number, 9);
    assert_eq!(scanner.step().await.unwrap(), Step::Idle, "waits for the rest");
    (0..9).for_each(|_| chain.extend(&[], &[]));
    settle(&mut scanner).await;
    assert_eq!(store.cursor().unwrap().number, 12);
}

#[tokio::test(start_paused = true)]
async fn with_each_stretch_goes_whether_many_blocks_behind_it_are_known() {
    let mut catching_up = 0;
    for (settings, until) in [
        (&[][..], Until::Block(70)),
        (&[("chain.reading", "ranged"), ("rpc.max_range", "50")], Until::Forever),
        (&[("rpc.max_range", "4")], Until::Head),
    ] {
        let chain = Fake::new(Some(10));
        (0..100).for_each(|_| chain.extend(&[], &[]));
        let store = open_store();
        let mut scanner = scanner(&chain, &store, settings, until);
        let mut seen: BTreeMap<u64, bool> = BTreeMap::new();
        settle_seeing(&mut scanner, || seen.extend([(store.next_block(), store.appended().borrow().more)]))
            .await;
        let target = store.cursor().unwrap().number;
        assert!(target >= 70, "{target}: {seen:?}");
        catching_up += seen.values().filter(|more| **more).count();
        assert!(seen.iter().all(|(next, more)| *more == (next + CATCH_UP <= target)), "{target}: {seen:?}");
    }
    assert!(catching_up > 3, "{catching_up}");
}

#[tokio::test(start_paused = true)]
async fn where_reading_pauses_amid_a_catch_up_nothing_more_is_expected() {
    let chain = Fake::new(Some(10));
    (0..100).for_each(|_| chain.extend(&[], &[]));
    let store = open_store();
    let mut scanner = scanner(&chain, &store, &[("rpc.max_range", "4")], Until::Head);
    while !store.appended().borrow().more {
        assert_eq!(scanner.step().await.unwrap(), Step::Progress);
    }
    chain.set_lag(95);
    while matches!(scanner.step().await.unwrap(), Step::Progress) {}
    assert!(store.cursor().unwrap().number < 60, "there was more to read");
    assert!(!store.appended().borrow().more);
}

#[tokio::test(start_paused = true)]
async fn tags_as_horizon_are_followed() {
    for horizon in ["safe", "finalized"] {
        let chain = Fake::new(Some(5));
        (0..20).for_each(|_| chain.extend(&[], &[]));
        let store = open_store();
        let mut scanner = scanner(&chain, &store, &[("chain.horizon", horizon)], Until::Forever);
        settle(&mut scanner).await;
        assert_eq!(store.cursor().unwrap().number, 15);
        chain.extend(&[], &[]);
        settle(&mut scanner).await;
        assert_eq!(store.cursor().unwrap().number, 16);
        chain.forget();
        settle(&mut scanner).await;
        assert_eq!(chain.asked(), [(1, 0)]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_fork_to_a_shorter_chain_or_the_same_height_is_seen() {
    for (reading, grown) in [("linked", 1), ("linked", 2), ("linked", 3), ("ranged", 2), ("ranged", 3)] {
        let chain = Fake::new(Some(64));
        chain.extend(&[1], &[]);
        chain.extend(&[2], &[1]);
        chain.extend(&[], &[2]);
        let store = open_store();
        let mut scanner = scanner(&chain, &store, &[("chain.reading", reading)], Until::Forever);
        settle(&mut scanner).await;
        let mut seen: BTreeMap<u64, Entry> = BTreeMap::new();
        let mut claim = |store: &Store| {
            seen.extend(store.claim(usize::MAX).unwrap().into_iter().map(|it| (it.position, it.entry)));
            standing(&seen)
        };
        assert_eq!(claim(&store).values().map(Vec::len).sum::<usize>(), 4);
        chain.drop_newest(2);
        (0..grown).for_each(|_| chain.extend(&[], &[]));
        settle(&mut scanner).await;
        settle(&mut scanner).await;
        assert_eq!(store.cursor(), Some(chain.blocks.lock().unwrap().last().unwrap().header.block));
        let left = claim(&store);
        assert_eq!(left.keys().collect::<Vec<_>>(), [&escrow(1)], "{reading}, {grown} blocks grown");
        assert_eq!(left[&escrow(1)].len(), 1);
        assert!(!store.registry().contains(&escrow(2)), "announced on the lost fork only");
    }
}

/// One thing that happens to a chain and its relay.
#[derive(Clone, Debug)]
enum Happening {
    Grow(Vec<u8>, Vec<u8>),
    Fork(usize, usize),
    Lag(usize),
    Steps(usize),
    Claim,
    Restart,
}

fn happenings() -> impl Strategy<Value = Happening> {
    let numbers = || prop::collection::vec(1u8..6, 0..4);
    prop_oneof![
        4 => (prop::collection::vec(1u8..6, 0..2), numbers()).prop_map(|(new, events)| Happening::Grow(new, events)),
        2 => (1usize..5, 0usize..6).prop_map(|(depth, grown)| Happening::Fork(depth, grown)),
        1 => (0usize..4).prop_map(Happening::Lag),
        4 => (1usize..8).prop_map(Happening::Steps),
        2 => Just(Happening::Claim),
        1 => Just(Happening::Restart),
    ]
}

/// Before which happenings the chain grows by how many blocks: more than are unfinal.
fn leaps() -> impl Strategy<Value = Vec<(usize, u8)>> {
    prop::collection::vec((0usize..20, 9u8..25), 0..3)
}

/// Blocks that come before this happening; of each, which escrow it is of.
fn leap(leaps: &[(usize, u8)], happening: usize) -> impl Iterator<Item = u8> {
    let blocks = leaps.iter().filter(move |(before, _)| *before == happening).map(|(_, blocks)| *blocks);
    (0..blocks.sum::<u8>()).map(|block| 1 + block % 5)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    /// Whatever happens: once the node is whole again, published minus withdrawn is the chain, in its order, per
    /// escrow without a gap in the sequence.
    #[test]
    fn through_growth_forks_lag_and_restarts_what_stands_is_the_chain(
        script in prop::collection::vec(happenings(), 1..40),
        confirmations in 0u64..3,
        ranged in any::<bool>(),
        small in any::<bool>(),
        hasty in any::<bool>(),
        leaps in leaps(),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let chain = Fake::new(Some(8));
            (0..3).for_each(|_| chain.extend(&[], &[]));
            let store = open_store();
            let confirmations_text = confirmations.to_string();
            let settings = [
                ("chain.confirmations", &confirmations_text[..]),
                ("chain.reading", if ranged { "ranged" } else { "linked" }),
                ("rpc.max_range", if small { "2" } else { "100" }),
                ("rpc.max_addresses", if small { "2" } else { "1000" }),
                ("rpc.requests_per_second", if hasty { "1000" } else { "25" }),
            ];
            let mut scanner = scanner(&chain, &store, &settings, Until::Forever);
            let mut seen: BTreeMap<u64, Entry> = BTreeMap::new();
            for (place, happening) in script.into_iter().enumerate() {
                for escrow in leap(&leaps, place) {
                    chain.extend(&[escrow], &[escrow, 1]);
                }
                match happening {
                    Happening::Grow(announced, approved) => chain.extend(&announced, &approved),
                    Happening::Fork(depth, grown) => {
                        chain.drop_newest(depth);
                        (0..grown).for_each(|n| chain.extend(if n == 1 { &[5] } else { &[] }, &[1, 5]));
                    }
                    Happening::Lag(lag) => chain.set_lag(lag),
                    Happening::Claim => {
                        seen.extend(store.claim(usize::MAX).unwrap().into_iter().map(|it| (it.position, it.entry)));
                    }
                    Happening::Restart => scanner = self::scanner(&chain, &store, &settings, Until::Forever),
                    Happening::Steps(count) => {
                        for _ in 0..count {
                            scanner.step().await.unwrap();
                        }
                    }
                }
            }
            chain.set_lag(0);
            // Beyond what could look like a lagging node: a fork is certain where the chain has grown past the cursor.
            (0..8).for_each(|_| chain.extend(&[], &[]));
            for _ in 0..3 {
                settle(&mut scanner).await;
            }
            seen.extend(store.claim(usize::MAX).unwrap().into_iter().map(|it| (it.position, it.entry)));

            let blocks = chain.blocks.lock().unwrap();
            let accepted = &blocks[..blocks.len() - confirmations as usize];
            assert_eq!(store.cursor(), accepted.last().map(|block| block.header.block));
            let mut announced = BTreeSet::new();
            let mut truth: BTreeMap<Address, Vec<(B256, u64)>> = BTreeMap::new();
            for block in accepted {
                let here = block.logs.iter().filter(|log| log.address == FACTORY);
                announced.extend(here.map(|log| Address::from_word(log.topics[1])));
                for log in &block.logs {
                    let of = if log.address == FACTORY { Address::from_word(log.topics[1]) } else { log.address };
                    if announced.contains(&of) {
                        truth.entry(of).or_default().push((block.header.block.hash, log.log_index));
                    }
                }
            }
            assert_eq!(standing(&seen), truth);
            let watched: BTreeSet<Address> = store.registry().watched().collect();
            assert_eq!(watched, announced);
            let mut sequences: BTreeMap<Address, u64> = BTreeMap::new();
            for entry in seen.values() {
                let last = sequences.entry(entry.escrow).or_default();
                assert_eq!(entry.sequence, *last + 1, "sequence of {}", entry.escrow);
                *last = entry.sequence;
            }
        });
    }
}
