//! Unfinal blocks, asked for while the final ones before them are still read.
//!
//! Their headers can be asked for at once. Their logs when it is known who is watched by then: as soon as the announcements
//! of all final ranges are there, beside the follow-ups and the commits of these. They are asked for by block hash, so whatever
//! happens to the chain meanwhile, they are the logs of those blocks; whether the blocks follow the cursor is for the reader to
//! see. That they are still on the chain nobody looks again, so what lies unused for long is asked for anew.

use std::ops::RangeInclusive;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use alloy::primitives::B256;
use alloy::primitives::map::AddressSet;
use foldhash::HashSet;
use tokio::sync::oneshot;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use super::harvest::{Decoder, Harvest};
use super::limits::Way;
use super::read::calls_of_block;
use super::{Answer, BlockTag, Call, Chain, LogFilter};
use crate::event::{BlockRange, BlockRef, Header};

/// How long answers may lie unused: a fork that takes those blocks meanwhile would be seen only after they were accepted.
const FRESH: Duration = Duration::from_secs(2);

/// Blocks that were asked for.
pub(super) struct Coming {
    pub range: BlockRange,
    whom: Option<oneshot::Sender<Whom>>,
    /// Which block they follow, once their headers are there.
    parent: Arc<OnceLock<B256>>,
    asking: AbortOnDropHandle<Option<There>>,
}

/// Whose logs to ask for, who of them is not watched yet, and what makes events of them: who has it has the store.
type Whom = (Vec<LogFilter>, How, AddressSet, Decoder);

/// What came of it, how long nothing was under way until the logs were asked for, and since when nothing is.
struct There {
    come: Come,
    unused: Duration,
    since: Instant,
}

/// How logs were asked for.
pub(super) struct How {
    pub way: Way,
    /// Addresses in the largest filter.
    pub addresses: usize,
    /// Escrows that had come to be watched before the filters were made.
    pub arrivals: u64,
}

/// What came of it.
pub(super) struct Come {
    /// Each the parent of the next.
    pub headers: Vec<Header>,
    /// The logs of the range, if they were asked for and answered.
    pub logs: Option<(Harvest, How)>,
}

impl Coming {
    /// Asks for the headers of the range, whose logs are wanted later, and of the blocks behind it up to `newest`, but for
    /// those that are `known`.
    pub fn ask<C: Chain>(chain: &Arc<C>, range: BlockRange, newest: u64, known: Vec<Header>) -> Self {
        let (whom, filters) = oneshot::channel::<Whom>();
        let chain = Arc::clone(chain);
        let parent = Arc::new(OnceLock::new());
        let told = Arc::clone(&parent);
        let asking = AbortOnDropHandle::new(tokio::spawn(async move {
            let headers = headers(&*chain, range.from()..=newest, known).await?;
            if let Some(first) = headers.first() {
                told.get_or_init(|| first.parent_hash);
            }
            let answered = Instant::now();
            let Ok((filters, how, joining, decoder)) = filters.await else {
                let come = Come { headers, logs: None };
                return Some(There { come, unused: Duration::ZERO, since: answered });
            };
            let unused = answered.elapsed();
            let of_range = &headers[..range.blocks() as usize];
            let logs = match unused < FRESH {
                true => logs(&*chain, &decoder, of_range, &filters, joining).await,
                false => None,
            };
            let come = Come { headers, logs: logs.map(|harvest| (harvest, how)) };
            Some(There { come, unused, since: Instant::now() })
        }));
        Self { range, whom: Some(whom), parent, asking }
    }

    /// Whether it is known that they do not follow this block, which is the one before them.
    pub fn contradicts(&self, block: BlockRef) -> bool {
        block.number + 1 == self.range.from() && self.parent.get().is_some_and(|parent| *parent != block.hash)
    }

    /// Whether it has yet to be said whose logs to ask for.
    pub fn waits_for_filters(&self) -> bool {
        self.whom.is_some()
    }

    /// Asks for their logs. `joining`: those in the filters that are not watched yet.
    pub fn ask_logs(&mut self, filters: Vec<LogFilter>, how: How, joining: AddressSet, decoder: &Decoder) {
        if let Some(whom) = self.whom.take() {
            // The headers were not answered: then nobody listens.
            let _ = whom.send((filters, how, joining, decoder.clone()));
        }
    }

    /// Waits for what was asked for. `None`: it was not answered, or too long ago.
    pub async fn there(self) -> Option<Come> {
        drop(self.whom);
        let There { come, unused, since } = match self.asking.await {
            Ok(there) => there?,
            Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
        };
        (unused + since.elapsed() < FRESH).then_some(come)
    }
}

/// The headers of these blocks; `None` if one is missing, or does not name the one before as its parent.
async fn headers<C: Chain>(
    chain: &C,
    blocks: RangeInclusive<u64>,
    known: Vec<Header>,
) -> Option<Vec<Header>> {
    let mut all = known;
    let known: HashSet<u64> = all.iter().map(|header| header.block.number).collect();
    let missing: Vec<u64> = blocks.clone().filter(|number| !known.contains(number)).collect();
    if !missing.is_empty() {
        let calls = missing.iter().map(|number| Call::Header(BlockTag::Number(*number))).collect();
        all.extend(chain.ask_ahead(calls).await?.into_iter().filter_map(Answer::header));
    }
    all.sort_unstable_by_key(|header| header.block.number);
    let is_whole = all.iter().map(|header| header.block.number).eq(blocks);
    let is_linked = all.windows(2).all(|pair| pair[1].parent_hash == pair[0].block.hash);
    (is_whole && is_linked).then_some(all)
}

/// The logs of these blocks, decoded as far as can be; `None` if they were not answered, or contradict themselves.
async fn logs<C: Chain>(
    chain: &C,
    decoder: &Decoder,
    headers: &[Header],
    filters: &[LogFilter],
    joining: AddressSet,
) -> Option<Harvest> {
    let mut harvest = Harvest::of(headers);
    harvest.expected = joining;
    let calls = |header: &Header| calls_of_block(filters, header);
    if !harvest.gather_blocks(chain, headers, calls, true).await.ok()? {
        return None;
    }
    harvest.prepare(chain, decoder, true, |_| false).await.ok()
}
