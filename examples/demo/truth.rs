//! What must have arrived, worked out without the relayer: raw `eth_getLogs` answers, decoded with the ABI of the
//! contracts.

use std::collections::BTreeMap;

use alloy::dyn_abi::{DynSolValue, EventExt};
use alloy::primitives::Address;
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value, json};

use crate::common::chain::event_of;
use crate::common::pubsub::Message;
use crate::common::{Chain, Log};

/// An event of the escrow's constructor that the relayer knows and, by default, does not relay.
const NOT_RELAYED: &str = "EscrowCreated";

/// What was compared.
pub struct Compared {
    pub logs: usize,
    pub not_relayed: usize,
    pub messages: usize,
    pub escrows: usize,
}

/// Compares all that arrived with all the chain has up to `last`: per escrow the same events in the same order, each
/// once, with the same arguments.
pub async fn compare(
    chain: &Chain,
    factory: Address,
    escrows: &[Address],
    last: u64,
    arrived: &[Message],
) -> Result<Compared> {
    let chain_id = chain.chain_id().await;
    let addresses: Vec<Address> = escrows.iter().copied().chain([factory]).collect();
    let logs = chain.logs(&addresses, 0..=last).await;
    let mut expected: BTreeMap<String, Vec<(Place, Value)>> = BTreeMap::new();
    let mut not_relayed = 0;
    for log in &logs {
        let event = event_of(log).with_context(|| format!("a log no contract of ours emits: {log:?}"))?;
        if event.name == NOT_RELAYED {
            not_relayed += 1;
            continue;
        }
        let announcement = log.address == factory;
        let escrow = if announcement { Address::from_word(log.topics[1]) } else { log.address };
        let place = (log.block_number, log.transaction_index, !announcement, log.log_index);
        expected
            .entry(format!("{escrow:#x}"))
            .or_default()
            .push((place, message(chain_id, log, &event.name)?));
    }
    let mut found: BTreeMap<&str, Vec<Value>> = BTreeMap::new();
    for message in arrived {
        found.entry(&message.ordering_key).or_default().push(essence(message)?);
    }

    for (escrow, events) in &mut expected {
        // Chain order, but the announcement comes before the other logs of its own transaction.
        events.sort_by_key(|(place, _)| *place);
        let found = found.remove(escrow.as_str()).unwrap_or_default();
        for (index, (_, event)) in events.iter().enumerate() {
            let mut event = event.clone();
            event["sequence"] = json!(index + 1);
            match found.get(index) {
                Some(found) if *found == event => {}
                Some(found) => {
                    bail!("escrow {escrow}, message {}:\n  chain:   {event}\n  Pub/Sub: {found}", index + 1)
                }
                None => bail!("escrow {escrow}: message {} never arrived:\n  chain: {event}", index + 1),
            }
        }
        if let Some(extra) = found.get(events.len()) {
            bail!("escrow {escrow}: a message too many:\n  Pub/Sub: {extra}");
        }
    }
    if let Some((key, messages)) = found.first_key_value() {
        bail!("{} messages with the ordering key {key:?}, which is no escrow's", messages.len());
    }
    ensure!(expected.len() == escrows.len(), "{} escrows have events, not {}", expected.len(), escrows.len());
    Ok(Compared { logs: logs.len(), not_relayed, messages: arrived.len(), escrows: expected.len() })
}

/// Block, transaction, not the announcement, log.
type Place = (u64, u64, bool, u64);

/// What the message for this log says, as far as the log says it.
fn message(chain_id: u64, log: &Log, event_name: &str) -> Result<Value> {
    Ok(json!({
        "event_id": format!("{chain_id}:{}:{}", log.block_hash, log.log_index),
        "event_name": event_name,
        "chain_id": chain_id,
        "contract_address": format!("{:#x}", log.address),
        "block_number": log.block_number,
        "block_hash": log.block_hash,
        "transaction_hash": log.transaction_hash,
        "transaction_index": log.transaction_index,
        "log_index": log.log_index,
        "args": arguments(log)?,
    }))
}

/// The same of a message that arrived, with its sequence.
fn essence(message: &Message) -> Result<Value> {
    let body: Value = serde_json::from_slice(&message.data).context("a message that is not JSON")?;
    for name in ["event_id", "event_name"] {
        let attribute = message.attribute(name);
        ensure!(body[name] == attribute, "{name} is {} in the body and {attribute:?} outside", body[name]);
    }
    let names = [
        "event_id",
        "event_name",
        "chain_id",
        "contract_address",
        "block_number",
        "block_hash",
        "transaction_hash",
        "transaction_index",
        "log_index",
        "args",
        "sequence",
    ];
    let essence: Map<String, Value> =
        names.into_iter().map(|name| (name.to_owned(), body[name].clone())).collect();
    Ok(Value::Object(essence))
}

fn arguments(log: &Log) -> Result<Value> {
    let event = event_of(log).expect("asked before");
    let decoded = event.decode_log_parts(log.topics.iter().copied(), &log.data)?;
    let (mut indexed, mut body) = (decoded.indexed.into_iter(), decoded.body.into_iter());
    let mut arguments = Map::new();
    for input in &event.inputs {
        let value = if input.indexed { indexed.next() } else { body.next() };
        let value = match value.context("fewer values than parameters")? {
            DynSolValue::Address(address) => json!(format!("{address:#x}")),
            DynSolValue::Uint(number, _) => json!(number.to_string()),
            other => bail!("{} has an argument of a kind the demo does not compare: {other:?}", event.name),
        };
        arguments.insert(input.name.clone(), value);
    }
    Ok(Value::Object(arguments))
}
