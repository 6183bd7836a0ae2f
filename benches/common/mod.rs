//! What the benches stand on: a fast fake node, a fast Pub/Sub server, stores in temporary folders, and a table of
//! ratios in which every number stands beside its floor from the same run.

// Every bench compiles all of it and uses a part.
#![allow(dead_code)]

pub mod broker;
pub mod events;
pub mod naive;
pub mod node;
pub mod ratios;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use relayer::config::{Config, Sources};
use relayer::event::Signatures;
use relayer::rpc::Rpc;
use relayer::scan::{Scanner, Step, Until};
use relayer::store::{Added, Store};
use tempfile::TempDir;
use tokio::runtime::Runtime;

use broker::Broker;
use node::Node;

/// The program's: it counts on both sides of a ratio.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The round trip to the node where one is not free.
pub const FAR: Duration = Duration::from_millis(20);
pub const NEAR: Duration = Duration::ZERO;

/// `cargo bench -- --test` runs everything once: to see that it works, on small sizes.
pub fn is_test() -> bool {
    std::env::args().any(|argument| argument == "--test")
}

/// The size that counts, or the one to test with.
pub fn size(measured: usize, tested: usize) -> usize {
    if is_test() { tested } else { measured }
}

pub fn runtime() -> Runtime {
    Runtime::new().expect("a runtime")
}

/// A folder on the disk the build is on: /tmp may be memory, where an fsync costs nothing.
pub fn folder() -> TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder")
}

/// The defaults, without the limits that spare a provider; later settings win.
pub fn config(url: &str, settings: &[(&str, &str)]) -> Config {
    load(url, settings, None)
}

/// The same with a Pub/Sub server as the sink.
pub fn config_to(broker: &Broker, url: &str, settings: &[(&str, &str)]) -> Config {
    load(url, settings, Some(broker))
}

fn load(url: &str, settings: &[(&str, &str)], broker: Option<&Broker>) -> Config {
    let factory = format!("{:#x}", events::FACTORY);
    let common = [
        ("chain.id", "1"),
        ("chain.start_block", "0"),
        ("chain.confirmations", "0"),
        ("factory.address", &factory),
        ("rpc.urls", url),
        ("rpc.requests_per_second", "100000000"),
        ("rpc.burst", "100000000"),
    ];
    let overrides =
        common.iter().chain(settings).map(|(key, value)| ((*key).into(), (*value).into())).collect();
    let sink = |broker: &Broker| {
        [("PUBSUB_PROJECT_ID", "bench".to_owned()), ("PUBSUB_EMULATOR_HOST", broker.endpoint())]
    };
    let environment =
        broker.map(sink).into_iter().flatten().map(|(key, value)| (key.into(), value)).collect();
    let sources = Sources { overrides, environment, directory: PathBuf::from("/nonexistent"), file: None };
    Config::load(&sources).unwrap_or_else(|error| panic!("{error}")).0
}

pub fn signatures(config: &Config) -> Arc<Signatures> {
    Arc::new(relayer::signatures(config).expect("they make a set"))
}

pub fn store(config: &Config, path: &Path) -> Arc<Store> {
    let identity = relayer::identity(config, &signatures(config));
    Arc::new(Store::open(path, identity, Some(0), Added::Leave).expect("the store opens"))
}

/// The real reader with the real client, which has not connected yet.
pub fn scanner(config: &Config, store: &Arc<Store>, until: Until) -> Scanner<Rpc> {
    let rpc = Arc::new(Rpc::new(config.chain.id, &config.rpc).expect("a client"));
    Scanner::new(rpc, Arc::clone(store), signatures(config), config, until)
}

/// Steps until everything asked for is stored.
pub async fn read_all(mut scanner: Scanner<Rpc>) -> Scanner<Rpc> {
    loop {
        match scanner.step().await.expect("the node answers") {
            Step::Progress => {}
            Step::Wait(pause) => tokio::time::sleep(pause).await,
            Step::Idle | Step::Done => return scanner,
        }
    }
}

/// A relayer that has read a node's chain to its head and goes on reading.
pub struct Reader {
    pub store: Arc<Store>,
    scanner: Option<Scanner<Rpc>>,
    runtime: Runtime,
    _folder: TempDir,
}

impl Reader {
    /// With a new store.
    pub fn new(node: &Node) -> Reader {
        Self::with_store(node, folder())
    }

    /// With the store in that folder, or a new one.
    pub fn with_store(node: &Node, folder: TempDir) -> Reader {
        let config = config(&node.url(), &[]);
        let store = store(&config, &folder.path().join("relayer.redb"));
        let scanner = scanner(&config, &store, Until::Forever);
        let runtime = runtime();
        let scanner = runtime.block_on(runtime.spawn(read_all(scanner))).expect("it reads");
        Reader { store, scanner: Some(scanner), runtime, _folder: folder }
    }

    /// One step as the run loop makes it, on a worker's thread; what came of it, and how long it took.
    pub fn step(&mut self) -> (Step, Duration) {
        let mut scanner = self.scanner.take().expect("put back below");
        let (scanner, step, took) = self
            .runtime
            .block_on(self.runtime.spawn(async move {
                let began = Instant::now();
                let step = scanner.step().await.expect("the node answers");
                (scanner, step, began.elapsed())
            }))
            .expect("it reads");
        self.scanner = Some(scanner);
        (step, took)
    }

    /// A poll that finds nothing.
    pub fn idle(&mut self) -> Duration {
        let (step, took) = self.step();
        assert_eq!(step, Step::Idle);
        took
    }

    /// A poll that finds the block just mined, and stores it.
    pub fn new_block(&mut self) -> Duration {
        let (step, took) = self.step();
        assert_eq!(step, Step::Progress);
        took
    }
}
