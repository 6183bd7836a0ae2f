//! What a contract may do to the relayer: logs that no compiler would encode, announcements that make no sense, blocks
//! full of events. Nothing is lost, nothing else is relayed, and the next event goes on as ever.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use alloy::dyn_abi::DynSolValue;
use alloy::primitives::{Address, B256, Bytes, U256, keccak256};
use common::fakechain::{self, Emitted, FINALITY, FakeChain};
use common::relay::faults::Faults;
use common::{Finished, Line, Setup, World};
use serde_json::json;

const FACTORY: Address = Address::repeat_byte(0xFA);
const DEPLOYED: &str = "EscrowDeployed(address,address,address,address,uint256,uint256,uint8)";
const DEPLOYED_OLDER: &str = "EscrowDeployed(address,address,address,uint256,uint256,uint8)";
const APPROVED: &str = "Approved(address)";

fn escrow(number: u8) -> Address {
    Address::repeat_byte(number)
}

/// An announcement as either generation makes it.
fn announced(signature: &str, escrow: Address, transaction: u64) -> Emitted {
    let party = Address::repeat_byte(0x77).into_word();
    let words = if signature == DEPLOYED { 4 } else { 3 };
    Emitted {
        address: FACTORY,
        topics: vec![keccak256(signature), escrow.into_word(), party, party],
        data: vec![0; 32 * words].into(),
        transaction,
    }
}

fn approved(escrow: Address, transaction: u64) -> Emitted {
    let topics = vec![keccak256(APPROVED), Address::repeat_byte(0x66).into_word()];
    Emitted { address: escrow, topics, transaction, ..Emitted::default() }
}

fn setup(url: &str) -> Setup {
    Setup::new(url, FACTORY).with("CHAIN_ID", 1)
}

/// What a relayer says of this chain when it reads it at once by range, block by block by link, and in small portions.
async fn told_in_every_way(chain: FakeChain) -> Vec<Finished> {
    let faults = Faults::fake(Arc::new(chain)).await;
    let mut told = vec![];
    for (reading, range) in [("ranged", 2000), ("linked", 2000), ("ranged", 1), ("linked", 1)] {
        let setup = setup(&faults.url())
            .with("RELAYER_CHAIN__READING", reading)
            .with("RELAYER_RPC__MAX_RANGE", range);
        told.push(setup.run(&["run", "--until", "head"]).await.good());
    }
    told
}

#[tokio::test]
async fn announcements_that_make_no_sense_are_relayed_once_each_and_confuse_nothing() {
    let (a, b, c, d) = (escrow(1), escrow(2), escrow(3), escrow(4));
    let chain = FakeChain::new(1);
    // Twice in one transaction, and twice in one block.
    chain.extend(vec![announced(DEPLOYED, a, 0), approved(a, 0), announced(DEPLOYED, a, 0), approved(a, 0)]);
    chain.extend(vec![announced(DEPLOYED, b, 0), approved(b, 1), announced(DEPLOYED, b, 2), approved(b, 2)]);
    // Again in a later block, by the older generation, and as somebody else's.
    chain.extend(vec![
        approved(a, 0),
        announced(DEPLOYED_OLDER, a, 1),
        announced(DEPLOYED, b, 1),
        approved(b, 2),
    ]);
    // By both generations at once.
    chain.extend(vec![
        approved(c, 0),
        announced(DEPLOYED, c, 0),
        announced(DEPLOYED_OLDER, c, 0),
        approved(c, 1),
    ]);
    // The factory itself, which then speaks as an escrow; nobody at all; a contract that is announced after it spoke.
    chain.extend(vec![announced(DEPLOYED, FACTORY, 0), approved(FACTORY, 1), announced(DEPLOYED, a, 1)]);
    chain.extend(vec![announced(DEPLOYED, Address::ZERO, 0), approved(d, 0)]);
    chain.extend(vec![approved(d, 0), announced(DEPLOYED_OLDER, d, 1), approved(d, 2), approved(FACTORY, 3)]);
    // An escrow that speaks as if it were the factory.
    let mut posing = announced(DEPLOYED, escrow(9), 0);
    posing.address = a;
    chain.extend(vec![posing, approved(escrow(9), 0), approved(a, 0)]);
    (0..FINALITY).for_each(|_| chain.extend(vec![]));

    let announcements = [keccak256(DEPLOYED), keccak256(DEPLOYED_OLDER)];
    let truth = fakechain::truth(&chain.blocks(), FACTORY, &announcements, &[keccak256(APPROVED)]);
    assert_eq!(truth.len(), 6);
    for told in told_in_every_way(chain).await {
        assert_eq!(fakechain::standing(&told.lines()), truth);
    }
}

// ---- arguments

fn words(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|value| U256::from(*value).to_be_bytes::<32>()).collect()
}

fn bytes_with(head: &[u64], tail: &[u8]) -> Bytes {
    [words(head), tail.to_vec()].concat().into()
}

/// Lists of lists of lists, each list so often the same one as it has places.
fn bomb(places: u64) -> Bytes {
    let list = |offset: u64| [vec![places], vec![offset; places as usize]].concat();
    let leaf = list(7);
    let level = list(32 * places);
    let all = [vec![32], level.clone(), level, leaf].concat();
    words(&all).into()
}

/// A list whose every place names the same text.
fn repeated_text(places: u64, length: u64) -> Bytes {
    let list = [vec![32, places], vec![32 * places; places as usize], vec![length]].concat();
    bytes_with(&list, &vec![b'x'; length as usize])
}

/// Name of the event and its data.
fn hostile_data() -> Vec<(&'static str, &'static str, Bytes)> {
    let encoded = |value: DynSolValue| Bytes::from(DynSolValue::Tuple(vec![value]).abi_encode_params());
    let most = U256::MAX.to_be_bytes::<32>();
    let huge_list = |length: u64| Bytes::from([words(&[32]), words(&[length])].concat());
    vec![
        (
            "an honest text",
            "Noted(string)",
            encoded(DynSolValue::String("héllo \u{0}\"\\\n\u{1F600}".into())),
        ),
        ("a text of a megabyte", "Noted(string)", encoded(DynSolValue::String("\u{7}€".repeat(250_000)))),
        (
            "a text that is not UTF-8",
            "Noted(string)",
            bytes_with(&[32, 4], &[[0xC3, 0x28, 0xFF, 0xFE].as_slice(), &[0; 28]].concat()),
        ),
        (
            "half a surrogate",
            "Noted(string)",
            bytes_with(&[32, 3], &[[0xED, 0xA0, 0x80].as_slice(), &[0; 29]].concat()),
        ),
        ("a text longer than its log", "Noted(string)", bytes_with(&[32, 1000], &[b'x'; 32])),
        ("a text of absurd length", "Noted(string)", [&words(&[32])[..], &most].concat().into()),
        ("a text nowhere", "Noted(string)", most.to_vec().into()),
        ("a text at its own place", "Noted(string)", words(&[0]).into()),
        ("no data at all", "Noted(string)", Bytes::new()),
        ("data of an odd length", "Noted(string)", vec![1; 33].into()),
        ("a list of four thousand million", "Listed(uint256[])", huge_list(1 << 32)),
        ("a list of all there is", "Listed(uint256[])", [&words(&[32])[..], &most].concat().into()),
        ("a list with one missing", "Listed(uint256[])", bytes_with(&[32, 3, 1, 2], &[])),
        ("a list of lists of absurd length", "Nested(uint256[][][])", huge_list(u64::MAX)),
        ("lists that are all the same one", "Nested(uint256[][][])", bomb(20)),
        ("lists that would fill the memory", "Nested(uint256[][][])", bomb(250)),
        ("a text that is there two thousand times", "Texts(string[])", repeated_text(2000, 64_000)),
        ("lists within each other without end", "Nested(uint256[][][])", words(&[0, 0, 0, 0]).into()),
    ]
}

/// What has no meaning at all; the rest is relayed, with U+FFFD for what is not UTF-8.
const KEPT_ASIDE: [&str; 11] = [
    "a text longer than its log",
    "a text of absurd length",
    "a text nowhere",
    "no data at all",
    "data of an odd length",
    "a list of four thousand million",
    "a list of all there is",
    "a list with one missing",
    "a list of lists of absurd length",
    "lists that would fill the memory",
    "a text that is there two thousand times",
];
/// The largest of these logs has a megabyte.
const MOST_KIB: u64 = 128 << 10;

#[tokio::test]
async fn whatever_an_event_carries_it_becomes_a_message_or_is_kept_aside_and_the_next_one_goes_on() {
    let chain = FakeChain::new(1);
    let of = escrow(5);
    chain.extend(vec![announced(DEPLOYED, of, 0)]);
    let table = hostile_data();
    for (_, event, data) in &table {
        let topics = vec![keccak256(event)];
        let hostile = Emitted { address: of, topics, data: data.clone(), transaction: 0 };
        chain.extend(vec![hostile, approved(of, 1)]);
    }
    let faults = Faults::fake(Arc::new(chain)).await;
    let events = [
        "Approved(address indexed approver)",
        "Noted(string note)",
        "Listed(uint256[] list)",
        "Nested(uint256[][][] lists)",
        "Texts(string[] texts)",
    ];
    let setup = setup(&faults.url())
        .with("RELAYER_ESCROW__EVENTS", json!(events))
        .with("RELAYER_ESCROW__TERMINAL", json!(["Approved"]));
    let (told, peak) = setup.start(&["run", "--until", "head"]).ended_with_peak().await;
    assert!(peak < MOST_KIB, "{peak} KiB of memory");
    let told = told.good();
    let aside: BTreeSet<u64> =
        told.logged("does not decode").iter().map(|log| log["block"].as_u64().expect("a number")).collect();
    let lines = told.lines();
    let by_block: BTreeMap<u64, Vec<&Line>> = lines.iter().fold(BTreeMap::new(), |mut blocks, line| {
        blocks
            .entry(line.data["block_number"].as_u64().expect("a number"))
            .or_insert_with(Vec::new)
            .push(line);
        blocks
    });
    for (block, (what, event, _)) in (2..).zip(&table) {
        let names: Vec<&str> = by_block[&block].iter().map(|line| line.name()).collect();
        let name = event.split('(').next().expect("a name");
        match aside.contains(&block) {
            true => assert_eq!(names, ["Approved"], "{what}"),
            false => assert_eq!(names, [name, "Approved"], "{what}"),
        }
    }
    let kept = table.iter().zip(2..).filter(|(_, block)| aside.contains(block)).map(|((what, ..), _)| *what);
    let kept: Vec<&str> = kept.collect();
    assert_eq!(kept, KEPT_ASIDE);
    let sequences: Vec<u64> = lines.iter().map(Line::sequence).collect();
    assert_eq!(sequences, Vec::from_iter(1..=lines.len() as u64));
}

// ---- blocks full of events

#[tokio::test]
async fn ten_thousand_events_of_one_escrow_in_one_block_are_relayed_in_their_order() {
    const EVENTS: u64 = 10_000;
    let world = World::new().await;
    let escrow = world.factory.create_escrow().await;
    world.factory.send("approveMany", &[escrow.address.into(), EVENTS.into()]).await;
    escrow.send("release", &[]).await;
    let lines = world.setup.run_to_head().await;
    assert_eq!(lines.len() as u64, EVENTS + 2);
    world.truth().await.assert_is(&lines);
}

/// A node with one block, number 1, that is full: so many approvals of each of the escrows. As text: values were too slow.
fn full_block(escrows: u64, each: u64) -> impl Fn(&serde_json::Value) -> String + Send + Sync + 'static {
    let hash = |number: u64| B256::left_padding_from(&(number + 1).to_be_bytes());
    let address = |number: u64| Address::left_padding_from(&(0xE000 + number).to_be_bytes());
    let topic = keccak256(APPROVED);
    move |call| {
        let params = &call["params"];
        match call["method"].as_str().unwrap_or_default() {
            "eth_chainId" => "\"0x1\"".to_owned(),
            "eth_getCode" => "\"0x00\"".to_owned(),
            "eth_getBlockByNumber" => {
                let number = match params[0].as_str().unwrap_or_default() {
                    "latest" => 1,
                    "finalized" | "safe" => 0,
                    text => u64::from_str_radix(text.trim_start_matches("0x"), 16).expect("a number"),
                };
                json!({ "number": format!("{number:#x}"), "hash": hash(number), "timestamp": "0x5",
                    "parentHash": if number == 0 { B256::ZERO } else { hash(number - 1) } })
                .to_string()
            }
            _ => {
                let filter = &params[0];
                let from = filter["fromBlock"].as_str().map_or(1, |text| {
                    u64::from_str_radix(text.trim_start_matches("0x"), 16).expect("a number")
                });
                let to = filter["toBlock"].as_str().map_or(1, |text| {
                    u64::from_str_radix(text.trim_start_matches("0x"), 16).expect("a number")
                });
                if filter["blockHash"] == json!(hash(0)) || !(from..=to).contains(&1) {
                    return "[]".to_owned();
                }
                let wanted =
                    |of: Address| filter["address"].as_array().is_none_or(|any| any.contains(&json!(of)));
                let topics = filter["topics"][0].as_array().cloned().unwrap_or_default();
                let mut text = String::from("[");
                let mut put = |emitter: Address, topics: String, data: &str, index: u64| {
                    use std::fmt::Write;
                    let comma = if text.len() > 1 { "," } else { "" };
                    write!(
                        text,
                        r#"{comma}{{"address":"{emitter:#x}","topics":[{topics}],"data":"0x{data}","blockNumber":"0x1","blockHash":"{}","transactionHash":"{}","transactionIndex":"0x0","logIndex":"{index:#x}","blockTimestamp":"0x5","removed":false}}"#,
                        hash(1), hash(7),
                    )
                    .expect("writing to memory");
                };
                if wanted(FACTORY) && topics.contains(&json!(keccak256(DEPLOYED))) {
                    for number in 0..escrows {
                        let log = announced(DEPLOYED, address(number), 0);
                        let topics: Vec<String> =
                            log.topics.iter().map(|topic| format!("\"{topic}\"")).collect();
                        put(FACTORY, topics.join(","), &"0".repeat(64 * 4), number);
                    }
                }
                for number in (0..escrows).filter(|number| wanted(address(*number))) {
                    for nth in 0..each {
                        let approver = B256::left_padding_from(&nth.to_be_bytes());
                        let index = escrows + number * each + nth;
                        put(address(number), format!("\"{topic}\",\"{approver}\""), "", index);
                    }
                }
                text.push(']');
                text
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_block_full_of_events_is_relayed_whole() {
    let number = |name: &str, default: u64| {
        std::env::var(name).map_or(default, |number| number.parse().expect("a number"))
    };
    // As many as a debug build relays in ten seconds; `ESCROWS=1000 EACH=1000` makes it a million.
    let (escrows, each) = (number("ESCROWS", 20), number("EACH", 1_500));
    let faults = Faults::answering(full_block(escrows, each)).await;
    let setup =
        setup(&faults.url()).with("RELAYER_SINK__KIND", "file").with("RELAYER_SINK__PATH", "events.jsonl");
    let began = Instant::now();
    let (ended, peak) = setup.start(&["run", "--until", "head"]).ended_with_peak().await;
    println!("{} events in {:?}, {peak} KiB at most", escrows * (each + 1), began.elapsed());
    ended.good();
    assert!(peak < 8 * escrows * each + (128 << 10), "{peak} KiB of memory");
    let written = std::fs::read_to_string(setup.path("events.jsonl")).expect("the file is there");
    let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
    for line in written.lines() {
        let key = line.split('"').nth(3).expect("a key");
        let count = counts.entry(key).or_default();
        *count += 1;
        assert!(line.contains(&format!("\"sequence\":{count},")), "{line}");
        if *count > 1 {
            assert!(line.contains(&format!("{:064x}\"", *count - 2)[24..]), "{count}: {line}");
        }
    }
    assert!(counts.values().all(|count| *count == each + 1), "{counts:?}");
    assert_eq!(counts.len() as u64, escrows);
}
