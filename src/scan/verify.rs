//! Reading blocks again on request, the other way than they were read, and comparing them with what stands. It uses what
//! the [audit](super::Auditor) uses, and changes nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use alloy::primitives::Address;
use governor::Quota;
use thiserror::Error;
use tracing::debug;

use super::audit::Auditor;
use super::harvest::Harvest;
use super::limits::Size;
use super::{Chain, Trouble};
use crate::config::Config;
use crate::event::{BlockRange, Decoded, Log, Recognised, Role, Signatures, event_id};
use crate::store::{Place, Store, StoreError, on_disk};

/// Blocks read by hash in one go, at most.
const BY_HASH: u64 = 32;
/// Attempts at one stretch of blocks before it is given up, and the pause between them.
const ATTEMPTS: u32 = 5;
const PAUSE: Duration = Duration::from_millis(500);
/// The part of `rpc.requests_per_second` that it may use: who relays comes first.
const SHARE: u32 = 4;

/// How an event differs between the chain and what was relayed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Difference {
    /// The chain has it, and it was not relayed.
    Missing,
    /// It was relayed, and the chain has it not.
    Extra,
    /// Both have an event there, and they say different things.
    Differs,
    /// The chain has a log with a known topic that does not decode and was not kept aside.
    Undecodable,
}

/// One difference.
#[derive(Clone, Debug)]
pub struct Finding {
    /// Which kind.
    pub difference: Difference,
    /// Block and log index.
    pub place: Place,
    /// The escrow, where it is still known.
    pub escrow: Option<Address>,
    /// The event's name, where it is still known.
    pub event: Option<String>,
    /// Its id, where it is still known.
    pub event_id: Option<String>,
}

/// Blocks that were compared.
#[derive(Debug)]
pub struct Verified {
    /// Which.
    pub blocks: BlockRange,
    /// How many events were the same.
    pub events: usize,
    /// What was not.
    pub findings: Vec<Finding>,
    /// Escrows that were announced in these blocks and are not registered: all that they emit is missing.
    pub unregistered: Vec<Address>,
}

/// What ends it.
#[derive(Debug, Error)]
pub enum VerifyError {
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// No provider answered so that it could be believed.
    #[error("blocks {blocks} cannot be read again: {reason}; try again later, or add a provider to rpc.urls")]
    Unread {
        /// Which.
        blocks: BlockRange,
        /// Why not.
        reason: String,
    },
}

/// Compares a range of blocks, one stretch at a time.
pub struct Verifier<C> {
    auditor: Auditor<C>,
    store: Arc<Store>,
    signatures: Arc<Signatures>,
    chain_id: u64,
    /// Escrows announced in what was compared that are not registered, and the block that announced each.
    strangers: BTreeMap<Address, u64>,
    /// What has not been compared.
    rest: Option<BlockRange>,
    by_range: Size,
    by_hash: Size,
}

impl<C: Chain> Verifier<C> {
    /// Compares these blocks, all of which were accepted.
    pub fn new(
        chain: Arc<C>,
        store: Arc<Store>,
        signatures: Arc<Signatures>,
        config: &Config,
        blocks: BlockRange,
    ) -> Self {
        let share = NonZeroU32::new(config.rpc.requests_per_second.get() / SHARE).unwrap_or(NonZeroU32::MIN);
        let quota = Quota::per_second(share);
        Self {
            auditor: Auditor::paced(chain, Arc::clone(&store), Arc::clone(&signatures), config, quota),
            store,
            signatures,
            chain_id: config.chain.id,
            strangers: BTreeMap::new(),
            rest: Some(blocks),
            by_range: Size::new(config.rpc.max_range.get()),
            by_hash: Size::new(BY_HASH),
        }
    }

    /// Compares what comes next; waits for a provider, but not for ever. `None`: everything is compared.
    pub async fn step(&mut self) -> Result<Option<Verified>, VerifyError> {
        let mut failed = 0;
        while let Some(rest) = self.rest {
            let (same_way, was_by_hash) = on_disk(&self.store, move |store| store.read_one_way(rest)).await?;
            let size = self.size(was_by_hash).now;
            let blocks =
                BlockRange::starting_at(rest.from(), size, same_way.to()).expect("there is one at least");
            let reason = match self.compare(blocks, was_by_hash).await {
                Ok(verified) => {
                    self.size(was_by_hash).answered(blocks.blocks());
                    self.rest = blocks.to().checked_add(1).and_then(|next| rest.tail(next));
                    return Ok(Some(verified));
                }
                Err(Trouble::Store(error)) => return Err(error.into()),
                Err(Trouble::Refused { refused, .. }) => refused.to_string(),
                Err(Trouble::Disagreement(what)) => what,
            };
            debug!(%blocks, %reason, "Nothing was compared");
            // Fewer at once may be what helps: only where there cannot be fewer an attempt counts.
            failed += u32::from(!self.size(was_by_hash).refuse(blocks.blocks()));
            if failed == ATTEMPTS {
                return Err(VerifyError::Unread { blocks, reason });
            }
            tokio::time::sleep(PAUSE).await;
        }
        Ok(None)
    }

    fn size(&mut self, by_range: bool) -> &mut Size {
        if by_range { &mut self.by_range } else { &mut self.by_hash }
    }

    async fn read(
        &self,
        blocks: BlockRange,
        was_by_hash: bool,
        escrows: &[Address],
    ) -> Result<Harvest, Trouble> {
        match was_by_hash {
            true => self.auditor.read_by_range(blocks, escrows).await,
            false => self.auditor.read_by_hash(blocks, escrows).await,
        }
    }

    async fn compare(&mut self, blocks: BlockRange, was_by_hash: bool) -> Result<Verified, Trouble> {
        let harvest = self.read(blocks, was_by_hash, &[]).await?;
        let signatures = Arc::clone(&self.signatures);
        let (found, comparison) = self.auditor.find(&signatures, blocks, harvest).await?;
        let mut findings = Vec::new();
        let missed: BTreeSet<Place> = comparison.missed.iter().copied().collect();
        // What is said to be missing is seen twice.
        self.auditor.confirm(missed.iter().map(|place| &found.events[place].0)).await?;
        for place in &missed {
            let (log, decoded) = &found.events[place];
            let difference = match comparison.extra.contains(place) {
                true => Difference::Differs,
                false => Difference::Missing,
            };
            findings.push(self.of_log(difference, log, decoded));
        }
        for (escrow, block) in &found.announced {
            self.strangers.entry(*escrow).or_insert(block.number);
        }
        self.miss_strangers(blocks, was_by_hash, &mut findings).await?;
        let extra = comparison.extra.into_iter().filter(|place| !missed.contains(place)).collect();
        findings.extend(self.extra(extra).await?);
        let odd = found.malformed.iter().filter(|log| comparison.odd.contains(&log.place()));
        findings.extend(odd.map(|log| Finding {
            difference: Difference::Undecodable,
            place: log.place(),
            escrow: Some(log.address),
            event: None,
            event_id: Some(log.event_id(self.chain_id)),
        }));
        findings.sort_by_key(|finding| finding.place);
        let unregistered = found.announced.keys().copied().collect();
        Ok(Verified { blocks, events: found.events.len() - missed.len(), findings, unregistered })
    }

    fn of_log(&self, difference: Difference, log: &Log, decoded: &Decoded) -> Finding {
        Finding {
            difference,
            place: (log.block.number, log.log_index),
            escrow: Some(decoded.escrow(log)),
            event: Some(decoded.name().to_owned()),
            event_id: Some(event_id(self.chain_id, &log.block.hash, log.log_index)),
        }
    }

    /// What escrows that are not registered emitted, from their announcements on.
    async fn miss_strangers(
        &self,
        blocks: BlockRange,
        was_by_hash: bool,
        findings: &mut Vec<Finding>,
    ) -> Result<(), Trouble> {
        let escrows: Vec<Address> = self.strangers.keys().copied().collect();
        if escrows.is_empty() {
            return Ok(());
        }
        for log in self.read(blocks, was_by_hash, &escrows).await?.logs() {
            let since = self.strangers.get(&log.address);
            if since.is_none_or(|since| log.block.number < *since) {
                continue;
            }
            if let Recognised::Known(decoded) = self.signatures.recognise(Role::Lifecycle, log) {
                findings.push(self.of_log(Difference::Missing, log, &decoded));
            }
        }
        Ok(())
    }

    /// Events that stand at these places, as far as their messages are still there.
    async fn extra(&self, places: Vec<Place>) -> Result<Vec<Finding>, Trouble> {
        let wanted = places.clone();
        let standing = on_disk(&self.store, move |store| store.standing_at(&wanted)).await?;
        let finding = |place| {
            let entry = standing.get(&place).map(|claimed| &claimed.entry);
            Finding {
                difference: Difference::Extra,
                place,
                escrow: entry.map(|entry| entry.escrow),
                event: entry.map(|entry| entry.name.clone()),
                event_id: entry.map(|entry| entry.event_id(self.chain_id)),
            }
        };
        Ok(places.into_iter().map(finding).collect())
    }
}
