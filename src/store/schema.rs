//! Tables, their keys and the layout of their values.
//!
//! Keys are chosen so that writes are sequential. A value is one version byte followed by its bincode; the
//! configuration is byte-compatible with other encoders of the legacy layout, so there is a way out.

use alloy::primitives::{Address, B256};
use redb::TableDefinition;
use serde::{Deserialize, Serialize};

use super::StoreError;
use crate::event::{Attributes, event_id, retraction_id};

/// Address → [`Escrow`].
pub(super) const REGISTRY: TableDefinition<&[u8; 20], &[u8]> = TableDefinition::new("registry");
/// Position → a row of entries ([`log`](super::log)), append-only: outbox, memory for retraction, recent ledger.
pub(super) const EVENT_LOG: TableDefinition<u64, &[u8]> = TableDefinition::new("event_log");
/// Unfinal (and the newest final) accepted block → [`Remembered`].
pub(super) const BLOCKS: TableDefinition<u64, &[u8]> = TableDefinition::new("blocks");
/// First position → one past the last, of each run acknowledged above the watermark.
pub(super) const ACKNOWLEDGED: TableDefinition<u64, u64> = TableDefinition::new("acknowledged");
/// (block, log index) → [`Quarantined`].
pub(super) const QUARANTINE: TableDefinition<(u64, u64), &[u8]> = TableDefinition::new("quarantine");
/// Number → [`LateRead`], ascending in the order they were asked for.
pub(super) const LATE_READS: TableDefinition<u64, &[u8]> = TableDefinition::new("late_reads");
/// Block → log index and [`digest`](crate::event::digest) of each event that stands ([`standing`](super::standing)), also
/// when its entry was pruned; 0 where layout 2 had not kept it, or layout 3 had made it otherwise.
pub(super) const STANDING: TableDefinition<u64, &[u8]> = TableDefinition::new("standing");
/// First block → one past the last, of runs of blocks that were read while they could leave the chain, and not again since.
pub(super) const UNAUDITED: TableDefinition<u64, u64> = TableDefinition::new("unaudited");
/// Position → [`Refusal`], of the first message of each blocked lane.
pub(super) const BLOCKED: TableDefinition<u64, &[u8]> = TableDefinition::new("blocked");
/// Name → value: [`IDENTITY`] and [`PROGRESS`].
pub(super) const META: TableDefinition<&str, &[u8]> = TableDefinition::new("meta");

pub(super) const IDENTITY: &str = "identity";
pub(super) const PROGRESS: &str = "progress";
/// Name → number; the watermark has its own row because the publisher moves it while the scanner moves [`PROGRESS`].
pub(super) const MARKS: TableDefinition<&str, u64> = TableDefinition::new("marks");
/// Every entry below it is acknowledged.
pub(super) const WATERMARK: &str = "watermark";
/// The highest block of which an entry was pruned.
pub(super) const PRUNED_BLOCK: &str = "pruned_block";

/// The newest stretch of the log that was handed out escrow by escrow, from its first position to one past its last.
pub(super) const GROUP_START: &str = "group_start";
pub(super) const GROUP_END: &str = "group_end";
/// Where messages are ordered by escrow. 0: of what was handed to the sink in the order of the log nothing waits for its
/// acknowledgement. 1, or not there: that is not known.
pub(super) const IN_DOUBT: &str = "in_doubt";

/// If this store was made of a snapshot: the highest number there was of one then.
pub(super) const RESTORED_FROM: &str = "restored_from";

/// Before a signature: the block from which on its events count, if it was added and its history was not read.
pub(super) const COUNTS_FROM: &str = "counts from ";
/// The first block whose events all have digests.
pub(super) const DIGESTS_FROM: &str = "digests_from";

/// Version of this layout. 1 had no [`LATE_READS`] and no escrow that was [`EscrowState::Joining`]; 2 had no digests, no
/// [`UNAUDITED`], no escrow that was [`EscrowState::Archived`], and wider rows of escrows, which are still read; 3 had a row in
/// [`EVENT_LOG`] for each entry, which is still read, too, no [`BLOCKED`], and digests made otherwise; 4 had a row for each
/// digest; 5 had no [`IN_DOUBT`].
pub const SCHEMA: u32 = 6;
pub(super) const VALUE_VERSION: u8 = 1;
const COMPACT_VERSION: u8 = 2;
/// No value is larger: what a damaged length may make us allocate, in bytes.
const VALUE_LIMIT: usize = 256 << 20;

/// What a store was made for. Opened for anything else it is refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The chain.
    pub chain_id: u64,
    /// The factory.
    pub factory: Address,
    /// The events relayed, as sorted text.
    pub signatures: Vec<String>,
    /// Where messages go.
    pub sink: String,
    /// How they are ordered there.
    pub ordering: String,
}

/// The identity as stored.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Life {
    pub schema: u32,
    /// Microseconds since 1970 when this life of the store began; grows with every life.
    pub epoch: u64,
    pub identity: Identity,
}

/// Where reading stands.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Progress {
    /// The first block ever to read.
    pub start_block: u64,
    /// The last block accepted.
    pub cursor: Option<(u64, B256)>,
    /// The position of the next entry; never used twice.
    pub next_position: u64,
    /// The highest block known to be final.
    pub finalized: Option<u64>,
}

/// One escrow of the registry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Escrow {
    /// Height of the block that announced it, and the beginning of its hash: forks differ in it. Imported: of the first block
    /// that counts, and 0.
    pub announced: (u64, u64),
    /// Its logs have been read from this block on; the announcement may have been found later, in an earlier block.
    pub covered_from: u64,
    /// The sequence its last message carries; 0 before the first.
    pub last_sequence: u64,
    /// The block of the event that ended its life.
    pub ended: Option<u64>,
    /// Whether it is watched.
    pub state: EscrowState,
}

impl Escrow {
    /// Whether somebody registered it by hand, and no announcement did.
    pub fn is_imported(&self) -> bool {
        self.announced.1 == 0
    }

    /// What is kept of the hash of the block that announced it.
    pub(super) fn mark(hash: &B256) -> u64 {
        let [a, b, c, d, e, f, g, h, ..] = hash.0;
        match hash.is_zero() {
            true => 0,
            false => u64::from_be_bytes([a, b, c, d, e, f, g, h]).max(1),
        }
    }

    /// There may be millions of these, so small numbers are written small.
    pub(super) fn encode(&self) -> Result<Vec<u8>, StoreError> {
        let mut bytes = Vec::with_capacity(32);
        bytes.push(COMPACT_VERSION);
        encode_into(self, &mut bytes, compact())?;
        Ok(bytes)
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, StoreError> {
        if bytes.first() == Some(&COMPACT_VERSION) {
            return decode_rest("registry", &bytes[1..], compact());
        }
        let wide: WideEscrow = decode("registry", bytes)?;
        let WideEscrow { announced: (number, hash), covered_from, last_sequence, ended, state } = wide;
        Ok(Self { announced: (number, Self::mark(&hash)), covered_from, last_sequence, ended, state })
    }
}

/// An [`Escrow`] as layouts 1 and 2 wrote it.
#[derive(Serialize, Deserialize)]
pub(super) struct WideEscrow {
    pub announced: (u64, B256),
    pub covered_from: u64,
    pub last_sequence: u64,
    pub ended: Option<u64>,
    pub state: EscrowState,
}

/// Whether an escrow is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum EscrowState {
    /// Watched.
    Active,
    /// Its announcement left the chain; kept because its lane has a history to number on from.
    Withdrawn,
    /// Known late: a [`LateRead`] reads its history, and it is watched once that has reached the cursor.
    Joining {
        /// Which one.
        late_read: u64,
    },
    /// Its end is long final: it is not asked for. A log of its that is seen all the same makes it active again.
    Archived,
}

/// History to be read once more: for signatures that were not known when it was read, for escrows that became known
/// later, or both. What it finds is published as late.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LateRead {
    /// Which signatures, as in [`Identity::signatures`]; none if it is for escrows only.
    pub signatures: Vec<String>,
    /// The first block it has not read.
    pub next: u64,
    /// The last block in which `signatures` are looked for: later ones were read with them.
    pub to: u64,
}

/// An accepted block whose hash may still be needed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Remembered {
    pub hash: B256,
    /// Entries of later blocks stand at or after this position.
    pub log_end: u64,
}

/// What an entry of the event log is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// A log of the factory or of an escrow.
    Event,
    /// Withdraws the event at that position.
    Retraction {
        /// Position of the event withdrawn.
        of: u64,
    },
}

/// One message of the event log, complete: the bytes stored are the bytes sent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(bound(
    serialize = "N: Serialize, B: serde_bytes::Serialize",
    deserialize = "N: Deserialize<'de>, B: serde_bytes::Deserialize<'de>"
))]
pub struct Entry<N = String, B = Vec<u8>> {
    /// Event or retraction.
    pub kind: Kind,
    /// The original event's name, for a retraction too.
    pub name: N,
    /// Whether the event announces its escrow.
    pub announces: bool,
    /// Who emitted the log.
    pub emitter: Address,
    /// Whose lane it travels on.
    pub escrow: Address,
    /// The log's block.
    pub block_number: u64,
    /// The log's block, of which fork.
    pub block_hash: B256,
    /// The log's place in its block.
    pub log_index: u64,
    /// The message's place in its escrow's life.
    pub sequence: u64,
    /// The life of the store that numbered it.
    pub epoch: u64,
    /// Found after later ones of its escrow were published.
    pub late: bool,
    /// When it was stored, seconds since 1970.
    pub stored_at: u64,
    /// The message's body.
    #[serde(with = "serde_bytes")]
    pub body: B,
}

/// The entry that an event becomes, to be encoded: nothing of the event is copied.
pub(super) type NewEntry<'a> = Entry<&'a str, &'a [u8]>;

impl Entry {
    /// The id of the message this entry is.
    pub fn event_id(&self, chain_id: u64) -> String {
        let id = event_id(chain_id, &self.block_hash, self.log_index);
        match self.kind {
            Kind::Event => id,
            Kind::Retraction { .. } => retraction_id(&id, self.sequence),
        }
    }

    /// What travels beside the body.
    pub fn attributes(&self, chain_id: u64) -> Attributes {
        let event_type = match self.kind {
            Kind::Event => self.name.clone(),
            Kind::Retraction { .. } => "Retracted".to_owned(),
        };
        Attributes {
            event_type,
            chain_id,
            emitter: self.emitter,
            escrow: self.escrow,
            block_number: self.block_number,
            event_id: self.event_id(chain_id),
            sequence: self.sequence,
            epoch: self.epoch,
            late: self.late,
        }
    }
}

/// A log with a known topic that did not decode, whole, with the reason. It never enters a lane.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quarantined {
    /// Who emitted it.
    pub address: Address,
    /// Its topics.
    pub topics: Vec<B256>,
    /// Its data.
    #[serde(with = "serde_bytes")]
    pub data: Vec<u8>,
    /// Height and hash of its block.
    pub block: (u64, B256),
    /// Its transaction.
    pub transaction_hash: B256,
    /// Its place in the block.
    pub log_index: u64,
    /// Why it does not decode.
    pub reason: String,
}

/// Why a message is refused, and since when.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// The lane that waits for it.
    pub lane: String,
    /// What the sink said last.
    pub reason: String,
    /// When it was refused first, in seconds since 1970.
    pub since: u64,
}

fn config() -> impl bincode::config::Config {
    bincode::config::legacy().with_limit::<VALUE_LIMIT>()
}

pub(super) fn compact() -> impl bincode::config::Config {
    bincode::config::standard().with_limit::<VALUE_LIMIT>()
}

pub(super) fn encode_into<T: Serialize>(
    value: &T,
    bytes: &mut Vec<u8>,
    config: impl bincode::config::Config,
) -> Result<(), StoreError> {
    bincode::serde::encode_into_std_write(value, bytes, config)
        .map(drop)
        .map_err(|error| StoreError::Damaged { what: format!("a value cannot be encoded: {error}") })
}

pub(super) fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, StoreError> {
    // As much as most messages need.
    let mut bytes = Vec::with_capacity(2048);
    bytes.push(VALUE_VERSION);
    encode_into(value, &mut bytes, config())?;
    Ok(bytes)
}

pub(super) fn damaged(table: &str, what: String) -> StoreError {
    StoreError::Damaged { what: format!("table {table}: {what}") }
}

pub(super) fn decode<T: for<'de> Deserialize<'de>>(table: &str, bytes: &[u8]) -> Result<T, StoreError> {
    let (&version, rest) = bytes.split_first().ok_or_else(|| damaged(table, "an empty value".into()))?;
    if version != VALUE_VERSION {
        let what = format!("a value of version {version}, this program knows {VALUE_VERSION}");
        return Err(damaged(table, what));
    }
    decode_rest(table, rest, config())
}

pub(super) fn decode_rest<T: for<'de> Deserialize<'de>>(
    table: &str,
    rest: &[u8],
    config: impl bincode::config::Config,
) -> Result<T, StoreError> {
    let (value, used) = bincode::serde::decode_from_slice(rest, config)
        .map_err(|error| damaged(table, format!("a value does not decode: {error}")))?;
    // bincode accepts trailing bytes silently.
    if used != rest.len() {
        return Err(damaged(table, format!("a value has {} bytes too many", rest.len() - used)));
    }
    Ok(value)
}
