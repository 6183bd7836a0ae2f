//! The whole, with everything a process of its own: a real escrow with money and rules in it, relayer, Pub/Sub server,
//! settlement consumer, and the workflow example that says whether it works.

mod common;

use std::path::PathBuf;

use alloy::primitives::Address;
use common::pubsub::Answer;
use common::relay::Running;
use common::settlement::{SUBSCRIPTION, Settlement, subscribe};
use common::{Anvil, Contract, PubSub, Setup, World, example};

const TOPIC: &str = "projects/test-project/topics/settlement.events.v1";

/// The keys of anvil's first two accounts, the same everywhere.
const KEYS: [&str; 2] = [
    "0xac0974bec39a17e36ba4a6b4d238ff944bacb478cbed5efcae784d7bf4f2ff80",
    "0x59c6995e998f97a5a0044966f0945389dc9e86dae88c7a8412f4603b6b78690d",
];

struct Scene {
    anvil: Anvil,
    factory: Contract,
    setup: Setup,
    pubsub: PubSub,
    program: PathBuf,
}

impl Scene {
    async fn new() -> Scene {
        let World { anvil, chain, setup, .. } = World::new().await;
        let factory = chain.deploy("CustodyFactory", &[]).await;
        let pubsub = PubSub::start().await;
        pubsub.create_topic(TOPIC);
        subscribe(&pubsub, TOPIC);
        let setup = setup
            .with("CONTRACT_ADDRESS", factory.address)
            .with("PUBSUB_EMULATOR_HOST", pubsub.endpoint())
            .with("PUBSUB_PROJECT_ID", "test-project");
        let program = tokio::task::spawn_blocking(|| example::path("workflow")).await.expect("built");
        Scene { anvil, factory, setup, pubsub, program }
    }

    async fn settlement(&self) -> Settlement {
        Settlement::start(&self.setup, &self.pubsub).await
    }

    /// `workflow ARGS` against this settlement service.
    fn workflow(&self, settlement: &str, args: &[&str]) -> Running {
        let factory = format!("{:#x}", self.factory.address);
        let rpc = self.anvil.url();
        let common = ["--rpc", &rpc, "--factory", &factory, "--settlement-url", settlement, "--poll", "20"];
        let variables = [("PRIVATE_KEY", KEYS[0]), ("PRIVATE_KEY_2", KEYS[1])];
        self.setup.start_program(&self.program, &[&common[..], args].concat(), &variables)
    }
}

#[tokio::test]
async fn an_escrow_is_created_approved_and_released_and_the_row_says_so_at_each_step() {
    let scene = Scene::new().await;
    let settlement = scene.settlement().await;
    let relayer = scene.setup.start(&["run"]);
    let done = scene.workflow(settlement.url(), &["--release-delay", "3"]).ended().await;
    let done = done.good_with_stdout(&[
        "1. Create an escrow",
        "approvals_count 0, status created, after",
        "2. Approve",
        "approvals_count 1, status created, after",
        "3. Release",
        "approvals_count 1, status released, after",
        "It works",
    ]);
    assert_eq!(done.stdout.iter().filter(|line| line.contains("mined after")).count(), 3);
    let escrow =
        done.stdout.iter().find_map(|line| line.trim().strip_prefix("escrow ")).expect("it was named");
    let custody = scene.factory.chain.at("Custody", escrow.parse::<Address>().expect("an address"));
    assert_eq!((custody.get("approvalsCount").await, custody.get("released").await), (1, 1));
    relayer.stop().await;
}

#[tokio::test]
async fn two_approvers_count_one_after_the_other_and_an_approval_that_is_due_releases_at_once() {
    let scene = Scene::new().await;
    let settlement = scene.settlement().await;
    let relayer = scene.setup.start(&["run"]);
    let done = scene.workflow(settlement.url(), &["--two-approvers", "--release-delay", "0"]).ended().await;
    done.good_with_stdout(&[
        "approvals_count 0, status created",
        "approvals_count 1, status created",
        "approvals_count 2, status released",
        "released it at once",
        "It works",
    ]);
    relayer.stop().await;
}

#[tokio::test]
async fn a_refund_arrives_too() {
    let scene = Scene::new().await;
    let settlement = scene.settlement().await;
    let relayer = scene.setup.start(&["run"]);
    let done = scene.workflow(settlement.url(), &["--refund"]).ended().await;
    done.good_with_stdout(&["2. Refund", "approvals_count 0, status refunded", "It works"]);
    relayer.stop().await;
}

#[tokio::test]
async fn consumer_and_relayer_killed_in_the_middle_and_started_again_the_workflow_still_ends_well() {
    let scene = Scene::new().await;
    // One address for both lives of the consumer, as a service has.
    let settlement = scene.settlement().await;
    let url = settlement.url().to_owned();
    // What is applied is not acknowledged, and what is published is not known to be.
    scene.pubsub.lose_acknowledgements(true);
    scene.pubsub.on_publish(|_| Answer::StoreAndHang);
    let relayer = scene.setup.start(&["run"]);
    let mut workflow = scene.workflow(&url, &["--release-delay", "3"]);
    workflow.wait_printed("2. Approve").await;
    settlement.kill().await;
    relayer.kill().await;
    scene.pubsub.heal();
    let relayer = scene.setup.start(&["run"]);
    let settlement = Settlement::start_at(&scene.setup, &scene.pubsub, &url).await;
    scene.pubsub.end_leases(SUBSCRIPTION); // the killed one's
    workflow
        .ended()
        .await
        .good_with_stdout(&["approvals_count 1, status created", "approvals_count 1, status released"]);
    assert_eq!(settlement.counts().await["gaps"], 0);
    relayer.stop().await;
}

#[tokio::test]
async fn what_does_not_arrive_is_said_with_what_was_expected_and_where_to_look() {
    let scene = Scene::new().await;
    let settlement = scene.settlement().await; // and no relayer
    let ended = scene.workflow(settlement.url(), &["--timeout", "1"]).ended().await;
    ended.failed_with(1, &["did not arrive", "approvals_count 0", "no row", "the relayer's log"]);
    let nobody = "http://127.0.0.1:9";
    let ended = scene.workflow(nobody, &["--timeout", "1"]).ended().await;
    ended.failed_with(1, &["did not arrive", "no answer"]);
}

#[tokio::test]
async fn mistakes_are_named_and_a_key_is_never_shown() {
    let scene = Scene::new().await;
    let (rpc, factory) = (scene.anvil.url(), format!("{:#x}", scene.factory.address));
    let nobody = "0x00000000000000000000000000000000000000aa";
    let run = async |factory: &str, key: &[(&str, &str)], more: &[&str]| {
        let common = ["--rpc", &rpc, "--factory", factory, "--settlement-url", "http://127.0.0.1:9"];
        scene.setup.start_program(&scene.program, &[&common[..], more].concat(), key).ended().await
    };
    let key = [("PRIVATE_KEY", KEYS[0])];
    run(&factory, &[], &[]).await.failed_with(2, &["PRIVATE_KEY is not set"]);
    let bad = [("PRIVATE_KEY", "0xsecret-that-is-no-key")];
    let ended = run(&factory, &bad, &[]).await.failed_with(2, &["PRIVATE_KEY is not a private key"]);
    assert!(!ended.stderr.contains("secret"));
    run(nobody, &key, &[]).await.failed_with(2, &[nobody, "has no code on chain 31337"]);
    run(&factory, &key, &["--create", "make(address owner)"])
        .await
        .failed_with(2, &["address owner", "payer, payee"]);
    run(&factory, &key, &["--create", "make()"]).await.failed_with(1, &["creating", &factory, "refuse"]);
    run(&factory, &key, &["--amount", "0"]).await.failed_with(1, &["creating", "no amount"]);
    run(&factory, &key, &["--two-approvers"]).await.failed_with(2, &["PRIVATE_KEY_2 is not set"]);
}
