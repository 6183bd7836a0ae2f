//! The one table of keys: it drives parsing, the detection of unknown keys, and what `relayer config` prints.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::num::{NonZeroU32, NonZeroU64, NonZeroUsize};
use std::path::PathBuf;
use std::time::Duration;

use alloy::dyn_abi::Specifier;
use alloy::json_abi::{Event, Function};
use alloy::primitives::Address;
use figment::value::Value;
use reqwest::Url;

use super::layers::{self, Raw};
use super::report::Origin;
use super::secret::SecretUrl;
use super::{CountCall, Filter, Horizon, LogFormat, Meaning, Ordering, Reading, RefusalText};

/// How a key's text is read where there is only text (variables, command line).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    Number,
    Text,
    List,
}

/// A variable without our prefix, and how its own form becomes the key's.
pub(super) struct Plain {
    pub variable: &'static str,
    rewrite: fn(&str) -> Result<String, String>,
}

/// What is known about a key apart from its type.
pub(super) struct Key {
    pub path: &'static str,
    /// What belongs there; also the advice when it is missing or of a wrong type.
    pub about: &'static str,
    pub shape: Shape,
    /// The built-in default, as it would be written in the file.
    pub default: Option<&'static str>,
    pub plain: Option<Plain>,
    /// Whether the value is a URL, of which only scheme, host and port may be shown.
    pub secret: bool,
}

impl Key {
    pub fn section(&self) -> &'static str {
        self.path.split_once('.').map_or("", |(section, _)| section)
    }

    pub fn name(&self) -> &'static str {
        self.path.split_once('.').map_or(self.path, |(_, name)| name)
    }

    /// The `RELAYER_<SECTION>__<KEY>` variable of this key.
    pub fn variable(&self) -> String {
        format!("RELAYER_{}", self.path.replace('.', "__").to_uppercase())
    }

    pub fn default_value(&self) -> Option<Value> {
        let written = format!("value = {}", self.default?);
        let mut dict = layers::toml(&written).expect("built-in defaults are TOML");
        dict.remove("value")
    }

    /// `text` in the key's own form, where `origin` is the plain variable with another one.
    pub fn rewritten(&self, text: &str, origin: &Origin) -> Result<String, String> {
        match (&self.plain, origin) {
            (Some(plain), Origin::Variable(name)) if name == plain.variable => (plain.rewrite)(text.trim()),
            _ => Ok(text.to_owned()),
        }
    }
}

/// A key and the parser of its value.
pub(super) struct Typed<T> {
    pub key: Key,
    pub parse: fn(&Raw) -> Parsed<T>,
}

pub(super) type Parsed<T> = Result<T, Vec<Fault>>;

/// What is wrong with a value, or with one item of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fault {
    pub item: Option<usize>,
    pub reason: String,
}

fn fault<T>(reason: impl Into<String>) -> Parsed<T> {
    Err(vec![Fault { item: None, reason: reason.into() }])
}

macro_rules! keys {
    ($($name:ident: $type:ty {
        path: $path:literal,
        about: $about:literal,
        shape: $shape:ident,
        default: $default:expr,
        plain: $plain:expr,
        parse: $parse:expr $(, secret: $secret:literal)? $(,)?
    })*) => {
        $(pub(super) static $name: Typed<$type> = Typed {
            key: Key {
                path: $path,
                about: $about,
                shape: Shape::$shape,
                default: $default,
                plain: $plain,
                secret: false $(|| $secret)?,
            },
            parse: $parse,
        };)*

        /// All keys, in the order of the documentation.
        pub(super) static KEYS: &[&Key] = &[$(&$name.key),*];
    };
}

const fn plain(variable: &'static str) -> Option<Plain> {
    rewritten(variable, |text| Ok(text.to_owned()))
}

const fn rewritten(variable: &'static str, rewrite: fn(&str) -> Result<String, String>) -> Option<Plain> {
    Some(Plain { variable, rewrite })
}

keys! {
    CHAIN_ID: u64 {
        path: "chain.id",
        about: "the chain's id, such as 11155111 for Sepolia",
        shape: Number, default: None, plain: plain("CHAIN_ID"),
        parse: |raw| non_zero::<NonZeroU64>(raw).map(NonZeroU64::get),
    }
    CHAIN_START_BLOCK: u64 {
        path: "chain.start_block",
        about: "the number of the block that deployed the factory",
        shape: Number, default: None, plain: plain("START_BLOCK"),
        parse: whole,
    }
    CHAIN_HORIZON: Horizon {
        path: "chain.horizon",
        about: "how far is read: \"latest\", \"safe\" or \"finalized\"",
        shape: Text, default: Some(r#""latest""#), plain: None,
        parse: |raw| choice(raw, &[
            ("latest", Horizon::Latest),
            ("safe", Horizon::Safe),
            ("finalized", Horizon::Finalized),
        ]),
    }
    CHAIN_CONFIRMATIONS: u64 {
        path: "chain.confirmations",
        about: "how many of the latest blocks are not read yet, such as 2",
        shape: Number, default: Some("2"), plain: None,
        parse: whole,
    }
    CHAIN_FINALITY_DEPTH: u64 {
        path: "chain.finality_depth",
        about: "blocks after which a block is final where the node knows no \"finalized\", such as 64",
        shape: Number, default: Some("64"), plain: None,
        parse: whole,
    }
    CHAIN_MAX_RETRACTIONS: u64 {
        path: "chain.max_retractions_per_minute",
        about: "messages that forks may withdraw within a minute, such as 5000",
        shape: Number, default: Some("5000"), plain: None,
        parse: whole,
    }
    CHAIN_READING: Reading {
        path: "chain.reading",
        about: "how unfinal blocks are read: \"linked\" or \"ranged\"",
        shape: Text, default: Some(r#""linked""#), plain: None,
        parse: |raw| choice(raw, &[("linked", Reading::Linked), ("ranged", Reading::Ranged)]),
    }
    CHAIN_POLL_INTERVAL: Duration {
        path: "chain.poll_interval",
        about: "the time between two looks at the head, such as \"4s\"",
        shape: Text, default: Some(r#""4s""#), plain: rewritten("POLL_INTERVAL_SECONDS", seconds),
        parse: duration,
    }
    FACTORY_ADDRESS: Address {
        path: "factory.address",
        about: "the factory's address, 0x and 40 hex digits",
        shape: Text, default: None, plain: plain("CONTRACT_ADDRESS"),
        parse: address,
    }
    FACTORY_EVENTS: Vec<Event> {
        path: "factory.events",
        about: "the signatures of the factory's events, such as [\"EscrowDeployed(address indexed escrow)\"]",
        shape: List, default: Some(FACTORY_EVENTS_DEFAULT), plain: None,
        parse: events,
    }
    FACTORY_CHILD: String {
        path: "factory.child",
        about: "the name of the argument that holds the deployed escrow's address, such as \"escrow\"",
        shape: Text, default: Some(r#""escrow""#), plain: None,
        parse: name,
    }
    FACTORY_COUNT_CALL: Function {
        path: "factory.count_call",
        about: "the factory's function that counts its escrows, such as \"getEscrowCount()\"",
        shape: Text, default: None, plain: None,
        parse: |raw| function(&text(raw)?),
    }
    ESCROW_EVENTS: Vec<Event> {
        path: "escrow.events",
        about: "the signatures of the escrows' events, such as [\"Approved(address indexed approver)\"]",
        shape: List, default: Some(ESCROW_EVENTS_DEFAULT), plain: None,
        parse: events,
    }
    ESCROW_TERMINAL: Vec<String> {
        path: "escrow.terminal",
        about: "the names of the events after which nothing more is expected, such as [\"EscrowReleased\"]",
        shape: List, default: Some(r#"["EscrowReleased", "EscrowRefunded"]"#), plain: None,
        parse: names,
    }
    ESCROW_ARCHIVE_AFTER: u64 {
        path: "escrow.archive_after",
        about: "final blocks after its end after which an escrow is not asked for any more, such as 50000",
        shape: Number, default: Some("50000"), plain: None,
        parse: whole,
    }
    ESCROW_COUNT_CALLS: Vec<CountCall> {
        path: "escrow.count_calls",
        about: "functions of the escrows that count events, such as [\"Approved = approvalsCount()\"]",
        shape: List, default: Some("[]"), plain: None,
        parse: |raw| list(raw, count_call, |_, _| None),
    }
    RPC_URLS: Vec<SecretUrl> {
        path: "rpc.urls",
        about: "the nodes to ask, preferred first, such as [\"https://host/…\", \"wss://host/…\"]",
        shape: List, default: None, plain: plain("RPC_URL"),
        parse: urls,
        secret: true,
    }
    RPC_REQUESTS_PER_SECOND: NonZeroU32 {
        path: "rpc.requests_per_second",
        about: "how many calls a second the provider allows, each of a batch counted, such as 25",
        shape: Number, default: Some("25"), plain: None,
        parse: non_zero,
    }
    RPC_BURST: NonZeroU32 {
        path: "rpc.burst",
        about: "how many calls may go out at once after a pause, such as 25",
        shape: Number, default: Some("25"), plain: None,
        parse: non_zero,
    }
    RPC_MAX_CONCURRENT: NonZeroUsize {
        path: "rpc.max_concurrent",
        about: "how many requests may be in flight, such as 10",
        shape: Number, default: Some("10"), plain: plain("MAX_CONCURRENT_QUERIES"),
        parse: non_zero,
    }
    RPC_MAX_RANGE: NonZeroU64 {
        path: "rpc.max_range",
        about: "the most blocks one eth_getLogs asks for, such as 2000",
        shape: Number, default: Some("2000"), plain: plain("BATCH_SIZE"),
        parse: non_zero,
    }
    RPC_MAX_ADDRESSES: NonZeroUsize {
        path: "rpc.max_addresses",
        about: "the most addresses one eth_getLogs asks for, such as 1000",
        shape: Number, default: Some("1000"), plain: None,
        parse: non_zero,
    }
    RPC_FILTER: Filter {
        path: "rpc.filter",
        about: "how escrows' logs are asked for: \"auto\", \"addresses\" or \"topics\"",
        shape: Text, default: Some(r#""auto""#), plain: None,
        parse: |raw| choice(raw, &[
            ("auto", Filter::Auto),
            ("addresses", Filter::Addresses),
            ("topics", Filter::Topics),
        ]),
    }
    RPC_MAX_BATCH: NonZeroUsize {
        path: "rpc.max_batch",
        about: "the most calls in one JSON-RPC batch, such as 100",
        shape: Number, default: Some("100"), plain: None,
        parse: non_zero,
    }
    RPC_TIMEOUT: Duration {
        path: "rpc.timeout",
        about: "how long a request may take, such as \"20s\"",
        shape: Text, default: Some(r#""20s""#), plain: None,
        parse: duration,
    }
    RPC_REFUSALS: Vec<RefusalText> {
        path: "rpc.refusals",
        about: "what a provider's words mean, such as [\"cap = up to # blocks\", \"wait = slow down\"]",
        shape: List, default: Some("[]"), plain: None,
        parse: |raw| list(raw, refusal_text, equal),
    }
    STORAGE_PATH: PathBuf {
        path: "storage.path",
        about: "the file of the store, such as \"relayer.redb\"",
        shape: Text, default: Some(r#""relayer.redb""#), plain: None,
        parse: |raw| text(raw).map(PathBuf::from),
    }
    STORAGE_SNAPSHOT_DIR: PathBuf {
        path: "storage.snapshot_dir",
        about: "a folder for snapshots of the store, such as a mounted bucket: \"/snapshots\"",
        shape: Text, default: None, plain: None,
        parse: |raw| text(raw).map(PathBuf::from),
    }
    STORAGE_SNAPSHOT_INTERVAL: Duration {
        path: "storage.snapshot_interval",
        about: "the time between two snapshots, such as \"5m\"",
        shape: Text, default: Some(r#""5m""#), plain: None,
        parse: duration,
    }
    STORAGE_SNAPSHOT_KEEP: NonZeroUsize {
        path: "storage.snapshot_keep",
        about: "how many snapshots are kept, such as 5",
        shape: Number, default: Some("5"), plain: None,
        parse: non_zero,
    }
    LEDGER_MAX_WAITING: NonZeroU64 {
        path: "ledger.max_waiting",
        about: "the most events that may wait to be published before reading pauses, such as 1000000",
        shape: Number, default: Some("1000000"), plain: None,
        parse: non_zero,
    }
    LEDGER_RETENTION: Option<Duration> {
        path: "ledger.retention",
        about: "how long published events are kept once they are final, such as \"7days\", or \"forever\"",
        shape: Text, default: Some(r#""7days""#), plain: None,
        parse: |raw| match raw.text() {
            Some(text) if text == "forever" => Ok(None),
            _ => duration(raw).map(Some),
        },
    }
    AUDIT_SAMPLE_INTERVAL: Option<Duration> {
        path: "audit.sample_interval",
        about: "how often logs are read without a topic filter, to find unknown events, such as \"1h\", or \"off\"",
        shape: Text, default: Some(r#""1h""#), plain: None,
        parse: |raw| match raw.text() {
            Some(text) if text == "off" => Ok(None),
            _ => duration(raw).map(Some),
        },
    }
    AUDIT_CALLS_PER_HOUR: u32 {
        path: "audit.calls_per_hour",
        about: "how many calls an hour reading again may cost, such as 120; 0 for none",
        shape: Number, default: Some("120"), plain: None,
        parse: |raw| u32::try_from(whole(raw)?).or_else(|_| fault("is too large")),
    }
    AUDIT_COUNT_INTERVAL: Duration {
        path: "audit.count_interval",
        about: "how often what was read is compared with the contracts' own counts, such as \"1h\"",
        shape: Text, default: Some(r#""1h""#), plain: None,
        parse: duration,
    }
    AUDIT_IGNORED_EVENTS: Vec<Event> {
        path: "audit.ignored_events",
        about: "the signatures of events that are known and not relayed, such as [\"Paused(address account)\"]",
        shape: List, default: Some(IGNORED_EVENTS_DEFAULT), plain: None,
        parse: |raw| list(raw, event, |_, _| None),
    }
    SINK_KIND: Kind {
        path: "sink.kind",
        about: "where events go: \"pubsub\", \"stdout\" or \"file\"",
        shape: Text, default: None, plain: None,
        parse: |raw| choice(raw, &[
            ("pubsub", Kind::Pubsub),
            ("stdout", Kind::Stdout),
            ("file", Kind::File),
        ]),
    }
    SINK_PATH: PathBuf {
        path: "sink.path",
        about: "the file events are appended to",
        shape: Text, default: None, plain: None,
        parse: |raw| text(raw).map(PathBuf::from),
    }
    SINK_PROJECT: String {
        path: "sink.project",
        about: "the id of the Google Cloud project, such as \"my-project\"",
        shape: Text, default: None, plain: plain("PUBSUB_PROJECT_ID"),
        parse: name,
    }
    SINK_TOPIC: String {
        path: "sink.topic",
        about: "the id of the Pub/Sub topic, such as \"settlement.events.v1\"",
        shape: Text, default: Some(r#""settlement.events.v1""#), plain: plain("PUBSUB_TOPIC_ID"),
        parse: name,
    }
    SINK_ENDPOINT: String {
        path: "sink.endpoint",
        about: "another Pub/Sub endpoint than Google's global one, such as \"https://europe-west1-pubsub.googleapis.com\"",
        shape: Text, default: None, plain: rewritten("PUBSUB_EMULATOR_HOST", emulator),
        parse: endpoint,
        secret: true,
    }
    SINK_TIMEOUT: Duration {
        path: "sink.timeout",
        about: "how long one attempt to publish may take, such as \"15s\"",
        shape: Text, default: Some(r#""15s""#), plain: None,
        parse: duration,
    }
    SINK_ORDERING: Ordering {
        path: "sink.ordering",
        about: "the ordering key: \"escrow\", \"bucket:N\" or \"none\"",
        shape: Text, default: Some(r#""escrow""#), plain: None,
        parse: ordering,
    }
    SINK_MAX_OUTSTANDING: NonZeroUsize {
        path: "sink.max_outstanding",
        about: "the most messages sent and not yet acknowledged, such as 1000",
        shape: Number, default: Some("1000"), plain: None,
        parse: max_outstanding,
    }
    HTTP_LISTEN: Option<SocketAddr> {
        path: "http.listen",
        about: "the address to listen on, such as \"127.0.0.1:8080\", or \"off\"",
        shape: Text, default: Some(r#""127.0.0.1:8080""#), plain: rewritten("PORT", port),
        parse: listen,
    }
    HTTP_READY_LAG_BLOCKS: u64 {
        path: "http.ready_lag_blocks",
        about: "blocks a relayer may be behind and still count as ready, such as 100",
        shape: Number, default: Some("100"), plain: None,
        parse: whole,
    }
    HTTP_READY_AGE: Duration {
        path: "http.ready_age",
        about: "how old the oldest unpublished event may be for a relayer to count as ready, such as \"2m\"",
        shape: Text, default: Some(r#""2m""#), plain: None,
        parse: duration,
    }
    LOG_FORMAT: LogFormat {
        path: "log.format",
        about: "how log lines look: \"auto\", \"text\" or \"json\"",
        shape: Text, default: Some(r#""auto""#), plain: None,
        parse: |raw| choice(raw, &[
            ("auto", LogFormat::Auto),
            ("text", LogFormat::Text),
            ("json", LogFormat::Json),
        ]),
    }
}

/// Two generations of the factory's ABI.
const FACTORY_EVENTS_DEFAULT: &str = r#"[
    "EscrowDeployed(address indexed escrow, address indexed payer, address indexed payee, address arbiter, uint256 amount, uint256 releaseDelay, uint8 approvalsRequired)",
    "EscrowDeployed(address indexed escrow, address indexed payer, address indexed payee, uint256 amount, uint256 releaseDelay, uint8 approvalsRequired)",
]"#;

/// Three generations of the escrow's ABI: a relayer that knows one of them captures nothing of the others.
const ESCROW_EVENTS_DEFAULT: &str = r#"[
    "Approved(address indexed approver)",
    "EscrowReleased(address indexed payee)",
    "EscrowReleased(address indexed payee, uint256 amount)",
    "EscrowReleased(address indexed payee, uint256 amount, uint256 timestamp)",
    "EscrowRefunded(address indexed payer)",
    "EscrowRefunded(address indexed payer, uint256 amount)",
    "EscrowRefunded(address indexed payer, uint256 amount, uint256 timestamp)",
]"#;

/// What the contracts say beside: an escrow's constructor, in two generations, and a change of its arbiter.
const IGNORED_EVENTS_DEFAULT: &str = r#"[
    "EscrowCreated(address indexed payer, address indexed payee, address indexed arbiter, uint256 amount, uint256 releaseTime, uint8 approvalsRequired)",
    "EscrowCreated(address indexed payer, address indexed payee, uint256 amount, uint256 releaseTime, uint8 approvalsRequired)",
    "ArbiterChanged(address indexed oldArbiter, address indexed newArbiter)",
]"#;

/// The bare choice of `sink.kind`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Pubsub,
    Stdout,
    File,
}

/// The most messages that may be repeated after a crash; more than this is surely a slip of the pen.
const MAX_OUTSTANDING_LIMIT: usize = 100_000;

fn wrong_type<T>(raw: &Raw, wanted: &str) -> Parsed<T> {
    fault(format!("must be {wanted}, not {}", raw.type_name()))
}

fn whole(raw: &Raw) -> Parsed<u64> {
    match raw {
        Raw::Integer(number) => match u64::try_from(*number) {
            Ok(number) => Ok(number),
            Err(_) if *number < 0 => fault("must not be negative"),
            Err(_) => fault("is too large"),
        },
        Raw::Text(_) | Raw::Float(_) | Raw::Bool(_) | Raw::List(_) | Raw::Table => {
            wrong_type(raw, "a whole number")
        }
    }
}

fn non_zero<T: TryFrom<NonZeroU64>>(raw: &Raw) -> Parsed<T> {
    match NonZeroU64::new(whole(raw)?) {
        None => fault("must be at least 1"),
        Some(number) => T::try_from(number).or_else(|_| fault("is too large")),
    }
}

fn max_outstanding(raw: &Raw) -> Parsed<NonZeroUsize> {
    let number = non_zero::<NonZeroUsize>(raw)?;
    if number.get() > MAX_OUTSTANDING_LIMIT {
        return fault(format!("must be at most {MAX_OUTSTANDING_LIMIT}"));
    }
    Ok(number)
}

fn text(raw: &Raw) -> Parsed<String> {
    match raw.text() {
        Some(text) if text.is_empty() => fault("must not be empty"),
        Some(text) => Ok(text),
        None => wrong_type(raw, "a string"),
    }
}

fn name(raw: &Raw) -> Parsed<String> {
    let name = text(raw)?;
    if name.contains(|c: char| c.is_whitespace() || c == '/') {
        return fault("must be the bare name, without \"/\" or spaces");
    }
    Ok(name)
}

fn choice<T: Copy>(raw: &Raw, choices: &[(&str, T)]) -> Parsed<T> {
    let given = text(raw)?;
    match choices.iter().find(|(name, _)| *name == given) {
        Some((_, value)) => Ok(*value),
        None => {
            let names: Vec<_> = choices.iter().map(|(name, _)| format!("\"{name}\"")).collect();
            fault(format!("must be one of {}", names.join(", ")))
        }
    }
}

fn duration(raw: &Raw) -> Parsed<Duration> {
    match humantime::parse_duration(&text(raw)?) {
        Ok(duration) if duration.is_zero() => fault("must be more than 0"),
        Ok(duration) => Ok(duration),
        Err(_) => fault("must be a duration with its unit: write it like \"200ms\", \"4s\" or \"5m\""),
    }
}

/// `POLL_INTERVAL_SECONDS`: a bare number.
fn seconds(text: &str) -> Result<String, String> {
    let seconds: Option<f64> = text.parse().ok();
    let duration = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    match duration {
        Some(duration) => Ok(humantime::format_duration(duration).to_string()),
        None => Err("must be a number of seconds, such as 4 or 0.5".to_owned()),
    }
}

fn address(raw: &Raw) -> Parsed<Address> {
    let text = text(raw)?;
    let digits = match text.strip_prefix("0x") {
        Some(digits) if digits.len() == 40 && digits.bytes().all(|b| b.is_ascii_hexdigit()) => digits,
        _ => return fault("must be an address: 0x and 40 hex digits"),
    };
    let Ok(address) = text.parse::<Address>() else {
        return fault("must be an address: 0x and 40 hex digits");
    };
    let mixed = digits.contains(|c: char| c.is_ascii_lowercase())
        && digits.contains(|c: char| c.is_ascii_uppercase());
    if mixed && address.to_checksum(None) != text {
        return fault(format!(
            "has a wrong EIP-55 checksum, so a digit may be wrong: compare it with its source, then write it in \
             lower case, or as {}",
            address.to_checksum(None)
        ));
    }
    if address.is_zero() {
        return fault("must not be the zero address");
    }
    Ok(address)
}

fn items(raw: &Raw) -> Parsed<&[Raw]> {
    match raw {
        Raw::List(items) => Ok(items),
        Raw::Text(_) | Raw::Integer(_) | Raw::Float(_) | Raw::Bool(_) | Raw::Table => {
            wrong_type(raw, "a list such as [\"a\", \"b\"]")
        }
    }
}

/// Parses every item with `parse` and tells all faults; `same` finds an earlier item that the new one repeats.
fn list<T>(
    raw: &Raw,
    parse: fn(&Raw) -> Parsed<T>,
    same: fn(&T, &T) -> Option<&'static str>,
) -> Parsed<Vec<T>> {
    let mut good: Vec<(usize, T)> = Vec::new();
    let mut faults = Vec::new();
    for (index, item) in items(raw)?.iter().enumerate() {
        match parse(item) {
            Ok(value) => {
                let repeated = good.iter().find_map(|(at, earlier)| Some((at, same(earlier, &value)?)));
                if let Some((at, how)) = repeated {
                    faults.push(Fault {
                        item: Some(index),
                        reason: format!("{how} item {}: remove one of them", at + 1),
                    });
                }
                good.push((index, value));
            }
            Err(found) => faults.extend(found.into_iter().map(|fault| Fault { item: Some(index), ..fault })),
        }
    }
    if faults.is_empty() { Ok(good.into_iter().map(|(_, value)| value).collect()) } else { Err(faults) }
}

fn equal<T: PartialEq>(a: &T, b: &T) -> Option<&'static str> {
    (a == b).then_some("is the same as")
}

fn names(raw: &Raw) -> Parsed<Vec<String>> {
    list(raw, name, equal)
}

fn urls(raw: &Raw) -> Parsed<Vec<SecretUrl>> {
    match list(raw, rpc_url, equal)? {
        urls if urls.is_empty() => fault("must name at least one URL"),
        urls => Ok(urls),
    }
}

fn rpc_url(raw: &Raw) -> Parsed<SecretUrl> {
    url(raw, &["http", "https", "ws", "wss"]).map(SecretUrl::new)
}

fn endpoint(raw: &Raw) -> Parsed<String> {
    url(raw, &["http", "https"])?;
    text(raw)
}

fn url(raw: &Raw, schemes: &[&str]) -> Parsed<Url> {
    let text = text(raw)?;
    match Url::parse(&text) {
        Ok(url) if schemes.contains(&url.scheme()) && url.has_host() => Ok(url),
        _ => fault(format!(
            "must be a URL with a host, beginning with {}",
            schemes.iter().map(|scheme| format!("{scheme}://")).collect::<Vec<_>>().join(", ")
        )),
    }
}

/// `PUBSUB_EMULATOR_HOST`: host and port without a scheme, as all Google libraries read it.
fn emulator(text: &str) -> Result<String, String> {
    let url = match text.contains("://") {
        true => text.to_owned(),
        false => format!("http://{text}"),
    };
    match Url::parse(&url) {
        Ok(parsed) if parsed.has_host() && matches!(parsed.path(), "" | "/") => Ok(url),
        _ => Err("must be host:port, such as localhost:8085".to_owned()),
    }
}

fn events(raw: &Raw) -> Parsed<Vec<Event>> {
    match list(raw, event, indistinguishable)? {
        events if events.is_empty() => fault("must name at least one event"),
        events => Ok(events),
    }
}

/// Logs are known by topic0 and by their number of topics: two signatures that agree in both cannot be told apart.
pub(super) fn indistinguishable(a: &Event, b: &Event) -> Option<&'static str> {
    (a.selector() == b.selector() && a.num_topics() == b.num_topics())
        .then_some("has the same topic0 and the same number of indexed arguments as")
}

fn event(raw: &Raw) -> Parsed<Event> {
    let Ok(event) = Event::parse(&text(raw)?) else {
        return fault(
            "must be an event's signature: write it like \"Approved(address indexed approver, uint256 amount)\"",
        );
    };
    if event.anonymous {
        return fault("must not be anonymous: an anonymous event has no topic0 to be known by");
    }
    for (position, input) in event.inputs.iter().enumerate() {
        if input.resolve().is_err() {
            return fault(format!("argument {} has a type that does not exist", position + 1));
        }
    }
    if event.num_topics() > 4 {
        return fault("must have at most 3 indexed arguments");
    }
    let mut names = BTreeSet::new();
    for (position, input) in event.inputs.iter().enumerate() {
        // An argument without a name is published as arg0, arg1, …
        let name = match input.name.as_str() {
            "" => format!("arg{position}"),
            name => name.to_owned(),
        };
        if !names.insert(name) {
            return fault(format!("argument {} has the name of an earlier one", position + 1));
        }
    }
    Ok(event)
}

/// `getEscrowCount()`: what it returns is a number, or a truth value, in the first word.
fn function(text: &str) -> Parsed<Function> {
    match Function::parse(text) {
        Ok(function) if function.inputs.is_empty() => Ok(function),
        _ => fault("must be a function without arguments, such as \"getEscrowCount()\""),
    }
}

/// `Approved = approvalsCount()`
fn count_call(raw: &Raw) -> Parsed<CountCall> {
    let text = text(raw)?;
    let Some((event, call)) = text.split_once('=') else {
        return fault("must be an event's name and a function, such as \"Approved = approvalsCount()\"");
    };
    Ok(CountCall { event: event.trim().to_owned(), function: function(call.trim())? })
}

/// `cap = up to # blocks`
fn refusal_text(raw: &Raw) -> Parsed<RefusalText> {
    const MEANINGS: [(&str, Meaning); 9] = [
        ("wait", Meaning::Wait),
        ("halve", Meaning::Halve),
        ("cap", Meaning::Cap),
        ("addresses", Meaning::Addresses),
        ("batch", Meaning::Batch),
        ("behind", Meaning::Behind),
        ("unsupported", Meaning::Unsupported),
        ("pruned", Meaning::Pruned),
        ("fault", Meaning::Fault),
    ];
    let text = text(raw)?;
    let (word, says) = text.split_once('=').unwrap_or((&text, ""));
    let meaning = MEANINGS.iter().find(|(name, _)| *name == word.trim());
    let says = says.split_whitespace().collect::<Vec<_>>().join(" ").to_lowercase();
    match meaning {
        Some((_, meaning)) if says.starts_with(|c: char| c.is_alphanumeric()) => {
            Ok(RefusalText { meaning: *meaning, says })
        }
        _ => {
            let words: Vec<&str> = MEANINGS.iter().map(|(name, _)| *name).collect();
            fault(format!(
                "must be one of {}, an equals sign, and words of the provider's message in which # stands for a number, such \
                 as \"cap = up to # blocks\"",
                words.join(", ")
            ))
        }
    }
}

fn ordering(raw: &Raw) -> Parsed<Ordering> {
    let text = text(raw)?;
    let buckets = text.strip_prefix("bucket:").map(str::parse);
    match (text.as_str(), buckets) {
        ("escrow", _) => Ok(Ordering::Escrow),
        ("none", _) => Ok(Ordering::None),
        (_, Some(Ok(buckets))) => Ok(Ordering::Bucket(buckets)),
        _ => fault("must be \"escrow\", \"none\" or \"bucket:N\" with N at least 1, such as \"bucket:64\""),
    }
}

/// `PORT`: as Cloud Run gives it, on all addresses.
fn port(text: &str) -> Result<String, String> {
    match text.parse::<u16>() {
        Ok(port) => Ok(format!("0.0.0.0:{port}")),
        Err(_) => Err("must be a port number, such as 8080".to_owned()),
    }
}

fn listen(raw: &Raw) -> Parsed<Option<SocketAddr>> {
    match text(raw)?.as_str() {
        "off" => Ok(None),
        text => match text.parse() {
            Ok(address) => Ok(Some(address)),
            Err(_) => fault("must be IP:port, such as \"127.0.0.1:8080\" or \"0.0.0.0:8080\", or \"off\""),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reason<T: std::fmt::Debug>(parsed: Parsed<T>) -> String {
        let faults = parsed.expect_err("must be refused");
        let reasons: Vec<_> = faults.into_iter().map(|fault| fault.reason).collect();
        reasons.join("; ")
    }

    fn texts(items: &[&str]) -> Raw {
        let items = items.iter().map(|&item| Raw::Text(item.to_owned()));
        Raw::List(items.collect())
    }

    #[test]
    fn every_key_has_a_section_a_name_and_a_valid_default() {
        let mut paths = BTreeSet::new();
        for key in KEYS {
            assert!(paths.insert(key.path), "{} twice", key.path);
            assert_eq!(format!("{}.{}", key.section(), key.name()), key.path);
            assert_eq!(key.default.is_some(), key.default_value().is_some());
        }
    }

    /// The topic0 of each signature seen in the wild begins with these digits; they are facts, not computed here.
    #[test]
    fn the_default_signatures_are_those_seen_in_the_wild() {
        let parsed = |key: &Key| {
            let raw = Raw::List(
                key.default_value()
                    .and_then(|value| value.into_array())
                    .expect("a list")
                    .iter()
                    .map(|value| Raw::Text(value.as_str().expect("a string").to_owned()))
                    .collect(),
            );
            let prefixes: Vec<_> = events(&raw)
                .expect("valid")
                .iter()
                .map(|event| (event.name.clone(), event.selector().to_string()[..10].to_owned()))
                .collect();
            prefixes
        };
        let expected = |pairs: &[(&str, &str)]| {
            let pairs = pairs.iter().map(|&(a, b)| (a.to_owned(), b.to_owned()));
            pairs.collect::<Vec<_>>()
        };
        assert_eq!(
            parsed(&FACTORY_EVENTS.key),
            expected(&[("EscrowDeployed", "0x94de54d4"), ("EscrowDeployed", "0x3c9dc28f"),])
        );
        assert_eq!(
            parsed(&ESCROW_EVENTS.key),
            expected(&[
                ("Approved", "0x5d91bd0c"),
                ("EscrowReleased", "0xa064882c"),
                ("EscrowReleased", "0xe327b247"),
                ("EscrowReleased", "0xe2dfcde5"),
                ("EscrowRefunded", "0xedd9332b"),
                ("EscrowRefunded", "0x894ce7cc"),
                ("EscrowRefunded", "0xefe2e8d9"),
            ])
        );
    }

    #[test]
    fn an_address_is_accepted_unless_its_checksum_says_a_digit_is_wrong() {
        for good in [
            "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed",
            "0x5aaeb6053f3e94c9b9a09f33669435e7ef1beaed",
            "0x5AAEB6053F3E94C9B9A09F33669435E7EF1BEAED",
        ] {
            assert!(address(&Raw::Text(good.to_owned())).is_ok(), "{good}");
        }
        for (bad, why) in [
            ("0x5aAeb6053F3E94C9b9A09f33669435E7Ef1Beaed", "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed"),
            ("5aaeb6053f3e94c9b9a09f33669435e7ef1beaed", "40 hex digits"),
            ("0x5aaeb6053f3e94c9b9a09f33669435e7ef1beae", "40 hex digits"),
            ("0x5aaeb6053f3e94c9b9a09f33669435e7ef1beaeg", "40 hex digits"),
            ("0x0000000000000000000000000000000000000000", "zero address"),
        ] {
            let reason = reason(address(&Raw::Text(bad.to_owned())));
            assert!(reason.contains(why), "{bad}: {reason}");
        }
    }

    #[test]
    fn durations_need_a_unit_and_more_than_nothing() {
        for (text, millis) in [("200ms", 200), ("4s", 4_000), ("5m", 300_000), ("1m 30s", 90_000)] {
            let parsed = duration(&Raw::Text(text.to_owned()));
            assert_eq!(parsed, Ok(Duration::from_millis(millis)), "{text}");
        }
        for raw in [
            Raw::Text("4".to_owned()),
            Raw::Text("4 parsecs".to_owned()),
            Raw::Text("-4s".to_owned()),
            Raw::Text("0s".to_owned()),
            Raw::Text(String::new()),
            Raw::Integer(4),
            Raw::List(vec![]),
        ] {
            assert!(duration(&raw).is_err(), "{raw:?}");
        }
    }

    #[test]
    fn the_plans_variables_have_their_own_form() {
        for (rewrite, text, rewritten) in [
            (seconds as fn(&str) -> Result<String, String>, "4", Some("4s")),
            (seconds, "0.5", Some("500ms")),
            (seconds, "-1", None),
            (seconds, "NaN", None),
            (seconds, "4s", None),
            (emulator, "localhost:8085", Some("http://localhost:8085")),
            (emulator, "[::1]:8085", Some("http://[::1]:8085")),
            (emulator, "http://pubsub:8085", Some("http://pubsub:8085")),
            (emulator, "a b", None),
            (emulator, "host/path", None),
            (port, "8080", Some("0.0.0.0:8080")),
            (port, "70000", None),
            (port, "tcp://10.0.0.1:80", None),
        ] {
            assert_eq!(rewrite(text).ok().as_deref(), rewritten, "{text}");
        }
    }

    #[test]
    fn urls_need_a_known_scheme_and_a_host_and_stand_once() {
        let good = ["http://a", "https://b/v2/KEY", "ws://c:1", "wss://d"];
        assert_eq!(urls(&texts(&good)).map(|urls| urls.len()), Ok(4));
        for bad in ["ftp://a", "a.example/v2/KEY", "http://", "localhost:8545", ""] {
            let reason = reason(urls(&texts(&[bad])));
            assert!(!reason.contains("KEY"), "{reason}");
        }
        assert!(reason(urls(&texts(&["http://a", "http://a/"]))).contains("same as item 1"));
        assert!(reason(urls(&texts(&[]))).contains("at least one"));
    }

    #[test]
    fn all_bad_signatures_are_told_with_their_position() {
        let raw = texts(&[
            "Fine(address indexed a)",
            "Unclosed(address",
            "Wrong(adress a)",
            "Hidden(uint256 a) anonymous",
            "Many(bool indexed a, bool indexed b, bool indexed c, bool indexed d)",
            "Twice(bool a, bool a)",
            "Fine(address indexed other)",
            "Fine(address a)",
        ]);
        let faults = events(&raw).expect_err("must be refused");
        let told: Vec<_> = faults.iter().map(|fault| (fault.item, fault.reason.as_str())).collect();
        let expected = [
            (1, "signature"),
            (2, "argument 1 has a type that does not exist"),
            (3, "anonymous"),
            (4, "at most 3 indexed"),
            (5, "argument 2 has the name"),
            (6, "same number of indexed arguments as item 1"),
        ];
        assert_eq!(told.len(), expected.len(), "{told:?}");
        for ((item, reason), (position, words)) in told.iter().zip(expected) {
            assert_eq!(*item, Some(position), "{reason}");
            assert!(reason.contains(words), "{reason}");
        }
    }

    #[test]
    fn numbers_outside_what_makes_sense_are_refused() {
        assert_eq!(whole(&Raw::Integer(0)), Ok(0));
        assert!(reason(whole(&Raw::Integer(-1))).contains("negative"));
        assert!(reason(whole(&Raw::Integer(1 << 70))).contains("too large"));
        assert!(reason(whole(&Raw::Float(2.5))).contains("whole number, not a fraction"));
        assert!(reason(whole(&Raw::Text("12".to_owned()))).contains("not a string"));
        assert!(reason(non_zero::<NonZeroU32>(&Raw::Integer(0))).contains("at least 1"));
        assert!(reason(non_zero::<NonZeroU32>(&Raw::Integer(1 << 32))).contains("too large"));
        assert!(reason(max_outstanding(&Raw::Integer(100_001))).contains("at most 100000"));
    }

    #[test]
    fn orderings_and_listen_addresses_are_read_as_documented() {
        let bucket = NonZeroU32::new(64).map(Ordering::Bucket);
        for (text, expected) in [
            ("escrow", Some(Ordering::Escrow)),
            ("none", Some(Ordering::None)),
            ("bucket:64", bucket),
            ("bucket:0", None),
            ("bucket", None),
        ] {
            assert_eq!(ordering(&Raw::Text(text.to_owned())).ok(), expected, "{text}");
        }
        for (text, expected) in [
            ("off", Some(None)),
            ("[::1]:80", Some("[::1]:80".parse().ok())),
            ("localhost:80", None),
            ("8080", None),
        ] {
            assert_eq!(listen(&Raw::Text(text.to_owned())).ok(), expected, "{text}");
        }
    }
}
