//! The socket beside the store: who may use it, how it comes and goes, and what it makes of whatever is said there.

mod common;

use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use alloy::primitives::Address;
use common::relay::{PATIENCE, Running};
use common::{Setup, World};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

async fn started(setup: &Setup) -> Running {
    let mut relayer = setup.start(&["run"]);
    relayer.wait_logged("Relaying from block").await;
    let socket = setup.path("relayer.redb.sock");
    let bound = async {
        while UnixStream::connect(&socket).await.is_err() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, bound).await.expect("the socket is there");
    relayer
}

fn mode(path: &Path) -> u32 {
    path.symlink_metadata().expect("it is there").permissions().mode() & 0o7777
}

#[tokio::test]
async fn the_socket_is_its_owners_alone_and_gone_with_the_relayer() {
    let world = World::new().await;
    let socket = world.setup.path("relayer.redb.sock");
    let relayer = started(&world.setup).await;
    assert!(socket.symlink_metadata().expect("it is there").file_type().is_socket());
    assert_eq!(mode(&socket), 0o600);
    assert!(!world.setup.path("relayer.redb.sock.new").exists());
    relayer.stop().await;
    assert!(!socket.exists());
    assert!(UnixStream::connect(&socket).await.is_err());
}

#[tokio::test]
async fn what_a_dead_relayer_left_is_replaced_and_no_command_is_misled_by_it() {
    let world = World::new().await;
    let socket = world.setup.path("relayer.redb.sock");
    let relayer = started(&world.setup).await;
    relayer.kill().await;
    assert!(socket.exists(), "nobody was there to remove it");
    std::fs::create_dir(world.setup.path("relayer.redb.sock.new")).expect("made");
    std::fs::write(world.setup.path("relayer.redb.sock.new/s"), "half of one").expect("written");
    world.setup.run(&["escrows", "list"]).await.good();
    let relayer = started(&world.setup).await;
    assert_eq!(mode(&socket), 0o600);
    world.setup.run(&["escrows", "list"]).await.good();
    relayer.stop().await;
    assert!(!socket.exists());
    // What is not a socket is nobody's to remove; the relayer runs without one and says so.
    std::fs::write(&socket, "precious").expect("written");
    let mut relayer = world.setup.start(&["run"]);
    relayer.wait_logged("No socket for commands").await;
    let refused = world.setup.run(&["escrows", "list"]).await;
    refused.failed_with(1, &["in use by another process", "relayer.redb.sock", "stop it first"]);
    relayer.stop().await;
    assert_eq!(std::fs::read_to_string(&socket).expect("it is there"), "precious");
}

#[tokio::test]
async fn a_store_at_a_very_long_path_has_a_socket_all_the_same() {
    let world = World::new().await;
    let mut folder = PathBuf::from("deep");
    for _ in 0..4 {
        folder.push("a".repeat(80));
    }
    std::fs::create_dir_all(world.setup.path(folder.to_str().expect("a name"))).expect("made");
    let store = world.setup.path(folder.join("relayer.redb").to_str().expect("a name"));
    let setup = world.setup.anew().with("RELAYER_STORAGE__PATH", store.display());
    world.factory.create_many(2).await;
    let mut relayer = setup.start(&["run"]);
    relayer.wait_for_lines(2).await;
    setup.run(&["escrows", "list"]).await.good_with_stdout(&["active"]);
    let mut socket = store.into_os_string();
    socket.push(".sock");
    assert_eq!(mode(Path::new(&socket)), 0o600);
    relayer.stop().await;
    assert!(!Path::new(&socket).exists());
}

/// Says this and reads to the end.
async fn say(setup: &Setup, text: &[u8], ends: bool) -> Vec<Value> {
    let mut stream =
        UnixStream::connect(setup.path("relayer.redb.sock")).await.expect("the relayer is there");
    // Whoever is refused early may not take all of it.
    let _ = stream.write_all(text).await;
    if ends {
        let _ = stream.shutdown().await;
    }
    let mut answer = Vec::new();
    let read = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer)).await.expect("it answers");
    // A connection that is closed with something unread may break off.
    if let Err(error) = read {
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    }
    let answer = String::from_utf8(answer).expect("text");
    answer.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

fn error(answers: &[Value]) -> &str {
    answers.last().and_then(|last| last["error"]["message"].as_str()).unwrap_or_else(|| panic!("{answers:?}"))
}

#[tokio::test]
async fn whatever_is_said_at_the_socket_is_answered_or_refused_and_nobody_else_is_held_up() {
    let world = World::new().await;
    let relayer = started(&world.setup).await;
    // Some that never say anything, and some that say half of it.
    let mut silent = vec![];
    for _ in 0..20 {
        let mut stream =
            UnixStream::connect(world.setup.path("relayer.redb.sock")).await.expect("the relayer is there");
        stream.write_all(b"{\"version\":1,").await.expect("it is taken");
        silent.push(stream);
    }
    let table: [(&[u8], &str); 9] = [
        (b"\n", "not one"),
        (b"GET / HTTP/1.1\r\n", "not one"),
        (b"\xff\xfe\x00\n", "not one"),
        (b"{\"request\":\"escrows\"}\n", "version"),
        (b"{\"version\":2,\"request\":{\"something\":\"new\"}}\n", "speaks version 1"),
        (b"{\"version\":1,\"request\":\"nothing_known\"}\n", "not one"),
        (b"{\"version\":1,\"request\":{\"outbox\":{\"limit\":-1}}}\n", "not one"),
        (
            b"{\"version\":1,\"request\":{\"replay\":{\"from\":9,\"to\":1,\"escrow\":null}}}\n",
            "--from 9 --to 1",
        ),
        (b"{\"version\":1,\"request\":{\"import\":{\"escrows\":[],\"from\":99}}}\n", "has not got there"),
    ];
    for (text, said) in table {
        let answers = say(&world.setup, text, false).await;
        assert!(error(&answers).contains(said), "{answers:?}");
    }
    assert!(error(&say(&world.setup, b"{\"version\":1", true).await).contains("not whole"));
    assert!(error(&say(&world.setup, b"", true).await).contains("not whole"));
    let huge = [b"{\"version\":1,\"request\":\"".to_vec(), vec![b'a'; 8 << 20], b"\"}\n".to_vec()].concat();
    let answers = say(&world.setup, &huge, false).await;
    if !answers.is_empty() {
        assert!(error(&answers).contains("too long"), "{answers:?}");
    }
    // A good one, said by hand, is answered to the end.
    let answers = say(&world.setup, b"{\"version\":1,\"request\":\"escrows\"}\n", true).await;
    assert_eq!(answers.last(), Some(&json!("end")));
    world.setup.run(&["escrows", "list"]).await.good();
    // Whoever says nothing is told so in the end.
    let mut told = String::new();
    let read = silent[0].read_to_string(&mut told);
    tokio::time::timeout(PATIENCE, read).await.expect("in time").expect("text");
    assert!(told.contains("no request came"), "{told}");
    relayer.stop().await;
}

#[tokio::test]
async fn several_commands_at_once_are_all_answered_and_one_that_does_not_read_holds_up_nobody() {
    let world = World::new().await;
    for _ in 0..6 {
        world.factory.create_many(100).await;
    }
    world.setup.run_to_head().await;
    // More than fits into a socket, so that whoever writes to one that does not read has to wait.
    let many = (1..=5_000u64).map(|number| Address::left_padding_from(&number.to_be_bytes()));
    let file = world.setup.path("many.json");
    let registry = json!({ "escrows": many.collect::<Vec<_>>(), "count": 5_000 });
    std::fs::write(&file, registry.to_string()).expect("written");
    let next = world.chain.block_number().await + 1;
    let file = file.to_str().expect("a name");
    world.setup.run(&["escrows", "import", file, "--from", &next.to_string()]).await.good();
    let mut relayer = started(&world.setup).await;
    let rows = say(&world.setup, b"{\"version\":1,\"request\":\"escrows\"}\n", true).await;
    let bytes: usize = rows.iter().map(|row| row.to_string().len()).sum();
    assert!(bytes > 600_000, "{bytes} bytes: less than three of the buffers that a socket has");
    // It asks for much and reads nothing.
    let mut lazy = UnixStream::connect(world.setup.path("relayer.redb.sock")).await.expect("it is there");
    lazy.write_all(b"{\"version\":1,\"request\":{\"replay\":{\"from\":0,\"to\":99999,\"escrow\":null}}}\n")
        .await
        .expect("it is taken");
    let mut unread = UnixStream::connect(world.setup.path("relayer.redb.sock")).await.expect("it is there");
    unread.write_all(b"{\"version\":1,\"request\":\"escrows\"}\n").await.expect("it is taken");
    let listed = (0..6).map(|_| world.setup.run(&["escrows", "list"]));
    for finished in futures_util::future::join_all(listed).await {
        assert_eq!(finished.good().stdout.len(), 5_601);
    }
    world.factory.create_escrow().await;
    relayer.wait_until("the new one", |lines| lines.iter().any(|line| line.data["block_number"] == 8)).await;
    drop((lazy, unread));
    relayer.stop().await;
}

#[tokio::test]
async fn two_relayers_never_share_a_store_and_commands_wait_for_each_other() {
    let world = World::new().await;
    world.factory.create_many(20).await;
    world.setup.run_to_head().await;
    // On the file one after the other has the lock.
    let listed = (0..5).map(|_| world.setup.run(&["escrows", "list"]));
    for finished in futures_util::future::join_all(listed).await {
        assert_eq!(finished.good().stdout.len(), 21);
    }
    // Somebody who has the store and no socket.
    let _held = redb::Database::open(world.setup.path("relayer.redb")).expect("a store");
    let _stale = UnixListener::bind(world.setup.path("relayer.redb.sock")).map(drop);
    world.setup.run(&["status"]).await.failed_with(1, &["in use by another process", "wait for it"]);
}
