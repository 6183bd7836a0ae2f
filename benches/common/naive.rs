//! The per-escrow way: three `eth_getLogs` an escrow and one for the factory, each a request of its own. It throws the
//! answers away and stores nothing, which favours it.

use alloy::primitives::{Address, B256};
use alloy::rpc::types::Log;
use futures_util::future::join_all;
use futures_util::stream::{self, StreamExt};
use serde::Deserialize;
use serde_json::json;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::events::{APPROVED, DEPLOYED, FACTORY, REFUNDED, RELEASED, escrow, topic};
use super::node::Recorded;

/// The requests of one poll.
pub fn requests(escrows: usize, from: u64, to: u64) -> Vec<Vec<u8>> {
    let ask = |address: Address, topic: B256| {
        json!({ "jsonrpc": "2.0", "id": 1, "method": "eth_getLogs", "params": [{
            "fromBlock": format!("{from:#x}"), "toBlock": format!("{to:#x}"),
            "address": address, "topics": [topic],
        }]})
        .to_string()
        .into_bytes()
    };
    let events = [APPROVED, RELEASED, REFUNDED].map(topic);
    let of_escrows = (0..escrows).flat_map(|number| events.map(|event| ask(escrow(number), event)));
    std::iter::once(ask(FACTORY, topic(DEPLOYED))).chain(of_escrows).collect()
}

/// One request for every log there is.
pub fn everything(from: u64, to: u64) -> Vec<u8> {
    json!({ "jsonrpc": "2.0", "id": 1, "method": "eth_getLogs", "params": [{
        "fromBlock": format!("{from:#x}"), "toBlock": format!("{to:#x}"),
    }]})
    .to_string()
    .into_bytes()
}

/// Sends it, and parses the answer into alloy's logs; how many.
pub async fn parse(http: &reqwest::Client, url: &str, request: &[u8]) -> usize {
    #[derive(Deserialize)]
    struct Answer {
        result: Vec<Log>,
    }
    let request = http.post(url).header("content-type", "application/json").body(request.to_vec());
    let answer = request.send().await.expect("the node answers").bytes().await.expect("to the end");
    let answer: Answer = serde_json::from_slice(&answer).expect("logs");
    answer.result.len()
}

/// Sends them, so many at once, and throws the answers away.
pub async fn fetch(http: &reqwest::Client, url: &str, requests: &[Vec<u8>], concurrent: usize) {
    let answers = stream::iter(requests).map(|request| async move {
        let request = http.post(url).header("content-type", "application/json").body(request.clone());
        let mut answer = request.send().await.expect("the node answers");
        while answer.chunk().await.expect("to the end").is_some() {}
    });
    answers.buffer_unordered(concurrent).collect::<()>().await;
}

/// Holds a conversation once more, so many requests at once, and throws the answers away. Each request waits for what was
/// answered before it the first time: what they ask for is known only then.
pub async fn hold_again(http: &reqwest::Client, url: &str, conversation: &[Recorded], concurrent: usize) {
    let answered: Vec<CancellationToken> = conversation.iter().map(|_| CancellationToken::new()).collect();
    let (answered, room) = (&answered, &Semaphore::new(concurrent));
    let requests = conversation.iter().enumerate().map(|(place, recorded)| async move {
        for earlier in &recorded.after {
            answered[*earlier].cancelled().await;
        }
        let _room = room.acquire().await.expect("nobody closes it");
        fetch(http, url, std::slice::from_ref(&recorded.body), 1).await;
        answered[place].cancel();
    });
    join_all(requests).await;
}
