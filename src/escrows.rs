//! `relayer escrows`: the registry of a store on which no relayer runs.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use alloy::primitives::Address;
use anyhow::{Context, anyhow, bail};
use clap::Subcommand;
use relayer::config::Config;
use relayer::store::{Added, Escrow, EscrowState, Store};
use serde::Deserialize;
use serde_json::json;

use crate::{CONFIGURATION, FAULT, Failure, print};

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Prints every escrow: state, the block that announced it, its messages so far.
    List {
        /// One JSON array instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// Prints the escrows as {"escrows": ["0x…"], "count": N}, the registry file of the earlier relayer.
    Export {
        /// The file to write; it is replaced whole. Default: standard output.
        file: Option<PathBuf>,
    },
    /// Registers the escrows of such a file. The next run reads their events from that block on and publishes those of
    /// blocks already read as late; escrows that are registered stay as they are.
    Import {
        /// {"escrows": ["0x…"], "count": N}
        file: PathBuf,
        /// The first block whose events count: the escrows' first one, or the first one nobody has relayed.
        #[arg(long, value_name = "BLOCK")]
        from: u64,
    },
}

pub(crate) fn execute(config: &Config, command: Command) -> Result<ExitCode, Failure> {
    match command {
        Command::List { json } => list(&open(config, true)?, json)?,
        Command::Export { file } => export(&open(config, true)?, file.as_deref())?,
        Command::Import { file, from } => {
            // Before the store is made: a file that cannot be read must not leave one behind.
            let escrows = read(&file).map_err(|error| Failure { code: CONFIGURATION, error })?;
            import(&open(config, false)?, &escrows, from)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn open(config: &Config, must_exist: bool) -> Result<Store, Failure> {
    let path = &config.storage.path;
    if must_exist && !path.exists() {
        let error = anyhow!("storage.path {} does not exist: no relayer has run here yet", path.display());
        return Err(Failure { code: CONFIGURATION, error });
    }
    let fail = |error: relayer::store::StoreError| {
        let code = if error.is_configuration() { CONFIGURATION } else { FAULT };
        Failure { code, error: anyhow!("{error}") }
    };
    let signatures = relayer::signatures(config)
        .map_err(|error| Failure { code: CONFIGURATION, error: anyhow!("{error}") })?;
    let identity = relayer::identity(config, &signatures);
    Store::open(path, identity, config.chain.start_block, Added::Leave).map_err(fail)
}

fn state(escrow: &Escrow) -> &'static str {
    match escrow.state {
        EscrowState::Active => "active",
        EscrowState::Withdrawn => "withdrawn",
        EscrowState::Joining { .. } => "joining",
        EscrowState::Archived => "archived",
    }
}

fn list(store: &Store, as_json: bool) -> anyhow::Result<()> {
    let escrows = store.escrows().map_err(|error| anyhow!("{error}"))?;
    if as_json {
        let rows = escrows.iter().map(|(address, escrow)| {
            json!({
                "address": format!("{address:#x}"),
                "state": state(escrow),
                "announced_block": escrow.announced.0,
                "covered_from": escrow.covered_from,
                "messages": escrow.last_sequence,
                "ended_block": escrow.ended,
            })
        });
        let rows: Vec<_> = rows.collect();
        return print(format_args!("{}\n", serde_json::to_string_pretty(&rows)?));
    }
    let mut table = format!(
        "{:<42}  {:<9}  {:>10}  {:>8}  {:>10}\n",
        "escrow", "state", "announced", "messages", "ended"
    );
    for (address, escrow) in &escrows {
        let ended = escrow.ended.map_or_else(|| "-".to_owned(), |block| block.to_string());
        table += &format!(
            "{:<42}  {:<9}  {:>10}  {:>8}  {:>10}\n",
            format!("{address:#x}"),
            state(escrow),
            escrow.announced.0,
            escrow.last_sequence,
            ended
        );
    }
    print(format_args!("{table}"))
}

fn export(store: &Store, file: Option<&Path>) -> anyhow::Result<()> {
    let escrows = store.escrows().map_err(|error| anyhow!("{error}"))?;
    let stands = |(_, escrow): &&(Address, Escrow)| escrow.state != EscrowState::Withdrawn;
    let addresses: Vec<String> =
        escrows.iter().filter(stands).map(|(address, _)| format!("{address:#x}")).collect();
    let (count, next_block) = (addresses.len(), store.next_block());
    let text = serde_json::to_string_pretty(&json!({ "escrows": addresses, "count": count }))? + "\n";
    match file {
        None => print(format_args!("{text}"))?,
        Some(file) => replace(file, &text).with_context(|| {
            format!("{} cannot be written: give a file in a writable directory", file.display())
        })?,
    }
    eprintln!("{count} escrows; the next block to read is {next_block}");
    if store.late_read().is_some() {
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

fn import(store: &Store, escrows: &[Address], from: u64) -> Result<(), Failure> {
    let next_block = store.next_block();
    if from > next_block {
        let error = anyhow!(
            "--from {from}: the store has not got there, its next block is {next_block}; give at most that"
        );
        return Err(Failure { code: CONFIGURATION, error });
    }
    if let Some(factory) = escrows.iter().find(|escrow| **escrow == store.identity().factory) {
        let error = anyhow!("{factory:#x} is factory.address, not an escrow: take it out of the file");
        return Err(Failure { code: CONFIGURATION, error });
    }
    let imported = store.import(escrows, from).map_err(|error| anyhow!("{error}"))?;
    eprintln!("{} escrows registered, {} were already", imported.new, imported.known);
    if imported.new > 0 && from < next_block {
        eprintln!(
            "The next run reads their events of blocks {from} to {} and publishes them as late",
            next_block - 1
        );
    }
    Ok(())
}
