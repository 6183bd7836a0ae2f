//! What must be published, made from raw `eth_getLogs` and the message contract. Nothing here comes from `src/`, and
//! the decoding is by hand: every argument of every known event is one word.

use std::collections::{BTreeMap, btree_map::Entry};

use alloy::primitives::{Address, B256, U256, keccak256};
use serde_json::{Value, json};

use super::super::{Chain, Log};
use super::{Line, by_key};

/// The message contract's table: name and arguments (type, name, indexed), by who may emit it.
type Known = (&'static str, &'static [(&'static str, &'static str, bool)]);

const ANNOUNCEMENTS: &[Known] = &[
    (
        "EscrowDeployed",
        &[
            ("address", "escrow", true),
            ("address", "payer", true),
            ("address", "payee", true),
            ("address", "arbiter", false),
            ("uint256", "amount", false),
            ("uint256", "releaseDelay", false),
            ("uint8", "approvalsRequired", false),
        ],
    ),
    (
        "EscrowDeployed",
        &[
            ("address", "escrow", true),
            ("address", "payer", true),
            ("address", "payee", true),
            ("uint256", "amount", false),
            ("uint256", "releaseDelay", false),
            ("uint8", "approvalsRequired", false),
        ],
    ),
];

const PAYEE: (&str, &str, bool) = ("address", "payee", true);
const PAYER: (&str, &str, bool) = ("address", "payer", true);
const AMOUNT: (&str, &str, bool) = ("uint256", "amount", false);
const TIMESTAMP: (&str, &str, bool) = ("uint256", "timestamp", false);

const LIFECYCLE: &[Known] = &[
    ("Approved", &[("address", "approver", true)]),
    ("EscrowReleased", &[PAYEE]),
    ("EscrowReleased", &[PAYEE, AMOUNT]),
    ("EscrowReleased", &[PAYEE, AMOUNT, TIMESTAMP]),
    ("EscrowRefunded", &[PAYER]),
    ("EscrowRefunded", &[PAYER, AMOUNT]),
    ("EscrowRefunded", &[PAYER, AMOUNT, TIMESTAMP]),
];

/// Every topic0 there is: factory's and escrows'.
pub fn topics() -> Vec<B256> {
    ANNOUNCEMENTS.iter().chain(LIFECYCLE).map(topic).collect()
}

pub fn lifecycle_topics() -> Vec<B256> {
    LIFECYCLE.iter().map(topic).collect()
}

fn topic((name, arguments): &Known) -> B256 {
    let types: Vec<&str> = arguments.iter().map(|(ty, ..)| *ty).collect();
    keccak256(format!("{name}({})", types.join(",")))
}

/// What a store that read the chain from its first block must have published, per escrow and in order.
#[derive(Debug)]
pub struct Truth {
    /// By ordering key.
    pub escrows: BTreeMap<String, Vec<Line>>,
    /// The block that announced each escrow.
    pub announced: BTreeMap<Address, u64>,
}

impl Truth {
    pub async fn read(chain: &Chain, factory: Address, last: u64) -> Truth {
        let chain_id = chain.chain_id().await;
        let logs = chain.logs(&[], 0..=last).await;
        let mut announced = BTreeMap::new();
        for log in logs.iter().filter(|log| log.address == factory) {
            if let Some((_, arguments)) = decode(ANNOUNCEMENTS, log) {
                let escrow: Address = arguments["escrow"].as_str().expect("an address").parse().expect("one");
                announced.entry(escrow).or_insert(log.block_number);
            }
        }
        // The promise's order: chain order, but the announcement before its transaction's other logs.
        let mut events = vec![];
        for log in &logs {
            let from = announced.get(&log.address).copied();
            let announcement = decode(ANNOUNCEMENTS, log).filter(|_| log.address == factory);
            let lifecycle =
                decode(LIFECYCLE, log).filter(|_| from.is_some_and(|from| from <= log.block_number));
            if let Some((name, arguments)) = announcement {
                let escrow = arguments["escrow"].as_str().expect("an address").to_owned();
                events.push((
                    (log.block_number, log.transaction_index, 0, log.log_index),
                    log,
                    escrow,
                    name,
                    arguments,
                ));
            } else if let Some((name, arguments)) = lifecycle {
                let escrow = lower(log.address);
                events.push((
                    (log.block_number, log.transaction_index, 1, log.log_index),
                    log,
                    escrow,
                    name,
                    arguments,
                ));
            }
        }
        events.sort_by_key(|(order, ..)| *order);
        let mut times = BTreeMap::new();
        let mut escrows: BTreeMap<String, Vec<Line>> = BTreeMap::new();
        for (_, log, escrow, name, arguments) in events {
            if let Entry::Vacant(unknown) = times.entry(log.block_number) {
                unknown.insert(chain.block(log.block_number).await.timestamp);
            }
            let lane = escrows.entry(escrow.clone()).or_default();
            let sequence = lane.len() as u64 + 1;
            lane.push(message(chain_id, log, &escrow, name, arguments, sequence, times[&log.block_number]));
        }
        Truth { escrows, announced }
    }

    pub fn len(&self) -> usize {
        self.escrows.values().map(Vec::len).sum()
    }

    /// Panics unless these are exactly the lines: the set, each escrow's order, every attribute and every field.
    pub fn assert_is(&self, lines: &[Line]) {
        let epochs: Vec<&str> = lines.iter().map(|line| line.attributes["epoch"].as_str()).collect();
        assert!(epochs.iter().all(|epoch| epoch.parse::<u64>().is_ok_and(|epoch| epoch > 0)), "{epochs:?}");
        assert!(epochs.windows(2).all(|pair| pair[0] == pair[1]), "one store, one epoch: {epochs:?}");

        let got = by_key(&without_epoch(lines));
        for (key, expected) in &self.escrows {
            let got = got.get(key).map_or(&[][..], Vec::as_slice);
            for (expected, got) in expected.iter().zip(got) {
                assert_eq!(got, expected, "a message of {key}");
            }
            assert_eq!(got.len(), expected.len(), "messages of {key}: {:?}", names(got));
        }
        for (key, lines) in &got {
            assert!(self.escrows.contains_key(key), "of {key} nothing may be relayed: {:?}", names(lines));
        }
    }

    /// Panics unless what was published less what was retracted is the chain, each escrow's numbers have no gaps, and
    /// every retraction follows its event on the same key.
    pub fn assert_is_net(&self, lines: &[Line]) {
        let mut standing = BTreeMap::new();
        for (key, lines) in by_key(&without_epoch(lines)) {
            let sequences: Vec<u64> = lines.iter().map(Line::sequence).collect();
            assert_eq!(sequences, Vec::from_iter(1..=lines.len() as u64), "sequences of {key}");
            let mut left: Vec<Line> = vec![];
            for line in lines {
                if !line.is_retraction() {
                    left.push(line);
                    continue;
                }
                let last =
                    left.pop().unwrap_or_else(|| panic!("{key}: nothing is left to retract: {line:?}"));
                assert_eq!(line.data["retracts"], last.data["event_id"], "newest first");
                assert_eq!(line, retraction(&last, line.sequence()));
            }
            if !left.is_empty() {
                standing.insert(key, left);
            }
        }
        let unnumbered = |escrows: &BTreeMap<String, Vec<Line>>| -> BTreeMap<String, Vec<Line>> {
            let strip = |line: &Line| {
                let mut line = line.clone();
                line.attributes.remove("sequence");
                line.data["sequence"] = Value::Null;
                line
            };
            escrows.iter().map(|(key, lines)| (key.clone(), lines.iter().map(strip).collect())).collect()
        };
        assert_eq!(unnumbered(&standing), unnumbered(&self.escrows), "published less retracted is the chain");
    }
}

/// The epoch is the store's, not the chain's.
pub fn without_epoch(lines: &[Line]) -> Vec<Line> {
    let strip = |line: &Line| {
        let mut line = line.clone();
        line.attributes.remove("epoch").expect("every message has an epoch");
        line
    };
    lines.iter().map(strip).collect()
}

/// The withdrawal of a message, without its epoch.
pub fn retraction(of: &Line, sequence: u64) -> Line {
    let event_id = format!("{}:retracted:{sequence}", of.event_id());
    let mut attributes = of.attributes.clone();
    attributes.remove("epoch");
    attributes.insert("event_type".into(), "Retracted".into());
    attributes.insert("event_name".into(), "Retracted".into());
    attributes.insert("event_id".into(), event_id.clone());
    attributes.insert("sequence".into(), sequence.to_string());
    let data = json!({
        "event_name": "Retracted",
        "event_id": event_id,
        "retracts": of.event_id(),
        "retracted_event": of.data,
        "reason": "reorg",
        "sequence": sequence,
        "chain_id": of.data["chain_id"],
        "contract_address": of.data["contract_address"],
    });
    Line { ordering_key: of.ordering_key.clone(), attributes, data }
}

fn message(
    chain_id: u64,
    log: &Log,
    escrow: &str,
    name: &str,
    arguments: serde_json::Map<String, Value>,
    sequence: u64,
    time: u64,
) -> Line {
    let event_id = format!("{chain_id}:{}:{}", log.block_hash, log.log_index);
    let mut data = arguments.clone();
    let envelope = json!({
        "schema_version": 1,
        "event_id": event_id,
        "sequence": sequence,
        "chain_id": chain_id,
        "contract_address": lower(log.address),
        "event_name": name,
        "block_number": log.block_number,
        "block_hash": log.block_hash.to_string(),
        "block_timestamp": rfc3339(time),
        "timestamp": rfc3339(time),
        "transaction_hash": log.transaction_hash.to_string(),
        "transaction_index": log.transaction_index,
        "log_index": log.log_index,
        "args": arguments,
    });
    data.extend(envelope.as_object().expect("it is one").clone());
    let attributes = [
        ("event_type", name.to_owned()),
        ("event_name", name.to_owned()),
        ("chain_id", chain_id.to_string()),
        ("contract_address", lower(log.address)),
        ("escrow", escrow.to_owned()),
        ("block_number", log.block_number.to_string()),
        ("event_id", event_id),
        ("sequence", sequence.to_string()),
        ("schema_version", "1".to_owned()),
    ];
    Line {
        ordering_key: escrow.to_owned(),
        attributes: attributes.map(|(name, value)| (name.to_owned(), value)).into(),
        data: Value::Object(data),
    }
}

/// `None`: not one of these events, or malformed.
fn decode(known: &[Known], log: &Log) -> Option<(&'static str, serde_json::Map<String, Value>)> {
    let indexed =
        |arguments: &[(&str, &str, bool)]| arguments.iter().filter(|(.., indexed)| *indexed).count();
    let (name, arguments) = known.iter().find(|event| {
        log.topics.first() == Some(&topic(event)) && log.topics.len() == indexed(event.1) + 1
    })?;
    if log.data.len() < 32 * (arguments.len() - indexed(arguments)) {
        return None;
    }
    let (mut topics, mut words) = (log.topics[1..].iter(), log.data.chunks_exact(32));
    let value = |(ty, name, indexed): &(&str, &str, bool)| {
        let word = if *indexed { *topics.next()? } else { B256::from_slice(words.next()?) };
        let value = match *ty {
            "address" => lower(Address::from_word(word)),
            _ => U256::from_be_bytes(word.0).to_string(),
        };
        Some(((*name).to_owned(), Value::String(value)))
    };
    Some((name, arguments.iter().map(value).collect::<Option<_>>()?))
}

fn lower(address: Address) -> String {
    format!("{address:#x}")
}

fn names(lines: &[Line]) -> Vec<&str> {
    lines.iter().map(Line::name).collect()
}

/// Seconds since 1970 as `2026-01-01T00:00:00Z`: days from the civil calendar, counted.
fn rfc3339(seconds: u64) -> String {
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let (mut days, time) = (seconds / 86_400, seconds % 86_400);
    let mut year = 1970;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let february = 28 + u64::from(leap(year));
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    let (hour, minute, second) = (time / 3600, time / 60 % 60, time % 60);
    format!("{year}-{month:02}-{:02}T{hour:02}:{minute:02}:{second:02}Z", days + 1)
}
