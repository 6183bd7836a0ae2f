//! Snapshots and the lease on a volume with a mounted bucket's manners: no locks, nothing there before it is closed, the last
//! one to close a file wins, handles go stale, and what is slow is slow.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::ops::ControlFlow;
use std::sync::Mutex;

use alloy::primitives::Address;

use super::lease::{Lease, Lost, NotTaken, Wait};
use super::*;
use crate::event::BlockRef;
use crate::store::tests::{block, escrow, event, identity, memory, stretch};
use crate::store::{Added, Piece, Stretch};

/// A bucket. Whatever is read or written may have to wait until it is let go of. Faults are scripted: each read or write takes the next one, if there is one for its file.
#[derive(Debug, Default)]
struct Bucket {
    files: Mutex<BTreeMap<String, Vec<u8>>>,
    faults: Mutex<VecDeque<(&'static str, Fault)>>,
    writes: Mutex<Vec<String>>,
    /// Each write of the lease waits for one of these.
    held_up: Mutex<Option<std::sync::mpsc::Receiver<()>>>,
}

/// In the place of a file: the list of them.
const LISTING: &str = "the list";

#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    /// What is written is not there afterwards, and nobody says so.
    Lost,
    /// What is written is cut off.
    Cut,
    /// It fails.
    Stale,
}

impl Bucket {
    fn fault(&self, name: &str, writing: bool) -> Option<Fault> {
        let mut faults = self.faults.lock().unwrap();
        let is_meant =
            |(file, fault): &(&str, Fault)| name.starts_with(file) && (writing || *fault == Fault::Stale);
        let found = faults.iter().position(is_meant)?;
        faults.remove(found).map(|(_, fault)| fault)
    }

    fn fails(&self, file: &'static str, faults: &[Fault]) {
        self.faults.lock().unwrap().extend(faults.iter().map(|fault| (file, *fault)));
    }

    fn names(&self, folder: &str) -> Vec<String> {
        self.files.lock().unwrap().keys().filter(|name| name.starts_with(folder)).cloned().collect()
    }

    fn change(&self, name: &str, change: impl FnOnce(&mut Vec<u8>)) {
        change(self.files.lock().unwrap().get_mut(name).expect("a file that is there"));
    }

    fn written(&self) -> Vec<String> {
        std::mem::take(&mut self.writes.lock().unwrap())
    }
}

fn stale() -> io::Error {
    io::Error::from_raw_os_error(116)
}

impl Volume for Bucket {
    fn write(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        self.writes.lock().unwrap().push(name.to_owned());
        let held_up = if name == "lease.json" { self.held_up.lock().unwrap().take() } else { None };
        if let Some(let_go) = held_up {
            let_go.recv().unwrap();
        }
        let kept = match self.fault(name, true) {
            Some(Fault::Lost) => return Ok(()),
            Some(Fault::Stale) => return Err(stale()),
            Some(Fault::Cut) => &bytes[..bytes.len() / 2],
            None => bytes,
        };
        self.files.lock().unwrap().insert(name.to_owned(), kept.to_vec());
        Ok(())
    }

    fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        match self.fault(name, false) {
            Some(_) => Err(stale()),
            None => Ok(self.files.lock().unwrap().get(name).cloned()),
        }
    }

    fn list(&self, folder: &str) -> io::Result<Vec<String>> {
        if self.fault(LISTING, false).is_some() {
            return Err(stale());
        }
        let prefix = if folder.is_empty() { String::new() } else { format!("{folder}/") };
        let files = self.files.lock().unwrap();
        let inside = files.keys().filter_map(|name| name.strip_prefix(&prefix));
        Ok(inside.filter(|name| !name.contains('/')).map(str::to_owned).collect())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.files.lock().unwrap().remove(name);
        Ok(())
    }
}

fn snapshots() -> (Arc<Bucket>, Arc<Snapshots<Bucket>>) {
    let bucket = Arc::new(Bucket::default());
    (Arc::clone(&bucket), Arc::new(Snapshots::new(bucket)))
}

/// A store with a little of everything in it, and how it goes on.
fn lived() -> Store {
    let store = memory();
    for number in 1..=6 {
        let announced: &[u8] = if number == 1 { &[1, 2] } else { &[] };
        let unfinal = Stretch {
            unfinal_from: Some(number),
            finalized: Some(2),
            ..stretch(block(number, 0), announced, &[1, 2])
        };
        store.accept(&unfinal).unwrap();
    }
    store.import(&[escrow(9)], 1).unwrap();
    let claimed = store.claim(9).unwrap();
    store.acknowledge(claimed.iter().map(|it| it.position).filter(|at| *at != 5).collect()).unwrap();
    store.retract(Some(block(5, 0)), u64::MAX).unwrap().unwrap();
    store
}

fn go_on(store: &Store, number: u64) {
    store.accept(&stretch(block(number, 0), &[], &[1, 2])).unwrap();
}

/// All rows but those that say which life of the store it is, in a form that can be told apart at a glance.
fn rows(store: &Store) -> Vec<String> {
    let mut pieces = vec![format!("watermark {}", store.watermark().unwrap())];
    let copied = store.copy(|Piece { table, rows, bytes }| {
        if !["meta", "marks"].contains(&table) {
            pieces.push(format!("{table}: {rows} rows, {}", manifest::sha256(&bytes)));
        }
        ControlFlow::Continue(())
    });
    assert!(copied.unwrap().is_some());
    pieces
}

struct Restored {
    store: Store,
    manifest: Manifest,
    _folder: tempfile::TempDir,
}

/// Pauses between attempts take no time.
fn restore(
    snapshots: &Arc<Snapshots<Bucket>>,
    path: &Path,
    identity: &Identity,
) -> Result<Option<Manifest>, SnapshotError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    runtime.unwrap().block_on(snapshots.restore(path, identity, None))
}

fn restored(snapshots: &Arc<Snapshots<Bucket>>) -> Result<Option<Restored>, SnapshotError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("relayer.redb");
    let made = restore(snapshots, &path, &identity());
    assert_eq!(path.exists(), matches!(made, Ok(Some(_))), "a store is there exactly if it was restored");
    let Some(manifest) = made? else { return Ok(None) };
    let store = Store::open(&path, identity(), None, Added::Leave).unwrap();
    Ok(Some(Restored { store, manifest, _folder: folder }))
}

#[test]
fn a_store_comes_back_from_its_snapshot_as_it_was_in_another_life() {
    let (_, snapshots) = snapshots();
    assert!(restored(&snapshots).unwrap().is_none(), "there is none");
    let store = lived();
    let made = snapshots.create(&store, None).unwrap();
    let before = rows(&store);
    go_on(&store, 6);
    let Restored { store: again, manifest, .. } = restored(&snapshots).unwrap().unwrap();
    assert_eq!(manifest, made);
    assert_eq!(rows(&again), before);
    assert_eq!((again.cursor(), again.next_block()), (Some(block(5, 0)), 6));
    assert!(again.epoch() > store.epoch());
    // Whatever waited may have been sent since.
    go_on(&again, 6);
    assert_eq!(rows(&again).len(), rows(&store).len());
}

#[test]
fn what_did_not_change_is_not_written_again() {
    let (bucket, snapshots) = snapshots();
    let store = lived();
    let first = snapshots.create(&store, None).unwrap();
    assert_eq!(bucket.written().len(), first.parts.len() + 1);
    let second = snapshots.create(&store, None).unwrap();
    assert_eq!(bucket.written(), [second.file()]);
    assert_eq!((second.number, &second.parts), (2, &first.parts));
}

#[test]
fn a_process_that_starts_leaves_the_parts_alone_that_others_wrote() {
    let (bucket, snapshots) = snapshots();
    let store = lived();
    snapshots.create(&store, None).unwrap();
    bucket.written();
    let again = Snapshots::new(Arc::clone(&bucket));
    let made = again.create(&store, None).unwrap();
    assert_eq!(bucket.written(), [made.file()], "a crash may cut off whatever is written");

    // One that is damaged is mended, one that somebody removed is written again.
    bucket.change(&changed_part(&made), |bytes| bytes[9] ^= 1);
    let mending = Snapshots::new(Arc::clone(&bucket));
    let made = mending.create(&store, None).unwrap();
    assert_eq!(bucket.written(), [changed_part(&made), made.file()]);
    bucket.remove(&changed_part(&made)).unwrap();
    let made = mending.create(&store, None).unwrap();
    assert_eq!(bucket.written(), [changed_part(&made), made.file()]);
    assert_eq!(rows(&restored(&snapshots).unwrap().unwrap().store), rows(&store));
}

#[tokio::test(start_paused = true)]
async fn who_does_not_hold_the_lease_any_more_writes_no_snapshot_and_removes_none() {
    let bucket: Arc<Bucket> = Arc::default();
    let lease = acquire(&bucket, "first").await.unwrap();
    let snapshots = Snapshots::new(Arc::clone(&bucket)).permitted_by(lease.permit());
    let store = lived();
    snapshots.create(&store, None).unwrap();
    go_on(&store, 6);
    snapshots.create(&store, None).unwrap();
    sleep(5 * SECOND).await;
    let before = bucket.names("snapshot-");
    assert!(matches!(snapshots.create(&store, None), Err(SnapshotError::NotHolder)));
    assert!(matches!(snapshots.prune(1), Err(SnapshotError::NotHolder)));
    assert_eq!(bucket.names("snapshot-"), before);
}

#[test]
fn one_of_a_later_layout_is_left_to_the_program_that_made_it() {
    let (bucket, snapshots) = snapshots();
    let store = lived();
    snapshots.create(&store, None).unwrap();
    let mut newer = snapshots.create(&store, None).unwrap();
    newer.schema += 1;
    bucket.write(&newer.file(), &newer.encode()).unwrap();
    let refused = restored(&snapshots).map(|restored| restored.is_some()).unwrap_err();
    assert!(refused.is_configuration() && refused.to_string().contains(&newer.file()), "{refused}");
}

#[test]
fn a_store_that_came_of_an_older_snapshot_goes_on_though_there_are_newer_ones() {
    let (bucket, snapshots) = snapshots();
    let store = lived();
    snapshots.create(&store, None).unwrap();
    go_on(&store, 6);
    let damaged = snapshots.create(&store, None).unwrap();
    bucket.change(&damaged.file(), Vec::clear);
    let again = restored(&snapshots).unwrap().unwrap();
    assert_eq!((again.manifest.number, again.store.restored_from().unwrap()), (1, Some(2)));
}

#[test]
fn a_store_is_not_put_in_the_place_of_one_that_came_to_be_meanwhile() {
    let (_, snapshots) = snapshots();
    snapshots.create(&lived(), None).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("relayer.redb");
    fs::write(&path, "another's").unwrap();
    assert!(restore(&snapshots, &path, &identity()).is_err());
    assert_eq!(fs::read_to_string(&path).unwrap(), "another's");
}

#[test]
fn a_change_of_a_large_store_changes_few_of_its_parts() {
    let (_, snapshots) = snapshots();
    let store = memory();
    let many = (0..150_000u32).map(|number| Address::left_padding_from(&number.to_le_bytes()));
    let announced = many.chain([escrow(1)]).map(|escrow| (escrow, block(1, 0))).collect();
    store.accept(&Stretch { announced, ..stretch(block(1, 0), &[], &[]) }).unwrap();
    for number in 2..32 {
        let events = (0..1_000).map(|index| event(escrow(1), block(number, 0), index, false)).collect();
        store.accept(&Stretch { events, ..stretch(block(number, 0), &[], &[]) }).unwrap();
    }
    let first = snapshots.create(&store, None).unwrap();
    go_on_with_one(&store, 32);
    let second = snapshots.create(&store, None).unwrap();
    let large: Vec<&Part> = second.parts.iter().filter(|part| part.bytes > 1 << 20).collect();
    let new = large.iter().filter(|part| !first.parts.contains(part)).count();
    assert!(large.len() >= 4, "{} large parts: the store is too small for this test", large.len());
    assert!(
        new <= 2,
        "{new} of {} large parts are new: of the registry and of the log one each may be",
        large.len()
    );
}

fn go_on_with_one(store: &Store, number: u64) {
    store.accept(&stretch(block(number, 0), &[], &[1])).unwrap();
}

#[test]
fn of_damaged_snapshots_the_newest_that_is_whole_is_restored() {
    type Damage = fn(&Bucket, &Manifest);
    let table: [(&str, Damage); 7] = [
        ("a manifest cut off", |bucket, it| {
            bucket.change(&it.file(), |bytes| bytes.truncate(bytes.len() - 9))
        }),
        ("a manifest changed", |bucket, it| bucket.change(&it.file(), |bytes| bytes[40] ^= 1)),
        ("an empty manifest", |bucket, it| bucket.change(&it.file(), Vec::clear)),
        ("a part missing", |bucket, it| bucket.remove(&changed_part(it)).unwrap()),
        ("a part cut off", |bucket, it| bucket.change(&changed_part(it), |bytes| bytes.truncate(7))),
        ("a part changed", |bucket, it| bucket.change(&changed_part(it), |bytes| bytes[9] ^= 1)),
        ("a part that cannot be read", |bucket, it| {
            // More often than it is tried.
            let file: &'static str = changed_part(it).leak();
            bucket.fails(file, &[Fault::Stale; 99]);
        }),
    ];
    for (what, damage) in table {
        let (bucket, snapshots) = snapshots();
        let store = lived();
        let older = snapshots.create(&store, None).unwrap();
        let before = rows(&store);
        go_on(&store, 6);
        let newer = snapshots.create(&store, None).unwrap();
        damage(&bucket, &newer);
        let Restored { store: again, manifest, .. } =
            restored(&snapshots).unwrap().unwrap_or_else(|| panic!("{what}"));
        assert_eq!((manifest.number, rows(&again)), (older.number, before), "{what}");
        damage_all(&bucket);
        let refused = restored(&snapshots).map(|restored| restored.is_some());
        assert!(matches!(refused, Err(SnapshotError::NoneWhole { count: 2, .. })), "{what}: {refused:?}");
    }
}

/// A part that an older snapshot has not.
fn changed_part(manifest: &Manifest) -> String {
    let part = manifest.parts.iter().find(|part| part.table == "event_log");
    part.expect("there are events").file()
}

fn damage_all(bucket: &Bucket) {
    for file in bucket.names("snapshot-") {
        bucket.change(&file, |bytes| bytes.push(b'!'));
    }
}

#[test]
fn a_volume_that_does_not_keep_what_it_was_given_is_noticed_and_nothing_is_announced() {
    for file in ["parts/", "snapshot-"] {
        for fault in [Fault::Lost, Fault::Cut, Fault::Stale] {
            let (bucket, snapshots) = snapshots();
            let store = lived();
            // A part is looked for before it is written.
            let times = if (file, fault) == ("parts/", Fault::Stale) { 2 } else { 1 };
            bucket.fails(file, &vec![fault; times]);
            let refused = snapshots.create(&store, None);
            let what = format!("{file} {fault:?}: {refused:?}");
            assert!(
                matches!(refused, Err(SnapshotError::NotKept(_) | SnapshotError::Volume { .. })),
                "{what}"
            );
            assert!(!matches!(restored(&snapshots), Ok(Some(_))), "{what}");
            snapshots.create(&store, None).unwrap();
            assert_eq!(rows(&restored(&snapshots).unwrap().unwrap().store), rows(&store), "{what}");
        }
    }
}

#[test]
fn a_handle_that_goes_stale_is_opened_again() {
    let (bucket, snapshots) = snapshots();
    let store = lived();
    snapshots.create(&store, None).unwrap();
    bucket.fails("parts/", &[Fault::Stale; 2]);
    assert!(restored(&snapshots).unwrap().is_some());
}

#[test]
fn a_snapshot_that_cannot_be_read_for_a_while_is_waited_for_before_an_older_one_is_taken() {
    let kinds: [fn(&Manifest) -> String; 2] = [Manifest::file, changed_part];
    for file in kinds {
        let (bucket, snapshots) = snapshots();
        let store = lived();
        snapshots.create(&store, None).unwrap();
        go_on(&store, 6);
        let newer = snapshots.create(&store, None).unwrap();
        bucket.fails(file(&newer).leak(), &[Fault::Stale; 7]);
        let Restored { store: again, manifest, .. } = restored(&snapshots).unwrap().unwrap();
        assert_eq!((manifest.number, rows(&again)), (newer.number, rows(&store)), "{}", file(&newer));
    }
}

#[test]
fn a_list_that_cannot_be_read_for_a_while_is_waited_for() {
    let (bucket, snapshots) = snapshots();
    let store = lived();
    snapshots.create(&store, None).unwrap();
    bucket.fails(LISTING, &[Fault::Stale; 4]);
    assert_eq!(rows(&restored(&snapshots).unwrap().unwrap().store), rows(&store));
    bucket.fails(LISTING, &[Fault::Stale; 5]);
    let refused = restored(&snapshots).map(|restored| restored.is_some());
    assert!(matches!(refused, Err(SnapshotError::Volume { .. })), "{refused:?}");
}

/// Whether the first store may go on after another one has gone on from its snapshot, on a volume that is then as `is`
/// says; and how long it took to say.
async fn may_go_on(is: impl FnOnce(&Bucket, &Manifest)) -> (Result<(), SnapshotError>, Duration) {
    let (bucket, snapshots) = snapshots();
    let store = lived();
    snapshots.create(&store, None).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("relayer.redb");
    snapshots.restore(&path, &identity(), None).await.unwrap();
    let other = Store::open(&path, identity(), None, Added::Leave).unwrap();
    let newest = snapshots.create(&other, None).unwrap();
    is(&bucket, &newest);
    let began = Instant::now();
    (is_newest(snapshots, &store, &path).await, began.elapsed())
}

#[tokio::test(start_paused = true)]
async fn a_store_of_the_past_does_not_go_on_because_a_volume_hiccups() {
    let (refused, _) = may_go_on(|_, _| {}).await;
    assert!(matches!(refused, Err(SnapshotError::Outlived { .. })), "{refused:?}");
    let (refused, _) =
        may_go_on(|bucket, newest| bucket.fails(newest.file().leak(), &[Fault::Stale; 14])).await;
    assert!(matches!(refused, Err(SnapshotError::Outlived { .. })), "{refused:?}");
    let (refused, _) = may_go_on(|bucket, _| bucket.fails(LISTING, &[Fault::Stale; 4])).await;
    assert!(matches!(refused, Err(SnapshotError::Outlived { .. })), "{refused:?}");
}

#[tokio::test(start_paused = true)]
async fn a_manifest_that_stays_unread_is_named_and_one_that_is_damaged_is_no_evidence() {
    let (refused, took) =
        may_go_on(|bucket, newest| bucket.fails(newest.file().leak(), &[Fault::Stale; 99])).await;
    let refused = refused.unwrap_err();
    assert!(!refused.is_configuration());
    for word in ["snapshot-000000000002.json", "cannot be read", "os error 116", "repair the volume"] {
        assert!(refused.to_string().contains(word), "{word}: {refused}");
    }
    assert_eq!(took.as_secs(), 40);
    let (fine, _) = may_go_on(|bucket, newest| bucket.change(&newest.file(), Vec::clear)).await;
    fine.unwrap();
}

#[test]
fn one_that_would_be_late_is_not_announced() {
    let (bucket, snapshots) = snapshots();
    let refused = snapshots.create(&lived(), Some(Instant::now()));
    assert!(matches!(refused, Err(SnapshotError::Late)), "{refused:?}");
    assert_eq!(bucket.names("snapshot-"), [""; 0]);
}

#[test]
fn old_snapshots_go_and_what_the_others_need_stays() {
    let (bucket, snapshots) = snapshots();
    let store = lived();
    for number in 6..=10 {
        go_on(&store, number);
        snapshots.create(&store, None).unwrap();
    }
    assert_eq!(snapshots.prune(2).unwrap(), 3);
    assert_eq!(bucket.names("snapshot-"), ["snapshot-000000000004.json", "snapshot-000000000005.json"]);
    let listed = snapshots.list().unwrap();
    let needed: BTreeSet<String> =
        listed.iter().flat_map(|it| &it.manifest.as_ref().unwrap().parts).map(Part::file).collect();
    assert_eq!(bucket.names("parts/"), needed.into_iter().collect::<Vec<_>>());
    assert_eq!(rows(&restored(&snapshots).unwrap().unwrap().store), rows(&store));

    bucket.change("snapshot-000000000004.json", |bytes| bytes[30] ^= 1);
    let before = bucket.names("");
    assert_eq!(snapshots.prune(2).unwrap(), 0, "nobody knows what the damaged one needs");
    assert_eq!(bucket.names(""), before);
    // A part that was pruned and is needed again is written again.
    assert_eq!(snapshots.prune(1).unwrap(), 1);
    snapshots.create(&store, None).unwrap();
    assert_eq!(rows(&restored(&snapshots).unwrap().unwrap().store), rows(&store));
}

#[test]
fn a_snapshot_of_another_relay_is_refused_and_both_are_named() {
    let (_, snapshots) = snapshots();
    snapshots.create(&lived(), None).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("relayer.redb");
    let other = Identity { chain_id: 5, ..identity() };
    let refused = restore(&snapshots, &path, &other).unwrap_err();
    assert!(refused.is_configuration());
    let text = refused.to_string();
    assert!(text.contains("snapshot-000000000001.json") && text.contains("configuration 5"), "{text}");
}

#[test]
fn a_copy_made_while_the_store_is_written_is_of_one_moment() {
    let (_, snapshots) = snapshots();
    let store = lived();
    std::thread::scope(|scope| {
        let writing = scope.spawn(|| (6..200).for_each(|number| go_on(&store, number)));
        while !writing.is_finished() {
            let made = snapshots.create(&store, None).unwrap();
            let Restored { store, .. } = restored(&snapshots).unwrap().unwrap();
            assert_eq!(
                (store.entries(), store.cursor()),
                (made.entries, made.cursor.map(|(number, hash)| BlockRef { number, hash }))
            );
            let log: u64 =
                made.parts.iter().filter(|part| part.table == "blocks").map(|part| part.rows).sum();
            assert_eq!(log, store.next_block() - 2, "blocks from the newest final one, 2, on");
        }
    });
}

#[test]
fn old_snapshots_are_not_removed_from_under_one_in_the_making() {
    let (_, snapshots) = snapshots();
    let store = lived();
    std::thread::scope(|scope| {
        let pruning = scope.spawn(|| (0..300).map(|_| snapshots.prune(1).unwrap()).sum::<usize>());
        let mut number = 6;
        while !pruning.is_finished() {
            go_on(&store, number);
            number += 1;
            snapshots.create(&store, None).unwrap();
        }
    });
    snapshots.create(&store, None).unwrap();
    assert_eq!(rows(&restored(&snapshots).unwrap().unwrap().store), rows(&store));
}

const SECOND: Duration = Duration::from_secs(1);

fn acquire(bucket: &Arc<Bucket>, name: &str) -> tokio::task::JoinHandle<Lease<Bucket>> {
    let (bucket, name) = (Arc::clone(bucket), name.to_owned());
    tokio::spawn(async move {
        let (vitals, never) = (Vitals::default(), CancellationToken::new());
        Lease::acquire(bucket, name, Wait::ForIt, &vitals, &never).await.unwrap().unwrap()
    })
}

#[tokio::test(start_paused = true)]
async fn whoever_comes_second_stands_by_until_the_first_gives_the_lease_up() {
    let bucket = Arc::default();
    let first = acquire(&bucket, "first").await.unwrap();
    let second = acquire(&bucket, "second");
    let permit = first.permit();
    let keeping = tokio::spawn(async move {
        let mut first = first;
        tokio::select! {
            lost = first.keep() => panic!("{lost:?}"),
            () = sleep(300 * SECOND) => first.release().await,
        }
    });
    for _ in 0..299 {
        sleep(SECOND).await;
        assert!(permit.holds() && !second.is_finished());
    }
    keeping.await.unwrap();
    let asked = Instant::now();
    let second = second.await.unwrap();
    assert!(second.permit().holds() && !permit.holds());
    assert!(asked.elapsed() < 12 * SECOND, "{:?}", asked.elapsed());
}

#[tokio::test(start_paused = true)]
async fn the_lease_of_a_dead_holder_expires_and_its_permit_ends_before() {
    let bucket = Arc::default();
    let dead = acquire(&bucket, "dead").await.unwrap();
    let (permit, second) = (dead.permit(), acquire(&bucket, "second"));
    drop(dead);
    let died = Instant::now();
    sleep(6 * SECOND).await;
    assert!(!permit.holds() && !second.is_finished());
    second.await.unwrap();
    assert!((20 * SECOND..30 * SECOND).contains(&died.elapsed()), "{:?}", died.elapsed());
}

#[tokio::test(start_paused = true)]
async fn who_waits_for_the_dead_alone_takes_their_lease_and_is_told_who_is_alive() {
    let bucket: Arc<Bucket> = Arc::default();
    let take = async || {
        let (bucket, vitals, never) = (Arc::clone(&bucket), Vitals::default(), CancellationToken::new());
        Lease::acquire(bucket, "command".to_owned(), Wait::ForTheDead, &vitals, &never).await
    };
    let mut first = acquire(&bucket, "first").await.unwrap();
    let working = tokio::spawn(async move {
        tokio::select! {
            lost = first.keep() => panic!("{lost:?}"),
            () = sleep(60 * SECOND) => {}
        }
    });
    let Err(NotTaken::Held(by)) = take().await else { panic!("it is held") };
    assert!(by.contains(&format!("process {}", std::process::id())), "{by}");
    assert!(!working.is_finished());
    // It dies at the end of that, and what it held expires.
    working.await.unwrap();
    assert!(take().await.unwrap().unwrap().permit().holds());
    bucket.fails("lease.json", &[Fault::Stale]);
    assert!(matches!(take().await, Err(NotTaken::Volume(_))), "nobody waits for a volume that fails");
}

#[tokio::test(start_paused = true)]
async fn a_lease_of_an_earlier_version_is_somebodys_too() {
    let bucket: Arc<Bucket> = Arc::default();
    let beating = Arc::clone(&bucket);
    let beats = tokio::spawn(async move {
        for beat in 1.. {
            beating.write("lease.json", format!(r#"{{"holder":"ab12","beat":{beat}}}"#).as_bytes()).unwrap();
            sleep(4 * SECOND).await;
        }
    });
    let (vitals, never) = (Vitals::default(), CancellationToken::new());
    let taken = Lease::acquire(bucket, "command".to_owned(), Wait::ForTheDead, &vitals, &never).await;
    assert!(matches!(taken, Err(NotTaken::Held(by)) if by == "the instance ab12"));
    beats.abort();
}

#[tokio::test(start_paused = true)]
async fn the_process_of_the_same_store_need_not_wait_after_a_crash() {
    let bucket = Arc::default();
    drop(acquire(&bucket, "same").await.unwrap());
    let began = Instant::now();
    assert!(acquire(&bucket, "same").await.unwrap().permit().holds());
    assert_eq!(began.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn a_holder_that_was_paused_may_publish_nothing_until_it_looked_and_then_knows_that_it_lost() {
    let bucket = Arc::default();
    let mut paused = acquire(&bucket, "paused").await.unwrap();
    let permit = paused.permit();
    let other = acquire(&bucket, "other").await.unwrap();
    assert!(!permit.holds() && other.permit().holds());
    assert_eq!(paused.keep().await, Lost::Taken);
    assert!(!permit.holds());
}

#[tokio::test(start_paused = true)]
async fn a_volume_that_does_not_answer_stops_publishing_and_no_more() {
    let bucket: Arc<Bucket> = Arc::default();
    let mut lease = acquire(&bucket, "first").await.unwrap();
    let permit = lease.permit();
    let keeping = tokio::spawn(async move { lease.keep().await });
    bucket.fails("lease.json", &[Fault::Stale; 12]);
    sleep(8 * SECOND).await;
    assert!(!permit.holds());
    sleep(8 * SECOND).await;
    assert!(permit.holds() && !keeping.is_finished());
}

#[tokio::test(start_paused = true)]
async fn a_change_that_takes_its_time_is_no_loss_until_another_may_have_taken_the_lease() {
    for (seconds, lost) in [(10u32, false), (25, true)] {
        let bucket: Arc<Bucket> = Arc::default();
        let mut lease = acquire(&bucket, "first").await.unwrap();
        let permit = lease.permit();
        let keeping = tokio::spawn(async move { lease.keep().await });
        let let_go = held_up(&bucket).await;
        tokio::time::advance(seconds * SECOND).await;
        assert!(!permit.holds(), "nothing is known of it");
        let_go.send(()).unwrap();
        sleep(3 * SECOND).await;
        assert_eq!((keeping.is_finished(), permit.holds()), (lost, !lost), "after {seconds} s");
        if lost {
            assert_eq!(keeping.await.unwrap(), Lost::TooLate);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_is_not_there_any_more_is_no_one_elses() {
    let bucket: Arc<Bucket> = Arc::default();
    let mut lease = acquire(&bucket, "first").await.unwrap();
    let permit = lease.permit();
    let keeping = tokio::spawn(async move { lease.keep().await });
    let kept = bucket.read("lease.json").unwrap().unwrap();
    bucket.remove("lease.json").unwrap();
    sleep(6 * SECOND).await;
    assert!(!permit.holds() && !keeping.is_finished(), "the volume may be gone");
    bucket.write("lease.json", &kept).unwrap();
    sleep(3 * SECOND).await;
    assert!(permit.holds() && !keeping.is_finished());
}

#[tokio::test(start_paused = true)]
async fn who_stops_while_it_waits_for_its_name_to_stay_leaves_no_name_behind() {
    let bucket: Arc<Bucket> = Arc::default();
    let stop = CancellationToken::new();
    let (stopping, waiting) = (stop.clone(), Arc::clone(&bucket));
    let acquiring = tokio::spawn(async move {
        let (name, vitals) = ("first".to_owned(), Vitals::default());
        Lease::acquire(waiting, name, Wait::ForIt, &vitals, &stopping).await.unwrap().is_some()
    });
    sleep(2 * SECOND).await;
    stop.cancel();
    assert!(!acquiring.await.unwrap());
    let began = Instant::now();
    acquire(&bucket, "second").await.unwrap();
    assert!(began.elapsed() < 6 * SECOND, "{:?}", began.elapsed());
}

/// Waits until somebody writes the lease, who then waits for what is returned.
async fn held_up(bucket: &Bucket) -> std::sync::mpsc::Sender<()> {
    let (let_go, held_up) = std::sync::mpsc::channel();
    *bucket.held_up.lock().unwrap() = Some(held_up);
    // While something blocks, time passes only when it is told to.
    while bucket.held_up.lock().unwrap().is_some() {
        pass_a_moment().await;
    }
    let_go
}

/// For everybody, also those off the async threads.
async fn pass_a_moment() {
    tokio::time::advance(SECOND / 100).await;
    std::thread::sleep(Duration::from_millis(2));
}

#[tokio::test(start_paused = true)]
async fn a_name_that_is_being_written_when_its_process_stops_does_not_stay_behind() {
    for held in [false, true] {
        let bucket: Arc<Bucket> = Arc::default();
        let stop = CancellationToken::new();
        let (stopping, volume) = (stop.clone(), Arc::clone(&bucket));
        let live = async move {
            let (name, vitals) = ("first".to_owned(), Vitals::default());
            let lease = Lease::acquire(volume, name, Wait::ForIt, &vitals, &stopping).await.unwrap();
            let Some(mut lease) = lease else { return };
            tokio::select! {
                lost = lease.keep() => panic!("{lost:?}"),
                () = stopping.cancelled() => lease.release().await,
            }
        };
        let living = tokio::spawn(live);
        if held {
            sleep(6 * SECOND).await;
        }
        let let_go = held_up(&bucket).await;
        stop.cancel();
        for _ in 0..20 {
            pass_a_moment().await;
        }
        let_go.send(()).unwrap();
        living.await.unwrap();
        let began = Instant::now();
        acquire(&bucket, "second").await.unwrap();
        assert!(began.elapsed() < 6 * SECOND, "held: {held}, {:?}", began.elapsed());
    }
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_is_half_written_is_somebodys_until_it_expires() {
    let bucket: Arc<Bucket> = Arc::default();
    bucket.write("lease.json", br#"{"holder":"#).unwrap();
    let began = Instant::now();
    acquire(&bucket, "first").await.unwrap();
    assert!(began.elapsed() >= 20 * SECOND);
}

/// Instances come, are paused for any time, die and go: at no moment may two publish.
#[test]
fn however_instances_come_pause_and_go_no_two_hold_the_lease_at_once() {
    use proptest::prelude::*;
    /// When it comes, and how long it is then at work and paused, in turns, in seconds.
    type Life = (u32, Vec<(u32, u32)>);
    async fn live(
        bucket: Arc<Bucket>,
        name: String,
        (comes, turns): Life,
        permits: Arc<Mutex<Vec<Arc<Permit>>>>,
    ) {
        sleep(comes * SECOND).await;
        let (vitals, never) = (Vitals::default(), CancellationToken::new());
        let Some(mut lease) = Lease::acquire(bucket, name, Wait::ForIt, &vitals, &never).await.unwrap()
        else {
            return;
        };
        permits.lock().unwrap().push(lease.permit());
        for (works, pauses) in turns {
            tokio::select! {
                _lost = lease.keep() => return,
                () = sleep(works * SECOND) => {}
            }
            sleep(pauses * SECOND).await;
        }
        lease.release().await;
    }
    let life = || (0..60u32, prop::collection::vec((0..40u32, 0..50u32), 0..4));
    proptest!(ProptestConfig::with_cases(60), |(lives in prop::collection::vec(life(), 2..5))| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let bucket = Arc::<Bucket>::default();
            let permits = Arc::<Mutex<Vec<Arc<Permit>>>>::default();
            let lives: Vec<_> = (0..).zip(lives).map(|(number, life)| {
                tokio::spawn(live(Arc::clone(&bucket), format!("{number}"), life, Arc::clone(&permits)))
            }).collect();
            while lives.iter().any(|life| !life.is_finished()) {
                let holding = permits.lock().unwrap().iter().filter(|permit| permit.holds()).count();
                assert!(holding <= 1, "{holding} at once");
                sleep(Duration::from_millis(500)).await;
            }
            assert!(!permits.lock().unwrap().is_empty(), "somebody had it");
        });
    });
}
