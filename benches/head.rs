//! At the head: from a block that is announced to its message acknowledged, and that recorded: the relayer as it runs.
//!
//! The floor is what cannot be spared: one `eth_getLogs` of a bare client and one publish of a bare `google-cloud-pubsub`
//! publisher, one after the other, with the same node and the same server.

mod common;

use std::time::{Duration, Instant};

use common::broker::Broker;
use common::events::{approved, chain};
use common::naive;
use common::node::Node;
use common::ratios::Ratios;
use common::{FAR, NEAR, config_to, folder, is_test, runtime};
use criterion::{Criterion, criterion_group, criterion_main};
use google_cloud_auth::credentials::anonymous;
use google_cloud_pubsub::client::BasePublisher;
use google_cloud_pubsub::model;
use relayer::Relay;
use relayer::scan::Until;
use relayer::store::Added;
use tokio_util::sync::CancellationToken;

const ESCROWS: usize = 100;
const BLOCKS: usize = 20;
/// More than a hundred runs of each: slow ones are wanted, too.
const MEASURED: Duration = Duration::from_secs(6);

fn far(criterion: &mut Criterion) {
    compare(criterion, "head/20ms_away", FAR);
}

fn near(criterion: &mut Criterion) {
    compare(criterion, "head/next_door", NEAR);
}

fn compare(criterion: &mut Criterion, name: &str, latency: Duration) {
    let (broker, runtime, folder) = (Broker::start(), runtime(), folder());
    let node = Node::start(chain(ESCROWS, BLOCKS), 10);
    let url = node.url();
    let mut ratios = Ratios::new(criterion, name);
    ratios.measure_for(if is_test() { Duration::from_millis(1) } else { MEASURED });

    node.set_latency(latency);
    let http = reqwest::Client::new();
    let logs = [naive::everything(BLOCKS as u64, BLOCKS as u64)];
    let publisher = runtime.block_on(async {
        let credentials = anonymous::Builder::new().build();
        let builder = BasePublisher::builder().with_endpoint(broker.url()).with_credentials(credentials);
        let base = builder.build().await.expect("a client");
        base.publisher("projects/bench/topics/settlement.events.v1").set_message_count_threshold(1).build()
    });
    ratios.measure("logs_and_publish", || {
        let began = Instant::now();
        runtime.block_on(async {
            naive::fetch(&http, &url, &logs, 1).await;
            let message = model::Message::new().set_data(vec![b'x'; 600]).set_ordering_key("0x01");
            publisher.publish(message).await.expect("it is acknowledged");
        });
        began.elapsed()
    });

    // What is read before the first announcement does not count.
    node.set_latency(Duration::ZERO);
    let path = folder.path().join("relayer.redb").display().to_string();
    let urls = format!("{url},{}", node.announcing_url());
    let settings = [("storage.path", path.as_str()), ("chain.poll_interval", "1h")];
    let config = config_to(&broker, &urls, &settings);
    let stop = CancellationToken::new();
    let relay = runtime.block_on(Relay::open(config, Added::Leave, &stop)).expect("it opens");
    let relay = relay.expect("nobody asked to stop");
    let store = std::sync::Arc::clone(relay.store());
    let running = runtime.spawn(relay.run(Until::Forever, stop.clone()));
    while !node.is_listened_to() || store.next_block() <= node.head() || store.waiting() > 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    node.set_latency(latency);
    let mut number = 0;
    ratios.measure("announced_to_acknowledged", || {
        number += 1;
        node.extend(vec![approved(number % ESCROWS)]);
        let entries = store.entries();
        let began = Instant::now();
        node.announce();
        // Acknowledged, and recorded.
        while store.entries() == entries || store.waiting() > 0 {
            std::thread::sleep(Duration::from_micros(50));
        }
        began.elapsed()
    });
    ratios.relate("announced_to_acknowledged", "logs_and_publish");
    ratios.compare_slow("announced_to_acknowledged", "logs_and_publish", 1.2, Duration::from_millis(20));
    ratios.finish();
    stop.cancel();
    runtime.block_on(running).expect("it runs").expect("it ends well");
}

criterion_group!(benches, far, near);
criterion_main!(benches);
