//! History read once more, beside the reading of new blocks: for signatures added to the configuration, and for escrows
//! that became known late. It never goes beyond the cursor, and what it finds is published as late.
//!
//! Exactness is that of the first reading: final blocks by range with the header of the last block beside, later
//! ones by hash, after their headers were seen to lead to a block that was accepted.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use alloy::primitives::{Address, B256};
use tracing::info;

use super::read::{Harvest, quarantined, say_found, whole};
use super::{
    Answer, BlockTag, Call, Chain, LINKED_BLOCKS, LogFilter, ScanError, Scanner, Span, Step, Trouble,
};
use crate::config::Reading;
use crate::event::{BlockRange, BlockRef, Header, Log, Recognised, Role, Signatures};
use crate::store::{LateRead, LateStretch, on_disk};

/// Whose logs a late read asks for, in blocks that are all of one kind.
struct Pass {
    id: u64,
    /// Signatures to look for in what is registered; none beyond the last block they concern.
    added: Signatures,
    topics: Arc<[B256]>,
    /// The factory and the escrows registered, as far as `added` concerns them.
    registered: Vec<Address>,
    /// Escrows that are joining, each with the first block of its that counts.
    joining: BTreeMap<Address, u64>,
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
        let pass = self.pass(id, &read);
        let accepted = self.store.next_block().saturating_sub(1);
        let last = match read.next <= read.to {
            true => read.to,
            false if pass.joining.is_empty() => return self.finish_late(&pass, read.next).await,
            false if read.next >= self.store.next_block() => return self.finish_late(&pass, read.next).await,
            false => accepted,
        };
        let last_final = self.finalized.unwrap_or(0).min(last);
        let (by_range, count, last) = match self.settings.reading {
            _ if read.next <= last_final => (true, self.limits.range(), last_final),
            Reading::Ranged => (true, self.limits.range(), last),
            Reading::Linked => (false, LINKED_BLOCKS.min(self.limits.range()), last),
        };
        let range = BlockRange::starting_at(read.next, count, last).expect("next is not above last");
        let everyone = !by_range && self.limits.topics_only(pass.registered.len() + pass.joining.len());
        let harvested = match by_range {
            true => self.late_range(&pass, range).await.map(Some),
            false => self.late_linked(&pass, range, everyone).await,
        };
        let (harvest, times) = match harvested {
            Ok(Some(harvested)) => harvested,
            Ok(None) => return Ok(Step::Idle),
            Err(Trouble::Refused { .. }) if everyone => {
                self.limits.refuse_topics_only();
                return Ok(Step::Progress);
            }
            Err(Trouble::Refused { refused, .. }) => {
                return Err(Trouble::Refused { refused, blocks: range.blocks() });
            }
            Err(trouble) => return Err(trouble),
        };
        let stretch = self.late_stretch(&pass, &harvest, &times, range.to() + 1).await?;
        self.accept_late(&pass, stretch, read.next).await?;
        self.limits.grow(range.blocks());
        Ok(Step::Progress)
    }

    fn pass(&self, id: u64, read: &LateRead) -> Pass {
        let added = match read.next <= read.to {
            true => self.signatures.only(&read.signatures),
            false => Signatures::default(),
        };
        let registry = self.store.registry();
        let mut registered = Vec::new();
        if !added.announcement_topics().is_empty() {
            registered.push(self.factory);
        }
        if !added.lifecycle_topics().is_empty() {
            registered.extend(registry.watched().iter());
        }
        let joining = registry.joining(id).collect();
        Pass { id, topics: added.topics().into(), added, registered, joining }
    }

    /// Commits that nothing is left to read.
    async fn finish_late(&mut self, pass: &Pass, next: u64) -> Result<Step, Trouble> {
        self.accept_late(pass, LateStretch { next, ..LateStretch::default() }, next).await?;
        Ok(Step::Progress)
    }

    async fn accept_late(&mut self, pass: &Pass, stretch: LateStretch, from: u64) -> Result<(), Trouble> {
        let (id, stretch) = (pass.id, Arc::new(stretch));
        let committed = Arc::clone(&stretch);
        let done = on_disk(&self.store, move |store| store.accept_late(id, &committed)).await?;
        let (to, events) = (stretch.next.saturating_sub(1), stretch.events.len());
        metrics::counter!("relayer_late_events_total").increment(events as u64);
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
    async fn late_range(
        &self,
        pass: &Pass,
        range: BlockRange,
    ) -> Result<(Harvest, HashMap<u64, u64>), Trouble> {
        let mut harvest = Harvest::default();
        let end = self
            .gather_range(&mut harvest, range, |this| pass.calls(this, Span::Range(range), false))
            .await?;
        if self.store.cursor().is_some_and(|cursor| cursor.number == range.to() && cursor != end.block) {
            return Err(Trouble::Disagreement(format!("block {} is not the one accepted", range.to())));
        }
        let fresh = self.discover(&mut harvest, &pass.added);
        if let Some(first) = fresh.iter().map(|(_, block)| block.number).min() {
            let span = range.tail(first).expect("announced inside the range");
            let escrows: Vec<Address> = fresh.iter().map(|(escrow, _)| *escrow).collect();
            let calls =
                |this: &Self| this.log_calls(Span::Range(span), None, &escrows, &this.lifecycle_topics);
            let again = self.gather_range(&mut harvest, span, calls).await?;
            if again.block != end.block {
                return Err(Trouble::Disagreement(format!("two headers of block {}", range.to())));
            }
        }
        let times = self.times(&harvest, end).await?;
        Ok((harvest, times))
    }

    /// Asks these calls and for the header of the range's last block, which is returned.
    async fn gather_range(
        &self,
        harvest: &mut Harvest,
        range: BlockRange,
        calls: impl Fn(&Self) -> Vec<Call>,
    ) -> Result<Header, Trouble> {
        let mut all = vec![Call::Header(BlockTag::Number(range.to()))];
        all.extend(calls(self));
        let mut answers = self.ask(all).await?.into_iter();
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
    ) -> Result<Option<(Harvest, HashMap<u64, u64>)>, Trouble> {
        let remembered = on_disk(&self.store, |store| store.remembered()).await?;
        let Some(known) = remembered.into_iter().rev().find(|block| block.number >= range.to()) else {
            return Ok(None);
        };
        let headers = self.headers_leading_to(range.from(), known).await?;
        let headers = &headers[..range.blocks() as usize];
        let mut harvest = Harvest::default();
        let calls = |header: &Header| pass.calls(self, Span::Block(header.block.hash), everyone);
        self.gather_linked(&mut harvest, headers, calls).await?;
        let fresh = self.discover(&mut harvest, &pass.added);
        if !fresh.is_empty() {
            let again = |header: &Header| {
                let announced = fresh.iter().filter(|(_, block)| block.number <= header.block.number);
                let escrows: Vec<Address> = announced.map(|(escrow, _)| *escrow).collect();
                self.log_calls(Span::Block(header.block.hash), None, &escrows, &self.lifecycle_topics)
            };
            self.gather_linked(&mut harvest, headers, again).await?;
        }
        let times = headers.iter().map(|header| (header.block.number, header.timestamp)).collect();
        Ok(Some((harvest, times)))
    }

    /// The headers from block `from` on to `known`, each the parent of the next: so all are of the chain accepted.
    async fn headers_leading_to(&self, from: u64, known: BlockRef) -> Result<Vec<Header>, Trouble> {
        let calls = (from..=known.number).map(|number| Call::Header(BlockTag::Number(number))).collect();
        let answers = self.ask(calls).await?.into_iter().map(Answer::header);
        let headers = answers.collect::<Option<Vec<Header>>>();
        let linked = headers.filter(|headers| {
            headers.last().is_some_and(|last| last.block == known)
                && headers.windows(2).all(|pair| pair[1].parent_hash == pair[0].block.hash)
        });
        linked.ok_or_else(|| Trouble::Disagreement(format!("blocks {from} to {} do not link", known.number)))
    }

    async fn late_stretch(
        &self,
        pass: &Pass,
        harvest: &Harvest,
        times: &HashMap<u64, u64>,
        next: u64,
    ) -> Result<LateStretch, Trouble> {
        let registered: Vec<Address> =
            pass.registered.iter().filter(|it| **it != self.factory).copied().collect();
        let emitters: Vec<Address> = {
            let emitted: std::collections::BTreeSet<Address> =
                harvest.logs.values().map(|log| log.address).collect();
            registered.into_iter().filter(|escrow| emitted.contains(escrow)).collect()
        };
        let rows = on_disk(&self.store, move |store| store.escrows_of(&emitters)).await?;
        let mut stretch = LateStretch { next, ..LateStretch::default() };
        for log in harvest.logs.values() {
            let since = rows.get(&log.address).map(|escrow| escrow.announced.0);
            match self.recognise_late(pass, harvest, since, log) {
                Recognised::Unknown => {}
                Recognised::Malformed(reason) => stretch.quarantined.push(quarantined(log, reason)),
                Recognised::Known(decoded) => {
                    stretch.events.push(decoded.event(self.settings.id, log, times[&log.block.number]));
                }
            }
        }
        stretch.events.sort_by_key(|event| event.order());
        stretch.announced = harvest.fresh.iter().map(|(escrow, block)| (*escrow, *block)).collect();
        stretch.announced.sort_by_key(|(escrow, block)| (block.number, *escrow));
        Ok(stretch)
    }

    /// `since`: the block that announced the emitter, if it is registered. Only what was not read before counts,
    /// whatever the node answers beyond what was asked for.
    fn recognise_late<'a>(
        &'a self,
        pass: &'a Pass,
        harvest: &Harvest,
        since: Option<u64>,
        log: &Log,
    ) -> Recognised<'a> {
        if log.address == self.factory {
            match pass.added.recognise(Role::Announcement, log) {
                Recognised::Unknown => {}
                known => return known,
            }
        }
        let fresh = harvest.fresh.get(&log.address).map(|block| block.number);
        let joining = pass.joining.get(&log.address).copied().or(fresh);
        match (joining, since) {
            (Some(from), _) if log.block.number >= from => self.signatures.recognise(Role::Lifecycle, log),
            (None, Some(from)) if log.block.number >= from => pass.added.recognise(Role::Lifecycle, log),
            _ => Recognised::Unknown,
        }
    }
}

impl Pass {
    /// What to ask about a span. `everyone`: without addresses.
    fn calls<C: Chain>(&self, scanner: &Scanner<C>, span: Span, everyone: bool) -> Vec<Call> {
        let mut calls = Vec::new();
        let joining: Vec<Address> = self.joining.keys().copied().collect();
        for (addresses, topics) in [(&self.registered, &self.topics), (&joining, &scanner.lifecycle_topics)] {
            match everyone && !addresses.is_empty() {
                true => {
                    let topics = Arc::clone(topics);
                    calls.push(Call::Logs(LogFilter { span, addresses: Vec::new(), topics }));
                }
                false => calls.extend(scanner.log_calls(span, None, addresses, topics)),
            }
        }
        calls
    }
}
