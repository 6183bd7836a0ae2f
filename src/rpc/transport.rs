//! One round trip to one provider.

use std::sync::Arc;
use std::time::Duration;

use alloy::pubsub::{PubSubConnect, PubSubFrontend, RawSubscription};
use alloy::rpc::json_rpc::{RequestPacket, Response, ResponsePacket, ResponsePayload, SerializedRequest};
use alloy::transports::ws::WsConnect;
use alloy::transports::{RpcError, TransportResult};
use reqwest::header::{CONTENT_TYPE, RETRY_AFTER};
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout_at};

use super::verdict::redact;
use super::wire::Said;
use crate::config::SecretUrl;

/// What is read of one answer at most, in bytes: beyond it the range is too large for anyone's good.
const MAX_BODY: usize = 128 << 20;
/// What is held ready for an answer whose length is told, in bytes, at most: it may be a lie.
const MAX_BODY_AHEAD: u64 = 16 << 20;
/// What is kept of a provider's text, in characters.
const MAX_TEXT: usize = 500;

/// A failed round trip; texts carry no URL.
#[derive(Debug)]
pub(super) struct Failure {
    /// Whether the provider said something, and did not merely fail to answer.
    pub said: bool,
    /// Whether it may be that too much was asked for: no answer in time, or one cut short.
    pub slow: bool,
    pub message: String,
    pub http_status: Option<u16>,
    pub retry_after: Option<Duration>,
}

impl Failure {
    pub(super) fn fault(message: impl std::fmt::Display) -> Self {
        let message = redact(&message.to_string(), MAX_TEXT);
        Self { said: false, slow: false, message, http_status: None, retry_after: None }
    }
}

/// What came back.
pub(super) struct Reply {
    pub packet: ResponsePacket<Said>,
    pub http_status: Option<u16>,
    pub retry_after: Option<Duration>,
}

/// How to reach a provider.
pub(super) enum Transport {
    Http { client: reqwest::Client, url: SecretUrl },
    WebSocket(WebSocket),
}

impl Transport {
    /// `timeout` bounds every round trip.
    pub fn new(url: &SecretUrl, timeout: Duration) -> Result<Self, reqwest::Error> {
        if matches!(url.expose().scheme(), "ws" | "wss") {
            return Ok(Self::WebSocket(WebSocket {
                url: url.clone(),
                connection: Mutex::new(None),
                timeout,
            }));
        }
        let client = reqwest::Client::builder()
            .timeout(timeout)
            .connect_timeout(timeout.min(Duration::from_secs(10)))
            .user_agent(concat!("relayer/", env!("CARGO_PKG_VERSION")))
            .build()?;
        Ok(Self::Http { client, url: url.clone() })
    }

    pub fn is_web_socket(&self) -> bool {
        matches!(self, Self::WebSocket(_))
    }

    /// Makes a subscription; only a web socket can.
    pub async fn subscribe(&self, request: SerializedRequest) -> Result<RawSubscription, Failure> {
        match self {
            Self::WebSocket(socket) => {
                socket.exchange(async |frontend| subscribe(&frontend, request).await).await
            }
            Self::Http { .. } => Err(Failure::fault("no web socket")),
        }
    }

    pub async fn round_trip(&self, packet: RequestPacket) -> Result<Reply, Failure> {
        match self {
            Self::Http { client, url } => http(client, url, &packet).await,
            Self::WebSocket(socket) => {
                let packet = socket.exchange(async |frontend| frontend.send_packet(packet).await).await?;
                Ok(Reply { packet: as_said(packet), http_status: None, retry_after: None })
            }
        }
    }
}

async fn http(client: &reqwest::Client, url: &SecretUrl, packet: &RequestPacket) -> Result<Reply, Failure> {
    let body = serde_json::to_vec(packet).expect("a request is plain JSON");
    let request = client.post(url.expose().clone()).header(CONTENT_TYPE, "application/json").body(body);
    let mut response = request.send().await.map_err(connection_failure)?;
    let status = response.status();
    let retry_after = response
        .headers()
        .get(RETRY_AFTER)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.trim().parse().ok())
        .map(Duration::from_secs);
    let failure = |said: bool, message: String| Failure {
        said,
        slow: !said,
        message,
        http_status: Some(status.as_u16()),
        retry_after,
    };
    // Grown step by step a large one would be copied again and again.
    let said = response.content_length().unwrap_or(0).min(MAX_BODY_AHEAD);
    let mut bytes = Vec::with_capacity(said as usize);
    while let Some(chunk) = response.chunk().await.map_err(cut_short)? {
        if bytes.len() + chunk.len() > MAX_BODY {
            return Err(failure(true, "response too large".to_owned()));
        }
        bytes.extend_from_slice(&chunk);
    }
    match read_packet(&bytes) {
        Ok(packet) => {
            Ok(Reply { packet, http_status: (!status.is_success()).then(|| status.as_u16()), retry_after })
        }
        Err(_) if !status.is_success() => {
            let text = redact(&String::from_utf8_lossy(&bytes), MAX_TEXT);
            Err(failure(true, format!("HTTP {status}: {text}")))
        }
        // An error in a shape of its own, for all that was asked.
        Err(_) if let Some(message) = refusal_in(&bytes) => Err(failure(true, redact(&message, MAX_TEXT))),
        Err(error) => {
            Err(failure(false, format!("the body is not a JSON-RPC answer ({} bytes): {error}", bytes.len())))
        }
    }
}

/// Reads an answer once; a second time if it is of another shape than most, so that each call has what was said to it.
fn read_packet(bytes: &[u8]) -> Result<ResponsePacket<Said>, serde_json::Error> {
    // It is looked at whole: text by text takes longer.
    let text = std::str::from_utf8(bytes).map_err(serde::de::Error::custom)?;
    serde_json::from_str(text).or_else(|_| serde_json::from_str(text).map(as_said))
}

fn as_said(packet: ResponsePacket) -> ResponsePacket<Said> {
    let said = |response: Response| Response {
        id: response.id,
        payload: match response.payload {
            ResponsePayload::Success(raw) => ResponsePayload::Success(Said::Raw(raw)),
            ResponsePayload::Failure(failure) => ResponsePayload::Failure(failure),
        },
    };
    match packet {
        ResponsePacket::Single(response) => ResponsePacket::Single(said(response)),
        ResponsePacket::Batch(responses) => ResponsePacket::Batch(responses.into_iter().map(said).collect()),
    }
}

/// What a JSON object says with its `error`, which is not one of JSON-RPC.
fn refusal_in(bytes: &[u8]) -> Option<String> {
    let object: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(bytes).ok()?;
    let error = object.get("error").filter(|error| !error.is_null())?;
    let message = error.get("message").unwrap_or(error);
    Some(message.as_str().map_or_else(|| message.to_string(), str::to_owned))
}

/// The innermost cause says what happened; the URL is taken out: it carries keys.
fn connection_failure(error: reqwest::Error) -> Failure {
    let timed_out = error.is_timeout();
    let error = error.without_url();
    let mut cause: &dyn std::error::Error = &error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    let what = if timed_out { "no answer in time".to_owned() } else { cause.to_string() };
    Failure { slow: timed_out, ..Failure::fault(format_args!("connection failed: {what}")) }
}

fn cut_short(error: reqwest::Error) -> Failure {
    Failure { slow: true, ..connection_failure(error) }
}

/// Connected when first used, and again after it broke.
pub(super) struct WebSocket {
    url: SecretUrl,
    connection: Mutex<Option<Arc<PubSubFrontend>>>,
    timeout: Duration,
}

impl WebSocket {
    /// Exchanges something over the connection. One that fails is not used again.
    async fn exchange<T>(
        &self,
        exchange: impl AsyncFnOnce(Arc<PubSubFrontend>) -> TransportResult<T>,
    ) -> Result<T, Failure> {
        let deadline = Instant::now() + self.timeout;
        let late =
            || Failure { slow: true, ..Failure::fault(format_args!("no answer within {:?}", self.timeout)) };
        let frontend = timeout_at(deadline, self.connected()).await.map_err(|_| late())??;
        let failure = match timeout_at(deadline, exchange(Arc::clone(&frontend))).await {
            Ok(Ok(exchanged)) => return Ok(exchanged),
            Ok(Err(error @ RpcError::ErrorResp(_))) => return Err(Failure::fault(error)),
            // Perhaps the answer was too large for a message.
            Ok(Err(error)) => Failure { slow: true, ..Failure::fault(error) },
            Err(_) => late(),
        };
        // Not the one that another exchange may have made since.
        self.connection.lock().await.take_if(|current| Arc::ptr_eq(current, &frontend));
        Err(failure)
    }

    /// The connection, made if there is none.
    async fn connected(&self) -> Result<Arc<PubSubFrontend>, Failure> {
        let mut slot = self.connection.lock().await;
        if let Some(frontend) = &*slot {
            return Ok(Arc::clone(frontend));
        }
        let connect = WsConnect::new(self.url.expose().as_str()).with_max_retries(0);
        let frontend = connect.into_service().await.map_err(Failure::fault)?;
        Ok(Arc::clone(slot.insert(Arc::new(frontend))))
    }
}

async fn subscribe(
    frontend: &PubSubFrontend,
    request: SerializedRequest,
) -> TransportResult<RawSubscription> {
    match frontend.send(request).await?.payload {
        ResponsePayload::Success(id) => {
            let id = serde_json::from_str(id.get()).map_err(|error| RpcError::deser_err(error, id.get()))?;
            frontend.get_subscription(id).await
        }
        ResponsePayload::Failure(failure) => Err(RpcError::ErrorResp(failure)),
    }
}
