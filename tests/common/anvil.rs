//! A chain of our own: finds the anvil binary (or has npm fetch it once), runs it, and ends it on drop.

use std::{
    env,
    ffi::OsString,
    fs::{self, File},
    io::{self, BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};

/// What npm installs where neither `ANVIL` nor `PATH` has one.
const ANVIL_VERSION: &str = "1.7.1";

/// How long a fresh anvil may take before it listens.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// A running anvil. Its accounts are unlocked: transactions need no key.
pub struct Anvil {
    child: Child,
    port: u16,
}

/// How to run it; [`Anvil::new`] begins, [`Options::spawn`] ends.
pub struct Options {
    port: u16,
    args: Vec<OsString>,
}

impl Anvil {
    /// Chain 31337 on a free port; every transaction is mined at once, in a block of its own; a block holds a
    /// thousand times what a real one does, so that a hundred escrows fit into one transaction.
    #[allow(clippy::new_ret_no_self)]
    pub fn new() -> Options {
        // First come, first mined: the order in which a test sent them is the order in the block.
        Options {
            port: 0,
            args: vec![],
        }
        .args(["--order", "fifo", "--gas-limit", "30000000000"])
    }

    /// As [`Anvil::new`] says, without further options.
    pub async fn start() -> Anvil {
        Anvil::new().spawn().await.expect("anvil starts")
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub fn ws_url(&self) -> String {
        format!("ws://127.0.0.1:{}", self.port)
    }

    pub fn port(&self) -> u16 {
        self.port
    }
}

impl Drop for Anvil {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Options {
    pub fn chain_id(self, id: u64) -> Self {
        self.args(["--chain-id".to_owned(), id.to_string()])
    }

    /// A fixed port, for a node that comes back where it was. Otherwise a free one.
    pub fn port(mut self, port: u16) -> Self {
        self.port = port;
        self
    }

    /// Nothing is mined until it is asked for (`Chain::mine`).
    pub fn manual_mining(self) -> Self {
        self.args(["--no-mining"])
    }

    /// A block every so many seconds, instead of one for each transaction.
    pub fn block_time(self, seconds: u64) -> Self {
        self.args(["--block-time".to_owned(), seconds.to_string()])
    }

    /// The block gas limit; given again, the last one counts.
    pub fn gas_limit(mut self, gas: u64) -> Self {
        let at = self
            .args
            .iter()
            .position(|arg| arg == "--gas-limit")
            .expect("Anvil::new set it");
        self.args[at + 1] = gas.to_string().into();
        self
    }

    /// `safe` is one epoch behind the head and `finalized` two: 32 and 64 blocks unless told otherwise here.
    pub fn slots_in_an_epoch(self, slots: u64) -> Self {
        self.args(["--slots-in-an-epoch".to_owned(), slots.to_string()])
    }

    /// Any other option of anvil's.
    pub fn args<A: Into<OsString>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Starts it and returns when it listens. The first time ever this may wait for npm.
    pub async fn spawn(self) -> Result<Anvil> {
        tokio::task::spawn_blocking(move || self.spawn_blocking()).await?
    }

    fn spawn_blocking(self) -> Result<Anvil> {
        let binary = find()?;
        let mut child = Command::new(&binary)
            .args(["--host", "127.0.0.1", "--port", &self.port.to_string()])
            .args(&self.args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .with_context(|| format!("cannot run {}", binary.display()))?;

        let output = BufReader::new(child.stdout.take().expect("stdout is piped"));
        let mut anvil = Anvil { child, port: 0 }; // from here on, an early return ends the child

        // anvil takes a free port itself, which nobody can snatch in between, and prints which one. What it prints
        // later (a line for every request) has to be read too, else it would stop at a full pipe.
        let (say_port, hear_port) = mpsc::channel();
        thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if let Some(port) = line.strip_prefix("Listening on 127.0.0.1:") {
                    let _ = say_port.send(port.trim().parse::<u16>());
                }
            }
        });
        anvil.port = match hear_port.recv_timeout(START_TIMEOUT) {
            Ok(port) => port.context("anvil printed no usable port")?,
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                bail!(
                    "{} ended before it listened: {}",
                    binary.display(),
                    anvil.child.wait()?
                )
            }
            Err(mpsc::RecvTimeoutError::Timeout) => {
                bail!("{} did not listen within {START_TIMEOUT:?}", binary.display())
            }
        };
        Ok(anvil)
    }
}

/// `ANVIL`, else the one in `PATH`, else the pinned one from npm.
fn find() -> Result<PathBuf> {
    if let Some(path) = env::var_os("ANVIL").filter(|path| !path.is_empty()) {
        return Ok(path.into());
    }
    let name = format!("anvil{}", env::consts::EXE_SUFFIX);
    let in_path = env::var_os("PATH").and_then(|path| {
        env::split_paths(&path)
            .map(|folder| folder.join(&name))
            .find(|file| file.is_file())
    });
    match in_path {
        Some(path) => Ok(path),
        None => from_npm(&name),
    }
}

fn from_npm(name: &str) -> Result<PathBuf> {
    let os = match env::consts::OS {
        "macos" => "darwin",
        "windows" => "win32",
        os => os,
    };
    let arch = match env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        arch => arch,
    };
    let platform = format!("@foundry-rs/anvil-{os}-{arch}");
    let packages = [
        format!("@foundry-rs/anvil@{ANVIL_VERSION}"),
        format!("{platform}@{ANVIL_VERSION}"),
    ];
    let home = npm_install(&format!("anvil-{ANVIL_VERSION}"), &packages)
        .context("no anvil: ANVIL is not set, PATH has none, and npm did not bring it")?;
    let binary = home.join("node_modules").join(platform).join("bin").join(name);
    ensure!(
        binary.is_file(),
        "npm installed anvil without {}",
        binary.display()
    );
    Ok(binary)
}

/// Installs `packages` into `target/node/<name>` if it is not there, and returns that folder. Safe to call from
/// many processes at once: one installs, the others wait for it.
fn npm_install(name: &str, packages: &[String]) -> Result<PathBuf> {
    let node = target_dir().join("node");
    let home = node.join(name);
    fs::create_dir_all(&node)?;
    let lock = File::create(node.join(format!("{name}.lock")))?;
    lock.lock()?; // given back when the file closes
    if home.is_dir() {
        return Ok(home);
    }

    // Installed under another name first: an install that was interrupted must not look like one.
    let partial = node.join(format!("{name}.partial"));
    if partial.exists() {
        fs::remove_dir_all(&partial)?;
    }
    fs::create_dir(&partial)?;
    fs::write(partial.join("package.json"), "{ \"private\": true }\n")?; // else npm looks for one further up
    let output = Command::new(if cfg!(windows) { "npm.cmd" } else { "npm" })
        .args([
            "install",
            "--no-audit",
            "--no-fund",
            "--ignore-scripts",
            "--loglevel=error",
        ])
        .args(packages)
        .current_dir(&partial)
        .output()
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => anyhow::anyhow!("npm is not installed"),
            _ => anyhow::Error::new(error).context("cannot run npm"),
        })?;
    ensure!(
        output.status.success(),
        "npm install {}: {}\n{}",
        packages.join(" "),
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    fs::rename(&partial, &home)?;
    Ok(home)
}

/// Cargo's target directory: as the compiler saw it (integration tests), else as the environment says, else the
/// usual one (examples).
pub fn target_dir() -> PathBuf {
    let seen_by_compiler = option_env!("CARGO_TARGET_TMPDIR").and_then(|tmp| Path::new(tmp).parent());
    match (seen_by_compiler, env::var_os("CARGO_TARGET_DIR")) {
        (Some(target), _) => target.to_owned(),
        (None, Some(target)) => target.into(),
        (None, None) => Path::new(env!("CARGO_MANIFEST_DIR")).join("target"),
    }
}
