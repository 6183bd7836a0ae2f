//! A generation of the contracts that nobody told the relayer about does not go unseen: it is named, by a run and by
//! `check`. Real contracts that emit it, on a real chain.

mod common;

use alloy::primitives::keccak256;
use common::relay::proxy::{Proxy, Request};
use common::{Setup, World};

const UNKNOWN_RELEASE: &str = "EscrowReleased(address,uint256,uint256,bytes32)";
const LIFECYCLE: &str = r#"["Approved(address indexed approver)", "EscrowReleased(address indexed payee, uint256 amount, uint256 timestamp)", "EscrowReleased(address indexed payee, uint256 amount, uint256 timestamp, bytes32 reason)"]"#;

fn topic(signature: &str) -> String {
    keccak256(signature).to_string()
}

/// Samples as often as a test needs them.
fn sampling(setup: &Setup) -> Setup {
    setup.anew().with("RELAYER_AUDIT__SAMPLE_INTERVAL", "50ms")
}

fn samples(requests: &[Request]) -> usize {
    let calls = requests.iter().flat_map(|request| &request.calls);
    calls.filter(|call| call.method == "eth_getLogs" && call.params[0].get("topics").is_none()).count()
}

#[tokio::test]
async fn an_unknown_event_of_an_escrow_or_of_the_factory_is_named_once_with_the_remedy() {
    let world = World::new().await;
    let escrow = world.factory.create_escrow().await;
    let released = escrow.send("emitUnknown", &[]).await;
    world.factory.send("emitUnknown", &[]).await;
    let proxy = Proxy::start(&world.anvil.url()).await;
    let mut setup = sampling(&world.setup);
    setup.set("RPC_URL", proxy.url());
    let mut relayer = setup.start(&["run"]);
    let said = relayer.wait_logged_times("An event that is not relayed", 2).await;
    let of = |topic0: &str| {
        let found = said.iter().find(|log| log["topic0"] == topic0);
        found.unwrap_or_else(|| panic!("nothing of {topic0}: {said:?}"))
    };
    let of_escrow = of(&topic(UNKNOWN_RELEASE));
    assert_eq!(of_escrow["severity"], "WARNING");
    assert_eq!(of_escrow["emitter"], format!("{:#x}", escrow.address));
    assert_eq!(of_escrow["transaction"], released.transaction_hash.to_string());
    assert!(of_escrow["message"].as_str().is_some_and(|text| text.contains("escrow.events")));
    let of_factory = of(&topic("FeeChanged(uint256)"));
    assert!(of_factory["message"].as_str().is_some_and(|text| text.contains("factory.events")));

    // It goes on looking, and does not say it again. A constructor's EscrowCreated was never worth a word.
    let before = proxy.requests().len();
    proxy.wait_until("three more samples", before, |requests| samples(requests) >= 3).await;
    let finished = relayer.stop().await;
    assert_eq!(finished.logged("An event that is not relayed").len(), 2, "{}", finished.stderr);
}

#[tokio::test]
async fn an_event_that_is_relayed_or_said_not_to_matter_is_no_news() {
    let world = World::new().await;
    let escrow = world.factory.create_escrow().await;
    escrow.send("emitUnknown", &[]).await;
    world.factory.send("emitUnknown", &[]).await;
    let proxy = Proxy::start(&world.anvil.url()).await;
    let setup = sampling(&world.setup)
        .with("RPC_URL", proxy.url())
        .with("RELAYER_ESCROW__EVENTS", LIFECYCLE)
        .with("RELAYER_ESCROW__TERMINAL", "[]")
        .with(
            "RELAYER_AUDIT__IGNORED_EVENTS",
            r#"["FeeChanged(uint256 fee)", "EscrowCreated(address,address,address,uint256,uint256,uint8)"]"#,
        );
    let relayer = setup.start(&["run"]);
    proxy.wait_until("three samples", 0, |requests| samples(requests) >= 3).await;
    let finished = relayer.stop().await;
    assert_eq!(finished.logged("An event that is not relayed").len(), 0, "{}", finished.stderr);
}

#[tokio::test]
async fn by_default_a_sample_is_two_calls_beside_at_the_start_and_off_means_none() {
    let world = World::new().await;
    let escrow = world.factory.create_escrow().await;
    for (interval, expected) in [(None, 1), (Some("off"), 0)] {
        let proxy = Proxy::start(&world.anvil.url()).await;
        let mut setup = world.setup.anew();
        setup.set("RPC_URL", proxy.url());
        if let Some(interval) = interval {
            setup.set("RELAYER_AUDIT__SAMPLE_INTERVAL", interval);
        }
        let mut relayer = setup.start(&["run"]);
        relayer.wait_for_lines(1).await;
        let sampled = |requests: &[Request]| samples(requests) >= expected;
        let idle = |requests: &[Request]| requests.iter().filter(|request| request.is_poll()).count() >= 5;
        let requests = proxy
            .wait_until("the sample, and polls", 0, |requests| sampled(requests) && idle(requests))
            .await;
        relayer.stop().await;
        assert_eq!(samples(&requests), expected, "{interval:?}");
    }
    escrow.send("approve", &[]).await;
}

#[tokio::test]
async fn check_fails_on_a_factory_that_speaks_only_in_unknown_ways() {
    let world = World::new().await;
    let future = world.chain.deploy("FutureFactory", &[]).await;
    let setup = world.setup.anew().with("CONTRACT_ADDRESS", future.address);
    let silent = setup.run(&["check"]).await.good();
    assert!(
        silent.stdout.iter().any(|line| line.starts_with("note") && line.contains("says nothing")),
        "{silent:?}"
    );
    future.send("open", &[]).await;
    world.chain.mine(300).await;
    let topic0 = topic("EscrowOpened(address,address,uint256)");
    // However far back it spoke.
    for max_range in ["2000", "20"] {
        let setup = world
            .setup
            .anew()
            .with("CONTRACT_ADDRESS", future.address)
            .with("START_BLOCK", 1)
            .with("BATCH_SIZE", max_range);
        let failed = setup.run(&["check"]).await.failed_with(1, &[]);
        let said = failed.stdout.join("\n");
        assert!(
            said.contains("none of its events is known") && said.contains(&topic0),
            "{max_range}: {said}"
        );
    }
}

#[tokio::test]
async fn check_notes_an_unknown_event_beside_known_ones_and_passes_when_all_are_known() {
    let world = World::new().await;
    let escrow = world.factory.create_escrow().await;
    escrow.send("approve", &[]).await;
    let known = world.setup.run(&["check"]).await.good();
    assert!(
        known.stdout.iter().any(|line| line.starts_with("ok") && line.contains("all known")),
        "{known:?}"
    );
    escrow.send("emitUnknown", &[]).await;
    let noted = world.setup.run(&["check"]).await.good();
    let line =
        noted.stdout.iter().find(|line| line.contains("known ones and others")).expect("a line on them");
    assert!(line.starts_with("note") && line.contains(&topic(UNKNOWN_RELEASE)), "{line}");
}

#[tokio::test]
async fn a_node_that_refuses_samples_changes_nothing() {
    let world = World::new().await;
    let escrows = world.factory.create_many(3).await;
    let refuse = |calls: &[common::relay::proxy::Call]| {
        calls.iter().any(|call| call.method == "eth_getLogs" && call.params[0].get("topics").is_none())
    };
    let proxy = Proxy::refusing(&world.anvil.url(), refuse).await;
    let mut setup = sampling(&world.setup);
    setup.set("RPC_URL", proxy.url());
    let mut relayer = setup.start(&["run"]);
    for escrow in &escrows {
        escrow.send("approve", &[]).await;
    }
    relayer.wait_for_lines(6).await;
    proxy.wait_until("samples", 0, |requests| samples(requests) >= 3).await;
    escrows[0].send("release", &[]).await;
    relayer.wait_for_lines(7).await;
    let finished = relayer.stop().await;
    world.truth().await.assert_is(&finished.lines());
    let worried = |log: &serde_json::Value| log["severity"] == "WARNING" || log["severity"] == "ERROR";
    assert!(!finished.logs().iter().any(worried), "{}", finished.stderr);
}
