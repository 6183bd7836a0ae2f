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
    if chain.factory_without_code {
        let text = format!(
            "factory {:#x} has no code: nothing is read before there is a contract; a wrong factory.address, or a node \
             that is still syncing",
            chain.factory
        );
        reasons.push(because("factory_without_code", text));
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
        warnings.push(because("blocked_lanes", format!("lanes whose first message is refused: {blocked}")));
    }
    let quarantined = status.events.as_ref().map_or(0, |events| events.quarantined);
    if quarantined > 0 {
        warnings.push(because(
            "quarantined",
            format!("logs kept aside because they do not decode: {quarantined}"),
        ));
    }
    warnings
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use alloy::primitives::Address;

    use super::*;
    use crate::status::{ChainStatus, Events, Provider, SinkStatus};
    use crate::vitals::BlockedLane;

    const EXPECTED: Expectations =
        Expectations { lag_blocks: 100, age: Duration::from_secs(120), head_age: Duration::from_secs(120) };

    /// Of a relayer that follows the chain, with nothing to complain of.
    fn well() -> Status {
        Status {
            version: "1.0.0".into(),
            phase: Phase::Following,
            lease_holder: None,
            at: 1_000_000,
            uptime_seconds: Some(60),
            chain: ChainStatus {
                id: 1,
                factory: Address::ZERO,
                start_block: Some(0),
                head: Some(102),
                head_age_seconds: Some(120),
                horizon: Some(100),
                cursor: None,
                finalized: None,
                lag_blocks: Some(0),
                retractions_stopped: false,
                factory_without_code: false,
            },
            escrows: None,
            events: Some(Events {
                ever: 10,
                waiting: 1,
                oldest_unpublished_seconds: Some(120),
                oldest_unblocked_seconds: Some(120),
                published_per_second: None,
                quarantined: 0,
                recent: Vec::new(),
            }),
            sink: SinkStatus {
                name: "stdout".into(),
                outage_since: None,
                blocked_lanes: Some(0),
                blocked: Vec::new(),
                stopped: false,
            },
            late_reads: Vec::new(),
            audit: None,
            providers: vec![provider(false), provider(true)],
            rpc_calls: None,
            faults: Vec::new(),
        }
    }

    fn provider(answers: bool) -> Provider {
        Provider {
            place: 0,
            url: "http://a".into(),
            answers,
            silent_seconds: None,
            wrong_chain: false,
            lag_blocks: 0,
            in_use: answers,
        }
    }

    fn reasons(change: impl FnOnce(&mut Status)) -> Vec<&'static str> {
        let mut status = well();
        change(&mut status);
        let Readiness { ready, reasons, .. } = readiness(&status, &EXPECTED);
        assert_eq!(ready, reasons.is_empty());
        reasons.into_iter().map(|it| it.reason).collect()
    }

    fn events(status: &mut Status) -> &mut Events {
        status.events.as_mut().unwrap()
    }

    #[test]
    fn each_trouble_keeps_it_from_being_ready_and_is_named_and_its_bounds_are_exact() {
        assert_eq!(reasons(|_| {}), [""; 0]);
        assert_eq!(reasons(|it| it.chain.lag_blocks = Some(100)), [""; 0]);
        assert_eq!(reasons(|it| it.chain.lag_blocks = Some(101)), ["behind"]);
        assert_eq!(reasons(|it| it.chain.head_age_seconds = Some(121)), ["head_not_seen"]);
        assert_eq!(reasons(|it| it.chain.retractions_stopped = true), ["retractions_stopped"]);
        assert_eq!(reasons(|it| it.chain.factory_without_code = true), ["factory_without_code"]);
        assert_eq!(reasons(|it| events(it).oldest_unblocked_seconds = Some(121)), ["events_wait"]);
        assert_eq!(reasons(|it| it.sink.outage_since = Some(999_990)), ["sink_outage"]);
        assert_eq!(reasons(|it| it.sink.stopped = true), ["publishing_stopped"]);
        assert_eq!(reasons(|it| it.providers[1].answers = false), ["no_provider"]);
        assert_eq!(reasons(|it| it.phase = Phase::Starting), ["starting"]);
        assert_eq!(reasons(|it| it.phase = Phase::Stopping), ["stopping"]);
        let worse = |it: &mut Status| {
            it.phase = Phase::CatchingUp;
            it.chain.lag_blocks = Some(5_000);
            it.sink.outage_since = Some(0);
        };
        assert_eq!(reasons(worse), ["behind", "sink_outage"], "all at once");
        assert!(!store_failed("the store failed: no space").ready);
    }

    #[test]
    fn while_it_catches_up_a_head_seen_long_ago_is_no_reason() {
        let far = |it: &mut Status| {
            it.chain.lag_blocks = Some(50);
            it.chain.head_age_seconds = Some(5_000);
        };
        assert_eq!(reasons(far), [""; 0]);
    }

    #[test]
    fn a_standby_is_ready_whatever_it_does_not_know() {
        let standby = |it: &mut Status| {
            it.phase = Phase::Standby;
            it.chain.lag_blocks = None;
            it.events = None;
            it.providers = Vec::new();
        };
        assert_eq!(reasons(standby), [""; 0]);
    }

    #[test]
    fn a_blocked_lane_and_what_does_not_decode_are_warnings_and_no_reasons() {
        let mut status = well();
        status.sink.blocked_lanes = Some(1);
        status.sink.blocked = vec![BlockedLane { lane: "0x01".into(), reason: "too large".into(), since: 0 }];
        let events = events(&mut status);
        (events.oldest_unpublished_seconds, events.oldest_unblocked_seconds) = (Some(1_000_000), None);
        events.quarantined = 3;
        let Readiness { ready, warnings, .. } = readiness(&status, &EXPECTED);
        assert!(ready);
        let warned: Vec<_> = warnings.iter().map(|it| (it.reason, it.text.as_str())).collect();
        let expected = [
            ("blocked_lanes", "lanes whose first message is refused: 1"),
            ("quarantined", "logs kept aside because they do not decode: 3"),
        ];
        assert_eq!(warned, expected);
    }
}
