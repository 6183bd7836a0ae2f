//! Reading blocks: the calls, the checks that their answers are whole, and the stretch they become.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Instant;

use alloy::primitives::{Address, B256};
use tracing::{info, warn};

use super::{Answer, BlockTag, Call, Chain, LINKED_BLOCKS, LogFilter, Refused, Scanner, Span, Step, Trouble};
use crate::config::Reading;
use crate::event::{BlockRange, BlockRef, Header, Log, Recognised, Role};
use crate::store::{Quarantined, Stretch, on_disk};
use crate::telemetry::metrics;

/// Logs of a stretch of blocks with the escrows found in them.
#[derive(Default)]
pub(super) struct Harvest {
    /// Each log once, by block and log index.
    pub(super) logs: BTreeMap<(u64, u64), Log>,
    /// Of which fork each block with logs is.
    forks: HashMap<u64, B256>,
    /// Escrows not registered before, with the block that announced each.
    fresh: HashMap<Address, BlockRef>,
}

impl<C: Chain> Scanner<C> {
    /// Reads the first part of the pending blocks.
    pub(super) async fn read(&mut self, pending: BlockRange) -> Result<Step, Trouble> {
        let (next, target) = (pending.from(), pending.to());
        let last_final = self.finalized.unwrap_or(0).min(target);
        if next <= last_final {
            return self.read_range(next, last_final).await;
        }
        match self.settings.reading {
            Reading::Ranged => self.read_range(next, target).await,
            Reading::Linked => self.read_linked(next, target).await,
        }
    }

    /// Final blocks, or all blocks where the configuration says so: by range.
    async fn read_range(&mut self, next: u64, last: u64) -> Result<Step, Trouble> {
        let started = Instant::now();
        let Some(range) = BlockRange::starting_at(next, self.limits.range(), last) else {
            return Ok(Step::Idle);
        };
        let blocks = range.blocks();
        let watched = self.store.registry().watched();
        let (end, harvest) = match self.harvest_range(range, &watched).await {
            Err(Trouble::Refused { refused, .. }) => return Err(Trouble::Refused { refused, blocks }),
            other => other?,
        };
        let Some(end) = end else {
            // The block before is not the one that was accepted.
            return self.look_back().await;
        };
        self.suspected = None;
        let times = self.times(&harvest, end).await?;
        let mut marks: BTreeMap<u64, BlockRef> = BTreeMap::new();
        let is_final = self.finalized.is_some_and(|finalized| range.to() <= finalized);
        if !is_final {
            // Where the range may still fork, every block with logs is a place to come back to.
            marks.extend(harvest.logs.values().map(|log| (log.block.number, log.block)));
        }
        marks.insert(end.block.number, end.block);
        let queried = watched.len() + harvest.fresh.len();
        self.accept(range, harvest, &times, marks.into_values().collect(), queried, started).await?;
        self.recent = self.recent.split_off(&(range.to() + 1));
        self.proven = is_final.then_some(end.block);
        self.limits.grow(blocks, watched.len() + 1);
        Ok(Step::Progress)
    }

    /// The logs of a range and the header of its last block; no header if the block before it forked away.
    async fn harvest_range(
        &self,
        range: BlockRange,
        watched: &[Address],
    ) -> Result<(Option<Header>, Harvest), Trouble> {
        // What was accepted unfinal may have left the chain since, and be final by now on another fork.
        let cursor = self.store.cursor().filter(|cursor| self.proven != Some(*cursor));
        let mut calls = vec![Call::Header(BlockTag::Number(range.to()))];
        calls.extend(cursor.map(|block| Call::Header(BlockTag::Number(block.number))));
        let heads = calls.len();
        calls.extend(self.log_calls(Span::Range(range), Some(self.factory), watched, &self.topics));
        let mut answers = self.ask(calls).await?;
        let logs = answers.split_off(heads);
        let mut headers = answers.into_iter().map(Answer::header);
        let end = headers.next().flatten();
        if let Some(cursor) = cursor {
            match headers.next().flatten() {
                Some(header) if header.block == cursor => {}
                Some(_) => return Ok((None, Harvest::default())),
                None => return Err(Trouble::Disagreement(format!("no header of block {}", cursor.number))),
            }
        }
        let end = whole(range, end)?;
        let mut harvest = Harvest::default();
        for logs in logs {
            harvest.gather(logs.logs(), range, &end)?;
        }
        let fresh = self.discover(&mut harvest);
        if let Some(first) = fresh.iter().map(|(_, block)| block.number).min() {
            let span = range.tail(first).expect("announced inside the range");
            let addresses: Vec<Address> = fresh.iter().map(|(address, _)| *address).collect();
            let mut calls = vec![Call::Header(BlockTag::Number(range.to()))];
            calls.extend(self.log_calls(Span::Range(span), None, &addresses, &self.lifecycle_topics));
            let mut answers = self.ask(calls).await?.into_iter();
            let again = whole(range, answers.next().and_then(Answer::header))?;
            if again.block != end.block {
                return Err(Trouble::Disagreement(format!("two headers of block {}", range.to())));
            }
            for logs in answers {
                harvest.gather(logs.logs(), span, &end)?;
            }
        }
        Ok((Some(end), harvest))
    }

    /// One filter for as many addresses as the provider takes.
    pub(super) fn log_calls(
        &self,
        span: Span,
        factory: Option<Address>,
        addresses: &[Address],
        topics: &Arc<[B256]>,
    ) -> Vec<Call> {
        let all: Vec<Address> = factory.iter().chain(addresses).copied().collect();
        log_calls(span, &all, self.limits.addresses(), topics)
    }

    /// Notes the escrows announced in the harvest that are not registered yet, and returns them.
    fn discover(&self, harvest: &mut Harvest) -> Vec<(Address, BlockRef)> {
        let registry = self.store.registry();
        let mut found = Vec::new();
        for log in harvest.logs.values().filter(|log| log.address == self.factory) {
            if let Recognised::Known(decoded) = self.signatures.recognise(Role::Announcement, log) {
                let escrow = decoded.escrow(log);
                let registered = registry.contains(&escrow) || registry.is_joining(&escrow);
                if !registered && !harvest.fresh.contains_key(&escrow) {
                    harvest.fresh.insert(escrow, log.block);
                    found.push((escrow, log.block));
                }
            }
        }
        found
    }

    /// Times of the blocks whose logs do not say theirs.
    pub(super) async fn times(&self, harvest: &Harvest, end: Header) -> Result<HashMap<u64, u64>, Trouble> {
        let mut times = HashMap::from([(end.block.number, end.timestamp)]);
        let mut missing: BTreeMap<u64, BlockRef> = BTreeMap::new();
        for log in harvest.logs.values() {
            match log.block_timestamp {
                Some(time) => {
                    times.insert(log.block.number, time);
                }
                None => {
                    missing.insert(log.block.number, log.block);
                }
            }
        }
        missing.retain(|number, _| !times.contains_key(number));
        let calls = missing.keys().map(|number| Call::Header(BlockTag::Number(*number))).collect::<Vec<_>>();
        if calls.is_empty() {
            return Ok(times);
        }
        for (answer, block) in self.ask(calls).await?.into_iter().zip(missing.values()) {
            match answer.header() {
                Some(header) if header.block == *block => {
                    times.insert(block.number, header.timestamp);
                }
                _ => {
                    return Err(Trouble::Disagreement(format!(
                        "logs and header of block {} differ",
                        block.number
                    )));
                }
            }
        }
        Ok(times)
    }

    /// Unfinal blocks: linked by parent hash, logs by block hash.
    async fn read_linked(&mut self, next: u64, target: u64) -> Result<Step, Trouble> {
        let started = Instant::now();
        let count = self.linked.min(self.limits.range());
        let Some(range) = BlockRange::starting_at(next, count, target) else {
            return Ok(Step::Idle);
        };
        let headers = self.headers(range).await?;
        let (first, last) = (headers[0], headers[headers.len() - 1]);
        let range = BlockRange::new(next, last.block.number).expect("headers begin with the next block's");
        if self.store.cursor().is_some_and(|cursor| cursor.hash != first.parent_hash) {
            return self.look_back().await;
        }
        self.suspected = None;
        let watched = self.store.registry().watched();
        let everyone = self.limits.topics_only(watched.len() + 1);
        let harvest = match self.harvest_linked(&headers, &watched, everyone).await {
            Err(Trouble::Refused {
                refused: Refused::FewerAddresses(_) | Refused::Halve(_) | Refused::Unknown(_),
                ..
            }) if everyone => {
                self.limits.refuse_topics_only();
                return Ok(Step::Progress);
            }
            Err(Trouble::Refused { refused, .. }) => {
                return Err(Trouble::Refused { refused, blocks: range.blocks() });
            }
            other => other?,
        };
        let times = headers.iter().map(|header| (header.block.number, header.timestamp)).collect();
        let marks = headers.iter().map(|header| header.block).collect();
        let queried = watched.len() + harvest.fresh.len();
        self.accept(range, harvest, &times, marks, queried, started).await?;
        self.recent = self.recent.split_off(&(last.block.number + 1));
        self.limits.grow(range.blocks(), if everyone { 0 } else { watched.len() + 1 });
        Ok(Step::Progress)
    }

    /// The headers of the range, each the parent of the next; those seen at the head are not asked for again. Fewer, but
    /// one at least, if the node answering does not have the last ones.
    async fn headers(&mut self, range: BlockRange) -> Result<Vec<Header>, Trouble> {
        // Up to the head already seen, so that from then on each new head links to it and costs no other header.
        let newest = self.recent.keys().next_back().copied().unwrap_or(0);
        let last = if newest < range.to() + LINKED_BLOCKS { newest.max(range.to()) } else { range.to() };
        let missing: Vec<u64> =
            (range.from()..=last).filter(|number| !self.recent.contains_key(number)).collect();
        if !missing.is_empty() {
            let calls = missing.iter().map(|number| Call::Header(BlockTag::Number(*number))).collect();
            for (answer, number) in self.ask(calls).await?.into_iter().zip(missing) {
                if let Some(header) = answer.header().filter(|header| header.block.number == number) {
                    self.recent.insert(number, header);
                }
            }
        }
        let headers: Vec<Header> =
            (range.from()..=range.to()).map_while(|number| self.recent.get(&number).copied()).collect();
        if headers.is_empty() {
            return Err(Trouble::Disagreement(format!("no header of block {}", range.from())));
        }
        match headers.windows(2).find(|pair| pair[1].parent_hash != pair[0].block.hash) {
            Some(pair) => Err(Trouble::Disagreement(format!("block {} does not link", pair[1].block.number))),
            None => Ok(headers),
        }
    }

    /// `everyone`: by hash one call without addresses covers any number of escrows; the registry picks out theirs.
    async fn harvest_linked(
        &self,
        headers: &[Header],
        watched: &[Address],
        everyone: bool,
    ) -> Result<Harvest, Trouble> {
        let mut harvest = Harvest::default();
        let first = |span| match everyone {
            true => {
                let topics = Arc::clone(&self.topics);
                vec![Call::Logs(LogFilter { span, addresses: Vec::new(), topics })]
            }
            false => self.log_calls(span, Some(self.factory), watched, &self.topics),
        };
        self.gather_linked(&mut harvest, headers, |header| first(Span::Block(header.block.hash))).await?;
        let fresh = self.discover(&mut harvest);
        if fresh.is_empty() || everyone {
            return Ok(harvest);
        }
        let again = |header: &Header| {
            let announced = fresh.iter().filter(|(_, block)| block.number <= header.block.number);
            let addresses: Vec<Address> = announced.map(|(address, _)| *address).collect();
            self.log_calls(Span::Block(header.block.hash), None, &addresses, &self.lifecycle_topics)
        };
        self.gather_linked(&mut harvest, headers, again).await?;
        Ok(harvest)
    }

    /// Asks what `calls` says for each block, all in one go.
    pub(super) async fn gather_linked(
        &self,
        harvest: &mut Harvest,
        headers: &[Header],
        calls: impl Fn(&Header) -> Vec<Call>,
    ) -> Result<(), Trouble> {
        let (mut asked, mut of) = (Vec::new(), Vec::new());
        for header in headers {
            let block = calls(header);
            of.extend(std::iter::repeat_n(*header, block.len()));
            asked.extend(block);
        }
        for (answer, header) in self.ask(asked).await?.into_iter().zip(of) {
            let block = BlockRange::new(header.block.number, header.block.number).expect("one block");
            harvest.gather(answer.logs(), block, &header)?;
        }
        Ok(())
    }

    /// Turns the harvest into a stretch and commits it.
    async fn accept(
        &mut self,
        range: BlockRange,
        harvest: Harvest,
        times: &HashMap<u64, u64>,
        blocks: Vec<BlockRef>,
        queried: usize,
        started: Instant,
    ) -> Result<(), Trouble> {
        let mut stretch = self.stretch(&harvest, times, blocks);
        let is_final = self.finalized.is_some_and(|finalized| range.to() <= finalized);
        stretch.unfinal_from = (!is_final).then_some(range.from());
        let (from, to) = (range.from(), range.to());
        info!(from, to, events = stretch.events.len(), "Processing blocks {from} to {to}");
        let found = stretch.announced.len();
        let stretch = Arc::new(stretch);
        let committed = Arc::clone(&stretch);
        let committing = Instant::now();
        on_disk(&self.store, move |store| store.accept(&committed)).await?;
        metrics::commit_took("blocks", committing.elapsed());
        metrics::events(stretch.events.iter().map(|event| &*event.name));
        say_found(&stretch.announced, &stretch.quarantined);
        if found > 0 {
            info!(from, to, escrows = found, "Discovered {found} new escrows in blocks {from}-{to}");
            let registered = self.store.registry().len();
            info!(escrows = registered, "Registry: {registered} escrows registered");
        }
        let seconds = started.elapsed().as_secs_f64();
        info!(escrows = queried, seconds, "Queried {queried} escrows in {seconds:.3} s");
        Ok(())
    }

    fn stretch(&self, harvest: &Harvest, times: &HashMap<u64, u64>, blocks: Vec<BlockRef>) -> Stretch {
        let mut stretch = Stretch { blocks, finalized: self.finalized, ..Stretch::default() };
        let registry = self.store.registry();
        for log in harvest.logs.values() {
            let registered = registry.counts(&log.address, log.block.number)
                || harvest.fresh.get(&log.address).is_some_and(|block| log.block.number >= block.number);
            let recognised = match log.address == self.factory {
                true => self.signatures.recognise(Role::Announcement, log),
                false => Recognised::Unknown,
            };
            let recognised = match recognised {
                Recognised::Unknown if registered => self.signatures.recognise(Role::Lifecycle, log),
                other => other,
            };
            match recognised {
                Recognised::Unknown => {}
                Recognised::Malformed(reason) => stretch.quarantined.push(quarantined(log, reason)),
                Recognised::Known(decoded) => {
                    // Every block with logs has its time by now: from its header, or from a log of it.
                    let time = times[&log.block.number];
                    stretch.events.push(decoded.event(self.settings.id, log, time));
                }
            }
        }
        stretch.events.sort_by_key(|event| event.order());
        stretch.announced = harvest.fresh.iter().map(|(escrow, block)| (*escrow, *block)).collect();
        stretch.announced.sort_by_key(|(escrow, block)| (block.number, *escrow));
        stretch
    }
}

impl Harvest {
    /// Adds one answer's logs. `end` is the header of the last block: the logs there must be of that fork.
    pub(super) fn gather(&mut self, logs: Vec<Log>, range: BlockRange, end: &Header) -> Result<(), Trouble> {
        for log in logs {
            let number = log.block.number;
            if !range.contains(number) {
                return Err(Trouble::Disagreement(format!(
                    "a log of block {number} in the answer for {range}"
                )));
            }
            if number == end.block.number && log.block.hash != end.block.hash {
                return Err(Trouble::Disagreement(format!("logs and header of block {number} differ")));
            }
            if *self.forks.entry(number).or_insert(log.block.hash) != log.block.hash {
                return Err(Trouble::Disagreement(format!("logs of two forks of block {number}")));
            }
            match self.logs.entry((number, log.log_index)) {
                Entry::Vacant(vacant) => {
                    vacant.insert(log);
                }
                // A log said twice counts once.
                Entry::Occupied(known) if is_same(known.get(), &log) => {}
                Entry::Occupied(_) => {
                    return Err(Trouble::Disagreement(format!("two logs with one index in block {number}")));
                }
            }
        }
        Ok(())
    }
}

/// One filter for each `at_once` addresses.
pub(super) fn log_calls(
    span: Span,
    addresses: &[Address],
    at_once: usize,
    topics: &Arc<[B256]>,
) -> Vec<Call> {
    let filter =
        |chunk: &[Address]| LogFilter { span, addresses: chunk.to_vec(), topics: Arc::clone(topics) };
    addresses.chunks(at_once).map(|chunk| Call::Logs(filter(chunk))).collect()
}

/// What was found and stored, a line each.
pub(super) fn say_found(announced: &[(Address, BlockRef)], quarantined: &[Quarantined]) {
    metrics::quarantined(quarantined.len());
    for (escrow, block) in announced {
        info!(escrow = %format_args!("{escrow:#x}"), block = block.number, "New escrow discovered: {escrow:#x}");
    }
    for log in quarantined {
        warn!(
            emitter = %format_args!("{:#x}", log.address), block = log.block.0, log_index = log.log_index,
            reason = %log.reason, "A log with a known topic does not decode: it is kept aside"
        );
    }
}

fn is_same(one: &Log, other: &Log) -> bool {
    (one.transaction_hash, one.address, &one.topics, &one.data)
        == (other.transaction_hash, other.address, &other.topics, &other.data)
}

/// The header of a range's last block: without it the node is behind, and an empty list of logs means nothing.
pub(super) fn whole(range: BlockRange, end: Option<Header>) -> Result<Header, Trouble> {
    end.filter(|header| header.block.number == range.to())
        .ok_or_else(|| Trouble::Disagreement(format!("no header of block {}", range.to())))
}

pub(super) fn quarantined(log: &Log, reason: String) -> Quarantined {
    Quarantined {
        address: log.address,
        topics: log.topics.clone(),
        data: log.data.to_vec(),
        block: (log.block.number, log.block.hash),
        transaction_hash: log.transaction_hash,
        log_index: log.log_index,
        reason,
    }
}
