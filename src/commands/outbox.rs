//! `relayer outbox`: what waits, what is blocked or quarantined, and what to do about it.

use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::anyhow;
use clap::Subcommand;
use relayer::config::Config;
use relayer::control::{
    BlockedRow, Discarded, MessageRow, OutboxRow, QuarantinedRow, Request, RetryRow, Shown, Totals,
};

use super::{Missing, Office, changing, shortened};
use crate::{FAULT, Failure, print};

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Prints what waits to be published, what is blocked (a message that the sink refuses, and its lane with it) and what
    /// is quarantined (logs with a known topic that do not decode), oldest first.
    #[command(after_help = "Example: relayer outbox list --json | jq '.blocked[].reason'")]
    List {
        /// At most so many of each.
        #[arg(long, value_name = "N", default_value_t = 20)]
        limit: usize,
        /// One JSON object instead of tables.
        #[arg(long)]
        json: bool,
    },
    /// Offers blocked messages again at once, and decodes quarantined logs again with the events configured now: those that
    /// decode are published as late. A relayer that runs uses the events it was started with.
    #[command(after_help = "Examples: relayer outbox retry --all\n          \
        relayer outbox retry 0x311e63dfcefe7f2c202715ef0df01cda82f58914")]
    Retry {
        /// Lanes, or event ids of blocked messages or quarantined logs, as `outbox list` prints them.
        #[arg(value_name = "LANE|EVENT_ID", required_unless_present = "all", conflicts_with = "all")]
        which: Vec<String>,
        /// Everything that is blocked or quarantined.
        #[arg(long)]
        all: bool,
    },
    /// Gives up blocked messages or quarantined logs, for ever; each is printed whole before. A blocked message counts as done:
    /// its lane goes on, and its sequence stays a gap that consumers can see. Nothing else can be discarded.
    #[command(after_help = "Example: relayer outbox discard 11155111:0x5d91…:17 >> given-up.jsonl")]
    Discard {
        /// Exactly as `outbox list` prints them.
        #[arg(value_name = "EVENT_ID", required = true)]
        event_ids: Vec<String>,
    },
}

pub(crate) async fn execute(config: &Config, command: Command) -> Result<ExitCode, Failure> {
    let missing = Missing::Refuse;
    match command {
        Command::List { limit, json } => list(&Office::find(config, missing).await?, limit, json).await,
        Command::Retry { which, all: _ } => {
            changing(config, missing, async |office| retry(office, which).await).await
        }
        Command::Discard { event_ids } => {
            changing(config, missing, async |office| discard(office, event_ids).await).await
        }
    }
}

/// What the outbox holds, as far as it was asked for.
#[derive(Default, serde::Serialize)]
struct Outbox {
    totals: Option<Totals>,
    blocked: Vec<BlockedRow>,
    quarantined: Vec<QuarantinedRow>,
    waiting: Vec<MessageRow>,
}

async fn list(office: &Office, limit: usize, as_json: bool) -> Result<ExitCode, Failure> {
    let mut rows = office.ask(Request::Outbox { limit }).await?;
    let mut outbox = Outbox::default();
    while let Some(row) = rows.next().await? {
        match row {
            OutboxRow::Totals(totals) => outbox.totals = Some(totals),
            OutboxRow::Blocked(row) => outbox.blocked.push(row),
            OutboxRow::Quarantined(row) => outbox.quarantined.push(row),
            OutboxRow::Waiting(row) => outbox.waiting.push(row),
        }
    }
    match as_json {
        true => {
            let text = serde_json::to_string_pretty(&outbox).map_err(anyhow::Error::from)?;
            print(format_args!("{text}\n"))?;
        }
        false => table(&outbox)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn table(outbox: &Outbox) -> anyhow::Result<()> {
    let Some(Totals { waiting, blocked, quarantined }) = outbox.totals else { return Ok(()) };
    print(format_args!("{waiting} waiting, {blocked} blocked, {quarantined} quarantined\n"))?;
    let more = |total: u64, shown: usize| match total > shown as u64 {
        true => print(format_args!("… {} more: --limit\n", total - shown as u64)),
        false => Ok(()),
    };
    if !outbox.blocked.is_empty() {
        print(format_args!(
            "\nblocked: `relayer outbox retry LANE`, or `discard EVENT_ID` to give one up\n"
        ))?;
    }
    for BlockedRow { lane, reason, since, message } in &outbox.blocked {
        let (since, size) = (time(*since), message.size);
        print(format_args!(
            "{}\n  {} of lane {lane}, {size} bytes, refused since {since}: {}\n",
            message.event_id,
            message.event_type,
            shortened(reason, 200)
        ))?;
    }
    more(blocked, outbox.blocked.len())?;
    if !outbox.quarantined.is_empty() {
        print(format_args!(
            "\nquarantined: mend factory.events or escrow.events, restart, and `relayer outbox retry EVENT_ID`\n"
        ))?;
    }
    for QuarantinedRow { event_id, contract, topic0, block, reason, .. } in &outbox.quarantined {
        let topic0 = topic0.map_or("-".to_owned(), |topic| topic.to_string());
        print(format_args!(
            "{event_id}\n  of {contract} in block {block}, topic0 {topic0}: {}\n",
            shortened(reason, 200)
        ))?;
    }
    more(quarantined, outbox.quarantined.len())?;
    if !outbox.waiting.is_empty() {
        print(format_args!("\nwaiting, oldest first\n"))?;
    }
    for MessageRow { event_id, event_type, escrow, sequence, block, stored_at, size } in &outbox.waiting {
        let since = time(*stored_at);
        print(format_args!(
            "{event_id}\n  {event_type} {sequence} of {escrow}, block {block}, {size} bytes, since {since}\n"
        ))?;
    }
    more(waiting, outbox.waiting.len())
}

fn time(seconds: u64) -> String {
    let time: SystemTime = UNIX_EPOCH + Duration::from_secs(seconds.min(253_402_300_799));
    humantime::format_rfc3339_seconds(time).to_string()
}

async fn retry(office: &Office, which: Vec<String>) -> Result<ExitCode, Failure> {
    let mut rows = office.ask(Request::Retry { which }).await?;
    let (mut relayed, mut left) = (0, 0);
    while let Some(row) = rows.next().await? {
        match row {
            RetryRow::Offered { messages, running: true } => {
                eprintln!(
                    "{messages} blocked messages are offered again now: `relayer outbox list` shows which are still refused"
                );
            }
            RetryRow::Offered { messages, running: false } => {
                eprintln!(
                    "{messages} messages are blocked, and no relayer runs: its next run offers them at once"
                );
            }
            RetryRow::Relayed { event_id } => {
                relayed += 1;
                print(format_args!("relayed {event_id}\n"))?;
            }
            RetryRow::Left { event_id, reason } => {
                left += 1;
                eprintln!("still quarantined: {event_id}: {}", shortened(&reason, 300));
            }
        }
    }
    if relayed + left > 0 {
        eprintln!("{relayed} quarantined logs are published as late, {left} stay");
    }
    Ok(if left > 0 { ExitCode::from(FAULT) } else { ExitCode::SUCCESS })
}

async fn discard(office: &Office, event_ids: Vec<String>) -> Result<ExitCode, Failure> {
    // Printed first: what is given up is nowhere else afterwards.
    let mut rows = office.ask(Request::Show { event_ids: event_ids.clone() }).await?;
    let mut shown = 0;
    while let Some(row) = rows.next::<Shown>().await? {
        shown += 1;
        crate::print_whole(&serde_json::to_string(&row).map_err(anyhow::Error::from)?)?;
    }
    if shown == 0 {
        return Err(anyhow!("nothing was shown, so nothing is discarded").into());
    }
    let mut rows = office.ask(Request::Discard { event_ids }).await?;
    while let Some(Discarded { event_id }) = rows.next().await? {
        eprintln!("discarded {event_id}");
    }
    Ok(ExitCode::SUCCESS)
}
