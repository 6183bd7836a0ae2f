//! One log decoded and encoded to the message that is stored.
//!
//! The floor: `serde_json` parsing the same log, as the node sends it, into alloy's `Log`. `from_json` is both together:
//! what it takes from the node's bytes to the message's with that parser.

mod common;

use std::hint::black_box;

use alloy::rpc::types::Log as AlloyLog;
use common::events::{Emitted, FACTORY, approved, block_time, deployed};
use common::ratios::Ratios;
use common::{config, signatures};
use criterion::{Criterion, criterion_group, criterion_main};
use relayer::event::{BlockRef, Log, Recognised, Role, Signatures};

const NUMBER: usize = 9_508_300;
const INDEX: usize = 117;

fn announcement(criterion: &mut Criterion) {
    compare(criterion, "decode/EscrowDeployed", &deployed(7));
}

fn lifecycle(criterion: &mut Criterion) {
    compare(criterion, "decode/Approved", &approved(7));
}

fn compare(criterion: &mut Criterion, name: &str, emitted: &Emitted) {
    let signatures = signatures(&config("http://localhost", &[]));
    let json = emitted.json(NUMBER, INDEX);
    let log = emitted.log(NUMBER, INDEX);
    assert_eq!(converted(parsed(&json)), log);
    let mut ratios = Ratios::new(criterion, name);
    let bytes = message(&signatures, &log).len();
    ratios.say(format!("{} bytes of JSON become a message of {bytes}", json.len()));
    ratios.measure_small([
        ("parse_into_alloy", &mut || drop(black_box(parsed(&json)))),
        ("decode_and_encode", &mut || drop(black_box(message(&signatures, &log)))),
        ("from_json", &mut || drop(black_box(message(&signatures, &converted(parsed(&json)))))),
    ]);
    ratios.compare("decode_and_encode", "parse_into_alloy", 2.0);
    ratios.relate("from_json", "parse_into_alloy");
    ratios.finish();
}

fn parsed(json: &str) -> AlloyLog {
    serde_json::from_str(json).expect("a log")
}

fn message(signatures: &Signatures, log: &Log) -> Vec<u8> {
    let role = if log.address == FACTORY { Role::Announcement } else { Role::Lifecycle };
    match signatures.recognise(role, log) {
        Recognised::Known(decoded) => decoded.event(1, log, block_time(NUMBER)).body.finish(1),
        other => panic!("{other:?}"),
    }
}

fn converted(log: AlloyLog) -> Log {
    let place = "a log of a block";
    let (topics, data) = log.inner.data.split();
    Log {
        address: log.inner.address,
        topics,
        data,
        block: BlockRef { number: log.block_number.expect(place), hash: log.block_hash.expect(place) },
        transaction_hash: log.transaction_hash.expect(place),
        transaction_index: log.transaction_index.expect(place),
        log_index: log.log_index.expect(place),
        block_timestamp: log.block_timestamp,
    }
}

criterion_group!(benches, announcement, lifecycle);
criterion_main!(benches);
