//! The README says what is so: each key with its default and its variable, and the commands that `.ci/run` runs.

#[allow(dead_code, reason = "each test file uses some of it")]
#[path = "common/sources.rs"]
mod sources;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use relayer::config::{Config, Effective, Row, Sources};

const README: &str = include_str!("../README.md");

/// The plain variables, each with a value it takes.
const VARIABLES: [(&str, &str); 11] = [
    ("CHAIN_ID", "1"),
    ("START_BLOCK", "2"),
    ("CONTRACT_ADDRESS", "0x311E63dfcEfe7f2c202715ef0DF01CDA82f58914"),
    ("RPC_URL", "http://127.0.0.1:8545"),
    ("POLL_INTERVAL_SECONDS", "3"),
    ("MAX_CONCURRENT_QUERIES", "4"),
    ("BATCH_SIZE", "5"),
    ("PUBSUB_PROJECT_ID", "project"),
    ("PUBSUB_TOPIC_ID", "topic"),
    ("PUBSUB_EMULATOR_HOST", "127.0.0.1:8085"),
    ("PORT", "8081"),
];

/// The effective configuration with the first `variables` of the plain ones set, and nothing else.
fn effective(variables: usize) -> Effective {
    let set = VARIABLES[..variables].iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    let nowhere = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let sources = Sources { environment: set.collect(), directory: nowhere, ..Sources::default() };
    Config::load(&sources).expect("these variables are enough").1
}

/// The table's rows by key: default, meaning, variable.
fn table() -> BTreeMap<&'static str, [&'static str; 3]> {
    let rows = README.lines().filter_map(|line| {
        let cells: Vec<&str> = line.strip_prefix("| `")?.strip_suffix('|')?.split(" | ").collect();
        match cells[..] {
            [key, default, meaning, variable] => {
                Some((key.strip_suffix('`')?, [default, meaning, variable.trim()]))
            }
            [key, default, rest] => Some((key.strip_suffix('`')?, [default, rest.strip_suffix(" |")?, ""])),
            _ => None,
        }
    });
    rows.collect()
}

/// As the file would have it.
fn written(row: &Row) -> String {
    match row.value.as_slice() {
        [] => String::new(),
        [single] => single.clone(),
        items => format!("[{}]", items.join(", ")),
    }
}

#[test]
fn every_key_stands_in_the_readme_with_its_default() {
    let table = table();
    // With the four that are required: all others are at their defaults.
    let rows = effective(4).rows;
    for row in &rows {
        let [default, meaning, _] =
            table.get(row.key).unwrap_or_else(|| panic!("the README lacks {}", row.key));
        assert!(!meaning.is_empty(), "{} has no meaning in the README", row.key);
        if row.source != "default" {
            assert!(default.starts_with("required"), "{}: {default}", row.key);
        } else if row.value.is_empty() {
            assert_eq!(*default, "–", "{}", row.key);
        } else if row.value.iter().any(|item| item.contains('(')) {
            for signature in &row.value {
                assert!(README.contains(signature.as_str()), "the README lacks {signature} of {}", row.key);
            }
        } else {
            let value = format!("`{}`", written(row));
            assert!(
                default.starts_with(&value),
                "{}: the default is {value}, the README says {default}",
                row.key
            );
        }
    }
    let known: BTreeSet<_> = rows.iter().map(|row| row.key).collect();
    let told: BTreeSet<_> = table.keys().copied().collect();
    assert_eq!(told, known);
}

#[test]
fn every_plain_variable_stands_beside_its_key() {
    let table = table();
    for row in effective(VARIABLES.len()).rows {
        let [.., variable] = table[row.key];
        match VARIABLES.iter().find(|(name, _)| *name == row.source) {
            Some((name, _)) => assert!(variable.starts_with(&format!("`{name}`")), "{}: {variable}", row.key),
            None => assert_eq!(variable, "", "{} comes from {}", row.key, row.source),
        }
    }
    // `relayer.toml` names them, too: none was added there without this test knowing it.
    let told = include_str!("../relayer.toml").split(|c: char| !c.is_ascii_uppercase() && c != '_');
    let known: BTreeSet<_> = VARIABLES.iter().map(|(name, _)| *name).collect();
    for name in told.filter(|word| word.contains('_') && word.len() > 4 && !word.starts_with("RELAYER_")) {
        assert!(known.contains(name) || name == "RUST_LOG", "relayer.toml names {name}");
    }
}

#[test]
fn the_two_commands_of_the_readme_are_what_the_ci_runs() {
    let block = README.split("```sh\n").nth(1).and_then(|rest| rest.split("```").next());
    assert_eq!(block, Some("cargo run --release --example demo\ncargo test\n"));

    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join(".ci/run");
    let output = Command::new("bash").arg(script).arg("--list").output().expect("there is a bash");
    let listed = String::from_utf8(output.stdout).expect("text");
    for command in ["cargo run --release --example demo", "cargo test"] {
        assert!(listed.lines().any(|line| line == command), "{listed}");
    }
}

#[test]
fn every_metric_stands_in_the_readme_with_its_meaning() {
    for (name, _, help) in relayer::telemetry::metrics::ALL {
        let row = README.lines().find(|line| line.starts_with(&format!("| `{name}` |")));
        let row = row.unwrap_or_else(|| panic!("no row for {name}"));
        let meaning = help.trim_end_matches('.')[1..].to_owned();
        assert!(row.contains(&meaning), "{row}: {help}");
    }
}

#[test]
fn every_reason_of_readiness_stands_in_the_readme() {
    let said = include_str!("../src/http/ready.rs").split("because(").skip(1);
    let words = said.filter_map(|rest| rest.trim_start().strip_prefix('"')?.split('"').next());
    // What is a warning only has no row.
    let words: BTreeSet<&str> =
        words.filter(|word| !["blocked_lanes", "quarantined"].contains(word)).collect();
    let section = README.split("## Watching it").nth(1).expect("the section is there");
    let section = section.split("\n## ").next().expect("it has an end");
    let table = section.split("| reason |").nth(1).and_then(|rest| rest.split("\n\n").next());
    let told: BTreeSet<&str> = table
        .expect("the table is there")
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split('`').next())
        .collect();
    assert_eq!(told, words);
}

#[test]
fn what_the_table_of_failures_promises_to_be_seen_is_what_the_program_says() {
    let program = sources::program();
    let section = README.split("## What fails, and what it does").nth(1).expect("the section is there");
    let rows =
        section.split("\n## ").next().expect("it has an end").lines().filter(|line| line.starts_with("| "));
    let mut quoted = 0;
    for row in rows.skip(1) {
        let seen = row.split(" | ").nth(1).expect("a second column");
        for phrase in sources::quoted(seen) {
            assert!(program.contains(phrase), "the program never says `{phrase}`");
            quoted += 1;
        }
    }
    assert!(quoted > 15, "{quoted}");
}
