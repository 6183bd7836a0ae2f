//! The relayer's own way to Pub/Sub, without the rest of it.

use std::path::PathBuf;
use std::sync::Arc;

use relayer::config::{Config, Sources};
use relayer::publish::Message;
use relayer::pubsub::GooglePubSub;

/// A sink that publishes to the server there; later settings win.
pub async fn to(endpoint: &str, settings: &[(&str, &str)]) -> GooglePubSub {
    GooglePubSub::open(&config(endpoint, settings).sink).await.expect("a client can be made")
}

fn config(endpoint: &str, settings: &[(&str, &str)]) -> Config {
    let common = [
        ("chain.id", "1"),
        ("factory.address", "0xfafafafafafafafafafafafafafafafafafafafa"),
        ("rpc.urls", "http://127.0.0.1:1"),
        ("sink.project", "test-project"),
    ];
    let sources = Sources {
        overrides: common
            .iter()
            .chain(settings)
            .map(|(key, value)| ((*key).into(), (*value).into()))
            .collect(),
        environment: [("PUBSUB_EMULATOR_HOST".to_owned(), endpoint.to_owned())].into(),
        directory: PathBuf::from("/nonexistent"),
        ..Sources::default()
    };
    Config::load(&sources).expect("it is right").0
}

/// The first message of a key.
pub fn message(key: u64) -> Arc<Message> {
    Arc::new(Message {
        ordering_key: format!("0x{key:040x}"),
        attributes: vec![("sequence", "1".to_owned())],
        data: vec![b'x'; 700].into(),
    })
}
