//! The documents say what is so: words of the log, metrics and keys that exist, and links that lead somewhere.

#[path = "common/sources.rs"]
mod sources;

use std::collections::BTreeSet;
use std::path::Path;

use relayer::config::{Config, Sources};
use relayer::telemetry::metrics;

const DOCUMENTS: [&str; 7] = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "docs/troubleshooting.md",
    "docs/store.md",
    "docs/consumers.md",
    "docs/security.md",
];

fn known_metrics() -> BTreeSet<&'static str> {
    metrics::ALL.iter().map(|(name, _, _)| *name).collect()
}

/// All configuration keys.
fn keys() -> BTreeSet<String> {
    let set = |(name, value): (&str, &str)| (name.to_owned(), value.to_owned());
    let required = [
        ("CHAIN_ID", "1"),
        ("START_BLOCK", "2"),
        ("CONTRACT_ADDRESS", "0x311E63dfcEfe7f2c202715ef0DF01CDA82f58914"),
        ("RPC_URL", "http://127.0.0.1:8545"),
    ];
    let environment = required.into_iter().map(set).collect();
    let sources = Sources { environment, directory: sources::path("src"), ..Sources::default() };
    let (_, effective) = Config::load(&sources).expect("these variables are enough");
    effective.rows.iter().map(|row| row.key.to_owned()).collect()
}

/// The paragraphs of the troubleshooting guide that say what is seen, each with its heading.
fn seen(guide: &str) -> Vec<(String, String)> {
    let section = |section: &str| {
        let (heading, text) = section.split_once('\n').expect("a heading is a line");
        let mut paragraphs = text.split("\n\n").map(str::trim_start);
        let seen = paragraphs.find_map(|paragraph| paragraph.strip_prefix("**Seen:**"));
        let seen = seen.unwrap_or_else(|| panic!("{heading}: nothing is said to be seen"));
        (heading.to_owned(), seen.replace('\n', " "))
    };
    guide.split("\n## ").skip(1).map(section).collect()
}

#[test]
fn what_the_troubleshooting_guide_says_is_seen_the_program_says() {
    let (guide, program, metrics) =
        (sources::text("docs/troubleshooting.md"), sources::program(), known_metrics());
    let mut quoted = BTreeSet::new();
    let mut missing = Vec::new();
    for (heading, seen) in seen(&guide) {
        for phrase in sources::quoted(&seen) {
            quoted.insert(phrase.to_owned());
            let known = match phrase.starts_with("relayer_") {
                true => metrics.contains(phrase),
                false => program.contains(phrase),
            };
            if !known {
                missing.push(format!("{heading}: {phrase}"));
            }
        }
    }
    // Elsewhere, too, what begins like a line of the log is one.
    let sentence = |it: &&str| it.starts_with(|c: char| c.is_ascii_uppercase()) && it.contains(' ');
    for phrase in guide.lines().flat_map(sources::quoted).filter(sentence) {
        if !program.contains(phrase) {
            missing.push(phrase.to_owned());
        }
    }
    assert!(quoted.len() > 60, "{}", quoted.len());
    assert!(missing.is_empty(), "the program has none of these:\n{}", missing.join("\n"));
}

#[test]
fn every_symptom_has_a_cause_and_a_remedy() {
    let guide = sources::text("docs/troubleshooting.md");
    for section in guide.split("\n## ").skip(1) {
        let heading = section.lines().next().expect("a heading");
        let both = section.contains("**Cause and remedy.**");
        assert!(both || section.contains("**Cause.**"), "{heading} has no cause");
        assert!(both || section.contains("**Remedy.**"), "{heading} has no remedy");
    }
}

#[test]
fn every_link_within_the_documents_leads_somewhere() {
    let mut followed = 0;
    for document in DOCUMENTS {
        let text = sources::text(document);
        let folder = Path::new(document).parent().expect("a folder");
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if link.starts_with("http") {
                continue;
            }
            let (file, heading) = link.split_once('#').map_or((link, None), |(file, it)| (file, Some(it)));
            let target = match file {
                "" => sources::path(document),
                file => sources::path(&folder.join(file).to_string_lossy()),
            };
            assert!(target.exists(), "{document} links to {link}");
            if let Some(heading) = heading {
                let headings = sources::anchors(&std::fs::read_to_string(&target).expect("a document"));
                assert!(headings.iter().any(|it| it == heading), "{document} links to {link}");
            }
            followed += 1;
        }
    }
    assert!(followed > 30, "{followed}");
}

#[test]
fn every_key_and_every_metric_the_documents_name_exists() {
    let (keys, metrics) = (keys(), known_metrics());
    let sections: BTreeSet<&str> = keys.iter().filter_map(|key| Some(key.split_once('.')?.0)).collect();
    let mut unknown = BTreeSet::new();
    for document in DOCUMENTS {
        let text = sources::text(document);
        for word in text.lines().flat_map(sources::quoted).filter_map(|it| it.split([' ', '=']).next()) {
            let of_a_section = word.split_once('.').is_some_and(|(section, name)| {
                sections.contains(section) && name.bytes().all(|it| it.is_ascii_lowercase() || it == b'_')
            });
            let is_file = ["toml", "rs", "redb", "service", "env"].iter().any(|end| word.ends_with(end));
            if of_a_section && !is_file && !keys.contains(word)
                || word.starts_with("relayer_") && !metrics.contains(word)
            {
                unknown.insert(format!("{document}: {word}"));
            }
        }
    }
    let unknown: Vec<_> = unknown.into_iter().collect();
    assert!(unknown.is_empty(), "there are no such keys or metrics:\n{}", unknown.join("\n"));
}

#[test]
fn every_table_and_every_layout_of_the_store_is_described() {
    let (document, schema) = (sources::text("docs/store.md"), sources::text("src/store/schema.rs"));
    let between = |line: &str, start: &str, end: &str| {
        line.split_once(start).and_then(|(_, rest)| Some(rest.split_once(end)?.0.to_owned()))
    };
    let tables = schema.lines().filter_map(|line| between(line, "TableDefinition::new(\"", "\""));
    let described = tables.filter(|table| document.contains(&format!("| `{table}` |"))).count();
    assert_eq!(described, schema.matches("TableDefinition::new(").count());
    let layout =
        schema.lines().find_map(|line| between(line, "const SCHEMA: u32 = ", ";")).expect("a version");
    let newest = document
        .lines()
        .rev()
        .find(|line| line.starts_with("| 1 |") || line.starts_with(&format!("| {layout} |")));
    assert!(newest.is_some_and(|line| line.starts_with(&format!("| {layout} |"))), "layout {layout}");
}

#[test]
fn every_attribute_of_a_message_stands_in_the_guide_for_consumers() {
    let document = sources::text("docs/consumers.md");
    let rows: Vec<&str> = document.lines().filter(|line| line.starts_with("| `")).collect();
    let message = relayer::event::Attributes {
        event_type: "Approved".to_owned(),
        chain_id: 1,
        emitter: Default::default(),
        escrow: Default::default(),
        block_number: 2,
        event_id: String::new(),
        sequence: 3,
        epoch: 4,
        late: true,
    };
    for (name, _) in message.pairs() {
        assert!(rows.iter().any(|row| sources::quoted(row).any(|it| it == name)), "{name}");
    }
}
