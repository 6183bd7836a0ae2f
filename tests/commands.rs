//! The operator's commands, beside a running relayer and on its file: both say the same, and do the same.

mod common;

use std::collections::BTreeSet;

use alloy::dyn_abi::DynSolValue;
use alloy::primitives::{Address, B256, keccak256};
use common::pubsub::Code;
use common::relay::{Finished, PATIENCE, Running, by_key, firsts};
use common::{Answer, Contract, Line, PubSub, Setup, World};
use serde_json::{Value, json};

/// A world whose relayer publishes to a Pub/Sub server.
async fn with_pubsub() -> (World, PubSub) {
    World::new().await.publishing().await
}

fn json_of(finished: &Finished) -> Value {
    serde_json::from_str(&finished.stdout.join("\n")).expect("JSON on stdout")
}

async fn json(setup: &Setup, args: &[&str]) -> Value {
    json_of(&setup.run(args).await.good())
}

fn is_marked(line: &Line, attribute: &str) -> bool {
    line.attributes.get(attribute).is_some_and(|value| value == "true")
}

fn lines(pubsub: &PubSub) -> Vec<Line> {
    pubsub.messages().iter().map(Line::of).collect()
}

/// The relayer's own socket answers: from then on commands go through it.
async fn started(setup: &Setup) -> Running {
    let mut relayer = setup.start(&["run"]);
    relayer.wait_logged("Relaying from block").await;
    relayer
}

#[tokio::test]
async fn escrows_and_status_are_told_beside_a_running_relayer_as_on_its_file() {
    let world = World::new().await;
    let setup = &world.setup;
    let escrows = world.factory.create_many(7).await;
    setup.run(&["status"]).await.failed_with(2, &["does not exist"]);
    let mut relayer = started(setup).await;
    relayer.wait_for_lines(7).await;
    let told = async || {
        let listed = json(setup, &["escrows", "list", "--json"]).await;
        let table = setup.run(&["escrows", "list"]).await.good().stdout;
        let exported = setup.run(&["escrows", "export"]).await.good();
        (listed, table, exported.stdout.join("\n"))
    };
    let beside = told().await;
    let status = json(setup, &["status", "--json"]).await;
    assert!(status["uptime_seconds"].is_u64() && status["chain"]["cursor"].is_object(), "{status}");
    setup.run(&["status"]).await.good_with_stdout(&["following the chain"]);
    relayer.stop().await;
    assert_eq!(told().await, beside);
    assert_eq!(beside.0.as_array().map(Vec::len), Some(escrows.len()));
    assert_eq!(beside.1.len(), escrows.len() + 1);
    let status = json(setup, &["status", "--json"]).await;
    assert_eq!((&status["phase"], &status["uptime_seconds"]), (&json!("stopped"), &Value::Null));
}

/// An escrow that its factory never announced, with this many approvals.
async fn silent_escrow(world: &World, approvals: usize) -> Contract {
    let receipt = world.factory.send("createSilently", &world.factory.escrow_args()).await;
    let escrow = world.chain.at("Escrow", receipt.logs.first().expect("its constructor speaks").address);
    for _ in 0..approvals {
        escrow.send("approve", &[]).await;
    }
    escrow
}

fn registry_file(setup: &Setup, escrows: &[Address]) -> String {
    let file = setup.path("registry.json");
    let text = json!({ "escrows": escrows, "count": escrows.len() }).to_string();
    std::fs::write(&file, text).expect("written");
    file.to_str().expect("a plain path").to_owned()
}

#[tokio::test]
async fn imported_beside_a_running_relayer_an_escrow_comes_with_its_past_as_late_and_is_watched() {
    let world = World::new().await;
    let (old, new) = (silent_escrow(&world, 3).await, silent_escrow(&world, 2).await);
    let mut relayer = started(&world.setup).await;
    relayer.wait_read(world.chain.block_number().await).await;
    let import = async |escrow: &Contract, from: u64| {
        let file = registry_file(&world.setup, &[escrow.address]);
        world.setup.run(&["escrows", "import", &file, "--from", &from.to_string()]).await
    };
    let imported = import(&old, 0).await.good();
    assert!(imported.stderr.contains("1 escrows registered, 0 were already"), "{}", imported.stderr);
    assert!(imported.stderr.contains("The relayer that runs"), "{}", imported.stderr);
    let late = relayer.wait_for_lines(3).await;
    assert!(late.iter().all(|line| is_marked(line, "late")));
    let next = world.chain.block_number().await + 1;
    // From the next block on: nothing of its past.
    import(&new, next).await.good();
    import(&new, next + 100).await.failed_with(2, &["the store has not got there"]);
    relayer.wait_logged_times("The history is read", 2).await;
    old.send("approve", &[]).await;
    new.send("approve", &[]).await;
    let lines = relayer.wait_for_lines(5).await;
    assert!(!lines[3..].iter().any(|line| is_marked(line, "late")));
    let finished = relayer.stop().await;
    let keys: BTreeSet<String> = by_key(&finished.lines()).into_keys().collect();
    assert_eq!(keys, BTreeSet::from([old, new].map(|escrow| format!("{:#x}", escrow.address))));
    assert_eq!(world.setup.run_to_head().await, []);
}

#[tokio::test]
async fn discover_tells_which_escrows_the_registry_has_and_registers_and_publishes_nothing() {
    let world = World::new().await;
    let setup = world.setup.anew().with("RELAYER_RPC__MAX_RANGE", 2);
    let first = world.factory.create_many(3).await;
    let states = async |args: &[&str]| {
        let found = json(&setup, &[&["escrows", "discover", "--json"], args].concat()).await;
        let rows = found.as_array().expect("an array").clone();
        rows.into_iter().map(|row| (row["address"].clone(), row["state"].clone())).collect::<Vec<_>>()
    };
    let told = |escrow: &Contract, state: Value| (json!(format!("{:#x}", escrow.address)), state);
    let expected: Vec<_> = first.iter().map(|escrow| told(escrow, Value::Null)).collect();
    assert_eq!(states(&[]).await, expected);
    assert!(!setup.path("relayer.redb").exists(), "nothing is made");

    let lines = setup.run_to_head().await;
    assert_eq!(lines.len(), 3);
    let later = world.factory.create_escrow().await;
    let all = [&first[..], &[later]].concat();
    let state = |index: usize| if index < 3 { json!("active") } else { Value::Null };
    let expected: Vec<_> = all.iter().enumerate().map(|(index, it)| told(it, state(index))).collect();
    assert_eq!(states(&[]).await, expected);
    let head = world.chain.block_number().await.to_string();
    assert_eq!(states(&["--from", &head]).await, expected[3..]);
    let before = (world.chain.block_number().await - 1).to_string();
    assert_eq!(states(&["--to", &before]).await, expected[..3]);

    let mut relayer = started(&setup).await;
    relayer.wait_for_lines(1).await;
    assert!(states(&[]).await.iter().all(|(_, state)| state == "active"));
    let finished = setup.run(&["escrows", "discover"]).await.good_with_stdout(&["active"]);
    assert!(finished.stderr.contains("0 of escrows not in the registry"), "{}", finished.stderr);
    assert_eq!(relayer.stop().await.lines().len(), 1);
}

/// Refuses what has this ordering key.
fn refuse(pubsub: &PubSub, escrow: &Contract) {
    let key = format!("{:#x}", escrow.address);
    pubsub.on_publish(move |attempt| match attempt.ordering_key == key {
        true => Answer::Refuse(Code::InvalidArgument, "not this one".into()),
        false => Answer::Store,
    });
}

/// What the outbox holds once so many lanes are noted as blocked: that is a moment after it is logged.
async fn blocked(setup: &Setup, lanes: u64) -> Value {
    let looked = async {
        loop {
            let outbox = json(setup, &["outbox", "list", "--json"]).await;
            if outbox["totals"]["blocked"] == lanes {
                return outbox;
            }
        }
    };
    tokio::time::timeout(PATIENCE, looked).await.unwrap_or_else(|_| panic!("{lanes} lanes never are blocked"))
}

#[tokio::test]
async fn a_blocked_message_is_told_with_its_reason_and_goes_out_at_once_when_retried_after_the_fault() {
    let (world, pubsub) = with_pubsub().await;
    let (setup, refused) = (&world.setup, world.factory.create_escrow().await);
    let other = world.factory.create_escrow().await;
    refuse(&pubsub, &refused);
    let mut relayer = started(setup).await;
    relayer.wait_logged("Lane blocked").await;
    refused.send("approve", &[]).await;
    other.send("approve", &[]).await;
    pubsub.wait_for(2).await;
    let lane = format!("{:#x}", refused.address);
    let outbox = blocked(setup, 1).await;
    let first = &outbox["blocked"][0];
    assert_eq!((&first["lane"], &first["sequence"]), (&json!(lane), &json!(1)));
    assert!(first["reason"].as_str().is_some_and(|reason| reason.contains("not this one")), "{first}");
    assert!(first["size"].as_u64() > Some(500) && first["since"].is_u64(), "{first}");
    setup.run(&["outbox", "list"]).await.good_with_stdout(&["1 blocked", "not this one", &lane]);
    setup
        .run(&["outbox", "retry", "0x12"])
        .await
        .failed_with(2, &["0x12 is neither blocked nor quarantined"]);

    pubsub.heal();
    // By itself it would be offered again after half a minute.
    let retried = setup.run(&["outbox", "retry", &lane]).await.good();
    assert!(retried.stderr.contains("1 blocked messages are offered again"), "{}", retried.stderr);
    pubsub.wait_for(4).await;
    relayer.wait_logged("Lane unblocked").await;
    relayer.stop().await;
    let outbox = json(setup, &["outbox", "list", "--json"]).await;
    assert_eq!(outbox["totals"], json!({ "waiting": 0, "blocked": 0, "quarantined": 0 }));
    world.truth().await.assert_is(&lines(&pubsub));
}

#[tokio::test]
async fn a_discarded_message_is_shown_whole_frees_its_lane_and_leaves_a_gap_that_can_be_seen() {
    for running in [true, false] {
        let (world, pubsub) = with_pubsub().await;
        let (setup, refused) = (&world.setup, world.factory.create_escrow().await);
        refuse(&pubsub, &refused);
        let mut relayer = started(setup).await;
        refused.send("approve", &[]).await;
        relayer.wait_logged("Lane blocked").await;
        relayer.wait_read(world.chain.block_number().await).await;
        let outbox = blocked(setup, 1).await;
        let mut relayer = Some(relayer);
        if !running {
            relayer.take().expect("it runs").kill().await;
        }
        let id = outbox["blocked"][0]["event_id"].as_str().expect("one is blocked").to_owned();
        let waiting = outbox["waiting"][1]["event_id"].as_str().expect("one waits behind it").to_owned();
        // Only what is blocked can be given up, and nobody is told so after the fact.
        setup.run(&["outbox", "discard", &id, &waiting]).await.failed_with(2, &[&waiting, "neither blocked"]);
        assert_eq!(json(setup, &["outbox", "list", "--json"]).await["totals"]["waiting"], 2);

        pubsub.heal();
        let discarded = setup.run(&["outbox", "discard", &id]).await.good();
        assert!(discarded.stderr.contains(&format!("discarded {id}")), "{}", discarded.stderr);
        let shown: Value = serde_json::from_str(&discarded.stdout[0]).expect("JSON");
        assert_eq!(shown["message"]["data"]["event_id"], id.as_str());
        assert_eq!(shown["message"]["attributes"]["event_type"], "EscrowDeployed");
        let mut relayer = match relayer {
            Some(relayer) => relayer,
            None => started(setup).await,
        };
        let arrived = pubsub.wait_for(1).await;
        assert_eq!((arrived.len(), arrived[0].attribute("sequence")), (1, "2"), "running: {running}");
        refused.send("approve", &[]).await;
        pubsub.wait_for(2).await;
        if running {
            let logged = relayer.wait_logged("Giving up on request").await;
            assert_eq!(logged["severity"], "WARNING", "{logged}");
            assert!(logged["whole"].as_str().is_some_and(|whole| whole.contains("arbiter")), "{logged}");
        }
        relayer.stop().await;
        setup.run_to_head().await;
        let sequences: Vec<u64> = lines(&pubsub).iter().map(Line::sequence).collect();
        assert_eq!(sequences, [2, 3], "running: {running}");
        setup.run(&["outbox", "discard", &id]).await.failed_with(2, &["neither blocked nor quarantined"]);
    }
}

fn list(signatures: &[&str]) -> String {
    serde_json::to_string(signatures).expect("text is JSON")
}

const APPROVED: &str = "Approved(address indexed approver)";
const APPROVED_OTHERWISE: &str = "Approved(address approver)";

/// A setup that knows no more than one event of escrows, and an escrow that said it in a way that is not known, twice in one
/// transaction.
async fn quarantine(world: &World) -> (Setup, Contract) {
    let setup = world.setup.anew().with("RELAYER_ESCROW__EVENTS", list(&[APPROVED]));
    let setup = setup.with("RELAYER_ESCROW__TERMINAL", "[]");
    let (escrow, other) = (world.factory.create_escrow().await, world.factory.create_escrow().await);
    let topics = DynSolValue::Array(vec![DynSolValue::FixedBytes(keccak256("Approved(address)"), 32)]);
    let raw = [topics, DynSolValue::Bytes(B256::with_last_byte(7).to_vec())];
    world.chain.set_automine(false).await;
    // Neither the first of its block nor the first of its transaction.
    other.submit("approve", &[]).await;
    escrow.submit("emitRaw", &raw).await;
    escrow.submit("emitRaw", &raw).await;
    world.chain.mine(1).await;
    world.chain.set_automine(true).await;
    (setup, escrow)
}

#[tokio::test]
async fn a_quarantined_log_is_relayed_as_late_once_its_signature_is_mended() {
    for running in [true, false] {
        let world = World::new().await;
        let (mut setup, escrow) = quarantine(&world).await;
        setup.run_to_head().await;
        let outbox = json(&setup, &["outbox", "list", "--json"]).await;
        assert_eq!(outbox["totals"]["quarantined"], 2, "{outbox}");
        let ids: Vec<&str> =
            (0..2).map(|row| outbox["quarantined"][row]["event_id"].as_str().expect("an id")).collect();
        assert_eq!(outbox["quarantined"][0]["contract"], format!("{:#x}", escrow.address));
        assert_eq!(outbox["quarantined"][0]["topic0"], json!(keccak256("Approved(address)")));
        setup
            .run(&["outbox", "retry", ids[0]])
            .await
            .failed_with(1, &["still quarantined", "known topic0 with 1 topics"]);

        setup.set("RELAYER_ESCROW__EVENTS", list(&[APPROVED, APPROVED_OTHERWISE]));
        let relay = async |setup: &Setup| match running {
            true => {
                let mut relayer = setup.start(&["run", "--from-now"]);
                relayer.wait_logged("Relaying from block").await;
                setup.run(&["outbox", "retry", ids[0]]).await.good_with_stdout(&[ids[0]]);
                setup.run(&["outbox", "retry", "--all"]).await.good_with_stdout(&[ids[1]]);
                relayer.wait_for_lines(2).await;
                relayer.stop().await.lines()
            }
            false => {
                setup.run(&["outbox", "retry", ids[0]]).await.good_with_stdout(&[ids[0]]);
                setup.run(&["outbox", "retry", "--all"]).await.good_with_stdout(&[ids[1]]);
                setup.run_to_head().await
            }
        };
        let lines = relay(&setup).await;
        assert_eq!(lines.iter().map(Line::event_id).collect::<Vec<_>>(), ids, "running: {running}");
        let logs = world.chain.all_logs(&[escrow.address]).await;
        for (line, sequence) in lines.iter().zip(2..) {
            assert!(is_marked(line, "late"));
            assert_eq!((line.name(), line.sequence()), ("Approved", sequence));
            assert_eq!(line.data["approver"], format!("{:#x}", Address::with_last_byte(7)));
            let log = logs.iter().find(|log| line.data["log_index"] == log.log_index).expect("it is there");
            assert_eq!(line.data["transaction_index"], log.transaction_index);
            assert_eq!(line.data["transaction_hash"], json!(log.transaction_hash));
        }
        assert_eq!(json(&setup, &["outbox", "list", "--json"]).await["totals"]["quarantined"], 0);
        assert_eq!(setup.run_to_head().await, [], "each once");
    }
}

#[tokio::test]
async fn a_quarantined_log_that_is_discarded_is_printed_whole_and_then_gone() {
    let world = World::new().await;
    let (setup, _) = quarantine(&world).await;
    setup.run_to_head().await;
    let outbox = json(&setup, &["outbox", "list", "--json", "--limit", "1"]).await;
    assert_eq!(outbox["quarantined"].as_array().map(Vec::len), Some(1), "at most one is shown");
    let id = outbox["quarantined"][0]["event_id"].as_str().expect("an id").to_owned();
    let discarded = setup.run(&["outbox", "discard", &id]).await.good();
    let shown: Value = serde_json::from_str(&discarded.stdout[0]).expect("JSON");
    assert_eq!(shown["log"]["data"], json!(B256::with_last_byte(7)));
    let outbox = json(&setup, &["outbox", "list", "--json"]).await;
    assert_eq!(outbox["totals"]["quarantined"], 1);
    assert_ne!(outbox["quarantined"][0]["event_id"], id.as_str());
    setup.run(&["outbox", "discard", &id]).await.failed_with(2, &["neither blocked nor quarantined"]);
}

#[tokio::test]
async fn a_signature_added_with_its_history_takes_its_logs_out_of_the_quarantine_and_puts_none_in() {
    let world = World::new().await;
    let (mut setup, _) = quarantine(&world).await;
    let before = setup.run_to_head().await;
    setup.set("RELAYER_ESCROW__EVENTS", list(&[APPROVED, APPROVED_OTHERWISE]));
    let late = setup.run_to_head().await;
    assert_eq!(late.len(), 2);
    assert_eq!(firsts(&[before, late].concat()).1, 0);
    assert_eq!(json(&setup, &["outbox", "list", "--json"]).await["totals"]["quarantined"], 0);
}
