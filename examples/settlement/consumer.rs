//! From the subscription to the ledger.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use google_cloud_auth::credentials::anonymous;
use google_cloud_gax::error::rpc::Code;
use google_cloud_pubsub::client::Subscriber;
use google_cloud_pubsub::subscriber::MessageStream;
use google_cloud_pubsub::subscriber::handler::Handler;
use tokio_util::sync::CancellationToken;

use crate::ledger::{Applied, Ledger, Message};

/// Between a failure and the next attempt.
const PAUSE: Duration = Duration::from_secs(1);
/// What handing back acknowledgements may take at the end.
const GOODBYE: Duration = Duration::from_secs(3);

/// Shared by the consumer and the HTTP pages.
pub struct State {
    pub ledger: Mutex<Ledger>,
    /// Messages can be received and applied.
    pub healthy: AtomicBool,
}

impl State {
    pub fn new(ledger: Ledger) -> Arc<Self> {
        Arc::new(Self { ledger: Mutex::new(ledger), healthy: AtomicBool::new(true) })
    }
}

/// A client for Google, or for the emulator at that host and port, which wants no credentials.
pub async fn connect(emulator: Option<&str>) -> Result<Subscriber> {
    let builder = Subscriber::builder();
    let builder = match emulator {
        Some(host) => builder
            .with_endpoint(format!("http://{host}"))
            .with_credentials(anonymous::Builder::new().build()),
        None => builder,
    };
    builder.build().await.context("the Pub/Sub client cannot be set up")
}

/// Applies what arrives until `stop`.
pub async fn consume(
    subscriber: &Subscriber,
    subscription: &str,
    state: &Arc<State>,
    stop: &CancellationToken,
) -> Result<()> {
    while !stop.is_cancelled() {
        let mut stream = subscriber.subscribe(subscription).build();
        let failure = tokio::select! {
            () = stop.cancelled() => None,
            failure = receive(&mut stream, state) => failure,
        };
        // What was applied gets acknowledged, what was not is given back.
        let _ = tokio::time::timeout(GOODBYE, stream.shutdown_token().shutdown()).await;
        let Some(failure) = failure else { continue };
        state.healthy.store(false, Ordering::Relaxed);
        if failure.status().is_some_and(|status| status.code == Code::NotFound) {
            bail!(
                "{subscription} does not exist: create it with `gcloud pubsub subscriptions create … \
                 --enable-message-ordering`"
            );
        }
        tracing::warn!(%failure, "The subscription failed: trying again");
        tokio::time::sleep(PAUSE).await;
    }
    Ok(())
}

/// Message after message, in the order of their keys. `Some`: the stream ended with this.
async fn receive(stream: &mut MessageStream, state: &Arc<State>) -> Option<google_cloud_pubsub::Error> {
    while let Some(next) = stream.next().await {
        let (message, handler) = match next {
            Ok(next) => next,
            Err(failure) => return Some(failure),
        };
        handle(message, handler, state).await;
    }
    None
}

async fn handle(message: google_cloud_pubsub::model::Message, handler: Handler, state: &Arc<State>) {
    let id = message.message_id;
    let message = Message { id: id.clone(), attributes: message.attributes, data: message.data.to_vec() };
    let shared = Arc::clone(state);
    let applied = tokio::task::spawn_blocking(move || {
        shared.ledger.lock().expect("no panic while held").apply(&message)
    });
    match applied.await.expect("applying does not panic") {
        // After the commit, never before: a message acknowledged and not applied is lost.
        Ok(applied) => {
            match applied {
                Applied::Changed { event, escrow } => tracing::info!(%event, %escrow, "Applied"),
                Applied::Known => tracing::debug!(%id, "Applied before"),
                Applied::Ignored { event } => tracing::info!(%event, "Not an event of ours"),
                Applied::Rejected { reason } => tracing::warn!(%id, %reason, "A message was put aside"),
            }
            state.healthy.store(true, Ordering::Relaxed);
            handler.ack();
        }
        Err(error) => {
            state.healthy.store(false, Ordering::Relaxed);
            tracing::error!(%id, "The database failed, the message will come again: {error:#}");
            handler.nack();
            tokio::time::sleep(PAUSE).await;
        }
    }
}
