//! JSON-RPC: many calls in one round trip, paced, retried and failed over.
//!
//! Faults and rate limits end here: one that begins is said once, and so is its end. In an outage one attempt at
//! a time is made, with growing, jittered pauses. What passes upwards changes the plan: see [`Refused`].

mod heads;
mod health;
#[cfg(test)]
mod tests;
mod transport;
pub mod verdict;
mod wire;

pub use heads::follow_heads;
pub use health::ProviderState;

use std::collections::HashSet;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use alloy::rpc::json_rpc::{Id, RequestPacket, Response, ResponsePacket, ResponsePayload};
use futures_util::future::{join_all, try_join_all};
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use serde_json::value::RawValue;
use tokio::sync::{Notify, Semaphore, watch};
use tokio::time::Instant;
use tracing::{debug, error, warn};

use crate::config::{self, RefusalText, SecretUrl};
use crate::event::{BlockRange, Header};
use crate::scan::{Answer, BlockTag, Call, Chain, Refused, Size};
use crate::telemetry::metrics;
use health::Health;
use transport::{Failure, Transport};
use verdict::{Asked, Refusal, Verdict, classify, redact};
use wire::{Query, Said};

/// What is logged of a provider's text, in characters.
const MAX_TEXT: usize = 500;
/// How long others are asked first instead of a provider that contradicts itself or does not know what is asked.
const STAY_AWAY: Duration = Duration::from_secs(60);
/// How long others are asked first instead of one that does not offer what is needed, or has it no more.
const STAY_AWAY_LONG: Duration = Duration::from_secs(600);
/// How often all providers are looked at, where there are several; and those that failed.
const LOOK_AROUND: Duration = Duration::from_secs(60);
const LOOK_AT_FAILED: Duration = Duration::from_secs(5);
/// Unknown refusals logged in full, at most.
const UNKNOWN_TEXTS: usize = 100;
/// Answers in a row with another chain's id after which a provider is on another chain.
const WRONG_LOOKS: u32 = 3;
/// Attempts without a usable answer after which less is asked for.
const SLOW_ATTEMPTS: usize = 3;

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
    health: Health,
    heads: watch::Sender<Option<Header>>,
    /// Told when the subscription seems to be dead.
    resubscribe: Notify,
    /// What the configuration says of refusals.
    told: Vec<RefusalText>,
    /// The id of the next call: none is used twice.
    next_id: AtomicU64,
    /// Texts already logged in full.
    never_seen: Mutex<HashSet<String>>,
}

struct Provider {
    url: SecretUrl,
    transport: Transport,
    /// It answered with the right chain id.
    verified: AtomicBool,
    /// How often in a row it answered with another chain's id.
    wrong_looks: AtomicU32,
    /// Requests in a row that were refused as a whole in words nobody understands.
    wondered: AtomicU32,
    /// Calls it takes in one request, as learnt.
    batch: Mutex<Size>,
}

impl Provider {
    fn batch(&self) -> usize {
        self.size().now as usize
    }

    /// So many calls in one request are too many.
    fn takes_smaller_batches(&self, than: usize) {
        self.size().cap(than as u64 / 2);
    }

    /// So many calls in one request were refused in words nobody understands: again, and it may be their number.
    fn wonder_about_batches(&self, than: usize) {
        if self.wondered.fetch_add(1, Ordering::Relaxed) > 0 {
            self.size().refuse(than as u64);
        }
    }

    /// A request with so many calls was answered.
    fn took(&self, calls: usize) {
        if calls > 1 {
            self.wondered.store(0, Ordering::Relaxed);
        }
        self.size().answered(calls as u64);
    }

    fn size(&self) -> MutexGuard<'_, Size> {
        self.batch.lock().expect("no code that panics runs under this lock")
    }
}

/// One call's answer, or why there is none.
type Outcome = Result<Answer, Refusing>;

/// A verdict with the text it was read from.
#[derive(Clone, Debug)]
pub struct Refusing {
    /// What to do.
    pub verdict: Verdict,
    /// What the provider said, without URLs.
    pub message: String,
    /// No usable answer came: perhaps too much was asked for.
    slow: bool,
    /// Several calls were refused by one word.
    whole: bool,
}

impl Refusing {
    fn hint(&self) -> Option<Duration> {
        match self.verdict {
            Verdict::Wait { hint } => hint,
            _ => None,
        }
    }
}

/// What came of one request.
enum Attempt {
    /// Per call, in their order.
    Outcomes(Vec<Outcome>),
    /// The provider is on this chain instead.
    WrongChain(u64),
}

/// What to do after a call was refused.
enum Next {
    /// Ask again, after this long if the provider says so.
    Wait { hint: Option<Duration>, message: String, slow: bool },
    /// Ask again at once, otherwise.
    Again,
    /// The plan must change.
    Replan(Refused),
}

impl Rpc {
    /// Connects to nothing yet.
    pub fn new(chain_id: u64, config: &config::Rpc) -> Result<Self, reqwest::Error> {
        let providers = config.urls.iter().map(|url| {
            Ok(Provider {
                url: url.clone(),
                transport: Transport::new(url, config.timeout)?,
                verified: AtomicBool::new(false),
                wrong_looks: AtomicU32::new(0),
                wondered: AtomicU32::new(0),
                batch: Mutex::new(Size::new(config.max_batch.get() as u64)),
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
            health: Health::new(&config.urls),
            heads: watch::Sender::new(None),
            resubscribe: Notify::new(),
            told: config.refusals.clone(),
            next_id: AtomicU64::new(1),
            never_seen: Mutex::default(),
        })
    }

    /// The providers' URLs, the preferred first.
    pub fn providers(&self) -> impl Iterator<Item = &SecretUrl> {
        self.providers.iter().map(|provider| &provider.url)
    }

    /// How they are doing, the preferred first.
    pub fn provider_states(&self) -> Vec<ProviderState> {
        self.health.states()
    }

    /// How many calls were made.
    pub fn calls(&self) -> u64 {
        self.next_id.load(Ordering::Relaxed) - 1
    }

    /// Which of the providers was asked last.
    pub fn provider_in_use(&self) -> usize {
        self.current.load(Ordering::Relaxed)
    }

    /// Asks one provider once, without retrying: how a check looks at it.
    pub async fn try_once(&self, provider: usize, calls: &[Call]) -> Result<Vec<Outcome>, Refused> {
        match self.attempt(&self.providers[provider], calls).await {
            Attempt::Outcomes(outcomes) => Ok(outcomes),
            Attempt::WrongChain(found) => Err(Refused::WrongChain { expected: self.chain_id, found }),
        }
    }

    /// Asks one provider once; refused if any of the calls is.
    async fn ask_provider(&self, provider: usize, calls: &[Call]) -> Result<Vec<Answer>, Refused> {
        let batches = calls.chunks(self.max_batch).map(|batch| self.try_once(provider, batch));
        let outcomes = try_join_all(batches).await?.into_iter().flatten();
        outcomes.map(|outcome| outcome.map_err(|refusing| Refused::Unknown(refusing.message))).collect()
    }

    /// Asks until every call is answered or one is refused in a way that waiting does not mend.
    async fn ask_batch(&self, calls: &[Call]) -> Result<Vec<Answer>, Refused> {
        let mut answers: Vec<Option<Answer>> = vec![None; calls.len()];
        let (mut slow, mut unfit) = (0, Vec::new());
        loop {
            let pending: Vec<usize> = (0..calls.len()).filter(|index| answers[*index].is_none()).collect();
            if pending.is_empty() {
                return Ok(answers.into_iter().flatten().collect());
            }
            let (current, turn) = self.health.enter().await;
            self.current.store(current, Ordering::Relaxed);
            let provider = &self.providers[current];
            let pending = &pending[..provider.batch().min(pending.len())];
            let asked: Vec<Call> = pending.iter().map(|index| calls[*index].clone()).collect();
            let began = Instant::now();
            let outcomes = match self.attempt(provider, &asked).await {
                Attempt::Outcomes(outcomes) => outcomes,
                Attempt::WrongChain(found) => {
                    self.give_up(current, found, began.elapsed())?;
                    continue;
                }
            };
            let mut fault = None;
            for (outcome, index) in outcomes.into_iter().zip(pending) {
                match outcome.map_err(|refusing| self.judge(provider, refusing, asked.len())) {
                    Ok(answer) => answers[*index] = Some(answer),
                    Err(Next::Again) => {}
                    Err(Next::Wait { hint, message, slow }) => fault = Some((hint, message, slow)),
                    Err(Next::Replan(refused)) => {
                        self.health.succeeded(current);
                        if !self.turns_elsewhere(current, &refused, &asked, &mut unfit) {
                            return Err(refused);
                        }
                        break;
                    }
                }
            }
            match fault {
                None => {
                    self.health.succeeded(current);
                    provider.took(asked.len());
                    slow = 0;
                }
                Some((hint, message, is_slow)) => {
                    self.health.failed(current, &message, hint, began.elapsed());
                    slow += usize::from(is_slow);
                    if slow >= SLOW_ATTEMPTS && asked.iter().any(|call| matches!(call, Call::Logs(_))) {
                        return Err(Refused::Slow(message));
                    }
                }
            }
            drop(turn);
        }
    }

    /// Whether a refusal that no smaller plan helps with is one of this provider alone: another is asked then. `unfit`:
    /// those that refused already.
    fn turns_elsewhere(
        &self,
        current: usize,
        refused: &Refused,
        asked: &[Call],
        unfit: &mut Vec<usize>,
    ) -> bool {
        match refused {
            Refused::HistoryGone(_) | Refused::Unsupported(_) => {
                self.health.rest(current, STAY_AWAY_LONG);
                unfit.push(current);
                let elsewhere = self.health.has_other_than(unfit);
                if elsewhere {
                    warn!(provider = %self.providers[current].url, "{refused}: asking another");
                }
                elsewhere
            }
            Refused::UnknownTag(_) => {
                self.health.rest(current, STAY_AWAY);
                false
            }
            Refused::Unknown(_) => {
                if !asked.iter().any(|call| matches!(call, Call::Logs(_))) {
                    self.health.rest(current, STAY_AWAY);
                }
                false
            }
            Refused::Cap(_) | Refused::Use(_) | Refused::Halve(_) | Refused::FewerAddresses(_) => false,
            Refused::Slow(_) | Refused::Behind(_) | Refused::WrongChain { .. } => false,
        }
    }

    fn judge(&self, provider: &Provider, refusing: Refusing, batch: usize) -> Next {
        let Refusing { verdict, message, slow, whole } = refusing;
        debug!(provider = %provider.url, ?verdict, %message, "A call was refused");
        Next::Replan(match verdict {
            Verdict::Wait { hint } => return Next::Wait { hint, message, slow },
            Verdict::SmallerBatch if batch > 1 => {
                provider.takes_smaller_batches(batch);
                return Next::Again;
            }
            Verdict::Fault | Verdict::SmallerBatch => return Next::Wait { hint: None, message, slow },
            Verdict::CapRange(blocks) => Refused::Cap(blocks),
            Verdict::UseRange { from, to } => match BlockRange::new(from, to) {
                Some(range) => Refused::Use(range),
                None => Refused::Halve(message),
            },
            Verdict::Halve => Refused::Halve(message),
            Verdict::FewerAddresses => Refused::FewerAddresses(message),
            Verdict::Behind => Refused::Behind(message),
            Verdict::Unsupported => Refused::Unsupported(message),
            Verdict::HistoryGone => Refused::HistoryGone(message),
            Verdict::UnknownTag => Refused::UnknownTag(message),
            Verdict::Unknown => {
                let mut seen = self.never_seen.lock().expect("no code that panics runs under this lock");
                if seen.len() < UNKNOWN_TEXTS && seen.insert(message.clone()) {
                    warn!(provider = %provider.url, %message, "The provider refused with a message nobody has seen before");
                }
                // Perhaps it was that they came together.
                if whole && batch > 1 {
                    provider.wonder_about_batches(batch);
                }
                Refused::Unknown(message)
            }
        })
    }

    /// Leaves a provider that says again and again that it serves another chain; when all of them do, the run ends.
    fn give_up(&self, index: usize, found: u64, took: Duration) -> Result<(), Refused> {
        let wrong = Refused::WrongChain { expected: self.chain_id, found };
        let provider = &self.providers[index];
        // One node behind a gateway may be another chain's: that passes.
        if provider.wrong_looks.fetch_add(1, Ordering::Relaxed) + 1 < WRONG_LOOKS {
            self.health.failed(index, &wrong.to_string(), None, took);
            return Ok(());
        }
        let (newly, all) = self.health.is_wrong(index);
        if newly {
            error!(provider = %provider.url, "{wrong}");
        }
        if all { Err(wrong) } else { Ok(()) }
    }

    /// Looks at a provider: whether it answers, on which chain, and how far it is.
    async fn look_at(&self, index: usize) -> Option<(usize, u64)> {
        let began = Instant::now();
        match self.attempt(&self.providers[index], &[Call::Header(BlockTag::Latest)]).await {
            Attempt::WrongChain(found) => {
                // The run ends when reading comes to the same end.
                let _ = self.give_up(index, found, began.elapsed());
                None
            }
            Attempt::Outcomes(mut outcomes) => match outcomes.remove(0) {
                Ok(answer) => {
                    self.health.succeeded(index);
                    answer.header().map(|header| (index, header.block.number))
                }
                Err(refusing) => {
                    self.health.failed(index, &refusing.message, refusing.hint(), began.elapsed());
                    None
                }
            },
        }
    }

    /// One HTTP request with all these calls, and with what makes their answers trustworthy: the chain id until it
    /// is known, the header of a range's last block. A provider that takes no batches is asked for its chain id alone.
    async fn attempt(&self, provider: &Provider, calls: &[Call]) -> Attempt {
        let single = provider.batch() == 1;
        let mut verify = !provider.verified.load(Ordering::Relaxed);
        if verify && single {
            let outcome = self.exchange(provider, &[Query::ChainId]).await;
            match outcome.and_then(|mut answers| self.check_chain_id(provider, answers.remove(0))) {
                Ok(None) => verify = false,
                Ok(Some(found)) => return Attempt::WrongChain(found),
                Err(refusing) => return Attempt::Outcomes(refuse_all(&refusing, calls)),
            }
        }
        let anchor = wire::missing_anchor(calls).filter(|_| !single);
        let mut queries: Vec<Query<'_>> = calls.iter().map(Query::Call).collect();
        queries.extend(anchor.map(Query::Anchor));
        queries.extend(verify.then_some(Query::ChainId));
        let mut answers = match self.exchange(provider, &queries).await {
            Ok(answers) => answers,
            Err(refusing) => return Attempt::Outcomes(refuse_all(&refusing, calls)),
        };
        if verify {
            let chain_id = answers.pop().expect("an answer for each query");
            match self.check_chain_id(provider, chain_id) {
                Ok(None) => {}
                Ok(Some(found)) => return Attempt::WrongChain(found),
                Err(refusing) => return Attempt::Outcomes(refuse_all(&refusing, calls)),
            }
        }
        if anchor.is_some() {
            let anchor = answers.pop().expect("an answer for each query");
            if let Err(refusing) = anchor.and_then(read_anchor) {
                return Attempt::Outcomes(refuse_all(&refusing, calls));
            }
        }
        let outcomes = calls.iter().zip(answers).map(|(call, payload)| {
            let outcome = payload.and_then(|payload| read(call, payload));
            metrics::rpc_call(
                wire::method(call),
                outcome.as_ref().map_or_else(|it| it.verdict.name(), |_| "answered"),
            );
            outcome
        });
        Attempt::Outcomes(outcomes.collect())
    }

    /// `Ok(None)`: it is ours. `Ok(Some)`: it is that one.
    fn check_chain_id(
        &self,
        provider: &Provider,
        payload: Result<Said, Refusing>,
    ) -> Result<Option<u64>, Refusing> {
        let found =
            wire::chain_id(&payload?).map_err(|error| useless(format!("an unexpected chain id: {error}")))?;
        if found != self.chain_id {
            return Ok(Some(found));
        }
        provider.wrong_looks.store(0, Ordering::Relaxed);
        provider.verified.store(true, Ordering::Relaxed);
        Ok(None)
    }

    /// One round trip: the result of each query, or why there is none; or why there is none at all.
    async fn exchange(
        &self,
        provider: &Provider,
        queries: &[Query<'_>],
    ) -> Result<Vec<Result<Said, Refusing>>, Refusing> {
        // Never used twice: over a web socket a late answer would pass for another call's.
        let first = self.next_id.fetch_add(queries.len() as u64, Ordering::Relaxed);
        self.pace(queries.len()).await;
        let permit = self.requests.acquire().await.expect("the semaphore is never closed");
        let packet = match queries {
            [single] => RequestPacket::Single(wire::request(*single, first)),
            many => many.iter().zip(first..).map(|(query, id)| wire::request(*query, id)).collect(),
        };
        let began = Instant::now();
        let reply = provider.transport.round_trip(packet).await;
        metrics::rpc_request_took(began.elapsed());
        drop(permit);
        let reply = reply.map_err(|failure| refuse_request(&failure, queries, &self.told))?;
        let (status, retry_after) = (reply.http_status, reply.retry_after);
        let responses = match reply.packet {
            ResponsePacket::Batch(responses) => responses,
            // Some gateways answer a single call with id null.
            ResponsePacket::Single(Response { payload, .. }) if queries.len() == 1 => {
                vec![Response { id: Id::Number(first), payload }]
            }
            ResponsePacket::Single(Response { payload: ResponsePayload::Failure(failure), .. }) => {
                // One error for a whole batch: the batch was refused.
                let message = redact(&failure.message, MAX_TEXT);
                let failure = Failure { said: true, slow: false, message, http_status: status, retry_after };
                return Err(refuse_request(&failure, queries, &self.told));
            }
            ResponsePacket::Single(response) => vec![response],
        };
        let mut payloads: Vec<Option<ResponsePayload<Said>>> = queries.iter().map(|_| None).collect();
        for response in responses {
            if let Id::Number(id) = response.id
                && let Some(slot) = id.checked_sub(first).and_then(|place| payloads.get_mut(place as usize))
            {
                *slot = Some(response.payload);
            }
        }
        Ok(queries
            .iter()
            .zip(payloads)
            .map(|(query, payload)| judge_payload(query, payload, status, retry_after, &self.told))
            .collect())
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

/// Looks at all providers now and then, for ever; at once there is only one, there is nothing to compare.
pub async fn watch(rpc: Arc<Rpc>) {
    if rpc.providers.len() < 2 {
        return;
    }
    let mut next = Instant::now();
    loop {
        let all = next <= Instant::now();
        if all {
            next = Instant::now() + LOOK_AROUND;
        }
        let looked_at =
            rpc.health.to_look_at().into_iter().filter(|index| all || rpc.health.is_failing(*index));
        let heads = join_all(looked_at.map(|index| rpc.look_at(index))).await;
        if all {
            rpc.health.heads(&heads.into_iter().flatten().collect::<Vec<_>>());
        }
        tokio::time::sleep(LOOK_AT_FAILED).await;
    }
}

impl Chain for Rpc {
    async fn ask(&self, calls: Vec<Call>) -> Result<Vec<Answer>, Refused> {
        let batches = calls.chunks(self.max_batch).map(|batch| self.ask_batch(batch));
        Ok(try_join_all(batches).await?.into_iter().flatten().collect())
    }

    async fn ask_another(&self, calls: Vec<Call>) -> Option<Result<Vec<Answer>, Refused>> {
        if self.providers.len() < 2 {
            return None;
        }
        let mut refused = Refused::Unknown("no other provider answers now".to_owned());
        for other in self.health.others(self.provider_in_use()) {
            match self.ask_provider(other, &calls).await {
                Ok(answers) => return Some(Ok(answers)),
                Err(why) => refused = why,
            }
        }
        Some(Err(refused))
    }

    async fn ask_ahead(&self, calls: Vec<Call>) -> Option<Vec<Answer>> {
        let current = self.health.choose()?;
        let batches = calls.chunks(self.providers[current].batch());
        let began = Instant::now();
        let answered = try_join_all(batches.map(|batch| self.try_once(current, batch))).await.ok()?;
        let mut answers = Vec::with_capacity(calls.len());
        for outcome in answered.into_iter().flatten() {
            match outcome {
                Ok(answer) => answers.push(answer),
                Err(refusing) => {
                    if matches!(refusing.verdict, Verdict::Wait { .. } | Verdict::Fault) {
                        self.health.failed(current, &refusing.message, refusing.hint(), began.elapsed());
                    }
                    return None;
                }
            }
        }
        Some(answers)
    }

    async fn ask_once(&self, calls: Vec<Call>) -> Result<Vec<Answer>, Refused> {
        let provider = self.provider_in_use();
        if self.health.is_failing(provider) {
            return Err(Refused::Unknown("the provider in use does not answer now".to_owned()));
        }
        self.ask_provider(provider, &calls).await
    }

    fn heads(&self) -> Option<watch::Receiver<Option<Header>>> {
        self.announcer().map(|_| self.heads.subscribe())
    }

    fn heads_are_missing(&self) {
        self.resubscribe.notify_one();
    }

    fn turn_away(&self) {
        self.health.rest(self.provider_in_use(), STAY_AWAY);
    }
}

fn refuse_all(refusing: &Refusing, calls: &[Call]) -> Vec<Outcome> {
    calls.iter().for_each(|call| metrics::rpc_call(wire::method(call), refusing.verdict.name()));
    calls.iter().map(|_| Err(refusing.clone())).collect()
}

/// A refusal of a request as a whole, read as one of its heaviest query.
fn refuse_request(failure: &Failure, queries: &[Query<'_>], told: &[RefusalText]) -> Refusing {
    let message = failure.message.clone();
    if !failure.said {
        return Refusing { verdict: Verdict::Fault, message, slow: failure.slow, whole: false };
    }
    let refusal = Refusal {
        message: &failure.message,
        code: None,
        http_status: failure.http_status,
        retry_after: failure.retry_after,
        data: None,
    };
    let heaviest = queries.iter().map(asked).max_by_key(weight).unwrap_or(Asked::Other);
    let verdict = match classify(&refusal, heaviest, told) {
        // A server's own trouble, in words of its own.
        Verdict::Unknown if failure.http_status.is_some_and(|status| status >= 500) => Verdict::Fault,
        verdict => verdict,
    };
    let verdict = match (verdict, heaviest) {
        // One call in a request that is too large: it is the call.
        (Verdict::SmallerBatch, Asked::Range { from, to, .. }) if queries.len() == 1 && from < to => {
            Verdict::Halve
        }
        (verdict, _) => verdict,
    };
    // A gateway that gave up on the node behind it, or a node on the question.
    let slow = verdict == Verdict::Fault && failure.http_status.is_some_and(|status| status >= 500);
    Refusing { verdict, message, slow, whole: queries.len() > 1 }
}

fn asked(query: &Query<'_>) -> Asked {
    match query {
        Query::Call(call) => wire::asked(call),
        Query::Anchor(_) => Asked::Header,
        Query::ChainId => Asked::Other,
    }
}

/// How much of a node's work a call is: blocks, then addresses.
fn weight(asked: &Asked) -> (u64, usize) {
    match asked {
        Asked::Range { from, to, addresses } => ((to - from).saturating_add(2), *addresses),
        Asked::BlockHash { addresses } => (1, *addresses),
        Asked::Header | Asked::Tag | Asked::Other => (0, 0),
    }
}

fn judge_payload(
    query: &Query<'_>,
    payload: Option<ResponsePayload<Said>>,
    http_status: Option<u16>,
    retry_after: Option<Duration>,
    told: &[RefusalText],
) -> Result<Said, Refusing> {
    match payload {
        None => Err(useless("the batch was answered only partly".to_owned())),
        Some(ResponsePayload::Success(result)) => Ok(result),
        Some(ResponsePayload::Failure(failure)) => {
            let refusal = Refusal {
                message: &failure.message,
                code: Some(failure.code),
                http_status,
                retry_after,
                data: failure.data.as_deref().map(RawValue::get),
            };
            let verdict = classify(&refusal, asked(query), told);
            let message = redact(&failure.message, MAX_TEXT);
            let slow = verdict == Verdict::Fault;
            let message = format!("{message} (code {})", failure.code);
            Err(Refusing { verdict, message, slow, whole: false })
        }
    }
}

fn read(call: &Call, result: Said) -> Outcome {
    wire::answer(call, result).map_err(|error| useless(format!("an unexpected result: {error}")))
}

/// The node answering must have the last block of the range: else its logs may be missing without a word.
fn read_anchor(result: Said) -> Result<(), Refusing> {
    match result.header() {
        Ok(Some(_)) => Ok(()),
        Ok(None) => {
            let message = "it does not have the last block of the range".to_owned();
            Err(Refusing { verdict: Verdict::Behind, message, slow: false, whole: false })
        }
        Err(error) => Err(useless(format!("an unexpected header: {error}"))),
    }
}

/// An answer nothing can be done with.
fn useless(message: String) -> Refusing {
    Refusing { verdict: Verdict::Fault, message, slow: true, whole: false }
}
