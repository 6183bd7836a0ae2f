//! The permit to publish: only who holds the lease may, and only as long as that was seen lately.

use std::sync::Mutex;
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

/// Given to the publisher by whoever keeps the lease; without a lease it always holds.
#[derive(Debug)]
pub struct Permit {
    confirmed: Option<Mutex<Moment>>,
    lasts: Duration,
}

/// A moment by both clocks: the monotonic one stands still while a machine is suspended, the other one can be set.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moment {
    monotonic: Instant,
    wall: SystemTime,
}

impl Moment {
    pub fn now() -> Self {
        Self { monotonic: Instant::now(), wall: SystemTime::now() }
    }

    /// How long ago it was, by the clock that says longer.
    pub fn elapsed(&self) -> Duration {
        let wall = self.wall.elapsed().unwrap_or_default();
        self.monotonic.elapsed().max(wall)
    }
}

impl Permit {
    /// For a process that needs no lease.
    pub fn forever() -> Self {
        Self { confirmed: None, lasts: Duration::MAX }
    }

    /// Holds for `lasts` after each confirmation; the first one is `at`.
    pub(crate) fn confirmed(at: Moment, lasts: Duration) -> Self {
        Self { confirmed: Some(Mutex::new(at)), lasts }
    }

    /// The lease was seen to be held at that moment.
    pub(crate) fn confirm(&self, at: Moment) {
        if let Some(confirmed) = &self.confirmed {
            *confirmed.lock().expect("nothing panics with it") = at;
        }
    }

    /// Whether something may be handed to the sink now.
    pub fn holds(&self) -> bool {
        let Some(confirmed) = &self.confirmed else { return true };
        confirmed.lock().expect("nothing panics with it").elapsed() < self.lasts
    }
}
