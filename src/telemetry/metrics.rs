//! The metrics: one table of names, and one small function for each fact, which whoever knows it calls.
//!
//! No label names an escrow: what labels there are take few values. Where no recorder is installed (tests, `check`)
//! nothing is counted.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use metrics::{Unit, counter, gauge, histogram};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};

/// What a metric measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// How long something took, in seconds.
    Histogram,
}

/// Name, kind and help of every metric.
pub const ALL: &[(&str, Kind, &str)] = &[
    ("relayer_head_block", Kind::Gauge, "The number of the newest block the node has shown."),
    ("relayer_cursor_block", Kind::Gauge, "The number of the last block accepted."),
    ("relayer_events_total", Kind::Counter, "Events accepted, by their name."),
    ("relayer_late_events_total", Kind::Counter, "Events found in history that was read once more."),
    ("relayer_retractions_total", Kind::Counter, "Messages withdrawn because their block left the chain."),
    ("relayer_retractions_stopped", Kind::Gauge, "1 while a fork would withdraw more than may be withdrawn."),
    ("relayer_quarantined_logs_total", Kind::Counter, "Logs with a known topic that did not decode."),
    ("relayer_unknown_topic_logs_total", Kind::Counter, "Logs in samples whose topic0 no signature knows."),
    ("relayer_audited_blocks_total", Kind::Counter, "Blocks read again once they were final."),
    ("relayer_audit_missed_events_total", Kind::Counter, "Events found by the audit, published as late."),
    ("relayer_audit_extra_events_total", Kind::Counter, "Events relayed that the audit did not find again."),
    (
        "relayer_audit_escrow_count_differs",
        Kind::Gauge,
        "1 while the factory counts other escrows than the store.",
    ),
    ("relayer_audit_event_counts_total", Kind::Counter, "Escrows that count other events than were relayed."),
    ("relayer_pruned_entries_total", Kind::Counter, "Published and final messages removed from the store."),
    ("relayer_snapshots_total", Kind::Counter, "Snapshots of the store that were made."),
    ("relayer_snapshot_failures_total", Kind::Counter, "Snapshots that could not be made."),
    (
        "relayer_snapshot_timestamp_seconds",
        Kind::Gauge,
        "When this process made its last snapshot, seconds since 1970.",
    ),
    ("relayer_escrows", Kind::Gauge, "Escrows that are watched."),
    ("relayer_waiting_events", Kind::Gauge, "Events stored and not acknowledged."),
    ("relayer_published_events_total", Kind::Counter, "Events acknowledged by the sink."),
    ("relayer_blocked_lanes", Kind::Gauge, "Lanes whose first message is refused."),
    ("relayer_sink_outage", Kind::Gauge, "1 while the sink answers nobody."),
    (
        "relayer_publish_seconds",
        Kind::Histogram,
        "How long a run of messages took to be acknowledged or refused.",
    ),
    ("relayer_commit_seconds", Kind::Histogram, "How long a commit took, by what it stored."),
    ("relayer_rpc_calls_total", Kind::Counter, "JSON-RPC calls, by method and by what came of them."),
    ("relayer_rpc_request_seconds", Kind::Histogram, "How long a request to a node took."),
    ("relayer_provider_answers", Kind::Gauge, "1 while that provider answers, by its place in rpc.urls."),
    (
        "relayer_provider_lag_blocks",
        Kind::Gauge,
        "Blocks that provider is behind the newest told by another.",
    ),
    ("relayer_provider_in_use", Kind::Gauge, "The place in rpc.urls of the provider asked, from 0."),
    ("relayer_lag_blocks", Kind::Gauge, "Blocks that may be read and are not accepted yet."),
    ("relayer_head_age_seconds", Kind::Gauge, "How long ago the newest block was shown last."),
    ("relayer_finalized_block", Kind::Gauge, "The number of the highest block known to be final."),
    (
        "relayer_oldest_unpublished_seconds",
        Kind::Gauge,
        "The age of the oldest event not acknowledged, or 0.",
    ),
    ("relayer_registered_escrows", Kind::Gauge, "Escrows by state."),
    ("relayer_quarantined_logs", Kind::Gauge, "Logs that did not decode and are kept aside."),
    ("relayer_start_time_seconds", Kind::Gauge, "When the process started, in seconds since 1970."),
    ("relayer_build_info", Kind::Gauge, "1, with the version of the program."),
];

/// Bounds of the histograms' buckets, in seconds: from a commit to a request that times out.
const BUCKETS: [f64; 14] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0];

/// Counts from now on. `None` if something in this process counts already.
pub fn install() -> Option<PrometheusHandle> {
    let builder = PrometheusBuilder::new().set_buckets(&BUCKETS).expect("there are buckets");
    let recorder = builder.build_recorder();
    let handle = recorder.handle();
    ::metrics::set_global_recorder(recorder).ok()?;
    for &(name, kind, help) in ALL {
        match kind {
            Kind::Counter => ::metrics::describe_counter!(name, help),
            Kind::Gauge => ::metrics::describe_gauge!(name, help),
            Kind::Histogram => ::metrics::describe_histogram!(name, Unit::Seconds, help),
        }
    }
    // What has not happened yet is 0, not missing: an alert can tell the two apart.
    for name in [
        "relayer_late_events_total",
        "relayer_retractions_total",
        "relayer_quarantined_logs_total",
        "relayer_unknown_topic_logs_total",
        "relayer_audited_blocks_total",
        "relayer_audit_missed_events_total",
        "relayer_audit_extra_events_total",
        "relayer_audit_event_counts_total",
        "relayer_pruned_entries_total",
        "relayer_snapshots_total",
        "relayer_snapshot_failures_total",
        "relayer_published_events_total",
    ] {
        counter!(name).increment(0);
    }
    for name in [
        "relayer_blocked_lanes",
        "relayer_sink_outage",
        "relayer_provider_in_use",
        "relayer_retractions_stopped",
        "relayer_audit_escrow_count_differs",
        "relayer_snapshot_timestamp_seconds",
    ] {
        gauge!(name).set(0.0);
    }
    reading(Some(0), Some(0), Some(0));
    kept(None, 0);
    registered([("watched", 0), ("joining", 0), ("archived", 0), ("withdrawn", 0)]);
    gauge!("relayer_build_info", "version" => env!("CARGO_PKG_VERSION")).set(1.0);
    gauge!("relayer_start_time_seconds").set(unix_time());
    Some(handle)
}

/// The newest block the node has shown.
pub fn head(block: u64) {
    gauge!("relayer_head_block").set(block as f64);
}

/// Where the store stands.
pub fn stored(cursor: Option<u64>, escrows: usize, waiting: u64) {
    if let Some(cursor) = cursor {
        gauge!("relayer_cursor_block").set(cursor as f64);
    }
    gauge!("relayer_escrows").set(escrows as f64);
    gauge!("relayer_waiting_events").set(waiting as f64);
}

/// Events were accepted, by their names: these come from the configuration, and are few.
pub fn events<'a>(names: impl Iterator<Item = &'a str>) {
    let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
    names.for_each(|name| *counts.entry(name).or_default() += 1);
    for (name, count) in counts {
        counter!("relayer_events_total", "event" => name.to_owned()).increment(count);
    }
}

/// Events found in history that was read once more.
pub fn late_events(events: usize) {
    counter!("relayer_late_events_total").increment(events as u64);
}

/// Whether a fork waits because it would withdraw more than may be withdrawn in a minute.
pub fn retractions_stopped(stopped: bool) {
    gauge!("relayer_retractions_stopped").set(if stopped { 1.0 } else { 0.0 });
}

/// Messages were withdrawn.
pub fn retracted(messages: usize) {
    counter!("relayer_retractions_total").increment(messages as u64);
}

/// Blocks were read again.
pub fn audited(blocks: u64, missed: usize, extra: usize) {
    counter!("relayer_audited_blocks_total").increment(blocks);
    counter!("relayer_audit_missed_events_total").increment(missed as u64);
    counter!("relayer_audit_extra_events_total").increment(extra as u64);
}

/// Whether the factory counts other escrows than the registry has.
pub fn escrow_count_differs(differs: bool) {
    gauge!("relayer_audit_escrow_count_differs").set(if differs { 1.0 } else { 0.0 });
}

/// An escrow counts other events than were relayed.
pub fn event_count_differs() {
    counter!("relayer_audit_event_counts_total").increment(1);
}

/// Entries were pruned.
pub fn pruned(entries: usize) {
    counter!("relayer_pruned_entries_total").increment(entries as u64);
}

/// A snapshot was made.
pub fn snapshot_made() {
    counter!("relayer_snapshots_total").increment(1);
    gauge!("relayer_snapshot_timestamp_seconds").set(unix_time());
}

/// In seconds since 1970.
fn unix_time() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// A snapshot could not be made.
pub fn snapshot_failed() {
    counter!("relayer_snapshot_failures_total").increment(1);
}

/// Logs did not decode.
pub fn quarantined(logs: usize) {
    counter!("relayer_quarantined_logs_total").increment(logs as u64);
}

/// A sample showed logs that no signature knows.
pub fn unknown_topic(logs: u64) {
    counter!("relayer_unknown_topic_logs_total").increment(logs);
}

/// The sink acknowledged, and the store committed it.
pub fn published(events: usize) {
    counter!("relayer_published_events_total").increment(events as u64);
}

/// How many lanes are blocked, and whether the sink answers nobody.
pub fn sink(blocked: usize, outage: bool) {
    gauge!("relayer_blocked_lanes").set(blocked as f64);
    gauge!("relayer_sink_outage").set(f64::from(u8::from(outage)));
}

/// A run of messages was acknowledged or refused.
pub fn publish_took(time: Duration) {
    histogram!("relayer_publish_seconds").record(time);
}

/// A commit took so long. `what`: blocks, acknowledgements.
pub fn commit_took(what: &'static str, time: Duration) {
    histogram!("relayer_commit_seconds", "what" => what).record(time);
}

/// A JSON-RPC call was answered, or what came instead.
pub fn rpc_call(method: &'static str, outcome: &'static str) {
    counter!("relayer_rpc_calls_total", "method" => method, "outcome" => outcome).increment(1);
}

/// A request to a node took so long.
pub fn rpc_request_took(time: Duration) {
    histogram!("relayer_rpc_request_seconds").record(time);
}

/// Whether a provider answers.
pub fn provider_answers(index: usize, answers: bool) {
    gauge!("relayer_provider_answers", "provider" => index.to_string()).set(if answers { 1.0 } else { 0.0 });
}

/// How far a provider is behind the others.
pub fn provider_lag(index: usize, blocks: u64) {
    gauge!("relayer_provider_lag_blocks", "provider" => index.to_string()).set(blocks as f64);
}

/// Which provider is asked.
pub fn provider_in_use(index: usize) {
    gauge!("relayer_provider_in_use").set(index as f64);
}

/// How far reading is, as far as is known.
pub fn reading(lag_blocks: Option<u64>, head_age_seconds: Option<u64>, finalized: Option<u64>) {
    let known = [
        ("relayer_lag_blocks", lag_blocks),
        ("relayer_head_age_seconds", head_age_seconds),
        ("relayer_finalized_block", finalized),
    ];
    for (name, value) in known {
        if let Some(value) = value {
            gauge!(name).set(value as f64);
        }
    }
}

/// Escrows by state.
pub fn registered(states: [(&'static str, usize); 4]) {
    for (state, escrows) in states {
        gauge!("relayer_registered_escrows", "state" => state).set(escrows as f64);
    }
}

/// What the store keeps: the age of the oldest event not acknowledged, and logs that did not decode.
pub fn kept(oldest_seconds: Option<u64>, quarantined: u64) {
    gauge!("relayer_oldest_unpublished_seconds").set(oldest_seconds.unwrap_or(0) as f64);
    gauge!("relayer_quarantined_logs").set(quarantined as f64);
}
