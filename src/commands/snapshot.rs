//! `relayer snapshot`: copies of the store in `storage.snapshot_dir`.

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::anyhow;
use clap::Subcommand;
use relayer::config::Config;
use relayer::control::{Request, SnapshotRow};
use relayer::snapshot::{self, Folder, Snapshots};

use super::{CtrlC, JsonArray, Missing, changing, failure, identity, leased, under};
use crate::{CONFIGURATION, Failure, print};

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Makes one now, also while a relayer runs; prints its file.
    #[command(after_help = "Example: relayer snapshot create --json")]
    Create {
        /// JSON instead of text.
        #[arg(long)]
        json: bool,
    },
    /// Lists those there are, the newest first.
    #[command(after_help = "Example: relayer snapshot list")]
    List {
        /// One JSON array instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// Makes the store at storage.path, where there is none, of the newest snapshot that is whole. `relayer run` does so by
    /// itself; this is for an older one, or for looking at one.
    #[command(after_help = "Example: relayer snapshot restore --snapshot snapshot-000000000007.json")]
    Restore {
        /// The file of another one than the newest, as `relayer snapshot list` shows it.
        #[arg(long, value_name = "FILE")]
        snapshot: Option<String>,
    },
}

pub(crate) async fn execute(config: &Config, command: Command) -> Result<ExitCode, Failure> {
    match command {
        Command::Create { json } => create(config, json).await?,
        Command::List { json } => list(config, json)?,
        Command::Restore { snapshot } => restore(config, snapshot.as_deref()).await?,
    }
    Ok(ExitCode::SUCCESS)
}

fn usage(error: anyhow::Error) -> Failure {
    Failure { code: CONFIGURATION, error }
}

fn configured(config: &Config) -> Result<Arc<Snapshots<Folder>>, Failure> {
    let missing = || usage(anyhow!("storage.snapshot_dir is not set: set it to the folder of the snapshots"));
    snapshot::configured(&config.storage).ok_or_else(missing)
}

async fn create(config: &Config, as_json: bool) -> Result<(), Failure> {
    configured(config)?;
    let made = changing(config, Missing::Refuse, async |office| {
        office.ask(Request::Snapshot).await?.next::<SnapshotRow>().await
    });
    let made = made.await?.ok_or_else(|| anyhow!("the relayer said nothing of a snapshot: try again"))?;
    match as_json {
        true => {
            let text = serde_json::to_string_pretty(&made).map_err(anyhow::Error::from)?;
            print(format_args!("{text}\n"))?;
        }
        false => print(format_args!("{}\n", made.snapshot))?,
    }
    Ok(())
}

fn list(config: &Config, as_json: bool) -> Result<(), Failure> {
    let listed = configured(config)?.list_whole().map_err(failure)?;
    let rows = listed.iter().map(SnapshotRow::from);
    if as_json {
        let mut array = JsonArray::begin();
        for row in rows {
            array.row(&row)?;
        }
        return Ok(array.end()?);
    }
    let mut table = format!(
        "{:<26}  {:<20}  {:>10}  {:>9}  {:>11}  {}\n",
        "snapshot", "made", "next block", "messages", "bytes", "state"
    );
    let number = |number: Option<u64>| number.map_or_else(|| "-".to_owned(), |number| number.to_string());
    for row in rows {
        table += &format!(
            "{:<26}  {:<20}  {:>10}  {:>9}  {:>11}  {}\n",
            row.snapshot,
            row.made_at.as_deref().unwrap_or("-"),
            number(row.next_block),
            number(row.messages),
            number(row.bytes),
            row.damaged.as_deref().unwrap_or("readable")
        );
    }
    Ok(print(format_args!("{table}"))?)
}

async fn restore(config: &Config, file: Option<&str>) -> Result<(), Failure> {
    let snapshots = configured(config)?;
    let path = &config.storage.path;
    if path.exists() {
        let path = path.display();
        return Err(usage(anyhow!(
            "storage.path {path} exists, and is not overwritten: stop the relayer, if it runs, and move the file away first"
        )));
    }
    let (_, identity) = identity(config)?;
    let mut ctrl_c = CtrlC::listen()?;
    let keeper = leased(config, false, &mut ctrl_c).await?;
    let restoring = async { snapshots.restore(path, &identity, file).await.map_err(failure) };
    let restored = under(keeper, &mut ctrl_c, restoring).await?;
    let manifest = restored.ok_or_else(|| anyhow!("there is no snapshot in storage.snapshot_dir yet"))?;
    let (file, made_at, path) = (manifest.file(), manifest.made_at, path.display());
    let next =
        manifest.cursor.map_or_else(|| "the first one".to_owned(), |(number, _)| (number + 1).to_string());
    eprintln!(
        "Restored {file} of {made_at} into {path}: the next run reads from block {next} on, and what was published since is \
         published again"
    );
    Ok(())
}
