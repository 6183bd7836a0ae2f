//! Finding escrows on the chain without registering them, or publishing anything.

use std::collections::BTreeMap;
use std::time::Duration;

use alloy::primitives::Address;

use super::rows::{FoundRow, state};
use super::{Desk, Progress, Refusal, Replies};
use crate::config::Horizon;
use crate::event::{BlockRange, Log, Recognised, Role};
use crate::scan::{Answer, BlockTag, Call, Chain, LogFilter, Refused, Size, Span};
use crate::store::Place;

/// Attempts at one range before it is given up, and the pause between them.
const ATTEMPTS: u32 = 10;
const PAUSE: Duration = Duration::from_millis(500);

impl Desk {
    /// The factory's announcements, read by range with the header of the range's last block beside: a node that is behind
    /// gives itself away.
    pub(super) async fn discover(
        &self,
        from: Option<u64>,
        to: Option<u64>,
        replies: &Replies,
    ) -> Result<(), Refusal> {
        let from = from.unwrap_or(self.store.start_block());
        let horizon = self.horizon().await?;
        let last = to.unwrap_or(horizon);
        let Some(blocks) = BlockRange::new(from, last.min(horizon)) else {
            let why =
                format!("there are no blocks from {from} to {last}: the last that may be read is {horizon}");
            return Err(Refusal::usage(why));
        };
        if last > horizon {
            replies.note(format!("Blocks up to {horizon} are read: later ones may not be yet")).await?;
        }
        let (mut size, mut failed, mut progress) =
            (Size::new(self.config.rpc.max_range.get()), 0, Progress::new());
        let mut rest = Some(blocks);
        while let Some(left) = rest {
            let range =
                BlockRange::starting_at(left.from(), size.now, left.to()).expect("one block at least");
            match self.announcements(range).await {
                Ok(logs) => {
                    (failed, rest) = (0, range.to().checked_add(1).and_then(|next| left.tail(next)));
                    size.answered(range.blocks());
                    self.tell_found(logs, replies).await?;
                    progress
                        .tell(replies, || format!("Read up to block {} of {}", range.to(), blocks.to()))
                        .await?;
                }
                Err(reason) => {
                    failed += u32::from(!size.refuse(range.blocks()));
                    if failed == ATTEMPTS {
                        return Err(Refusal::fault(format!("blocks {range} cannot be read: {reason}")));
                    }
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
        replies.row(&FoundRow::Read { from: blocks.from(), to: blocks.to() }).await
    }

    /// The last block that a run would read now.
    async fn horizon(&self) -> Result<u64, Refusal> {
        let chain = &self.config.chain;
        let tag = match chain.horizon {
            Horizon::Latest => BlockTag::Latest,
            Horizon::Safe => BlockTag::Safe,
            Horizon::Finalized => BlockTag::Finalized,
        };
        let number = async |tag| -> Result<Option<u64>, Refused> {
            let header = self.rpc.ask(vec![Call::Header(tag)]).await?.remove(0).header();
            Ok(header.map(|header| header.block.number))
        };
        let refuse = |refused: Refused| Refusal::fault(refused.to_string());
        let told = match number(tag).await {
            Ok(told) => told,
            Err(Refused::UnknownTag(_)) => None,
            Err(refused) => return Err(refuse(refused)),
        };
        let behind = match (told, chain.horizon) {
            (Some(number), Horizon::Latest) => Some((number, chain.confirmations)),
            (Some(number), Horizon::Safe | Horizon::Finalized) => Some((number, 0)),
            // The node knows no tags: the depth stands in for them.
            (None, _) => {
                number(BlockTag::Latest).await.map_err(refuse)?.map(|number| (number, chain.finality_depth))
            }
        };
        let horizon = behind.and_then(|(number, depth)| number.checked_sub(depth));
        horizon.ok_or_else(|| Refusal::fault("the node has no block yet that may be read"))
    }

    async fn announcements(&self, range: BlockRange) -> Result<Vec<Log>, String> {
        let filter = LogFilter {
            span: Span::Range(range),
            addresses: vec![self.config.factory.address].into(),
            topics: self.signatures.announcement_topics().into(),
        };
        let calls = vec![Call::Header(BlockTag::Number(range.to())), Call::Logs(filter)];
        let mut answers = self.rpc.ask(calls).await.map_err(|refused| refused.to_string())?.into_iter();
        let end = answers.next().and_then(Answer::header);
        let logs = answers.next().map(Answer::logs).unwrap_or_default();
        let fits = |log: &Log| {
            let is_last = log.block.number == range.to();
            range.contains(log.block.number) && (!is_last || end.is_some_and(|end| end.block == log.block))
        };
        match end.is_some_and(|end| end.block.number == range.to()) && logs.iter().all(fits) {
            true => Ok(logs),
            false => Err(format!("the node's answers for blocks {range} do not fit together")),
        }
    }

    async fn tell_found(&self, logs: Vec<Log>, to: &Replies) -> Result<(), Refusal> {
        let mut found: BTreeMap<Place, Address> = BTreeMap::new();
        for log in logs.iter().filter(|log| log.address == self.config.factory.address) {
            if let Recognised::Known(known) = self.signatures.recognise(Role::Announcement, log) {
                found.insert((log.block.number, log.log_index), known.escrow(log));
            }
        }
        let addresses: Vec<Address> = found.values().copied().collect();
        let rows = self.on_disk(move |store| store.escrows_of(&addresses)).await?;
        for ((block, log_index), escrow) in found {
            let state = rows.get(&escrow).map(|row| state(row).to_owned());
            let address = format!("{escrow:#x}");
            to.row(&FoundRow::Escrow { address, block, log_index, state }).await?;
        }
        Ok(())
    }
}
