//! A clock that jumps: times stored from before and after it change what is pruned when, and nothing else.

use super::*;

/// As if entry number n had been stored at `times[n]`.
fn store_at(store: &Store, times: &[u64]) {
    let transaction = store.db.begin_write().unwrap();
    {
        let mut table = transaction.open_table(EVENT_LOG).unwrap();
        let entries: Vec<Entry> =
            log::entries(&table, 0..u64::MAX).unwrap().map(|entry| entry.unwrap().1).collect();
        assert_eq!(entries.len(), times.len());
        log::remove_below(&mut table, u64::MAX).unwrap();
        let mut log = log::Appender::new(&mut table, 0);
        for (entry, time) in entries.into_iter().zip(times) {
            log.append(&Entry { stored_at: *time, ..entry }).unwrap();
        }
        log.finish().unwrap();
    }
    transaction.commit().unwrap();
}

/// Six blocks with an approval each, the first three final.
fn six_blocks() -> Store {
    let store = memory();
    for number in 1..=6 {
        let announced: &[u8] = if number == 1 { &[1] } else { &[] };
        let finalized = (number == 6).then_some(3);
        store.accept(&Stretch { finalized, ..stretch(block(number, 0), announced, &[1]) }).unwrap();
    }
    store
}

#[test]
fn whatever_times_are_stored_only_what_is_acknowledged_and_final_is_pruned_and_all_else_goes_on() {
    const FUTURE: u64 = 1 << 40;
    let table: [[u64; 7]; 5] = [
        [0; 7],
        [u64::MAX; 7],
        [FUTURE, 0, FUTURE, 0, 0, 0, 0],
        [0, FUTURE, 0, 0, 0, 0, 0],
        [5, 4, 3, 2, 1, 0, 0],
    ];
    for times in table {
        for retention in [0, 3600, u64::MAX] {
            let store = six_blocks();
            store_at(&store, &times);
            assert_eq!(store.prune(retention, 100).unwrap(), 0, "nothing is acknowledged");
            let claimed = store.claim(usize::MAX).unwrap();
            assert_eq!(claimed.len(), 7);
            store.acknowledge(claimed.iter().map(|it| it.position).collect()).unwrap();
            let pruned = store.prune(retention, 100).unwrap();
            assert!(pruned <= 4, "{pruned} of {times:?}: the rest is not final");
            let withdrawal = store.retract(Some(block(3, 0)), u64::MAX).unwrap().unwrap();
            assert_eq!(withdrawal.retracted, 3, "{times:?}");
            store.accept(&stretch(block(4, 1), &[], &[1])).unwrap();
            let sequences: Vec<u64> =
                waiting(&store).into_iter().map(|(_, _, sequence, _)| sequence).collect();
            assert_eq!(sequences, [8, 9, 10, 11], "{times:?}");
        }
    }
}

#[test]
fn an_entry_stored_while_the_clock_was_ahead_does_not_hold_up_the_pruning_of_later_ones() {
    let store = six_blocks();
    let claimed = store.claim(usize::MAX).unwrap();
    store.acknowledge(claimed.iter().map(|it| it.position).collect()).unwrap();
    store_at(&store, &[1 << 40, 1 << 40, 0, 0, 0, 0, 0]);
    assert_eq!(store.prune(3600, 100).unwrap(), 4);
}
