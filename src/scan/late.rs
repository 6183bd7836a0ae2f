//! History read once more, beside the reading of new blocks: for signatures added to the configuration, and for escrows
//! that became known late. It never goes beyond the cursor, and what it finds is published as late.
//!
//! Exactness is that of the first reading: final blocks by range with the header of the last block beside, later
//! ones by hash, after their headers were seen to lead to a block that was accepted.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use alloy::primitives::{Address, B256};
use tracing::info;

use super::harvest::{Harvest, quarantined, whole};
use super::limits::Way;
use super::read::say_found;
use super::{
    Answer, BlockTag, Call, Chain, LINKED_BLOCKS, LogFilter, Refused, ScanError, Scanner, Span, Step, Trouble,
};
use crate::config::Reading;
use crate::event::{Addresses, BlockRange, BlockRef, Header, Log, Recognised, Role, Signatures};
use crate::store::{Escrow, LateRead, LateStretch, on_disk};
use crate::telemetry::metrics;

/// What a late read looks for now.
struct Pass {
    id: u64,
    /// Signatures to look for in what is registered; none beyond the last block they concern.
    added: Signatures,
    topics: Arc<[B256]>,
    /// The factory and the escrows registered, as far as `added` concerns them.
    registered: Vec<Address>,
    /// Escrows with blocks of which nothing was read before: the first of these, and the first one after them.
    missing: BTreeMap<Address, (u64, u64)>,
    /// Late reads that come after this one and will find theirs in these escrows, too.
    later: Vec<LateRead>,
    /// The last block to read.
    last: u64,
}

/// The logs of a range, and the escrows that turned up in them.
#[derive(Default)]
struct LateHarvest {
    harvest: Harvest,
    /// Not registered before: the block that announced each.
    fresh: BTreeMap<Address, BlockRef>,
    /// Known from a later block only: the block that announced each, and the first block that was read.
    earlier: BTreeMap<Address, (BlockRef, u64)>,
}

impl<C: Chain> Scanner<C> {
    /// Goes on with what is read late: one commit at most. `Idle`: there is nothing, or nothing that can be read now.
    pub async fn step_late(&mut self) -> Result<Step, ScanError> {
        match self.try_step_late().await {
            Ok(step) => Ok(step),
            Err(trouble) => self.recover(trouble),
        }
    }

    async fn try_step_late(&mut self) -> Result<Step, Trouble> {
        let Some((id, read)) = self.store.late_read() else {
            return Ok(Step::Idle);
        };
        let (pass, next) = (self.pass(id, &read), read.next);
        if next > pass.last {
            let nothing = LateStretch { next, ..LateStretch::default() };
            self.accept_late(&pass, Arc::new(nothing), next).await?;
            return Ok(Step::Progress);
        }
        let last_final = self.finalized.unwrap_or(0).min(pass.last);
        let (by_range, count, last) = match self.settings.reading {
            _ if next <= last_final => (true, self.limits.range(Way::Addresses), last_final),
            Reading::Ranged => (true, self.limits.range(Way::Addresses), pass.last),
            Reading::Linked => (false, LINKED_BLOCKS.min(self.limits.range(Way::Addresses)), pass.last),
        };
        let range = BlockRange::starting_at(next, count, last).expect("next is not above last");
        let count = pass.registered.len().max(pass.missing.len());
        let everyone = !by_range && self.limits.way_by_hash(count) == Way::Everyone;
        let harvested = match by_range {
            true => self.late_range(&pass, range).await.map(Some),
            false => self.late_linked(&pass, range, everyone).await,
        };
        let found = match harvested {
            Ok(Some(found)) => found,
            Ok(None) => return Ok(Step::Idle),
            Err(Trouble::Refused {
                refused: Refused::FewerAddresses(_) | Refused::Halve(_) | Refused::Unknown(_),
                ..
            }) if everyone => {
                self.limits.refuse_everyone();
                return Ok(Step::Progress);
            }
            Err(trouble) => return Err(trouble.about(range.blocks(), Way::Addresses)),
        };
        let stretch = Arc::new(self.late_stretch(&pass, &found, range.to() + 1).await?);
        let compared = Arc::clone(&stretch);
        if on_disk(&self.store, move |store| store.is_of_another_fork(&compared)).await? {
            return Err(Trouble::Disagreement(format!("a log in {range} is not the one accepted there")));
        }
        self.accept_late(&pass, stretch, next).await?;
        let addresses = if everyone { 0 } else { pass.registered.len().max(pass.missing.len()) };
        self.limits.grow(Way::Addresses, range.blocks(), addresses.min(self.limits.addresses()), 0);
        Ok(Step::Progress)
    }

    fn pass(&self, id: u64, read: &LateRead) -> Pass {
        let within = read.next <= read.to;
        let added = if within { self.signatures.only(&read.signatures) } else { Signatures::default() };
        let registry = self.store.registry();
        let mut registered = Vec::new();
        if !added.announcement_topics().is_empty() {
            registered.push(self.factory);
        }
        if !added.lifecycle_topics().is_empty() {
            registered.extend(registry.registered());
        }
        let next_block = self.store.next_block();
        let joining = registry.joining(id).map(|(escrow, from)| (escrow, (from, next_block)));
        let missing: BTreeMap<Address, (u64, u64)> = joining.chain(registry.uncovered()).collect();
        let last = match missing.values().map(|(_, end)| *end).max() {
            Some(end) if !within => end.saturating_sub(1),
            Some(_) | None => read.to,
        };
        let later = self.store.late_reads_after(id);
        Pass { id, topics: added.topics().into(), added, registered, missing, later, last }
    }

    async fn accept_late(
        &mut self,
        pass: &Pass,
        stretch: Arc<LateStretch>,
        from: u64,
    ) -> Result<(), Trouble> {
        let (id, committed) = (pass.id, Arc::clone(&stretch));
        let done = on_disk(&self.store, move |store| store.accept_late(id, &committed)).await?;
        let (to, events) = (stretch.next.saturating_sub(1), stretch.events.len());
        metrics::late_events(events);
        if stretch.next > from {
            info!(from, to, events, "Read blocks {from} to {to} once more: {events} late events");
        }
        say_found(&stretch.announced, &stretch.quarantined);
        if done {
            let registered = self.store.registry().len();
            info!(escrows = registered, "The history is read; registry: {registered} escrows registered");
        }
        Ok(())
    }

    /// Final blocks, or all where the configuration says so.
    async fn late_range(&self, pass: &Pass, range: BlockRange) -> Result<LateHarvest, Trouble> {
        let mut found = LateHarvest::default();
        let calls = pass.calls(self, Span::Range(range), false);
        let end = self.gather_range(&mut found.harvest, range, calls).await?;
        if self.store.cursor().is_some_and(|cursor| cursor.number == range.to() && cursor != end.block) {
            return Err(Trouble::Disagreement(format!("block {} is not the one accepted", range.to())));
        }
        self.discover_late(pass, &mut found).await?;
        let turned_up = found.turned_up();
        if let Some(first) = turned_up.iter().map(|(_, block)| *block).min() {
            let span = range.tail(first).expect("announced inside the range");
            let escrows: Vec<Address> = turned_up.iter().map(|(escrow, _)| *escrow).collect();
            let calls = self.log_calls(Span::Range(span), &escrows, &self.lifecycle_topics);
            let again = self.gather_range(&mut found.harvest, span, calls).await?;
            if again.block != end.block {
                return Err(Trouble::Disagreement(format!("two headers of block {}", range.to())));
            }
        }
        found.harvest.times.insert(end.block.number, end.timestamp);
        found.harvest.know_times(&*self.chain).await?;
        Ok(found)
    }

    /// Asks these calls and for the header of the range's last block, which is returned.
    async fn gather_range(
        &self,
        harvest: &mut Harvest,
        range: BlockRange,
        mut calls: Vec<Call>,
    ) -> Result<Header, Trouble> {
        calls.insert(0, Call::Header(BlockTag::Number(range.to())));
        let mut answers = self.ask(calls).await?.into_iter();
        let end = whole(range, answers.next().and_then(Answer::header))?;
        for logs in answers {
            harvest.gather(logs.logs(), range, &end)?;
        }
        Ok(end)
    }

    /// Blocks that may still leave the chain. `None`: no accepted block says yet which they are.
    async fn late_linked(
        &self,
        pass: &Pass,
        range: BlockRange,
        everyone: bool,
    ) -> Result<Option<LateHarvest>, Trouble> {
        let remembered = on_disk(&self.store, |store| store.remembered()).await?;
        let Some(known) = remembered.into_iter().rev().find(|block| block.number >= range.to()) else {
            return Ok(None);
        };
        let headers = self.headers_leading_to(range.from(), known).await?;
        let headers = &headers[..range.blocks() as usize];
        let mut found = LateHarvest::default();
        let calls = |header: &Header| pass.calls(self, Span::Block(header.block.hash), everyone);
        self.gather_linked(&mut found.harvest, headers, calls).await?;
        self.discover_late(pass, &mut found).await?;
        let turned_up = found.turned_up();
        if !turned_up.is_empty() {
            let again = |header: &Header| {
                let announced = turned_up.iter().filter(|(_, block)| *block <= header.block.number);
                let escrows: Vec<Address> = announced.map(|(escrow, _)| *escrow).collect();
                self.log_calls(Span::Block(header.block.hash), &escrows, &self.lifecycle_topics)
            };
            self.gather_linked(&mut found.harvest, headers, again).await?;
        }
        found.harvest.times = headers.iter().map(|header| (header.block.number, header.timestamp)).collect();
        Ok(Some(found))
    }

    /// The headers from block `from` on to `known`, each the parent of the next: so all are of the chain accepted.
    async fn headers_leading_to(&self, from: u64, known: BlockRef) -> Result<Vec<Header>, Trouble> {
        let calls = (from..=known.number).map(|number| Call::Header(BlockTag::Number(number))).collect();
        let answers = self.ask(calls).await?.into_iter().map(Answer::header);
        let linked = answers.collect::<Option<Vec<Header>>>().filter(|headers| {
            headers.last().is_some_and(|last| last.block == known)
                && headers.windows(2).all(|pair| pair[1].parent_hash == pair[0].block.hash)
        });
        linked.ok_or_else(|| Trouble::Disagreement(format!("blocks {from} to {} do not link", known.number)))
    }

    /// Notes the escrows whose announcement was not known, and those that were known from a later one only.
    async fn discover_late(&self, pass: &Pass, found: &mut LateHarvest) -> Result<(), Trouble> {
        let mut known: BTreeMap<Address, BlockRef> = BTreeMap::new();
        for log in found.harvest.logs().filter(|log| log.address == self.factory) {
            if let Recognised::Known(decoded) = pass.added.recognise(Role::Announcement, log) {
                let (escrow, registry) = (decoded.escrow(log), self.store.registry());
                if registry.contains(&escrow) {
                    known.entry(escrow).or_insert(log.block);
                } else if !registry.is_joining(&escrow) {
                    found.fresh.entry(escrow).or_insert(log.block);
                }
            }
        }
        let rows = self.rows(known.keys().copied().collect()).await?;
        for (escrow, block) in known {
            let row = &rows[&escrow];
            // Of one that was imported, whoever did it said from where on it counts.
            if block.number < row.announced.0 && !row.is_imported() {
                found.earlier.insert(escrow, (block, row.covered_from));
            }
        }
        Ok(())
    }

    async fn rows(&self, escrows: Vec<Address>) -> Result<HashMap<Address, Escrow>, Trouble> {
        Ok(on_disk(&self.store, move |store| store.escrows_of(&escrows)).await?)
    }

    async fn late_stretch(
        &self,
        pass: &Pass,
        found: &LateHarvest,
        next: u64,
    ) -> Result<LateStretch, Trouble> {
        let emitters: BTreeSet<Address> = found.harvest.logs().map(|log| log.address).collect();
        let registered = pass.registered.iter().filter(|it| **it != self.factory && emitters.contains(*it));
        let rows = self.rows(registered.copied().collect()).await?;
        let mut stretch = LateStretch { next, ..LateStretch::default() };
        for log in found.harvest.logs() {
            let since = rows.get(&log.address).map(|escrow| escrow.announced.0);
            match self.recognise_late(pass, found, since, log) {
                Recognised::Unknown => {}
                Recognised::Malformed(reason) => stretch.quarantined.push(quarantined(log, reason)),
                Recognised::Known(decoded) => {
                    let time = found.harvest.time_of(log).expect("they were asked for");
                    stretch.events.push(decoded.event(self.settings.id, log, time));
                }
            }
        }
        stretch.events.sort_by_key(|event| event.order());
        stretch.announced = found.fresh.iter().map(|(escrow, block)| (*escrow, *block)).collect();
        stretch.announced.sort_by_key(|(escrow, block)| (block.number, *escrow));
        stretch.announced_earlier =
            found.earlier.iter().map(|(escrow, (block, _))| (*escrow, *block)).collect();
        Ok(stretch)
    }

    /// `since`: the block the emitter counts from, if it is registered. Only what was not read before counts, whatever
    /// the node answers beyond what was asked for.
    fn recognise_late(&self, pass: &Pass, found: &LateHarvest, since: Option<u64>, log: &Log) -> Recognised {
        let (address, block) = (&log.address, log.block.number);
        if *address == self.factory {
            match self.recognise_added(pass, Role::Announcement, log) {
                Recognised::Unknown => {}
                known => return known,
            }
        }
        let fresh = found.fresh.get(address).map(|announced| (announced.number, u64::MAX));
        let earlier = found.earlier.get(address).map(|(announced, covered)| (announced.number, *covered));
        let missing = fresh.or(earlier).or_else(|| pass.missing.get(address).copied());
        if missing.is_some_and(|(from, end)| (from..end).contains(&block)) {
            match self.signatures.recognise(Role::Lifecycle, log) {
                Recognised::Known(decoded) if pass.is_left_to_later(decoded.signature(), block) => {
                    Recognised::Unknown
                }
                recognised => recognised,
            }
        } else if since.is_some_and(|since| block >= since) {
            self.recognise_added(pass, Role::Lifecycle, log)
        } else {
            Recognised::Unknown
        }
    }

    /// By an added signature. One that shares its topic0 with another does not make that one's events odd: they were read.
    fn recognise_added(&self, pass: &Pass, role: Role, log: &Log) -> Recognised {
        match pass.added.recognise(role, log) {
            Recognised::Malformed(_)
                if matches!(self.signatures.recognise(role, log), Recognised::Known(_)) =>
            {
                Recognised::Unknown
            }
            recognised => recognised,
        }
    }
}

impl LateHarvest {
    /// Escrows whose logs have to be asked for, from that block on.
    fn turned_up(&self) -> Vec<(Address, u64)> {
        let fresh = self.fresh.iter().map(|(escrow, block)| (*escrow, block.number));
        fresh.chain(self.earlier.iter().map(|(escrow, (block, _))| (*escrow, block.number))).collect()
    }
}

impl Pass {
    fn is_left_to_later(&self, signature: &str, block: u64) -> bool {
        let finds = |read: &LateRead| {
            (read.next..=read.to).contains(&block) && read.signatures.iter().any(|text| text == signature)
        };
        self.later.iter().any(finds)
    }

    /// What to ask about a span. `everyone`: without addresses.
    fn calls<C: Chain>(&self, scanner: &Scanner<C>, span: Span, everyone: bool) -> Vec<Call> {
        let mut calls = Vec::new();
        let missing: Vec<Address> = self.missing.keys().copied().collect();
        for (addresses, topics) in [(&self.registered, &self.topics), (&missing, &scanner.lifecycle_topics)] {
            match everyone && !addresses.is_empty() {
                true => {
                    let topics = Arc::clone(topics);
                    calls.push(Call::Logs(LogFilter { span, addresses: Addresses::any(), topics }));
                }
                false => calls.extend(scanner.log_calls(span, addresses, topics)),
            }
        }
        calls
    }
}
