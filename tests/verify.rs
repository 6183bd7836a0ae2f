//! An auditor's command: what the chain has against what was relayed. It finds what a node left out and what a ledger
//! lacks, says nothing where both agree, and changes nothing.

mod common;

use std::collections::BTreeMap;

use common::relay::faults::{Fault, Faults};
use common::{Finished, Line, Setup, World};
use redb::{Database, ReadableTable, TableDefinition};
use serde_json::{Value, json};

/// Anvil calls a block final that is so far below the head.
const FINAL: u64 = 64;
/// The store's table of what stands: of each block the events, log index and digest.
const STANDING: TableDefinition<u64, &[u8]> = TableDefinition::new("standing");
type Said = BTreeMap<u64, u64>;

/// Some lives, read in part by range, in part by hash; the audit is off. And the last block.
async fn relayed() -> (World, u64) {
    let mut world = World::new().await;
    world.setup.set("RELAYER_AUDIT__CALLS_PER_HOUR", 0);
    lives(&world).await;
    world.chain.mine(FINAL).await;
    lives(&world).await;
    world.setup.run_to_head().await;
    let last = world.chain.block_number().await;
    (world, last)
}

async fn lives(world: &World) {
    for escrow in world.factory.create_many(4).await {
        world.factory.send("approveMany", &[escrow.address.into(), 3u64.into()]).await;
        escrow.send("release", &[]).await;
    }
    world.factory.create_by("createApproveRelease").await;
}

async fn verify(setup: &Setup, from: u64, to: u64) -> Finished {
    let (from, to) = (from.to_string(), to.to_string());
    setup.run(&["verify", "--json", "--from", &from, "--to", &to]).await
}

fn findings(finished: &Finished) -> Vec<Value> {
    let array: Value = serde_json::from_str(&finished.stdout.join("\n")).expect("JSON on stdout");
    array.as_array().expect("an array").clone()
}

#[tokio::test]
async fn where_chain_and_ledger_agree_nothing_is_found_on_the_file_and_beside_a_running_relayer() {
    let (world, last) = relayed().await;
    let events = world.truth().await.len();
    let said = format!("{} blocks compared: {events} events agree, 0 differ", last + 1);
    let on_file = verify(&world.setup, 0, last).await.good();
    assert_eq!(findings(&on_file), Vec::<Value>::new());
    assert!(on_file.stderr.contains(&said), "{}", on_file.stderr);
    assert!(on_file.stderr.contains("are not final"), "{}", on_file.stderr);
    let mut relayer = world.setup.start(&["run"]);
    relayer.wait_logged("Relaying from block").await;
    let beside = verify(&world.setup, 0, last).await.good();
    assert!(findings(&beside).is_empty() && beside.stderr.contains(&said), "{}", beside.stderr);
    // What was not read yet is not said to be verified.
    let further = verify(&world.setup, 0, last + 100).await.good();
    assert!(
        further.stderr.contains(&format!("Only blocks 0-{last} of 0-{}", last + 100)),
        "{}",
        further.stderr
    );
    verify(&world.setup, last + 50, last + 100).await.failed_with(2, &["cannot be compared"]);
    assert_eq!(relayer.stop().await.lines(), []);
    world.setup.run(&["verify", "--from", "9", "--to", "8"]).await.failed_with(2, &["--from 9 --to 8"]);
}

#[tokio::test]
async fn what_a_node_left_out_when_it_was_read_is_found_missing() {
    let mut world = World::new().await;
    world.setup.set("RELAYER_AUDIT__CALLS_PER_HOUR", 0);
    let faults = Faults::start(&world.anvil.url()).await;
    world.setup.set("RPC_URL", faults.url());
    lives(&world).await;
    let hide = |faults: &Faults| {
        faults.on_request(|_, _| {
            Fault::edited(|_, answers| {
                for answer in answers {
                    if let Value::Array(logs) = &mut answer["result"] {
                        // Not the announcements, which have four topics.
                        let is_told = |log: &Value| {
                            log["logIndex"] != "0x1" || log["topics"].as_array().map(Vec::len) == Some(4)
                        };
                        logs.retain(is_told);
                    }
                }
            })
        });
    };
    hide(&faults);
    let told = world.setup.run_to_head().await;
    faults.heal();
    let truth = world.truth().await;
    assert!(told.len() < truth.len());
    let last = world.chain.block_number().await;
    for running in [false, true] {
        let mut relayer = running.then(|| world.setup.start(&["run"]));
        if let Some(relayer) = &mut relayer {
            relayer.wait_logged("Relaying from block").await;
        }
        let finished = verify(&world.setup, 0, last).await.failed_with(1, &["differ"]);
        let found = findings(&finished);
        let mut missing: Vec<String> =
            found.iter().map(|it| it["event_id"].as_str().expect("an id").to_owned()).collect();
        assert!(found.iter().all(|it| it["difference"] == "missing" && it["log_index"] == 1), "{found:?}");
        assert!(found.iter().all(|it| it["escrow"].is_string() && it["event"].is_string()), "{found:?}");
        let lines = truth.escrows.values().flatten();
        let mut expected: Vec<String> = lines
            .filter(|line| !told.iter().any(|it| it.event_id() == line.event_id()))
            .map(|line| line.event_id().to_owned())
            .collect();
        missing.sort();
        expected.sort();
        assert_eq!(missing, expected, "running: {running}");
        world
            .setup
            .run(&["verify", "--from", "0", "--to", &last.to_string()])
            .await
            .failed_with(1, &[])
            .stdout
            .iter()
            .find(|line| line.starts_with("missing?"))
            .expect("these blocks are not final");
    }
    // And the other way round: the node leaves out now what it told before.
    let mut whole = world.setup.anew();
    whole.set("RELAYER_AUDIT__CALLS_PER_HOUR", 0);
    whole.run_to_head().await;
    hide(&faults);
    let finished = verify(&whole, 0, last).await.failed_with(1, &["differ"]);
    let found = findings(&finished);
    assert!(found.iter().all(|it| it["difference"] == "extra" && it["event"].is_string()), "{found:?}");
    assert_eq!(found.len(), truth.len() - told.len());
}

#[tokio::test]
async fn a_row_taken_out_of_the_ledger_or_put_into_it_is_found() {
    let (world, last) = relayed().await;
    let place_of = |line: &Line| {
        let number = |name: &str| line.data[name].as_u64().expect("a number");
        (number("block_number"), number("log_index"))
    };
    let truth = world.truth().await;
    let line = truth.escrows.values().flatten().min_by_key(|line| place_of(line)).expect("an event");
    let place = place_of(line);
    let change = |change: &dyn Fn(&mut Said)| {
        let db = Database::open(world.setup.path("relayer.redb")).expect("a store");
        let transaction = db.begin_write().expect("it can be written");
        {
            let mut table = transaction.open_table(STANDING).expect("it is there");
            let row = table.get(place.0).expect("it is read").expect("a row").value().to_vec();
            let number = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
            let events = row[1..].chunks_exact(16);
            let mut said: Said = events.map(|event| (number(&event[..8]), number(&event[8..]))).collect();
            change(&mut said);
            let events = said.into_iter().flat_map(|(index, digest)| [index, digest]);
            let row: Vec<u8> = row[..1].iter().copied().chain(events.flat_map(u64::to_le_bytes)).collect();
            table.insert(place.0, row.as_slice()).expect("it is put there");
        }
        transaction.commit().expect("it is written");
    };
    change(&|said| {
        said.remove(&place.1).expect("it was there");
        said.insert(99, 5);
    });
    let finished = verify(&world.setup, 0, last).await.failed_with(1, &["2 differ"]);
    let found = findings(&finished);
    let short = |it: &Value| (it["difference"].clone(), it["block"].clone(), it["log_index"].clone());
    assert_eq!(
        found.iter().map(short).collect::<Vec<_>>(),
        [(json!("missing"), json!(place.0), json!(place.1)), (json!("extra"), json!(place.0), json!(99))]
    );
    assert_eq!(found[0]["event_id"], line.event_id());
    assert_eq!(found[0]["final"], true);
    // It says something else than the chain.
    change(&|said| {
        said.remove(&99);
        said.insert(place.1, 5);
    });
    let finished = verify(&world.setup, place.0, place.0).await.failed_with(1, &["1 differ"]);
    assert_eq!(findings(&finished)[0]["difference"], "differs");
}

#[tokio::test]
async fn of_an_escrow_that_was_never_registered_all_events_are_missing_however_they_are_read() {
    for (by_hash, range) in [(true, 2), (false, 2000)] {
        let world = World::new().await;
        let early = world.factory.create_escrow().await;
        early.send("approve", &[]).await;
        world.chain.mine(if by_hash { FINAL + 5 } else { 1 }).await;
        early.send("approve", &[]).await;
        let faults = Faults::start(&world.anvil.url()).await;
        let setup = world.setup.anew().with("RPC_URL", faults.url()).with("RELAYER_RPC__MAX_RANGE", range);
        faults.on_request(|_, _| {
            Fault::edited(|_, answers| {
                for answer in answers {
                    if let Value::Array(logs) = &mut answer["result"] {
                        logs.clear();
                    }
                }
            })
        });
        assert_eq!(setup.run_to_head().await, []);
        faults.heal();
        let last = world.chain.block_number().await;
        let address = format!("{:#x}", early.address);
        let finished =
            verify(&setup, 0, last).await.failed_with(1, &[&address, "not registered", "3 differ"]);
        let found = findings(&finished);
        assert!(found.iter().all(|it| it["difference"] == "missing" && it["escrow"] == address), "{found:?}");
        let mut expected: Vec<String> =
            world.truth().await.escrows.values().flatten().map(|line| line.event_id().to_owned()).collect();
        let mut missing: Vec<String> =
            found.iter().map(|it| it["event_id"].as_str().expect("an id").to_owned()).collect();
        expected.sort();
        missing.sort();
        assert_eq!(missing, expected);
    }
}
