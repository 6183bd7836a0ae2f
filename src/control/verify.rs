//! What the chain has against what was relayed.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::rows::{FindingRow, VerifyRow};
use super::{Desk, Progress, Refusal, Replies};
use crate::event::BlockRange;
use crate::scan::{Difference, Finding, Verified, Verifier};
use crate::store::{Place, Store, StoreError};

impl Desk {
    /// Says how these blocks differ on the chain from what was relayed of them.
    pub(super) async fn verify(&self, asked: BlockRange, to: &Replies) -> Result<(), Refusal> {
        self.reads_nothing_late()?;
        let blocks = self.comparable(asked, to).await?;
        let finalized = self.store.finalized();
        let is_final = |block: u64| finalized.is_some_and(|finalized| block <= finalized);
        if !is_final(blocks.to()) {
            let upto = finalized.map_or("none is".to_owned(), |block| format!("up to {block}"));
            to.note(format!("Not all blocks are final ({upto}): what is said of later ones is true for now"))
                .await?;
        }
        let (chain, store, signatures) =
            (Arc::clone(&self.rpc), Arc::clone(&self.store), Arc::clone(&self.signatures));
        let mut verifier = Verifier::new(chain, store, signatures, &self.config, blocks);
        let (mut events, mut extra, mut progress) = (0, BTreeSet::new(), Progress::new());
        let refuse = |error: crate::scan::VerifyError| Refusal::fault(error.to_string());
        while let Some(verified) = verifier.step().await.map_err(refuse)? {
            let verified = self.on_disk(move |store| as_of_now(store, verified)).await?;
            if verified.findings.iter().any(is_missing) {
                self.reads_nothing_late()?;
            }
            events += verified.events as u64;
            for finding in &verified.findings {
                if finding.difference == Difference::Extra {
                    extra.insert(finding.place);
                }
                to.row(&VerifyRow::Finding(finding_row(finding, is_final(finding.place.0)))).await?;
            }
            for escrow in &verified.unregistered {
                to.row(&VerifyRow::Unregistered { escrow: format!("{escrow:#x}") }).await?;
            }
            let done = verified.blocks.to();
            progress.tell(to, || format!("Compared up to block {done} of {}", blocks.to())).await?;
        }
        let unkept = self.on_disk(move |store| store.unkept(blocks)).await?;
        for (block, log_index) in unkept.into_iter().filter(|place| !extra.contains(place)) {
            let difference = "unkept".to_owned();
            let (escrow, event, event_id) = (None, None, None);
            let is_final = is_final(block);
            let row = FindingRow { difference, block, log_index, escrow, event, event_id, is_final };
            to.row(&VerifyRow::Finding(row)).await?;
        }
        let final_to = (!is_final(blocks.to())).then_some(finalized.unwrap_or(0));
        to.row(&VerifyRow::Verified { blocks: blocks.blocks(), events, final_to }).await
    }

    /// Refused while what would be missing may yet be read.
    fn reads_nothing_late(&self) -> Result<(), Refusal> {
        match self.store.late_read() {
            None => Ok(()),
            Some((_, read)) => Err(Refusal::fault(format!(
                "history is still being read once more, from block {} on, and what it has not reached would seem to be \
                 missing: verify when that is done",
                read.next
            ))),
        }
    }

    /// Those of the blocks that can be compared.
    async fn comparable(&self, asked: BlockRange, to: &Replies) -> Result<BlockRange, Refusal> {
        let first = self.on_disk(|store| store.comparable_from()).await?;
        let last = self.store.next_block().checked_sub(1);
        let comparable = last.and_then(|last| BlockRange::new(asked.from().max(first), asked.to().min(last)));
        let Some(blocks) = comparable else {
            let what = match last.filter(|last| *last >= first) {
                Some(last) => format!("blocks {first} to {last} can be"),
                None => "no block was read yet".to_owned(),
            };
            return Err(Refusal::usage(format!("blocks {asked} cannot be compared: {what}")));
        };
        if blocks != asked {
            let why = "earlier ones left no trace in this store, later ones were not read yet";
            to.note(format!("Only blocks {blocks} of {asked} are compared: {why}")).await?;
        }
        Ok(blocks)
    }
}

fn is_missing(finding: &Finding) -> bool {
    finding.difference == Difference::Missing
}

/// What of that is so by now: beside an audit, or an import, what was missing when it was looked for may have been found
/// and stored.
fn as_of_now(store: &Store, mut verified: Verified) -> Result<Verified, StoreError> {
    let missing: Vec<Place> =
        verified.findings.iter().filter(|it| is_missing(it)).map(|it| it.place).collect();
    let stored = store.standing_among(&missing)?;
    verified.findings.retain(|it| !(is_missing(it) && stored.contains(&it.place)));
    verified.events += stored.len();
    let registry = store.registry();
    verified.unregistered.retain(|escrow| !registry.contains(escrow) && !registry.is_joining(escrow));
    Ok(verified)
}

fn finding_row(finding: &Finding, is_final: bool) -> FindingRow {
    let difference = match finding.difference {
        Difference::Missing => "missing",
        Difference::Extra => "extra",
        Difference::Differs => "differs",
        Difference::Undecodable => "undecodable",
    };
    let (block, log_index) = finding.place;
    FindingRow {
        difference: difference.to_owned(),
        block,
        log_index,
        escrow: finding.escrow.map(|escrow| format!("{escrow:#x}")),
        event: finding.event.clone(),
        event_id: finding.event_id.clone(),
        is_final,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::{block, escrow, memory, stretch};

    #[test]
    fn what_was_missing_and_came_while_it_was_compared_is_not_said_to_be_missing() {
        let store = memory();
        store.accept(&stretch(block(1, 0), &[1], &[1])).unwrap();
        let finding = |difference, place| Finding {
            difference,
            place,
            escrow: Some(escrow(1)),
            event: None,
            event_id: None,
        };
        let verified = Verified {
            blocks: BlockRange::new(1, 2).unwrap(),
            events: 5,
            findings: vec![
                finding(Difference::Missing, (1, 0)),
                finding(Difference::Missing, (1, 9)),
                finding(Difference::Missing, (2, 0)),
                finding(Difference::Differs, (1, 1)),
                finding(Difference::Extra, (1, 1)),
            ],
            unregistered: vec![escrow(1), escrow(2)],
        };
        let Verified { events, findings, unregistered, .. } = as_of_now(&store, verified).unwrap();
        let left: Vec<_> = findings.iter().map(|it| (it.difference, it.place)).collect();
        assert_eq!(
            left,
            [
                (Difference::Missing, (1, 9)),
                (Difference::Missing, (2, 0)),
                (Difference::Differs, (1, 1)),
                (Difference::Extra, (1, 1)),
            ]
        );
        assert_eq!((events, unregistered), (6, vec![escrow(2)]));
    }
}
