//! Reading blocks: which calls, in which way, and the commit of what they bring.

use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use alloy::primitives::map::{AddressMap, AddressSet};
use alloy::primitives::{Address, B256};
use tracing::{info, warn};

use super::ahead::{Answered, Fetched, Following, RANGES};
use super::coming::{Come, Coming, How};
use super::harvest::Harvest;
use super::limits::Way;
use super::{
    BlockTag, CATCH_UP, Call, Chain, LINKED_BLOCKS, LOOKS, LogFilter, Refused, Scanner, Span, Step, Trouble,
};
use crate::config::Reading;
use crate::event::{Addresses, BlockRange, BlockRef, Header};
use crate::store::{CHUNK, Quarantined, Stretch, on_disk};
use crate::telemetry::metrics;

/// Events in one commit, at most, unless a single block has more.
pub(super) const EVENTS_A_COMMIT: usize = 10_000;

/// More events than these are worth another thread to be dropped on.
const DROPPED_ASIDE: usize = 500;

impl<C: Chain> Scanner<C> {
    /// Reads the first part of the pending blocks.
    pub(super) async fn read(&mut self, pending: BlockRange) -> Result<Step, Trouble> {
        let (next, target) = (pending.from(), pending.to());
        let last_final = self.last_final();
        if next <= last_final {
            return self.read_range(next, last_final, RANGES).await;
        }
        if let Some(head) = self.followed {
            self.reach(next, head).await?;
        }
        match self.settings.reading {
            Reading::Ranged => self.read_range(next, target, 1).await,
            Reading::Linked => self.read_linked(next, target).await,
        }
    }

    /// An announced head confirms blocks only if the node that is read has all of them up to it, each the parent of the next:
    /// it may be of another chain, or a lie.
    async fn reach(&mut self, next: u64, announced: Header) -> Result<(), Trouble> {
        let range =
            BlockRange::new(next, announced.block.number).expect("the target is no higher than the head");
        match self.headers(range).await?.last() {
            Some(last) if last.block == announced.block => Ok(()),
            Some(_) | None => Err(Trouble::Disagreement("the announced block does not lead here".into())),
        }
    }

    /// Asks for the unfinal blocks behind the last final one, once all ranges up to there are under way: for the headers
    /// first, for the logs as soon as it is known who was announced until there. Where calls are scarce, nothing waits behind
    /// these: they are made when the ranges need no more.
    fn ask_coming(&mut self) {
        let last = self.last_final();
        let is_in_doubt = self.looks > 0 || self.suspected.is_some();
        if self.ahead.next() <= Some(last) || self.settings.reading == Reading::Ranged || is_in_doubt {
            return;
        }
        if self.coming.is_none() {
            self.ask_coming_headers(last);
        }
        if self.coming.as_ref().is_some_and(Coming::waits_for_filters)
            && let Some(announced) = self.ahead.announced()
        {
            self.ask_coming_logs(announced);
        }
    }

    /// Whether so many calls may be made before others that may follow.
    fn is_time_for(&self, calls: u64) -> bool {
        calls <= self.haste || self.ahead.is_there()
    }

    fn ask_coming_headers(&mut self, last: u64) {
        let target = self.target.unwrap_or(last);
        let Some(range) = BlockRange::starting_at(last + 1, self.linked_blocks(), target) else {
            return;
        };
        let newest = self.newest_near(range);
        if self.is_time_for(newest - last) {
            let known = self.recent.range(range.from()..=newest).map(|(_, header)| *header).collect();
            self.coming = Some(Coming::ask(&self.chain, range, newest, known));
        }
    }

    /// `joining`: who will be watched by then.
    fn ask_coming_logs(&mut self, mut joining: AddressSet) {
        let Some(blocks) = self.coming.as_ref().map(|coming| coming.range.blocks()) else {
            return;
        };
        let registry = self.store.registry();
        // A range that was accepted since may have announced them, too.
        joining.retain(|escrow| !registry.is_watched(escrow));
        let (arrivals, contracts) = (registry.arrivals(), registry.watched_len() + joining.len() + 1);
        drop(registry);
        let way = self.limits.way_by_hash(contracts);
        let calls = match way {
            Way::Everyone => blocks,
            Way::Addresses => blocks.saturating_mul(contracts.div_ceil(self.limits.addresses()) as u64),
        };
        if !self.is_time_for(calls) {
            return;
        }
        let filters = self.filters_with(Span::Block(B256::ZERO), way, &joining);
        let addresses = most_addresses(&filters);
        if let Some(coming) = &mut self.coming {
            coming.ask_logs(filters, How { way, addresses, arrivals }, joining, &self.decoder);
        }
    }

    /// By range, some of them ahead: final blocks, or all blocks where the configuration says so.
    async fn read_range(&mut self, next: u64, last: u64, at_once: usize) -> Result<Step, Trouble> {
        self.ask_ranges(next, last, at_once);
        if self.ahead.is_empty() {
            return Ok(Step::Idle);
        }
        let fetched = loop {
            self.follow_up();
            if self.ahead.is_empty() {
                // What was asked for ahead was not answered: now it is needed.
                return Ok(Step::Wait(Duration::ZERO));
            }
            let first = self.ahead.take_first(&self.store.registry());
            match first? {
                Some(fetched) => break fetched,
                None => self.ahead.wait().await,
            }
        };
        let cursor = self.store.cursor();
        if let (Some(cursor), Some(parent)) = (cursor, fetched.parent)
            && parent != cursor.hash
        {
            return match self.proven == Some(cursor) && self.looks < LOOKS {
                // Who answered is on another chain: final blocks stay where they are. Unless it goes on.
                true => {
                    Err(Trouble::Disagreement(format!("blocks {} do not follow the last one", fetched.range)))
                }
                // What was accepted unfinal may have left the chain since, and be final by now on another fork.
                false => self.look_back().await,
            };
        }
        self.believe_end(&fetched.end)?;
        self.suspected = None;
        self.accept_range(fetched).await?;
        self.ahead.accepted();
        Ok(Step::Progress)
    }

    /// Asks for what is wanted of the ranges under way, by all that is there, and behind them.
    fn follow_up(&mut self) {
        let following = Following {
            decoder: self.decoder.clone(),
            topics: Arc::clone(&self.lifecycle_topics),
            at_once: self.limits.addresses(),
            everyone: self.limits.everyone(),
        };
        self.ahead.follow(&self.chain, &following);
        self.ask_coming();
    }

    /// The last final block that is to be read.
    fn last_final(&self) -> u64 {
        self.finalized.unwrap_or(0).min(self.target.unwrap_or(0))
    }

    /// Holds the end of a range against all that is known of it otherwise: what is accepted as final cannot be taken back.
    fn believe_end(&mut self, header: &Header) -> Result<(), Trouble> {
        let end = header.block;
        let is_another = |told: &mut BlockRef| told.number == end.number && told.hash != end.hash;
        if self.told_final.take_if(is_another).is_some() {
            // One of both is a lie. What is told of it next time counts.
            return Err(Trouble::Disagreement(format!("two headers of block {}", end.number)));
        }
        if self.coming.as_ref().is_some_and(|coming| coming.contradicts(end)) {
            return Err(Trouble::Disagreement(format!("block {} does not follow", end.number + 1)));
        }
        if self.followed.is_some() && self.is_seen_otherwise(header) {
            return Err(Trouble::Disagreement(
                "the announced block is of another fork than what was read".into(),
            ));
        }
        Ok(())
    }

    /// Has as many ranges under way as there may be.
    fn ask_ranges(&mut self, next: u64, last: u64, at_once: usize) {
        if !self.ahead.begins_at(next) {
            self.ahead.clear();
        }
        while self.ahead.has_room(at_once) {
            let way = self.limits.way(self.store.registry().watched_len() + 1);
            let from = self.ahead.next().unwrap_or(next);
            let left = last.saturating_sub(from).saturating_add(1);
            let share = if self.store.cursor().is_none() { self.ahead.share(left, at_once) } else { left };
            let Some(range) = BlockRange::starting_at(from, self.limits.range(way).min(share), last) else {
                break;
            };
            let linked = self.store.cursor().is_some() || !self.ahead.is_empty();
            // Before the filters are made: whoever comes in between is asked for twice rather than not at all.
            let arrivals = self.store.registry().arrivals();
            let filters = self.filters(Span::Range(range), way);
            self.ahead.ask(&self.chain, &self.decoder, linked, (range, way), (filters, arrivals));
        }
    }

    async fn accept_range(&mut self, fetched: Fetched) -> Result<(), Trouble> {
        let Fetched { range, way, answered, started, end, harvests, parent: _ } = fetched;
        let mut marks: BTreeMap<u64, BlockRef> = BTreeMap::new();
        let is_final = self.finalized.is_some_and(|finalized| range.to() <= finalized);
        if !is_final {
            // Where the range may still fork, every block with logs is a place to come back to.
            let logs = harvests.iter().flat_map(|harvest| harvest.logs());
            marks.extend(logs.map(|log| (log.block.number, log.block)));
        }
        marks.insert(end.block.number, end.block);
        let others = self.accept(range, harvests, marks.into_values().collect(), started).await?;
        self.recent = self.recent.split_off(&(range.to() + 1));
        self.proven = is_final.then_some(end.block);
        for Answered { blocks, addresses, logs } in answered {
            self.limits.grow(way, blocks, addresses, logs);
        }
        if way == Way::Everyone {
            self.limits.saw_others(range.blocks(), others);
        }
        Ok(())
    }

    /// What to ask about a span: the factory and everyone who is watched.
    fn filters(&mut self, span: Span, way: Way) -> Vec<LogFilter> {
        self.filters_with(span, way, &AddressSet::default())
    }

    /// The same with those who are about to be.
    fn filters_with(&mut self, span: Span, way: Way, joining: &AddressSet) -> Vec<LogFilter> {
        let topics = || Arc::clone(&self.topics);
        if way == Way::Everyone {
            return vec![LogFilter { span, addresses: Addresses::any(), topics: topics() }];
        }
        let at_once = self.limits.addresses();
        let registry = self.store.registry();
        if at_once <= CHUNK || !joining.is_empty() {
            let watched = registry.watched().chain(joining.iter().copied());
            let all: Vec<Address> = [self.factory].into_iter().chain(watched).collect();
            let filter =
                |part: &[Address]| LogFilter { span, addresses: part.to_vec().into(), topics: topics() };
            return all.chunks(at_once).map(filter).collect();
        }
        let first = registry.chunks().first().cloned().unwrap_or_default();
        if !self.with_factory.as_ref().is_some_and(|(of, _)| of.is(&first)) {
            let list: Vec<Address> = [self.factory].into_iter().chain(first.list().iter().copied()).collect();
            self.with_factory = Some((first, list.into()));
        }
        let first = self.with_factory.iter().map(|(_, list)| list);
        let lists = first.chain(registry.chunks().iter().skip(1));
        lists.map(|list| LogFilter { span, addresses: list.clone(), topics: topics() }).collect()
    }

    /// One filter for as many addresses as the provider takes.
    pub(super) fn log_calls(&self, span: Span, addresses: &[Address], topics: &Arc<[B256]>) -> Vec<Call> {
        log_calls(span, addresses, self.limits.addresses(), topics)
    }

    /// Unfinal blocks: linked by parent hash, logs by block hash.
    async fn read_linked(&mut self, next: u64, target: u64) -> Result<Step, Trouble> {
        let started = Instant::now();
        let Some(range) = BlockRange::starting_at(next, self.linked_blocks(), target) else {
            return Ok(Step::Idle);
        };
        let (headers, come) = self.come(range, target).await?;
        let (first, last) = (headers[0], headers[headers.len() - 1]);
        let range = BlockRange::new(next, last.block.number).expect("headers begin with the next block's");
        if self.store.cursor().is_some_and(|cursor| cursor.hash != first.parent_hash) {
            return self.look_back().await;
        }
        self.suspected = None;
        let way = match &come {
            Some((_, how)) => how.way,
            None => self.limits.way_by_hash(self.store.registry().watched_len() + 1),
        };
        let (harvest, addresses) = match self.harvest_linked(&headers, way, come).await {
            Err(Trouble::Refused {
                refused: Refused::FewerAddresses(_) | Refused::Halve(_) | Refused::Unknown(_),
                ..
            }) if way == Way::Everyone => {
                self.limits.refuse_everyone();
                return Ok(Step::Progress);
            }
            Err(trouble) => return Err(trouble.about(range.blocks(), Way::Addresses)),
            Ok(harvested) => harvested,
        };
        let marks = headers.iter().map(|header| header.block).collect();
        let others = self.accept(range, vec![harvest], marks, started).await?;
        self.recent = self.recent.split_off(&(last.block.number + 1));
        match way {
            Way::Addresses => self.limits.grow(way, range.blocks(), addresses, 0),
            Way::Everyone => self.limits.saw_others(range.blocks(), others),
        }
        Ok(Step::Progress)
    }

    /// Unfinal blocks to read together.
    fn linked_blocks(&self) -> u64 {
        self.linked.min(self.limits.range(Way::Addresses))
    }

    /// How far to ask for headers: up to the head already seen, so that from then on each new head links to it and costs no
    /// other header.
    fn newest_near(&self, range: BlockRange) -> u64 {
        let newest = self.recent.keys().next_back().copied().unwrap_or(0);
        if newest < range.to().saturating_add(LINKED_BLOCKS) { newest.max(range.to()) } else { range.to() }
    }

    /// The headers of the range, and the logs of its blocks if these were asked for before: then perhaps of fewer
    /// blocks, or of more.
    async fn come(
        &mut self,
        range: BlockRange,
        target: u64,
    ) -> Result<(Vec<Header>, Option<(Harvest, How)>), Trouble> {
        let is_wanted = |it: &Coming| it.range.from() == range.from() && it.range.to() <= target;
        if let Some(coming) = self.coming.take().filter(is_wanted)
            && let asked = coming.range.blocks() as usize
            && let Some(Come { mut headers, logs }) = coming.there().await
            && !headers.iter().any(|header| self.is_seen_otherwise(header))
        {
            self.recent.extend(headers.iter().map(|header| (header.block.number, *header)));
            if logs.is_some() {
                headers.truncate(asked);
                return Ok((headers, logs));
            }
        }
        Ok((self.headers(range).await?, None))
    }

    /// What was seen since is newer.
    fn is_seen_otherwise(&self, header: &Header) -> bool {
        self.recent.get(&header.block.number).is_some_and(|seen| seen.block != header.block)
    }

    /// The headers of the range, each the parent of the next; those seen at the head are not asked for again. Fewer, but
    /// one at least, if the node answering does not have the last ones.
    async fn headers(&mut self, range: BlockRange) -> Result<Vec<Header>, Trouble> {
        let newest = self.newest_near(range);
        let missing: Vec<u64> =
            (range.from()..=newest).filter(|number| !self.recent.contains_key(number)).collect();
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

    /// The blocks' logs, and the most addresses in one filter. By hash one call without addresses covers any number of
    /// escrows. `come`: what was asked for before.
    async fn harvest_linked(
        &mut self,
        headers: &[Header],
        way: Way,
        come: Option<(Harvest, How)>,
    ) -> Result<(Harvest, usize), Trouble> {
        let (harvest, addresses, since) = match come {
            Some((harvest, How { addresses, arrivals, .. })) => {
                let registry = self.store.registry();
                let arrived = registry.arrived_after(arrivals).iter().copied();
                let since = arrived.filter(|escrow| !harvest.expected.contains(escrow)).collect();
                (harvest, addresses, since)
            }
            None => {
                let mut harvest = Harvest::of(headers);
                let filters = self.filters(Span::Block(B256::ZERO), way);
                let first = |header: &Header| calls_of_block(&filters, header);
                self.gather_linked(&mut harvest, headers, first).await?;
                let addresses = most_addresses(&filters);
                (harvest, addresses, Vec::new())
            }
        };
        let mut harvest = harvest.prepare(&*self.chain, &self.decoder, false, |_| false).await?;
        let fresh = harvest.unwatched(&self.store.registry());
        if fresh.is_empty() && since.is_empty() || way == Way::Everyone {
            return Ok((harvest, addresses));
        }
        let again = |header: &Header| {
            let announced = fresh.iter().filter(|(_, block)| block.number <= header.block.number);
            let addresses: Vec<Address> =
                since.iter().copied().chain(announced.map(|(address, _)| *address)).collect();
            self.log_calls(Span::Block(header.block.hash), &addresses, &self.lifecycle_topics)
        };
        self.gather_linked(&mut harvest, headers, again).await?;
        Ok((harvest.prepare(&*self.chain, &self.decoder, false, |_| false).await?, addresses))
    }

    /// Asks what `calls` says for each block, all in one go.
    pub(super) async fn gather_linked(
        &self,
        harvest: &mut Harvest,
        headers: &[Header],
        calls: impl Fn(&Header) -> Vec<Call>,
    ) -> Result<(), Trouble> {
        harvest.gather_blocks(&*self.chain, headers, calls, false).await.map(drop)
    }

    /// Turns what was harvested, in this order, into stretches and commits them. `blocks`: those to remember, the last one
    /// the new cursor. Returns how many logs were of others.
    async fn accept(
        &mut self,
        range: BlockRange,
        harvests: Vec<Harvest>,
        blocks: Vec<BlockRef>,
        started: Instant,
    ) -> Result<usize, Trouble> {
        let (mut whole, mut fresh, mut others) = (Stretch::default(), AddressMap::default(), 0);
        for mut harvest in harvests {
            // Some escrow may have come to be registered since, or is about to be.
            harvest.expected.extend(fresh.keys());
            let harvest = harvest.prepare(&*self.chain, &self.decoder, false, |_| false).await?;
            others += harvest.add_to(&mut whole, &mut fresh, &self.decoder);
        }
        let (from, to, found) = (range.from(), range.to(), whole.announced.len());
        info!(from, to, events = whole.events.len(), "Processing blocks {from} to {to}");
        let is_final = self.finalized.is_some_and(|finalized| range.to() <= finalized);
        let mut next = from;
        for mut part in parts(Stretch { blocks, ..whole }) {
            part.finalized = self.finalized;
            part.unfinal_from = (!is_final).then_some(next);
            // Far below the head its last blocks are still to be read, however final they are.
            let read = self.finalized.map(|block| block.min(range.to()));
            part.archive_upto = read.and_then(|block| block.checked_sub(self.archive_after));
            next = part.blocks.last().map_or(next, |block| block.number + 1);
            part.more = self.target.is_some_and(|target| next.saturating_add(CATCH_UP) <= target);
            self.commit(part).await?;
        }
        if found > 0 {
            info!(from, to, escrows = found, "Discovered {found} new escrows in blocks {from}-{to}");
            let registered = self.store.registry().len();
            info!(escrows = registered, "Registry: {registered} escrows registered");
        }
        let (escrows, seconds) = (self.store.registry().len(), started.elapsed().as_secs_f64());
        info!(escrows, seconds, "Queried {escrows} escrows in {seconds:.3} s");
        Ok(others)
    }

    /// Meanwhile what comes of the ranges behind it is followed up.
    async fn commit(&mut self, stretch: Stretch) -> Result<(), Trouble> {
        let stretch = Arc::new(stretch);
        let (store, to_commit) = (Arc::clone(&self.store), Arc::clone(&stretch));
        let began = Instant::now();
        let mut committing = pin!(on_disk(&store, move |store| store.accept(&to_commit)));
        loop {
            tokio::select! {
                biased;
                committed = &mut committing => break committed?,
                () = self.ahead.wait(), if self.ahead.is_under_way() => self.follow_up(),
            }
        }
        metrics::commit_took("blocks", began.elapsed());
        metrics::events(stretch.events.iter().map(|event| &*event.name));
        say_found(&stretch.announced, &stretch.quarantined);
        if stretch.events.len() > DROPPED_ASIDE {
            // Nobody waits for it.
            drop(tokio::task::spawn_blocking(move || drop(stretch)));
        }
        Ok(())
    }
}

/// The calls for a block's logs with these filters, of whatever blocks they are.
pub(super) fn calls_of_block(filters: &[LogFilter], header: &Header) -> Vec<Call> {
    let span = Span::Block(header.block.hash);
    filters.iter().map(|filter| Call::Logs(LogFilter { span, ..filter.clone() })).collect()
}

/// Addresses in the largest filter.
pub(super) fn most_addresses(filters: &[LogFilter]) -> usize {
    filters.iter().map(|filter| filter.addresses.len()).max().unwrap_or(0)
}

/// Cuts a stretch between blocks, so that no commit holds too much. What was announced, or does not decode, goes with its
/// block.
fn parts(whole: Stretch) -> Vec<Stretch> {
    let mut parts = Vec::new();
    let mut rest = whole;
    while rest.events.len() > EVENTS_A_COMMIT {
        let Some(cut) =
            rest.events[EVENTS_A_COMMIT - 1..].windows(2).position(|pair| pair[0].block != pair[1].block)
        else {
            break;
        };
        let events = rest.events.split_off(EVENTS_A_COMMIT + cut);
        let last = rest.events.last().expect("there are that many").block;
        let split = |blocks: &mut Vec<BlockRef>| {
            blocks.split_off(blocks.partition_point(|block| block.number <= last.number))
        };
        let blocks = split(&mut rest.blocks);
        // By range only the last block's hash was asked for; the log has its own block's.
        if rest.blocks.last() != Some(&last) {
            rest.blocks.push(last);
        }
        let announced = rest.announced.partition_point(|(_, block)| block.number <= last.number);
        let announced = rest.announced.split_off(announced);
        let quarantined = rest.quarantined.partition_point(|log| log.block.0 <= last.number);
        let quarantined = rest.quarantined.split_off(quarantined);
        let later = Stretch { announced, events, quarantined, blocks, ..Stretch::default() };
        parts.push(std::mem::replace(&mut rest, later));
    }
    parts.push(rest);
    parts
}

/// One filter for each `at_once` addresses.
pub(super) fn log_calls(
    span: Span,
    addresses: &[Address],
    at_once: usize,
    topics: &Arc<[B256]>,
) -> Vec<Call> {
    let filter =
        |chunk: &[Address]| LogFilter { span, addresses: chunk.to_vec().into(), topics: Arc::clone(topics) };
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{Event, Log, Recognised, Role, Signatures};

    fn event(number: u64, log_index: u64) -> Event {
        let parse = |text: &str| vec![alloy::json_abi::Event::parse(text).unwrap()];
        let signatures = Signatures::new(&parse("A(address indexed it)"), "it", &parse("B()"), &[]).unwrap();
        let log = Log {
            address: Address::ZERO,
            topics: vec![parse("B()")[0].selector()],
            data: Default::default(),
            block: block(number),
            transaction_hash: B256::ZERO,
            transaction_index: 0,
            log_index,
            block_timestamp: None,
        };
        match signatures.recognise(Role::Lifecycle, &log) {
            Recognised::Known(decoded) => decoded.event(1, &log, 0),
            other => panic!("{other:?}"),
        }
    }

    fn block(number: u64) -> BlockRef {
        BlockRef { number, hash: B256::from(alloy::primitives::U256::from(number)) }
    }

    #[test]
    fn a_commit_is_bounded_at_the_end_of_a_block_and_a_single_block_may_exceed_it() {
        let dense = |blocks: &[(u64, usize)], marks: &[u64]| Stretch {
            events: blocks
                .iter()
                .flat_map(|(number, count)| (0..*count as u64).map(|index| event(*number, index)))
                .collect(),
            announced: blocks.iter().map(|(number, _)| (Address::ZERO, block(*number))).collect(),
            blocks: marks.iter().map(|number| block(*number)).collect(),
            ..Stretch::default()
        };
        type Row<'a> = (&'a [(u64, usize)], &'a [u64], &'a [(usize, &'a [u64])]);
        let table: [Row<'_>; 5] = [
            (&[(3, 5)], &[9], &[(5, &[9])]),
            (&[(3, 6000), (5, 6000), (7, 10)], &[9], &[(12_000, &[5]), (10, &[9])]),
            (&[(3, 25_000)], &[9], &[(25_000, &[9])]),
            (&[(3, 10_000), (4, 10_000)], &[3, 4, 5], &[(10_000, &[3]), (10_000, &[4, 5])]),
            (&[(1, 9_999), (2, 1), (3, 1)], &[1, 2, 3], &[(10_000, &[1, 2]), (1, &[3])]),
        ];
        for (blocks, marks, expected) in table {
            let whole = dense(blocks, marks);
            let (events, announced) = (whole.events.len(), whole.announced.len());
            let parts = parts(whole);
            let got: Vec<(usize, Vec<u64>)> = parts
                .iter()
                .map(|part| (part.events.len(), part.blocks.iter().map(|block| block.number).collect()))
                .collect();
            let expected: Vec<(usize, Vec<u64>)> =
                expected.iter().map(|(events, marks)| (*events, marks.to_vec())).collect();
            assert_eq!(got, expected, "{blocks:?}");
            assert_eq!(parts.iter().map(|part| part.events.len()).sum::<usize>(), events);
            assert_eq!(parts.iter().map(|part| part.announced.len()).sum::<usize>(), announced);
            for part in &parts {
                let last = part.blocks.last().unwrap().number;
                assert!(part.announced.iter().all(|(_, block)| block.number <= last), "with their events");
            }
        }
    }
}
