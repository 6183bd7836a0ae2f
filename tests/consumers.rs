//! What the consumers that exist read, field by field, from messages taken off the wire as theirs come: through a
//! subscription. They are not here to be asked; these are the facts about them.

mod common;

use std::collections::BTreeMap;

use common::pubsub::Subscription;
use common::{Contract, PubSub, World};
use googleapis_tonic_google_pubsub_v1::google::pubsub::v1::subscriber_client::SubscriberClient;
use googleapis_tonic_google_pubsub_v1::google::pubsub::v1::{AcknowledgeRequest, PullRequest};
use serde_json::{Value, json};

const TOPIC: &str = "projects/test-project/topics/settlement.events.v1";
const THEIRS: &str = "projects/test-project/subscriptions/settlement-events-ordered";

/// A message as it is delivered.
struct Delivered {
    ordering_key: String,
    attributes: BTreeMap<String, String>,
    text: String,
    body: Value,
}

impl Delivered {
    /// They route on the one, or else on the other.
    fn name(&self) -> &str {
        let name = self.attributes.get("event_type").expect("event_type");
        assert_eq!(Some(name), self.attributes.get("event_name"));
        name
    }

    /// The number that Python's `int()` makes of a value, which takes text and numbers.
    fn int(&self, name: &str) -> i128 {
        match &self.body[name] {
            Value::String(text) => text.parse().unwrap_or_else(|_| panic!("{name} is {text:?}")),
            Value::Number(number) => i128::from(number.as_u64().expect("whole")),
            other => panic!("{name} is {other}"),
        }
    }

    fn text(&self, name: &str) -> &str {
        self.body[name].as_str().unwrap_or_else(|| panic!("{name} is {}", self.body[name]))
    }

    fn address(&self, name: &str) -> &str {
        let text = self.text(name);
        let digits = text.strip_prefix("0x").expect("0x");
        assert!(
            digits.len() == 40 && digits.chars().all(|c| matches!(c, '0'..='9' | 'a'..='f')),
            "{name}: {text}"
        );
        text
    }
}

/// Everything the subscription has, in the order of delivery.
async fn deliver(pubsub: &PubSub, subscription: &str) -> Vec<Delivered> {
    let server = tonic::transport::Endpoint::from_shared(pubsub.url()).expect("a URL");
    let mut client = SubscriberClient::new(server.connect().await.expect("the server is there"));
    let mut all = vec![];
    while pubsub.waiting(subscription) > 0 {
        let request =
            PullRequest { subscription: subscription.into(), max_messages: 1000, ..Default::default() };
        let received = client.pull(request).await.expect("pulled").into_inner().received_messages;
        let ack_ids = received.iter().map(|message| message.ack_id.clone()).collect();
        for message in received.into_iter().filter_map(|received| received.message) {
            let text = String::from_utf8(message.data).expect("UTF-8");
            let body = serde_json::from_str(&text).expect("JSON");
            let attributes = message.attributes.into_iter().collect();
            all.push(Delivered { ordering_key: message.ordering_key, attributes, text, body });
        }
        let request = AcknowledgeRequest { subscription: subscription.into(), ack_ids };
        client.acknowledge(request).await.expect("acknowledged");
    }
    all
}

/// A relayer that publishes, and their subscription.
async fn scene() -> (World, PubSub) {
    let mut world = World::new().await;
    let pubsub = PubSub::start().await;
    pubsub.create_topic(TOPIC);
    pubsub.create_subscription(Subscription {
        name: THEIRS.into(),
        topic: TOPIC.into(),
        enable_message_ordering: true,
        filter: "attributes.event_type != \"Retracted\"".into(),
        ..Default::default()
    });
    let setup = world.setup.with("PUBSUB_EMULATOR_HOST", pubsub.endpoint());
    world.setup = setup.with("PUBSUB_PROJECT_ID", "test-project");
    (world, pubsub)
}

fn key(escrow: &Contract) -> String {
    format!("{:#x}", escrow.address)
}

#[tokio::test]
async fn an_announcement_has_all_that_is_written_into_the_row_flat_and_of_the_types_they_parse() {
    let (world, pubsub) = scene().await;
    let (escrow, receipt) = world.factory.create_by("createEscrow").await;
    world.factory.send("announceOlder", &[escrow.address.into()]).await;
    world.setup.run_to_head().await;
    let delivered = deliver(&pubsub, THEIRS).await;
    let account = |index| format!("{:#x}", world.chain.account(index));
    for (message, has_arbiter) in delivered.iter().zip([true, false]) {
        assert_eq!(message.name(), "EscrowDeployed");
        assert_eq!(message.address("escrow"), key(&escrow));
        assert_eq!(message.address("payer"), account(1));
        assert_eq!(message.address("payee"), account(2));
        // Beyond 2^53 a JSON number would lose digits: text, which they divide as a decimal.
        assert_eq!(message.text("amount"), "1000000000000000000");
        assert_eq!(message.int("releaseDelay"), 86_400);
        assert_eq!(message.int("approvalsRequired"), 2);
        assert_eq!(
            message.body.get("arbiter").is_some(),
            has_arbiter,
            "the older ABI has none, and none is made up"
        );
        if has_arbiter {
            assert_eq!(message.address("arbiter"), account(3));
            assert_eq!(message.text("transaction_hash"), receipt.transaction_hash.to_string());
            assert_eq!(message.int("block_number"), i128::from(receipt.block_number));
        }
        assert_eq!(message.body["chain_id"], 31337, "a JSON number");
        assert!(message.body["block_number"].is_u64(), "a JSON number");
        assert_eq!(message.address("contract_address"), key(&world.factory), "who emitted it: the factory");
    }
    assert_eq!(delivered.len(), 2);
}

#[tokio::test]
async fn whatever_generation_speaks_the_events_name_and_the_escrow_are_where_they_look_for_them() {
    let (world, pubsub) = scene().await;
    let escrow = world.factory.create_escrow().await;
    escrow.send("emitAll", &[]).await;
    world.setup.run_to_head().await;
    let delivered = deliver(&pubsub, THEIRS).await;
    let names: Vec<&str> = delivered.iter().map(Delivered::name).collect();
    let released = ["EscrowReleased"; 3];
    let refunded = ["EscrowRefunded"; 3];
    assert_eq!(names, [&["EscrowDeployed", "Approved"][..], &released, &refunded].concat());
    for message in &delivered[1..] {
        // An approval increments the row of that address; an end sets its status.
        assert_eq!(message.address("contract_address"), key(&escrow));
        assert_eq!(message.attributes["contract_address"], key(&escrow));
    }
    assert_eq!(delivered[1].address("approver"), format!("{:#x}", world.chain.account(1)));
}

#[tokio::test]
async fn every_message_has_every_argument_flat_and_under_args_and_an_envelope_that_no_argument_hides() {
    let (world, pubsub) = scene().await;
    let escrow = world.factory.create_escrow().await;
    escrow.send("emitAll", &[]).await;
    world.setup.run_to_head().await;
    for message in deliver(&pubsub, THEIRS).await {
        let body = message.body.as_object().expect("an object");
        let args = body["args"].as_object().expect("an object");
        assert!(!args.is_empty());
        for (name, value) in args {
            assert!(value.is_string(), "{name}: integers of any width are text");
            if name != "timestamp" {
                assert_eq!(body[name], *value, "{name} stands flat, too");
            }
        }
        for name in
            ["schema_version", "sequence", "chain_id", "block_number", "transaction_index", "log_index"]
        {
            assert!(body[name].is_u64(), "{name} is a JSON number");
        }
        let time = message.text("timestamp");
        assert_eq!(
            time,
            message.text("block_timestamp"),
            "the block's time, also where the event has its own"
        );
        assert!(time.ends_with('Z') && time.len() == 20, "{time}");
        if let Some(own) = args.get("timestamp") {
            assert!(
                own.as_str().is_some_and(|own| own.parse::<u64>().is_ok()),
                "{own}: its own is under args"
            );
        }
        let (chain, log) = (message.int("chain_id"), message.int("log_index"));
        let id = format!("{chain}:{}:{log}", message.text("block_hash"));
        assert_eq!(message.text("event_id"), id);
        let expected = json!({
            "event_type": body["event_name"], "event_name": body["event_name"], "chain_id": chain.to_string(),
            "contract_address": body["contract_address"], "escrow": key(&escrow),
            "block_number": message.int("block_number").to_string(), "event_id": id,
            "sequence": message.int("sequence").to_string(), "schema_version": "1",
        });
        let mut attributes = json!(message.attributes);
        let epoch = attributes.as_object_mut().and_then(|them| them.remove("epoch")).expect("epoch");
        assert!(epoch.as_str().is_some_and(|epoch| epoch.parse::<u64>().is_ok_and(|epoch| epoch > 0)));
        assert_eq!(attributes, expected);
        assert_eq!(message.ordering_key, key(&escrow));
    }
}

#[tokio::test]
async fn an_escrows_messages_arrive_in_the_order_of_the_chain_the_announcement_first() {
    let (world, pubsub) = scene().await;
    // Its constructor approves before the factory announces it.
    let (escrow, _) = world.factory.create_by("createApprovedInConstructor").await;
    for function in ["approve", "approve", "release"] {
        escrow.send(function, &[]).await;
    }
    world.setup.run_to_head().await;
    let delivered = deliver(&pubsub, THEIRS).await;
    let names: Vec<&str> = delivered.iter().map(Delivered::name).collect();
    assert_eq!(names, ["EscrowDeployed", "Approved", "Approved", "Approved", "EscrowReleased"]);
    let sequences: Vec<i128> = delivered.iter().map(|message| message.int("sequence")).collect();
    assert_eq!(sequences, [1, 2, 3, 4, 5]);
}

#[tokio::test]
async fn a_retraction_does_not_reach_them_and_nobody_can_take_it_for_the_event() {
    let (world, pubsub) = scene().await;
    let all = "projects/test-project/subscriptions/all";
    pubsub.create_subscription(Subscription { name: all.into(), topic: TOPIC.into(), ..Default::default() });
    let escrow = world.factory.create_escrow().await;
    let relayer = world.setup.start(&["run"]);
    escrow.send("approve", &[]).await;
    pubsub.wait_for(2).await;
    world.chain.reorg(1).await;
    pubsub.wait_for(3).await;
    relayer.stop().await;
    assert_eq!(deliver(&pubsub, THEIRS).await.len(), 2);
    let delivered = deliver(&pubsub, all).await;
    let [_, approved, retracted] = &delivered[..] else { panic!("{} messages", delivered.len()) };
    assert_eq!(retracted.name(), "Retracted");
    assert_eq!(retracted.body["event_name"], "Retracted");
    assert_eq!(retracted.body["retracts"], approved.body["event_id"]);
    assert_eq!(retracted.body["retracted_event"], approved.body);
    let without = retracted.text.replace(&approved.text, "");
    assert!(!without.contains("Approved"), "{without}");
    assert!(!retracted.attributes.values().any(|value| value.contains("Approved")));
    assert_eq!(retracted.ordering_key, approved.ordering_key);
}
