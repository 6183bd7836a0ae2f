//! What a status shows of the store is what is in it.

use super::*;

#[test]
fn an_escrow_that_goes_on_in_the_commit_that_would_archive_it_stays_watched() {
    let store = memory();
    let end = Event { ends: true, ..event(escrow(1), block(1, 0), 5, false) };
    let (announced, blocks) = (vec![(escrow(1), block(1, 0))], vec![block(1, 0)]);
    store.accept(&Stretch { announced, events: vec![end], blocks, ..Stretch::default() }).unwrap();
    let goes_on = stretch(block(9, 0), &[], &[1]);
    store.accept(&Stretch { archive_upto: Some(1), ..goes_on }).unwrap();
    let census = || (store.registry().census().watched, store.registry().census().archived);
    assert_eq!(census(), (1, 0));
    store.accept(&Stretch { archive_upto: Some(8), ..stretch(block(20, 0), &[], &[]) }).unwrap();
    assert_eq!(census(), (1, 0), "it ended anew in block 9");
    store.accept(&Stretch { archive_upto: Some(9), ..stretch(block(21, 0), &[], &[]) }).unwrap();
    assert_eq!(census(), (0, 1));
}

#[test]
fn the_oldest_that_waits_is_the_first_not_acknowledged_and_not_left_out() {
    let store = memory();
    assert_eq!(store.oldest_waiting().unwrap(), None);
    store.accept(&stretch(block(1, 0), &[1, 2, 3], &[1, 2])).unwrap();
    let whose = |entry: Option<Entry>| entry.map(|entry| (entry.escrow, entry.sequence));
    assert_eq!(whose(store.oldest_waiting().unwrap()), Some((escrow(1), 1)));
    store.acknowledge(vec![0, 2]).unwrap();
    assert_eq!(whose(store.oldest_waiting().unwrap()), Some((escrow(2), 1)));
    let without = |left_out: u8| store.oldest_waiting_but(|entry| entry.escrow == escrow(left_out)).unwrap();
    assert_eq!(whose(without(2)), Some((escrow(1), 2)));
    assert_eq!(whose(without(1)), Some((escrow(2), 1)));
    assert_eq!(store.oldest_waiting_but(|_| true).unwrap(), None);
    store.acknowledge(vec![1, 3, 4]).unwrap();
    assert_eq!(store.oldest_waiting().unwrap(), None);
}

#[test]
fn however_many_were_acknowledged_behind_what_is_left_out_the_oldest_that_waits_is_found() {
    let store = memory();
    let approved = [2; 6_001];
    store.accept(&stretch(block(1, 0), &[1], &[])).unwrap();
    store.accept(&stretch(block(2, 0), &[2], &approved)).unwrap();
    store.acknowledge((1..=6_001).collect()).unwrap();
    let oldest = store.oldest_waiting_but(|entry| entry.escrow == escrow(1)).unwrap();
    assert_eq!(oldest.map(|entry| (entry.escrow, entry.sequence)), Some((escrow(2), 6_002)));
}

#[test]
fn the_newest_entries_come_newest_first_and_no_more_than_asked_for() {
    let store = memory();
    store.accept(&stretch(block(1, 0), &[1, 2], &[1])).unwrap();
    let newest: Vec<(Address, u64)> =
        store.newest(2).unwrap().into_iter().map(|entry| (entry.escrow, entry.sequence)).collect();
    assert_eq!(newest, [(escrow(1), 2), (escrow(2), 1)]);
    assert_eq!(store.newest(10).unwrap().len(), 3);
}

#[test]
fn escrows_are_counted_by_state_through_forks_imports_archiving_and_restarts() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("relayer.redb");
    let open = || Store::open(&path, identity(), Some(1), Added::Read).unwrap();
    let store = open();
    store.accept(&stretch(block(1, 0), &[1, 2], &[])).unwrap();
    let mut ends = stretch(block(2, 0), &[3], &[1]);
    ends.events.iter_mut().for_each(|event| event.ends = !event.announces);
    store.accept(&ends).unwrap();
    store.claim(usize::MAX).unwrap();
    let census = |watched, joining, archived, withdrawn| Census { watched, joining, archived, withdrawn };
    assert_eq!(store.registry().census(), census(3, 0, 0, 0));

    store.import(&[escrow(8), escrow(9)], 1).unwrap();
    assert_eq!(store.registry().census(), census(3, 2, 0, 0));
    store.retract(Some(block(1, 0)), u64::MAX).unwrap().unwrap();
    assert_eq!(store.registry().census(), census(2, 2, 0, 1));
    ends.blocks = vec![block(2, 1)];
    ends.events = vec![event(escrow(1), block(2, 1), 0, false)];
    ends.events[0].ends = true;
    ends.announced = Vec::new();
    store.accept(&ends).unwrap();
    store.accept(&Stretch { archive_upto: Some(2), ..stretch(block(3, 1), &[], &[]) }).unwrap();
    assert_eq!(store.registry().census(), census(1, 2, 1, 1));
    drop(store);
    assert_eq!(open().registry().census(), census(1, 2, 1, 1));
    let store = open();
    store.accept(&stretch(block(4, 1), &[3], &[])).unwrap();
    assert_eq!(store.registry().census(), census(2, 2, 1, 0), "announced again");
}
