//! Published again: the same bytes, in order, beside whatever happens meanwhile; and never what did not get out before.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use alloy::primitives::Address;
use common::load::Load;
use common::pubsub::{Code, Message};
use common::relay::{PATIENCE, firsts};
use common::{Answer, Line, PubSub, World};

async fn with_pubsub() -> (World, PubSub) {
    World::new().await.publishing().await
}

fn is_replay(message: &Message) -> bool {
    message.attribute("replay") == "true"
}

/// What came in its turn, and what came again.
fn parted(pubsub: &PubSub) -> (Vec<Message>, Vec<Message>) {
    pubsub.messages().into_iter().partition(|message| !is_replay(message))
}

fn lines(messages: &[Message]) -> Vec<Line> {
    messages.iter().map(Line::of).collect()
}

/// Each is what was published before, byte for byte, but for the mark.
fn assert_same(replayed: &[Message], published: &[Message]) {
    let by_id: BTreeMap<&str, &Message> =
        published.iter().map(|message| (message.attribute("event_id"), message)).collect();
    for message in replayed {
        let original = by_id[message.attribute("event_id")];
        let mut attributes = message.attributes.clone();
        attributes.remove("replay");
        assert_eq!(attributes, original.attributes);
        assert_eq!((&message.data, &message.ordering_key), (&original.data, &original.ordering_key));
    }
}

/// The event ids of each key, in their order.
fn ids_by_key(messages: &[Message]) -> BTreeMap<String, Vec<String>> {
    let mut keys: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for message in messages {
        keys.entry(message.ordering_key.clone()).or_default().push(message.attribute("event_id").to_owned());
    }
    keys
}

/// Waits until every acknowledgement is stored.
async fn settled(world: &World) {
    let looked = async {
        loop {
            let outbox = world.setup.run(&["outbox", "list"]).await.good().stdout;
            if outbox[0].starts_with("0 waiting") {
                return;
            }
        }
    };
    tokio::time::timeout(PATIENCE, looked).await.expect("everything is acknowledged");
}

async fn replay(world: &World, from: u64, to: u64, more: &[&str]) -> common::Finished {
    let (from, to) = (from.to_string(), to.to_string());
    world.setup.run(&[&["replay", "--from", &from, "--to", &to], more].concat()).await
}

#[tokio::test]
async fn a_replay_beside_a_running_relayer_is_the_same_bytes_in_order_while_new_events_keep_theirs() {
    let (mut world, pubsub) = with_pubsub().await;
    world.setup.set("RELAYER_SINK__MAX_OUTSTANDING", 12);
    let load = Load::start(&world.chain, &world.factory);
    let mut relayer = world.setup.start(&["run"]);
    pubsub.wait_for(60).await;
    let last = world.chain.block_number().await;
    relayer.wait_read(last).await;
    // Whatever waits still is not replayed: so first everything up to there is out.
    let expected: BTreeSet<String> = world
        .truth_to(last)
        .await
        .escrows
        .values()
        .flatten()
        .map(|line| line.event_id().to_owned())
        .collect();
    pubsub
        .wait_until("everything up to that block", |messages| {
            let there: BTreeSet<&str> = messages.iter().map(|it| it.attribute("event_id")).collect();
            expected.iter().all(|id| there.contains(id.as_str()))
        })
        .await;
    let arrived = pubsub.messages().len();
    pubsub.wait_for(arrived + 13).await; // by now their acknowledgements are stored
    for _ in 0..2 {
        replay(&world, 0, last, &[]).await.good();
    }
    load.stop().await;
    relayer.stop().await;
    world.setup.run_to_head().await;

    let (published, replayed) = parted(&pubsub);
    assert_eq!(replayed.len(), 2 * expected.len());
    assert_same(&replayed, &published);
    let (once, again) = replayed.split_at(expected.len());
    let ids = |messages: &[Message]| -> BTreeSet<String> {
        messages.iter().map(|it| it.attribute("event_id").to_owned()).collect()
    };
    assert_eq!((ids(once), ids(again)), (expected.clone(), expected.clone()));
    let in_their_turn = ids_by_key(&published);
    for run in [once, again] {
        for (key, ids) in ids_by_key(run) {
            assert_eq!(in_their_turn[&key][..ids.len()], ids, "{key}");
        }
    }
    // First occurrences, replays included, are what the chain has.
    let (first, repeats) = firsts(&lines(&published));
    assert_eq!(repeats, 0);
    world.truth().await.assert_is(&first);
    let mut seen = BTreeSet::new();
    let new = pubsub.messages().into_iter().filter(|it| seen.insert(it.attribute("event_id").to_owned()));
    assert!(!new.collect::<Vec<_>>().iter().any(is_replay), "nothing comes first as a replay");
}

#[tokio::test]
async fn on_a_file_a_replay_publishes_its_range_or_one_escrow_of_it_and_nothing_that_waits() {
    let (world, pubsub) = with_pubsub().await;
    let escrows = world.factory.create_many(4).await;
    let created = world.chain.block_number().await;
    for escrow in &escrows {
        escrow.send("approve", &[]).await;
    }
    world.setup.run_to_head().await;
    // One more waits, as it is refused.
    let key = format!("{:#x}", escrows[0].address);
    let no = key.clone();
    pubsub.on_publish(move |attempt| match attempt.ordering_key == no {
        true => Answer::Refuse(Code::InvalidArgument, "not this one".into()),
        false => Answer::Store,
    });
    escrows[0].send("release", &[]).await;
    let head = world.chain.block_number().await;
    world.setup.run(&["run", "--until", "head"]).await.failed_with(1, &["1 lanes are blocked"]);
    pubsub.heal();

    let done = replay(&world, created + 1, head, &[]).await.good();
    assert!(done.stderr.contains("4 messages of blocks"), "{}", done.stderr);
    let (published, replayed) = parted(&pubsub);
    assert_eq!((published.len(), replayed.len()), (8, 4));
    assert_same(&replayed, &published);

    let done = replay(&world, 0, head, &["--escrow", &key]).await.good();
    assert!(done.stderr.contains("2 messages of blocks"), "{}", done.stderr);
    let (_, replayed) = parted(&pubsub);
    assert_eq!(replayed[4..].iter().map(|it| it.attribute("sequence")).collect::<Vec<_>>(), ["1", "2"]);
    assert!(replayed[4..].iter().all(|message| message.ordering_key == key));
    assert_eq!(world.setup.run_to_head().await, []);
    assert_eq!(parted(&pubsub).0.len(), 9, "what waited came in its turn");
    replay(&world, 5, 4, &[]).await.failed_with(2, &["--from 5 --to 4"]);
}

#[tokio::test]
async fn retractions_are_replayed_in_their_place() {
    let world = World::new().await;
    let escrow = world.factory.create_escrow().await;
    let mut relayer = world.setup.start(&["run"]);
    escrow.send("approve", &[]).await;
    relayer.wait_for_lines(2).await;
    world.chain.reorg(1).await;
    relayer.wait_for_lines(3).await;
    escrow.send("approve", &[]).await;
    let published = relayer.wait_for_lines(4).await;
    relayer.stop().await;
    let head = world.chain.block_number().await;
    let again = replay(&world, 0, head, &[]).await.good().lines();
    let unmarked = |line: &Line| {
        let mut line = line.clone();
        assert_eq!(line.attributes.remove("replay").as_deref(), Some("true"));
        line
    };
    assert_eq!(again.iter().map(unmarked).collect::<Vec<_>>(), published);
}

#[tokio::test]
async fn what_was_pruned_cannot_be_replayed_and_the_first_block_that_can_is_named() {
    let mut world = World::new().await;
    world.setup.set("RELAYER_LEDGER__RETENTION", "1s");
    world.factory.create_many(3).await;
    let pruned = world.chain.block_number().await;
    world.chain.mine(200).await;
    let mut relayer = world.setup.start(&["run"]);
    relayer.wait_for_lines(3).await;
    world.chain.mine(70).await;
    // Pruned as soon as it is old enough: then its block is named as one that is gone.
    let refused = loop {
        let finished = replay(&world, pruned, pruned, &[]).await;
        if finished.code != Some(0) {
            break finished;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    let said = format!("the first block that can is {}", pruned + 1);
    refused.failed_with(2, &["ledger.retention", &said]);
    replay(&world, pruned + 1, pruned + 9, &[]).await.good();
    relayer.stop().await;
}

#[tokio::test]
async fn a_replay_that_pruning_overtakes_fails_and_says_from_which_block_on_it_can_go_on() {
    let (mut world, pubsub) = with_pubsub().await;
    world.setup.set("RELAYER_LEDGER__RETENTION", "1s");
    // More than a page of the log, in blocks none of which is final yet.
    for _ in 0..11 {
        world.factory.create_many(100).await;
    }
    let last = world.chain.block_number().await;
    let relayer = world.setup.start(&["run"]);
    pubsub.wait_for(1100).await;
    settled(&world).await;
    pubsub.on_publish(|_| Answer::unavailable());
    let before = pubsub.requests().len();
    let replaying = world.setup.start(&["replay", "--from", "0", "--to", &last.to_string()]);
    pubsub.wait_for_requests(before + 1).await;
    // Its first page is read: now everything becomes final, and is pruned once it is old enough.
    world.chain.mine(70).await;
    loop {
        // What is final is noted with the next block.
        world.chain.mine(1).await;
        // Of an escrow without messages, so that nothing is published.
        let finished = replay(&world, last, last, &["--escrow", &format!("{:#x}", Address::ZERO)]).await;
        if finished.code != Some(0) {
            break;
        }
    }
    pubsub.heal();
    let said = format!("the first block that can is {}", last + 1);
    let ended = replaying.ended().await;
    ended.failed_with(1, &["pruning was faster", "ledger.retention", &said]);
    let (_, replayed) = parted(&pubsub);
    assert_eq!(replayed.len(), 1000, "the page that was read");
    relayer.stop().await;
}

#[tokio::test]
async fn killed_in_the_middle_of_a_replay_the_relayer_loses_nothing_and_repeats_at_most_what_was_under_way() {
    let (mut world, pubsub) = with_pubsub().await;
    world.setup.set("RELAYER_SINK__MAX_OUTSTANDING", 4); // so it goes message by message
    let escrows = world.factory.create_many(40).await;
    world.setup.run_to_head().await;
    let last = world.chain.block_number().await;
    let mut relayer = world.setup.start(&["run"]);
    relayer.wait_logged("Relaying from block").await;
    pubsub.on_publish(|_| Answer::Delay(Duration::from_millis(200)));
    let (from, to) = ("0", last.to_string());
    let replaying = world.setup.start(&["replay", "--from", from, "--to", &to]);
    pubsub.wait_until("some of the replay", |messages| messages.iter().any(is_replay)).await;
    escrows[0].send("approve", &[]).await;
    relayer.kill().await;
    replaying.ended().await.failed_with(1, &["the relayer ended before it had answered everything"]);
    pubsub.heal();
    world.setup.run_to_head().await;
    let (published, replayed) = parted(&pubsub);
    assert!(replayed.len() < 40, "it was in the middle");
    assert_same(&replayed, &published);
    let (first, repeats) = firsts(&lines(&published));
    world.truth().await.assert_is(&first);
    let in_turn = published.iter().filter(|message| message.attribute("sequence") == "1").count();
    assert_eq!(in_turn, 40, "what was acknowledged before comes again as a replay only");
    assert!(repeats <= 1, "{repeats} repeats: only the new one may have been under way");
}

#[tokio::test]
async fn a_replayed_message_that_is_refused_is_told_and_holds_up_no_lane() {
    let (world, pubsub) = with_pubsub().await;
    let escrows = world.factory.create_many(3).await;
    let relayer = world.setup.start(&["run"]);
    pubsub.wait_for(3).await;
    let last = world.chain.block_number().await;
    settled(&world).await;
    let key = format!("{:#x}", escrows[1].address);
    pubsub.on_publish(move |attempt| match attempt.ordering_key == key {
        true => Answer::Refuse(Code::InvalidArgument, "not this one".into()),
        false => Answer::Store,
    });
    let finished = replay(&world, 0, last, &[]).await;
    let finished = finished.failed_with(1, &["2 messages of blocks", "1 were not", "not this one"]);
    assert!(!finished.stderr.contains("panicked"));
    pubsub.heal();
    escrows[1].send("approve", &[]).await;
    pubsub.wait_for(6).await;
    assert!(!relayer.stop().await.stderr.contains("Lane blocked"));
}

#[tokio::test]
async fn ctrl_c_ends_a_replay_beside_a_running_relayer_and_on_the_file() {
    for running in [true, false] {
        let (mut world, pubsub) = with_pubsub().await;
        world.setup.set("RELAYER_SINK__MAX_OUTSTANDING", 4); // so it goes message by message
        let escrows = world.factory.create_many(40).await;
        world.setup.run_to_head().await;
        let last = world.chain.block_number().await.to_string();
        let mut relayer = running.then(|| world.setup.start(&["run"]));
        if let Some(relayer) = &mut relayer {
            relayer.wait_logged("Relaying from block").await;
        }
        pubsub.on_publish(|_| Answer::Delay(Duration::from_millis(200)));
        let replaying = world.setup.start(&["replay", "--from", "0", "--to", &last]);
        pubsub.wait_until("some of the replay", |messages| messages.iter().any(is_replay)).await;
        replaying.interrupted().await.failed_with(1, &["stopped by Ctrl-C"]);
        pubsub.heal();
        escrows[39].send("approve", &[]).await;
        match relayer {
            Some(relayer) => {
                pubsub
                    .wait_until("the new one", |all| all.iter().any(|it| it.attribute("sequence") == "2"))
                    .await;
                settled(&world).await;
                relayer.stop().await;
            }
            None => drop(world.setup.run_to_head().await),
        }
        let (published, replayed) = parted(&pubsub);
        assert_eq!(published.len(), 41, "running: {running}");
        assert!(replayed.len() < 40, "running: {running}: it was ended");
    }
}
