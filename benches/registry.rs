//! A registry that grows from a hundred escrows to a million: what the start, an idle poll, a new block and a block that
//! announces one more escrow cost at each size, and how much memory and file an escrow takes.
//!
//! The floor of every size is the smallest: nothing that is done for each poll may grow with the registry. Memory is
//! that of a process of its own that opened the store and polled once: this program again, with other arguments.

mod common;

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use common::events::{approved, block, deployed, escrow, released};
use common::node::Node;
use common::ratios::Ratios;
use common::{NEAR, Reader, config, folder, is_test, read_all, runtime, scanner, store};
use criterion::{Criterion, criterion_group};
use relayer::scan::Until;
use relayer::store::Stretch;
use tempfile::TempDir;

const RESIDENT: &str = "--resident";
/// Escrows announced in one block.
const A_BLOCK: usize = 10_000;

fn sizes() -> &'static [usize] {
    if is_test() { &[100, 2_000] } else { &[100, 10_000, 1_000_000] }
}

/// A store with so many escrows, and the node it is at the head of.
struct Grown {
    escrows: usize,
    folder: TempDir,
    node: Node,
}

impl Grown {
    fn new(escrows: usize) -> Grown {
        let folder = folder();
        let store = store(&config("http://localhost", &[]), &folder.path().join("relayer.redb"));
        let numbers: Vec<usize> = (0..escrows).collect();
        for (place, chunk) in numbers.chunks(A_BLOCK).enumerate() {
            let block = block(place + 1);
            let announced = chunk.iter().map(|number| (escrow(*number), block)).collect();
            let finalized = Some(block.number);
            let stretch = Stretch { announced, blocks: vec![block], finalized, ..Stretch::default() };
            store.accept(&stretch).expect("it is committed");
        }
        let blocks = vec![Vec::new(); numbers.chunks(A_BLOCK).len()];
        Grown { escrows, folder, node: Node::start(blocks, 64) }
    }

    fn path(&self) -> std::path::PathBuf {
        self.folder.path().join("relayer.redb")
    }

    /// From nothing to the end of the first poll.
    fn start(&self) -> Duration {
        let runtime = runtime();
        let config = config(&self.node.url(), &[]);
        let began = Instant::now();
        let store = store(&config, &self.path());
        let scanner = scanner(&config, &store, Until::Forever);
        let scanner = runtime.block_on(runtime.spawn(read_all(scanner)));
        let took = began.elapsed();
        assert_eq!(store.registry().len(), self.escrows);
        drop(scanner);
        took
    }

    /// Bytes resident in a process that has started and polled.
    fn resident(&self) -> u64 {
        let this = std::env::current_exe().expect("there is one");
        let mut command = Command::new(this);
        let output = command.arg(RESIDENT).arg(self.path()).arg(self.node.url()).output().expect("it runs");
        let said = String::from_utf8(output.stdout).expect("a number");
        said.trim().parse().unwrap_or_else(|_| panic!("{said}{}", String::from_utf8_lossy(&output.stderr)))
    }
}

/// What the other process does.
fn resident(path: &Path, url: &str) {
    let (config, runtime) = (config(url, &[]), runtime());
    let store = store(&config, path);
    let scanner = scanner(&config, &store, Until::Forever);
    let _scanner = runtime.block_on(runtime.spawn(read_all(scanner))).expect("it reads");
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("it says so");
    let kilobytes: u64 = line.trim().trim_end_matches(" kB").parse().expect("a number");
    println!("{}", kilobytes * 1024);
}

fn registry(criterion: &mut Criterion) {
    let grown: Vec<Grown> = sizes().iter().map(|escrows| Grown::new(*escrows)).collect();
    let mut ratios = Ratios::new(criterion, "registry");
    let (smallest, largest) = (sizes()[0], sizes()[sizes().len() - 1]);
    let (mut empty, mut file) = (0.0, 0.0);
    for it in &grown {
        let (resident, length) =
            (it.resident() as f64, std::fs::metadata(it.path()).expect("it is there").len() as f64);
        if it.escrows == smallest {
            (empty, file) = (resident, length);
        }
        let each = |bytes: f64| bytes / (it.escrows - smallest).max(1) as f64;
        ratios.say(format!(
            "{} escrows: {:.1} MB resident, {:.1} MB file; above the smallest an escrow takes {:.0} bytes of memory \
             (target 150) and {:.0} of the file (target 200)",
            it.escrows, resident / 1e6, length / 1e6, each(resident - empty), each(length - file),
        ));
        ratios.measure(&format!("start/{}", it.escrows), || it.start());
    }
    for it in grown {
        let Grown { escrows, folder, node } = it;
        node.set_latency(NEAR);
        let mut reader = Reader::with_store(&node, folder);
        ratios.measure(&format!("idle/{escrows}"), || reader.idle());
        let mut number = 0;
        let mut new_block = || {
            number += 1;
            node.extend(vec![approved(number % escrows), released((number + 1) % escrows)]);
            reader.new_block()
        };
        node.take_counts();
        new_block();
        ratios.say(format!("{escrows} escrows: a new block asks {:?}", node.take_counts()));
        ratios.measure(&format!("new_block/{escrows}"), &mut new_block);
        let mut newest = escrows;
        ratios.measure(&format!("new_escrow/{escrows}"), || {
            node.extend(vec![deployed(newest)]);
            newest += 1;
            reader.new_block()
        });
    }
    for what in ["idle", "new_block", "new_escrow"] {
        ratios.compare(&format!("{what}/{largest}"), &format!("{what}/{smallest}"), 1.5);
    }
    ratios.finish();
}

criterion_group!(benches, registry);

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, what, path, url] = &arguments[..]
        && what == RESIDENT
    {
        return resident(Path::new(path), url);
    }
    benches();
    Criterion::default().configure_from_args().final_summary();
}
