//! The way to Google Pub/Sub, whole: real binary, real chain, a server that speaks the real protocol and fails on
//! demand. Everything arrives, each escrow's messages in order; what comes again comes as the same bytes.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use common::pubsub::{Code, Message};
use common::relay::truth::without_epoch;
use common::relay::{self, by_key, free_port};
use common::sink::{message, to};
use common::{Answer, Contract, Line, PubSub, Setup, World};
use futures_util::future::join_all;
use relayer::publish::{Sink, SinkError};

const TOPIC: &str = "projects/test-project/topics/settlement.events.v1";

/// A world whose relayer publishes to a Pub/Sub of its own.
struct Google {
    world: World,
    pubsub: PubSub,
}

impl Google {
    async fn new() -> Google {
        let mut world = World::new().await;
        let pubsub = PubSub::start().await;
        pubsub.create_topic(TOPIC);
        world.setup = publishing(world.setup, &pubsub);
        Google { world, pubsub }
    }

    /// `n` escrows with `approvals` each, in one transaction each.
    async fn escrows(&self, n: u64, approvals: u64) -> Vec<Contract> {
        let escrows = self.world.factory.create_many(n).await;
        for escrow in &escrows {
            self.world.factory.send("approveMany", &[escrow.address.into(), approvals.into()]).await;
        }
        escrows
    }

    /// Waits until `n` messages have arrived, repeats not counted.
    async fn wait_for_distinct(&self, n: usize) {
        let distinct = |messages: &[Message]| {
            let ids: BTreeSet<&str> = messages.iter().map(|message| message.attribute("event_id")).collect();
            ids.len() >= n
        };
        self.pubsub.wait_until(&format!("{n} different messages"), distinct).await;
    }

    /// Panics unless everything on the chain has arrived, first occurrences in order, and repeats as promised.
    /// How many messages were repeats.
    async fn assert_arrived(&self) -> usize {
        let (firsts, repeats) = firsts(&self.pubsub.messages());
        self.world.truth().await.assert_is(&firsts);
        repeats
    }
}

fn publishing(setup: Setup, pubsub: &PubSub) -> Setup {
    setup.with("PUBSUB_EMULATOR_HOST", pubsub.endpoint()).with("PUBSUB_PROJECT_ID", "test-project")
}

/// [`relay::firsts`] of what arrived; what came again came as the same bytes.
fn firsts(messages: &[Message]) -> (Vec<Line>, usize) {
    let mut bytes: BTreeMap<String, &[u8]> = BTreeMap::new();
    let mut lines = vec![];
    for message in messages {
        assert_eq!(message.topic, TOPIC);
        let line = Line::of(message);
        let first = bytes.entry(line.event_id().to_owned()).or_insert(&message.data);
        assert_eq!(*first, message.data, "the same bytes");
        lines.push(line);
    }
    relay::firsts(&lines)
}

#[tokio::test]
async fn with_the_plain_variables_alone_messages_are_what_stdout_prints() {
    let World { anvil, chain, factory, .. } = World::new().await;
    factory.create_by("createApprovedInConstructor").await;
    factory.create_by("createApproveRelease").await;
    for escrow in factory.create_many(20).await {
        factory.send("announceOlder", &[escrow.address.into()]).await;
        escrow.send("emitAll", &[]).await;
    }
    let last = chain.block_number().await;
    chain.mine(2).await; // the confirmations, for which there is no plain variable

    let plain = || Setup::plain(&anvil.url(), factory.address).with("PORT", free_port());
    let printed = plain().run_to_head().await;
    let pubsub = PubSub::start().await;
    pubsub.create_topic("projects/test-project/topics/another.topic");
    let setup = publishing(plain(), &pubsub).with("PUBSUB_TOPIC_ID", "another.topic");
    assert_eq!(setup.run_to_head().await, [], "stdout stays empty");

    let arrived: Vec<Line> = pubsub.messages().iter().map(Line::of).collect();
    common::relay::truth::Truth::read(&chain, factory.address, last).await.assert_is(&arrived);
    assert_eq!(by_key(&without_epoch(&arrived)), by_key(&without_epoch(&printed)));
    assert!(pubsub.messages().iter().all(|message| message.topic.ends_with("/another.topic")));
}

#[tokio::test]
async fn without_pubsub_at_the_start_it_waits_and_says_so_once_and_goes_on_when_it_comes() {
    let google = Google::new().await;
    google.escrows(5, 3).await;
    google.pubsub.take_down().await;
    let mut relayer = google.world.setup.start(&["run"]);
    let said = relayer.wait_logged("Pub/Sub is unavailable").await;
    assert_eq!(said["severity"], "WARNING");
    tokio::time::sleep(Duration::from_secs(1)).await; // time to say it again; nothing waits for this
    google.pubsub.bring_up().await;
    relayer.wait_logged("Pub/Sub answers again").await;
    google.pubsub.wait_for(20).await;
    let finished = relayer.stop().await;
    assert_eq!(finished.logged("unavailable").len(), 1, "{}", finished.stderr);
    assert_eq!(google.assert_arrived().await, 0, "what never arrived is no repeat");
}

#[tokio::test]
async fn without_its_topic_it_waits_and_goes_on_when_that_is_created() {
    let google = Google::new().await;
    google.escrows(3, 3).await;
    google.pubsub.delete_topic(TOPIC);
    let mut relayer = google.world.setup.start(&["run", "--until", "head"]);
    let said = relayer.wait_logged("Pub/Sub is unavailable").await;
    assert!(said["reason"].as_str().expect("a reason").contains("settlement.events.v1"), "{said}");
    google.pubsub.create_topic(TOPIC);
    relayer.ended().await.good();
    google.assert_arrived().await;
}

#[tokio::test]
async fn an_outage_in_the_middle_loses_nothing_and_is_said_once() {
    let google = Google::new().await;
    google.pubsub.on_publish(|_| Answer::Delay(Duration::from_millis(5)));
    let escrows = google.escrows(10, 5).await;
    let mut relayer = google.world.setup.start(&["run"]);
    google.pubsub.wait_for(60).await;
    google.pubsub.take_down().await;
    for escrow in &escrows {
        escrow.send("release", &[]).await;
    }
    relayer.wait_logged("Pub/Sub is unavailable").await;
    google.pubsub.bring_up().await;
    let all = google.world.truth().await.len();
    google.wait_for_distinct(all).await;
    relayer.wait_logged("Pub/Sub answers again").await;
    let finished = relayer.stop().await;
    assert_eq!(finished.logged("Pub/Sub is unavailable").len(), 1, "{}", finished.stderr);
    google.assert_arrived().await;
}

#[tokio::test]
async fn an_outage_that_hits_many_lanes_at_once_is_over_soon_after_the_server_is_back() {
    const LANES: usize = 30;
    let google = Google::new().await;
    google.escrows(LANES as u64, 2).await;
    google.pubsub.on_publish(|_| Answer::Delay(Duration::from_secs(30)));
    let relayer = google.world.setup.start(&["run", "--until", "head"]);
    google.pubsub.wait_for_requests(LANES).await;
    google.pubsub.take_down().await;
    google.pubsub.heal();
    google.pubsub.bring_up().await;
    let back = Instant::now();
    google.wait_for_distinct(LANES * 3).await;
    let took = back.elapsed();
    assert!(
        took < Duration::from_secs(5),
        "one failure of many lanes is one step of the backoff; took {took:?}"
    );
    relayer.ended().await.good();
    google.assert_arrived().await;
}

#[tokio::test]
async fn a_refused_escrow_blocks_itself_alone_and_after_healing_a_restart_delivers_it_in_order() {
    let google = Google::new().await;
    let escrows = google.escrows(6, 4).await;
    let blocked = format!("{:#x}", escrows[2].address);
    let refused = blocked.clone();
    google.pubsub.on_publish(move |attempt| match attempt.ordering_key == refused {
        true => Answer::Refuse(Code::InvalidArgument, "the test will not have it".into()),
        false => Answer::Store,
    });
    let ended = google.world.setup.run(&["run", "--until", "head"]).await;
    let ended = ended.failed_with(1, &[&blocked, "the test will not have it"]);
    assert_eq!(ended.logged("Lane blocked").len(), 1, "said once");
    let still = ended.logged("Still blocked");
    assert_eq!(still.len(), 1);
    assert_eq!(still[0]["lane"], blocked);
    let arrived: Vec<Line> = google.pubsub.messages().iter().map(Line::of).collect();
    assert_eq!(arrived.len(), 25, "the others go on");
    assert!(!by_key(&arrived).contains_key(&blocked));

    // Its life goes on meanwhile; so does everybody else's.
    for escrow in &escrows {
        escrow.send("release", &[]).await;
    }
    google.world.setup.run(&["run", "--until", "head"]).await.failed_with(1, &[&blocked]);
    google.pubsub.heal();
    google.world.setup.run_to_head().await;
    assert_eq!(google.assert_arrived().await, 0);
}

#[tokio::test]
async fn a_lost_answer_brings_a_run_again_as_the_same_bytes_and_nothing_else() {
    let google = Google::new().await;
    google.escrows(3, 40).await;
    google.pubsub.on_publish(|attempt| match attempt.index % 3 {
        0 => Answer::lost(),
        _ => Answer::Store,
    });
    google.world.setup.run_to_head().await;
    let repeats = google.assert_arrived().await;
    let lost = google.pubsub.messages().iter().filter(|message| message.request % 3 == 0).count();
    assert!(lost > 0, "answers were lost");
    assert_eq!(repeats, lost, "what was stored without an answer comes again, and nothing else");
}

#[tokio::test]
async fn killed_amid_publishing_it_repeats_no_more_than_what_was_outstanding() {
    const OUTSTANDING: usize = 20;
    let google = Google::new().await;
    google.escrows(8, 50).await;
    let all = google.world.truth().await.len();
    google.pubsub.on_publish(|attempt| Answer::Delay(Duration::from_millis(2 + attempt.index as u64 % 7)));
    let setup = &google.world.setup;
    let limited = [("RELAYER_SINK__MAX_OUTSTANDING", OUTSTANDING.to_string())];
    let limited = [(limited[0].0, limited[0].1.as_str())];
    let mut repeats = 0;
    for kill in 1..=4 {
        let relayer = setup.start_with(&["run"], &limited);
        let enough = google.pubsub.messages().len() + 60;
        google.pubsub.wait_for(enough).await;
        let finished = relayer.kill().await;
        assert_eq!(finished.code, None, "killed");
        let (firsts, so_far) = firsts(&google.pubsub.messages());
        assert!(firsts.len() < all, "killed in the middle");
        assert!(so_far <= repeats + OUTSTANDING, "kill {kill}: {} repeats", so_far - repeats);
        repeats = so_far;
    }
    setup.start_with(&["run", "--until", "head"], &limited).ended().await.good();
    let total = google.assert_arrived().await;
    assert!(total <= repeats + OUTSTANDING, "{} repeats at last", total - repeats);
}

#[tokio::test]
async fn sigterm_while_pubsub_does_not_answer_ends_it_in_time_and_nothing_is_lost() {
    for answer in [Answer::Hang, Answer::StoreAndHang] {
        let google = Google::new().await;
        google.escrows(3, 5).await;
        google.pubsub.on_publish(move |_| answer.clone());
        let relayer = google.world.setup.start(&["run"]);
        google.pubsub.wait_for_requests(3).await;
        relayer.stop().await;
        google.pubsub.heal();
        google.world.setup.run_to_head().await;
        google.assert_arrived().await;
    }
}

#[tokio::test]
async fn sigterm_while_messages_are_under_way_waits_for_them_and_nothing_comes_twice() {
    let google = Google::new().await;
    google.escrows(3, 5).await;
    google.pubsub.on_publish(|_| Answer::Delay(Duration::from_millis(500)));
    let relayer = google.world.setup.start(&["run"]);
    google.pubsub.wait_for_requests(3).await;
    relayer.stop().await;
    google.world.setup.run_to_head().await;
    assert_eq!(google.assert_arrived().await, 0);
}

#[tokio::test]
async fn a_fork_while_pubsub_does_not_answer_leaves_published_less_retracted_the_chain() {
    // With room for one, most entries were never handed over when the fork comes; with room for all, all were.
    for outstanding in ["1", "1000"] {
        let google = Google::new().await;
        let World { chain, factory, setup, .. } = &google.world;
        let old = google.escrows(3, 2).await;
        google.pubsub.on_publish(|_| Answer::Hang);
        let limits = [("RELAYER_SINK__MAX_OUTSTANDING", outstanding), ("RELAYER_SINK__TIMEOUT", "1s")];
        let mut relayer = setup.start_with(&["run"], &limits);
        google.pubsub.wait_for_requests(1).await;
        let base = chain.block_number().await;
        for escrow in &old {
            escrow.send("approve", &[]).await;
        }
        let young = factory.create_by("createApproveRelease").await.0;
        relayer.wait_read(base + 4).await;
        chain.reorg(4).await;
        relayer.wait_logged("The chain was reorganised").await;
        old[1].send("release", &[]).await;
        relayer.wait_read(base + 5).await;
        google.pubsub.heal();
        google.pubsub.wait_for(10).await; // what stands on the chain now
        relayer.stop().await;
        setup.run_to_head().await;

        let (firsts, _) = firsts(&google.pubsub.messages());
        google.world.truth().await.assert_is_net(&firsts);
        let of_young = relay::names_of(&firsts, young.address).len();
        assert!(matches!((outstanding, of_young), ("1", 0) | ("1000", 0 | 8)), "{outstanding}: {of_young}");
    }
}

#[tokio::test]
async fn in_buckets_an_escrow_keeps_its_key_and_its_order() {
    let mut google = Google::new().await;
    google.escrows(12, 6).await;
    google.world.setup.set("RELAYER_SINK__ORDERING", "bucket:4");
    google.world.setup.run_to_head().await;
    let mut keys: BTreeMap<String, String> = BTreeMap::new();
    let mut lines: Vec<Line> = google.pubsub.messages().iter().map(Line::of).collect();
    for line in &mut lines {
        let number: u32 =
            line.ordering_key.strip_prefix("escrow-").expect("escrow-<n>").parse().expect("a number");
        assert!(number < 4);
        let escrow = line.attributes["escrow"].clone();
        let key = std::mem::replace(&mut line.ordering_key, escrow.clone());
        assert_eq!(*keys.entry(escrow).or_insert(key.clone()), key, "one key for an escrow");
    }
    google.world.truth().await.assert_is(&lines);
}

#[tokio::test]
async fn without_ordering_messages_have_no_key_and_all_arrive() {
    let mut google = Google::new().await;
    google.escrows(5, 6).await;
    google.world.setup.set("RELAYER_SINK__ORDERING", "none");
    google.world.setup.run_to_head().await;
    let mut lines: Vec<Line> = google.pubsub.messages().iter().map(Line::of).collect();
    for line in &mut lines {
        assert_eq!(line.ordering_key, "");
        line.ordering_key = line.attributes["escrow"].clone();
    }
    lines.sort_by_key(Line::sequence); // no order is promised
    google.world.truth().await.assert_is(&lines);
}

/// Forwards connections to the server; those that are open when told so are never heard of again: no end, no reset.
struct Wire {
    port: u16,
    cut: tokio::sync::watch::Sender<()>,
    accepting: tokio::task::JoinHandle<()>,
}

impl Wire {
    async fn to(server: String) -> Wire {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("there is a free port");
        let port = listener.local_addr().expect("it has an address").port();
        let cut = tokio::sync::watch::Sender::new(());
        let cuts = cut.clone();
        let accepting = tokio::spawn(async move {
            loop {
                let (mut near, _) = listener.accept().await.expect("connections can be accepted");
                let mut far = tokio::net::TcpStream::connect(&server).await.expect("the server is there");
                let mut cut = cuts.subscribe();
                tokio::spawn(async move {
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
                        _ = cut.changed() => std::future::pending().await,
                    }
                });
            }
        });
        Wire { port, cut, accepting }
    }

    /// `127.0.0.1:port`
    fn endpoint(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

#[tokio::test]
async fn a_connection_that_is_dead_without_a_word_is_replaced() {
    let mut google = Google::new().await;
    let wire = Wire::to(google.pubsub.endpoint()).await;
    google.world.setup.set("PUBSUB_EMULATOR_HOST", wire.endpoint());
    google.world.setup.set("RELAYER_SINK__TIMEOUT", "300ms");
    let escrows = google.escrows(2, 1).await;
    let mut relayer = google.world.setup.start(&["run"]);
    google.wait_for_distinct(4).await;
    wire.cut.send_replace(());
    escrows[0].send("approve", &[]).await;
    relayer.wait_logged("Pub/Sub is unavailable").await;
    relayer.wait_logged("Pub/Sub answers again").await;
    google.wait_for_distinct(5).await;
    relayer.stop().await;
    google.assert_arrived().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_is_dead_without_a_word_costs_one_message_its_time_and_no_other() {
    let pubsub = PubSub::start().await;
    pubsub.create_topic(TOPIC);
    let wire = Wire::to(pubsub.endpoint()).await;
    let sink = to(&wire.endpoint(), &[("sink.timeout", "2s")]).await;
    let warm = join_all((0..100).map(|key| sink.publish(vec![message(key)]))).await;
    assert!(warm.iter().all(|receipt| receipt.failure.is_none()), "{warm:?}");
    wire.cut.send_replace(());
    let mut failed = None;
    for key in 100..400 {
        failed = sink.publish(vec![message(key)]).await.failure;
        if failed.is_some() {
            break;
        }
    }
    assert!(matches!(failed, Some(SinkError::Unavailable(_))), "it is answered all the same: {failed:?}");
    for key in 400..460 {
        let receipt = sink.publish(vec![message(key)]).await;
        assert_eq!(receipt.failure, None, "message {key}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_an_outage_no_message_fails_for_what_a_connection_remembers_of_it() {
    let pubsub = PubSub::start().await;
    pubsub.create_topic(TOPIC);
    let sink = to(&pubsub.endpoint(), &[]).await;
    let flood =
        async |keys: std::ops::Range<u64>| join_all(keys.map(|key| sink.publish(vec![message(key)]))).await;
    // As far away as Google's: one that is near gets all on one connection.
    pubsub.on_publish(|_| Answer::Delay(Duration::from_millis(20)));
    let before = flood(0..300).await;
    assert!(before.iter().all(|receipt| receipt.failure.is_none()), "{before:?}");
    pubsub.take_down().await;
    // The last one finds no more room on the one connection.
    let during = flood(300..401).await;
    assert!(
        during.iter().all(|receipt| matches!(receipt.failure, Some(SinkError::Unavailable(_)))),
        "{during:?}"
    );
    pubsub.bring_up().await;
    let after = flood(300..600).await;
    assert!(after.iter().all(|receipt| receipt.failure.is_none()), "{after:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_over_many_keys_has_more_under_way_than_google_takes_on_one_connection() {
    let pubsub = PubSub::with_streams(100).await;
    pubsub.create_topic(TOPIC);
    pubsub.on_publish(|_| Answer::Hang);
    let sink = to(&pubsub.endpoint(), &[("sink.timeout", "60s")]).await;
    let flood = join_all((0..300).map(|key| sink.publish(vec![message(key)])));
    tokio::select! {
        receipts = flood => panic!("nothing is answered: {receipts:?}"),
        () = pubsub.wait_for_requests(300) => {}
    }
}
