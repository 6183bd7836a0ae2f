//! The message as consumers read it: body and attributes.

use std::io::Write;

use alloy::dyn_abi::DynSolValue;
use alloy::primitives::{Address, B256, hex};
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};

use super::Log;

/// Version of the body's layout.
pub const SCHEMA_VERSION: u32 = 1;

/// Top-level names that an event's own argument never overwrites.
const ENVELOPE: [&str; 14] = [
    "schema_version",
    "event_id",
    "sequence",
    "chain_id",
    "contract_address",
    "event_name",
    "block_number",
    "block_hash",
    "block_timestamp",
    "timestamp",
    "transaction_hash",
    "transaction_index",
    "log_index",
    "args",
];

/// Names one log in one block: mined again in another block it is another event.
pub fn event_id(chain_id: u64, block_hash: &B256, log_index: u64) -> String {
    format!("{chain_id}:{block_hash}:{log_index}")
}

/// The id of the message that withdraws `retracted`.
pub fn retraction_id(retracted: &str, sequence: u64) -> String {
    format!("{retracted}:retracted:{sequence}")
}

/// What a log says, wherever it stands in its block: by this an audit knows an event again. Never 0. Processors have SHA-256;
/// Keccak takes as long as all the rest of an event.
pub fn digest(log: &Log) -> u64 {
    let mut hasher = Sha256::new();
    hasher.update(log.block.hash);
    hasher.update(log.transaction_hash);
    hasher.update(log.address);
    log.topics.iter().for_each(|topic| hasher.update(topic));
    hasher.update(&log.data);
    let hash: [u8; 32] = hasher.finalize().into();
    let [a, b, c, d, e, f, g, h, ..] = hash;
    u64::from_be_bytes([a, b, c, d, e, f, g, h]).max(1)
}

/// A decoded log and its context, about to become a [`Body`].
pub(super) struct Fields<'a> {
    pub chain_id: u64,
    pub log: &'a Log,
    pub timestamp: u64,
    pub event: &'a str,
    pub names: &'a [String],
    pub values: &'a [DynSolValue],
}

/// An encoded message body with a gap where the sequence number goes.
///
/// Everything else is known when the log is decoded; the sequence only in the commit that stores it.
#[derive(Clone, Debug)]
pub struct Body {
    bytes: Box<[u8]>,
    gap: usize,
}

impl Body {
    pub(super) fn new(fields: &Fields<'_>) -> Self {
        let log = fields.log;
        // As much as most need. What is kept has its own size: there are many of these at once.
        let mut bytes = Vec::with_capacity(2048);
        let to = &mut bytes;
        text(to, "{\"schema_version\":");
        number(to, SCHEMA_VERSION.into());
        // As `event_id` has it.
        text(to, ",\"event_id\":\"");
        number(to, fields.chain_id);
        text(to, ":");
        hexadecimal(to, log.block.hash.as_slice());
        text(to, ":");
        number(to, log.log_index);
        text(to, "\",\"sequence\":");
        let gap = to.len();
        text(to, ",\"chain_id\":");
        number(to, fields.chain_id);
        text(to, ",\"contract_address\":");
        hex_string(to, log.address.as_slice());
        text(to, ",\"event_name\":");
        json_string(to, fields.event);
        text(to, ",\"block_number\":");
        number(to, log.block.number);
        text(to, ",\"block_hash\":");
        hex_string(to, log.block.hash.as_slice());
        let time = rfc3339(fields.timestamp);
        text(to, ",\"block_timestamp\":\"");
        text(to, &time);
        text(to, "\",\"timestamp\":\"");
        text(to, &time);
        text(to, "\",\"transaction_hash\":");
        hex_string(to, log.transaction_hash.as_slice());
        text(to, ",\"transaction_index\":");
        number(to, log.transaction_index);
        text(to, ",\"log_index\":");
        number(to, log.log_index);
        text(to, ",\"args\":{");
        let arguments = bytes.len();
        for (index, name) in fields.names.iter().enumerate() {
            if index > 0 {
                bytes.push(b',');
            }
            argument(&mut bytes, fields, index, name);
        }
        let arguments = arguments..bytes.len();
        bytes.push(b'}');
        flatten(&mut bytes, fields, arguments);
        bytes.push(b'}');
        Self { bytes: bytes.as_slice().into(), gap }
    }

    /// The finished bytes: what is stored, and what is sent.
    pub fn finish(&self, sequence: u64) -> Vec<u8> {
        let mut finished = Vec::new();
        self.finish_into(&mut finished, sequence);
        finished
    }

    /// The same in place of what was in there.
    pub fn finish_into(&self, finished: &mut Vec<u8>, sequence: u64) {
        let number = sequence.to_string();
        finished.clear();
        finished.reserve(self.bytes.len() + number.len());
        finished.extend_from_slice(&self.bytes[..self.gap]);
        finished.extend_from_slice(number.as_bytes());
        finished.extend_from_slice(&self.bytes[self.gap..]);
    }
}

/// Every argument once more at the top level, except where the envelope has the name already: consumers of
/// both generations exist.
fn flatten(bytes: &mut Vec<u8>, fields: &Fields<'_>, arguments: std::ops::Range<usize>) {
    let collides = fields.names.iter().any(|name| ENVELOPE.contains(&name.as_str()));
    if !collides {
        if !arguments.is_empty() {
            bytes.push(b',');
            bytes.extend_from_within(arguments);
        }
        return;
    }
    for (index, name) in fields.names.iter().enumerate() {
        if !ENVELOPE.contains(&name.as_str()) {
            bytes.push(b',');
            argument(bytes, fields, index, name);
        }
    }
}

fn argument(bytes: &mut Vec<u8>, fields: &Fields<'_>, index: usize, name: &str) {
    json_string(bytes, name);
    bytes.push(b':');
    value(bytes, &fields.values[index]);
}

/// Integers of any width as decimal strings: JSON numbers lose digits above 2^53.
fn value(bytes: &mut Vec<u8>, of: &DynSolValue) {
    match of {
        DynSolValue::Bool(it) => put(bytes, format_args!("{it}")),
        DynSolValue::Int(it, _) => put(bytes, format_args!("\"{it}\"")),
        DynSolValue::Uint(it, _) => match u64::try_from(it) {
            Ok(small) => {
                text(bytes, "\"");
                number(bytes, small);
                text(bytes, "\"");
            }
            Err(_) => put(bytes, format_args!("\"{it}\"")),
        },
        DynSolValue::FixedBytes(word, size) => hex_string(bytes, &word[..*size]),
        DynSolValue::Address(it) => hex_string(bytes, it.as_slice()),
        DynSolValue::Function(it) => hex_string(bytes, it.as_slice()),
        DynSolValue::Bytes(it) => hex_string(bytes, it),
        DynSolValue::String(it) => json_string(bytes, it),
        DynSolValue::Array(items) | DynSolValue::FixedArray(items) | DynSolValue::Tuple(items) => {
            sequence(bytes, items);
        }
    }
}

/// Signatures give the members of a tuple no names: it is an array, too.
fn sequence(bytes: &mut Vec<u8>, items: &[DynSolValue]) {
    bytes.push(b'[');
    for (index, item) in items.iter().enumerate() {
        if index > 0 {
            bytes.push(b',');
        }
        value(bytes, item);
    }
    bytes.push(b']');
}

fn put(bytes: &mut Vec<u8>, text: std::fmt::Arguments<'_>) {
    bytes.write_fmt(text).expect("writing to memory");
}

fn text(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend_from_slice(text.as_bytes());
}

fn number(bytes: &mut Vec<u8>, number: u64) {
    serde_json::to_writer(bytes, &number).expect("a number is JSON");
}

fn json_string(bytes: &mut Vec<u8>, text: &str) {
    serde_json::to_writer(bytes, text).expect("a string is JSON");
}

fn hex_string(bytes: &mut Vec<u8>, data: &[u8]) {
    bytes.push(b'"');
    hexadecimal(bytes, data);
    bytes.push(b'"');
}

fn hexadecimal(bytes: &mut Vec<u8>, data: &[u8]) {
    text(bytes, "0x");
    let begin = bytes.len();
    bytes.resize(begin + 2 * data.len(), 0);
    hex::encode_to_slice(data, &mut bytes[begin..]).expect("there is room for two digits a byte");
}

/// Seconds since 1970 as `2026-01-01T00:00:00Z`; a node's nonsense beyond the year 9999 becomes that year's end.
fn rfc3339(seconds: u64) -> String {
    const LAST: u64 = 253_402_300_799;
    let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(seconds.min(LAST));
    humantime::format_rfc3339_seconds(time).to_string()
}

/// The withdrawal of a message whose block left the chain.
#[derive(Debug)]
pub struct Retraction<'a> {
    /// The id of the message withdrawn.
    pub retracts: &'a str,
    /// Its body.
    pub retracted_event: &'a [u8],
    /// The withdrawal's own sequence.
    pub sequence: u64,
    /// The chain.
    pub chain_id: u64,
    /// Who had emitted the event.
    pub emitter: Address,
}

impl Retraction<'_> {
    /// The body. No top-level field carries the original event's name, so that nobody mistakes it for the event.
    pub fn encode(&self) -> Result<Vec<u8>, serde_json::Error> {
        let original: &RawValue = serde_json::from_slice(self.retracted_event)?;
        let id = retraction_id(self.retracts, self.sequence);
        let mut bytes = Vec::with_capacity(self.retracted_event.len() + 512);
        put(
            &mut bytes,
            format_args!(
                "{{\"event_name\":\"Retracted\",\"event_id\":\"{id}\",\"retracts\":\"{}\",\"retracted_event\":{},\
                 \"reason\":\"reorg\",\"sequence\":{},\"chain_id\":{},\"contract_address\":\"{:#x}\"}}",
                self.retracts,
                original.get(),
                self.sequence,
                self.chain_id,
                self.emitter
            ),
        );
        Ok(bytes)
    }
}

/// What travels beside the body; all values are text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// What consumers route on: the event's name, or `Retracted`.
    pub event_type: String,
    /// The chain.
    pub chain_id: u64,
    /// Who emitted the log.
    pub emitter: Address,
    /// Whose life it is about.
    pub escrow: Address,
    /// The log's block.
    pub block_number: u64,
    /// The message's id.
    pub event_id: String,
    /// The message's place in its escrow's life.
    pub sequence: u64,
    /// The life of the store that numbered it.
    pub epoch: u64,
    /// Published after later ones of its escrow: outside the order promise.
    pub late: bool,
}

impl Attributes {
    /// Name and value of each.
    pub fn pairs(self) -> Vec<(&'static str, String)> {
        let mut pairs = vec![
            ("event_type", self.event_type.clone()),
            ("event_name", self.event_type),
            ("chain_id", self.chain_id.to_string()),
            ("contract_address", format!("{:#x}", self.emitter)),
            ("escrow", format!("{:#x}", self.escrow)),
            ("block_number", self.block_number.to_string()),
            ("event_id", self.event_id),
            ("sequence", self.sequence.to_string()),
            ("epoch", self.epoch.to_string()),
            ("schema_version", SCHEMA_VERSION.to_string()),
        ];
        if self.late {
            pairs.push(("late", "true".to_owned()));
        }
        pairs
    }
}
