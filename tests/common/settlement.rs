//! The settlement consumer of `examples/` as a process of its own.

use serde_json::Value;

use super::pubsub::Subscription;
use super::relay::{Finished, PATIENCE, Running, Setup};
use super::{PubSub, example};

pub const SUBSCRIPTION: &str = "projects/test-project/subscriptions/settlement";

/// The consumer at work, with its database in the set-up's folder.
pub struct Settlement {
    pub running: Running,
    url: String,
    http: reqwest::Client,
}

/// The subscription that the consumer needs, on that topic.
pub fn subscribe(pubsub: &PubSub, topic: &str) {
    pubsub.create_subscription(Subscription {
        name: SUBSCRIPTION.into(),
        topic: topic.into(),
        enable_message_ordering: true,
        ..Default::default()
    });
}

impl Settlement {
    /// Starts it, or starts it again on the same database.
    pub async fn start(setup: &Setup, pubsub: &PubSub) -> Settlement {
        Self::start_at(setup, pubsub, "http://127.0.0.1:0").await
    }

    /// The same at the address that an earlier one had.
    pub async fn start_at(setup: &Setup, pubsub: &PubSub, url: &str) -> Settlement {
        let listen = url.strip_prefix("http://").expect("a URL");
        let program = tokio::task::spawn_blocking(|| example::path("settlement")).await.expect("built");
        let args = ["--subscription", SUBSCRIPTION, "--listen", listen];
        let mut running =
            setup.start_program(&program, &args, &[("PUBSUB_EMULATOR_HOST", &pubsub.endpoint())]);
        let said = running.wait_said("Listening on http://").await;
        let (_, address) = said.split_once("Listening on ").expect("it was said");
        let address = address.split_whitespace().next().expect("an address");
        Settlement { running, url: address.to_owned(), http: reqwest::Client::new() }
    }

    pub fn url(&self) -> &str {
        &self.url
    }

    /// Status and body.
    pub async fn get(&self, path: &str) -> (u16, Value) {
        let response = self.http.get(format!("{}{path}", self.url)).send().await.expect("it answers");
        let status = response.status().as_u16();
        let body = response.bytes().await.expect("a body");
        (status, serde_json::from_slice(&body).unwrap_or(Value::Null))
    }

    /// The row of an escrow; null before there is one.
    pub async fn row(&self, escrow: &str) -> Value {
        match self.get(&format!("/escrows/{escrow}")).await {
            (200, row) => row,
            (404, _) => Value::Null,
            other => panic!("{other:?}"),
        }
    }

    /// Waits until the row is as wanted; `wanted` says in words what that is.
    pub async fn wait_row(&self, escrow: &str, wanted: &str, is_so: impl Fn(&Value) -> bool) -> Value {
        let wait = async {
            loop {
                let row = self.row(escrow).await;
                if is_so(&row) {
                    return row;
                }
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
        };
        match tokio::time::timeout(PATIENCE, wait).await {
            Ok(row) => row,
            Err(_) => panic!("{escrow} is not {wanted}: {}", self.row(escrow).await),
        }
    }

    pub async fn wait_count(&self, escrow: &str, approvals: u64, status: &str) -> Value {
        let wanted = format!("at {approvals} approvals, {status}");
        self.wait_row(escrow, &wanted, |row| row["approvals_count"] == approvals && row["status"] == status)
            .await
    }

    /// What `/health` counts.
    pub async fn counts(&self) -> Value {
        self.get("/health").await.1["ledger"].take()
    }

    pub async fn kill(self) -> Finished {
        self.running.kill().await
    }
}
