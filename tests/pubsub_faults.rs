//! Pub/Sub that fails in every way there is while the chain goes on and the relayer is killed again and again: at the
//! broker nothing is missing, nothing is extra, nothing overtakes, and what comes again is the same bytes.

mod common;

use std::time::Duration;

use alloy::dyn_abi::DynSolValue;
use alloy::primitives::{Address, keccak256};
use common::load::{Dice, Load};
use common::pubsub::{Attempt, Code};
use common::relay::truth::Truth;
use common::relay::{self, Running};
use common::{Answer, Anvil, Line, PubSub, World};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::{Builder, Runtime};

const TOPIC: &str = "projects/test-project/topics/settlement.events.v1";

struct Broken {
    world: World,
    pubsub: PubSub,
}

impl Broken {
    async fn new() -> Broken {
        Self::on(Anvil::start().await).await
    }

    async fn on(anvil: Anvil) -> Broken {
        let (mut world, pubsub) = World::on(anvil).await.publishing().await;
        world.setup.set("RELAYER_SINK__TIMEOUT", "300ms");
        world.setup.set("RELAYER_SINK__MAX_OUTSTANDING", 50);
        Broken { world, pubsub }
    }

    fn start(&self) -> Running {
        self.world.setup.start(&["run"])
    }

    /// The first occurrence of each message in the order of arrival; repeats are runs of the same bytes.
    fn firsts(&self) -> Vec<Line> {
        let messages = self.pubsub.messages();
        let firsts = relay::firsts(&messages.iter().map(Line::of).collect::<Vec<_>>()).0;
        for line in &firsts {
            let id = line.event_id();
            let mut same = messages.iter().filter(|message| message.attribute("event_id") == id);
            let first = &same.next().expect("it arrived").data;
            assert!(same.all(|message| message.data == *first), "{id}: other bytes");
        }
        firsts
    }

    async fn assert_arrived(&self) {
        self.world.truth().await.assert_is(&self.firsts());
    }
}

#[tokio::test]
async fn every_fault_in_turn_with_kills_amid_a_load_leaves_at_the_broker_the_chain_and_nothing_else() {
    type Decide = fn(&Attempt) -> Answer;
    let table: [(&str, Decide); 9] = [
        ("unavailable", |_| Answer::unavailable()),
        ("answers lost", |_| Answer::lost()),
        ("denied", |_| Answer::Refuse(Code::PermissionDenied, "this account may not publish".into())),
        ("no such token", |_| Answer::Refuse(Code::Unauthenticated, "who are you?".into())),
        ("too much", |_| Answer::Refuse(Code::ResourceExhausted, "quota".into())),
        ("never answers", |_| Answer::Hang),
        ("stores and never answers", |_| Answer::StoreAndHang),
        ("some of each", |attempt| match Dice(attempt.index as u64).below(8) {
            0 => Answer::unavailable(),
            1 => Answer::lost(),
            2 => Answer::Hang,
            3 => Answer::StoreAndHang,
            4 => Answer::Refuse(Code::Internal, "it broke".into()),
            5 => Answer::Refuse(Code::Aborted, "again, please".into()),
            6 => Answer::Delay(Duration::from_millis(40)),
            _ => Answer::Store,
        }),
        ("slow", |_| Answer::Delay(Duration::from_millis(120))),
    ];
    let broken = Broken::new().await;
    let load = Load::start(&broken.world.chain, &broken.world.factory);
    let mut dice = Dice(5);
    let mut relayer = broken.start();
    for (name, fault) in table {
        broken.pubsub.on_publish(fault);
        for _ in 0..2 {
            let seen = broken.pubsub.requests().len();
            broken.pubsub.wait_for_requests(seen + 3).await;
            tokio::time::sleep(Duration::from_millis(dice.below(150))).await; // at any moment
            assert_eq!(relayer.kill().await.code, None, "{name}: it did not end by itself");
            relayer = broken.start();
        }
        broken.pubsub.heal();
        let arrived = broken.pubsub.messages().len();
        broken.pubsub.wait_for(arrived + 1).await;
    }
    load.stop().await;
    relayer.stop().await;
    broken.world.setup.run_to_head().await;
    broken.assert_arrived().await;
}

#[tokio::test]
async fn one_refused_escrow_waits_through_kills_while_the_others_go_on_and_then_comes_whole() {
    let broken = Broken::new().await;
    let World { chain, factory, setup, .. } = &broken.world;
    let refused = factory.create_escrow().await;
    let key = format!("{:#x}", refused.address);
    let no = key.clone();
    broken.pubsub.on_publish(move |attempt| match attempt.ordering_key == no {
        true => Answer::Refuse(Code::InvalidArgument, "not this one".into()),
        false => Answer::Store,
    });
    let load = Load::start(chain, factory);
    for _ in 0..6 {
        let mut relayer = broken.start();
        refused.send("approve", &[]).await;
        relayer.wait_logged("Lane blocked").await;
        let arrived = broken.pubsub.messages().len();
        broken.pubsub.wait_for(arrived + 5).await;
        relayer.kill().await;
    }
    load.stop().await;
    setup.run(&["run", "--until", "head"]).await.failed_with(1, &["1 lanes are blocked"]);
    let mut others = broken.world.truth().await;
    assert_eq!(others.escrows.remove(&key).map(|lane| lane.len()), Some(7));
    others.assert_is(&broken.firsts());
    broken.pubsub.heal();
    setup.run_to_head().await;
    broken.assert_arrived().await;
}

#[tokio::test]
async fn a_topic_deleted_amid_a_load_is_waited_for_and_after_it_is_created_again_nothing_is_missing() {
    let broken = Broken::new().await;
    let load = Load::start(&broken.world.chain, &broken.world.factory);
    let mut relayer = broken.start();
    for kill in [false, true] {
        let arrived = broken.pubsub.messages().len();
        broken.pubsub.wait_for(arrived + 10).await;
        broken.pubsub.delete_topic(TOPIC);
        let said = relayer.wait_logged("Pub/Sub is unavailable").await;
        assert!(said["reason"].as_str().expect("a reason").contains("settlement.events.v1"), "{said}");
        if kill {
            relayer.kill().await;
            relayer = broken.start();
            relayer.wait_logged("Pub/Sub is unavailable").await;
        }
        broken.pubsub.create_topic(TOPIC);
        relayer.wait_logged("Pub/Sub answers again").await;
        if !kill {
            relayer.stop().await;
            relayer = broken.start();
        }
    }
    load.stop().await;
    relayer.stop().await;
    broken.world.setup.run_to_head().await;
    broken.assert_arrived().await;
}

/// Accepts connections and says nothing on them; from `speak` on it forwards new ones to the server, and ends the others. It
/// has a thread of its own: what it forwards late, when whoever sent it has given up, would come after what was sent instead.
struct Mute {
    port: u16,
    speak: tokio::sync::watch::Sender<bool>,
    running: Option<Runtime>,
}

impl Mute {
    async fn before(server: String) -> Mute {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("there is a free port");
        let port = listener.local_addr().expect("it has an address").port();
        let speak = tokio::sync::watch::Sender::new(false);
        let told = speak.clone();
        let running = Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
        let listener = listener.into_std().expect("it is a socket");
        running.spawn(async move {
            let listener = TcpListener::from_std(listener).expect("it does not block");
            loop {
                let (mut near, _) = listener.accept().await.expect("connections can be accepted");
                let (server, mut told) = (server.clone(), told.subscribe());
                tokio::spawn(async move {
                    if *told.borrow_and_update() {
                        let mut far = TcpStream::connect(&server).await?;
                        return tokio::io::copy_bidirectional(&mut near, &mut far).await.map(drop);
                    }
                    let _ = told.changed().await;
                    Ok(())
                });
            }
        });
        Mute { port, speak, running: Some(running) }
    }
}

impl Drop for Mute {
    fn drop(&mut self) {
        self.running.take().expect("taken only here").shutdown_background();
    }
}

#[tokio::test]
async fn a_server_that_accepts_connections_and_never_says_a_word_is_waited_for_through_kills() {
    let mut broken = Broken::new().await;
    let mute = Mute::before(broken.pubsub.endpoint()).await;
    broken.world.setup.set("PUBSUB_EMULATOR_HOST", format!("127.0.0.1:{}", mute.port));
    let load = Load::start(&broken.world.chain, &broken.world.factory);
    for _ in 0..2 {
        let mut relayer = broken.start();
        relayer.wait_logged("Pub/Sub is unavailable").await;
        relayer.kill().await;
    }
    let mut relayer = broken.start();
    relayer.wait_logged("Pub/Sub is unavailable").await;
    load.stop().await;
    mute.speak.send_replace(true);
    relayer.wait_logged("Pub/Sub answers again").await;
    relayer.stop().await;
    // So that nothing it sends is given up and arrives all the same.
    broken.world.setup.set("RELAYER_SINK__TIMEOUT", "15s");
    broken.world.setup.run_to_head().await;
    broken.assert_arrived().await;
}

/// What stands there of an escrow up to an event that is too large to be published, and everything of the others.
fn up_to(mut truth: Truth, key: &str, messages: usize) -> Truth {
    truth.escrows.get_mut(key).expect("it has a lane").truncate(messages);
    truth
}

#[tokio::test]
async fn a_message_too_large_for_pubsub_blocks_its_own_escrow_and_no_other() {
    const BYTES: usize = 2_600_000; // as hex, and twice: over ten million
    let broken =
        Broken::on(Anvil::new().args(["--no-request-size-limit"]).spawn().await.expect("anvil")).await;
    let World { factory, setup, .. } = &broken.world;
    let escrows = factory.create_many(3).await;
    for escrow in &escrows {
        escrow.send("approve", &[]).await;
    }
    let note = DynSolValue::Tuple(vec![DynSolValue::Bytes(vec![0; BYTES])]).abi_encode_params();
    let topics = DynSolValue::Array(vec![DynSolValue::FixedBytes(keccak256("Noted(bytes)"), 32)]);
    escrows[1].send("emitRaw", &[topics, DynSolValue::Bytes(note)]).await;
    for escrow in &escrows {
        escrow.send("release", &[]).await;
    }
    let events = [
        "Approved(address indexed approver)",
        "EscrowReleased(address indexed payee, uint256 amount, uint256 timestamp)",
        "Noted(bytes note)",
    ];
    let events = serde_json::to_string(&events).expect("strings");
    let variables =
        [("RELAYER_ESCROW__EVENTS", &*events), ("RELAYER_ESCROW__TERMINAL", "[\"EscrowReleased\"]")];
    let run = setup.start_with(&["run", "--until", "head"], &variables);
    let key = format!("{:#x}", escrows[1].address);
    let ended = run.ended().await.failed_with(1, &[&key, "Pub/Sub takes", "1 lanes are blocked"]);
    assert_eq!(ended.logged("Lane blocked").len(), 1, "{}", ended.stderr);
    up_to(broken.world.truth().await, &key, 2).assert_is(&broken.firsts());
}

// ---- a full event log

#[tokio::test]
async fn a_full_event_log_pauses_reading_says_so_and_reading_goes_on_when_there_is_room() {
    const MAX_WAITING: u64 = 40;
    const PER_BLOCK: u64 = 7;
    let mut broken = Broken::new().await;
    broken.world.setup.set("RELAYER_LEDGER__MAX_WAITING", MAX_WAITING);
    broken.world.setup.set("RELAYER_SINK__MAX_OUTSTANDING", 10);
    broken.world.setup.set("RELAYER_RPC__MAX_RANGE", 1); // a block a commit
    let escrows = broken.world.factory.create_many(PER_BLOCK).await;
    for nth in 0..30 {
        let escrow = &escrows[nth % escrows.len()];
        broken.world.factory.send("approveMany", &[escrow.address.into(), PER_BLOCK.into()]).await;
    }
    let head = broken.world.chain.block_number().await;
    broken.pubsub.on_publish(|_| Answer::Hang);
    for _again in 0..2 {
        let mut relayer = broken.start();
        let said = relayer.wait_logged("reading pauses").await;
        assert_eq!((&said["severity"], &said["max_waiting"]), (&"WARNING".into(), &MAX_WAITING.into()));
        // Long enough to read everything, if it did.
        tokio::time::sleep(Duration::from_secs(1)).await;
        let finished = relayer.kill().await;
        let read = |name: &str| -> Vec<u64> {
            let read = finished.logged("Processing blocks");
            read.iter().map(|log| log[name].as_u64().expect("a number")).collect()
        };
        assert!(read("to").iter().all(|block| *block < head), "{}", finished.stderr);
        assert!(read("events").iter().sum::<u64>() < MAX_WAITING + PER_BLOCK, "{}", finished.stderr);
        assert_eq!(finished.logged("reading pauses").len(), 1, "said once");
    }
    let mut relayer = broken.start();
    relayer.wait_logged("reading pauses").await;
    broken.pubsub.heal();
    relayer.wait_logged("There is room again").await;
    relayer.wait_read(head).await;
    relayer.stop().await;
    broken.world.setup.run_to_head().await;
    broken.assert_arrived().await;
}

/// A world in which one escrow's messages are refused and leave room for hardly anything else: its key.
async fn without_room(broken: &mut Broken) -> String {
    broken.world.setup.set("RELAYER_LEDGER__MAX_WAITING", 6);
    broken.world.setup.set("RELAYER_RPC__MAX_RANGE", 1); // a block a commit
    let escrows = broken.world.factory.create_many(2).await;
    let key = format!("{:#x}", escrows[0].address);
    for _ in 0..3 {
        for escrow in &escrows {
            broken.world.factory.send("approveMany", &[escrow.address.into(), 4u64.into()]).await;
        }
    }
    let refused = key.clone();
    broken.pubsub.on_publish(move |attempt| match attempt.ordering_key == refused {
        true => Answer::Refuse(Code::InvalidArgument, "not this one".into()),
        false => Answer::Store,
    });
    key
}

#[tokio::test]
async fn a_job_to_which_blocked_lanes_leave_no_room_ends_and_names_them_and_the_ways_out() {
    let mut broken = Broken::new().await;
    let key = without_room(&mut broken).await;
    let head = broken.world.chain.block_number().await;
    let ended = broken.world.setup.run(&["run", "--until", "head"]).await;
    let said = [&key, "not this one", "relayer outbox list", "retry", "discard", "ledger.max_waiting = 6"];
    let ended = ended.failed_with(1, &said);
    let read = ended.logged("Processing blocks").into_iter().filter_map(|log| log["to"].as_u64()).max();
    assert!(read.is_some_and(|read| read < head), "it did not read on without room: {}", ended.stderr);
    broken.pubsub.heal();
    broken.world.setup.run_to_head().await;
    broken.assert_arrived().await;
}

#[tokio::test]
async fn a_job_that_has_read_everything_ends_as_blocked_also_if_there_is_no_room_left() {
    let mut broken = Broken::new().await;
    let refused: Address = without_room(&mut broken).await.parse().expect("an address");
    broken.world.factory.send("approveMany", &[refused.into(), 4u64.into()]).await;
    broken.world.setup.set("RELAYER_LEDGER__MAX_WAITING", 1 + 4 * 4); // all there is of it, with the last block
    let ended = broken.world.setup.run(&["run", "--until", "head"]).await;
    let ended = ended.failed_with(1, &["1 lanes are blocked: their messages are kept"]);
    assert!(!ended.stderr.contains("nothing more is read"), "{}", ended.stderr);
    broken.pubsub.heal();
    broken.world.setup.run_to_head().await;
    broken.assert_arrived().await;
}

#[tokio::test]
async fn a_run_to_which_blocked_lanes_leave_no_room_says_so_once_and_goes_on_when_they_are_mended() {
    let mut broken = Broken::new().await;
    let key = without_room(&mut broken).await;
    let head = broken.world.chain.block_number().await;
    let mut relayer = broken.start();
    let said = relayer.wait_logged("All that waits is blocked").await;
    assert_eq!(said["severity"], "WARNING");
    let text = said["message"].as_str().expect("a text");
    for word in [&*key, "not this one", "relayer outbox list", "ledger.max_waiting = 6"] {
        assert!(text.contains(word), "{word}: {text}");
    }
    // Offered again and refused again: no news.
    broken.world.setup.run(&["outbox", "retry", "--all"]).await.good();
    broken.pubsub.heal();
    broken.world.setup.run(&["outbox", "retry", "--all"]).await.good();
    relayer.wait_logged("There is room again").await;
    relayer.wait_read(head).await;
    let ended = relayer.stop().await;
    assert_eq!(ended.logged("All that waits is blocked").len(), 1, "{}", ended.stderr);
    broken.world.setup.run_to_head().await;
    broken.assert_arrived().await;
}
