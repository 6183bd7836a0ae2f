//! The relayer as its users have it: the real binary, in a folder and an environment of its own.
//!
//! - [`Setup`]: folder and variables; [`Running`]: a process; [`Finished`]: what it left behind.
//! - `truth`: what must come out, made from the node's raw logs, without a line of the code under test.
//! - `proxy`: between relayer and node, to count and to look; `faults`: the same, to fail and to lie.
//! - `pages`: its HTTP pages.
//!
//! Nothing here sleeps and hopes: whoever waits is told of changes, and panics when a deadline passes.

pub mod faults;
pub mod pages;
pub mod proxy;
pub mod truth;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use alloy::primitives::Address;
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::{Anvil, Chain, Contract, pubsub};

/// How long anything may take that is not itself a promise about time.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// How long stopping may take: promised.
pub const STOP_WITHIN: Duration = Duration::from_secs(8);

/// A chain with a factory on it, and a relayer set up for both.
pub struct World {
    pub anvil: Anvil,
    pub chain: Chain,
    pub factory: Contract,
    pub setup: Setup,
}

impl World {
    pub async fn new() -> World {
        Self::on(Anvil::start().await).await
    }

    pub async fn on(anvil: Anvil) -> World {
        let chain = Chain::connect(anvil.url()).await;
        let factory = chain.deploy("EscrowFactory", &[]).await;
        let setup = Setup::new(&anvil.url(), factory.address);
        World { anvil, chain, factory, setup }
    }

    /// The same, with relayers that publish to a Pub/Sub server.
    pub async fn publishing(mut self) -> (World, pubsub::PubSub) {
        let server = pubsub::PubSub::start().await;
        server.create_topic("projects/test-project/topics/settlement.events.v1");
        self.setup.set("PUBSUB_EMULATOR_HOST", server.endpoint());
        self.setup.set("PUBSUB_PROJECT_ID", "test-project");
        (self, server)
    }

    /// What a relayer must have said of everything on the chain up to `last`.
    pub async fn truth_to(&self, last: u64) -> truth::Truth {
        truth::Truth::read(&self.chain, self.factory.address, last).await
    }

    pub async fn truth(&self) -> truth::Truth {
        self.truth_to(self.chain.block_number().await).await
    }
}

/// A folder of its own, and the only variables the relayer sees.
pub struct Setup {
    folder: Arc<TempDir>,
    variables: BTreeMap<String, String>,
}

impl Setup {
    /// The plain variables, and the settings that make a test quick: no confirmations, fast polls, no rate limit.
    pub fn new(rpc_url: &str, factory: Address) -> Setup {
        Setup::plain(rpc_url, factory)
            .with("RELAYER_CHAIN__CONFIRMATIONS", 0)
            .with("RELAYER_RPC__REQUESTS_PER_SECOND", 10_000)
            .with("RELAYER_RPC__BURST", 10_000)
            .with("RELAYER_HTTP__LISTEN", "off")
    }

    /// The plain variables and nothing else.
    pub fn plain(rpc_url: &str, factory: Address) -> Setup {
        let setup = Setup {
            folder: Arc::new(tempfile::tempdir().expect("a folder can be made")),
            variables: BTreeMap::new(),
        };
        setup
            .with("CHAIN_ID", 31337)
            .with("START_BLOCK", 0)
            .with("CONTRACT_ADDRESS", factory)
            .with("RPC_URL", rpc_url)
            .with("POLL_INTERVAL_SECONDS", 0.05)
    }

    /// The same variables in a new folder: another store.
    pub fn anew(&self) -> Setup {
        let folder = Arc::new(tempfile::tempdir().expect("a folder can be made"));
        Setup { folder, variables: self.variables.clone() }
    }

    pub fn with(mut self, name: &str, value: impl ToString) -> Setup {
        self.set(name, value);
        self
    }

    pub fn set(&mut self, name: &str, value: impl ToString) {
        self.variables.insert(name.to_owned(), value.to_string());
    }

    pub fn unset(&mut self, name: &str) {
        self.variables.remove(name).expect("it was set");
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Starts `relayer ARGS`.
    pub fn start(&self, args: &[&str]) -> Running {
        self.start_with(args, &[])
    }

    /// The same, with these variables beside or instead of the set-up's; an empty value takes one away.
    pub fn start_with(&self, args: &[&str], variables: &[(&str, &str)]) -> Running {
        let mut environment = self.variables.clone();
        for (name, value) in variables {
            match *value {
                "" => environment.remove(*name),
                value => environment.insert((*name).to_owned(), value.to_owned()),
            };
        }
        Running::start(binary(), args, environment, self.folder.clone())
    }

    /// Starts `relayer ARGS` where no file may grow beyond `bytes` (in steps of 512): what a full disk is to it.
    pub fn start_on_disk_of(&self, bytes: u64, args: &[&str]) -> Running {
        let script = format!("trap '' XFSZ; ulimit -f {} && exec \"$0\" \"$@\"", bytes / 512);
        let relayer = binary().to_str().expect("a path in UTF-8");
        let args = [&["-c", &script, relayer], args].concat();
        Running::start(Path::new("/bin/sh"), &args, self.variables.clone(), self.folder.clone())
    }

    /// Starts another program in the same folder, with these variables alone.
    pub fn start_program(&self, program: &Path, args: &[&str], variables: &[(&str, &str)]) -> Running {
        let environment = variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        Running::start(program, args, environment.collect(), self.folder.clone())
    }

    /// Runs `relayer ARGS` to its end.
    pub async fn run(&self, args: &[&str]) -> Finished {
        self.start(args).ended().await
    }

    /// As a backfill job: everything up to the head. Panics unless that ends well.
    pub async fn run_to_head(&self) -> Vec<Line> {
        self.run(&["run", "--until", "head"]).await.good().lines()
    }
}

fn binary() -> &'static Path {
    // Not `env!`: the demo compiles this, too, and cargo names the binary to integration tests only.
    let Some(binary) = option_env!("CARGO_BIN_EXE_relayer") else {
        panic!("only integration tests know where the relayer is");
    };
    Path::new(binary)
}

/// What a process has said so far, in whole lines.
#[derive(Default)]
struct Output {
    texts: Mutex<Texts>,
    changed: watch::Sender<()>,
}

#[derive(Clone, Default)]
struct Texts {
    out: Vec<String>,
    err: Vec<String>,
}

impl Output {
    fn follow(
        self: Arc<Self>,
        pipe: impl AsyncRead + Unpin + Send + 'static,
        of: fn(&mut Texts) -> &mut Vec<String>,
    ) -> JoinHandle<()> {
        tokio::spawn(async move {
            let mut pipe = BufReader::new(pipe);
            let mut line = Vec::new();
            while pipe.read_until(b'\n', &mut line).await.is_ok_and(|read| read > 0) {
                // A line that a kill cut short is none.
                if line.pop() == Some(b'\n') {
                    let text = String::from_utf8(std::mem::take(&mut line)).expect("output is UTF-8");
                    of(&mut self.texts.lock().expect("no panic while held")).push(text);
                    self.changed.send_replace(());
                }
                line.clear();
            }
        })
    }

    fn texts(&self) -> Texts {
        self.texts.lock().expect("no panic while held").clone()
    }
}

/// A relayer at work. Dropped, it is killed.
pub struct Running {
    child: Child,
    output: Arc<Output>,
    readers: [JoinHandle<()>; 2],
    _told: TellOnPanic,
    /// It lives in there, also when its set-up is gone.
    _folder: Arc<TempDir>,
}

impl Running {
    fn start(
        program: &Path,
        args: &[&str],
        environment: BTreeMap<String, String>,
        folder: Arc<TempDir>,
    ) -> Running {
        let mut child = Command::new(program)
            .args(args)
            .env_clear()
            .envs(environment)
            .current_dir(folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap_or_else(|error| panic!("{} cannot be started: {error}", program.display()));
        let output = Arc::new(Output::default());
        let readers = [
            output.clone().follow(child.stdout.take().expect("piped"), |texts| &mut texts.out),
            output.clone().follow(child.stderr.take().expect("piped"), |texts| &mut texts.err),
        ];
        let name = program.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let told = TellOnPanic(name, output.clone());
        Running { child, output, readers, _told: told, _folder: folder }
    }

    /// Waits for a line on stderr, of whatever shape, that contains `text`; returns the first.
    pub async fn wait_said(&mut self, text: &str) -> String {
        self.wait(&format!("{text:?} on stderr"), |texts| {
            texts.err.iter().find(|line| line.contains(text)).cloned()
        })
        .await
    }

    /// The same on stdout.
    pub async fn wait_printed(&mut self, text: &str) -> String {
        self.wait(&format!("{text:?} on stdout"), |texts| {
            texts.out.iter().find(|line| line.contains(text)).cloned()
        })
        .await
    }

    pub fn lines(&self) -> Vec<Line> {
        self.output.texts().out.iter().map(|text| Line::parse(text)).collect()
    }

    pub fn stderr(&self) -> String {
        self.output.texts().err.join("\n")
    }

    pub fn logs(&self) -> Vec<Value> {
        logs(&self.output.texts().err)
    }

    /// Waits until what was printed is as wanted; `wanted` says in words what that is.
    pub async fn wait_until(&mut self, wanted: &str, is_so: impl Fn(&[Line]) -> bool) -> Vec<Line> {
        self.wait(wanted, |texts| {
            let lines: Vec<Line> = texts.out.iter().map(|text| Line::parse(text)).collect();
            is_so(&lines).then_some(lines)
        })
        .await
    }

    pub async fn wait_for_lines(&mut self, n: usize) -> Vec<Line> {
        self.wait(&format!("{n} lines"), |texts| {
            (texts.out.len() >= n).then(|| texts.out.iter().map(|text| Line::parse(text)).collect())
        })
        .await
    }

    /// Waits for a log line whose message contains `text`; returns the first.
    pub async fn wait_logged(&mut self, text: &str) -> Value {
        self.wait_logged_times(text, 1).await.remove(0)
    }

    /// Waits for `n` such log lines.
    pub async fn wait_logged_times(&mut self, text: &str, n: usize) -> Vec<Value> {
        self.wait(&format!("log line with {text:?}"), |texts| {
            let found: Vec<Value> = logs(&texts.err).into_iter().filter(|log| says(log, text)).collect();
            (found.len() >= n).then_some(found)
        })
        .await
    }

    /// Waits until block `last` was read, or what lies beyond it.
    pub async fn wait_read(&mut self, last: u64) {
        self.wait(&format!("reading of block {last}"), |texts| {
            let read = logs(&texts.err).into_iter().filter(|log| says(log, "Processing blocks"));
            read.filter_map(|log| log["to"].as_u64()).any(|to| to >= last).then_some(())
        })
        .await
    }

    async fn wait<T>(&mut self, wanted: &str, look: impl Fn(&Texts) -> Option<T>) -> T {
        let mut changed = self.output.changed.subscribe();
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            if let Some(found) = look(&self.output.texts()) {
                return found;
            }
            let why = tokio::select! {
                told = changed.changed() => { told.expect("kept by self"); continue }
                status = self.child.wait() => {
                    for reader in &mut self.readers {
                        let _ = reader.await;
                    }
                    if let Some(found) = look(&self.output.texts()) {
                        return found;
                    }
                    format!("it ended ({:?})", status.expect("it can be waited for"))
                }
                () = tokio::time::sleep_until(deadline) => format!("{PATIENCE:?} passed"),
            };
            let texts = self.output.texts();
            panic!("no {wanted}: {why}; {} lines printed", texts.out.len());
        }
    }

    fn signal(&self, name: &str) {
        let Some(pid) = self.child.id() else { return };
        let sent = std::process::Command::new("kill").args([name, &pid.to_string()]).status();
        assert!(sent.expect("kill is there").success(), "kill {name} {pid}");
    }

    /// SIGTERM, and its end. Panics unless that comes with exit code 0 as fast as promised.
    pub async fn stop(self) -> Finished {
        self.signal("-TERM");
        let asked = Instant::now();
        let finished = self.ended().await.good();
        let took = asked.elapsed();
        assert!(took < STOP_WITHIN, "stopping took {took:?}\n{}", finished.stderr);
        finished
    }

    /// The same by SIGINT.
    pub async fn interrupt(self) -> Finished {
        self.signal("-INT");
        self.ended().await.good()
    }

    /// SIGINT to what does not end well by it.
    pub async fn interrupted(self) -> Finished {
        self.signal("-INT");
        self.ended().await
    }

    /// SIGSTOP: it does nothing until it is thawed.
    pub fn freeze(&self) {
        self.signal("-STOP");
    }

    /// SIGCONT.
    pub fn thaw(&self) {
        self.signal("-CONT");
    }

    /// SIGKILL.
    pub async fn kill(self) -> Finished {
        self.signal("-KILL");
        self.ended().await
    }

    /// Waits for its own end; also, how much memory it had at most, in KiB (Linux; else 0).
    pub async fn ended_with_peak(mut self) -> (Finished, u64) {
        let status = format!("/proc/{}/status", self.child.id().expect("it is not waited for yet"));
        let mut peak = 0;
        while tokio::time::timeout(Duration::from_millis(20), self.child.wait()).await.is_err() {
            let text = std::fs::read_to_string(&status).unwrap_or_default();
            let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
            let kib = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
            peak = kib.unwrap_or(peak);
        }
        (self.ended().await, peak)
    }

    /// Waits for its own end.
    pub async fn ended(mut self) -> Finished {
        let status = match tokio::time::timeout(PATIENCE, self.child.wait()).await {
            Ok(status) => status.expect("it can be waited for"),
            Err(_) => panic!("it does not end"),
        };
        // Whoever waited for something it did not live to see has waited for these already.
        for reader in self.readers.into_iter().filter(|reader| !reader.is_finished()) {
            reader.await.expect("reading does not panic");
        }
        let Texts { out, err } = self.output.texts();
        Finished { code: status.code(), stdout: out, stderr: err.join("\n") }
    }
}

/// A test that fails while it runs wants to know what it said.
struct TellOnPanic(String, Arc<Output>);

impl Drop for TellOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{} said:\n{}", self.0, self.1.texts().err.join("\n"));
        }
    }
}

/// What a process left behind.
#[derive(Debug)]
pub struct Finished {
    /// `None`: killed.
    pub code: Option<i32>,
    pub stdout: Vec<String>,
    pub stderr: String,
}

impl Finished {
    pub fn good(self) -> Self {
        self.failed_with(0, &[])
    }

    /// Panics unless it ended with 0 and printed all of this.
    pub fn good_with_stdout(self, printed: &[&str]) -> Self {
        let stdout = self.stdout.join("\n");
        for text in printed {
            assert!(stdout.contains(text), "no {text:?} in:\n{stdout}");
        }
        self.good()
    }

    /// Panics unless it ended with this code and said all of this.
    pub fn failed_with(self, code: i32, said: &[&str]) -> Self {
        assert_eq!(self.code, Some(code), "exit code; stderr:\n{}", self.stderr);
        for text in said {
            assert!(self.stderr.contains(text), "no {text:?} in:\n{}", self.stderr);
        }
        self
    }

    pub fn lines(&self) -> Vec<Line> {
        self.stdout.iter().map(|text| Line::parse(text)).collect()
    }

    pub fn logs(&self) -> Vec<Value> {
        logs(&self.stderr.lines().collect::<Vec<_>>())
    }

    /// The log lines whose message contains `text`.
    pub fn logged(&self, text: &str) -> Vec<Value> {
        self.logs().into_iter().filter(|log| says(log, text)).collect()
    }
}

fn logs(lines: &[impl AsRef<str>]) -> Vec<Value> {
    lines.iter().filter_map(|line| serde_json::from_str(line.as_ref()).ok()).collect()
}

fn says(log: &Value, text: &str) -> bool {
    log["message"].as_str().is_some_and(|message| message.contains(text))
}

/// One line of the stdout or file sink.
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    pub ordering_key: String,
    pub attributes: BTreeMap<String, String>,
    pub data: Value,
}

impl Line {
    /// Panics unless it is exactly of the promised shape. A name that stands twice in the body is noticed, too.
    pub fn parse(text: &str) -> Line {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Raw {
            ordering_key: String,
            attributes: BTreeMap<String, String>,
            data: UniqueNames,
        }
        let raw: Raw =
            serde_json::from_str(text).unwrap_or_else(|error| panic!("{error} in the line {text}"));
        Line { ordering_key: raw.ordering_key, attributes: raw.attributes, data: Value::Object(raw.data.0) }
    }

    /// A message as it arrived at Pub/Sub.
    pub fn of(message: &pubsub::Message) -> Line {
        let data: UniqueNames = serde_json::from_slice(&message.data).expect("the body is JSON");
        Line {
            ordering_key: message.ordering_key.clone(),
            attributes: message.attributes.clone(),
            data: Value::Object(data.0),
        }
    }

    pub fn all(text: &str) -> Vec<Line> {
        text.lines().map(Line::parse).collect()
    }

    pub fn name(&self) -> &str {
        self.attributes["event_type"].as_str()
    }

    pub fn event_id(&self) -> &str {
        self.data["event_id"].as_str().expect("an id")
    }

    pub fn sequence(&self) -> u64 {
        self.data["sequence"].as_u64().expect("a number")
    }

    pub fn is_retraction(&self) -> bool {
        self.name() == "Retracted"
    }
}

/// A JSON object in which no name comes twice.
struct UniqueNames(serde_json::Map<String, Value>);

impl<'de> Deserialize<'de> for UniqueNames {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = UniqueNames;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<UniqueNames, A::Error> {
                let mut names = serde_json::Map::new();
                while let Some((name, value)) = map.next_entry::<String, Value>()? {
                    if names.insert(name.clone(), value).is_some() {
                        return Err(serde::de::Error::custom(format!("{name} stands twice")));
                    }
                }
                Ok(UniqueNames(names))
            }
        }
        deserializer.deserialize_map(Object)
    }
}

/// The lines of each ordering key, in their order.
pub fn by_key(lines: &[Line]) -> BTreeMap<String, Vec<Line>> {
    let mut keys: BTreeMap<String, Vec<Line>> = BTreeMap::new();
    for line in lines {
        keys.entry(line.ordering_key.clone()).or_default().push(line.clone());
    }
    keys
}

/// The names of one escrow's events, in their order.
pub fn names_of(lines: &[Line], escrow: Address) -> Vec<String> {
    let key = format!("{escrow:#x}");
    lines.iter().filter(|line| line.ordering_key == key).map(|line| line.name().to_owned()).collect()
}

/// The first occurrence of each message, and the number of repeats. Panics unless a repeat is the same message, and
/// repeats are runs: after a message of a key comes its successor, or the run begins again somewhere before.
pub fn firsts(lines: &[Line]) -> (Vec<Line>, usize) {
    let mut seen: BTreeMap<&str, &Line> = BTreeMap::new();
    let mut last: BTreeMap<&str, u64> = BTreeMap::new();
    let mut firsts = vec![];
    for line in lines {
        let before = last.insert(&line.ordering_key, line.sequence()).unwrap_or(0);
        assert!(line.sequence() <= before + 1, "{}: {} after {before}", line.ordering_key, line.sequence());
        match seen.insert(line.event_id(), line) {
            None => firsts.push(line.clone()),
            Some(first) => assert_eq!(line, first, "what comes again is the same"),
        }
    }
    let repeats = lines.len() - firsts.len();
    (firsts, repeats)
}

/// A port nobody listens on now.
pub fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("there is a free port");
    listener.local_addr().expect("it has an address").port()
}
