//! Decoding of whatever topics and data there may be.

use proptest::prelude::*;

use super::*;
use crate::event::extent::fits;

const FACTORY_EVENTS: [&str; 2] = [
    "EscrowDeployed(address indexed escrow, uint256 amount)",
    "EscrowDeployed(address indexed escrow, string note, bytes timestamp)",
];
const ESCROW_EVENTS: [&str; 8] = [
    "Approved(address indexed approver)",
    "EscrowReleased(address indexed payee, uint256 amount, uint256 timestamp)",
    "Noted(string indexed topic, string, bytes args)",
    "Listed(uint256[] list, bool[3] three, (int8,string) pair)",
    "Nested(uint64[][] lists, bytes[2][] pairs)",
    "Small(bytes4 four, int128 number, bool flag, function callback)",
    "Deep((string,(bytes,uint8[])[])[] deep)",
    "Plain()",
];

fn everything() -> Signatures {
    set(&FACTORY_EVENTS, &ESCROW_EVENTS).unwrap()
}

/// The signatures with who may emit them.
fn known() -> impl Strategy<Value = (Role, AbiEvent)> {
    let of = |role, all: &[&str]| {
        all.iter().map(|text| (role, AbiEvent::parse(text).unwrap())).collect::<Vec<_>>()
    };
    let all = [of(Role::Announcement, &FACTORY_EVENTS), of(Role::Lifecycle, &ESCROW_EVENTS)].concat();
    prop::sample::select(all)
}

/// Words as an encoding has them: small numbers that may be offsets and lengths, text, and anything.
fn data() -> impl Strategy<Value = Vec<u8>> {
    let number = (0u64..40).prop_map(|words| U256::from(words * 32).to_be_bytes::<32>());
    let small = (0u64..70).prop_map(|number| U256::from(number).to_be_bytes::<32>());
    let word = prop_oneof![4 => number, 3 => small, 1 => any::<[u8; 32]>(), 1 => Just([0xFF; 32])];
    let words = prop::collection::vec(word, 0..40).prop_map(|words| words.concat());
    (words, prop::collection::vec(any::<u8>(), 0..40), any::<bool>())
        .prop_map(|(words, rest, whole)| if whole { words } else { [words, rest].concat() })
}

fn topics(event: &AbiEvent, others: Vec<[u8; 32]>, right: bool) -> Vec<B256> {
    let indexed = event.inputs.iter().filter(|input| input.indexed).count();
    let count = if right { indexed } else { others.len() };
    [event.selector()].into_iter().chain(others.into_iter().cycle().map(B256::from).take(count)).collect()
}

/// Panics unless the body has exactly the promised fields, and each argument under `args` and flat.
fn assert_promised(decoded: &Decoded, log: &Log, event: &AbiEvent, sequence: u64) -> Value {
    let bytes = decoded.event(CHAIN, log, TIME).body.finish(sequence);
    let body: serde_json::Map<String, Value> = serde_json::from_slice(&bytes).unwrap();
    let envelope = json!({
        "schema_version": 1, "event_id": format!("{CHAIN}:{}:17", log.block.hash), "sequence": sequence,
        "chain_id": CHAIN, "contract_address": format!("{:#x}", log.address), "event_name": event.name,
        "block_number": 9_508_321, "block_hash": log.block.hash, "block_timestamp": "2026-01-01T00:00:00Z",
        "timestamp": "2026-01-01T00:00:00Z", "transaction_hash": log.transaction_hash, "transaction_index": 3,
        "log_index": 17,
    });
    let envelope = envelope.as_object().unwrap();
    let arguments = body["args"].as_object().unwrap();
    assert_eq!(arguments.len(), event.inputs.len());
    let mut expected = envelope.clone();
    expected.insert("args".to_owned(), body["args"].clone());
    for (index, input) in event.inputs.iter().enumerate() {
        let name = if input.name.is_empty() { format!("arg{index}") } else { input.name.clone() };
        let value = arguments[&name].clone();
        expected.entry(name).or_insert(value);
    }
    assert_eq!(body, expected);
    // No name stands twice, which a map would hide.
    let written = serde_json::to_string(&body).unwrap();
    assert_eq!(written.len(), bytes.len(), "{}", String::from_utf8_lossy(&bytes));
    body["args"].clone()
}

/// Any value of that type.
fn value_of(ty: &DynSolType) -> BoxedStrategy<DynSolValue> {
    let list = |item: &DynSolType, count| prop::collection::vec(value_of(item), count);
    match ty.clone() {
        DynSolType::Bool => any::<bool>().prop_map(DynSolValue::Bool).boxed(),
        DynSolType::Int(bits) => {
            any::<i8>().prop_map(move |it| DynSolValue::Int(I256::try_from(it).unwrap(), bits)).boxed()
        }
        DynSolType::Uint(bits) => any::<[u8; 32]>()
            .prop_map(move |it| DynSolValue::Uint(U256::from_be_bytes(it) >> (256 - bits), bits))
            .boxed(),
        DynSolType::FixedBytes(size) => any::<[u8; 32]>()
            .prop_map(move |it| DynSolValue::FixedBytes(B256::right_padding_from(&it[..size]), size))
            .boxed(),
        DynSolType::Address => {
            any::<[u8; 20]>().prop_map(|it| DynSolValue::Address(Address::from(it))).boxed()
        }
        DynSolType::Function => any::<[u8; 24]>()
            .prop_map(|it| DynSolValue::Function(alloy::primitives::Function::from(it)))
            .boxed(),
        DynSolType::Bytes => prop::collection::vec(any::<u8>(), 0..70).prop_map(DynSolValue::Bytes).boxed(),
        DynSolType::String => any::<String>().prop_map(DynSolValue::String).boxed(),
        DynSolType::Array(item) => list(&item, 0..5).prop_map(DynSolValue::Array).boxed(),
        DynSolType::FixedArray(item, count) => {
            list(&item, count..count + 1).prop_map(DynSolValue::FixedArray).boxed()
        }
        DynSolType::Tuple(members) => {
            let members: Vec<_> = members.iter().map(value_of).collect();
            members.prop_map(DynSolValue::Tuple).boxed()
        }
    }
}

/// An event and values for its arguments that are not indexed.
fn honest() -> impl Strategy<Value = (Role, AbiEvent, Vec<DynSolValue>)> {
    known().prop_flat_map(|(role, event)| {
        let body = event.inputs.iter().filter(|input| !input.indexed);
        let values: Vec<_> = body.map(|input| value_of(&input.resolve().unwrap())).collect();
        (Just(role), Just(event), values)
    })
}

proptest! {
    #[test]
    fn any_topics_and_data_are_unknown_malformed_or_a_message_exactly_as_promised(
        (role, event) in known(), others in prop::collection::vec(any::<[u8; 32]>(), 1..5), right in any::<bool>(),
        data in data(), sequence in 1u64..,
    ) {
        let set = everything();
        let text = event.full_signature();
        let log = Log { topics: topics(&event, others, right), ..log("Plain()", &[], data) };
        match set.recognise(role, &log) {
            Recognised::Known(decoded) => {
                assert_promised(&decoded, &log, &event, sequence);
                let _ = decoded.escrow(&log);
            }
            Recognised::Malformed(reason) => prop_assert!(!reason.is_empty(), "{text}"),
            Recognised::Unknown => prop_assert!(false, "{text} is known"),
        }
    }

    #[test]
    fn no_topics_and_no_data_at_all_make_it_panic(
        words in prop::collection::vec(any::<[u8; 32]>(), 0..6), data in prop::collection::vec(any::<u8>(), 0..200),
        announces in any::<bool>(),
    ) {
        let role = if announces { Role::Announcement } else { Role::Lifecycle };
        let log = Log { topics: words.into_iter().map(B256::from).collect(), ..log("Plain()", &[], data) };
        prop_assert!(matches!(everything().recognise(role, &log), Recognised::Unknown));
    }

    #[test]
    fn what_a_compiler_encodes_is_decoded_to_what_it_was(
        (role, event, values) in honest(), others in prop::collection::vec(any::<[u8; 32]>(), 1..2),
    ) {
        let set = everything();
        let log = Log { topics: topics(&event, others, true), ..log("Plain()", &[], words(&values)) };
        let Recognised::Known(decoded) = set.recognise(role, &log) else {
            panic!("{}: {:?}", event.full_signature(), set.recognise(role, &log))
        };
        let types = event.inputs.iter().filter(|input| !input.indexed).map(|input| input.resolve().unwrap());
        prop_assert!(fits(&types.collect::<Vec<_>>(), &log.data, log.data.len()), "no value is counted twice");
        let arguments = assert_promised(&decoded, &log, &event, 1);
        let body = event.inputs.iter().enumerate().filter(|(_, input)| !input.indexed);
        for ((index, input), value) in body.zip(&values) {
            let name = if input.name.is_empty() { format!("arg{index}") } else { input.name.clone() };
            prop_assert_eq!(&arguments[&name], &as_json(value), "{}", name);
        }
    }
}

/// As the message contract has it.
fn as_json(value: &DynSolValue) -> Value {
    let bytes = |bytes: &[u8]| json!(Bytes::copy_from_slice(bytes));
    match value {
        DynSolValue::Bool(it) => json!(it),
        DynSolValue::Int(it, _) => json!(it.to_string()),
        DynSolValue::Uint(it, _) => json!(it.to_string()),
        DynSolValue::FixedBytes(word, size) => bytes(&word[..*size]),
        DynSolValue::Address(it) => json!(format!("{it:#x}")),
        DynSolValue::Function(it) => bytes(it.as_slice()),
        DynSolValue::Bytes(it) => bytes(it),
        DynSolValue::String(it) => json!(it),
        DynSolValue::Array(items) | DynSolValue::FixedArray(items) | DynSolValue::Tuple(items) => {
            items.iter().map(as_json).collect()
        }
    }
}
