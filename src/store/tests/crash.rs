//! A crash, or a disk that fails, at every write and every sync of a run: what is found afterwards is the state before or
//! after a whole step, and the run can go on.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering as Atomic};

use redb::{ReadableDatabase, ReadableTable, StorageBackend, TableHandle};

use super::*;

/// A disk: what was synced stays; what was written since may be there after a crash, or in part.
#[derive(Debug, Default)]
struct Platter {
    synced: Vec<u8>,
    since: Vec<Write>,
    image: Vec<u8>,
}

#[derive(Clone, Debug)]
enum Write {
    Bytes(usize, Vec<u8>),
    Length(usize),
}

impl Write {
    fn apply(&self, image: &mut Vec<u8>) {
        match self {
            Self::Bytes(offset, bytes) => {
                if image.len() < offset + bytes.len() {
                    image.resize(offset + bytes.len(), 0);
                }
                image[*offset..offset + bytes.len()].copy_from_slice(bytes);
            }
            Self::Length(length) => image.resize(*length, 0),
        }
    }
}

/// Fails at operation number `fails_at`, and at every one after it.
#[derive(Clone, Debug)]
struct Disk {
    platter: Arc<Mutex<Platter>>,
    operations: Arc<AtomicUsize>,
    fails_at: usize,
    with: io::ErrorKind,
}

impl Disk {
    fn holding(image: Vec<u8>) -> Self {
        let platter = Platter { synced: image.clone(), since: vec![], image };
        let platter = Arc::new(Mutex::new(platter));
        Self { platter, operations: Arc::default(), fails_at: usize::MAX, with: io::ErrorKind::Other }
    }

    fn failing(fails_at: usize, with: io::ErrorKind) -> Self {
        Self { fails_at, with, ..Self::holding(vec![]) }
    }

    fn operation(&self) -> io::Result<MutexGuard<'_, Platter>> {
        let number = self.operations.fetch_add(1, Atomic::SeqCst);
        if number >= self.fails_at {
            return Err(io::Error::new(self.with, "the test says so"));
        }
        Ok(lock(&self.platter))
    }

    fn write_that(&self, write: Write) -> io::Result<()> {
        let mut platter = self.operation()?;
        write.apply(&mut platter.image);
        platter.since.push(write);
        Ok(())
    }

    /// What may be found after a crash: all that was written (the process was killed); only what was synced (the power
    /// went); and between them some of the writes, the last of these torn.
    fn remains(&self, salt: u64) -> Vec<Vec<u8>> {
        let platter = lock(&self.platter);
        let mut remains = vec![platter.image.clone(), platter.synced.clone()];
        for nth in 0..3u64 {
            let mut image = platter.synced.clone();
            for (place, write) in platter.since.iter().enumerate() {
                let mut dice =
                    (salt + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(place as u32 + nth as u32);
                dice ^= (place as u64 + 7 * nth).wrapping_mul(0xBF58_476D_1CE4_E5B9);
                match (dice >> 17) % 3 {
                    0 => {}
                    1 => write.apply(&mut image),
                    _ => match write {
                        Write::Bytes(offset, bytes) => {
                            let torn = bytes[..bytes.len() / 2].to_vec();
                            Write::Bytes(*offset, torn).apply(&mut image);
                        }
                        length @ Write::Length(_) => length.apply(&mut image),
                    },
                }
            }
            // A file never ends before what was synced of it.
            let length = image.len().max(platter.image.len());
            image.resize(length, 0);
            remains.push(image);
        }
        remains
    }
}

impl StorageBackend for Disk {
    fn len(&self) -> io::Result<u64> {
        Ok(lock(&self.platter).image.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let offset = offset as usize;
        let platter = lock(&self.platter);
        let bytes = platter.image.get(offset..offset + out.len());
        out.copy_from_slice(bytes.ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?);
        Ok(())
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.write_that(Write::Length(length as usize))
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut platter = self.operation()?;
        platter.synced = platter.image.clone();
        platter.since.clear();
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.write_that(Write::Bytes(offset as usize, data.to_vec()))
    }
}

fn open(disk: &Disk) -> Result<Store, StoreError> {
    Store::open_backend(disk.clone(), identity(), Some(1), Added::Read)
}

/// One transaction at most.
type Script = Vec<(&'static str, fn(&Store) -> Result<(), StoreError>)>;

fn claim_all_and_acknowledge(store: &Store, of: fn(usize) -> bool) -> Result<(), StoreError> {
    let claimed = store.claim(usize::MAX)?;
    let wanted = claimed.iter().enumerate().filter(|(place, _)| of(*place));
    store.acknowledge(wanted.map(|(_, claimed)| claimed.position).collect())
}

fn malformed(at: BlockRef) -> Quarantined {
    Quarantined {
        address: escrow(1),
        topics: vec![B256::ZERO],
        data: vec![1; 3000],
        block: (at.number, at.hash),
        transaction_hash: B256::ZERO,
        log_index: 99,
        reason: "the test says so".into(),
    }
}

/// Every kind of transaction there is, in an order in which each finds something to do.
fn script() -> Script {
    fn withdraw(store: &Store, to: BlockRef) -> Result<(), StoreError> {
        store.retract(Some(to), u64::MAX)?.expect("there is no cap");
        Ok(())
    }
    vec![
        ("escrows and their events", |store| store.accept(&stretch(block(1, 0), &[1, 2], &[1, 2, 2]))),
        ("some acknowledged", |store| claim_all_and_acknowledge(store, |place| place % 2 == 0)),
        ("the next block", |store| store.accept(&stretch(block(2, 0), &[3], &[1, 3]))),
        ("a log that does not decode", |store| {
            store.accept(&Stretch {
                quarantined: vec![malformed(block(3, 0))],
                ..stretch(block(3, 0), &[], &[2])
            })
        }),
        ("a fork: dropped where nobody saw it", |store| withdraw(store, block(1, 0))),
        ("the other fork", |store| store.accept(&stretch(block(2, 1), &[4], &[1, 4, 4]))),
        ("all acknowledged", |store| claim_all_and_acknowledge(store, |_| true)),
        ("a fork: withdrawn where it was published", |store| withdraw(store, block(1, 0))),
        ("escrows known late", |store| store.import(&[escrow(7), escrow(8)], 1).map(drop)),
        ("their history", |store| {
            let (id, _) = store.late_read().expect("the import asks for one");
            let events = vec![event(escrow(7), block(1, 0), 50, false)];
            store.accept_late(id, &LateStretch { events, next: 2, ..LateStretch::default() }).map(drop)
        }),
        ("blocks become final", |store| {
            let finalized = Some(2);
            store.accept(&Stretch {
                finalized,
                unfinal_from: Some(2),
                ..stretch(block(2, 2), &[5], &[7, 1])
            })?;
            Ok(())
        }),
        ("final blocks are forgotten", |store| {
            store.accept(&Stretch { finalized: Some(3), ..stretch(block(3, 2), &[], &[5]) })
        }),
        ("the rest acknowledged", |store| claim_all_and_acknowledge(store, |_| true)),
        ("what need not be kept", |store| store.prune(0, 4).map(drop)),
        ("what the audit found", |store| {
            let missed = event(escrow(7), block(2, 2), 77, false);
            let found = LateStretch { events: vec![missed], ..LateStretch::default() };
            store.accept_audited(crate::event::BlockRange::new(2, 2), &found).map(drop)
        }),
        ("a message that is refused", |store| {
            let last = store.entries() - 1;
            store.settle(vec![], &[(last, "a lane".into(), "the test says so".into())])
        }),
        ("it is given up", |store| store.give_up(store.entries() - 1).map(drop)),
        ("logs that do not decode yet", |store| {
            let mut later = malformed(block(4, 2));
            later.log_index += 1;
            let quarantined = vec![malformed(block(4, 2)), later];
            store.accept(&Stretch { quarantined, ..stretch(block(4, 2), &[], &[]) })
        }),
        ("one does now", |store| {
            let events = vec![event(escrow(7), block(4, 2), 99, false)];
            let found = LateStretch { events, ..LateStretch::default() };
            store.release(&found, &[(block(4, 2), 99)]).map(drop)
        }),
        ("the other is dropped", |store| store.drop_quarantined((block(4, 2), 100)).map(drop)),
    ]
}

/// All rows of all tables, without what differs from run to run: times, and the epoch made from one.
pub(super) fn rows(store: &Store) -> BTreeMap<String, Vec<String>> {
    let read = store.db.begin_read().unwrap();
    let mut tables = BTreeMap::new();
    let mut names: Vec<String> = read.list_tables().unwrap().map(|table| table.name().to_owned()).collect();
    names.sort();
    let mut put = |name: &str, rows: Vec<String>| tables.insert(name.to_owned(), rows);
    let log = read.open_table(EVENT_LOG).unwrap();
    let entries = log::entries(&log, 0..u64::MAX).unwrap().map(|entry| {
        let (position, entry) = entry.unwrap();
        format!("{position} {:?}", Entry { epoch: 0, stored_at: 0, ..entry })
    });
    put("event_log", entries.collect());
    put("registry", store.escrows().unwrap().iter().map(|row| format!("{row:?}")).collect());
    put("blocks", store.remembered().unwrap().iter().map(|row| format!("{row:?}")).collect());
    put("quarantine", store.quarantined().unwrap().iter().map(|row| format!("{row:?}")).collect());
    let acknowledged = read.open_table(ACKNOWLEDGED).unwrap();
    let runs =
        acknowledged.iter().unwrap().map(|run| run.map(|(from, to)| (from.value(), to.value())).unwrap());
    put("acknowledged", runs.map(|run| format!("{run:?}")).collect());
    let unaudited = read.open_table(schema::UNAUDITED).unwrap();
    let runs = unaudited.iter().unwrap().map(|run| run.map(|(from, to)| (from.value(), to.value())).unwrap());
    put("unaudited", runs.map(|run| format!("{run:?}")).collect());
    let standing = standing_in(&read.open_table(STANDING).unwrap(), everywhere()).unwrap();
    put("standing", standing.iter().map(|row| format!("{row:?}")).collect());
    put("watermark", vec![store.watermark().unwrap().to_string()]);
    put("progress", vec![format!("{:?}", lock(&store.progress))]);
    put("late_reads", vec![format!("{:?}", late::load(&store.db).unwrap())]);
    let blocked =
        store.blocked(|it| Some((it.claimed.position, it.refusal.lane, it.refusal.reason))).unwrap();
    put("blocked", blocked.iter().map(|row| format!("{row:?}")).collect());
    put("tables", names);
    tables
}

/// What holds of every store that can be opened.
fn assert_sound(store: &Store) {
    let read = store.db.begin_read().unwrap();
    let log = read.open_table(EVENT_LOG).unwrap();
    let next_position = lock(&store.progress).next_position;
    let mut last: AddressMap<u64> = AddressMap::default();
    // Of what was pruned only the end is known.
    let whole = log.first().unwrap().is_none_or(|(position, _)| position.value() == 0);
    for entry in log::entries(&log, 0..u64::MAX).unwrap() {
        let (position, entry) = entry.unwrap();
        assert!(position < next_position, "a position not given out");
        let before = last.insert(entry.escrow, entry.sequence).or((!whole).then(|| entry.sequence - 1));
        assert_eq!(entry.sequence, before.unwrap_or(0) + 1, "sequence of {}", entry.escrow);
    }
    for (address, row) in store.escrows().unwrap() {
        if whole || last.contains_key(&address) {
            assert_eq!(row.last_sequence, last.get(&address).copied().unwrap_or(0), "{address}");
        }
        assert_eq!(store.registry().contains(&address), row.state == EscrowState::Active, "{address}");
    }
    if whole {
        let mut standing: BTreeSet<(u64, u64)> = BTreeSet::new();
        for entry in log::entries(&log, 0..u64::MAX).unwrap() {
            let (_, entry) = entry.unwrap();
            let key = (entry.block_number, entry.log_index);
            match entry.kind {
                Kind::Event => assert!(standing.insert(key), "{key:?} twice"),
                Kind::Retraction { .. } => {
                    assert!(standing.remove(&key), "{key:?} withdrawn, and never there")
                }
            }
        }
        let digests = standing_in(&read.open_table(STANDING).unwrap(), everywhere()).unwrap();
        let keys: BTreeSet<(u64, u64)> = digests.into_iter().map(|(place, _)| place).collect();
        assert_eq!(keys, standing, "a digest for each event that stands");
    }
    assert!(store.watermark().unwrap() <= next_position);
    assert_eq!(store.waiting() as usize, waiting(store).len(), "what waits is what is handed out");
}

#[test]
fn a_crash_at_any_write_or_sync_leaves_the_state_before_or_after_a_whole_step() {
    assert!(crash_everywhere(&script(), block(4, 2)) > 60);
}

#[test]
fn a_crash_in_a_commit_of_many_events_leaves_the_state_before_or_after_it() {
    let script: Script = vec![
        ("an escrow", |store| store.accept(&stretch(block(1, 0), &[1], &[]))),
        ("many events", |store| {
            let events = (0..EVENTS_A_THREAD as u64).map(|it| event(escrow(1), block(2, 0), it, false));
            store.accept(&Stretch { events: events.collect(), ..stretch(block(2, 0), &[], &[]) })
        }),
    ];
    assert!(crash_everywhere(&script, block(2, 0)) > 10);
}

/// Lets each write and each sync of the script fail, which ends at block `last`. How many there are.
fn crash_everywhere(script: &Script, last: BlockRef) -> usize {
    let disk = Disk::holding(vec![]);
    let store = open(&disk).unwrap();
    let mut states = vec![rows(&store)];
    for (name, step) in script {
        step(&store).unwrap_or_else(|error| panic!("{name}: {error}"));
        states.push(rows(&store));
    }
    assert!(states.windows(2).all(|pair| pair[0] != pair[1]), "each step does something");
    let operations = disk.operations.load(Atomic::SeqCst);

    for fails_at in 0..operations {
        let kind = [io::ErrorKind::Other, io::ErrorKind::StorageFull][fails_at % 2];
        let disk = Disk::failing(fails_at, kind);
        // How many steps were said to be done.
        let mut done = None;
        if let Ok(store) = open(&disk) {
            done = Some(0);
            for (_, step) in script {
                match step(&store) {
                    Ok(()) => done = done.map(|steps| steps + 1),
                    Err(error) => {
                        assert!(matches!(error, StoreError::Io(_)), "{error}");
                        // Its outcome is unknown: nothing more is committed by this process.
                        let again = store.accept(&stretch(block(9, 0), &[], &[]));
                        assert!(matches!(again, Err(StoreError::Io(_))), "{again:?}");
                        break;
                    }
                }
            }
        }
        for (nth, image) in disk.remains(fails_at as u64).into_iter().enumerate() {
            // What is not whole yet has not got its name yet.
            if done.is_none() && open(&Disk::holding(image.clone())).is_err() {
                continue;
            }
            let context =
                format!("crash at operation {fails_at} of {operations}, remains {nth}, {done:?} steps done");
            assert_sound(
                &open(&Disk::holding(image.clone())).unwrap_or_else(|error| panic!("{context}: {error}")),
            );
            let disk = Disk::holding(image);
            let store = open(&disk).unwrap();
            let found = rows(&store);
            let before = done.unwrap_or(0);
            let after = (before + usize::from(done.is_some())).min(script.len());
            let state = (before..=after).find(|state| states[*state] == found);
            let Some(state) = state else {
                panic!("{context}: {found:#?}\nis neither\n{:#?}\nnor\n{:#?}", states[before], states[after]);
            };
            if nth < 2 {
                for (name, step) in &script[state..] {
                    step(&store).unwrap_or_else(|error| panic!("{context}, then {name}: {error}"));
                }
                assert_eq!(store.cursor(), Some(last), "{context}");
                drop(store);
                let store = open(&disk).unwrap();
                claim_all_and_acknowledge(&store, |_| true).unwrap();
                assert_eq!(store.waiting(), 0, "{context}");
            }
        }
    }
    operations
}

#[test]
fn a_damaged_file_is_opened_or_refused_but_nothing_worse() {
    let disk = Disk::holding(vec![]);
    let store = open(&disk).unwrap();
    for (_, step) in script() {
        step(&store).unwrap();
    }
    drop(store);
    let image = lock(&disk.platter).image.clone();
    let mut refused = 0;
    let mut dice = 1u64;
    let mut roll = |bound: usize| {
        dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (dice >> 33) as usize % bound
    };
    for round in 0..600 {
        let mut damaged = image.clone();
        match round % 4 {
            0 => damaged.truncate(roll(image.len())),
            1 => damaged[roll(image.len())] ^= 1 << roll(8),
            2 => {
                let from = roll(image.len());
                let to = (from + roll(5000)).min(image.len());
                damaged[from..to].fill(roll(256) as u8);
            }
            _ => damaged[roll(4096)] ^= 0xFF,
        }
        let opened = std::panic::catch_unwind(|| open(&Disk::holding(damaged)).map(drop));
        match opened {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => {
                assert!(
                    // What was damaged may be the name of what it belongs to.
                    matches!(
                        error,
                        StoreError::Damaged { .. } | StoreError::Io(_) | StoreError::OtherIdentity { .. }
                    ),
                    "round {round}: {error}"
                );
                refused += 1;
            }
            Err(_) => panic!("round {round} panicked"),
        }
    }
    assert!(refused > 100, "{refused} refused");
}
