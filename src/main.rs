//! The command line: arguments, signals, exit codes.

mod commands;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow};
use clap::{Args, Parser, Subcommand};
use commands::{escrows, outbox, replay, snapshot, status, verify};
use relayer::config::{Config, Sources};
use relayer::scan::Until;
use relayer::status::Observer;
use relayer::store::Added;
use relayer::vitals::Vitals;
use relayer::{Ending, Relay, check, http, telemetry};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::{error, info};

/// Answers of nodes are many small texts, which the system's allocator is slow with.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const FAULT: u8 = 1;
const CONFIGURATION: u8 = 2;

/// Turns the events of escrow contracts on an EVM chain into Google Pub/Sub messages: none lost, in order per escrow.
///
/// Without a command it runs. Configuration comes from ./relayer.toml (or --config), then from the variables
/// CHAIN_ID, START_BLOCK, CONTRACT_ADDRESS, RPC_URL, PUBSUB_PROJECT_ID, PUBSUB_TOPIC_ID, PUBSUB_EMULATOR_HOST and
/// RELAYER_<SECTION>__<KEY>, then from --set; later wins. `relayer config` shows what came out of it.
#[derive(Parser)]
#[command(
    version,
    after_help = "Exit codes: 0 done or stopped; 1 a fault, try again; 2 usage or configuration.\n\
    Messages for people go to standard error (RUST_LOG=debug for more), data to standard output."
)]
struct Cli {
    #[command(flatten)]
    options: Options,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Args)]
struct Options {
    /// The configuration file; it must exist. Default: ./relayer.toml if it is there.
    #[arg(long, value_name = "FILE", global = true)]
    config: Option<PathBuf>,
    /// Sets one configuration key, above all other sources: --set chain.confirmations=0
    #[arg(long = "set", value_name = "KEY=VALUE", global = true, value_parser = key_value)]
    overrides: Vec<(String, String)>,
}

#[derive(Subcommand)]
enum Command {
    /// Relays until SIGTERM or SIGINT, then finishes what is under way and stops within 8 s.
    Run {
        /// Stop when everything up to there is acknowledged: `head` (the head less chain.confirmations, as it is at
        /// the start) or a block number (waited for, if it is not there yet).
        #[arg(long, value_name = "head|BLOCK", value_parser = until)]
        until: Option<Until>,
        /// Of events added to the configuration since the store was made, relay only those of blocks not yet read.
        /// Without it the history is read once more for them, and what it brings is published as late.
        #[arg(long)]
        from_now: bool,
    },
    /// Tries everything a run needs and prints a line for each; exit 1 if something would not work.
    Check,
    /// Prints how far the relayer is, what waits and what went wrong; also where none runs, as its store has it.
    #[command(after_help = "Example: relayer status --json | jq .chain.lag_blocks")]
    Status {
        /// JSON instead of text.
        #[arg(long)]
        json: bool,
    },
    /// Lists the registered escrows, hands them over to another relayer, or takes them from one.
    Escrows {
        #[command(subcommand)]
        command: escrows::Command,
    },
    /// Shows what waits to be published, what is blocked or quarantined, and tries it again or gives it up.
    Outbox {
        #[command(subcommand)]
        command: outbox::Command,
    },
    /// Publishes the messages of a range of blocks again, exactly as they were, with the attribute replay=true. Only what
    /// was acknowledged before; and in order with whatever a running relayer publishes meanwhile. Ctrl-C stops it.
    #[command(after_help = "Example: relayer replay --from 9508300 --to 9510000")]
    Replay(replay::Replay),
    /// Reads a range of blocks again another way, from another provider where there is one, and compares it with what was
    /// relayed. Prints what is missing, extra or different; exit 1 if anything is. Changes nothing.
    #[command(after_help = "Example: relayer verify --from 9508300 --to 9510000 --json")]
    Verify(verify::Verify),
    /// Makes, lists and restores copies of the store in storage.snapshot_dir.
    Snapshot {
        #[command(subcommand)]
        command: snapshot::Command,
    },
    /// Prints the effective configuration, each value with where it came from; secrets are hidden.
    Config,
}

fn key_value(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("write it as KEY=VALUE, as in chain.confirmations=0")?;
    Ok((key.trim().to_owned(), value.trim().to_owned()))
}

fn until(text: &str) -> Result<Until, String> {
    match text {
        "head" => Ok(Until::Head),
        number => number
            .parse()
            .map(Until::Block)
            .map_err(|_| "give `head` or the number of the last block".to_owned()),
    }
}

/// A message and the exit code that goes with it.
struct Failure {
    code: u8,
    error: anyhow::Error,
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self { code: FAULT, error }
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match execute(cli) {
        Ok(code) => code,
        Err(Failure { code, error }) => {
            eprintln!("error: {error:#}");
            ExitCode::from(code)
        }
    }
}

fn execute(cli: Cli) -> Result<ExitCode, Failure> {
    let command = cli.command.unwrap_or(Command::Run { until: None, from_now: false });
    let sources = Sources::from_env(cli.options.config, cli.options.overrides);
    let (config, effective) =
        Config::load(&sources).map_err(|error| Failure { code: CONFIGURATION, error: error.into() })?;
    let vitals = Arc::new(Vitals::default());
    telemetry::init_logs(config.log.format, &vitals);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("the runtime cannot be started")?;
    let result = match command {
        Command::Config => print(format_args!("{effective}")).map(|()| ExitCode::SUCCESS).map_err(Into::into),
        Command::Check => Ok(runtime.block_on(check_all(&config))),
        Command::Run { until, from_now } => {
            let added = if from_now { Added::FromNow } else { Added::Read };
            runtime.block_on(run(config, until.unwrap_or(Until::Forever), added, vitals))
        }
        Command::Status { json } => runtime.block_on(status::execute(&config, json)),
        Command::Escrows { command } => runtime.block_on(escrows::execute(&config, command)),
        Command::Outbox { command } => runtime.block_on(outbox::execute(&config, command)),
        Command::Replay(replay) => runtime.block_on(replay::execute(&config, replay)),
        Command::Snapshot { command } => runtime.block_on(snapshot::execute(&config, command)),
        Command::Verify(verify) => runtime.block_on(verify::execute(&config, verify)),
    };
    // A write that hangs must not hold up the exit.
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

fn print(text: std::fmt::Arguments<'_>) -> anyhow::Result<()> {
    use std::io::{ErrorKind, Write};
    match std::io::stdout().write_fmt(text) {
        // The reader has seen enough.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        written => written.context("standard output cannot be written"),
    }
}

/// Prints a line that must not get lost: an error also where nobody reads.
fn print_whole(line: &str) -> anyhow::Result<()> {
    use std::io::Write;
    let mut out = std::io::stdout();
    let written = writeln!(out, "{line}").and_then(|()| out.flush());
    written.context("standard output cannot be written: nothing was discarded")
}

async fn check_all(config: &Config) -> ExitCode {
    use std::io::Write;
    // Nobody may be reading any more; the exit code still tells.
    let print = |finding: &check::Finding| drop(writeln!(std::io::stdout(), "{finding}"));
    let good = check::check(config, print).await;
    if good { ExitCode::SUCCESS } else { ExitCode::from(FAULT) }
}

async fn run(config: Config, until: Until, added: Added, vitals: Arc<Vitals>) -> Result<ExitCode, Failure> {
    let stop = stop_on_signal()?;
    let fail = |error: relayer::RelayError| {
        let code = if error.is_configuration() { CONFIGURATION } else { FAULT };
        // Our errors name their causes themselves: as a chain they would say them twice.
        Failure { code, error: anyhow!("{error}") }
    };
    let observer = Arc::new(Observer::new(&config, vitals));
    // Before the store is opened: probes are answered while that takes its time. Until the end: while it stops, too.
    let _serving = match config.http.listen {
        Some(address) => serve(address, &observer).await,
        None => None,
    };
    let relay = Relay::open_observed(config, added, observer, &stop).await.map_err(fail)?;
    let Some(relay) = relay else {
        return Ok(ExitCode::SUCCESS);
    };
    match relay.run(until, stop).await.map_err(fail)? {
        Ending::Complete | Ending::Stopped => Ok(ExitCode::SUCCESS),
        Ending::Blocked(lanes) => {
            for (lane, reason) in &lanes {
                error!(%lane, %reason, "Still blocked");
            }
            Err(anyhow!("{} lanes are blocked: their messages are kept and wait in the store", lanes.len())
                .into())
        }
    }
}

async fn serve(address: SocketAddr, observer: &Arc<Observer>) -> Option<AbortOnDropHandle<()>> {
    let metrics = telemetry::metrics::install()?;
    let listener = http::bind(address).await?;
    let pages = http::Pages { metrics, observer: Arc::clone(observer) };
    Some(AbortOnDropHandle::new(tokio::spawn(http::serve(listener, pages))))
}

/// Cancelled at the first SIGTERM or SIGINT.
fn stop_on_signal() -> Result<CancellationToken, Failure> {
    use tokio::signal::unix::{SignalKind, signal};
    let stop = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM cannot be handled")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT cannot be handled")?;
    let stopping = stop.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        // First things first: a log nobody reads must not hold it up.
        stopping.cancel();
        info!("Stopping: finishing what is under way");
    });
    Ok(stop)
}
