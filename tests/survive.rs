//! Whatever breaks, no event is lost, order per escrow holds, and the relayer goes on by itself when the fault ends.
//! Real binary, real chain, a proxy that fails and lies, kills at random moments; what arrived is compared with the chain.

mod common;

use std::time::{Duration, Instant};

use common::load::{Dice, Load};
use common::pubsub::Message;
use common::relay::faults::{Fault, Faults};
use common::relay::{self, PATIENCE};
use common::{Line, PubSub, World};

/// Whether so much of a thousand hits this number; the same in every run.
fn hits(number: usize, of_a_thousand: u64) -> bool {
    Dice(number as u64 + 1).below(1000) < of_a_thousand
}

/// A world whose relayer reaches the node through [`Faults`].
async fn faulty_world() -> (World, Faults) {
    let mut world = World::new().await;
    let faults = Faults::start(&world.anvil.url()).await;
    world.setup.set("RPC_URL", faults.url());
    world.setup.set("RELAYER_RPC__TIMEOUT", "500ms");
    (world, faults)
}

/// Waits until the lines of this relayer are as many as the events of the chain, stops it and compares.
async fn assert_catches_up(world: &World, relayer: relay::Running) {
    let mut relayer = relayer;
    let truth = world.truth().await;
    relayer.wait_for_lines(truth.len()).await;
    let finished = relayer.stop().await;
    truth.assert_is(&finished.lines());
}

#[tokio::test]
async fn faults_of_the_node_in_turn_and_at_random_lose_nothing_and_add_nothing() {
    let table = [
        Fault::Status(429, "", "slow down"),
        Fault::Status(429, "retry-after: 1", "Too Many Requests"),
        Fault::Status(503, "", "<html><body>503</body></html>"),
        Fault::Hang,
        Fault::Body("<!doctype html><p>down for maintenance"),
        Fault::Body(""),
        Fault::Body("null"),
        Fault::Body("[]"),
        Fault::Truncated,
        Fault::Reset,
        Fault::Errors(-32603, "something odd went on in there"),
        Fault::OneError(-32000, "the moon is in the wrong phase"),
    ];
    let (world, faults) = faulty_world().await;
    let load = Load::start(&world.chain, &world.factory);
    let relayer = world.setup.start(&["run"]);
    for fault in &table {
        let (once, passed) = (fault.clone(), faults.requests());
        faults.on_request(move |number, _| if number < passed + 2 { once.clone() } else { Fault::Pass });
        let asked = Instant::now();
        while faults.requests() < passed + 6 {
            assert!(asked.elapsed() < PATIENCE, "it goes on after {fault:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
    let all = table.clone();
    faults.on_request(move |number, _| match hits(number, 300) {
        true => all[number % all.len()].clone(),
        false => Fault::Pass,
    });
    let from = faults.requests();
    let asked = Instant::now();
    while faults.requests() < from + 40 {
        assert!(asked.elapsed() < PATIENCE, "it goes on with faults at random");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    load.stop().await;
    // The faults go on while it catches up.
    assert_catches_up(&world, relayer).await;
}

#[tokio::test]
async fn half_of_all_answers_from_a_node_that_is_behind_miss_nothing_and_withdraw_nothing() {
    for reading in ["linked", "ranged"] {
        let (mut world, faults) = faulty_world().await;
        world.setup.set("RELAYER_CHAIN__READING", reading);
        faults.on_request(|number, _| if hits(number, 500) { Fault::Behind(3) } else { Fault::Pass });
        let load = Load::start(&world.chain, &world.factory);
        let relayer = world.setup.start(&["run"]);
        tokio::time::sleep(Duration::from_secs(5)).await; // what happens meanwhile is the test
        load.stop().await;
        assert_catches_up(&world, relayer).await;
    }
}

#[tokio::test]
async fn in_a_total_outage_it_asks_rarely_and_it_goes_on_when_that_ends() {
    let table = [Fault::Status(503, "", "no"), Fault::Reset, Fault::Errors(-32000, "no backend is well")];
    for fault in table {
        let (world, faults) = faulty_world().await;
        // Enough to read that many requests would be under way at once.
        world.factory.create_many(20).await;
        world.chain.mine(300).await;
        let said = format!("{fault:?}");
        faults.on_request(move |_, _| fault.clone());
        let relayer = world.setup.start(&["run"]);
        while faults.requests() == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        tokio::time::sleep(Duration::from_secs(3)).await; // the bound is on requests in so much time
        let requests = faults.requests();
        assert!(requests < 60, "{requests} requests in three seconds of {said}");
        faults.heal();
        assert_catches_up(&world, relayer).await;
    }
}

struct Published {
    world: World,
    pubsub: PubSub,
}

impl Published {
    async fn new() -> Published {
        let (world, pubsub) = World::new().await.publishing().await;
        Published { world, pubsub }
    }

    /// The first occurrence of each message, and how many were repeats: these are runs of the same bytes.
    fn firsts(&self) -> (Vec<Line>, usize) {
        let messages: Vec<Message> = self.pubsub.messages();
        relay::firsts(&messages.iter().map(Line::of).collect::<Vec<_>>())
    }
}

#[tokio::test]
async fn thirty_kills_under_load_lose_nothing_and_repeat_only_what_was_under_way() {
    const OUTSTANDING: usize = 50;
    let mut published = Published::new().await;
    published.world.setup.set("RELAYER_SINK__MAX_OUTSTANDING", OUTSTANDING);
    let World { chain, factory, setup, .. } = &published.world;
    let load = Load::start(chain, factory);
    let (mut dice, mut repeated) = (Dice(1), 0);
    for kill in 1..=30 {
        let relayer = setup.start(&["run"]);
        tokio::time::sleep(Duration::from_millis(50 + dice.below(250))).await; // at any moment
        relayer.kill().await;
        let (_, repeats) = published.firsts();
        assert!(repeats <= repeated + OUTSTANDING, "kill {kill}: {} repeats", repeats - repeated);
        repeated = repeats;
    }
    load.stop().await;
    setup.run_to_head().await;
    let (firsts, _) = published.firsts();
    published.world.truth().await.assert_is(&firsts);
}

#[tokio::test]
async fn forks_of_every_depth_with_kills_between_leave_published_less_retracted_the_chain() {
    let published = Published::new().await;
    let World { chain, factory, setup, .. } = &published.world;
    // Made below every fork.
    let (escrows, mut dice) = (factory.create_many(4).await, Dice(3));
    chain.mine(10).await;
    let mut relayer = setup.start(&["run"]);
    for depth in [1, 2, 3, 4, 5, 6, 6, 1, 3, 2] {
        for _ in 0..3 {
            let escrow = escrows[dice.below(escrows.len() as u64) as usize].clone();
            escrow.send("approve", &[]).await;
            factory.send("approveMany", &[escrow.address.into(), 3u64.into()]).await;
        }
        let base = chain.block_number().await;
        match dice.below(3) {
            // Amid reading, or after it.
            0 => {}
            1 => relayer.wait_read(base).await,
            _ => {
                relayer.kill().await;
                relayer = setup.start(&["run"]);
            }
        }
        factory.create_by("createApproveRelease").await;
        tokio::time::sleep(Duration::from_millis(dice.below(120))).await; // at any moment
        match dice.below(3) {
            0 => chain.roll_back(depth).await,
            _ => chain.reorg(depth).await,
        }
        factory.create_escrow().await;
    }
    relayer.kill().await;
    chain.mine(8).await;
    setup.run_to_head().await;
    let (firsts, _) = published.firsts();
    published.world.truth().await.assert_is_net(&firsts);
}
