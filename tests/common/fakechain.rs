//! A chain in memory that forks as told, and answers JSON-RPC as a strict node does: what it does not have is null or
//! an error, never an empty list. `relay::faults` puts it behind real HTTP, and makes it fail and lie.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

use alloy::primitives::{Address, B256, Bytes, keccak256};
use serde_json::{Value, json};

use super::Line;

/// How far below the highest block there ever was blocks are final.
pub const FINALITY: u64 = 12;

/// A log to be.
#[derive(Debug, Clone, Default)]
pub struct Emitted {
    pub address: Address,
    pub topics: Vec<B256>,
    pub data: Bytes,
    /// Of the block: logs of one transaction stand together.
    pub transaction: u64,
}

#[derive(Debug, Clone)]
pub struct Block {
    pub number: u64,
    pub hash: B256,
    pub parent: B256,
    pub logs: Vec<Emitted>,
}

#[derive(Default)]
struct State {
    blocks: Vec<Block>,
    /// The newest block there ever was.
    highest: u64,
    /// Makes each block another.
    salt: u64,
}

pub struct FakeChain {
    id: u64,
    state: Mutex<State>,
}

impl FakeChain {
    /// With an empty first block.
    pub fn new(id: u64) -> FakeChain {
        let chain = FakeChain { id, state: Mutex::default() };
        chain.extend(vec![]);
        chain
    }

    /// One more block with these logs.
    pub fn extend(&self, logs: Vec<Emitted>) {
        let mut state = self.state.lock().expect("no panic while held");
        state.salt += 1;
        let number = state.blocks.len() as u64;
        let parent = state.blocks.last().map_or(B256::ZERO, |block| block.hash);
        let hash = keccak256([state.salt.to_be_bytes(), number.to_be_bytes()].concat());
        state.blocks.push(Block { number, hash, parent, logs });
        state.highest = state.highest.max(number);
    }

    /// Takes the newest `depth` blocks away, none that was ever final, and returns them.
    pub fn fork(&self, depth: u64) -> Vec<Block> {
        let mut state = self.state.lock().expect("no panic while held");
        let head = state.blocks.len() as u64 - 1;
        let keep = (head - depth.min(head)).max(state.highest.saturating_sub(FINALITY)) as usize + 1;
        let keep = keep.min(state.blocks.len());
        state.blocks.split_off(keep)
    }

    /// Goes back to blocks that [`FakeChain::fork`] took away, if what they stand on is there.
    pub fn restore(&self, branch: &[Block]) {
        let Some(first) = branch.first() else { return };
        let mut state = self.state.lock().expect("no panic while held");
        let final_below = state.highest.saturating_sub(FINALITY);
        let stands = |block: &Block| block.hash == first.parent;
        let place = first.number as usize;
        let fits = place > final_below as usize && state.blocks.get(place - 1).is_some_and(stands);
        if fits {
            state.blocks.truncate(place);
            state.blocks.extend_from_slice(branch);
            state.highest = state.highest.max(state.blocks.len() as u64 - 1);
        }
    }

    pub fn blocks(&self) -> Vec<Block> {
        self.state.lock().expect("no panic while held").blocks.clone()
    }

    /// One call or many.
    pub fn answer(&self, asked: &Value) -> Value {
        let state = self.state.lock().expect("no panic while held");
        let one = |call: &Value| match state.result(self.id, call) {
            Ok(result) => json!({ "jsonrpc": "2.0", "id": call["id"], "result": result }),
            Err(message) => {
                json!({ "jsonrpc": "2.0", "id": call["id"], "error": { "code": -32000, "message": message } })
            }
        };
        match asked {
            Value::Array(calls) => calls.iter().map(one).collect(),
            call => one(call),
        }
    }
}

impl State {
    fn result(&self, id: u64, call: &Value) -> Result<Value, &'static str> {
        let params = &call["params"];
        let head = self.blocks.len() as u64 - 1;
        Ok(match call["method"].as_str().unwrap_or_default() {
            "eth_chainId" => json!(hex(id)),
            "eth_blockNumber" => json!(hex(head)),
            "eth_getCode" => json!("0x00"),
            "eth_getBlockByNumber" => {
                let number = match params[0].as_str().unwrap_or_default() {
                    "latest" => head,
                    "safe" | "finalized" => self.highest.saturating_sub(FINALITY).min(head),
                    text => parse(text),
                };
                self.blocks.get(number as usize).map_or(Value::Null, header)
            }
            "eth_getBlockByHash" => self.by_hash(&params[0]).map_or(Value::Null, header),
            "eth_getLogs" => {
                let filter = &params[0];
                let blocks = match filter.get("blockHash") {
                    Some(hash) => vec![self.by_hash(hash).ok_or("unknown block")?],
                    None => {
                        let bound = |name: &str| parse(filter[name].as_str().unwrap_or_default());
                        let (from, to) = (bound("fromBlock"), bound("toBlock"));
                        if to > head {
                            return Err("block range extends beyond current head block");
                        }
                        self.blocks[from as usize..=to as usize].iter().collect()
                    }
                };
                blocks.into_iter().flat_map(|block| logs(block, filter)).collect()
            }
            _ => return Err("the method does not exist/is not available"),
        })
    }

    fn by_hash(&self, hash: &Value) -> Option<&Block> {
        self.blocks.iter().find(|block| json!(block.hash) == *hash)
    }
}

/// What must stand in the end, per lane: event ids in order. An escrow's events count from the block that announces it on.
pub fn truth(
    blocks: &[Block],
    factory: Address,
    announcements: &[B256],
    lifecycle: &[B256],
) -> BTreeMap<String, Vec<String>> {
    let mut lanes: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut announced = BTreeSet::new();
    for block in blocks {
        let announces = |log: &Emitted| log.address == factory && announcements.contains(&log.topics[0]);
        let subject = |log: &Emitted| Address::from_word(log.topics[1]);
        announced.extend(block.logs.iter().filter(|log| announces(log)).map(subject));
        let mut events = vec![];
        for (index, log) in block.logs.iter().enumerate() {
            let lane = if announces(log) { subject(log) } else { log.address };
            let counts = announces(log) || lifecycle.contains(&log.topics[0]) && announced.contains(&lane);
            if counts {
                events.push(((log.transaction, !announces(log), index), lane));
            }
        }
        events.sort();
        for ((_, _, index), lane) in events {
            lanes.entry(format!("{lane:#x}")).or_default().push(format!("1:{}:{index}", block.hash));
        }
    }
    lanes
}

/// What was published less what was withdrawn, as [`truth`] has it. Panics where numbers have gaps, or what is withdrawn is
/// not the newest.
pub fn standing(lines: &[Line]) -> BTreeMap<String, Vec<String>> {
    let mut lanes: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut last: BTreeMap<&str, u64> = BTreeMap::new();
    for line in lines {
        let key = line.ordering_key.as_str();
        let before = last.insert(key, line.sequence()).unwrap_or(0);
        assert_eq!(line.sequence(), before + 1, "{key}");
        let lane = lanes.entry(key.to_owned()).or_default();
        match line.data["retracts"].as_str() {
            None => lane.push(line.event_id().to_owned()),
            Some(retracted) => assert_eq!(lane.pop().as_deref(), Some(retracted), "{key}: newest first"),
        }
    }
    lanes.retain(|_, lane| !lane.is_empty());
    lanes
}

fn header(block: &Block) -> Value {
    json!({ "number": hex(block.number), "hash": block.hash, "parentHash": block.parent, "timestamp": hex(time(block)) })
}

fn time(block: &Block) -> u64 {
    1_700_000_000 + 12 * block.number
}

fn logs(block: &Block, filter: &Value) -> Vec<Value> {
    let among = |wanted: &Value, value: Value| match wanted {
        Value::Array(any) => any.is_empty() || any.contains(&value),
        Value::Null => true,
        one => *one == value,
    };
    let places = block.logs.iter().enumerate();
    let wanted = places.filter(|(_, log)| {
        among(&filter["address"], json!(log.address)) && among(&filter["topics"][0], json!(log.topics[0]))
    });
    let log = |(index, log): (usize, &Emitted)| {
        json!({
            "address": log.address, "topics": log.topics, "data": log.data,
            "blockNumber": hex(block.number), "blockHash": block.hash,
            "transactionHash": keccak256([&block.hash[..], &log.transaction.to_be_bytes()].concat()),
            "transactionIndex": hex(log.transaction), "logIndex": hex(index as u64), "removed": false,
        })
    };
    wanted.map(log).collect()
}

fn hex(number: u64) -> String {
    format!("{number:#x}")
}

fn parse(quantity: &str) -> u64 {
    let digits = quantity.strip_prefix("0x").unwrap_or_else(|| panic!("not a quantity: {quantity}"));
    u64::from_str_radix(digits, 16).unwrap_or_else(|_| panic!("not a quantity: {quantity}"))
}
