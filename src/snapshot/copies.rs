//! Making, listing, pruning and restoring snapshots.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::io;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use thiserror::Error;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep};
use tracing::warn;

use super::joined;
use super::manifest::{Manifest, Part, sha256};
use super::volume::Volume;
use crate::permit::Permit;
use crate::store::{self, Identity, Piece, Restored, Store, StoreError, on_thread};

/// How often a file is read before it cannot be read, and the pause between.
const ATTEMPTS: u32 = 3;
const BETWEEN_ATTEMPTS: Duration = Duration::from_millis(500);
/// The pauses before a snapshot that could not be read is tried again: what it would cost to take an older one, or to go on
/// beside another instance, is more.
const PATIENCE: [Duration; 4] =
    [Duration::from_secs(1), Duration::from_secs(3), Duration::from_secs(9), Duration::from_secs(27)];

/// Why there is no snapshot, or no store from one.
#[derive(Debug, Error)]
pub enum SnapshotError {
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The folder of snapshots.
    #[error(
        "storage.snapshot_dir: {what}: {source}; mount the volume or make the folder, and let this user write to it"
    )]
    Volume {
        /// What was tried.
        what: String,
        /// What the system says.
        source: io::Error,
    },
    /// What was written did not come back.
    #[error("storage.snapshot_dir: {0} was written, and reads otherwise: the volume cannot be trusted")]
    NotKept(String),
    /// Another instance may hold the lease.
    #[error(
        "the lease in storage.snapshot_dir is not known to be held: another instance may be making snapshots"
    )]
    NotHolder,
    /// A newer program made it.
    #[error(
        "the snapshot {file} in storage.snapshot_dir was made by {made_by}, whose store this program does not know: use that \
         version or a later one; or restore an earlier snapshot with `relayer snapshot restore --snapshot FILE`"
    )]
    Newer {
        /// Its file.
        file: String,
        /// That program.
        made_by: String,
    },
    /// There was not enough time.
    #[error("there was not enough time for it")]
    Late,
    /// There are snapshots, and none can be used.
    #[error(
        "none of the {count} snapshots in storage.snapshot_dir can be restored; the newest, {newest}: {why}. Repair the \
         volume, or move the snapshots away to read the chain again from chain.start_block (what was published will be \
         published again)"
    )]
    NoneWhole {
        /// How many there are.
        count: usize,
        /// The file of the newest.
        newest: String,
        /// What is wrong with it.
        why: String,
    },
    /// The snapshot is of something else.
    #[error(
        "the snapshot {file} in storage.snapshot_dir belongs to another relay:\n{differences}\nUse the configuration it was \
         made with, or give this relayer a storage.snapshot_dir of its own"
    )]
    OtherIdentity {
        /// Its file.
        file: String,
        /// One line per difference, both sides named.
        differences: String,
    },
    /// There is no such snapshot.
    #[error(
        "there is no snapshot {0} in storage.snapshot_dir: `relayer snapshot list` shows those there are"
    )]
    Unknown(String),
    /// It may be of another instance that has gone on.
    #[error(
        "the snapshot {file} in storage.snapshot_dir cannot be read ({why}): unless it can, nobody knows whether another \
         instance has gone on from there; repair the volume, or, if that snapshot is lost, move its file away"
    )]
    Unread {
        /// Its file.
        file: String,
        /// What the system says.
        why: String,
    },
    /// The file belongs to a life before that of the newest snapshot.
    #[error(
        "storage.path {path} is older than the newest snapshot, {newest}, which another instance made after it had gone on \
         from there: move the file away, and the snapshot is restored; or give this relayer another storage.snapshot_dir"
    )]
    Outlived {
        /// The store.
        path: String,
        /// The file of the snapshot.
        newest: String,
    },
}

impl SnapshotError {
    /// Whether only a change of configuration, or of what lies in the folders, can help.
    pub fn is_configuration(&self) -> bool {
        match self {
            Self::Store(error) => error.is_configuration(),
            Self::Outlived { .. } | Self::OtherIdentity { .. } | Self::Newer { .. } | Self::Unknown(_) => {
                true
            }
            Self::Volume { .. }
            | Self::NotKept(_)
            | Self::NotHolder
            | Self::Late
            | Self::NoneWhole { .. }
            | Self::Unread { .. } => false,
        }
    }
}

fn volume_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> SnapshotError {
    let what = what.into();
    |source| SnapshotError::Volume { what, source }
}

/// A snapshot in the folder: its file, and what it is of, or why it cannot be used.
#[derive(Debug)]
pub struct Listed {
    /// The manifest's file.
    pub file: String,
    /// What it says.
    pub manifest: Result<Manifest, String>,
}

/// The snapshots in a folder.
#[derive(Debug)]
pub struct Snapshots<V> {
    volume: Arc<V>,
    /// While this holds nobody else makes or removes snapshots.
    permit: Option<Arc<Permit>>,
    /// Files of parts that this process found, or read back, as they should be.
    kept: Mutex<HashSet<String>>,
    /// One is made at a time, and none while old ones are removed: its parts are nobody's until it is done.
    making: Mutex<()>,
}

impl<V: Volume> Snapshots<V> {
    /// Those in that folder.
    pub fn new(volume: Arc<V>) -> Self {
        Self { volume, permit: None, kept: Mutex::default(), making: Mutex::default() }
    }

    /// Writes and removes only while that permit holds.
    pub(super) fn permitted_by(self, permit: Arc<Permit>) -> Self {
        Self { permit: Some(permit), ..self }
    }

    fn is_permitted(&self) -> Result<(), SnapshotError> {
        match self.permit.as_ref().is_none_or(|permit| permit.holds()) {
            true => Ok(()),
            false => Err(SnapshotError::NotHolder),
        }
    }

    /// Makes a snapshot of what the store is now, while it goes on, and before `deadline` or not at all.
    ///
    /// Parts that are there already are not written again, so one made soon after another is quick. The manifest is written
    /// last: until then nobody sees that there is something.
    pub fn create(&self, store: &Store, deadline: Option<Instant>) -> Result<Manifest, SnapshotError> {
        let _making = self.making.lock().expect("nothing panics with it");
        let number = self.manifests()?.first().map_or(1, |(newest, _)| newest + 1);
        let is_late = || deadline.is_some_and(|deadline| Instant::now() >= deadline);
        self.forget_missing_parts()?;
        let mut parts = Vec::new();
        let mut failed = None;
        let moment = store.copy(|piece| {
            match if is_late() { Err(SnapshotError::Late) } else { self.keep(piece) } {
                Ok(part) => {
                    parts.push(part);
                    ControlFlow::Continue(())
                }
                Err(error) => {
                    failed = Some(error);
                    ControlFlow::Break(())
                }
            }
        })?;
        let moment = match (moment, failed) {
            (Some(moment), None) if !is_late() => moment,
            (_, failed) => return Err(failed.unwrap_or(SnapshotError::Late)),
        };
        let manifest = Manifest::new(number, moment, parts);
        self.is_permitted()?;
        self.write(&manifest.file(), &manifest.encode())?;
        Ok(manifest)
    }

    /// Somebody else may have removed some.
    fn forget_missing_parts(&self) -> Result<(), SnapshotError> {
        let there = self.parts_there()?;
        self.kept.lock().expect("nothing panics with it").retain(|file| there.contains(file));
        Ok(())
    }

    fn parts_there(&self) -> Result<HashSet<String>, SnapshotError> {
        let parts = self.volume.list("parts").map_err(volume_error("its parts cannot be listed"))?;
        Ok(parts.into_iter().map(|part| format!("parts/{part}")).collect())
    }

    /// One that is there as it should be is left alone: other snapshots need it, and a crash may cut off what is written.
    fn keep(&self, piece: Piece) -> Result<Part, SnapshotError> {
        let Piece { table, rows, bytes } = piece;
        let part = Part { table: table.to_owned(), rows, bytes: bytes.len() as u64, sha256: sha256(&bytes) };
        let is_kept = self.kept.lock().expect("nothing panics with it").contains(&part.file());
        if !is_kept {
            let is_there = self.volume.read(&part.file()).is_ok_and(|read| read.as_ref() == Some(&bytes));
            if !is_there {
                self.write(&part.file(), &bytes)?;
            }
            self.kept.lock().expect("nothing panics with it").insert(part.file());
        }
        Ok(part)
    }

    /// Writes a file and reads it back.
    fn write(&self, file: &str, bytes: &[u8]) -> Result<(), SnapshotError> {
        self.volume.write(file, bytes).map_err(volume_error(format!("{file} cannot be written")))?;
        let read = self.volume.read(file).map_err(volume_error(format!("{file} cannot be read")))?;
        match read.is_some_and(|read| read == bytes) {
            true => Ok(()),
            false => Err(SnapshotError::NotKept(file.to_owned())),
        }
    }

    /// Number and file of each manifest, the newest first.
    fn manifests(&self) -> Result<Vec<(u64, String)>, SnapshotError> {
        let files = self.volume.list("").map_err(volume_error("it cannot be listed"))?;
        let numbered = files.into_iter().filter_map(|file| Some((Manifest::number_of(&file)?, file)));
        let mut manifests: Vec<(u64, String)> = numbered.collect();
        manifests.sort_unstable_by(|a, b| b.cmp(a));
        Ok(manifests)
    }

    /// All snapshots, the newest first; one without all of its parts is damaged.
    pub fn list_whole(&self) -> Result<Vec<Listed>, SnapshotError> {
        let (mut listed, there) = (self.list()?, self.parts_there()?);
        for Listed { manifest, .. } in &mut listed {
            let parts = manifest.iter().flat_map(|manifest| &manifest.parts);
            let missing = parts.filter(|part| !there.contains(&part.file())).count();
            if missing > 0 {
                *manifest = Err(format!("{missing} of its parts are missing"));
            }
        }
        Ok(listed)
    }

    /// All snapshots, the newest first.
    pub fn list(&self) -> Result<Vec<Listed>, SnapshotError> {
        let manifests = self.manifests()?.into_iter();
        Ok(manifests
            .map(|(_, file)| Listed { manifest: self.manifest(&file).map_err(|why| why.to_string()), file })
            .collect())
    }

    fn manifest(&self, file: &str) -> Result<Manifest, Unusable> {
        match self.read_patiently(file) {
            Ok(Some(bytes)) => Manifest::decode(&bytes).map_err(Unusable::Damaged),
            Ok(None) => Err(Unusable::Damaged("it is gone".to_owned())),
            Err(error) => Err(Unusable::Unread(error.to_string())),
        }
    }

    /// Removes all but the newest `keep` snapshots, and the parts that none of those needs. If one of them cannot be read,
    /// nobody knows what it needs: then nothing is removed.
    pub fn prune(&self, keep: usize) -> Result<usize, SnapshotError> {
        let _making = self.making.lock().expect("nothing panics with it");
        let listed = self.list()?;
        let (kept, gone) = listed.split_at(keep.min(listed.len()));
        let mut needed = HashSet::new();
        for Listed { manifest, .. } in kept {
            let Ok(manifest) = manifest else { return Ok(0) };
            needed.extend(manifest.parts.iter().map(Part::file));
        }
        let removed = |file: &str| {
            self.is_permitted()?;
            self.volume.remove(file).map_err(volume_error(format!("{file} cannot be removed")))
        };
        for Listed { file, .. } in gone {
            removed(file)?;
        }
        for file in self.parts_there()? {
            if !needed.contains(&file) {
                self.kept.lock().expect("nothing panics with it").remove(&file);
                removed(&file)?;
            }
        }
        Ok(gone.len())
    }

    /// Number and file of each manifest, the newest first. A volume that cannot list them is tried again for a while.
    async fn manifests_patiently(self: &Arc<Self>) -> Result<Vec<(u64, String)>, SnapshotError> {
        let mut pauses = PATIENCE.iter();
        loop {
            let snapshots = Arc::clone(self);
            let error = match on_thread(move || snapshots.manifests()).await {
                Ok(manifests) => return Ok(manifests),
                Err(error) => error,
            };
            let Some(pause) = pauses.next() else { return Err(error) };
            let seconds = pause.as_secs();
            warn!(%error, "The list of snapshots cannot be read: {error}; trying again in {seconds} s");
            sleep(*pause).await;
        }
    }

    /// What the snapshots say of themselves, the newest first, but for those that are damaged. One that cannot be read may be
    /// whole: it is tried again for a while.
    pub(super) async fn told(self: &Arc<Self>) -> Result<Vec<Manifest>, SnapshotError> {
        let mut pauses = PATIENCE.iter();
        loop {
            let (snapshots, files) = (Arc::clone(self), self.manifests_patiently().await?);
            let reading = spawn_blocking(move || {
                let told = files.into_iter().filter_map(|(_, file)| match snapshots.manifest(&file) {
                    Ok(manifest) => Some(Ok(manifest)),
                    Err(Unusable::Unread(why)) => Some(Err(Unread { file, why })),
                    Err(Unusable::Damaged(_) | Unusable::Fault(_)) => None,
                });
                told.collect()
            });
            let unread = match joined::<Result<Vec<Manifest>, Unread>>(reading.await) {
                Ok(told) => return Ok(told),
                Err(unread) => unread,
            };
            match pauses.next() {
                Some(pause) => unread.wait(*pause).await,
                None => return Err(SnapshotError::Unread { file: unread.file, why: unread.why }),
            }
        }
    }

    /// Makes a store at `path` of the newest snapshot that is whole, or of the one in that file. `None`: there is no
    /// snapshot. `identity`: what the store is to be for; a snapshot of another one is an error.
    ///
    /// One that cannot be read may be whole: it is tried again for a while before an older one is taken.
    pub async fn restore(
        self: &Arc<Self>,
        path: &Path,
        identity: &Identity,
        file: Option<&str>,
    ) -> Result<Option<Manifest>, SnapshotError> {
        let mut tried: BTreeMap<String, usize> = BTreeMap::new();
        loop {
            let given_up = tried.iter().filter(|(_, times)| **times > PATIENCE.len());
            let given_up: HashSet<String> = given_up.map(|(file, _)| file.clone()).collect();
            let (snapshots, path, identity) = (Arc::clone(self), path.to_owned(), identity.clone());
            let asked_for = file.map(str::to_owned);
            let files = self.manifests_patiently().await?.into_iter().map(|(_, file)| file).collect();
            let attempt = spawn_blocking(move || {
                snapshots.try_restore(files, &path, &identity, asked_for.as_deref(), &given_up)
            });
            match joined(attempt.await)? {
                Ok(restored) => return Ok(restored),
                Err(unread) => {
                    let times = tried.entry(unread.file.clone()).or_default();
                    if let Some(pause) = PATIENCE.get(*times) {
                        unread.wait(*pause).await;
                    }
                    *times += 1;
                }
            }
        }
    }

    /// The same once, of these files. `given_up`: an older one is taken instead of these, should they still not be read.
    fn try_restore(
        &self,
        files: Vec<String>,
        path: &Path,
        identity: &Identity,
        file: Option<&str>,
        given_up: &HashSet<String>,
    ) -> Result<Result<Option<Manifest>, Unread>, SnapshotError> {
        let all: Vec<(&String, Result<Manifest, Unusable>)> =
            files.iter().map(|file| (file, self.manifest(file))).collect();
        // What was there when it was restored is no sign that another instance has gone on since.
        let restored_at = Restored {
            number: files.first().and_then(|newest| Manifest::number_of(newest)).unwrap_or(0),
            after: all.iter().filter_map(|(_, manifest)| Some(manifest.as_ref().ok()?.epoch)).max(),
        };
        let candidates = all.into_iter().filter(|(candidate, _)| file.is_none_or(|file| **candidate == file));
        let (mut count, mut newest) = (0, None);
        for (file, manifest) in candidates {
            count += 1;
            let restored =
                manifest.and_then(|it| self.restore_from(&it, path, identity, restored_at).map(|()| it));
            let why = match restored {
                Ok(manifest) => return Ok(Ok(Some(manifest))),
                Err(Unusable::Fault(error)) => return Err(error),
                Err(Unusable::Unread(why)) if !given_up.contains(file) => {
                    return Ok(Err(Unread { file: file.clone(), why }));
                }
                Err(Unusable::Unread(why) | Unusable::Damaged(why)) => why,
            };
            warn!(snapshot = %file, %why, "The snapshot {file} cannot be used: {why}");
            newest.get_or_insert((file.clone(), why));
        }
        match (newest, file) {
            (None, None) => Ok(Ok(None)),
            (None, Some(file)) => Err(SnapshotError::Unknown(file.to_owned())),
            (Some((newest, why)), _) => Err(SnapshotError::NoneWhole { count, newest, why }),
        }
    }

    fn restore_from(
        &self,
        manifest: &Manifest,
        path: &Path,
        identity: &Identity,
        at: Restored,
    ) -> Result<(), Unusable> {
        if manifest.schema > store::LAYOUT {
            let (file, made_by) = (manifest.file(), manifest.made_by.clone());
            return Err(Unusable::Fault(SnapshotError::Newer { file, made_by }));
        }
        if let Err(StoreError::OtherIdentity { differences, .. }) =
            store::fits(path, &manifest.identity, identity)
        {
            let file = manifest.file();
            return Err(Unusable::Fault(SnapshotError::OtherIdentity { file, differences }));
        }
        let pieces = manifest.parts.iter().map(|part| {
            let bytes = match self.read_patiently(&part.file()) {
                Ok(Some(bytes)) => bytes,
                Ok(None) => return Err(Unusable::Damaged(format!("{} is missing", part.file()))),
                Err(error) => return Err(Unusable::Unread(format!("{}: {error}", part.file()))),
            };
            match sha256(&bytes) == part.sha256 {
                true => Ok((part.table.clone(), bytes)),
                false => Err(Unusable::Damaged(format!("{} is damaged", part.file()))),
            }
        });
        store::restore(path, at, pieces)
    }
}

impl<V: Volume> Snapshots<V> {
    /// A handle may be stale, a volume may hiccup: that alone does not make a snapshot a bad one.
    fn read_patiently(&self, file: &str) -> io::Result<Option<Vec<u8>>> {
        for _ in 1..ATTEMPTS {
            match self.volume.read(file) {
                Err(_) => std::thread::sleep(BETWEEN_ATTEMPTS),
                read => return read,
            }
        }
        self.volume.read(file)
    }
}

/// A snapshot that cannot be read: its file, and why.
struct Unread {
    file: String,
    why: String,
}

impl Unread {
    /// Says so, and waits before it is tried again.
    async fn wait(&self, pause: Duration) {
        let (Self { file, why }, seconds) = (self, pause.as_secs());
        warn!(
            snapshot = %file, %why,
            "The snapshot {file} cannot be read: {why}; trying again in {seconds} s"
        );
        sleep(pause).await;
    }
}

/// Why a snapshot was not restored.
enum Unusable {
    /// The volume fails. It may be whole all the same.
    Unread(String),
    /// It is not whole: an older one may be.
    Damaged(String),
    /// Another one would not help.
    Fault(SnapshotError),
}

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unread(why) | Self::Damaged(why) => f.write_str(why),
            Self::Fault(error) => error.fmt(f),
        }
    }
}

impl From<StoreError> for Unusable {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Damaged { what } => Self::Damaged(what),
            error => Self::Fault(error.into()),
        }
    }
}
