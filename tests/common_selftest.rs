//! The test support, tested for real: an anvil, our contracts on it, and Google's own client against the Pub/Sub server.

mod common;

use std::{
    collections::{BTreeMap, HashMap},
    time::{Duration, Instant},
};

use alloy::primitives::{Address, B256, keccak256};
use common::{
    Answer, Anvil, Chain, Contract, Log, PubSub,
    chain::{event_of, events},
    pubsub::{Code, Subscription},
};
use google_cloud_auth::credentials::anonymous;
use google_cloud_pubsub::{
    client::{BasePublisher, Publisher, Subscriber},
    model::Message,
};
use googleapis_tonic_google_pubsub_v1::google::pubsub::v1::{
    AcknowledgeRequest, GetSubscriptionRequest, GetTopicRequest, ModifyAckDeadlineRequest, PublishRequest,
    PubsubMessage, PullRequest, ReceivedMessage, Topic, publisher_client::PublisherClient,
    subscriber_client::SubscriberClient,
};
use tonic::transport::Channel;

/// The table in the message contract: name, parameters, topic0 as far as it is written out there.
const KNOWN: [(&str, &str, &str); 9] = [
    (
        "EscrowDeployed",
        "(address,address,address,address,uint256,uint256,uint8)",
        "0x94de54d4",
    ),
    (
        "EscrowDeployed",
        "(address,address,address,uint256,uint256,uint8)",
        "0x3c9dc28f",
    ),
    ("Approved", "(address)", "0x5d91bd0c"),
    ("EscrowReleased", "(address)", "0xa064882c"),
    ("EscrowReleased", "(address,uint256)", "0xe327b247"),
    ("EscrowReleased", "(address,uint256,uint256)", "0xe2dfcde5"),
    ("EscrowRefunded", "(address)", "0xedd9332b"),
    ("EscrowRefunded", "(address,uint256)", "0x894ce7cc"),
    ("EscrowRefunded", "(address,uint256,uint256)", "0xefe2e8d9"),
];

struct World {
    chain: Chain,
    factory: Contract,
    _anvil: Anvil,
}

async fn world() -> World {
    let anvil = Anvil::start().await;
    let chain = Chain::connect(anvil.url()).await;
    let factory = chain.deploy("EscrowFactory", &[]).await;
    World {
        chain,
        factory,
        _anvil: anvil,
    }
}

fn signatures(logs: &[Log]) -> Vec<String> {
    logs.iter()
        .map(|log| event_of(log).map_or("?".into(), |event| event.signature()))
        .collect()
}

fn names(logs: &[Log]) -> Vec<&str> {
    logs.iter()
        .map(|log| event_of(log).map_or("?", |event| event.name.as_str()))
        .collect()
}

#[test]
fn our_contracts_declare_the_events_of_the_message_contract() {
    for (name, parameters, topic) in KNOWN {
        let signature = format!("{name}{parameters}");
        let event = events()
            .find(|event| event.signature() == signature)
            .expect(&signature);
        assert!(event.selector().to_string().starts_with(topic), "{signature}");
        assert_eq!(event.selector(), keccak256(&signature));
    }
}

#[tokio::test]
async fn every_known_signature_comes_out_of_a_real_chain() {
    let World {
        chain,
        factory,
        _anvil,
    } = world().await;
    let escrow = factory.create_escrow().await;
    factory.send("announceOlder", &[escrow.address.into()]).await;
    let all = escrow.send("emitAll", &[]).await;
    assert_eq!(all.logs.len(), 7);

    let mut seen: BTreeMap<String, B256> = BTreeMap::new();
    for log in chain.all_logs(&[factory.address, escrow.address]).await {
        seen.insert(event_of(&log).expect("all are known").signature(), log.topics[0]);
    }
    for (name, parameters, topic) in KNOWN {
        let signature = format!("{name}{parameters}");
        assert!(seen[&signature].to_string().starts_with(topic), "{signature}");
    }
}

#[tokio::test]
async fn an_escrow_lives_as_the_deployed_contract_does() {
    let World {
        chain,
        factory,
        _anvil,
    } = world().await;
    let (escrow, created) = factory.create_by("createEscrow").await;
    assert_eq!(names(&created.logs), ["EscrowCreated", "EscrowDeployed"]);
    assert_eq!(created.logs[0].address, escrow.address);
    assert_eq!(created.logs[1].address, factory.address);
    assert_eq!(
        created.logs[1].topics[2],
        chain.account(1).into_word(),
        "the payer"
    );

    let approved = escrow.submit_from(chain.account(5), "approve", &[]).await;
    let approved = chain.receipt(approved).await;
    assert_eq!(approved.logs[0].topics[1], chain.account(5).into_word());
    escrow.send("approveAs", &[Address::repeat_byte(7).into()]).await;
    escrow.send("release", &[]).await;
    escrow.send("refund", &[]).await;
    assert_eq!(escrow.get("approvalsCount").await, 2);
    assert_eq!(
        (escrow.get("released").await, escrow.get("refunded").await),
        (1, 1)
    );
    assert_eq!(
        names(&chain.all_logs(&[escrow.address]).await),
        [
            "EscrowCreated",
            "Approved",
            "Approved",
            "EscrowReleased",
            "EscrowRefunded"
        ]
    );
}

#[tokio::test]
async fn a_hundred_escrows_come_from_one_transaction() {
    let World { factory, _anvil, .. } = world().await;
    assert_eq!(factory.create_many(100).await.len(), 100);
    assert_eq!(factory.create_many(100).await.len(), 100);
    assert_eq!(factory.get("getEscrowCount").await, 200);
}

#[tokio::test]
async fn the_awkward_transactions_are_as_awkward_as_promised() {
    let World { factory, _anvil, .. } = world().await;

    let (_, whole_life) = factory.create_by("createApproveRelease").await;
    assert_eq!(
        names(&whole_life.logs),
        [
            "EscrowCreated",
            "EscrowDeployed",
            "Approved",
            "Approved",
            "EscrowReleased"
        ]
    );
    let (_, early) = factory.create_by("createApprovedInConstructor").await;
    assert_eq!(
        names(&early.logs),
        ["EscrowCreated", "Approved", "EscrowDeployed"]
    );
    let (escrow, twice) = factory.create_by("createAnnouncedTwice").await;
    assert_eq!(
        names(&twice.logs),
        ["EscrowCreated", "EscrowDeployed", "EscrowDeployed"]
    );
    let again = factory.send("announce", &[escrow.address.into()]).await;
    assert_eq!(names(&again.logs), ["EscrowDeployed"]);

    let silent = factory.send("createSilently", &factory.escrow_args()).await;
    assert_eq!(names(&silent.logs), ["EscrowCreated"]);

    let many = factory
        .send("approveMany", &[escrow.address.into(), 60u64.into()])
        .await;
    assert_eq!(many.logs.len(), 60);
    assert!(many.logs.iter().all(|log| log.address == escrow.address));
}

#[tokio::test]
async fn malformed_logs_have_the_topics_of_sound_ones() {
    let World { factory, _anvil, .. } = world().await;
    let (escrow, created) = factory.create_by("createEscrow").await;

    let release = escrow.send("release", &[]).await.logs.remove(0);
    let truncated = escrow.send("emitTruncatedRelease", &[]).await.logs.remove(0);
    assert_eq!((truncated.topics, truncated.data.len()), (release.topics, 5));

    let approved = escrow.send("approve", &[]).await.logs.remove(0);
    let bare = escrow
        .send("emitApprovedWithoutApprover", &[])
        .await
        .logs
        .remove(0);
    assert_eq!(bare.topics, approved.topics[..1]);

    let announced = factory
        .send("emitTruncatedAnnouncement", &[escrow.address.into()])
        .await
        .logs
        .remove(0);
    assert_eq!(announced.topics[..2], created.logs[1].topics[..2]);
    assert_eq!((announced.topics.len(), announced.data.len()), (4, 5));

    for unknown in [
        escrow.send("emitUnknown", &[]).await,
        factory.send("emitUnknown", &[]).await,
    ] {
        let signature = event_of(&unknown.logs[0]).expect("our ABI has it").signature();
        assert!(
            KNOWN
                .iter()
                .all(|(name, parameters, _)| signature != format!("{name}{parameters}"))
        );
    }

    let topics: Vec<B256> = (1..=4).map(B256::repeat_byte).collect();
    for n in 0..=4 {
        let words: Vec<_> = topics[..n].iter().map(|topic| (*topic).into()).collect();
        let args = [
            alloy::dyn_abi::DynSolValue::Array(words),
            vec![0xab_u8; 33].into(),
        ];
        let raw = escrow.send("emitRaw", &args).await.logs.remove(0);
        assert_eq!((&raw.topics[..], &raw.data[..]), (&topics[..n], &[0xab; 33][..]));
    }
}

#[tokio::test]
async fn other_generations_and_look_alikes_are_there_too() {
    let World {
        chain,
        factory,
        _anvil,
    } = world().await;

    let older = chain.deploy("OlderFactory", &[]).await;
    let args = &older.escrow_args()[..];
    let receipt = older
        .send("createEscrow", &[&args[..2], &args[3..]].concat())
        .await;
    assert_eq!(
        signatures(&receipt.logs),
        ["EscrowDeployed(address,address,address,uint256,uint256,uint8)"]
    );
    let escrow = older.escrows_in(&receipt).remove(0);
    escrow.send("approve", &[]).await;
    escrow.send("release", &[]).await;
    escrow.send("refund", &[]).await;
    assert_eq!(
        signatures(&chain.all_logs(&[escrow.address]).await),
        [
            "Approved(address)",
            "EscrowReleased(address,uint256)",
            "EscrowRefunded(address,uint256)"
        ]
    );

    let look_alike = chain.deploy("LookAlike", &[]).await;
    let fake = look_alike.send("emitAll", &[]).await;
    assert_eq!(
        names(&fake.logs),
        ["EscrowDeployed", "Approved", "EscrowReleased", "EscrowRefunded"]
    );
    assert!(
        factory.escrows_in(&fake).is_empty(),
        "another address announced it"
    );
}

#[tokio::test]
async fn a_batch_is_one_transaction() {
    let World {
        chain,
        factory,
        _anvil,
    } = world().await;
    let escrow = factory.create_escrow().await;
    let batch = chain.deploy("Batch", &[]).await;
    let receipt = batch
        .run(&[
            (&escrow, "approve", &[]),
            (&factory, "createEscrow", &factory.escrow_args()),
            (&escrow, "release", &[]),
        ])
        .await;
    assert_eq!(
        names(&receipt.logs),
        ["Approved", "EscrowCreated", "EscrowDeployed", "EscrowReleased"]
    );
    assert!(
        receipt
            .logs
            .iter()
            .all(|log| log.transaction_hash == receipt.transaction_hash)
    );
}

#[tokio::test]
async fn manual_mining_puts_what_waits_into_one_block_in_order() {
    let anvil = Anvil::new()
        .chain_id(4242)
        .manual_mining()
        .spawn()
        .await
        .expect("anvil starts");
    let chain = Chain::connect(anvil.url()).await;
    assert_eq!(chain.chain_id().await, 4242);
    let factory = chain.deploy("EscrowFactory", &[]).await;
    let escrow = factory.create_escrow().await;
    let before = chain.block_number().await;

    let mut sent = vec![];
    for account in 0..10 {
        sent.push(escrow.submit_from(chain.account(account), "approve", &[]).await);
    }
    assert_eq!(chain.block_number().await, before, "nothing is mined yet");
    chain.mine(3).await;
    assert_eq!(chain.block_number().await, before + 3);
    assert_eq!(chain.block(before + 1).await.transactions, sent);
    assert_eq!(
        chain
            .logs_of_block(chain.block(before + 1).await.hash)
            .await
            .len(),
        10
    );

    chain.set_automine(true).await;
    escrow.send("release", &[]).await;
    assert_eq!(chain.block_number().await, before + 4);
}

#[tokio::test]
async fn a_reorg_replaces_blocks_and_may_keep_transactions() {
    let World {
        chain,
        factory,
        _anvil,
    } = world().await;
    let escrow = factory.create_escrow().await;
    let base = chain.head().await;
    let approved = escrow.send("approve", &[]).await;
    let released = escrow.send("release", &[]).await;
    chain.mine(1).await;

    // The approval moves into the second of the replaced blocks; the release is gone.
    chain.reorg_keeping(3, &[(approved.transaction_hash, 1)]).await;
    let first = chain.block(base.number + 1).await;
    assert_eq!(first.parent_hash, base.hash);
    assert_ne!(first.hash, approved.block_hash);
    assert!(chain.logs_of_block(first.hash).await.is_empty());
    let logs = chain
        .logs(&[escrow.address], base.number + 1..=base.number + 3)
        .await;
    assert_eq!(names(&logs), ["Approved"]);
    assert_eq!(
        (logs[0].block_number, logs[0].transaction_hash),
        (base.number + 2, approved.transaction_hash)
    );

    let gone = serde_json::json!([{ "blockHash": released.block_hash }]);
    chain
        .try_rpc("eth_getLogs", gone)
        .await
        .expect_err("that block is not on this chain any more");

    // A deeper one takes the escrow's announcement with it.
    chain.reorg(4).await;
    assert!(chain.all_logs(&[escrow.address]).await.is_empty());
    assert_eq!(chain.block_number().await, base.number + 3);

    chain.roll_back(2).await;
    assert_eq!(chain.block_number().await, base.number + 1);
}

#[tokio::test]
async fn a_reorg_changes_every_hash_even_of_blocks_with_the_same_content() {
    let World {
        chain,
        factory,
        _anvil,
    } = world().await;
    let escrow = factory.create_escrow().await;
    let first = escrow.send("approve", &[]).await;
    chain.mine(2).await;
    let mut before = vec![];
    for number in first.block_number..=first.block_number + 2 {
        before.push(chain.block(number).await.hash);
    }
    for _ in 0..2 {
        chain.reorg_keeping(3, &[(first.transaction_hash, 0)]).await;
        for number in first.block_number..=first.block_number + 2 {
            let hash = chain.block(number).await.hash;
            assert!(!before.contains(&hash), "block {number}");
            before.push(hash);
        }
    }
    chain.roll_back(3).await;
    chain.mine(3).await;
    assert!(!before.contains(&chain.head().await.hash));
}

#[tokio::test]
async fn anvil_ends_with_its_owner() {
    let anvil = Anvil::start().await;
    let address = format!("127.0.0.1:{}", anvil.port());
    tokio::net::TcpStream::connect(&address)
        .await
        .expect("it listens");
    drop(anvil);
    tokio::net::TcpStream::connect(&address)
        .await
        .expect_err("nobody listens any more");
}

// ---- Pub/Sub

const TOPIC: &str = "projects/test/topics/settlement.events.v1";
const SUBSCRIPTION: &str = "projects/test/subscriptions/settlement";

async fn publisher(pubsub: &PubSub) -> Publisher {
    let base = BasePublisher::builder()
        .with_endpoint(pubsub.url())
        .with_credentials(anonymous::Builder::new().build())
        .build()
        .await
        .expect("a client");
    base.publisher(TOPIC)
        .set_delay_threshold(Duration::from_millis(1))
        .build()
}

async fn channel(pubsub: &PubSub) -> Channel {
    Channel::from_shared(pubsub.url())
        .expect("a URL")
        .connect()
        .await
        .expect("the server listens")
}

/// The generated clients, without the retries of Google's library.
async fn raw_publisher(pubsub: &PubSub) -> PublisherClient<Channel> {
    PublisherClient::new(channel(pubsub).await)
}

async fn raw_subscriber(pubsub: &PubSub) -> SubscriberClient<Channel> {
    SubscriberClient::new(channel(pubsub).await)
}

fn message(key: &str, data: impl Into<Vec<u8>>) -> PubsubMessage {
    PubsubMessage {
        data: data.into(),
        ordering_key: key.to_owned(),
        ..Default::default()
    }
}

fn request(messages: impl IntoIterator<Item = PubsubMessage>) -> PublishRequest {
    PublishRequest {
        topic: TOPIC.to_owned(),
        messages: messages.into_iter().collect(),
    }
}

fn subscription() -> Subscription {
    Subscription {
        name: SUBSCRIPTION.into(),
        topic: TOPIC.into(),
        ..Default::default()
    }
}

fn ordered() -> Subscription {
    Subscription {
        enable_message_ordering: true,
        ..subscription()
    }
}

async fn pull(client: &mut SubscriberClient<Channel>, max_messages: i32) -> Vec<ReceivedMessage> {
    let request = PullRequest {
        subscription: SUBSCRIPTION.into(),
        max_messages,
        ..Default::default()
    };
    client
        .pull(request)
        .await
        .expect("pull")
        .into_inner()
        .received_messages
}

fn bodies(received: &[ReceivedMessage]) -> Vec<String> {
    let body = |received: &ReceivedMessage| received.message.clone().expect("a message").data;
    received
        .iter()
        .map(|received| String::from_utf8(body(received)).expect("text"))
        .collect()
}

fn ack_ids(received: &[ReceivedMessage]) -> Vec<String> {
    received.iter().map(|received| received.ack_id.clone()).collect()
}

async fn ack(client: &mut SubscriberClient<Channel>, received: &[ReceivedMessage]) {
    let request = AcknowledgeRequest {
        subscription: SUBSCRIPTION.into(),
        ack_ids: ack_ids(received),
    };
    client.acknowledge(request).await.expect("acknowledge");
}

async fn nack(client: &mut SubscriberClient<Channel>, received: &[ReceivedMessage]) {
    let request = ModifyAckDeadlineRequest {
        subscription: SUBSCRIPTION.into(),
        ack_ids: ack_ids(received),
        ack_deadline_seconds: 0,
    };
    client
        .modify_ack_deadline(request)
        .await
        .expect("modify_ack_deadline");
}

#[tokio::test]
async fn googles_publisher_and_subscriber_talk_to_it_in_order() {
    const KEYS: usize = 5;
    const EACH: usize = 100;
    let pubsub = PubSub::start().await;
    pubsub.create_topic(TOPIC);
    pubsub.create_subscription(ordered());

    let publisher = publisher(&pubsub).await;
    let sent = (0..KEYS * EACH).map(|n| {
        publisher.publish(
            Message::new()
                .set_data(n.to_string())
                .set_ordering_key(format!("key-{}", n % KEYS))
                .set_attributes([("event_type", "Approved")]),
        )
    });
    let ids = futures_util::future::try_join_all(sent.collect::<Vec<_>>())
        .await
        .expect("published");
    let recorded = pubsub.wait_for(KEYS * EACH).await;
    assert_eq!(recorded.len(), ids.len());

    let mut per_key: HashMap<&str, Vec<usize>> = HashMap::new();
    for message in &recorded {
        assert_eq!(
            (message.topic.as_str(), message.attribute("event_type")),
            (TOPIC, "Approved")
        );
        let n: usize = String::from_utf8_lossy(&message.data).parse().expect("a number");
        assert_eq!(message.message_id, ids[n]);
        assert_eq!(
            message.ordering_key,
            pubsub.requests()[message.request].ordering_key
        );
        per_key.entry(&message.ordering_key).or_default().push(n);
    }
    assert_eq!(per_key.len(), KEYS);
    assert!(
        per_key
            .values()
            .all(|seen| seen.is_sorted() && seen.len() == EACH)
    );

    let subscriber = Subscriber::builder()
        .with_endpoint(pubsub.url())
        .with_credentials(anonymous::Builder::new().build())
        .build()
        .await
        .expect("a client");
    let mut stream = subscriber.subscribe(SUBSCRIPTION).build();
    let mut received: HashMap<String, Vec<usize>> = HashMap::new();
    for _ in 0..KEYS * EACH {
        let (message, handler) = stream
            .next()
            .await
            .expect("the stream goes on")
            .expect("a message");
        let n = String::from_utf8_lossy(&message.data).parse().expect("a number");
        received.entry(message.ordering_key).or_default().push(n);
        handler.ack();
    }
    assert!(received.iter().all(|(key, seen)| per_key[key.as_str()] == *seen));

    // All were acknowledged: nothing is left for another subscriber.
    stream.shutdown_token().shutdown().await;
    assert!(pull(&mut raw_subscriber(&pubsub).await, 10).await.is_empty());
}

#[tokio::test]
async fn topics_and_subscriptions_exist_or_do_not() {
    let pubsub = PubSub::start().await;
    let mut topics = raw_publisher(&pubsub).await;
    let mut subscriptions = raw_subscriber(&pubsub).await;
    let topic = Topic {
        name: TOPIC.into(),
        ..Default::default()
    };
    let get = GetTopicRequest { topic: TOPIC.into() };

    let publish = || request([message("", "x")]);
    assert_eq!(
        topics.publish(publish()).await.unwrap_err().code(),
        Code::NotFound
    );
    assert_eq!(
        topics.get_topic(get.clone()).await.unwrap_err().code(),
        Code::NotFound
    );
    assert_eq!(
        subscriptions
            .create_subscription(ordered())
            .await
            .unwrap_err()
            .code(),
        Code::NotFound
    );

    topics.create_topic(topic.clone()).await.expect("created");
    topics.get_topic(get).await.expect("found");
    assert_eq!(
        topics.create_topic(topic).await.unwrap_err().code(),
        Code::AlreadyExists
    );
    let nameless = Topic {
        name: "settlement".into(),
        ..Default::default()
    };
    assert_eq!(
        topics.create_topic(nameless).await.unwrap_err().code(),
        Code::InvalidArgument
    );

    subscriptions
        .create_subscription(ordered())
        .await
        .expect("created");
    let get = GetSubscriptionRequest {
        subscription: SUBSCRIPTION.into(),
    };
    let found = subscriptions
        .get_subscription(get)
        .await
        .expect("found")
        .into_inner();
    assert!(found.enable_message_ordering);
    let odd = Subscription {
        filter: "what is this".into(),
        ..ordered()
    };
    assert_eq!(
        subscriptions.create_subscription(odd).await.unwrap_err().code(),
        Code::InvalidArgument
    );

    topics.publish(publish()).await.expect("published");
    pubsub.delete_topic(TOPIC);
    assert_eq!(
        topics.publish(publish()).await.unwrap_err().code(),
        Code::NotFound
    );
}

#[tokio::test]
async fn what_google_refuses_is_refused_and_not_stored() {
    let pubsub = PubSub::start().await;
    pubsub.create_topic(TOPIC);
    let mut client = raw_publisher(&pubsub).await;
    let with = |key: &str, value: &str| PubsubMessage {
        attributes: HashMap::from([(key.to_owned(), value.to_owned())]),
        ..message("", "x")
    };
    let many_attributes = |n: usize| PubsubMessage {
        attributes: (0..n).map(|n| (format!("k{n}"), String::new())).collect(),
        ..message("", "x")
    };

    for (why, refused) in [
        ("no messages", request([])),
        ("an empty message", request([message("key", "")])),
        (
            "over 10 MB in one message",
            request([message("", vec![0; 10_000_000])]),
        ),
        (
            "over 10 MB together",
            request(vec![message("", vec![0; 2_000_000]); 5]),
        ),
        ("over 1000 messages", request(vec![message("", "x"); 1001])),
        ("two keys", request([message("a", "x"), message("b", "x")])),
        ("a long key", request([message(&"k".repeat(1025), "x")])),
        ("many attributes", request([many_attributes(101)])),
        ("a long attribute", request([with("k", &"v".repeat(1025))])),
        ("a long attribute name", request([with(&"k".repeat(257), "v")])),
        ("a reserved attribute", request([with("googclient", "v")])),
    ] {
        let status = client.publish(refused).await.expect_err(why);
        assert_eq!(status.code(), Code::InvalidArgument, "{why}: {status:?}");
    }
    assert!(pubsub.messages().is_empty());
    assert_eq!(pubsub.requests().len(), 11);

    for allowed in [
        request([message("", vec![0; 9_999_900])]),
        request(vec![message(&"k".repeat(1024), "x"); 1000]),
        request([many_attributes(100)]),
        request([PubsubMessage {
            data: vec![],
            ..with(&"k".repeat(256), &"v".repeat(1024))
        }]),
    ] {
        client.publish(allowed).await.expect("within the limits");
    }
    assert_eq!(pubsub.messages().len(), 1003);
}

#[tokio::test]
async fn faults_come_as_ordered() {
    let pubsub = PubSub::start().await;
    pubsub.create_topic(TOPIC);
    let client = raw_publisher(&pubsub).await;
    let publish = async |text: &str| client.clone().publish(request([message("key", text)])).await;
    let stored = || {
        pubsub
            .messages()
            .iter()
            .map(|m| String::from_utf8_lossy(&m.data).into())
            .collect::<Vec<String>>()
    };

    pubsub.next_answers([Answer::unavailable(), Answer::lost()]);
    assert_eq!(publish("refused").await.unwrap_err().code(), Code::Unavailable);
    assert_eq!(publish("lost").await.unwrap_err().code(), Code::Unavailable);
    publish("sound").await.expect("the queue is used up");
    assert_eq!(stored(), ["lost", "sound"]);

    pubsub.on_publish(|attempt| match attempt.ordering_key.as_str() {
        "key" if attempt.index % 2 == 1 => Answer::Refuse(Code::PermissionDenied, "not you".into()),
        _ => Answer::Store,
    });
    assert_eq!(publish("odd").await.unwrap_err().code(), Code::PermissionDenied);
    publish("even").await.expect("stored");
    pubsub.heal();
    publish("healed").await.expect("stored");
    assert_eq!(stored(), ["lost", "sound", "even", "healed"]);

    let begun = Instant::now();
    pubsub.next_answers([
        Answer::Delay(Duration::from_millis(200)),
        Answer::Hang,
        Answer::StoreAndHang,
    ]);
    publish("late").await.expect("stored");
    assert!(begun.elapsed() >= Duration::from_millis(200));
    let short = Duration::from_millis(200);
    tokio::time::timeout(short, publish("hangs"))
        .await
        .expect_err("no answer");
    tokio::time::timeout(short, publish("stored and hangs"))
        .await
        .expect_err("no answer");
    assert_eq!(stored()[4..], ["late", "stored and hangs"]);
    pubsub.wait_for_requests(8).await;
}

#[tokio::test]
async fn an_outage_breaks_connections_and_keeps_what_was_stored() {
    let pubsub = PubSub::start().await;
    pubsub.create_topic(TOPIC);
    let mut client = raw_publisher(&pubsub).await;
    client
        .publish(request([message("", "before")]))
        .await
        .expect("published");

    pubsub.take_down().await;
    client
        .publish(request([message("", "during")]))
        .await
        .expect_err("nobody is there");
    tokio::net::TcpStream::connect(pubsub.endpoint())
        .await
        .expect_err("nobody listens");

    pubsub.bring_up().await;
    let mut client = raw_publisher(&pubsub).await;
    client
        .publish(request([message("", "after")]))
        .await
        .expect("published");
    let stored: Vec<_> = pubsub
        .messages()
        .into_iter()
        .map(|message| message.data)
        .collect();
    assert_eq!(stored, [b"before".to_vec(), b"after".to_vec()]);
}

#[tokio::test]
async fn an_ordered_subscription_gives_a_key_to_one_consumer_at_a_time() {
    let pubsub = PubSub::start().await;
    pubsub.create_topic(TOPIC);
    pubsub.create_subscription(ordered());
    let mut publisher = raw_publisher(&pubsub).await;
    let mut client = raw_subscriber(&pubsub).await;
    for (key, text) in [("a", "a1"), ("a", "a2"), ("b", "b1"), ("a", "a3")] {
        publisher
            .publish(request([message(key, text)]))
            .await
            .expect("published");
    }

    let first = pull(&mut client, 2).await;
    assert_eq!(bodies(&first), ["a1", "a2"]);
    let second = pull(&mut client, 10).await;
    assert_eq!(bodies(&second), ["b1"], "a3 waits for a1 and a2");
    ack(&mut client, &second).await;

    // Giving a1 back gives a2 back too, although that was held by the same consumer.
    nack(&mut client, &first[..1]).await;
    let again = pull(&mut client, 10).await;
    assert_eq!(bodies(&again), ["a1", "a2", "a3"]);
    ack(&mut client, &again).await;
    assert!(pull(&mut client, 10).await.is_empty());
}

#[tokio::test]
async fn what_is_not_acknowledged_in_time_comes_again() {
    let pubsub = PubSub::start().await;
    pubsub.create_topic(TOPIC);
    pubsub.create_subscription(subscription());
    let mut publisher = raw_publisher(&pubsub).await;
    publisher
        .publish(request(["1", "2", "3"].map(|text| message("key", text))))
        .await
        .expect("published");

    let mut client = raw_subscriber(&pubsub).await;
    let first = pull(&mut client, 2).await;
    assert_eq!(
        bodies(&pull(&mut client, 10).await),
        ["3"],
        "without ordering, nobody waits for 1 and 2"
    );
    let soon = ModifyAckDeadlineRequest {
        subscription: SUBSCRIPTION.into(),
        ack_ids: ack_ids(&first[..1]),
        ack_deadline_seconds: 1,
    };
    client
        .modify_ack_deadline(soon)
        .await
        .expect("modify_ack_deadline");
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(
        bodies(&pull(&mut client, 10).await),
        ["1"],
        "a waiting pull sees the lease run out"
    );
}

#[tokio::test]
async fn a_filter_withholds_retractions() {
    let pubsub = PubSub::start().await;
    pubsub.create_topic(TOPIC);
    pubsub.create_subscription(Subscription {
        filter: r#"attributes.event_type != "Retracted""#.into(),
        ..ordered()
    });
    let mut publisher = raw_publisher(&pubsub).await;
    for kind in ["Approved", "Retracted", "EscrowReleased"] {
        let attributes = HashMap::from([("event_type".to_owned(), kind.to_owned())]);
        publisher
            .publish(request([PubsubMessage {
                attributes,
                ..message("key", kind)
            }]))
            .await
            .expect("published");
    }
    let received = pull(&mut raw_subscriber(&pubsub).await, 10).await;
    assert_eq!(bodies(&received), ["Approved", "EscrowReleased"]);
}

#[tokio::test]
async fn googles_subscriber_gets_again_what_it_gave_back() {
    let pubsub = PubSub::start().await;
    pubsub.create_topic(TOPIC);
    pubsub.create_subscription(ordered());
    let mut client = raw_publisher(&pubsub).await;
    client
        .publish(request(["1", "2", "3"].map(|text| message("key", text))))
        .await
        .expect("published");

    let subscriber = Subscriber::builder()
        .with_endpoint(pubsub.url())
        .with_credentials(anonymous::Builder::new().build())
        .build()
        .await
        .expect("a client");
    let mut stream = subscriber.subscribe(SUBSCRIPTION).build();
    let mut seen = vec![];
    let mut refused = false;
    while seen.len() < 6 {
        let (message, handler) = stream
            .next()
            .await
            .expect("the stream goes on")
            .expect("a message");
        seen.push(String::from_utf8_lossy(&message.data).into_owned());
        if message.data == "1" && !refused {
            refused = true;
            handler.nack();
        } else if refused && seen.len() > 3 {
            handler.ack();
        }
    }
    assert_eq!(seen, ["1", "2", "3", "1", "2", "3"]);
}
