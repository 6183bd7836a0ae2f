//! Reading the chain: what to read next, how, and what to do when it forks.
//!
//! Two ways of reading. Final blocks by range: forks cannot happen there, and the header of the range's last
//! block rides in the same batch, so that a node that is behind gives itself away. Unfinal blocks one by one and
//! linked: each must name the one before as its parent, and its logs are asked for by block hash, which is exact.

mod ahead;
mod audit;
mod chain;
mod coming;
mod fork;
mod harvest;
mod late;
mod limits;
mod patient;
mod read;
#[cfg(test)]
mod tests;
mod verify;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use alloy::primitives::{Address, B256};
use thiserror::Error;
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{debug, info, warn};

pub use audit::Auditor;
pub use chain::{Answer, BlockTag, Call, Chain, LogFilter, Refused, Span};
pub(crate) use limits::Size;
pub use limits::{Limits, Way};
pub use patient::Patient;
pub use verify::{Difference, Finding, Verified, Verifier, VerifyError};

use crate::backoff::Backoff;
use crate::config;
use crate::event::{Addresses, BlockRange, BlockRef, Header, Signatures};
use crate::store::{Store, StoreError, on_disk};
use crate::telemetry::metrics;
use crate::vitals::Vitals;
use ahead::Ahead;
use coming::Coming;
use fork::{Suspicion, Withdrawn};
use harvest::Decoder;

/// So many blocks to read are a catch-up; fewer are the head, which somebody may wait for.
const CATCH_UP: u64 = 32;
/// Unfinal blocks linked and committed together, at most: bounds a batch and a commit.
const LINKED_BLOCKS: u64 = 128;
/// How long to leave a node that is behind, or two nodes that disagree, before asking again.
const SECOND_LOOK: Duration = Duration::from_millis(250);
/// How often a node is looked at again for a block that another one has announced.
const AWAITED_LOOKS: u32 = 12;
/// Looks at a node that is behind or inconsistent before turning to another; pauses grow by as many.
const LOOKS: u32 = 8;
/// How long to wait before asking for less after a refusal nobody understands.
const NO_HURRY: Duration = Duration::from_millis(100);
/// The finalized head is asked for again once this many blocks were seen. What is final is read by range and never
/// withdrawn, so knowing of it late costs calls and memory, never an event.
const FINALITY_REFRESH: u64 = 64;
/// Heads in a row that polls found and that had not been announced, after which the subscription counts as dead.
const UNANNOUNCED: u32 = 3;
/// Poll intervals for which announcements may do without any poll, however fast they come: a poll shows whether they are late.
const WITHOUT_POLL: u32 = 2;
/// Looks at a tag without an answer after which the node counts as not knowing it: a node just started has none yet.
const TAG_LOOKS: u32 = 3;
/// Calls that are scarce are not spent on haste: it may have those of a quarter of a second.
const HASTE_DIVISOR: u64 = 4;

/// What a step came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Something was read or withdrawn: step again.
    Progress,
    /// Nothing new: step again after the poll interval.
    Idle,
    /// Step again after this long.
    Wait(Duration),
    /// Everything up to the requested block is accepted.
    Done,
}

/// What ends scanning.
#[derive(Debug, Error)]
pub enum ScanError {
    /// The store cannot go on.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The provider serves another chain.
    #[error("{0}")]
    WrongChain(Refused),
}

/// How far a run reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// Without end.
    Forever,
    /// To the horizon as it is when first seen.
    Head,
    /// To this block.
    Block(u64),
}

/// Reads the chain into the store, one step at a time.
pub struct Scanner<C> {
    chain: Arc<C>,
    store: Arc<Store>,
    signatures: Arc<Signatures>,
    settings: config::Chain,
    archive_after: u64,
    factory: Address,
    decoder: Decoder,
    topics: Arc<[B256]>,
    lifecycle_topics: Arc<[B256]>,
    limits: Limits,
    /// Ranges asked for ahead.
    ahead: Ahead,
    /// Unfinal blocks asked for while final ones are read.
    coming: Option<Coming>,
    /// Calls that may be made before those that are waited for.
    haste: u64,
    /// The first list of watched escrows, and the same with the factory.
    with_factory: Option<(Addresses, Addresses)>,
    until: Until,
    /// The highest block that may be read now.
    target: Option<u64>,
    /// The last block to read, as far as it is known.
    goal: watch::Sender<u64>,
    /// Heads announced by a subscription.
    heads: Option<watch::Receiver<Option<Header>>>,
    /// The announced head that the target comes from: when it is read, the next is waited for, not polled for at once.
    followed: Option<Header>,
    /// An announced head that the node asked did not have yet, and how often it is still looked for between polls.
    awaited: Option<(u64, u32)>,
    /// When the head was asked for last.
    polled_at: Option<Instant>,
    /// Heads in a row that polls found and that had not been announced, and the last of them.
    unannounced: (u32, u64),
    /// Headers seen at the head, not yet read: a chain linked by parent hashes.
    recent: BTreeMap<u64, Header>,
    finality: Finality,
    /// The tag of the configured horizon.
    horizon_tag: Tag,
    /// The highest block known to be final.
    finalized: Option<u64>,
    /// The last block that was told to be final: a range that ends with it ends alike.
    told_final: Option<BlockRef>,
    /// A cursor that was final when it was accepted: no fork can have taken it.
    proven: Option<BlockRef>,
    /// A fork seen and not acted on yet.
    suspected: Option<Suspicion>,
    /// What forks withdrew lately.
    withdrawn: Withdrawn,
    /// Whether the factory has been seen to exist.
    factory_seen: bool,
    /// Unfinal blocks to read together.
    linked: u64,
    /// Looks in a row that found a node behind or inconsistent.
    looks: u32,
    /// Pauses for a provider that does not serve us at all, until blocks are accepted again.
    rest: Backoff,
    said: Said,
    vitals: Arc<Vitals>,
}

/// What is known of a tag, `safe` or `finalized`. A node that answered it once and does not now only lags; one that
/// never did does not know it.
#[derive(Clone, Copy, Debug, Default)]
struct Tag {
    known: bool,
    /// The configured depth stands in for it.
    replaced: bool,
    /// How often in a row it was not answered.
    misses: u32,
}

impl Tag {
    /// `true` when this miss is the one after which the depth stands in for the tag.
    fn missed(&mut self) -> bool {
        self.misses += 1;
        !self.known && self.misses >= TAG_LOOKS && !std::mem::replace(&mut self.replaced, true)
    }

    fn answered(&mut self) {
        *self = Self { known: true, ..Self::default() };
    }
}

/// When finality is asked for.
#[derive(Clone, Copy, Debug, Default)]
struct Finality {
    tag: Tag,
    /// The poll under way asks for it.
    asking: bool,
    /// The head when it was last asked for.
    asked_at: Option<u64>,
    /// The last head seen.
    head: u64,
}

/// What was already said: a wait is announced once.
#[derive(Clone, Copy, Debug, Default)]
struct Said {
    no_factory: bool,
    not_there_yet: bool,
    behind: bool,
    cap: bool,
}

/// What a look at the announcements brings.
enum Announced {
    Nothing,
    /// What it means is for a poll to say.
    Something,
    Head(Header),
}

impl<C: Chain> Scanner<C> {
    /// A scanner that continues where the store's cursor stands.
    pub fn new(
        chain: Arc<C>,
        store: Arc<Store>,
        signatures: Arc<Signatures>,
        config: &config::Config,
        until: Until,
    ) -> Self {
        let (factory_seen, finalized) = (store.cursor().is_some(), store.finalized());
        let haste = u64::from(config.rpc.requests_per_second.get()) / HASTE_DIVISOR;
        let decoder = Decoder {
            chain_id: config.chain.id,
            factory: config.factory.address,
            signatures: Arc::clone(&signatures),
            store: Arc::clone(&store),
        };
        Self {
            goal: watch::Sender::new(0),
            heads: chain.heads(),
            followed: None,
            awaited: None,
            polled_at: None,
            unannounced: (0, 0),
            decoder,
            archive_after: config.escrow.archive_after,
            ahead: match store.cursor() {
                Some(_) => Ahead::default(),
                None => Ahead::hasty(haste),
            },
            haste,
            coming: None,
            with_factory: None,
            chain,
            factory: config.factory.address,
            topics: signatures.topics().into(),
            lifecycle_topics: signatures.lifecycle_topics().into(),
            limits: Limits::new(config.rpc.max_range, config.rpc.max_addresses.get(), config.rpc.filter),
            settings: config.chain.clone(),
            store,
            signatures,
            until,
            target: None,
            recent: BTreeMap::new(),
            finality: Finality::default(),
            horizon_tag: Tag::default(),
            finalized,
            told_final: None,
            proven: None,
            suspected: None,
            withdrawn: Withdrawn::default(),
            factory_seen,
            linked: LINKED_BLOCKS,
            looks: 0,
            rest: Backoff::growing(),
            said: Said::default(),
            vitals: Arc::default(),
        }
    }

    /// Tells there how far the chain is.
    pub fn reporting_to(mut self, vitals: &Arc<Vitals>) -> Self {
        self.vitals = Arc::clone(vitals);
        self
    }

    /// Reads what comes next: blocks that are committed together, unless they are too many for one commit.
    pub async fn step(&mut self) -> Result<Step, ScanError> {
        let step = match self.try_step().await {
            Ok(step) => Ok(step),
            Err(trouble) => self.recover(trouble),
        };
        // Whoever pauses appends nothing soon.
        if !matches!(step, Ok(Step::Progress)) {
            self.store.expect_more(false);
        }
        step
    }

    /// What to do after a step that read nothing.
    fn recover(&mut self, trouble: Trouble) -> Result<Step, ScanError> {
        if self.followed.take().is_some() {
            self.awaited = Some((self.finality.head, AWAITED_LOOKS));
        }
        self.ahead.clear();
        self.coming = None;
        match trouble {
            Trouble::Store(error) => Err(error.into()),
            Trouble::Refused { refused, blocks, way } => self.replan(refused, blocks, way),
            Trouble::Disagreement(what) => {
                self.recent.clear();
                if !std::mem::replace(&mut self.said.behind, true) {
                    warn!(reason = %what, "An answer was thrown away: the node answering is behind or inconsistent");
                }
                Ok(self.look_again())
            }
        }
    }

    /// A node is behind, or contradicts itself: fewer blocks at once, and after some looks another provider.
    fn look_again(&mut self) -> Step {
        self.target = None;
        self.linked = (self.linked / 2).max(1);
        self.looks += 1;
        if self.looks.is_multiple_of(LOOKS) {
            self.chain.turn_away();
        }
        Step::Wait(SECOND_LOOK * (1 + self.looks / LOOKS).min(16))
    }

    /// Blocks were accepted: the answers belong together.
    fn looked_well(&mut self) {
        self.looks = 0;
        self.rest = Backoff::growing();
        self.go_on_retracting();
        self.linked = (self.linked * 2).min(LINKED_BLOCKS);
        if self.ahead.is_empty() && self.coming.is_none() {
            self.store.forget_arrivals();
        }
        if std::mem::take(&mut self.said.behind) {
            info!("Answers are consistent again");
        }
    }

    async fn try_step(&mut self) -> Result<Step, Trouble> {
        let next = self.store.next_block();
        if self.is_done(next) {
            return Ok(Step::Done);
        }
        if self.target.is_none_or(|target| target < next) {
            let nothing_new = match self.announced(next) {
                Announced::Head(head) => self.follow(next, head),
                // What is final can be asked for when nobody waits for it.
                Announced::Nothing if self.followed.take().is_some() && !self.finality_is_due() => {
                    return Ok(Step::Idle);
                }
                Announced::Something | Announced::Nothing => {
                    self.followed = None;
                    self.poll(next).await?
                }
            };
            if let Some(step) = nothing_new {
                return Ok(self.await_announced(step));
            }
            if self.is_done(next) {
                return Ok(Step::Done);
            }
        }
        let Some(pending) = self.target.and_then(|target| BlockRange::new(next, target)) else {
            return Ok(Step::Idle);
        };
        let step = self.read(pending).await?;
        if step == Step::Progress {
            self.looked_well();
        }
        Ok(step)
    }

    /// Whether everything up to the end asked for is read, as far as the end is known.
    pub fn has_read_all(&self) -> bool {
        self.is_done(self.store.next_block())
    }

    fn is_done(&self, next: u64) -> bool {
        matches!(self.until, Until::Block(last) if next > last)
    }

    /// The last block to read: of the run, or for now; 0 while it is not known.
    pub fn goal(&self) -> watch::Receiver<u64> {
        self.goal.subscribe()
    }

    /// Changes with each head that is announced; `None`: there are no announcements, only polls.
    pub fn heads(&self) -> Option<watch::Receiver<Option<Header>>> {
        self.heads.clone()
    }

    /// What was announced since the last look. A head that says all that a poll would saves the poll. One so far above the
    /// next block that a batch of headers does not show whether it leads there does not.
    fn announced(&mut self, next: u64) -> Announced {
        let Some(heads) = self.heads.as_mut().filter(|heads| heads.has_changed().unwrap_or(false)) else {
            return Announced::Nothing;
        };
        let Some(head) = *heads.borrow_and_update() else {
            return Announced::Nothing;
        };
        let says_all = self.settings.horizon == config::Horizon::Latest
            && self.factory_seen
            && self.store.cursor().is_some()
            && self.polled_at.is_some_and(|at| at.elapsed() < self.settings.poll_interval * WITHOUT_POLL);
        let is_near = head.block.number < next.saturating_add(LINKED_BLOCKS);
        match says_all && is_near && head.block.number > self.finality.head {
            true => Announced::Head(head),
            false => Announced::Something,
        }
    }

    /// Sets the target by an announced head. `Some`: there is nothing to read yet.
    fn follow(&mut self, next: u64, head: Header) -> Option<Step> {
        self.followed = Some(head);
        self.unannounced = (0, 0);
        self.finality.head = head.block.number;
        metrics::head(head.block.number);
        self.vitals.saw_head(head.block.number);
        self.see_head(head);
        // What is final is for polls to say: an announced height alone is believed by nobody else.
        self.aim(next, self.horizon(BlockTag::Latest, head.block.number));
        let something = self.is_done(next) || self.target.is_some_and(|target| next <= target);
        (!something).then_some(Step::Idle)
    }

    /// One node announces a block, another one is asked for it: that has it a moment later, long before the next poll.
    fn await_announced(&mut self, step: Step) -> Step {
        match self.awaited.take() {
            Some((number, looks)) if step == Step::Idle && number > self.finality.head && looks > 0 => {
                self.awaited = Some((number, looks - 1));
                Step::Wait(SECOND_LOOK)
            }
            Some(_) | None => step,
        }
    }

    /// Whether the head that a poll found had been announced.
    fn compare_with_announcements(&mut self, head: Header) {
        let Some(announced) = self.heads.as_ref().and_then(|heads| *heads.borrow()) else {
            return;
        };
        let (count, last) = self.unannounced;
        self.unannounced = match head.block.number {
            number if number <= announced.block.number => (0, 0),
            number if number > last => (count + 1, number),
            _ => (count, last),
        };
        if self.unannounced.0 == UNANNOUNCED {
            self.unannounced.0 = 0;
            self.chain.heads_are_missing();
        }
    }

    /// Asks for the head and sets the target. `Some`: there is nothing to read now.
    async fn poll(&mut self, next: u64) -> Result<Option<Step>, Trouble> {
        let tag = match self.settings.horizon {
            config::Horizon::Latest => BlockTag::Latest,
            config::Horizon::Safe => BlockTag::Safe,
            config::Horizon::Finalized => BlockTag::Finalized,
        };
        let tag = if self.horizon_tag.replaced { BlockTag::Latest } else { tag };
        let ask_finality = tag != BlockTag::Finalized && self.finality_is_due();
        self.finality.asking = ask_finality;
        let mut calls = vec![Call::Header(tag)];
        if ask_finality {
            calls.push(Call::Header(BlockTag::Finalized));
        }
        if !self.factory_seen {
            calls.push(Call::Code(self.factory));
        }
        let mut answers = self.ask(calls).await?.into_iter();
        self.polled_at = Some(Instant::now());
        let head = answers.next().and_then(Answer::header);
        let finalized = if ask_finality { answers.next().and_then(Answer::header) } else { None };
        let code = answers.next().map(Answer::code);
        // Before the head: whoever sees that one knows this, too.
        self.vitals.factory_without_code(code == Some(false));
        let Some(head) = head else {
            self.finality.asking = false;
            return Err(match tag {
                BlockTag::Latest | BlockTag::Number(_) => {
                    Trouble::Disagreement("it has no latest block".into())
                }
                BlockTag::Safe | BlockTag::Finalized => {
                    Trouble::refused(Refused::UnknownTag(format!("{tag}: no such block")))
                }
            });
        };
        self.finality.head = head.block.number;
        metrics::head(head.block.number);
        self.vitals.saw_head(head.block.number);
        if tag != BlockTag::Latest {
            self.horizon_tag.answered();
        }
        let finalized = if tag == BlockTag::Finalized { Some(head) } else { finalized };
        match finalized {
            Some(_) => self.finality_answered(),
            None if ask_finality => self.finality_missed("finalized: no such block"),
            None => {}
        }
        if tag == BlockTag::Latest {
            self.compare_with_announcements(head);
        }
        self.see_head(head);
        self.told_final = finalized.map(|header| header.block).or(self.told_final);
        let horizon = self.horizon(tag, head.block.number);
        self.note_finality(head.block.number, finalized.map(|header| header.block.number));
        if let Some(wait) = self.wait_for_factory(code) {
            return Ok(Some(wait));
        }
        self.aim(next, horizon);
        if self.is_done(next) || self.target.is_some_and(|target| next <= target) {
            return Ok(None);
        }
        self.nothing_new(next, head).await.map(Some)
    }

    /// The highest block that counts as there.
    fn horizon(&self, tag: BlockTag, head: u64) -> Option<u64> {
        match (tag, self.settings.horizon) {
            (BlockTag::Latest, config::Horizon::Latest) => head.checked_sub(self.settings.confirmations),
            // The node knows no tags: the depth stands in for them.
            (BlockTag::Latest, config::Horizon::Safe | config::Horizon::Finalized) => {
                head.checked_sub(self.settings.finality_depth)
            }
            (BlockTag::Safe | BlockTag::Finalized | BlockTag::Number(_), _) => Some(head),
        }
    }

    fn aim(&mut self, next: u64, horizon: Option<u64>) {
        let Some(horizon) = horizon else {
            return;
        };
        self.vitals.may_read_upto(horizon);
        if self.until == Until::Head && (horizon >= next || self.store.cursor().is_some()) {
            info!(block = horizon, "Relaying up to block {horizon}");
            self.until = Until::Block(horizon);
        }
        self.target = Some(match self.until {
            Until::Block(last) => horizon.min(last),
            Until::Forever | Until::Head => horizon,
        });
        self.goal.send_replace(match self.until {
            Until::Block(last) => last,
            Until::Forever | Until::Head => horizon,
        });
    }

    async fn nothing_new(&mut self, next: u64, head: Header) -> Result<Step, Trouble> {
        if let Until::Block(last) = self.until
            && next <= last
        {
            self.say_not_there_yet(format_args!("Waiting for block {last}, the last one to relay"), head);
        } else if self.store.cursor().is_none() {
            self.say_not_there_yet(format_args!("Waiting for block {next}, where reading starts"), head);
        }
        if self.may_have_forked(head).await? {
            return self.look_back().await;
        }
        self.suspected = None;
        Ok(Step::Idle)
    }

    /// Whether a head at or below the cursor may be of another fork. A block that was accepted is only the head of
    /// a node that lags.
    async fn may_have_forked(&self, head: Header) -> Result<bool, Trouble> {
        match self.store.cursor() {
            Some(cursor) if head.block.number <= cursor.number && head.block != cursor => {}
            Some(_) | None => return Ok(false),
        }
        if self.finalized.is_some_and(|finalized| head.block.number <= finalized) {
            return Ok(false);
        }
        let remembered = on_disk(&self.store, |store| store.remembered()).await?;
        Ok(!remembered.contains(&head.block))
    }

    fn say_not_there_yet(&mut self, what: std::fmt::Arguments<'_>, head: Header) {
        if !std::mem::replace(&mut self.said.not_there_yet, true) {
            warn!(head = head.block.number, "{what}: the node's head is at block {}", head.block.number);
        }
    }

    /// The factory may be deployed later, or the node may still be syncing.
    fn wait_for_factory(&mut self, code: Option<bool>) -> Option<Step> {
        if self.factory_seen || code != Some(false) {
            self.factory_seen = true;
            if std::mem::take(&mut self.said.no_factory) {
                info!("The factory is there: going on");
            }
            return None;
        }
        if !std::mem::replace(&mut self.said.no_factory, true) {
            warn!(
                factory = %format_args!("{:#x}", self.factory),
                "No contract at factory.address {:#x} yet: waiting for it (a node still syncing, or a wrong address)",
                self.factory
            );
        }
        Some(Step::Idle)
    }

    /// Keeps the headers that link to this head.
    fn see_head(&mut self, head: Header) {
        let number = head.block.number;
        let _forked = self.recent.split_off(&number);
        let below = number.checked_sub(1).and_then(|below| self.recent.get(&below));
        if below.is_some_and(|below| below.block.hash != head.parent_hash) {
            self.recent.clear();
        }
        self.recent.insert(number, head);
    }

    fn finality_is_due(&self) -> bool {
        let head = self.finality.head;
        // A head far above the next was a mistake of the node's.
        self.finality.asked_at.is_none_or(|at| head < at || head - at >= FINALITY_REFRESH)
    }

    /// Never trusts beyond the head, and never for longer than until the next answer.
    fn note_finality(&mut self, head: u64, tagged: Option<u64>) {
        let known = match tagged {
            Some(number) => Some(number.min(head)),
            None if self.finality.tag.replaced => head.checked_sub(self.settings.finality_depth),
            None => self.finalized,
        };
        self.finalized = known.max(self.store.finalized());
    }

    fn finality_answered(&mut self) {
        self.finality.tag.answered();
        self.finality.asked_at = Some(self.finality.head);
        if self.settings.horizon == config::Horizon::Finalized {
            self.horizon_tag.answered();
        }
    }

    /// Blocks count as unfinal until the tag is answered, or the depth stands in for it.
    fn finality_missed(&mut self, why: &str) {
        if self.finality.tag.missed() {
            warn!(
                reason = %why,
                "The node does not know the tag finalized: blocks count as final {} blocks below the head",
                self.settings.finality_depth
            );
        }
        if self.finality.tag.known || self.finality.tag.replaced {
            self.finality.asked_at = Some(self.finality.head);
        }
    }

    /// A poll was refused over a tag.
    fn tag_is_missing(&mut self, why: &str) -> Step {
        if std::mem::take(&mut self.finality.asking) {
            self.finality_missed(why);
            return Step::Progress;
        }
        if self.settings.horizon != config::Horizon::Latest && self.horizon_tag.missed() {
            warn!(
                reason = %why,
                "The node does not know the tag of chain.horizon: reading goes up to {} blocks below the head",
                self.settings.finality_depth
            );
            return Step::Progress;
        }
        if !std::mem::replace(&mut self.said.behind, true) {
            warn!(reason = %why, "The node does not answer to the tag of chain.horizon: waiting");
        }
        Step::Wait(SECOND_LOOK.max(self.settings.poll_interval))
    }

    /// Changes the plan after a refusal.
    fn replan(&mut self, refused: Refused, blocks: u64, way: Way) -> Result<Step, ScanError> {
        debug!(%refused, blocks, "Changing the plan");
        // Whatever was wrong, it may be the block that was asked for: look again where the head is.
        self.recent.clear();
        self.target = None;
        let addresses = self.limits.addresses().min(self.store.registry().watched_len() + 1);
        let one_block_for_everyone = way == Way::Everyone && blocks == 1;
        match refused {
            Refused::Cap(cap) => {
                self.limits.cap(cap);
                info!(blocks = cap.get(), "The provider takes at most {cap} blocks a range");
                Ok(Step::Progress)
            }
            Refused::Use(range) => {
                self.limits.shrink(way, range.blocks());
                Ok(Step::Progress)
            }
            Refused::FewerAddresses(_) if way == Way::Everyone && blocks > 0 => {
                self.limits.refuse_everyone();
                Ok(Step::Progress)
            }
            Refused::Halve(_) | Refused::Unknown(_) | Refused::Slow(_) if one_block_for_everyone => {
                self.limits.refuse_everyone();
                Ok(Step::Wait(NO_HURRY))
            }
            // Not a question of size: no smaller plan helps.
            Refused::Halve(_) | Refused::FewerAddresses(_) | Refused::Unknown(_) | Refused::Slow(_)
                if blocks == 0 =>
            {
                Ok(Step::Wait(self.rest.pause()))
            }
            Refused::Halve(_) | Refused::Slow(_) if self.limits.halve(way, blocks) => Ok(Step::Progress),
            // Perhaps it is not a question of size after all: no hurry.
            Refused::Unknown(_) if self.limits.halve(way, blocks) => Ok(Step::Wait(NO_HURRY)),
            Refused::FewerAddresses(_) if self.limits.cap_addresses(addresses) => Ok(Step::Progress),
            Refused::Halve(_) if self.limits.fewer_addresses(addresses) => Ok(Step::Progress),
            Refused::Unknown(_) if self.limits.fewer_addresses(addresses) => Ok(Step::Wait(NO_HURRY)),
            Refused::FewerAddresses(_) | Refused::Halve(_) | Refused::Unknown(_) | Refused::Slow(_) => {
                Ok(Step::Wait(self.rest.pause()))
            }
            Refused::Behind(_) => Ok(self.look_again()),
            Refused::UnknownTag(why) => Ok(self.tag_is_missing(&why)),
            Refused::HistoryGone(_) | Refused::Unsupported(_) => {
                if !std::mem::replace(&mut self.said.behind, true) {
                    warn!("{refused}: use another provider in rpc.urls; waiting");
                }
                Ok(Step::Wait(self.rest.pause()))
            }
            Refused::WrongChain { .. } => Err(ScanError::WrongChain(refused)),
        }
    }

    async fn ask(&self, calls: Vec<Call>) -> Result<Vec<Answer>, Trouble> {
        self.chain.ask(calls).await.map_err(Trouble::refused)
    }
}

/// Why a step read nothing.
#[derive(Debug)]
enum Trouble {
    Store(StoreError),
    /// The provider refused; logs of `blocks` were asked for at once in that way, or none.
    Refused {
        refused: Refused,
        blocks: u64,
        way: Way,
    },
    /// Answers that cannot all be of one chain: thrown away whole.
    Disagreement(String),
}

impl Trouble {
    fn refused(refused: Refused) -> Self {
        Self::Refused { refused, blocks: 0, way: Way::Addresses }
    }

    /// It was logs of so many blocks that were asked for.
    fn about(self, blocks: u64, way: Way) -> Self {
        match self {
            Self::Refused { refused, .. } => Self::Refused { refused, blocks, way },
            Self::Store(_) | Self::Disagreement(_) => self,
        }
    }
}

impl From<StoreError> for Trouble {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}
