//! The operator's commands beside a running relayer: a Unix socket next to the store, one request on each connection.
//!
//! Constraints it keeps:
//!
//! 1. Whoever has the store's lock answers, and nobody else: the relayer that runs, also if it only stands by, else the
//!    command itself, on the file.
//!    A command tries for the lock first. If it gets it, no relayer runs and none can begin meanwhile; if not, somebody
//!    has it who opens the socket, or ends. So no moment remains in which both work, or a command works beside nobody.
//! 2. Both ways are one code: a [`Desk`] answers a [`Request`] with [`Answer`]s, through a channel or through a socket.
//! 3. Only the user who runs the relayer can connect: the socket gets its name when its mode is set already.
//! 4. Answers are written as they come, and made as they are read: neither side holds more than a page. Nothing in the
//!    store is held open meanwhile.
//! 5. Where instances share a folder of snapshots, only who holds the lease publishes from a store, or changes it: a
//!    command on the file takes the lease for that, and one that stands by refuses it.
//! 6. Whoever connects and says nothing, or something else, costs one connection for a few seconds.
//!
//! A request is one line of JSON, `{"version": 1, "request": …}`; the answers are lines `{"row": …}`, `{"note": "…"}`,
//! `"waiting"` (somebody is still there), and at the end `"end"` or `{"error": {…}}`. The error's layout is that of all
//! versions, so that an older or newer client can read why it is refused.

mod client;
mod desk;
mod discover;
mod outbox;
mod replay;
mod rows;
mod server;
mod socket;
mod verify;

use alloy::primitives::Address;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use tokio::sync::mpsc;

pub use client::{Answers, ask};
pub use desk::Desk;
pub use rows::{
    BlockedRow, Discarded, EscrowRow, FindingRow, FoundRow, Imported, MessageRow, OutboxRow, QuarantinedRow,
    RegistryRow, ReplayRow, RetryRow, Shown, SnapshotRow, Totals, VerifyRow,
};
pub use server::{Serving, serve};
pub use socket::{connect, socket_path};

use crate::store::StoreError;

/// Of the protocol.
pub const VERSION: u32 = 1;
/// Answers that may wait for whoever reads them.
const ANSWERS: usize = 16;
/// Rows of the store looked at in one go.
const PAGE: usize = 1000;

/// What can be asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// What the relayer does right now: one [`Status`](crate::status::Status).
    Status,
    /// Every escrow: [`RegistryRow`]s.
    Escrows,
    /// Registers escrows: one [`Imported`].
    Import {
        /// Which; at most [`IMPORTED_AT_ONCE`](crate::control::IMPORTED_AT_ONCE).
        escrows: Vec<Address>,
        /// The first block that counts.
        from: u64,
    },
    /// Escrows that the factory announced on the chain: [`FoundRow`]s.
    Discover {
        /// The first block; default: the first one ever to read.
        from: Option<u64>,
        /// The last; default: the last one that may be read now.
        to: Option<u64>,
    },
    /// What did not get out: [`OutboxRow`]s.
    Outbox {
        /// At most so many of each kind.
        limit: usize,
    },
    /// Messages that are blocked and logs that are quarantined, whole: [`Shown`].
    Show {
        /// Which.
        event_ids: Vec<String>,
    },
    /// Gives these up: [`Discarded`].
    Discard {
        /// Which.
        event_ids: Vec<String>,
    },
    /// Tries again: [`RetryRow`]s.
    Retry {
        /// Lanes and event ids; all if there is none.
        which: Vec<String>,
    },
    /// Publishes again: [`ReplayRow`]s.
    Replay {
        /// The first block.
        from: u64,
        /// The last.
        to: u64,
        /// Of this escrow alone.
        escrow: Option<Address>,
    },
    /// Makes a snapshot: one [`SnapshotRow`].
    Snapshot,
    /// Compares the chain with what was relayed: [`VerifyRow`]s.
    Verify {
        /// The first block.
        from: u64,
        /// The last.
        to: u64,
    },
}

impl Request {
    /// Whether it publishes something, or changes what is stored.
    pub fn changes(&self) -> bool {
        match self {
            Self::Import { .. }
            | Self::Discard { .. }
            | Self::Retry { .. }
            | Self::Replay { .. }
            | Self::Snapshot => true,
            Self::Status
            | Self::Escrows
            | Self::Discover { .. }
            | Self::Outbox { .. }
            | Self::Show { .. }
            | Self::Verify { .. } => false,
        }
    }
}

/// Escrows in one [`Request::Import`]: what fits into a line.
pub const IMPORTED_AT_ONCE: usize = 50_000;

/// One line of an answer.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// Data: what the request says.
    Row(Box<RawValue>),
    /// For people.
    Note(String),
    /// It goes on.
    Waiting,
    /// That was all.
    End,
    /// That was all, and not all that was asked for.
    Error(Refusal),
}

/// Why a request is not answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// Whether asking otherwise would help, or setting something: exit code 2, else 1.
    pub usage: bool,
    /// For people.
    pub message: String,
}

impl Refusal {
    /// Asking otherwise would help.
    pub fn usage(message: impl Into<String>) -> Self {
        Self { usage: true, message: message.into() }
    }

    /// Another try may help.
    pub fn fault(message: impl Into<String>) -> Self {
        Self { usage: false, message: message.into() }
    }

    /// Nobody reads the answers any more.
    fn gone() -> Self {
        Self::fault("whoever asked has gone")
    }
}

impl From<StoreError> for Refusal {
    fn from(error: StoreError) -> Self {
        Self { usage: error.is_configuration(), message: error.to_string() }
    }
}

/// Where answers go.
struct Replies(mpsc::Sender<Answer>);

impl Replies {
    async fn row<T: Serialize>(&self, row: &T) -> Result<(), Refusal> {
        let row = serde_json::value::to_raw_value(row)
            .map_err(|error| Refusal::fault(format!("a row cannot be encoded: {error}")))?;
        self.send(Answer::Row(row)).await
    }

    async fn note(&self, text: impl Into<String>) -> Result<(), Refusal> {
        self.send(Answer::Note(text.into())).await
    }

    async fn send(&self, answer: Answer) -> Result<(), Refusal> {
        self.0.send(answer).await.map_err(|_| Refusal::gone())
    }
}

/// Notes on long work, one now and then.
struct Progress {
    next: tokio::time::Instant,
}

impl Progress {
    const EVERY: std::time::Duration = std::time::Duration::from_secs(5);

    fn new() -> Self {
        Self { next: tokio::time::Instant::now() + Self::EVERY }
    }

    /// Whoever has gone meanwhile is noticed by this.
    async fn tell(&mut self, to: &Replies, text: impl FnOnce() -> String) -> Result<(), Refusal> {
        if tokio::time::Instant::now() < self.next {
            return to.send(Answer::Waiting).await;
        }
        self.next = tokio::time::Instant::now() + Self::EVERY;
        to.note(text()).await
    }
}
