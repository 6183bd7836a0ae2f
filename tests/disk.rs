//! A disk that is full: an end with a clear error, at whatever moment it fills up; and when there is room again,
//! nothing is lost and nothing is added.

mod common;

use std::fs;
use std::path::Path;

use common::relay::firsts;
use common::{Finished, Line, Setup, World};

/// More than one commit's worth at the smallest limit, in bytes of messages.
const ESCROWS: u64 = 20;
const APPROVALS: u64 = 40;
/// By how much the disk grows from one try to the next, in bytes.
const STEP: u64 = 192 << 10;
/// Tries after which it must have been enough.
const TRIES: u64 = 60;

async fn load(world: &World) {
    for escrow in world.factory.create_many(ESCROWS).await {
        world.factory.send("approveMany", &[escrow.address.into(), APPROVALS.into()]).await;
    }
}

fn size(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |file| file.len())
}

/// Runs to the head on a disk that has a little more room each time; what each try that failed left behind.
async fn with_more_and_more_room(setup: &Setup, from: u64) -> (Vec<Finished>, Finished) {
    let mut failed = vec![];
    for nth in 0..TRIES {
        let run = setup.start_on_disk_of(from + nth * STEP, &["run", "--until", "head"]).ended().await;
        if run.code == Some(0) {
            return (failed, run);
        }
        failed.push(run);
    }
    panic!("{} bytes were not enough: {:?}", from + TRIES * STEP, failed.last());
}

#[tokio::test]
async fn a_disk_that_fills_up_at_any_moment_ends_it_with_what_to_do_and_loses_and_adds_nothing() {
    const OUTSTANDING: usize = 50;
    let mut world = World::new().await;
    world.setup.set("RELAYER_SINK__MAX_OUTSTANDING", OUTSTANDING);
    world.setup.set("RELAYER_RPC__MAX_RANGE", 3);
    let store = world.setup.path("relayer.redb");
    let mut lines = world.setup.run_to_head().await;
    load(&world).await;
    let (failed, last) = with_more_and_more_room(&world.setup, size(&store)).await;
    assert!(failed.len() > 1, "{} tries failed", failed.len());
    let mut repeated = 0;
    for run in failed {
        lines.extend(run.failed_with(1, &["the store failed", "free space", "nothing is lost"]).lines());
        let (_, repeats) = firsts(&lines);
        assert!(repeats <= repeated + OUTSTANDING, "{} repeats", repeats - repeated);
        repeated = repeats;
    }
    lines.extend(last.lines());
    world.truth().await.assert_is(&firsts(&lines).0);
}

#[tokio::test]
async fn a_new_store_that_cannot_even_be_made_for_want_of_room_says_so() {
    let world = World::new().await;
    for bytes in [0, 512, 4096, 64 << 10] {
        let run = world.setup.start_on_disk_of(bytes, &["run", "--until", "head"]).ended().await;
        run.failed_with(1, &["free space"]);
    }
    world.truth().await.assert_is(&world.setup.run_to_head().await);
}

#[tokio::test]
async fn a_new_store_that_finds_no_room_for_what_it_reads_goes_on_when_there_is() {
    let world = World::new().await;
    load(&world).await;
    for bytes in [256 << 10, 512 << 10, 1 << 20] {
        let run = world.setup.start_on_disk_of(bytes, &["run", "--until", "head"]).ended().await;
        assert_eq!(run.failed_with(1, &["the store failed", "free space"]).lines(), [], "nothing was read");
    }
    world.truth().await.assert_is(&world.setup.run_to_head().await);
}

#[tokio::test]
async fn a_file_sink_without_room_ends_it_and_no_line_is_cut_lost_or_written_twice() {
    let mut world = World::new().await;
    world.setup.set("RELAYER_SINK__KIND", "file");
    world.setup.set("RELAYER_SINK__PATH", "events.jsonl");
    world.setup.set("RELAYER_SINK__MAX_OUTSTANDING", 100);
    load(&world).await;
    // So much stands in it already that it is the sink that has no room, and not the store.
    let written = world.setup.path("events.jsonl");
    let before = "{\"earlier\":true}\n".repeat(500_000);
    fs::write(&written, &before).expect("it can be written");
    let (failed, _) = with_more_and_more_room(&world.setup, size(&written)).await;
    assert!(failed.len() > 3, "{} tries failed", failed.len());
    for run in failed {
        run.failed_with(1, &["the sink is gone", "File too large"]);
    }
    let text = fs::read_to_string(&written).expect("the file is there");
    let lines = Line::all(text.strip_prefix(&before).expect("what stood there stays"));
    world.truth().await.assert_is(&lines);
}
