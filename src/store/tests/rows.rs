//! The rows of the event log against a plain map.

use std::ops::Range;

use super::*;

/// An entry that can be told from others, with a body of that size.
fn entry(position: u64, size: usize) -> Entry {
    Entry {
        kind: Kind::Event,
        name: "Approved".to_owned(),
        announces: false,
        emitter: escrow(1),
        escrow: escrow(1),
        block_number: position / 3,
        block_hash: B256::repeat_byte(7),
        log_index: position % 3,
        sequence: position + 1,
        epoch: 1_760_000_000_000_000,
        late: false,
        stored_at: 1_760_000_000,
        body: vec![position as u8; size],
    }
}

#[derive(Clone, Debug)]
enum Change {
    /// Entries with bodies of these sizes.
    Append(Vec<usize>),
    /// As layout 3 wrote them.
    AppendOld(Vec<usize>),
    /// Those whose place among what is there, in per mille, is one of these.
    Remove(Vec<usize>),
    /// The first so many per mille.
    RemoveBelow(usize),
}

fn changes() -> impl Strategy<Value = Vec<Change>> {
    let size = prop_oneof![8 => 0..2_000usize, 1 => 30_000..140_000usize];
    let some = prop_oneof![Just(1..5usize), Just(120..300)];
    let sizes = some.prop_flat_map(move |count| prop::collection::vec(size.clone(), count));
    let change = prop_oneof![
        4 => sizes.prop_map(Change::Append),
        1 => prop::collection::vec(0..2_000usize, 1..5).prop_map(Change::AppendOld),
        2 => prop::collection::vec(0..1000usize, 1..40).prop_map(Change::Remove),
        1 => (0..1000usize).prop_map(Change::RemoveBelow),
    ];
    prop::collection::vec(change, 1..12)
}

fn apply(
    change: &Change,
    table: &mut redb::Table<'_, u64, &'static [u8]>,
    model: &mut BTreeMap<u64, Entry>,
    next: u64,
) -> u64 {
    let at = |per_mille: usize| model.keys().nth(model.len() * per_mille / 1000).copied();
    match change {
        Change::Append(sizes) => {
            let mut log = log::Appender::new(table, next);
            for size in sizes {
                let entry = entry(log.next_position(), *size);
                log.append(&entry).unwrap();
                model.insert(log.next_position() - 1, entry);
            }
            log.finish().unwrap()
        }
        Change::AppendOld(sizes) => {
            for (position, size) in (next..).zip(sizes) {
                let entry = entry(position, *size);
                table.insert(position, encode(&entry).unwrap().as_slice()).unwrap();
                model.insert(position, entry);
            }
            next + sizes.len() as u64
        }
        Change::Remove(places) => {
            let places: BTreeSet<u64> = places.iter().filter_map(|per_mille| at(*per_mille)).collect();
            model.retain(|position, _| !places.contains(position));
            // Newest first, as a fork finds them.
            log::remove(table, &mut places.into_iter().rev().collect::<Vec<_>>()).unwrap();
            next
        }
        Change::RemoveBelow(per_mille) => {
            let end = at(*per_mille).unwrap_or(next);
            log::remove_below(table, end).unwrap();
            model.retain(|position, _| *position >= end);
            next
        }
    }
}

fn read(table: &impl ReadableTable<u64, &'static [u8]>, positions: Range<u64>) -> Vec<(u64, Entry)> {
    log::entries(table, positions).unwrap().map(Result::unwrap).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(30))]

    #[test]
    fn whatever_is_appended_and_taken_out_the_log_holds_what_a_map_would(
        changes in changes(),
        ranges in prop::collection::vec((0..1100u64, 0..1100u64), 4),
    ) {
        let db = Database::builder().create_with_backend(InMemoryBackend::new()).unwrap();
        let transaction = db.begin_write().unwrap();
        let mut table = transaction.open_table(EVENT_LOG).unwrap();
        let (mut model, mut next) = (BTreeMap::new(), 0);
        for change in &changes {
            next = apply(change, &mut table, &mut model, next);
            let all: Vec<(u64, Entry)> = model.iter().map(|(at, entry)| (*at, entry.clone())).collect();
            prop_assert_eq!(log::len(&table).unwrap(), all.len() as u64);
            prop_assert_eq!(read(&table, 0..u64::MAX), all.clone());
            let mut backwards: Vec<_> =
                log::entries(&table, 0..u64::MAX).unwrap().rev().map(Result::unwrap).collect();
            backwards.reverse();
            prop_assert_eq!(backwards, all);
            for &(from, to) in &ranges {
                let (from, to) = (next * from / 1000, next * to / 1000);
                let some: Vec<_> =
                    model.iter().filter(|(at, _)| (from..to).contains(at)).map(|(at, it)| (*at, it.clone())).collect();
                prop_assert_eq!(read(&table, from..to), some);
            }
            for row in table.iter().unwrap() {
                let (first, row) = row.unwrap();
                prop_assert!(row.value().len() < 64 << 10 || read(&table, first.value()..u64::MAX)[0].1.body.len() > 60_000);
            }
        }
    }

    #[test]
    fn no_bytes_make_a_row_of_the_log_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..400), version in 0..4u8) {
        if let Some(first) = bytes.first_mut() {
            *first = version;
        }
        let db = Database::builder().create_with_backend(InMemoryBackend::new()).unwrap();
        let transaction = db.begin_write().unwrap();
        let mut table = transaction.open_table(EVENT_LOG).unwrap();
        table.insert(5, bytes.as_slice()).unwrap();
        for entry in log::entries(&table, 0..u64::MAX).unwrap() {
            if let Err(error) = entry {
                prop_assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
            }
        }
    }
}

#[test]
fn a_row_that_was_cut_off_or_made_longer_is_damage() {
    let db = Database::builder().create_with_backend(InMemoryBackend::new()).unwrap();
    let transaction = db.begin_write().unwrap();
    let mut table = transaction.open_table(EVENT_LOG).unwrap();
    let mut log = log::Appender::new(&mut table, 0);
    (0..5).for_each(|position| log.append(&entry(position, 50)).unwrap());
    log.finish().unwrap();
    let row = table.get(0).unwrap().unwrap().value().to_vec();
    for length in 0..row.len() {
        table.insert(0, &row[..length]).unwrap();
        let damaged = log::entries(&table, 0..u64::MAX).unwrap().any(|entry| entry.is_err());
        assert!(damaged, "{length} of {} bytes", row.len());
    }
    table.insert(0, [row, vec![0]].concat().as_slice()).unwrap();
    assert!(log::entries(&table, 0..u64::MAX).unwrap().any(|entry| entry.is_err()));
}

/// Makes the rows of a log what layout 3 wrote: one for each entry.
fn unpack_rows(path: &Path) {
    let db = Database::create(path).unwrap();
    let transaction = db.begin_write().unwrap();
    {
        let mut table = transaction.open_table(EVENT_LOG).unwrap();
        let entries = read(&table, 0..u64::MAX);
        log::remove_below(&mut table, u64::MAX).unwrap();
        for (position, entry) in entries {
            table.insert(position, encode(&entry).unwrap().as_slice()).unwrap();
        }
    }
    transaction.commit().unwrap();
}

#[test]
fn a_file_of_the_third_layout_goes_on_in_this_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("relayer.redb");
    let store = Store::open(&path, identity(), Some(1), Added::Read).unwrap();
    for number in 1..=4u64 {
        let announced: &[u8] = if number == 1 { &[1, 2] } else { &[] };
        let accepted = stretch(block(number, 0), announced, &[1, 2]);
        store.accept(&Stretch { finalized: Some(number.min(2)), ..accepted }).unwrap();
    }
    let claimed = store.claim(6).unwrap();
    store.acknowledge(claimed.into_iter().map(|it| it.position).collect()).unwrap();
    let (epoch, before) =
        (store.epoch(), read(&store.db.begin_read().unwrap().open_table(EVENT_LOG).unwrap(), 0..99));
    drop(store);
    unpack_rows(&path);
    age(&path, 3, epoch, &["blocked"]);

    let store = Store::open(&path, identity(), None, Added::Leave).unwrap();
    let after = read(&store.db.begin_read().unwrap().open_table(EVENT_LOG).unwrap(), 0..99);
    assert_eq!((after, store.epoch()), (before, epoch));
    assert_eq!((store.waiting(), waiting(&store).len()), (4, 4));
    let all = BlockRange::new(1, 4).unwrap();
    let another = u64::MAX;
    let seen: Vec<_> = (1..=4).flat_map(|block| (0..4).map(move |index| ((block, index), another))).collect();
    let comparison = store.compare(all, &seen, vec![]).unwrap();
    assert_eq!(comparison.extra, vec![], "of each it is known that it stands, and no more");
    assert_eq!(store.retract(Some(block(3, 0)), u64::MAX).unwrap().unwrap().retracted, 2);
    store.accept(&stretch(block(4, 1), &[], &[1, 2])).unwrap();
    claim_all(&store);
    assert_eq!(store.prune(0, 100).unwrap(), 6);
    let standing = read(&store.db.begin_read().unwrap().open_table(EVENT_LOG).unwrap(), 0..99);
    assert_eq!(standing.len(), 2 + 2 + 2 + 2, "blocks 3 and 4, what took block 4 back, and another block 4");
}
