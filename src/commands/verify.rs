//! `relayer verify`: the chain against what was relayed.

use std::process::ExitCode;

use clap::Args;
use relayer::config::Config;
use relayer::control::{FindingRow, Request, VerifyRow};

use super::{JsonArray, Missing, Office};
use crate::{FAULT, Failure, print};

#[derive(Args)]
pub(crate) struct Verify {
    /// The first block.
    #[arg(long, value_name = "BLOCK")]
    from: u64,
    /// The last block.
    #[arg(long, value_name = "BLOCK")]
    to: u64,
    /// One JSON array instead of a table.
    #[arg(long)]
    json: bool,
}

pub(crate) async fn execute(config: &Config, verify: Verify) -> Result<ExitCode, Failure> {
    let Verify { from, to, json } = verify;
    let office = Office::find(config, Missing::Refuse).await?;
    let mut rows = office.ask(Request::Verify { from, to }).await?;
    let mut array = JsonArray::begin();
    let mut findings = 0;
    while let Some(row) = rows.next().await? {
        match row {
            VerifyRow::Finding(finding) => {
                if findings == 0 && !json {
                    line("difference", "block", "log", "escrow", "event", "event_id")?;
                }
                findings += 1;
                match json {
                    true => array.row(&finding)?,
                    false => show(&finding)?,
                }
            }
            VerifyRow::Unregistered { escrow } => eprintln!(
                "{escrow} is announced there and not registered: the audit of a running relayer finds it, or `relayer escrows \
                 import` registers it"
            ),
            VerifyRow::Verified { blocks, events, final_to } => {
                eprintln!("{blocks} blocks compared: {events} events agree, {findings} differ");
                if let Some(block) = final_to {
                    eprintln!("Blocks after {block} are not final: verify them again once they are");
                }
            }
        }
    }
    if json {
        array.end()?;
    }
    Ok(if findings > 0 { ExitCode::from(FAULT) } else { ExitCode::SUCCESS })
}

fn show(finding: &FindingRow) -> anyhow::Result<()> {
    let FindingRow { difference, block, log_index, escrow, event, event_id, is_final } = finding;
    let known = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
    let difference = if *is_final { difference.clone() } else { format!("{difference}?") };
    let (block, log) = (block.to_string(), log_index.to_string());
    line(&difference, &block, &log, &known(escrow), &known(event), &known(event_id))
}

fn line(
    difference: &str,
    block: &str,
    log: &str,
    escrow: &str,
    event: &str,
    event_id: &str,
) -> anyhow::Result<()> {
    print(format_args!("{difference:<12} {block:>10} {log:>5}  {escrow:<42}  {event:<15} {event_id}\n"))
}
