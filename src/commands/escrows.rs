//! `relayer escrows`: the registry.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use alloy::primitives::Address;
use anyhow::{Context, anyhow, bail};
use clap::Subcommand;
use relayer::config::Config;
use relayer::control::{EscrowRow, FoundRow, IMPORTED_AT_ONCE, Imported, RegistryRow, Request};
use serde::Deserialize;

use super::{JsonArray, Missing, Office, changing};
use crate::{CONFIGURATION, Failure, print};

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Prints every escrow: state, the block that announced it, its messages so far.
    #[command(after_help = "Example: relayer escrows list --json | jq '.[] | select(.state == \"active\")'")]
    List {
        /// One JSON array instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// Prints the escrows as {"escrows": ["0x…"], "count": N}, the registry file of the earlier relayer.
    #[command(after_help = "Example: relayer escrows export registry.json")]
    Export {
        /// The file to write; it is replaced whole. Default: standard output.
        file: Option<PathBuf>,
    },
    /// Registers the escrows of such a file. Their events are read from that block on; those of blocks already read are
    /// published as late, by the relayer that runs or by the next run. Escrows that are registered stay as they are.
    #[command(after_help = "Example: relayer escrows import registry.json --from 9508300")]
    Import {
        /// {"escrows": ["0x…"], "count": N}
        file: PathBuf,
        /// The first block whose events count: the escrows' first one, or the first one nobody has relayed.
        #[arg(long, value_name = "BLOCK")]
        from: u64,
    },
    /// Finds the escrows that the factory announced on the chain, and prints which of them the registry has. Registers and
    /// publishes nothing.
    #[command(
        after_help = "Example: relayer escrows discover --from 9508300 --json | jq '.[] | select(.state == null)'"
    )]
    Discover {
        /// The first block. Default: the first one that the store ever read, or chain.start_block.
        #[arg(long, value_name = "BLOCK")]
        from: Option<u64>,
        /// The last block. Default: the last one that a run would read now.
        #[arg(long, value_name = "BLOCK")]
        to: Option<u64>,
        /// One JSON array instead of a table.
        #[arg(long)]
        json: bool,
    },
}

pub(crate) async fn execute(config: &Config, command: Command) -> Result<ExitCode, Failure> {
    match command {
        Command::List { json } => list(&Office::find(config, Missing::Refuse).await?, json).await?,
        Command::Export { file } => {
            export(&Office::find(config, Missing::Refuse).await?, file.as_deref()).await?;
        }
        Command::Import { file, from } => {
            // Before the store is made: a file that cannot be read must not leave one behind.
            let escrows = read(&file).map_err(|error| Failure { code: CONFIGURATION, error })?;
            changing(config, Missing::Make, async |office| import(office, &escrows, from).await).await?;
        }
        Command::Discover { from, to, json } => {
            if from.is_none() && config.chain.start_block.is_none() && !config.storage.path.exists() {
                let error = anyhow!("--from is not given, and neither is chain.start_block: set one of them");
                return Err(Failure { code: CONFIGURATION, error });
            }
            discover(&Office::find(config, Missing::Pretend).await?, from, to, json).await?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn list(office: &Office, as_json: bool) -> Result<(), Failure> {
    let mut rows = office.ask(Request::Escrows).await?;
    let mut array = JsonArray::begin();
    if !as_json {
        line("escrow", "state", "announced", "messages", "ended")?;
    }
    while let Some(row) = rows.next().await? {
        match row {
            RegistryRow::Escrow(escrow) if as_json => array.row(&escrow)?,
            RegistryRow::Escrow(EscrowRow {
                address, state, announced_block, messages, ended_block, ..
            }) => {
                let ended = ended_block.map_or_else(|| "-".to_owned(), |block| block.to_string());
                line(&address, &state, &announced_block.to_string(), &messages.to_string(), &ended)?;
            }
            RegistryRow::Store { .. } => {}
        }
    }
    if as_json {
        array.end()?;
    }
    Ok(())
}

fn line(escrow: &str, state: &str, announced: &str, messages: &str, ended: &str) -> anyhow::Result<()> {
    print(format_args!("{escrow:<42}  {state:<9}  {announced:>10}  {messages:>8}  {ended:>10}\n"))
}

async fn export(office: &Office, file: Option<&Path>) -> Result<(), Failure> {
    let mut rows = office.ask(Request::Escrows).await?;
    let (mut addresses, mut next, mut late) = (Vec::new(), 0, false);
    while let Some(row) = rows.next().await? {
        match row {
            RegistryRow::Escrow(escrow) if escrow.state == "withdrawn" => {}
            RegistryRow::Escrow(escrow) => addresses.push(escrow.address),
            RegistryRow::Store { next_block, reads_late } => (next, late) = (next_block, reads_late),
        }
    }
    let count = addresses.len();
    let registry = serde_json::json!({ "escrows": addresses, "count": count });
    let text = serde_json::to_string_pretty(&registry).map_err(anyhow::Error::from)? + "\n";
    match file {
        None => print(format_args!("{text}"))?,
        Some(file) => replace(file, &text).with_context(|| {
            format!("{} cannot be written: give a file in a writable directory", file.display())
        })?,
    }
    eprintln!("{count} escrows; the next block to read is {next}");
    if late {
        eprintln!(
            "note: history has yet to be read once more; run the relayer until that is done, or read it elsewhere"
        );
    }
    Ok(())
}

/// Whole or not at all: whoever reads it may do so at any moment.
fn replace(file: &Path, text: &str) -> std::io::Result<()> {
    let mut beside = file.as_os_str().to_owned();
    beside.push(".new");
    let beside = PathBuf::from(beside);
    let mut written = std::fs::File::create(&beside)?;
    written.write_all(text.as_bytes())?;
    written.sync_all()?;
    std::fs::rename(&beside, file)
}

/// The registry file of the earlier relayer; names it has beside these two do not matter.
#[derive(Deserialize)]
struct RegistryFile {
    escrows: Vec<String>,
    count: Option<usize>,
}

fn read(file: &Path) -> anyhow::Result<Vec<Address>> {
    let shown = file.display();
    let text = std::fs::read_to_string(file)
        .with_context(|| format!("{shown} cannot be read: give the registry file of the earlier relayer"))?;
    let registry: RegistryFile = serde_json::from_str(&text).with_context(|| {
        format!("{shown} is not a registry: it should be {{\"escrows\": [\"0x…\"], \"count\": N}}")
    })?;
    let mut escrows = Vec::with_capacity(registry.escrows.len());
    for (index, text) in registry.escrows.iter().enumerate() {
        let address: Address = text.trim().parse().map_err(|_| {
            anyhow!("{shown}: escrow {} is {text:?}: an address is 0x and 40 hex digits", index + 1)
        })?;
        escrows.push(address);
    }
    let found = escrows.len();
    if let Some(count) = registry.count.filter(|count| *count != found) {
        bail!("{shown}: \"count\" is {count}, but there are {found} escrows: the file is not whole");
    }
    escrows.sort_unstable();
    escrows.dedup();
    Ok(escrows)
}

async fn import(office: &Office, escrows: &[Address], from: u64) -> Result<(), Failure> {
    let (mut new, mut known, mut last) = (0, 0, None);
    for part in escrows.chunks(IMPORTED_AT_ONCE) {
        let mut rows = office.ask(Request::Import { escrows: part.to_vec(), from }).await?;
        while let Some(imported) = rows.next::<Imported>().await? {
            (new, known, last) = (new + imported.new, known + imported.known, Some(imported));
        }
    }
    eprintln!("{new} escrows registered, {known} were already");
    if let Some(Imported { next_block, running, .. }) = last.filter(|it| new > 0 && from < it.next_block) {
        let who = if running { "The relayer that runs" } else { "The next run" };
        let to = next_block - 1;
        eprintln!("{who} reads their events of blocks {from} to {to} and publishes them as late");
    }
    Ok(())
}

async fn discover(office: &Office, from: Option<u64>, to: Option<u64>, as_json: bool) -> Result<(), Failure> {
    let mut rows = office.ask(Request::Discover { from, to }).await?;
    let mut array = JsonArray::begin();
    let (mut found, mut unknown) = (0, 0);
    let line =
        |escrow: &str, block: &str, state: &str| print(format_args!("{escrow:<42}  {block:>10}  {state}\n"));
    if !as_json {
        line("escrow", "announced", "registry")?;
    }
    while let Some(row) = rows.next().await? {
        match row {
            FoundRow::Escrow { address, block, log_index, state } => {
                found += 1;
                unknown += u64::from(state.is_none());
                match as_json {
                    true => array.row(&serde_json::json!({
                        "address": address, "block": block, "log_index": log_index, "state": state
                    }))?,
                    false => line(&address, &block.to_string(), state.as_deref().unwrap_or("not there"))?,
                }
            }
            FoundRow::Read { from, to } => {
                eprintln!(
                    "{found} announcements in blocks {from} to {to}; {unknown} of escrows not in the registry"
                );
            }
        }
    }
    if as_json {
        array.end()?;
    }
    Ok(())
}
