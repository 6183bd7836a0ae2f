//! Catching up: 20,000 events of 10,000 escrows in 301 blocks, fetched, decoded and committed with fsync into a new file;
//! and, before a node like a real one, until a Pub/Sub server has acknowledged all of it.
//!
//! The floor: the requests the relayer made, sent again by a bare client (as many at once as the relayer may) that
//! throws the answers away, each after those that were answered before it was asked. For comparison all of them from the
//! start: nobody can ask so, since which escrows there are, and which block is the last, is in the answers of others. Beside
//! it the least that could be asked, one `eth_getLogs` for everything. Once before a node that takes as long as a real one to
//! find a log, and once before one that takes no time at all, where the floor is a copy in memory: there what counts is
//! parsing the answers into alloy's `Log`.

mod common;

use std::time::{Duration, Instant};

use common::broker::Broker;
use common::events::chain;
use common::node::Node;
use common::ratios::Ratios;
use common::{config, config_to, folder, naive, read_all, runtime, scanner, size, store};
use criterion::{Criterion, criterion_group, criterion_main};
use relayer::scan::Until;
use relayer::store::Added;
use relayer::{Ending, Relay};
use tokio_util::sync::CancellationToken;

const BLOCKS: usize = 301;
/// As far as Ethereum's finality is behind.
const UNFINAL: u64 = 64;
/// What anvil takes for each log of an answer: 0.3 s for all 20,000 at once.
const ANVILS_TIME_A_LOG: Duration = Duration::from_micros(15);

fn real(criterion: &mut Criterion) {
    compare(criterion, "catch_up/node_like_anvil", ANVILS_TIME_A_LOG);
}

fn free(criterion: &mut Criterion) {
    compare(criterion, "catch_up/node_for_free", Duration::ZERO);
}

fn compare(criterion: &mut Criterion, name: &str, time_a_log: Duration) {
    let escrows = size(10_000, 300);
    let node = Node::start(chain(escrows, BLOCKS), UNFINAL);
    node.set_time_a_log(time_a_log);
    let runtime = runtime();
    let http = reqwest::Client::new();
    let url = node.url();
    let mut ratios = Ratios::new(criterion, name);
    ratios.measure_for(Duration::from_secs(6));

    let settings = config(&url, &[]);
    let stored = || {
        let folder = folder();
        let store = store(&settings, &folder.path().join("relayer.redb"));
        let began = Instant::now();
        let scanner = scanner(&settings, &store, Until::Head);
        runtime.block_on(runtime.spawn(read_all(scanner))).expect("it reads");
        let took = began.elapsed();
        assert_eq!(store.waiting(), 2 * escrows as u64);
        took
    };
    let broker = Broker::start();
    let acknowledged = || {
        let folder = folder();
        let path = folder.path().join("relayer.redb").display().to_string();
        let config = config_to(&broker, &url, &[("storage.path", &path)]);
        let began = Instant::now();
        let stop = CancellationToken::new();
        let relay = runtime.block_on(Relay::open(config, Added::Leave, &stop)).expect("it opens");
        let run = runtime.spawn(relay.expect("nobody asked to stop").run(Until::Head, stop));
        let ending = runtime.block_on(run).expect("it runs").expect("it ends well");
        assert_eq!(ending, Ending::Complete);
        began.elapsed()
    };
    node.take_counts();
    let conversation = node.record(|| {
        stored();
    });
    let requests: Vec<Vec<u8>> = conversation.iter().map(|recorded| recorded.body.clone()).collect();
    ratios.say(format!("the relayer asks: {:?}", node.take_counts()));
    let concurrent = settings.rpc.max_concurrent.get();
    let fetch = |requests: &[Vec<u8>]| {
        let began = Instant::now();
        runtime.block_on(naive::fetch(&http, &url, requests, concurrent));
        began.elapsed()
    };
    let everything = [naive::everything(1, BLOCKS as u64)];
    ratios.measure("one_raw_get_logs", || fetch(&everything));
    ratios.measure("one_raw_get_logs_parsed", || {
        let began = Instant::now();
        assert_eq!(runtime.block_on(naive::parse(&http, &url, &everything[0])), 2 * escrows);
        began.elapsed()
    });
    ratios.measure("fetch_and_throw_away", || fetch(&requests));
    let mut fetched_in_turn = || {
        let began = Instant::now();
        runtime.block_on(naive::hold_again(&http, &url, &conversation, concurrent));
        began.elapsed()
    };
    ratios.measure_by_turns([
        ("fetch_in_turn_and_throw_away", &mut fetched_in_turn),
        ("fetch_decode_commit", &mut &stored),
    ]);

    if time_a_log > Duration::ZERO {
        ratios.measure("until_acknowledged", acknowledged);
        broker.take_counts();
        acknowledged();
        let (requests, messages) = broker.take_counts();
        ratios.say(format!("until_acknowledged: {messages} messages in {requests} requests to Pub/Sub"));
        ratios.compare("fetch_decode_commit", "one_raw_get_logs", 1.5);
        ratios.compare("fetch_decode_commit", "fetch_in_turn_and_throw_away", 1.5);
        ratios.relate("fetch_decode_commit", "fetch_and_throw_away");
        ratios.relate("fetch_in_turn_and_throw_away", "fetch_and_throw_away");
        ratios.compare("until_acknowledged", "one_raw_get_logs", 3.0);
    } else {
        ratios.relate("fetch_decode_commit", "one_raw_get_logs_parsed");
        ratios.relate("fetch_decode_commit", "fetch_in_turn_and_throw_away");
    }
    ratios.finish();
}

criterion_group!(benches, real, free);
criterion_main!(benches);
