//! Moving over from the earlier relayer, which watched the factory only, and back to it: no gap, and what repeats is what
//! the guide says.

mod common;

use std::collections::BTreeSet;
use std::path::PathBuf;

use alloy::primitives::Address;
use common::relay::truth::Truth;
use common::relay::{Finished, by_key, firsts};
use common::{Contract, Line, Setup, World};
use serde_json::{Value, json};

/// Deeper than anvil's `finalized` (64 blocks).
const PAST_FINALITY: u64 = 100;

/// What the earlier relayer leaves behind: it published every announcement up to `cursor`, and nothing else.
struct Earlier {
    escrows: Vec<Address>,
    cursor: u64,
}

impl Earlier {
    /// Its registry file: sorted, lower-case, with its own version.
    fn registry(&self, setup: &Setup) -> PathBuf {
        let mut escrows: Vec<String> = self.escrows.iter().map(|escrow| format!("{escrow:#x}")).collect();
        escrows.sort();
        let file = setup.path("escrow_registry.json");
        let text = json!({ "escrows": escrows, "count": escrows.len(), "version": "1.0" });
        std::fs::write(&file, serde_json::to_string_pretty(&text).expect("JSON")).expect("written");
        file
    }

    /// What it published.
    fn published(&self, truth: &Truth) -> BTreeSet<String> {
        let lines = truth.escrows.values().flatten();
        let its = lines.filter(|line| line.name() == "EscrowDeployed" && block(line) <= self.cursor);
        its.map(|line| line.event_id().to_owned()).collect()
    }
}

fn block(line: &Line) -> u64 {
    line.data["block_number"].as_u64().expect("a number")
}

fn ids<'a>(lines: impl IntoIterator<Item = &'a Line>) -> BTreeSet<String> {
    lines.into_iter().map(|line| line.event_id().to_owned()).collect()
}

/// Some escrows, final and unfinal by now, that the earlier relayer announced, and more that it never saw.
async fn history(world: &World) -> (Earlier, Vec<Contract>) {
    let mut escrows = world.factory.create_many(6).await;
    live(&escrows).await;
    world.chain.mine(PAST_FINALITY).await;
    escrows.extend(world.factory.create_many(4).await);
    live(&escrows).await;
    let cursor = world.chain.block_number().await;
    let earlier = Earlier { escrows: escrows.iter().map(|escrow| escrow.address).collect(), cursor };
    escrows.extend(world.factory.create_many(3).await);
    live(&escrows).await;
    (earlier, escrows)
}

async fn live(escrows: &[Contract]) {
    for escrow in escrows {
        escrow.send("approve", &[]).await;
    }
}

async fn import(setup: &Setup, file: &std::path::Path, from: u64) -> Finished {
    let file = file.to_str().expect("a plain path");
    setup.run(&["escrows", "import", file, "--from", &from.to_string()]).await
}

#[tokio::test]
async fn moved_over_with_registry_and_cursor_nothing_is_missing_and_nothing_is_published_twice() {
    let world = World::new().await;
    let (earlier, escrows) = history(&world).await;
    let mut setup = world.setup.anew();
    setup.set("START_BLOCK", earlier.cursor + 1);
    let file = earlier.registry(&setup);
    let imported = import(&setup, &file, 1).await.good();
    assert!(imported.stderr.contains("10 escrows registered, 0 were already"), "{}", imported.stderr);
    // Once more changes nothing.
    let again = import(&setup, &file, 1).await.good();
    assert!(again.stderr.contains("0 escrows registered, 10 were already"), "{}", again.stderr);

    let mut lines = setup.run_to_head().await;
    let truth = world.truth().await;
    let theirs = earlier.published(&truth);
    assert_eq!(theirs.len(), 10);
    let ours = ids(&lines);
    assert_eq!(ours.len(), lines.len(), "each once");
    assert!(ours.is_disjoint(&theirs), "nothing that was published comes again");
    let all: BTreeSet<String> = ours.union(&theirs).cloned().collect();
    assert_eq!(all, ids(truth.escrows.values().flatten()), "no gap");
    for line in lines.iter().filter(|line| block(line) <= earlier.cursor) {
        assert_eq!(line.attributes.get("late").map(String::as_str), Some("true"), "{line:?}");
    }
    // Each escrow's own order holds, late or not, since nothing of it came before.
    for (key, lines) in by_key(&lines) {
        let blocks: Vec<u64> = lines.iter().map(block).collect();
        assert!(blocks.is_sorted(), "{key}: {blocks:?}");
    }
    // And all of them are watched.
    live(&escrows).await;
    let after = setup.run_to_head().await;
    assert_eq!(after.len(), escrows.len());
    assert!(after.iter().all(|line| !line.attributes.contains_key("late")), "these were read in time");
    lines.extend(after);
    assert_eq!(firsts(&lines).0.len() + theirs.len(), world.truth().await.len());
}

#[tokio::test]
async fn imported_from_the_cursor_on_only_what_is_new_comes() {
    let world = World::new().await;
    let (earlier, _) = history(&world).await;
    let mut setup = world.setup.anew();
    setup.set("START_BLOCK", earlier.cursor + 1);
    let file = earlier.registry(&setup);
    import(&setup, &file, earlier.cursor + 1).await.good();
    let lines = setup.run_to_head().await;
    assert!(lines.iter().all(|line| !line.attributes.contains_key("late")));
    let truth = world.truth().await;
    let expected = truth.escrows.values().flatten().filter(|line| block(line) > earlier.cursor);
    assert_eq!(ids(&lines), ids(expected));
}

#[tokio::test]
async fn without_the_registry_everything_comes_again_from_the_first_block() {
    let world = World::new().await;
    history(&world).await;
    let lines = world.setup.anew().run_to_head().await;
    world.truth().await.assert_is(&lines);
}

#[tokio::test]
async fn moved_back_the_earlier_relayer_has_every_escrow_and_the_block_to_go_on_from() {
    let world = World::new().await;
    let (earlier, escrows) = history(&world).await;
    let mut setup = world.setup.anew();
    setup.set("START_BLOCK", earlier.cursor + 1);
    let file = earlier.registry(&setup);
    import(&setup, &file, 1).await.good();
    let head = world.chain.block_number().await;
    setup.run_to_head().await;

    let exported = setup.run(&["escrows", "export"]).await.good();
    assert!(
        exported.stderr.contains(&format!("the next block to read is {}", head + 1)),
        "{}",
        exported.stderr
    );
    let registry: Value = serde_json::from_str(&exported.stdout.join("\n")).expect("JSON");
    let of_registry = |registry: &Value| -> BTreeSet<Address> {
        let escrows = registry["escrows"].as_array().expect("a list").iter();
        escrows.map(|escrow| escrow.as_str().expect("text").parse().expect("an address")).collect()
    };
    let every: BTreeSet<Address> = escrows.iter().map(|escrow| escrow.address).collect();
    assert_eq!(of_registry(&registry), every);
    assert_eq!(registry["count"], every.len());

    // Written to a file it is the same, and another store takes it.
    let file = setup.path("back.json");
    setup.run(&["escrows", "export", file.to_str().expect("a plain path")]).await.good();
    let written: Value = serde_json::from_slice(&std::fs::read(&file).expect("written")).expect("JSON");
    assert_eq!(written, registry);
    let mut forth = world.setup.anew();
    forth.set("START_BLOCK", head + 1);
    import(&forth, &file, head + 1).await.good();
    live(&escrows).await;
    assert_eq!(forth.run_to_head().await.len(), escrows.len());
}

#[tokio::test]
async fn escrows_are_listed_with_what_is_known_of_them() {
    let world = World::new().await;
    let escrow = world.factory.create_escrow().await;
    escrow.send("approve", &[]).await;
    escrow.send("release", &[]).await;
    world.setup.run(&["escrows", "list"]).await.failed_with(2, &["storage.path", "does not exist"]);
    world.setup.run_to_head().await;
    let address = format!("{:#x}", escrow.address);
    let table = world.setup.run(&["escrows", "list"]).await.good().stdout;
    assert_eq!(table.len(), 2);
    assert!(table[1].contains(&address) && table[1].contains("active"), "{table:?}");
    let listed = world.setup.run(&["escrows", "list", "--json"]).await.good().stdout.join("\n");
    let listed: Value = serde_json::from_str(&listed).expect("JSON");
    let block = world.chain.block_number().await;
    let expected = json!([{
        "address": address, "state": "active", "announced_block": block - 2, "covered_from": block - 2,
        "messages": 3, "ended_block": block,
    }]);
    assert_eq!(listed, expected);
}

#[tokio::test]
async fn a_registry_that_cannot_be_taken_is_refused_with_what_is_wrong_and_leaves_no_store_behind() {
    let world = World::new().await;
    let factory = world.factory.address;
    let one = "0x00000000000000000000000000000000000000aa";
    let table = [
        ("not JSON".to_owned(), "is not a registry"),
        (r#"{"addresses": []}"#.to_owned(), "is not a registry"),
        (json!({ "escrows": [one, "0x12"], "count": 2 }).to_string(), "escrow 2 is \"0x12\""),
        (json!({ "escrows": [one], "count": 2 }).to_string(), "\"count\" is 2, but there are 1"),
    ];
    let file = world.setup.path("registry.json");
    for (text, said) in table {
        std::fs::write(&file, text).expect("written");
        import(&world.setup, &file, 0).await.failed_with(2, &["registry.json", said]);
    }
    import(&world.setup, &world.setup.path("nowhere.json"), 0)
        .await
        .failed_with(2, &["nowhere.json", "cannot be read"]);
    assert!(!world.setup.path("relayer.redb").exists());

    std::fs::write(&file, json!({ "escrows": [one] }).to_string()).expect("written");
    import(&world.setup, &file, 1).await.failed_with(2, &["--from 1", "its next block is 0"]);
    std::fs::write(&file, json!({ "escrows": [factory] }).to_string()).expect("written");
    import(&world.setup, &file, 0).await.failed_with(2, &["factory.address", "not an escrow"]);
    let mut relayer = world.setup.start(&["run"]);
    relayer.wait_logged("Relaying from block").await;
    // Beside a running relayer the same is refused.
    import(&world.setup, &file, 0).await.failed_with(2, &["factory.address", "not an escrow"]);
    relayer.stop().await;
}
