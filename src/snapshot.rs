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
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep, timeout, timeout_at};
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
use lease::{Lease, Lost, NotTaken, Wait};

/// The first snapshot of a run is made after this time at the latest: until then a crash costs all the run has read.
const FIRST_AFTER: Duration = Duration::from_secs(5);
/// What giving up the lease may take when the process has to end.
const RELEASE: Duration = Duration::from_millis(500);

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
    /// Waits for the lease, under the name of the store that this process has open, or under a new one. `None`: asked to stop
    /// before.
    pub async fn begin(
        storage: &config::Storage,
        folder: &Path,
        has_store: bool,
        vitals: &Vitals,
        stop: &CancellationToken,
    ) -> Option<Self> {
        let keeper = Self::take(storage, folder, has_store, Wait::ForIt, vitals, stop).await;
        let keeper = keeper.unwrap_or_else(|why| unreachable!("it is waited for: {why:?}"));
        vitals.entered(Stage::Starting);
        keeper
    }

    /// Takes the lease unless another instance that is alive holds it. Otherwise the same.
    pub async fn unless_held(
        storage: &config::Storage,
        folder: &Path,
        has_store: bool,
        stop: &CancellationToken,
    ) -> Result<Option<Self>, LeaseNotTaken> {
        let vitals = Vitals::default();
        let taken = Self::take(storage, folder, has_store, Wait::ForTheDead, &vitals, stop).await;
        taken.map_err(|why| match why {
            NotTaken::Held(by) => LeaseNotTaken::Held { by },
            NotTaken::Volume(source) => LeaseNotTaken::Volume { source },
        })
    }

    async fn take(
        storage: &config::Storage,
        folder: &Path,
        has_store: bool,
        wait: Wait,
        vitals: &Vitals,
        stop: &CancellationToken,
    ) -> Result<Option<Self>, NotTaken> {
        let volume = Arc::new(Folder::new(folder));
        let known = if has_store { known_holder(&storage.path) } else { None };
        let holder = known.unwrap_or_else(new_holder);
        let Some(lease) = Lease::acquire(Arc::clone(&volume), holder, wait, vitals, stop).await? else {
            return Ok(None);
        };
        let snapshots = Arc::new(Snapshots::new(volume).permitted_by(lease.permit()));
        let (interval, keep) = (storage.snapshot_interval, storage.snapshot_keep);
        Ok(Some(Self { snapshots, lease, interval, keep }))
    }

    /// Keeps the lease until `work` is done. `None`: asked to stop, or the lease is lost.
    pub async fn during<T>(
        &mut self,
        work: impl Future<Output = T>,
        stop: &CancellationToken,
    ) -> Result<Option<T>, LeaseLost> {
        tokio::select! {
            biased;
            () = stop.cancelled() => Ok(None),
            lost = self.lease.keep() => Err(lost.into()),
            done = work => Ok(Some(done)),
        }
    }

    /// Keeps the name of the lease beside the store that this process has open: after a crash it need not wait for it.
    pub fn remember(&self, store: &Path) {
        if let Err(error) = fs::write(holder_file(store), format!("{} {}", self.lease.holder(), place(store)))
        {
            warn!(%error, "The lease's name cannot be kept: after a crash it must expire first");
        }
    }

    /// Makes the store at `path` of the newest snapshot, if there is one that is whole.
    pub async fn restore(
        snapshots: Arc<Snapshots<Folder>>,
        path: &Path,
        identity: &Identity,
    ) -> Result<(), SnapshotError> {
        match snapshots.restore(path, identity, None).await? {
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

    /// Holds while the lease does.
    pub fn permit(&self) -> Arc<Permit> {
        self.lease.permit()
    }

    /// Keeps the lease and makes snapshots, until the lease is lost. When `stop` is cancelled one more is made at once: what it
    /// writes, the last one need not.
    pub async fn tend(&mut self, store: &Arc<Store>, stop: &CancellationToken) -> LeaseLost {
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
            lost = self.lease.keep() => {
                let lost = LeaseLost::from(lost);
                error!("{lost}");
                lost
            }
            () = copying => unreachable!("it goes on for ever"),
        }
    }

    /// Makes the last snapshot, if that can be done before `deadline`, and gives the lease up.
    pub async fn end(self, store: &Arc<Store>, deadline: Instant) {
        let made = make(&self.snapshots, store, self.keep, Some(deadline));
        if timeout_at(deadline, made).await.is_err() {
            warn!("The last snapshot did not fit into the time there is for stopping: an earlier one stands");
        }
        if timeout(RELEASE, self.lease.release()).await.is_err() {
            warn!("The lease could not be given up in time: the next instance waits until it expires");
        }
    }
}

/// Why what needs the lease is not done.
#[derive(Debug, thiserror::Error)]
pub enum LeaseNotTaken {
    /// Another instance has it.
    #[error(
        "another instance holds the lease in storage.snapshot_dir ({by}): if that is a relayer, run it there, beside it, or stop \
         it first; if it is a command, try again when that has ended"
    )]
    Held {
        /// Who.
        by: String,
    },
    /// The folder cannot be read or written.
    #[error(
        "the lease in storage.snapshot_dir cannot be taken: {source}; mount the volume or make the folder, and let this user \
         write to it"
    )]
    Volume {
        /// What the system says.
        source: io::Error,
    },
}

/// Why a run ends without having been asked to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LeaseLost {
    /// Another instance relays.
    #[error(
        "Another instance has taken the lease in storage.snapshot_dir, while this one did not answer for it: this one ends, and \
         stands by when it is started again"
    )]
    Taken,
    /// Another instance may relay.
    #[error(
        "The lease in storage.snapshot_dir could not be renewed in time, and another instance may have taken it: this one ends, \
         and asks for it when it is started again"
    )]
    TooLate,
}

impl From<Lost> for LeaseLost {
    fn from(lost: Lost) -> Self {
        match lost {
            Lost::Taken => Self::Taken,
            Lost::TooLate => Self::TooLate,
        }
    }
}

/// Whether the store at `path` may go on: not if another instance has gone on from one of its snapshots since. What cannot be
/// read may be the sign of that, so it is waited for; what is damaged is no sign.
pub async fn is_newest<V: Volume>(
    snapshots: Arc<Snapshots<V>>,
    store: &Store,
    path: &Path,
) -> Result<(), SnapshotError> {
    let (epoch, restored_from) = (store.epoch(), store.restored_from()?);
    let another_went_on = |manifest: &Manifest| {
        let since = restored_from.is_some_and(|number| manifest.number > number);
        manifest.epoch > epoch || since && manifest.epoch != epoch
    };
    match snapshots.told().await?.into_iter().find(another_went_on) {
        Some(newest) => {
            let (path, newest) = (path.display().to_string(), newest.file());
            Err(SnapshotError::Outlived { path, newest })
        }
        None => Ok(()),
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
        let pruned = if deadline.is_none() { snapshots.prune(keep) } else { Ok(0) };
        Ok::<_, SnapshotError>((made, pruned))
    });
    match joined(making.await) {
        Ok((made, pruned)) => {
            metrics::snapshot_made();
            let (file, bytes, seconds) = (made.file(), made.bytes(), began.elapsed().as_secs_f64());
            info!(snapshot = %file, bytes, seconds, "Snapshot {file}: {bytes} bytes in {seconds:.1} s");
            if let Err(error) = pruned {
                warn!(%error, "Old snapshots could not be removed: {error}");
            }
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

fn holder_file(store: &Path) -> PathBuf {
    let mut file = store.as_os_str().to_owned();
    file.push(".holder");
    PathBuf::from(file)
}

/// The name under which the process that had this store last held the lease; only whoever has the store open may use it. A
/// copy of the file, on this machine or another, is another holder.
fn known_holder(store: &Path) -> Option<String> {
    let known = fs::read_to_string(holder_file(store)).ok()?;
    let (name, of) = known.split_once(' ')?;
    (of == place(store)).then(|| name.to_owned())
}

fn new_holder() -> String {
    let random = || RandomState::new().build_hasher().finish();
    format!("{:016x}{:016x}", random(), random())
}

/// Which file it is, on which machine, since when that runs.
fn place(store: &Path) -> String {
    let read = |file| fs::read_to_string(file).unwrap_or_default().trim().to_owned();
    // A service may not be shown the first one.
    let machine = [read("/proc/sys/kernel/random/boot_id"), read("/etc/machine-id")].join(",");
    let (device, inode) = fs::metadata(store).map_or((0, 0), |file| (file.dev(), file.ino()));
    format!("{machine} {device}:{inode}")
}
