//! Results of calls, whatever JSON they are.

use alloy::primitives::{Address, B256};
use proptest::prelude::*;
use serde_json::value::to_raw_value;

use super::*;
use crate::scan::{LogFilter, Span};

/// Texts that quantities, hashes and addresses are taken for, and others.
fn text() -> impl Strategy<Value = String> {
    prop_oneof![
        "0x[0-9a-f]{0,18}",
        "0x[0-9a-fA-F]{40}",
        "0x[0-9a-f]{64}",
        Just("0x".to_owned()),
        Just("0x+1".to_owned()),
        Just("latest".to_owned()),
        any::<String>(),
    ]
}

/// Names that answers have.
fn name() -> impl Strategy<Value = String> {
    prop::sample::select(vec![
        "number",
        "hash",
        "parentHash",
        "timestamp",
        "address",
        "topics",
        "data",
        "blockNumber",
        "blockHash",
        "transactionHash",
        "transactionIndex",
        "logIndex",
        "blockTimestamp",
        "removed",
        "else",
    ])
    .prop_map(str::to_owned)
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        text().prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 40, 12, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            prop::collection::btree_map(name(), inner, 0..14).prop_map(|it| it.into_iter().collect()),
        ]
    })
}

fn good_header() -> Value {
    json!({"number": "0x10", "hash": B256::repeat_byte(1), "parentHash": B256::repeat_byte(2), "timestamp": "0x5",
        "miner": "0x00", "transactions": []})
}

fn good_log() -> Value {
    json!({"address": Address::repeat_byte(7), "topics": [B256::repeat_byte(3)], "data": "0x0102", "blockNumber": "0x10",
        "blockHash": B256::repeat_byte(1), "transactionHash": B256::repeat_byte(4), "transactionIndex": "0x0",
        "logIndex": "0x3", "blockTimestamp": "0x5", "removed": false})
}

/// A good answer in which one field is another value, or is missing.
fn spoilt(good: Value) -> impl Strategy<Value = Value> {
    (name(), prop::option::of(any_json())).prop_map(move |(name, value)| {
        let mut spoilt = good.clone();
        let fields = spoilt.as_object_mut().unwrap();
        match value {
            Some(value) => fields.insert(name, value),
            None => fields.remove(&name),
        };
        spoilt
    })
}

fn calls() -> [Call; 3] {
    let filter =
        LogFilter { span: Span::Block(B256::ZERO), addresses: Vec::new().into(), topics: Arc::from([]) };
    [Call::Header(BlockTag::Latest), Call::Code(Address::ZERO), Call::Logs(filter)]
}

/// The answer, if the value is one. It is the same whether the value is read as it comes, or kept and read later.
fn answer(call: &Call, value: &Value) -> Option<Answer> {
    let later = wire::answer(call, raw(value)).ok();
    if let Ok(said) = serde_json::from_str::<Said>(&value.to_string()) {
        assert_eq!(wire::answer(call, said).ok(), later, "{call:?}: {value}");
    }
    later
}

fn raw(value: &Value) -> Said {
    Said::Raw(to_raw_value(value).unwrap())
}

#[test]
fn good_answers_are_read() {
    let [header, code, logs] = calls();
    assert_eq!(answer(&header, &good_header()).unwrap().header().unwrap().block.number, 16);
    assert!(answer(&header, &Value::Null).unwrap().header().is_none());
    assert!(!answer(&code, &json!("0x")).unwrap().code());
    assert_eq!(answer(&logs, &json!([good_log()])).unwrap().logs()[0].log_index, 3);
}

#[test]
fn lists_objects_text_and_nothing_are_read_as_they_come() {
    let [header, code, logs] = calls();
    let read = Call::Read { contract: Address::ZERO, selector: Default::default(), at: 1 };
    let table = [
        (json!([good_log()]), [false, false, true, false]),
        (json!([]), [false, true, true, true]),
        (good_header(), [true, false, false, false]),
        (json!("0x60"), [false, true, false, true]),
        (Value::Null, [true, false, false, false]),
    ];
    for (value, fits) in table {
        let said = || serde_json::from_str::<Said>(&value.to_string()).unwrap();
        let fit = [&header, &code, &logs, &read].map(|call| wire::answer(call, said()).is_ok());
        assert_eq!(fit, fits, "{value}");
    }
    assert!(
        serde_json::from_str::<Said>(&json!([good_log(), 1]).to_string()).is_err(),
        "it is no list of logs"
    );
}

proptest! {
    #[test]
    fn any_json_is_an_answer_of_its_kind_or_none_and_nothing_panics(value in any_json()) {
        for call in calls() {
            let Some(answer) = answer(&call, &value) else { continue };
            match (call, answer) {
                (Call::Header(_), Answer::Header(None)) => prop_assert!(value.is_null()),
                (Call::Header(_), Answer::Header(Some(_))) => prop_assert!(value.is_object()),
                (Call::Code(_), Answer::Code(_)) => prop_assert!(value.is_string() || value.is_array()),
                (Call::Logs(_), Answer::Logs(logs)) => prop_assert!(logs.len() <= value.as_array().unwrap().len()),
                other => prop_assert!(false, "{other:?}"),
            }
        }
        if let Ok(id) = wire::chain_id(&raw(&value)) {
            let digits = value.as_str().map_or_else(|| value.to_string(), |text| text[2..].to_owned());
            let radix = if value.is_string() { 16 } else { 10 };
            prop_assert_eq!(u64::from_str_radix(&digits, radix).ok(), Some(id));
        }
    }

    #[test]
    fn a_header_is_read_whole_or_not_at_all(value in spoilt(good_header())) {
        let [header, ..] = calls();
        if let Some(read) = answer(&header, &value) {
            let read = read.header().unwrap();
            prop_assert_eq!(json!(read.block.hash), value["hash"].as_str().unwrap().to_lowercase());
            prop_assert_eq!(json!(read.parent_hash), value["parentHash"].as_str().unwrap().to_lowercase());
            let number = |value: &Value| match value.as_u64() {
                Some(number) => number,
                None => u64::from_str_radix(&value.as_str().unwrap()[2..], 16).unwrap(),
            };
            prop_assert_eq!((read.block.number, read.timestamp), (number(&value["number"]), number(&value["timestamp"])));
        }
    }

    #[test]
    fn one_log_that_cannot_be_read_makes_the_whole_answer_unreadable(value in spoilt(good_log())) {
        let [.., logs] = calls();
        let alone = answer(&logs, &json!([value])).map(Answer::logs);
        let among = answer(&logs, &json!([good_log(), value, good_log()])).map(Answer::logs);
        match alone {
            None => prop_assert!(among.is_none(), "nothing is left out in silence"),
            Some(read) if read.is_empty() => {
                prop_assert_eq!(&value["removed"], &json!(true));
                prop_assert_eq!(among.unwrap().len(), 2);
            }
            Some(read) => {
                let among = among.unwrap();
                prop_assert_eq!((among.len(), &among[1]), (3, &read[0]));
            }
        }
    }
}
