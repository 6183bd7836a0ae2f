//! The embedded store: registry, event log, cursor and watermark in one redb file.
//!
//! Constraints it keeps:
//!
//! 1. One fact, one transaction. What a stretch of blocks brings (escrows, events, cursor) is committed together;
//!    after a crash at any instant the file is the state before or after a whole commit.
//! 2. The event log is append-only and a position is never used twice. Entries below the watermark are
//!    acknowledged; above it the acknowledged ones are kept as runs.
//! 3. `sequence` grows by one per message of an escrow, without gaps, retractions included.
//! 4. An entry is dropped instead of retracted only if no publisher can have seen it: it was never claimed,
//!    or taken into a group, in this process and did not exist when the file was opened.
//! 5. A commit whose outcome is unknown (I/O error) is a fault of the process: restart reads what is true.

mod audit;
mod claims;
mod copy;
mod fork;
mod lanes;
mod late;
mod log;
mod look;
mod mount;
mod opening;
mod outbox;
mod prune;
mod registry;
mod runs;
mod schema;
mod standing;
mod status;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, RwLock, RwLockReadGuard};

use alloy::primitives::Address;
use alloy::primitives::map::AddressMap;
use redb::{Database, ReadableDatabase, ReadableTable, StorageBackend, WriteTransaction};
use thiserror::Error;
use tokio::sync::watch;

pub use audit::{Comparison, Place};
pub use claims::Claimed;
#[cfg(test)]
pub(crate) use claims::Groups;
pub use copy::{Moment, Piece, Restored, restore};
pub use late::{Added, Imported, LateStretch};
pub use look::Page;
pub use opening::fits;
pub use outbox::{Blocked, LogId};
pub use registry::{CHUNK, Census, Registry};
pub use runs::Acknowledged;
pub use schema::{
    Entry, Escrow, EscrowState, Identity, Kind, LateRead, Quarantined, Refusal, SCHEMA as LAYOUT,
};

use crate::event::{BlockRef, Event};
use crate::telemetry::metrics;
use claims::Claims;
use fork::{Fate, doomed, forget_final, log_end, newest_final};
use lanes::{Entries, Lanes, Recent};
use opening::{begin_life, builder, compare, create, migrate, open_error, read_life};
use runs::{acknowledge, add_run, cut_runs, watermark};
use schema::{
    ACKNOWLEDGED, BLOCKS, EVENT_LOG, MARKS, META, PROGRESS, Progress, QUARANTINE, REGISTRY, Remembered,
    STANDING, UNAUDITED, decode, encode,
};
use standing::Standing;

/// What can go wrong with the store.
#[derive(Debug, Error)]
pub enum StoreError {
    /// Another process has the file.
    #[error("{path} is in use by another process: stop it first, or give this one another storage.path")]
    Locked {
        /// The file.
        path: PathBuf,
    },
    /// The file cannot be created or written.
    #[error("storage.path {path} cannot be opened for writing: {source}; {remedy}")]
    Unwritable {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
        /// What to do.
        remedy: String,
    },
    /// The file system cannot hold a store.
    #[error(
        "storage.path {path} cannot be used: {why}, where two relayers could write to one file and what was synced can be \
         lost. Set storage.path to a file on a local disk (on Cloud Run an in-memory or ephemeral disk volume), and \
         storage.snapshot_dir to a folder there"
    )]
    Unsuitable {
        /// The file.
        path: PathBuf,
        /// What the file system is.
        why: String,
    },
    /// The store was made for something else.
    #[error("storage.path {path} belongs to another relay:\n{differences}\n{remedy}")]
    OtherIdentity {
        /// The file.
        path: PathBuf,
        /// One line per difference, both sides named.
        differences: String,
        /// What to do.
        remedy: &'static str,
    },
    /// A new store needs to know where to begin.
    #[error(
        "chain.start_block is not set, and {path} is new: set it (START_BLOCK, chain.start_block in relayer.toml) to \
         the block that deployed the factory"
    )]
    NoStartBlock {
        /// The file.
        path: PathBuf,
    },
    /// The file is not a store, or not whole.
    #[error(
        "the store is damaged or not a relayer's: {what}; restore a snapshot, or move the file away to read the \
         chain again from chain.start_block (what was published will be published again)"
    )]
    Damaged {
        /// What was found.
        what: String,
    },
    /// A fork reaches below what the store remembers.
    #[error(
        "the chain forked below block {block}, which was final: nothing was changed; check that the RPC provider is \
         on the right chain. If the fork is real, move the store away and read again from chain.start_block"
    )]
    ForkBelowFinality {
        /// The newest block that cannot have left the chain.
        block: u64,
    },
    /// The disk. The outcome of the commit is unknown until the file is opened again.
    #[error("the store failed: {0}; free space or mend the disk, then start again: nothing is lost")]
    Io(String),
}

impl StoreError {
    /// Whether only a change of configuration can help.
    pub fn is_configuration(&self) -> bool {
        match self {
            Self::Unwritable { .. }
            | Self::Unsuitable { .. }
            | Self::OtherIdentity { .. }
            | Self::NoStartBlock { .. } => true,
            Self::Locked { .. } | Self::Damaged { .. } | Self::ForkBelowFinality { .. } | Self::Io(_) => {
                false
            }
        }
    }
}

macro_rules! io_error {
    ($($source:ty),*) => {$(
        impl From<$source> for StoreError {
            fn from(error: $source) -> Self {
                StoreError::Io(error.to_string())
            }
        }
    )*};
}
io_error!(redb::TransactionError, redb::TableError, redb::StorageError, redb::CommitError);

/// Escrows archived in one commit, at most.
const ARCHIVED_AT_ONCE: usize = 500;
/// So many events are worth a thread that appends them while another one does the rest.
const EVENTS_A_THREAD: usize = 500;

/// Blocks read and accepted: what one transaction stores.
#[derive(Debug, Default)]
pub struct Stretch {
    /// Escrows seen for the first time, with the block that announced each.
    pub announced: Vec<(Address, BlockRef)>,
    /// Events in the order of [`Event::order`].
    pub events: Vec<Event>,
    /// Logs that do not decode.
    pub quarantined: Vec<Quarantined>,
    /// Blocks whose hashes may be needed to find where a fork began, ascending; the last one is the new cursor.
    pub blocks: Vec<BlockRef>,
    /// The highest block known to be final: hashes below it are forgotten.
    pub finalized: Option<u64>,
    /// The first of the blocks, if they may still leave the chain: they are to be read again once they cannot.
    pub unfinal_from: Option<u64>,
    /// Escrows that ended in this block or before need not be asked for any more.
    pub archive_upto: Option<u64>,
    /// Many blocks behind these are known, and are read next.
    pub more: bool,
}

/// What a publisher waits on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Appended {
    /// The end of the event log.
    pub end: u64,
    /// Whether more is about to be appended: a catch-up is under way.
    pub more: bool,
}

/// What a retraction did.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Withdrawal {
    /// Messages withdrawn by a `Retracted`.
    pub retracted: usize,
    /// Entries dropped: no publisher had seen them.
    pub dropped: usize,
    /// Escrows taken out of the registry.
    pub escrows: usize,
}

/// A retraction was not made: it would have withdrawn so many messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooMany {
    /// How many.
    pub messages: u64,
}

/// The open store. All calls block on the disk: call them off the async threads.
#[derive(Debug)]
pub struct Store {
    db: Database,
    identity: Identity,
    epoch: u64,
    /// Held by whoever changes `progress`, from reading it to following the commit in memory.
    writer: Mutex<()>,
    progress: Mutex<Progress>,
    registry: RwLock<Registry>,
    /// Followed by whoever commits, under `writer`.
    recent: Mutex<Recent>,
    late_reads: Mutex<BTreeMap<u64, LateRead>>,
    claims: Mutex<Claims>,
    waiting: AtomicU64,
    appended: watch::Sender<Appended>,
}

impl Store {
    /// Opens the store at `path`, or makes it. `start_block` is needed the first time; `added` says what to do if the
    /// identity has signatures the store has not.
    pub fn open(
        path: &Path,
        identity: Identity,
        start_block: Option<u64>,
        added: Added,
    ) -> Result<Self, StoreError> {
        suits(path)?;
        unbroken(path, || {
            let db = match path.symlink_metadata() {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    create(path, &identity, start_block)?
                }
                // redb would begin anew in it.
                Ok(file) if file.is_file() && file.len() == 0 => {
                    return Err(StoreError::Damaged { what: format!("{} is empty", path.display()) });
                }
                Ok(_) | Err(_) => builder().create(path).map_err(|error| open_error(path, error))?,
            };
            Self::start(db, path, identity, start_block, added)
        })
    }

    /// A store that is forgotten when it is dropped.
    pub fn in_memory(identity: Identity, start_block: u64) -> Result<Self, StoreError> {
        let backend = redb::backends::InMemoryBackend::new();
        Self::open_backend(backend, identity, Some(start_block), Added::Leave)
    }

    /// The same on any backend: how tests crash it, count its syncs, or keep it in memory.
    pub fn open_backend(
        backend: impl StorageBackend,
        identity: Identity,
        start_block: Option<u64>,
        added: Added,
    ) -> Result<Self, StoreError> {
        let path = Path::new("(memory)");
        unbroken(path, || {
            let db = builder().create_with_backend(backend).map_err(|error| open_error(path, error))?;
            Self::start(db, path, identity, start_block, added)
        })
    }

    fn start(
        db: Database,
        path: &Path,
        identity: Identity,
        start_block: Option<u64>,
        added: Added,
    ) -> Result<Self, StoreError> {
        let (mut life, progress) = match read_life(&db.begin_read()?)? {
            Some(found) => found,
            None => begin_life(&db, path, &identity, start_block)?,
        };
        migrate(&db, &mut life)?;
        let new = compare(path, &life.identity, &identity)?;
        if !new.is_empty() && added != Added::Leave {
            late::add_signatures(&db, &mut life, &progress, &identity, new, added == Added::Read)?;
        }
        let late_reads = Mutex::new(late::load(&db)?);
        let read = db.begin_read()?;
        let registry = Registry::load(&read.open_table(REGISTRY)?)?;
        let claims = Claims::load(&read, progress.next_position)?;
        let mut acknowledged_above = 0;
        for run in read.open_table(ACKNOWLEDGED)?.iter()? {
            let (start, end) = run?;
            acknowledged_above += end.value() - start.value();
        }
        drop(read);
        let waiting = progress.next_position - claims.next - acknowledged_above;
        Ok(Self {
            db,
            identity: life.identity,
            epoch: life.epoch,
            late_reads,
            claims: Mutex::new(claims),
            appended: watch::Sender::new(Appended { end: progress.next_position, more: false }),
            writer: Mutex::new(()),
            progress: Mutex::new(progress),
            registry: RwLock::new(registry),
            recent: Mutex::default(),
            waiting: AtomicU64::new(waiting),
        })
    }

    /// What the store was made for.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Names this life of the store: microseconds since 1970 when it began.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The last block accepted.
    pub fn cursor(&self) -> Option<BlockRef> {
        lock(&self.progress).cursor.map(|(number, hash)| BlockRef { number, hash })
    }

    /// The first block not yet accepted.
    pub fn next_block(&self) -> u64 {
        let progress = lock(&self.progress);
        progress.cursor.map_or(progress.start_block, |(number, _)| number + 1)
    }

    /// The first block ever to read.
    pub fn start_block(&self) -> u64 {
        lock(&self.progress).start_block
    }

    /// The highest block known to be final.
    pub fn finalized(&self) -> Option<u64> {
        lock(&self.progress).finalized
    }

    /// The escrows.
    pub fn registry(&self) -> RwLockReadGuard<'_, Registry> {
        read(&self.registry)
    }

    /// How many entries there ever were.
    pub fn entries(&self) -> u64 {
        lock(&self.progress).next_position
    }

    /// How many entries are not acknowledged.
    pub fn waiting(&self) -> u64 {
        self.waiting.load(Ordering::Acquire)
    }

    /// Changes whenever entries were appended, or no more are expected: what an idle publisher waits on.
    pub fn appended(&self) -> watch::Receiver<Appended> {
        self.appended.subscribe()
    }

    /// Whether more is about to be appended than was so far.
    pub fn expect_more(&self, more: bool) {
        self.appended.send_if_modified(|appended| std::mem::replace(&mut appended.more, more) && !more);
    }

    /// Accepted blocks whose hashes are known, newest first.
    pub fn remembered(&self) -> Result<Vec<BlockRef>, StoreError> {
        let read = self.db.begin_read()?;
        let mut blocks = Vec::new();
        for row in read.open_table(BLOCKS)?.iter()?.rev() {
            let (number, value) = row?;
            let remembered: Remembered = decode("blocks", value.value())?;
            blocks.push(BlockRef { number: number.value(), hash: remembered.hash });
        }
        Ok(blocks)
    }

    /// Logs that did not decode.
    pub fn quarantined(&self) -> Result<Vec<Quarantined>, StoreError> {
        let read = self.db.begin_read()?;
        let mut all = Vec::new();
        for row in read.open_table(QUARANTINE)?.iter()? {
            all.push(decode("quarantine", row?.1.value())?);
        }
        Ok(all)
    }

    /// Accepts blocks: registry, event log and cursor move together, or not at all.
    pub fn accept(&self, stretch: &Stretch) -> Result<(), StoreError> {
        let Some(cursor) = stretch.blocks.last() else {
            return Ok(());
        };
        let _writing = lock(&self.writer);
        let mut progress = lock(&self.progress).clone();
        let ended = stretch.archive_upto.map(|last| self.registry().ended_upto(last, ARCHIVED_AT_ONCE));
        let ended = ended.unwrap_or_default();
        let transaction = self.db.begin_write()?;
        let changed = {
            let mut lanes = Lanes::open(self, &transaction)?;
            for (escrow, block) in &stretch.announced {
                lanes.discover(*escrow, *block)?;
            }
            // Before its events: one that goes on here comes back.
            for (block, escrow) in &ended {
                lanes.archive(*escrow, *block)?;
            }
            let number = |event| lanes.number(event);
            let sequences = stretch.events.iter().map(number).collect::<Result<Vec<u64>, _>>()?;
            let first = progress.next_position;
            progress.next_position += sequences.len() as u64;
            progress.cursor = Some((cursor.number, cursor.hash));
            // What the node says of blocks to come is not worth keeping.
            progress.finalized =
                progress.finalized.max(stretch.finalized.map(|block| block.min(cursor.number)));
            let entries = lanes.entries();
            let (appended, changed) = both(
                sequences.len() >= EVENTS_A_THREAD,
                || append(&transaction, first, &stretch.events, &sequences, entries),
                || {
                    note(&transaction, stretch, first, &progress)?;
                    lanes.close()
                },
            );
            appended?;
            changed?
        };
        transaction.commit()?;
        if !ended.is_empty() {
            self.registry.write().expect("a registry writer panicked").forget_ended(&ended);
        }
        // A publisher may leave what was appended until more comes: that it is to come it hears first, that it is not last.
        if stretch.more {
            self.expect_more(true);
        }
        self.moved(progress, changed, 0);
        if !stretch.more {
            self.expect_more(false);
        }
        Ok(())
    }

    /// Nobody has still to catch up with escrows that came to be watched: see [`Registry::arrived_after`].
    pub fn forget_arrivals(&self) {
        self.registry.write().expect("a registry writer panicked").forget_arrivals();
    }

    /// Moves the cursor back to `ancestor`, the newest accepted block still on the chain (`None`: none is), and
    /// withdraws what came after it: newest first, on the same lanes. Changes nothing if that were more than `at_most`
    /// messages.
    pub fn retract(
        &self,
        ancestor: Option<BlockRef>,
        at_most: u64,
    ) -> Result<Result<Withdrawal, TooMany>, StoreError> {
        // Held throughout: a publisher must not claim what is being dropped.
        let claims = lock(&self.claims);
        let _writing = lock(&self.writer);
        let mut progress = lock(&self.progress).clone();
        // What a late read found before the store's first block is no concern of a fork that the store can see.
        let above = ancestor.map_or(progress.start_block, |block| block.number + 1);
        let transaction = self.db.begin_write()?;
        let mut withdrawal = Withdrawal::default();
        let changed = {
            let mut blocks = transaction.open_table(BLOCKS)?;
            if let Some(block) = newest_final(&blocks, progress.finalized)?
                && above <= block
            {
                return Err(StoreError::ForkBelowFinality { block });
            }
            let log_end = log_end(&blocks, ancestor)?;
            let mut lanes = Lanes::open(self, &transaction)?;
            let mut log = transaction.open_table(EVENT_LOG)?;
            let doomed = doomed(&log, log_end, above, claims.seen_below.max(claims.next))?;
            let messages = doomed.iter().filter(|(_, _, fate)| *fate == Fate::Retract).count() as u64;
            if messages > at_most {
                return Ok(Err(TooMany { messages }));
            }
            let mut dropped = Vec::new();
            let mut appended = log::Appender::new(&mut log, progress.next_position);
            let mut standing = transaction.open_table(STANDING)?;
            let mut standing = Standing::of(&mut standing);
            for (position, entry, fate) in doomed {
                standing.remove((entry.block_number, entry.log_index))?;
                if entry.announces && lanes.withdraw(entry.escrow, entry.block_hash)? {
                    withdrawal.escrows += 1;
                }
                lanes.reopen(entry.escrow, above)?;
                match fate {
                    Fate::Drop => {
                        lanes.take_back(&entry)?;
                        dropped.push(position);
                    }
                    Fate::Retract => {
                        appended.append(&lanes.retraction(position, &entry, self.identity.chain_id)?)?;
                        withdrawal.retracted += 1;
                    }
                }
            }
            progress.next_position = appended.finish()?;
            standing.finish()?;
            log::remove(&mut log, &mut dropped)?;
            withdrawal.dropped = dropped.len();
            acknowledge(&transaction, &mut dropped)?;
            blocks.retain_in(above.., |_, _| false)?;
            transaction.open_table(QUARANTINE)?.retain_in((above, 0).., |_, _| false)?;
            cut_runs(&mut transaction.open_table(UNAUDITED)?, above)?;
            let uncovered = self.registry().uncovered().map(|(escrow, _)| escrow).collect();
            late::go_back(&transaction, &mut lanes, uncovered, above)?;
            progress.cursor = ancestor.map(|block| (block.number, block.hash));
            write_progress(&transaction, &progress)?;
            lanes.close()?
        };
        transaction.commit()?;
        *lock(&self.late_reads) = late::load(&self.db)?;
        self.moved(progress, changed, withdrawal.dropped as u64);
        Ok(Ok(withdrawal))
    }

    /// Follows a commit in memory. `gone`: entries that no longer wait.
    fn moved(&self, progress: Progress, changed: AddressMap<Option<Escrow>>, gone: u64) {
        lock(&self.recent).follow(&changed);
        let mut registry = self.registry.write().expect("a registry writer panicked");
        for (address, escrow) in changed {
            registry.set(address, escrow.as_ref());
        }
        drop(registry);
        let end = progress.next_position;
        let mut current = lock(&self.progress);
        self.waiting.fetch_add(end - current.next_position, Ordering::AcqRel);
        self.waiting.fetch_sub(gone, Ordering::AcqRel);
        *current = progress;
        let cursor = current.cursor.map(|(number, _)| number);
        drop(current);
        self.measure(cursor);
        self.appended.send_if_modified(|appended| std::mem::replace(&mut appended.end, end) != end);
    }

    fn measure(&self, cursor: Option<u64>) {
        metrics::stored(cursor, self.registry().len(), self.waiting());
    }

    /// Records that the sink acknowledged these entries. The watermark follows where they close the gap to it.
    pub fn acknowledge(&self, positions: Vec<u64>) -> Result<(), StoreError> {
        self.settle(positions, &[])
    }

    /// Every entry below it is acknowledged.
    pub fn watermark(&self) -> Result<u64, StoreError> {
        let read = self.db.begin_read()?;
        watermark(&read.open_table(MARKS)?)
    }

    /// How many entries the log holds.
    pub fn log_len(&self) -> Result<u64, StoreError> {
        log::len(&self.db.begin_read()?.open_table(EVENT_LOG)?)
    }
}

/// Whether a store can live at `path`: not on every file system.
pub fn suits(path: &Path) -> Result<(), StoreError> {
    match mount::unsuitable(path) {
        Some(why) => Err(StoreError::Unsuitable { path: path.to_owned(), why }),
        None => Ok(()),
    }
}

/// Runs a store operation off the async threads, from now on: it waits for the disk.
pub(crate) fn on_disk<T, W>(
    store: &Arc<Store>,
    work: W,
) -> impl Future<Output = Result<T, StoreError>> + use<T, W>
where
    T: Send + 'static,
    W: FnOnce(&Store) -> Result<T, StoreError> + Send + 'static,
{
    let store = Arc::clone(store);
    on_thread(move || work(&store))
}

/// Does what takes a while on a thread that nobody waits for the network on, from now on. A panic there goes on in whoever
/// waits for it.
pub(crate) fn on_thread<T, W>(work: W) -> impl Future<Output = T> + use<T, W>
where
    T: Send + 'static,
    W: FnOnce() -> T + Send + 'static,
{
    let working = tokio::task::spawn_blocking(work);
    async {
        match working.await {
            Ok(result) => result,
            Err(error) => match error.try_into_panic() {
                Ok(panicked) => std::panic::resume_unwind(panicked),
                // The process ends: whoever waits ends with it.
                Err(_) => std::future::pending().await,
            },
        }
    }
}

/// redb panics over pages that make no sense: when a file is opened, that is damage to report.
fn unbroken<T>(path: &Path, open: impl FnOnce() -> Result<T, StoreError>) -> Result<T, StoreError> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(open)).unwrap_or_else(|panicked| {
        let why = panicked.downcast_ref::<String>().map_or("it cannot be read", String::as_str);
        Err(StoreError::Damaged { what: format!("{}: {why}", path.display()) })
    })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("a store operation panicked")
}

fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().expect("a registry writer panicked")
}

/// Does both, at once if they are `many` things to do.
fn both<T: Send, U>(many: bool, one: impl FnOnce() -> T + Send, other: impl FnOnce() -> U) -> (T, U) {
    if !many {
        return (one(), other());
    }
    std::thread::scope(|scope| {
        let one = scope.spawn(one);
        let other = other();
        (one.join().unwrap_or_else(|panicked| std::panic::resume_unwind(panicked)), other)
    })
}

/// Appends the messages of events to the log, the `first` one at that position.
fn append(
    transaction: &WriteTransaction,
    first: u64,
    events: &[Event],
    sequences: &[u64],
    mut entries: Entries,
) -> Result<(), StoreError> {
    let mut log = transaction.open_table(EVENT_LOG)?;
    let mut log = log::Appender::new(&mut log, first);
    for (event, sequence) in events.iter().zip(sequences) {
        log.append(&entries.entry(event, *sequence, false))?;
    }
    assert_eq!(log.finish()?, first + events.len() as u64, "a position for each event");
    Ok(())
}

/// Notes what blocks bring besides messages and escrows. The `first` of their events is at that position.
fn note(
    transaction: &WriteTransaction,
    stretch: &Stretch,
    first: u64,
    progress: &Progress,
) -> Result<(), StoreError> {
    let mut standing = transaction.open_table(STANDING)?;
    let mut standing = Standing::of(&mut standing);
    for event in &stretch.events {
        standing.put((event.block.number, event.log_index), event.digest)?;
    }
    standing.finish()?;
    let mut blocks = transaction.open_table(BLOCKS)?;
    for block in &stretch.blocks {
        let upto = stretch.events.partition_point(|event| event.block.number <= block.number);
        let remembered = Remembered { hash: block.hash, log_end: first + upto as u64 };
        blocks.insert(block.number, encode(&remembered)?.as_slice())?;
    }
    let cursor = stretch.blocks.last().map_or(0, |block| block.number);
    assert!(
        stretch.events.last().is_none_or(|event| event.block.number <= cursor),
        "an event beyond the cursor"
    );
    forget_final(&mut blocks, progress.finalized)?;
    quarantine(transaction, &stretch.quarantined)?;
    if let Some(from) = stretch.unfinal_from {
        add_run(&mut transaction.open_table(UNAUDITED)?, from, cursor + 1)?;
    }
    write_progress(transaction, progress)
}

fn write_progress(transaction: &WriteTransaction, progress: &Progress) -> Result<(), StoreError> {
    transaction.open_table(META)?.insert(PROGRESS, encode(progress)?.as_slice())?;
    Ok(())
}

fn quarantine(transaction: &WriteTransaction, logs: &[Quarantined]) -> Result<(), StoreError> {
    let mut table = transaction.open_table(QUARANTINE)?;
    for log in logs {
        table.insert((log.block.0, log.log_index), encode(log)?.as_slice())?;
    }
    Ok(())
}
