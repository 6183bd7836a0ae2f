//! What did not get out: shown, tried again, given up.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use alloy::primitives::{Address, B256};
use tokio::sync::oneshot;
use tracing::{info, warn};

use super::rows::{BlockedRow, Discarded, MessageRow, OutboxRow, QuarantinedRow, RetryRow, Shown, Totals};
use super::{Desk, PAGE, Refusal, Replies};
use crate::config::Ordering;
use crate::event::{BlockRef, Log, Recognised, Role, digest};
use crate::publish::{Message, Order};
use crate::scan::{Answer, BlockTag, Call, Chain, LogFilter, Span};
use crate::store::{Blocked, Claimed, Entry, LateStretch, LogId, Place, Quarantined};
use crate::telemetry::metrics;

impl Desk {
    fn chain_id(&self) -> u64 {
        self.config.chain.id
    }

    pub(super) async fn outbox(&self, limit: usize, to: &Replies) -> Result<(), Refusal> {
        let blocked = self.on_disk(|store| store.blocked_len()).await?;
        let quarantined = self.on_disk(|store| store.quarantined_len()).await?;
        let totals = Totals { waiting: self.store.waiting(), blocked, quarantined };
        to.row(&OutboxRow::Totals(totals)).await?;
        let (chain_id, ordering) = (self.chain_id(), self.config.sink.ordering);
        let mut left = limit;
        let rows = self.on_disk(move |store| {
            store.blocked(|Blocked { claimed, refusal }| {
                left = left.checked_sub(1)?;
                let message = message_row(&claimed.entry, chain_id, ordering);
                let (lane, reason, since) = (refusal.lane, refusal.reason, refusal.since);
                Some(BlockedRow { lane, reason, since, message })
            })
        });
        for row in rows.await? {
            to.row(&OutboxRow::Blocked(row)).await?;
        }
        let (mut left, mut after) = (limit, None);
        while left > 0 {
            let page = self.on_disk(move |store| store.quarantined_after(after, left.min(PAGE))).await?;
            let Some(last) = page.last() else { break };
            (left, after) = (left - page.len(), Some(last.place()));
            for log in &page {
                to.row(&OutboxRow::Quarantined(self.quarantined_row(log))).await?;
            }
        }
        self.waiting(limit, to).await
    }

    async fn waiting(&self, limit: usize, to: &Replies) -> Result<(), Refusal> {
        let acknowledged = self.on_disk(|store| store.acknowledged()).await?;
        let (mut left, mut next) = (limit, Some(acknowledged.watermark()));
        while let Some(position) = next.filter(|_| left > 0) {
            let page = self.on_disk(move |store| store.entries_from(position, PAGE)).await?;
            next = page.next;
            let waiting = page.entries.iter().filter(|claimed| !acknowledged.contains(claimed.position));
            for Claimed { entry, .. } in waiting.take(left) {
                left -= 1;
                let row = message_row(entry, self.chain_id(), self.config.sink.ordering);
                to.row(&OutboxRow::Waiting(row)).await?;
            }
        }
        Ok(())
    }

    /// These blocked messages and quarantined logs, whole.
    pub(super) async fn show(&self, event_ids: &[String], to: &Replies) -> Result<(), Refusal> {
        for stuck in self.stuck(event_ids).await? {
            to.row(&self.shown(&stuck)).await?;
        }
        Ok(())
    }

    /// Gives these up. Each is done before the next is looked at.
    pub(super) async fn discard(&self, event_ids: &[String], to: &Replies) -> Result<(), Refusal> {
        for stuck in self.stuck(event_ids).await? {
            let event_id = stuck.event_id(self.chain_id());
            let whole = serde_json::to_string(&self.shown(&stuck));
            let whole = whole.map_err(|error| Refusal::fault(error.to_string()))?;
            warn!(%event_id, %whole, "Giving up on request: {event_id} is not published");
            let done = match &stuck {
                Stuck::Message(blocked) => self.give_up(blocked.claimed.position).await?,
                Stuck::Log(log) => {
                    let id = log.id();
                    self.on_disk(move |store| store.drop_quarantined(id)).await?
                }
            };
            if !done {
                return Err(Refusal::fault(format!(
                    "{event_id} was not discarded: it is not blocked now, or is being offered for the first time since the \
                     start; look at `relayer outbox list`, and try again if it is still there"
                )));
            }
            to.row(&Discarded { event_id }).await?;
        }
        Ok(())
    }

    async fn give_up(&self, position: u64) -> Result<bool, Refusal> {
        match self.orders() {
            None => self.on_disk(move |store| store.give_up(position)).await,
            Some(orders) => {
                let (told, answer) = oneshot::channel();
                let _ = orders.send(Order::GiveUp { position, told }).await;
                answer.await.map_err(|_| stopping())
            }
        }
    }

    /// Offers messages again, and decodes logs again with the signatures of this process.
    pub(super) async fn retry(&self, which: &[String], to: &Replies) -> Result<(), Refusal> {
        let (chain_id, names) = (self.chain_id(), which.to_vec());
        let blocked = self.on_disk(move |store| {
            store.blocked(|Blocked { claimed, refusal }| {
                let its = [refusal.lane, claimed.entry.event_id(chain_id)];
                let meant = names.is_empty() || its.iter().any(|name| names.contains(name));
                meant.then_some((claimed.position, its))
            })
        });
        let blocked: Vec<(u64, [String; 2])> = blocked.await?;
        let positions: Vec<u64> = blocked.iter().map(|(position, _)| *position).collect();
        let of_lanes: BTreeSet<&String> = blocked.iter().flat_map(|(_, names)| names).collect();
        let rest: Vec<String> = which.iter().filter(|name| !of_lanes.contains(name)).cloned().collect();
        let logs = match which.is_empty() {
            true => None,
            // Refused before anything is done, if one of them is nothing.
            false => Some(self.quarantined(&rest).await?),
        };
        if !positions.is_empty() {
            let (messages, running) = match self.orders() {
                None => (positions.len(), false),
                Some(orders) => {
                    let (told, answer) = oneshot::channel();
                    let _ = orders.send(Order::Retry { only: Some(positions), told }).await;
                    (answer.await.map_err(|_| stopping())?, true)
                }
            };
            to.row(&RetryRow::Offered { messages, running }).await?;
        }
        match logs {
            Some(logs) => self.decode_again(&logs, to).await,
            None => {
                let mut after = None;
                loop {
                    let page = self.on_disk(move |store| store.quarantined_after(after, PAGE)).await?;
                    let Some(last) = page.last() else { return Ok(()) };
                    after = Some(last.place());
                    self.decode_again(&page, to).await?;
                }
            }
        }
    }

    /// Relays those of the logs that decode by now, as late: each page in one transaction with its removal from the quarantine.
    async fn decode_again(&self, logs: &[Quarantined], to: &Replies) -> Result<(), Refusal> {
        let mut decodable = Vec::new();
        let mut left: Vec<(String, String)> = Vec::new();
        for quarantined in logs {
            match self.recognise(&log_of(quarantined)) {
                Ok(_) => decodable.push(quarantined),
                Err(reason) => left.push((quarantined.event_id(self.chain_id()), reason)),
            }
        }
        let again = self.read_again(&decodable).await?;
        let mut found = LateStretch::default();
        let mut released: Vec<LogId> = Vec::new();
        let mut relayed = Vec::new();
        for quarantined in decodable {
            let event_id = quarantined.event_id(self.chain_id());
            let seen = again.get(&quarantined.place()).map(|(log, time)| (log, *time, self.recognise(log)));
            let Some((log, time, Ok(known))) = seen else {
                let why = "the node does not show this log now: its block may be another one, or its history is gone";
                left.push((event_id, why.to_owned()));
                continue;
            };
            if known.announces() {
                found.announced.push((known.escrow(log), log.block));
            }
            found.events.push(known.event(self.chain_id(), log, time));
            released.push(quarantined.id());
            relayed.push(event_id);
        }
        found.events.sort_by_key(|event| event.order());
        found.next = found.announced.iter().map(|(_, block)| block.number).min().unwrap_or(0);
        if !released.is_empty() {
            let events = found.events.len();
            let done = self.on_disk(move |store| store.release(&found, &released)).await?;
            let new = done.ok_or_else(|| {
                Refusal::fault("the quarantine has changed meanwhile (a fork, another command): try again")
            })?;
            metrics::late_events(new);
            info!(events, new, "{events} quarantined logs decode by now: {new} late events");
        }
        for event_id in relayed {
            to.row(&RetryRow::Relayed { event_id }).await?;
        }
        for (event_id, reason) in left {
            to.row(&RetryRow::Left { event_id, reason }).await?;
        }
        Ok(())
    }

    fn recognise(&self, log: &Log) -> Result<crate::event::Decoded, String> {
        let role = match log.address == self.config.factory.address {
            true => Role::Announcement,
            false if self.store.registry().counts(&log.address, log.block.number) => Role::Lifecycle,
            false => return Err(format!("{:#x} is not a registered escrow now", log.address)),
        };
        match self.signatures.recognise(role, log) {
            Recognised::Known(known) => Ok(known),
            Recognised::Malformed(reason) => Err(reason),
            Recognised::Unknown => Err("no configured event has its topic0".to_owned()),
        }
    }

    /// These logs as the chain shows them now, with their blocks' times: of what was kept aside only what decodes is known.
    async fn read_again(&self, logs: &[&Quarantined]) -> Result<HashMap<Place, (Log, u64)>, Refusal> {
        let ask = async |calls: Vec<Call>| match calls.is_empty() {
            true => Ok(Vec::new()),
            false => self.rpc.ask(calls).await.map_err(|refused| Refusal::fault(refused.to_string())),
        };
        let numbers: BTreeSet<u64> = logs.iter().map(|log| log.block.0).collect();
        let headers = numbers.iter().map(|number| Call::Header(BlockTag::Number(*number))).collect();
        let headers = ask(headers).await?.into_iter().filter_map(Answer::header);
        let times: HashMap<BlockRef, u64> = headers.map(|header| (header.block, header.timestamp)).collect();
        let mut contracts: BTreeMap<(u64, B256), BTreeSet<Address>> = BTreeMap::new();
        for log in logs.iter().filter(|log| times.contains_key(&block_of(log))) {
            contracts.entry(log.block).or_default().insert(log.address);
        }
        let calls = contracts.into_iter().map(|((_, hash), contracts)| {
            let addresses = contracts.into_iter().collect::<Vec<_>>().into();
            Call::Logs(LogFilter {
                span: Span::Block(hash),
                addresses,
                topics: self.signatures.topics().into(),
            })
        });
        let answered = ask(calls.collect()).await?.into_iter().flat_map(Answer::logs);
        let shown: HashMap<Place, Log> =
            answered.map(|log| ((log.block.number, log.log_index), log)).collect();
        let mut again = HashMap::new();
        for kept in logs {
            let same = shown.get(&kept.place()).filter(|log| digest(log) == digest(&log_of(kept)));
            if let (Some(log), Some(time)) = (same, times.get(&block_of(kept))) {
                again.insert(kept.place(), (log.clone(), *time));
            }
        }
        Ok(again)
    }

    /// What these ids name; refused if one of them is neither blocked nor quarantined.
    async fn stuck(&self, event_ids: &[String]) -> Result<Vec<Stuck>, Refusal> {
        let (chain_id, ids) = (self.chain_id(), event_ids.to_vec());
        let blocked = self.on_disk(move |store| {
            store.blocked(|it| {
                let id = it.claimed.entry.event_id(chain_id);
                ids.contains(&id).then(|| (id, Stuck::Message(Box::new(it))))
            })
        });
        let mut by_id: BTreeMap<String, Stuck> = blocked.await?.into_iter().collect();
        let rest: Vec<String> = event_ids.iter().filter(|id| !by_id.contains_key(*id)).cloned().collect();
        let logs = self.quarantined(&rest).await?.into_iter();
        by_id.extend(logs.map(|log| (log.event_id(chain_id), Stuck::Log(Box::new(log)))));
        Ok(event_ids.iter().filter_map(|id| by_id.remove(id)).collect())
    }

    async fn quarantined(&self, event_ids: &[String]) -> Result<Vec<Quarantined>, Refusal> {
        let mut wanted: BTreeSet<&String> = event_ids.iter().collect();
        let (mut found, mut after) = (Vec::new(), None);
        while !wanted.is_empty() {
            let page = self.on_disk(move |store| store.quarantined_after(after, PAGE)).await?;
            let Some(last) = page.last() else { break };
            after = Some(last.place());
            found.extend(page.into_iter().filter(|log| wanted.remove(&log.event_id(self.chain_id()))));
        }
        match wanted.first() {
            None => Ok(found),
            Some(unknown) => Err(Refusal::usage(format!(
                "{unknown} is neither blocked nor quarantined: `relayer outbox list` shows what is"
            ))),
        }
    }

    fn message(&self, entry: &Entry) -> Message {
        Message::of(entry.clone(), self.chain_id(), self.config.sink.ordering)
    }

    fn quarantined_row(&self, log: &Quarantined) -> QuarantinedRow {
        QuarantinedRow {
            event_id: log.event_id(self.chain_id()),
            contract: format!("{:#x}", log.address),
            topic0: log.topics.first().copied(),
            block: log.block.0,
            log_index: log.log_index,
            reason: log.reason.clone(),
        }
    }

    fn shown(&self, stuck: &Stuck) -> Shown {
        match stuck {
            Stuck::Message(blocked) => {
                let message = self.message(&blocked.claimed.entry);
                let attributes = message.attributes.into_iter().map(|(name, value)| (name.to_owned(), value));
                Shown::Message {
                    event_id: stuck.event_id(self.chain_id()),
                    lane: blocked.refusal.lane.clone(),
                    reason: blocked.refusal.reason.clone(),
                    ordering_key: message.ordering_key,
                    attributes: attributes.collect(),
                    data: serde_json::from_slice(&message.data).unwrap_or_default(),
                }
            }
            Stuck::Log(log) => Shown::Log {
                event_id: stuck.event_id(self.chain_id()),
                contract: log.address,
                topics: log.topics.clone(),
                data: log.data.clone().into(),
                block: log.block.0,
                block_hash: log.block.1,
                transaction_hash: log.transaction_hash,
                log_index: log.log_index,
                reason: log.reason.clone(),
            },
        }
    }
}

/// What does not get out by itself.
enum Stuck {
    Message(Box<Blocked>),
    Log(Box<Quarantined>),
}

impl Stuck {
    fn event_id(&self, chain_id: u64) -> String {
        match self {
            Self::Message(blocked) => blocked.claimed.entry.event_id(chain_id),
            Self::Log(log) => log.event_id(chain_id),
        }
    }
}

pub(super) fn stopping() -> Refusal {
    Refusal::fault("the relayer is stopping, or publishes nothing any more: try again when it runs")
}

fn message_row(entry: &Entry, chain_id: u64, ordering: Ordering) -> MessageRow {
    MessageRow {
        event_id: entry.event_id(chain_id),
        event_type: entry.attributes(chain_id).event_type,
        escrow: format!("{:#x}", entry.escrow),
        sequence: entry.sequence,
        block: entry.block_number,
        stored_at: entry.stored_at,
        size: Message::of(entry.clone(), chain_id, ordering).size(),
    }
}

fn block_of(quarantined: &Quarantined) -> BlockRef {
    BlockRef { number: quarantined.block.0, hash: quarantined.block.1 }
}

/// As much of it as was kept: enough to decode it, not to encode it.
fn log_of(quarantined: &Quarantined) -> Log {
    Log {
        address: quarantined.address,
        topics: quarantined.topics.clone(),
        data: quarantined.data.clone().into(),
        block: block_of(quarantined),
        transaction_hash: quarantined.transaction_hash,
        transaction_index: 0,
        log_index: quarantined.log_index,
        block_timestamp: None,
    }
}
