//! When the chain changes its mind, what was published is withdrawn: exactly that, newest first, on the same key.
//! Real binary, real chain, no confirmations: the relayer has published everything before the fork comes.

mod common;

use common::relay::proxy::{Proxy, Request};
use common::relay::truth::{retraction, without_epoch};
use common::relay::{by_key, names_of};
use common::{Contract, Line, Running, World};

struct Forked {
    world: World,
    proxy: Proxy,
    relayer: Running,
}

impl Forked {
    /// With one escrow, announced far below any fork, and a relayer that has said so.
    async fn new() -> (Forked, Contract) {
        Self::reading("linked").await
    }

    async fn reading(how: &str) -> (Forked, Contract) {
        let mut world = World::new().await;
        let escrow = world.factory.create_escrow().await;
        world.chain.mine(3).await;
        let proxy = Proxy::start(&world.anvil.url()).await;
        world.setup.set("RPC_URL", proxy.url());
        world.setup.set("RELAYER_CHAIN__READING", how);
        let mut relayer = world.setup.start(&["run"]);
        relayer.wait_for_lines(1).await;
        (Forked { world, proxy, relayer }, escrow)
    }

    /// Waits until the relayer has read the head as it is now.
    async fn settled(&mut self) {
        let head = self.world.chain.block_number().await;
        // A block of its own, so that the wait is for something that comes after all that is asked about.
        self.world.chain.mine(1).await;
        self.relayer.wait_read(head + 1).await;
    }

    /// Ends it and compares: published less retracted is the chain, numbers without gaps.
    async fn finish(self) -> Vec<Line> {
        let truth = self.world.truth().await;
        let mut lines = self.relayer.stop().await.lines();
        // What stopping cut off comes with the next life, in the same numbering.
        lines.extend(self.world.setup.run_to_head().await);
        truth.assert_is_net(&lines);
        lines
    }
}

#[tokio::test]
async fn events_of_lost_blocks_are_retracted_newest_first_and_relayed_anew_where_they_are_mined_again() {
    let (mut forked, escrow) = Forked::new().await;
    let approved = escrow.send("approve", &[]).await;
    let released = escrow.send("release", &[]).await;
    forked.world.chain.mine(1).await;
    let before = forked.relayer.wait_for_lines(3).await;

    // The approval moves one block further; the release is gone.
    forked.world.chain.reorg_keeping(3, &[(approved.transaction_hash, 1)]).await;
    let lines = forked.relayer.wait_for_lines(6).await;
    let expected = ["EscrowDeployed", "Approved", "EscrowReleased", "Retracted", "Retracted", "Approved"];
    assert_eq!(names_of(&lines, escrow.address), expected);

    let plain = without_epoch(&lines);
    assert_eq!(plain[3], retraction(&without_epoch(&before)[2], 4));
    assert_eq!(plain[4], retraction(&without_epoch(&before)[1], 5));
    for line in &lines[3..5] {
        assert_eq!(line.attributes["epoch"], lines[0].attributes["epoch"]);
        let top =
            line.data.as_object().expect("an object").iter().filter(|(name, _)| *name != "retracted_event");
        let said: Vec<String> = top
            .map(|(_, value)| value.to_string())
            .chain(line.attributes.values().map(|value| format!("{value:?}")))
            .collect();
        for name in ["\"Approved\"", "\"EscrowReleased\""] {
            assert!(!said.iter().any(|value| value == name), "nobody may mistake it for {name}: {said:?}");
        }
    }
    assert_eq!(lines[3].data["retracts"], lines[2].data["event_id"]);
    assert_eq!(lines[3].attributes["block_number"], released.block_number.to_string());
    assert_eq!(lines[5].data["transaction_hash"], lines[1].data["transaction_hash"]);
    assert_ne!(lines[5].data["event_id"], lines[1].data["event_id"], "in another block it is another event");
    forked.finish().await;
}

#[tokio::test]
async fn a_transaction_mined_again_at_the_same_height_is_another_event() {
    let (mut forked, escrow) = Forked::new().await;
    let approved = escrow.send("approve", &[]).await;
    forked.relayer.wait_for_lines(2).await;
    forked.world.chain.reorg_keeping(1, &[(approved.transaction_hash, 0)]).await;
    let lines = forked.relayer.wait_for_lines(4).await;
    assert_eq!(names_of(&lines, escrow.address), ["EscrowDeployed", "Approved", "Retracted", "Approved"]);
    assert_eq!(lines[1].data["block_number"], lines[3].data["block_number"]);
    assert_ne!(lines[1].data["block_hash"], lines[3].data["block_hash"]);
    forked.finish().await;
}

#[tokio::test]
async fn other_escrows_hear_nothing_of_a_fork_that_lost_none_of_their_events() {
    let (mut forked, escrow) = Forked::new().await;
    let other = forked.world.factory.create_escrow().await;
    escrow.send("approve", &[]).await;
    forked.relayer.wait_for_lines(3).await;
    forked.world.chain.reorg(1).await;
    forked.relayer.wait_for_lines(4).await;
    forked.settled().await;
    let lines = forked.finish().await;
    assert_eq!(names_of(&lines, escrow.address), ["EscrowDeployed", "Approved", "Retracted"]);
    assert_eq!(names_of(&lines, other.address), ["EscrowDeployed"]);
}

#[tokio::test]
async fn an_escrow_announced_only_on_the_lost_fork_is_no_longer_watched() {
    let (mut forked, first) = Forked::new().await;
    let lost = forked.world.factory.create_escrow().await;
    lost.send("approve", &[]).await;
    let lines = forked.relayer.wait_for_lines(3).await;
    assert_eq!(names_of(&lines, lost.address), ["EscrowDeployed", "Approved"]);
    forked.world.chain.reorg(2).await;
    let lines = forked.relayer.wait_for_lines(5).await;
    let withdrawn = ["EscrowDeployed", "Approved", "Retracted", "Retracted"];
    assert_eq!(names_of(&lines, lost.address), withdrawn);

    // The factory's next contract gets that very address. Not announced, it is nobody's.
    let factory = &forked.world.factory;
    let again = factory.send("createSilently", &factory.escrow_args()).await.logs[0].address;
    assert_eq!(again, lost.address);
    lost.send("emitAll", &[]).await;
    first.send("approve", &[]).await;
    let lines = forked.relayer.wait_for_lines(6).await;
    assert_eq!(names_of(&lines, lost.address), withdrawn);

    // Announced again, it is watched again, and numbered on.
    forked.world.factory.send("announce", &[lost.address.into()]).await;
    lost.send("release", &[]).await;
    let lines = forked.relayer.wait_for_lines(8).await;
    let sequences: Vec<u64> =
        by_key(&lines)[&format!("{:#x}", lost.address)].iter().map(Line::sequence).collect();
    assert_eq!(sequences, Vec::from_iter(1..=6));
    forked.finish().await;
}

#[tokio::test]
async fn an_escrow_announced_again_on_the_new_fork_goes_on_with_its_life() {
    let (mut forked, _) = Forked::new().await;
    let (escrow, created) = forked.world.factory.create_by("createApprovedInConstructor").await;
    let approved = escrow.send("approve", &[]).await;
    forked.relayer.wait_for_lines(4).await;
    let keep = [(created.transaction_hash, 1), (approved.transaction_hash, 1)];
    forked.world.chain.reorg_keeping(2, &keep).await;
    let lines = forked.relayer.wait_for_lines(10).await;
    let life = ["EscrowDeployed", "Approved", "Approved"];
    let expected = [&life[..], &["Retracted"; 3][..], &life[..]].concat();
    assert_eq!(names_of(&lines, escrow.address), expected);
    escrow.send("release", &[]).await;
    forked.relayer.wait_for_lines(11).await;
    forked.finish().await;
}

#[tokio::test]
async fn a_fork_that_is_shorter_than_what_was_read_is_followed_too() {
    let (mut forked, escrow) = Forked::new().await;
    for _ in 0..4 {
        escrow.send("approve", &[]).await;
    }
    forked.relayer.wait_for_lines(5).await;
    let high = forked.world.chain.block_number().await;
    forked.world.chain.roll_back(3).await;
    escrow.send("release", &[]).await;
    assert!(forked.world.chain.block_number().await < high);
    let lines = forked.relayer.wait_for_lines(9).await;
    let mut expected = vec!["EscrowDeployed"];
    expected.extend(["Approved"; 4]);
    expected.extend(["Retracted"; 3]);
    expected.push("EscrowReleased");
    assert_eq!(names_of(&lines, escrow.address), expected);
    forked.finish().await;
}

#[tokio::test]
async fn a_node_that_only_lags_makes_nothing_be_retracted() {
    let (mut forked, escrow) = Forked::new().await;
    escrow.send("approve", &[]).await;
    forked.relayer.wait_for_lines(2).await;
    let chain = &forked.world.chain;
    let head = chain.head().await;
    // The same chain, two empty blocks shorter, and polled several times.
    chain.mine(2).await;
    forked.relayer.wait_read(head.number + 2).await;
    forked.world.chain.roll_back(2).await;
    assert_eq!(forked.world.chain.head().await.hash, head.hash);
    let from = forked.proxy.requests().len();
    let sees = |request: &Request| request.is_poll() && request.calls[0].block() == Some(head.number);
    let polled = |requests: &[Request]| requests.iter().filter(|request| sees(request)).count() >= 3;
    forked.proxy.wait_until("polls of the shorter chain", from, polled).await;
    forked.world.chain.mine(3).await;
    escrow.send("release", &[]).await;
    let lines = forked.relayer.wait_for_lines(3).await;
    assert_eq!(names_of(&lines, escrow.address), ["EscrowDeployed", "Approved", "EscrowReleased"]);
    forked.finish().await;
}

#[tokio::test]
async fn a_fork_that_came_while_it_was_stopped_is_noticed_at_the_next_start() {
    let world = World::new().await;
    let escrow = world.factory.create_escrow().await;
    escrow.send("approve", &[]).await;
    escrow.send("refund", &[]).await;
    let mut lines = world.setup.run_to_head().await;
    world.chain.reorg(2).await;
    escrow.send("release", &[]).await;
    lines.extend(world.setup.run_to_head().await);
    let expected =
        ["EscrowDeployed", "Approved", "EscrowRefunded", "Retracted", "Retracted", "EscrowReleased"];
    assert_eq!(names_of(&lines, escrow.address), expected);
    world.truth().await.assert_is_net(&lines);
}

#[tokio::test]
async fn a_fork_below_finality_halts_changes_nothing_and_names_the_way_out() {
    let world = World::new().await;
    let escrow = world.factory.create_escrow().await;
    escrow.send("approve", &[]).await;
    world.chain.mine(200).await;
    assert_eq!(world.setup.run_to_head().await.len(), 2);
    world.chain.reorg(100).await; // finality is 64 blocks deep
    for _ in 0..2 {
        let ended = world.setup.run(&["run"]).await;
        let ended =
            ended.failed_with(1, &["forked below block", "nothing was changed", "RPC provider", "store"]);
        assert!(ended.stdout.is_empty());
    }
}

#[tokio::test]
async fn after_many_forks_in_a_row_published_less_retracted_is_the_chain() {
    many_forks("linked").await;
}

#[tokio::test]
async fn after_many_forks_in_a_row_read_by_range_published_less_retracted_is_the_chain() {
    many_forks("ranged").await;
}

async fn many_forks(reading: &str) {
    let (mut forked, first) = Forked::reading(reading).await;
    let mut escrows = vec![first];
    escrows.extend(forked.world.factory.create_many(5).await);
    forked.world.chain.mine(1).await;
    for round in 0..6_u64 {
        let world = &forked.world;
        let mut sent = vec![];
        for (number, escrow) in escrows.iter().enumerate() {
            let approvals = 1 + (round + number as u64) % 3;
            let args = [escrow.address.into(), approvals.into()];
            sent.push(world.factory.send("approveMany", &args).await.transaction_hash);
        }
        sent.push(world.factory.send("createMany", &[2u64.into()]).await.transaction_hash);
        let head = world.chain.block_number().await;
        forked.relayer.wait_read(head).await;
        // The deeper the fork, the more of it comes back.
        let (depth, kept) = (1 + round, round as usize / 2);
        let first_lost = sent.len() - depth as usize;
        let keep: Vec<_> = sent[first_lost..].iter().take(kept).map(|hash| (*hash, depth - 1)).collect();
        forked.world.chain.reorg_keeping(depth, &keep).await;
        forked.relayer.wait_logged_times("The chain was reorganised", round as usize + 1).await;
    }
    forked.settled().await;
    let lines = forked.finish().await;
    let retracted = lines.iter().filter(|line| line.is_retraction()).count();
    assert!(retracted >= 20, "only {retracted} retractions");
}
