//! Any number of ordering keys in bounded memory. The Pub/Sub library keeps a task for every key it has ever seen, about
//! 14 KB each: for a hundred thousand escrows that were over a gigabyte.
//!
//! `KEYS=100000 cargo test --test keys -- --nocapture` publishes for so many.

mod common;

use std::time::Instant;

use common::PubSub;
use common::sink::{message, to};
use futures_util::StreamExt;
use relayer::publish::Sink;
use relayer::pubsub::GooglePubSub;

/// How many, unless asked for more.
const KEYS: u64 = 12_000;
/// After so many, connections and what the allocator keeps are there; nothing is kept for a key.
const WARM: u64 = 4_000;
const AT_ONCE: usize = 500;
/// What resident memory may grow by until then, and for all other keys, in KiB: the library alone would take 14 for each.
const WARMING: u64 = 128 << 10;
const LATER: u64 = 48 << 10;

/// Of this process, in KiB.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("this is Linux");
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("it says so");
    line.split_whitespace().nth(1).expect("a number").parse().expect("a number")
}

async fn publish(sink: &GooglePubSub, pubsub: &PubSub, keys: std::ops::Range<u64>) -> u64 {
    let mut arrived = 0;
    for from in keys.clone().step_by(1000) {
        let part = from..(from + 1000).min(keys.end);
        let sent = futures_util::stream::iter(part).map(|key| sink.publish(vec![message(key)]));
        let mut sent = sent.buffer_unordered(AT_ONCE);
        while let Some(receipt) = sent.next().await {
            assert_eq!(receipt.failure, None);
            arrived += receipt.acknowledged as u64;
        }
        // The server is in this process: what it remembers is not the relayer's.
        pubsub.forget();
    }
    arrived
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[cfg(target_os = "linux")]
async fn however_many_ordering_keys_there_were_memory_does_not_grow_with_them() {
    let keys = std::env::var("KEYS").map_or(KEYS, |keys| keys.parse().expect("a number"));
    let pubsub = PubSub::start().await;
    pubsub.create_topic("projects/test-project/topics/settlement.events.v1");
    let sink = to(&pubsub.endpoint(), &[]).await;
    let began = Instant::now();
    let cold = resident();
    let mut arrived = publish(&sink, &pubsub, 0..WARM).await;
    let warm = resident();
    arrived += publish(&sink, &pubsub, WARM..keys).await;
    let end = resident();
    println!("{cold} KiB, {warm} after {WARM} keys, {end} after {keys}, in {:?}", began.elapsed());
    assert_eq!(arrived, keys);
    assert!(warm < cold + WARMING, "resident memory grew from {cold} to {warm} KiB");
    assert!(end < warm + LATER, "resident memory grew from {warm} to {end} KiB");
}
