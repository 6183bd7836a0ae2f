//! Another server behind ours: whatever `PUBSUB_EMULATOR_HOST` names when the tests are run, Google's pstest for one.
//!
//! Ours stays in front. It injects the faults, keeps the record of what was accepted and in which order, and delivers to
//! subscribers, since pstest delivers without order. But what is published is stored only if the other server takes it, and
//! at the end of a test the other server must deliver exactly that.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use googleapis_tonic_google_pubsub_v1::google::pubsub::v1::publisher_client::PublisherClient;
use googleapis_tonic_google_pubsub_v1::google::pubsub::v1::subscriber_client::SubscriberClient;
use googleapis_tonic_google_pubsub_v1::google::pubsub::v1::{
    AcknowledgeRequest, PublishRequest, PublishResponse, PullRequest, Subscription, Topic,
};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

/// The variable that names the other server, as the official emulator's users know it.
const VARIABLE: &str = "PUBSUB_EMULATOR_HOST";
/// How long the other server may take to deliver what it accepted.
const PATIENCE: Duration = Duration::from_secs(60);

pub struct External {
    endpoint: String,
    /// Makes a test's projects its own: many tests share the server.
    suffix: String,
    topics: tokio::sync::Mutex<BTreeSet<String>>,
    accepted: Mutex<BTreeMap<String, Vec<u8>>>,
    /// Ours was taken down: a message may have been accepted there and never recorded here.
    interrupted: AtomicBool,
}

impl External {
    pub fn from_env() -> Option<External> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let host = std::env::var(VARIABLE).ok().filter(|host| !host.is_empty())?;
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros();
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        Some(External {
            endpoint: format!("http://{host}"),
            suffix: format!("-{time:x}-{}-{number}", std::process::id()),
            topics: Default::default(),
            accepted: Mutex::default(),
            interrupted: AtomicBool::new(false),
        })
    }

    pub fn interrupted(&self) {
        self.interrupted.store(true, Ordering::Relaxed);
    }

    /// A connection for each use: ours may be taken down, and the runtime with it.
    async fn connect(&self) -> Channel {
        let endpoint = Endpoint::from_shared(self.endpoint.clone()).expect("host:port");
        let connected = endpoint.connect().await;
        connected.unwrap_or_else(|_| panic!("{VARIABLE} is set, but nothing answers at {}", self.endpoint))
    }

    /// `projects/p/topics/t` as it is called there.
    fn renamed(&self, name: &str) -> String {
        let mut parts: Vec<String> = name.split('/').map(str::to_owned).collect();
        parts[1].push_str(&self.suffix);
        parts.join("/")
    }

    fn subscription(topic: &str) -> String {
        format!("{}-all", topic.replace("/topics/", "/subscriptions/"))
    }

    pub async fn publish(&self, mut request: PublishRequest) -> Result<PublishResponse, Status> {
        let channel = self.connect().await;
        request.topic = self.renamed(&request.topic);
        self.create_topic(&channel, &request.topic).await;
        let data: Vec<Vec<u8>> = request.messages.iter().map(|message| message.data.clone()).collect();
        let response = client(channel).publish(request).await?.into_inner();
        assert_eq!(response.message_ids.len(), data.len(), "an id for each message");
        let mut accepted = self.accepted.lock().expect("no panic while held");
        accepted.extend(response.message_ids.iter().cloned().zip(data));
        Ok(response)
    }

    /// With a subscription that gets everything.
    async fn create_topic(&self, channel: &Channel, name: &str) {
        let mut topics = self.topics.lock().await;
        if topics.insert(name.to_owned()) {
            let topic = Topic { name: name.to_owned(), ..Default::default() };
            client(channel.clone()).create_topic(topic).await.expect("the topic can be created there");
            let subscription = Subscription {
                name: Self::subscription(name),
                topic: name.to_owned(),
                ack_deadline_seconds: 60,
                ..Default::default()
            };
            let created = SubscriberClient::new(channel.clone()).create_subscription(subscription).await;
            created.expect("the subscription can be created there");
        }
    }

    /// Panics unless the other server delivers what it accepted, each message as it was, and nothing else.
    pub async fn verify(&self) {
        let mut expected = self.accepted.lock().expect("no panic while held").clone();
        let mut client = SubscriberClient::new(self.connect().await).max_decoding_message_size(64 << 20);
        let mut delivered = BTreeSet::new();
        for topic in self.topics.lock().await.iter() {
            let subscription = Self::subscription(topic);
            let began = Instant::now();
            loop {
                let request = PullRequest {
                    subscription: subscription.clone(),
                    max_messages: 1000,
                    ..Default::default()
                };
                #[allow(deprecated)] // otherwise it waits for a message when there are none left
                let request = PullRequest { return_immediately: true, ..request };
                let received = match client.pull(request).await {
                    Ok(response) => response.into_inner().received_messages,
                    Err(status) if status.code() == Code::Unavailable => vec![],
                    Err(status) => panic!("pulling from the other server: {status}"),
                };
                if received.is_empty() && (expected.is_empty() || began.elapsed() > PATIENCE) {
                    break;
                }
                let ack_ids = received.iter().map(|message| message.ack_id.clone()).collect::<Vec<_>>();
                for message in received.into_iter().filter_map(|received| received.message) {
                    let data = expected.remove(&message.message_id);
                    if let Some(data) = data {
                        assert!(data == message.data, "the other server changed a message");
                    } else if !delivered.contains(&message.message_id) {
                        let excused = self.interrupted.load(Ordering::Relaxed);
                        assert!(excused, "the other server has a message that ours did not record");
                    }
                    delivered.insert(message.message_id);
                }
                if !ack_ids.is_empty() {
                    let request = AcknowledgeRequest { subscription: subscription.clone(), ack_ids };
                    client.acknowledge(request).await.expect("acknowledged there");
                }
            }
        }
        assert!(expected.is_empty(), "{} messages are not in the other server", expected.len());
    }
}

fn client(channel: Channel) -> PublisherClient<Channel> {
    PublisherClient::new(channel).max_encoding_message_size(64 << 20)
}
