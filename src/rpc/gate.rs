//! The outage gate: open while providers answer; one attempt at a time, with growing pauses, while they do not.

use std::sync::{Mutex, MutexGuard as StdGuard};
use std::time::Duration;

use tokio::sync::MutexGuard;
use tokio::time::Instant;
use tracing::{info, warn};

use crate::backoff::Backoff;
use crate::config::SecretUrl;

/// A provider's hint is not taken for less than this.
const SHORTEST_HINT: Duration = Duration::from_millis(200);

#[derive(Default)]
pub(super) struct Gate {
    outage: Mutex<Option<Outage>>,
    /// Held by the one attempt made during an outage.
    probe: tokio::sync::Mutex<()>,
}

struct Outage {
    since: Instant,
    resume_at: Instant,
    backoff: Backoff,
}

impl Gate {
    /// Passes at once while all is well. In an outage: one caller at a time, each after its pause.
    pub async fn enter(&self) -> Option<MutexGuard<'_, ()>> {
        self.resume_at()?;
        let turn = self.probe.lock().await;
        if let Some(resume_at) = self.resume_at() {
            tokio::time::sleep_until(resume_at).await;
        }
        Some(turn)
    }

    /// An attempt failed in a way that waiting may mend. `hint`: how long the provider asks to be left alone.
    pub fn failed(&self, provider: &SecretUrl, reason: &str, hint: Option<Duration>) {
        let now = Instant::now();
        let mut outage = self.lock();
        let current = outage.get_or_insert_with(|| {
            warn!(%provider, %reason, "The RPC provider does not answer: waiting, then trying again");
            Outage { since: now, resume_at: now, backoff: Backoff::growing() }
        });
        // Several requests under way fail together: that is one step of the backoff, not several.
        if current.resume_at <= now {
            let pause = current.backoff.pause();
            current.resume_at = now + hint.map_or(pause, |hint| hint.max(SHORTEST_HINT));
        }
    }

    /// An attempt was answered.
    pub fn succeeded(&self) {
        if let Some(outage) = self.lock().take() {
            let seconds = outage.since.elapsed().as_secs_f64();
            info!(seconds, "The RPC provider answers again after {seconds:.1} s");
        }
    }

    fn resume_at(&self) -> Option<Instant> {
        self.lock().as_ref().map(|outage| outage.resume_at)
    }

    fn lock(&self) -> StdGuard<'_, Option<Outage>> {
        self.outage.lock().expect("no code that panics runs under this lock")
    }
}
