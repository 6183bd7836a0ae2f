//! Turns the events of escrow contracts on an EVM chain into Google Pub/Sub messages: none lost, in order per escrow.
//!
//! # The way of an event
//!
//! ```text
//! chain ──rpc──▶ scan ──▶ event ──▶ store ─────▶ publish ──▶ pubsub
//!                plan      decode    registry      lanes       ack
//!                link      encode    event log                 │
//!                fork                cursor   ◀────────────────┘ watermark
//! ```
//!
//! [`scan`] decides what to read next and asks [`rpc`] for it, many calls in one round trip. [`event`] decodes and
//! encodes each log once. [`store`] commits registry, event log and cursor in one transaction. [`publish`] walks the
//! event log, one ordered lane per escrow, and hands it to [`pubsub`]; an entry is done when the sink acknowledged
//! it and the store committed that. `scan` and `publish` meet only in the store.
//!
//! # The promise
//!
//! Every event of a registered escrow in a block the relayer accepted is published at least once, and the first
//! occurrences of one escrow's messages are in chain order. Repeats happen only for messages handed to the sink whose
//! acknowledgement was not yet committed (at most `sink.max_outstanding`), as a contiguous run, with the same
//! `event_id` and the same bytes. A message is withdrawn (`Retracted`) exactly when its own block leaves the chain.

mod backoff;
pub mod check;
pub mod config;
pub mod control;
pub mod event;
pub mod http;
mod permit;
mod progress;
pub mod publish;
pub mod pubsub;
mod room;
pub mod rpc;
pub mod sample;
pub mod scan;
pub mod snapshot;
pub mod status;
pub mod store;
pub mod telemetry;
pub mod vitals;

use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::{info, warn};

use config::{Config, SinkKind};
use control::Desk;
use event::{Header, Signatures};
use publish::{PublishError, Publisher, Sink};
use pubsub::ConfiguredSink;
pub use room::NoRoom;
use room::Room;
use rpc::Rpc;
use scan::{Auditor, Patient, ScanError, Scanner, Until};
use snapshot::{Keeper, LeaseLost, SnapshotError, is_newest};
use status::Observer;
use store::{Added, Identity, Store, StoreError, on_disk, on_thread};
use telemetry::metrics;
use vitals::{Loop, Stage, Turning, Vitals};

/// What stopping may take for messages under way to be acknowledged: with the last commit it fits into 8 s.
const DRAIN: Duration = Duration::from_secs(6);
/// The same where a last snapshot has to be made, and when that must be done, in time to give up the lease.
const DRAIN_BEFORE_SNAPSHOT: Duration = Duration::from_secs(4);
const STOPPED_AFTER: Duration = Duration::from_secs(6);
/// How often is looked whether there is something to prune, and how many entries one commit removes.
const PRUNE_EVERY: Duration = Duration::from_secs(60);
const PRUNED_AT_ONCE: usize = 5_000;
/// How often is looked whether blocks have become final that are to be read again.
const AUDIT_EVERY: Duration = Duration::from_secs(5);
/// While new blocks keep coming without a pause, each so many steps one goes to what has to be read late.
const LATE_TURN: u64 = 8;

/// Why a relay did not start, or ended.
#[derive(Debug, Error)]
pub enum RelayError {
    /// The configured signatures do not make a set.
    #[error("the configured events cannot be used: {0}")]
    Signatures(#[from] event::SignatureError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The sink cannot be set up.
    #[error(transparent)]
    Sink(#[from] pubsub::SetupError),
    /// The HTTP client cannot be set up.
    #[error("the RPC client cannot be set up: {0}")]
    Rpc(#[from] reqwest::Error),
    /// Reading ended.
    #[error(transparent)]
    Scan(#[from] ScanError),
    /// Publishing ended.
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// There are snapshots, and the store cannot be made of them.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// Another instance relays, or may.
    #[error(transparent)]
    LeaseLost(#[from] LeaseLost),
    /// Blocked lanes leave no room to read to the end asked for.
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
}

impl RelayError {
    /// Whether only a change of configuration can help: a restart alone cannot.
    pub fn is_configuration(&self) -> bool {
        match self {
            Self::Signatures(_) | Self::Sink(_) | Self::Scan(ScanError::WrongChain(_)) => true,
            Self::Store(error)
            | Self::Scan(ScanError::Store(error))
            | Self::Publish(PublishError::Store(error)) => error.is_configuration(),
            Self::Snapshot(error) => error.is_configuration(),
            Self::Rpc(_) | Self::Publish(PublishError::Closed(_)) | Self::LeaseLost(_) | Self::NoRoom(_) => {
                false
            }
        }
    }
}

/// How a relay ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Everything up to the requested block is acknowledged.
    Complete,
    /// Asked to stop; what was under way is acknowledged, or will be sent again.
    Stopped,
    /// Everything is acknowledged but what these lanes hold: lane and reason.
    Blocked(Vec<(String, String)>),
}

/// A relay ready to run: configuration checked, store open.
pub struct Relay {
    config: Config,
    signatures: Arc<Signatures>,
    store: Arc<Store>,
    rpc: Arc<Rpc>,
    sink: Arc<ConfiguredSink>,
    observer: Arc<Observer>,
    keeper: Option<Keeper>,
}

impl Relay {
    /// Opens the store and sets up the clients. Calls no node yet. `added`: what to do about signatures that the store has not
    /// read the history for.
    ///
    /// With `storage.snapshot_dir` it stands by until it has the lease, and a store that is not there is made of the newest
    /// snapshot. `None`: `stop` came before.
    pub async fn open(
        config: Config,
        added: Added,
        stop: &CancellationToken,
    ) -> Result<Option<Self>, RelayError> {
        let observer = Arc::new(Observer::new(&config, Arc::default()));
        Self::open_observed(config, added, observer, stop).await
    }

    /// The same, with somebody who looks at it from before it is open.
    pub async fn open_observed(
        config: Config,
        added: Added,
        observer: Arc<Observer>,
        stop: &CancellationToken,
    ) -> Result<Option<Self>, RelayError> {
        let signatures = Arc::new(signatures(&config)?);
        let identity = identity(&config, &signatures);
        let rpc = Arc::new(Rpc::new(config.chain.id, &config.rpc)?);
        let standing_by = |store: &Arc<Store>| {
            let (signatures, store, rpc) = (Arc::clone(&signatures), Arc::clone(store), Arc::clone(&rpc));
            Desk::standing_by(config.clone(), signatures, store, rpc, Arc::clone(&observer))
        };
        let opened = open_store(&config, identity, added, observer.vitals(), standing_by, stop).await?;
        let Some((store, keeper)) = opened else {
            return Ok(None);
        };
        let sink = Arc::new(ConfiguredSink::open(&config.sink).await?);
        observer.opened(&store, &rpc);
        Ok(Some(Self { config, signatures, store, rpc, sink, observer, keeper }))
    }

    /// The store, to look at.
    pub fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// What it does, to look at.
    pub fn observer(&self) -> &Arc<Observer> {
        &self.observer
    }

    /// Relays until the end asked for, or until `stop`.
    pub async fn run(self, until: Until, stop: CancellationToken) -> Result<Ending, RelayError> {
        let escrows = self.store.registry().len();
        info!(escrows, "Loaded {escrows} escrows from checkpoint");
        info!(
            next_block = self.store.next_block(),
            waiting = self.store.waiting(),
            epoch = self.store.epoch(),
            sink = self.sink.name(),
            "Relaying from block {} on",
            self.store.next_block()
        );
        if let Some(asked) = self.config.chain.start_block.filter(|asked| *asked != self.store.start_block())
        {
            let began = self.store.start_block();
            warn!(
                asked,
                began,
                "chain.start_block is {asked}, but this store began at block {began} and goes on from there"
            );
        }
        if let Some((_, read)) = self.store.late_read() {
            info!(
                from = read.next,
                signatures = read.signatures.len(),
                "History has to be read once more, from block {} on: what it brings is published as late",
                read.next
            );
        }
        metrics::stored(self.store.cursor().map(|cursor| cursor.number), escrows, self.store.waiting());
        // Ends with the run, whatever it is at.
        let _sampling = AbortOnDropHandle::new(tokio::spawn(sample::watch(
            self.config.clone(),
            Arc::clone(&self.rpc),
            Arc::clone(&self.store),
            Arc::clone(&self.signatures),
        )));
        let _pruning = AbortOnDropHandle::new(tokio::spawn(prune(
            Arc::clone(&self.store),
            self.config.ledger.retention,
        )));
        let _following = AbortOnDropHandle::new(tokio::spawn(rpc::follow_heads(Arc::clone(&self.rpc))));
        let _watching = AbortOnDropHandle::new(tokio::spawn(rpc::watch(Arc::clone(&self.rpc))));
        let (chain, store, signatures) =
            (Arc::clone(&self.rpc), Arc::clone(&self.store), Arc::clone(&self.signatures));
        let vitals = Arc::clone(self.observer.vitals());
        let auditor = Auditor::new(chain, store, signatures, &self.config);
        let _auditing =
            auditor.map(|auditor| AbortOnDropHandle::new(tokio::spawn(audit(auditor.reporting_to(&vitals)))));
        let (orders, taken) = mpsc::channel(publish::ORDERS);
        let mut desk = Desk::beside(
            self.config.clone(),
            Arc::clone(&self.signatures),
            Arc::clone(&self.store),
            Arc::clone(&self.rpc),
            orders,
            Arc::clone(&self.observer),
        );
        if let Some(keeper) = &self.keeper {
            desk = desk.with_snapshots(keeper.snapshots());
        }
        // Gone before the store is closed: afterwards the socket may be another relayer's.
        let _serving = control::serve(&self.config.storage.path, desk);
        // Either side's end, good or bad, must reach the other.
        let stop = stop.child_token();
        let read = CancellationToken::new();
        let scanner = Scanner::new(
            Arc::new(Patient::new(Arc::clone(&self.rpc), Arc::clone(&vitals))),
            Arc::clone(&self.store),
            self.signatures,
            &self.config,
            until,
        )
        .reporting_to(&vitals);
        let telling = progress::tell(
            scanner.goal(),
            Arc::clone(&self.store),
            Arc::clone(&self.rpc),
            until != Until::Forever,
            self.config.sink.kind == SinkKind::Stdout,
        );
        let telling = AbortOnDropHandle::new(tokio::spawn(telling));
        let mut publisher = Publisher::new(self.sink, Arc::clone(&self.store), &self.config.sink)
            .reporting_to(&vitals)
            .taking(taken);
        if let Some(keeper) = &self.keeper {
            publisher = publisher.permitted_by(keeper.permit());
        }
        let max_waiting = self.config.ledger.max_waiting.get();
        let room = Room::new(&self.store, &vitals, max_waiting, until == Until::Forever);
        vitals.entered(Stage::Relaying);
        let scanning = tokio::spawn(scan_loop(
            scanner,
            vitals.begin(Loop::Scan),
            Arc::clone(&self.store),
            self.config.chain.poll_interval,
            room,
            stop.clone(),
            read.clone(),
        ));
        let drain = if self.keeper.is_some() { DRAIN_BEFORE_SNAPSHOT } else { DRAIN };
        let publishing =
            tokio::spawn(publish_loop(publisher, Arc::clone(&self.store), vitals, stop.clone(), read, drain));
        let relaying = async { tokio::join!(joined(scanning), joined(publishing)) };
        let (scanned, published) = match self.keeper {
            None => relaying.await,
            Some(keeper) => keep_while(relaying, keeper, &self.store, &stop).await?,
        };
        drop(telling);
        telemetry::end_progress_bar();
        scanned?;
        let ending = published?;
        info!(
            waiting = self.store.waiting(),
            "Stopped at block {}",
            self.store.next_block().saturating_sub(1)
        );
        Ok(ending)
    }
}

/// The events the configuration names.
pub fn signatures(config: &Config) -> Result<Signatures, event::SignatureError> {
    let (factory, escrow) = (&config.factory, &config.escrow);
    Signatures::new(&factory.events, &factory.child, &escrow.events, &escrow.terminal)
}

/// What a store of this configuration is made for.
pub fn identity(config: &Config, signatures: &Signatures) -> Identity {
    let ordering = match config.sink.ordering {
        config::Ordering::Escrow => "escrow".to_owned(),
        config::Ordering::Bucket(buckets) => format!("bucket:{buckets}"),
        config::Ordering::None => "none".to_owned(),
    };
    Identity {
        chain_id: config.chain.id,
        factory: config.factory.address,
        signatures: signatures.identity().to_vec(),
        sink: sink_identity(&config.sink),
        ordering,
    }
}

fn sink_identity(sink: &config::Sink) -> String {
    match &sink.kind {
        SinkKind::Pubsub { project, topic, .. } => format!("Pub/Sub {}", pubsub::topic_name(project, topic)),
        SinkKind::Stdout => "stdout".to_owned(),
        SinkKind::File { path } => format!("file {}", path.display()),
    }
}

async fn joined<T>(task: JoinHandle<T>) -> T {
    match task.await {
        Ok(result) => result,
        Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
    }
}

/// The store, and who keeps the lease and makes snapshots of it, if there is a folder for that. `None`: asked to stop while
/// standing by; who asks something of a store that is there is answered by `standing_by` meanwhile.
async fn open_store(
    config: &Config,
    identity: Identity,
    added: Added,
    vitals: &Vitals,
    standing_by: impl FnOnce(&Arc<Store>) -> Desk,
    stop: &CancellationToken,
) -> Result<Option<(Arc<Store>, Option<Keeper>)>, RelayError> {
    let (storage, start_block) = (&config.storage, config.chain.start_block);
    // Off the async threads: it may have to repair or to migrate.
    let open = async |identity| {
        let path = storage.path.clone();
        let opening = move || Store::open(&path, identity, start_block, added);
        on_thread(opening).await.map(Arc::new)
    };
    let Some(folder) = &storage.snapshot_dir else {
        return Ok(Some((open(identity).await?, None)));
    };
    if config.chain.horizon == config::Horizon::Latest {
        warn!(
            "With storage.snapshot_dir and chain.horizon = \"latest\": if the store is lost, what was published after the last \
             snapshot and has left the chain since is never withdrawn; with \"finalized\" there is no such thing"
        );
    }
    let path = &storage.path;
    let snapshots = snapshot::configured(storage).expect("there is a folder");
    // Whoever has the file has its name for the lease, too.
    let existing = if path.exists() { Some(open(identity.clone()).await?) } else { None };
    // Before it stands by: what another instance has gone on from is no standby. And after: one may have gone on meanwhile.
    if let Some(store) = &existing {
        tokio::select! {
            biased;
            () = stop.cancelled() => return Ok(None),
            newest = is_newest(Arc::clone(&snapshots), store, path) => newest?,
        }
    }
    let answering = existing.as_ref().and_then(|store| control::serve(path, standing_by(store)));
    let Some(mut keeper) = Keeper::begin(storage, folder, existing.is_some(), vitals, stop).await else {
        return Ok(None);
    };
    drop(answering);
    let opening = async {
        // It stays open here until the lease is given up: who opens it before would take the lease by its name.
        let store = match existing.clone() {
            Some(store) => store,
            None => {
                // Another instance on this machine may have made it meanwhile.
                if !path.exists() {
                    Keeper::restore(Arc::clone(&snapshots), path, &identity).await?;
                }
                open(identity).await?
            }
        };
        is_newest(snapshots, &store, path).await?;
        Ok::<Arc<Store>, RelayError>(store)
    };
    match keeper.during(opening, stop).await? {
        Some(Ok(store)) => {
            keeper.remember(path);
            Ok(Some((store, Some(keeper))))
        }
        Some(Err(error)) => {
            keeper.release().await;
            Err(error)
        }
        None => {
            keeper.release().await;
            Ok(None)
        }
    }
}

/// Keeps the lease while `relaying`, and makes the last snapshot after it.
async fn keep_while<T>(
    relaying: impl Future<Output = T>,
    mut keeper: Keeper,
    store: &Arc<Store>,
    stop: &CancellationToken,
) -> Result<T, RelayError> {
    let mut stopped = None;
    let ended = {
        let mut relaying = std::pin::pin!(relaying);
        let stopping = async {
            stop.cancelled().await;
            stopped = Some(Instant::now());
            std::future::pending::<()>().await;
        };
        tokio::select! {
            ended = &mut relaying => ended,
            () = stopping => unreachable!("it only notes when"),
            lost = keeper.tend(store, stop) => {
                stop.cancel();
                relaying.await;
                return Err(lost.into());
            }
        }
    };
    let deadline = stopped.unwrap_or_else(Instant::now) + STOPPED_AFTER;
    keeper.end(store, deadline).await;
    Ok(ended)
}

/// Steps the scanner until it is done (`read` tells) or `stop`.
async fn scan_loop(
    mut scanner: Scanner<Patient<Rpc>>,
    turning: Turning,
    store: Arc<Store>,
    poll_interval: Duration,
    room: Room,
    stop: CancellationToken,
    read: CancellationToken,
) -> Result<(), RelayError> {
    let scanned = async {
        let mut busy = 0;
        loop {
            turning.turned();
            let pause = match scanner.step().await? {
                scan::Step::Progress => {
                    wait_for_room(&scanner, &turning, &store, &room).await?;
                    busy += 1;
                    if busy % LATE_TURN != 0 {
                        continue;
                    }
                    Duration::ZERO
                }
                scan::Step::Idle => poll_interval,
                scan::Step::Wait(pause) => {
                    turning.while_waiting(tokio::time::sleep(pause)).await;
                    continue;
                }
                scan::Step::Done => break,
            };
            let deadline = Some(Instant::now() + pause);
            // As the scanner has seen them: a head that it took note of on its way is not worth another step, which would
            // poll.
            let mut heads = scanner.heads();
            read_late(&mut scanner, &turning, &store, &room, deadline, &mut heads).await?;
        }
        read_late(&mut scanner, &turning, &store, &room, None, &mut None).await
    };
    let result = tokio::select! {
        biased;
        () = stop.cancelled() => return Ok(()),
        result = scanned => result,
    };
    match result {
        Ok(()) => read.cancel(),
        Err(_) => stop.cancel(),
    }
    result
}

/// Waits for room for what is read next; a job that has read all there is needs none.
async fn wait_for_room(
    scanner: &Scanner<Patient<Rpc>>,
    turning: &Turning,
    store: &Store,
    room: &Room,
) -> Result<(), NoRoom> {
    match scanner.has_read_all() && store.late_read().is_none() {
        true => Ok(()),
        false => turning.while_waiting(room.wait()).await,
    }
}

type Heads = Option<watch::Receiver<Option<Header>>>;

/// Sleeps until `deadline`, or until a head is announced: whether one was.
async fn sleep_until(deadline: Instant, heads: &mut Heads) -> bool {
    let announced = async {
        match heads {
            // Its sender lives as long as the scanner's chain.
            Some(heads) => drop(heads.changed().await),
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        () = tokio::time::sleep_until(deadline) => false,
        () = announced => true,
    }
}

/// Reads late what has to be read late: one step at least, until `deadline` or an announced head; or to its end. Then
/// sleeps until `deadline`, or until a head is announced.
async fn read_late(
    scanner: &mut Scanner<Patient<Rpc>>,
    turning: &Turning,
    store: &Store,
    room: &Room,
    deadline: Option<Instant>,
    heads: &mut Heads,
) -> Result<(), RelayError> {
    loop {
        let pause = match scanner.step_late().await? {
            scan::Step::Progress => {
                wait_for_room(scanner, turning, store, room).await?;
                Duration::ZERO
            }
            scan::Step::Wait(pause) => pause,
            scan::Step::Idle | scan::Step::Done => break,
        };
        let next = Instant::now() + pause;
        let end = deadline.map_or(next, |deadline| deadline.min(next));
        let announced = turning.while_waiting(sleep_until(end, heads)).await;
        if announced || deadline.is_some_and(|deadline| deadline <= next) {
            return Ok(());
        }
    }
    match deadline {
        Some(deadline) => {
            turning.while_waiting(sleep_until(deadline, heads)).await;
        }
        None if store.late_read().is_some() => warn!(
            "History that has to be read once more waits for the first block to be accepted: the next run reads it"
        ),
        None => {}
    }
    Ok(())
}

/// Removes what need not be kept any more, for ever. The store's faults end the run where it reads or publishes.
async fn prune(store: Arc<Store>, retention: Option<Duration>) {
    let Some(retention) = retention else { return };
    loop {
        let pruned = on_disk(&store, move |store| store.prune(retention.as_secs(), PRUNED_AT_ONCE)).await;
        let pruned = match pruned {
            Ok(pruned) => pruned,
            Err(error) => return warn!(%error, "Pruning ended"),
        };
        metrics::pruned(pruned);
        if pruned < PRUNED_AT_ONCE {
            tokio::time::sleep(PRUNE_EVERY.min(retention)).await;
        }
    }
}

/// Reads again what was read before, for ever. The store's faults end the run where it reads or publishes.
async fn audit(mut auditor: Auditor<Rpc>) {
    loop {
        match auditor.step().await {
            Ok(scan::Step::Progress) => {}
            Ok(scan::Step::Wait(pause)) => tokio::time::sleep(pause.min(AUDIT_EVERY)).await,
            Ok(scan::Step::Idle | scan::Step::Done) => tokio::time::sleep(AUDIT_EVERY).await,
            Err(error) => return warn!(%error, "The audit ended"),
        }
    }
}

/// Steps the publisher until everything read is published, or `stop`; then lets what is under way finish.
async fn publish_loop<S: Sink>(
    mut publisher: Publisher<S>,
    store: Arc<Store>,
    vitals: Arc<Vitals>,
    stop: CancellationToken,
    read: CancellationToken,
    drain: Duration,
) -> Result<Ending, RelayError> {
    let published = tokio::select! {
        biased;
        () = stop.cancelled() => None,
        published = publish_all(&mut publisher, &store, &vitals, &read) => Some(published),
    };
    vitals.entered(Stage::Stopping);
    match published {
        None => match tokio::time::timeout(drain, publisher.drain()).await {
            Ok(drained) => drained.map(|()| Ending::Stopped).map_err(Into::into),
            Err(_) => {
                warn!("Messages under way were not acknowledged in time: they will be sent again");
                Ok(Ending::Stopped)
            }
        },
        Some(Err(error)) => {
            stop.cancel();
            Err(error.into())
        }
        Some(Ok(())) => match publisher.blocked() {
            blocked if blocked.is_empty() => Ok(Ending::Complete),
            blocked => Ok(Ending::Blocked(blocked)),
        },
    }
}

async fn publish_all<S: Sink>(
    publisher: &mut Publisher<S>,
    store: &Store,
    vitals: &Arc<Vitals>,
    read: &CancellationToken,
) -> Result<(), PublishError> {
    let turning = vitals.begin(Loop::Publish);
    let mut told = None;
    loop {
        turning.turned();
        // Before the step: of what is appended meanwhile nothing is said.
        let (all_read, entries) = (read.is_cancelled(), store.entries());
        let step = publisher.step().await?;
        let rests = step != publish::Step::Progress && publisher.is_drained();
        let all_blocked_upto = rests.then_some(entries);
        if std::mem::replace(&mut told, all_blocked_upto) != all_blocked_upto {
            vitals.all_blocked_upto(all_blocked_upto);
        }
        let pause = match step {
            publish::Step::Progress => continue,
            _ if all_read && rests => return Ok(()),
            publish::Step::Idle => None,
            publish::Step::Wait(pause) => Some(pause),
        };
        let something_to_do = async {
            tokio::select! {
                () = publisher.woken() => {}
                () = tokio::time::sleep(pause.unwrap_or_default()), if pause.is_some() => {}
                () = read.cancelled(), if !all_read => {}
            }
        };
        turning.while_waiting(something_to_do).await;
    }
}
