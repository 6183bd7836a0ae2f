//! `relayer check`: tries everything a run needs, without relaying anything.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use alloy::primitives::Address;

use crate::config::{Config, SinkKind};
use crate::event::{BlockRange, Header, Log, Recognised, Role, Signatures};
use crate::pubsub::{Topic, find_topic};
use crate::rpc::{Refusing, Rpc};
use crate::scan::{Answer, BlockTag, Call, LogFilter, Refused, Span};
use crate::store::{self, Added, Store};
use crate::{identity, sample, signatures, snapshot};

/// Ranges of `rpc.max_range` blocks in which the factory's logs are looked for, from the head back, at most.
const EVENT_RANGES: usize = 8;
/// Logs after which no more are looked for.
const ENOUGH_LOGS: usize = 20;
/// Escrows whose logs are looked at.
const SAMPLED_ESCROWS: usize = 5;

/// One thing tried.
#[derive(Clone, Debug)]
pub struct Finding {
    /// Whether a run can rely on it.
    pub outcome: Outcome,
    /// What was tried.
    pub name: String,
    /// What was found, and what to do.
    pub detail: String,
}

/// How it went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// As a run needs it.
    Good,
    /// A run copes, or waits.
    Notable,
    /// A run would not work.
    Bad,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mark = match self.outcome {
            Outcome::Good => "ok  ",
            Outcome::Notable => "note",
            Outcome::Bad => "FAIL",
        };
        write!(f, "{mark}  {}: {}", self.name, self.detail)
    }
}

fn finding(outcome: Outcome, name: impl Into<String>, detail: impl Into<String>) -> Finding {
    Finding { outcome, name: name.into(), detail: detail.into() }
}

/// Tries everything, telling each finding as it comes. `true`: a run can start.
pub async fn check(config: &Config, mut tell: impl FnMut(&Finding)) -> bool {
    let mut all_good = true;
    let mut say = |found: Finding| {
        all_good &= found.outcome != Outcome::Bad;
        tell(&found);
    };
    say(match signatures(config) {
        Ok(signatures) => {
            finding(Outcome::Good, "events", format!("{} signatures", signatures.identity().len()))
        }
        Err(error) => finding(Outcome::Bad, "events", error.to_string()),
    });
    match Rpc::new(config.chain.id, &config.rpc) {
        Ok(rpc) => {
            for provider in 0..config.rpc.urls.len() {
                for found in check_provider(config, &rpc, provider).await {
                    say(found);
                }
            }
        }
        Err(error) => say(finding(Outcome::Bad, "rpc", error.to_string())),
    }
    say(check_storage(config));
    if let Some(folder) = &config.storage.snapshot_dir {
        say(check_snapshots(config, folder));
    }
    say(check_sink(config).await);
    all_good
}

async fn check_provider(config: &Config, rpc: &Rpc, provider: usize) -> Vec<Finding> {
    let url = &config.rpc.urls[provider];
    let name = |what: &str| format!("rpc {url} {what}");
    let calls = [
        Call::Header(BlockTag::Latest),
        Call::Header(BlockTag::Finalized),
        Call::Code(config.factory.address),
    ];
    let outcomes = match rpc.try_once(provider, &calls).await {
        Ok(outcomes) => outcomes,
        Err(wrong) => return vec![finding(Outcome::Bad, name("chain id"), wrong.to_string())],
    };
    let mut outcomes = outcomes.into_iter();
    let head = match outcomes.next() {
        Some(Ok(answer)) => answer.header(),
        Some(Err(refusing)) => return vec![finding(Outcome::Bad, name("answers"), refusing.message)],
        None => None,
    };
    let Some(head) = head else {
        return vec![finding(Outcome::Bad, name("answers"), "it has no latest block")];
    };
    let mut found = vec![finding(Outcome::Good, name("chain id"), format!("{}", config.chain.id))];
    found.push(check_head(config, name("head"), head));
    found.push(match outcomes.next() {
        Some(Ok(Answer::Header(Some(header)))) => {
            finding(Outcome::Good, name("finalized"), format!("block {}", header.block.number))
        }
        _ => {
            let depth = config.chain.finality_depth;
            finding(
                Outcome::Notable,
                name("finalized"),
                format!("unknown: {depth} blocks below the head count as final"),
            )
        }
    });
    found.push(match outcomes.next() {
        Some(Ok(Answer::Code(true))) => {
            finding(Outcome::Good, name("factory"), format!("{:#x} has code", config.factory.address))
        }
        Some(Ok(_)) | None => finding(
            Outcome::Bad,
            name("factory"),
            format!(
                "factory.address {:#x} has no code on chain {}: a wrong address, or a node still syncing",
                config.factory.address, config.chain.id
            ),
        ),
        Some(Err(refusing)) => finding(Outcome::Bad, name("factory"), refusing.message),
    });
    found.push(check_range(config, rpc, provider, head, name("range")).await);
    found.push(check_addresses(config, rpc, provider, head, name("addresses")).await);
    found.push(check_events(config, rpc, provider, head, name("events")).await);
    found
}

/// Whether the contracts speak as the configuration has it: logs of the factory, without a topic filter, from the head
/// back and from the start, and of some escrows that turned up there.
async fn check_events(config: &Config, rpc: &Rpc, provider: usize, head: Header, name: String) -> Finding {
    let signatures = match signatures(config) {
        Ok(signatures) => signatures,
        Err(error) => return finding(Outcome::Bad, name, error.to_string()),
    };
    let (factory, step) = (config.factory.address, config.rpc.max_range.get());
    let start = config.chain.start_block.unwrap_or(0).min(head.block.number);
    let (mut logs, mut looked_at, mut next) = (Vec::new(), 0, Some(head.block.number));
    let beginning = BlockRange::starting_at(start, step, head.block.number);
    for _ in 0..EVENT_RANGES {
        // Back from the head; at last the beginning, where a factory that is silent now will have spoken.
        let Some(to) = next.filter(|to| *to >= start) else { break };
        let from = to.saturating_sub(step - 1).max(start);
        let range = BlockRange::new(from, to).expect("from is not above to");
        match sample::logs_of(rpc, provider, &[factory], range).await {
            Ok((found, part)) => {
                logs.extend(found);
                looked_at += part.blocks();
                next = part.from().checked_sub(1);
            }
            Err(text) => return finding(Outcome::Notable, name, format!("not looked at ({text})")),
        }
        if logs.len() >= ENOUGH_LOGS {
            break;
        }
    }
    if let (Some(beginning), true) = (beginning, logs.is_empty() && next.is_some_and(|next| next >= start))
        && let Ok((found, part)) = sample::logs_of(rpc, provider, &[factory], beginning).await
    {
        logs.extend(found);
        looked_at += part.blocks();
    }
    let ignored = sample::ignored(config);
    let of_factory = sample::tally(&signatures, &ignored, factory, &logs);
    let escrows = announced(&signatures, &logs);
    if let (false, Some(last)) = (escrows.is_empty(), BlockRange::new(start, head.block.number)) {
        let last = last.tail(head.block.number.saturating_sub(step - 1)).unwrap_or(last);
        if let Ok((found, _)) = sample::logs_of(rpc, provider, &escrows, last).await {
            logs.extend(found);
        }
    }
    let all = sample::tally(&signatures, &ignored, factory, &logs);
    let unknown: Vec<String> = all
        .unknown
        .iter()
        .map(|unknown| {
            format!("topic0 {} of {:#x} ({})", unknown.topic, unknown.example.address, unknown.key())
        })
        .collect();
    let unknown = unknown.join(", ");
    match (of_factory.known, all.unknown.is_empty()) {
        (0, true) => finding(
            Outcome::Notable,
            name,
            format!(
                "the factory says nothing in the {looked_at} blocks looked at: nothing to compare the signatures with"
            ),
        ),
        (0, false) => finding(
            Outcome::Bad,
            name,
            format!(
                "the factory speaks, but none of its events is known: {unknown}. A new generation of the contracts? Add its \
                 signatures"
            ),
        ),
        (_, true) => {
            let known = all.known;
            finding(
                Outcome::Good,
                name,
                format!("{known} logs of the factory and {} escrows, all known", escrows.len()),
            )
        }
        (_, false) => finding(
            Outcome::Notable,
            name,
            format!(
                "known ones and others: {unknown}. Add their signatures, or put them into audit.ignored_events"
            ),
        ),
    }
}

/// Some of the escrows announced in these logs, the last ones.
fn announced(signatures: &Signatures, logs: &[Log]) -> Vec<Address> {
    let mut escrows: Vec<Address> = Vec::new();
    for log in logs.iter().rev() {
        if let Recognised::Known(decoded) = signatures.recognise(Role::Announcement, log) {
            let escrow = decoded.escrow(log);
            if escrows.len() < SAMPLED_ESCROWS && !escrows.contains(&escrow) {
                escrows.push(escrow);
            }
        }
    }
    escrows
}

fn check_head(config: &Config, name: String, head: Header) -> Finding {
    let number = head.block.number;
    match config.chain.start_block {
        Some(start) if start > number => finding(
            Outcome::Notable,
            name,
            format!("block {number}, below chain.start_block {start}: a run waits for it"),
        ),
        _ => finding(Outcome::Good, name, format!("block {number}")),
    }
}

/// Whether the provider takes `rpc.max_range` blocks in one request.
async fn check_range(config: &Config, rpc: &Rpc, provider: usize, head: Header, name: String) -> Finding {
    let to = head.block.number;
    let from = to.saturating_sub(config.rpc.max_range.get() - 1);
    let range = BlockRange::new(from, to).expect("from is not above to");
    let blocks = range.blocks();
    let filter = filter(config, Span::Range(range), vec![config.factory.address]);
    match try_logs(rpc, provider, filter).await {
        Ok(()) => finding(Outcome::Good, name, format!("{blocks} blocks in one request")),
        Err(text) => finding(
            Outcome::Notable,
            name,
            format!("{blocks} blocks are refused ({text}): a run asks for fewer"),
        ),
    }
}

/// Whether the provider takes `rpc.max_addresses` addresses in one filter.
async fn check_addresses(config: &Config, rpc: &Rpc, provider: usize, head: Header, name: String) -> Finding {
    let count = config.rpc.max_addresses.get();
    let mut addresses = vec![config.factory.address];
    addresses.extend((1..count).map(|number| Address::left_padding_from(&number.to_be_bytes())));
    let filter = filter(config, Span::Block(head.block.hash), addresses);
    match try_logs(rpc, provider, filter).await {
        Ok(()) => finding(Outcome::Good, name, format!("{count} addresses in one filter")),
        Err(text) => finding(
            Outcome::Notable,
            name,
            format!("{count} addresses are refused ({text}): a run asks for fewer"),
        ),
    }
}

fn filter(config: &Config, span: Span, addresses: Vec<Address>) -> LogFilter {
    let topics: Vec<_> =
        config.factory.events.iter().chain(&config.escrow.events).map(|event| event.selector()).collect();
    LogFilter { span, addresses: addresses.into(), topics: Arc::from(topics) }
}

async fn try_logs(rpc: &Rpc, provider: usize, filter: LogFilter) -> Result<(), String> {
    let outcomes =
        rpc.try_once(provider, &[Call::Logs(filter)]).await.map_err(|wrong: Refused| wrong.to_string())?;
    match outcomes.into_iter().next() {
        Some(Err(Refusing { message, .. })) => Err(message),
        Some(Ok(_)) | None => Ok(()),
    }
}

fn check_storage(config: &Config) -> Finding {
    let path = &config.storage.path;
    let name = format!("storage {}", path.display());
    if let Err(error) = store::suits(path) {
        return finding(Outcome::Bad, name, error.to_string());
    }
    if !path.exists() {
        return match (config.chain.start_block, writable(path)) {
            (None, _) => finding(
                Outcome::Bad,
                name,
                "new, and chain.start_block is not set: set it to the block that deployed the factory",
            ),
            (Some(start), Ok(())) => {
                finding(Outcome::Good, name, format!("new: reading will start at block {start}"))
            }
            (Some(_), Err(error)) => finding(
                Outcome::Bad,
                name,
                format!("cannot be created: {error}; give storage.path a writable directory"),
            ),
        };
    }
    let signatures = match signatures(config) {
        Ok(signatures) => signatures,
        Err(error) => return finding(Outcome::Bad, name, error.to_string()),
    };
    let asked = identity(config, &signatures);
    match Store::open(path, asked.clone(), config.chain.start_block, Added::Leave) {
        Ok(store) if store.identity().signatures != asked.signatures => {
            let known = &store.identity().signatures;
            let added: Vec<&str> =
                asked.signatures.iter().filter(|it| !known.contains(it)).map(String::as_str).collect();
            finding(
                Outcome::Notable,
                name,
                format!(
                    "it was made without {}: a run reads the history from block {} on once more and publishes what it \
                     finds as late, or, with --from-now, relays these events from the next block on",
                    added.join(" and "),
                    store.start_block()
                ),
            )
        }
        Ok(store) => {
            let escrows = store.registry().len();
            finding(
                Outcome::Good,
                name,
                format!(
                    "next block {}, {escrows} escrows, {} events wait",
                    store.next_block(),
                    store.waiting()
                ),
            )
        }
        Err(error) => finding(Outcome::Bad, name, error.to_string()),
    }
}

fn check_snapshots(config: &Config, folder: &Path) -> Finding {
    let name = format!("snapshots {}", folder.display());
    if let Err(error) = writable(&folder.join("probe")) {
        let remedy = "mount the volume or make the folder, and let this user write to storage.snapshot_dir";
        return finding(Outcome::Bad, name, format!("cannot be written: {error}; {remedy}"));
    }
    let listed = snapshot::configured(&config.storage).map(|snapshots| snapshots.list_whole()).transpose();
    let listed = match listed {
        Ok(listed) => listed.unwrap_or_default(),
        Err(error) => return finding(Outcome::Bad, name, error.to_string()),
    };
    match listed.iter().find_map(|listed| listed.manifest.as_ref().ok()) {
        None if listed.is_empty() => finding(Outcome::Good, name, "can be written; there are none yet"),
        None => finding(Outcome::Bad, name, "none of those there are can be read"),
        Some(newest) => {
            let (file, made_at) = (newest.file(), &newest.made_at);
            finding(Outcome::Good, name, format!("can be written; the newest is {file} of {made_at}"))
        }
    }
}

/// Whether a file could be made there; none is left behind.
fn writable(path: &Path) -> std::io::Result<()> {
    let mut probe = path.as_os_str().to_owned();
    probe.push(format!(".check-{}", std::process::id()));
    std::fs::File::create_new(&probe)?;
    std::fs::remove_file(&probe)
}

async fn check_sink(config: &Config) -> Finding {
    match &config.sink.kind {
        SinkKind::Stdout => finding(Outcome::Good, "sink", "standard output"),
        SinkKind::File { path } => {
            let name = format!("sink {}", path.display());
            let existing = path.exists();
            let open = || std::fs::OpenOptions::new().append(true).open(path).map(drop);
            let tried = if existing { open() } else { writable(path) };
            match tried {
                Ok(()) => finding(Outcome::Good, name, "can be written"),
                Err(error) => finding(Outcome::Bad, name, format!("cannot be written: {error}")),
            }
        }
        SinkKind::Pubsub { .. } => match find_topic(&config.sink).await {
            Ok(Topic::There(detail)) => finding(Outcome::Good, "sink Pub/Sub", detail),
            Ok(Topic::Hidden(detail)) => finding(Outcome::Notable, "sink Pub/Sub", detail),
            Err(detail) => finding(Outcome::Bad, "sink Pub/Sub", detail),
        },
    }
}
