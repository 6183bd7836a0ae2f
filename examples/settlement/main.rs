//! A settlement service: how a consumer of the relayer's messages should be written. Copy its shape.
//!
//! ```sh
//! gcloud pubsub subscriptions create settlement --topic=settlement.events.v1 --enable-message-ordering
//! cargo run --example settlement -- --subscription projects/my-project/subscriptions/settlement
//! curl http://127.0.0.1:8000/escrows/0x…
//! ```
//!
//! The rules, and where they stand:
//!
//! 1. **One message, one database transaction**: what it changes and that it was applied are committed together
//!    (`ledger.rs`, `Ledger::apply`).
//! 2. **Acknowledge after the commit**, never before (`consumer.rs`, `handle`). Killed in between, the message comes
//!    again and rule 3 finds it.
//! 3. **A message is known by escrow, epoch and sequence; an event by its event_id.** The same message again changes
//!    nothing. The same event in a new epoch (the relayer has a new store and publishes everything again) changes
//!    nothing either.
//! 4. **`Retracted` takes back exactly the event it names**, and forgets its id: if the block returns to the chain, the
//!    event comes again under the same id and counts again.
//! 5. **A gap in `sequence` is said, and what arrived is applied.** `late=true` needs no case of its own: it is numbered
//!    like all others.
//! 6. **What cannot be understood is put aside and acknowledged**: delivering it for ever helps nobody.
//!
//! The subscription has to have message ordering. The amounts are text: they do not fit into 64 bits.

mod consumer;
mod http;
mod ledger;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Keeps escrows and their approvals in SQLite, as the relayer's messages say.
///
/// PUBSUB_EMULATOR_HOST=host:port makes it talk to an emulator, without credentials. RUST_LOG filters the log.
#[derive(Parser)]
struct Options {
    /// The full name, projects/…/subscriptions/…; it must exist, and have message ordering.
    #[arg(long, value_parser = subscription)]
    subscription: String,
    /// The database; it is made if it is not there.
    #[arg(long, default_value = "settlement.db")]
    database: PathBuf,
    /// Where GET /escrows/{address} and /health are served; port 0 takes a free one.
    #[arg(long, default_value = "127.0.0.1:8000")]
    listen: String,
}

fn subscription(name: &str) -> Result<String, String> {
    match name.split('/').collect::<Vec<_>>()[..] {
        ["projects", project, "subscriptions", id] if !project.is_empty() && !id.is_empty() => {
            Ok(name.to_owned())
        }
        _ => Err("write it as projects/<project>/subscriptions/<name>".to_owned()),
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let options = Options::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    match run(&options).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(options: &Options) -> Result<()> {
    let stop = stop_on_signal()?;
    let state = consumer::State::new(ledger::Ledger::open(&options.database)?);
    let listener = TcpListener::bind(&options.listen)
        .await
        .with_context(|| format!("--listen {} cannot be listened on: give another port", options.listen))?;
    let address = listener.local_addr()?;
    let emulator = std::env::var("PUBSUB_EMULATOR_HOST").ok().filter(|host| !host.is_empty());
    let subscriber = consumer::connect(emulator.as_deref()).await?;
    tracing::info!(subscription = %options.subscription, "Listening on http://{address}");

    let serving = axum::serve(listener, http::router(state.clone()));
    let consuming = consumer::consume(&subscriber, &options.subscription, &state, &stop);
    tokio::select! {
        served = serving.into_future() => served.context("the HTTP pages ended"),
        consumed = consuming => consumed,
    }
}

fn stop_on_signal() -> Result<CancellationToken> {
    let stop = CancellationToken::new();
    let mut signals = [signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?];
    let stopping = stop.clone();
    tokio::spawn(async move {
        let [terminate, interrupt] = &mut signals;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        stopping.cancel();
    });
    Ok(stop)
}
