//! A plain HTTP/1.1 forwarder between relayer and node that keeps what was asked and answered. Whatever the path and
//! the query, it asks the node at its root.

use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};

use super::PATIENCE;

/// Whether a request with these calls is refused.
type Refuse = Arc<dyn Fn(&[Call]) -> bool + Send + Sync>;

pub struct Proxy {
    port: u16,
    record: Arc<Record>,
    accepting: AbortHandle,
}

#[derive(Default)]
struct Record {
    requests: Mutex<Vec<Request>>,
    changed: watch::Sender<()>,
}

/// One HTTP request.
#[derive(Debug, Clone)]
pub struct Request {
    /// Path and query, as asked.
    pub path: String,
    pub calls: Vec<Call>,
}

/// One JSON-RPC call of it.
#[derive(Debug, Clone)]
pub struct Call {
    pub method: String,
    pub params: Value,
    /// `result`, or null.
    pub result: Value,
}

impl Request {
    /// The head asked for, alone: what an idle poll is.
    pub fn is_poll(&self) -> bool {
        let [call] = &self.calls[..] else { return false };
        call.method == "eth_getBlockByNumber" && call.params[0] == "latest"
    }

    pub fn methods(&self) -> Vec<&str> {
        self.calls.iter().map(|call| call.method.as_str()).collect()
    }
}

impl Call {
    /// The number of the block answered, for a header.
    pub fn block(&self) -> Option<u64> {
        let number = self.result["number"].as_str()?.strip_prefix("0x")?;
        u64::from_str_radix(number, 16).ok()
    }
}

impl Proxy {
    pub async fn start(node: &str) -> Proxy {
        Self::start_at(0, node).await
    }

    /// On a port of one's choice.
    pub async fn start_at(port: u16, node: &str) -> Proxy {
        Self::start_with(port, node, |_| false).await
    }

    /// Answers a request that `refuse` picks out with an error for each of its calls.
    pub async fn refusing(node: &str, refuse: impl Fn(&[Call]) -> bool + Send + Sync + 'static) -> Proxy {
        Self::start_with(0, node, refuse).await
    }

    async fn start_with(
        port: u16,
        node: &str,
        refuse: impl Fn(&[Call]) -> bool + Send + Sync + 'static,
    ) -> Proxy {
        let refuse: Refuse = Arc::new(refuse);
        let listener = TcpListener::bind(("127.0.0.1", port)).await.expect("the port is free");
        let port = listener.local_addr().expect("it has an address").port();
        let record = Arc::new(Record::default());
        let (node, http) = (node.to_owned(), reqwest::Client::new());
        let recorded = record.clone();
        let accepting = tokio::spawn(async move {
            let mut connections = JoinSet::new(); // they end with this task
            loop {
                let (stream, _) = listener.accept().await.expect("connections can be accepted");
                while connections.try_join_next().is_some() {}
                connections.spawn(serve(
                    stream,
                    http.clone(),
                    node.clone(),
                    recorded.clone(),
                    refuse.clone(),
                ));
            }
        });
        Proxy { port, record, accepting: accepting.abort_handle() }
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// All requests so far.
    pub fn requests(&self) -> Vec<Request> {
        self.record.requests.lock().expect("no panic while held").clone()
    }

    /// Waits until the requests from number `from` on are as wanted, and returns them.
    pub async fn wait_until(
        &self,
        wanted: &str,
        from: usize,
        is_so: impl Fn(&[Request]) -> bool,
    ) -> Vec<Request> {
        let mut changed = self.record.changed.subscribe();
        let wait = async {
            loop {
                let requests = self.requests().split_off(from);
                if is_so(&requests) {
                    return requests;
                }
                changed.changed().await.expect("kept by self");
            }
        };
        match tokio::time::timeout(PATIENCE, wait).await {
            Ok(requests) => requests,
            Err(_) => panic!("no {wanted} within {PATIENCE:?}: {:#?}", self.requests().split_off(from)),
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// One connection: request after request. An error ends it, as it would end a real one.
async fn serve(
    stream: TcpStream,
    http: reqwest::Client,
    node: String,
    record: Arc<Record>,
    refuse: Refuse,
) -> Option<()> {
    let mut stream = BufReader::new(stream);
    loop {
        let (path, body) = read_request(&mut stream).await?;
        let asked: Value = serde_json::from_slice(&body).ok()?;
        let request = http.post(&node).header("content-type", "application/json").body(body);
        let mut answer = request.send().await.ok()?.bytes().await.ok()?;
        if refuse(&calls(asked.clone(), &Value::Null)) {
            let error = json!({ "code": -32000, "message": "the test will not have it" });
            let refused = |call: Value| json!({ "jsonrpc": "2.0", "id": call["id"], "error": error });
            let refused = match asked.clone() {
                Value::Array(calls) => calls.into_iter().map(refused).collect(),
                call => refused(call),
            };
            answer = refused.to_string().into();
        }
        let answered: Value = serde_json::from_slice(&answer).ok()?;
        let calls = calls(asked, &answered);
        record.requests.lock().expect("no panic while held").push(Request { path, calls });
        record.changed.send_replace(());
        let head = format!(
            "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            answer.len()
        );
        stream.write_all(&[head.as_bytes(), &answer].concat()).await.ok()?;
    }
}

pub(super) async fn read_request(stream: &mut BufReader<TcpStream>) -> Option<(String, Vec<u8>)> {
    let mut lines = vec![];
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line).await.ok()? == 0 {
            return None;
        }
        match line.trim_end() {
            "" => break,
            line => lines.push(line.to_owned()),
        }
    }
    let path = lines.first()?.split(' ').nth(1)?.to_owned();
    let length = lines.iter().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse().ok())?
    })?;
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.ok()?;
    Some((path, body))
}

fn calls(asked: Value, answered: &Value) -> Vec<Call> {
    let call = |call: Value| {
        let result = many(answered.clone()).into_iter().find(|answer| answer["id"] == call["id"]);
        Call {
            method: call["method"].as_str().unwrap_or_default().to_owned(),
            params: call["params"].clone(),
            result: result.map_or(Value::Null, |answer| answer["result"].clone()),
        }
    };
    many(asked).into_iter().map(call).collect()
}

fn many(value: Value) -> Vec<Value> {
    match value {
        Value::Array(values) => values,
        value => vec![value],
    }
}
