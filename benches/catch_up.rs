//! Catching up: 20,000 events of 10,000 escrows in 301 blocks, fetched, decoded and committed with fsync into a new file.
//!
//! The floor: the requests the relayer made, sent again by a bare client (as many at once as the relayer may) that
//! throws the answers away. Beside it the least that could be asked: one `eth_getLogs` for everything. The whole way,
//! until a Pub/Sub server has acknowledged all of it, is compared with the same floor.

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
use serde_json::json;
use tokio_util::sync::CancellationToken;

const BLOCKS: usize = 301;
/// As far as Ethereum's finality is behind.
const UNFINAL: u64 = 64;

fn catch_up(criterion: &mut Criterion) {
    let escrows = size(10_000, 300);
    let node = Node::start(chain(escrows, BLOCKS), UNFINAL);
    let runtime = runtime();
    let http = reqwest::Client::new();
    let url = node.url();
    let mut ratios = Ratios::new(criterion, "catch_up");
    ratios.measure_for(Duration::from_secs(8));

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
    node.take_counts();
    let requests = node.record(|| {
        stored();
    });
    ratios.say(format!("the relayer asks: {:?}", node.take_counts()));
    let concurrent = settings.rpc.max_concurrent.get();
    let fetch = |requests: &[Vec<u8>]| {
        let began = Instant::now();
        runtime.block_on(naive::fetch(&http, &url, requests, concurrent));
        began.elapsed()
    };
    ratios.measure("fetch_and_throw_away", || fetch(&requests));
    let all = json!({ "jsonrpc": "2.0", "id": 1, "method": "eth_getLogs", "params": [{
        "fromBlock": "0x1", "toBlock": format!("{BLOCKS:#x}"),
    }]});
    let all = [all.to_string().into_bytes()];
    ratios.measure("one_raw_get_logs", || fetch(&all));
    ratios.measure("fetch_decode_commit", stored);

    let broker = Broker::start();
    ratios.measure("until_acknowledged", || {
        let folder = folder();
        let path = folder.path().join("relayer.redb").display().to_string();
        let config = config_to(&broker, &url, &[("storage.path", &path)]);
        let began = Instant::now();
        let relay = runtime.block_on(Relay::open(config, Added::Leave)).expect("it opens");
        let run = runtime.spawn(relay.run(Until::Head, CancellationToken::new()));
        let ending = runtime.block_on(run).expect("it runs").expect("it ends well");
        assert_eq!(ending, Ending::Complete);
        began.elapsed()
    });

    ratios.compare("fetch_decode_commit", "fetch_and_throw_away", 1.5);
    ratios.compare("until_acknowledged", "fetch_and_throw_away", 3.0);
    ratios.finish();
}

criterion_group!(benches, catch_up);
criterion_main!(benches);
