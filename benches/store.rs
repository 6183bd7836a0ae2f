//! The store on a real file, fsync on: what a range costs to commit, what acknowledgements cost, and how fast it opens.
//!
//! The floors are redb itself: one transaction with one key that holds the same bytes; one transaction that writes one
//! number; opening the same file and reading nothing. Files are new for each run of commits, on both sides.

mod common;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::events::{block, deployed, escrow};
use common::ratios::Ratios;
use common::{config, folder, signatures, size, store};
use criterion::{Criterion, criterion_group, criterion_main};
use redb::{Database, ReadableDatabase, TableDefinition};
use relayer::config::Config;
use relayer::event::Signatures;
use relayer::store::{Store, Stretch};

/// What the store gives redb.
const CACHE_BYTES: usize = 48 << 20;
const BYTES: TableDefinition<u64, &[u8]> = TableDefinition::new("bytes");
/// Commits into one file: the first one finds it small.
const COMMITS: usize = 8;

fn settings() -> (Config, Arc<Signatures>) {
    let config = config("http://localhost", &[]);
    let signatures = signatures(&config);
    (config, signatures)
}

/// One event for each of the escrows, all of one block, which announces them if it is the first.
fn stretch(signatures: &Signatures, number: usize, escrows: usize) -> Stretch {
    let event = |index| deployed(index).event(signatures, number, index);
    let announced = match number {
        1 => (0..escrows).map(|index| (escrow(index), block(number))).collect(),
        _ => Vec::new(),
    };
    Stretch {
        announced,
        events: (0..escrows).map(event).collect(),
        blocks: vec![block(number)],
        finalized: Some(number as u64),
        ..Stretch::default()
    }
}

fn database(path: &Path) -> Database {
    Database::builder().set_cache_size(CACHE_BYTES).create(path).expect("a database")
}

/// One transaction, one key.
fn put(database: &Database, key: u64, bytes: &[u8]) {
    let transaction = database.begin_write().expect("a transaction");
    transaction.open_table(BYTES).expect("a table").insert(key, bytes).expect("it fits");
    transaction.commit().expect("it is committed");
}

/// Calls `run` with numbers that begin anew with every so many, for which `begin` then makes the world anew; only what
/// `run` takes counts.
fn in_turns<W>(begin: impl Fn() -> W, mut run: impl FnMut(&mut W, usize)) -> impl FnMut() -> Duration {
    let mut turn: Option<(W, usize)> = None;
    move || {
        let (world, number) = match &mut turn {
            Some((world, number)) if *number < COMMITS => {
                *number += 1;
                (world, *number)
            }
            other => {
                let (world, number) = other.insert((begin(), 1));
                (world, *number)
            }
        };
        let began = Instant::now();
        run(world, number);
        began.elapsed()
    }
}

fn ranges(criterion: &mut Criterion) {
    let (config, signatures) = settings();
    let events = size(1000, 50);
    let stretches: Vec<Stretch> =
        (1..=COMMITS + 1).map(|number| stretch(&signatures, number, events)).collect();
    let bytes: usize = stretches[1].events.iter().map(|event| event.body.finish(1).len()).sum();
    let all = vec![0xAB; bytes];
    let mut ratios = Ratios::new(criterion, "store/range");
    ratios.measure_for(Duration::from_secs(4));
    ratios.say(format!("{events} events of {} bytes in each commit", bytes / events));
    let mut one_key = in_turns(
        || {
            let folder = folder();
            let database = database(&folder.path().join("floor.redb"));
            put(&database, 0, &[]);
            (database, folder)
        },
        |(database, _), number| put(database, number as u64, &all),
    );
    let mut accept = in_turns(
        || {
            let folder = folder();
            let store = store(&config, &folder.path().join("relayer.redb"));
            // The escrows are known from here on.
            store.accept(&stretches[0]).expect("it is committed");
            (store, folder)
        },
        |(store, _), number| store.accept(&stretches[number]).expect("it is committed"),
    );
    ratios.measure_by_turns([("one_key", &mut one_key), ("accept", &mut accept)]);
    ratios.compare("accept", "one_key", 2.0);
    ratios.finish();
}

fn acknowledgements(criterion: &mut Criterion) {
    let (config, signatures) = settings();
    let events = size(1000, 50);
    let folder = folder();
    let database = database(&folder.path().join("floor.redb"));
    let mut ratios = Ratios::new(criterion, "store/acknowledge");
    ratios.measure("one_number", || {
        let began = Instant::now();
        put(&database, 0, &[1; 8]);
        began.elapsed()
    });
    let open = || {
        let folder = common::folder();
        let store = store(&config, &folder.path().join("relayer.redb"));
        for number in 1..=COMMITS {
            store.accept(&stretch(&signatures, number, events)).expect("it is committed");
        }
        (store, folder)
    };
    let claim = |store: &Store| -> Vec<u64> {
        store.claim(events).expect("it reads").iter().map(|claimed| claimed.position).collect()
    };
    let mut turns = in_turns(
        || {
            let (store, folder) = open();
            let positions: Vec<Vec<u64>> = (0..COMMITS).map(|_| claim(&store)).collect();
            (store, positions, folder)
        },
        |(store, positions, _), number| {
            store.acknowledge(std::mem::take(&mut positions[number - 1])).expect("it is committed");
        },
    );
    ratios.measure("a_thousand_in_a_row", &mut turns);
    // Every second one: as many runs as there can be.
    let mut turns = in_turns(
        || {
            let (store, folder) = open();
            let positions: Vec<Vec<u64>> =
                (0..COMMITS).map(|_| claim(&store).into_iter().step_by(2).collect()).collect();
            (store, positions, folder)
        },
        |(store, positions, _), number| {
            store.acknowledge(std::mem::take(&mut positions[number - 1])).expect("it is committed");
        },
    );
    ratios.measure("every_second_of_a_thousand", &mut turns);
    ratios.compare("a_thousand_in_a_row", "one_number", 2.0);
    ratios.finish();
}

fn opening(criterion: &mut Criterion) {
    let (config, signatures) = settings();
    let (escrows, blocks) = (size(10_000, 100), 10);
    let folder = folder();
    let path = folder.path().join("relayer.redb");
    let filled = store(&config, &path);
    for number in 1..=blocks {
        filled.accept(&stretch(&signatures, number, escrows)).expect("it is committed");
    }
    drop(filled);
    let mut ratios = Ratios::new(criterion, "store/open");
    ratios.say(format!("{escrows} escrows, {} messages", escrows * blocks));
    ratios.measure("redb_alone", || {
        let began = Instant::now();
        let database = database(&path);
        drop(database.begin_read().expect("it reads"));
        began.elapsed()
    });
    ratios.measure("open", || {
        let began = Instant::now();
        let store = store(&config, &path);
        let took = began.elapsed();
        assert_eq!(store.registry().len(), escrows);
        took
    });
    ratios.relate("open", "redb_alone");
    ratios.finish();
}

criterion_group!(benches, ranges, acknowledgements, opening);
criterion_main!(benches);
