//! The operator's commands, one file each. They work beside a running relayer, through the socket next to its store, and
//! on the store's file where none runs: what changes it, or publishes from it, then under the lease, if there is one.

pub(crate) mod escrows;
pub(crate) mod outbox;
pub(crate) mod replay;
pub(crate) mod snapshot;
pub(crate) mod status;
pub(crate) mod verify;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::anyhow;
use relayer::config::Config;
use relayer::control::{self, Answer, Answers, Desk, Refusal, Request};
use relayer::event::Signatures;
use relayer::snapshot::{Folder, Keeper, LeaseLost, SnapshotError, Snapshots, configured, is_newest};
use relayer::store::{Added, Identity, Store, StoreError};
use serde::de::DeserializeOwned;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::{CONFIGURATION, FAULT, Failure};

/// How long is waited for whoever has the store to open its socket, or to end: a relayer that starts or stops, another
/// command.
const WITHIN: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(50);

/// What to do where there is no store yet.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Missing {
    /// Say so.
    Refuse,
    /// Make it.
    Make,
    /// Take one that is forgotten afterwards.
    Pretend,
}

/// Who answers.
pub(crate) enum Office {
    /// This process, which has the store open.
    Here(Arc<Desk>),
    /// The relayer that runs.
    Beside(PathBuf),
}

impl Office {
    /// Finds out who has the store. Whoever has its lock answers: so it is tried first, and a relayer that runs is asked only
    /// if it has it.
    pub(crate) async fn find(config: &Config, missing: Missing) -> Result<Self, Failure> {
        let path = &config.storage.path;
        let deadline = Instant::now() + WITHIN;
        // Off the async threads: it may have to repair or to migrate, and Ctrl-C ends that.
        let opening = async || {
            let config = config.clone();
            spawn_blocking(move || open(&config, missing)).await.expect("opening does not panic")
        };
        let unreached = loop {
            match opening().await {
                Ok(desk) => return Ok(Self::Here(Arc::new(desk))),
                Err(Opening::Failed(failure)) => return Err(failure),
                Err(Opening::Locked) => {}
            }
            match control::connect(path).await {
                // Each request has a connection of its own: this one only shows that somebody is there.
                Ok(_) => return Ok(Self::Beside(path.clone())),
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => break error,
                Err(error) if Instant::now() >= deadline => break error,
                Err(_) => sleep(PAUSE).await,
            }
        };
        Err(anyhow!(
            "storage.path {} is in use by another process that does not answer at {} ({unreached}): run this as the same user; \
             if it is another command, or a relayer that starts, wait for it; if it is a relayer without this socket (its log \
             says why when it starts), stop it first",
            path.display(),
            control::socket_path(path).display()
        )
        .into())
    }

    /// Asks for something.
    pub(crate) async fn ask(&self, request: Request) -> Result<Asking, Failure> {
        // Before anything is begun that it is to end.
        let interrupt = signal(SignalKind::interrupt()).map_err(anyhow::Error::from)?;
        match self {
            Self::Here(desk) => Ok(Asking { answers: Answers::of(Arc::clone(desk), request), interrupt }),
            Self::Beside(path) => {
                let gone = |error| anyhow!("the relayer that ran has just gone ({error}): try again");
                let stream = control::connect(path).await.map_err(gone)?;
                let answers = control::ask(stream, &request).await.map_err(anyhow::Error::from)?;
                Ok(Asking { answers, interrupt })
            }
        }
    }
}

/// Ctrl-C, listened to from one moment on. Whoever listens once has taken it from the system for good: so one of these goes
/// along with all that is waited for, and what comes in between is not lost.
pub(crate) struct CtrlC(Signal);

impl CtrlC {
    pub(crate) fn listen() -> Result<Self, Failure> {
        Ok(Self(signal(SignalKind::interrupt()).map_err(anyhow::Error::from)?))
    }

    /// Does that until Ctrl-C comes.
    pub(crate) async fn ends<T>(
        &mut self,
        work: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, Failure> {
        tokio::select! {
            biased;
            done = work => done,
            _ = self.0.recv() => Err(stopped()),
        }
    }
}

fn stopped() -> Failure {
    anyhow!("stopped by Ctrl-C").into()
}

/// Does what publishes from a store or changes it. Where instances share a folder of snapshots that takes the lease, if no
/// relayer runs here: another one may be at work elsewhere.
pub(crate) async fn changing<T>(
    config: &Config,
    missing: Missing,
    work: impl AsyncFnOnce(&Office) -> Result<T, Failure>,
) -> Result<T, Failure> {
    let mut ctrl_c = CtrlC::listen()?;
    let Some(snapshots) = configured(&config.storage) else {
        let working = async { work(&Office::find(config, missing).await?).await };
        return ctrl_c.ends(working).await;
    };
    // The store stays open in here until the lease is given up: whoever opened it before would find its own name in the
    // lease, take it at once, and lose it by that.
    let mut office = match missing {
        // A store that is to be made is made under the lease.
        Missing::Make if !config.storage.path.exists() => None,
        Missing::Refuse | Missing::Make | Missing::Pretend => {
            Some(ctrl_c.ends(Office::find(config, missing)).await?)
        }
    };
    if let Some(beside @ Office::Beside(_)) = &office {
        return ctrl_c.ends(work(beside)).await;
    }
    let keeper = leased(config, office.is_some(), &mut ctrl_c).await?;
    let (permit, making) = (keeper.permit(), Arc::clone(keeper.snapshots()));
    let working = async {
        let found = match office.take() {
            Some(found) => found,
            None => made(config, missing, &snapshots).await?,
        };
        let office = office.insert(found);
        if let Office::Here(desk) = office {
            is_newest(snapshots, desk.store(), &config.storage.path).await.map_err(failure)?;
            Arc::get_mut(desk).expect("nobody has asked it yet").works_under(permit, &making);
        }
        work(office).await
    };
    let worked = under(keeper, &mut ctrl_c, working).await;
    drop(office);
    worked
}

/// Makes the store as a run would: what was published before is not to be published from another store again.
async fn made(
    config: &Config,
    missing: Missing,
    snapshots: &Arc<Snapshots<Folder>>,
) -> Result<Office, Failure> {
    let (_, identity) = identity(config)?;
    let restoring = Keeper::restore(Arc::clone(snapshots), &config.storage.path, &identity);
    restoring.await.map_err(failure)?;
    Office::find(config, missing).await
}

/// The lease, unless another instance that is alive has it.
pub(crate) async fn leased(config: &Config, has_store: bool, ctrl_c: &mut CtrlC) -> Result<Keeper, Failure> {
    let folder = config.storage.snapshot_dir.as_ref().expect("looked at before");
    let stop = CancellationToken::new();
    let mut taking = std::pin::pin!(Keeper::unless_held(&config.storage, folder, has_store, &stop));
    let taken = tokio::select! {
        biased;
        taken = &mut taking => taken,
        _ = ctrl_c.0.recv() => {
            stop.cancel();
            taking.await
        }
    };
    match taken.map_err(anyhow::Error::from)? {
        Some(keeper) if !stop.is_cancelled() => Ok(keeper),
        keeper => {
            if let Some(keeper) = keeper {
                keeper.release().await;
            }
            Err(stopped())
        }
    }
}

/// Does that while the lease is held, until Ctrl-C; then gives it up, whatever came of it.
pub(crate) async fn under<T>(
    mut keeper: Keeper,
    ctrl_c: &mut CtrlC,
    work: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    let never = CancellationToken::new();
    let working = async {
        let worked = keeper.during(work, &never).await.map_err(lost)?;
        worked.expect("nobody stops it")
    };
    let worked = ctrl_c.ends(working).await;
    keeper.release().await;
    worked
}

/// What the loss of the lease is to a command: it does not stand by, and may have done a part.
fn lost(lease: LeaseLost) -> Failure {
    let how = match lease {
        LeaseLost::Taken => {
            "Another instance has taken the lease in storage.snapshot_dir, while this command did not answer for it"
        }
        LeaseLost::TooLate => {
            "The lease in storage.snapshot_dir could not be renewed in time, and another instance may have taken it"
        }
    };
    let remedy =
        "a part may be done; where a relayer holds the lease now, run it there, beside it; else try again";
    anyhow!("{how}: this command ends here, and {remedy}").into()
}

/// What a fault of the snapshots is to whoever asked.
pub(crate) fn failure(error: SnapshotError) -> Failure {
    let code = if error.is_configuration() { CONFIGURATION } else { FAULT };
    Failure { code, error: anyhow!("{error}") }
}

/// The rows that answer a request.
pub(crate) struct Asking {
    answers: Answers,
    interrupt: Signal,
}

impl Asking {
    /// The next row. Notes go to standard error meanwhile; Ctrl-C ends it.
    pub(crate) async fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, Failure> {
        loop {
            let answer = tokio::select! {
                answer = self.answers.next() => answer,
                _ = self.interrupt.recv() => return Err(anyhow!("stopped by Ctrl-C").into()),
            };
            match answer {
                Answer::Row(row) => {
                    let row = serde_json::from_str(row.get());
                    let other = |error| {
                        anyhow!("an answer that makes no sense ({error}): use the same program for both")
                    };
                    return Ok(Some(row.map_err(other)?));
                }
                Answer::Note(note) => eprintln!("{note}"),
                Answer::Waiting => {}
                Answer::End => return Ok(None),
                Answer::Error(Refusal { usage, message }) => {
                    let code = if usage { CONFIGURATION } else { FAULT };
                    return Err(Failure { code, error: anyhow!("{message}") });
                }
            }
        }
    }
}

enum Opening {
    Locked,
    Failed(Failure),
}

impl From<Failure> for Opening {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

fn open(config: &Config, missing: Missing) -> Result<Desk, Opening> {
    let path = &config.storage.path;
    let usage = |error: anyhow::Error| Failure { code: CONFIGURATION, error };
    let is_there = path.exists();
    if !is_there && missing == Missing::Refuse {
        let error = anyhow!("storage.path {} does not exist: no relayer has run here yet", path.display());
        return Err(usage(error).into());
    }
    let (signatures, identity) = identity(config)?;
    let start_block = config.chain.start_block;
    let store = match is_there || missing == Missing::Make {
        true => Store::open(path, identity, start_block, Added::Leave),
        false => Store::in_memory(identity, start_block.unwrap_or(0)),
    };
    let store = store.map_err(|error| match error {
        StoreError::Locked { .. } => Opening::Locked,
        error => {
            let code = if error.is_configuration() { CONFIGURATION } else { FAULT };
            Opening::Failed(Failure { code, error: anyhow!("{error}") })
        }
    })?;
    let desk = Desk::alone(config.clone(), Arc::new(signatures), Arc::new(store));
    Ok(desk.map_err(|error| Failure::from(anyhow!("the RPC client cannot be set up: {error}")))?)
}

/// The configured events, and what a store of this configuration is made for.
pub(crate) fn identity(config: &Config) -> Result<(Signatures, Identity), Failure> {
    let unusable = |error| Failure { code: CONFIGURATION, error: anyhow!("{error}") };
    let signatures = relayer::signatures(config).map_err(unusable)?;
    let identity = relayer::identity(config, &signatures);
    Ok((signatures, identity))
}

/// Rows as one JSON array, as they come.
pub(crate) struct JsonArray {
    rows: usize,
}

impl JsonArray {
    pub(crate) fn begin() -> Self {
        Self { rows: 0 }
    }

    pub(crate) fn row(&mut self, row: &impl serde::Serialize) -> anyhow::Result<()> {
        let begin = if self.rows == 0 { "[\n" } else { ",\n" };
        self.rows += 1;
        crate::print(format_args!("{begin}  {}", serde_json::to_string(row)?))
    }

    pub(crate) fn end(self) -> anyhow::Result<()> {
        crate::print(format_args!("{}", if self.rows == 0 { "[]\n" } else { "\n]\n" }))
    }
}

/// Text of a node or a sink, on one line, and harmless to a terminal.
pub(crate) fn shortened(text: &str, length: usize) -> String {
    let line = text.replace(char::is_control, " ");
    match line.char_indices().nth(length) {
        None => line,
        Some(_) => line.chars().take(length - 1).chain(['…']).collect(),
    }
}
