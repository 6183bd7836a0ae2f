mod clock;
mod crash;
mod rows;
mod standing;
mod status;
mod stuck;
mod values;

use std::collections::{BTreeMap, BTreeSet};

use alloy::json_abi::Event as AbiEvent;
use alloy::primitives::B256;
use proptest::prelude::*;
use redb::backends::InMemoryBackend;

use super::standing::standing_in;
use super::*;
use crate::event::{BlockRange, Log, Recognised, Role, Signatures, event_id};

pub(crate) fn identity() -> Identity {
    Identity {
        chain_id: 1,
        factory: Address::repeat_byte(0xFA),
        signatures: vec!["escrow: event Approved(address indexed approver)".into()],
        sink: "stdout".into(),
        ordering: "escrow".into(),
    }
}

pub(crate) fn memory() -> Store {
    Store::open_backend(InMemoryBackend::new(), identity(), Some(1), Added::Read).unwrap()
}

pub(crate) fn escrow(number: u8) -> Address {
    Address::repeat_byte(number)
}

/// A block of fork `fork`: forks differ in their hashes.
pub(crate) fn block(number: u64, fork: u8) -> BlockRef {
    let mut hash = B256::repeat_byte(fork);
    hash[..8].copy_from_slice(&number.to_be_bytes());
    BlockRef { number, hash }
}

fn signatures() -> Signatures {
    let parse = |text: &str| vec![AbiEvent::parse(text).unwrap()];
    Signatures::new(
        &parse("EscrowDeployed(address indexed escrow)"),
        "escrow",
        &parse("Approved(address indexed approver)"),
        &[],
    )
    .unwrap()
}

pub(crate) fn event(of: Address, block: BlockRef, log_index: u64, announces: bool) -> Event {
    let (role, signature, address) = match announces {
        true => (Role::Announcement, "EscrowDeployed(address)", identity().factory),
        false => (Role::Lifecycle, "Approved(address)", of),
    };
    let log = Log {
        address,
        topics: vec![AbiEvent::parse(signature).unwrap().selector(), of.into_word()],
        data: Default::default(),
        block,
        transaction_hash: B256::ZERO,
        transaction_index: 0,
        log_index,
        block_timestamp: None,
    };
    match signatures().recognise(role, &log) {
        Recognised::Known(decoded) => decoded.event(1, &log, 0),
        other => panic!("{other:?}"),
    }
}

pub(crate) fn stretch(block: BlockRef, announced: &[u8], approved: &[u8]) -> Stretch {
    let mut events = Vec::new();
    for number in announced {
        events.push(event(escrow(*number), block, events.len() as u64, true));
    }
    for number in approved {
        events.push(event(escrow(*number), block, events.len() as u64, false));
    }
    Stretch {
        announced: announced.iter().map(|number| (escrow(*number), block)).collect(),
        events,
        blocks: vec![block],
        ..Stretch::default()
    }
}

/// (position, escrow, sequence, whether it retracts) of everything not acknowledged, from a store just opened.
fn waiting(store: &Store) -> Vec<(u64, Address, u64, bool)> {
    let claimed = store.claim(usize::MAX).unwrap();
    claimed
        .into_iter()
        .map(|Claimed { position, entry }| {
            (position, entry.escrow, entry.sequence, entry.kind != Kind::Event)
        })
        .collect()
}

#[test]
fn registry_counts_an_address_once_whatever_its_case() {
    let store = memory();
    let lower: Address = "0x311e63dfcefe7f2c202715ef0df01cda82f58914".parse().unwrap();
    let mixed: Address = "0x311E63dfcEfe7f2c202715ef0DF01CDA82f58914".parse().unwrap();
    let at = block(1, 0);
    let announced = vec![(lower, at), (mixed, at)];
    store.accept(&Stretch { announced, blocks: vec![at], ..Stretch::default() }).unwrap();
    assert_eq!(store.registry().len(), 1);
    assert!(store.registry().contains(&mixed));
}

#[test]
fn registry_cursor_and_what_waits_survive_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("relayer.redb");
    let store = Store::open(&path, identity(), Some(5), Added::Read).unwrap();
    assert_eq!((store.next_block(), store.cursor()), (5, None));
    store.accept(&stretch(block(5, 0), &[1, 2], &[1, 1])).unwrap();
    let epoch = store.epoch();
    let first = store.claim(1).unwrap();
    store.acknowledge(vec![first[0].position]).unwrap();
    drop(store);

    let store = Store::open(&path, identity(), None, Added::Read).unwrap();
    assert_eq!(store.epoch(), epoch);
    assert_eq!((store.next_block(), store.cursor()), (6, Some(block(5, 0))));
    assert_eq!(store.registry().len(), 2);
    assert_eq!(store.waiting(), 3);
    let expected = vec![(1, escrow(2), 1, false), (2, escrow(1), 2, false), (3, escrow(1), 3, false)];
    assert_eq!(waiting(&store), expected);
}

#[test]
fn the_bytes_that_were_stored_are_the_bytes_claimed_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("relayer.redb");
    let store = Store::open(&path, identity(), Some(1), Added::Read).unwrap();
    store.accept(&stretch(block(1, 0), &[1], &[1])).unwrap();
    let before: Vec<Entry> = store.claim(9).unwrap().into_iter().map(|claimed| claimed.entry).collect();
    drop(store);
    let store = Store::open(&path, identity(), None, Added::Read).unwrap();
    let after: Vec<Entry> = store.claim(9).unwrap().into_iter().map(|claimed| claimed.entry).collect();
    assert_eq!(before, after);
    assert_eq!(before[1].attributes(1), after[1].attributes(1));
}

#[test]
fn a_store_made_for_something_else_is_refused_and_both_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("relayer.redb");
    drop(Store::open(&path, identity(), Some(1), Added::Read).unwrap());
    let table: [(Identity, [&str; 2]); 5] = [
        (Identity { chain_id: 2, ..identity() }, ["chain.id: the store has 1", "the configuration 2"]),
        (Identity { factory: escrow(9), ..identity() }, ["0xfafa", "0x0909"]),
        (Identity { sink: "file x".into(), ..identity() }, ["stdout", "file x"]),
        (Identity { ordering: "none".into(), ..identity() }, ["escrow", "none"]),
        (Identity { signatures: vec![], ..identity() }, ["the store has `escrow: event Approved", "has not"]),
    ];
    for (other, expected) in table {
        let error = Store::open(&path, other, None, Added::Read).unwrap_err();
        assert!(error.is_configuration(), "{error}");
        for text in expected {
            assert!(error.to_string().contains(text), "{error}");
        }
    }
    Store::open(&path, identity(), None, Added::Read).unwrap();
}

#[test]
fn a_second_opening_of_the_same_file_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("relayer.redb");
    let _held = Store::open(&path, identity(), Some(1), Added::Read).unwrap();
    let error = Store::open(&path, identity(), Some(1), Added::Read).unwrap_err();
    assert!(matches!(error, StoreError::Locked { .. }), "{error}");
}

#[test]
fn files_that_are_no_store_are_refused_and_left_as_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let foreign = folder.path().join("foreign.redb");
    std::fs::write(&foreign, "not a database, but somebody's file".repeat(500)).unwrap();
    let before = std::fs::read(&foreign).unwrap();
    let error = Store::open(&foreign, identity(), Some(1), Added::Read).unwrap_err();
    assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
    assert_eq!(std::fs::read(&foreign).unwrap(), before);

    let other = folder.path().join("other.redb");
    let db = Database::create(&other).unwrap();
    let transaction = db.begin_write().unwrap();
    transaction.open_table(redb::TableDefinition::<u64, u64>::new("theirs")).unwrap();
    transaction.commit().unwrap();
    drop(db);
    let error = Store::open(&other, identity(), Some(1), Added::Read).unwrap_err();
    assert!(matches!(error, StoreError::Damaged { .. }), "{error}");

    let empty = folder.path().join("empty.redb");
    std::fs::write(&empty, "").unwrap();
    let error = Store::open(&empty, identity(), Some(1), Added::Read).unwrap_err();
    assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
    assert_eq!(std::fs::read(&empty).unwrap(), b"");

    let nowhere = folder.path().join("no/such/folder/relayer.redb");
    let error = Store::open(&nowhere, identity(), Some(1), Added::Read).unwrap_err();
    assert!(error.is_configuration() && error.to_string().contains("does not exist"), "{error}");
    let error = Store::open(&folder.path().join("new.redb"), identity(), None, Added::Read).unwrap_err();
    assert!(matches!(error, StoreError::NoStartBlock { .. }), "{error}");
}

#[test]
fn what_a_crash_left_of_a_new_store_is_no_hindrance() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("relayer.redb");
    let unfinished = folder.path().join("relayer.redb.new");
    let whole = folder.path().join("whole.redb");
    drop(Store::open(&whole, Identity { chain_id: 7, ..identity() }, Some(5), Added::Read).unwrap());
    let left = [vec![], vec![0; 4096], b"redb\x1a\x0a".to_vec(), std::fs::read(&whole).unwrap()];
    for left in left {
        std::fs::write(&unfinished, left).unwrap();
        let store = Store::open(&path, identity(), Some(1), Added::Read).unwrap();
        assert_eq!((store.start_block(), unfinished.exists()), (1, false));
        store.accept(&stretch(block(1, 0), &[1], &[])).unwrap();
        drop(store);
        let store = Store::open(&path, identity(), None, Added::Read).unwrap();
        assert_eq!(store.next_block(), 2);
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn a_fork_withdraws_newest_first_on_the_same_lane_and_frees_what_nobody_saw() {
    let store = memory();
    store.accept(&stretch(block(1, 0), &[1], &[])).unwrap();
    store.accept(&stretch(block(2, 0), &[2], &[1, 1, 2])).unwrap();
    // Announcement of 1, announcement of 2 and the first approval of 1 may be on their way.
    assert_eq!(store.claim(3).unwrap().len(), 3);
    let withdrawal = store.retract(Some(block(1, 0)), u64::MAX).unwrap().unwrap();
    assert_eq!(withdrawal, Withdrawal { retracted: 2, dropped: 2, escrows: 1 });
    assert_eq!(store.cursor(), Some(block(1, 0)));
    assert!(store.registry().contains(&escrow(1)) && !store.registry().contains(&escrow(2)));
    let left = waiting(&store);
    assert_eq!(left, vec![(5, escrow(1), 3, true), (6, escrow(2), 2, true)]);
    store.acknowledge(vec![6, 0, 5, 2, 1]).unwrap();
    assert_eq!((store.waiting(), store.watermark().unwrap()), (0, 7));

    // Announced again on the other fork: the lane is numbered on.
    store.accept(&stretch(block(2, 9), &[2], &[2])).unwrap();
    assert_eq!(waiting(&store), vec![(7, escrow(2), 3, false), (8, escrow(2), 4, false)]);
}

#[test]
fn a_fork_seen_by_nobody_leaves_no_trace() {
    let store = memory();
    store.accept(&stretch(block(1, 0), &[1], &[])).unwrap();
    store.accept(&stretch(block(2, 0), &[2], &[1, 2])).unwrap();
    let withdrawal = store.retract(Some(block(1, 0)), u64::MAX).unwrap().unwrap();
    assert_eq!(withdrawal, Withdrawal { retracted: 0, dropped: 3, escrows: 1 });
    store.accept(&stretch(block(2, 9), &[2], &[1])).unwrap();
    let sequences: Vec<_> =
        waiting(&store).into_iter().map(|(_, escrow, sequence, _)| (escrow, sequence)).collect();
    assert_eq!(sequences, vec![(escrow(1), 1), (escrow(2), 1), (escrow(1), 2)]);
    assert_eq!(store.waiting(), 3);
}

#[test]
fn entries_dropped_at_the_end_of_the_log_leave_nothing_to_claim() {
    let store = memory();
    store.accept(&stretch(block(1, 0), &[1], &[])).unwrap();
    store.accept(&stretch(block(2, 0), &[], &[1, 1])).unwrap();
    assert_eq!(store.claim(1).unwrap().len(), 1);
    store.retract(Some(block(1, 0)), u64::MAX).unwrap().unwrap();
    assert!(!store.all_claimed());
    assert_eq!(store.claim(1000).unwrap().len(), 0);
    assert!(store.all_claimed());
    store.acknowledge(vec![0]).unwrap();
    assert_eq!((store.waiting(), store.watermark().unwrap()), (0, 3));
}

#[test]
fn what_was_in_the_log_when_the_file_was_opened_may_have_been_sent_and_is_withdrawn_aloud() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("relayer.redb");
    let store = Store::open(&path, identity(), Some(1), Added::Read).unwrap();
    store.accept(&stretch(block(1, 0), &[1], &[])).unwrap();
    store.accept(&stretch(block(2, 0), &[], &[1])).unwrap();
    drop(store);
    let store = Store::open(&path, identity(), None, Added::Read).unwrap();
    assert_eq!(store.retract(Some(block(1, 0)), u64::MAX).unwrap().unwrap().retracted, 1);
}

#[test]
fn there_and_back_again_every_fork_is_published_and_withdrawn_in_turn() {
    let store = memory();
    store.accept(&stretch(block(1, 0), &[1], &[])).unwrap();
    for fork in [7, 8, 7] {
        store.accept(&stretch(block(2, fork), &[], &[1])).unwrap();
        store.claim(usize::MAX).unwrap();
        assert_eq!(store.retract(Some(block(1, 0)), u64::MAX).unwrap().unwrap().retracted, 1);
    }
    store.accept(&stretch(block(2, 8), &[], &[1])).unwrap();
    assert_eq!(store.log_len().unwrap(), 1 + 3 * 2 + 1);
}

#[test]
fn a_fork_below_finality_changes_nothing_and_says_so() {
    let store = memory();
    for number in 1..=3 {
        let finalized = Some(2);
        store.accept(&Stretch { finalized, ..stretch(block(number, 0), &[], &[]) }).unwrap();
    }
    assert_eq!(store.remembered().unwrap(), vec![block(3, 0), block(2, 0)]);
    let error = store.retract(None, u64::MAX).unwrap_err();
    assert!(matches!(error, StoreError::ForkBelowFinality { block: 2 }), "{error}");
    assert_eq!(store.cursor(), Some(block(3, 0)));
    store.retract(Some(block(2, 0)), u64::MAX).unwrap().unwrap();
    assert_eq!(store.next_block(), 3);
}

#[test]
fn trailing_or_missing_bytes_and_foreign_versions_of_a_value_are_damage() {
    let good = encode(&identity()).unwrap();
    assert_eq!(decode::<Identity>("t", &good).unwrap(), identity());
    let table =
        [vec![], good[..good.len() - 1].to_vec(), [&good[..], &[0]].concat(), [&[9], &good[1..]].concat()];
    for bytes in table {
        assert!(matches!(decode::<Identity>("t", &bytes), Err(StoreError::Damaged { .. })), "{bytes:?}");
    }
}

proptest! {
    #[test]
    fn no_bytes_make_a_value_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let bytes = [&[1], &bytes[..]].concat();
        let _ = decode::<Entry>("t", &bytes);
        let _ = decode::<Escrow>("t", &bytes);
        let _ = decode::<schema::Life>("t", &bytes);
        let _ = decode::<Quarantined>("t", &bytes);
    }

}

proptest! {
    // Each case syncs real files.
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Acknowledged in any order and portions, with restarts: what is claimed after a restart is exactly what was not.
    #[test]
    fn after_any_acknowledgements_a_restart_hands_out_exactly_the_rest(
        portions in prop::collection::vec(prop::collection::btree_set(0u64..40, 0..12), 1..6)
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("relayer.redb");
        let store = Store::open(&path, identity(), Some(1), Added::Read).unwrap();
        store.accept(&stretch(block(1, 0), &[1], &[1; 39])).unwrap();
        drop(store);
        let mut left: BTreeSet<u64> = (0..40).collect();
        for portion in portions {
            let store = Store::open(&path, identity(), None, Added::Read).unwrap();
            let claimed: BTreeSet<u64> = waiting(&store).into_iter().map(|(position, ..)| position).collect();
            prop_assert_eq!(&claimed, &left);
            prop_assert_eq!(store.waiting(), left.len() as u64);
            prop_assert_eq!(store.watermark().unwrap(), left.first().copied().unwrap_or(40));
            let done: Vec<u64> = portion.intersection(&left).copied().collect();
            left.retain(|position| !done.contains(position));
            store.acknowledge(done).unwrap();
        }
    }

    /// Random forks, claims and restarts against a plain list: per escrow the sequence has no gap, and what was
    /// published and not withdrawn is what the accepted blocks hold.
    #[test]
    fn through_forks_claims_and_restarts_each_lane_is_gapless_and_true(
        steps in prop::collection::vec((0u8..5, 0u64..4, prop::collection::vec(1u8..4, 0..4)), 1..25)
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("relayer.redb");
        let mut store = Store::open(&path, identity(), Some(1), Added::Read).unwrap();
        let mut chain: Vec<(BlockRef, Vec<u8>)> = Vec::new();
        let mut seen: BTreeMap<u64, Entry> = BTreeMap::new();
        let first = block(1, 0);
        store.accept(&stretch(first, &[1, 2, 3], &[])).unwrap();
        let mut fork = 0;
        for (kind, depth, approved) in steps {
            match kind {
                0 => {
                    fork += 1;
                    let keep = chain.len().saturating_sub(depth as usize);
                    chain.truncate(keep);
                    let ancestor = chain.last().map_or(first, |(block, _)| *block);
                    store.retract(Some(ancestor), u64::MAX).unwrap().unwrap();
                }
                1 => seen.extend(store.claim(depth as usize + 1).unwrap().into_iter().map(|it| (it.position, it.entry))),
                2 => {
                    drop(store);
                    store = Store::open(&path, identity(), None, Added::Read).unwrap();
                }
                _ => {
                    let next = block(store.next_block(), fork);
                    store.accept(&stretch(next, &[], &approved)).unwrap();
                    chain.push((next, approved));
                }
            }
        }
        seen.extend(store.claim(usize::MAX).unwrap().into_iter().map(|it| (it.position, it.entry)));
        let mut lanes: BTreeMap<Address, Vec<&Entry>> = BTreeMap::new();
        for entry in seen.values() {
            lanes.entry(entry.escrow).or_default().push(entry);
        }
        for (address, lane) in lanes {
            let sequences: Vec<u64> = lane.iter().map(|entry| entry.sequence).collect();
            prop_assert_eq!(&sequences, &(1..=lane.len() as u64).collect::<Vec<_>>(), "sequences of {}", address);
            let mut standing: Vec<String> = Vec::new();
            for entry in lane {
                match entry.kind {
                    Kind::Event => standing.push(entry.event_id(1)),
                    Kind::Retraction { of } => {
                        // Newest first: a withdrawal always takes the last one standing.
                        prop_assert_eq!(standing.pop(), Some(seen[&of].event_id(1)));
                    }
                }
            }
            let approvals = chain.iter().flat_map(|(block, approved)| {
                let places = approved.iter().enumerate().filter(move |(_, number)| escrow(**number) == address);
                places.map(move |(place, _)| event_id(1, &block.hash, place as u64))
            });
            prop_assert_eq!(standing.split_off(1), approvals.collect::<Vec<_>>(), "events of {}", address);
        }
    }
}

// ---- history read once more

/// The identity with a signature more.
fn extended() -> Identity {
    Identity { signatures: [identity().signatures, vec!["new".into()]].concat(), ..identity() }
}

fn late_stretch(next: u64, events: Vec<Event>) -> LateStretch {
    LateStretch { next, events, ..LateStretch::default() }
}

#[test]
fn for_an_added_signature_the_history_is_read_late_once_or_not_at_all_as_asked() {
    let folder = tempfile::tempdir().unwrap();
    for (number, added) in [Added::Read, Added::FromNow, Added::Leave].into_iter().enumerate() {
        let path = folder.path().join(format!("{number}.redb"));
        let store = Store::open(&path, identity(), Some(5), Added::Read).unwrap();
        for number in 5..9 {
            store.accept(&stretch(block(number, 0), &[], &[])).unwrap();
        }
        drop(store);
        let read = LateRead { signatures: vec!["new".into()], next: 5, to: 8 };
        let expected = (added == Added::Read).then_some((0, read));
        for _again in 0..2 {
            let store = Store::open(&path, extended(), None, added).unwrap();
            assert_eq!(store.late_read(), expected, "{added:?}");
            let identity = if added == Added::Leave { identity() } else { extended() };
            assert_eq!(*store.identity(), identity, "{added:?}");
        }
        if let Some((id, _)) = expected {
            let store = Store::open(&path, extended(), None, added).unwrap();
            assert!(!store.accept_late(id, &late_stretch(7, vec![])).unwrap());
            assert_eq!(store.late_read().unwrap().1.next, 7);
            assert!(
                store.accept_late(id, &late_stretch(9, vec![])).unwrap(),
                "beyond its last block it is done"
            );
            drop(store);
            let store = Store::open(&path, extended(), None, added).unwrap();
            assert_eq!(store.late_read(), None);
        }
        // A signature the store knows cannot be taken away.
        if added != Added::Leave {
            assert!(Store::open(&path, identity(), None, added).unwrap_err().is_configuration());
        }
    }
}

#[test]
fn a_store_that_has_read_nothing_yet_has_no_history_to_read_late() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("relayer.redb");
    drop(Store::open(&path, identity(), Some(5), Added::Read).unwrap());
    let store = Store::open(&path, extended(), None, Added::Read).unwrap();
    assert_eq!((store.late_read(), store.identity()), (None, &extended()));
}

#[test]
fn what_is_found_late_is_marked_and_numbered_on() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("relayer.redb");
    let store = Store::open(&path, identity(), Some(1), Added::Read).unwrap();
    store.accept(&stretch(block(1, 0), &[1], &[1])).unwrap();
    drop(store);
    let store = Store::open(&path, extended(), None, Added::Read).unwrap();
    let (id, _) = store.late_read().unwrap();
    store.accept_late(id, &late_stretch(2, vec![event(escrow(1), block(1, 0), 9, false)])).unwrap();
    let claimed = store.claim(9).unwrap();
    let seen: Vec<_> = claimed
        .iter()
        .map(|claimed| (claimed.entry.sequence, claimed.entry.late, claimed.entry.log_index))
        .collect();
    assert_eq!(seen, [(1, false, 0), (2, false, 1), (3, true, 9)]);
    let late = claimed[2].entry.attributes(1).pairs();
    assert!(late.contains(&("late", "true".to_owned())));
}

#[test]
fn an_imported_escrow_is_watched_when_its_history_has_reached_the_cursor() {
    let store = memory();
    store.accept(&stretch(block(1, 0), &[1], &[])).unwrap();
    store.accept(&stretch(block(2, 0), &[], &[])).unwrap();
    let imported = store.import(&[escrow(1), escrow(2), escrow(3)], 1).unwrap();
    assert_eq!(imported, Imported { new: 2, known: 1 });
    let (id, read) = store.late_read().unwrap();
    assert_eq!((read.next, store.registry().len()), (1, 1));
    assert_eq!(Vec::from_iter(store.registry().joining(id)), [(escrow(2), 1), (escrow(3), 1)]);
    // New blocks go on meanwhile, and it has to catch up with them.
    assert!(!store.accept_late(id, &late_stretch(2, vec![])).unwrap());
    store.accept(&stretch(block(3, 0), &[], &[])).unwrap();
    assert!(!store.accept_late(id, &late_stretch(3, vec![event(escrow(2), block(2, 0), 0, false)])).unwrap());
    assert_eq!(store.registry().len(), 1);
    assert!(store.accept_late(id, &late_stretch(4, vec![])).unwrap());
    assert_eq!(store.registry().len(), 3, "both are watched from block 4 on");
    assert_eq!(store.late_read(), None);
    // From the next block on there is no history.
    assert_eq!(store.import(&[escrow(4)], 4).unwrap(), Imported { new: 1, known: 0 });
    assert!(store.registry().contains(&escrow(4)) && store.late_read().is_none());
}

#[test]
fn a_fork_takes_late_events_of_lost_blocks_back_and_the_late_read_reads_again_from_there() {
    let store = memory();
    for number in 1..=4 {
        store.accept(&stretch(block(number, 0), &[], &[])).unwrap();
    }
    store.import(&[escrow(7)], 1).unwrap();
    let (id, _) = store.late_read().unwrap();
    let events = [event(escrow(7), block(2, 0), 0, false), event(escrow(7), block(4, 0), 0, false)];
    assert!(!store.accept_late(id, &late_stretch(4, events[..1].to_vec())).unwrap());
    let (_, read) = store.late_read().unwrap();
    assert_eq!(read.next, 4);
    store.accept(&stretch(block(5, 0), &[], &[])).unwrap();
    assert!(
        !store.accept_late(id, &late_stretch(5, events[1..].to_vec())).unwrap(),
        "block 5 is still missing"
    );
    assert_eq!(store.claim(9).unwrap().len(), 2);
    let withdrawal = store.retract(Some(block(3, 0)), u64::MAX).unwrap().unwrap();
    assert_eq!((withdrawal.retracted, withdrawal.dropped), (1, 0), "block 4 is lost, block 2 stands");
    assert_eq!(store.late_read().unwrap().1.next, 4);
    assert!(
        store.accept_late(id, &late_stretch(4, vec![])).unwrap(),
        "the cursor is block 3: it has caught up"
    );
    assert!(store.registry().contains(&escrow(7)));
}

fn everywhere() -> BlockRange {
    BlockRange::new(0, u64::MAX).unwrap()
}

#[test]
fn many_events_in_one_commit_leave_what_they_leave_in_commits_of_few() {
    let few = EVENTS_A_THREAD as u64 / 2;
    let (one, several) = (memory(), memory());
    let mut whole = Stretch::default();
    for number in 1..=4u64 {
        let escrow = |index: u64| escrow((index % 200) as u8);
        let of_block = Stretch {
            announced: (0..200).filter(|_| number == 1).map(|it| (escrow(it), block(number, 0))).collect(),
            events: (0..few).map(|it| event(escrow(it), block(number, 0), it, false)).collect(),
            blocks: vec![block(number, 0)],
            ..Stretch::default()
        };
        several.accept(&of_block).unwrap();
        whole.announced.extend(of_block.announced);
        whole.events.extend(of_block.events);
        whole.blocks.extend(of_block.blocks);
    }
    one.accept(&whole).unwrap();
    assert_eq!(crash::rows(&one), crash::rows(&several));
    assert_eq!(one.waiting(), 4 * few);
}

/// Makes a file that was written by this layout one of an earlier: without these tables, and up to layout 4 with a row for
/// each digest.
fn age(path: &Path, schema: u32, epoch: u64, later: &[&str]) {
    let db = Database::create(path).unwrap();
    let transaction = db.begin_write().unwrap();
    if schema < 5 {
        let standing = standing_in(&transaction.open_table(STANDING).unwrap(), everywhere()).unwrap();
        let mut digests = transaction.open_table(opening::DIGESTS).unwrap();
        for (place, digest) in standing {
            digests.insert(place, digest).unwrap();
        }
        transaction.delete_table(STANDING).unwrap();
    }
    for table in transaction.list_tables().unwrap().collect::<Vec<_>>() {
        if later.contains(&redb::TableHandle::name(&table)) {
            transaction.delete_table(table).unwrap();
        }
    }
    let life = schema::Life { schema, epoch, identity: identity() };
    let life = encode(&life).unwrap();
    transaction.open_table(META).unwrap().insert(schema::IDENTITY, life.as_slice()).unwrap();
    transaction.commit().unwrap();
}

#[test]
fn a_file_of_the_second_layout_is_audited_from_the_first_block_on_that_is_whole() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("relayer.redb");
    let store = Store::open(&path, identity(), Some(1), Added::Read).unwrap();
    for number in 1..=4u64 {
        let announced: &[u8] = if number == 1 { &[1] } else { &[] };
        let finalized = Some(number.saturating_sub(1));
        store.accept(&Stretch { finalized, ..stretch(block(number, 0), announced, &[1]) }).unwrap();
    }
    claim_all(&store);
    assert_eq!(store.prune(0, 2).unwrap(), 2, "all of block 1");
    store.retract(Some(block(3, 0)), u64::MAX).unwrap().unwrap();
    let epoch = store.epoch();
    drop(store);
    age(&path, 2, epoch, &["digests", "unaudited"]);

    let store = Store::open(&path, identity(), None, Added::Leave).unwrap();
    assert_eq!(store.comparable_from().unwrap(), 2);
    let approved = event(escrow(1), block(2, 0), 0, false);
    let all = BlockRange::new(2, 4).unwrap();
    let comparison = store.compare(all, &[((2, 0), approved.digest)], vec![]).unwrap();
    assert_eq!((comparison.missed, comparison.extra), (vec![], vec![(3, 0)]), "block 4 was withdrawn");
}

#[test]
fn a_file_of_the_fourth_layout_keeps_what_each_event_says() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("relayer.redb");
    let store = Store::open(&path, identity(), Some(1), Added::Read).unwrap();
    for number in 1..=3u64 {
        let announced: &[u8] = if number == 1 { &[1, 2] } else { &[] };
        store.accept(&stretch(block(number, 0), announced, &[1, 2])).unwrap();
    }
    let standing = |store: &Store| {
        let read = store.db.begin_read().unwrap();
        standing_in(&read.open_table(STANDING).unwrap(), everywhere()).unwrap()
    };
    let (epoch, before) = (store.epoch(), standing(&store));
    assert_eq!(before.len(), 4 + 2 + 2);
    drop(store);
    age(&path, 4, epoch, &[]);

    let store = Store::open(&path, identity(), None, Added::Leave).unwrap();
    assert_eq!(standing(&store), before);
    assert!(store.db.begin_read().unwrap().open_table(opening::DIGESTS).is_err(), "it is gone");
    assert_eq!(store.compare(everywhere(), &before, vec![]).unwrap().extra, vec![]);
}

#[test]
fn of_a_file_of_the_fifth_layout_it_is_not_known_that_nothing_is_in_doubt() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("relayer.redb");
    let store = Store::open(&path, identity(), Some(1), Added::Read).unwrap();
    for number in 1..=9u64 {
        let announced: &[u8] = if number == 1 { &[1, 2] } else { &[] };
        store.accept(&stretch(block(number, 0), announced, &[1, 2])).unwrap();
    }
    let epoch = store.epoch();
    drop(store);
    let first = || {
        let store = Store::open(&path, identity(), None, Added::Leave).unwrap();
        store.group_by(Groups { backlog: 9, ..Groups::default() });
        let claimed = store.claim_by_escrow(4, 0, 4).unwrap();
        claimed.iter().map(|claimed| claimed.position).collect::<Vec<_>>()
    };
    age(&path, 5, epoch, &[]);
    assert_eq!(first(), [0, 1, 2, 3], "in the order of the log");
    assert_eq!(first(), [0, 1, 2, 3], "as before");
}

fn claim_all(store: &Store) {
    let claimed = store.claim(usize::MAX).unwrap();
    store.acknowledge(claimed.into_iter().map(|it| it.position).collect()).unwrap();
}

#[test]
fn blocks_read_unfinal_are_to_be_audited_until_they_were_and_not_if_they_left_the_chain() {
    let store = memory();
    let unfinal = |number, fork, finalized| Stretch {
        unfinal_from: Some(number),
        finalized,
        ..stretch(block(number, fork), &[], &[])
    };
    let unaudited = || store.unaudited(100).unwrap().map(|range| (range.from(), range.to()));
    store.accept(&Stretch { finalized: Some(1), ..stretch(block(1, 0), &[1], &[]) }).unwrap();
    (2..=6).for_each(|number| store.accept(&unfinal(number, 0, Some(1))).unwrap());
    assert_eq!(unaudited(), None, "nothing of it is final");
    store.retract(Some(block(4, 0)), u64::MAX).unwrap().unwrap();
    store.accept(&unfinal(5, 1, Some(5))).unwrap();
    assert_eq!(unaudited(), Some((2, 5)));
    assert_eq!(store.unaudited(2).unwrap(), BlockRange::new(2, 3));

    let missed = event(escrow(1), block(3, 0), 7, false);
    let late = LateStretch { events: vec![missed.clone()], ..LateStretch::default() };
    assert_eq!(store.accept_audited(BlockRange::new(2, 3), &late).unwrap(), 1);
    assert_eq!(unaudited(), Some((4, 5)));
    assert_eq!(store.accept_audited(BlockRange::new(3, 3), &late).unwrap(), 0, "it stands already");
    store.accept_audited(BlockRange::new(5, 5), &LateStretch::default()).unwrap();
    assert_eq!(unaudited(), Some((4, 4)), "a block in the middle");
    let seen = [((3, 7), missed.digest), ((3, 8), 1), ((3, 9), missed.digest)];
    let comparison = store.compare(BlockRange::new(3, 3).unwrap(), &seen, vec![(3, 1)]).unwrap();
    assert_eq!((comparison.missed, comparison.odd), (vec![(3, 8), (3, 9)], vec![(3, 1)]));
    let comparison = store.compare(BlockRange::new(3, 3).unwrap(), &seen[2..], vec![]).unwrap();
    assert_eq!((comparison.renumbered, comparison.extra), (1, vec![]));
}

#[test]
fn an_escrow_that_the_scanner_and_the_audit_find_at_once_is_read_from_its_first_announcement() {
    let found =
        |next| LateStretch { announced: vec![(escrow(1), block(next, 0))], next, ..LateStretch::default() };
    for audit_first in [true, false] {
        let store = memory();
        for number in 1..=4 {
            store.accept(&stretch(block(number, 0), &[], &[])).unwrap();
        }
        // The scanner has not seen the announcement in block 2, and sees another in block 5.
        let audit = || store.accept_audited(BlockRange::new(2, 3), &found(2)).unwrap();
        if audit_first {
            audit();
        }
        store.accept(&stretch(block(5, 0), &[1], &[1])).unwrap();
        if !audit_first {
            audit();
        }
        let row = store.escrows_of(&[escrow(1)]).unwrap()[&escrow(1)].clone();
        assert_eq!(row.announced.0, 2, "audit first: {audit_first}");
        let (id, read) = store.late_read().expect("blocks 2 to 4 are still to be read");
        assert_eq!(read.next, 2);
        let events = vec![event(escrow(1), block(3, 0), 9, false), event(escrow(1), block(5, 0), 1, false)];
        assert!(store.accept_late(id, &late_stretch(6, events)).unwrap());
        assert!(store.registry().contains(&escrow(1)));
        let log: Vec<_> =
            store.claim(9).unwrap().into_iter().map(|it| (it.entry.block_number, it.entry.late)).collect();
        assert_eq!(log, [(5, false), (5, false), (3, true)], "what stands comes once");
    }
}

#[test]
fn a_signature_whose_history_was_not_read_counts_from_the_next_block_on_for_the_audit_too() {
    let folder = tempfile::tempdir().unwrap();
    for (number, added) in [Added::FromNow, Added::Read].into_iter().enumerate() {
        let path = folder.path().join(format!("{number}.redb"));
        let store = Store::open(&path, identity(), Some(1), Added::Read).unwrap();
        store.accept(&stretch(block(1, 0), &[1], &[])).unwrap();
        drop(store);
        let store = Store::open(&path, extended(), None, added).unwrap();
        let expected = (added == Added::FromNow).then(|| ("new".to_owned(), 2));
        assert_eq!(store.signatures_from().unwrap(), expected.into_iter().collect());
    }
}

#[test]
fn a_file_of_the_first_layout_is_brought_to_this_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("relayer.redb");
    let store = Store::open(&path, identity(), Some(1), Added::Read).unwrap();
    store.accept(&stretch(block(1, 0), &[1], &[1])).unwrap();
    let epoch = store.epoch();
    drop(store);
    age(&path, 1, epoch, &["late_reads", "digests", "unaudited"]);

    for _again in 0..2 {
        let store = Store::open(&path, identity(), None, Added::Leave).unwrap();
        assert_eq!((store.next_block(), store.registry().len(), store.epoch()), (2, 1, epoch));
        assert_eq!(store.waiting(), 2);
    }
    age(&path, 99, epoch, &[]);
    let error = Store::open(&path, identity(), None, Added::Leave).unwrap_err().to_string();
    assert!(error.contains("99"), "{error}");
}

#[test]
fn what_was_acknowledged_above_the_watermark_is_not_handed_out_again_in_another_life() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("relayer.redb");
    let store = Store::open(&path, identity(), Some(1), Added::Read).unwrap();
    let announced = vec![(escrow(1), block(1, 0))];
    let events = (0..5).map(|index| event(escrow(1), block(1, 0), index, index == 0)).collect();
    store.accept(&Stretch { announced, events, blocks: vec![block(1, 0)], ..Stretch::default() }).unwrap();
    assert_eq!(store.claim(10).unwrap().len(), 5);
    store.acknowledge(vec![1, 2, 4]).unwrap();
    drop(store);

    let store = Store::open(&path, identity(), None, Added::Read).unwrap();
    let claim = || store.claim(1).unwrap().into_iter().map(|it| it.position).collect::<Vec<_>>();
    assert_eq!(claim(), [0]);
    // Now the watermark passes the run that said so of 1 and 2.
    store.acknowledge(vec![0]).unwrap();
    assert_eq!((store.watermark().unwrap(), store.waiting()), (3, 1));
    assert_eq!((claim(), claim()), (vec![3], vec![]));
    store.acknowledge(vec![3]).unwrap();
    assert_eq!((store.watermark().unwrap(), store.waiting()), (5, 0));
    assert!(claim().is_empty());
}

#[test]
fn only_what_is_acknowledged_final_and_old_is_pruned_and_everything_goes_on_as_before() {
    let store = memory();
    for number in 1..=6 {
        let announced: &[u8] = if number == 1 { &[1, 2] } else { &[] };
        let finalized = u64::checked_sub(number, 3);
        store.accept(&Stretch { finalized, ..stretch(block(number, 0), announced, &[1, 2]) }).unwrap();
    }
    // 4 entries in block 1, 2 in each after it; blocks up to 3 are final.
    assert_eq!(store.prune(0, 100).unwrap(), 0, "nothing is acknowledged");
    let claimed = store.claim(usize::MAX).unwrap();
    store.acknowledge(claimed.iter().map(|it| it.position).filter(|it| *it != 6).collect()).unwrap();
    assert_eq!(store.prune(3600, 100).unwrap(), 0, "nothing is old");
    assert_eq!((store.whole_from().unwrap(), store.prune(0, 5).unwrap()), (1, 5));
    assert_eq!((store.prune(0, 100).unwrap(), store.whole_from().unwrap()), (1, 3), "one before the gap");
    store.acknowledge(vec![6]).unwrap();
    assert_eq!((store.prune(0, 100).unwrap(), store.log_len().unwrap()), (2, 6), "the rest is not final");
    assert_eq!(store.whole_from().unwrap(), 4);

    let withdrawal = store.retract(Some(block(3, 0)), u64::MAX).unwrap().unwrap();
    assert_eq!(withdrawal.retracted, 6);
    store.accept(&stretch(block(4, 1), &[], &[1])).unwrap();
    let next = store.claim(usize::MAX).unwrap();
    assert_eq!(next.len(), 7);
    assert_eq!(next[6].position, 20, "no position is used again");
    assert_eq!(next[6].entry.sequence, 11, "seven events, three withdrawals, and one more");
}

#[test]
fn what_was_pruned_is_not_subtracted_from_what_an_escrow_is_known_to_have_emitted() {
    let store = memory();
    store.accept(&stretch(block(1, 0), &[], &[])).unwrap();
    store.accept(&stretch(block(2, 0), &[1], &[1])).unwrap();
    claim_all(&store);
    store.retract(Some(block(1, 0)), u64::MAX).unwrap().unwrap();
    store.accept(&stretch(block(2, 1), &[], &[])).unwrap();
    let again = Stretch { finalized: Some(3), ..stretch(block(3, 1), &[1], &[1, 1]) };
    store.accept(&again).unwrap();
    claim_all(&store);
    for pruned in [0, 2, 1] {
        assert_eq!(store.prune(0, pruned).unwrap(), pruned);
        let counts = store.events_upto(&BTreeSet::from([escrow(1)]), 9).unwrap();
        assert_eq!(counts[&escrow(1)], BTreeMap::from([("Approved".to_owned(), 2)]), "{pruned} pruned");
    }
}

/// What an audit found in block 1: that it announced escrow 1, which was known from a later block only.
fn announced_in_block_1() -> LateStretch {
    LateStretch {
        announced_earlier: vec![(escrow(1), block(1, 0))],
        next: 1,
        events: vec![event(escrow(1), block(1, 0), 0, true)],
        ..LateStretch::default()
    }
}

#[test]
fn an_escrow_that_a_fork_takes_while_an_audit_finds_it_announced_earlier_is_read_from_there_on() {
    for seen in [false, true] {
        let store = memory();
        store.accept(&Stretch { finalized: Some(1), ..stretch(block(1, 0), &[], &[]) }).unwrap();
        store.accept(&stretch(block(2, 0), &[1], &[1])).unwrap();
        if seen {
            claim_all(&store);
        }
        store.retract(Some(block(1, 0)), u64::MAX).unwrap().unwrap();
        let audited = BlockRange::new(1, 1).unwrap();
        assert_eq!(store.accept_audited(Some(audited), &announced_in_block_1()).unwrap(), 1);
        let (id, read) = store.late_read().unwrap();
        assert_eq!((read.next, store.registry().joining(id).count()), (1, 1));
        assert!(store.accept_late(id, &late_stretch(2, vec![])).unwrap());
        assert!(store.registry().contains(&escrow(1)));
    }
}

#[test]
fn an_escrow_announced_again_while_its_history_is_to_be_read_is_read_from_the_first_announcement_on() {
    let store = memory();
    store.accept(&Stretch { finalized: Some(1), ..stretch(block(1, 0), &[], &[]) }).unwrap();
    store.accept(&stretch(block(2, 0), &[], &[])).unwrap();
    // Found by an audit between reading block 3 and its commit.
    let found = LateStretch {
        announced: vec![(escrow(1), block(1, 0))],
        announced_earlier: vec![],
        ..announced_in_block_1()
    };
    store.accept_audited(BlockRange::new(1, 1), &found).unwrap();
    store.accept(&stretch(block(3, 0), &[1], &[1])).unwrap();
    let (id, _) = store.late_read().unwrap();
    assert_eq!(store.registry().joining(id).collect::<Vec<_>>(), [(escrow(1), 1)]);
    let late = [event(escrow(1), block(2, 0), 0, false), event(escrow(1), block(3, 0), 1, false)];
    assert!(store.accept_late(id, &late_stretch(4, late.to_vec())).unwrap());
    assert_eq!(store.claim(99).unwrap().len(), 4, "announced twice, approved in blocks 2 and 3");
}
