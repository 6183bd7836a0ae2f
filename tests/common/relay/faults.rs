//! Between relayer and node: an HTTP server that fails, refuses and lies, request by request as told.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicUsize, Ordering},
};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, JoinSet};

use super::super::fakechain::FakeChain;
use super::proxy::read_request;

/// What to do with a request.
#[derive(Debug, Clone)]
pub enum Fault {
    /// The node answers.
    Pass,
    /// This status with this body, and this header if it is not empty.
    Status(u16, &'static str, &'static str),
    /// No answer, ever.
    Hang,
    /// The connection ends without an answer.
    Reset,
    /// The first half of the answer, and the end.
    Truncated,
    /// 200, and a body that is no answer.
    Body(&'static str),
    /// An error for each call.
    Errors(i64, &'static str),
    /// One error for the whole request.
    OneError(i64, &'static str),
    /// The node answers, and this is made of it, with this status.
    Edited(u16, Edit),
    /// A node so many blocks behind answers, which does not say so.
    Behind(u64),
    /// Such a node answers every second call, another the rest.
    SomeBehind(u64),
}

/// Makes of the answers to these calls what is sent.
#[derive(Clone)]
pub struct Edit(Arc<EditAnswers>);

type EditAnswers = dyn Fn(&[Value], &mut Vec<Value>) + Send + Sync;

impl std::fmt::Debug for Edit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Edit")
    }
}

impl Fault {
    /// The node answers, and `edit` makes something else of it: by the calls asked, the answers to them.
    pub fn edited(edit: impl Fn(&[Value], &mut Vec<Value>) + Send + Sync + 'static) -> Fault {
        Fault::Edited(200, Edit(Arc::new(edit)))
    }
}

/// Who answers behind the server.
enum Node {
    Url(String, reqwest::Client),
    Fake(Arc<FakeChain>),
    /// The answer to each call, as text.
    Text(Box<TextNode>),
}

type TextNode = dyn Fn(&Value) -> String + Send + Sync;

type Decide = dyn Fn(usize, &[Value]) -> Fault + Send + Sync;

/// The server. It ends on drop.
pub struct Faults {
    port: u16,
    shared: Arc<Shared>,
    accepting: AbortHandle,
}

struct Shared {
    node: Node,
    decide: Mutex<Arc<Decide>>,
    requests: AtomicUsize,
}

impl Faults {
    /// Passes everything on until told otherwise.
    pub async fn start(node: &str) -> Faults {
        Self::before(Node::Url(node.to_owned(), reqwest::Client::new())).await
    }

    /// The same before a chain in memory.
    pub async fn fake(chain: Arc<FakeChain>) -> Faults {
        Self::before(Node::Fake(chain)).await
    }

    /// Before a node that is a function: the result for a call, as JSON text. For answers too large to build as values.
    pub async fn answering(result: impl Fn(&Value) -> String + Send + Sync + 'static) -> Faults {
        Self::before(Node::Text(Box::new(result))).await
    }

    async fn before(node: Node) -> Faults {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("there is a free port");
        let port = listener.local_addr().expect("it has an address").port();
        let shared = Arc::new(Shared {
            node,
            decide: Mutex::new(Arc::new(|_, _: &[Value]| Fault::Pass)),
            requests: AtomicUsize::new(0),
        });
        let serving = Arc::clone(&shared);
        let accepting = tokio::spawn(async move {
            let mut connections = JoinSet::new(); // they end with this task
            loop {
                let (stream, _) = listener.accept().await.expect("connections can be accepted");
                while connections.try_join_next().is_some() {}
                connections.spawn(serve(stream, Arc::clone(&serving)));
            }
        });
        Faults { port, shared, accepting: accepting.abort_handle() }
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// From now on: what to do with a request, by its number and its calls.
    pub fn on_request(&self, decide: impl Fn(usize, &[Value]) -> Fault + Send + Sync + 'static) {
        *self.shared.decide.lock().expect("no panic while held") = Arc::new(decide);
    }

    /// From now on everything is passed on.
    pub fn heal(&self) {
        self.on_request(|_, _| Fault::Pass);
    }

    /// How many requests there were.
    pub fn requests(&self) -> usize {
        self.shared.requests.load(Ordering::Relaxed)
    }
}

impl Drop for Faults {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// One connection: request after request.
async fn serve(stream: TcpStream, shared: Arc<Shared>) -> Option<()> {
    let mut stream = BufReader::new(stream);
    loop {
        let (_, body) = read_request(&mut stream).await?;
        let asked: Value = serde_json::from_slice(&body).ok()?;
        let calls = match &asked {
            Value::Array(calls) => calls.clone(),
            call => vec![call.clone()],
        };
        let number = shared.requests.fetch_add(1, Ordering::Relaxed);
        let decide = Arc::clone(&shared.decide.lock().expect("no panic while held"));
        let (mut status, mut header, mut cut) = (200, "", false);
        let answer = match decide(number, &calls) {
            Fault::Pass => shared.text(&asked).await?,
            Fault::Edited(code, edit) => {
                status = code;
                shared.edited(&asked, &calls, &edit).await?
            }
            Fault::Behind(blocks) => shared.ask_one_behind(&asked, calls, blocks, 1).await?.to_string(),
            Fault::SomeBehind(blocks) => shared.ask_one_behind(&asked, calls, blocks, 2).await?.to_string(),
            Fault::Truncated => {
                cut = true;
                shared.ask(&asked).await?.to_string()
            }
            Fault::Reset => return None,
            Fault::Hang => {
                tokio::time::sleep(Duration::from_secs(3600)).await;
                return None;
            }
            Fault::Status(code, with, body) => {
                (status, header) = (code, with);
                body.to_owned()
            }
            Fault::Body(body) => body.to_owned(),
            Fault::OneError(code, message) => {
                json!({ "jsonrpc": "2.0", "id": null, "error": { "code": code, "message": message } })
                    .to_string()
            }
            Fault::Errors(code, message) => {
                let error = json!({ "code": code, "message": message });
                let refused = |call: &Value| json!({ "jsonrpc": "2.0", "id": call["id"], "error": error });
                like(&asked, calls.iter().map(refused).collect()).to_string()
            }
        };
        let header = if header.is_empty() { String::new() } else { format!("{header}\r\n") };
        let head = format!(
            "HTTP/1.1 {status} X\r\ncontent-type: application/json\r\n{header}content-length: {}\r\n\r\n",
            answer.len()
        );
        let sent = if cut { &answer.as_bytes()[..answer.len() / 2] } else { answer.as_bytes() };
        stream.write_all(&[head.as_bytes(), sent].concat()).await.ok()?;
        if cut {
            return None;
        }
    }
}

impl Shared {
    async fn text(&self, asked: &Value) -> Option<String> {
        match &self.node {
            Node::Text(result) => Some(answer_in_text(result, asked)),
            Node::Url(..) | Node::Fake(_) => Some(self.ask(asked).await?.to_string()),
        }
    }

    async fn edited(&self, asked: &Value, calls: &[Value], edit: &Edit) -> Option<String> {
        let mut answers = match self.ask(asked).await? {
            Value::Array(answers) => answers,
            answer => vec![answer],
        };
        (edit.0)(calls, &mut answers);
        Some(if asked.is_array() { Value::Array(answers) } else { answers.pop()? }.to_string())
    }

    async fn ask(&self, asked: &Value) -> Option<Value> {
        let (url, http) = match &self.node {
            Node::Url(url, http) => (url, http),
            Node::Fake(chain) => return Some(chain.answer(asked)),
            Node::Text(result) => return serde_json::from_str(&answer_in_text(result, asked)).ok(),
        };
        let request = http.post(url).header("content-type", "application/json");
        let answer = request.body(asked.to_string()).send().await.ok()?.bytes().await.ok()?;
        serde_json::from_slice(&answer).ok()
    }

    async fn result(&self, method: &str, params: Value) -> Option<Value> {
        let asked = json!({ "jsonrpc": "2.0", "id": 1, "method": method, "params": params });
        Some(self.ask(&asked).await?["result"].take())
    }

    /// Each `nth` call is answered by the node that is behind.
    async fn ask_one_behind(
        &self,
        asked: &Value,
        calls: Vec<Value>,
        blocks: u64,
        nth: usize,
    ) -> Option<Value> {
        let head = number(&self.result("eth_blockNumber", json!([])).await?)?.saturating_sub(blocks);
        let mut answers = vec![];
        for (place, mut call) in calls.into_iter().enumerate() {
            let id = call["id"].clone();
            let as_of = if place % nth == 0 { self.as_of(&mut call, head).await? } else { None };
            let instead = match as_of {
                Some(instead) => instead,
                None => {
                    let mut answer = self.ask(&call).await?;
                    let result = answer["result"].take();
                    if answer["error"].is_null() { Ok(result) } else { Err(answer["error"].take()) }
                }
            };
            answers.push(match instead {
                Ok(result) => json!({ "jsonrpc": "2.0", "id": id, "result": result }),
                Err(error) => json!({ "jsonrpc": "2.0", "id": id, "error": error }),
            });
        }
        Some(like(asked, answers))
    }

    /// Changes the call to what a node whose head is `head` would make of it, or says what it would answer.
    async fn as_of(&self, call: &mut Value, head: u64) -> Option<Option<Result<Value, Value>>> {
        let hex = |number: u64| json!(format!("{number:#x}"));
        match call["method"].as_str()? {
            "eth_blockNumber" => return Some(Some(Ok(hex(head)))),
            "eth_getBlockByNumber" => match number(&call["params"][0]) {
                Some(number) if number > head => return Some(Some(Ok(Value::Null))),
                None if call["params"][0] == "latest" => call["params"][0] = hex(head),
                Some(_) | None => {}
            },
            "eth_getLogs" => {
                let filter = &mut call["params"][0];
                if let Some(hash) = filter.get("blockHash").cloned() {
                    let block = self.result("eth_getBlockByHash", json!([hash, false])).await?;
                    if number(&block["number"]).is_none_or(|number| number > head) {
                        let error = json!({ "code": -32000, "message": "unknown block" });
                        return Some(Some(Err(error)));
                    }
                } else if number(&filter["fromBlock"])? > head {
                    return Some(Some(Ok(json!([]))));
                } else if number(&filter["toBlock"])? > head {
                    filter["toBlock"] = hex(head);
                }
            }
            _ => {}
        }
        Some(None)
    }
}

fn answer_in_text(result: &TextNode, asked: &Value) -> String {
    let one =
        |call: &Value| format!("{{\"jsonrpc\":\"2.0\",\"id\":{},\"result\":{}}}", call["id"], result(call));
    match asked {
        Value::Array(calls) => format!("[{}]", calls.iter().map(one).collect::<Vec<_>>().join(",")),
        call => one(call),
    }
}

/// In the form of the request: one answer, or many.
fn like(asked: &Value, mut answers: Vec<Value>) -> Value {
    if asked.is_array() { Value::Array(answers) } else { answers.remove(0) }
}

fn number(quantity: &Value) -> Option<u64> {
    u64::from_str_radix(quantity.as_str()?.strip_prefix("0x")?, 16).ok()
}
