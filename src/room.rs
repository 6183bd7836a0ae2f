//! Room for what is read next: reading pauses while too much waits to be published.
//!
//! Messages that blocked lanes hold wait, too, and count: they are in the store as well. If nothing but these is left to
//! publish, no room comes of itself. Somebody may mend that beside a run; a job that is to end waits for nobody.

use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tracing::{info, warn};

use crate::store::Store;
use crate::vitals::{BlockedLane, Vitals};

/// How often a paused reader looks whether there is room again.
const LOOK: Duration = Duration::from_millis(200);
/// Blocked lanes that are named.
const NAMED: usize = 5;

/// There is no room, and none will come of itself.
#[derive(Debug, Error)]
#[error(
    "All that waits is blocked, and nothing more is read: {waiting} messages wait, ledger.max_waiting = {max_waiting}, and \
     {lanes}. `relayer outbox list` shows them: mend what makes them refused and `relayer outbox retry`, give them up with \
     `relayer outbox discard`, or set a greater ledger.max_waiting"
)]
pub struct NoRoom {
    /// How many messages wait.
    pub waiting: u64,
    /// The bound.
    pub max_waiting: u64,
    /// The blocked lanes and why they are, in words.
    pub lanes: String,
}

/// The bound on what waits, to a reader.
#[derive(Debug)]
pub(crate) struct Room {
    store: Arc<Store>,
    vitals: Arc<Vitals>,
    max_waiting: u64,
    /// Whether it may be waited for somebody to mend what is blocked.
    patient: bool,
}

impl Room {
    /// That of a run; `patient`: one without an end.
    pub fn new(store: &Arc<Store>, vitals: &Arc<Vitals>, max_waiting: u64, patient: bool) -> Self {
        Self { store: Arc::clone(store), vitals: Arc::clone(vitals), max_waiting, patient }
    }

    /// Waits until there is some.
    pub async fn wait(&self) -> Result<(), NoRoom> {
        if self.is_some() {
            return Ok(());
        }
        let (waiting, max_waiting) = (self.store.waiting(), self.max_waiting);
        warn!(waiting, max_waiting, "Too many events wait to be published: reading pauses");
        // The publisher must not wait for what waits for it.
        self.store.expect_more(false);
        let mut said = false;
        while !self.is_some() {
            let blocked = if said { None } else { self.blocked() };
            if let Some(blocked) = blocked {
                if !self.patient {
                    return Err(blocked);
                }
                said = true;
                warn!("{blocked}");
            }
            tokio::time::sleep(LOOK).await;
        }
        info!(waiting = self.store.waiting(), "There is room again: reading goes on");
        Ok(())
    }

    fn is_some(&self) -> bool {
        self.store.waiting() < self.max_waiting
    }

    /// Why no room will come of itself, if so.
    fn blocked(&self) -> Option<NoRoom> {
        // What was appended since the publisher looked, it may yet publish.
        if !self.vitals.is_all_blocked(self.store.entries()) {
            return None;
        }
        let lanes = self.vitals.blocked_lanes();
        // It may have been taken since.
        (!lanes.is_empty() && !self.is_some()).then(|| NoRoom {
            waiting: self.store.waiting(),
            max_waiting: self.max_waiting,
            lanes: named(&lanes),
        })
    }
}

fn named(lanes: &[BlockedLane]) -> String {
    let first: Vec<String> = lanes
        .iter()
        .take(NAMED)
        .map(|BlockedLane { lane, reason, .. }| format!("lane {lane} is blocked ({reason})"))
        .collect();
    let more = match lanes.len().saturating_sub(NAMED) {
        0 => String::new(),
        more => format!(", and so are {more} more"),
    };
    first.join(", ") + &more
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::{block, memory, stretch};

    fn full(patient: bool) -> (Arc<Vitals>, Room) {
        let (store, vitals) = (Arc::new(memory()), Arc::new(Vitals::default()));
        store.accept(&stretch(block(1, 0), &[1], &[1, 1])).unwrap();
        vitals.lane_blocked("0x01".into(), "too large");
        (Arc::clone(&vitals), Room::new(&store, &vitals, 3, patient))
    }

    #[tokio::test(start_paused = true)]
    async fn a_job_waits_while_something_may_be_published_and_ends_when_all_is_blocked() {
        let (vitals, room) = full(false);
        room.store.expect_more(true);
        let appended = room.store.appended();
        let waiting = tokio::spawn(async move { room.wait().await });
        // The publisher has not seen the last entry yet.
        for upto in [None, Some(2)] {
            vitals.all_blocked_upto(upto);
            tokio::time::sleep(Duration::from_secs(60)).await;
            assert!(!waiting.is_finished(), "{upto:?}");
            assert!(!appended.borrow().more, "the publisher waits for nothing");
        }
        vitals.all_blocked_upto(Some(3));
        let ended = waiting.await.unwrap().unwrap_err().to_string();
        for word in ["3 messages wait", "ledger.max_waiting = 3", "lane 0x01 is blocked (too large)"] {
            assert!(ended.contains(word), "{word}: {ended}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_run_without_an_end_waits_for_as_long_as_it_takes() {
        let (vitals, room) = full(true);
        vitals.all_blocked_upto(Some(3));
        let store = Arc::clone(&room.store);
        let waiting = tokio::spawn(async move { room.wait().await });
        tokio::time::sleep(Duration::from_secs(3600)).await;
        assert!(!waiting.is_finished());
        store.acknowledge(vec![0]).unwrap();
        waiting.await.unwrap().unwrap();
    }

    #[test]
    fn very_many_lanes_are_not_all_named() {
        let lane = |number| BlockedLane { lane: format!("lane{number}"), reason: "no".into(), since: 0 };
        let named = named(&(0..12).map(lane).collect::<Vec<_>>());
        assert!(named.contains("lane4") && !named.contains("lane5") && named.ends_with("7 more"), "{named}");
    }
}
