//! The domain: blocks, logs, and the events they carry.
//!
//! A [`Log`] is what the node answered. [`Signatures`] turns it into an [`Event`]: decoded once, encoded once,
//! lacking only its sequence number, which the store assigns in the commit.

mod addresses;
mod extent;
mod message;
mod signature;
#[cfg(test)]
mod tests;

use std::fmt;

use alloy::primitives::{Address, B256, Bytes};

pub use addresses::Addresses;
pub use message::digest;
pub use message::{Attributes, Body, Retraction, SCHEMA_VERSION, event_id, retraction_id};
pub use signature::{Decoded, Recognised, Role, SignatureError, Signatures};

/// A stretch of blocks, both ends included, never empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockRange {
    from: u64,
    to: u64,
}

impl BlockRange {
    /// The blocks `from..=to`, or none when that is empty.
    pub fn new(from: u64, to: u64) -> Option<Self> {
        (from <= to).then_some(Self { from, to })
    }

    /// At most `count` blocks starting at `from`, not beyond `limit`.
    pub fn starting_at(from: u64, count: u64, limit: u64) -> Option<Self> {
        let to = from.saturating_add(count.checked_sub(1)?).min(limit);
        Self::new(from, to)
    }

    /// First block.
    pub fn from(&self) -> u64 {
        self.from
    }

    /// Last block.
    pub fn to(&self) -> u64 {
        self.to
    }

    /// How many blocks; a range over all of `u64` counts one too few.
    pub fn blocks(&self) -> u64 {
        (self.to - self.from).saturating_add(1)
    }

    /// Whether `number` lies in it.
    pub fn contains(&self, number: u64) -> bool {
        (self.from..=self.to).contains(&number)
    }

    /// The part from `from` on.
    pub fn tail(&self, from: u64) -> Option<Self> {
        Self::new(from.max(self.from), self.to)
    }
}

impl fmt::Display for BlockRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.from, self.to)
    }
}

/// One block of one fork.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockRef {
    /// Height.
    pub number: u64,
    /// Hash: tells forks of one height apart.
    pub hash: B256,
}

impl fmt::Display for BlockRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.number, self.hash)
    }
}

/// What the relayer needs of a block header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The block itself.
    pub block: BlockRef,
    /// Its parent's hash: what links one block to the one before.
    pub parent_hash: B256,
    /// Seconds since 1970.
    pub timestamp: u64,
}

/// One log as a node answered it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Log {
    /// The contract that emitted it.
    pub address: Address,
    /// `topics[0]` is the event's signature hash.
    pub topics: Vec<B256>,
    /// The arguments that are not indexed, ABI-encoded.
    pub data: Bytes,
    /// Where it stands.
    pub block: BlockRef,
    /// The transaction that emitted it.
    pub transaction_hash: B256,
    /// The transaction's place in its block.
    pub transaction_index: u64,
    /// The log's place in its block.
    pub log_index: u64,
    /// The block's time (seconds since 1970) where the node says it: geth from 1.16, reth, anvil.
    pub block_timestamp: Option<u64>,
}

/// One decoded event of the factory or of an escrow, ready to be stored.
#[derive(Clone, Debug)]
pub struct Event {
    /// The escrow it is about: whose lane it travels on.
    pub escrow: Address,
    /// The contract that emitted it: the escrow, or the factory.
    pub emitter: Address,
    /// The event's name, which consumers route on.
    pub name: String,
    /// Whether it announces the escrow.
    pub announces: bool,
    /// Whether it ends the escrow's life.
    pub ends: bool,
    /// Its block.
    pub block: BlockRef,
    /// The transaction's place in its block.
    pub transaction_index: u64,
    /// The log's place in its block.
    pub log_index: u64,
    /// The message, complete but for the sequence.
    pub body: Body,
    /// See [`digest`].
    pub digest: u64,
}

impl Event {
    /// Chain order, except that an announcement comes before the other logs of its own transaction:
    /// an escrow's constructor logs precede the `EscrowDeployed` that makes it known.
    pub fn order(&self) -> (u64, u64, bool, u64) {
        (self.block.number, self.transaction_index, !self.announces, self.log_index)
    }
}
