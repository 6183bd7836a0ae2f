//! Whether a relayer does what is expected of it.

use serde::Serialize;

use crate::status::{Expectations, Phase, Status};

/// The answer of `/readyz`.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(super) struct Readiness {
    pub ready: bool,
    /// What keeps it from being ready.
    pub reasons: Vec<Reason>,
    /// What deserves a look and does not.
    pub warnings: Vec<Reason>,
}

/// A word for programs and a text for people.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(super) struct Reason {
    pub reason: &'static str,
    pub text: String,
}

fn because(reason: &'static str, text: impl Into<String>) -> Reason {
    Reason { reason, text: text.into() }
}

pub(super) fn store_failed(error: &str) -> Readiness {
    let reasons = vec![because("store_failed", error)];
    Readiness { ready: false, reasons, warnings: Vec::new() }
}

/// A standby is ready: that is what it is for. A blocked lane holds up one escrow, by a message that no other instance would
/// get rid of either: it is a warning, and what it holds has no age. But if so much is blocked that nothing moves
/// any more, that is a reason.
pub(super) fn readiness(status: &Status, expected: &Expectations) -> Readiness {
    let reasons = match status.phase {
        Phase::Standby => Vec::new(),
        Phase::Starting => {
            let mut reasons = vec![because("starting", "the chain's head is not known yet")];
            reasons.extend(silence(status));
            reasons
        }
        Phase::Stopping | Phase::Stopped => {
            vec![because("stopping", "it finishes what is under way, and ends")]
        }
        Phase::CatchingUp | Phase::Following => troubles(status, expected),
    };
    Readiness { ready: reasons.is_empty(), reasons, warnings: warnings(status) }
}

fn troubles(status: &Status, expected: &Expectations) -> Vec<Reason> {
    let mut reasons: Vec<Reason> = silence(status).into_iter().collect();
    let (chain, sink) = (&status.chain, &status.sink);
    let lag = chain.lag_blocks.unwrap_or(0);
    if lag > expected.lag_blocks {
        let most = expected.lag_blocks;
        reasons.push(because(
            "behind",
            format!("{lag} blocks are not read yet; http.ready_lag_blocks is {most}"),
        ));
    }
    // While it catches up nobody asks for the head.
    let head_age = chain.head_age_seconds.unwrap_or(0);
    if lag == 0 && head_age > expected.head_age.as_secs() {
        reasons.push(because("head_not_seen", format!("the chain's head was seen {head_age} s ago")));
    }
    if chain.retractions_stopped {
        let text =
            "a fork would withdraw more messages than chain.max_retractions_per_minute: reading stands still";
        reasons.push(because("retractions_stopped", text));
    }
    let age = status.events.as_ref().and_then(|events| events.oldest_unblocked_seconds).unwrap_or(0);
    if age > expected.age.as_secs() {
        let most = humantime::format_duration(expected.age);
        let text = format!("the oldest unpublished event is {age} s old; http.ready_age is {most}");
        reasons.push(because("events_wait", text));
    }
    if let Some(since) = sink.outage_since {
        let text = format!("the sink answers nobody for {} s", status.at.saturating_sub(since));
        reasons.push(because("sink_outage", text));
    }
    if sink.stopped {
        let text = "blocked lanes hold as many messages as may be held: nothing is published behind them";
        reasons.push(because("publishing_stopped", text));
    }
    reasons
}

fn silence(status: &Status) -> Option<Reason> {
    let providers = &status.providers;
    let silent = !providers.is_empty() && providers.iter().all(|provider| !provider.answers);
    silent.then(|| because("no_provider", "no provider of rpc.urls answers"))
}

fn warnings(status: &Status) -> Vec<Reason> {
    let mut warnings = Vec::new();
    let blocked = status.sink.blocked_lanes.unwrap_or(0);
    if blocked > 0 {
        warnings
            .push(because("blocked_lanes", format!("the sink refuses the first message of {blocked} lanes")));
    }
    let quarantined = status.events.as_ref().map_or(0, |events| events.quarantined);
    if quarantined > 0 {
        warnings.push(because("quarantined", format!("{quarantined} logs do not decode and are kept aside")));
    }
    warnings
}
