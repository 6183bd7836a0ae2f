//! Progress on long work: a bar on a terminal, a log line now and then elsewhere.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use tracing::info;

use crate::rpc::Rpc;
use crate::store::Store;
use crate::telemetry;

/// Between two lines, and between two looks for the bar.
const LINE_EVERY: Duration = Duration::from_secs(10);
const DRAW_EVERY: Duration = Duration::from_millis(200);
/// Without an end in sight a line is only worth it so many blocks behind.
const FAR_BEHIND: u64 = 1_000;

/// How far a run is.
#[derive(Clone, Debug, PartialEq)]
struct Numbers {
    /// The last block accepted, and the last one to be.
    block: u64,
    last: u64,
    /// Since the start.
    blocks: u64,
    events: u64,
    calls: u64,
    seconds: f64,
    /// Events not published yet.
    waiting: u64,
}

impl Numbers {
    fn events_per_second(&self) -> f64 {
        if self.seconds > 0.0 { self.events as f64 / self.seconds } else { 0.0 }
    }

    /// How long the rest takes at the pace so far; unknown before the first block.
    fn eta(&self) -> Option<Duration> {
        let left = self.last.saturating_sub(self.block);
        let seconds = left as f64 * self.seconds / self.blocks as f64;
        Duration::try_from_secs_f64(seconds.round()).ok().filter(|_| self.blocks > 0)
    }
}

impl fmt::Display for Numbers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { calls, waiting, .. } = self;
        write!(f, "{:.0} events/s, {calls} calls, {waiting} waiting", self.events_per_second())?;
        match self.eta() {
            Some(eta) => write!(f, ", {} left", humantime::format_duration(eta)),
            None => Ok(()),
        }
    }
}

/// Tells how far the run is, for ever. `goal`: the last block to read, 0 while it is not known; `has_end`: whether the run
/// ends there; `events_are_printed`: on standard output.
pub(crate) async fn tell(
    goal: watch::Receiver<u64>,
    store: Arc<Store>,
    rpc: Arc<Rpc>,
    has_end: bool,
    events_are_printed: bool,
) {
    let (began, first, entries, calls) = (Instant::now(), store.next_block(), store.entries(), rpc.calls());
    let numbers = || Numbers {
        block: store.next_block().saturating_sub(1),
        last: *goal.borrow(),
        blocks: store.next_block().saturating_sub(first),
        events: store.entries().saturating_sub(entries),
        calls: rpc.calls() - calls,
        seconds: began.elapsed().as_secs_f64(),
        waiting: store.waiting(),
    };
    let bar = if has_end { telemetry::progress_bar(events_are_printed) } else { None };
    match bar {
        Some(bar) => draw(&bar, numbers, first).await,
        None => loop {
            sleep(LINE_EVERY).await;
            say(&numbers(), has_end);
        },
    }
}

fn say(numbers: &Numbers, has_end: bool) {
    let Numbers { block, last, events, calls, waiting, .. } = *numbers;
    let behind = last.saturating_sub(block);
    if last == 0 || behind == 0 && waiting == 0 || !has_end && behind < FAR_BEHIND {
        return;
    }
    let eta_seconds = numbers.eta().map(|eta| eta.as_secs());
    info!(
        block,
        last, events, calls, waiting, eta_seconds, "Relayed up to block {block} of {last}: {numbers}"
    );
}

async fn draw(bar: &ProgressBar, numbers: impl Fn() -> Numbers, first: u64) {
    let style = ProgressStyle::with_template("{bar:30} {pos} of {len} blocks, {msg}").expect("a template");
    bar.set_style(style);
    loop {
        let numbers = numbers();
        if numbers.last > 0 {
            bar.set_length((numbers.last + 1).saturating_sub(first));
            bar.set_position(numbers.blocks);
            bar.set_message(numbers.to_string());
        }
        sleep(DRAW_EVERY).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rest_is_told_at_the_pace_so_far() {
        let numbers = |block, blocks, events, seconds| Numbers {
            block,
            last: 1_000,
            blocks,
            events,
            calls: 12,
            seconds,
            waiting: 3,
        };
        let table = [
            (numbers(0, 0, 0, 0.0), "0 events/s, 12 calls, 3 waiting"),
            (numbers(499, 100, 50, 10.0), "5 events/s, 12 calls, 3 waiting, 50s left"),
            (numbers(900, 1, 0, 60.0), "0 events/s, 12 calls, 3 waiting, 1h 40m left"),
            (numbers(1_000, 600, 1_800, 2.0), "900 events/s, 12 calls, 3 waiting, 0s left"),
            (numbers(1_200, 600, 0, 2.0), "0 events/s, 12 calls, 3 waiting, 0s left"),
        ];
        for (numbers, text) in table {
            assert_eq!(numbers.to_string(), text);
        }
    }
}
