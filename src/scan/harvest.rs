//! The logs of a stretch of blocks: whether they can be believed, and what they say.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::{Arc, LazyLock, RwLockReadGuard};
use std::thread::available_parallelism;

use alloy::primitives::map::{AddressMap, AddressSet};
use alloy::primitives::{Address, B256};
use foldhash::HashMap;

use super::{Answer, BlockTag, Call, Chain, Trouble};
use crate::event::{BlockRange, BlockRef, Decoded, Event, Header, Log, Recognised, Role, Signatures, digest};
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
    taken: BTreeMap<Place, Box<Taken>>,
    /// How many of them, at most, have yet to be looked at, or to be encoded.
    open: usize,
    /// Of which fork each block with logs is.
    forks: HashMap<u64, B256>,
    /// Times of blocks whose logs do not say theirs.
    pub times: HashMap<u64, u64>,
    /// Which escrow each announcement names.
    announced: BTreeMap<Place, (Address, BlockRef)>,
    /// Escrows that were asked for before anybody watches them.
    pub expected: AddressSet,
}

/// A log, and what has become of it.
struct Taken {
    /// Once it is encoded, without its topics and data: what it says is in the event's digest.
    log: Log,
    stage: Stage,
}

impl Taken {
    /// Whether that is this log.
    fn is(&self, other: &Log) -> bool {
        let known = &self.log;
        match &self.stage {
            Stage::Ready(event) => event.digest == digest(other),
            Stage::Fresh | Stage::Announces(_) | Stage::Other => {
                (known.transaction_hash, known.address, &known.topics, &known.data)
                    == (other.transaction_hash, other.address, &other.topics, &other.data)
            }
        }
    }
}

enum Stage {
    /// Just gathered; or not of a contract that is ours, as far as is known: filters without addresses bring those.
    Fresh,
    /// An announcement, not encoded yet.
    Announces(Decoded),
    /// Encoded.
    Ready(Event),
    /// Of ours, and no event of its kind; what it is instead is said where it is known whether it counts.
    Other,
}

impl Harvest {
    /// Nothing yet, of blocks with these headers.
    pub fn of(headers: &[Header]) -> Self {
        let times = headers.iter().map(|header| (header.block.number, header.timestamp)).collect();
        Self { times, ..Self::default() }
    }

    /// How many logs there are.
    pub fn len(&self) -> usize {
        self.taken.len()
    }

    /// The logs, in order.
    pub fn logs(&self) -> impl Iterator<Item = &Log> {
        self.taken.values().map(|taken| &taken.log)
    }

    /// The logs with their places, in order.
    pub fn into_logs(self) -> impl Iterator<Item = (Place, Log)> {
        self.taken.into_iter().map(|(place, taken)| (place, taken.log))
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
            match self.taken.entry(place) {
                Entry::Vacant(vacant) => {
                    vacant.insert(Box::new(Taken { log, stage: Stage::Fresh }));
                    self.open += 1;
                }
                // A log said twice counts once.
                Entry::Occupied(known) if known.get().is(&log) => {}
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
        match self.untimed(|_| true) {
            untimed if untimed.is_empty() => Ok(()),
            untimed => self.ask_times(chain, untimed, false).await.map(drop),
        }
    }

    /// The time of a log's block, as far as it is known.
    pub fn time_of(&self, log: &Log) -> Option<u64> {
        time_of(&self.times, log)
    }

    /// Reads whom the announcements among what was gathered name, on as many cores as there is work for.
    fn read_announcements(&mut self, decoder: &Decoder) {
        let is_fresh =
            |taken: &Taken| taken.log.address == decoder.factory && matches!(taken.stage, Stage::Fresh);
        let mut fresh: Vec<(&Place, &mut Box<Taken>)> =
            self.taken.iter_mut().filter(|(_, taken)| is_fresh(taken)).collect();
        on_cores(&mut fresh, |(_, taken)| {
            taken.stage = match decoder.signatures.recognise(Role::Announcement, &taken.log) {
                Recognised::Known(decoded) => Stage::Announces(decoded),
                Recognised::Malformed(_) | Recognised::Unknown => Stage::Other,
            };
        });
        for (place, Taken { log, stage }) in fresh.into_iter().map(|(place, taken)| (place, &**taken)) {
            if let Stage::Announces(decoded) = stage {
                self.announced.insert(*place, (decoded.escrow(log), log.block));
            }
        }
    }

    /// The blocks whose times are still unknown, of the logs of these emitters.
    fn untimed(&self, is_wanted: impl Fn(&Address) -> bool) -> BTreeMap<u64, BlockRef> {
        let untimed = self.logs().filter(|log| self.time_of(log).is_none() && is_wanted(&log.address));
        untimed.map(|log| (log.block.number, log.block)).collect()
    }

    /// Encodes what was not, of contracts that are ours, as far as the times are known; on as many cores as there is work for.
    fn encode_open(&mut self, decoder: &Decoder) {
        let ours = Ours::of(&self.announced, &self.expected, decoder);
        let (mut work, mut left) = (Vec::with_capacity(self.open), 0);
        for taken in self.taken.values_mut() {
            let is_open = match &taken.stage {
                // Of the factory it is only what was gathered since its announcements were read.
                Stage::Fresh => taken.log.address != decoder.factory && ours.has(&taken.log.address),
                Stage::Announces(_) => true,
                Stage::Ready(_) | Stage::Other => false,
            };
            match time_of(&self.times, &taken.log) {
                Some(time) if is_open => work.push((taken, time)),
                Some(_) | None => {
                    left += usize::from(matches!(taken.stage, Stage::Fresh | Stage::Announces(_)))
                }
            }
        }
        drop(ours);
        on_cores(&mut work, |(taken, time)| {
            let Taken { log, stage } = &mut ***taken;
            let decoded = match std::mem::replace(stage, Stage::Other) {
                Stage::Announces(decoded) => Recognised::Known(decoded),
                Stage::Fresh | Stage::Ready(_) | Stage::Other => {
                    decoder.signatures.recognise(Role::Lifecycle, log)
                }
            };
            if let Recognised::Known(decoded) = decoded {
                *stage = Stage::Ready(decoded.event(decoder.chain_id, log, *time));
                // There are many of these at once.
                (log.topics, log.data) = Default::default();
            }
        });
        self.open = left;
    }

    /// Does what there is to do with what is open: on another thread than those that wait for the network, if it is much.
    async fn aside(
        mut self,
        decoder: &Decoder,
        work: impl FnOnce(&mut Self, &Decoder) + Send + 'static,
    ) -> Self {
        if self.open == 0 {
            return self;
        }
        if self.open < LOGS_A_THREAD {
            work(&mut self, decoder);
            return self;
        }
        let decoder = decoder.clone();
        on_thread(move || {
            work(&mut self, &decoder);
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
        let mut harvest = self.aside(decoder, Self::read_announcements).await;
        if harvest.open == 0 || to_be_followed(&harvest) {
            return Ok(harvest);
        }
        let untimed = {
            let ours = Ours::of(&harvest.announced, &harvest.expected, decoder);
            harvest.untimed(|emitter| ours.has(emitter))
        };
        if !untimed.is_empty() {
            harvest.ask_times(chain, untimed, ahead).await?;
        }
        Ok(harvest.encode(decoder).await)
    }

    /// Makes events of what was gathered, as far as it can be done without asking.
    pub async fn encode(self, decoder: &Decoder) -> Self {
        self.aside(decoder, Self::encode_open).await
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
        let mut logs = self.logs();
        registry.len() > registry.watched_len() && logs.any(|log| registry.is_archived(&log.address))
    }

    /// Adds what these blocks bring to a stretch of those before them: the events of registered escrows and of those
    /// announced here or there, `fresh`. Says how many of the logs are of others.
    pub fn add_to(self, stretch: &mut Stretch, fresh: &mut AddressMap<BlockRef>, decoder: &Decoder) -> usize {
        let registry = decoder.store.registry();
        let (events, announced) = (stretch.events.len(), stretch.announced.len());
        for (escrow, block) in self.unregistered(&registry) {
            fresh.entry(escrow).or_insert_with(|| {
                stretch.announced.push((escrow, block));
                block
            });
        }
        let mut others = 0;
        stretch.events.reserve(self.taken.len());
        for Taken { log, stage } in self.taken.into_values().map(|taken| *taken) {
            let registered = registry.counts(&log.address, log.block.number)
                || fresh.get(&log.address).is_some_and(|block| log.block.number >= block.number);
            let by_factory = log.address == decoder.factory;
            if let Stage::Ready(event) = stage
                && (event.announces || registered)
            {
                stretch.events.push(event);
                continue;
            }
            others += usize::from(!registered && !by_factory);
            let recognised = match by_factory {
                true => decoder.signatures.recognise(Role::Announcement, &log),
                false => Recognised::Unknown,
            };
            let recognised = match recognised {
                Recognised::Unknown if registered => decoder.signatures.recognise(Role::Lifecycle, &log),
                other => other,
            };
            match recognised {
                Recognised::Unknown => {}
                Recognised::Malformed(reason) => stretch.quarantined.push(quarantined(&log, reason)),
                Recognised::Known(decoded) => {
                    let time = time_of(&self.times, &log).expect("what may be an event has its time by now");
                    stretch.events.push(decoded.event(decoder.chain_id, &log, time));
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

/// Whose logs are ours, as far as is known.
struct Ours<'a> {
    factory: Address,
    registry: RwLockReadGuard<'a, Registry>,
    expected: &'a AddressSet,
    announced: &'a BTreeMap<Place, (Address, BlockRef)>,
    /// The same by address, made when it is needed first.
    by_address: OnceCell<AddressSet>,
}

impl<'a> Ours<'a> {
    fn of(
        announced: &'a BTreeMap<Place, (Address, BlockRef)>,
        expected: &'a AddressSet,
        decoder: &'a Decoder,
    ) -> Self {
        let (factory, registry) = (decoder.factory, decoder.store.registry());
        Self { factory, registry, expected, announced, by_address: OnceCell::new() }
    }

    fn has(&self, emitter: &Address) -> bool {
        let by_address = || self.announced.values().map(|(escrow, _)| *escrow).collect();
        *emitter == self.factory
            || self.expected.contains(emitter)
            || self.registry.contains(emitter)
            || self.by_address.get_or_init(by_address).contains(emitter)
    }
}

fn time_of(times: &HashMap<u64, u64>, log: &Log) -> Option<u64> {
    log.block_timestamp.or_else(|| times.get(&log.block.number).copied())
}

/// Does it with each, on as many cores as there is work for.
fn on_cores<T: Send>(items: &mut [T], work: impl Fn(&mut T) + Sync) {
    // The system reads files to say it.
    static CORES: LazyLock<usize> = LazyLock::new(|| available_parallelism().map_or(1, usize::from));
    let part = items.len().div_ceil(*CORES).max(LOGS_A_THREAD);
    let (here, others) = items.split_at_mut(part.min(items.len()));
    std::thread::scope(|scope| {
        for part in others.chunks_mut(part) {
            scope.spawn(|| part.iter_mut().for_each(&work));
        }
        here.iter_mut().for_each(&work);
    });
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
    /// The header of its last block.
    pub end: Header,
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
    let told_otherwise = |told: Ends| told.end.block != end.block;
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
    Ok(Some((Ends { parent, end }, harvest)))
}
