//! From the outbox to acknowledged: 20,000 messages over 1,000 ordering keys and over 10,000, into a Pub/Sub server in
//! this process that costs next to nothing; and 5,000, each with a key of its own, into one that is as far away as Google's
//! and allows a hundred requests on a connection, too.
//!
//! The floor: a bare `google-cloud-pubsub` publisher that sends the same messages, ordered, from memory, and waits for
//! every answer. It runs as the library comes, and as the relayer sets it up. The relayer reads the messages from its
//! file, keeps to `sink.max_outstanding`, and commits what was acknowledged, with fsync.

mod common;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::broker::Broker;
use common::events::{block, escrow, released};
use common::ratios::Ratios;
use common::{config_to, folder, runtime, signatures, size, store};
use criterion::{Criterion, criterion_group, criterion_main};
use futures_util::future::join_all;
use google_cloud_auth::credentials::anonymous;
use google_cloud_pubsub::client::{BasePublisher, Publisher as Bare};
use google_cloud_pubsub::model;
use relayer::config::Config;
use relayer::publish::{Publisher, Step};
use relayer::pubsub::ConfiguredSink;
use relayer::store::Stretch;

const MESSAGES: usize = 20_000;
const FAR_MESSAGES: usize = 5_000;
const FAR: Duration = Duration::from_millis(20);
const TOPIC: &str = "projects/bench/topics/settlement.events.v1";

/// A store at `path` in which each escrow's messages wait, one a block.
fn fill(config: &Config, path: &Path, escrows: usize, blocks: usize) {
    let (store, signatures) = (store(config, path), signatures(config));
    for number in 1..=blocks {
        let announced = match number {
            1 => (0..escrows).map(|index| (escrow(index), block(number))).collect(),
            _ => Vec::new(),
        };
        let event = |index| released(index).event(&signatures, number, index);
        let events = (0..escrows).map(event).collect();
        let stretch = Stretch { announced, events, blocks: vec![block(number)], ..Stretch::default() };
        store.accept(&stretch).expect("it is committed");
    }
}

/// What waits in the store, as the library wants it.
fn waiting(config: &Config, path: &Path) -> Vec<model::Message> {
    let claimed = store(config, path).claim(usize::MAX).expect("it reads");
    let message = |entry: &relayer::store::Entry| {
        model::Message::new()
            .set_data(entry.body.clone())
            .set_ordering_key(format!("{:#x}", entry.escrow))
            .set_attributes(entry.attributes(1).pairs())
    };
    claimed.iter().map(|claimed| message(&claimed.entry)).collect()
}

async fn client(broker: &Broker) -> BasePublisher {
    let credentials = anonymous::Builder::new().build();
    let builder = BasePublisher::builder().with_endpoint(broker.url()).with_credentials(credentials);
    builder.build().await.expect("a client")
}

async fn send(publisher: Bare, messages: Vec<model::Message>) -> Duration {
    let began = Instant::now();
    let answers = join_all(messages.into_iter().map(|message| publisher.publish(message))).await;
    answers.into_iter().for_each(|answer| drop(answer.expect("it is acknowledged")));
    began.elapsed()
}

/// As [`relayer::Relay`] does it.
async fn publish_all(mut publisher: Publisher<ConfiguredSink>) {
    loop {
        match publisher.step().await.expect("it publishes") {
            Step::Progress => {}
            Step::Idle if publisher.is_drained() => return,
            Step::Idle => publisher.woken().await,
            Step::Wait(pause) => tokio::time::sleep(pause).await,
        }
    }
}

fn few_keys(criterion: &mut Criterion) {
    compare(criterion, "publish/1000_keys", Broker::start(), size(1000, 50), size(MESSAGES, 1000));
}

fn many_keys(criterion: &mut Criterion) {
    compare(criterion, "publish/10000_keys", Broker::start(), size(10_000, 100), size(MESSAGES, 1000));
}

fn far(criterion: &mut Criterion) {
    let messages = size(FAR_MESSAGES, 250);
    compare(criterion, "publish/20_ms_away", Broker::far(FAR), messages, messages);
}

fn compare(criterion: &mut Criterion, name: &str, broker: Broker, escrows: usize, messages: usize) {
    let (runtime, folder) = (runtime(), folder());
    let full = folder.path().join("full.redb");
    let config = config_to(&broker, "http://localhost", &[]);
    fill(&config, &full, escrows, messages / escrows);
    let waiting = waiting(&config, &full);
    assert_eq!(waiting.len(), messages);
    let mut ratios = Ratios::new(criterion, name);
    ratios.measure_for(Duration::from_secs(4));

    let bare = |tuned: bool| {
        let messages = waiting.clone();
        let client = runtime.block_on(client(&broker));
        let _inside = runtime.enter();
        let publisher = client.publisher(TOPIC);
        let publisher = if tuned {
            publisher
                .set_message_count_threshold(1000)
                .set_byte_threshold(3_000_000)
                .set_delay_threshold(Duration::from_millis(1))
        } else {
            publisher
        };
        runtime.block_on(runtime.spawn(send(publisher.build(), messages))).expect("it sends")
    };
    // `sink.max_outstanding` bounds what may be repeated after a crash: the default, and more.
    let outbox = |max_outstanding: usize| {
        let path = folder.path().join("relayer.redb");
        fs::copy(&full, &path).expect("there is room");
        // Otherwise the first commit would wait for the copy to be written.
        fs::File::open(&path).and_then(|file| file.sync_all()).expect("it is written");
        let max_outstanding = max_outstanding.to_string();
        let config = config_to(&broker, "http://localhost", &[("sink.max_outstanding", &max_outstanding)]);
        let store = store(&config, &path);
        let sink = runtime.block_on(ConfiguredSink::open(&config.sink)).expect("a client");
        let publisher = Publisher::new(Arc::new(sink), Arc::clone(&store), &config.sink);
        let began = Instant::now();
        runtime.block_on(runtime.spawn(publish_all(publisher))).expect("it publishes");
        let took = began.elapsed();
        assert_eq!((store.waiting(), store.watermark().expect("it reads")), (0, messages as u64));
        took
    };
    // How many requests the last run of each took.
    let requests = RefCell::new(BTreeMap::new());
    let counted = |name: &'static str, run: &dyn Fn() -> Duration| {
        broker.take_counts();
        let took = run();
        requests.borrow_mut().insert(name, broker.take_counts().0);
        took
    };
    let [default, more] = ["outbox/1000", "outbox/20000"];
    ratios.measure_by_turns([
        ("bare", &mut || counted("bare", &|| bare(false))),
        (default, &mut || counted(default, &|| outbox(1000))),
    ]);
    ratios.measure("bare_set_up_alike", || counted("bare_set_up_alike", &|| bare(true)));
    ratios.measure(more, || counted(more, &|| outbox(20_000)));
    for (name, requests) in requests.take() {
        ratios.say(format!("{name}: {messages} messages in {requests} requests"));
    }
    ratios.compare(default, "bare", 1.25);
    ratios.relate(more, "bare");
    ratios.finish();
}

criterion_group!(benches, few_keys, many_keys, far);
criterion_main!(benches);
