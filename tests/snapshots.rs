//! Snapshots in a folder that outlives the store, and the lease that goes with them: real processes, a real chain, a broker
//! that keeps all it was given.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::relay::{Running, free_port};
use common::{Answer, Line, PubSub, Setup, World};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio_util::task::AbortOnDropHandle;

/// A world whose relayers publish to one broker and keep snapshots in one folder; each has a machine of its own.
struct Fleet {
    world: World,
    pubsub: PubSub,
    volume: TempDir,
}

impl Fleet {
    async fn new() -> Fleet {
        let (mut world, pubsub) = World::new().await.publishing().await;
        let volume = tempfile::tempdir().expect("a folder can be made");
        let folder = volume.path().join("snapshots");
        fs::create_dir(&folder).expect("a folder can be made");
        world.setup.set("RELAYER_STORAGE__SNAPSHOT_DIR", folder.display());
        Fleet { world, pubsub, volume }
    }

    /// A machine without a store.
    fn machine(&self) -> Setup {
        self.world.setup.anew()
    }

    async fn live(&self, escrows: u64) {
        for escrow in self.world.factory.create_many(escrows).await {
            escrow.send("approve", &[]).await;
        }
    }

    /// A command that publishes there, and is not answered.
    async fn replaying(&self, machine: &Setup) -> Running {
        self.pubsub.on_publish(|_| Answer::Hang);
        let replaying = machine.start(CHANGING[0]);
        self.pubsub.wait_for_requests(self.pubsub.requests().len() + 1).await;
        replaying
    }

    /// Another instance, on some other machine, that holds the lease and does nothing else.
    async fn held(&self) -> Holder {
        let folder = self.volume.path().join("snapshots");
        let (held, mut is_held) = tokio::sync::watch::channel(0_u64);
        let holding = tokio::spawn(async move {
            for beat in 1.. {
                let claim = json!({ "holder": "another", "by": HOLDER, "beat": 1_000 + beat });
                fs::write(folder.join("lease.new"), claim.to_string()).expect("it can be written");
                fs::rename(folder.join("lease.new"), folder.join("lease.json")).expect("it can be renamed");
                held.send_replace(beat);
                tokio::time::sleep(Duration::from_millis(200)).await; // its pace
            }
        });
        is_held.wait_for(|beat| *beat > 0).await.expect("it lives");
        Holder(AbortOnDropHandle::new(holding))
    }

    /// Who holds the lease.
    fn holder(&self) -> Value {
        let file = self.volume.path().join("snapshots").join("lease.json");
        let claim: Value = serde_json::from_slice(&fs::read(file).expect("it is there")).expect("JSON");
        claim["holder"].clone()
    }

    /// Waits until everything on the chain has arrived.
    async fn wait(&self) {
        let events = self.world.truth().await.len();
        self.pubsub.wait_until("all events", |messages| firsts(&lines(messages)).0.len() >= events).await;
    }

    /// Everything arrived, in order; how many came again. What comes again says the same.
    async fn assert_whole(&self) -> usize {
        let (mut firsts, repeats) = firsts(&lines(&self.pubsub.messages()));
        for line in &mut firsts {
            // Each life of the store has its own.
            line.attributes.insert("epoch".to_owned(), "1".to_owned());
        }
        self.world.truth().await.assert_is(&firsts);
        repeats
    }

    fn snapshots(&self) -> Vec<PathBuf> {
        let folder = self.volume.path().join("snapshots");
        let files = fs::read_dir(folder).expect("it is there").map(|file| file.expect("readable").path());
        let mut manifests: Vec<PathBuf> =
            files.filter(|file| file.extension().is_some_and(|extension| extension == "json")).collect();
        manifests.retain(|file| !file.ends_with("lease.json"));
        manifests.sort();
        manifests
    }
}

const HOLDER: &str = "host elsewhere, process 7";

/// Dropped, it is dead.
struct Holder(#[expect(dead_code, reason = "it lives as long as this")] AbortOnDropHandle<()>);

fn lines(messages: &[common::pubsub::Message]) -> Vec<Line> {
    messages.iter().map(Line::of).collect()
}

/// The first of each event, and how many came again: with the same body and key, whatever life of a store sent them.
fn firsts(lines: &[Line]) -> (Vec<Line>, usize) {
    let (mut seen, mut firsts): (BTreeMap<&str, &Line>, Vec<Line>) = Default::default();
    for line in lines {
        match seen.get(line.event_id()) {
            None => {
                seen.insert(line.event_id(), line);
                firsts.push(line.clone());
            }
            Some(first) => {
                assert_eq!(
                    (&line.data, &line.ordering_key),
                    (&first.data, &first.ordering_key),
                    "it says the same"
                );
            }
        }
    }
    let repeats = lines.len() - firsts.len();
    (firsts, repeats)
}

async fn started(setup: &Setup) -> Running {
    let mut relayer = setup.start(&["run"]);
    relayer.wait_logged("Relaying from block").await;
    relayer
}

#[tokio::test]
async fn a_store_that_is_gone_comes_back_from_the_snapshot_of_its_end_and_nothing_repeats() {
    let fleet = Fleet::new().await;
    fleet.live(5).await;
    let relayer = started(&fleet.machine()).await;
    fleet.wait().await;
    relayer.stop().await;
    fleet.live(3).await;
    let mut relayer = started(&fleet.machine()).await;
    relayer.wait_logged("Restored the snapshot of").await;
    fleet.live(1).await;
    fleet.wait().await;
    relayer.stop().await;
    assert_eq!(fleet.assert_whole().await, 0);
    let epochs =
        lines(&fleet.pubsub.messages()).iter().map(|line| line.attributes["epoch"].clone()).collect();
    let epochs: std::collections::BTreeSet<String> = epochs;
    assert_eq!(epochs.len(), 2, "another life of the store has another epoch");
}

#[tokio::test]
async fn after_a_kill_what_came_since_the_last_snapshot_that_is_whole_comes_again_and_no_more() {
    let fleet = Fleet::new().await;
    let machine = fleet.machine();
    fleet.live(4).await;
    let relayer = started(&machine).await;
    fleet.wait().await;
    let made = machine.run(&["snapshot", "create"]).await.good();
    assert_eq!(made.stdout, ["snapshot-000000000001.json"]);
    let kept = fleet.pubsub.messages().len();
    fleet.live(3).await;
    fleet.wait().await;
    machine.run(&["snapshot", "create"]).await.good();
    relayer.kill().await;
    let published = fleet.pubsub.messages().len();

    // The newest is damaged: one of its parts.
    let newest = fleet.snapshots().pop().expect("there are two");
    damage_a_part_of(&newest, &fleet.volume.path().join("snapshots"));
    let other = fleet.machine();
    let listed = other.run(&["snapshot", "list", "--json"]).await.good().stdout.join("\n");
    let listed: Vec<Value> = serde_json::from_str(&listed).expect("JSON");
    assert_eq!(listed.len(), 2);

    // The lease of who was killed expires first.
    let mut relayer = started(&other).await;
    relayer.wait_said("The snapshot snapshot-000000000002.json cannot be used").await;
    fleet.live(1).await;
    fleet.wait().await;
    relayer.stop().await;
    assert_eq!(fleet.assert_whole().await, published - kept, "what was published after the first snapshot");

    // The machine that was killed comes back with its old store: another one has gone on.
    let refused = machine.run(&["run"]).await;
    refused.failed_with(2, &["is older than the newest snapshot", "move the file away"]);
}

#[tokio::test]
async fn what_was_published_after_the_last_snapshot_and_left_the_chain_since_is_never_withdrawn_and_the_start_says_so()
 {
    const SAID: &str = "has left the chain since is never withdrawn";
    let fleet = Fleet::new().await;
    let machine = fleet.machine();
    let escrow = fleet.world.factory.create_escrow().await;
    let mut relayer = started(&machine).await;
    relayer.wait_said(SAID).await;
    fleet.wait().await;
    // The first comes by itself; then none for minutes.
    relayer.wait_said("Snapshot snapshot-").await;
    machine.run(&["snapshot", "create"]).await.good();
    escrow.send("approve", &[]).await;
    fleet.wait().await;
    relayer.kill().await;
    // Before the next snapshot the machine is gone, and the block of the approval, too.
    fleet.world.chain.roll_back(1).await;
    fleet.live(1).await;
    let relayer = started(&fleet.machine()).await;
    fleet.pubsub.wait_for(2 + 2).await;
    relayer.stop().await;
    let lines = lines(&fleet.pubsub.messages());
    assert!(!lines.iter().any(Line::is_retraction), "nobody knows of it");
    let of_it: Vec<&Line> =
        lines.iter().filter(|line| line.ordering_key == format!("{:#x}", escrow.address)).collect();
    assert_eq!(of_it.len(), 2, "announced, and approved, which is not so any more: {of_it:?}");

    let fleet = Fleet::new().await;
    let machine = fleet.machine().with("RELAYER_CHAIN__HORIZON", "finalized");
    let relayer = started(&machine).await;
    assert!(!relayer.stop().await.stderr.contains(SAID), "only what is final is published");
}

fn damage_a_part_of(manifest: &Path, folder: &Path) {
    let text = fs::read_to_string(manifest).expect("it is there");
    let manifest: Value = serde_json::from_str(text.lines().next().expect("a line")).expect("JSON");
    let parts = manifest["parts"].as_array().expect("parts");
    let part = parts.iter().find(|part| part["table"] == "event_log").expect("there are events");
    let file = folder.join("parts").join(part["sha256"].as_str().expect("a name"));
    let mut bytes = fs::read(&file).expect("it is there");
    bytes[20] ^= 1;
    fs::write(&file, bytes).expect("it can be written");
}

#[tokio::test]
async fn during_a_rollout_the_new_instance_stands_by_ready_until_the_old_one_has_ended() {
    let fleet = Fleet::new().await;
    let old = started(&fleet.machine()).await;
    let port = free_port();
    let new = fleet.machine().with("RELAYER_HTTP__LISTEN", format!("127.0.0.1:{port}"));
    let mut new = new.start(&["run"]);
    new.wait_logged("standing by").await;
    let page = |path: &str| reqwest::get(format!("http://127.0.0.1:{port}{path}"));
    assert_eq!(page("/healthz").await.expect("it answers").status(), 200);
    assert_eq!(page("/readyz").await.expect("it answers").status(), 200);
    let status: Value = page("/status").await.expect("it answers").json().await.expect("JSON");
    assert_eq!(status["phase"], "standby", "{status}");
    for _ in 0..3 {
        fleet.live(2).await;
        fleet.wait().await;
    }
    let ended = old.stop().await;
    assert!(ended.stderr.contains("Snapshot snapshot-"), "{}", ended.stderr);
    new.wait_logged("Restored the snapshot of").await;
    fleet.live(2).await;
    fleet.wait().await;
    new.stop().await;
    assert_eq!(fleet.assert_whole().await, 0);
}

#[tokio::test]
async fn an_instance_that_was_frozen_publishes_nothing_once_another_has_taken_over() {
    let fleet = Fleet::new().await;
    let mut frozen = started(&fleet.machine()).await;
    fleet.live(2).await;
    fleet.wait().await;
    frozen.freeze();
    fleet.live(2).await;
    let other = started(&fleet.machine()).await;
    fleet.wait().await;
    let before = epochs(&fleet);
    frozen.thaw();
    frozen.wait_said("has taken the lease").await;
    frozen.ended().await.failed_with(1, &["Another instance has taken the lease"]);
    fleet.live(2).await;
    fleet.wait().await;
    other.stop().await;
    fleet.assert_whole().await;
    let first = before.keys().next().expect("two lives");
    assert_eq!((before.len(), epochs(&fleet)[first]), (2, before[first]), "the frozen one sent nothing more");
}

/// How many messages each life of a store has sent, the oldest first.
fn epochs(fleet: &Fleet) -> BTreeMap<String, usize> {
    let mut epochs = BTreeMap::new();
    for line in lines(&fleet.pubsub.messages()) {
        *epochs.entry(line.attributes["epoch"].clone()).or_default() += 1;
    }
    epochs
}

#[tokio::test]
async fn snapshots_are_made_listed_and_restored_by_command_and_wrong_asking_is_told_what_to_do() {
    let fleet = Fleet::new().await;
    let (machine, mut without) = (fleet.machine(), fleet.machine());
    without.unset("RELAYER_STORAGE__SNAPSHOT_DIR");
    for command in ["create", "list", "restore"] {
        let refused = without.run(&["snapshot", command]).await;
        refused.failed_with(2, &["storage.snapshot_dir is not set"]);
    }
    machine.run(&["snapshot", "create"]).await.failed_with(2, &["no relayer has run here yet"]);
    machine.run(&["snapshot", "restore"]).await.failed_with(1, &["there is no snapshot"]);
    fleet.live(3).await;
    machine.run_to_head().await;
    assert_eq!(fleet.snapshots().len(), 1, "a job that ends well makes one");

    let made = machine.run(&["snapshot", "create", "--json"]).await.good().stdout.join("\n");
    let made: Value = serde_json::from_str(&made).expect("JSON");
    assert_eq!(
        (made["snapshot"].as_str(), made["messages"].as_u64()),
        (Some("snapshot-000000000002.json"), Some(6))
    );
    let table = machine.run(&["snapshot", "list"]).await.good().stdout;
    assert_eq!(table.len(), 3, "{table:?}");
    assert!(table[1].starts_with("snapshot-000000000002.json") && table[1].trim_end().ends_with("readable"));

    machine.run(&["snapshot", "restore"]).await.failed_with(2, &["exists, and is not overwritten"]);
    let other = fleet.machine();
    let unknown = other.run(&["snapshot", "restore", "--snapshot", "snapshot-000000000009.json"]).await;
    unknown.failed_with(2, &["there is no snapshot snapshot-000000000009.json", "relayer snapshot list"]);
    let restored = other.run(&["snapshot", "restore", "--snapshot", "snapshot-000000000001.json"]).await;
    restored.failed_with(0, &["Restored snapshot-000000000001.json"]);
    other.run_to_head().await;
    let escrows = |finished: common::Finished| finished.good().stdout;
    assert_eq!(
        escrows(other.run(&["escrows", "list"]).await),
        escrows(machine.run(&["escrows", "list"]).await)
    );
    let stranger = fleet.machine().with("CHAIN_ID", 5);
    stranger.run(&["snapshot", "restore"]).await.failed_with(2, &["belongs to another relay", "chain.id"]);
}

#[tokio::test]
async fn a_volume_that_is_gone_pauses_publishing_and_it_goes_on_when_it_is_back() {
    let fleet = Fleet::new().await;
    let machine = fleet.machine();
    let mut relayer = started(&machine).await;
    fleet.live(1).await;
    fleet.wait().await;
    let (folder, away) = (fleet.volume.path().join("snapshots"), fleet.volume.path().join("away"));
    fs::rename(&folder, &away).expect("it can be moved");
    fs::write(&folder, "no folder").expect("it can be written");
    relayer.wait_said("publishing pauses until it can").await;
    tokio::time::sleep(Duration::from_secs(5)).await; // the permit has ended by then
    let published = fleet.pubsub.messages().len();
    fleet.live(2).await;
    tokio::time::sleep(Duration::from_secs(1)).await; // what comes meanwhile is the test
    let late = fleet.pubsub.messages().len() - published;
    fs::remove_file(&folder).expect("it is there");
    fs::rename(&away, &folder).expect("it can be moved back");
    relayer.wait_said("The lease is confirmed again").await;
    fleet.wait().await;
    relayer.stop().await;
    assert_eq!(fleet.assert_whole().await, 0);
    assert_eq!(late, 0);
}

#[tokio::test]
async fn a_volume_that_is_not_mounted_is_no_empty_one() {
    let fleet = Fleet::new().await;
    fs::remove_dir(fleet.volume.path().join("snapshots")).expect("it is there");
    let machine = fleet.machine();
    for command in ["create", "list"] {
        let refused = machine.run(&["snapshot", command]).await;
        assert_ne!(refused.code, Some(0), "{}", refused.stderr);
    }
    let mut relayer = machine.start(&["run"]);
    relayer.wait_said("storage.snapshot_dir cannot be read: looking again").await;
    fleet.live(1).await;
    relayer.stop().await;
    assert!(fleet.pubsub.messages().is_empty() && !machine.path("relayer.redb").exists());
}

/// What changes a store or publishes from it, as it is asked of one that no relayer runs on.
const CHANGING: [&[&str]; 4] = [
    &["replay", "--from", "0", "--to", "1000"],
    &["outbox", "retry", "--all"],
    &["outbox", "discard", "31337:0x00:0"],
    &["escrows", "import", "registry.json", "--from", "0"],
];

fn write_registry(machine: &Setup) {
    let registry = json!({ "escrows": [format!("{:#x}", alloy::primitives::Address::repeat_byte(7))] });
    fs::write(machine.path("registry.json"), registry.to_string()).expect("it can be written");
}

#[tokio::test]
async fn while_another_instance_holds_the_lease_no_command_publishes_or_changes_a_store_and_all_can_look() {
    let fleet = Fleet::new().await;
    let (machine, bare) = (fleet.machine(), fleet.machine());
    fleet.live(2).await;
    machine.run_to_head().await;
    let published = fleet.pubsub.messages().len();
    write_registry(&machine);
    write_registry(&bare);
    let holder = fleet.held().await;
    for command in CHANGING {
        let refused = machine.run(command).await;
        refused.failed_with(1, &["storage.snapshot_dir", HOLDER, "run it there", "if it is a command"]);
    }
    bare.run(CHANGING[3]).await.failed_with(1, &[HOLDER]);
    assert!(!bare.path("relayer.redb").exists(), "nothing is left behind");
    machine.run(&["snapshot", "create"]).await.failed_with(1, &[HOLDER]);
    for command in [&["outbox", "list"], &["escrows", "list"], &["status", "--json"], &["snapshot", "list"]] {
        machine.run(command).await.good();
    }
    drop(holder);
    let (folder, away) = (fleet.volume.path().join("snapshots"), fleet.volume.path().join("away"));
    fs::rename(&folder, &away).expect("it can be moved");
    machine
        .run(CHANGING[0])
        .await
        .failed_with(1, &["storage.snapshot_dir cannot be taken", "mount the volume"]);
    assert_eq!(fleet.pubsub.messages().len(), published, "nothing came again");
    assert_eq!(machine.run(&["escrows", "list"]).await.good().stdout.len(), 1 + 2, "nothing is new");
}

#[tokio::test]
async fn a_command_that_publishes_holds_the_lease_meanwhile_and_gives_it_up_at_its_end() {
    let fleet = Fleet::new().await;
    let machine = fleet.machine();
    fleet.live(2).await;
    machine.run_to_head().await;
    let published = fleet.pubsub.messages().len();
    let replaying = fleet.replaying(&machine).await;
    assert!(fleet.holder().is_string(), "the command has it");
    let mut other = fleet.machine().start(&["run"]);
    other.wait_logged("standing by").await;
    fleet.pubsub.heal();
    replaying.ended().await.failed_with(0, &["were published again"]);
    other.wait_logged("Relaying from block").await;
    assert_eq!(fleet.pubsub.messages().len(), 2 * published);
    other.stop().await;
    // The other one has gone on: the file this machine has is of the past.
    for command in CHANGING.iter().take(3) {
        machine.run(command).await.failed_with(2, &["is older than the newest snapshot"]);
    }
    assert_eq!(fleet.pubsub.messages().len(), 2 * published);
    assert!(fleet.holder().is_null());
}

#[tokio::test]
async fn a_command_whose_lease_is_taken_ends_and_says_so() {
    let fleet = Fleet::new().await;
    let machine = fleet.machine();
    fleet.live(1).await;
    machine.run_to_head().await;
    let replaying = fleet.replaying(&machine).await;
    let _holder = fleet.held().await;
    let ended = replaying.ended().await;
    let ended =
        ended.failed_with(1, &["Another instance has taken the lease", "this command ends", "run it there"]);
    assert!(!ended.stderr.contains("stands by"), "a command never does: {}", ended.stderr);
}

#[tokio::test]
async fn a_command_has_the_store_until_it_has_given_up_the_lease() {
    let fleet = Fleet::new().await;
    let machine = fleet.machine();
    fleet.live(1).await;
    machine.run_to_head().await;
    let replaying = fleet.replaying(&machine).await;
    // From now on who looks at the lease gets no answer: giving it up takes its time.
    let lease = fleet.volume.path().join("snapshots").join("lease.json");
    fs::remove_file(&lease).expect("it is there");
    pipe(&lease);
    let ended = tokio::spawn(replaying.interrupted());
    tokio::time::sleep(Duration::from_secs(1)).await; // there is nothing left to do but that
    let opened = redb::Database::open(machine.path("relayer.redb"));
    assert!(matches!(opened, Err(redb::DatabaseError::DatabaseAlreadyOpen)), "{opened:?}");
    let ended = ended.await.expect("it ends");
    ended.failed_with(1, &["stopped by Ctrl-C", "The lease could not be given up"]);
}

/// Whoever opens it waits for somebody at the other end.
fn pipe(path: &Path) {
    let made = std::process::Command::new("mkfifo").arg(path).status();
    assert!(made.expect("mkfifo is there").success(), "{}", path.display());
}

#[tokio::test]
async fn ctrl_c_ends_a_command_that_waits_for_a_snapshot_and_the_lease_is_given_up() {
    let fleet = Fleet::new().await;
    fleet.live(2).await;
    fleet.machine().run_to_head().await;
    let parts = fleet.volume.path().join("snapshots").join("parts");
    for part in fs::read_dir(parts).expect("it is there") {
        let part = part.expect("readable").path();
        fs::remove_file(&part).expect("it is there");
        fs::create_dir(&part).expect("a folder can be made");
    }
    let restore: &[&str] = &["snapshot", "restore"];
    for command in [CHANGING[3], restore] {
        let machine = fleet.machine();
        write_registry(&machine);
        let mut waiting = machine.start(command);
        waiting.wait_said("trying again in 1 s").await;
        let asked = Instant::now();
        waiting.interrupted().await.failed_with(1, &["stopped by Ctrl-C"]);
        assert!(asked.elapsed() < common::relay::STOP_WITHIN, "{command:?}: {:?}", asked.elapsed());
        assert!(fleet.holder().is_null() && !machine.path("relayer.redb").exists(), "{command:?}");
    }
}

#[tokio::test]
async fn an_import_where_the_store_is_gone_goes_on_from_the_newest_snapshot_and_nothing_repeats() {
    let fleet = Fleet::new().await;
    fleet.live(2).await;
    fleet.machine().run_to_head().await;
    let other = fleet.machine();
    write_registry(&other);
    other.run(CHANGING[3]).await.good();
    assert!(fleet.holder().is_null());
    assert_eq!(other.run(&["escrows", "list"]).await.good().stdout.len(), 1 + 2 + 1);
    fleet.live(1).await;
    other.run_to_head().await;
    assert_eq!(fleet.assert_whole().await, 0);
}

#[tokio::test]
async fn commands_beside_a_standby_learn_that_it_stands_by_and_who_holds_the_lease() {
    let fleet = Fleet::new().await;
    let machine = fleet.machine();
    fleet.live(2).await;
    machine.run_to_head().await;
    write_registry(&machine);
    let holder = fleet.held().await;
    let mut standby = machine.start(&["run"]);
    standby.wait_logged("standing by").await;
    let status = machine.run(&["status", "--json"]).await.good().stdout.join("\n");
    let status: Value = serde_json::from_str(&status).expect("JSON");
    assert_eq!((&status["phase"], &status["lease_holder"]), (&json!("standby"), &json!(HOLDER)));
    assert_eq!(status["escrows"]["watched"], 2, "{status}");
    let text = machine.run(&["status"]).await.good().stdout.join("\n");
    assert!(text.contains("standing by") && text.contains(HOLDER), "{text}");
    assert_eq!(machine.run(&["escrows", "list"]).await.good().stdout.len(), 1 + 2);
    // Not `discard`: what it names is looked for first, and is not there.
    for command in [CHANGING[0], CHANGING[1], CHANGING[3], &["snapshot", "create"]] {
        machine.run(command).await.failed_with(1, &["stands by", HOLDER, "run it there"]);
    }
    drop(holder);
    standby.wait_logged("Relaying from block").await;
    let status = machine.run(&["status", "--json"]).await.good().stdout.join("\n");
    let status: Value = serde_json::from_str(&status).expect("JSON");
    assert_eq!(status["lease_holder"], Value::Null, "{status}");
    standby.stop().await;
}
