//! The seam between scanning and whatever answers JSON-RPC.

use std::fmt;
use std::future::Future;
use std::num::NonZeroU64;
use std::sync::Arc;

use alloy::primitives::{Address, B256, Bytes, Selector};
use thiserror::Error;
use tokio::sync::watch;

use crate::event::{Addresses, BlockRange, Header, Log};

/// A chain one can ask. Faults and rate limits are waited out below this seam; what comes through it either
/// changes the plan or ends the run.
pub trait Chain: Send + Sync + 'static {
    /// Asks all calls in as few round trips as possible; answers in the order of the calls.
    ///
    /// The calls of one batch may be answered by different nodes: nothing follows from their agreeing by chance.
    fn ask(&self, calls: Vec<Call>) -> impl Future<Output = Result<Vec<Answer>, Refused>> + Send;

    /// Asks the same of a provider other than the one in use: one attempt, for a second opinion. `None`: no other is
    /// configured; an error: none of them answered.
    fn ask_another(
        &self,
        calls: Vec<Call>,
    ) -> impl Future<Output = Option<Result<Vec<Answer>, Refused>>> + Send;

    /// Asks what is not needed yet: one attempt, none while the provider is in trouble. `None`: it was not answered; whoever
    /// needs it then asks again and learns why.
    fn ask_ahead(&self, calls: Vec<Call>) -> impl Future<Output = Option<Vec<Answer>>> + Send;

    /// Asks the provider in use: one attempt, without consequences for who is asked next.
    fn ask_once(&self, calls: Vec<Call>) -> impl Future<Output = Result<Vec<Answer>, Refused>> + Send;

    /// Heads as they are announced, the newest kept; the header before the first one is not known. `None`: nobody announces
    /// any. An announcement wakes and says where to look; what is there is asked for.
    fn heads(&self) -> Option<watch::Receiver<Option<Header>>> {
        None
    }

    /// Polls found heads that had not been announced: the subscription may be dead, or late.
    fn heads_are_missing(&self) {}

    /// The provider in use contradicts itself or the others: asks another from now on, where there is one.
    fn turn_away(&self);
}

/// One question.
#[derive(Clone, Debug)]
pub enum Call {
    /// The header of a block.
    Header(BlockTag),
    /// Logs.
    Logs(LogFilter),
    /// Whether there is a contract at an address, at the head.
    Code(Address),
    /// What a function without arguments returns, as of a block.
    Read {
        /// Whose function.
        contract: Address,
        /// Which.
        selector: Selector,
        /// The block's height.
        at: u64,
    },
}

/// Which block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockTag {
    /// By height.
    Number(u64),
    /// The head.
    Latest,
    /// The head the node calls safe.
    Safe,
    /// The head the node calls finalized.
    Finalized,
}

impl fmt::Display for BlockTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => write!(f, "{number}"),
            Self::Latest => f.write_str("latest"),
            Self::Safe => f.write_str("safe"),
            Self::Finalized => f.write_str("finalized"),
        }
    }
}

/// Which logs.
#[derive(Clone, Debug)]
pub struct LogFilter {
    /// Of which blocks.
    pub span: Span,
    /// From these contracts; from any if there is none.
    pub addresses: Addresses,
    /// With one of these as `topics[0]`; with any if there is none.
    pub topics: Arc<[B256]>,
}

/// The blocks of a filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Span {
    /// By height. Always numbers: `latest` in a range fails on geth when there is no new block.
    Range(BlockRange),
    /// One block of one fork: a node that does not know it says so, instead of answering with an empty list.
    Block(B256),
}

/// One answer, of the kind of its call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// `None`: the node has no such block.
    Header(Option<Header>),
    /// In the order the node gave; those marked `removed` are already dropped.
    Logs(Vec<Log>),
    /// Whether there is code.
    Code(bool),
    /// What a function returned.
    Output(Bytes),
}

impl Answer {
    /// The header of an answer to [`Call::Header`].
    pub fn header(self) -> Option<Header> {
        match self {
            Self::Header(header) => header,
            Self::Logs(_) | Self::Code(_) | Self::Output(_) => {
                unreachable!("answers are of the kind of their call")
            }
        }
    }

    /// The logs of an answer to [`Call::Logs`].
    pub fn logs(self) -> Vec<Log> {
        match self {
            Self::Logs(logs) => logs,
            Self::Header(_) | Self::Code(_) | Self::Output(_) => {
                unreachable!("answers are of the kind of their call")
            }
        }
    }

    /// The answer to [`Call::Code`].
    pub fn code(self) -> bool {
        match self {
            Self::Code(code) => code,
            Self::Header(_) | Self::Logs(_) | Self::Output(_) => {
                unreachable!("answers are of the kind of their call")
            }
        }
    }

    /// The answer to [`Call::Read`].
    pub fn output(self) -> Bytes {
        match self {
            Self::Output(output) => output,
            Self::Header(_) | Self::Logs(_) | Self::Code(_) => {
                unreachable!("answers are of the kind of their call")
            }
        }
    }
}

/// Why a call was refused, as far as the plan has to change. Texts are already free of URLs.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Refused {
    /// At most that many blocks a range.
    #[error("the provider takes at most {0} blocks a range")]
    Cap(NonZeroU64),
    /// This smaller range, starting where the asked one did, would be answered.
    #[error("the provider suggests blocks {0}")]
    Use(BlockRange),
    /// Too many blocks, or too many logs in them.
    #[error("the provider wants a smaller range: {0}")]
    Halve(String),
    /// No usable answer again and again: perhaps too much was asked for.
    #[error("the provider does not manage to answer: {0}")]
    Slow(String),
    /// Too many addresses in one filter.
    #[error("the provider wants fewer addresses: {0}")]
    FewerAddresses(String),
    /// The node answering does not have that block yet.
    #[error("the node is behind: {0}")]
    Behind(String),
    /// The node does not know the tag.
    #[error("the node does not know the tag: {0}")]
    UnknownTag(String),
    /// The node no longer has those blocks' logs.
    #[error("the provider no longer has this history: {0}")]
    HistoryGone(String),
    /// The provider does not offer the method.
    #[error("the provider does not offer this: {0}")]
    Unsupported(String),
    /// A message nobody has seen before.
    #[error("the provider refused: {0}")]
    Unknown(String),
    /// Every provider is on another chain.
    #[error("rpc.urls: the provider is on chain {found}, chain.id is {expected}: correct one of them")]
    WrongChain {
        /// As configured.
        expected: u64,
        /// As answered.
        found: u64,
    },
}
