//! Publishing again what was published before.

use std::sync::Arc;

use alloy::primitives::Address;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tracing::info;

use super::outbox::stopping;
use super::rows::ReplayRow;
use super::{Desk, PAGE, Progress, Refusal, Replies};
use crate::event::BlockRange;
use crate::publish::{ORDERS, Order, PublishError, Publisher, Replayed, Step};
use crate::pubsub::ConfiguredSink;
use crate::store::Claimed;

/// Messages given to the lanes at once, at most; and at most this part of `sink.max_outstanding`, so that what is new is
/// not kept waiting.
const AT_ONCE: usize = 250;
const PART: usize = 4;

impl Desk {
    /// Publishes again what these blocks brought and was acknowledged by now, in the order of the log.
    pub(super) async fn replay(
        &self,
        blocks: BlockRange,
        escrow: Option<Address>,
        to: &Replies,
    ) -> Result<(), Refusal> {
        if let Some(why) = self.pruned_from(blocks.from()).await? {
            return Err(Refusal::usage(format!("--from {}: {why}", blocks.from())));
        }
        match self.orders() {
            Some(orders) => self.feed(orders, blocks, escrow, to).await,
            None => self.publish_alone(blocks, escrow, to).await,
        }
    }

    /// Whether messages of that block or later ones were pruned, in words.
    async fn pruned_from(&self, block: u64) -> Result<Option<String>, Refusal> {
        let whole_from = self.on_disk(|store| store.whole_from()).await?;
        let pruned = block < whole_from && whole_from > self.store.start_block();
        Ok(pruned.then(|| {
            format!(
                "some messages of blocks before {whole_from} were pruned (ledger.retention) and cannot be published again; \
                 the first block that can is {whole_from}"
            )
        }))
    }

    /// With a publisher of its own, that publishes nothing else.
    async fn publish_alone(
        &self,
        blocks: BlockRange,
        escrow: Option<Address>,
        to: &Replies,
    ) -> Result<(), Refusal> {
        let sink = ConfiguredSink::open(&self.config.sink).await;
        let sink = Arc::new(sink.map_err(|error| Refusal::usage(error.to_string()))?);
        let (orders, taken) = mpsc::channel(ORDERS);
        let publisher = Publisher::new(sink, Arc::clone(&self.store), &self.config.sink)
            .permitted_by(Arc::clone(&self.permit));
        tokio::select! {
            fed = self.feed(&orders, blocks, escrow, to) => fed,
            error = publish(publisher.only_ordered().taking(taken)) => Err(Refusal::fault(error.to_string())),
        }
    }

    /// One part after the other: the next when the last is acknowledged. So no more than one is in memory, and none is left
    /// behind when whoever asked goes away.
    async fn feed(
        &self,
        orders: &mpsc::Sender<Order>,
        blocks: BlockRange,
        escrow: Option<Address>,
        to: &Replies,
    ) -> Result<(), Refusal> {
        let end = self.store.entries();
        let acknowledged = self.on_disk(|store| store.acknowledged()).await?;
        let is_meant = |claimed: &Claimed| {
            claimed.position < end
                && blocks.contains(claimed.entry.block_number)
                && escrow.is_none_or(|escrow| escrow == claimed.entry.escrow)
                && acknowledged.contains(claimed.position)
        };
        let at_once = (self.config.sink.max_outstanding.get() / PART).clamp(1, AT_ONCE);
        let (mut published, mut next, mut progress) = (0, Some(0), Progress::new());
        while let Some(position) = next.filter(|position| *position < end) {
            let page = self.on_disk(move |store| store.entries_from(position, PAGE)).await?;
            // What the page begins with was there when the page before was read.
            let overtaken = page.entries.first().is_none_or(|first| first.position > position);
            if overtaken && let Some(why) = self.pruned_from(blocks.from()).await? {
                return Err(Refusal::fault(format!(
                    "stopped after {published} messages, as pruning was faster: {why}. To replay the rest from there on, set \
                     ledger.retention to more, or to \"forever\", and start again"
                )));
            }
            next = page.next;
            let meant: Vec<Claimed> = page.entries.into_iter().filter(is_meant).collect();
            for part in meant.chunks(at_once) {
                published += self.give(orders, part, to).await?;
                let block = part.last().map_or(0, |claimed| claimed.entry.block_number);
                let text =
                    || format!("{published} messages published again so far, the last of block {block}");
                progress.tell(to, text).await?;
            }
        }
        info!(messages = published, %blocks, "Published {published} messages of blocks {blocks} again");
        to.row(&ReplayRow::Published { messages: published }).await
    }

    /// Has these published again; how many were acknowledged.
    async fn give(
        &self,
        orders: &mpsc::Sender<Order>,
        part: &[Claimed],
        to: &Replies,
    ) -> Result<u64, Refusal> {
        let (told, mut outcomes) = mpsc::unbounded_channel();
        orders.send(Order::Replay { entries: part.to_vec(), told }).await.map_err(|_| stopping())?;
        let (mut published, mut told_of) = (0, 0);
        while told_of < part.len() {
            let Ok(outcome) = timeout(Progress::EVERY, outcomes.recv()).await else {
                let waiting = part.len() - told_of;
                to.note(format!("Waiting for {waiting} messages to be acknowledged")).await?;
                continue;
            };
            told_of += 1;
            match outcome.ok_or_else(stopping)? {
                Replayed::Acknowledged => published += 1,
                Replayed::Left(position, reason) => {
                    let of_it = part.iter().find(|claimed| claimed.position == position);
                    let event_id = of_it.map(|it| it.entry.event_id(self.config.chain.id));
                    to.row(&ReplayRow::Left { event_id: event_id.unwrap_or_default(), reason }).await?;
                }
            }
        }
        Ok(published)
    }
}

/// Obeys orders until something fails.
async fn publish(mut publisher: Publisher<ConfiguredSink>) -> PublishError {
    loop {
        let pause = match publisher.step().await {
            Ok(Step::Progress) => continue,
            Ok(Step::Idle) => None,
            Ok(Step::Wait(pause)) => Some(pause),
            Err(error) => return error,
        };
        tokio::select! {
            () = publisher.woken() => {}
            () = tokio::time::sleep(pause.unwrap_or_default()), if pause.is_some() => {}
        }
    }
}
