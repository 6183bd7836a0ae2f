//! The reason for all of it: an approval on the chain changes a row in the settlement service's database, once, whatever is
//! delivered again, killed, forked or begun anew. Relayer and consumer are processes of their own; chain and Pub/Sub
//! are real.

mod common;

use common::pubsub::{Answer, Subscription};
use common::relay::World;
use common::settlement::{SUBSCRIPTION, Settlement, subscribe};
use common::{Contract, PubSub};
use serde_json::{Value, json};

const TOPIC: &str = "projects/test-project/topics/settlement.events.v1";

struct Scene {
    world: World,
    pubsub: PubSub,
}

impl Scene {
    async fn new() -> Scene {
        let mut world = World::new().await;
        let pubsub = PubSub::start().await;
        pubsub.create_topic(TOPIC);
        subscribe(&pubsub, TOPIC);
        world.setup = world
            .setup
            .with("PUBSUB_EMULATOR_HOST", pubsub.endpoint())
            .with("PUBSUB_PROJECT_ID", "test-project");
        Scene { world, pubsub }
    }

    async fn settlement(&self) -> Settlement {
        Settlement::start(&self.world.setup, &self.pubsub).await
    }

    /// Waits until everything published is applied or found to be known, acknowledged, and delivered to nobody again.
    async fn all_delivered(&self) {
        self.pubsub.wait_all_acknowledged(SUBSCRIPTION).await;
    }
}

fn key(escrow: &Contract) -> String {
    format!("{:#x}", escrow.address)
}

#[tokio::test]
async fn an_approval_on_the_chain_takes_the_row_from_0_to_1_and_a_release_to_released() {
    let scene = Scene::new().await;
    let mut settlement = scene.settlement().await;
    let mut relayer = scene.world.setup.start(&["run"]);
    let escrow = scene.world.factory.create_escrow().await;
    let address = key(&escrow);
    assert_eq!(settlement.get("/escrows/0x00000000000000000000000000000000000000aa").await.0, 404);
    let created = settlement.wait_count(&address, 0, "created").await;
    let account = |index| format!("{:#x}", scene.world.chain.account(index));
    let expected = json!({
        "address": address, "payer": account(1), "payee": account(2), "arbiter": account(3),
        "amount": "1000000000000000000", "asset_symbol": "ETH", "chain_id": 31337, "status": "created",
        "release_delay": 86400, "approvals_required": 2, "approvals_count": 0,
        "block_number": scene.world.chain.block_number().await,
    });
    for (name, value) in expected.as_object().expect("an object") {
        assert_eq!(created[name], *value, "{name}");
    }
    assert!(created["transaction_hash"].as_str().is_some_and(|hash| hash.len() == 66));

    escrow.send("approve", &[]).await;
    settlement.wait_count(&address, 1, "created").await;
    settlement.running.wait_said(&format!("Processing approval for escrow {address}")).await;
    escrow.send("release", &[]).await;
    let released = settlement.wait_count(&address, 1, "released").await;
    // The address in whatever case.
    assert_eq!(settlement.row(&address.to_uppercase().replace("0X", "0x")).await, released);
    let refunded = scene.world.factory.create_escrow().await;
    refunded.send("refund", &[]).await;
    settlement.wait_count(&key(&refunded), 0, "refunded").await;
    assert_eq!(settlement.get("/health").await.0, 200);
    relayer.wait_logged("Published").await;
    relayer.stop().await;
    settlement.running.stop().await;
}

#[tokio::test]
async fn what_is_delivered_again_is_not_counted_again() {
    let scene = Scene::new().await;
    let escrow = scene.world.factory.create_escrow().await;
    for _ in 0..3 {
        escrow.send("approve", &[]).await;
    }
    // The relayer does not learn that its messages arrived, and sends them again.
    scene.pubsub.next_answers([Answer::lost()]);
    scene.world.setup.run_to_head().await;
    assert_eq!(scene.pubsub.messages().len(), 8, "each twice");
    let settlement = scene.settlement().await;
    scene.all_delivered().await;
    settlement.wait_count(&key(&escrow), 3, "created").await;
    assert_eq!(settlement.counts().await, json!({ "escrows": 1, "events": 4, "gaps": 0, "rejected": 0 }));
}

#[tokio::test]
async fn killed_between_the_commit_and_the_acknowledgement_it_applies_once() {
    let scene = Scene::new().await;
    let escrow = scene.world.factory.create_escrow().await;
    let address = key(&escrow);
    let mut approvals = 0;
    // The server takes no acknowledgement, so that the kill always comes between the two.
    scene.pubsub.lose_acknowledgements(true);
    for _ in 0..3 {
        escrow.send("approve", &[]).await;
        approvals += 1;
        scene.world.setup.run_to_head().await;
        let settlement = scene.settlement().await;
        scene.pubsub.end_leases(SUBSCRIPTION); // the killed one's
        settlement.wait_count(&address, approvals, "created").await;
        settlement.kill().await;
    }
    scene.pubsub.lose_acknowledgements(false);
    let settlement = scene.settlement().await;
    scene.pubsub.end_leases(SUBSCRIPTION);
    scene.all_delivered().await;
    settlement.wait_count(&address, approvals, "created").await;
    assert_eq!(settlement.counts().await["events"], 4);
}

#[tokio::test]
async fn the_relayer_killed_between_publishing_and_its_commit_changes_no_count() {
    let scene = Scene::new().await;
    let escrow = scene.world.factory.create_escrow().await;
    for _ in 0..5 {
        escrow.send("approve", &[]).await;
    }
    // Stored, and no answer: what is published is never committed as acknowledged.
    scene.pubsub.on_publish(|_| Answer::StoreAndHang);
    for kill in 1..=3 {
        let relayer = scene.world.setup.start(&["run"]);
        scene.pubsub.wait_for_requests(kill).await;
        relayer.kill().await;
    }
    scene.pubsub.heal();
    scene.world.setup.run_to_head().await;
    assert!(scene.pubsub.messages().len() > 6, "some came again");
    let settlement = scene.settlement().await;
    scene.all_delivered().await;
    settlement.wait_count(&key(&escrow), 5, "created").await;
}

#[tokio::test]
async fn a_fork_takes_back_what_left_the_chain_and_what_is_mined_again_counts_again() {
    let scene = Scene::new().await;
    let World { chain, factory, setup, .. } = &scene.world;
    let escrow = factory.create_escrow().await;
    let address = key(&escrow);
    let settlement = scene.settlement().await;
    let relayer = setup.start(&["run"]);
    escrow.send("approve", &[]).await;
    settlement.wait_count(&address, 1, "created").await;
    let approved = escrow.send("approve", &[]).await;
    let young = factory.create_escrow().await;
    settlement.wait_count(&address, 2, "created").await;
    settlement.wait_row(&key(&young), "there", |row| !row.is_null()).await;

    // Another fork, without either.
    chain.reorg(2).await;
    settlement.wait_count(&address, 1, "created").await;
    settlement.wait_row(&key(&young), "gone", Value::is_null).await;
    // The approval is mined again, in another block.
    escrow.send("approve", &[]).await;
    settlement.wait_count(&address, 2, "created").await;
    relayer.stop().await;
    assert_ne!(chain.head().await.hash, approved.block_hash);
    assert_eq!(settlement.counts().await["gaps"], 0);
}

#[tokio::test]
async fn an_event_whose_block_returns_to_the_chain_counts_again_under_the_same_id() {
    let scene = Scene::new().await;
    let settlement = scene.settlement().await;
    // A fork and back again, as the relayer publishes it: the very same id, retracted in between.
    let escrow = "0x00000000000000000000000000000000000000aa";
    let event = |sequence: u64| {
        let data = json!({ "event_id": "1:0xb:0", "sequence": sequence, "chain_id": 1, "block_number": 7,
            "log_index": 0, "approver": "0x01", "contract_address": escrow });
        ("Approved", "1:0xb:0".to_owned(), sequence, data)
    };
    let retraction = |sequence: u64| {
        let data = json!({ "event_name": "Retracted", "retracts": "1:0xb:0", "sequence": sequence });
        ("Retracted", format!("1:0xb:0:retracted:{sequence}"), sequence, data)
    };
    let table =
        [(event(1), 1), (retraction(2), 0), (event(1), 0), (event(3), 1), (retraction(2), 1), (event(3), 1)];
    for ((name, event_id, sequence, data), expected) in table {
        let sequence = sequence.to_string();
        let attributes = [
            ("event_type", name),
            ("event_id", &event_id),
            ("sequence", &sequence),
            ("epoch", "9"),
            ("escrow", escrow),
        ];
        scene.pubsub.publish(TOPIC, escrow, &attributes, data.to_string().as_bytes()).await;
        scene.all_delivered().await;
        let row = settlement.row(escrow).await;
        let count = if row.is_null() { 0 } else { row["approvals_count"].as_u64().expect("a number") };
        assert_eq!(count, expected, "after {name} {sequence}");
    }
}

#[tokio::test]
async fn a_new_store_of_the_relayer_publishes_everything_again_and_nothing_changes() {
    let scene = Scene::new().await;
    let escrows = scene.world.factory.create_many(3).await;
    for escrow in &escrows {
        escrow.send("approve", &[]).await;
    }
    escrows[0].send("release", &[]).await;
    scene.world.setup.run_to_head().await;
    let settlement = scene.settlement().await;
    scene.all_delivered().await;
    let before = settlement.counts().await;
    let rows = [settlement.row(&key(&escrows[0])).await, settlement.row(&key(&escrows[1])).await];
    assert_eq!(rows[0]["status"], "released");

    scene.world.setup.anew().run_to_head().await;
    assert_eq!(scene.pubsub.messages().len(), 14);
    scene.all_delivered().await;
    assert_eq!(settlement.counts().await, before);
    assert_eq!([settlement.row(&key(&escrows[0])).await, settlement.row(&key(&escrows[1])).await], rows);
    // And goes on in its own numbers.
    escrows[1].send("approve", &[]).await;
    scene.world.setup.run_to_head().await;
    settlement.wait_count(&key(&escrows[1]), 2, "created").await;
    assert_eq!(settlement.counts().await["gaps"], 0);
}

#[tokio::test]
async fn restarted_it_knows_what_it_knew() {
    let scene = Scene::new().await;
    let escrow = scene.world.factory.create_escrow().await;
    escrow.send("approve", &[]).await;
    scene.world.setup.run_to_head().await;
    let settlement = scene.settlement().await;
    let row = settlement.wait_count(&key(&escrow), 1, "created").await;
    settlement.running.stop().await;
    let settlement = scene.settlement().await;
    assert_eq!(settlement.row(&key(&escrow)).await, row);
    escrow.send("refund", &[]).await;
    scene.world.setup.run_to_head().await;
    settlement.wait_count(&key(&escrow), 1, "refunded").await;
}

#[tokio::test]
async fn what_it_cannot_understand_is_put_aside_and_a_missing_message_is_noticed() {
    let scene = Scene::new().await;
    let settlement = scene.settlement().await;
    let escrow = "0x00000000000000000000000000000000000000aa";
    let publish = async |name: &str, sequence: &str, data: &[u8]| {
        let attributes = [
            ("event_type", name),
            ("event_id", sequence),
            ("sequence", sequence),
            ("epoch", "9"),
            ("escrow", escrow),
        ];
        scene.pubsub.publish(TOPIC, escrow, &attributes, data).await;
    };
    let body = json!({ "chain_id": 1, "block_number": 7, "log_index": 0, "approver": "0x01" }).to_string();
    publish("Approved", "1", body.as_bytes()).await;
    publish("Approved", "2", b"not JSON").await;
    publish("Approved", "two", body.as_bytes()).await;
    publish("Approved", "2", b"{}").await;
    publish("FeeChanged", "2", body.as_bytes()).await;
    scene.pubsub.publish(TOPIC, escrow, &[("event_name", "Approved")], body.as_bytes()).await;
    publish("Approved", "5", body.as_bytes()).await;
    scene.all_delivered().await;
    // An escrow whose announcement never came has its approvals.
    let row = settlement.row(escrow).await;
    assert_eq!((&row["approvals_count"], &row["payer"]), (&json!(2), &Value::Null));
    assert_eq!(settlement.counts().await, json!({ "escrows": 1, "events": 2, "gaps": 1, "rejected": 4 }));
}

#[tokio::test]
async fn without_a_subscription_it_ends_and_says_what_to_create() {
    let world = World::new().await;
    let pubsub = PubSub::start().await;
    pubsub.create_topic(TOPIC);
    let settlement = Settlement::start(&world.setup, &pubsub).await;
    let ended = settlement.running.ended().await;
    ended.failed_with(1, &[SUBSCRIPTION, "does not exist", "--enable-message-ordering"]);
}

#[tokio::test]
async fn a_subscription_that_keeps_retractions_back_gets_everything_else() {
    let scene = Scene::new().await;
    let World { chain, factory, setup, .. } = &scene.world;
    scene.pubsub.create_subscription(Subscription {
        name: "projects/test-project/subscriptions/filtered".into(),
        topic: TOPIC.into(),
        enable_message_ordering: true,
        filter: "attributes.event_type != \"Retracted\"".into(),
        ..Default::default()
    });
    let escrow = factory.create_escrow().await;
    let relayer = setup.start(&["run"]);
    escrow.send("approve", &[]).await;
    scene.pubsub.wait_for(2).await;
    chain.reorg(1).await;
    scene.pubsub.wait_for(3).await;
    relayer.stop().await;
    assert_eq!(scene.pubsub.waiting("projects/test-project/subscriptions/filtered"), 2);
    assert_eq!(scene.pubsub.waiting(SUBSCRIPTION), 3);
}
