//! What a relayer says of itself: its status is what is so, and its probes tell whether to leave it alone, to wait, or to
//! start it again.

mod common;

use std::path::Path;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use common::pubsub::Code;
use common::relay::faults::{Fault, Faults};
use common::relay::pages::{Pages, reasons};
use common::relay::proxy::Proxy;
use common::relay::{PATIENCE, free_port};
use common::{Answer, Anvil, Chain, PubSub, Setup, World};
use metrics_exporter_prometheus::PrometheusHandle;
use relayer::config::{Config, Sources};
use relayer::status::{Observer, Phase, Status};
use relayer::vitals::{Loop, Vitals};
use relayer::{http, telemetry};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// A world whose relayer publishes to a Pub/Sub that fails as told.
async fn with_pubsub() -> (World, PubSub, Pages) {
    let (mut world, pubsub) = World::new().await.publishing().await;
    world.setup.set("RELAYER_SINK__TIMEOUT", "300ms");
    let pages = Pages::of(&mut world.setup);
    (world, pubsub, pages)
}

#[tokio::test]
async fn the_status_is_what_the_chain_the_registry_and_the_sink_say() {
    let mut world = World::new().await;
    let escrows = world.factory.create_many(3).await;
    for escrow in &escrows {
        escrow.send("approve", &[]).await;
    }
    escrows[0].send("emitTruncatedRelease", &[]).await;
    let proxy = Proxy::start(&world.anvil.url()).await;
    world.setup.set("RPC_URL", proxy.url());
    let pages = Pages::of(&mut world.setup);
    let mut relayer = world.setup.start(&["run"]);
    let lines = relayer.wait_for_lines(6).await;
    pages.wait_ready().await;
    let done = |page: &common::relay::pages::Page| page.json()["events"]["waiting"] == 0;
    let status = pages.wait("/status", "everything acknowledged", done).await.json();

    let head = world.chain.head().await;
    let chain = &status["chain"];
    assert_eq!(status["phase"], "following");
    assert_eq!(status["version"], env!("CARGO_PKG_VERSION"));
    let expected = json!({
        "id": 31337,
        "factory": format!("{:#x}", world.factory.address),
        "start_block": 0,
        "head": head.number,
        "head_age_seconds": chain["head_age_seconds"],
        "horizon": head.number,
        "cursor": { "number": head.number, "hash": format!("{:#x}", head.hash) },
        "finalized": 0,
        "lag_blocks": 0,
        "retractions_stopped": false,
        "factory_without_code": false,
    });
    assert_eq!(*chain, expected);
    assert_eq!(status["escrows"], json!({ "watched": 3, "joining": 0, "archived": 0, "withdrawn": 0 }));

    let events = &status["events"];
    for (key, expected) in
        [("ever", json!(6)), ("quarantined", json!(1)), ("oldest_unpublished_seconds", Value::Null)]
    {
        assert_eq!(events[key], expected, "{key}");
    }
    assert!(events["published_per_second"].as_f64().expect("a number") > 0.0);
    let recent: Vec<Value> = lines
        .iter()
        .rev()
        .map(|line| {
            json!([line.name(), line.attributes["escrow"], line.data["block_number"], line.sequence()])
        })
        .collect();
    let told = events["recent"].as_array().expect("a list").iter();
    let told: Vec<Value> =
        told.map(|it| json!([it["name"], it["escrow"], it["block"], it["sequence"]])).collect();
    assert_eq!(told, recent);

    assert_eq!(status["sink"]["name"], "stdout");
    assert_eq!(
        (&status["sink"]["outage_since"], &status["sink"]["blocked_lanes"]),
        (&Value::Null, &json!(0))
    );
    let provider = json!({
        "place": 0, "url": proxy.url(), "answers": true, "silent_seconds": null, "wrong_chain": false, "lag_blocks": 0,
        "in_use": true,
    });
    assert_eq!(status["providers"], json!([provider]));
    let calls = |requests: Vec<common::relay::proxy::Request>| -> u64 {
        requests.iter().map(|request| request.calls.len() as u64).sum()
    };
    let (before, told) = (calls(proxy.requests()), pages.status().await["rpc_calls"].as_u64());
    // One batch may be under way.
    assert!((before..before + 10).contains(&told.expect("a number")), "{before} calls, and {told:?} told");
    let warned = status["faults"].to_string();
    assert!(warned.contains("A log with a known topic does not decode: it is kept aside"), "{warned}");

    // A program reads it as we wrote it, and a person reads the same.
    let read: Status = serde_json::from_value(status.clone()).expect("a status");
    assert_eq!(serde_json::to_value(&read).expect("JSON"), status);
    assert_eq!(read.phase, Phase::Following);
    let text = read.to_string();
    for line in [
        "following the chain",
        "escrows     3 watched",
        "events      6 ever, 0 waiting, 1 quarantined",
        "lag         0 blocks",
    ] {
        assert!(text.contains(line), "no {line:?} in\n{text}");
    }
    relayer.stop().await;
}

#[tokio::test]
async fn what_a_store_alone_says_is_what_its_relayer_said_last_as_far_as_it_knows() {
    let mut world = World::new().await;
    world.factory.create_many(2).await;
    let pages = Pages::of(&mut world.setup);
    let mut relayer = world.setup.start(&["run"]);
    relayer.wait_for_lines(2).await;
    let done = |page: &common::relay::pages::Page| page.json()["events"]["waiting"] == 0;
    let text = pages.wait("/status", "everything acknowledged", done).await.text;
    let running: Status = serde_json::from_str(&text).expect("a status");
    relayer.stop().await;

    let environment = [
        ("CHAIN_ID", "31337".to_owned()),
        ("CONTRACT_ADDRESS", format!("{}", world.factory.address)),
        ("RPC_URL", world.anvil.url()),
    ];
    let config = config(&environment, &world.setup.path(""));
    let signatures = relayer::signatures(&config).expect("a set");
    let identity = relayer::identity(&config, &signatures);
    let path = world.setup.path("relayer.redb");
    let store =
        relayer::store::Store::open(&path, identity, None, relayer::store::Added::Leave).expect("a store");
    let alone = Status::of_store(&store).expect("it can be read");
    assert_eq!(alone.phase, Phase::Stopped);
    assert_eq!((alone.chain.cursor, alone.escrows), (running.chain.cursor, running.escrows));
    let (alone_events, running_events) = (alone.events.clone().expect("some"), running.events.expect("some"));
    assert_eq!((alone_events.ever, alone_events.recent), (running_events.ever, running_events.recent));
    let unknown = (alone.chain.head, alone.chain.lag_blocks, alone.sink.blocked_lanes, alone.rpc_calls);
    assert_eq!(unknown, (None, None, None, None));
    assert!(alone.to_string().contains("not running: as its store has it"), "{alone}");
}

#[tokio::test]
async fn without_a_node_it_is_starting_and_healthy_and_ready_once_the_node_has_answered() {
    let mut world = World::new().await;
    let faults = Faults::start(&world.anvil.url()).await;
    faults.on_request(|_, _| Fault::Status(503, "", "not now"));
    world.setup.set("RPC_URL", faults.url());
    let pages = Pages::of(&mut world.setup);
    let relayer = world.setup.start(&["run"]);
    let unready = pages.wait_unready("no_provider").await;
    assert_eq!(reasons(&unready), ["starting", "no_provider"]);
    assert_eq!(pages.get("/healthz").await.code, 200);
    assert_eq!(pages.status().await["phase"], "starting");
    faults.heal();
    pages.wait_ready().await;
    relayer.stop().await;
}

#[tokio::test]
async fn without_code_at_the_factorys_address_it_is_not_ready_says_so_and_is_when_there_is() {
    let anvil = Anvil::start().await;
    let chain = Chain::connect(anvil.url()).await;
    let address = chain.account(0).create(0);
    let mut setup = Setup::new(&anvil.url(), address);
    let pages = Pages::of(&mut setup);
    let relayer = setup.start(&["run"]);
    let unready = pages.wait_unready("factory_without_code").await;
    let text = unready.json()["reasons"].to_string();
    assert!(text.contains(&format!("factory {address:#x} has no code")), "{text}");
    assert_eq!(reasons(&unready), ["factory_without_code"]);
    assert_eq!(pages.status().await["chain"]["factory_without_code"], true);
    assert_eq!(pages.get("/healthz").await.code, 200);
    assert_eq!(chain.deploy("EscrowFactory", &[]).await.address, address);
    pages.wait_ready().await;
    assert_eq!(pages.status().await["chain"]["factory_without_code"], false);
    relayer.stop().await;
}

#[tokio::test]
async fn readiness_ends_with_a_silent_provider_or_with_blocks_left_unread_and_comes_back_with_them() {
    let mut world = World::new().await;
    let faults = Faults::start(&world.anvil.url()).await;
    world.setup.set("RPC_URL", faults.url());
    world.setup.set("RELAYER_HTTP__READY_LAG_BLOCKS", 3);
    let pages = Pages::of(&mut world.setup);
    let relayer = world.setup.start(&["run"]);
    pages.wait_ready().await;

    faults.on_request(|_, _| Fault::Status(503, "", "not now"));
    pages.wait_unready("no_provider").await;
    let silent = pages.status().await;
    assert_eq!(
        (&silent["providers"][0]["answers"], &silent["providers"][0]["in_use"]),
        (&json!(false), &json!(true))
    );
    assert_eq!(pages.get("/healthz").await.code, 200, "waiting is no hanging");
    faults.heal();
    pages.wait_ready().await;

    // Heads go on, and logs are not to be had. The blocks are mined while nothing is answered, so that they are seen at
    // once: at one seen in between it would insist on that one's logs, and not learn of the others.
    faults.on_request(|_, _| Fault::Status(503, "", "not now"));
    pages.wait_unready("no_provider").await;
    world.chain.mine(5).await;
    faults.on_request(|_, calls| match calls.iter().any(|call| call["method"] == "eth_getLogs") {
        true => Fault::OneError(-32005, "rate limit exceeded"),
        false => Fault::Pass,
    });
    let behind = pages.wait_unready("behind").await;
    let text = behind.json()["reasons"].to_string();
    assert!(text.contains("http.ready_lag_blocks is 3"), "{text}");
    assert_eq!(pages.status().await["phase"], "catching_up");
    faults.heal();
    pages.wait_ready().await;
    relayer.stop().await;
}

#[tokio::test]
async fn readiness_ends_with_an_outage_of_the_sink_and_with_events_that_wait_and_comes_back_with_it() {
    let (mut world, pubsub, pages) = with_pubsub().await;
    world.setup.set("RELAYER_HTTP__READY_AGE", "1s");
    let relayer = world.setup.start(&["run"]);
    pages.wait_ready().await;
    pubsub.on_publish(|_| Answer::Refuse(Code::PermissionDenied, "this account may not publish".into()));
    world.factory.create_many(3).await;
    pages.wait_unready("sink_outage").await;
    let waiting = pages.wait_unready("events_wait").await;
    assert!(waiting.json()["reasons"].to_string().contains("http.ready_age is 1s"), "{}", waiting.text);
    let status = pages.status().await;
    assert!(status["sink"]["outage_since"].is_u64(), "{status}");
    assert!(status["events"]["oldest_unblocked_seconds"].as_u64() > Some(1), "{status}");
    assert_eq!(pages.get("/healthz").await.code, 200, "waiting is no hanging");
    pubsub.heal();
    pages.wait_ready().await;
    relayer.stop().await;
}

#[tokio::test]
async fn a_blocked_lane_alone_is_a_warning_however_old_its_message() {
    let (mut world, pubsub, pages) = with_pubsub().await;
    world.setup.set("RELAYER_HTTP__READY_AGE", "1s");
    let escrows = world.factory.create_many(3).await;
    let blocked = format!("{:#x}", escrows[0].address);
    let lane = blocked.clone();
    pubsub.on_publish(move |attempt| match attempt.ordering_key == lane {
        true => Answer::Refuse(Code::InvalidArgument, "such a message is not taken".into()),
        false => Answer::Store,
    });
    let relayer = world.setup.start(&["run"]);
    let old = |page: &common::relay::pages::Page| {
        page.json()["events"]["oldest_unpublished_seconds"].as_u64() > Some(2)
    };
    let status = pages.wait("/status", "old", old).await.json();
    assert_eq!(status["events"]["oldest_unblocked_seconds"], Value::Null);
    let [lane] = &status["sink"]["blocked"].as_array().expect("a list")[..] else { panic!("{status}") };
    assert_eq!(lane["lane"], blocked);
    assert!(lane["reason"].as_str().expect("text").contains("such a message is not taken"), "{lane}");
    let readiness = pages.get("/readyz").await;
    assert_eq!(readiness.code, 200, "{}", readiness.text);
    assert_eq!(readiness.json()["warnings"][0]["reason"], "blocked_lanes");
    pubsub.heal();
    relayer.stop().await;
}

#[tokio::test]
async fn a_fork_that_would_withdraw_too_much_makes_it_unready() {
    let mut world = World::new().await;
    world.setup.set("RELAYER_CHAIN__MAX_RETRACTIONS_PER_MINUTE", 0);
    let pages = Pages::of(&mut world.setup);
    let mut relayer = world.setup.start(&["run"]);
    world.factory.create_escrow().await;
    relayer.wait_for_lines(1).await;
    world.chain.reorg(1).await;
    pages.wait_unready("retractions_stopped").await;
    assert_eq!(pages.get("/healthz").await.code, 200);
    relayer.stop().await;
}

#[tokio::test]
async fn a_standby_is_ready_says_that_it_stands_by_and_follows_once_the_other_has_ended() {
    let mut world = World::new().await;
    let snapshots = world.setup.path("snapshots");
    std::fs::create_dir(&snapshots).expect("made");
    world.setup.set("RELAYER_STORAGE__SNAPSHOT_DIR", snapshots.display());
    world.factory.create_escrow().await;
    let first_pages = Pages::of(&mut world.setup);
    let mut first = world.setup.start(&["run"]);
    first.wait_for_lines(1).await;
    first_pages.wait_ready().await;

    let mut setup = world.setup.anew();
    let pages = Pages::of(&mut setup);
    let mut second = setup.start(&["run"]);
    second.wait_logged("standing by").await;
    pages.wait_ready().await;
    assert_eq!(pages.status().await["phase"], "standby");
    assert_eq!(pages.get("/healthz").await.code, 200);
    first.stop().await;
    let follows = |page: &common::relay::pages::Page| page.json()["phase"] == "following";
    pages.wait("/status", "following", follows).await;
    pages.wait_ready().await;
    second.stop().await;
}

#[tokio::test]
async fn while_it_stops_the_probes_are_answered_until_what_is_under_way_is_done() {
    let (mut world, pubsub, pages) = with_pubsub().await;
    world.setup.set("RELAYER_SINK__TIMEOUT", "15s");
    pubsub.on_publish(|_| Answer::Hang);
    let relayer = world.setup.start(&["run"]);
    world.factory.create_escrow().await;
    pubsub.wait_for_requests(1).await;
    tokio::join!(relayer.stop(), async {
        let stopping = pages.wait_unready("stopping").await;
        assert_eq!(reasons(&stopping), ["stopping"]);
        assert_eq!(pages.get("/healthz").await.code, 200);
    });
}

#[tokio::test]
async fn neither_pages_nor_logs_nor_metrics_show_anything_secret_of_an_rpc_url() {
    let mut world = World::new().await;
    world.factory.create_escrow().await;
    let proxy = Proxy::start(&world.anvil.url()).await;
    let secret = |host: &str| format!("http://user:PASSWORD@{host}/v3/SECRETKEY?token=TOKEN");
    let dead = format!("127.0.0.1:{}", free_port());
    let urls = [secret(&dead), secret(proxy.url().trim_start_matches("http://"))];
    world.setup.set("RPC_URL", urls.join(","));
    let pages = Pages::of(&mut world.setup);
    let mut relayer = world.setup.start(&["run"]);
    relayer.wait_for_lines(1).await;
    pages.wait_ready().await;
    let providers = pages.status().await["providers"].clone();
    assert_eq!(providers[0]["url"], format!("http://{dead}/…"), "{providers}");
    assert_eq!((&providers[0]["answers"], &providers[1]["in_use"]), (&json!(false), &json!(true)));
    let mut told = Vec::new();
    for path in ["/", "/healthz", "/readyz", "/status", "/metrics", "/nothing"] {
        told.push((path, pages.get(path).await.text));
    }
    told.push(("the log", relayer.stop().await.stderr));
    assert!(told[3].1.contains("The RPC provider does not answer"), "its fault is shown: {}", told[3].1);
    for (place, text) in told {
        for secret in ["PASSWORD", "SECRETKEY", "TOKEN", "v3/"] {
            assert!(!text.contains(secret), "{secret} in {place}: {text}");
        }
    }
}

fn config(environment: &[(&str, String)], directory: &Path) -> Config {
    let environment = environment.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
    let sources = Sources { environment, directory: directory.to_owned(), ..Sources::default() };
    Config::load(&sources).expect("a configuration").0
}

/// Pages in this process, of a relayer that has only begun to start.
struct Starting {
    vitals: Arc<Vitals>,
    pages: Pages,
}

impl Starting {
    async fn with(vitals: Vitals) -> Starting {
        static METRICS: LazyLock<PrometheusHandle> =
            LazyLock::new(|| telemetry::metrics::install().expect("nothing counts yet"));
        let environment = [
            ("CHAIN_ID", "5".to_owned()),
            ("CONTRACT_ADDRESS", format!("0x{}", "7".repeat(40))),
            ("RPC_URL", "http://127.0.0.1:1".to_owned()),
        ];
        let folder = tempfile::tempdir().expect("a folder can be made");
        let config = config(&environment, folder.path());
        let vitals = Arc::new(vitals);
        let observer = Arc::new(Observer::new(&config, Arc::clone(&vitals)));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("there is a free port");
        let pages = Pages { port: listener.local_addr().expect("it has an address").port() };
        tokio::spawn(http::serve(listener, http::Pages { metrics: METRICS.clone(), observer }));
        Starting { vitals, pages }
    }
}

#[tokio::test]
async fn before_the_store_is_open_every_page_is_answered_healthy_and_not_ready() {
    let Starting { pages, .. } = Starting::with(Vitals::default()).await;
    assert_eq!(pages.get("/healthz").await.code, 200);
    let unready = pages.get("/readyz").await;
    assert_eq!((unready.code, reasons(&unready)), (503, vec!["starting".to_owned()]));
    let status = pages.status().await;
    assert_eq!(
        (&status["phase"], &status["escrows"], &status["events"]),
        (&json!("starting"), &Value::Null, &Value::Null)
    );
    assert!(pages.get("/metrics").await.text.contains("relayer_build_info{version="));
    assert!(pages.get("/").await.text.starts_with("<!doctype html>"));
}

#[tokio::test]
async fn a_loop_that_hangs_makes_it_unhealthy_by_name_until_it_turns_again() {
    let Starting { vitals, pages } = Starting::with(Vitals::patient_for(Duration::from_millis(300))).await;
    let (scan, publish) = (vitals.begin(Loop::Scan), vitals.begin(Loop::Publish));
    let waiting = tokio::spawn(async move {
        publish.while_waiting(std::future::pending::<()>()).await;
    });
    let unhealthy = pages.wait("/healthz", "unhealthy", |page| page.code == 503).await.json();
    waiting.abort();
    let named = unhealthy["hanging"].as_array().expect("a list").iter().any(|it| it["loop"] == "scan");
    assert!(named, "{unhealthy}");
    drop(scan);
    pages.wait("/healthz", "healthy", |page| page.code == 200).await;
}

#[tokio::test]
async fn nothing_but_reading_is_possible_and_what_is_not_there_says_what_is() {
    let Starting { pages, .. } = Starting::with(Vitals::default()).await;
    let http = reqwest::Client::new();
    for method in
        [reqwest::Method::POST, reqwest::Method::PUT, reqwest::Method::DELETE, reqwest::Method::OPTIONS]
    {
        for path in ["/", "/status", "/nothing"] {
            let response = http.request(method.clone(), pages.url(path)).send().await.expect("it answers");
            assert_eq!(response.status(), 405, "{method} {path}");
            assert_eq!(response.headers()["allow"], "GET, HEAD");
        }
    }
    let head = http.head(pages.url("/status")).send().await.expect("it answers");
    assert_eq!((head.status().as_u16(), head.bytes().await.expect("none").len()), (200, 0));
    let nothing = pages.get("/metric").await;
    assert_eq!(nothing.code, 404);
    assert!(nothing.text.contains("/, /healthz, /readyz, /status, /metrics"), "{}", nothing.text);
    for path in ["/", "/status", "/metrics", "/nothing"] {
        let page = pages.get(path).await;
        assert_eq!(page.header("cache-control"), "no-store", "{path}");
        assert_eq!(page.header("x-content-type-options"), "nosniff", "{path}");
        assert!(page.header("content-security-policy").starts_with("default-src 'none'"), "{path}");
    }
    assert_ne!(pages.get("/").await.text, pages.get("/").await.text, "each with a nonce of its own");
}

#[tokio::test]
async fn clients_that_never_finish_keep_nobody_out_and_are_sent_away() {
    let Starting { pages, .. } = Starting::with(Vitals::default()).await;
    let mut clients = Vec::new();
    for _ in 0..200 {
        let mut client = TcpStream::connect(("127.0.0.1", pages.port)).await.expect("it listens");
        client.write_all(b"GET /status HTTP/1.1\r\nX-Slow: ").await.expect("written");
        clients.push(client);
    }
    assert_eq!(pages.get("/healthz").await.code, 200);
    // The first had to make room; the last goes when its time is over.
    for mut client in [clients.remove(0), clients.pop().expect("many")] {
        let read = tokio::time::timeout(PATIENCE, client.read(&mut [0; 16])).await.expect("it is sent away");
        assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
    }
}
