//! New heads, announced over a web socket: they save the poll that would have found them.
//!
//! After a reorg only the last new head is announced, and a subscription may die without a word: polls go on, and whoever
//! polls says when announcements are missing.

use std::sync::Arc;
use std::time::Duration;

use alloy::pubsub::RawSubscription;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::{Instant, sleep};
use tracing::{debug, info, warn};

use super::transport::Failure;
use super::{Rpc, wire};
use crate::backoff::Backoff;
use crate::config::SecretUrl;

/// A subscription that held so long was a good one: the next is made at once.
const HELD: Duration = Duration::from_secs(60);

/// Keeps a subscription to the first provider with a web socket, for ever; at once there is nothing to do without one.
pub async fn follow_heads(rpc: Arc<Rpc>) {
    let Some(announcer) = rpc.announcer() else {
        return;
    };
    let url = rpc.providers[announcer].url.clone();
    let mut backoff = Backoff::growing();
    let mut said = false;
    loop {
        let began = Instant::now();
        let ended = match rpc.subscribe(announcer).await {
            Ok(subscription) => {
                say(&url, &mut said, true, "");
                rpc.relay_heads(subscription).await
            }
            Err(failure) => failure.message,
        };
        say(&url, &mut said, false, &ended);
        if began.elapsed() > HELD {
            backoff = Backoff::growing();
        }
        sleep(backoff.pause()).await;
    }
}

fn say(url: &SecretUrl, announced: &mut bool, announces: bool, reason: &str) {
    if std::mem::replace(announced, announces) == announces {
        debug!(provider = %url, announces, %reason, "As before");
        return;
    }
    match announces {
        true => info!(provider = %url, "New heads are announced over the web socket"),
        false => {
            warn!(provider = %url, %reason, "New heads are announced no more: polling, and subscribing again")
        }
    }
}

impl Rpc {
    /// The first provider with a web socket.
    pub(super) fn announcer(&self) -> Option<usize> {
        self.providers.iter().position(|provider| provider.transport.is_web_socket())
    }

    async fn subscribe(&self, index: usize) -> Result<RawSubscription, Failure> {
        let first = self.next_id.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        self.pace(1).await;
        self.providers[index].transport.subscribe(wire::new_heads(first)).await
    }

    /// Passes heads on until the subscription ends or seems dead; returns why.
    async fn relay_heads(&self, mut subscription: RawSubscription) -> String {
        loop {
            let received = tokio::select! {
                received = subscription.recv() => received,
                () = self.resubscribe.notified() => return "polls find heads that were not announced".to_owned(),
            };
            match received {
                Ok(head) => match wire::head(&head) {
                    Ok(head) => drop(self.heads.send_replace(Some(head))),
                    Err(error) => debug!(%error, "An announcement that is no header"),
                },
                // The newest is still to come.
                Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return "the connection ended".to_owned(),
            }
        }
    }
}
