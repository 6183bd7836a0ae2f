//! Finding where a fork began, and whether there is one.

use tracing::{info, warn};

use super::{Answer, BlockTag, Call, Chain, SECOND_LOOK, Scanner, Step, Trouble};
use crate::event::{BlockRef, Header};
use crate::store::on_disk;
use crate::telemetry::metrics;

/// Remembered blocks looked up in one round trip.
const LOOK_BACK: usize = 64;

/// What the chain says of the blocks that were accepted.
#[derive(Debug, PartialEq, Eq)]
enum Finding {
    /// Every accepted block the node has is still on the chain: it only lags.
    NoFork,
    /// The newest accepted block still on the chain; `None`: none of them is.
    Fork(Option<BlockRef>),
}

impl<C: Chain> Scanner<C> {
    /// Compares the accepted blocks with the chain. A fork is acted on when two looks agree.
    pub(super) async fn look_back(&mut self) -> Result<Step, Trouble> {
        self.recent.clear();
        self.target = None;
        let ancestor = match self.find_fork().await? {
            Finding::NoFork => {
                self.suspected = None;
                return Ok(Step::Idle);
            }
            Finding::Fork(ancestor) => ancestor,
        };
        if self.suspected != Some(ancestor) {
            self.suspected = Some(ancestor);
            return Ok(Step::Wait(SECOND_LOOK));
        }
        self.suspected = None;
        let cursor = self.store.cursor();
        let withdrawal = on_disk(&self.store, move |store| store.retract(ancestor)).await?;
        metrics::retracted(withdrawal.retracted);
        warn!(
            from = cursor.map(|block| block.number),
            to = ancestor.map(|block| block.number),
            retracted = withdrawal.retracted,
            dropped = withdrawal.dropped,
            escrows = withdrawal.escrows,
            "The chain was reorganised: {} events withdrawn",
            withdrawal.retracted
        );
        info!("Registry: {} escrows registered", self.store.registry().len());
        Ok(Step::Progress)
    }

    /// Walks back over the accepted blocks to the newest that is still on the chain. A height the node does not
    /// have says nothing: it may lag, or the new fork may be shorter.
    async fn find_fork(&self) -> Result<Finding, Trouble> {
        let remembered = on_disk(&self.store, |store| store.remembered()).await?;
        let mut differs = false;
        for accepted in remembered.chunks(LOOK_BACK) {
            let calls = accepted.iter().map(|block| Call::Header(BlockTag::Number(block.number))).collect();
            let headers = self.ask(calls).await?.into_iter().map(Answer::header);
            for (accepted, header) in accepted.iter().zip(headers) {
                match header {
                    Some(Header { block, .. }) if block == *accepted && differs => {
                        return Ok(Finding::Fork(Some(block)));
                    }
                    Some(Header { block, .. }) if block == *accepted => return Ok(Finding::NoFork),
                    Some(_) => differs = true,
                    None => {}
                }
            }
        }
        Ok(if differs { Finding::Fork(None) } else { Finding::NoFork })
    }
}
