//! The logs of a stretch of blocks: whether they can be believed, and what they say.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::{Arc, LazyLock};
use std::thread::available_parallelism;

use alloy::primitives::map::{AddressMap, AddressSet};
use alloy::primitives::{Address, B256};
use foldhash::HashMap;

use super::{Answer, BlockTag, Call, Chain, Trouble};
use crate::event::{BlockRange, BlockRef, Event, Header, Log, Recognised, Role, Signatures};
use crate::store::{Place, Quarantined, Registry, Store, Stretch, on_thread};

/// Logs decoded by one thread at a time, at least: below it another one is not worth its start.
const LOGS_A_THREAD: usize = 500;

/// What it takes to make an event of a log.
#[derive(Clone)]
pub(super) struct Decoder {
    pub chain_id: u64,
    pub factory: Address,
    pub signatures: Arc<Signatures>,
    pub store: Arc<Store>,
}

/// Logs of a stretch of blocks with the escrows found in them.
#[derive(Default)]
pub(super) struct Harvest {
    /// Each log once.
    pub logs: BTreeMap<Place, Log>,
    /// Of which fork each block with logs is.
    forks: HashMap<u64, B256>,
    /// Times of blocks whose logs do not say theirs.
    pub times: HashMap<u64, u64>,
    /// Which escrow each announcement names.
    pub announced: BTreeMap<Place, (Address, BlockRef)>,
    /// Escrows that were asked for before anybody watches them.
    pub expected: AddressSet,
    /// Gathered and not decoded: since the last time, or because it is not of a contract that is ours.
    fresh_logs: Vec<Place>,
    /// Events already encoded.
    ready: HashMap<Place, Event>,
}

impl Harvest {
    /// Nothing yet, of blocks with these headers.
    pub fn of(headers: &[Header]) -> Self {
        let times = headers.iter().map(|header| (header.block.number, header.timestamp)).collect();
        Self { times, ..Self::default() }
    }

    /// Adds one answer's logs. `end` is the header of the last block: the logs there must be of that fork.
    pub fn gather(&mut self, logs: Vec<Log>, range: BlockRange, end: &Header) -> Result<(), Trouble> {
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
            let place = (number, log.log_index);
            match self.logs.entry(place) {
                Entry::Vacant(vacant) => {
                    vacant.insert(log);
                    self.fresh_logs.push(place);
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

    /// Asks what `calls` says for each block, all in one go. `false`: it was asked for ahead, and not answered.
    pub async fn gather_blocks<C: Chain>(
        &mut self,
        chain: &C,
        headers: &[Header],
        calls: impl Fn(&Header) -> Vec<Call>,
        ahead: bool,
    ) -> Result<bool, Trouble> {
        let (mut asked, mut of) = (Vec::new(), Vec::new());
        for header in headers {
            let block = calls(header);
            of.extend(std::iter::repeat_n(*header, block.len()));
            asked.extend(block);
        }
        let Some(answers) = ask(chain, asked, ahead).await? else {
            return Ok(false);
        };
        for (answer, header) in answers.into_iter().zip(of) {
            let block = BlockRange::new(header.block.number, header.block.number).expect("one block");
            self.gather(answer.logs(), block, &header)?;
        }
        Ok(true)
    }

    /// Asks for the times that the logs do not say.
    pub async fn know_times<C: Chain>(&mut self, chain: &C) -> Result<(), Trouble> {
        let places: Vec<Place> = self.logs.keys().copied().collect();
        match self.untimed(&places) {
            untimed if untimed.is_empty() => Ok(()),
            untimed => self.ask_times(chain, untimed, false).await.map(drop),
        }
    }

    /// The time of a log's block, as far as it is known.
    pub fn time_of(&self, log: &Log) -> Option<u64> {
        log.block_timestamp.or_else(|| self.times.get(&log.block.number).copied())
    }

    /// Takes what is of block `from` and later ones out.
    pub fn split_off(&mut self, from: u64) -> Self {
        let logs = self.logs.split_off(&(from, 0));
        let announced = self.announced.split_off(&(from, 0));
        let (later, earlier) =
            std::mem::take(&mut self.fresh_logs).into_iter().partition(|(block, _)| *block >= from);
        self.fresh_logs = earlier;
        let ready = self.ready.extract_if(|(block, _), _| *block >= from).collect();
        let (forks, times) = (self.forks.clone(), self.times.clone());
        let expected = self.expected.clone();
        Self { logs, forks, times, announced, expected, fresh_logs: later, ready }
    }

    /// Reads whom the announcements among what was gathered name, on as many cores as there is work for.
    fn read_announcements(&mut self, decoder: &Decoder) {
        let by_factory = |place: &&Place| self.logs[place].address == decoder.factory;
        let is_new = |place: &&Place| by_factory(place) && !self.announced.contains_key(place);
        let places: Vec<Place> = self.fresh_logs.iter().filter(is_new).copied().collect();
        let read = on_cores(&places, |place| {
            let log = &self.logs[place];
            match decoder.signatures.recognise(Role::Announcement, log) {
                Recognised::Known(decoded) => Some((*place, (decoded.escrow(log), log.block))),
                Recognised::Malformed(_) | Recognised::Unknown => None,
            }
        });
        self.announced.extend(read);
    }

    /// What is gathered and not decoded of contracts that are ours. Of others (filters without addresses bring them) is kept
    /// which they are: they may turn out to be ours.
    fn take_ours(&mut self, decoder: &Decoder) -> Vec<Place> {
        let registry = decoder.store.registry();
        let announced: AddressSet = self.announced.values().map(|(escrow, _)| *escrow).collect();
        let is_ours = |place: &Place| {
            let address = &self.logs[place].address;
            *address == decoder.factory
                || registry.contains(address)
                || announced.contains(address)
                || self.expected.contains(address)
        };
        let (ours, others): (Vec<Place>, Vec<Place>) =
            std::mem::take(&mut self.fresh_logs).into_iter().partition(is_ours);
        self.fresh_logs = others;
        ours
    }

    /// The blocks whose times are still unknown, of logs that may be events.
    fn untimed(&self, places: &[Place]) -> BTreeMap<u64, BlockRef> {
        let logs = places.iter().map(|place| &self.logs[place]);
        let untimed = logs.filter(|log| self.time_of(log).is_none());
        untimed.map(|log| (log.block.number, log.block)).collect()
    }

    /// Decodes and encodes these logs, on as many cores as there is work for.
    fn decode(&mut self, decoder: &Decoder, places: &[Place]) {
        let decoded = on_cores(places, |place| {
            let log = &self.logs[place];
            let time = self.time_of(log)?;
            let role = if log.address == decoder.factory { Role::Announcement } else { Role::Lifecycle };
            match decoder.signatures.recognise(role, log) {
                Recognised::Known(decoded) => Some((*place, decoded.event(decoder.chain_id, log, time))),
                // Said where it is known whether it counts.
                Recognised::Malformed(_) | Recognised::Unknown => None,
            }
        });
        self.ready.extend(decoded);
    }

    /// Does what there is to do with so many logs: on another thread than those that wait for the network, if they are many.
    async fn aside(mut self, logs: usize, work: impl FnOnce(&mut Self) + Send + 'static) -> Self {
        if logs < LOGS_A_THREAD {
            work(&mut self);
            return self;
        }
        on_thread(move || {
            work(&mut self);
            self
        })
        .await
    }

    /// Makes events of what was gathered, as far as it can be said by now which logs are, and asks for times that are missing.
    /// `ahead`: nobody waits for it yet. If others are `to_be_followed`, only reads who is announced: these are to be asked for,
    /// and the rest can be done [meanwhile](Self::encode).
    pub async fn prepare<C: Chain>(
        self,
        chain: &C,
        decoder: &Decoder,
        ahead: bool,
        to_be_followed: impl FnOnce(&Self) -> bool,
    ) -> Result<Self, Trouble> {
        let (fresh, with) = (self.fresh_logs.len(), decoder.clone());
        let mut harvest = self.aside(fresh, move |harvest| harvest.read_announcements(&with)).await;
        if to_be_followed(&harvest) {
            return Ok(harvest);
        }
        let places = harvest.take_ours(decoder);
        let untimed = harvest.untimed(&places);
        if !untimed.is_empty() {
            harvest.ask_times(chain, untimed, ahead).await?;
        }
        Ok(harvest.encode_these(decoder, places).await)
    }

    /// Makes events of what was gathered, as far as it can be done without asking.
    pub async fn encode(mut self, decoder: &Decoder) -> Self {
        let places = self.take_ours(decoder);
        self.encode_these(decoder, places).await
    }

    /// Those whose times are unknown stay as they are.
    async fn encode_these(mut self, decoder: &Decoder, places: Vec<Place>) -> Self {
        let is_timed = |place: &Place| self.time_of(&self.logs[place]).is_some();
        let (timed, rest): (Vec<Place>, Vec<Place>) = places.into_iter().partition(is_timed);
        self.fresh_logs.extend(rest);
        let with = decoder.clone();
        self.aside(timed.len(), move |harvest| harvest.decode(&with, &timed)).await
    }

    /// `false`: it was asked for ahead, and not answered.
    async fn ask_times<C: Chain>(
        &mut self,
        chain: &C,
        blocks: BTreeMap<u64, BlockRef>,
        ahead: bool,
    ) -> Result<bool, Trouble> {
        let calls = blocks.keys().map(|number| Call::Header(BlockTag::Number(*number))).collect();
        let Some(answers) = ask(chain, calls, ahead).await? else {
            return Ok(false);
        };
        for (answer, block) in answers.into_iter().zip(blocks.values()) {
            match answer.header() {
                Some(header) if header.block == *block => {
                    self.times.insert(block.number, header.timestamp);
                }
                _ => {
                    let number = block.number;
                    return Err(Trouble::Disagreement(format!("logs and header of block {number} differ")));
                }
            }
        }
        Ok(true)
    }

    /// Escrows announced here that are not registered, with the block that announced each first.
    pub fn unregistered(&self, registry: &Registry) -> Vec<(Address, BlockRef)> {
        self.announced_unless(|escrow| registry.contains(escrow) || registry.is_joining(escrow))
    }

    /// Escrows announced here that nobody asks for: the same, and archived ones.
    pub fn unwatched(&self, registry: &Registry) -> Vec<(Address, BlockRef)> {
        self.announced_unless(|escrow| is_asked_for(registry, escrow))
    }

    /// Whether there are any.
    pub fn has_unwatched(&self, registry: &Registry) -> bool {
        self.announced.values().any(|(escrow, _)| !is_asked_for(registry, escrow))
    }

    fn announced_unless(&self, is_known: impl Fn(&Address) -> bool) -> Vec<(Address, BlockRef)> {
        let mut seen = AddressSet::default();
        let announced = self.announced.values().copied();
        announced.filter(|(escrow, _)| !is_known(escrow) && seen.insert(*escrow)).collect()
    }

    /// Whether there are logs of an archived escrow here: once they are accepted, it is asked for again.
    pub fn has_archived(&self, registry: &Registry) -> bool {
        let mut logs = self.logs.values();
        registry.len() > registry.watched_len() && logs.any(|log| registry.is_archived(&log.address))
    }

    /// Adds what these blocks bring to a stretch of those before them: the events of registered escrows and of those
    /// announced here or there, `fresh`. Says how many of the logs are of others.
    pub fn add_to(
        mut self,
        stretch: &mut Stretch,
        fresh: &mut AddressMap<BlockRef>,
        decoder: &Decoder,
    ) -> usize {
        let registry = decoder.store.registry();
        let (events, announced) = (stretch.events.len(), stretch.announced.len());
        for (escrow, block) in self.unregistered(&registry) {
            fresh.entry(escrow).or_insert_with(|| {
                stretch.announced.push((escrow, block));
                block
            });
        }
        let mut others = 0;
        for (place, log) in &self.logs {
            let registered = registry.counts(&log.address, log.block.number)
                || fresh.get(&log.address).is_some_and(|block| log.block.number >= block.number);
            let by_factory = log.address == decoder.factory;
            if let Some(event) = self.ready.remove(place)
                && (event.announces || registered)
            {
                stretch.events.push(event);
                continue;
            }
            others += usize::from(!registered && !by_factory);
            let recognised = match by_factory {
                true => decoder.signatures.recognise(Role::Announcement, log),
                false => Recognised::Unknown,
            };
            let recognised = match recognised {
                Recognised::Unknown if registered => decoder.signatures.recognise(Role::Lifecycle, log),
                other => other,
            };
            match recognised {
                Recognised::Unknown => {}
                Recognised::Malformed(reason) => stretch.quarantined.push(quarantined(log, reason)),
                Recognised::Known(decoded) => {
                    let time = self.time_of(log).expect("what may be an event has its time by now");
                    stretch.events.push(decoded.event(decoder.chain_id, log, time));
                }
            }
        }
        stretch.events[events..].sort_by_key(|event| event.order());
        stretch.announced[announced..].sort_by_key(|(escrow, block)| (block.number, *escrow));
        others
    }
}

/// Whether it is watched, or a late read is about to see to that.
fn is_asked_for(registry: &Registry, escrow: &Address) -> bool {
    registry.is_watched(escrow) || registry.is_joining(escrow)
}

/// What becomes of each, in order, where something does.
fn on_cores<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> Option<R> + Sync) -> Vec<R> {
    // The system reads files to say it.
    static CORES: LazyLock<usize> = LazyLock::new(|| available_parallelism().map_or(1, usize::from));
    let cores = *CORES;
    let part = items.len().div_ceil(cores).max(LOGS_A_THREAD);
    if items.len() <= part {
        return items.iter().filter_map(work).collect();
    }
    let part_of = |part: &[T]| part.iter().filter_map(&work).collect::<Vec<R>>();
    let parts: Vec<Vec<R>> = std::thread::scope(|scope| {
        let threads: Vec<_> = items.chunks(part).map(|part| scope.spawn(|| part_of(part))).collect();
        threads.into_iter().map(|it| it.join().expect("decoding does not panic")).collect()
    });
    parts.into_iter().flatten().collect()
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

/// `None`: it was asked for ahead, and not answered.
async fn ask<C: Chain>(chain: &C, calls: Vec<Call>, ahead: bool) -> Result<Option<Vec<Answer>>, Trouble> {
    match ahead {
        true => Ok(chain.ask_ahead(calls).await),
        false => chain.ask(calls).await.map(Some).map_err(Trouble::refused),
    }
}

/// The calls for a range.
pub(super) struct Ask {
    pub range: BlockRange,
    /// Whether to ask which block it follows.
    pub linked: bool,
    /// Nobody waits for it yet.
    pub ahead: bool,
    /// What was told of its ends before.
    pub told: Option<Ends>,
    pub logs: Vec<Call>,
}

/// What is told of the ends of a range.
#[derive(Clone, Copy)]
pub(super) struct Ends {
    /// The hash of the block before it, if that was asked.
    pub parent: Option<B256>,
    /// The header of its last block; unknown of a part that was cut off.
    pub end: Option<Header>,
}

/// Asks for a range: with its logs come the headers of its ends, so that it is known where it belongs and that the node
/// answering has all of it. They are added to the harvest that `meanwhile` makes. `None`: it was asked for ahead, and not
/// answered.
pub(super) async fn ask_range<C: Chain>(
    chain: &C,
    request: Ask,
    meanwhile: impl Future<Output = Harvest>,
) -> Result<Option<(Ends, Harvest)>, Trouble> {
    let Ask { range, linked, ahead, told, logs } = request;
    let header = |number| Call::Header(BlockTag::Number(number));
    let single = range.from() == range.to();
    let mut calls = vec![header(range.to())];
    calls.extend((linked && !single).then(|| header(range.from())));
    let heads = calls.len();
    calls.extend(logs);
    let (answers, mut harvest) = tokio::join!(ask(chain, calls, ahead), meanwhile);
    let Some(mut answers) = answers? else {
        return Ok(None);
    };
    let logs = answers.split_off(heads);
    let mut headers = answers.into_iter().map(Answer::header);
    let end = whole(range, headers.next().flatten())?;
    let told_otherwise = |told: Ends| told.end.is_some_and(|told| told.block != end.block);
    let of_another_fork = harvest.forks.get(&range.to()).is_some_and(|hash| *hash != end.block.hash);
    if told.is_some_and(told_otherwise) || of_another_fork {
        return Err(Trouble::Disagreement(format!("two headers of block {}", range.to())));
    }
    let parent = match headers.next() {
        None => linked.then_some(end.parent_hash),
        Some(first) => {
            let first = first.filter(|header| header.block.number == range.from());
            let missing = || Trouble::Disagreement(format!("no header of block {}", range.from()));
            Some(first.ok_or_else(missing)?.parent_hash)
        }
    };
    for logs in logs {
        harvest.gather(logs.logs(), range, &end)?;
    }
    let parent = parent.or(told.and_then(|told| told.parent));
    Ok(Some((Ends { parent, end: Some(end) }, harvest)))
}
