//! What people get wrong, and what is not there yet. A mistake ends the process with exit code 2 and the name of the
//! thing; a fault with 1; what may still come is waited for, and that is said once.

mod common;

use std::path::Path;

use alloy::primitives::{Address, keccak256};
use common::relay::free_port;
use common::relay::proxy::Proxy;
use common::{Anvil, Chain, PubSub, Setup, World};

/// Nobody listens there, and nobody needs to: these mistakes are noticed before anybody is called.
const NOBODY: &str = "http://127.0.0.1:1";

/// Variables on top of a set-up's own; an empty value takes one away.
type Variables<'a> = &'a [(&'a str, &'a str)];
/// Texts that must be said.
type Said<'a> = &'a [&'a str];

const MISTAKE: i32 = 2;
const FAULT: i32 = 1;

fn setup() -> Setup {
    Setup::new(NOBODY, Address::repeat_byte(0xfa))
}

#[tokio::test]
async fn a_wrong_value_is_named_with_its_variable_and_what_would_be_right() {
    // Variable, value (none: taken away), what must be said.
    let table: [(&str, &str, Said); 17] = [
        ("CONTRACT_ADDRESS", "0x1234", &["factory.address", "0x1234", "CONTRACT_ADDRESS", "40 hex digits"]),
        ("CONTRACT_ADDRESS", "0x311E63dfcEfe7f2c202715ef0DF01CDA82f58915", &["factory.address", "checksum"]),
        ("CONTRACT_ADDRESS", "", &["factory.address", "CONTRACT_ADDRESS", "missing"]),
        ("RPC_URL", "", &["rpc.urls", "RPC_URL", "missing"]),
        ("RPC_URL", "ftp://node", &["rpc.urls", "RPC_URL", "https://"]),
        ("CHAIN_ID", "sepolia", &["chain.id", "sepolia", "CHAIN_ID", "whole number"]),
        ("CHAIN_ID", "", &["chain.id", "CHAIN_ID", "missing"]),
        ("START_BLOCK", "-5", &["chain.start_block", "-5", "START_BLOCK", "negative"]),
        ("START_BLOCK", "", &["chain.start_block", "START_BLOCK"]),
        (
            "POLL_INTERVAL_SECONDS",
            "soon",
            &["chain.poll_interval", "soon", "POLL_INTERVAL_SECONDS", "seconds"],
        ),
        ("RELAYER_CHAIN__COLOUR", "blue", &["chain.colour", "RELAYER_CHAIN__COLOUR", "unknown key"]),
        (
            "RELAYER_CHAIN__CONFIRMATION",
            "5",
            &["chain.confirmation", "unknown key", "did you mean RELAYER_CHAIN__CONFIRMATIONS?"],
        ),
        (
            "RELAYER_ESCROW__EVENTS",
            "Approved(adress indexed approver)",
            &["escrow.events", "Approved(adress", "type"],
        ),
        ("RELAYER_ESCROW__EVENTS", "Approved indexed", &["escrow.events", "signature"]),
        ("RELAYER_FACTORY__CHILD", "vault", &["factory.child", "vault", "EscrowDeployed"]),
        ("RELAYER_SINK__KIND", "kafka", &["sink.kind", "kafka", "pubsub", "stdout", "file"]),
        ("RELAYER_SINK__KIND", "pubsub", &["sink.project", "PUBSUB_PROJECT_ID", "missing"]),
    ];
    for (variable, value, said) in table {
        let ended = setup().start_with(&["run"], &[(variable, value)]).ended().await;
        let ended = ended.failed_with(MISTAKE, said);
        assert!(ended.stdout.is_empty(), "stdout is for data");
    }
}

#[tokio::test]
async fn everything_wrong_is_told_at_once() {
    let wrong = [("CONTRACT_ADDRESS", "0x1"), ("CHAIN_ID", "x"), ("RELAYER_RPC__MAX_RANGE", "0")];
    let ended = setup().start_with(&["run"], &wrong).ended().await;
    let said = ["3 problems", "factory.address", "chain.id", "rpc.max_range"];
    ended.failed_with(MISTAKE, &said);
}

#[tokio::test]
async fn a_misspelt_key_in_the_file_is_named_with_the_file_and_a_suggestion() {
    let setup = setup();
    std::fs::write(setup.path("relayer.toml"), "[chain]\nconfirmatons = 3\n").expect("written");
    let said = ["chain.confirmatons", "relayer.toml", "did you mean chain.confirmations?"];
    setup.run(&["run"]).await.failed_with(MISTAKE, &said);
    std::fs::write(setup.path("relayer.toml"), "[chain\n").expect("written");
    setup.run(&["run"]).await.failed_with(MISTAKE, &["relayer.toml", "line 1"]);
    setup.run(&["--config", "other.toml"]).await.failed_with(MISTAKE, &["other.toml", "cannot be read"]);
}

#[tokio::test]
async fn a_wrong_command_line_is_a_mistake_too() {
    for (arguments, said) in [
        (&["run", "--until", "soon"][..], &["--until", "head"][..]),
        (&["fly"], &["fly"]),
        (&["run", "--set", "chain.id"], &["KEY=VALUE"]),
        (&["run", "--set", "chain.idd=5"], &["chain.idd", "did you mean chain.id?", "command line"]),
    ] {
        setup().run(arguments).await.failed_with(MISTAKE, said);
    }
}

#[tokio::test]
async fn a_place_that_cannot_be_written_is_named() {
    for (variable, kind, path) in [
        ("RELAYER_STORAGE__PATH", "stdout", "no/such/folder/store.redb"),
        ("RELAYER_STORAGE__PATH", "stdout", "/proc/store.redb"),
        ("RELAYER_SINK__PATH", "file", "no/such/folder/events.jsonl"),
        ("RELAYER_SINK__PATH", "file", "/proc/events.jsonl"),
    ] {
        let variables = [("RELAYER_SINK__KIND", kind), (variable, path)];
        let key = if kind == "file" { "sink.path" } else { "storage.path" };
        let ended = setup().start_with(&["run"], &variables).ended().await;
        let ended = ended.failed_with(MISTAKE, &[key, path, "os error"]);
        assert_eq!(ended.stderr.matches("os error").count(), 1, "the cause once: {}", ended.stderr);
    }
}

#[tokio::test]
async fn a_store_made_for_something_else_is_refused_and_both_are_named() {
    let world = World::new().await;
    world.setup.run_to_head().await;
    let factory = format!("{:#x}", world.factory.address);
    let other = format!("{:#x}", Address::repeat_byte(7));
    let table: [(Variables, Said); 6] = [
        (&[("CHAIN_ID", "11155111")], &["chain.id", "31337", "11155111"]),
        (&[("CONTRACT_ADDRESS", &other)], &["factory.address", &factory, &other]),
        (
            &[("RELAYER_SINK__KIND", "file"), ("RELAYER_SINK__PATH", "events.jsonl")],
            &["sink", "stdout", "file events.jsonl"],
        ),
        (
            &[("PUBSUB_PROJECT_ID", "my-project"), ("PUBSUB_EMULATOR_HOST", "127.0.0.1:1")],
            &["sink", "stdout", "projects/my-project/topics/settlement.events.v1"],
        ),
        (
            &[
                (
                    "RELAYER_ESCROW__EVENTS",
                    "Approved(address indexed approver), Disputed(address indexed by)",
                ),
                ("RELAYER_ESCROW__TERMINAL", "Approved"),
            ],
            &["signatures", "EscrowRefunded", "Disputed(address indexed by)"],
        ),
        (&[("RELAYER_SINK__ORDERING", "bucket:64")], &["sink.ordering", "escrow", "bucket:64"]),
    ];
    for (variables, said) in table {
        let ended = world.setup.start_with(&["run"], variables).ended().await.failed_with(MISTAKE, said);
        assert!(ended.stderr.contains("relayer.redb"), "the file: {}", ended.stderr);
    }
    // Nothing of that harmed it.
    world.factory.create_escrow().await;
    assert_eq!(world.setup.run_to_head().await.len(), 1);
}

#[tokio::test]
async fn a_node_of_another_chain_is_refused_and_both_ids_are_named() {
    let world = World::on(Anvil::new().chain_id(4242).spawn().await.expect("anvil starts")).await;
    let ended = world.setup.run(&["run"]).await.failed_with(MISTAKE, &["31337", "4242", "chain.id"]);
    assert!(ended.stdout.is_empty());
}

#[tokio::test]
async fn a_second_process_on_the_same_file_is_told_so() {
    let world = World::new().await;
    world.factory.create_escrow().await;
    let mut first = world.setup.start(&["run"]);
    first.wait_for_lines(1).await;
    world.setup.run(&["run"]).await.failed_with(FAULT, &["relayer.redb", "in use by another process"]);
    world.factory.create_escrow().await;
    first.wait_for_lines(2).await;
    first.stop().await;
}

#[tokio::test]
async fn a_file_that_is_no_store_is_left_as_it_is() {
    let world = World::new().await;
    let text = "somebody's notes\n".repeat(1000);
    std::fs::write(world.setup.path("relayer.redb"), &text).expect("written");
    world.setup.run(&["run"]).await.failed_with(FAULT, &["relayer.redb", "damaged or not a relayer's"]);
    assert_eq!(std::fs::read_to_string(world.setup.path("relayer.redb")).expect("still there"), text);
}

#[tokio::test]
async fn without_a_node_it_waits_says_so_once_tells_no_secret_and_goes_on_when_the_node_comes() {
    let World { anvil, factory, setup, chain } = World::new().await;
    factory.create_by("createApproveRelease").await;
    let port = free_port();
    let url = format!("http://user:PASSWORD@127.0.0.1:{port}/v2/SECRETKEY?token=SECRET#HIDDEN");
    let mut setup = setup.with("RPC_URL", &url);
    setup.set("RUST_LOG", "trace");
    let mut relayer = setup.start(&["run"]);
    let said = relayer.wait_logged("does not answer").await;
    assert_eq!(said["severity"], "WARNING");
    tokio::time::sleep(std::time::Duration::from_secs(1)).await; // time to say it again; nothing waits for this

    let proxy = Proxy::start_at(port, &anvil.url()).await;
    relayer.wait_for_lines(4).await;
    relayer.wait_logged("answers again").await;
    assert_eq!(proxy.requests()[0].path, "/v2/SECRETKEY?token=SECRET", "the whole URL is used");

    // Gone once more, in the middle of its life.
    drop(proxy);
    relayer.wait_logged_times("does not answer", 2).await;
    let proxy = Proxy::start_at(port, &anvil.url()).await;
    factory.create_escrow().await;
    relayer.wait_for_lines(5).await;
    drop(proxy);

    let finished = relayer.stop().await;
    assert!(finished.logged("does not answer").len() <= 3, "{}", finished.stderr);
    assert!(finished.stderr.contains(&format!("127.0.0.1:{port}")), "which provider");
    for secret in ["SECRET", "PASSWORD", "HIDDEN", "/v2/"] {
        let told = finished.stderr.lines().find(|line| line.contains(secret));
        assert!(told.is_none(), "{secret} in {told:?}");
    }
    common::relay::truth::Truth::read(&chain, factory.address, chain.block_number().await)
        .await
        .assert_is(&finished.lines());
}

#[tokio::test]
async fn no_secret_is_told_by_any_command_or_mistake() {
    let world = World::new().await;
    let proxy = Proxy::start(&world.anvil.url()).await;
    let secret = |base: &str| format!("{base}/v2/SECRETKEY?token=SECRET");
    let (good, bad) = (secret(&proxy.url()), secret(NOBODY));
    let twice = format!("{bad},{bad}");
    let misspelt = secret("htp://127.0.0.1");
    let wrong: [(&[&str], Variables); 9] = [
        (&["config"], &[("RPC_URL", &good)]),
        (&["check"], &[("RPC_URL", &good)]),
        (&["check"], &[("RPC_URL", &bad)]),
        (&["run", "--until", "head"], &[("RPC_URL", &good)]),
        (&["run", "--until", "head"], &[("RPC_URL", &good), ("CHAIN_ID", "1")]),
        (&["run"], &[("RPC_URL", &twice)]),
        (&["run"], &[("RPC_URL", &misspelt)]),
        (&["run"], &[("RELAYER_RPC__URL", &good)]),
        (&["run"], &[("CONTRACT_ADDRESS", &good)]),
    ];
    for (arguments, variables) in wrong {
        let setup = world.setup.anew().with("RUST_LOG", "trace");
        let ended = setup.start_with(arguments, variables).ended().await;
        let all = ended.stdout.join("\n") + &ended.stderr;
        assert!(!all.contains("SECRET"), "{arguments:?} {variables:?}:\n{all}");
    }
}

#[tokio::test]
async fn without_the_factory_it_waits_says_so_once_and_goes_on_when_it_is_deployed() {
    let anvil = Anvil::start().await;
    let chain = Chain::connect(anvil.url()).await;
    let address = first_contract_of(chain.account(0));
    let mut relayer = Setup::new(&anvil.url(), address).start(&["run"]);
    let said = relayer.wait_logged("No contract at factory.address").await;
    assert_eq!(said["severity"], "WARNING");
    assert_eq!(said["factory"], format!("{address:#x}"));

    let factory = chain.deploy("EscrowFactory", &[]).await;
    assert_eq!(factory.address, address);
    factory.create_by("createApproveRelease").await;
    relayer.wait_for_lines(4).await;
    let finished = relayer.stop().await;
    assert_eq!(finished.logged("No contract at").len(), 1);
    assert_eq!(finished.logged("The factory is there").len(), 1);
}

#[tokio::test]
async fn below_its_start_block_it_waits_says_so_once_and_begins_when_that_is_mined() {
    let world = World::new().await;
    world.factory.create_escrow().await;
    let start = world.chain.block_number().await + 5;
    let mut relayer = world.setup.start_with(&["run"], &[("START_BLOCK", &start.to_string())]);
    let said = relayer.wait_logged(&format!("Waiting for block {start}")).await;
    assert_eq!(said["severity"], "WARNING");
    world.chain.mine(4).await;
    let (escrow, receipt) = world.factory.create_by("createApproveRelease").await;
    assert_eq!(receipt.block_number, start);
    let lines = relayer.wait_for_lines(4).await;
    assert!(lines.iter().all(|line| line.ordering_key == format!("{:#x}", escrow.address)));
    let finished = relayer.stop().await;
    assert_eq!(finished.logged("Waiting for block").len(), 1);
}

#[tokio::test]
async fn config_prints_each_value_with_its_source_and_hides_the_urls_path() {
    let mut setup = Setup::plain("https://rpc.example/v2/SECRETKEY", Address::repeat_byte(0xfa));
    setup.set("RELAYER_RPC__MAX_RANGE", 500);
    setup.set("CONTRACT_ADDRESS", "0xfafafafafafafafafafafafafafafafafafafafa");
    std::fs::write(setup.path("relayer.toml"), "[chain]\nconfirmations = 3\nid = 5\n").expect("written");
    let ended = setup.run(&["config", "--set", "chain.horizon=safe"]).await.good();
    let row = |key: &str| {
        let row = ended.stdout.iter().find(|row| row.split_whitespace().next() == Some(key));
        row.unwrap_or_else(|| panic!("no {key} in {:#?}", ended.stdout))
    };
    for (key, value, source) in [
        ("chain.id", "31337", "CHAIN_ID"),
        ("chain.confirmations", "3", "relayer.toml"),
        ("chain.horizon", "safe", "command line"),
        ("chain.finality_depth", "64", "default"),
        ("rpc.max_range", "500", "RELAYER_RPC__MAX_RANGE"),
        ("rpc.urls", "https://rpc.example/…", "RPC_URL"),
        ("sink.kind", "stdout", "default"),
        ("factory.address", "0xfafafafafafafafafafafafafafafafafafafafa", "CONTRACT_ADDRESS"),
        ("storage.path", "relayer.redb", "default"),
    ] {
        assert!(row(key).contains(value) && row(key).contains(source), "{key}: {:?}", row(key));
    }
    assert!(!ended.stdout.join("\n").contains("SECRETKEY"));
    assert!(!setup.path("relayer.redb").exists(), "it only looks");
}

#[tokio::test]
async fn check_finds_everything_in_order_and_leaves_no_trace() {
    let world = World::new().await;
    world.factory.create_escrow().await; // a factory that never spoke is worth a note
    let pubsub = PubSub::start().await;
    pubsub.create_topic("projects/test-project/topics/settlement.events.v1");
    let setup =
        world.setup.with("PUBSUB_PROJECT_ID", "test-project").with("PUBSUB_EMULATOR_HOST", pubsub.endpoint());
    let ended = setup.run(&["check"]).await.good();
    assert!(ended.stdout.iter().all(|line| line.starts_with("ok  ")), "{:#?}", ended.stdout);
    for item in
        ["events", "chain id", "head", "finalized", "factory", "range", "addresses", "storage", "sink"]
    {
        assert!(ended.stdout.iter().any(|line| line.contains(item)), "no {item} in {:#?}", ended.stdout);
    }
    assert!(pubsub.messages().is_empty(), "nothing is sent");
    let left: Vec<_> = std::fs::read_dir(setup.path("")).expect("a folder").collect();
    assert!(left.is_empty(), "{left:?}");
}

#[tokio::test]
async fn check_passes_with_a_note_where_the_account_may_publish_and_not_look() {
    let (world, pubsub) = (World::new().await, PubSub::start().await);
    pubsub.hide_topics();
    let (folder, emulator) = (world.setup.path("snapshots"), pubsub.endpoint());
    std::fs::create_dir(&folder).expect("a folder can be made");
    let setup = world.setup.with("PUBSUB_PROJECT_ID", "test-project").with("PUBSUB_EMULATOR_HOST", emulator);
    let setup = setup.with("RELAYER_STORAGE__SNAPSHOT_DIR", folder.display());
    let ended = setup.run(&["check"]).await.good();
    let line = |item: &str| ended.stdout.iter().find(|line| line.contains(item)).expect("a line").clone();
    let sink = line("sink Pub/Sub");
    assert!(sink.starts_with("note") && sink.contains("roles/pubsub.publisher"), "{sink}");
    let snapshots = line("snapshots ");
    assert!(snapshots.starts_with("ok") && snapshots.contains("there are none yet"), "{snapshots}");
    assert_eq!(std::fs::read_dir(&folder).expect("it is there").count(), 0, "it only looks");
}

#[tokio::test]
async fn check_fails_with_a_line_for_each_thing_that_would_not_work() {
    let world = World::new().await;
    let pubsub = PubSub::start().await;
    let (nowhere, emulator) = (format!("{:#x}", Address::repeat_byte(9)), pubsub.endpoint());
    let table: [(Variables, Said); 9] = [
        (&[("CONTRACT_ADDRESS", &nowhere)], &["factory", &nowhere, "no code"]),
        (&[("CHAIN_ID", "5")], &["chain id", "31337", "5"]),
        (&[("RPC_URL", NOBODY)], &["rpc http://127.0.0.1:1", "answers"]),
        (&[("RELAYER_STORAGE__PATH", "no/such/folder/x.redb")], &["storage", "no/such/folder/x.redb"]),
        (&[("START_BLOCK", "")], &["storage", "chain.start_block"]),
        (
            &[("RELAYER_STORAGE__SNAPSHOT_DIR", "no/such/folder")],
            &["snapshots no/such/folder", "storage.snapshot_dir"],
        ),
        (
            &[("RELAYER_SINK__KIND", "file"), ("RELAYER_SINK__PATH", "no/such/folder/x.jsonl")],
            &["sink", "no/such/folder/x.jsonl"],
        ),
        (
            &[("PUBSUB_PROJECT_ID", "test-project"), ("PUBSUB_EMULATOR_HOST", &emulator)],
            &["sink Pub/Sub", "projects/test-project/topics/settlement.events.v1", "does not exist"],
        ),
        (
            &[("PUBSUB_PROJECT_ID", "test-project"), ("PUBSUB_EMULATOR_HOST", "127.0.0.1:1")],
            &["sink Pub/Sub", "127.0.0.1:1"],
        ),
    ];
    for (variables, said) in table {
        let ended = world.setup.start_with(&["check"], variables).ended().await.failed_with(FAULT, &[]);
        let failed: Vec<_> = ended.stdout.iter().filter(|line| line.starts_with("FAIL")).collect();
        assert_eq!(failed.len(), 1, "{variables:?}: {:#?}", ended.stdout);
        assert!(said.iter().all(|text| failed[0].contains(text)), "{said:?} in {}", failed[0]);
        assert!(ended.stdout.len() > 2, "the other things are told, too: {:#?}", ended.stdout);
    }
    assert!(!Path::new(&world.setup.path("relayer.redb")).exists(), "it only looks");
}

/// Where an account's first transaction deploys to: the hash of the RLP of `[account, 0]`.
fn first_contract_of(account: Address) -> Address {
    let rlp = [&[0xd6, 0x94], account.as_slice(), &[0x80]].concat();
    Address::from_word(keccak256(rlp))
}
