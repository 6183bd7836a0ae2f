mod decoding;

use std::collections::BTreeMap;
use std::num::{NonZeroU64, NonZeroUsize};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};

use super::*;
use crate::scan::BlockTag;

/// What a node does with one HTTP request: status, headers and body.
type Node = dyn Fn(usize, &Value) -> (u16, &'static str, String) + Send + Sync;

/// An HTTP server that answers request by request as told; records the requests.
struct Server {
    url: SecretUrl,
    requests: Arc<Mutex<Vec<Value>>>,
}

impl Server {
    async fn start(
        node: impl Fn(usize, &Value) -> (u16, &'static str, String) + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/v2/SECRET", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (node, seen): (Arc<Node>, _) = (Arc::new(node), Arc::clone(&requests));
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                tokio::spawn(serve(stream, Arc::clone(&node), Arc::clone(&seen)));
            }
        });
        Self { url: SecretUrl::new(url.parse().unwrap()), requests }
    }

    /// How many calls each request had.
    fn calls(&self) -> Vec<usize> {
        let requests = self.requests.lock().unwrap();
        requests.iter().map(|request| request.as_array().map_or(1, Vec::len)).collect()
    }
}

async fn serve(stream: TcpStream, node: Arc<Node>, seen: Arc<Mutex<Vec<Value>>>) -> std::io::Result<()> {
    let mut stream = BufReader::new(stream);
    loop {
        let mut length = 0;
        loop {
            let mut line = String::new();
            if stream.read_line(&mut line).await? == 0 {
                return Ok(());
            }
            let line = line.trim().to_ascii_lowercase();
            if let Some(value) = line.strip_prefix("content-length:") {
                length = value.trim().parse().unwrap();
            }
            if line.is_empty() {
                break;
            }
        }
        let mut body = vec![0; length];
        stream.read_exact(&mut body).await?;
        let request: Value = serde_json::from_slice(&body).unwrap();
        let number = {
            let mut seen = seen.lock().unwrap();
            seen.push(request.clone());
            seen.len() - 1
        };
        let (status, headers, body) = node(number, &request);
        let length = body.len();
        let response = format!("HTTP/1.1 {status} X\r\n{headers}Content-Length: {length}\r\n\r\n{body}");
        stream.get_mut().write_all(response.as_bytes()).await?;
    }
}

fn hash(number: u64) -> String {
    format!("0x{number:064x}")
}

/// The honest answer to one call.
fn honest(call: &Value) -> Value {
    let result = match call["method"].as_str().unwrap() {
        "eth_chainId" => json!("0x1"),
        "eth_getBlockByNumber" => {
            let number = call["params"][0].as_str().unwrap();
            let number =
                number.strip_prefix("0x").map_or(99, |digits| u64::from_str_radix(digits, 16).unwrap());
            json!({"number": format!("{number:#x}"), "hash": hash(number), "parentHash": hash(number.wrapping_sub(1)),
                "timestamp": "0x5"})
        }
        "eth_getCode" => json!("0x00"),
        _ => json!([]),
    };
    json!({"jsonrpc": "2.0", "id": call["id"], "result": result})
}

fn all(request: &Value) -> Vec<Value> {
    request.as_array().map_or_else(|| vec![honest(request)], |calls| calls.iter().map(honest).collect())
}

fn ok(request: &Value) -> (u16, &'static str, String) {
    saying(request, &all(request))
}

/// These answers, in a list if there was one of calls.
fn saying(request: &Value, answers: &[Value]) -> (u16, &'static str, String) {
    (200, "", if request.is_array() { json!(answers).to_string() } else { answers[0].to_string() })
}

fn rpc(servers: &[&Server], max_batch: usize) -> Rpc {
    let config = config::Rpc {
        urls: servers.iter().map(|server| server.url.clone()).collect(),
        requests_per_second: NonZeroU32::new(10_000).unwrap(),
        burst: NonZeroU32::new(7).unwrap(),
        max_concurrent: NonZeroUsize::new(4).unwrap(),
        max_range: NonZeroU64::new(2000).unwrap(),
        max_addresses: NonZeroUsize::new(1000).unwrap(),
        filter: config::Filter::Auto,
        max_batch: NonZeroUsize::new(max_batch).unwrap(),
        timeout: Duration::from_secs(5),
        refusals: vec![],
    };
    Rpc::new(1, &config).unwrap()
}

fn headers(count: u64) -> Vec<Call> {
    (1..=count).map(|number| Call::Header(BlockTag::Number(number))).collect()
}

fn numbers(answers: Vec<Answer>) -> Vec<u64> {
    answers.into_iter().map(|answer| answer.header().unwrap().block.number).collect()
}

#[tokio::test]
async fn the_chain_id_rides_with_the_first_calls_and_one_call_then_travels_alone() {
    let server = Server::start(|_, request| ok(request)).await;
    let rpc = rpc(&[&server], 100);
    for _ in 0..2 {
        assert_eq!(numbers(rpc.ask(headers(1)).await.unwrap()), [1]);
    }
    let requests = server.requests.lock().unwrap();
    assert_eq!(requests[0][1]["method"], "eth_chainId");
    assert!(requests[0].is_array() && requests[1].is_object());
}

#[tokio::test]
async fn more_calls_than_the_burst_and_the_batch_take_are_all_answered_in_their_order() {
    let server = Server::start(|_, request| ok(request)).await;
    let rpc = rpc(&[&server], 10);
    assert_eq!(numbers(rpc.ask(headers(35)).await.unwrap()), (1..=35).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_batch_answered_in_another_order_is_matched_by_id_and_only_what_is_missing_is_asked_again() {
    let server = Server::start(|number, request| {
        let mut answers = all(request);
        answers.reverse();
        if number == 1 {
            answers.truncate(2);
        }
        saying(request, &answers)
    })
    .await;
    let rpc = rpc(&[&server], 100);
    rpc.ask(headers(1)).await.unwrap();
    assert_eq!(numbers(rpc.ask(headers(5)).await.unwrap()), [1, 2, 3, 4, 5]);
    assert_eq!(server.calls(), [2, 5, 3]);
}

#[tokio::test]
async fn one_result_of_no_known_shape_is_asked_for_again_and_the_others_are_taken() {
    for odd in [json!(true), json!([1]), json!({"number": "0x3"})] {
        let server = Server::start(move |number, request| {
            let mut answers = all(request);
            if number == 1 {
                answers[2]["result"] = odd.clone();
            }
            saying(request, &answers)
        })
        .await;
        let rpc = rpc(&[&server], 100);
        rpc.ask(headers(1)).await.unwrap();
        assert_eq!(numbers(rpc.ask(headers(5)).await.unwrap()), [1, 2, 3, 4, 5]);
        assert_eq!(server.calls(), [2, 5, 1]);
    }
}

#[tokio::test]
async fn faults_are_waited_out_without_shrinking_anything() {
    let error = |code: i64, message: &str| json!({"jsonrpc": "2.0", "id": 1, "error": {"code": code, "message": message}});
    let table: Vec<(&str, (u16, &'static str, String))> = vec![
        (
            "rate limit",
            (429, "Retry-After: 0\r\n", error(429, "exceeded its compute units per second").to_string()),
        ),
        ("rate limit in a 200", (200, "", error(-32016, "over rate limit").to_string())),
        ("html", (502, "", "<html>Bad gateway</html>".into())),
        ("empty", (200, "", String::new())),
        ("truncated", (200, "", r#"{"jsonrpc":"2.0","id":1,"resu"#.into())),
        ("not what was asked", (200, "", r#"{"jsonrpc":"2.0","id":1,"result":"0x1"}"#.into())),
        ("unavailable", (503, "", "no backend is currently healthy to serve traffic".into())),
    ];
    for (name, fault) in table {
        let server =
            Server::start(move |number, request| if number == 1 { fault.clone() } else { ok(request) }).await;
        let rpc = rpc(&[&server], 100);
        rpc.ask(headers(1)).await.unwrap();
        assert_eq!(numbers(rpc.ask(headers(1)).await.unwrap()), [1], "{name}");
        assert_eq!(server.calls(), [2, 1, 1], "{name}");
    }
}

#[tokio::test]
async fn a_refused_batch_becomes_smaller_ones() {
    let server = Server::start(|_, request| match request.as_array() {
        Some(calls) if calls.len() > 3 => {
            let error = json!({"jsonrpc": "2.0", "id": null, "error": {"code": -32600, "message": "batch too large"}});
            (200, "", error.to_string())
        }
        _ => ok(request),
    })
    .await;
    let rpc = rpc(&[&server], 100);
    rpc.ask(headers(1)).await.unwrap();
    assert_eq!(numbers(rpc.ask(headers(7)).await.unwrap()), [1, 2, 3, 4, 5, 6, 7]);
    assert!(server.calls()[2..].iter().all(|calls| *calls <= 3));
}

#[tokio::test]
async fn what_changes_the_plan_is_passed_on_with_what_the_provider_said() {
    let server = Server::start(|number, request| {
        if number == 0 {
            return ok(request);
        }
        let error = json!({"code": -32602, "message": "exceed maximum block range: 50"});
        (200, "", json!({"jsonrpc": "2.0", "id": 1, "error": error}).to_string())
    })
    .await;
    let rpc = rpc(&[&server], 100);
    rpc.ask(headers(1)).await.unwrap();
    let span = crate::scan::Span::Range(BlockRange::new(1, 2000).unwrap());
    let filter =
        crate::scan::LogFilter { span, addresses: crate::event::Addresses::any(), topics: Arc::from([]) };
    let refused = rpc.ask(vec![Call::Logs(filter)]).await.unwrap_err();
    assert_eq!(refused, Refused::Cap(NonZeroU64::new(50).unwrap()));
}

#[tokio::test]
async fn a_provider_of_another_chain_ends_the_run_unless_there_is_another() {
    let other = |_: usize, request: &Value| {
        let mut answers = all(request);
        for (answer, call) in answers.iter_mut().zip(request.as_array().unwrap()) {
            if call["method"] == "eth_chainId" {
                answer["result"] = json!("0x5");
            }
        }
        (200, "", json!(answers).to_string())
    };
    let wrong = Server::start(other).await;
    let expected = Refused::WrongChain { expected: 1, found: 5 };
    assert_eq!(rpc(&[&wrong], 100).ask(headers(1)).await.unwrap_err(), expected);
    assert_eq!(rpc(&[&wrong, &wrong], 100).ask(headers(1)).await.unwrap_err(), expected);
    let right = Server::start(|_, request| ok(request)).await;
    assert_eq!(numbers(rpc(&[&wrong, &right], 100).ask(headers(1)).await.unwrap()), [1]);
}

#[tokio::test]
async fn a_dead_provider_is_failed_over_and_no_text_holds_the_url() {
    let dead = Server {
        url: SecretUrl::new("http://127.0.0.1:1/v2/SECRET".parse().unwrap()),
        requests: Arc::default(),
    };
    let alive = Server::start(|_, request| ok(request)).await;
    assert_eq!(numbers(rpc(&[&dead, &alive], 100).ask(headers(2)).await.unwrap()), [1, 2]);
    let outcomes = rpc(&[&dead], 100).try_once(0, &headers(1)).await.unwrap();
    let Err(refusing) = &outcomes[0] else { panic!("answered") };
    assert_eq!(refusing.verdict, Verdict::Fault);
    assert!(
        !refusing.message.contains("SECRET") && refusing.message.contains("connection failed"),
        "{refusing:?}"
    );
}

#[tokio::test]
async fn a_provider_that_was_down_is_asked_again_after_it_answered_a_look_and_its_chain_is_checked_then() {
    let down = Arc::new(AtomicBool::new(true));
    let is_down = Arc::clone(&down);
    let first = Server::start(move |_, request| match is_down.load(Ordering::Relaxed) {
        true => (503, "", String::new()),
        false => ok(request),
    })
    .await;
    let second = Server::start(|_, request| ok(request)).await;
    let rpc = rpc(&[&first, &second], 100);
    rpc.ask(headers(1)).await.unwrap();
    rpc.ask(headers(1)).await.unwrap();
    assert_eq!((rpc.provider_in_use(), first.calls().len()), (1, 1), "one attempt at what is down");
    down.store(false, Ordering::Relaxed);
    assert_eq!(rpc.look_at(0).await, Some((0, 99)));
    assert_eq!(first.calls().last(), Some(&2), "the head and the chain id");
    rpc.ask(headers(1)).await.unwrap();
    assert_eq!(rpc.provider_in_use(), 0);
}

#[tokio::test]
async fn a_provider_without_the_history_is_passed_over_where_another_has_it() {
    let pruned = |_: usize, request: &Value| {
        let mut answers = all(request);
        for answer in &mut answers {
            let error = json!({"code": 4444, "message": "pruned history unavailable"});
            *answer = json!({"jsonrpc": "2.0", "id": answer["id"], "error": error});
        }
        (200, "", json!(answers).to_string())
    };
    let table = [("pruned first", false), ("pruned everywhere", true)];
    for (name, everywhere) in table {
        let first = Server::start(pruned).await;
        first.requests.lock().unwrap().clear();
        let whole = Server::start(|_, request| ok(request)).await;
        let second = if everywhere { Server::start(pruned).await } else { whole };
        let rpc = rpc(&[&first, &second], 100);
        // Its chain is known already: only then is what it says of the history heard.
        rpc.providers.iter().for_each(|provider| provider.verified.store(true, Ordering::Relaxed));
        let answered = rpc.ask(vec![range_logs(9)]).await;
        assert_eq!(answered.is_err(), everywhere, "{name}: {answered:?}");
        assert_eq!((first.calls().len(), second.calls().len()), (1, 1), "{name}: {answered:?}");
    }
}

#[tokio::test]
async fn in_an_outage_one_attempt_is_made_at_a_time_however_many_ask() {
    let server = Server::start(|number, request| match number {
        // The chain id, and the first header.
        0 | 1 => ok(request),
        _ => (503, "", String::new()),
    })
    .await;
    let rpc = Arc::new(rpc(&[&server], 1));
    rpc.ask(headers(1)).await.unwrap();
    let began = Instant::now();
    let asking = Arc::clone(&rpc);
    let asking = tokio::spawn(async move { asking.ask(headers(8)).await.unwrap() });
    tokio::time::sleep(Duration::from_millis(1500)).await;
    // All eight may meet the outage as it begins; then about one for each of 0.2, 0.4, 0.8 s.
    let attempts = server.requests.lock().unwrap().len() - 1;
    assert!((1..=12).contains(&attempts), "{attempts} attempts in {:?}", began.elapsed());
    asking.abort();
}

fn range_logs(to: u64) -> Call {
    let span = crate::scan::Span::Range(BlockRange::new(1, to).unwrap());
    Call::Logs(crate::scan::LogFilter {
        span,
        addresses: crate::event::Addresses::any(),
        topics: Arc::from([]),
    })
}

#[tokio::test]
async fn logs_by_range_never_travel_without_the_header_of_their_last_block() {
    let server = Server::start(|number, request| {
        if number == 0 {
            return ok(request);
        }
        let mut answers = all(request);
        for (answer, call) in answers.iter_mut().zip(request.as_array().unwrap()) {
            if call["params"][0] == "0x7" {
                answer["result"] = Value::Null;
            }
        }
        (200, "", json!(answers).to_string())
    })
    .await;
    let rpc = rpc(&[&server], 100);
    rpc.ask(headers(1)).await.unwrap();
    let behind = rpc.ask(vec![range_logs(7)]).await.unwrap_err();
    assert!(matches!(behind, Refused::Behind(_)), "{behind:?}");
    assert!(matches!(&rpc.ask(vec![range_logs(6)]).await.unwrap()[..], [Answer::Logs(_)]));
    rpc.ask(vec![Call::Header(BlockTag::Number(5)), range_logs(5)]).await.unwrap();
    assert_eq!(server.calls(), [2, 2, 2, 2]);
}

#[tokio::test]
async fn a_provider_that_takes_no_batches_is_asked_one_by_one() {
    let server = Server::start(|_, request| {
        if !request.is_array() {
            return ok(request);
        }
        let error = json!({"code": -32600, "message": "Batched requests are not supported by this server"});
        (200, "", json!({"jsonrpc": "2.0", "id": null, "error": error}).to_string())
    })
    .await;
    let rpc = rpc(&[&server], 100);
    assert_eq!(numbers(rpc.ask(headers(3)).await.unwrap()), [1, 2, 3]);
}

#[tokio::test]
async fn a_provider_that_never_manages_a_range_is_asked_for_less() {
    let server = Server::start(|number, request| match number {
        0 => ok(request),
        _ => (200, "", r#"{"jsonrpc":"2.0","id":2,"result":[{"addre"#.into()),
    })
    .await;
    let rpc = rpc(&[&server], 100);
    rpc.ask(headers(1)).await.unwrap();
    let slow = rpc.ask(vec![range_logs(2000)]).await.unwrap_err();
    assert!(matches!(slow, Refused::Slow(_)), "{slow:?}");
}

#[tokio::test]
async fn no_two_requests_share_an_id() {
    let server = Server::start(|_, request| ok(request)).await;
    let rpc = rpc(&[&server], 3);
    rpc.ask(headers(20)).await.unwrap();
    let requests = server.requests.lock().unwrap();
    let ids: Vec<u64> =
        requests.iter().flat_map(|it| it.as_array().unwrap()).map(|it| it["id"].as_u64().unwrap()).collect();
    assert_eq!(ids.len(), ids.iter().collect::<std::collections::HashSet<_>>().len());
}

#[tokio::test]
async fn every_kind_of_call_has_its_method() {
    let server = Server::start(|_, request| ok(request)).await;
    let rpc = rpc(&[&server], 100);
    let filter = crate::scan::LogFilter {
        span: crate::scan::Span::Block(Default::default()),
        addresses: crate::event::Addresses::any(),
        topics: Arc::from([]),
    };
    let calls = vec![Call::Header(BlockTag::Latest), Call::Code(Default::default()), Call::Logs(filter)];
    let answers = rpc.ask(calls).await.unwrap();
    assert!(
        matches!(&answers[..], [Answer::Header(Some(_)), Answer::Code(true), Answer::Logs(logs)] if logs.is_empty())
    );
    let requests = server.requests.lock().unwrap();
    let mut methods: BTreeMap<String, usize> = BTreeMap::new();
    for call in requests[0].as_array().unwrap() {
        *methods.entry(call["method"].as_str().unwrap().to_owned()).or_default() += 1;
    }
    assert_eq!(
        methods.into_keys().collect::<Vec<_>>(),
        ["eth_chainId", "eth_getBlockByNumber", "eth_getCode", "eth_getLogs"]
    );
}
