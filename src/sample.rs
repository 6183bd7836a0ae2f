//! Logs read without a topic filter, now and then: what the relayer asks for by topic can never show it that the
//! contracts have begun to speak otherwise.
//!
//! A sample is outside the way of an event: it is asked once, of the provider in use, and whatever comes of it changes
//! neither what is read nor what is published.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use alloy::primitives::{Address, B256};
use tokio::time::sleep;
use tracing::{debug, warn};

use crate::config::Config;
use crate::event::{BlockRange, Log, Role, Signatures};
use crate::rpc::Rpc;
use crate::rpc::verdict::Verdict;
use crate::scan::{Answer, Call, LogFilter, Span};
use crate::store::{Store, StoreError, on_disk};
use crate::telemetry::metrics;

/// Escrows whose logs are looked at beside the factory's.
const ESCROWS: usize = 10;
/// Smaller ranges tried where a provider refuses one.
const ATTEMPTS: u32 = 4;
/// Between attempts while none has been answered yet.
const UNANSWERED: Duration = Duration::from_secs(60);

/// An event of the factory or of an escrow that no signature knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unknown {
    /// Who may emit it.
    pub role: Role,
    /// Its topic0.
    pub topic: B256,
    /// One of the logs with it.
    pub example: Log,
    /// How many there were.
    pub logs: u64,
}

impl Unknown {
    /// Where its signature belongs.
    pub fn key(&self) -> &'static str {
        match self.role {
            Role::Announcement => "factory.events",
            Role::Lifecycle => "escrow.events",
        }
    }
}

/// What a sample showed.
#[derive(Clone, Debug, Default)]
pub struct Sample {
    /// Logs of events that are relayed.
    pub known: u64,
    /// Those that are not, by their topic0.
    pub unknown: Vec<Unknown>,
}

/// Which events the logs are of. `ignored`: topic0s of events that are known and not relayed.
pub fn tally(signatures: &Signatures, ignored: &[B256], factory: Address, logs: &[Log]) -> Sample {
    let mut known = 0;
    let mut unknown: BTreeMap<(bool, B256), Unknown> = BTreeMap::new();
    for log in logs {
        // An anonymous event has no topic0 to be known by.
        let Some(topic) = log.topics.first().copied() else {
            continue;
        };
        let role = if log.address == factory { Role::Announcement } else { Role::Lifecycle };
        if signatures.topics().contains(&topic) {
            known += 1;
        } else if !ignored.contains(&topic) {
            let entry = unknown.entry((role == Role::Lifecycle, topic));
            entry.or_insert_with(|| Unknown { role, topic, example: log.clone(), logs: 0 }).logs += 1;
        }
    }
    Sample { known, unknown: unknown.into_values().collect() }
}

/// Events that are known and not relayed.
pub fn ignored(config: &Config) -> Vec<B256> {
    config.audit.ignored_events.iter().map(|event| event.selector()).collect()
}

/// All logs of these contracts in the range, or in as much of it, from its end, as the provider bears; once, or why not.
pub async fn logs_of(
    rpc: &Rpc,
    provider: usize,
    addresses: &[Address],
    range: BlockRange,
) -> Result<(Vec<Log>, BlockRange), String> {
    let mut blocks = range.blocks();
    let mut refusal = String::new();
    for _ in 0..ATTEMPTS {
        let from = range.to().saturating_sub(blocks.saturating_sub(1)).max(range.from());
        let part = BlockRange::new(from, range.to()).expect("the end of a range");
        let filter = LogFilter {
            span: Span::Range(part),
            addresses: addresses.to_vec().into(),
            topics: Arc::from([]),
        };
        let outcomes =
            rpc.try_once(provider, &[Call::Logs(filter)]).await.map_err(|refused| refused.to_string())?;
        match outcomes.into_iter().next() {
            Some(Ok(answer)) => return Ok((Answer::logs(answer), part)),
            Some(Err(refusing)) => {
                blocks = match refusing.verdict {
                    Verdict::CapRange(cap) => cap.get().min(blocks / 2),
                    Verdict::UseRange { from, to } => (to.saturating_sub(from) + 1).min(blocks / 2),
                    Verdict::Halve | Verdict::Unknown => blocks / 8,
                    _ => return Err(refusing.message),
                };
                refusal = refusing.message;
            }
            None => return Err("no answer".to_owned()),
        }
        if blocks == 0 {
            break;
        }
    }
    Err(refusal)
}

/// Samples at the start and every `audit.sample_interval`; says each unknown event once. Ends only with the store.
pub async fn watch(
    config: Config,
    rpc: Arc<Rpc>,
    store: Arc<Store>,
    signatures: Arc<Signatures>,
) -> Result<(), StoreError> {
    let Some(interval) = config.audit.sample_interval else {
        return Ok(());
    };
    let ignored = ignored(&config);
    let mut said: HashSet<(bool, B256)> = HashSet::new();
    let mut first = true;
    loop {
        let escrows = on_disk(&store, |store| store.recent_escrows(ESCROWS)).await?;
        let addresses: Vec<Address> = [config.factory.address].into_iter().chain(escrows).collect();
        let mut answered = true;
        for range in ranges(&store, config.rpc.max_range.get(), first) {
            match logs_of(&rpc, rpc.provider_in_use(), &addresses, range).await {
                Ok((logs, _)) => say(&tally(&signatures, &ignored, config.factory.address, &logs), &mut said),
                Err(reason) => {
                    debug!(%range, %reason, "A sample without topics was not answered");
                    answered = false;
                }
            }
        }
        first &= !answered;
        sleep(if answered { interval } else { UNANSWERED.min(interval) }).await;
    }
}

/// The last blocks that were read; the first time also the first ones, where the factory began to speak.
fn ranges(store: &Store, blocks: u64, first: bool) -> Vec<BlockRange> {
    let (start, cursor) = (store.start_block(), store.cursor().map(|cursor| cursor.number));
    let beginning = match cursor {
        Some(cursor) => BlockRange::starting_at(start, blocks, cursor),
        None => BlockRange::new(start, start),
    };
    let end = cursor.and_then(|cursor| {
        BlockRange::new(start.max(cursor.saturating_sub(blocks.saturating_sub(1))), cursor)
    });
    let mut ranges: Vec<BlockRange> = beginning.filter(|_| first).into_iter().chain(end).collect();
    ranges.dedup();
    ranges
}

fn say(sample: &Sample, said: &mut HashSet<(bool, B256)>) {
    for unknown in &sample.unknown {
        metrics::unknown_topic(unknown.logs);
        if !said.insert((unknown.role == Role::Lifecycle, unknown.topic)) {
            continue;
        }
        let (log, key) = (&unknown.example, unknown.key());
        warn!(
            topic0 = %unknown.topic,
            emitter = %format_args!("{:#x}", log.address),
            block = log.block.number,
            transaction = %log.transaction_hash,
            "An event that is not relayed: topic0 {}; a new generation of the contracts? Add its signature to {key}, or to \
             audit.ignored_events if it does not matter",
            unknown.topic
        );
    }
}

#[cfg(test)]
mod tests {
    use alloy::json_abi::Event as AbiEvent;

    use super::*;
    use crate::event::BlockRef;

    fn log(address: Address, signature: &str) -> Log {
        let topics = match signature {
            "" => vec![],
            signature => vec![AbiEvent::parse(signature).unwrap().selector()],
        };
        let block = BlockRef { number: 1, hash: B256::ZERO };
        let (transaction_hash, data) = (B256::ZERO, Default::default());
        Log {
            address,
            topics,
            data,
            block,
            transaction_hash,
            transaction_index: 0,
            log_index: 0,
            block_timestamp: None,
        }
    }

    #[test]
    fn what_is_neither_relayed_nor_ignored_is_unknown_once_for_factory_and_escrows_each() {
        let event = |text: &str| AbiEvent::parse(text).unwrap();
        let signatures = Signatures::new(
            &[event("EscrowDeployed(address indexed escrow)")],
            "escrow",
            &[event("Approved(address indexed approver)")],
            &[],
        )
        .unwrap();
        let ignored = [event("EscrowCreated(uint256)").selector()];
        let (factory, escrow) = (Address::repeat_byte(1), Address::repeat_byte(2));
        type Row<'a> = (&'a str, &'a [(Address, &'a str)], u64, &'a [(Role, u64)]);
        let table: [Row<'_>; 6] = [
            ("nothing", &[], 0, &[]),
            ("known", &[(factory, "EscrowDeployed(address)"), (escrow, "Approved(address)")], 2, &[]),
            ("ignored", &[(escrow, "EscrowCreated(uint256)"), (factory, "EscrowCreated(uint256)")], 0, &[]),
            ("anonymous", &[(escrow, "")], 0, &[]),
            ("one twice", &[(escrow, "New()"), (escrow, "New()")], 0, &[(Role::Lifecycle, 2)]),
            (
                "both",
                &[(escrow, "New()"), (factory, "New()"), (escrow, "Approved(address)")],
                1,
                &[(Role::Announcement, 1), (Role::Lifecycle, 1)],
            ),
        ];
        for (what, logs, known, unknown) in table {
            let logs: Vec<Log> = logs.iter().map(|(address, signature)| log(*address, signature)).collect();
            let sample = tally(&signatures, &ignored, factory, &logs);
            let found: Vec<(Role, u64)> =
                sample.unknown.iter().map(|unknown| (unknown.role, unknown.logs)).collect();
            assert_eq!((sample.known, &found[..]), (known, unknown), "{what}");
        }
    }
}
