//! Google Pub/Sub through the official crate.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use google_cloud_auth::credentials::anonymous;
use google_cloud_gax::error::rpc::Code;
use google_cloud_gax::retry_policy::RetryPolicy;
use google_cloud_gax::retry_result::RetryResult;
use google_cloud_gax::retry_state::RetryState;
use google_cloud_pubsub::client::{BasePublisher, Publisher};
use google_cloud_pubsub::error::PublishError;
use google_cloud_pubsub::model;
use tracing::debug;

use super::SetupError;
use crate::config::{self, SinkKind};
use crate::publish::{Message, Receipt, Sink, SinkError};

/// How long the library gathers messages into one request, where it cannot know that it has all of them.
const GATHER: Duration = Duration::from_millis(1);
/// The same where it sends when it has so many as there are: a shorter time would part them when the machine is busy.
const WHOLE: Duration = Duration::from_secs(1);
const REQUEST_MESSAGES: u32 = 1000;
/// Bytes of a request: servers built on gRPC's default refuse more than 4 MB.
const REQUEST_BYTES: u32 = 3_000_000;
/// What Pub/Sub takes at most, in bytes: a request with its framing, so a message a little less.
const MESSAGE_BYTES: usize = 10_000_000 - 10_000;
/// Requests under way on one connection, at most: as many as Google's server allows, and the library.
const STREAMS: usize = 100;
/// A server that answers within this has room for so many: twenty thousand runs a second, more than are ever made.
const NEAR: Duration = Duration::from_millis(5);

/// How clients are used, and when one is replaced.
struct Use {
    connections: usize,
    /// After so many runs that failed in a row, whatever the reason: its credentials may have failed for good.
    failures: u32,
    /// After so long without use.
    unused: Duration,
}

/// One connection, which what comes now and then keeps in use.
const STEADY: Use = Use { connections: 1, failures: 4, unused: Duration::MAX };
/// More of them, for what would wait on that one; without need they only cost, as each sends less at a time. After a while
/// without use they may be forgotten on the way without a word, and each would cost a run its time. After an outage each says
/// once that it could not be made, whether or not it can be then.
const FLOOD: Use = Use { connections: 4, failures: 1, unused: Duration::from_secs(60) };

/// Publishes to a topic. The library makes one attempt, bounded by `sink.timeout` from when it is connected; every retry is
/// the publisher's.
pub struct GooglePubSub {
    steady: Clients,
    flood: Clients,
    under_way: AtomicUsize,
}

/// A client of the library, and another one when that is bad.
struct Clients {
    endpoint: Option<String>,
    emulator: bool,
    timeout: Duration,
    topic: String,
    usage: Use,
    client: Mutex<Client>,
}

/// The library's client.
struct Client {
    base: BasePublisher,
    /// Gathers messages that have no ordering key into one request, of whatever lane they are.
    gathering: Publisher,
    record: Arc<Record>,
    used: Instant,
}

/// How a client does.
#[derive(Default)]
struct Record {
    /// Runs in a row that could not be published.
    failures: AtomicU32,
    /// Something was: it is connected, and its credentials are good.
    has_published: AtomicBool,
    /// Later a run was not answered in time: one of its connections may be dead without a word, which nothing in the library
    /// notices.
    was_unanswered: AtomicBool,
    /// Somebody makes another one.
    is_replaced: AtomicBool,
    /// The fastest answer so far.
    fastest: Mutex<Option<Duration>>,
}

impl Record {
    fn succeeded(&self, took: Duration) {
        self.failures.store(0, Ordering::Relaxed);
        self.has_published.store(true, Ordering::Relaxed);
        let mut fastest = lock(&self.fastest);
        *fastest = Some(fastest.map_or(took, |fastest| fastest.min(took)));
    }

    fn failed(&self, error: &PublishError, failure: &SinkError) {
        match failure {
            SinkError::Unavailable(_) => self.failures.fetch_add(1, Ordering::Relaxed),
            // The server answered.
            SinkError::Refused(_) | SinkError::Closed(_) => self.failures.swap(0, Ordering::Relaxed),
        };
        let unanswered = matches!(error, PublishError::Rpc(rpc) if rpc.is_timeout());
        // One that is still connecting, or waits for its first token, would begin anew for ever.
        if unanswered && self.has_published.load(Ordering::Relaxed) {
            self.was_unanswered.store(true, Ordering::Relaxed);
        }
    }

    fn is_bad(&self, failures: u32) -> bool {
        self.was_unanswered.load(Ordering::Relaxed) || self.failures.load(Ordering::Relaxed) >= failures
    }
}

impl GooglePubSub {
    /// For the configured topic; it connects when it first publishes.
    pub async fn open(config: &config::Sink) -> Result<Self, SetupError> {
        let (steady, flood) = (Clients::open(config, STEADY).await?, Clients::open(config, FLOOD).await?);
        Ok(Self { steady, flood, under_way: AtomicUsize::new(0) })
    }

    /// Who publishes a run that begins while so many are under way.
    async fn clients(&self, under_way: usize) -> &Clients {
        if under_way >= STREAMS && !self.steady.is_near() && self.flood.replace_bad_client().await {
            return &self.flood;
        }
        self.steady.replace_bad_client().await;
        &self.steady
    }
}

impl Clients {
    async fn open(config: &config::Sink, usage: Use) -> Result<Self, SetupError> {
        let SinkKind::Pubsub { project, topic, endpoint, emulator } = &config.kind else {
            return Err(SetupError::PubSub("sink.kind is not \"pubsub\"".into()));
        };
        let (endpoint, timeout) = (endpoint.clone(), config.timeout);
        let base = client(endpoint.as_deref(), *emulator, timeout, usage.connections).await?;
        let topic = topic_name(project, topic);
        let client = Mutex::new(Client::new(base, &topic, Arc::default()));
        Ok(Self { endpoint, emulator: *emulator, timeout, topic, usage, client })
    }

    /// Whether the server is so near that one connection takes whatever there is.
    fn is_near(&self) -> bool {
        lock(&lock(&self.client).record.fastest).is_some_and(|fastest| fastest <= NEAR)
    }

    /// Makes another client, with connections of its own, where this one is bad. What is under way in it keeps it until it is
    /// done. `false`: it is bad, and another run is making the new one.
    async fn replace_bad_client(&self) -> bool {
        let (record, used) = {
            let client = lock(&self.client);
            (Arc::clone(&client.record), client.used)
        };
        if used.elapsed() <= self.usage.unused && !record.is_bad(self.usage.failures) {
            return true;
        }
        if record.is_replaced.swap(true, Ordering::Relaxed) {
            return false;
        }
        let made = client(self.endpoint.as_deref(), self.emulator, self.timeout, self.usage.connections);
        let base = match made.await {
            Ok(base) => base,
            Err(error) => {
                debug!(%error, "No other Pub/Sub client can be made: going on with this one");
                lock(&self.client).base.clone()
            }
        };
        *lock(&self.client) = Client::new(base, &self.topic, Arc::default());
        true
    }

    /// Who publishes a run.
    ///
    /// With a key each run has a publisher of its own: it sends when it has the whole run, and nothing of a run before, least
    /// of all that its key is paused, is left in it. A lane has one run under way at a time, so a key never lives in two of
    /// them at once. Kept, the library would have a task for every key it has ever seen, 14 KB each.
    fn publisher_for(&self, run: &[Arc<Message>]) -> (Publisher, Arc<Record>) {
        let mut client = lock(&self.client);
        client.used = Instant::now();
        let bytes: usize = run.iter().map(|message| message.size()).sum();
        let publisher = match run {
            // What comes alone must not wait for company.
            [first, _, ..] if first.ordering_key.is_empty() => client.gathering.clone(),
            _ if bytes < REQUEST_BYTES as usize - self.topic.len() => {
                publisher(&client.base, &self.topic, run.len() as u32, WHOLE)
            }
            _ => publisher(&client.base, &self.topic, REQUEST_MESSAGES, GATHER),
        };
        (publisher, Arc::clone(&client.record))
    }

    /// The publisher that gathers has ended: the next run gets a new one.
    fn renew(&self) {
        let mut client = lock(&self.client);
        *client = Client::new(client.base.clone(), &self.topic, Arc::clone(&client.record));
    }
}

impl Client {
    fn new(base: BasePublisher, topic: &str, record: Arc<Record>) -> Self {
        let gathering = publisher(&base, topic, REQUEST_MESSAGES, GATHER);
        Self { base, gathering, record, used: Instant::now() }
    }
}

/// Sends when it has so many messages, or a request is full, or has gathered long enough.
fn publisher(base: &BasePublisher, topic: &str, messages: u32, gather: Duration) -> Publisher {
    let builder = base.publisher(topic).set_message_count_threshold(messages);
    builder.set_byte_threshold(REQUEST_BYTES).set_delay_threshold(gather).build()
}

async fn client(
    endpoint: Option<&str>,
    emulator: bool,
    timeout: Duration,
    connections: usize,
) -> Result<BasePublisher, SetupError> {
    let builder = BasePublisher::builder().with_grpc_subchannel_count(connections);
    let mut builder = builder.with_retry_policy(OneAttempt { timeout });
    if let Some(endpoint) = endpoint {
        builder = builder.with_endpoint(endpoint);
    }
    if emulator {
        builder = builder.with_credentials(anonymous::Builder::new().build());
    }
    builder.build().await.map_err(|error| SetupError::PubSub(error.to_string()))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no code that panics runs under this lock")
}

/// The topic's full name; a full name is taken as it is.
pub(crate) fn topic_name(project: &str, topic: &str) -> String {
    if topic.starts_with("projects/") {
        topic.to_owned()
    } else {
        format!("projects/{project}/topics/{topic}")
    }
}

impl Sink for GooglePubSub {
    async fn publish(&self, run: Vec<Arc<Message>>) -> Receipt {
        let fitting = run.iter().take_while(|message| message.size() <= MESSAGE_BYTES).count();
        if fitting == 0 {
            let size = run.first().map_or(0, |message| message.size());
            let reason = format!("the message has {size} bytes, Pub/Sub takes {MESSAGE_BYTES}");
            return Receipt { acknowledged: 0, failure: Some(SinkError::Refused(reason)) };
        }
        let under_way = UnderWay::one_more(&self.under_way);
        let clients = self.clients(under_way.before).await;
        let (publisher, record) = clients.publisher_for(&run[..fitting]);
        let sent = run[..fitting].iter().map(|message| publisher.publish(wire(message)));
        let began = Instant::now();
        // All of them: nothing may be under way when the run is tried again.
        let results = join_all(sent).await;
        let acknowledged = results.iter().take_while(|result| result.is_ok()).count();
        let Some(error) = results.into_iter().find_map(Result::err) else {
            record.succeeded(began.elapsed());
            return Receipt { acknowledged, failure: None };
        };
        if matches!(error, PublishError::Shutdown) {
            clients.renew();
        }
        let failure = judge(&error);
        record.failed(&error, &failure);
        Receipt { acknowledged, failure: Some(failure) }
    }

    fn is_sequential(&self) -> bool {
        false
    }

    fn name(&self) -> &'static str {
        "Pub/Sub"
    }
}

/// A run that is under way, until it is dropped.
struct UnderWay<'a> {
    all: &'a AtomicUsize,
    /// How many were when it began.
    before: usize,
}

impl<'a> UnderWay<'a> {
    fn one_more(all: &'a AtomicUsize) -> Self {
        Self { all, before: all.fetch_add(1, Ordering::Relaxed) }
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.all.fetch_sub(1, Ordering::Relaxed);
    }
}

fn wire(message: &Message) -> model::Message {
    model::Message::new()
        .set_data(message.data.clone())
        .set_ordering_key(message.ordering_key.clone())
        .set_attributes(message.attributes.iter().map(|(name, value)| (*name, value.clone())))
}

/// Only what the server says of the message itself blocks a lane; everything else may pass.
fn judge(error: &PublishError) -> SinkError {
    let PublishError::Rpc(rpc) = error else {
        return SinkError::Unavailable(error.to_string());
    };
    match rpc.status() {
        Some(status) if matches!(status.code, Code::InvalidArgument | Code::OutOfRange) => {
            SinkError::Refused(format!("{}: {}", status.code, status.message))
        }
        Some(status) => SinkError::Unavailable(format!("{}: {}", status.code, status.message)),
        None => SinkError::Unavailable(rpc.to_string()),
    }
}

/// One attempt, bounded: the library has no limit for a server that accepts and never answers, and repeats what
/// fails without telling.
#[derive(Debug)]
struct OneAttempt {
    timeout: Duration,
}

impl RetryPolicy for OneAttempt {
    fn on_error(&self, _state: &RetryState, error: google_cloud_gax::error::Error) -> RetryResult {
        RetryResult::Permanent(error)
    }

    fn remaining_time(&self, state: &RetryState) -> Option<Duration> {
        let elapsed = tokio::time::Instant::now().into_std().saturating_duration_since(state.start);
        Some(self.timeout.saturating_sub(elapsed))
    }
}

/// What can be said of a topic without sending anything to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Topic {
    /// It is there.
    There(String),
    /// This account may not look at it, which publishing does not need.
    Hidden(String),
}

/// Looks whether the topic is there, without sending anything to it. `Err`: what to do.
pub async fn find_topic(config: &config::Sink) -> Result<Topic, String> {
    let SinkKind::Pubsub { project, topic, endpoint, emulator } = &config.kind else {
        return Err("sink.kind is not \"pubsub\"".into());
    };
    let topic = topic_name(project, topic);
    let found: std::pin::Pin<Box<dyn Future<Output = Result<Topic, String>> + Send>> = match endpoint {
        Some(endpoint) if *emulator => Box::pin(emulated_topic(endpoint, &topic)),
        _ => Box::pin(admin_topic(endpoint.as_deref(), &topic)),
    };
    match tokio::time::timeout(config.timeout, found).await {
        Ok(found) => found,
        Err(_) => Err(format!("no answer within {:?}", config.timeout)),
    }
}

/// Emulators speak gRPC; not all of them speak the REST of the library's admin client.
async fn emulated_topic(endpoint: &str, topic: &str) -> Result<Topic, String> {
    use googleapis_tonic_google_pubsub_v1::google::pubsub::v1::GetTopicRequest;
    use googleapis_tonic_google_pubsub_v1::google::pubsub::v1::publisher_client::PublisherClient;

    let channel =
        tonic::transport::Endpoint::from_shared(endpoint.to_owned()).map_err(|error| error.to_string())?;
    let channel = channel.connect().await.map_err(|_| format!("nothing answers at {endpoint}"))?;
    let request = GetTopicRequest { topic: topic.to_owned() };
    match PublisherClient::new(channel).get_topic(request).await {
        Ok(_) => Ok(Topic::There(format!("{topic} is there"))),
        Err(status) if status.code() == tonic::Code::NotFound => {
            Err(format!("{topic} does not exist: create it"))
        }
        Err(status) if status.code() == tonic::Code::PermissionDenied => Ok(hidden(topic)),
        Err(status) => Err(format!("{topic}: {}", status.message())),
    }
}

/// Publishing needs another permission than looking.
fn hidden(topic: &str) -> Topic {
    Topic::Hidden(format!(
        "{topic}: this account may not look at it, so only the first message will show whether it is there; publishing needs \
         roles/pubsub.publisher alone, this check roles/pubsub.viewer"
    ))
}

async fn admin_topic(endpoint: Option<&str>, topic: &str) -> Result<Topic, String> {
    let mut admin = google_cloud_pubsub::client::TopicAdmin::builder();
    if let Some(endpoint) = endpoint {
        admin = admin.with_endpoint(endpoint);
    }
    let admin = admin.build().await.map_err(|error| error.to_string())?;
    match admin.get_topic().set_topic(topic).send().await {
        Ok(_) => Ok(Topic::There(format!("{topic} is there"))),
        Err(error) => match error.status().map(|status| status.code) {
            Some(Code::NotFound) => {
                Err(format!("{topic} does not exist: create it with `gcloud pubsub topics create {topic}`"))
            }
            Some(Code::PermissionDenied) => Ok(hidden(topic)),
            _ => Err(format!("{topic}: {error}")),
        },
    }
}
