//! What is on the chain comes out: all of it, nothing else, in order, once; however it is read and however often the
//! relayer is stopped. Real binary, real chain; what must come out is made from raw logs (`common::relay::truth`).

mod common;

use std::time::{Duration, Instant};

use alloy::dyn_abi::DynSolValue;
use alloy::primitives::Address;
use common::relay::truth::{Truth, without_epoch};
use common::relay::{by_key, firsts, names_of};
use common::{Anvil, Chain, Contract, Line, Receipt, Setup, World};

/// Deeper than anvil's `finalized` (64 blocks): what lies below is read by range, what lies above block by block.
const PAST_FINALITY: u64 = 150;

async fn relayed(world: &World) -> Vec<Line> {
    let lines = world.setup.run_to_head().await;
    world.truth().await.assert_is(&lines);
    lines
}

#[tokio::test]
async fn an_escrow_created_approved_and_released_in_one_transaction_is_relayed_whole_and_in_order() {
    let world = World::new().await;
    let (escrow, _) = world.factory.create_by("createApproveRelease").await;
    let lines = relayed(&world).await;
    let life = ["EscrowDeployed", "Approved", "Approved", "EscrowReleased"];
    assert_eq!(names_of(&lines, escrow.address), life);
    assert_eq!(lines.len(), 4);
}

#[tokio::test]
async fn what_an_escrows_constructor_emits_follows_its_announcement() {
    let world = World::new().await;
    let (escrow, receipt) = world.factory.create_by("createApprovedInConstructor").await;
    assert_eq!(
        receipt.logs.last().expect("logs").address,
        world.factory.address,
        "on the chain it comes last"
    );
    let lines = relayed(&world).await;
    assert_eq!(names_of(&lines, escrow.address), ["EscrowDeployed", "Approved"]);
}

#[tokio::test]
async fn every_signature_of_three_generations_is_relayed_even_in_one_block() {
    let world = World::new().await;
    let escrow = world.factory.create_escrow().await;
    world.factory.send("announceOlder", &[escrow.address.into()]).await;
    let all = escrow.send("emitAll", &[]).await;
    assert_eq!(all.logs.len(), 7);
    let lines = relayed(&world).await;
    let mut expected = vec!["EscrowDeployed"; 2];
    expected.push("Approved");
    expected.extend(["EscrowReleased"; 3]);
    expected.extend(["EscrowRefunded"; 3]);
    assert_eq!(names_of(&lines, escrow.address), expected);
}

#[tokio::test]
async fn the_older_factory_and_its_escrows_are_relayed() {
    let mut world = World::new().await;
    world.factory = world.chain.deploy("OlderFactory", &[]).await;
    world.setup.set("CONTRACT_ADDRESS", world.factory.address);
    let escrow = older_escrow(&world.factory).await;
    for function in ["approve", "release", "refund"] {
        escrow.send(function, &[]).await;
    }
    let lines = relayed(&world).await;
    let life = ["EscrowDeployed", "Approved", "EscrowReleased", "EscrowRefunded"];
    assert_eq!(names_of(&lines, escrow.address), life);
    assert!(lines[0].data.get("arbiter").is_none());
}

#[tokio::test]
async fn look_alikes_that_nobody_registered_are_never_relayed() {
    let world = World::new().await;
    let escrow = world.factory.create_escrow().await;
    let look_alike = world.chain.deploy("LookAlike", &[]).await;
    look_alike.send("emitAll", &[]).await;
    // A fake announcement of a real contract, which would have something to say.
    let silent = silent_escrow(&world).await;
    look_alike.send("announce", &[silent.address.into()]).await;
    silent.send("emitAll", &[]).await;
    // An announcement by a registered escrow is none either.
    let announcement = world.factory.send("announce", &[escrow.address.into()]).await.logs.remove(0);
    let topics = announcement.topics[..1].iter().copied().chain([silent.address.into_word(); 3]);
    let topics = DynSolValue::Array(topics.map(Into::into).collect());
    escrow.send("emitRaw", &[topics, announcement.data.to_vec().into()]).await;
    silent.send("approve", &[]).await;

    let lines = relayed(&world).await;
    assert_eq!(names_of(&lines, escrow.address), ["EscrowDeployed", "EscrowDeployed"]);
    assert_eq!(lines.len(), 2);
}

#[tokio::test]
async fn malformed_logs_are_kept_aside_and_later_events_of_the_same_escrow_go_on() {
    let world = World::new().await;
    let escrow = world.factory.create_escrow().await;
    let spoiled = silent_escrow(&world).await;
    escrow.send("approve", &[]).await;
    let malformed = [
        escrow.send("emitTruncatedRelease", &[]).await,
        escrow.send("emitApprovedWithoutApprover", &[]).await,
        world.factory.send("emitTruncatedAnnouncement", &[spoiled.address.into()]).await,
    ];
    spoiled.send("approve", &[]).await;
    escrow.send("emitUnknown", &[]).await;
    escrow.send("release", &[]).await;

    let finished = world.setup.run(&["run", "--until", "head"]).await.good();
    let lines = finished.lines();
    world.truth().await.assert_is(&lines);
    assert_eq!(names_of(&lines, escrow.address), ["EscrowDeployed", "Approved", "EscrowReleased"]);
    assert_eq!(names_of(&lines, spoiled.address), [""; 0], "its announcement could not be read");

    let kept = finished.logged("does not decode");
    let blocks: Vec<u64> = kept.iter().map(|log| log["block"].as_u64().expect("a number")).collect();
    assert_eq!(blocks, malformed.map(|receipt| receipt.block_number));
}

#[tokio::test]
async fn fifty_events_of_one_escrow_in_one_transaction_are_numbered_in_chain_order() {
    let world = World::new().await;
    let escrow = world.factory.create_escrow().await;
    world.factory.send("approveMany", &[escrow.address.into(), 50u64.into()]).await;
    let lines = relayed(&world).await;
    assert_eq!(lines.iter().map(Line::sequence).collect::<Vec<_>>(), Vec::from_iter(1..=51));
    let approvers =
        lines[1..].iter().map(|line| line.data["approver"].as_str().expect("an address").to_owned());
    let expected = (1..=50u64).map(|number| format!("{number:#042x}"));
    assert_eq!(approvers.collect::<Vec<_>>(), expected.collect::<Vec<_>>());
}

#[tokio::test]
async fn everything_at_once_is_relayed_exactly_by_range_and_by_link_in_any_portions() {
    let world = World::new().await;
    everything(&world).await;
    world.chain.mine(PAST_FINALITY).await;
    everything(&world).await;
    let truth = world.truth().await;
    assert!(truth.len() > 250, "only {} events", truth.len());

    let lines = world.setup.run_to_head().await;
    truth.assert_is(&lines);
    let mut ids: Vec<&str> = lines.iter().map(Line::event_id).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), lines.len(), "no event twice");

    let read_otherwise: [&[(&str, &str)]; 5] = [
        &[("RELAYER_RPC__MAX_RANGE", "7"), ("RELAYER_RPC__MAX_ADDRESSES", "3")],
        &[
            ("RELAYER_RPC__MAX_RANGE", "1"),
            ("RELAYER_RPC__MAX_ADDRESSES", "1"),
            ("RELAYER_RPC__MAX_BATCH", "2"),
        ],
        &[("RELAYER_CHAIN__READING", "ranged")],
        &[
            ("RELAYER_CHAIN__READING", "ranged"),
            ("RELAYER_RPC__MAX_RANGE", "7"),
            ("RELAYER_RPC__MAX_ADDRESSES", "3"),
        ],
        &[("RPC_URL", &world.anvil.ws_url())],
    ];
    for variables in read_otherwise {
        let setup = world.setup.anew();
        let otherwise = setup.start_with(&["run", "--until", "head"], variables).ended().await.good().lines();
        truth.assert_is(&otherwise);
        assert_eq!(
            by_key(&without_epoch(&otherwise)),
            by_key(&without_epoch(&lines)),
            "the same lines, read with {variables:?}"
        );
    }
}

#[tokio::test]
async fn stopped_and_started_amid_production_nothing_is_lost_and_nothing_comes_twice() {
    const CYCLES: usize = 4;
    let world = World::new().await;
    let producing = tokio::spawn(produce(world.factory.clone(), 60));
    let mut lines = vec![];
    for cycle in 0..CYCLES {
        let mut relayer = world.setup.start(&["run"]);
        let loaded = escrows_loaded(&mut relayer, &world.chain, world.factory.address).await;
        assert!(cycle == 0 || loaded > 0, "the registry survives");
        relayer.wait_for_lines(5).await;
        let finished = relayer.stop().await;
        lines.extend(finished.lines());
        assert!(cycle == CYCLES - 1 || !producing.is_finished(), "production outlasts the cycles");
    }
    producing.await.expect("production does not panic");
    lines.extend(world.setup.run_to_head().await);
    world.truth().await.assert_is(&lines);

    // Nothing is left, and an escrow announced in an earlier life is still watched.
    assert_eq!(world.setup.run_to_head().await, []);
    let truth = world.truth().await;
    let (first, _) = truth.announced.first_key_value().expect("escrows");
    world.chain.at("Escrow", *first).send("refund", &[]).await;
    let last = world.setup.run_to_head().await;
    assert_eq!(last.len(), 1);
    assert_eq!(last[0].data["contract_address"], format!("{first:#x}"));
}

#[tokio::test]
async fn killed_amid_production_nothing_is_lost_and_only_what_was_outstanding_comes_twice() {
    const OUTSTANDING: usize = 10;
    let world = World::new().await;
    let mut setup = world.setup.anew();
    setup.set("RELAYER_SINK__KIND", "file");
    setup.set("RELAYER_SINK__PATH", "events.jsonl");
    setup.set("RELAYER_SINK__MAX_OUTSTANDING", OUTSTANDING);
    let written = || std::fs::read_to_string(setup.path("events.jsonl")).unwrap_or_default();
    let producing = tokio::spawn(produce(world.factory.clone(), 60));
    for _ in 0..6 {
        let mut relayer = setup.start(&["run"]);
        relayer.wait_logged_times("Published", 3).await;
        relayer.kill().await;
    }
    producing.await.expect("production does not panic");
    setup.run_to_head().await;
    let (firsts, repeats) = firsts(&Line::all(&written()));
    world.truth().await.assert_is(&firsts);
    assert!(repeats <= 6 * OUTSTANDING, "{repeats} repeats after 6 kills");
}

/// Transactions of many kinds, one after another.
async fn produce(factory: Contract, rounds: u64) {
    let mut escrows = vec![];
    for round in 0..rounds {
        escrows.extend(factory.create_many(3).await);
        let escrow = &escrows[(round as usize * 7) % escrows.len()];
        factory.send("approveMany", &[escrow.address.into(), 5u64.into()]).await;
        escrow.send("emitAll", &[]).await;
        factory.create_by("createApprovedInConstructor").await;
    }
}

/// What it says it loaded, having compared that with the chain below its cursor.
async fn escrows_loaded(relayer: &mut common::Running, chain: &Chain, factory: Address) -> u64 {
    let loaded = relayer.wait_logged("escrows from checkpoint").await;
    let number = loaded["escrows"].as_u64().expect("a number");
    assert_eq!(loaded["message"], format!("Loaded {number} escrows from checkpoint"));
    let next = relayer.wait_logged("Relaying from block").await["next_block"].as_u64().expect("a number");
    if next > 0 {
        let known = Truth::read(chain, factory, next - 1).await.announced.len();
        assert_eq!(number, known as u64, "escrows announced below block {next}");
    }
    number
}

#[tokio::test]
async fn sigterm_ends_it_in_time_idle_busy_and_without_a_node() {
    let world = World::new().await;
    let escrow = world.factory.create_escrow().await;

    let mut idle = world.setup.start(&["run"]);
    idle.wait_for_lines(1).await;
    idle.stop().await;
    let mut idle = world.setup.start(&[]);
    idle.wait_logged("Relaying from block").await;
    idle.interrupt().await;

    for _ in 0..20 {
        world.factory.send("approveMany", &[escrow.address.into(), 100u64.into()]).await;
    }
    let mut busy = world.setup.start(&["run"]);
    busy.wait_for_lines(1).await;
    let mut lines = busy.stop().await.lines();
    lines.extend(world.setup.run_to_head().await);
    assert_eq!(lines.iter().map(Line::sequence).collect::<Vec<_>>(), Vec::from_iter(2..=2001));

    let nobody = "http://127.0.0.1:1";
    let mut lonely = world.setup.start_with(&["run"], &[("RPC_URL", nobody)]);
    lonely.wait_logged("does not answer").await;
    lonely.stop().await;

    // A node that accepts and never answers.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("http://{}", silent.local_addr().expect("its address"));
    let mut waiting = world.setup.start_with(&["run"], &[("RPC_URL", &url)]);
    waiting.wait_logged("Relaying from block").await;
    let accepted = tokio::task::spawn_blocking(move || silent.accept());
    let _connection = accepted.await.expect("no panic").expect("the relayer connects");
    waiting.stop().await;
}

#[tokio::test]
async fn a_file_gets_what_stdout_gets_and_is_continued() {
    let world = World::new().await;
    everything(&world).await;
    let printed = world.setup.run_to_head().await;

    let setup =
        world.setup.anew().with("RELAYER_SINK__KIND", "file").with("RELAYER_SINK__PATH", "events.jsonl");
    let written = |setup: &Setup| {
        Line::all(&std::fs::read_to_string(setup.path("events.jsonl")).expect("the file is there"))
    };
    assert_eq!(setup.run_to_head().await, [], "stdout stays empty");
    assert_eq!(without_epoch(&written(&setup)), without_epoch(&printed));

    world.factory.create_by("createApproveRelease").await;
    setup.run_to_head().await;
    world.truth().await.assert_is(&written(&setup));
}

#[tokio::test]
async fn until_a_block_relays_up_to_that_block_and_the_next_run_goes_on_from_there() {
    let world = World::new().await;
    let mut blocks = vec![];
    for _ in 0..3 {
        blocks.push(world.factory.create_by("createApproveRelease").await.1.block_number);
    }
    let mut lines = vec![];
    for block in blocks {
        lines.extend(world.setup.run(&["run", "--until", &block.to_string()]).await.good().lines());
        world.truth_to(block).await.assert_is(&lines);
    }
}

#[tokio::test]
async fn a_long_job_says_now_and_then_how_far_it_is() {
    let world = World::new().await;
    world.factory.create_many(3).await;
    let head = world.chain.block_number().await;
    let mut relayer = world.setup.start(&["run", "--until", &(head + 2).to_string()]);
    let said = relayer.wait_logged(&format!("Relayed up to block {head} of {}", head + 2)).await;
    assert_eq!(
        (&said["block"], &said["last"], &said["events"]),
        (&head.into(), &(head + 2).into(), &3.into())
    );
    world.chain.mine(2).await;
    relayer.ended().await.good();
}

#[tokio::test]
async fn until_a_block_to_come_says_that_it_waits_and_ends_when_it_is_mined() {
    let world = World::new().await;
    let escrow = world.factory.create_escrow().await;
    let last = world.chain.block_number().await + 2;
    let mut relayer = world.setup.start(&["run", "--until", &last.to_string()]);
    let waits = relayer.wait_logged(&format!("Waiting for block {last}")).await;
    assert_eq!(waits["severity"], "WARNING");
    for _ in 0..3 {
        escrow.send("approve", &[]).await;
    }
    let finished = relayer.ended().await.good();
    assert_eq!(finished.logged("Waiting for block").len(), 1, "said once");
    world.truth_to(last).await.assert_is(&finished.lines());
}

#[tokio::test]
async fn the_horizon_decides_how_far_is_read() {
    let world = World::new().await;
    let escrow = world.factory.create_escrow().await;
    for _ in 0..80 {
        escrow.send("approve", &[]).await;
    }
    let head = world.chain.block_number().await;
    // anvil's `safe` is 32 blocks behind the head, its `finalized` 64.
    for (variable, value, behind) in [
        ("RELAYER_CHAIN__CONFIRMATIONS", "", 2),
        ("RELAYER_CHAIN__CONFIRMATIONS", "5", 5),
        ("RELAYER_CHAIN__HORIZON", "safe", 32),
        ("RELAYER_CHAIN__HORIZON", "finalized", 64),
    ] {
        let run = world.setup.anew().start_with(&["run", "--until", "head"], &[(variable, value)]);
        world.truth_to(head - behind).await.assert_is(&run.ended().await.good().lines());
    }
}

#[tokio::test]
async fn a_second_provider_takes_over_for_one_that_is_dead_or_on_another_chain() {
    let world = World::new().await;
    world.factory.create_by("createApproveRelease").await;
    let another = Anvil::new().chain_id(4242).spawn().await.expect("anvil starts");
    for first in ["http://127.0.0.1:1".to_owned(), another.url()] {
        let urls = format!("{first},{}", world.anvil.url());
        let run = world.setup.anew().start_with(&["run", "--until", "head"], &[("RPC_URL", &urls)]);
        world.truth().await.assert_is(&run.ended().await.good().lines());
    }
}

#[tokio::test]
async fn an_event_is_relayed_promptly_after_its_block() {
    let world = World::new().await;
    let escrow = world.factory.create_escrow().await;
    let mut relayer = world.setup.start(&["run"]);
    relayer.wait_for_lines(1).await;
    escrow.send("approve", &[]).await;
    let mined = Instant::now();
    relayer.wait_for_lines(2).await;
    let took = mined.elapsed();
    assert!(took < Duration::from_secs(3), "polls every 50 ms, but took {took:?}");
    relayer.stop().await;
}

/// One of everything: what is relayed, what is not, and what looks like it.
async fn everything(world: &World) {
    let World { chain, factory, .. } = world;
    let approve_by = |number: u64| [DynSolValue::from(Address::left_padding_from(&number.to_be_bytes()))];
    let (batch, look_alike, older) = (
        chain.deploy("Batch", &[]).await,
        chain.deploy("LookAlike", &[]).await,
        chain.deploy("OlderFactory", &[]).await,
    );
    let many = factory.create_many(30).await;
    let escrow = factory.create_escrow().await;
    factory.create_by("createApproveRelease").await;
    factory.create_by("createApprovedInConstructor").await;
    factory.create_by("createAnnouncedTwice").await;
    factory.send("announceOlder", &[escrow.address.into()]).await;
    factory.send("announce", &[escrow.address.into()]).await;
    factory.send("approveMany", &[escrow.address.into(), 60u64.into()]).await;
    escrow.send("emitAll", &[]).await;

    // Malformed, unknown, and somebody else's.
    escrow.send("emitTruncatedRelease", &[]).await;
    escrow.send("emitApprovedWithoutApprover", &[]).await;
    escrow.send("emitUnknown", &[]).await;
    factory.send("emitUnknown", &[]).await;
    factory.send("emitTruncatedAnnouncement", &[many[0].address.into()]).await;
    look_alike.send("emitAll", &[]).await;
    let stranger = older_escrow(&older).await;
    stranger.send("approve", &[]).await;
    stranger.send("release", &[]).await;

    // Announced late: what was emitted in earlier blocks does not count.
    let late = silent_escrow(world).await;
    late.send("approve", &[]).await;
    look_alike.send("announce", &[late.address.into()]).await;
    factory.send("announce", &[late.address.into()]).await;
    late.send("release", &[]).await;

    // Several escrows and several transactions in one block; one is announced in its middle.
    let in_the_middle = silent_escrow(world).await;
    chain.set_automine(false).await;
    let mut sent = vec![];
    for (number, escrow) in (1..).zip(&many) {
        sent.push(escrow.submit("approveAs", &approve_by(number)).await);
    }
    sent.push(in_the_middle.submit("approveAs", &approve_by(1)).await);
    sent.push(factory.submit("announce", &[in_the_middle.address.into()]).await);
    sent.push(in_the_middle.submit("approveAs", &approve_by(2)).await);
    for escrow in many.iter().rev() {
        sent.push(escrow.submit("release", &[]).await);
    }
    chain.mine(1).await;
    chain.set_automine(true).await;
    let mut blocks = vec![];
    for transaction in sent {
        blocks.push(chain.receipt(transaction).await.block_number);
    }
    assert!(blocks.iter().all(|block| *block == blocks[0]), "one block: {blocks:?}");

    // Several escrows in one transaction, in turn; an escrow announced again after it spoke.
    let (first, second) = (&many[1], &many[2]);
    batch
        .run(&[
            (first, "approve", &[]),
            (second, "approve", &[]),
            (factory, "announce", &[first.address.into()]),
            (first, "refund", &[]),
            (second, "emitAll", &[]),
            (first, "emitReleasedOlder", &[]),
        ])
        .await;
}

/// An escrow of the factory's that nobody announced.
async fn silent_escrow(world: &World) -> Contract {
    let receipt: Receipt = world.factory.send("createSilently", &world.factory.escrow_args()).await;
    world.chain.at("Escrow", receipt.logs[0].address)
}

async fn older_escrow(factory: &Contract) -> Contract {
    let args = factory.escrow_args();
    let receipt = factory.send("createEscrow", &[&args[..2], &args[3..]].concat()).await;
    factory.escrows_in(&receipt).remove(0)
}
