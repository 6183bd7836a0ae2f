//! The test support, tested for real: an anvil, our contracts on it, and Google's own client against the Pub/Sub server.

mod common;

use std::collections::BTreeMap;

use alloy::primitives::{Address, B256, keccak256};
use common::{
    Anvil, Chain, Contract, Log,
    chain::{event_of, events},
};

/// The table in the message contract: name, parameters, topic0 as far as it is written out there.
const KNOWN: [(&str, &str, &str); 9] = [
    ("EscrowDeployed", "(address,address,address,address,uint256,uint256,uint8)", "0x94de54d4"),
    ("EscrowDeployed", "(address,address,address,uint256,uint256,uint8)", "0x3c9dc28f"),
    ("Approved", "(address)", "0x5d91bd0c"),
    ("EscrowReleased", "(address)", "0xa064882c"),
    ("EscrowReleased", "(address,uint256)", "0xe327b247"),
    ("EscrowReleased", "(address,uint256,uint256)", "0xe2dfcde5"),
    ("EscrowRefunded", "(address)", "0xedd9332b"),
    ("EscrowRefunded", "(address,uint256)", "0x894ce7cc"),
    ("EscrowRefunded", "(address,uint256,uint256)", "0xefe2e8d9"),
];

struct World {
    chain: Chain,
    factory: Contract,
    _anvil: Anvil,
}

async fn world() -> World {
    let anvil = Anvil::start().await;
    let chain = Chain::connect(anvil.url()).await;
    let factory = chain.deploy("EscrowFactory", &[]).await;
    World { chain, factory, _anvil: anvil }
}

fn signatures(logs: &[Log]) -> Vec<String> {
    logs.iter().map(|log| event_of(log).map_or("?".into(), |event| event.signature())).collect()
}

fn names(logs: &[Log]) -> Vec<&str> {
    logs.iter().map(|log| event_of(log).map_or("?", |event| event.name.as_str())).collect()
}

#[test]
fn our_contracts_declare_the_events_of_the_message_contract() {
    for (name, parameters, topic) in KNOWN {
        let signature = format!("{name}{parameters}");
        let event = events().find(|event| event.signature() == signature).expect(&signature);
        assert!(event.selector().to_string().starts_with(topic), "{signature}");
        assert_eq!(event.selector(), keccak256(&signature));
    }
}

#[tokio::test]
async fn every_known_signature_comes_out_of_a_real_chain() {
    let World { chain, factory, _anvil } = world().await;
    let escrow = factory.create_escrow().await;
    factory.send("announceOlder", &[escrow.address.into()]).await;
    let all = escrow.send("emitAll", &[]).await;
    assert_eq!(all.logs.len(), 7);

    let mut seen: BTreeMap<String, B256> = BTreeMap::new();
    for log in chain.all_logs(&[factory.address, escrow.address]).await {
        seen.insert(event_of(&log).expect("all are known").signature(), log.topics[0]);
    }
    for (name, parameters, topic) in KNOWN {
        let signature = format!("{name}{parameters}");
        assert!(seen[&signature].to_string().starts_with(topic), "{signature}");
    }
}

#[tokio::test]
async fn an_escrow_lives_as_the_deployed_contract_does() {
    let World { chain, factory, _anvil } = world().await;
    let (escrow, created) = factory.create_by("createEscrow").await;
    assert_eq!(names(&created.logs), ["EscrowCreated", "EscrowDeployed"]);
    assert_eq!(created.logs[0].address, escrow.address);
    assert_eq!(created.logs[1].address, factory.address);
    assert_eq!(created.logs[1].topics[2], chain.account(1).into_word(), "the payer");

    let approved = escrow.submit_from(chain.account(5), "approve", &[]).await;
    let approved = chain.receipt(approved).await;
    assert_eq!(approved.logs[0].topics[1], chain.account(5).into_word());
    escrow.send("approveAs", &[Address::repeat_byte(7).into()]).await;
    escrow.send("release", &[]).await;
    escrow.send("refund", &[]).await;
    assert_eq!(escrow.get("approvalsCount").await, 2);
    assert_eq!((escrow.get("released").await, escrow.get("refunded").await), (1, 1));
    assert_eq!(
        names(&chain.all_logs(&[escrow.address]).await),
        ["EscrowCreated", "Approved", "Approved", "EscrowReleased", "EscrowRefunded"]
    );
}

#[tokio::test]
async fn a_hundred_escrows_come_from_one_transaction() {
    let World { factory, _anvil, .. } = world().await;
    assert_eq!(factory.create_many(100).await.len(), 100);
    assert_eq!(factory.create_many(100).await.len(), 100);
    assert_eq!(factory.get("getEscrowCount").await, 200);
}

#[tokio::test]
async fn the_awkward_transactions_are_as_awkward_as_promised() {
    let World { factory, _anvil, .. } = world().await;

    let (_, whole_life) = factory.create_by("createApproveRelease").await;
    assert_eq!(
        names(&whole_life.logs),
        ["EscrowCreated", "EscrowDeployed", "Approved", "Approved", "EscrowReleased"]
    );
    let (_, early) = factory.create_by("createApprovedInConstructor").await;
    assert_eq!(names(&early.logs), ["EscrowCreated", "Approved", "EscrowDeployed"]);
    let (escrow, twice) = factory.create_by("createAnnouncedTwice").await;
    assert_eq!(names(&twice.logs), ["EscrowCreated", "EscrowDeployed", "EscrowDeployed"]);
    let again = factory.send("announce", &[escrow.address.into()]).await;
    assert_eq!(names(&again.logs), ["EscrowDeployed"]);

    let silent = factory.send("createSilently", &factory.escrow_args()).await;
    assert_eq!(names(&silent.logs), ["EscrowCreated"]);

    let many = factory.send("approveMany", &[escrow.address.into(), 60u64.into()]).await;
    assert_eq!(many.logs.len(), 60);
    assert!(many.logs.iter().all(|log| log.address == escrow.address));
}

#[tokio::test]
async fn malformed_logs_have_the_topics_of_sound_ones() {
    let World { factory, _anvil, .. } = world().await;
    let (escrow, created) = factory.create_by("createEscrow").await;

    let release = escrow.send("release", &[]).await.logs.remove(0);
    let truncated = escrow.send("emitTruncatedRelease", &[]).await.logs.remove(0);
    assert_eq!((truncated.topics, truncated.data.len()), (release.topics, 5));

    let approved = escrow.send("approve", &[]).await.logs.remove(0);
    let bare = escrow.send("emitApprovedWithoutApprover", &[]).await.logs.remove(0);
    assert_eq!(bare.topics, approved.topics[..1]);

    let announced = factory.send("emitTruncatedAnnouncement", &[escrow.address.into()]).await.logs.remove(0);
    assert_eq!(announced.topics[..2], created.logs[1].topics[..2]);
    assert_eq!((announced.topics.len(), announced.data.len()), (4, 5));

    for unknown in [escrow.send("emitUnknown", &[]).await, factory.send("emitUnknown", &[]).await] {
        let signature = event_of(&unknown.logs[0]).expect("our ABI has it").signature();
        assert!(KNOWN.iter().all(|(name, parameters, _)| signature != format!("{name}{parameters}")));
    }

    let topics: Vec<B256> = (1..=4).map(B256::repeat_byte).collect();
    for n in 0..=4 {
        let words: Vec<_> = topics[..n].iter().map(|topic| (*topic).into()).collect();
        let args = [alloy::dyn_abi::DynSolValue::Array(words), vec![0xab_u8; 33].into()];
        let raw = escrow.send("emitRaw", &args).await.logs.remove(0);
        assert_eq!((&raw.topics[..], &raw.data[..]), (&topics[..n], &[0xab; 33][..]));
    }
}

#[tokio::test]
async fn other_generations_and_look_alikes_are_there_too() {
    let World { chain, factory, _anvil } = world().await;

    let older = chain.deploy("OlderFactory", &[]).await;
    let args = &older.escrow_args()[..];
    let receipt = older.send("createEscrow", &[&args[..2], &args[3..]].concat()).await;
    assert_eq!(signatures(&receipt.logs), ["EscrowDeployed(address,address,address,uint256,uint256,uint8)"]);
    let escrow = older.escrows_in(&receipt).remove(0);
    escrow.send("approve", &[]).await;
    escrow.send("release", &[]).await;
    escrow.send("refund", &[]).await;
    assert_eq!(
        signatures(&chain.all_logs(&[escrow.address]).await),
        ["Approved(address)", "EscrowReleased(address,uint256)", "EscrowRefunded(address,uint256)"]
    );

    let look_alike = chain.deploy("LookAlike", &[]).await;
    let fake = look_alike.send("emitAll", &[]).await;
    assert_eq!(names(&fake.logs), ["EscrowDeployed", "Approved", "EscrowReleased", "EscrowRefunded"]);
    assert!(factory.escrows_in(&fake).is_empty(), "another address announced it");
}

#[tokio::test]
async fn a_batch_is_one_transaction() {
    let World { chain, factory, _anvil } = world().await;
    let escrow = factory.create_escrow().await;
    let batch = chain.deploy("Batch", &[]).await;
    let receipt = batch
        .run(&[
            (&escrow, "approve", &[]),
            (&factory, "createEscrow", &factory.escrow_args()),
            (&escrow, "release", &[]),
        ])
        .await;
    assert_eq!(names(&receipt.logs), ["Approved", "EscrowCreated", "EscrowDeployed", "EscrowReleased"]);
    assert!(receipt.logs.iter().all(|log| log.transaction_hash == receipt.transaction_hash));
}

#[tokio::test]
async fn manual_mining_puts_what_waits_into_one_block_in_order() {
    let anvil = Anvil::new().chain_id(4242).manual_mining().spawn().await.expect("anvil starts");
    let chain = Chain::connect(anvil.url()).await;
    assert_eq!(chain.chain_id().await, 4242);
    let factory = chain.deploy("EscrowFactory", &[]).await;
    let escrow = factory.create_escrow().await;
    let before = chain.block_number().await;

    let mut sent = vec![];
    for account in 0..10 {
        sent.push(escrow.submit_from(chain.account(account), "approve", &[]).await);
    }
    assert_eq!(chain.block_number().await, before, "nothing is mined yet");
    chain.mine(3).await;
    assert_eq!(chain.block_number().await, before + 3);
    assert_eq!(chain.block(before + 1).await.transactions, sent);
    assert_eq!(chain.logs_of_block(chain.block(before + 1).await.hash).await.len(), 10);

    chain.set_automine(true).await;
    escrow.send("release", &[]).await;
    assert_eq!(chain.block_number().await, before + 4);
}

#[tokio::test]
async fn a_reorg_replaces_blocks_and_may_keep_transactions() {
    let World { chain, factory, _anvil } = world().await;
    let escrow = factory.create_escrow().await;
    let base = chain.head().await;
    let approved = escrow.send("approve", &[]).await;
    let released = escrow.send("release", &[]).await;
    chain.mine(1).await;

    // The approval moves into the second of the replaced blocks; the release is gone.
    chain.reorg_keeping(3, &[(approved.transaction_hash, 1)]).await;
    let first = chain.block(base.number + 1).await;
    assert_eq!(first.parent_hash, base.hash);
    assert_ne!(first.hash, approved.block_hash);
    assert!(chain.logs_of_block(first.hash).await.is_empty());
    let logs = chain.logs(&[escrow.address], base.number + 1..=base.number + 3).await;
    assert_eq!(names(&logs), ["Approved"]);
    assert_eq!(
        (logs[0].block_number, logs[0].transaction_hash),
        (base.number + 2, approved.transaction_hash)
    );

    let gone = serde_json::json!([{ "blockHash": released.block_hash }]);
    chain.try_rpc("eth_getLogs", gone).await.expect_err("that block is not on this chain any more");

    // A deeper one takes the escrow's announcement with it.
    chain.reorg(4).await;
    assert!(chain.all_logs(&[escrow.address]).await.is_empty());
    assert_eq!(chain.block_number().await, base.number + 3);

    chain.roll_back(2).await;
    assert_eq!(chain.block_number().await, base.number + 1);
}

#[tokio::test]
async fn anvil_ends_with_its_owner() {
    let anvil = Anvil::start().await;
    let address = format!("127.0.0.1:{}", anvil.port());
    tokio::net::TcpStream::connect(&address).await.expect("it listens");
    drop(anvil);
    tokio::net::TcpStream::connect(&address).await.expect_err("nobody listens any more");
}
