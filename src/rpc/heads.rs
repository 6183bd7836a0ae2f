//! New heads, announced over a web socket: they save the poll that would have found them.
//!
//! After a reorg only the last new head is announced, and a subscription may die without a word: polls go on, and whoever
//! polls says when announcements are missing.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use alloy::pubsub::RawSubscription;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::{Instant, sleep};
use tracing::{debug, info, warn};

use super::transport::Failure;
use super::wire::Query;
use super::{Rpc, wire};
use crate::backoff::Backoff;
use crate::config::SecretUrl;

/// A subscription that held so long was a good one: the next is made at once.
const HELD: Duration = Duration::from_secs(60);

/// Keeps a subscription to the first provider with a web socket, for ever; at once there is nothing to do without one on
/// our chain.
pub async fn follow_heads(rpc: Arc<Rpc>) {
    let mut backoff = Backoff::growing();
    let mut said = false;
    while let Some(announcer) = rpc.announcer() {
        let url = rpc.providers[announcer].url.clone();
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
    /// The first provider with a web socket that is not known to be on another chain.
    pub(super) fn announcer(&self) -> Option<usize> {
        let announces = |index: &usize| self.providers[*index].transport.is_web_socket();
        (0..self.providers.len()).filter(announces).find(|index| !self.health.is_on_another_chain(*index))
    }

    async fn subscribe(&self, index: usize) -> Result<RawSubscription, Failure> {
        self.be_on_our_chain(index).await?;
        let first = self.next_id.fetch_add(1, Ordering::Relaxed);
        self.pace(1).await;
        self.providers[index].transport.subscribe(wire::new_heads(first)).await
    }

    /// Heads of another chain are worth nothing: that is asked before any of them is listened to, unless it is known.
    async fn be_on_our_chain(&self, index: usize) -> Result<(), Failure> {
        let provider = &self.providers[index];
        if provider.verified.load(Ordering::Relaxed) {
            return Ok(());
        }
        let began = Instant::now();
        let answered = self.exchange(provider, &[Query::ChainId]).await;
        match answered.and_then(|mut answers| self.check_chain_id(provider, answers.remove(0))) {
            Ok(None) => Ok(()),
            Ok(Some(found)) => {
                // That all of them are is said where reading finds it.
                let _ = self.give_up(index, found, began.elapsed());
                Err(Failure::fault(format_args!("it is on chain {found}")))
            }
            Err(refusing) => Err(Failure::fault(refusing.message)),
        }
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
