//! Final ranges, several under way at once and handed out in order.
//!
//! A range is asked for with the escrows known then. When its logs are there, and those of all ranges before it, it is
//! known which escrows were announced meanwhile: their logs in it are asked for at once, not only when its turn comes.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use alloy::primitives::map::AddressSet;
use alloy::primitives::{Address, B256};
use futures_util::FutureExt;
use futures_util::future::select_all;
use tokio::task::JoinError;
use tokio_util::task::AbortOnDropHandle;

use super::harvest::{Ask, Decoder, Ends, Harvest, ask_range};
use super::limits::Way;
use super::read::{EVENTS_A_COMMIT, log_calls, most_addresses};
use super::{CATCH_UP, Call, Chain, LogFilter, Span, Trouble};
use crate::event::{Addresses, BlockRange, BlockRef, Header};
use crate::store::Registry;

/// Ranges under way at once, at most: bounds what is in memory.
pub(super) const RANGES: usize = 4;
/// What a range costs: its logs and the headers of its ends, and once more for what turned up in it.
const CALLS_A_RANGE: u64 = 6;

/// A range whose logs are all there.
pub(super) struct Fetched {
    pub range: BlockRange,
    pub way: Way,
    pub answered: Vec<Answered>,
    pub started: Instant,
    /// The hash of the block before it, as its first block has it; not asked for the very first block.
    pub parent: Option<B256>,
    pub end: Header,
    /// In their order.
    pub harvests: Vec<Harvest>,
}

/// How much was answered at once.
pub(super) struct Answered {
    pub blocks: u64,
    /// Addresses in the largest filter.
    pub addresses: usize,
    pub logs: usize,
}

impl Fetched {
    /// Whether what is there of that range can be committed with this: it follows, and whom this brings back was asked for.
    fn goes_on_with(&self, next: &Slot, registry: &Registry) -> bool {
        let State::There(there) = &next.state else {
            return false;
        };
        let (Ends { parent, .. }, harvest) = &**there;
        let logs: usize = self.answered.iter().map(|answered| answered.logs).sum();
        next.way == self.way
            && parent.is_none_or(|parent| parent == self.end.block.hash)
            && logs + harvest.len() <= EVENTS_A_COMMIT
            && !self.harvests.last().is_some_and(|harvest| harvest.has_archived(registry))
    }

    /// Adds the range behind it.
    fn join(&mut self, next: Self) {
        self.range = BlockRange::new(self.range.from(), next.range.to()).expect("it lies behind");
        self.answered.extend(next.answered);
        self.end = next.end;
        self.harvests.extend(next.harvests);
    }
}

pub(super) struct Ahead {
    slots: VecDeque<Slot>,
    /// Announced in what was handed out and is not accepted yet, if something was.
    leaving: Option<Vec<Address>>,
    /// Ranges to have under way: one after trouble, more as they are answered.
    width: usize,
    /// Whether something was not answered since the last one was accepted.
    in_doubt: bool,
}

impl Default for Ahead {
    fn default() -> Self {
        Self { slots: VecDeque::new(), leaving: None, width: 1, in_doubt: false }
    }
}

struct Slot {
    range: BlockRange,
    way: Way,
    /// The way of what is under way: what turned up may be asked for otherwise.
    asking: Way,
    addresses: usize,
    started: Instant,
    /// Escrows that had come to be watched when it was asked for, or looked at last.
    arrivals: u64,
    state: State,
    /// Announced in it and not asked for then, once that is known.
    fresh: Option<Vec<(Address, BlockRef)>>,
}

/// What was told of a range, and its logs.
type There = (Ends, Harvest);
type Asked = Result<Option<Box<There>>, Trouble>;
type Asking = AbortOnDropHandle<Asked>;

enum State {
    Asking(Asking),
    There(Box<There>),
    Refused(Trouble),
    /// Asked for ahead, and not answered.
    Unanswered,
    /// Between two of the others.
    Changing,
}

impl State {
    fn of(asked: Result<Asked, JoinError>) -> Self {
        match asked {
            Ok(Ok(Some(there))) => Self::There(there),
            Ok(Ok(None)) => Self::Unanswered,
            Ok(Err(trouble)) => Self::Refused(trouble),
            Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
        }
    }
}

/// How to ask for what turned up: it may differ from range to range.
pub(super) struct Following {
    pub decoder: Decoder,
    pub topics: Arc<[B256]>,
    /// Addresses in one filter.
    pub at_once: usize,
    /// Blocks that can be asked for without addresses; 0: none.
    pub everyone: u64,
}

impl Ahead {
    /// With several at first, for a store that has read nothing: what a node takes for the logs of one range it takes for all
    /// of them at once. `calls`: so many may be spent on that.
    pub fn hasty(calls: u64) -> Self {
        Self { width: (calls / CALLS_A_RANGE).clamp(1, RANGES as u64) as usize, ..Self::default() }
    }

    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Whether another one may be asked for, where at most so many may be.
    pub fn has_room(&self, at_most: usize) -> bool {
        self.slots.len() < self.width.min(at_most)
    }

    /// How many of the `left` blocks to ask for next, if all that may be under way are to have their share.
    pub fn share(&self, left: u64, at_most: usize) -> u64 {
        let free = self.width.min(at_most).saturating_sub(self.slots.len()).max(1);
        left.div_ceil((left / CATCH_UP).clamp(1, free as u64))
    }

    /// What was handed out is accepted.
    pub fn accepted(&mut self) {
        self.leaving = None;
        if !std::mem::take(&mut self.in_doubt) {
            self.width = (self.width * 2).min(RANGES);
        }
    }

    /// The block after the last one asked for.
    pub fn next(&self) -> Option<u64> {
        self.slots.back().map(|slot| slot.range.to() + 1)
    }

    /// Escrows announced in what is not accepted, and not asked for when it came; `None` while it is not known of all.
    pub fn announced(&self) -> Option<AddressSet> {
        let mut all: AddressSet = self.leaving.iter().flatten().copied().collect();
        for slot in &self.slots {
            all.extend(slot.fresh.as_ref()?.iter().map(|(escrow, _)| *escrow));
        }
        Some(all)
    }

    /// Whether something is under way.
    pub fn is_under_way(&self) -> bool {
        self.slots.iter().any(|slot| matches!(slot.state, State::Asking(_)))
    }

    /// Whether nothing is under way, and all of it is there.
    pub fn is_there(&self) -> bool {
        self.slots.iter().all(|slot| matches!(slot.state, State::There(_)))
    }

    /// Whether the next range to hand out begins there.
    pub fn begins_at(&self, block: u64) -> bool {
        self.slots.front().is_none_or(|slot| slot.range.from() == block)
    }

    /// What is under way is of no use any more.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// Asks for a range. `linked`: with what says that it follows the block before it; `arrivals`: how many had come to be
    /// watched when the filters were made.
    pub fn ask<C: Chain>(
        &mut self,
        chain: &Arc<C>,
        decoder: &Decoder,
        linked: bool,
        (range, way): (BlockRange, Way),
        (filters, arrivals): (Vec<LogFilter>, u64),
    ) {
        let addresses = most_addresses(&filters);
        let logs = filters.into_iter().map(Call::Logs).collect();
        let ask = Ask { range, linked, ahead: !self.slots.is_empty(), told: None, logs };
        let state = asking(Arc::clone(chain), decoder.clone(), ask, Harvest::default(), way);
        let (started, asking) = (Instant::now(), way);
        self.slots.push_back(Slot { range, way, asking, addresses, started, arrivals, state, fresh: None });
    }

    /// The first range, if it is there, and those behind it as far as they are, too: they are committed together. All that
    /// are there were [followed up](Self::follow) since the last [`wait`](Self::wait).
    pub fn take_first(&mut self, registry: &Registry) -> Result<Option<Fetched>, Trouble> {
        let Some(mut first) = self.take_one()? else {
            return Ok(None);
        };
        while self.slots.front().is_some_and(|next| first.goes_on_with(next, registry)) {
            first.join(self.take_one()?.expect("it is there"));
        }
        Ok(Some(first))
    }

    fn take_one(&mut self) -> Result<Option<Fetched>, Trouble> {
        let Some(first) = self.slots.front_mut() else {
            return Ok(None);
        };
        match std::mem::replace(&mut first.state, State::Changing) {
            State::There(there) => {
                let (Ends { parent, end }, harvest) = *there;
                let Slot { range, way, addresses, started, fresh, .. } =
                    self.slots.pop_front().expect("it is");
                let leaving = self.leaving.get_or_insert_default();
                leaving.extend(fresh.iter().flatten().map(|(escrow, _)| *escrow));
                let logs = harvest.len();
                let answered = vec![Answered { blocks: range.blocks(), addresses, logs }];
                let harvests = vec![harvest];
                Ok(Some(Fetched { range, way, answered, started, parent, end, harvests }))
            }
            State::Refused(trouble) => Err(trouble.about(first.range.blocks(), first.asking)),
            asking @ (State::Asking(_) | State::Unanswered | State::Changing) => {
                first.state = asking;
                Ok(None)
            }
        }
    }

    /// Waits until one of those under way is there, and takes note of all that are.
    pub async fn wait(&mut self) {
        let under_way = self.slots.iter_mut().enumerate().filter_map(|(place, slot)| match &mut slot.state {
            State::Asking(asking) => Some(Box::pin(async move { (place, asking.await) })),
            State::There(..) | State::Refused(_) | State::Unanswered | State::Changing => None,
        });
        let ((place, asked), ..) = select_all(under_way).await;
        self.slots[place].state = State::of(asked);
        for slot in &mut self.slots {
            if let State::Asking(asking) = &mut slot.state
                && let Some(asked) = asking.now_or_never()
            {
                slot.state = State::of(asked);
            }
        }
    }

    /// What was not answered ahead is asked for when its turn comes, and what lies behind it then, too.
    fn drop_unanswered(&mut self) {
        let unanswered = |slot: &Slot| matches!(slot.state, State::Unanswered);
        if let Some(place) = self.slots.iter().position(unanswered) {
            self.slots.truncate(place);
            (self.width, self.in_doubt) = (1, true);
        }
    }

    /// Asks for the logs of escrows that were not known when a range was asked for.
    pub fn follow<C: Chain>(&mut self, chain: &Arc<C>, following: &Following) {
        self.drop_unanswered();
        let (slots, leaving) = (self.slots.make_contiguous(), self.leaving.as_deref());
        for place in 0..slots.len() {
            // Nobody waits for it before what was handed out is accepted, either.
            let ahead = place > 0 || leaving.is_some();
            let (earlier, later) = slots.split_at_mut(place);
            let slot = &mut later[0];
            let is_new = slot.fresh.is_none();
            if let (State::There(there), true) = (&slot.state, is_new) {
                slot.fresh = Some(there.1.unwatched(&following.decoder.store.registry()));
            }
            if slot.fresh.is_none() {
                // What it announces is not known yet, so nothing is of those after it.
                return;
            }
            if slot.way == Way::Addresses
                && matches!(slot.state, State::There(_))
                && let Some((from, addresses)) =
                    slot.news(following, leaving.unwrap_or_default(), earlier, is_new)
            {
                slot.follow(chain, following, ahead, from, addresses);
            }
        }
    }
}

impl Slot {
    /// Escrows whose logs were not asked for, and the first block in which they may have some: who has arrived since the
    /// last look, and if the range `is_new`, who was announced in it and in the ranges before it.
    fn news(
        &mut self,
        following: &Following,
        leaving: &[Address],
        earlier: &[Slot],
        is_new: bool,
    ) -> Option<(u64, Vec<Address>)> {
        let Self { range, arrivals, state: State::There(there), fresh, .. } = self else {
            unreachable!("only what is there is looked at");
        };
        let (start, expected) = (range.from(), &mut there.1.expected);
        let (mut from, mut addresses) = (u64::MAX, Vec::new());
        let mut look_at = |escrow: Address, block: u64| {
            if expected.insert(escrow) {
                from = from.min(block);
                addresses.push(escrow);
            }
        };
        let registry = following.decoder.store.registry();
        registry.arrived_after(*arrivals).iter().for_each(|escrow| look_at(*escrow, start));
        *arrivals = registry.arrivals();
        drop(registry);
        if is_new {
            let before = earlier.iter().flat_map(|slot| slot.fresh.iter().flatten());
            let before = before.map(|(escrow, _)| escrow).chain(leaving);
            before.for_each(|escrow| look_at(*escrow, start));
            fresh.iter().flatten().for_each(|(escrow, block)| look_at(*escrow, block.number));
        }
        (!addresses.is_empty()).then_some((from, addresses))
    }

    fn follow<C: Chain>(
        &mut self,
        chain: &Arc<C>,
        following: &Following,
        ahead: bool,
        from: u64,
        addresses: Vec<Address>,
    ) {
        let State::There(there) = std::mem::replace(&mut self.state, State::Changing) else {
            unreachable!("only what is there is followed up");
        };
        let (ends, harvest) = *there;
        let span = self.range.tail(from).expect("announced inside the range, or before");
        let many = addresses.len() > following.at_once && span.blocks() <= following.everyone;
        self.asking = if many { Way::Everyone } else { Way::Addresses };
        let logs = match self.asking {
            Way::Everyone => {
                let topics = Arc::clone(&following.topics);
                vec![Call::Logs(LogFilter { span: Span::Range(span), addresses: Addresses::any(), topics })]
            }
            Way::Addresses => log_calls(Span::Range(span), &addresses, following.at_once, &following.topics),
        };
        let ask = Ask { range: span, linked: false, ahead, told: Some(ends), logs };
        self.state = asking(Arc::clone(chain), following.decoder.clone(), ask, harvest, Way::Everyone);
    }
}

/// `way`: in which what turns up in it is still to be asked for, by addresses.
fn asking<C: Chain>(chain: Arc<C>, decoder: Decoder, ask: Ask, harvest: Harvest, way: Way) -> State {
    let ahead = ask.ahead;
    let asked = async move {
        let Some((ends, harvest)) = ask_range(&*chain, ask, harvest.encode(&decoder)).await? else {
            return Ok(None);
        };
        let to_be_followed =
            |harvest: &Harvest| way == Way::Addresses && harvest.has_unwatched(&decoder.store.registry());
        let harvest = harvest.prepare(&*chain, &decoder, ahead, to_be_followed).await?;
        Ok(Some(Box::new((ends, harvest))))
    };
    State::Asking(AbortOnDropHandle::new(tokio::spawn(asked)))
}
