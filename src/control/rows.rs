//! The rows of the answers, as they travel and as `--json` prints them. Names may be added, never changed.

use alloy::primitives::{Address, B256, Bytes};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::snapshot::Listed;
use crate::store::{Escrow, EscrowState};

/// An answer to [`Request::Escrows`](super::Request::Escrows).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RegistryRow {
    /// One of them.
    Escrow(EscrowRow),
    /// After the last.
    Store {
        /// The first block not yet accepted.
        next_block: u64,
        /// Whether history is still to be read once more.
        reads_late: bool,
    },
}

/// An escrow of the registry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EscrowRow {
    /// Its address.
    pub address: String,
    /// `active`, `joining`, `archived` or `withdrawn`.
    pub state: String,
    /// The block that announced it; imported: the first that counts.
    pub announced_block: u64,
    /// Its logs have been read from here on.
    pub covered_from: u64,
    /// How many it has so far.
    pub messages: u64,
    /// The block that ended it.
    pub ended_block: Option<u64>,
}

impl EscrowRow {
    pub(super) fn new(address: Address, escrow: &Escrow) -> Self {
        Self {
            address: format!("{address:#x}"),
            state: state(escrow).to_owned(),
            announced_block: escrow.announced.0,
            covered_from: escrow.covered_from,
            messages: escrow.last_sequence,
            ended_block: escrow.ended,
        }
    }
}

pub(super) fn state(escrow: &Escrow) -> &'static str {
    match escrow.state {
        EscrowState::Active => "active",
        EscrowState::Withdrawn => "withdrawn",
        EscrowState::Joining { .. } => "joining",
        EscrowState::Archived => "archived",
    }
}

/// What an import did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Imported {
    /// Escrows that were not registered before.
    pub new: usize,
    /// Escrows that were.
    pub known: usize,
    /// The first block not yet accepted.
    pub next_block: u64,
    /// Whether a relayer is there to read their past now.
    pub running: bool,
}

/// An answer to [`Request::Discover`](super::Request::Discover).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FoundRow {
    /// An announcement.
    Escrow {
        /// The escrow announced.
        address: String,
        /// Where.
        block: u64,
        /// Which log of the block.
        log_index: u64,
        /// As in the registry; `None`: it is not in it.
        state: Option<String>,
    },
    /// After the last: the blocks that were read.
    Read {
        /// The first.
        from: u64,
        /// The last.
        to: u64,
    },
}

/// An answer to [`Request::Outbox`](super::Request::Outbox): totals first, then the oldest of each.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OutboxRow {
    /// How many there are.
    Totals(Totals),
    /// A message that waits.
    Waiting(MessageRow),
    /// A message that is refused, and its lane with it.
    Blocked(BlockedRow),
    /// A log that does not decode.
    Quarantined(QuarantinedRow),
}

/// How many did not get out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Messages that are not acknowledged, blocked ones included.
    pub waiting: u64,
    /// Lanes whose first message is refused.
    pub blocked: u64,
    /// Logs that do not decode.
    pub quarantined: u64,
}

/// A message of the event log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MessageRow {
    /// Its id.
    pub event_id: String,
    /// What consumers route on.
    pub event_type: String,
    /// Whose life it is about.
    pub escrow: String,
    /// Its place in that.
    pub sequence: u64,
    /// The log's block.
    pub block: u64,
    /// When it was stored, in seconds since 1970.
    pub stored_at: u64,
    /// On the wire, in bytes.
    pub size: usize,
}

/// A message that is refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockedRow {
    /// The lane that waits for it.
    pub lane: String,
    /// What the sink said last.
    pub reason: String,
    /// Since when, in seconds since 1970.
    pub since: u64,
    /// Which it is.
    #[serde(flatten)]
    pub message: MessageRow,
}

/// A log that does not decode.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuarantinedRow {
    /// Which log it is.
    pub event_id: String,
    /// Who emitted it.
    pub contract: String,
    /// The event's signature hash.
    pub topic0: Option<B256>,
    /// Its block.
    pub block: u64,
    /// Its place there.
    pub log_index: u64,
    /// Why it does not decode.
    pub reason: String,
}

/// A blocked message or a quarantined log, whole.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Shown {
    /// A message.
    Message {
        /// Its id.
        event_id: String,
        /// The lane that waits for it.
        lane: String,
        /// Why it is refused.
        reason: String,
        /// As it would be sent.
        ordering_key: String,
        /// As they would be sent.
        attributes: std::collections::BTreeMap<String, String>,
        /// The body.
        data: Box<RawValue>,
    },
    /// A log.
    Log {
        /// Which log it is.
        event_id: String,
        /// Who emitted it.
        contract: Address,
        /// Its topics.
        topics: Vec<B256>,
        /// Its data.
        data: Bytes,
        /// Its block.
        block: u64,
        /// Of which fork.
        block_hash: B256,
        /// Its transaction.
        transaction_hash: B256,
        /// Its place in the block.
        log_index: u64,
        /// Why it does not decode.
        reason: String,
    },
}

/// An answer to [`Request::Discard`](super::Request::Discard).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Discarded {
    /// What was given up.
    pub event_id: String,
}

/// An answer to [`Request::Retry`](super::Request::Retry).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RetryRow {
    /// Refused messages that were offered again.
    Offered {
        /// How many.
        messages: usize,
        /// Whether a relayer is there that offers them now; else its next run does.
        running: bool,
    },
    /// A log that decodes by now, and is relayed as late.
    Relayed {
        /// Which.
        event_id: String,
    },
    /// A log that was left in the quarantine.
    Left {
        /// Which.
        event_id: String,
        /// Why.
        reason: String,
    },
}

/// An answer to [`Request::Replay`](super::Request::Replay).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReplayRow {
    /// A message that was not taken.
    Left {
        /// Which.
        event_id: String,
        /// Why.
        reason: String,
    },
    /// At the end.
    Published {
        /// How many were acknowledged once more.
        messages: u64,
    },
}

/// An answer to [`Request::Verify`](super::Request::Verify).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VerifyRow {
    /// A difference.
    Finding(FindingRow),
    /// An escrow that is announced there and not registered: all its events are missing.
    Unregistered {
        /// Which.
        escrow: String,
    },
    /// At the end.
    Verified {
        /// Blocks compared.
        blocks: u64,
        /// Events that were the same.
        events: u64,
        /// The last of the blocks that cannot change any more; `None`: all can.
        final_to: Option<u64>,
    },
}

/// A difference between the chain and what was relayed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FindingRow {
    /// `missing` (on the chain, not relayed), `extra` (relayed, not on the chain), `differs`, `undecodable` (a log that does
    /// not decode and is not quarantined), or `unkept` (relayed, and its message is lost from the store).
    pub difference: String,
    /// Its block.
    pub block: u64,
    /// Its place there.
    pub log_index: u64,
    /// The escrow, where it is still known.
    pub escrow: Option<String>,
    /// The event's name, where it is still known.
    pub event: Option<String>,
    /// Its id, where it is still known.
    pub event_id: Option<String>,
    /// Whether the block cannot leave the chain any more.
    #[serde(rename = "final")]
    pub is_final: bool,
}

/// A snapshot in `storage.snapshot_dir`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotRow {
    /// The file of its manifest.
    pub snapshot: String,
    /// When it was made, as RFC 3339 writes it.
    pub made_at: Option<String>,
    /// The block that is read next by who is restored from it.
    pub next_block: Option<u64>,
    /// How many messages there were.
    pub messages: Option<u64>,
    /// The bytes of its parts; snapshots share those that did not change.
    pub bytes: Option<u64>,
    /// Why it cannot be used, if it cannot.
    pub damaged: Option<String>,
}

impl From<&Listed> for SnapshotRow {
    fn from(Listed { file, manifest }: &Listed) -> Self {
        let (manifest, damaged) = (manifest.as_ref().ok(), manifest.as_ref().err().cloned());
        Self {
            snapshot: file.clone(),
            made_at: manifest.map(|it| it.made_at.clone()),
            next_block: manifest.and_then(|it| it.cursor).map(|(number, _)| number + 1),
            messages: manifest.map(|it| it.entries),
            bytes: manifest.map(|it| it.bytes()),
            damaged,
        }
    }
}
