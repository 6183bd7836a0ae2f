//! What a node leaves out without a word is found once it is final, and published as late. Real binary, real chain.

mod common;

use std::collections::BTreeSet;
use std::time::Duration;

use common::relay::faults::{Fault, Faults};
use common::relay::firsts;
use common::{Line, World};
use serde_json::Value;

/// Anvil calls a block final that is so far below the head.
const FINAL: u64 = 64;

async fn audited_world() -> World {
    let mut world = World::new().await;
    world.setup.set("RELAYER_AUDIT__CALLS_PER_HOUR", 1_000_000);
    world
}

fn is_late(line: &Line) -> bool {
    line.attributes.get("late").is_some_and(|late| late == "true")
}

fn is_odd(log: &Value) -> bool {
    log["logIndex"].as_str().is_some_and(|index| index.ends_with(['1', '3', '5', '7', '9', 'b', 'd', 'f']))
}

#[tokio::test]
async fn a_node_that_leaves_out_every_other_log_near_the_head_is_found_out_and_everything_arrives() {
    let mut world = audited_world().await;
    let faults = Faults::start(&world.anvil.url()).await;
    world.setup.set("RPC_URL", faults.url());
    let World { chain, factory, setup, .. } = &world;
    let mut relayer = setup.start(&["run"]);
    relayer.wait_logged("Relaying from block").await;
    faults.on_request(|_, _| {
        Fault::edited(|_, answers| {
            for answer in answers {
                if let Value::Array(logs) = &mut answer["result"] {
                    logs.retain(|log| !is_odd(log));
                }
            }
        })
    });
    let escrows = factory.create_many(5).await;
    for escrow in &escrows {
        factory.send("approveMany", &[escrow.address.into(), 4u64.into()]).await;
    }
    factory.create_by("createApproveRelease").await;
    let last = chain.block_number().await;
    relayer.wait_read(last).await;
    let truth = world.truth().await;
    let told = relayer.lines().len();
    assert!(told < truth.len(), "{told} of {}: some were left out", truth.len());
    faults.heal();
    // What is final is asked for again after so many blocks, and stored with the next one.
    chain.mine(2 * FINAL).await;
    relayer.wait_read(last + 2 * FINAL).await;
    chain.mine(1).await;
    relayer.wait_for_lines(truth.len()).await;
    relayer.wait_logged("The audit found").await;
    let lines = relayer.stop().await.lines();
    assert_eq!(lines.iter().filter(|line| is_late(line)).count(), truth.len() - told);
    let ids = |lines: &mut dyn Iterator<Item = &Line>| -> BTreeSet<String> {
        lines.map(|line| line.event_id().to_owned()).collect()
    };
    assert_eq!(ids(&mut lines.iter()), ids(&mut truth.escrows.values().flatten()));
    assert_eq!(lines.len(), truth.len(), "each once");
    let (firsts, repeats) = firsts(&lines);
    assert_eq!((firsts.len(), repeats), (lines.len(), 0));
}

#[tokio::test]
async fn a_factory_that_counts_more_escrows_than_were_found_says_that_the_start_block_is_too_late() {
    let mut world = audited_world().await;
    world.factory.create_many(3).await;
    let later = world.chain.block_number().await + 1;
    world.factory.create_many(2).await;
    world.chain.mine(2 * FINAL).await;
    world.setup.set("RELAYER_FACTORY__COUNT_CALL", "getEscrowCount()");
    world
        .setup
        .set("RELAYER_ESCROW__COUNT_CALLS", "Approved = approvalsCount(), EscrowReleased = released()");
    world.setup.set("RELAYER_AUDIT__COUNT_INTERVAL", "100ms");

    let mut whole = world.setup.start(&["run"]);
    whole.wait_logged("Registry: 5 escrows").await;
    tokio::time::sleep(Duration::from_secs(1)).await; // nothing is said
    let said = whole.stop().await.stderr;
    assert!(!said.contains("counts"), "{said}");

    let mut setup = world.setup.anew();
    setup.set("START_BLOCK", later);
    let mut late = setup.start(&["run"]);
    let said = late.wait_logged("The factory counts 5 escrows").await;
    assert_eq!(said["known"], 2);
    late.stop().await;
}
