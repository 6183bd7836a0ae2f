//! Reading again, once it cannot change any more, what was read before: another way, of another provider where there is
//! one, beside everything else and with a budget of its own.
//!
//! Blocks read while they could leave the chain were read by hash: they are read again by range, all of them. Of the
//! others, read by range, some are drawn and read again by hash. What a node left out without a word (pruned receipts, an
//! index with holes) is then published as late; but only after it was seen twice.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use alloy::primitives::{Address, B256, U256};
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use tokio::time::Instant;
use tracing::{debug, error, info, warn};

use super::harvest::{Harvest, quarantined, whole};
use super::limits::{Size, Way};
use super::read::{log_calls, say_found};
use super::{Answer, BlockTag, Call, Chain, LogFilter, Span, Step, Trouble};
use crate::config::{Config, CountCall};
use crate::event::{
    Addresses, BlockRange, BlockRef, Decoded, Header, Log, Recognised, Role, Signatures, digest,
};
use crate::store::{Comparison, Escrow, EscrowState, LateStretch, Quarantined, Store, StoreError, on_disk};
use crate::telemetry::metrics;
use crate::vitals::Vitals;

/// Between attempts while no provider answers.
const UNANSWERED: Duration = Duration::from_secs(30);
/// Nothing is audited so soon after the start.
const UNHURRIED: Duration = Duration::from_secs(60);
/// Calls of one sample: the header that says it is our chain, the block's header, its logs.
const SAMPLE_CALLS: u32 = 3;
/// Escrows whose own counts are compared at a time.
const COUNTED_ESCROWS: usize = 5;

/// Audits one stretch of blocks at a time.
pub struct Auditor<C> {
    chain: Arc<C>,
    store: Arc<Store>,
    signatures: Arc<Signatures>,
    config: Config,
    topics: Arc<[B256]>,
    budget: Budget,
    calls_per_hour: NonZeroU32,
    /// Blocks to ask for at once.
    blocks: Size,
    /// Addresses in a filter; beyond it none are named.
    addresses: usize,
    begins_at: Instant,
    sample_at: Instant,
    count_at: Instant,
    dice: u64,
    pub(super) said: Said,
    vitals: Arc<Vitals>,
}

/// How many calls reading again may cost.
struct Budget {
    limiter: DefaultDirectRateLimiter,
    at_once: NonZeroU32,
}

impl Budget {
    fn new(quota: Quota) -> Self {
        Self { limiter: RateLimiter::direct(quota), at_once: quota.burst_size() }
    }

    async fn take(&self, calls: usize) {
        let mut left = u32::try_from(calls).unwrap_or(u32::MAX);
        while let Some(part) = NonZeroU32::new(left.min(self.at_once.get())) {
            self.limiter.until_n_ready(part).await.expect("a part is never larger than the burst");
            left -= part.get();
        }
    }
}

/// What was said already.
#[derive(Debug, Default)]
pub(super) struct Said {
    unanswered: bool,
    /// That the factory counts otherwise.
    pub escrows: bool,
    /// Escrows that count otherwise.
    pub counts: BTreeSet<Address>,
}

/// What the logs of some blocks say.
#[derive(Default)]
pub(super) struct Found {
    /// Events by block and log index, with what they say.
    pub events: BTreeMap<(u64, u64), (Log, Decoded)>,
    pub malformed: Vec<Quarantined>,
    /// Escrows that are not registered, and the block that announced each.
    pub announced: BTreeMap<Address, BlockRef>,
    /// Escrows registered from a later block only.
    announced_earlier: BTreeMap<Address, BlockRef>,
}

impl<C: Chain> Auditor<C> {
    /// `None`: the configuration wants no audit.
    pub fn new(
        chain: Arc<C>,
        store: Arc<Store>,
        signatures: Arc<Signatures>,
        config: &Config,
    ) -> Option<Self> {
        let calls_per_hour = NonZeroU32::new(config.audit.calls_per_hour)?;
        let mut auditor = Self::paced(chain, store, signatures, config, Quota::per_hour(calls_per_hour));
        // A start is busy enough.
        auditor.begins_at = Instant::now() + sample_pause(calls_per_hour).min(UNHURRIED);
        auditor.calls_per_hour = calls_per_hour;
        (auditor.sample_at, auditor.count_at) = (auditor.begins_at, auditor.begins_at);
        Some(auditor)
    }

    /// One that may make so many calls.
    pub(super) fn paced(
        chain: Arc<C>,
        store: Arc<Store>,
        signatures: Arc<Signatures>,
        config: &Config,
        quota: Quota,
    ) -> Self {
        let now = Instant::now();
        Self {
            chain,
            topics: signatures.topics().into(),
            dice: store.epoch() ^ store.next_block(),
            store,
            signatures,
            budget: Budget::new(quota),
            calls_per_hour: NonZeroU32::MIN,
            blocks: Size::new(config.rpc.max_range.get()),
            addresses: config.rpc.max_addresses.get(),
            config: config.clone(),
            begins_at: now,
            sample_at: now,
            count_at: now,
            said: Said::default(),
            vitals: Arc::default(),
        }
    }

    /// Tells there what it comes to.
    pub fn reporting_to(mut self, vitals: &Arc<Vitals>) -> Self {
        self.vitals = Arc::clone(vitals);
        self
    }

    /// Audits what comes next. `Idle`: nothing is due.
    pub async fn step(&mut self) -> Result<Step, StoreError> {
        match self.try_step().await {
            Ok(step) => Ok(step),
            Err(Trouble::Store(error)) => Err(error),
            Err(Trouble::Refused { refused, blocks, .. }) => Ok(self.put_off(&refused.to_string(), blocks)),
            Err(Trouble::Disagreement(what)) => Ok(self.put_off(&what, 0)),
        }
    }

    /// Asked for less next time, where it may have been too much.
    fn put_off(&mut self, why: &str, blocks: u64) -> Step {
        debug!(%why, blocks, "Nothing was audited");
        if blocks > 0 && self.blocks.refuse(blocks) {
            return Step::Progress;
        }
        if blocks > 0 {
            // Round again: nobody may have been there at all, and then it was for no number that it was refused.
            self.addresses =
                if self.addresses > 1 { self.addresses / 2 } else { self.config.rpc.max_addresses.get() };
        }
        if !std::mem::replace(&mut self.said.unanswered, true) {
            info!(reason = %why, "The audit waits: no provider answers it");
        }
        Step::Wait(UNANSWERED)
    }

    async fn try_step(&mut self) -> Result<Step, Trouble> {
        // What is still being read is not missed.
        let (Some(finalized), None) = (self.store.finalized(), self.store.late_read()) else {
            return Ok(Step::Idle);
        };
        if Instant::now() < self.begins_at {
            return Ok(Step::Wait(self.begins_at - Instant::now()));
        }
        let most = self.blocks.now;
        if let Some(range) = on_disk(&self.store, move |store| store.unaudited(most)).await? {
            self.audit_range(range).await?;
            self.blocks.answered(range.blocks());
            return Ok(Step::Progress);
        }
        let now = Instant::now();
        if self.count_at <= now {
            self.count_at = now + self.config.audit.count_interval;
            self.count(finalized).await?;
            return Ok(Step::Progress);
        }
        if self.sample_at <= now {
            // Half of the budget is left for what has to be audited.
            self.sample_at = now + Duration::from_secs(3600) * (2 * SAMPLE_CALLS) / self.calls_per_hour.get();
            return self.sample(finalized).await;
        }
        Ok(Step::Idle)
    }

    /// Blocks read by hash before, by range now.
    async fn audit_range(&mut self, range: BlockRange) -> Result<(), Trouble> {
        let harvest = self.read_by_range(range, &[]).await?;
        self.compare(range, harvest, Some(range)).await
    }

    /// The logs of a range, with the header of its last block: of `escrows`, or of all that are ours.
    pub(super) async fn read_by_range(
        &self,
        range: BlockRange,
        escrows: &[Address],
    ) -> Result<Harvest, Trouble> {
        let mut calls = vec![Call::Header(BlockTag::Number(range.to()))];
        calls.extend(self.log_calls(Span::Range(range), escrows));
        let mut answers = self.ask_our_chain(calls, range.blocks()).await?;
        let end = whole(range, answers.remove(0).header())?;
        let mut harvest = Harvest::default();
        for logs in answers {
            harvest.gather(logs.logs(), range, &end)?;
        }
        Ok(harvest)
    }

    /// The same block by block, each by its hash.
    pub(super) async fn read_by_hash(
        &self,
        range: BlockRange,
        escrows: &[Address],
    ) -> Result<Harvest, Trouble> {
        let headers = (range.from()..=range.to()).map(|number| Call::Header(BlockTag::Number(number)));
        let answers = self.ask_our_chain(headers.collect(), 0).await?;
        let (mut calls, mut of) = (Vec::new(), Vec::new());
        for (number, answer) in (range.from()..).zip(answers) {
            let block = BlockRange::new(number, number).expect("one block");
            let header = whole(block, answer.header())?;
            let logs = self.log_calls(Span::Block(header.block.hash), escrows);
            of.extend(std::iter::repeat_n((block, header), logs.len()));
            calls.extend(logs);
        }
        let mut harvest = Harvest::default();
        for (logs, (block, header)) in self.ask(calls, 1).await?.into_iter().zip(of) {
            harvest.gather(logs.logs(), block, &header)?;
        }
        Ok(harvest)
    }

    /// A block drawn by lot, by hash.
    async fn sample(&mut self, finalized: u64) -> Result<Step, Trouble> {
        let from = on_disk(&self.store, |store| store.comparable_from()).await?;
        let Some(final_blocks) = BlockRange::new(from, finalized) else {
            return Ok(Step::Idle);
        };
        let number = from + self.roll(final_blocks.blocks());
        let block = BlockRange::new(number, number).expect("one block");
        let harvest = self.read_by_hash(block, &[]).await?;
        self.compare(block, harvest, None).await?;
        Ok(Step::Progress)
    }

    /// Numbers that look random, from Numerical Recipes: a lot, not a secret.
    fn roll(&mut self, bound: u64) -> u64 {
        self.dice = self.dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.dice >> 33) % bound
    }

    /// For these escrows; if none is named, one filter with the factory and all escrows, or without addresses where these are
    /// too many.
    fn log_calls(&self, span: Span, escrows: &[Address]) -> Vec<Call> {
        if !escrows.is_empty() {
            return log_calls(span, escrows, self.addresses, &self.topics);
        }
        let registry = self.store.registry();
        if registry.len() == registry.watched_len() && registry.len() < self.addresses {
            let all: Vec<Address> =
                [self.config.factory.address].into_iter().chain(registry.watched()).collect();
            return log_calls(span, &all, self.addresses, &self.topics);
        }
        vec![Call::Logs(LogFilter { span, addresses: Addresses::any(), topics: Arc::clone(&self.topics) })]
    }

    /// What was read again, and how it compares with what stands.
    pub(super) async fn find(
        &self,
        signatures: &Signatures,
        range: BlockRange,
        harvest: Harvest,
    ) -> Result<(Found, Comparison), Trouble> {
        let found = self.recognise(signatures, harvest).await?;
        let seen: Vec<((u64, u64), u64)> =
            found.events.iter().map(|(key, (log, _))| (*key, digest(log))).collect();
        let malformed = found.malformed.iter().map(|log| (log.block.0, log.log_index)).collect();
        let comparison = on_disk(&self.store, move |store| store.compare(range, &seen, malformed)).await?;
        Ok((found, comparison))
    }

    /// `audited`: blocks that are done with this.
    async fn compare(
        &mut self,
        range: BlockRange,
        harvest: Harvest,
        audited: Option<BlockRange>,
    ) -> Result<(), Trouble> {
        let signatures = Arc::clone(&self.signatures);
        let (found, comparison) = self.find(&signatures, range, harvest).await?;
        let missed: Vec<&(Log, Decoded)> = comparison.missed.iter().map(|key| &found.events[key]).collect();
        let times = self.confirm(missed.iter().map(|(log, _)| log)).await?;
        let mut late = LateStretch::default();
        for (log, decoded) in missed {
            late.events.push(decoded.event(self.config.chain.id, log, times[&log.block.number]));
        }
        late.events.sort_by_key(|event| event.order());
        late.announced = found.announced.into_iter().collect();
        late.announced_earlier = found.announced_earlier.into_iter().collect();
        let blocks = late.announced.iter().chain(&late.announced_earlier).map(|(_, block)| block.number);
        late.next = blocks.min().unwrap_or(0);
        late.quarantined = found
            .malformed
            .into_iter()
            .filter(|it| comparison.odd.contains(&(it.block.0, it.log_index)))
            .collect();
        let late = Arc::new(late);
        let stored = Arc::clone(&late);
        let nothing = late.events.is_empty()
            && late.announced.is_empty()
            && late.announced_earlier.is_empty()
            && late.quarantined.is_empty();
        let missed = match nothing && audited.is_none() {
            true => 0,
            false => on_disk(&self.store, move |store| store.accept_audited(audited, &stored)).await?,
        };
        if std::mem::take(&mut self.said.unanswered) {
            info!("The audit goes on");
        }
        metrics::audited(range.blocks(), missed, comparison.extra.len());
        self.vitals.audited(range.blocks(), missed, comparison.extra.len());
        say_found(&late.announced, &late.quarantined);
        say(range, missed, &comparison.extra, comparison.renumbered);
        Ok(())
    }

    /// Which of the logs are events, by the same rule as the first time: a log of an escrow counts from the block on that
    /// announced it.
    async fn recognise(&self, signatures: &Signatures, harvest: Harvest) -> Result<Found, Trouble> {
        let factory = self.config.factory.address;
        let announcement = |log: &Log| match log.address == factory {
            true => signatures.recognise(Role::Announcement, log),
            false => Recognised::Unknown,
        };
        let mut addresses: BTreeSet<Address> = harvest.logs().map(|log| log.address).collect();
        for log in harvest.logs() {
            if let Recognised::Known(decoded) = announcement(log) {
                addresses.insert(decoded.escrow(log));
            }
        }
        let (rows, counted_from) = on_disk(&self.store, move |store| {
            let addresses: Vec<Address> = addresses.into_iter().collect();
            Ok((store.escrows_of(&addresses)?, store.signatures_from()?))
        })
        .await?;
        let mut found = Found::default();
        for (key, log) in harvest.into_logs() {
            let recognised = match announcement(&log) {
                Recognised::Unknown if counts(&rows, &log) => signatures.recognise(Role::Lifecycle, &log),
                other => other,
            };
            match recognised {
                Recognised::Unknown => {}
                Recognised::Malformed(reason) => found.malformed.push(quarantined(&log, reason)),
                Recognised::Known(decoded)
                    if counted_from.get(decoded.signature()).is_some_and(|from| log.block.number < *from) => {
                }
                Recognised::Known(decoded) => {
                    found.note_announcement(&rows, &decoded, &log, log.address == factory);
                    found.events.insert(key, (log, decoded));
                }
            }
        }
        Ok(found)
    }

    /// Sees these logs once more, by the hash of their block, and returns the blocks' times.
    pub(super) async fn confirm<'a>(
        &self,
        logs: impl Iterator<Item = &'a Log>,
    ) -> Result<HashMap<u64, u64>, Trouble> {
        let mut blocks: BTreeMap<BlockKey, Vec<&Log>> = BTreeMap::new();
        logs.for_each(|log| blocks.entry((log.block.number, log.block.hash)).or_default().push(log));
        let mut times = HashMap::new();
        for ((number, hash), logs) in blocks {
            let addresses: BTreeSet<Address> = logs.iter().map(|log| log.address).collect();
            let addresses: Vec<Address> = addresses.into_iter().collect();
            let mut calls = vec![Call::Header(BlockTag::Number(number))];
            calls.extend(log_calls(Span::Block(hash), &addresses, self.addresses, &self.topics));
            let mut answers = self.ask(calls, 0).await?;
            let header =
                answers.remove(0).header().filter(|header| header.block == BlockRef { number, hash });
            let again: Vec<Log> = answers.into_iter().flat_map(Answer::logs).collect();
            let stands = |log: &&Log| {
                again.iter().any(|it| it.log_index == log.log_index && digest(it) == digest(log))
            };
            match header {
                Some(header) if logs.iter().all(stands) => times.insert(number, header.timestamp),
                _ => return Err(Trouble::Disagreement(format!("block {number} is told in two ways"))),
            };
        }
        Ok(times)
    }

    /// Asks another provider where there is one, once. `blocks`: how many blocks' logs are asked for.
    async fn ask(&self, calls: Vec<Call>, blocks: u64) -> Result<Vec<Answer>, Trouble> {
        self.budget.take(calls.len()).await;
        let answered = match self.chain.ask_another(calls.clone()).await {
            Some(answered) => answered,
            None => self.chain.ask_once(calls).await,
        };
        answered.map_err(|refused| Trouble::refused(refused).about(blocks, Way::Addresses))
    }

    /// The same, and thrown away unless the answering provider has the newest block that we know to be final.
    async fn ask_our_chain(&self, mut calls: Vec<Call>, blocks: u64) -> Result<Vec<Answer>, Trouble> {
        let known = on_disk(&self.store, |store| store.newest_final_block()).await?;
        calls.extend(known.map(|block| Call::Header(BlockTag::Number(block.number))));
        let mut answers = self.ask(calls, blocks).await?;
        if let Some(known) = known {
            let header: Option<Header> = answers.pop().expect("an answer for each call").header();
            if header.is_none_or(|header| header.block != known) {
                return Err(Trouble::Disagreement(format!("block {} is another one there", known.number)));
            }
        }
        Ok(answers)
    }

    /// Compares the registry and some escrows' events with the contracts' own counts at a final block.
    async fn count(&mut self, at: u64) -> Result<(), Trouble> {
        if let Some(function) = &self.config.factory.count_call {
            let selector = function.selector();
            let told = self.read(self.config.factory.address, &[selector], at).await?.remove(0);
            let known = on_disk(&self.store, move |store| store.registered_upto(at)).await?;
            self.say_escrows(at, known, told);
        }
        let functions = self.config.escrow.count_calls.clone();
        if functions.is_empty() {
            return Ok(());
        }
        let escrows = self.draw_escrows();
        let known = on_disk(&self.store, move |store| store.events_upto(&escrows, at)).await?;
        let selectors: Vec<[u8; 4]> = functions.iter().map(|it| it.function.selector().0).collect();
        for (escrow, events) in known {
            let told =
                self.read(escrow, &selectors.iter().map(|it| (*it).into()).collect::<Vec<_>>(), at).await?;
            self.say_counts(at, escrow, &functions, &events, &told);
        }
        Ok(())
    }

    fn draw_escrows(&mut self) -> BTreeSet<Address> {
        let store = Arc::clone(&self.store);
        let registry = store.registry();
        match registry.watched_len() as u64 {
            0 => BTreeSet::new(),
            count => (0..COUNTED_ESCROWS).map(|_| registry.nth_watched(self.roll(count) as usize)).collect(),
        }
    }

    /// What these functions without arguments return.
    async fn read(
        &self,
        contract: Address,
        selectors: &[alloy::primitives::FixedBytes<4>],
        at: u64,
    ) -> Result<Vec<U256>, Trouble> {
        let calls =
            selectors.iter().map(|selector| Call::Read { contract, selector: *selector, at }).collect();
        let outputs = self.ask(calls, 0).await?.into_iter().map(Answer::output);
        let numbers = outputs.map(|output| output.get(..32).map(U256::from_be_slice));
        numbers
            .collect::<Option<_>>()
            .ok_or_else(|| Trouble::Disagreement(format!("a count_call of {contract:#x} returned no number")))
    }

    fn say_escrows(&mut self, at: u64, known: u64, told: U256) {
        let differs = U256::from(known) != told;
        metrics::escrow_count_differs(differs);
        let said = std::mem::replace(&mut self.said.escrows, differs);
        if differs && !said {
            error!(
                block = at, known, told = %told,
                "The factory counts {told} escrows at block {at}, the registry has {known}: chain.start_block is too late, \
                 factory.events lacks a signature, or a provider left out logs. Read again with another one"
            );
        } else if said && !differs {
            info!(block = at, known, "The factory and the registry count the same again");
        }
    }

    fn say_counts(
        &mut self,
        at: u64,
        escrow: Address,
        functions: &[CountCall],
        events: &BTreeMap<String, u64>,
        told: &[U256],
    ) {
        for (CountCall { event, .. }, told) in functions.iter().zip(told) {
            let known = events.get(event).copied().unwrap_or(0);
            if U256::from(known) == *told || !self.said.counts.insert(escrow) {
                continue;
            }
            metrics::event_count_differs();
            error!(
                escrow = %format_args!("{escrow:#x}"), block = at, %event, known, told = %told,
                "Escrow {escrow:#x} counts {told} {event} at block {at}, {known} were relayed: a provider left out logs, or \
                 escrow.events lacks a signature"
            );
        }
    }
}

/// Half of the budget is left for what has to be audited.
fn sample_pause(calls_per_hour: NonZeroU32) -> Duration {
    Duration::from_secs(3600) * (2 * SAMPLE_CALLS) / calls_per_hour.get()
}

type BlockKey = (u64, B256);

impl Found {
    fn note_announcement(
        &mut self,
        rows: &HashMap<Address, Escrow>,
        decoded: &Decoded,
        log: &Log,
        by_factory: bool,
    ) {
        if !by_factory || !decoded.announces() {
            return;
        }
        let escrow = decoded.escrow(log);
        match rows.get(&escrow).filter(|row| row.state != EscrowState::Withdrawn) {
            None => drop(self.announced.entry(escrow).or_insert(log.block)),
            // Of one that was imported, whoever did it said from where on it counts.
            Some(row) if log.block.number < row.announced.0 && !row.is_imported() => {
                self.announced_earlier.entry(escrow).or_insert(log.block);
            }
            Some(_) => {}
        }
    }
}

fn counts(rows: &HashMap<Address, Escrow>, log: &Log) -> bool {
    let row = rows.get(&log.address);
    let is_read = |it: &&Escrow| matches!(it.state, EscrowState::Active | EscrowState::Archived);
    row.filter(is_read).is_some_and(|it| log.block.number >= it.announced.0)
}

fn say(range: BlockRange, missed: usize, extra: &[(u64, u64)], renumbered: usize) {
    let (from, to) = (range.from(), range.to());
    debug!(from, to, missed, extra = extra.len(), renumbered, "Audited blocks {from} to {to}");
    if missed > 0 {
        error!(
            from,
            to,
            missed,
            "The audit found {missed} events in blocks {from}-{to} that no provider had told of: they are published as late"
        );
    }
    if let Some((block, log_index)) = extra.first() {
        warn!(
            from,
            to,
            extra = extra.len(),
            block,
            log_index,
            "Read again, blocks {from}-{to} lack {} events that were relayed, the first in block {block}: the provider asked \
             now leaves out logs, or the one asked then told of what is not there",
            extra.len()
        );
    }
    if renumbered > 0 {
        warn!(
            from,
            to, renumbered, "Read again, {renumbered} events in blocks {from}-{to} have another log index"
        );
    }
}
