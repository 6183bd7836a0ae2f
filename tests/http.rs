//! The metrics as a Prometheus server would fetch them from a relayer at work: well-formed, true, and without secrets.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use common::relay::proxy::Proxy;
use common::relay::{PATIENCE, free_port};
use common::{Setup, World};
use relayer::telemetry::metrics::{ALL, Kind};

/// Samples by name and labels, as written.
struct Metrics {
    text: String,
    samples: BTreeMap<String, f64>,
}

impl Metrics {
    /// Panics unless every line is of the text format, and every sample has a HELP and a TYPE before it.
    fn parse(text: String) -> Metrics {
        let (mut helped, mut typed) = (BTreeSet::new(), BTreeMap::new());
        let mut samples = BTreeMap::new();
        for line in text.lines().filter(|line| !line.is_empty()) {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, help) = rest.split_once(' ').expect("a help has words");
                assert!(!help.is_empty() && helped.insert(name.to_owned()), "{line}");
                continue;
            }
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').expect("a type has a kind");
                assert!(matches!(kind, "counter" | "gauge" | "histogram"), "{line}");
                assert!(typed.insert(name.to_owned(), kind.to_owned()).is_none(), "{line}");
                continue;
            }
            let (key, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("no sample: {line}"));
            let name = key.split('{').next().expect("a name");
            let family = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| {
                let family = name.strip_suffix(suffix)?;
                typed.get(family).filter(|kind| *kind == "histogram").map(|_| family)
            });
            let family = family.unwrap_or(name);
            assert!(
                typed.contains_key(family) && helped.contains(family),
                "{line}: no HELP or TYPE before it"
            );
            let value = value.parse().unwrap_or_else(|_| panic!("no number: {line}"));
            assert!(samples.insert(key.to_owned(), value).is_none(), "twice: {line}");
        }
        Metrics { text, samples }
    }

    async fn fetch(port: u16) -> Metrics {
        let response = reqwest::get(format!("http://127.0.0.1:{port}/metrics")).await.expect("it answers");
        assert_eq!(response.status(), 200);
        let kind = response.headers()["content-type"].to_str().expect("text").to_owned();
        assert!(kind.starts_with("text/plain; version=0.0.4"), "{kind}");
        Self::parse(response.text().await.expect("text"))
    }

    async fn wait(port: u16, wanted: &str, is_so: impl Fn(&Metrics) -> bool) -> Metrics {
        let wait = async {
            loop {
                let metrics = Self::fetch(port).await;
                if is_so(&metrics) {
                    return metrics;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        match tokio::time::timeout(PATIENCE, wait).await {
            Ok(metrics) => metrics,
            Err(_) => panic!("not {wanted}:\n{}", Self::fetch(port).await.text),
        }
    }

    fn get(&self, key: &str) -> f64 {
        *self.samples.get(key).unwrap_or_else(|| panic!("no {key} in\n{}", self.text))
    }
}

fn with_pages(setup: &Setup) -> (Setup, u16) {
    let port = free_port();
    let setup = setup.anew().with("RELAYER_HTTP__LISTEN", format!("127.0.0.1:{port}"));
    (setup, port)
}

#[tokio::test]
async fn the_metrics_are_well_formed_agree_with_what_happened_and_name_no_escrow_and_no_key() {
    let world = World::new().await;
    let escrows = world.factory.create_many(3).await;
    for escrow in &escrows {
        escrow.send("approve", &[]).await;
    }
    escrows[0].send("emitTruncatedRelease", &[]).await;
    escrows[1].send("emitUnknown", &[]).await;
    let proxy = Proxy::start(&world.anvil.url()).await;
    let (mut setup, port) = with_pages(&world.setup);
    setup.set("RPC_URL", format!("{}/v3/0123456789abcdefSECRET", proxy.url()));
    setup.set("RELAYER_AUDIT__SAMPLE_INTERVAL", "50ms");
    let mut relayer = setup.start(&["run"]);
    relayer.wait_for_lines(6).await;
    let done = |metrics: &Metrics| {
        metrics.get("relayer_published_events_total") == 6.0
            && metrics.get("relayer_unknown_topic_logs_total") >= 1.0
    };
    let metrics = Metrics::wait(port, "everything published, and sampled", done).await;
    let head = world.chain.block_number().await as f64;
    let table = [
        ("relayer_head_block", head),
        ("relayer_cursor_block", head),
        ("relayer_events_total{event=\"EscrowDeployed\"}", 3.0),
        ("relayer_events_total{event=\"Approved\"}", 3.0),
        ("relayer_late_events_total", 0.0),
        ("relayer_retractions_total", 0.0),
        ("relayer_retractions_stopped", 0.0),
        ("relayer_quarantined_logs_total", 1.0),
        ("relayer_escrows", 3.0),
        ("relayer_waiting_events", 0.0),
        ("relayer_blocked_lanes", 0.0),
        ("relayer_sink_outage", 0.0),
        ("relayer_provider_in_use", 0.0),
        ("relayer_lag_blocks", 0.0),
        ("relayer_oldest_unpublished_seconds", 0.0),
        ("relayer_registered_escrows{state=\"watched\"}", 3.0),
        ("relayer_registered_escrows{state=\"joining\"}", 0.0),
        ("relayer_registered_escrows{state=\"archived\"}", 0.0),
        ("relayer_registered_escrows{state=\"withdrawn\"}", 0.0),
        ("relayer_quarantined_logs", 1.0),
        (concat!("relayer_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"}"), 1.0),
    ];
    for (key, expected) in table {
        assert_eq!(metrics.get(key), expected, "{key}");
    }
    assert!(metrics.get("relayer_rpc_calls_total{method=\"eth_getLogs\",outcome=\"answered\"}") >= 2.0);
    for name in ["relayer_publish_seconds_count", "relayer_rpc_request_seconds_count"] {
        assert!(metrics.get(name) > 0.0, "{name}");
    }
    for escrow in &escrows {
        assert!(!metrics.text.contains(&format!("{:x}", escrow.address)), "{}", metrics.text);
    }
    assert!(!metrics.text.contains("SECRET") && !metrics.text.contains("v3"), "{}", metrics.text);

    // Every metric in the table is there, of its kind, and there is no other.
    let types = metrics.text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    let types: BTreeSet<(&str, &str)> = types.filter_map(|line| line.split_once(' ')).collect();
    let kind = |kind| match kind {
        Kind::Counter => "counter",
        Kind::Gauge => "gauge",
        Kind::Histogram => "histogram",
    };
    assert_eq!(types, ALL.iter().map(|(name, of, _)| (*name, kind(*of))).collect());

    world.chain.reorg(3).await;
    Metrics::wait(port, "a retraction", |metrics| metrics.get("relayer_retractions_total") > 0.0).await;
    relayer.stop().await;
}

#[tokio::test]
async fn an_address_that_cannot_be_had_is_said_and_the_relay_goes_on() {
    let world = World::new().await;
    world.factory.create_escrow().await;
    let (setup, port) = with_pages(&world.setup);
    let _taken = std::net::TcpListener::bind(("127.0.0.1", port)).expect("it was free");
    let mut relayer = setup.start(&["run"]);
    let said = relayer.wait_logged("http.listen").await;
    assert_eq!(said["severity"], "WARNING");
    relayer.wait_for_lines(1).await;
    relayer.stop().await;
}

#[tokio::test]
async fn a_client_that_hangs_does_not_hold_up_the_end() {
    use tokio::io::AsyncWriteExt;
    let world = World::new().await;
    world.factory.create_escrow().await;
    let (setup, port) = with_pages(&world.setup);
    let mut relayer = setup.start(&["run"]);
    relayer.wait_logged("Pages: ").await;
    let mut client = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.expect("it listens");
    client.write_all(b"GET /metrics HTTP/1.1\r\n").await.expect("written");
    relayer.stop().await;
}
