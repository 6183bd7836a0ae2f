//! Which events are relayed, and the decoding of a log into one.

use std::collections::BTreeSet;
use std::sync::Arc;

use alloy::dyn_abi::{DynSolEvent, DynSolValue, Specifier};
use alloy::json_abi::{Event as AbiEvent, EventParam};
use alloy::primitives::{Address, B256};
use foldhash::HashMap;
use thiserror::Error;

use super::extent::is_bounded;
use super::message::{Fields, digest};
use super::{Body, Event, Log};

/// Who may emit an event: it counts only from there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// The factory, announcing an escrow.
    Announcement,
    /// A registered escrow.
    Lifecycle,
}

/// A set of signatures that cannot be told apart, or that names no escrow.
#[derive(Debug, Error)]
pub enum SignatureError {
    /// The announced escrow cannot be read from this event.
    #[error("`{signature}` has no address argument named `{child}`")]
    NoChild {
        /// The event.
        signature: String,
        /// The argument looked for.
        child: String,
    },
    /// Topics and their number are all that tells events apart.
    #[error("`{first}` and `{second}` cannot be told apart: same topic0, same number of indexed arguments")]
    Ambiguous {
        /// One of them.
        first: String,
        /// The other.
        second: String,
    },
    /// A type the ABI does not know.
    #[error("`{signature}`: {reason}")]
    Unresolvable {
        /// The event.
        signature: String,
        /// Why not.
        reason: String,
    },
    /// Two arguments would share one key of the message.
    #[error("`{signature}` has two arguments named `{argument}`")]
    SameArgument {
        /// The event.
        signature: String,
        /// The name both have.
        argument: String,
    },
}

/// One event the relayer knows.
#[derive(Clone, Debug)]
struct Signature {
    abi: AbiEvent,
    /// As it stands in the identity of the set.
    text: String,
    decoder: DynSolEvent,
    /// Names of the arguments as consumers see them; an unnamed one is `arg<n>`.
    names: Vec<String>,
    /// Which argument names the escrow (announcements only).
    child: Option<usize>,
    /// Whether it ends an escrow's life.
    ends: bool,
}

/// What a log turned out to be.
#[derive(Debug)]
pub enum Recognised {
    /// Nothing this relayer relays.
    Unknown,
    /// A known event.
    Known(Decoded),
    /// A known topic whose topics or data do not decode: to be kept aside with the reason.
    Malformed(String),
}

/// A known event's arguments, decoded; what is missing to encode it is the block's time.
#[derive(Debug)]
pub struct Decoded {
    signature: Arc<Signature>,
    values: Vec<DynSolValue>,
}

impl Decoded {
    /// The escrow announced, or the one that emitted `log`.
    pub fn escrow(&self, log: &Log) -> Address {
        self.signature.child.and_then(|index| self.values[index].as_address()).unwrap_or(log.address)
    }

    /// The event's name.
    pub fn name(&self) -> &str {
        &self.signature.abi.name
    }

    /// Whether it announces an escrow.
    pub fn announces(&self) -> bool {
        self.signature.child.is_some()
    }

    /// Which signature it was, as in [`Signatures::identity`].
    pub fn signature(&self) -> &str {
        &self.signature.text
    }

    /// Encodes the event. `timestamp`: the block's, in seconds since 1970.
    pub fn event(&self, chain_id: u64, log: &Log, timestamp: u64) -> Event {
        let signature = &*self.signature;
        let (event, names, values) = (&signature.abi.name[..], &signature.names[..], &self.values[..]);
        Event {
            escrow: self.escrow(log),
            emitter: log.address,
            name: signature.abi.name.clone(),
            announces: signature.child.is_some(),
            ends: signature.ends,
            block: log.block,
            transaction_index: log.transaction_index,
            log_index: log.log_index,
            body: Body::new(&Fields { chain_id, log, timestamp, event, names, values }),
            digest: digest(log),
        }
    }
}

/// All events the relayer knows, by role, topic0 and number of topics.
///
/// The number of topics matters: the three generations of the ABI share names, and indexing an argument
/// does not change topic0.
#[derive(Debug, Default)]
pub struct Signatures {
    known: HashMap<(Role, B256), HashMap<usize, Arc<Signature>>>,
    topics: Vec<B256>,
    announcement_topics: Vec<B256>,
    lifecycle_topics: Vec<B256>,
    identity: Vec<String>,
}

impl Signatures {
    /// The factory's events, the argument of theirs that names the escrow, the escrows' events and the names
    /// of those that end an escrow's life.
    pub fn new(
        factory: &[AbiEvent],
        child: &str,
        lifecycle: &[AbiEvent],
        terminal: &[String],
    ) -> Result<Self, SignatureError> {
        let mut set = Self::default();
        for event in factory {
            let index = child_index(event, child)?;
            set.add(Role::Announcement, Signature::new(event, Some(index), false)?)?;
        }
        for event in lifecycle {
            set.add(Role::Lifecycle, Signature::new(event, None, terminal.contains(&event.name))?)?;
        }
        set.identity.sort();
        Ok(set)
    }

    fn add(&mut self, role: Role, signature: Signature) -> Result<(), SignatureError> {
        let abi = &signature.abi;
        let topic = abi.selector();
        self.identity.push(signature.text.clone());
        let same_topic = self.known.entry((role, topic)).or_default();
        let topics = 1 + abi.inputs.iter().filter(|input| input.indexed).count();
        if let Some(other) = same_topic.get(&topics) {
            return Err(SignatureError::Ambiguous {
                first: other.abi.full_signature(),
                second: abi.full_signature(),
            });
        }
        same_topic.insert(topics, Arc::new(signature));
        push_new(&mut self.topics, topic);
        match role {
            Role::Announcement => push_new(&mut self.announcement_topics, topic),
            Role::Lifecycle => push_new(&mut self.lifecycle_topics, topic),
        }
        Ok(())
    }

    /// Those of the set that stand in `texts`, which are lines of its [`identity`](Self::identity).
    pub fn only(&self, texts: &[String]) -> Self {
        let mut set = Self::default();
        for ((role, _), same_topic) in &self.known {
            for signature in same_topic.values().filter(|signature| texts.contains(&signature.text)) {
                set.add(*role, Signature::clone(signature))
                    .expect("what can be told apart in a set can be in a part of it");
            }
        }
        set.identity.sort();
        set
    }

    /// The factory's topic0s.
    pub fn announcement_topics(&self) -> &[B256] {
        &self.announcement_topics
    }

    /// Every topic0, factory's and escrows': the filter of the one request that covers both.
    pub fn topics(&self) -> &[B256] {
        &self.topics
    }

    /// The escrows' topic0s: the filter for escrows just discovered.
    pub fn lifecycle_topics(&self) -> &[B256] {
        &self.lifecycle_topics
    }

    /// The set as sorted text: part of the store's identity, for history was read with exactly these.
    pub fn identity(&self) -> &[String] {
        &self.identity
    }

    /// Decodes a log of an emitter in that role.
    pub fn recognise(&self, role: Role, log: &Log) -> Recognised {
        let Some(topic) = log.topics.first() else {
            return Recognised::Unknown;
        };
        let Some(same_topic) = self.known.get(&(role, *topic)) else {
            return Recognised::Unknown;
        };
        let Some(signature) = same_topic.get(&log.topics.len()) else {
            return Recognised::Malformed(format!(
                "known topic0 with {} topics; known with {}",
                log.topics.len(),
                join(same_topic.keys())
            ));
        };
        match signature.decode(log) {
            Ok(values) => Recognised::Known(Decoded { signature: Arc::clone(signature), values }),
            Err(reason) => Recognised::Malformed(format!("{}: {reason}", signature.abi.full_signature())),
        }
    }
}

impl Signature {
    fn new(abi: &AbiEvent, child: Option<usize>, ends: bool) -> Result<Self, SignatureError> {
        let decoder = abi.resolve().map_err(|error| SignatureError::Unresolvable {
            signature: abi.full_signature(),
            reason: error.to_string(),
        })?;
        let names: Vec<String> =
            abi.inputs.iter().enumerate().map(|(index, input)| argument_name(index, input)).collect();
        let mut seen = BTreeSet::new();
        if let Some(argument) = names.iter().find(|name| !seen.insert(*name)) {
            return Err(SignatureError::SameArgument {
                signature: abi.full_signature(),
                argument: argument.clone(),
            });
        }
        let text = match child {
            Some(index) => format!("factory: {} [{}]", abi.full_signature(), names[index]),
            None => format!("escrow: {}", abi.full_signature()),
        };
        Ok(Self { abi: abi.clone(), text, decoder, names, child, ends })
    }

    /// The arguments in the order of the signature.
    fn decode(&self, log: &Log) -> Result<Vec<DynSolValue>, String> {
        if !is_bounded(self.decoder.body(), &log.data) {
            return Err(format!("{} bytes of data hold far larger values", log.data.len()));
        }
        let decoded = self
            .decoder
            .decode_log_parts(log.topics.iter().copied(), &log.data)
            .map_err(|error| error.to_string())?;
        let (mut indexed, mut body) = (decoded.indexed.into_iter(), decoded.body.into_iter());
        self.abi
            .inputs
            .iter()
            .map(|input| if input.indexed { indexed.next() } else { body.next() })
            .collect::<Option<_>>()
            .ok_or_else(|| "fewer values than arguments".to_owned())
    }
}

fn child_index(event: &AbiEvent, child: &str) -> Result<usize, SignatureError> {
    event
        .inputs
        .iter()
        .position(|input| input.name == child && input.ty == "address")
        .ok_or_else(|| SignatureError::NoChild { signature: event.full_signature(), child: child.to_owned() })
}

fn argument_name(index: usize, input: &EventParam) -> String {
    if input.name.is_empty() { format!("arg{index}") } else { input.name.clone() }
}

fn push_new(topics: &mut Vec<B256>, topic: B256) {
    if !topics.contains(&topic) {
        topics.push(topic);
    }
}

fn join<'a>(counts: impl Iterator<Item = &'a usize>) -> String {
    let mut counts: Vec<_> = counts.collect();
    counts.sort();
    counts.iter().map(|count| count.to_string()).collect::<Vec<_>>().join(" or ")
}
