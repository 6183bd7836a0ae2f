//! Pauses between attempts, growing and jittered: for the node and for the sink alike.

use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};

const FIRST: Duration = Duration::from_millis(200);
/// Doubled by jitter at most.
const LONGEST: Duration = Duration::from_secs(15);

/// The pauses of one trouble, from its first failed attempt on.
#[derive(Debug)]
pub(crate) struct Backoff(ExponentialBackoff);

impl Backoff {
    /// From 0.2 s, doubling to 15 s, each longer by up to as much again, so that many do not come in step.
    pub fn growing() -> Self {
        Self::between(FIRST, LONGEST)
    }

    /// Always about `pause`, longer by up to as much again.
    pub fn steady(pause: Duration) -> Self {
        Self::between(pause, pause)
    }

    fn between(first: Duration, longest: Duration) -> Self {
        let builder = ExponentialBuilder::default().with_min_delay(first).with_max_delay(longest);
        Self(builder.with_factor(2.0).with_jitter().without_max_times().build())
    }

    /// How long to wait before the next attempt.
    pub fn pause(&mut self) -> Duration {
        self.0.next().expect("there is no last pause")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_are_never_longer_than_half_a_minute() {
        let mut growing = Backoff::growing();
        let pauses: Vec<Duration> = (0..100).map(|_| growing.pause()).collect();
        assert!((FIRST..=FIRST * 2).contains(&pauses[0]));
        assert!(pauses[99] >= LONGEST);
        assert!(pauses.iter().all(|pause| *pause <= LONGEST * 2));
        let mut steady = Backoff::steady(FIRST);
        assert!((0..100).all(|_| (FIRST..=FIRST * 2).contains(&steady.pause())));
    }
}
