//! A Pub/Sub server that costs next to nothing: it counts the messages of a publish request without looking into them,
//! and gives each an id. It has threads of its own. One that is far away answers later, and allows as many requests on a
//! connection as Google's.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use googleapis_tonic_google_pubsub_v1::google::pubsub::v1::PublishResponse;
use tokio::runtime::Runtime;
use tonic::body::Body;
use tonic::codegen::{BoxFuture, Service, http};
use tonic::server::{Grpc, UnaryService};
use tonic::transport::{Server, server::TcpIncoming};
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;
use tonic_prost::prost::encoding::{DecodeContext, WireType, skip_field};
use tonic_prost::prost::{DecodeError, Message, bytes::Buf, bytes::BufMut};

/// The server.
pub struct Broker {
    address: SocketAddr,
    counted: Arc<Counted>,
    runtime: Option<Runtime>,
}

#[derive(Default)]
struct Counted {
    requests: AtomicUsize,
    messages: AtomicUsize,
}

impl Broker {
    /// One that answers at once, however many requests there are.
    pub fn start() -> Broker {
        Broker::serve(Duration::ZERO, 100_000)
    }

    /// One that answers after this long.
    pub fn far(away: Duration) -> Broker {
        Broker::serve(away, 100)
    }

    fn serve(away: Duration, streams: u32) -> Broker {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("broker")
            .enable_all()
            .build()
            .expect("a runtime for the server");
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("there is a free port");
        let address = listener.local_addr().expect("it has an address");
        listener.set_nonblocking(true).expect("a socket can be non-blocking");
        let counted = Arc::new(Counted::default());
        let serving = Topic { counted: Arc::clone(&counted), away };
        runtime.spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener).expect("a listening socket");
            Server::builder()
                .max_concurrent_streams(streams)
                .initial_stream_window_size(16 << 20)
                .initial_connection_window_size(64 << 20)
                .serve_with_incoming(serving, TcpIncoming::from(listener).with_nodelay(Some(true)))
                .await
                .expect("the server runs until it is told to stop");
        });
        Broker { address, counted, runtime: Some(runtime) }
    }

    /// `127.0.0.1:port`
    pub fn endpoint(&self) -> String {
        self.address.to_string()
    }

    /// `http://127.0.0.1:port`
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Requests and messages since the last time.
    pub fn take_counts(&self) -> (usize, usize) {
        let take = |counter: &AtomicUsize| counter.swap(0, Ordering::Relaxed);
        (take(&self.counted.requests), take(&self.counted.messages))
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        self.runtime.take().expect("taken only here").shutdown_background();
    }
}

/// A publish request of which only the number of messages is read.
#[derive(Debug, Default)]
struct Skimmed {
    messages: usize,
}

impl Message for Skimmed {
    fn encode_raw(&self, _: &mut impl BufMut) {}

    fn merge_field(
        &mut self,
        tag: u32,
        wire_type: WireType,
        buf: &mut impl Buf,
        ctx: DecodeContext,
    ) -> Result<(), DecodeError> {
        const MESSAGES: u32 = 2;
        self.messages += usize::from(tag == MESSAGES);
        skip_field(wire_type, tag, buf, ctx)
    }

    fn encoded_len(&self) -> usize {
        0
    }

    fn clear(&mut self) {
        self.messages = 0;
    }
}

#[derive(Clone)]
struct Topic {
    counted: Arc<Counted>,
    away: Duration,
}

impl Service<http::Request<Body>> for Topic {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let topic = self.clone();
        Box::pin(async move {
            Ok(match request.uri().path() {
                "/google.pubsub.v1.Publisher/Publish" => {
                    let codec = ProstCodec::<PublishResponse, Skimmed>::default();
                    Grpc::new(codec).max_decoding_message_size(64 << 20).unary(topic, request).await
                }
                path => Status::unimplemented(format!("{path} is not served here")).into_http(),
            })
        })
    }
}

impl UnaryService<Skimmed> for Topic {
    type Response = PublishResponse;
    type Future = BoxFuture<Response<PublishResponse>, Status>;

    fn call(&mut self, request: Request<Skimmed>) -> Self::Future {
        let count = request.get_ref().messages;
        self.counted.requests.fetch_add(1, Ordering::Relaxed);
        let first = self.counted.messages.fetch_add(count, Ordering::Relaxed);
        let message_ids = (first..first + count).map(|id| id.to_string()).collect();
        let away = self.away;
        Box::pin(async move {
            if !away.is_zero() {
                tokio::time::sleep(away).await;
            }
            Ok(Response::new(PublishResponse { message_ids }))
        })
    }
}
