//! JSON-RPC: many calls in one round trip, paced, retried and failed over.
//!
//! Faults and rate limits end here: one that begins is said once, and so is its end. In an outage one attempt at
//! a time is made, with growing, jittered pauses. What passes upwards changes the plan: see [`Refused`].

mod gate;
#[cfg(test)]
mod tests;
mod transport;
pub mod verdict;
mod wire;

use std::collections::HashSet;
use std::num::NonZeroU32;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use alloy::rpc::json_rpc::{Id, RequestPacket, ResponsePacket, ResponsePayload};
use futures_util::future::try_join_all;
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use serde_json::value::RawValue;
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tracing::{debug, error, warn};

use crate::config::{self, SecretUrl};
use crate::event::BlockRange;
use crate::scan::{Answer, Call, Chain, Refused};
use gate::Gate;
use transport::{Failure, Transport};
use verdict::{Asked, Refusal, Verdict, classify, redact};

/// What is logged of a provider's text, in characters.
const MAX_TEXT: usize = 500;
/// How long a provider that failed is left alone while another answers.
const STAY_AWAY: Duration = Duration::from_secs(60);
/// Unknown refusals logged in full, at most.
const UNKNOWN_TEXTS: usize = 100;
/// The id of the `eth_chainId` that rides with the first calls to a provider.
const CHAIN_ID: u64 = 0;

/// All configured providers of one chain.
pub struct Rpc {
    chain_id: u64,
    providers: Vec<Provider>,
    /// The provider in use.
    current: AtomicUsize,
    limiter: DefaultDirectRateLimiter,
    burst: NonZeroU32,
    requests: Semaphore,
    max_batch: usize,
    gate: Gate,
    /// When another provider was turned to.
    switched: Mutex<Instant>,
    /// Texts already logged in full.
    never_seen: Mutex<HashSet<String>>,
}

struct Provider {
    url: SecretUrl,
    transport: Transport,
    /// It answered with the right chain id.
    verified: AtomicBool,
    /// Calls it takes in one request, as learnt.
    batch: AtomicUsize,
}

/// One call's answer, or why there is none.
type Outcome = Result<Answer, Refusing>;

/// A verdict with the text it was read from.
#[derive(Debug)]
pub struct Refusing {
    /// What to do.
    pub verdict: Verdict,
    /// What the provider said, without URLs.
    pub message: String,
}

/// What came of one request.
enum Attempt {
    /// Per call, in their order.
    Outcomes(Vec<Outcome>),
    /// The provider is on this chain instead.
    WrongChain(u64),
}

impl Rpc {
    /// Connects to nothing yet.
    pub fn new(chain_id: u64, config: &config::Rpc) -> Result<Self, reqwest::Error> {
        let providers = config.urls.iter().map(|url| {
            Ok(Provider {
                url: url.clone(),
                transport: Transport::new(url, config.timeout)?,
                verified: AtomicBool::new(false),
                batch: AtomicUsize::new(config.max_batch.get()),
            })
        });
        let quota = Quota::per_second(config.requests_per_second).allow_burst(config.burst);
        Ok(Self {
            chain_id,
            providers: providers.collect::<Result<_, reqwest::Error>>()?,
            current: AtomicUsize::new(0),
            limiter: RateLimiter::direct(quota),
            burst: config.burst,
            requests: Semaphore::new(config.max_concurrent.get()),
            max_batch: config.max_batch.get(),
            gate: Gate::default(),
            switched: Mutex::new(Instant::now()),
            never_seen: Mutex::default(),
        })
    }

    /// The providers' URLs, the preferred first.
    pub fn providers(&self) -> impl Iterator<Item = &SecretUrl> {
        self.providers.iter().map(|provider| &provider.url)
    }

    /// Asks one provider once, without retrying: how a check looks at it.
    pub async fn try_once(&self, provider: usize, calls: &[Call]) -> Result<Vec<Outcome>, Refused> {
        match self.attempt(&self.providers[provider], calls).await {
            Attempt::Outcomes(outcomes) => Ok(outcomes),
            Attempt::WrongChain(found) => Err(Refused::WrongChain { expected: self.chain_id, found }),
        }
    }

    /// Asks until every call is answered or one is refused in a way that waiting does not mend.
    async fn ask_batch(&self, calls: &[Call]) -> Result<Vec<Answer>, Refused> {
        let mut answers: Vec<Option<Answer>> = vec![None; calls.len()];
        loop {
            let mut pending: Vec<usize> =
                (0..calls.len()).filter(|index| answers[*index].is_none()).collect();
            if pending.is_empty() {
                return Ok(answers.into_iter().flatten().collect());
            }
            let current = self.current.load(Ordering::Relaxed);
            let provider = &self.providers[current];
            pending.truncate(provider.batch.load(Ordering::Relaxed).max(1));
            let asked: Vec<Call> = pending.iter().map(|index| calls[*index].clone()).collect();
            let probe = self.gate.enter().await;
            let outcomes = match self.attempt(provider, &asked).await {
                Attempt::Outcomes(outcomes) => outcomes,
                Attempt::WrongChain(found) => {
                    self.give_up(current, found)?;
                    continue;
                }
            };
            let mut fault = None;
            for (outcome, index) in outcomes.into_iter().zip(&pending) {
                match outcome.map_err(|refusing| self.judge(provider, refusing, asked.len())) {
                    Ok(answer) => answers[*index] = Some(answer),
                    Err(Ok(wait)) => fault = Some(wait),
                    Err(Err(refused)) => {
                        self.gate.succeeded();
                        return Err(refused);
                    }
                }
            }
            match fault {
                None => {
                    self.gate.succeeded();
                    self.prefer_first();
                }
                Some((hint, message)) => {
                    self.gate.failed(&provider.url, &message, hint);
                    self.use_provider(current + 1);
                }
            }
            drop(probe);
        }
    }

    /// `Ok`: wait (that long, if it says) and ask again. `Err`: the plan must change.
    fn judge(
        &self,
        provider: &Provider,
        refusing: Refusing,
        batch: usize,
    ) -> Result<(Option<Duration>, String), Refused> {
        let Refusing { verdict, message } = refusing;
        debug!(provider = %provider.url, ?verdict, %message, "A call was refused");
        match verdict {
            Verdict::Wait { hint } => Ok((hint, message)),
            Verdict::Fault => Ok((None, message)),
            Verdict::SmallerBatch => {
                provider.batch.store((batch / 2).max(1), Ordering::Relaxed);
                Ok((None, message))
            }
            Verdict::CapRange(blocks) => Err(Refused::Cap(blocks)),
            Verdict::UseRange { from, to } => match BlockRange::new(from, to) {
                Some(range) => Err(Refused::Use(range)),
                None => Err(Refused::Halve(message)),
            },
            Verdict::Halve => Err(Refused::Halve(message)),
            Verdict::FewerAddresses => Err(Refused::FewerAddresses(message)),
            Verdict::Behind => Err(Refused::Behind(message)),
            Verdict::Unsupported => Err(Refused::Unsupported(message)),
            Verdict::HistoryGone => Err(Refused::HistoryGone(message)),
            Verdict::UnknownTag => Err(Refused::UnknownTag(message)),
            Verdict::Unknown => {
                let mut seen = self.never_seen.lock().expect("no code that panics runs under this lock");
                if seen.len() < UNKNOWN_TEXTS && seen.insert(message.clone()) {
                    warn!(provider = %provider.url, %message, "The provider refused with a message nobody has seen before");
                }
                Err(Refused::Unknown(message))
            }
        }
    }

    /// Leaves a provider that serves another chain; the last one ends the run.
    fn give_up(&self, current: usize, found: u64) -> Result<(), Refused> {
        let wrong = Refused::WrongChain { expected: self.chain_id, found };
        if self.providers.len() == 1 {
            return Err(wrong);
        }
        error!(provider = %self.providers[current].url, "{wrong}");
        self.use_provider(current + 1);
        self.gate.failed(&self.providers[current].url, &wrong.to_string(), None);
        Ok(())
    }

    fn use_provider(&self, index: usize) {
        self.current.store(index % self.providers.len(), Ordering::Relaxed);
        *self.switched.lock().expect("no code that panics runs under this lock") = Instant::now();
    }

    /// Goes back to the preferred provider after a while with another.
    fn prefer_first(&self) {
        let other = self.current.load(Ordering::Relaxed) != 0;
        if other
            && self.switched.lock().expect("no code that panics runs under this lock").elapsed() > STAY_AWAY
        {
            self.use_provider(0);
        }
    }

    /// One HTTP request with all these calls.
    async fn attempt(&self, provider: &Provider, calls: &[Call]) -> Attempt {
        let verify = !provider.verified.load(Ordering::Relaxed);
        let mut requests: Vec<_> = verify.then(|| wire::chain_id_request(CHAIN_ID)).into_iter().collect();
        requests.extend(calls.iter().zip(1..).map(|(call, id)| wire::request(call, id)));
        self.pace(requests.len()).await;
        let permit = self.requests.acquire().await.expect("the semaphore is never closed");
        let packet = match <[_; 1]>::try_from(requests) {
            Ok([single]) => RequestPacket::Single(single),
            Err(many) => RequestPacket::Batch(many),
        };
        let reply = provider.transport.round_trip(packet).await;
        drop(permit);
        let reply = match reply {
            Ok(reply) => reply,
            Err(failure) => return Attempt::Outcomes(refuse_all(&failure, calls)),
        };
        let (status, retry_after) = (reply.http_status, reply.retry_after);
        let responses = match reply.packet {
            ResponsePacket::Batch(responses) => responses,
            ResponsePacket::Single(response) => {
                let alone = calls.len() == 1 && !verify;
                match &response.payload {
                    // One error for a whole batch: the batch was refused.
                    ResponsePayload::Failure(failure) if !alone => {
                        let failure = Failure {
                            message: redact(&failure.message, MAX_TEXT),
                            http_status: status,
                            retry_after,
                        };
                        return Attempt::Outcomes(refuse_all(&failure, calls));
                    }
                    ResponsePayload::Failure(_) | ResponsePayload::Success(_) => {}
                }
                let mut response = response;
                if alone {
                    // Some gateways answer a single call with id null.
                    response.id = Id::Number(1);
                }
                vec![response]
            }
        };
        let mut payloads: Vec<Option<ResponsePayload>> = (0..=calls.len()).map(|_| None).collect();
        for response in responses {
            if let Id::Number(id) = response.id
                && let Some(slot) = payloads.get_mut(id as usize)
            {
                *slot = Some(response.payload);
            }
        }
        let mut payloads = payloads.into_iter();
        if let (Some(ResponsePayload::Success(id)), true) = (payloads.next().flatten(), verify) {
            match wire::chain_id(&id) {
                Ok(id) if id == self.chain_id => provider.verified.store(true, Ordering::Relaxed),
                Ok(found) => return Attempt::WrongChain(found),
                Err(_) => {}
            }
        }
        if verify && !provider.verified.load(Ordering::Relaxed) {
            let message = "it did not say its chain id".to_owned();
            return Attempt::Outcomes(refuse_all(
                &Failure { message, http_status: status, retry_after },
                calls,
            ));
        }
        let outcomes =
            calls.iter().zip(payloads).map(|(call, payload)| outcome(call, payload, status, retry_after));
        Attempt::Outcomes(outcomes.collect())
    }

    /// Waits for the limiter to let `calls` pass; it lets at most a burst through at once.
    async fn pace(&self, calls: usize) {
        let mut left = u32::try_from(calls).unwrap_or(u32::MAX);
        while let Some(part) = NonZeroU32::new(left.min(self.burst.get())) {
            self.limiter.until_n_ready(part).await.expect("a part is never larger than the burst");
            left -= part.get();
        }
    }
}

impl Chain for Rpc {
    async fn ask(&self, calls: Vec<Call>) -> Result<Vec<Answer>, Refused> {
        let batches = calls.chunks(self.max_batch).map(|batch| self.ask_batch(batch));
        Ok(try_join_all(batches).await?.into_iter().flatten().collect())
    }
}

fn refuse_all(failure: &Failure, calls: &[Call]) -> Vec<Outcome> {
    let heaviest = calls.iter().map(wire::asked).max_by_key(weight).unwrap_or(Asked::Other);
    let refusal = Refusal {
        message: &failure.message,
        code: None,
        http_status: failure.http_status,
        retry_after: failure.retry_after,
        data: None,
    };
    let refuse =
        |_: &Call| Err(Refusing { verdict: classify(&refusal, heaviest), message: failure.message.clone() });
    calls.iter().map(refuse).collect()
}

/// How much of a node's work a call is: blocks, then addresses.
fn weight(asked: &Asked) -> (u64, usize) {
    match asked {
        Asked::Range { from, to, addresses } => (to - from + 2, *addresses),
        Asked::BlockHash { addresses } => (1, *addresses),
        Asked::Header | Asked::Tag | Asked::Other => (0, 0),
    }
}

fn outcome(
    call: &Call,
    payload: Option<ResponsePayload>,
    http_status: Option<u16>,
    retry_after: Option<Duration>,
) -> Outcome {
    let fault = |message: String| Err(Refusing { verdict: Verdict::Fault, message });
    match payload {
        None => fault("the batch was answered only partly".to_owned()),
        Some(ResponsePayload::Success(result)) => match wire::answer(call, &result) {
            Ok(answer) => Ok(answer),
            Err(error) => fault(format!("an unexpected result: {error}")),
        },
        Some(ResponsePayload::Failure(failure)) => {
            let refusal = Refusal {
                message: &failure.message,
                code: Some(failure.code),
                http_status,
                retry_after,
                data: failure.data.as_deref().map(RawValue::get),
            };
            let verdict = classify(&refusal, wire::asked(call));
            let message = redact(&failure.message, MAX_TEXT);
            Err(Refusing { verdict, message: format!("{message} (code {})", failure.code) })
        }
    }
}
