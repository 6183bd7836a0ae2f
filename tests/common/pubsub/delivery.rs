//! What one subscription still has to deliver, and to whom it lent what.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    time::{Duration, Instant},
};

use googleapis_tonic_google_pubsub_v1::google::pubsub::v1::ReceivedMessage;
use tonic::Status;

use super::{Message, Subscription, invalid};

/// Delivers at least once. With ordering, a key's messages come in order, to one consumer at a time; if one of them
/// is not acknowledged, it and all later ones of its key come again.
pub struct Delivery {
    settings: Subscription,
    filter: Filter,
    /// In the order of their `position`.
    waiting: VecDeque<Entry>,
    leased: BTreeMap<u64, Lease>,
    /// With ordering: who has messages of a key, and how many.
    holders: HashMap<String, (u64, usize)>,
    next_position: u64,
    next_lease: u64,
}

struct Entry {
    position: u64,
    message: Message,
}

struct Lease {
    entry: Entry,
    consumer: u64,
    until: Instant,
}

impl Delivery {
    pub fn new(settings: &Subscription) -> Result<Delivery, Status> {
        Ok(Delivery {
            settings: settings.clone(),
            filter: Filter::parse(&settings.filter)?,
            waiting: VecDeque::new(),
            leased: BTreeMap::new(),
            holders: HashMap::new(),
            next_position: 0,
            next_lease: 0,
        })
    }

    pub fn settings(&self) -> &Subscription {
        &self.settings
    }

    pub fn ordered(&self) -> bool {
        self.settings.enable_message_ordering
    }

    /// Of a message just published: takes it in if it is this subscription's.
    pub fn offer(&mut self, message: &Message) {
        if message.topic == self.settings.topic && self.filter.lets_pass(message) {
            self.waiting.push_back(Entry { position: self.next_position, message: message.clone() });
            self.next_position += 1;
        }
    }

    /// Lends up to `max` messages, and says when the next lease runs out.
    pub fn take(
        &mut self,
        consumer: u64,
        max: usize,
        lease: Option<Duration>,
    ) -> (Vec<ReceivedMessage>, Option<Instant>) {
        let now = Instant::now();
        let expired = self.leased.iter().filter(|(_, lease)| lease.until <= now).map(|(id, _)| *id);
        for id in expired.collect::<Vec<_>>() {
            self.give_back(id);
        }

        let until = now + lease.unwrap_or(Duration::from_secs(self.settings.ack_deadline_seconds as u64));
        let mut taken = vec![];
        let mut passed_over = VecDeque::new();
        while taken.len() < max {
            let Some(entry) = self.waiting.pop_front() else {
                break;
            };
            let key = entry.message.ordering_key.clone();
            if self.is_bound(&key) {
                let (holder, held) = self.holders.entry(key).or_insert((consumer, 0));
                if *holder != consumer {
                    passed_over.push_back(entry);
                    continue;
                }
                *held += 1;
            }
            self.next_lease += 1;
            taken.push(ReceivedMessage {
                ack_id: self.next_lease.to_string(),
                message: Some(entry.message.to_proto()),
                delivery_attempt: 0, // said only of subscriptions with a dead-letter topic
            });
            self.leased.insert(self.next_lease, Lease { entry, consumer, until });
        }
        passed_over.append(&mut self.waiting);
        self.waiting = passed_over;
        (taken, self.leased.values().map(|lease| lease.until).min())
    }

    pub fn held_by(&self, consumer: u64) -> usize {
        self.leased.values().filter(|lease| lease.consumer == consumer).count()
    }

    /// Messages not acknowledged, lent or not.
    pub fn waiting(&self) -> usize {
        self.waiting.len() + self.leased.len()
    }

    /// As if every lease had run out.
    pub fn end_leases(&mut self) {
        for id in self.leased.keys().copied().collect::<Vec<_>>() {
            self.give_back(id);
        }
    }

    /// Ids of leases that ran out are ignored, as Google's does.
    pub fn acknowledge(&mut self, ack_ids: &[String]) {
        for id in ids(ack_ids) {
            self.end_lease(id);
        }
    }

    /// Zero gives the message back.
    pub fn modify_deadline(&mut self, ack_ids: &[String], deadline: Duration) {
        for id in ids(ack_ids) {
            match self.leased.get_mut(&id) {
                Some(_) if deadline.is_zero() => self.give_back(id),
                Some(lease) => lease.until = Instant::now() + deadline,
                None => {}
            }
        }
    }

    fn is_bound(&self, ordering_key: &str) -> bool {
        self.ordered() && !ordering_key.is_empty()
    }

    fn end_lease(&mut self, id: u64) -> Option<Entry> {
        let entry = self.leased.remove(&id)?.entry;
        if self.is_bound(&entry.message.ordering_key) {
            let (_, held) =
                self.holders.get_mut(&entry.message.ordering_key).expect("a lent key has a holder");
            *held -= 1;
            if *held == 0 {
                self.holders.remove(&entry.message.ordering_key);
            }
        }
        Some(entry)
    }

    /// Back into the queue, where it was; with ordering, all later ones of its key too.
    fn give_back(&mut self, id: u64) {
        let Some(Lease { entry: first, .. }) = self.leased.get(&id) else {
            return;
        };
        let mut back = vec![id];
        if self.is_bound(&first.message.ordering_key) {
            let later = |lease: &Lease| {
                lease.entry.position > first.position
                    && lease.entry.message.ordering_key == first.message.ordering_key
            };
            back.extend(self.leased.iter().filter(|(_, lease)| later(lease)).map(|(id, _)| *id));
        }
        for id in back {
            let entry = self.end_lease(id).expect("it is lent");
            let place = self.waiting.partition_point(|waiting| waiting.position < entry.position);
            self.waiting.insert(place, entry);
        }
    }
}

fn ids(ack_ids: &[String]) -> impl Iterator<Item = u64> {
    ack_ids.iter().filter_map(|id| id.parse().ok())
}

/// The part of the filter language that people use here: `attributes.k = "v"`, `attributes.k != "v"`,
/// `attributes:k`, each with `NOT` before it or not, joined by `AND`.
#[derive(Default)]
struct Filter(Vec<Term>);

struct Term {
    key: String,
    test: Test,
    negated: bool,
}

enum Test {
    Exists,
    Is(String),
    IsNot(String),
}

impl Filter {
    fn parse(text: &str) -> Result<Filter, Status> {
        if text.trim().is_empty() {
            return Ok(Filter::default());
        }
        let terms = text.split(" AND ").map(|term| Term::parse(term.trim()));
        let terms = terms.collect::<Option<_>>();
        terms
            .map(Filter)
            .ok_or_else(|| invalid(format!("this server does not understand the filter {text:?}")))
    }

    fn lets_pass(&self, message: &Message) -> bool {
        self.0.iter().all(|term| term.lets_pass(message))
    }
}

impl Term {
    fn parse(text: &str) -> Option<Term> {
        let (negated, text) = match text.strip_prefix("NOT ") {
            Some(rest) => (true, rest.trim()),
            None => (false, text),
        };
        let value = |text: &str| {
            let inner = text.trim().strip_prefix('"')?.strip_suffix('"')?;
            (!inner.contains(['"', '\\'])).then(|| inner.to_owned())
        };
        let (key, test) = if let Some(key) = text.strip_prefix("attributes:") {
            (key, Test::Exists)
        } else {
            let rest = text.strip_prefix("attributes.")?;
            match rest.split_once("!=") {
                Some((key, text)) => (key, Test::IsNot(value(text)?)),
                None => {
                    let (key, text) = rest.split_once('=')?;
                    (key, Test::Is(value(text)?))
                }
            }
        };
        let key = key.trim().to_owned();
        let sound = !key.is_empty() && key.chars().all(|c| c.is_ascii_alphanumeric() || "_-".contains(c));
        sound.then_some(Term { key, test, negated })
    }

    fn lets_pass(&self, message: &Message) -> bool {
        let found = message.attributes.get(&self.key);
        let so = match &self.test {
            Test::Exists => found.is_some(),
            Test::Is(value) => found == Some(value),
            Test::IsNot(value) => found != Some(value), // a message without the attribute passes
        };
        so != self.negated
    }
}
