//! Raw configuration → checked [`Config`].
//!
//! - `keys`: the one table of keys, with defaults and parsers.
//! - `layers`: where values come from, and which of them wins.
//! - `report`: what is said: all problems at once, or the effective values.
//! - `secret`: URLs that may not be shown.
//!
//! This file holds the result, and the checks that concern more than one key.

mod keys;
mod layers;
mod report;
mod secret;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::num::{NonZeroU32, NonZeroU64, NonZeroUsize};
use std::path::PathBuf;
use std::time::Duration;

use alloy::json_abi::{Event, Function};
use alloy::primitives::Address;

pub use report::{ConfigError, Effective, Origin, Problem, Row};
pub use secret::SecretUrl;

use keys::{Fault, KEYS, Key, Kind, Typed};
use layers::{Given, Layers, Raw};

/// Everything a run is told, checked.
#[derive(Debug, Clone)]
pub struct Config {
    /// The chain and how it is read.
    pub chain: Chain,
    /// The contract that announces escrows.
    pub factory: Factory,
    /// The contracts it deploys.
    pub escrow: Escrow,
    /// The nodes that are asked, and what they bear.
    pub rpc: Rpc,
    /// The store.
    pub storage: Storage,
    /// What waits in the store.
    pub ledger: Ledger,
    /// How what was read is checked afterwards.
    pub audit: Audit,
    /// Where events go.
    pub sink: Sink,
    /// The read-only HTTP server.
    pub http: Http,
    /// Log lines.
    pub log: Log,
}

/// The chain and how it is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// The id the node must answer to `eth_chainId`.
    pub id: u64,
    /// The number of the factory's first block; needed the first time only.
    pub start_block: Option<u64>,
    /// How far is read.
    pub horizon: Horizon,
    /// With [`Horizon::Latest`], how many of the last blocks are not read yet.
    pub confirmations: u64,
    /// Blocks after which a block is final, where the node knows no `finalized`.
    pub finality_depth: u64,
    /// Messages that forks may withdraw within a minute; a fork that would withdraw more is not followed.
    pub max_retractions_per_minute: u64,
    /// How unfinal blocks are read.
    pub reading: Reading,
    /// The time between two looks at the head; more than 0.
    pub poll_interval: Duration,
}

/// How far the chain is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Horizon {
    /// The head less `chain.confirmations`.
    Latest,
    /// The node's `safe` block.
    Safe,
    /// The node's `finalized` block.
    Finalized,
}

/// How unfinal blocks are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reading {
    /// Block by block, each linked to its parent: exact.
    Linked,
    /// By range: fewer calls, for very fast chains; the audit finds what slipped.
    Ranged,
}

/// The contract that announces escrows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Factory {
    /// Its address.
    pub address: Address,
    /// At least one; no two of these and of [`Escrow::events`] have the same topic0 and number of topics.
    pub events: Vec<Event>,
    /// The argument, an address in each of `events`, that names the escrow.
    pub child: String,
    /// Its function without arguments that counts the escrows; `None`: they are not counted.
    pub count_call: Option<Function>,
}

/// The contracts the factory deploys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Escrow {
    /// At least one.
    pub events: Vec<Event>,
    /// Names from `events` after which nothing more is expected of an escrow; may be empty.
    pub terminal: Vec<String>,
    /// Final blocks after its end after which an escrow is not asked for any more.
    pub archive_after: u64,
    /// Functions of theirs that count events; may be empty.
    pub count_calls: Vec<CountCall>,
}

/// A function without arguments, and the event whose occurrences it counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CountCall {
    /// The event's name.
    pub event: String,
    /// The function.
    pub function: Function,
}

/// The nodes that are asked, and what they bear.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rpc {
    /// At least one, preferred first; http, https, ws or wss.
    pub urls: Vec<SecretUrl>,
    /// Calls a second; each call of a batch counts.
    pub requests_per_second: NonZeroU32,
    /// Calls at once after a pause.
    pub burst: NonZeroU32,
    /// Requests in flight.
    pub max_concurrent: NonZeroUsize,
    /// Blocks in one `eth_getLogs`.
    pub max_range: NonZeroU64,
    /// Addresses in one `eth_getLogs`.
    pub max_addresses: NonZeroUsize,
    /// How escrows' logs are asked for.
    pub filter: Filter,
    /// Calls in one JSON-RPC batch.
    pub max_batch: NonZeroUsize,
    /// The time one request may take; more than 0.
    pub timeout: Duration,
    /// What words of theirs mean, before what is known of itself; may be empty.
    pub refusals: Vec<RefusalText>,
}

/// How escrows' logs are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filter {
    /// The cheaper way, as measured.
    Auto,
    /// By the addresses.
    Addresses,
    /// By the topics alone.
    Topics,
}

/// What words in a provider's refusal mean.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RefusalText {
    /// What they mean.
    pub meaning: Meaning,
    /// The words, in lower case; `#` stands for a number.
    pub says: String,
}

/// What a refusal can mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Meaning {
    /// A rate limit, or too busy: ask the same again later.
    Wait,
    /// Too many logs, too large an answer, too slow: ask for fewer blocks.
    Halve,
    /// Too many blocks; the last `#` is how many are allowed.
    Cap,
    /// Too many addresses.
    Addresses,
    /// Too many calls in one request.
    Batch,
    /// The node does not have the block yet.
    Behind,
    /// The provider does not offer this.
    Unsupported,
    /// The provider no longer has these blocks.
    Pruned,
    /// It failed: ask again, or another one.
    Fault,
}

/// The store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Storage {
    /// Its file; relative to the working directory.
    pub path: PathBuf,
    /// The folder of its snapshots; `None`: none are made.
    pub snapshot_dir: Option<PathBuf>,
    /// The time between two snapshots.
    pub snapshot_interval: Duration,
    /// How many snapshots are kept.
    pub snapshot_keep: usize,
}

/// What waits in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ledger {
    /// Events not yet acknowledged, be their lanes blocked or not, at which reading pauses.
    pub max_waiting: NonZeroU64,
    /// How long published events are kept once they are final; `None`: for ever.
    pub retention: Option<Duration>,
}

/// How what was read is checked afterwards.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Audit {
    /// The time between two samples of logs without a topic filter; `None`: none are taken.
    pub sample_interval: Option<Duration>,
    /// Calls an hour that reading again may cost; 0: nothing is read again.
    pub calls_per_hour: u32,
    /// The time between two comparisons with the contracts' own counts.
    pub count_interval: Duration,
    /// Events that are known and not relayed; may be empty.
    pub ignored_events: Vec<Event>,
}

/// Where events go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sink {
    /// What takes them.
    pub kind: SinkKind,
    /// The ordering key.
    pub ordering: Ordering,
    /// The time one attempt may take; more than 0.
    pub timeout: Duration,
    /// Messages sent and not yet acknowledged.
    pub max_outstanding: NonZeroUsize,
}

/// What takes the events.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SinkKind {
    /// Google Pub/Sub.
    Pubsub {
        /// The id of the project.
        project: String,
        /// The id of the topic.
        topic: String,
        /// A URL, where it is not Google's global endpoint.
        endpoint: Option<String>,
        /// The endpoint came from `PUBSUB_EMULATOR_HOST`: no credentials.
        emulator: bool,
    },
    /// One JSON object a line.
    Stdout,
    /// One JSON object a line.
    File {
        /// The file that is appended to.
        path: PathBuf,
    },
}

/// The ordering key of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ordering {
    /// The escrow's address.
    Escrow,
    /// The escrow's hash, in so many buckets.
    Bucket(NonZeroU32),
    /// None.
    None,
}

/// The read-only HTTP server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Http {
    /// Where it listens; `None` if it is off.
    pub listen: Option<SocketAddr>,
    /// Blocks a relayer may be behind and be ready.
    pub ready_lag_blocks: u64,
    /// How old the oldest unpublished event of a relayer that is ready may be.
    pub ready_age: Duration,
}

/// Log lines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Log {
    /// How they look.
    pub format: LogFormat,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// Text on a terminal, JSON elsewhere.
    Auto,
    /// For people.
    Text,
    /// For Cloud Logging.
    Json,
}

/// What a configuration is made from. Nothing else is read, so a test says it all.
#[derive(Clone, Default)]
pub struct Sources {
    /// The file of `--config`: it must exist. Without it `relayer.toml` is read if it is there.
    pub file: Option<PathBuf>,
    /// Keys and values from the command line; later ones win.
    pub overrides: Vec<(String, String)>,
    /// Environment variables.
    pub environment: BTreeMap<String, String>,
    /// What relative paths of files are relative to; empty for the working directory.
    pub directory: PathBuf,
}

/// Set by Cloud Run, for a service, a job and a worker pool.
const CLOUD_RUN: [&str; 3] = ["K_SERVICE", "CLOUD_RUN_JOB", "CLOUD_RUN_WORKER_POOL"];

impl Sources {
    /// With the process's environment and working directory.
    pub fn from_env(file: Option<PathBuf>, overrides: Vec<(String, String)>) -> Sources {
        let environment = std::env::vars_os().filter_map(|(name, value)| {
            let name = name.into_string().ok()?;
            let ours = layers::is_named_variable(&name)
                || CLOUD_RUN.contains(&name.as_str())
                || KEYS.iter().any(|key| key.plain.as_ref().is_some_and(|plain| plain.variable == name));
            ours.then(|| (name, value.to_string_lossy().into_owned()))
        });
        Sources { file, overrides, environment: environment.collect(), directory: PathBuf::new() }
    }

    /// The variable that says this runs on Cloud Run.
    fn cloud_run(&self) -> Option<&'static str> {
        let is_set = |name: &&str| {
            let value = self.environment.get(*name);
            value.is_some_and(|value| !value.trim().is_empty())
        };
        CLOUD_RUN.into_iter().find(is_set)
    }
}

impl Config {
    /// Reads all layers and checks everything; tells all that is wrong, not the first only.
    pub fn load(sources: &Sources) -> Result<(Config, Effective), ConfigError> {
        let mut problems = Vec::new();
        let layers = Layers::gather(sources, &mut problems);
        let mut reader = Reader { layers: &layers, problems };

        let chain = chain(&mut reader);
        let contracts = contracts(&mut reader);
        let rpc = rpc(&mut reader);
        let storage = storage(&mut reader);
        let max_waiting = reader.required(&keys::LEDGER_MAX_WAITING);
        let retention = reader.required(&keys::LEDGER_RETENTION);
        let sample_interval = reader.required(&keys::AUDIT_SAMPLE_INTERVAL);
        let calls_per_hour = reader.required(&keys::AUDIT_CALLS_PER_HOUR);
        let count_interval = reader.required(&keys::AUDIT_COUNT_INTERVAL);
        let ignored_events = reader.required(&keys::AUDIT_IGNORED_EVENTS);
        let sink = sink(&mut reader, sources);
        let listen = reader.required(&keys::HTTP_LISTEN);
        let ready_lag_blocks = reader.required(&keys::HTTP_READY_LAG_BLOCKS);
        let ready_age = reader.required(&keys::HTTP_READY_AGE);
        let format = reader.required(&keys::LOG_FORMAT);

        let problems = reader.problems;
        let config = (|| {
            let (factory, escrow) = contracts?;
            Some(Config {
                chain: chain?,
                factory,
                escrow,
                rpc: rpc?,
                storage: storage?,
                ledger: Ledger { max_waiting: max_waiting?, retention: retention? },
                audit: Audit {
                    sample_interval: sample_interval?,
                    calls_per_hour: calls_per_hour?,
                    count_interval: count_interval?,
                    ignored_events: ignored_events?,
                },
                sink: sink?,
                http: Http { listen: listen?, ready_lag_blocks: ready_lag_blocks?, ready_age: ready_age? },
                log: Log { format: format? },
            })
        })();
        match config {
            Some(config) if problems.is_empty() => {
                let effective = effective(&layers, &config);
                Ok((config, effective))
            }
            _ => Err(ConfigError { problems }),
        }
    }
}

fn chain(reader: &mut Reader) -> Option<Chain> {
    let id = reader.required(&keys::CHAIN_ID);
    let start_block = reader.optional(&keys::CHAIN_START_BLOCK);
    let horizon = reader.required(&keys::CHAIN_HORIZON);
    let confirmations = reader.required(&keys::CHAIN_CONFIRMATIONS);
    let finality_depth = reader.required(&keys::CHAIN_FINALITY_DEPTH);
    let max_retractions_per_minute = reader.required(&keys::CHAIN_MAX_RETRACTIONS);
    let reading = reader.required(&keys::CHAIN_READING);
    let poll_interval = reader.required(&keys::CHAIN_POLL_INTERVAL);
    Some(Chain {
        id: id?,
        start_block: start_block?,
        horizon: horizon?,
        confirmations: confirmations?,
        finality_depth: finality_depth?,
        max_retractions_per_minute: max_retractions_per_minute?,
        reading: reading?,
        poll_interval: poll_interval?,
    })
}

fn contracts(reader: &mut Reader) -> Option<(Factory, Escrow)> {
    let address = reader.required(&keys::FACTORY_ADDRESS);
    let factory_events = reader.required(&keys::FACTORY_EVENTS);
    let child = reader.required(&keys::FACTORY_CHILD);
    let escrow_events = reader.required(&keys::ESCROW_EVENTS);
    let terminal = reader.required(&keys::ESCROW_TERMINAL);
    let archive_after = reader.required(&keys::ESCROW_ARCHIVE_AFTER);
    let count_call = reader.optional(&keys::FACTORY_COUNT_CALL);
    let count_calls = reader.required(&keys::ESCROW_COUNT_CALLS);

    if let (Some(events), Some(child)) = (&factory_events, &child) {
        check_child(reader, events, child);
    }
    if let (Some(events), Some(terminal)) = (&escrow_events, &terminal) {
        check_names(reader, &keys::ESCROW_TERMINAL.key, events, terminal.iter());
    }
    if let (Some(events), Some(calls)) = (&escrow_events, &count_calls) {
        check_names(reader, &keys::ESCROW_COUNT_CALLS.key, events, calls.iter().map(|it| &it.event));
    }
    if let (Some(factory_events), Some(escrow_events)) = (&factory_events, &escrow_events) {
        check_distinct(reader, factory_events, escrow_events);
    }

    let factory =
        Factory { address: address?, events: factory_events?, child: child?, count_call: count_call? };
    let escrow = Escrow {
        events: escrow_events?,
        terminal: terminal?,
        archive_after: archive_after?,
        count_calls: count_calls?,
    };
    Some((factory, escrow))
}

fn check_child(reader: &mut Reader, events: &[Event], child: &str) {
    for event in events {
        let signature = event.full_signature();
        match event.inputs.iter().find(|input| input.name == child) {
            Some(input) if input.ty == "address" => {}
            Some(input) => reader.refuse(
                &keys::FACTORY_CHILD.key,
                format!("must be an address, but is {} in {signature:?}", input.ty),
            ),
            None => reader.refuse(
                &keys::FACTORY_CHILD.key,
                format!("must be an argument of every factory event, but is none of {signature:?}"),
            ),
        }
    }
}

fn check_names<'a>(
    reader: &mut Reader,
    key: &Key,
    events: &[Event],
    named: impl Iterator<Item = &'a String>,
) {
    for (item, name) in named.enumerate() {
        if events.iter().any(|event| event.name == *name) {
            continue;
        }
        let mut known: Vec<_> = events.iter().map(|event| event.name.as_str()).collect();
        known.dedup();
        let reason = format!("is not in escrow.events, which has {}", known.join(", "));
        reader.refuse_item(key, item, reason);
    }
}

fn check_distinct(reader: &mut Reader, factory_events: &[Event], escrow_events: &[Event]) {
    for (item, event) in escrow_events.iter().enumerate() {
        let twin = factory_events.iter().find_map(|other| keys::indistinguishable(event, other));
        if let Some(how) = twin {
            let reason = format!("{how} one in factory.events: remove one of them");
            reader.refuse_item(&keys::ESCROW_EVENTS.key, item, reason);
        }
    }
}

fn storage(reader: &mut Reader) -> Option<Storage> {
    let path = reader.required(&keys::STORAGE_PATH);
    let snapshot_dir = reader.optional(&keys::STORAGE_SNAPSHOT_DIR);
    let snapshot_interval = reader.required(&keys::STORAGE_SNAPSHOT_INTERVAL);
    let snapshot_keep = reader.required(&keys::STORAGE_SNAPSHOT_KEEP);
    Some(Storage {
        path: path?,
        snapshot_dir: snapshot_dir?,
        snapshot_interval: snapshot_interval?,
        snapshot_keep: snapshot_keep?.get(),
    })
}

fn rpc(reader: &mut Reader) -> Option<Rpc> {
    let urls = reader.required(&keys::RPC_URLS);
    let requests_per_second = reader.required(&keys::RPC_REQUESTS_PER_SECOND);
    let burst = reader.required(&keys::RPC_BURST);
    let max_concurrent = reader.required(&keys::RPC_MAX_CONCURRENT);
    let max_range = reader.required(&keys::RPC_MAX_RANGE);
    let max_addresses = reader.required(&keys::RPC_MAX_ADDRESSES);
    let filter = reader.required(&keys::RPC_FILTER);
    let max_batch = reader.required(&keys::RPC_MAX_BATCH);
    let timeout = reader.required(&keys::RPC_TIMEOUT);
    let refusals = reader.required(&keys::RPC_REFUSALS);
    Some(Rpc {
        urls: urls?,
        requests_per_second: requests_per_second?,
        burst: burst?,
        max_concurrent: max_concurrent?,
        max_range: max_range?,
        max_addresses: max_addresses?,
        filter: filter?,
        max_batch: max_batch?,
        timeout: timeout?,
        refusals: refusals?,
    })
}

fn sink(reader: &mut Reader, sources: &Sources) -> Option<Sink> {
    let kind = sink_kind(reader, sources);
    let timeout = reader.required(&keys::SINK_TIMEOUT);
    let ordering = reader.required(&keys::SINK_ORDERING);
    let max_outstanding = reader.required(&keys::SINK_MAX_OUTSTANDING);
    Some(Sink { kind: kind?, ordering: ordering?, timeout: timeout?, max_outstanding: max_outstanding? })
}

fn sink_kind(reader: &mut Reader, sources: &Sources) -> Option<SinkKind> {
    let kind = reader.optional(&keys::SINK_KIND);
    let path = reader.optional(&keys::SINK_PATH);
    let project = reader.optional(&keys::SINK_PROJECT);
    let topic = reader.required(&keys::SINK_TOPIC);
    let endpoint = reader.optional(&keys::SINK_ENDPOINT);
    let (kind, path, project, endpoint) = (kind?, path?, project?, endpoint?);

    let kind = match (kind, &project) {
        (Some(kind), _) => kind,
        (None, Some(_)) => Kind::Pubsub,
        (None, None) => {
            if let Some(variable) = sources.cloud_run() {
                // Events printed to a log that nobody reads would count as delivered.
                let why = format!("on Cloud Run ({variable} is set) it must be said");
                reader.missing(&keys::SINK_KIND.key, &format!("{why}, or sink.project set"));
                return None;
            }
            Kind::Stdout
        }
    };
    match kind {
        Kind::Stdout => Some(SinkKind::Stdout),
        Kind::File => {
            if path.is_none() {
                reader.missing(&keys::SINK_PATH.key, "sink.kind is \"file\"");
            }
            Some(SinkKind::File { path: path? })
        }
        Kind::Pubsub => {
            if project.is_none() {
                reader.missing(&keys::SINK_PROJECT.key, "sink.kind is \"pubsub\"");
            }
            Some(SinkKind::Pubsub {
                project: project?,
                topic: topic?,
                endpoint,
                emulator: reader.is_from_plain(&keys::SINK_ENDPOINT.key),
            })
        }
    }
}

/// Parses keys one by one and remembers every problem. `None` always means that a problem was recorded.
struct Reader<'a> {
    layers: &'a Layers,
    problems: Vec<Problem>,
}

impl Reader<'_> {
    fn required<T>(&mut self, typed: &Typed<T>) -> Option<T> {
        let value = self.optional(typed)?;
        if value.is_none() {
            self.missing(&typed.key, "it has no default");
        }
        value
    }

    fn optional<T>(&mut self, typed: &Typed<T>) -> Option<Option<T>> {
        let Some(given) = self.layers.given(&typed.key) else {
            return Some(None);
        };
        let parsed = match &given.value {
            Ok(raw) => (typed.parse)(raw),
            Err(reason) => Err(vec![Fault { item: None, reason: reason.clone() }]),
        };
        match parsed {
            Ok(value) => Some(Some(value)),
            Err(faults) => {
                let problems = faults.into_iter().map(|fault| problem(&typed.key, &given, fault));
                self.problems.extend(problems);
                None
            }
        }
    }

    fn missing(&mut self, key: &Key, why: &str) {
        // In a file that cannot be read it may well stand.
        if !self.layers.complete {
            return;
        }
        let plain = match &key.plain {
            Some(plain) => format!("{} or ", plain.variable),
            None => String::new(),
        };
        self.problems.push(Problem {
            subject: key.path.to_owned(),
            value: None,
            origin: None,
            reason: format!(
                "missing; {why}: set it in relayer.toml, or set {plain}{}: {}",
                key.variable(),
                key.about
            ),
        });
    }

    fn refuse(&mut self, key: &Key, reason: String) {
        self.record(key, Fault { item: None, reason });
    }

    fn refuse_item(&mut self, key: &Key, item: usize, reason: String) {
        let item = Some(item);
        self.record(key, Fault { item, reason });
    }

    fn record(&mut self, key: &Key, fault: Fault) {
        if let Some(given) = self.layers.given(key) {
            self.problems.push(problem(key, &given, fault));
        }
    }

    fn is_from_plain(&self, key: &Key) -> bool {
        let origin = self.layers.given(key).map(|given| given.origin);
        match (origin, &key.plain) {
            (Some(Origin::Variable(name)), Some(plain)) => name == plain.variable,
            _ => false,
        }
    }
}

fn problem(key: &Key, given: &Given, fault: Fault) -> Problem {
    let item = match (&given.written, fault.item) {
        (Raw::List(items), Some(index)) => items.get(index).map(|item| (index, item)),
        _ => None,
    };
    let (subject, shown) = match item {
        Some((index, item)) => (format!("{} item {}", key.path, index + 1), item),
        None => (key.path.to_owned(), &given.written),
    };
    Problem {
        subject,
        value: Some(shown.shown(key.secret)),
        origin: Some(given.origin.clone()),
        reason: fault.reason,
    }
}

fn effective(layers: &Layers, config: &Config) -> Effective {
    let rows = KEYS.iter().map(|key| match layers.given(key) {
        Some(given) => {
            let raw = given.value.unwrap_or(given.written);
            let value = match &raw {
                Raw::List(items) if !items.is_empty() => {
                    items.iter().map(|item| item.shown(key.secret)).collect()
                }
                raw => vec![raw.shown(key.secret)],
            };
            Row { key: key.path, value, source: given.origin.to_string() }
        }
        None => Row {
            key: key.path,
            value: derived(key, config).into_iter().collect(),
            source: Origin::Default.to_string(),
        },
    });
    Effective { rows: rows.collect() }
}

/// The value of a key whose default follows from others.
fn derived(key: &Key, config: &Config) -> Option<String> {
    if key.path != keys::SINK_KIND.key.path {
        return None;
    }
    let kind = match config.sink.kind {
        SinkKind::Pubsub { .. } => "\"pubsub\"",
        SinkKind::Stdout => "\"stdout\"",
        SinkKind::File { .. } => "\"file\"",
    };
    Some(kind.to_owned())
}

#[cfg(test)]
mod tests;
