//! The lease: of several instances over one folder of snapshots, one relays.
//!
//! The folder has no locks, and of two who write one file the last one wins. So:
//!
//! 1. Who wants the lease writes its name, waits [`SETTLE`], and has it if its name is still there.
//! 2. Who has it looks each [`LOOK`] whether that is still so, and may publish for [`TRUST`] after a look that said yes. As
//!    `TRUST` is shorter than `SETTLE`, it has stopped before another one that wrote its name begins.
//! 3. It changes the file now and then; a file that nobody changes for [`EXPIRY`] is a dead holder's. Each instance
//!    measures that by its own clock, so clocks need not agree.
//! 4. A store's file has a name of its own beside it, so one that was killed and is started again need not wait; two
//!    processes cannot have the file at once.
//! 5. A holder that was stopped between its look and its writing may have written over another's name: if that took
//!    longer than `TRUST`, it gives the lease up.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::volume::Volume;
use crate::permit::{Moment, Permit};
use crate::vitals::{Stage, Vitals};

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
    /// Another one with each change.
    beat: u64,
}

/// The lease, held by this process.
#[derive(Debug)]
pub(super) struct Lease<V> {
    volume: Arc<V>,
    holder: String,
    beat: u64,
    /// When it was changed last.
    wrote: Option<Instant>,
    permit: Arc<Permit>,
}

/// The lease is another's.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Lost;

impl<V: Volume> Lease<V> {
    /// Waits until the lease is free, and takes it. `None`: asked to stop before.
    pub async fn acquire(
        volume: Arc<V>,
        holder: String,
        vitals: &Vitals,
        stop: &CancellationToken,
    ) -> Option<Self> {
        tokio::select! {
            biased;
            () = stop.cancelled() => None,
            lease = Self::wait_for(volume, holder, vitals) => Some(lease),
        }
    }

    async fn wait_for(volume: Arc<V>, holder: String, vitals: &Vitals) -> Self {
        // What was seen last, and since when it has been that.
        let mut seen: Option<(Option<Claim>, Instant)> = None;
        let mut said = false;
        loop {
            let looked = Moment::now();
            match read(&volume).await {
                // This store's own, from before a crash.
                Ok(Some(claim)) if claim.holder.as_ref() == Some(&holder) => {
                    return Self::held(volume, holder, claim.beat, looked);
                }
                Ok(claim) => {
                    let since = match &seen {
                        Some((before, since)) if *before == claim => *since,
                        Some(_) | None => Instant::now(),
                    };
                    let is_free = claim.as_ref().is_none_or(|claim| claim.holder.is_none());
                    if is_free || since.elapsed() >= EXPIRY {
                        let beat = claim.as_ref().map_or(0, |claim| claim.beat) + 1;
                        if let Some(lease) = Self::claim(&volume, &holder, beat).await {
                            return lease;
                        }
                        seen = None;
                        continue;
                    }
                    if !std::mem::replace(&mut said, true) {
                        vitals.entered(Stage::Standby);
                        info!("Another instance holds the lease: standing by until it ends");
                    }
                    seen = Some((claim, since));
                }
                Err(error) => warn!(%error, "storage.snapshot_dir cannot be read: looking again"),
            }
            sleep(LOOK).await;
        }
    }

    /// Writes this name, and looks whether it stays.
    async fn claim(volume: &Arc<V>, holder: &str, beat: u64) -> Option<Self> {
        let claim = Claim { holder: Some(holder.to_owned()), beat };
        if let Err(error) = write(volume, &claim).await {
            warn!(%error, "storage.snapshot_dir cannot be written: trying again");
            sleep(LOOK).await;
            return None;
        }
        sleep(SETTLE).await;
        let looked = Moment::now();
        let stays = read(volume).await.is_ok_and(|read| read == Some(claim));
        stays.then(|| Self::held(Arc::clone(volume), holder.to_owned(), beat, looked))
    }

    fn held(volume: Arc<V>, holder: String, beat: u64, looked: Moment) -> Self {
        let permit = Arc::new(Permit::confirmed(looked, TRUST));
        Self { volume, holder, beat, wrote: None, permit }
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

    async fn renew(&mut self) -> io::Result<Result<(), Lost>> {
        let looked = Moment::now();
        if read(&self.volume).await?.and_then(|claim| claim.holder).as_ref() != Some(&self.holder) {
            return Ok(Err(Lost));
        }
        if self.wrote.is_some_and(|wrote| wrote.elapsed() < BEAT) {
            self.permit.confirm(looked);
            return Ok(Ok(()));
        }
        self.beat += 1;
        let written =
            write(&self.volume, &Claim { holder: Some(self.holder.clone()), beat: self.beat }).await;
        if looked.elapsed() >= TRUST {
            return Ok(Err(Lost));
        }
        written?;
        self.wrote = Some(Instant::now());
        self.permit.confirm(looked);
        Ok(Ok(()))
    }

    /// Gives it up, if it is still held.
    pub async fn release(mut self) {
        let looked = Moment::now();
        let held = read(&self.volume)
            .await
            .is_ok_and(|claim| claim.and_then(|claim| claim.holder).as_ref() == Some(&self.holder));
        if !held || looked.elapsed() >= TRUST {
            return;
        }
        self.beat += 1;
        if let Err(error) = write(&self.volume, &Claim { holder: None, beat: self.beat }).await {
            warn!(%error, "The lease could not be given up: the next instance waits until it expires");
        }
    }
}

/// What stands in the file; something that is no claim (it may be half written) is somebody's whose name is not known.
async fn read<V: Volume>(volume: &Arc<V>) -> io::Result<Option<Claim>> {
    let bytes = on_volume(volume, |volume| volume.read(FILE)).await?;
    let unknown = |bytes: &[u8]| Claim { holder: Some(String::new()), beat: bytes.len() as u64 };
    Ok(bytes.map(|bytes| serde_json::from_slice(&bytes).unwrap_or_else(|_| unknown(&bytes))))
}

async fn write<V: Volume>(volume: &Arc<V>, claim: &Claim) -> io::Result<()> {
    let bytes = serde_json::to_vec(claim).expect("a claim is JSON");
    on_volume(volume, move |volume| volume.write(FILE, &bytes)).await
}

/// Off the async threads: a mounted bucket answers when it likes.
async fn on_volume<V: Volume, T: Send + 'static>(
    volume: &Arc<V>,
    work: impl FnOnce(&V) -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let volume = Arc::clone(volume);
    match tokio::task::spawn_blocking(move || work(&volume)).await {
        Ok(done) => done,
        Err(error) => Err(io::Error::other(error)),
    }
}
