//! Snapshots: copies of the store in a folder that outlives the machine, and the lease that goes with it.
//!
//! The folder may be a mounted bucket. What can be relied on there is little: see [`Volume`]. A store cannot live in it, its
//! copies can: parts that are named after their content, and a manifest, written last, that names them.
//!
//! # What a restored store repeats, and what it cannot know
//!
//! A store made of a snapshot goes on where the snapshot was made. What was published after that is read and published
//! again, in order, with the same ids and, where the chain is the same, the same sequence, but in another epoch. What was
//! published after it *and left the chain* before it was restored is never withdrawn: nobody knows of it any more. With
//! `chain.horizon = "finalized"` there is nothing of that kind.

mod copies;
mod lease;
mod manifest;
#[cfg(test)]
mod tests;
mod volume;

use std::fs;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep, timeout_at};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

pub use copies::{Listed, SnapshotError, Snapshots};
pub use manifest::{Manifest, Part};
pub use volume::{Folder, Volume};

use crate::config;
use crate::permit::Permit;
use crate::store::{Identity, Store};
use crate::telemetry::metrics;
use crate::vitals::{Stage, Vitals};
use lease::Lease;

/// The first snapshot of a run is made after this time at the latest: until then a crash costs all the run has read.
const FIRST_AFTER: Duration = Duration::from_secs(60);

/// Keeps the lease, and makes snapshots while a relay runs.
#[derive(Debug)]
pub struct Keeper {
    snapshots: Arc<Snapshots<Folder>>,
    lease: Lease<Folder>,
    interval: Duration,
    keep: usize,
}

/// The snapshots of this configuration; `None`: it has no folder for them.
pub fn configured(storage: &config::Storage) -> Option<Arc<Snapshots<Folder>>> {
    let folder = storage.snapshot_dir.as_ref()?;
    Some(Arc::new(Snapshots::new(Arc::new(Folder::new(folder)))))
}

impl Keeper {
    /// Waits for the lease. `None`: asked to stop before.
    pub async fn begin(
        storage: &config::Storage,
        folder: &Path,
        vitals: &Vitals,
        stop: &CancellationToken,
    ) -> Option<Self> {
        let volume = Arc::new(Folder::new(folder));
        let lease = Lease::acquire(Arc::clone(&volume), holder(&storage.path), vitals, stop).await?;
        vitals.entered(Stage::Starting);
        let snapshots = Arc::new(Snapshots::new(volume));
        Some(Self { snapshots, lease, interval: storage.snapshot_interval, keep: storage.snapshot_keep })
    }

    /// Makes the store at `path` of the newest snapshot, if there is one that is whole.
    pub async fn restore(&self, path: &Path, identity: &Identity) -> Result<(), SnapshotError> {
        let (snapshots, path, identity) = (Arc::clone(&self.snapshots), path.to_owned(), identity.clone());
        let restored = joined(spawn_blocking(move || snapshots.restore(&path, &identity, None)).await)?;
        match restored {
            Some(manifest) => info!(
                snapshot = %manifest.file(),
                made_at = %manifest.made_at,
                next_block = manifest.cursor.map(|(number, _)| number + 1),
                "Restored the snapshot of {}: what was published since is published again",
                manifest.made_at
            ),
            None => info!("There is no snapshot yet: beginning a new store"),
        }
        Ok(())
    }

    /// The snapshots.
    pub fn snapshots(&self) -> &Arc<Snapshots<Folder>> {
        &self.snapshots
    }

    /// Gives the lease up.
    pub async fn release(self) {
        self.lease.release().await;
    }

    /// Whether the store may go on: not if another instance has gone on from one of its snapshots since.
    pub async fn is_newest(&self, store: &Store, path: &Path) -> Result<(), SnapshotError> {
        let snapshots = Arc::clone(&self.snapshots);
        let listed = joined(spawn_blocking(move || snapshots.list()).await)?;
        let restored_from = store.restored_from()?;
        let another_went_on = |manifest: &&Manifest| {
            let since = restored_from.is_some_and(|number| manifest.number > number);
            manifest.epoch > store.epoch() || since && manifest.epoch != store.epoch()
        };
        match listed.iter().filter_map(|listed| listed.manifest.as_ref().ok()).find(another_went_on) {
            Some(newest) => {
                let (path, newest) = (path.display().to_string(), newest.file());
                Err(SnapshotError::Outlived { path, newest })
            }
            None => Ok(()),
        }
    }

    /// Holds while the lease does.
    pub fn permit(&self) -> Arc<Permit> {
        self.lease.permit()
    }

    /// Keeps the lease and makes snapshots, until the lease is lost. When `stop` is cancelled one more is made at once: what it
    /// writes, the last one need not.
    pub async fn tend(&mut self, store: &Arc<Store>, stop: &CancellationToken) {
        let (snapshots, keep, interval) = (Arc::clone(&self.snapshots), self.keep, self.interval);
        let copying = async {
            let mut pause = interval.min(FIRST_AFTER);
            while !stop.is_cancelled() {
                tokio::select! {
                    () = sleep(pause) => {}
                    () = stop.cancelled() => {}
                }
                make(&snapshots, store, keep, None).await;
                pause = interval;
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            _lost = self.lease.keep() => {
                error!("Another instance has taken the lease in storage.snapshot_dir: this one ends");
            }
            () = copying => {}
        }
    }

    /// Makes the last snapshot, if that can be done before `deadline`, and gives the lease up.
    pub async fn end(self, store: &Arc<Store>, deadline: Instant) {
        let made = make(&self.snapshots, store, self.keep, Some(deadline));
        if timeout_at(deadline, made).await.is_err() {
            warn!("The last snapshot did not fit into the time there is for stopping: an earlier one stands");
        }
        self.lease.release().await;
    }
}

/// Makes a snapshot and removes old ones; a fault is said, and the next one may be better.
async fn make(
    snapshots: &Arc<Snapshots<Folder>>,
    store: &Arc<Store>,
    keep: usize,
    deadline: Option<Instant>,
) {
    let (snapshots, store) = (Arc::clone(snapshots), Arc::clone(store));
    let began = Instant::now();
    let making = spawn_blocking(move || {
        let made = snapshots.create(&store, deadline)?;
        // What is too many can wait.
        let pruned = if deadline.is_none() { snapshots.prune(keep)? } else { 0 };
        Ok::<_, SnapshotError>((made, pruned))
    });
    match joined(making.await) {
        Ok((made, pruned)) => {
            metrics::snapshot_made();
            let (file, bytes, seconds) = (made.file(), made.bytes(), began.elapsed().as_secs_f64());
            info!(snapshot = %file, bytes, pruned, seconds, "Snapshot {file}: {bytes} bytes in {seconds:.1} s");
        }
        Err(error) => {
            metrics::snapshot_failed();
            warn!(%error, "No snapshot was made: {error}");
        }
    }
}

fn joined<T>(task: Result<T, tokio::task::JoinError>) -> T {
    task.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
}

/// The name under which this store's process holds the lease. It is kept beside the store, for as long as the machine runs:
/// a copy of the disk on another machine is another holder.
fn holder(store: &Path) -> String {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let boot = boot.trim();
    let mut file = store.as_os_str().to_owned();
    file.push(".holder");
    let file = PathBuf::from(file);
    if store.exists()
        && let Ok(known) = fs::read_to_string(&file)
        && known.rsplit_once('@').is_some_and(|(_, at)| at == boot && !at.is_empty())
    {
        return known;
    }
    let random = || RandomState::new().build_hasher().finish();
    let new = format!("{:016x}{:016x}@{boot}", random(), random());
    if let Err(error) = fs::write(&file, &new) {
        warn!(%error, file = %file.display(), "The holder's name cannot be kept: after a crash the lease must expire first");
    }
    new
}
