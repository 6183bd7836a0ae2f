//! A hundred escrows, one chain, one node behind real HTTP: what one poll costs.
//!
//! Compared: asking per escrow, one request after the other (three `eth_getLogs` an escrow and one for the factory), the
//! same ten at once, and this relayer: a poll that finds nothing, one that finds a block, and the whole chain read into a
//! new store. The floor of each is the round trips it needs, measured as one `eth_blockNumber` of a bare client. All
//! against the same node, once a round trip away and once next door.

mod common;

use std::time::{Duration, Instant};

use common::events::{approved, chain, released};
use common::naive;
use common::node::Node;
use common::ratios::Ratios;
use common::{FAR, NEAR, Reader, config, folder, read_all, runtime, scanner, size, store};
use criterion::{Criterion, criterion_group, criterion_main};
use relayer::scan::Until;

const ESCROWS: usize = 100;
const BLOCKS: usize = 100;
/// Blocks of the chain that are not final: the relayer reads those one by one.
const UNFINAL: u64 = 10;

fn far(criterion: &mut Criterion) {
    compare(criterion, "hundred_escrows/20ms_away", FAR);
}

fn near(criterion: &mut Criterion) {
    compare(criterion, "hundred_escrows/next_door", NEAR);
}

fn compare(criterion: &mut Criterion, name: &str, latency: Duration) {
    let node = Node::start(chain(ESCROWS, BLOCKS), UNFINAL);
    let runtime = runtime();
    let http = reqwest::Client::new();
    let url = node.url();
    let mut reader = Reader::new(&node);
    node.set_latency(latency);
    let mut ratios = Ratios::new(criterion, name);

    let ping = [br#"{"jsonrpc":"2.0","id":1,"method":"eth_blockNumber","params":[]}"#.to_vec()];
    let naive = |requests: &[Vec<u8>], concurrent| {
        let began = Instant::now();
        runtime.block_on(naive::fetch(&http, &url, requests, concurrent));
        began.elapsed()
    };
    ratios.measure("round_trip", || naive(&ping, 1));
    let poll = naive::requests(size(ESCROWS, 10), 1, BLOCKS as u64);
    node.take_counts();
    naive(&poll, 10);
    ratios.say(format!("per_escrow asks: {:?}", node.take_counts()));
    ratios.measure("per_escrow_sequential", || naive(&poll, 1));
    ratios.measure("per_escrow_10_concurrent", || naive(&poll, 10));

    node.take_counts();
    reader.idle();
    ratios.say(format!("idle asks: {:?}", node.take_counts()));
    ratios.measure("relayer_idle", || reader.idle());

    let mut number = 0;
    let mut new_block = || {
        number += 1;
        node.extend(vec![approved(number % ESCROWS), released((number + 1) % ESCROWS)]);
        reader.new_block()
    };
    node.take_counts();
    new_block();
    ratios.say(format!("a new block asks: {:?}", node.take_counts()));
    ratios.measure("relayer_new_block", &mut new_block);

    // A node of its own: the other's chain has grown.
    let node = Node::start(chain(ESCROWS, BLOCKS), UNFINAL);
    node.set_latency(latency);
    let config = config(&node.url(), &[]);
    let cold_start = || {
        let folder = folder();
        let path = folder.path().join("relayer.redb");
        let began = Instant::now();
        let store = store(&config, &path);
        let scanner = scanner(&config, &store, Until::Head);
        runtime.block_on(runtime.spawn(read_all(scanner))).expect("it reads");
        let took = began.elapsed();
        assert_eq!(store.waiting(), 2 * ESCROWS as u64);
        took
    };
    cold_start();
    ratios.say(format!("a cold start asks: {:?}", node.take_counts()));
    ratios.measure("relayer_cold_start", cold_start);

    if !latency.is_zero() {
        ratios.compare("relayer_idle", "round_trip", 1.1);
        ratios.compare("relayer_new_block", "round_trip", 2.2);
        ratios.compare("relayer_cold_start", "round_trip", 6.0);
    }
    ratios.gain("relayer_new_block", "per_escrow_sequential");
    ratios.gain("relayer_new_block", "per_escrow_10_concurrent");
    ratios.gain("relayer_cold_start", "per_escrow_10_concurrent");
    ratios.finish();
}

criterion_group!(benches, far, near);
criterion_main!(benches);
