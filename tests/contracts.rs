//! The compiled contracts in the tree are those of the sources in the tree.

#[path = "common/anvil.rs"]
#[allow(dead_code)]
mod anvil;

use std::{path::Path, process::Command};

const REFRESH: &str = "node tests/contracts/compile.mjs";

#[test]
fn the_artifact_is_what_the_sources_compile_to() {
    let contracts = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/contracts");
    let output = Command::new("node")
        .arg(contracts.join("compile.mjs"))
        .arg("--stdout")
        .env("CARGO_TARGET_DIR", anvil::target_dir()) // the compiler is installed there, once
        .output()
        .expect("node is installed");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{REFRESH} failed:\n{said}");

    let committed = std::fs::read(contracts.join("artifact.json")).unwrap_or_default();
    assert!(committed == output.stdout, "tests/contracts/artifact.json is stale; refresh it with: {REFRESH}");
}
