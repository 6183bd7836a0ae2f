//! The repository's own texts, for tests that compare what documents and deployment files say with the program.

use std::fs;
use std::path::{Path, PathBuf};

/// A file or folder of the repository.
pub fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// A file of the repository.
pub fn text(name: &str) -> String {
    fs::read_to_string(path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// Everything under `src`, one file after the other.
pub fn program() -> String {
    fn gather(folder: &Path, all: &mut String) {
        for entry in fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path()) {
            match entry.is_dir() {
                true => gather(&entry, all),
                false => all.push_str(&fs::read_to_string(&entry).expect("a source file")),
            }
        }
    }
    let mut all = String::new();
    gather(&path("src"), &mut all);
    all
}

/// What stands between backticks within lines.
pub fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// The anchors of a document's headings, as GitHub makes them.
pub fn anchors(document: &str) -> Vec<String> {
    let mut in_code = false;
    let mut anchors = Vec::new();
    for line in document.lines() {
        in_code ^= line.starts_with("```");
        if let (false, true) = (in_code, line.starts_with('#')) {
            anchors.push(anchor(line.trim_start_matches('#')));
        }
    }
    anchors
}

fn anchor(heading: &str) -> String {
    let kept = |c: &char| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_');
    heading.trim().to_lowercase().chars().filter(kept).map(|c| if c == ' ' { '-' } else { c }).collect()
}
