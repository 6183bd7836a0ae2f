mod decoding;

use alloy::dyn_abi::{DynSolType, DynSolValue, Specifier};
use alloy::json_abi::Event as AbiEvent;
use alloy::primitives::{Address, B256, Bytes, I256, U256, keccak256};
use serde_json::{Value, json};

use super::*;

const TIME: u64 = 1_767_225_600; // 2026-01-01T00:00:00Z
const CHAIN: u64 = 11_155_111;

fn set(factory: &[&str], escrow: &[&str]) -> Result<Signatures, SignatureError> {
    let parse = |all: &[&str]| all.iter().map(|text| AbiEvent::parse(text).unwrap()).collect::<Vec<_>>();
    Signatures::new(&parse(factory), "escrow", &parse(escrow), &["EscrowReleased".into()])
}

const DEPLOYED: &str = "EscrowDeployed(address indexed escrow, uint256 amount)";

/// A log with this signature's topic0, these further topics and this data.
fn log(signature: &str, topics: &[B256], data: Vec<u8>) -> Log {
    let topic0 = AbiEvent::parse(signature).unwrap().selector();
    Log {
        address: Address::repeat_byte(0xEE),
        topics: [&[topic0], topics].concat(),
        data: Bytes::from(data),
        block: BlockRef { number: 9_508_321, hash: B256::repeat_byte(0xBB) },
        transaction_hash: B256::repeat_byte(0x77),
        transaction_index: 3,
        log_index: 17,
        block_timestamp: None,
    }
}

fn words(values: &[DynSolValue]) -> Vec<u8> {
    DynSolValue::Tuple(values.to_vec()).abi_encode_params()
}

fn body_of(signature: &str, topics: &[B256], data: Vec<u8>) -> Value {
    let set = set(&[DEPLOYED], &[signature]).unwrap();
    let log = log(signature, topics, data);
    let Recognised::Known(decoded) = set.recognise(Role::Lifecycle, &log) else { panic!("not recognised") };
    serde_json::from_slice(&decoded.event(CHAIN, &log, TIME).body.finish(2)).unwrap()
}

#[test]
fn the_body_is_what_consumers_were_promised_byte_for_byte() {
    let signature = "Approved(address indexed approver)";
    let set = set(&[DEPLOYED], &[signature]).unwrap();
    let log = log(signature, &[Address::repeat_byte(0xAB).into_word()], vec![]);
    let Recognised::Known(decoded) = set.recognise(Role::Lifecycle, &log) else { panic!("not recognised") };
    let body = String::from_utf8(decoded.event(CHAIN, &log, TIME).body.finish(2)).unwrap();
    let hash = format!("0x{}", "bb".repeat(32));
    let transaction = format!("0x{}", "77".repeat(32));
    let (escrow, approver) = (format!("0x{}", "ee".repeat(20)), format!("0x{}", "ab".repeat(20)));
    assert_eq!(
        body,
        format!(r#"{{"schema_version":1,"event_id":"11155111:{hash}:17","sequence":2,"chain_id":11155111,"#)
            + &format!(
                r#""contract_address":"{escrow}","event_name":"Approved","block_number":9508321,"block_hash":"{hash}","#
            )
            + &format!(
                r#""block_timestamp":"2026-01-01T00:00:00Z","timestamp":"2026-01-01T00:00:00Z","transaction_hash":"{transaction}","#
            )
            + &format!(
                r#""transaction_index":3,"log_index":17,"args":{{"approver":"{approver}"}},"approver":"{approver}"}}"#
            )
    );
}

#[test]
fn the_envelope_wins_over_an_events_own_argument_of_the_same_name() {
    let signature = "EscrowReleased(address indexed payee, uint256 amount, uint256 timestamp)";
    let data = words(&[U256::from(5).into(), U256::from(99).into()]);
    let body = body_of(signature, &[Address::repeat_byte(1).into_word()], data);
    assert_eq!(body["timestamp"], "2026-01-01T00:00:00Z");
    assert_eq!(body["args"]["timestamp"], "99");
    assert_eq!(body["amount"], "5");
}

#[test]
fn values_of_every_type_become_json_without_losing_digits() {
    let large = U256::MAX;
    let table: Vec<(&str, DynSolValue, Value)> = vec![
        ("uint256 it", large.into(), json!(large.to_string())),
        ("int8 it", DynSolValue::Int(I256::unchecked_from(-5), 8), json!("-5")),
        ("bool it", true.into(), json!(true)),
        ("bytes it", DynSolValue::Bytes(vec![0, 255]), json!("0x00ff")),
        (
            "bytes4 it",
            DynSolValue::FixedBytes(B256::right_padding_from(&[1, 2, 3, 4]), 4),
            json!("0x01020304"),
        ),
        ("string it", DynSolValue::String("a\"\n€".into()), json!("a\"\n€")),
        ("address it", Address::repeat_byte(0xAB).into(), json!(format!("0x{}", "ab".repeat(20)))),
        (
            "uint8[] it",
            DynSolValue::Array(vec![
                DynSolValue::Uint(U256::from(1), 8),
                DynSolValue::Uint(U256::from(2), 8),
            ]),
            json!(["1", "2"]),
        ),
        ("(bool,bool) it", DynSolValue::Tuple(vec![true.into(), false.into()]), json!([true, false])),
    ];
    for (argument, value, expected) in table {
        let body = body_of(&format!("Odd({argument})"), &[], words(&[value]));
        assert_eq!(body["args"]["it"], expected, "{argument}");
        assert_eq!(body["it"], expected, "{argument}, flat");
    }
}

#[test]
fn unnamed_arguments_are_named_by_their_place_and_indexed_text_is_its_hash() {
    let hash = keccak256("hello");
    let body = body_of("Odd(uint256, string indexed)", &[hash], words(&[U256::from(1).into()]));
    assert_eq!(body["args"], json!({"arg0": "1", "arg1": hash.to_string()}));
}

#[test]
fn an_event_is_known_by_topic0_and_the_number_of_topics_in_its_own_role_only() {
    let set = set(&[DEPLOYED], &["Approved(address indexed approver)"]).unwrap();
    let approver = Address::repeat_byte(1).into_word();
    let approved = log("Approved(address)", &[approver], vec![]);
    assert!(matches!(set.recognise(Role::Lifecycle, &approved), Recognised::Known(_)));
    assert!(matches!(set.recognise(Role::Announcement, &approved), Recognised::Unknown));
    let without = log("Approved(address)", &[], approver.to_vec());
    assert!(matches!(set.recognise(Role::Lifecycle, &without), Recognised::Malformed(_)));
    let other = log("Rejected(address)", &[approver], vec![]);
    assert!(matches!(set.recognise(Role::Lifecycle, &other), Recognised::Unknown));
    let anonymous = Log { topics: vec![], ..other };
    assert!(matches!(set.recognise(Role::Lifecycle, &anonymous), Recognised::Unknown));
}

#[test]
fn data_cut_short_is_malformed_and_says_of_what() {
    let set = set(&[DEPLOYED], &["Approved(address indexed approver)"]).unwrap();
    let cut = log(DEPLOYED, &[Address::repeat_byte(1).into_word()], vec![0; 5]);
    let Recognised::Malformed(reason) = set.recognise(Role::Announcement, &cut) else { panic!("accepted") };
    assert!(reason.contains("EscrowDeployed"), "{reason}");
}

#[test]
fn an_announcement_names_its_escrow_and_goes_before_the_other_logs_of_its_transaction() {
    let set = set(&[DEPLOYED], &["Approved(address indexed approver)"]).unwrap();
    let escrow = Address::repeat_byte(0x11);
    let announcement = log(DEPLOYED, &[escrow.into_word()], words(&[U256::from(1).into()]));
    let Recognised::Known(decoded) = set.recognise(Role::Announcement, &announcement) else {
        panic!("unknown")
    };
    let announcement = decoded.event(CHAIN, &announcement, TIME);
    assert_eq!((announcement.escrow, announcement.announces), (escrow, true));
    let earlier = Log { log_index: 2, ..log("Approved(address)", &[B256::ZERO], vec![]) };
    let Recognised::Known(decoded) = set.recognise(Role::Lifecycle, &earlier) else { panic!("unknown") };
    let constructor_log = decoded.event(CHAIN, &earlier, TIME);
    assert!(announcement.order() < constructor_log.order());
    let previous = Log { transaction_index: 2, log_index: 1, ..earlier };
    let Recognised::Known(decoded) = set.recognise(Role::Lifecycle, &previous) else { panic!("unknown") };
    assert!(decoded.event(CHAIN, &previous, TIME).order() < announcement.order());
}

#[test]
fn signatures_that_cannot_be_told_apart_or_name_no_escrow_are_refused() {
    let table: [(&[&str], &[&str], &str); 4] = [
        (&["EscrowDeployed(address indexed child)"], &[], "no address argument named `escrow`"),
        (&["EscrowDeployed(uint256 escrow)"], &[], "no address argument named `escrow`"),
        (&[DEPLOYED], &["A(address indexed a, address b)", "A(address a, address indexed b)"], "told apart"),
        (&[DEPLOYED], &["A(address a, uint256 a)"], "two arguments named `a`"),
    ];
    for (factory, escrow, expected) in table {
        let error = set(factory, escrow).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    // One topic0, told apart by how many arguments are indexed.
    set(&[DEPLOYED], &["A(address a)", "A(address indexed a)"]).unwrap();
}

#[test]
fn a_retraction_names_the_original_only_inside_it() {
    let retraction = Retraction {
        retracts: "1:0xaa:3",
        retracted_event: br#"{"event_name":"Approved","sequence":1}"#,
        sequence: 7,
        chain_id: 1,
        emitter: Address::repeat_byte(0xEE),
    };
    let body: Value = serde_json::from_slice(&retraction.encode().unwrap()).unwrap();
    assert_eq!(
        body,
        json!({
            "event_name": "Retracted", "event_id": "1:0xaa:3:retracted:7", "retracts": "1:0xaa:3",
            "retracted_event": {"event_name": "Approved", "sequence": 1}, "reason": "reorg", "sequence": 7,
            "chain_id": 1, "contract_address": format!("0x{}", "ee".repeat(20)),
        })
    );
}

#[test]
fn a_range_is_inclusive_and_never_empty() {
    assert_eq!(BlockRange::new(3, 2), None);
    assert_eq!(BlockRange::new(2, 2).unwrap().blocks(), 1);
    assert_eq!(BlockRange::starting_at(10, 5, 100), BlockRange::new(10, 14));
    assert_eq!(BlockRange::starting_at(10, 5, 12), BlockRange::new(10, 12));
    assert_eq!(BlockRange::starting_at(10, 0, 12), None);
    assert_eq!(BlockRange::starting_at(10, u64::MAX, u64::MAX), BlockRange::new(10, u64::MAX));
    assert_eq!(BlockRange::new(10, 20).unwrap().tail(15), BlockRange::new(15, 20));
    assert_eq!(BlockRange::new(10, 20).unwrap().tail(5), BlockRange::new(10, 20));
}
