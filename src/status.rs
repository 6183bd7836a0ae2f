//! What a relayer does right now, for people and programs: the page, `/status`, `relayer status`.
//!
//! A [`Status`] comes from a running relayer ([`Observer`]), or from a store alone, as far as that knows. Making one
//! reads a few rows, however much the store holds.

mod text;

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use alloy::primitives::{Address, B256};
use serde::{Deserialize, Serialize};

use crate::config::{self, Config, SinkKind};
use crate::publish::lane_of;
use crate::rpc::{ProviderState, Rpc};
use crate::store::{Census, Entry, Identity, Kind, Store, StoreError};
use crate::vitals::{Audited, BlockedLane, Facts, Fault, Stage, Vitals, unix_seconds};

/// Events shown, the newest.
const RECENT: usize = 20;
/// Blocked lanes shown.
const BLOCKED: usize = 20;

/// What a relayer does right now. What is not known is `null`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Of the program.
    pub version: String,
    /// How far the relayer is.
    pub phase: Phase,
    /// While it stands by: who holds the lease.
    pub lease_holder: Option<String>,
    /// When this was so, in seconds since 1970.
    pub at: u64,
    /// How long the relayer has been running.
    pub uptime_seconds: Option<u64>,
    /// The chain, and how far it is read.
    pub chain: ChainStatus,
    /// Escrows by state; `null` until the store is open.
    pub escrows: Option<Census>,
    /// Events, and those that wait; `null` until the store is open.
    pub events: Option<Events>,
    /// Where messages go, and what keeps them.
    pub sink: SinkStatus,
    /// History that is being read once more, in the order of its turns.
    pub late_reads: Vec<Late>,
    /// What the audit came to since the start.
    pub audit: Option<Audited>,
    /// The nodes asked, the preferred first.
    pub providers: Vec<Provider>,
    /// JSON-RPC calls made since the start.
    pub rpc_calls: Option<u64>,
    /// The last warnings and errors, the newest first.
    pub faults: Vec<Fault>,
}

/// How far a relayer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Its store is being opened or restored, or it has not seen the chain's head yet.
    Starting,
    /// Another one relays; this one takes over when that ends.
    Standby,
    /// It is further behind than `http.ready_lag_blocks`.
    CatchingUp,
    /// It follows the chain.
    Following,
    /// It finishes what is under way, and ends.
    Stopping,
    /// None runs: this is what its store says.
    Stopped,
}

/// The chain, and how far it is read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ChainStatus {
    /// Its id.
    pub id: u64,
    /// The contract that announces escrows.
    pub factory: Address,
    /// The first block ever read.
    pub start_block: Option<u64>,
    /// The newest block the node has shown.
    pub head: Option<u64>,
    /// How long ago it was shown last.
    pub head_age_seconds: Option<u64>,
    /// The highest block that may be read: the head less the confirmations, or the configured tag.
    pub horizon: Option<u64>,
    /// The last block accepted.
    pub cursor: Option<Block>,
    /// The highest block known to be final.
    pub finalized: Option<u64>,
    /// Blocks that may be read and are not accepted yet.
    pub lag_blocks: Option<u64>,
    /// Reading stands still, because a fork would withdraw more messages than may be withdrawn.
    pub retractions_stopped: bool,
    /// There is no contract at the factory's address: nothing is read before there is one.
    pub factory_without_code: bool,
}

/// One block of one fork.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Block {
    /// Its height.
    pub number: u64,
    /// Its hash.
    pub hash: B256,
}

/// Events, and those that wait.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Events {
    /// Messages there ever were in this store, retractions included.
    pub ever: u64,
    /// Messages that are not acknowledged.
    pub waiting: u64,
    /// The age of the oldest of these.
    pub oldest_unpublished_seconds: Option<u64>,
    /// The same without those that blocked lanes hold.
    pub oldest_unblocked_seconds: Option<u64>,
    /// Published a second, over the last minute.
    pub published_per_second: Option<f64>,
    /// Logs with a known topic that did not decode, kept aside.
    pub quarantined: u64,
    /// The last ones, the newest first.
    pub recent: Vec<Recent>,
}

/// One event, in short.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Recent {
    /// Its name; `Retracted` withdraws an earlier one.
    pub name: String,
    /// Whose it is.
    pub escrow: Address,
    /// Its block.
    pub block: u64,
    /// Its place in the escrow's life.
    pub sequence: u64,
    /// Found after later ones were published.
    pub late: bool,
    /// When it was stored, in seconds since 1970.
    pub stored_at: u64,
}

/// Where messages go, and what keeps them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SinkStatus {
    /// What takes them, and which topic or file.
    pub name: String,
    /// Since when it answers nobody, in seconds since 1970.
    pub outage_since: Option<u64>,
    /// Lanes whose first message is refused, in all; `null` where no relayer runs.
    pub blocked_lanes: Option<usize>,
    /// Some of them, in the order of their names.
    pub blocked: Vec<BlockedLane>,
    /// Blocked lanes hold as many messages as may be held: nothing is published behind them.
    pub stopped: bool,
}

/// History that is being read once more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Late {
    /// The next block to read.
    pub next_block: u64,
    /// Signatures it is read for; 0: it is for escrows only.
    pub signatures: usize,
}

/// A node that is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Provider {
    /// Its place in `rpc.urls`, from 0.
    pub place: usize,
    /// Scheme, host and port of its URL.
    pub url: String,
    /// It answers, as far as is known.
    pub answers: bool,
    /// For how long it has not.
    pub silent_seconds: Option<u64>,
    /// It serves another chain, and is not asked.
    pub wrong_chain: bool,
    /// Blocks it was behind another one when they were compared last.
    pub lag_blocks: u64,
    /// It was asked last.
    pub in_use: bool,
}

impl Status {
    /// What a store says where no relayer runs on it. Blocks on the disk.
    pub fn of_store(store: &Store) -> Result<Self, StoreError> {
        let Identity { chain_id, factory, sink, .. } = store.identity();
        let mut status = Self::blank(*chain_id, *factory, sink.clone());
        status.phase = Phase::Stopped;
        status.read(store, |_| false)?;
        Ok(status)
    }

    fn blank(chain_id: u64, factory: Address, sink: String) -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            phase: Phase::Starting,
            lease_holder: None,
            at: unix_seconds(),
            uptime_seconds: None,
            chain: ChainStatus {
                id: chain_id,
                factory,
                start_block: None,
                head: None,
                head_age_seconds: None,
                horizon: None,
                cursor: None,
                finalized: None,
                lag_blocks: None,
                retractions_stopped: false,
                factory_without_code: false,
            },
            escrows: None,
            events: None,
            sink: SinkStatus {
                name: sink,
                outage_since: None,
                blocked_lanes: None,
                blocked: Vec::new(),
                stopped: false,
            },
            late_reads: Vec::new(),
            audit: None,
            providers: Vec::new(),
            rpc_calls: None,
            faults: Vec::new(),
        }
    }

    fn read(&mut self, store: &Store, is_blocked: impl Fn(&Entry) -> bool) -> Result<(), StoreError> {
        let chain = &mut self.chain;
        chain.start_block = Some(store.start_block());
        chain.cursor = store.cursor().map(|cursor| Block { number: cursor.number, hash: cursor.hash });
        chain.finalized = store.finalized();
        self.escrows = Some(store.registry().census());
        let age = |entry: Option<Entry>| entry.map(|entry| self.at.saturating_sub(entry.stored_at));
        self.events = Some(Events {
            ever: store.entries(),
            waiting: store.waiting(),
            oldest_unpublished_seconds: age(store.oldest_waiting()?),
            oldest_unblocked_seconds: age(store.oldest_waiting_but(is_blocked)?),
            published_per_second: None,
            quarantined: store.quarantined_len()?,
            recent: store.newest(RECENT)?.into_iter().map(Recent::from).collect(),
        });
        let late_reads = store.late_reads().into_iter();
        self.late_reads = late_reads
            .map(|read| Late { next_block: read.next, signatures: read.signatures.len() })
            .collect();
        Ok(())
    }

    fn tell(&mut self, facts: Facts) {
        self.lease_holder = facts.lease_holder;
        let chain = &mut self.chain;
        chain.head = facts.head.map(|head| head.number);
        chain.head_age_seconds = facts.head.map(|head| head.seen.elapsed().as_secs());
        chain.horizon = facts.horizon;
        chain.retractions_stopped = facts.retractions_stopped;
        chain.factory_without_code = facts.factory_without_code;
        self.sink.outage_since = facts.outage_since;
        self.sink.blocked_lanes = Some(facts.blocked.len());
        self.sink.blocked = facts.blocked.into_values().take(BLOCKED).collect();
        self.sink.stopped = facts.publishing_stopped;
        self.audit = Some(facts.audited);
        self.faults = facts.faults.into();
        if let Some(events) = &mut self.events {
            events.published_per_second = Some(facts.events_per_second);
        }
    }
}

impl From<Entry> for Recent {
    fn from(entry: Entry) -> Self {
        let name = match entry.kind {
            Kind::Event => entry.name,
            Kind::Retraction { .. } => "Retracted".to_owned(),
        };
        Self {
            name,
            escrow: entry.escrow,
            block: entry.block_number,
            sequence: entry.sequence,
            late: entry.late,
            stored_at: entry.stored_at,
        }
    }
}

/// A relayer as it can be looked at from outside, from before its store is open until it has ended.
pub struct Observer {
    vitals: Arc<Vitals>,
    chain: config::Chain,
    factory: Address,
    sink: String,
    ordering: config::Ordering,
    /// See [`Sink::is_sequential`](crate::publish::Sink::is_sequential).
    sequential: bool,
    http: config::Http,
    opened: OnceLock<(Arc<Store>, Arc<Rpc>)>,
}

impl Observer {
    /// Of a relayer with this configuration, that tells those vitals.
    pub fn new(config: &Config, vitals: Arc<Vitals>) -> Self {
        Self {
            vitals,
            chain: config.chain.clone(),
            factory: config.factory.address,
            sink: crate::sink_identity(&config.sink),
            ordering: config.sink.ordering,
            sequential: match config.sink.kind {
                SinkKind::Pubsub { .. } => false,
                SinkKind::Stdout | SinkKind::File { .. } => true,
            },
            http: config.http.clone(),
            opened: OnceLock::new(),
        }
    }

    /// From now on there is a store to look at.
    pub(crate) fn opened(&self, store: &Arc<Store>, rpc: &Arc<Rpc>) {
        let _ = self.opened.set((Arc::clone(store), Arc::clone(rpc)));
    }

    /// What the relayer's loops tell.
    pub fn vitals(&self) -> &Arc<Vitals> {
        &self.vitals
    }

    /// What is asked of one that is ready.
    pub fn expectations(&self) -> Expectations {
        // Where the head is asked for seldom, it is old without fault.
        let head_age = self.http.ready_age.max(self.chain.poll_interval * 3);
        Expectations { lag_blocks: self.http.ready_lag_blocks, age: self.http.ready_age, head_age }
    }

    /// What it does right now. Blocks on the disk.
    pub fn status(&self) -> Result<Status, StoreError> {
        let mut status = Status::blank(self.chain.id, self.factory, self.sink.clone());
        // Before the store is read, which may have gone on since: the lag is never told too large.
        let facts = self.vitals.now_known();
        status.chain.start_block = self.chain.start_block;
        status.uptime_seconds = Some(self.vitals.uptime().as_secs());
        let stage = facts.stage;
        if let Some((store, rpc)) = self.opened.get() {
            let lane = |entry: &Entry| lane_of(entry, self.ordering, self.sequential);
            let any = !facts.blocked.is_empty();
            status.read(store, |entry| any && facts.blocked.contains_key(&lane(entry)))?;
            let next = store.next_block();
            status.chain.lag_blocks = match (facts.horizon, facts.head) {
                (Some(horizon), _) => Some(horizon.saturating_add(1).saturating_sub(next)),
                // The chain is shorter than the confirmations: nothing may be read yet.
                (None, Some(_)) => Some(0),
                (None, None) => None,
            };
            let states = rpc.provider_states().into_iter().enumerate();
            let in_use = rpc.provider_in_use();
            status.providers = states.map(|(place, state)| provider(place, state, in_use)).collect();
            status.rpc_calls = Some(rpc.calls());
        }
        status.tell(facts);
        status.phase = match (stage, status.chain.lag_blocks) {
            (Stage::Starting, _) | (Stage::Relaying, None) => Phase::Starting,
            (Stage::Standby, _) => Phase::Standby,
            (Stage::Relaying, Some(lag)) if lag > self.http.ready_lag_blocks => Phase::CatchingUp,
            (Stage::Relaying, Some(_)) => Phase::Following,
            (Stage::Stopping, _) => Phase::Stopping,
        };
        Ok(status)
    }

    /// The same of one that stands by, with the store that it will go on from unless another instance does before.
    pub fn standby_status(&self, store: &Store) -> Result<Status, StoreError> {
        let Status { chain, escrows, events, late_reads, .. } = Status::of_store(store)?;
        Ok(Status { chain, escrows, events, late_reads, ..self.status()? })
    }
}

/// What is asked of a relayer that is ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expectations {
    /// Blocks it may be behind.
    pub lag_blocks: u64,
    /// The age of the oldest unpublished event, blocked lanes aside.
    pub age: Duration,
    /// How long ago the head was seen.
    pub head_age: Duration,
}

fn provider(place: usize, state: ProviderState, in_use: usize) -> Provider {
    Provider {
        place,
        url: state.url,
        answers: state.answers,
        silent_seconds: state.silent_for.map(|silent| silent.as_secs()),
        wrong_chain: state.wrong_chain,
        lag_blocks: state.lag,
        in_use: place == in_use,
    }
}
