//! Forks at awkward moments: amid catching up, there and back again, with messages in every state there is, and with
//! escrows that each fork announces elsewhere.

mod common;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use alloy::primitives::{Address, B256, keccak256};
use common::fakechain::{self, Emitted, FakeChain};
use common::load::Dice;
use common::pubsub::Code;
use common::relay;
use common::relay::faults::{Fault, Faults};
use common::{Answer, Chain, Line, Running, Setup, World};
use serde_json::json;

const FACTORY: Address = Address::repeat_byte(0xFA);
const DEPLOYED: &str = "EscrowDeployed(address,address,address,address,uint256,uint256,uint8)";
const APPROVED: &str = "Approved(address)";
/// A block's worth of announcements and approvals of five escrows.
fn logs(dice: &mut Dice) -> Vec<Emitted> {
    let party = Address::repeat_byte(0x77).into_word();
    (0..dice.below(4))
        .map(|transaction| {
            let escrow = Address::repeat_byte(1 + dice.below(5) as u8);
            match dice.below(3) {
                0 => {
                    let topics = vec![keccak256(DEPLOYED), escrow.into_word(), party, party];
                    Emitted { address: FACTORY, topics, data: vec![0; 128].into(), transaction }
                }
                _ => {
                    let topics = vec![keccak256(APPROVED), B256::with_last_byte(dice.below(9) as u8)];
                    Emitted { address: escrow, topics, transaction, ..Emitted::default() }
                }
            }
        })
        .collect()
}

fn setup(url: &str, reading: &str) -> Setup {
    Setup::new(url, FACTORY)
        .with("CHAIN_ID", 1)
        .with("RELAYER_CHAIN__READING", reading)
        .with("RELAYER_RPC__MAX_RANGE", 4)
}

fn truth(chain: &FakeChain) -> BTreeMap<String, Vec<String>> {
    fakechain::truth(&chain.blocks(), FACTORY, &[keccak256(DEPLOYED)], &[keccak256(APPROVED)])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fork_at_any_moment_of_catching_up_leaves_published_less_retracted_the_chain() {
    for (reading, first) in [("linked", 1), ("ranged", 2)] {
        for at in (first..22).step_by(2) {
            let (chain, mut dice) = (Arc::new(FakeChain::new(1)), Dice(at as u64));
            (0..30).for_each(|_| chain.extend(logs(&mut dice)));
            let faults = Faults::fake(Arc::clone(&chain)).await;
            let (forking, dice) = (Arc::clone(&chain), Mutex::new(dice));
            // In the middle of a request: what was asked before it was of the other fork.
            faults.on_request(move |number, _| {
                if number == at {
                    let mut dice = dice.lock().expect("no panic while held");
                    forking.fork(1 + dice.below(8));
                    (0..dice.below(12)).for_each(|_| forking.extend(logs(&mut dice)));
                }
                Fault::Pass
            });
            let setup = setup(&faults.url(), reading);
            let mut relayer = setup.start(&["run"]);
            relayer.wait_logged("Processing blocks").await;
            while faults.requests() <= at + 4 {
                tokio::time::sleep(std::time::Duration::from_millis(2)).await;
            }
            let mut lines = relayer.stop().await.lines();
            // Beyond what could pass for a node that lags.
            (0..12).for_each(|_| chain.extend(vec![]));
            lines.extend(setup.run_to_head().await);
            assert_eq!(fakechain::standing(&lines), truth(&chain), "{reading}, at request {at}");
        }
    }
}

/// Waits until what stands is what is on the chain.
async fn wait_stands(relayer: &mut Running, chain: &FakeChain) {
    let truth = truth(chain);
    relayer.wait_until("the chain", |lines| fakechain::standing(lines) == truth).await;
}

#[tokio::test]
async fn there_and_back_again_what_was_withdrawn_is_published_anew_under_its_old_id() {
    for reading in ["linked", "ranged"] {
        let (chain, mut dice) = (Arc::new(FakeChain::new(1)), Dice(3));
        (0..30).for_each(|_| chain.extend(logs(&mut dice)));
        let faults = Faults::fake(Arc::clone(&chain)).await;
        let setup = setup(&faults.url(), reading);
        let mut relayer = setup.start(&["run"]);
        wait_stands(&mut relayer, &chain).await;
        let there = chain.fork(5);
        (0..6).for_each(|_| chain.extend(logs(&mut dice)));
        wait_stands(&mut relayer, &chain).await;
        let here = chain.fork(6);
        chain.restore(&there);
        wait_stands(&mut relayer, &chain).await;
        chain.fork(5);
        chain.restore(&here);
        (0..6).for_each(|_| chain.extend(logs(&mut dice)));
        wait_stands(&mut relayer, &chain).await;
        let finished = relayer.stop().await;
        assert_eq!(finished.logged("The chain was reorganised").len(), 3, "{}", finished.stderr);
        let mut lines = finished.lines();
        lines.extend(setup.run_to_head().await);
        assert_eq!(fakechain::standing(&lines), truth(&chain), "{reading}");
        let ids: Vec<&str> = lines.iter().map(Line::event_id).collect();
        let again = |id: &&str| ids.iter().filter(|other| *other == id).count() > 1;
        assert!(ids.iter().any(again), "what returned has its old id");
    }
}

/// The next block: the same whenever its parent and its transactions are.
async fn fix_next_block(chain: &Chain, time: u64) {
    chain.rpc("anvil_setCoinbase", json!([Address::repeat_byte(0x4D)])).await;
    chain.rpc("evm_setNextBlockTimestamp", json!([time])).await;
    chain.rpc("anvil_setNextBlockBaseFeePerGas", json!(["0x3b9aca00"])).await;
}

#[tokio::test]
async fn a_real_block_that_leaves_the_chain_and_returns_is_withdrawn_and_published_anew() {
    let world = World::new().await;
    let escrow = world.factory.create_escrow().await;
    let chain = &world.chain;
    let time = chain.head().await.timestamp + 100;
    let mut relayer = world.setup.start(&["run"]);
    relayer.wait_for_lines(1).await;
    fix_next_block(chain, time).await;
    let approved = escrow.send("approve", &[]).await;
    let signed = chain.rpc("eth_getRawTransactionByHash", json!([approved.transaction_hash])).await;
    relayer.wait_for_lines(2).await;
    chain.roll_back(1).await;
    escrow.send("release", &[]).await;
    relayer.wait_for_lines(4).await;
    chain.roll_back(1).await;
    fix_next_block(chain, time).await;
    chain.rpc("eth_sendRawTransaction", json!([signed])).await;
    let again = chain.receipt(approved.transaction_hash).await;
    assert_eq!(again.block_hash, approved.block_hash, "the same block");
    let lines = relayer.wait_for_lines(6).await;
    relayer.stop().await;
    let names = relay::names_of(&lines, escrow.address);
    let expected = ["EscrowDeployed", "Approved", "Retracted", "EscrowReleased", "Retracted", "Approved"];
    assert_eq!(names, expected);
    assert_eq!(lines[5].event_id(), lines[1].event_id());
    world.truth().await.assert_is_net(&lines);
}

#[tokio::test]
async fn a_fork_with_messages_waiting_under_way_acknowledged_and_blocked_withdraws_each_rightly() {
    for (outstanding, killed) in [(4, false), (4, true), (1000, false), (1000, true)] {
        let (mut world, pubsub) = World::new().await.publishing().await;
        world.setup.set("RELAYER_SINK__MAX_OUTSTANDING", outstanding);
        world.setup.set("RELAYER_SINK__TIMEOUT", "1s");
        let World { chain, factory, setup, .. } = &world;
        let escrows = factory.create_many(4).await;
        chain.mine(2).await;
        let mut relayer = setup.start(&["run"]);
        pubsub.wait_for(4).await;
        let key = |nth: usize| format!("{:#x}", escrows[nth].address);
        let (hangs, refused) = (key(0), key(1));
        pubsub.on_publish(move |attempt| match &attempt.ordering_key {
            key if *key == hangs => Answer::Hang,
            key if *key == refused => Answer::Refuse(Code::InvalidArgument, "not this one".into()),
            _ => Answer::Store,
        });
        let base = chain.block_number().await;
        for _ in 0..2 {
            for escrow in &escrows {
                escrow.send("approve", &[]).await;
            }
        }
        relayer.wait_logged("Lane blocked").await;
        relayer.wait_read(base + 8).await;
        let acknowledged = key(3);
        let arrived = |messages: &[common::pubsub::Message]| {
            messages.iter().filter(|message| message.ordering_key == acknowledged).count() == 3
        };
        pubsub.wait_until("three of the last escrow", arrived).await;
        if killed {
            relayer.kill().await;
            relayer = setup.start(&["run"]);
        }
        chain.reorg(6).await;
        relayer.wait_logged("The chain was reorganised").await;
        for escrow in &escrows {
            escrow.send("release", &[]).await;
        }
        relayer.wait_read(base + 12).await;
        pubsub.heal();
        // A blocked lane is tried again after a while; a new process tries at once.
        relayer.kill().await;
        setup.run_to_head().await;
        let lines: Vec<Line> = pubsub.messages().iter().map(Line::of).collect();
        world.truth().await.assert_is_net(&relay::firsts(&lines).0);
    }
}

#[tokio::test]
async fn an_escrow_that_each_fork_announces_in_another_block_counts_from_there_on() {
    for earlier in [false, true] {
        let world = World::new().await;
        let World { chain, factory, setup, .. } = &world;
        let made = factory.send("createSilently", &factory.escrow_args()).await;
        // It has said nothing of the factory's that would name it; its own log does.
        let address = made.logs[0].address;
        let escrow = chain.at("Escrow", address);
        chain.mine(2).await;
        let approve = async || escrow.send("approve", &[]).await;
        let announce = async || factory.send("announce", &[address.into()]).await;
        let mut relayer = setup.start(&["run"]);
        let of_either = [approve().await, approve().await];
        let announced = announce().await;
        approve().await;
        chain.mine(1).await;
        relayer.wait_for_lines(2).await;
        // The other fork: the announcement before the approvals, or after more of them.
        let depth = chain.block_number().await + 1 - of_either[0].block_number;
        let place = |receipt: &common::Receipt, at: u64| (receipt.transaction_hash, at);
        let [one, two] = &of_either;
        match earlier {
            // All of one sender: in one block they keep their order, so the announcement moves to where they are.
            true => chain.reorg_keeping(depth, &[place(one, 0), place(two, 0), place(&announced, 0)]).await,
            false => chain.reorg_keeping(depth, &[place(one, 0), place(two, 1), place(&announced, 4)]).await,
        }
        relayer.wait_logged("The chain was reorganised").await;
        approve().await;
        chain.mine(1).await;
        relayer.wait_read(chain.block_number().await).await;
        let mut lines = relayer.stop().await.lines();
        lines.extend(setup.run_to_head().await);
        world.truth().await.assert_is_net(&lines);
    }
}
