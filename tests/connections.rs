//! The connection to Pub/Sub, which is not trusted for ever.

mod common;

use common::sink::{message, to};
use common::{PubSub, Wire};
use futures_util::future::join_all;
use relayer::publish::{Sink, SinkError};

const TOPIC: &str = "projects/test-project/topics/settlement.events.v1";

async fn server() -> (PubSub, Wire) {
    let pubsub = PubSub::start().await;
    pubsub.create_topic(TOPIC);
    let wire = Wire::to(pubsub.endpoint()).await;
    (pubsub, wire)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_is_dead_without_a_word_costs_one_message_its_time_and_no_other() {
    let (_pubsub, wire) = server().await;
    let sink = to(&wire.endpoint(), &[("sink.timeout", "2s")]).await;
    let warm = join_all((0..100).map(|key| sink.publish(vec![message(key)]))).await;
    assert!(warm.iter().all(|receipt| receipt.failure.is_none()), "{warm:?}");
    wire.cut_first(1);
    let mut failed = None;
    for key in 100..400 {
        failed = sink.publish(vec![message(key)]).await.failure;
        if failed.is_some() {
            break;
        }
    }
    assert!(matches!(failed, Some(SinkError::Unavailable(_))), "nothing went over the first one: {failed:?}");
    for key in 400..460 {
        let receipt = sink.publish(vec![message(key)]).await;
        assert_eq!(receipt.failure, None, "message {key}");
    }
}
