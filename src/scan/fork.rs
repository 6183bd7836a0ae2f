//! Finding where a fork began, and whether there is one.
//!
//! A retraction cannot be taken back unseen, so a fork is acted on only when it is sure: the provider says so twice,
//! another provider, where one is configured, no longer has the lost block either, and it withdraws no more messages
//! than may be withdrawn in a minute.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;
use tracing::{error, info, warn};

use super::{Answer, BlockTag, Call, Chain, SECOND_LOOK, Scanner, Step, Trouble};
use crate::event::{BlockRef, Header};
use crate::store::{Withdrawal, on_disk};
use crate::telemetry::metrics;

/// Remembered blocks looked up in one round trip.
const LOOK_BACK: usize = 64;
/// How long the other providers may say nothing, or the contrary, before that settles it.
const CONSENT: Duration = Duration::from_secs(30);
/// How long to wait before asking for consent again.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// How long withdrawn messages count towards the cap.
const MINUTE: Duration = Duration::from_secs(60);

/// What the chain says of the blocks that were accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Finding {
    /// Every accepted block the node has is still on the chain: it only lags.
    NoFork,
    Fork(Fork),
}

/// A fork that took accepted blocks off the chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fork {
    /// The newest accepted block still on the chain; `None`: none of them is.
    ancestor: Option<BlockRef>,
    /// The oldest accepted block that is not.
    lost: BlockRef,
}

/// A fork that was seen, and is not acted on yet.
#[derive(Clone, Copy, Debug)]
pub(super) struct Suspicion {
    fork: Fork,
    since: Instant,
    said: bool,
}

/// What another provider says of a fork.
#[derive(Debug)]
enum Opinion {
    /// The lost block is not on its chain either, or there is nobody to ask.
    Agrees,
    /// It has the lost block.
    Contradicts,
    /// It has no block at that height, or does not answer.
    None(String),
}

/// The messages withdrawn within the last minute.
#[derive(Debug, Default)]
pub(super) struct Withdrawn(VecDeque<(Instant, u64)>);

impl Withdrawn {
    fn add(&mut self, messages: u64) {
        self.0.push_back((Instant::now(), messages));
    }

    fn last_minute(&mut self) -> u64 {
        self.0.retain(|(at, _)| at.elapsed() < MINUTE);
        self.0.iter().map(|(_, messages)| messages).sum()
    }
}

impl<C: Chain> Scanner<C> {
    /// Compares the accepted blocks with the chain, and goes back to where a fork began if it is sure that there is one.
    pub(super) async fn look_back(&mut self) -> Result<Step, Trouble> {
        self.recent.clear();
        self.ahead.clear();
        self.coming = None;
        self.followed = None;
        self.target = None;
        let Finding::Fork(fork) = self.find_fork().await? else {
            self.suspected = None;
            return Ok(Step::Idle);
        };
        let Some(suspicion) = self.suspected.filter(|suspicion| suspicion.fork == fork) else {
            self.suspected = Some(Suspicion { fork, since: Instant::now(), said: false });
            return Ok(Step::Wait(SECOND_LOOK));
        };
        if let Some(wait) = self.without_consent(suspicion).await {
            return Ok(wait);
        }
        self.go_back(fork).await
    }

    /// `Some`: not yet.
    async fn without_consent(&mut self, suspicion: Suspicion) -> Option<Step> {
        let (fork, waited) = (suspicion.fork, suspicion.since.elapsed());
        let patient = waited < CONSENT;
        let block = fork.lost.number;
        let why = match self.opinion(fork.lost).await {
            Opinion::Agrees => return None,
            Opinion::None(why) if patient => why,
            Opinion::None(why) => {
                warn!(block, reason = %why, "No other provider says whether block {block} left the chain: acting on one's word");
                return None;
            }
            Opinion::Contradicts if patient => "another provider still has it".to_owned(),
            Opinion::Contradicts => {
                warn!(
                    block,
                    "Providers disagree about block {block}: turning to another, nothing is withdrawn"
                );
                self.chain.turn_away();
                self.suspected = None;
                return Some(Step::Wait(ASK_AGAIN));
            }
        };
        if !suspicion.said {
            warn!(block, reason = %why, "Block {block} seems to have left the chain: waiting for another provider to agree");
            self.suspected = Some(Suspicion { said: true, ..suspicion });
        }
        Some(Step::Wait(ASK_AGAIN))
    }

    async fn opinion(&self, lost: BlockRef) -> Opinion {
        let asked = vec![Call::Header(BlockTag::Number(lost.number))];
        let header = match self.chain.ask_another(asked).await {
            None => return Opinion::Agrees,
            Some(Err(refused)) => return Opinion::None(refused.to_string()),
            Some(Ok(answers)) => answers.into_iter().next().and_then(Answer::header),
        };
        match header {
            Some(header) if header.block == lost => Opinion::Contradicts,
            Some(_) => Opinion::Agrees,
            None => Opinion::None("another provider has no block at that height".to_owned()),
        }
    }

    async fn go_back(&mut self, fork: Fork) -> Result<Step, Trouble> {
        let (ancestor, cap) = (fork.ancestor, self.settings.max_retractions_per_minute);
        let room = cap.saturating_sub(self.withdrawn.last_minute());
        let withdrawal = on_disk(&self.store, move |store| store.retract(ancestor, room)).await?;
        let withdrawal = match withdrawal {
            Ok(withdrawal) => withdrawal,
            Err(too_many) => return Ok(self.stop_at_cap(too_many.messages)),
        };
        self.suspected = None;
        self.go_on_retracting();
        self.say_withdrawn(fork, &withdrawal);
        Ok(Step::Progress)
    }

    /// Publishing goes on, and so does looking: the fork may pass, and a minute ends.
    fn stop_at_cap(&mut self, messages: u64) -> Step {
        let cap = self.settings.max_retractions_per_minute;
        if !std::mem::replace(&mut self.said.cap, true) {
            error!(
                messages,
                cap,
                "A fork would withdraw {messages} messages, and chain.max_retractions_per_minute is {cap}: reading stops. \
                 Check the provider; if the fork is real, raise the cap and start again"
            );
            metrics::retractions_stopped(true);
            self.vitals.retractions_stopped(true);
        }
        Step::Wait(ASK_AGAIN.max(self.settings.poll_interval))
    }

    /// The fork was followed after all, or blocks are accepted again and it has passed.
    pub(super) fn go_on_retracting(&mut self) {
        if std::mem::take(&mut self.said.cap) {
            metrics::retractions_stopped(false);
            self.vitals.retractions_stopped(false);
            info!("Retractions go on");
        }
    }

    fn say_withdrawn(&mut self, fork: Fork, withdrawal: &Withdrawal) {
        self.withdrawn.add(withdrawal.retracted as u64);
        metrics::retracted(withdrawal.retracted);
        warn!(
            from = fork.lost.number,
            back_to = fork.ancestor.map(|block| block.number),
            retracted = withdrawal.retracted,
            dropped = withdrawal.dropped,
            escrows = withdrawal.escrows,
            "The chain was reorganised: {} events withdrawn",
            withdrawal.retracted
        );
        info!("Registry: {} escrows registered", self.store.registry().len());
    }

    /// Walks back over the accepted blocks to the newest that is still on the chain. A height the node does not
    /// have says nothing: it may lag, or the new fork may be shorter.
    async fn find_fork(&self) -> Result<Finding, Trouble> {
        let remembered = on_disk(&self.store, |store| store.remembered()).await?;
        let mut lost = None;
        for accepted in remembered.chunks(LOOK_BACK) {
            let calls = accepted.iter().map(|block| Call::Header(BlockTag::Number(block.number))).collect();
            let headers = self.ask(calls).await?.into_iter().map(Answer::header);
            for (accepted, header) in accepted.iter().zip(headers) {
                match header {
                    Some(Header { block, .. }) if block == *accepted => {
                        let fork = lost.map(|lost| Fork { ancestor: Some(block), lost });
                        return Ok(fork.map_or(Finding::NoFork, Finding::Fork));
                    }
                    Some(_) => lost = Some(*accepted),
                    None => {}
                }
            }
        }
        Ok(lost.map_or(Finding::NoFork, |lost| Finding::Fork(Fork { ancestor: None, lost })))
    }
}
