//! The rows of what stands against a plain map.

use std::ops::ControlFlow;

use super::*;
use crate::store::standing::digest_at;

#[derive(Clone, Debug)]
enum Change {
    Put(Place, u64),
    Remove(Place),
    /// What was changed so far is written.
    Finish,
}

fn changes() -> impl Strategy<Value = Vec<Change>> {
    let place = || (0..4u64, prop_oneof![3 => 0..12u64, 1 => any::<u64>()]);
    let change = prop_oneof![
        5 => (place(), any::<u64>()).prop_map(|(place, digest)| Change::Put(place, digest)),
        3 => place().prop_map(Change::Remove),
        1 => Just(Change::Finish),
    ];
    prop::collection::vec(change, 0..80)
}

/// Applies changes up to the next `Finish`; how many.
fn apply(
    table: &mut redb::Table<'_, u64, &'static [u8]>,
    changes: &[Change],
    model: &mut BTreeMap<Place, u64>,
) -> usize {
    let mut standing = Standing::of(table);
    let applied = changes.iter().try_fold(0, |count, change| {
        match change {
            Change::Put(place, digest) => {
                assert_eq!(standing.has(*place).unwrap(), model.contains_key(place));
                standing.put(*place, *digest).unwrap();
                model.insert(*place, *digest);
            }
            Change::Remove(place) => {
                standing.remove(*place).unwrap();
                model.remove(place);
            }
            Change::Finish => return ControlFlow::Break(count + 1),
        }
        ControlFlow::Continue(count + 1)
    });
    standing.finish().unwrap();
    match applied {
        ControlFlow::Continue(count) | ControlFlow::Break(count) => count,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn whatever_is_put_and_removed_what_stands_is_what_a_map_would_hold(changes in changes()) {
        let store = memory();
        let transaction = store.db.begin_write().unwrap();
        let mut table = transaction.open_table(STANDING).unwrap();
        let (mut model, mut rest) = (BTreeMap::new(), changes.as_slice());
        while !rest.is_empty() {
            rest = &rest[apply(&mut table, rest, &mut model)..];
            let there: BTreeMap<Place, u64> = standing_in(&table, everywhere()).unwrap().into_iter().collect();
            prop_assert_eq!(&there, &model);
            for block in 0..4 {
                let one = BlockRange::new(block, block).unwrap();
                let of_block = model.range((block, 0)..=(block, u64::MAX)).map(|(place, digest)| (*place, *digest));
                prop_assert_eq!(standing_in(&table, one).unwrap(), of_block.collect::<Vec<_>>());
                for place in (0..12).map(|index| (block, index)) {
                    prop_assert_eq!(digest_at(&table, place).unwrap(), model.get(&place).copied());
                }
            }
            prop_assert!(table.iter().unwrap().all(|row| row.unwrap().1.value().len() > 1), "no row is empty");
        }
    }
}

#[test]
fn a_row_that_is_cut_off_too_long_or_of_another_version_is_damage() {
    let store = memory();
    store.accept(&stretch(block(1, 0), &[1], &[1])).unwrap();
    let transaction = store.db.begin_write().unwrap();
    let mut table = transaction.open_table(STANDING).unwrap();
    let row = table.get(1).unwrap().unwrap().value().to_vec();
    let whole = row.len();
    let others =
        (0..whole).filter(|length| length % 16 != 1 || *length == 1).map(|length| row[..length].to_vec());
    let too_long = [row.clone(), vec![0]].concat();
    let another_version = [vec![2], row[1..].to_vec()].concat();
    for damaged in others.chain([too_long, another_version]) {
        table.insert(1, damaged.as_slice()).unwrap();
        let error = standing_in(&table, everywhere()).unwrap_err().to_string();
        assert!(error.contains("standing"), "{} bytes: {error}", damaged.len());
        assert!(digest_at(&table, (1, 0)).is_err());
        assert!(Standing::of(&mut table).has((1, 0)).is_err());
    }
}
