//! The store's values: what was encoded comes back as it was; what a disk made of it is noticed or is another value, and
//! nothing worse.

use std::fmt::Debug;

use serde::{Deserialize, Serialize};

use super::*;
use crate::store::schema::{Life, Remembered};

fn address() -> impl Strategy<Value = Address> {
    any::<[u8; 20]>().prop_map(Address::from)
}

fn hash() -> impl Strategy<Value = B256> {
    any::<[u8; 32]>().prop_map(B256::from)
}

fn texts() -> impl Strategy<Value = Vec<String>> {
    prop::collection::vec(any::<String>(), 0..4)
}

fn bytes() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(any::<u8>(), 0..300)
}

fn any_identity() -> impl Strategy<Value = Identity> {
    (any::<u64>(), address(), texts(), any::<String>(), any::<String>()).prop_map(
        |(chain_id, factory, signatures, sink, ordering)| Identity {
            chain_id,
            factory,
            signatures,
            sink,
            ordering,
        },
    )
}

fn any_escrow() -> impl Strategy<Value = Escrow> {
    let state = prop_oneof![
        Just(EscrowState::Active),
        Just(EscrowState::Withdrawn),
        any::<u64>().prop_map(|late_read| EscrowState::Joining { late_read }),
        Just(EscrowState::Archived),
    ];
    (any::<u64>(), any::<u64>(), any::<u64>(), any::<u64>(), any::<Option<u64>>(), state).prop_map(
        |(number, mark, covered_from, last_sequence, ended, state)| Escrow {
            announced: (number, mark),
            covered_from,
            last_sequence,
            ended,
            state,
        },
    )
}

fn any_entry() -> impl Strategy<Value = Entry> {
    let kind = prop_oneof![Just(Kind::Event), any::<u64>().prop_map(|of| Kind::Retraction { of })];
    let whose = (any::<String>(), address(), address(), hash());
    let numbers = any::<[u64; 5]>();
    (kind, whose, numbers, any::<(bool, bool)>(), bytes()).prop_map(
        |(kind, (name, emitter, escrow, block_hash), numbers, (announces, late), body)| {
            let [block_number, log_index, sequence, epoch, stored_at] = numbers;
            Entry {
                kind,
                name,
                announces,
                emitter,
                escrow,
                block_number,
                block_hash,
                log_index,
                sequence,
                epoch,
                late,
                stored_at,
                body,
            }
        },
    )
}

fn any_quarantined() -> impl Strategy<Value = Quarantined> {
    let topics = prop::collection::vec(hash(), 0..5);
    (address(), topics, bytes(), any::<[u64; 2]>(), hash(), hash(), any::<String>()).prop_map(
        |(address, topics, data, [number, log_index], hash, transaction_hash, reason)| Quarantined {
            address,
            topics,
            data,
            block: (number, hash),
            transaction_hash,
            log_index,
            reason,
        },
    )
}

/// A change to an encoding as a bad disk makes it: a bit, a byte, a few bytes, a cut, bytes too many.
#[derive(Clone, Debug)]
enum Damage {
    Bit(prop::sample::Index, u8),
    Byte(prop::sample::Index, u8),
    Run(prop::sample::Index, Vec<u8>),
    Cut(prop::sample::Index),
    More(Vec<u8>),
}

fn damage() -> impl Strategy<Value = Damage> {
    let place = any::<prop::sample::Index>;
    let some = || prop::collection::vec(any::<u8>(), 1..12);
    prop_oneof![
        (place(), 0u8..8).prop_map(|(place, bit)| Damage::Bit(place, bit)),
        (place(), any::<u8>()).prop_map(|(place, byte)| Damage::Byte(place, byte)),
        (place(), some()).prop_map(|(place, run)| Damage::Run(place, run)),
        // What a length may have become.
        place().prop_map(|place| Damage::Run(place, vec![0xFF; 8])),
        place().prop_map(Damage::Cut),
        some().prop_map(Damage::More),
    ]
}

impl Damage {
    fn of(&self, good: &[u8]) -> Vec<u8> {
        let mut bytes = good.to_vec();
        match self {
            Self::Bit(place, bit) => bytes[place.index(good.len())] ^= 1 << bit,
            Self::Byte(place, byte) => bytes[place.index(good.len())] = *byte,
            Self::Run(place, run) => {
                bytes
                    .iter_mut()
                    .skip(place.index(good.len()))
                    .zip(run)
                    .for_each(|(byte, other)| *byte = *other);
            }
            Self::Cut(place) => bytes.truncate(place.index(good.len())),
            Self::More(more) => bytes.extend(more),
        }
        bytes
    }
}

/// Damage, or a value that is written exactly so.
fn assert_read_or_noticed<T: Serialize + for<'de> Deserialize<'de>>(bytes: &[u8]) {
    match decode::<T>("t", bytes) {
        Ok(value) => assert_eq!(encode(&value).unwrap(), bytes, "one value, one encoding"),
        Err(error) => assert!(matches!(error, StoreError::Damaged { .. }), "{error}"),
    }
}

/// Comes back as it was; damaged it is noticed or another value.
fn assert_sturdy<T: Serialize + for<'de> Deserialize<'de> + PartialEq + Debug>(value: &T, damage: &[Damage]) {
    let good = encode(value).unwrap();
    assert_eq!(&decode::<T>("t", &good).unwrap(), value);
    for one in damage {
        assert_read_or_noticed::<T>(&one.of(&good));
    }
}

fn some_damage() -> impl Strategy<Value = Vec<Damage>> {
    prop::collection::vec(damage(), 1..8)
}

proptest! {
    #[test]
    fn an_entry_comes_back_as_it_was_and_damage_is_noticed(entry in any_entry(), damage in some_damage()) {
        assert_sturdy(&entry, &damage);
    }

    #[test]
    fn an_escrow_comes_back_as_it_was_and_damage_is_noticed(escrow in any_escrow(), damage in some_damage()) {
        assert_sturdy(&escrow, &damage);
    }

    #[test]
    fn an_identity_comes_back_as_it_was_and_damage_is_noticed(identity in any_identity(), damage in some_damage()) {
        assert_sturdy(&identity, &damage);
    }

    #[test]
    fn a_log_kept_aside_comes_back_as_it_was_and_damage_is_noticed(log in any_quarantined(), damage in some_damage()) {
        assert_sturdy(&log, &damage);
    }

    #[test]
    fn a_late_read_comes_back_as_it_was_and_damage_is_noticed(
        signatures in texts(), next in any::<u64>(), to in any::<u64>(), damage in some_damage(),
    ) {
        assert_sturdy(&LateRead { signatures, next, to }, &damage);
    }

    #[test]
    fn whatever_bytes_there_are_they_are_a_value_or_damage(bytes in bytes()) {
        let bytes = [&[1], &bytes[..]].concat();
        assert_read_or_noticed::<Entry>(&bytes);
        assert_read_or_noticed::<Escrow>(&bytes);
        assert_read_or_noticed::<Identity>(&bytes);
        assert_read_or_noticed::<Life>(&bytes);
        assert_read_or_noticed::<schema::Progress>(&bytes);
        assert_read_or_noticed::<Remembered>(&bytes);
        assert_read_or_noticed::<LateRead>(&bytes);
        assert_read_or_noticed::<Quarantined>(&bytes);
    }
}

proptest! {
    #[test]
    fn a_row_of_an_escrow_is_small_comes_back_as_it_was_and_an_older_ones_is_still_read(escrow in any_escrow(), hash in hash()) {
        let bytes = escrow.encode().unwrap();
        prop_assert_eq!(&Escrow::decode(&bytes).unwrap(), &escrow);
        prop_assert!(Escrow::decode(&[&bytes[..], &[0]].concat()).is_err(), "a byte too many");
        prop_assert!(Escrow::decode(&bytes[..bytes.len() - 1]).is_err(), "a byte too few");

        let Escrow { announced: (number, _), covered_from, last_sequence, ended, state } = escrow;
        let wide = schema::WideEscrow { announced: (number, hash), covered_from, last_sequence, ended, state };
        let read = Escrow::decode(&encode(&wide).unwrap()).unwrap();
        prop_assert_eq!(read, Escrow { announced: (number, Escrow::mark(&hash)), ..escrow });
    }

    #[test]
    fn no_bytes_make_a_row_of_an_escrow_panic(bytes in bytes()) {
        let _ = Escrow::decode(&bytes);
        let _ = Escrow::decode(&[&[2], &bytes[..]].concat());
    }
}

#[test]
fn a_usual_row_of_an_escrow_has_few_bytes() {
    let usual = Escrow {
        announced: (9_508_321, u64::MAX),
        covered_from: 9_508_321,
        last_sequence: 4,
        ended: Some(9_600_000),
        state: EscrowState::Active,
    };
    assert!(usual.encode().unwrap().len() <= 28, "{:?}", usual.encode());
    assert!(
        !usual.is_imported() && Escrow { announced: (1, Escrow::mark(&B256::ZERO)), ..usual }.is_imported()
    );
}
