//! JSON-RPC as it travels: calls out, answers in.

use alloy::primitives::{Address, B256, Bytes, Selector};
use alloy::rpc::json_rpc::{Id, Request, SerializedRequest};
use serde::de::value::MapAccessDeserializer;
use serde::de::{self, DeserializeOwned, Deserializer, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize, Serializer};
use serde_json::value::{RawValue, to_raw_value};

use super::verdict::Asked;
use crate::event::{Addresses, BlockRef, Header, Log};
use crate::scan::{Answer, BlockTag, Call, LogFilter, Span};

/// One request of a batch.
#[derive(Clone, Copy, Debug)]
pub(super) enum Query<'a> {
    /// What was asked for.
    Call(&'a Call),
    /// Beside the first calls to a provider: whether it is on our chain.
    ChainId,
    /// Beside logs by range: whether the node answering has the range's last block.
    Anchor(u64),
}

/// The call's JSON-RPC method.
pub(super) fn method(call: &Call) -> &'static str {
    match call {
        Call::Header(_) => "eth_getBlockByNumber",
        Call::Code(_) => "eth_getCode",
        Call::Logs(_) => "eth_getLogs",
        Call::Read { .. } => "eth_call",
    }
}

/// The query as a JSON-RPC request.
pub(super) fn request(query: Query<'_>, id: u64) -> SerializedRequest {
    match query {
        Query::ChainId => serialize("eth_chainId", id, ()),
        Query::Anchor(number) => {
            serialize("eth_getBlockByNumber", id, (Tag(BlockTag::Number(number)), false))
        }
        Query::Call(call @ Call::Header(tag)) => serialize(method(call), id, (Tag(*tag), false)),
        Query::Call(call @ Call::Code(address)) => serialize(method(call), id, (address, "latest")),
        Query::Call(call @ Call::Read { contract, selector, at }) => {
            let input = ReadParam { to: contract, data: selector };
            serialize(method(call), id, (input, Tag(BlockTag::Number(*at))))
        }
        Query::Call(call @ Call::Logs(filter)) => serialize(method(call), id, (FilterParam::new(filter),)),
    }
}

/// The request that subscribes to new heads.
pub(super) fn new_heads(id: u64) -> SerializedRequest {
    serialize("eth_subscribe", id, ("newHeads",))
}

/// Reads an announced head.
pub(super) fn head(announced: &RawValue) -> Result<Header, serde_json::Error> {
    serde_json::from_str::<RawHeader>(announced.get()).map(Header::from)
}

/// The last block of these calls' ranges whose header is not among them: without it an empty list means nothing.
pub(super) fn missing_anchor(calls: &[Call]) -> Option<u64> {
    let last = |call: &Call| match call {
        Call::Logs(LogFilter { span: Span::Range(range), .. }) => Some(range.to()),
        Call::Logs(_) | Call::Header(_) | Call::Code(_) | Call::Read { .. } => None,
    };
    let anchor = calls.iter().filter_map(last).max()?;
    let is_there = |call: &Call| matches!(call, Call::Header(BlockTag::Number(number)) if *number == anchor);
    (!calls.iter().any(is_there)).then_some(anchor)
}

fn serialize(method: &'static str, id: u64, params: impl Serialize) -> SerializedRequest {
    let params = to_raw_value(&params).expect("parameters are plain JSON");
    Request::new(method, Id::Number(id), params).try_into().expect("a request is plain JSON")
}

/// The call as the classification of refusals wants it.
pub(super) fn asked(call: &Call) -> Asked {
    match call {
        Call::Header(BlockTag::Safe | BlockTag::Finalized) => Asked::Tag,
        Call::Header(BlockTag::Latest | BlockTag::Number(_)) => Asked::Header,
        Call::Code(_) | Call::Read { .. } => Asked::Other,
        Call::Logs(LogFilter { span: Span::Block(_), addresses, .. }) => {
            Asked::BlockHash { addresses: addresses.len() }
        }
        Call::Logs(LogFilter { span: Span::Range(range), addresses, .. }) => {
            Asked::Range { from: range.from(), to: range.to(), addresses: addresses.len() }
        }
    }
}

/// The result of a call as it comes, read once: what it is shows in its shape.
#[derive(Clone, Debug)]
pub(super) enum Said {
    /// A list: logs, without those of a fork already given up. Some gateways hand these out; they are never events.
    Logs(Vec<Log>),
    /// An object.
    Header(Header),
    /// Text or nothing; or what did not come that way, of any shape.
    Raw(Box<RawValue>),
}

impl Said {
    /// What it is, if it is of neither shape.
    fn read<T: DeserializeOwned>(&self) -> Result<T, serde_json::Error> {
        match self {
            Self::Raw(raw) => serde_json::from_str(raw.get()),
            // Whatever it is a list of.
            Self::Logs(logs) if logs.is_empty() => serde_json::from_str("[]"),
            Self::Logs(_) => Err(de::Error::custom("a list")),
            Self::Header(_) => Err(de::Error::custom("an object")),
        }
    }

    /// Reads a header; `None`: the node does not have the block.
    pub fn header(self) -> Result<Option<Header>, serde_json::Error> {
        match self {
            Self::Header(header) => Ok(Some(header)),
            other => Ok(other.read::<Option<RawHeader>>()?.map(Header::from)),
        }
    }

    fn logs(self) -> Result<Vec<Log>, serde_json::Error> {
        match self {
            Self::Logs(logs) => Ok(logs),
            other => Ok(other.read::<Vec<RawLog>>()?.into_iter().filter_map(RawLog::standing).collect()),
        }
    }
}

/// Fails if a list is not one of logs, or an object no header.
impl<'de> Deserialize<'de> for Said {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Shape;
        impl<'de> Visitor<'de> for Shape {
            type Value = Said;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("logs, a header or text")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Said, A::Error> {
                let mut logs = Vec::new();
                while let Some(log) = list.next_element::<RawLog>()? {
                    logs.extend(log.standing());
                }
                Ok(Said::Logs(logs))
            }
            fn visit_map<A: MapAccess<'de>>(self, object: A) -> Result<Said, A::Error> {
                let header = RawHeader::deserialize(MapAccessDeserializer::new(object))?;
                Ok(Said::Header(header.into()))
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Said, E> {
                to_raw_value(text).map(Said::Raw).map_err(E::custom)
            }
            fn visit_unit<E: de::Error>(self) -> Result<Said, E> {
                to_raw_value(&()).map(Said::Raw).map_err(E::custom)
            }
        }
        deserializer.deserialize_any(Shape)
    }
}

/// Reads the result of `call`.
pub(super) fn answer(call: &Call, result: Said) -> Result<Answer, serde_json::Error> {
    match call {
        Call::Header(_) => Ok(Answer::Header(result.header()?)),
        Call::Code(_) => Ok(Answer::Code(!result.read::<Bytes>()?.is_empty())),
        Call::Read { .. } => Ok(Answer::Output(result.read()?)),
        Call::Logs(_) => Ok(Answer::Logs(result.logs()?)),
    }
}

/// Reads the result of `eth_chainId`.
pub(super) fn chain_id(result: &Said) -> Result<u64, serde_json::Error> {
    result.read::<Quantity>().map(|quantity| quantity.0)
}

struct Tag(BlockTag);

impl Serialize for Tag {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            BlockTag::Number(number) => serializer.collect_str(&format_args!("{number:#x}")),
            BlockTag::Latest | BlockTag::Safe | BlockTag::Finalized => serializer.collect_str(&self.0),
        }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct FilterParam<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    from_block: Option<Tag>,
    #[serde(skip_serializing_if = "Option::is_none")]
    to_block: Option<Tag>,
    #[serde(skip_serializing_if = "Option::is_none")]
    block_hash: Option<B256>,
    #[serde(skip_serializing_if = "Addresses::is_empty")]
    address: &'a Addresses,
    #[serde(skip_serializing_if = "Option::is_none")]
    topics: Option<[&'a [B256]; 1]>,
}

impl<'a> FilterParam<'a> {
    fn new(filter: &'a LogFilter) -> Self {
        let (range, block_hash) = match filter.span {
            Span::Range(range) => (Some(range), None),
            Span::Block(hash) => (None, Some(hash)),
        };
        Self {
            from_block: range.map(|range| Tag(BlockTag::Number(range.from()))),
            to_block: range.map(|range| Tag(BlockTag::Number(range.to()))),
            block_hash,
            address: &filter.addresses,
            topics: (!filter.topics.is_empty()).then_some([&filter.topics]),
        }
    }
}

#[derive(Serialize)]
struct ReadParam<'a> {
    to: &'a Address,
    data: &'a Selector,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawHeader {
    number: Quantity,
    hash: B256,
    parent_hash: B256,
    timestamp: Quantity,
}

impl From<RawHeader> for Header {
    fn from(raw: RawHeader) -> Self {
        Self {
            block: BlockRef { number: raw.number.0, hash: raw.hash },
            parent_hash: raw.parent_hash,
            timestamp: raw.timestamp.0,
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawLog {
    address: Address,
    topics: Vec<B256>,
    data: Bytes,
    block_number: Quantity,
    block_hash: B256,
    transaction_hash: B256,
    transaction_index: Quantity,
    log_index: Quantity,
    #[serde(default)]
    block_timestamp: Option<Quantity>,
    #[serde(default)]
    removed: bool,
}

impl RawLog {
    /// The log, unless it is of a fork already given up.
    fn standing(self) -> Option<Log> {
        (!self.removed).then(|| Log {
            address: self.address,
            topics: self.topics,
            data: self.data,
            block: BlockRef { number: self.block_number.0, hash: self.block_hash },
            transaction_hash: self.transaction_hash,
            transaction_index: self.transaction_index.0,
            log_index: self.log_index.0,
            block_timestamp: self.block_timestamp.map(|quantity| quantity.0),
        })
    }
}

/// A number as hex text, or plain as geth 1.16.0 gave `blockTimestamp`.
struct Quantity(u64);

impl<'de> Deserialize<'de> for Quantity {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Hex;
        impl Visitor<'_> for Hex {
            type Value = Quantity;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a quantity of at most 64 bits, as 0x-hex")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Quantity, E> {
                let digits = text.strip_prefix("0x").ok_or_else(|| E::custom("a quantity without 0x"))?;
                u64::from_str_radix(digits, 16).map(Quantity).map_err(E::custom)
            }
            fn visit_u64<E: de::Error>(self, number: u64) -> Result<Quantity, E> {
                Ok(Quantity(number))
            }
        }
        deserializer.deserialize_any(Hex)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::BlockRange;

    fn raw(text: &str) -> Said {
        Said::Raw(RawValue::from_string(text.to_owned()).unwrap())
    }

    const LOG: &str = r#"{"address":"0x00000000000000000000000000000000000000aa","topics":["0x5d91bd0cecc45fef102af61de92c5462fad884a5ce9e21c15e0a85b9a4f7c8a4"],
        "data":"0x","blockNumber":"0x10","blockHash":"0x1111111111111111111111111111111111111111111111111111111111111111",
        "transactionHash":"0x2222222222222222222222222222222222222222222222222222222222222222","transactionIndex":"0x0","logIndex":"0x3"EXTRA}"#;

    #[test]
    fn a_log_is_read_with_its_time_in_any_notation_and_never_when_removed() {
        let table = [
            ("", Some(None)),
            (r#","blockTimestamp":"0x5""#, Some(Some(5))),
            (r#","blockTimestamp":5"#, Some(Some(5))),
            (r#","blockTimestamp":null"#, Some(None)),
            (r#","removed":false"#, Some(None)),
            (r#","removed":true"#, None),
        ];
        let call = Call::Logs(LogFilter {
            span: Span::Block(B256::ZERO),
            addresses: Addresses::any(),
            topics: std::sync::Arc::from([]),
        });
        for (extra, expected) in table {
            let text = format!("[{}]", LOG.replace("EXTRA", extra));
            for said in [serde_json::from_str(&text).unwrap(), raw(&text)] {
                let logs = answer(&call, said).unwrap().logs();
                assert_eq!(logs.first().map(|log| log.block_timestamp), expected, "{extra}");
            }
        }
    }

    #[test]
    fn a_range_is_asked_by_numbers_and_a_block_by_hash() {
        let filter = |span| LogFilter {
            span,
            addresses: vec![Address::repeat_byte(0xAB)].into(),
            topics: std::sync::Arc::from([B256::repeat_byte(1)]),
        };
        let range =
            serde_json::to_value(FilterParam::new(&filter(Span::Range(BlockRange::new(1, 255).unwrap()))));
        assert_eq!(
            range.unwrap(),
            serde_json::json!({"fromBlock": "0x1", "toBlock": "0xff", "topics": [[B256::repeat_byte(1)]],
                "address": ["0xabababababababababababababababababababab"]})
        );
        let block =
            serde_json::to_value(FilterParam::new(&filter(Span::Block(B256::repeat_byte(7))))).unwrap();
        assert_eq!(block["blockHash"], serde_json::json!(B256::repeat_byte(7)));
        assert!(block.get("fromBlock").is_none());
        let all = LogFilter { topics: std::sync::Arc::from([]), ..filter(Span::Block(B256::ZERO)) };
        assert!(serde_json::to_value(FilterParam::new(&all)).unwrap().get("topics").is_none());
    }
}
