//! Google Pub/Sub inside this process: gRPC on a free port, as strict as Google's where a publisher can notice it,
//! with a record of all it was sent and with faults on demand.
//!
//! What Google's does and this does not: the throughput limit per ordering key, exactly-once delivery, schemas,
//! snapshots, the REST side.
//!
//! With `PUBSUB_EMULATOR_HOST` set when the tests are run, what is published goes to the server there, too: see `external`.

mod delivery;
mod external;

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    future::{Future, pending},
    net::{SocketAddr, TcpListener},
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

pub use googleapis_tonic_google_pubsub_v1::google::pubsub::v1::Subscription;
use googleapis_tonic_google_pubsub_v1::google::pubsub::v1::{
    AcknowledgeRequest, DeleteSubscriptionRequest, DeleteTopicRequest, GetSubscriptionRequest,
    GetTopicRequest, ModifyAckDeadlineRequest, PublishRequest, PublishResponse, PubsubMessage, PullRequest,
    PullResponse, StreamingPullRequest, StreamingPullResponse, Topic,
    streaming_pull_response::SubscriptionProperties,
};
use tokio::{
    runtime::Runtime,
    sync::{mpsc, watch},
};
pub use tonic::Code;
use tonic::{
    Request, Response, Status, Streaming,
    body::Body,
    codegen::{BoxFuture, Service, http, tokio_stream::wrappers::ReceiverStream},
    server::{Grpc, StreamingService, UnaryService},
    transport::{Server, server::TcpIncoming},
};
use tonic_prost::{ProstCodec, prost::Message as _};

use delivery::Delivery;
use external::External;

/// Google's limits on a publish request. Its documentation says 10 MB, for a message and for a request; what it
/// enforces on a request is somewhat more, on which nobody should count.
const MAX_REQUEST_BYTES: usize = 10_000_000;
const MAX_REQUEST_MESSAGES: usize = 1000;
const MAX_ATTRIBUTES: usize = 100;
const MAX_ATTRIBUTE_KEY_BYTES: usize = 256;
const MAX_ATTRIBUTE_VALUE_BYTES: usize = 1024;
const MAX_ORDERING_KEY_BYTES: usize = 1024;

/// What is read off the wire at all: more than is allowed, so that too much is answered and not cut off.
const MAX_RECEIVED_BYTES: usize = 64 << 20;

/// How long the `wait_…` functions wait before they panic.
const WAIT_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a `Pull` waits for a first message.
const PULL_WAIT: Duration = Duration::from_secs(1);

/// A stream with nothing to say says so this often.
const HEARTBEAT: Duration = Duration::from_secs(10);

/// The server. It has threads of its own, so a test that blocks or pauses its clock does not stop it.
pub struct PubSub {
    shared: Arc<Shared>,
    address: SocketAddr,
    running: Mutex<Option<Runtime>>,
    streams: u32,
}

/// A message as it arrived, in the order of arrival over all topics.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    pub topic: String,
    pub ordering_key: String,
    pub attributes: BTreeMap<String, String>,
    pub data: Vec<u8>,
    pub message_id: String,
    /// Which publish request brought it: its index in [`PubSub::requests`].
    pub request: usize,
    published: SystemTime,
}

/// A publish request as it came in, whatever became of it.
#[derive(Debug, Clone)]
pub struct Attempt {
    /// 0 for the first since the server began, or since [`PubSub::forget`].
    pub index: usize,
    pub topic: String,
    /// Of the first message; a request with several keys is refused anyway.
    pub ordering_key: String,
    pub messages: usize,
    pub at: Instant,
}

/// What to do with a publish request.
#[derive(Debug, Clone)]
pub enum Answer {
    /// What a healthy server does: store it, or refuse what Google would refuse.
    Store,
    /// An error; nothing is stored.
    Refuse(Code, String),
    /// It is stored, but the publisher gets an error: the answer got lost.
    StoreAndFail(Code, String),
    /// No answer, ever; nothing is stored.
    Hang,
    /// It is stored, and there is no answer, ever.
    StoreAndHang,
    /// Stored after a while.
    Delay(Duration),
}

impl Answer {
    pub fn unavailable() -> Answer {
        Answer::Refuse(Code::Unavailable, "the test says so".into())
    }

    pub fn lost() -> Answer {
        Answer::StoreAndFail(Code::Unavailable, "stored, but the test lost the answer".into())
    }
}

impl Message {
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.data).expect("the body is JSON")
    }

    /// The attribute, or "" where there is none.
    pub fn attribute(&self, key: &str) -> &str {
        self.attributes.get(key).map_or("", String::as_str)
    }

    fn to_proto(&self) -> PubsubMessage {
        let mut message = PubsubMessage {
            data: self.data.clone(),
            attributes: self.attributes.clone().into_iter().collect(),
            message_id: self.message_id.clone(),
            ordering_key: self.ordering_key.clone(),
            ..Default::default()
        };
        let published = self.published.duration_since(UNIX_EPOCH).unwrap_or_default();
        let time = message.publish_time.get_or_insert_default();
        time.seconds = published.as_secs() as i64;
        time.nanos = published.subsec_nanos() as i32;
        message
    }
}

impl PubSub {
    /// A server without topics on a free port. It ends on drop.
    pub async fn start() -> PubSub {
        // Hanging requests must not use up what the others need.
        PubSub::with_streams(100_000).await
    }

    /// The same, where so many requests may be under way on one connection.
    pub async fn with_streams(streams: u32) -> PubSub {
        let listener = TcpListener::bind("127.0.0.1:0").expect("there is a free port");
        let address = listener.local_addr().expect("a bound socket has an address");
        let shared = Arc::new(Shared { external: External::from_env(), ..Shared::default() });
        let running = Mutex::new(Some(serve(listener, shared.clone(), streams)));
        PubSub { shared, address, running, streams }
    }

    /// `127.0.0.1:port`, as it stands in `PUBSUB_EMULATOR_HOST`.
    pub fn endpoint(&self) -> String {
        self.address.to_string()
    }

    /// `http://127.0.0.1:port`, for `with_endpoint`.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    // ---- topics and subscriptions

    /// By its full name, `projects/…/topics/…`; returns that name.
    pub fn create_topic(&self, name: &str) -> String {
        let topic = Topic { name: name.to_owned(), ..Default::default() };
        self.shared.create_topic(topic).expect("the topic can be created").name
    }

    /// From now on nobody may look at a topic, as with `roles/pubsub.publisher` alone; publishing goes on.
    pub fn hide_topics(&self) {
        self.shared.lock().topics_are_hidden = true;
    }

    /// From now on the topic is not found. Its subscriptions stay.
    pub fn delete_topic(&self, name: &str) {
        self.shared.delete_topic(name).expect("the topic is there");
    }

    /// `Subscription { name, topic, enable_message_ordering: true, filter, ..Default::default() }`
    pub fn create_subscription(&self, subscription: Subscription) -> Subscription {
        self.shared.create_subscription(subscription).expect("the subscription can be created")
    }

    /// How many messages the subscription has that were not acknowledged.
    pub fn waiting(&self, subscription: &str) -> usize {
        let waiting = self.shared.with_subscription(subscription, |delivery| delivery.waiting());
        waiting.expect("the subscription is there")
    }

    /// Waits until every message of the subscription is acknowledged.
    pub async fn wait_all_acknowledged(&self, subscription: &str) {
        self.wait(&format!("end of {subscription}"), |state| {
            state.subscriptions[subscription].waiting() == 0
        })
        .await;
    }

    /// As if every lease of the subscription had run out: what was delivered and not acknowledged comes again.
    pub fn end_leases(&self, subscription: &str) {
        let ended = self.shared.with_subscription(subscription, |delivery| delivery.end_leases());
        ended.expect("the subscription is there");
        self.shared.notify();
    }

    /// Publishes one message as any publisher might.
    pub async fn publish(&self, topic: &str, ordering_key: &str, attributes: &[(&str, &str)], data: &[u8]) {
        let attributes = attributes.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        let message = PubsubMessage {
            data: data.to_vec(),
            attributes: attributes.collect(),
            ordering_key: ordering_key.to_owned(),
            ..Default::default()
        };
        let request = PublishRequest { topic: topic.to_owned(), messages: vec![message] };
        self.shared.clone().store(usize::MAX, request).await.expect("the message can be published");
    }

    // ---- what arrived

    pub fn messages(&self) -> Vec<Message> {
        self.shared.lock().messages.clone()
    }

    /// Every publish request so far, refused and hanging ones included.
    pub fn requests(&self) -> Vec<Attempt> {
        self.shared.lock().requests.clone()
    }

    /// Waits until at least `n` messages are stored, and returns all that are.
    pub async fn wait_for(&self, n: usize) -> Vec<Message> {
        self.wait_until(&format!("{n} messages"), |messages| messages.len() >= n).await
    }

    /// Waits until the messages stored are as wanted; `wanted` says in words what that is.
    pub async fn wait_until(&self, wanted: &str, is_so: impl Fn(&[Message]) -> bool) -> Vec<Message> {
        self.wait(wanted, |state| is_so(&state.messages)).await;
        self.messages()
    }

    /// Waits until at least `n` publish requests came in, answered or not.
    pub async fn wait_for_requests(&self, n: usize) {
        self.wait(&format!("{n} publish requests"), |state| state.requests.len() >= n).await;
    }

    async fn wait(&self, wanted: &str, is_so: impl Fn(&State) -> bool) {
        let mut changed = self.shared.changed.subscribe();
        let wait = async {
            while !is_so(&self.shared.lock()) {
                changed.changed().await.expect("the server's state lives as long as the server");
            }
        };
        if tokio::time::timeout(WAIT_TIMEOUT, wait).await.is_err() {
            let state = self.shared.lock();
            let (messages, requests) = (state.messages.len(), state.requests.len());
            panic!("no {wanted} within {WAIT_TIMEOUT:?}, but {messages} messages of {requests} requests");
        }
    }

    /// Forgets messages and requests; subscriptions keep what they have yet to deliver.
    pub fn forget(&self) {
        let mut state = self.shared.lock();
        state.messages.clear();
        state.requests.clear();
    }

    // ---- faults

    /// Asked about each publish request from now on, except those [`PubSub::next_answers`] decides.
    pub fn on_publish(&self, decide: impl FnMut(&Attempt) -> Answer + Send + 'static) {
        self.shared.faults().decide = Some(Box::new(decide));
    }

    /// Decides the next publish requests, one answer each.
    pub fn next_answers(&self, answers: impl IntoIterator<Item = Answer>) {
        self.shared.faults().next.extend(answers);
    }

    /// Whether acknowledgements get lost on their way here.
    pub fn lose_acknowledgements(&self, lose: bool) {
        self.shared.faults().acknowledgements_get_lost = lose;
    }

    /// No faults any more. Requests that hang go on hanging.
    pub fn heal(&self) {
        *self.shared.faults() = Faults::default();
    }

    /// The server is gone: connections break, new ones are refused. What it knows stays.
    pub async fn take_down(&self) {
        let runtime = self.running.lock().expect("no panic while held").take();
        if let Some(external) = &self.shared.external {
            external.interrupted();
        }
        // Waits for the server's threads, so that afterwards nothing listens any more.
        tokio::task::spawn_blocking(|| drop(runtime)).await.expect("the server stops");
    }

    /// The server is back, on the same port.
    pub async fn bring_up(&self) {
        let listener = TcpListener::bind(self.address).expect("its port is still free");
        *self.running.lock().expect("no panic while held") =
            Some(serve(listener, self.shared.clone(), self.streams));
    }
}

impl Drop for PubSub {
    fn drop(&mut self) {
        if let Some(runtime) = self.running.get_mut().expect("no panic while held").take() {
            runtime.shutdown_background(); // a plain drop waits, which an async test must not
        }
        if self.shared.external.is_some() && !thread::panicking() {
            let shared = self.shared.clone();
            let verified = thread::spawn(move || {
                let runtime =
                    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
                runtime.block_on(shared.external.as_ref().expect("just seen").verify());
            });
            assert!(verified.join().is_ok(), "the other server does not have what was published");
        }
    }
}

fn serve(listener: TcpListener, shared: Arc<Shared>, streams: u32) -> Runtime {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("pubsub")
        .enable_all()
        .build()
        .expect("a runtime for the server");
    listener.set_nonblocking(true).expect("a socket can be non-blocking");
    runtime.spawn(async move {
        let listener = tokio::net::TcpListener::from_std(listener).expect("a listening socket");
        Server::builder()
            .max_concurrent_streams(streams)
            .initial_stream_window_size(16 << 20)
            .initial_connection_window_size(64 << 20)
            .serve_with_incoming(Rpc(shared), TcpIncoming::from(listener).with_nodelay(Some(true)))
            .await
            .expect("the server runs until it is told to stop");
    });
    runtime
}

// ---- what the server knows

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    faults: Mutex<Faults>,
    /// Told of every change of `state` for which somebody may be waiting.
    changed: watch::Sender<()>,
    external: Option<External>,
}

#[derive(Default)]
struct State {
    topics: BTreeMap<String, Topic>,
    subscriptions: BTreeMap<String, Delivery>,
    messages: Vec<Message>,
    requests: Vec<Attempt>,
    /// Counted apart from `messages`, which can be forgotten.
    published: u64,
    /// Nobody may look at a topic.
    topics_are_hidden: bool,
}

type Decide = Box<dyn FnMut(&Attempt) -> Answer + Send>;

#[derive(Default)]
struct Faults {
    next: VecDeque<Answer>,
    decide: Option<Decide>,
    acknowledgements_get_lost: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Not part of the state: a test's closure may look at the server while it decides.
    fn faults(&self) -> MutexGuard<'_, Faults> {
        self.faults.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn notify(&self) {
        self.changed.send_replace(());
    }

    // ---- the publisher's side

    fn create_topic(&self, topic: Topic) -> Result<Topic, Status> {
        check_name(&topic.name, "topics")?;
        let mut state = self.lock();
        if state.topics.contains_key(&topic.name) {
            return Err(already_exists(&topic.name));
        }
        state.topics.insert(topic.name.clone(), topic.clone());
        Ok(topic)
    }

    fn get_topic(&self, name: &str) -> Result<Topic, Status> {
        let state = self.lock();
        if state.topics_are_hidden {
            return Err(Status::permission_denied(format!(
                "User not authorized to perform this action on {name}."
            )));
        }
        state.topics.get(name).cloned().ok_or_else(|| not_found(name))
    }

    fn delete_topic(&self, name: &str) -> Result<(), Status> {
        self.lock().topics.remove(name).map(drop).ok_or_else(|| not_found(name))
    }

    async fn publish(self: Arc<Self>, request: PublishRequest) -> Result<PublishResponse, Status> {
        let attempt = {
            let mut state = self.lock();
            let attempt = Attempt {
                index: state.requests.len(),
                topic: request.topic.clone(),
                ordering_key: request
                    .messages
                    .first()
                    .map(|first| first.ordering_key.clone())
                    .unwrap_or_default(),
                messages: request.messages.len(),
                at: Instant::now(),
            };
            state.requests.push(attempt.clone());
            attempt
        };
        let answer = {
            let mut faults = self.faults();
            match (faults.next.pop_front(), &mut faults.decide) {
                (Some(answer), _) => answer,
                (None, Some(decide)) => decide(&attempt),
                (None, None) => Answer::Store,
            }
        };
        self.notify();
        match answer {
            Answer::Store => self.store(attempt.index, request).await,
            Answer::Refuse(code, message) => Err(Status::new(code, message)),
            Answer::StoreAndFail(code, message) => {
                self.store(attempt.index, request).await?;
                Err(Status::new(code, message))
            }
            Answer::Hang => pending().await,
            Answer::StoreAndHang => {
                self.store(attempt.index, request).await?;
                pending().await
            }
            Answer::Delay(delay) => {
                tokio::time::sleep(delay).await;
                self.store(attempt.index, request).await
            }
        }
    }

    /// In a task of its own: a publisher that gives up must not undo what is half done.
    async fn store(
        self: Arc<Self>,
        index: usize,
        request: PublishRequest,
    ) -> Result<PublishResponse, Status> {
        let storing = tokio::spawn(async move {
            check_publish(&request)?;
            if !self.lock().topics.contains_key(&request.topic) {
                return Err(not_found(&request.topic));
            }
            if let Some(external) = &self.external {
                external.publish(request.clone()).await?;
            }
            self.record(index, request)
        });
        storing.await.expect("storing does not panic")
    }

    fn record(&self, index: usize, request: PublishRequest) -> Result<PublishResponse, Status> {
        let mut state = self.lock();
        let state = &mut *state;
        if !state.topics.contains_key(&request.topic) {
            return Err(not_found(&request.topic));
        }
        let mut message_ids = vec![];
        for message in request.messages {
            state.published += 1;
            let message = Message {
                topic: request.topic.clone(),
                ordering_key: message.ordering_key,
                attributes: message.attributes.into_iter().collect(),
                data: message.data,
                message_id: state.published.to_string(),
                request: index,
                published: SystemTime::now(),
            };
            message_ids.push(message.message_id.clone());
            for delivery in state.subscriptions.values_mut() {
                delivery.offer(&message);
            }
            state.messages.push(message);
        }
        self.notify();
        Ok(PublishResponse { message_ids })
    }

    // ---- the subscriber's side

    fn create_subscription(&self, mut subscription: Subscription) -> Result<Subscription, Status> {
        check_name(&subscription.name, "subscriptions")?;
        match subscription.ack_deadline_seconds {
            0 => subscription.ack_deadline_seconds = 10,
            10..=600 => {}
            seconds => {
                return Err(invalid(format!("ack_deadline_seconds is {seconds}; allowed is 10 to 600")));
            }
        }
        let delivery = Delivery::new(&subscription)?;
        let mut state = self.lock();
        if !state.topics.contains_key(&subscription.topic) {
            return Err(not_found(&subscription.topic));
        }
        if state.subscriptions.contains_key(&subscription.name) {
            return Err(already_exists(&subscription.name));
        }
        state.subscriptions.insert(subscription.name.clone(), delivery);
        Ok(subscription)
    }

    fn with_subscription<T>(&self, name: &str, act: impl FnOnce(&mut Delivery) -> T) -> Result<T, Status> {
        self.lock().subscriptions.get_mut(name).map(act).ok_or_else(|| not_found(name))
    }

    fn delete_subscription(&self, name: &str) -> Result<(), Status> {
        let gone = self.lock().subscriptions.remove(name).map(drop).ok_or_else(|| not_found(name));
        self.notify(); // its streams end
        gone
    }

    fn acknowledge(&self, subscription: &str, ack_ids: &[String]) -> Result<(), Status> {
        if self.faults().acknowledgements_get_lost {
            return Ok(());
        }
        self.with_subscription(subscription, |delivery| delivery.acknowledge(ack_ids))?;
        self.notify();
        Ok(())
    }

    fn modify_ack_deadline(
        &self,
        subscription: &str,
        ack_ids: &[String],
        seconds: i32,
    ) -> Result<(), Status> {
        let Some(seconds) = u64::try_from(seconds).ok().filter(|seconds| *seconds <= 600) else {
            return Err(invalid(format!("ack_deadline_seconds is {seconds}; allowed is 0 to 600")));
        };
        let deadline = Duration::from_secs(seconds);
        self.with_subscription(subscription, |delivery| delivery.modify_deadline(ack_ids, deadline))?;
        self.notify();
        Ok(())
    }

    async fn pull(&self, request: PullRequest) -> Result<PullResponse, Status> {
        let Some(max) = usize::try_from(request.max_messages).ok().filter(|max| *max > 0) else {
            return Err(invalid("max_messages must be positive".into()));
        };
        let consumer = new_consumer();
        let give_up = tokio::time::Instant::now() + PULL_WAIT;
        let mut changed = self.changed.subscribe();
        loop {
            let (received_messages, due) =
                self.with_subscription(&request.subscription, |delivery| delivery.take(consumer, max, None))?;
            #[allow(deprecated)] // Google's still honours it
            let impatient = request.return_immediately;
            if impatient || !received_messages.is_empty() || tokio::time::Instant::now() >= give_up {
                return Ok(PullResponse { received_messages });
            }
            let wake = due.map_or(give_up, |due| give_up.min(due.into()));
            let _ = tokio::time::timeout_at(wake, changed.changed()).await;
        }
    }

    /// The first request names the subscription; later ones acknowledge and extend; messages go out meanwhile.
    async fn streaming_pull(
        self: Arc<Self>,
        mut requests: Streaming<StreamingPullRequest>,
    ) -> Result<Response<ReceiverStream<Result<StreamingPullResponse, Status>>>, Status> {
        let Some(first) = requests.message().await? else {
            return Err(invalid("the stream ended before it named a subscription".into()));
        };
        let subscription = first.subscription.clone();
        let ordered = self.with_subscription(&subscription, |delivery| delivery.ordered())?;
        let (answers, out) = mpsc::channel(4);

        // The client learns that the stream is open only from a first response.
        let properties = SubscriptionProperties {
            exactly_once_delivery_enabled: false,
            message_ordering_enabled: ordered,
        };
        let hello = StreamingPullResponse { subscription_properties: Some(properties), ..Default::default() };
        let _ = answers.send(Ok(hello)).await;

        tokio::spawn(async move {
            let pump = async {
                tokio::select! {
                    ended = self.read_acks(&subscription, &mut requests) => ended,
                    ended = self.deliver(&first, &answers) => ended,
                }
            };
            tokio::select! {
                ended = pump => if let Err(status) = ended {
                    let _ = answers.send(Err(status)).await;
                },
                _ = answers.closed() => {}
            }
        });
        Ok(Response::new(ReceiverStream::new(out)))
    }

    async fn read_acks(
        &self,
        subscription: &str,
        requests: &mut Streaming<StreamingPullRequest>,
    ) -> Result<(), Status> {
        while let Some(request) = requests.message().await? {
            if !request.ack_ids.is_empty() {
                self.acknowledge(subscription, &request.ack_ids)?;
            }
            for (ack_id, seconds) in
                request.modify_deadline_ack_ids.iter().zip(request.modify_deadline_seconds)
            {
                self.modify_ack_deadline(subscription, std::slice::from_ref(ack_id), seconds)?;
            }
        }
        Ok(())
    }

    async fn deliver(
        &self,
        first: &StreamingPullRequest,
        answers: &mpsc::Sender<Result<StreamingPullResponse, Status>>,
    ) -> Result<(), Status> {
        let consumer = new_consumer();
        let limit = usize::try_from(first.max_outstanding_messages).ok().filter(|limit| *limit > 0);
        let lease = u64::try_from(first.stream_ack_deadline_seconds).ok().filter(|seconds| *seconds > 0);
        let mut changed = self.changed.subscribe();
        loop {
            let (received_messages, due) = self.with_subscription(&first.subscription, |delivery| {
                let held = delivery.held_by(consumer);
                let max = limit.unwrap_or(usize::MAX).saturating_sub(held).min(MAX_REQUEST_MESSAGES);
                delivery.take(consumer, max, lease.map(Duration::from_secs))
            })?;
            if received_messages.is_empty() {
                let heartbeat = Instant::now() + HEARTBEAT;
                let wake = due.map_or(heartbeat, |due| due.min(heartbeat));
                if let Ok(told) = tokio::time::timeout_at(wake.into(), changed.changed()).await {
                    told.expect("the server's state outlives its streams");
                    continue;
                }
                if Instant::now() < heartbeat {
                    continue;
                }
            }
            let response = StreamingPullResponse { received_messages, ..Default::default() };
            if answers.send(Ok(response)).await.is_err() {
                return Ok(());
            }
        }
    }
}

/// Tells apart who holds a message. A key's messages go to one of them at a time.
fn new_consumer() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

// ---- what Google refuses

fn check_publish(request: &PublishRequest) -> Result<(), Status> {
    let messages = &request.messages;
    if messages.is_empty() {
        return Err(invalid("the request has no messages".into()));
    }
    if messages.len() > MAX_REQUEST_MESSAGES {
        return Err(invalid(format!("{} messages; the maximum is {MAX_REQUEST_MESSAGES}", messages.len())));
    }
    let size = request.encoded_len();
    if size > MAX_REQUEST_BYTES {
        return Err(invalid(format!("the request has {size} bytes; the maximum is {MAX_REQUEST_BYTES}")));
    }
    if messages.iter().any(|message| message.ordering_key != messages[0].ordering_key) {
        return Err(invalid("all messages of a request must have the same ordering key".into()));
    }
    messages.iter().try_for_each(check_message)
}

fn check_message(message: &PubsubMessage) -> Result<(), Status> {
    if message.data.is_empty() && message.attributes.is_empty() {
        return Err(invalid("a message must have data or at least one attribute".into()));
    }
    if message.ordering_key.len() > MAX_ORDERING_KEY_BYTES {
        return Err(invalid(format!("an ordering key has at most {MAX_ORDERING_KEY_BYTES} bytes")));
    }
    if message.attributes.len() > MAX_ATTRIBUTES {
        return Err(invalid(format!("a message has at most {MAX_ATTRIBUTES} attributes")));
    }
    for (key, value) in &message.attributes {
        if key.is_empty() || key.len() > MAX_ATTRIBUTE_KEY_BYTES {
            return Err(invalid(format!("an attribute's key has 1 to {MAX_ATTRIBUTE_KEY_BYTES} bytes")));
        }
        if key.starts_with("goog") {
            return Err(invalid(format!("the attribute {key} begins with `goog`, which is reserved")));
        }
        if value.len() > MAX_ATTRIBUTE_VALUE_BYTES {
            return Err(invalid(format!("the attribute {key} has over {MAX_ATTRIBUTE_VALUE_BYTES} bytes")));
        }
    }
    Ok(())
}

/// `projects/<project>/<kind>/<name>`, the name as Google wants it.
fn check_name(name: &str, kind: &str) -> Result<(), Status> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.~+%".contains(c);
    let sound = match name.split('/').collect::<Vec<_>>()[..] {
        ["projects", project, found, id] => {
            found == kind
                && !project.is_empty()
                && (3..=255).contains(&id.len())
                && id.starts_with(|c: char| c.is_ascii_alphabetic())
                && id.chars().all(allowed)
                && !id.starts_with("goog")
        }
        _ => false,
    };
    if sound { Ok(()) } else { Err(invalid(format!("not a valid name among {kind}: {name:?}"))) }
}

fn invalid(message: String) -> Status {
    Status::invalid_argument(message)
}

fn not_found(name: &str) -> Status {
    Status::not_found(format!("Resource not found (resource={name})."))
}

fn already_exists(name: &str) -> Status {
    Status::already_exists(format!("Resource already exists (resource={name})."))
}

// ---- gRPC. The crate of message types has clients only, so the paths are matched here.

#[derive(Clone)]
struct Rpc(Arc<Shared>);

impl Service<http::Request<Body>> for Rpc {
    type Response = http::Response<Body>;
    type Error = std::convert::Infallible;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let shared = self.0.clone();
        Box::pin(async move { Ok(route(shared, request).await) })
    }
}

async fn route(shared: Arc<Shared>, request: http::Request<Body>) -> http::Response<Body> {
    let path = request.uri().path().strip_prefix("/google.pubsub.v1.").unwrap_or_default().to_owned();
    match path.as_str() {
        "Publisher/CreateTopic" => {
            unary(request, |topic: Topic| async move { shared.create_topic(topic) }).await
        }
        "Publisher/GetTopic" => {
            unary(request, |get: GetTopicRequest| async move { shared.get_topic(&get.topic) }).await
        }
        "Publisher/DeleteTopic" => {
            unary(request, |delete: DeleteTopicRequest| async move { shared.delete_topic(&delete.topic) })
                .await
        }
        "Publisher/Publish" => {
            unary(request, |publish: PublishRequest| async move { shared.publish(publish).await }).await
        }
        "Subscriber/CreateSubscription" => {
            unary(request, |new: Subscription| async move { shared.create_subscription(new) }).await
        }
        "Subscriber/GetSubscription" => {
            unary(request, |get: GetSubscriptionRequest| async move {
                shared.with_subscription(&get.subscription, |delivery| delivery.settings().clone())
            })
            .await
        }
        "Subscriber/DeleteSubscription" => {
            unary(request, |delete: DeleteSubscriptionRequest| async move {
                shared.delete_subscription(&delete.subscription)
            })
            .await
        }
        "Subscriber/Pull" => unary(request, |pull: PullRequest| async move { shared.pull(pull).await }).await,
        "Subscriber/Acknowledge" => {
            unary(request, |ack: AcknowledgeRequest| async move {
                shared.acknowledge(&ack.subscription, &ack.ack_ids)
            })
            .await
        }
        "Subscriber/ModifyAckDeadline" => {
            unary(request, |modify: ModifyAckDeadlineRequest| async move {
                shared.modify_ack_deadline(&modify.subscription, &modify.ack_ids, modify.ack_deadline_seconds)
            })
            .await
        }
        "Subscriber/StreamingPull" => {
            let codec = ProstCodec::<StreamingPullResponse, StreamingPullRequest>::default();
            Grpc::new(codec).streaming(StreamingPull(shared), request).await
        }
        _ => Status::unimplemented(format!("{} is not served here", request.uri().path())).into_http(),
    }
}

async fn unary<Q, A, Fut>(
    request: http::Request<Body>,
    handler: impl FnOnce(Q) -> Fut,
) -> http::Response<Body>
where
    Q: tonic_prost::prost::Message + Default + 'static,
    A: tonic_prost::prost::Message + Default + 'static,
    Fut: Future<Output = Result<A, Status>>,
{
    Grpc::new(ProstCodec::<A, Q>::default())
        .max_decoding_message_size(MAX_RECEIVED_BYTES)
        .unary(Unary(Some(handler)), request)
        .await
}

/// One call of one handler, in the shape tonic wants.
struct Unary<F>(Option<F>);

impl<F, Fut, Q, A> UnaryService<Q> for Unary<F>
where
    F: FnOnce(Q) -> Fut,
    Fut: Future<Output = Result<A, Status>>,
{
    type Response = A;
    type Future = futures_util::future::MapOk<Fut, fn(A) -> Response<A>>;

    fn call(&mut self, request: Request<Q>) -> Self::Future {
        let handler = self.0.take().expect("tonic calls once");
        futures_util::TryFutureExt::map_ok(handler(request.into_inner()), Response::new)
    }
}

struct StreamingPull(Arc<Shared>);

impl StreamingService<StreamingPullRequest> for StreamingPull {
    type Response = StreamingPullResponse;
    type ResponseStream = ReceiverStream<Result<StreamingPullResponse, Status>>;
    type Future = BoxFuture<Response<Self::ResponseStream>, Status>;

    fn call(&mut self, request: Request<Streaming<StreamingPullRequest>>) -> Self::Future {
        Box::pin(self.0.clone().streaming_pull(request.into_inner()))
    }
}
