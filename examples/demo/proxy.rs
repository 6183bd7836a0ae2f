//! A small HTTP proxy in front of a node: passes every request on as it is, and writes down what was asked. What the
//! demo says about requests is counted here and not by the relayer.

use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// A running proxy. It ends on drop.
pub struct Proxy {
    url: String,
    record: Record,
    accepting: JoinHandle<()>,
}

type Record = Arc<Mutex<Vec<Request>>>;

/// One HTTP request.
#[derive(Clone, Debug)]
pub struct Request {
    /// The JSON-RPC calls in it: several in a batch.
    pub calls: Vec<Call>,
}

/// One JSON-RPC call.
#[derive(Clone, Debug)]
pub struct Call {
    pub method: String,
    pub params: Value,
}

/// What something cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cost {
    pub calls: usize,
    pub requests: usize,
}

/// What the relayer asked from one look at the head to the next.
#[derive(Clone, Debug, Default)]
pub struct Poll {
    pub requests: Vec<Request>,
}

impl Proxy {
    /// In front of the node at `node`, on a free port.
    pub async fn start(node: String) -> Result<Proxy> {
        let listener = TcpListener::bind("127.0.0.1:0").await.context("no free port for the proxy")?;
        let url = format!("http://{}", listener.local_addr()?);
        let record = Record::default();
        let accepting = tokio::spawn(accept(listener, node, record.clone()));
        Ok(Proxy { url, record, accepting })
    }

    pub fn url(&self) -> &str {
        &self.url
    }

    /// How many requests came in so far: a mark for [`Proxy::since`].
    pub fn mark(&self) -> usize {
        self.record.lock().expect("no panic while held").len()
    }

    /// The requests since the mark, in the order they came in.
    pub fn since(&self, mark: usize) -> Vec<Request> {
        self.record.lock().expect("no panic while held")[mark..].to_vec()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl Call {
    /// The relayer's look at the head, with which each poll begins.
    fn looks_at_head(&self) -> bool {
        self.method == "eth_getBlockByNumber" && self.params[0] == "latest"
    }
}

impl Cost {
    pub fn of(requests: &[Request]) -> Cost {
        Cost { calls: requests.iter().map(|request| request.calls.len()).sum(), requests: requests.len() }
    }
}

impl Poll {
    /// The polls these requests belong to. What comes before the first look at the head is left out.
    pub fn all(requests: Vec<Request>) -> Vec<Poll> {
        let mut polls: Vec<Poll> = vec![];
        for request in requests {
            if request.calls.iter().any(Call::looks_at_head) {
                polls.push(Poll::default());
            }
            if let Some(poll) = polls.last_mut() {
                poll.requests.push(request);
            }
        }
        polls
    }

    pub fn cost(&self) -> Cost {
        Cost::of(&self.requests)
    }

    /// Whether it asked for nothing but the head.
    pub fn is_idle(&self) -> bool {
        self.cost().calls == 1
    }
}

async fn accept(listener: TcpListener, node: String, record: Record) {
    let client = reqwest::Client::new();
    while let Ok((connection, _)) = listener.accept().await {
        let (client, node, record) = (client.clone(), node.clone(), record.clone());
        // A connection that breaks is the relayer's to notice, as with any node.
        tokio::spawn(async move { serve(connection, client, node, record).await.ok() });
    }
}

/// Requests on one connection, one after another, until it is closed.
async fn serve(connection: TcpStream, client: reqwest::Client, node: String, record: Record) -> Result<()> {
    connection.set_nodelay(true)?;
    let mut connection = BufReader::new(connection);
    while let Some(body) = read_request(&mut connection).await? {
        record.lock().expect("no panic while held").push(parse(&body)?);
        let request = client.post(&node).header("content-type", "application/json").body(body);
        let answer = request.send().await?;
        let status = answer.status();
        let body = answer.bytes().await?;
        let head = format!(
            "HTTP/1.1 {} {}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            status.as_u16(),
            status.canonical_reason().unwrap_or_default(),
            body.len()
        );
        connection.write_all(&[head.as_bytes(), &body].concat()).await?;
    }
    Ok(())
}

/// The next request's body; none at the end of the connection. Only its length is of interest in the head.
async fn read_request(connection: &mut BufReader<TcpStream>) -> Result<Option<Vec<u8>>> {
    let mut length = None;
    let mut line = String::new();
    loop {
        line.clear();
        if connection.read_line(&mut line).await? == 0 {
            return Ok(None);
        }
        match line.trim_end().split_once(':') {
            Some((name, value)) if name.eq_ignore_ascii_case("content-length") => {
                length = Some(value.trim().parse().context("content-length is no number")?);
            }
            None if line.trim_end().is_empty() => break,
            _ => {}
        }
    }
    let Some(length) = length else { bail!("a request without content-length") };
    let mut body = vec![0; length];
    connection.read_exact(&mut body).await?;
    Ok(Some(body))
}

fn parse(body: &[u8]) -> Result<Request> {
    let call = |call: Value| Call {
        method: call["method"].as_str().unwrap_or_default().to_owned(),
        params: call["params"].clone(),
    };
    let calls = match serde_json::from_slice(body).context("a request that is not JSON")? {
        Value::Array(batch) => batch.into_iter().map(call).collect(),
        single => vec![call(single)],
    };
    Ok(Request { calls })
}
