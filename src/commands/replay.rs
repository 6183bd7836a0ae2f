//! `relayer replay`: publishes again what was published before.

use std::process::ExitCode;

use alloy::primitives::Address;
use clap::Args;
use relayer::config::Config;
use relayer::control::{ReplayRow, Request};

use super::{Missing, Office, changing, shortened};
use crate::{FAULT, Failure};

#[derive(Args)]
pub(crate) struct Replay {
    /// The first block.
    #[arg(long, value_name = "BLOCK")]
    from: u64,
    /// The last block.
    #[arg(long, value_name = "BLOCK")]
    to: u64,
    /// Only the messages of this escrow.
    #[arg(long, value_name = "ADDRESS")]
    escrow: Option<Address>,
}

pub(crate) async fn execute(config: &Config, replay: Replay) -> Result<ExitCode, Failure> {
    changing(config, Missing::Refuse, async |office| publish(office, replay).await).await
}

async fn publish(office: &Office, Replay { from, to, escrow }: Replay) -> Result<ExitCode, Failure> {
    let mut rows = office.ask(Request::Replay { from, to, escrow }).await?;
    let mut left = 0;
    while let Some(row) = rows.next().await? {
        match row {
            ReplayRow::Left { event_id, reason } => {
                left += 1;
                eprintln!("not published again: {event_id}: {}", shortened(&reason, 300));
            }
            ReplayRow::Published { messages } => {
                eprintln!(
                    "{messages} messages of blocks {from} to {to} were published again, and are acknowledged"
                );
            }
        }
    }
    if left > 0 {
        eprintln!("{left} were not: see `relayer outbox list`");
    }
    Ok(if left > 0 { ExitCode::from(FAULT) } else { ExitCode::SUCCESS })
}
