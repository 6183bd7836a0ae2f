//! The examples as programs of their own, built from what is in the tree now.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Mutex;

/// Where the example's program is. Cargo tells integration tests where the package's binary is, but not its examples; and
/// builds them beside the tests only when all tests are run.
pub fn path(name: &str) -> PathBuf {
    // One build at a time: they would wait for each other anyway.
    static BUILDING: Mutex<()> = Mutex::new(());
    let _one = BUILDING.lock().unwrap_or_else(|poisoned| poisoned.into_inner());

    // This test's program is target/<profile>/deps/<test>.
    let test = std::env::current_exe().expect("a test knows its program");
    let profile = test.parent().and_then(|deps| deps.parent()).expect("target/<profile>/deps/<test>");
    let target = profile.parent().expect("target/<profile>");
    let mut build = Command::new(env!("CARGO"));
    build.args(["build", "--quiet", "--example", name, "--target-dir"]).arg(target);
    if profile.file_name().is_some_and(|profile| profile == "release") {
        build.arg("--release");
    }
    let built = build.current_dir(env!("CARGO_MANIFEST_DIR")).output().expect("cargo can be started");
    assert!(built.status.success(), "example {name}: {}", String::from_utf8_lossy(&built.stderr));
    profile.join("examples").join(name)
}
