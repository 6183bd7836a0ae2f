//! What does not get out by itself, and looking page by page.

use super::*;

fn odd(at: BlockRef, log_index: u64) -> Quarantined {
    Quarantined {
        address: escrow(1),
        topics: vec![],
        data: vec![],
        block: (at.number, at.hash),
        transaction_hash: B256::ZERO,
        log_index,
        reason: "the test says so".into(),
    }
}

fn refused(store: &Store) -> Vec<(u64, String)> {
    store.blocked(|it| Some((it.claimed.position, it.refusal.reason))).unwrap()
}

#[test]
fn a_refused_message_is_known_after_a_restart_with_the_time_of_its_first_refusal_until_it_is_taken() {
    let folder = tempfile::tempdir().unwrap();
    let open = || Store::open(&folder.path().join("relayer.redb"), identity(), Some(1), Added::Read).unwrap();
    let store = open();
    assert_eq!((refused(&store), store.blocked_len().unwrap()), (vec![], 0));
    store.accept(&stretch(block(1, 0), &[1, 2], &[])).unwrap();
    store.settle(vec![0], &[(1, "lane".into(), "too odd".into())]).unwrap();
    let since = |store: &Store| store.blocked(|it| Some(it.refusal.since)).unwrap();
    let first = since(&store);
    drop(store);
    let store = open();
    assert_eq!(refused(&store), [(1, "too odd".to_owned())]);
    store.settle(vec![], &[(1, "lane".into(), "still too odd".into())]).unwrap();
    assert_eq!((refused(&store), since(&store)), (vec![(1, "still too odd".to_owned())], first));
    store.acknowledge(vec![1]).unwrap();
    assert_eq!((refused(&store), store.waiting()), (vec![], 0));
}

#[test]
fn only_a_refused_message_can_be_given_up_and_only_once() {
    let store = memory();
    store.accept(&stretch(block(1, 0), &[1], &[1, 1])).unwrap();
    assert!(!store.give_up(0).unwrap(), "it is not refused");
    store.settle(vec![], &[(0, "lane".into(), "too odd".into())]).unwrap();
    assert!(store.give_up(0).unwrap());
    assert!(!store.give_up(0).unwrap());
    assert_eq!((store.waiting(), store.watermark().unwrap()), (2, 1));
    assert_eq!(waiting(&store).iter().map(|(_, _, sequence, _)| *sequence).collect::<Vec<_>>(), [2, 3]);
}

#[test]
fn a_log_leaves_the_quarantine_with_its_event_and_an_event_that_stands_already_is_not_told_twice() {
    let store = memory();
    let at = block(1, 0);
    let quarantined = vec![odd(at, 7), odd(at, 8), odd(at, 9)];
    store.accept(&Stretch { quarantined, ..stretch(at, &[1], &[]) }).unwrap();
    let found =
        |index| LateStretch { events: vec![event(escrow(1), at, index, false)], ..Default::default() };
    assert_eq!(store.release(&found(7), &[(at, 7)]).unwrap(), Some(1));
    assert_eq!(store.release(&found(7), &[(at, 7)]).unwrap(), None, "it is there no more");
    // The history that was read for an added signature had it first.
    store.import(&[escrow(9)], 1).unwrap();
    let (id, _) = store.late_read().unwrap();
    store.accept_late(id, &LateStretch { next: 2, ..found(8) }).unwrap();
    assert_eq!(store.quarantined().unwrap(), [odd(at, 9)]);
    assert!(store.drop_quarantined((at, 9)).unwrap() && !store.drop_quarantined((at, 9)).unwrap());
    let late: Vec<_> =
        store.claim(9).unwrap().into_iter().map(|it| (it.entry.sequence, it.entry.late)).collect();
    assert_eq!(late, [(1, false), (2, true), (3, true)]);
}

#[test]
fn a_log_of_another_block_at_the_same_place_is_neither_released_nor_dropped() {
    let store = memory();
    store.accept(&stretch(block(1, 0), &[1], &[])).unwrap();
    let (lost, stands) = (block(2, 0), block(2, 1));
    let odd_in = |at| Stretch { quarantined: vec![odd(at, 7), odd(at, 8)], ..stretch(at, &[], &[]) };
    store.accept(&odd_in(lost)).unwrap();
    store.retract(Some(block(1, 0)), u64::MAX).unwrap().unwrap();
    store.accept(&odd_in(stands)).unwrap();
    let found = LateStretch { events: vec![event(escrow(1), lost, 7, false)], ..LateStretch::default() };
    assert_eq!(store.release(&found, &[(stands, 8), (lost, 7)]).unwrap(), None);
    assert!(!store.drop_quarantined((lost, 7)).unwrap());
    assert_eq!(store.quarantined().unwrap(), [odd(stands, 7), odd(stands, 8)]);
    assert_eq!(store.entries(), 1, "nothing of the lost block was stored");
}

#[test]
fn a_message_acknowledged_or_given_up_before_its_refusal_is_noted_is_not_refused() {
    let store = memory();
    store.accept(&stretch(block(1, 0), &[1], &[1, 1, 1])).unwrap();
    let note = |positions: &[u64]| -> Vec<_> {
        positions.iter().map(|position| (*position, "lane".to_owned(), "too odd".to_owned())).collect()
    };
    // Refused, offered again and taken within one commit.
    store.settle(vec![0], &note(&[0])).unwrap();
    assert_eq!(refused(&store), []);
    // Below the watermark, and in a run above it.
    store.settle(vec![2], &note(&[0, 1])).unwrap();
    store.settle(vec![], &note(&[0, 1, 2])).unwrap();
    assert_eq!(refused(&store), [(1, "too odd".to_owned())]);
    assert!(!store.give_up(0).unwrap() && store.give_up(1).unwrap());
    assert_eq!((store.waiting(), store.watermark().unwrap()), (1, 3));
}

#[test]
fn beside_a_scanner_an_imported_escrow_joins_by_a_late_read_even_without_a_past() {
    let store = memory();
    store.accept(&stretch(block(1, 0), &[1], &[])).unwrap();
    assert_eq!(store.import_beside(&[escrow(2)], 3).unwrap(), None, "a fork has taken it back below");
    assert_eq!(store.import_beside(&[escrow(1), escrow(2)], 2).unwrap(), Some(Imported { new: 1, known: 1 }));
    assert!(!store.registry().contains(&escrow(2)), "the block being read may lack its logs");
    let (id, _) = store.late_read().unwrap();
    assert!(store.accept_late(id, &LateStretch { next: 2, ..LateStretch::default() }).unwrap());
    assert!(store.registry().contains(&escrow(2)));
}

#[test]
fn pages_hold_what_was_asked_for_and_together_everything_once() {
    let store = memory();
    let at = block(1, 0);
    let escrows: Vec<u8> = (1..=7).collect();
    let quarantined = (50..55).map(|index| odd(at, index)).collect();
    store.accept(&Stretch { quarantined, ..stretch(at, &escrows, &[3, 3]) }).unwrap();
    let (mut positions, mut next) = (vec![], Some(0));
    while let Some(position) = next {
        let page = store.entries_from(position, 4).unwrap();
        assert!(page.entries.len() <= 4);
        positions.extend(page.entries.into_iter().map(|claimed| claimed.position));
        next = page.next;
    }
    assert_eq!(positions, Vec::from_iter(0..9));
    let (mut addresses, mut after) = (vec![], None);
    while let Some((last, _)) = store.escrows_after(after, 3).unwrap().last().cloned() {
        addresses.extend(store.escrows_after(after, 3).unwrap().into_iter().map(|(address, _)| address));
        after = Some(last);
    }
    assert_eq!(addresses, escrows.iter().map(|number| escrow(*number)).collect::<Vec<_>>());
    let first = store.quarantined_after(None, 2).unwrap();
    let rest = store.quarantined_after(Some(first[1].place()), 9).unwrap();
    assert_eq!(
        [first, rest].concat().iter().map(|log| log.log_index).collect::<Vec<_>>(),
        [50, 51, 52, 53, 54]
    );
    store.acknowledge(vec![0, 1, 4]).unwrap();
    let acknowledged = store.acknowledged().unwrap();
    assert_eq!((0..9).filter(|position| acknowledged.contains(*position)).collect::<Vec<_>>(), [0, 1, 4]);
}

#[test]
fn blocks_are_split_where_the_way_changes_in_which_they_were_read() {
    let store = memory();
    let read = |number: u64, by_hash: bool| {
        let unfinal_from = by_hash.then_some(number);
        store.accept(&Stretch { unfinal_from, ..stretch(block(number, 0), &[], &[]) }).unwrap();
    };
    for (number, by_hash) in [(1, false), (2, false), (3, true), (4, true), (5, false), (6, true)] {
        read(number, by_hash);
    }
    let mut parts = vec![];
    let mut rest = BlockRange::new(1, 6);
    while let Some(blocks) = rest {
        let (part, by_hash) = store.read_one_way(blocks).unwrap();
        parts.push((part.from(), part.to(), by_hash));
        rest = blocks.tail(part.to() + 1);
    }
    assert_eq!(parts, [(1, 2, false), (3, 4, true), (5, 5, false), (6, 6, true)]);
    assert!(store.read_one_way(BlockRange::new(4, 4).unwrap()).unwrap().1);
}

#[test]
fn an_event_that_stands_and_whose_message_is_lost_is_found_and_nothing_else_is() {
    let store = memory();
    for number in 1..=3 {
        store.accept(&stretch(block(number, 0), &[number as u8], &[1, 1])).unwrap();
    }
    store.claim(99).unwrap();
    store.retract(Some(block(2, 0)), u64::MAX).unwrap().unwrap();
    store.accept(&stretch(block(3, 1), &[], &[2])).unwrap();
    let all = BlockRange::new(0, 9).unwrap();
    assert_eq!(store.unkept(all).unwrap(), [], "what was withdrawn does not stand");
    let transaction = store.db.begin_write().unwrap();
    log::remove(&mut transaction.open_table(EVENT_LOG).unwrap(), &mut [4]).unwrap();
    transaction.commit().unwrap();
    assert_eq!(store.unkept(all).unwrap(), [(2, 1)]);
    assert_eq!(store.unkept(BlockRange::new(3, 9).unwrap()).unwrap(), []);
}
