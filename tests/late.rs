//! What is read afterwards: events of a signature added to the configuration, and escrows imported from elsewhere. All
//! of their history comes, once and marked as late, and what comes in time goes on beside it.

mod common;

use std::collections::BTreeSet;

use common::relay::{firsts, names_of};
use common::{Contract, Line, Log, Setup, World};

/// Deeper than anvil's `finalized` (64 blocks): what lies below is read by range, what lies above block by block.
const PAST_FINALITY: u64 = 100;

const RELEASED_WITH_REASON: &str =
    "EscrowReleased(address indexed payee, uint256 amount, uint256 timestamp, bytes32 reason)";
const LIFECYCLE: [&str; 2] = [
    "Approved(address indexed approver)",
    "EscrowReleased(address indexed payee, uint256 amount, uint256 timestamp)",
];
const DEPLOYED: &str = "EscrowDeployed(address indexed escrow, address indexed payer, address indexed payee, address arbiter, uint256 amount, uint256 releaseDelay, uint8 approvalsRequired)";
const DEPLOYED_OLDER: &str = "EscrowDeployed(address indexed escrow, address indexed payer, address indexed payee, uint256 amount, uint256 releaseDelay, uint8 approvalsRequired)";

fn list(signatures: &[&str]) -> String {
    serde_json::to_string(signatures).expect("text is JSON")
}

/// A setup that knows two of the escrows' events.
fn knowing_two(world: &World) -> Setup {
    world
        .setup
        .anew()
        .with("RELAYER_ESCROW__EVENTS", list(&LIFECYCLE))
        .with("RELAYER_ESCROW__TERMINAL", list(&["EscrowReleased"]))
}

/// The same store, once somebody has added the signature with the reason.
fn learn(setup: &mut Setup) {
    let [approved, released] = LIFECYCLE;
    setup.set("RELAYER_ESCROW__EVENTS", list(&[approved, released, RELEASED_WITH_REASON]));
}

/// Final and unfinal blocks with escrows that speak in known and in unknown ways.
async fn lives(world: &World) -> Vec<Contract> {
    let mut escrows = world.factory.create_many(5).await;
    for (number, escrow) in escrows.iter().enumerate() {
        escrow.send("approve", &[]).await;
        for _ in 0..number {
            escrow.send("emitUnknown", &[]).await;
        }
    }
    world.chain.mine(PAST_FINALITY).await;
    escrows.extend(world.factory.create_many(5).await);
    for escrow in &escrows {
        escrow.send("approve", &[]).await;
        escrow.send("emitUnknown", &[]).await;
    }
    escrows
}

fn place(line: &Line) -> (u64, u64) {
    let number = |name: &str| line.data[name].as_u64().expect("a number");
    (number("block_number"), number("log_index"))
}

/// The places of the escrows' logs with that many words of data and two topics, which tells the unknown release.
async fn with_reason(world: &World, escrows: &[Contract]) -> BTreeSet<(u64, u64)> {
    let addresses: Vec<_> = escrows.iter().map(|escrow| escrow.address).collect();
    let logs = world.chain.all_logs(&addresses).await;
    let is_it = |log: &&Log| log.topics.len() == 2 && log.data.len() == 96;
    logs.iter().filter(is_it).map(|log| (log.block_number, log.log_index)).collect()
}

fn is_late(line: &Line) -> bool {
    line.attributes.get("late").map(String::as_str) == Some("true")
}

#[tokio::test]
async fn the_history_of_an_added_signature_comes_late_and_once_however_it_is_read() {
    let world = World::new().await;
    let escrows = lives(&world).await;
    let expected = with_reason(&world, &escrows).await;
    assert_eq!(expected.len(), 20);
    let ways: [&[(&str, &str)]; 4] = [
        &[],
        &[("RELAYER_RPC__MAX_RANGE", "7"), ("RELAYER_RPC__MAX_ADDRESSES", "3")],
        &[("RELAYER_CHAIN__READING", "ranged"), ("RELAYER_RPC__MAX_RANGE", "7")],
        &[("RELAYER_RPC__MAX_ADDRESSES", "2"), ("RELAYER_RPC__MAX_BATCH", "1")],
    ];
    for way in ways {
        let mut setup = knowing_two(&world);
        let before = setup.start_with(&["run", "--until", "head"], way).ended().await.good().lines();
        assert_eq!(before.len(), 10 + 15, "announcements and approvals");
        assert!(!before.iter().any(is_late));

        learn(&mut setup);
        setup.run(&["check"]).await.good_with_stdout(&["made without", "reason", "--from-now"]);
        let finished = setup.start_with(&["run", "--until", "head"], way).ended().await.good();
        let late = finished.lines();
        assert!(late.iter().all(is_late), "{way:?}");
        assert_eq!(late.iter().map(place).collect::<BTreeSet<_>>(), expected, "{way:?}");
        assert_eq!(late.len(), expected.len(), "{way:?}: each once");
        assert!(late.iter().all(|line| line.name() == "EscrowReleased" && line.data["reason"].is_string()));

        assert_eq!(setup.run_to_head().await, [], "it is read once");
        // One escrow's messages are numbered on, whatever came late.
        let (all, repeats) = firsts(&[before, late].concat());
        assert_eq!((all.len(), repeats), (45, 0));
    }
}

#[tokio::test]
async fn what_happens_while_history_is_read_late_comes_in_time() {
    let world = World::new().await;
    let escrows = lives(&world).await;
    let mut setup = knowing_two(&world).with("RELAYER_RPC__MAX_RANGE", 2);
    let before = setup.run_to_head().await;
    learn(&mut setup);
    let mut relayer = setup.start(&["run"]);
    relayer.wait_logged("once more").await;
    for escrow in &escrows {
        escrow.send("emitUnknown", &[]).await;
    }
    let expected = with_reason(&world, &escrows).await;
    relayer.wait_for_lines(expected.len()).await;
    relayer.wait_logged("The history is read").await;
    let after = relayer.stop().await.lines();
    assert_eq!(after.iter().map(place).collect::<BTreeSet<_>>(), expected);
    assert_eq!(after.iter().filter(|line| !is_late(line)).count(), escrows.len(), "these were new");
    assert_eq!(firsts(&[before, after].concat()).1, 0);
}

#[tokio::test]
async fn killed_while_history_is_read_late_nothing_of_it_is_lost_and_nothing_is_another_message() {
    let world = World::new().await;
    let escrows = lives(&world).await;
    let mut setup = knowing_two(&world).with("RELAYER_RPC__MAX_RANGE", 3);
    let mut lines = setup.run_to_head().await;
    learn(&mut setup);
    for kill in 1..=4 {
        let mut relayer = setup.start(&["run"]);
        relayer.wait_logged_times("once more", kill).await;
        lines.extend(relayer.kill().await.lines());
    }
    lines.extend(setup.run_to_head().await);
    let (firsts, _) = firsts(&lines);
    let late: BTreeSet<_> = firsts.iter().filter(|line| is_late(line)).map(place).collect();
    assert_eq!(late, with_reason(&world, &escrows).await);
    assert_eq!(firsts.len(), 45);
}

#[tokio::test]
async fn from_now_on_means_that_the_history_never_comes() {
    let world = World::new().await;
    let escrows = lives(&world).await;
    let mut setup = knowing_two(&world);
    setup.run_to_head().await;
    learn(&mut setup);
    setup.run(&["run", "--until", "head", "--from-now"]).await.good();
    for escrow in &escrows {
        escrow.send("emitUnknown", &[]).await;
    }
    let lines = setup.run_to_head().await;
    assert_eq!(lines.len(), escrows.len());
    assert!(!lines.iter().any(is_late));
}

#[tokio::test]
async fn escrows_that_only_an_added_signature_announces_come_with_their_whole_lives() {
    let world = World::new().await;
    let mut setup = world.setup.anew().with("RELAYER_FACTORY__EVENTS", list(&[DEPLOYED]));
    let mut lives = vec![];
    for final_by_then in [true, false] {
        for _ in 0..3 {
            let args = world.factory.escrow_args();
            let receipt = world.factory.send("createSilently", &args).await;
            let address = receipt.logs.first().expect("its constructor speaks").address;
            let escrow = world.chain.at("Escrow", address);
            escrow.send("approve", &[]).await; // before the announcement: none of ours
            world.factory.send("announceOlder", &[address.into()]).await;
            escrow.send("approve", &[]).await;
            escrow.send("release", &[]).await;
            lives.push(escrow);
        }
        if final_by_then {
            world.chain.mine(PAST_FINALITY).await;
        }
    }
    assert_eq!(setup.run_to_head().await, []);
    setup.set("RELAYER_FACTORY__EVENTS", list(&[DEPLOYED, DEPLOYED_OLDER]));
    let late = setup.run_to_head().await;
    assert!(late.iter().all(is_late));
    let strip = |line: &Line| {
        let mut line = line.clone();
        line.attributes.remove("late");
        line
    };
    let in_order: Vec<Line> = late.iter().map(strip).collect();
    world.truth().await.assert_is(&in_order);
    // From then on they are watched like any other.
    lives[0].send("approve", &[]).await;
    lives[5].send("approve", &[]).await;
    let lines = setup.run_to_head().await;
    assert_eq!(lines.len(), 2);
    assert_eq!(names_of(&lines, lives[5].address), ["Approved"]);
    assert!(!lines.iter().any(is_late));
}

#[tokio::test]
async fn a_fork_that_takes_blocks_read_late_takes_their_late_events_back() {
    let world = World::new().await;
    let escrow = world.factory.create_escrow().await;
    world.chain.mine(2).await;
    let mut setup = knowing_two(&world);
    escrow.send("emitUnknown", &[]).await;
    world.chain.mine(1).await;
    escrow.send("emitUnknown", &[]).await;
    setup.run_to_head().await;
    learn(&mut setup);
    let mut relayer = setup.start(&["run"]);
    relayer.wait_for_lines(2).await;
    world.chain.reorg(2).await;
    let lines = relayer.wait_for_lines(3).await;
    assert!(lines[2].is_retraction());
    assert_eq!(lines[2].data["retracts"], lines[1].data["event_id"]);
    escrow.send("emitUnknown", &[]).await;
    let lines = relayer.wait_for_lines(4).await;
    assert!(!is_late(&lines[3]));
    relayer.stop().await;
    assert_eq!(setup.run_to_head().await, []);
}
