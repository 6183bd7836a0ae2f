//! Nodes that refuse in words nobody has heard before, and nodes that lie: over real HTTP, the real binary gets everything
//! in the end, and nothing that is not on the chain.

mod common;

use std::sync::Arc;
use std::time::Duration;

use alloy::primitives::{Address, B256, keccak256};
use common::fakechain::{self, Emitted, FakeChain};
use common::load::Dice;
use common::relay::faults::{Fault, Faults};
use common::{Line, Setup};
use futures_util::StreamExt;
use serde_json::{Value, json};

const FACTORY: Address = Address::repeat_byte(0xFA);
const DEPLOYED: &str = "EscrowDeployed(address,address,address,address,uint256,uint256,uint8)";
const APPROVED: &str = "Approved(address)";
const BLOCKS: u64 = 70;
const ESCROWS: u8 = 9;
/// How many relayers run at once, and what each may take.
const AT_ONCE: usize = 12;
const PATIENCE: Duration = Duration::from_secs(50);

fn escrow(number: u64) -> Address {
    Address::repeat_byte(1 + number as u8)
}

/// Escrows announced here and there, approved in most blocks; in one many times.
fn chain() -> FakeChain {
    let (chain, mut dice) = (FakeChain::new(1), Dice(11));
    for number in 0..BLOCKS {
        let mut logs = vec![];
        if number % 7 == 0 && number / 7 < u64::from(ESCROWS) {
            let party = Address::repeat_byte(0x77).into_word();
            let topics = vec![keccak256(DEPLOYED), escrow(number / 7).into_word(), party, party];
            logs.push(Emitted { address: FACTORY, topics, data: vec![0; 128].into(), transaction: 0 });
        }
        let count = if number == 50 { 12 } else { dice.below(4) };
        for nth in 0..count {
            let topics = vec![keccak256(APPROVED), B256::with_last_byte(nth as u8)];
            let address = escrow(dice.below(u64::from(ESCROWS)));
            logs.push(Emitted { address, topics, transaction: 1 + nth, ..Emitted::default() });
        }
        chain.extend(logs);
    }
    chain
}

fn setup(url: &str, reading: &str) -> Setup {
    Setup::new(url, FACTORY)
        .with("CHAIN_ID", 1)
        .with("RELAYER_RPC__TIMEOUT", "2s")
        .with("RELAYER_RPC__MAX_RANGE", 20)
        .with("RELAYER_CHAIN__READING", reading)
}

/// What a node does: by the number of the request and its calls.
type Node = Arc<dyn Fn(usize, &[Value]) -> Fault + Send + Sync>;

fn node(decide: impl Fn(usize, &[Value]) -> Fault + Send + Sync + 'static) -> Node {
    Arc::new(decide)
}

/// Relays the chain through each of these nodes, read by link and by range; panics with all that went wrong.
async fn assert_all_relayed(table: Vec<(&'static str, Node)>) {
    let chain = Arc::new(chain());
    let truth = fakechain::truth(&chain.blocks(), FACTORY, &[keccak256(DEPLOYED)], &[keccak256(APPROVED)]);
    let one = async |(name, node, reading): (&str, Node, &str)| {
        let faults = Faults::fake(Arc::clone(&chain)).await;
        faults.on_request(move |number, calls| node(number, calls));
        let mut running = setup(&faults.url(), reading).start(&["run", "--until", "head"]);
        let said = tokio::time::timeout(PATIENCE, running.wait_said("Stopped at block")).await;
        if said.is_err() {
            let stderr = running.stderr();
            let tail = stderr.char_indices().nth_back(1500).map_or(0, |(place, _)| place);
            let requests = faults.requests();
            return Some(format!("{name}, {reading}: no end after {requests} requests: {}", &stderr[tail..]));
        }
        let lines: Vec<Line> = running.ended().await.good().lines();
        (fakechain::standing(&lines) != truth).then(|| format!("{name}, {reading}: not what is on the chain"))
    };
    let cases = table
        .into_iter()
        .flat_map(|(name, node)| ["linked", "ranged"].map(|reading| (name, Arc::clone(&node), reading)));
    let wrong = futures_util::stream::iter(cases).map(one).buffer_unordered(AT_ONCE);
    let wrong: Vec<String> = wrong.filter_map(std::future::ready).collect().await;
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
}

// ---- refusals

fn number(quantity: &Value) -> Option<u64> {
    u64::from_str_radix(quantity.as_str()?.strip_prefix("0x")?, 16).ok()
}

/// Blocks of a call for logs by range.
fn blocks(call: &Value) -> u64 {
    let filter = &call["params"][0];
    match (number(&filter["fromBlock"]), number(&filter["toBlock"])) {
        (Some(from), Some(to)) => to - from + 1,
        _ => 0,
    }
}

fn addresses(call: &Value) -> usize {
    call["params"][0]["address"].as_array().map_or(0, Vec::len)
}

fn is_logs(call: &Value) -> bool {
    call["method"] == "eth_getLogs"
}

fn wide(most: u64) -> impl Fn(&Value) -> bool + Copy + Send + Sync + 'static {
    move |call| blocks(call) > most
}

fn crowded(most: usize) -> impl Fn(&Value) -> bool + Copy + Send + Sync + 'static {
    move |call| addresses(call) > most
}

/// Refuses the calls that are too much, inside a good answer to the others.
fn refusing_some(too_much: impl Fn(&Value) -> bool + Send + Sync + 'static, error: Value) -> Node {
    let too_much = Arc::new(too_much);
    node(move |_, _| {
        let (too_much, error) = (Arc::clone(&too_much), error.clone());
        Fault::edited(move |calls, answers| {
            for (call, answer) in calls.iter().zip(answers).filter(|(call, _)| too_much(call)) {
                *answer = json!({ "jsonrpc": "2.0", "id": call["id"], "error": error });
            }
        })
    })
}

/// Refuses logs of which there are more than so many.
fn refusing_many(most: usize, error: Value) -> Node {
    node(move |_, _| {
        let error = error.clone();
        Fault::edited(move |calls, answers| {
            for (call, answer) in calls.iter().zip(answers) {
                if is_logs(call) && answer["result"].as_array().is_some_and(|logs| logs.len() > most) {
                    *answer = json!({ "jsonrpc": "2.0", "id": call["id"], "error": error });
                }
            }
        })
    })
}

/// Refuses a request as a whole if one of its calls is too much.
fn refusing_whole(too_much: impl Fn(&Value) -> bool + Send + Sync + 'static, refusal: Fault) -> Node {
    node(move |_, calls| if calls.iter().any(&too_much) { refusal.clone() } else { Fault::Pass })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refusals_in_words_nobody_has_heard_before_lead_to_smaller_questions_and_everything_comes() {
    let error = |code: i64, message: &str| json!({ "code": code, "message": message });
    let body = |text: &'static str| Fault::Body(text);
    assert_all_relayed(vec![
        ("a bite", refusing_some(wide(7), error(-32097, "that is a bigger bite than this table serves"))),
        ("a basket", refusing_many(14, error(-31999, "the basket overflows, come with a smaller one"))),
        ("faces", refusing_some(crowded(3), error(7, "too many faces in the picture"))),
        ("an abacus", refusing_some(wide(10), error(-32603, "the abacus ran out of beads"))),
        ("nothing said", refusing_many(45, error(0, ""))),
        ("a gap", refusing_whole(wide(5), Fault::Status(400, "", r#"{"jsonrpc":"2.0","id":null,"error":{"code":-32000,"message":"please mind the gap between your blocks"}}"#))),
        ("pipes", refusing_whole(wide(4), Fault::Status(400, "", "chunkier than our pipes"))),
        ("guests", refusing_whole(crowded(4), Fault::Status(400, "", r#"{"jsonrpc":"2.0","id":1,"error":{"code":-32602,"message":"the guest list exceeds the venue"}}"#))),
        ("no number", refusing_whole(wide(20), body(r#"{"jsonrpc":"2.0","id":1,"error":{"code":"E42","message":"not today"}}"#))),
        (
            "no batches",
            refusing_batches(
                200,
                r#"{"jsonrpc":"2.0","id":null,"error":{"code":-32600,"message":"batch requests are not supported"}}"#,
            ),
        ),
        ("only a text", refusing_whole(wide(20), body(r#"{"jsonrpc":"2.0","id":1,"error":"we would rather not"}"#))),
    ])
    .await;
}

/// Refuses every batch.
fn refusing_batches(status: u16, text: &'static str) -> Node {
    node(move |_, calls| if calls.len() > 1 { Fault::Status(status, "", text) } else { Fault::Pass })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refusals_with_a_servers_own_status_lead_to_smaller_questions_too() {
    let dropped = r#"{"jsonrpc":"2.0","id":null,"error":{"code":-32000,"message":"the librarian dropped all the books"}}"#;
    let bakers = r#"{"jsonrpc":"2.0","id":null,"error":{"code":-32600,"message":"one loaf at a time, says the baker"}}"#;
    assert_all_relayed(vec![
        ("books", refusing_whole(wide(7), Fault::Status(500, "", dropped))),
        ("stairs", refusing_whole(wide(7), Fault::Status(500, "", "it fell down the stairs"))),
        ("a queue", refusing_whole(wide(7), Fault::Status(503, "", "<h1>the queue fell asleep</h1>"))),
        ("pipes", refusing_whole(wide(4), Fault::Status(413, "", "chunkier than our pipes"))),
        ("bakers", refusing_batches(200, bakers)),
        ("bakers in a huff", refusing_batches(400, "one loaf at a time")),
    ])
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_answer_from_another_chain_does_not_end_the_run_and_one_range_of_it_is_not_believed() {
    let elsewhere = |_: &[Value], answers: &mut Vec<Value>| {
        for answer in answers {
            if answer["result"].is_array() {
                answer["result"] = json!([]);
            } else if answer["result"]["hash"].is_string() {
                answer["result"]["hash"] = json!(B256::repeat_byte(0xEE));
                answer["result"]["parentHash"] = json!(B256::repeat_byte(0xED));
            }
        }
    };
    assert_all_relayed(vec![
        (
            "another chain, once",
            node(|number, _| match number {
                // The first two: one may be the sample's.
                2.. => Fault::Pass,
                _ => Fault::edited(|calls, answers| {
                    let asked = calls.iter().zip(answers);
                    for (_, answer) in asked.filter(|(call, _)| call["method"] == "eth_chainId") {
                        answer["result"] = json!("0x5");
                    }
                }),
            }),
        ),
        (
            "another chain's range",
            node(move |request, calls| {
                // The first range follows nothing that is known.
                let from = |call: &Value| number(&call["params"][0]["fromBlock"]);
                let ranged = calls.iter().any(|call| from(call).is_some_and(|block| block >= 20));
                if ranged && Dice(request as u64).below(2) == 0 {
                    Fault::edited(elsewhere)
                } else {
                    Fault::Pass
                }
            }),
        ),
    ])
    .await;
}

// ---- lies

/// Edits the logs of each answer, with the call they answer.
fn with_logs(edit: impl Fn(&Value, &mut Vec<Value>) + Send + Sync + 'static) -> Fault {
    Fault::edited(move |calls, answers| {
        for (call, answer) in calls.iter().zip(answers).filter(|(call, _)| is_logs(call)) {
            if let Some(logs) = answer["result"].as_array_mut() {
                edit(call, logs);
            }
        }
    })
}

/// Such logs in every answer.
fn always(edit: impl Fn(&Value, &mut Vec<Value>) + Clone + Send + Sync + 'static) -> Node {
    node(move |_, _| with_logs(edit.clone()))
}

/// In the first answers, and then in one of five.
fn often(lie: impl Fn() -> Fault + Send + Sync + 'static) -> Node {
    node(move |number, _| if number < 3 || number % 5 == 0 { lie() } else { Fault::Pass })
}

/// A log like this one, elsewhere.
fn changed(log: &Value, changes: Value) -> Value {
    let mut log = log.clone();
    log.as_object_mut().expect("a log").extend(changes.as_object().expect("changes").clone());
    log
}

fn each_log_also(changes: impl Fn(&Value) -> Value) -> impl Fn(&mut Vec<Value>) {
    move |logs| {
        let more: Vec<Value> = logs.iter().map(|log| changed(log, changes(log))).collect();
        logs.extend(more);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_lying_node_adds_leaves_out_or_mixes_up_is_noticed_and_the_chain_is_relayed() {
    let far =
        |log: &Value| json!({ "logIndex": format!("{:#x}", number(&log["logIndex"]).expect("one") + 100) });
    let brackets: &'static str = Box::leak("[".repeat(1_000_000).into_boxed_str());
    let deep = format!("{}{}", "[".repeat(500_000), "]".repeat(500_000));
    let nested = format!(r#"{{"jsonrpc":"2.0","id":1,"result":{deep}}}"#);
    let nested: &'static str = Box::leak(nested.into_boxed_str());
    let and = |mut one: Value, other: Value| {
        one.as_object_mut().expect("changes").extend(other.as_object().expect("changes").clone());
        one
    };
    let set_headers = |key: &'static str, value: fn(&Value) -> Value| {
        move || {
            Fault::edited(move |calls, answers| {
                for (call, answer) in calls.iter().zip(answers) {
                    if call["method"] == "eth_getBlockByNumber" && call["params"][0] != "latest" {
                        let header = &mut answer["result"];
                        if header.is_object() {
                            header[key] = value(&header[key]);
                        }
                    }
                }
            })
        }
    };
    assert_all_relayed(vec![
        ("removed logs", always(move |_, logs| {
            each_log_also(|log| and(far(log), json!({ "removed": true })))(logs)
        })),
        ("each log twice", always(|_, logs| each_log_also(|_| json!({}))(logs))),
        ("logs of strangers", always(move |_, logs| {
            each_log_also(|log| and(far(log), json!({ "address": Address::repeat_byte(0xEE) })))(logs)
        })),
        ("logs with other topics", always(move |_, logs| {
            each_log_also(|log| and(far(log), json!({ "topics": [keccak256("Nothing()")] })))(logs)
        })),
        ("logs without topics", always(move |_, logs| each_log_also(|log| and(far(log), json!({ "topics": [] })))(logs))),
        ("logs in any order", always(|_, logs| logs.reverse())),
        ("logs of later blocks", often(move || with_logs(move |_, logs| {
            each_log_also(|log| and(far(log), json!({ "blockNumber": format!("{:#x}", BLOCKS + 5) })))(logs)
        }))),
        ("logs of earlier blocks", often(move || with_logs(move |_, logs| {
            each_log_also(|log| and(far(log), json!({ "blockNumber": "0x0" })))(logs)
        }))),
        ("logs of another fork", often(move || with_logs(move |_, logs| {
            each_log_also(|log| and(far(log), json!({ "blockHash": B256::repeat_byte(0xDD) })))(logs)
        }))),
        ("one index for all", often(|| with_logs(|_, logs| {
            logs.iter_mut().for_each(|log| log["logIndex"] = json!("0x0"));
            each_log_also(|_| json!({ "data": "0x01" }))(logs);
        }))),
        ("answers in any order", node(|_, _| Fault::edited(|_, answers| answers.reverse()))),
        ("half of the answers", often(|| Fault::edited(|_, answers| {
            let half = answers.len() / 2;
            answers.drain(..half);
        }))),
        ("no results", often(|| Fault::edited(|_, answers| {
            answers.iter_mut().for_each(|answer| drop(answer.as_object_mut().expect("an answer").remove("result")));
        }))),
        ("null for logs", often(|| Fault::edited(|calls, answers| {
            let logs = calls.iter().zip(answers).filter(|(call, _)| is_logs(call));
            logs.for_each(|(_, answer)| answer["result"] = Value::Null);
        }))),
        ("a text for logs", often(|| Fault::edited(|calls, answers| {
            let logs = calls.iter().zip(answers).filter(|(call, _)| is_logs(call));
            logs.for_each(|(_, answer)| answer["result"] = json!(""));
        }))),
        ("headers of the next height", often(set_headers("number", |value| {
            json!(format!("{:#x}", number(value).unwrap_or(0) + 1))
        }))),
        ("headers of another fork", often(set_headers("hash", |_| json!(B256::repeat_byte(0xDD))))),
        ("headers of other parents", often(set_headers("parentHash", |_| json!(B256::repeat_byte(0xDD))))),
        ("a depth of brackets", often(move || Fault::Body(brackets))),
        ("a result of brackets", often(move || Fault::Body(nested))),
        ("answers with other ids", often(|| Fault::edited(|_, answers| {
            answers.iter_mut().for_each(|answer| answer["id"] = json!(answer["id"].as_u64().unwrap_or(0) + 1000));
        }))),
    ])
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_too_large_to_be_read_is_asked_for_in_parts() {
    // 130 MB of nothing.
    let large: &'static str = Box::leak(" ".repeat(130 << 20).into_boxed_str());
    assert_all_relayed(vec![("a flood", refusing_whole(wide(30), Fault::Body(large)))]).await;
}
