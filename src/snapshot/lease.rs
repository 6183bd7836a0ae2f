//! The lease: of several instances over one folder of snapshots, one relays.
//!
//! The folder has no locks, and of two who write one file the last one wins. So:
//!
//! 1. Who wants the lease writes its name, waits [`SETTLE`], and has it if its name is still there.
//! 2. Who has it looks each [`LOOK`] whether that is still so, and may hand something over for [`TRUST`] after a look that
//!    said yes. As `TRUST` is shorter than `SETTLE`, it has stopped before another one that wrote its name begins. What the
//!    sink was handed by then goes on for up to `sink.timeout`.
//! 3. It changes the file now and then; a file that nobody changes for [`EXPIRY`] is a dead holder's. Each instance
//!    measures that by its own clock, so clocks need not agree.
//! 4. So nobody else can have written a name before `EXPIRY` has passed since the holder began to change the file last. If
//!    a change took until then, it may have gone over another's name: the holder gives up.
//! 5. A store's file has a name of its own beside it, so one that was killed and is started again need not wait; two
//!    processes cannot have the file at once.

use std::io;
use std::sync::Arc;
use std::time::Duration;
use std::{env, fs};

use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::volume::Volume;
use crate::permit::{Moment, Permit};
use crate::vitals::Vitals;

const FILE: &str = "lease.json";
const LOOK: Duration = Duration::from_secs(1);
const TRUST: Duration = Duration::from_secs(4);
const SETTLE: Duration = Duration::from_secs(5);
/// A bucket bears one change of a file a second.
const BEAT: Duration = Duration::from_secs(4);
const EXPIRY: Duration = Duration::from_secs(20);

/// What is in the file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Claim {
    /// Whose it is; `None`: nobody's.
    holder: Option<String>,
    /// The same to people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    by: Option<String>,
    /// Another one with each change.
    beat: u64,
}

impl Claim {
    /// Of this process.
    fn of(holder: &str, beat: u64) -> Self {
        Self { holder: Some(holder.to_owned()), by: Some(this_process()), beat }
    }

    /// Whose it is, to people; `None`: nobody's.
    fn whose(&self) -> Option<String> {
        let unnamed = |holder: &String| match holder.is_empty() {
            true => "an instance whose name cannot be read".to_owned(),
            false => format!("the instance {holder}"),
        };
        self.holder.as_ref().map(|holder| self.by.clone().unwrap_or_else(|| unnamed(holder)))
    }
}

/// The lease, held by this process.
#[derive(Debug)]
pub(super) struct Lease<V> {
    file: LeaseFile<V>,
    holder: String,
    beat: u64,
    /// When it began to change the file last, and for how long nobody may have changed it before.
    wrote: (Moment, Duration),
    permit: Arc<Permit>,
}

/// Why the lease is not waited for any longer.
#[derive(Debug)]
pub(super) enum NotTaken {
    /// Another instance holds it, and is alive: its name.
    Held(String),
    /// The volume fails.
    Volume(io::Error),
}

/// Whether a lease that another one holds is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wait {
    /// For as long as it takes.
    ForIt,
    /// No longer than it takes to see whether its holder is alive.
    ForTheDead,
}

/// Why the lease is not held any more.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Lost {
    /// It is another's.
    Taken,
    /// It could not be renewed in time: it may be.
    TooLate,
}

impl<V: Volume> Lease<V> {
    /// Waits until the lease is free, and takes it. `None`: asked to stop before.
    pub async fn acquire(
        volume: Arc<V>,
        holder: String,
        wait: Wait,
        vitals: &Vitals,
        stop: &CancellationToken,
    ) -> Result<Option<Self>, NotTaken> {
        let file = LeaseFile { volume, writing: Arc::default() };
        tokio::select! {
            biased;
            () = stop.cancelled() => {
                // The name may have been written already: nobody need wait for it to expire.
                let _ = timeout(TRUST, file.give_up(&holder)).await;
                Ok(None)
            }
            lease = Self::wait_for(file.clone(), holder.clone(), wait, vitals) => lease.map(Some),
        }
    }

    async fn wait_for(
        file: LeaseFile<V>,
        holder: String,
        wait: Wait,
        vitals: &Vitals,
    ) -> Result<Self, NotTaken> {
        // What was seen last, and since when it has been that.
        let mut seen: Option<(Option<Claim>, Instant)> = None;
        let mut waiting = Waiting { wait, vitals, said: false, failing: false };
        loop {
            let looked = Moment::now();
            match file.read().await {
                // This store's own, from before a crash.
                Ok(Some(claim)) if claim.holder.as_ref() == Some(&holder) => {
                    // Others may be about to take it.
                    let wrote = (looked, EXPIRY - TRUST);
                    return Ok(Self::held(file, holder, claim.beat, looked, wrote));
                }
                Ok(claim) => {
                    waiting.failing = false;
                    let since = match &seen {
                        Some((before, since)) if *before == claim => *since,
                        Some(_) | None => Instant::now(),
                    };
                    let whose = claim.as_ref().and_then(Claim::whose);
                    let Some(whose) = whose.filter(|_| since.elapsed() < EXPIRY) else {
                        let beat = claim.as_ref().map_or(0, |claim| claim.beat) + 1;
                        match Self::claim(&file, &holder, beat).await {
                            Ok(Some(lease)) => return Ok(lease),
                            Ok(None) => {}
                            Err(error) => {
                                waiting.unwritten(error)?;
                                sleep(LOOK).await;
                            }
                        }
                        seen = None;
                        continue;
                    };
                    let is_alive = seen.is_some_and(|(before, _)| before != claim);
                    waiting.seen(whose, is_alive)?;
                    seen = Some((claim, since));
                }
                Err(error) => waiting.unread(error)?,
            }
            sleep(LOOK).await;
        }
    }

    /// Writes this name, and looks whether it stays.
    async fn claim(file: &LeaseFile<V>, holder: &str, beat: u64) -> io::Result<Option<Self>> {
        let claim = Claim::of(holder, beat);
        let wrote = (Moment::now(), Duration::ZERO);
        file.write(&claim).await?;
        sleep(SETTLE).await;
        let looked = Moment::now();
        let stays = file.read().await.is_ok_and(|read| read == Some(claim));
        Ok(stays.then(|| Self::held(file.clone(), holder.to_owned(), beat, looked, wrote)))
    }

    fn held(
        file: LeaseFile<V>,
        holder: String,
        beat: u64,
        looked: Moment,
        wrote: (Moment, Duration),
    ) -> Self {
        let permit = Arc::new(Permit::confirmed(looked, TRUST));
        Self { file, holder, beat, wrote, permit }
    }

    /// Its name.
    pub fn holder(&self) -> &str {
        &self.holder
    }

    /// Holds while the lease is known to be held.
    pub fn permit(&self) -> Arc<Permit> {
        Arc::clone(&self.permit)
    }

    /// Keeps the lease until it is lost.
    pub async fn keep(&mut self) -> Lost {
        let mut failing = false;
        loop {
            sleep(LOOK).await;
            match self.renew().await {
                Ok(Ok(())) => {
                    if std::mem::take(&mut failing) {
                        info!("The lease is confirmed again: publishing goes on");
                    }
                }
                Ok(Err(lost)) => return lost,
                Err(error) if !std::mem::replace(&mut failing, true) => warn!(
                    %error,
                    "The lease in storage.snapshot_dir cannot be confirmed: publishing pauses until it can, since another \
                     instance may have taken it"
                ),
                Err(_) => {}
            }
        }
    }

    /// For how long nobody may have changed the file.
    fn unchanged_for(&self) -> Duration {
        let (wrote, before) = self.wrote;
        wrote.elapsed() + before
    }

    async fn renew(&mut self) -> io::Result<Result<(), Lost>> {
        let looked = Moment::now();
        let claim = timeout(TRUST, self.file.read()).await.map_err(|_| slow())??;
        // It may be the volume that is gone.
        let claim = claim.ok_or_else(|| io::Error::other("lease.json is not there"))?;
        if claim.holder.as_ref() != Some(&self.holder) || claim.beat > self.beat {
            return Ok(Err(Lost::Taken));
        }
        self.permit.confirm(looked);
        if self.unchanged_for() < BEAT && claim.beat == self.beat {
            return Ok(Ok(()));
        }
        self.beat += 1;
        let began = Moment::now();
        let claim = Claim::of(&self.holder, self.beat);
        let written = self.file.write(&claim).await;
        if self.unchanged_for() >= EXPIRY {
            return Ok(Err(Lost::TooLate));
        }
        written?;
        self.wrote = (began, Duration::ZERO);
        Ok(Ok(()))
    }

    /// Gives it up, if it is still held.
    pub async fn release(self) {
        let given_up = timeout(TRUST, self.file.give_up(&self.holder)).await.map_err(|_| slow());
        if let Err(error) = given_up.flatten() {
            warn!(%error, "The lease could not be given up: the next instance waits until it expires");
        }
    }
}

/// Somebody who waits for the lease: what that looks like from outside.
struct Waiting<'a> {
    wait: Wait,
    vitals: &'a Vitals,
    said: bool,
    failing: bool,
}

impl Waiting<'_> {
    /// It is another's, who may be alive for all that is known, or is.
    fn seen(&mut self, whose: String, is_alive: bool) -> Result<(), NotTaken> {
        let first = !std::mem::replace(&mut self.said, true);
        match self.wait {
            Wait::ForTheDead if is_alive => return Err(NotTaken::Held(whose)),
            Wait::ForTheDead if first => {
                info!(holder = %whose, "Another instance has the lease: looking whether it is alive");
            }
            Wait::ForTheDead => {}
            Wait::ForIt => {
                if first {
                    info!(holder = %whose, "Another instance holds the lease: standing by until it ends");
                }
                self.vitals.stands_by(whose);
            }
        }
        Ok(())
    }

    fn unread(&mut self, error: io::Error) -> Result<(), NotTaken> {
        let first = !std::mem::replace(&mut self.failing, true);
        match self.wait {
            Wait::ForTheDead => return Err(NotTaken::Volume(error)),
            Wait::ForIt if first => warn!(%error, "storage.snapshot_dir cannot be read: looking again"),
            Wait::ForIt => {}
        }
        Ok(())
    }

    fn unwritten(&self, error: io::Error) -> Result<(), NotTaken> {
        match self.wait {
            Wait::ForTheDead => Err(NotTaken::Volume(error)),
            Wait::ForIt => {
                warn!(%error, "storage.snapshot_dir cannot be written: trying again");
                Ok(())
            }
        }
    }
}

/// Where somebody finds this process. On Cloud Run all have one host's name, and revisions tell them apart.
fn this_process() -> String {
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let host = if host.trim().is_empty() { "unknown" } else { host.trim() };
    let process = std::process::id();
    match env::var("K_REVISION") {
        Ok(revision) => format!("host {host}, process {process}, revision {revision}"),
        Err(_) => format!("host {host}, process {process}"),
    }
}

fn slow() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "it does not answer")
}

/// The file, to one process. What it writes there it writes one after the other: a name whose write nobody waits for any
/// more still comes, and must not come after it was taken out again.
#[derive(Debug)]
struct LeaseFile<V> {
    volume: Arc<V>,
    /// Held by whoever writes, until that is done.
    writing: Arc<Mutex<()>>,
}

impl<V> Clone for LeaseFile<V> {
    fn clone(&self) -> Self {
        Self { volume: Arc::clone(&self.volume), writing: Arc::clone(&self.writing) }
    }
}

impl<V: Volume> LeaseFile<V> {
    /// Takes that name out of the file, if it is there.
    async fn give_up(&self, holder: &str) -> io::Result<()> {
        drop(self.writing.lock().await);
        match self.read().await? {
            Some(Claim { holder: Some(name), beat, .. }) if name == holder => {
                self.write(&Claim { holder: None, by: None, beat: beat + 1 }).await
            }
            Some(_) | None => Ok(()),
        }
    }

    /// What stands in the file; something that is no claim (it may be half written) is somebody's whose name is not known.
    async fn read(&self) -> io::Result<Option<Claim>> {
        let bytes = self.on_volume(|volume| volume.read(FILE)).await?;
        let unknown =
            |bytes: &[u8]| Claim { holder: Some(String::new()), by: None, beat: bytes.len() as u64 };
        Ok(bytes.map(|bytes| serde_json::from_slice(&bytes).unwrap_or_else(|_| unknown(&bytes))))
    }

    async fn write(&self, claim: &Claim) -> io::Result<()> {
        let bytes = serde_json::to_vec(claim).expect("a claim is JSON");
        let writing = Arc::clone(&self.writing).lock_owned().await;
        let write = move |volume: &V| {
            let _writing = writing;
            volume.write(FILE, &bytes)
        };
        self.on_volume(write).await
    }

    /// Off the async threads: a mounted bucket answers when it likes.
    async fn on_volume<T: Send + 'static>(
        &self,
        work: impl FnOnce(&V) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let volume = Arc::clone(&self.volume);
        match tokio::task::spawn_blocking(move || work(&volume)).await {
            Ok(done) => done,
            Err(error) => Err(io::Error::other(error)),
        }
    }
}
