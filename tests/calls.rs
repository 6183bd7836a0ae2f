//! What the relayer costs its RPC provider, counted between the two: the reason it exists.

mod common;

use std::collections::BTreeSet;

use alloy::primitives::{Address, B256};
use common::relay::proxy::{Call, Proxy, Request};
use common::relay::truth;
use common::{Contract, Running, World};
use serde_json::{Value, json};

const ESCROWS: u64 = 100;

/// A relayer that has read everything there is, with a hundred escrows registered, and a proxy that counts.
struct Counted {
    world: World,
    proxy: Proxy,
    escrows: Vec<Contract>,
    relayer: Running,
    confirmations: u64,
}

impl Counted {
    async fn new(confirmations: u64) -> Counted {
        let mut world = World::new().await;
        let escrows = world.factory.create_many(ESCROWS).await;
        world.chain.mine(confirmations).await;
        let proxy = Proxy::start(&world.anvil.url()).await;
        world.setup.set("RPC_URL", proxy.url());
        match confirmations {
            2 => world.setup.unset("RELAYER_CHAIN__CONFIRMATIONS"), // the default
            other => world.setup.set("RELAYER_CHAIN__CONFIRMATIONS", other),
        }
        let mut relayer = world.setup.start(&["run"]);
        relayer.wait_for_lines(ESCROWS as usize).await;
        Counted { world, proxy, escrows, relayer, confirmations }
    }

    /// Mines a block by `act`, waits until the relayer has read it and polls idly again, and returns what it asked:
    /// from the poll that saw the new head to the one before the next idle poll.
    async fn asked_for_a_block(&mut self, act: impl AsyncFnOnce(&World)) -> (u64, Vec<Request>) {
        let from = self.idle().await;
        let before = self.world.chain.block_number().await;
        act(&self.world).await;
        let head = self.world.chain.block_number().await;
        assert_eq!(head, before + 1, "one block");
        let read = head - self.confirmations;
        self.relayer.wait_logged(&format!("Processing blocks {read} to {read}")).await;
        let saw = |request: &Request| request.is_poll() && request.calls[0].block() == Some(head);
        let idle_again = |requests: &[Request]| requests.iter().filter(|request| saw(request)).count() >= 2;
        let requests = self.proxy.wait_until("poll after the block", from, idle_again).await;
        let first = requests.iter().position(saw).expect("a poll saw it");
        let next = first + 1 + requests[first + 1..].iter().position(Request::is_poll).expect("waited for");
        assert!(requests[..first].iter().all(Request::is_poll), "before the block: {requests:#?}");
        assert!(requests[next..].iter().all(Request::is_poll), "after the block: {requests:#?}");
        (read, requests[first..next].to_vec())
    }

    /// Waits for a poll from now on; the number of requests then.
    async fn idle(&self) -> usize {
        let from = self.proxy.requests().len();
        self.proxy.wait_until("idle poll", from, |requests| requests.iter().any(Request::is_poll)).await;
        self.proxy.requests().len()
    }

    fn watched(&self) -> BTreeSet<Address> {
        self.escrows.iter().chain([&self.world.factory]).map(|contract| contract.address).collect()
    }

    async fn hash(&self, block: u64) -> B256 {
        self.world.chain.block(block).await.hash
    }
}

/// The one `eth_getLogs` of a request: its block, addresses and topics.
#[track_caller]
fn logs_call(request: &Request) -> (Value, BTreeSet<Address>, BTreeSet<B256>) {
    let [Call { method, params, .. }] = &request.calls[..] else { panic!("not one call: {request:#?}") };
    assert_eq!(method, "eth_getLogs");
    let mut filter = params[0].as_object().expect("a filter").clone();
    let (address, topics) = (filter.remove("address"), filter.remove("topics"));
    let topics: Vec<Vec<B256>> = serde_json::from_value(topics.expect("topics")).expect("lists of topics");
    let addresses: Vec<Address> = serde_json::from_value(address.expect("addresses")).expect("a list");
    assert_eq!(topics.len(), 1, "only topic0 is asked for");
    let unique: BTreeSet<_> = addresses.iter().copied().collect();
    assert_eq!(unique.len(), addresses.len(), "each address once");
    (Value::Object(filter), unique, topics[0].iter().copied().collect())
}

async fn an_idle_poll_is_one_call(confirmations: u64) {
    let counted = Counted::new(confirmations).await;
    let from = counted.idle().await;
    let polls = counted.proxy.wait_until("10 requests", from, |requests| requests.len() >= 10).await;
    for poll in &polls {
        assert_eq!(poll.methods(), ["eth_getBlockByNumber"]);
        assert_eq!(poll.calls[0].params, json!(["latest", false]));
    }
}

async fn a_block_without_events_is_two_calls_in_two_requests(confirmations: u64) {
    let mut counted = Counted::new(confirmations).await;
    for _ in 0..4 {
        let (block, requests) = counted.asked_for_a_block(async |world| world.chain.mine(1).await).await;
        let methods: Vec<_> = requests.iter().map(Request::methods).collect();
        assert_eq!(methods, [["eth_getBlockByNumber"], ["eth_getLogs"]]);
        let (span, addresses, topics) = logs_call(&requests[1]);
        assert_eq!(span, json!({ "blockHash": counted.hash(block).await }));
        assert_eq!(addresses, counted.watched(), "the factory and all escrows");
        assert_eq!(topics, truth::topics().into_iter().collect());
    }
}

async fn an_announcement_costs_one_call_more_for_the_new_escrow_only(confirmations: u64) {
    let mut counted = Counted::new(confirmations).await;
    let mut escrow = None;
    let announced =
        counted.asked_for_a_block(async |world| escrow = Some(world.factory.create_escrow().await)).await;
    let escrow = escrow.expect("created");
    // With confirmations its block is read later, when these come.
    let (block, requests) = match confirmations {
        0 => announced,
        more => {
            let mut last = announced;
            for _ in 0..more {
                assert_eq!(last.1.len(), 2, "not yet its block");
                last = counted.asked_for_a_block(async |world| world.chain.mine(1).await).await;
            }
            last
        }
    };
    let methods: Vec<_> = requests.iter().map(Request::methods).collect();
    assert_eq!(methods, [["eth_getBlockByNumber"], ["eth_getLogs"], ["eth_getLogs"]]);
    assert_eq!(logs_call(&requests[1]).1, counted.watched());
    let (span, addresses, topics) = logs_call(&requests[2]);
    assert_eq!(span, json!({ "blockHash": counted.hash(block).await }));
    assert_eq!(addresses, BTreeSet::from([escrow.address]), "only the new escrow");
    assert_eq!(topics, truth::lifecycle_topics().into_iter().collect());

    // From then on it is one of them.
    counted.escrows.push(escrow);
    let (_, requests) = counted.asked_for_a_block(async |world| world.chain.mine(1).await).await;
    assert_eq!(logs_call(&requests[1]).1, counted.watched());
    counted.relayer.wait_for_lines(ESCROWS as usize + 1).await;
}

/// Each promise without confirmations, and with the default two.
macro_rules! with_and_without_confirmations {
    ($($name:ident)*) => {
        mod without_confirmations {
            $(#[tokio::test] async fn $name() { super::$name(0).await })*
        }
        mod with_the_default_confirmations {
            $(#[tokio::test] async fn $name() { super::$name(2).await })*
        }
    };
}

with_and_without_confirmations! {
    an_idle_poll_is_one_call
    a_block_without_events_is_two_calls_in_two_requests
    an_announcement_costs_one_call_more_for_the_new_escrow_only
}

#[tokio::test]
async fn an_event_of_an_escrow_costs_nothing_beyond_its_block() {
    let mut counted = Counted::new(0).await;
    let escrow = counted.escrows[42].clone();
    let (_, requests) = counted
        .asked_for_a_block(async |_| {
            escrow.send("emitAll", &[]).await;
        })
        .await;
    assert_eq!(requests.len(), 2);
    counted.relayer.wait_for_lines(ESCROWS as usize + 7).await;
}

fn is_sample(request: &Request) -> bool {
    let without_topics = |call: &Call| call.method == "eth_getLogs" && call.params[0].get("topics").is_none();
    request.calls.iter().any(without_topics)
}

#[tokio::test]
async fn two_thousand_final_blocks_of_a_hundred_escrows_are_one_request_for_logs() {
    let mut world = World::new().await;
    let escrows = world.factory.create_many(ESCROWS).await;
    world.setup.run_to_head().await;
    let from = world.chain.block_number().await + 1;
    escrows[7].send("approve", &[]).await;
    world.chain.mine(2100).await;

    let proxy = Proxy::start(&world.anvil.url()).await;
    world.setup.set("RPC_URL", proxy.url());
    let last = from + 1999;
    let lines = world.setup.run(&["run", "--until", &last.to_string()]).await.good().lines();
    assert_eq!(lines.len(), 1);
    // Beside, at the start, a sample without topics: of the first blocks and of the last ones read.
    let (samples, requests): (Vec<Request>, Vec<Request>) = proxy.requests().into_iter().partition(is_sample);
    assert!(samples.len() <= 2, "{samples:#?}");
    let asked: Vec<&Call> = requests
        .iter()
        .flat_map(|request| &request.calls)
        .filter(|call| call.method == "eth_getLogs")
        .collect();
    assert_eq!(asked.len(), 1, "{asked:#?}");
    assert_eq!(asked[0].params[0]["fromBlock"], format!("{from:#x}"));
    assert_eq!(asked[0].params[0]["toBlock"], format!("{last:#x}"));
    assert_eq!(asked[0].params[0]["address"].as_array().expect("a list").len() as u64, ESCROWS + 1);
    assert!(requests.len() <= 3, "{} requests: {requests:#?}", requests.len());
}
