//! The relayer at work, on this machine alone: a real chain (anvil), a Pub/Sub server in this process, a hundred
//! escrows. `cargo run --release --example demo`; with `-- --keep` it goes on until Ctrl-C.
//!
//! It shows what the relayer asked of the node and what arrived, compares that with the chain's own logs, and shows what a
//! settlement service makes of it. The exit code is 1 if anything differs.

#[path = "../tests/common/mod.rs"]
mod common;
#[path = "settlement/consumer.rs"]
mod consumer;
#[path = "settlement/ledger.rs"]
mod ledger;
#[path = "demo/proxy.rs"]
mod proxy;
#[path = "demo/truth.rs"]
mod truth;

use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use alloy::primitives::Address;
use anyhow::{Context, Result, anyhow, bail, ensure};
use common::pubsub::{Message, Subscription};
use common::{Anvil, Chain, Contract, PubSub};
use proxy::{Cost, Poll, Proxy};
use relayer::config::{Config, LogFormat, Sources};
use relayer::scan::Until;
use relayer::store::{Added, Store};
use relayer::{Ending, Relay, RelayError, telemetry};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};

const ESCROWS: usize = 100;
const CREATED_PER_BLOCK: usize = 25;
/// Escrows whose approvals and release go into one block.
const GROUP: usize = 10;
/// Groups that live while the relayer runs; the others while it is stopped.
const GROUPS_WATCHED: usize = 8;

const TOPIC: &str = "settlement.events.v1";
const PROJECT: &str = "demo";
const SUBSCRIPTION: &str = "projects/demo/subscriptions/settlement";
/// The built-in default is 4 s, which is made for real chains.
const POLL_INTERVAL: Duration = Duration::from_millis(250);
/// The built-in `chain.confirmations`: an event is relayed once that many blocks follow its own.
const CONFIRMATIONS: u64 = 2;
const IDLE: Duration = Duration::from_secs(2);
/// What nothing here should take.
const PATIENCE: Duration = Duration::from_secs(20);
/// With --keep.
const BLOCK_TIME: Duration = Duration::from_secs(2);

const NO_ANVIL: &str = "\
The demo runs on a real chain and needs anvil for that. Do one of these and run it again:
  - install Node.js with npm (npm then fetches anvil into target/, once; its registry must be reachable)
  - install Foundry, so that anvil is in PATH
  - set ANVIL to the path of an anvil binary";

fn main() -> ExitCode {
    let keep = match std::env::args().skip(1).collect::<Vec<_>>().as_slice() {
        [] => false,
        [option] if option == "--keep" => true,
        other => {
            eprintln!(
                "error: unknown arguments {other:?}\nusage: cargo run --release --example demo [-- --keep]"
            );
            return ExitCode::from(2);
        }
    };
    if std::env::var("RUST_LOG").is_ok_and(|filter| !filter.trim().is_empty()) {
        telemetry::init_logs(LogFormat::Text, &Default::default());
    }
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    // The support under tests/ panics where a test would fail: here that is an error like another.
    std::panic::set_hook(Box::new(|panic| eprintln!("error: {panic}")));
    let outcome = std::panic::catch_unwind(AssertUnwindSafe(|| {
        runtime.block_on(async {
            let stop = stop_signal()?;
            // Dropping the demo ends anvil with it.
            tokio::select! {
                result = demo(keep, stop.clone()) => result.map(|()| ExitCode::SUCCESS),
                () = stop.cancelled(), if !keep => {
                    eprintln!("Interrupted.");
                    Ok(ExitCode::from(130))
                }
            }
        })
    }));
    match outcome {
        Ok(Ok(code)) => return code,
        Ok(Err(error)) => {
            let error = format!("{error:#}");
            eprintln!("error: {error}");
            if error.contains(NO_ANVIL) {
                return ExitCode::FAILURE;
            }
        }
        Err(_) => {}
    }
    eprintln!("\nThe demo failed. RUST_LOG=info shows what the relayer says meanwhile.");
    ExitCode::FAILURE
}

async fn demo(keep: bool, stop: CancellationToken) -> Result<()> {
    let began = Instant::now();
    println!("The relayer's demo. Everything runs on this machine and is gone afterwards.");

    step(1, "A chain");
    let anvil =
        Anvil::new().manual_mining().spawn().await.map_err(|error| anyhow!("{error:#}\n\n{NO_ANVIL}"))?;
    let chain = Chain::connect(anvil.url()).await;
    let factory = chain.deploy("EscrowFactory", &[]).await;
    let start_block = chain.block_number().await;
    say(&format!("anvil at {}, chain {}", anvil.url(), chain.chain_id().await));
    say(&format!("the factory {:#x}, deployed in block {start_block}", factory.address));

    step(2, "Google Pub/Sub, played by a gRPC server in this process");
    let pubsub = PubSub::start().await;
    let topic = pubsub.create_topic(&format!("projects/{PROJECT}/topics/{TOPIC}"));
    say(&format!("{}, topic {topic}", pubsub.endpoint()));
    let folder = TempDir::new().context("no temporary folder")?;
    let settlement = Settlement::start(&pubsub, &topic, folder.path().join("settlement.db")).await?;
    say("A settlement service subscribes to it and keeps its rows in SQLite: examples/settlement.");

    step(3, "The relayer, with its built-in defaults and these variables");
    let proxy = Proxy::start(anvil.url()).await?;
    let environment = BTreeMap::from([
        ("CHAIN_ID", chain.chain_id().await.to_string()),
        ("START_BLOCK", start_block.to_string()),
        ("CONTRACT_ADDRESS", format!("{:#x}", factory.address)),
        ("RPC_URL", proxy.url().to_owned()),
        ("POLL_INTERVAL_SECONDS", POLL_INTERVAL.as_secs_f64().to_string()),
        ("PUBSUB_PROJECT_ID", PROJECT.to_owned()),
        ("PUBSUB_TOPIC_ID", TOPIC.to_owned()),
        ("PUBSUB_EMULATOR_HOST", pubsub.endpoint()),
        ("RELAYER_STORAGE__PATH", folder.path().join("relayer.redb").display().to_string()),
    ]);
    for (name, value) in &environment {
        say(&format!("{name}={value}"));
    }
    say("RPC_URL is a proxy in front of anvil, which counts what the relayer asks.");
    let sources = Sources {
        environment: environment.into_iter().map(|(name, value)| (name.to_owned(), value)).collect(),
        directory: folder.path().to_owned(),
        ..Sources::default()
    };
    let mut world = World { anvil, relayer: None, escrows: vec![], chain, factory, pubsub, proxy, sources };
    world.start_relayer().await?;

    step(4, &format!("{ESCROWS} escrows"));
    let creating = world.create().await?;
    say(&format!("created in {} blocks, {CREATED_PER_BLOCK} in each", ESCROWS / CREATED_PER_BLOCK));
    world.relayed(ESCROWS, ": an EscrowDeployed for each").await?;
    let created = settlement.row(world.escrows[0].address, "created", 0).await?;

    step(5, "They live: two approvals each, then a release or a refund");
    let mark = world.proxy.mark();
    let before = world.pubsub.messages().len();
    let groups: Vec<Vec<Contract>> = world.escrows.chunks(GROUP).map(<[Contract]>::to_vec).collect();
    let (watched, unwatched) = groups.split_at(GROUPS_WATCHED);
    let (events, blocks) = world.live(watched, true).await?;
    say(&format!("{events} events of {} escrows in {blocks} blocks", watched.len() * GROUP));
    world.relayed(before + events, " in all").await?;
    let new_block = polls(&world.proxy, mark, |poll| !poll.is_idle())?;

    step(6, &format!("Nothing happens, for {} s", IDLE.as_secs()));
    let mark = world.proxy.mark();
    tokio::time::sleep(IDLE).await;
    let idle = polls(&world.proxy, mark, Poll::is_idle)?;
    say(&format!("the relayer looked at the head {} times", idle.polls));

    step(7, "The relayer is stopped, the chain goes on, the relayer is started again");
    let before = world.pubsub.messages().len();
    world.stop_relayer().await?;
    let (events, blocks) = world.live(unwatched, false).await?;
    say(&format!("stopped: {events} events in {blocks} blocks that nobody watched"));
    world.start_relayer().await?;
    world.caught_up().await?;
    say("started: it goes on where its store says it was");
    world.relayed(before + events, " in all").await?;

    step(8, "What the relayer asked of the node, as the proxy counted it");
    let last = world.head().await - CONFIRMATIONS;
    let naive = ask_per_escrow(&world, last - CONFIRMATIONS).await?;
    heading();
    row("a poll that finds nothing new", &idle);
    row("a poll that finds a new block", &new_block);
    row("a poll that finds a block with new escrows", &creating);
    row("a new block, asked for escrow by escrow", &naive);
    say(&format!(
        "The last row is for comparison: 1 for the factory, 3 kinds of events for {ESCROWS} escrows each."
    ));
    let all = Cost::of(&world.proxy.since(0));
    say(&format!(
        "The relayer in all, for {last} blocks, idle polls included: {} calls in {} HTTP requests.",
        all.calls, all.requests
    ));

    step(9, "One escrow's life, as its messages");
    let messages = world.pubsub.messages();
    show_life(&messages, world.escrows[0].address)?;

    step(10, "Is it true? What arrived, compared with raw eth_getLogs over the factory and all escrows");
    world.caught_up().await?;
    let escrows: Vec<Address> = world.escrows.iter().map(|escrow| escrow.address).collect();
    let messages = world.pubsub.messages();
    let compared = truth::compare(&world.chain, world.factory.address, &escrows, last, &messages)
        .await
        .map_err(|error| anyhow!("what arrived is not what the chain says.\n{error:#}"))?;
    say(&format!(
        "the chain:  {} logs, {} of them EscrowCreated, which is not relayed unless configured",
        compared.logs, compared.not_relayed
    ));
    say(&format!("Pub/Sub:    {} messages with {} ordering keys", compared.messages, compared.escrows));
    say("Each of the other logs arrived, once, with its arguments, and in order for every escrow.");

    step(11, "What for: the settlement service's row of that escrow, before and after");
    let ended = settlement.row(world.escrows[0].address, "released", 2).await?;
    say(&format!("{:<6}  {:<8}  {:>15}  {}", "", "status", "approvals_count", "amount"));
    for (when, row) in [("step 4", &created), ("now", &ended)] {
        let amount = row.amount.as_deref().unwrap_or("-");
        say(&format!("{when:<6}  {:<8}  {:>15}  {amount}", row.status, row.approvals_count));
    }
    settlement.compare(&world.escrows).await?;
    say(&format!("All {ESCROWS} rows agree with what the contracts themselves say."));

    if keep {
        world.keep_going(&stop).await?;
    }
    world.stop_relayer().await?;
    println!("\nDone, after {:.1} s.", began.elapsed().as_secs_f64());
    Ok(())
}

/// The consumer of examples/settlement, in this process.
struct Settlement {
    state: Arc<consumer::State>,
    /// Ends it.
    _stop: DropGuard,
}

impl Settlement {
    async fn start(pubsub: &PubSub, topic: &str, database: PathBuf) -> Result<Self> {
        pubsub.create_subscription(Subscription {
            name: SUBSCRIPTION.to_owned(),
            topic: topic.to_owned(),
            enable_message_ordering: true,
            ..Default::default()
        });
        let state = consumer::State::new(ledger::Ledger::open(&database)?);
        let subscriber = consumer::connect(Some(&pubsub.endpoint())).await?;
        let stop = CancellationToken::new();
        let (consuming, stopping) = (state.clone(), stop.clone());
        tokio::spawn(
            async move { consumer::consume(&subscriber, SUBSCRIPTION, &consuming, &stopping).await },
        );
        Ok(Self { state, _stop: stop.drop_guard() })
    }

    fn look(&self, escrow: Address) -> Option<ledger::Escrow> {
        let ledger = self.state.ledger.lock().expect("no panic while held");
        ledger.escrow(&format!("{escrow:#x}")).expect("the database can be read")
    }

    /// The row, once it is as it should be.
    async fn row(&self, escrow: Address, status: &str, approvals: i64) -> Result<ledger::Escrow> {
        let is_so = |row: &ledger::Escrow| row.status == status && row.approvals_count == approvals;
        eventually(|| self.look(escrow).as_ref().is_some_and(is_so)).await;
        let row = self.look(escrow);
        let wrong = format!("the row of {escrow:#x} should be {status} with {approvals} approvals: {row:?}");
        row.filter(is_so).with_context(|| wrong)
    }

    /// Every row against the contract's own state.
    async fn compare(&self, escrows: &[Contract]) -> Result<()> {
        for escrow in escrows {
            let status = match (escrow.get("released").await, escrow.get("refunded").await) {
                (0, 0) => "created",
                (_, 0) => "released",
                (..) => "refunded",
            };
            self.row(escrow.address, status, escrow.get("approvalsCount").await as i64).await?;
        }
        let counts = self.state.ledger.lock().expect("no panic while held").counts()?;
        ensure!((counts.gaps, counts.rejected) == (0, 0), "gaps, or messages put aside: {counts:?}");
        Ok(())
    }
}

struct World {
    anvil: Anvil,
    chain: Chain,
    factory: Contract,
    escrows: Vec<Contract>,
    pubsub: PubSub,
    proxy: Proxy,
    sources: Sources,
    relayer: Option<Running>,
}

/// A relayer that runs.
struct Running {
    store: Arc<Store>,
    stop: CancellationToken,
    task: JoinHandle<Result<Ending, RelayError>>,
}

/// What polls of one kind cost.
struct Costs {
    polls: usize,
    least: Cost,
    most: Cost,
}

impl World {
    async fn start_relayer(&mut self) -> Result<()> {
        let (config, _) = Config::load(&self.sources)?;
        let stop = CancellationToken::new();
        let relay = Relay::open(config, Added::Read, &stop).await?.expect("nobody asked to stop");
        let store = Arc::clone(relay.store());
        let task = tokio::spawn(relay.run(Until::Forever, stop.clone()));
        self.relayer = Some(Running { store, stop, task });
        Ok(())
    }

    async fn stop_relayer(&mut self) -> Result<()> {
        let Some(Running { store, stop, task }) = self.relayer.take() else {
            return Ok(());
        };
        let held = Arc::downgrade(&store);
        drop(store);
        stop.cancel();
        let ending = task.await??;
        ensure!(ending == Ending::Stopped, "the relayer was asked to stop, and ended with {ending:?}");
        // What it was at may hold the file a moment longer: until then it is locked.
        while held.strong_count() > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok(())
    }

    async fn head(&self) -> u64 {
        self.chain.block_number().await
    }

    /// Mines a block with what waits in the pool; where the relayer runs, waits until it has read what it may.
    async fn mine(&mut self) -> Result<()> {
        self.chain.mine(1).await;
        if self.relayer.is_some() { self.caught_up().await } else { Ok(()) }
    }

    /// Waits until the relayer has read all it may, and published it.
    async fn caught_up(&mut self) -> Result<()> {
        let last = self.head().await.saturating_sub(CONFIRMATIONS);
        let Some(running) = &self.relayer else {
            bail!("the relayer does not run");
        };
        let there = || running.store.next_block() > last && running.store.waiting() == 0;
        let done = eventually(|| there() || running.task.is_finished()).await;
        if running.task.is_finished() {
            let ended = self.relayer.take().expect("just seen").task.await?;
            bail!("the relayer ended by itself: {:?}", ended.map_err(|error| error.to_string()));
        }
        if !done && TcpStream::connect(("127.0.0.1", self.anvil.port())).await.is_err() {
            bail!("anvil does not answer any more: something ended it. Run the demo again");
        }
        ensure!(done, "the relayer did not read and publish block {last} within {PATIENCE:?}");
        Ok(())
    }

    /// Blocks without events, so that the ones before count as confirmed.
    async fn confirm(&mut self) -> Result<()> {
        for _ in 0..CONFIRMATIONS {
            self.mine().await?;
        }
        Ok(())
    }

    /// Waits for so many messages, and says so.
    async fn relayed(&self, messages: usize, what: &str) -> Result<()> {
        let done = eventually(|| self.pubsub.messages().len() >= messages).await;
        let arrived = self.pubsub.messages().len();
        ensure!(done, "{arrived} messages arrived within {PATIENCE:?}, not {messages}");
        say(&format!("relayed: {arrived} messages{what}"));
        Ok(())
    }

    async fn create(&mut self) -> Result<Costs> {
        self.confirm().await?; // the first poll also asks for the chain's id, finality and the factory's code
        let mark = self.proxy.mark();
        for _ in 0..ESCROWS / CREATED_PER_BLOCK {
            let created = self.factory.submit("createMany", &[(CREATED_PER_BLOCK as u64).into()]).await;
            self.mine().await?;
            let receipt = self.chain.receipt(created).await;
            self.escrows.extend(self.factory.escrows_in(&receipt));
        }
        self.confirm().await?;
        ensure!(self.escrows.len() == ESCROWS, "the factory announced {} escrows", self.escrows.len());
        polls(&self.proxy, mark, |poll| poll.cost().calls > 2)
    }

    /// Each group is approved by the payer, by the arbiter, then ended; three groups are at it in one block. Returns
    /// how many events and blocks that made.
    async fn live(&mut self, groups: &[Vec<Contract>], one_by_one: bool) -> Result<(usize, u64)> {
        let first = self.head().await;
        let mut events = 0;
        for block in 0..groups.len() + 2 {
            for (age, group) in (0..3).filter_map(|age| Some((age, groups.get(block.checked_sub(age)?)?))) {
                for (index, escrow) in group.iter().enumerate() {
                    let (account, function) = match age {
                        0 => (1, "approve"),
                        1 => (3, "approve"),
                        _ if index % 5 == 4 => (3, "refund"),
                        _ => (1, "release"),
                    };
                    escrow.submit_from(self.chain.account(account), function, &[]).await;
                    events += 1;
                }
            }
            if one_by_one { self.mine().await? } else { self.chain.mine(1).await }
        }
        let blocks = self.head().await - first;
        self.confirm().await?;
        Ok((events, blocks))
    }

    async fn keep_going(&mut self, stop: &CancellationToken) -> Result<()> {
        println!(
            "\nIt goes on, with a block every {} s, an approval in every other, until Ctrl-C.",
            BLOCK_TIME.as_secs()
        );
        say(&format!("node     {}", self.anvil.url()));
        say(&format!("proxy    {}", self.proxy.url()));
        say(&format!("Pub/Sub  {} (gRPC), project {PROJECT}, topic {TOPIC}", self.pubsub.endpoint()));
        let mut shown = self.pubsub.messages().len();
        for turn in 0.. {
            tokio::select! {
                () = stop.cancelled() => return Ok(()),
                () = tokio::time::sleep(BLOCK_TIME) => {}
            }
            let escrow = &self.escrows[turn % self.escrows.len()];
            if turn % 2 == 0 {
                escrow.submit_from(self.chain.account(turn % 10), "approve", &[]).await;
            }
            self.mine().await?;
            let messages = self.pubsub.messages();
            for message in &messages[shown..] {
                say(&line(message)?);
            }
            shown = messages.len();
        }
        Ok(())
    }
}

/// What the polls of this kind since the mark cost.
fn polls(proxy: &Proxy, mark: usize, is_meant: impl Fn(&Poll) -> bool) -> Result<Costs> {
    let polls = Poll::all(proxy.since(mark));
    let costs: Vec<Cost> = polls.iter().filter(|poll| is_meant(poll)).map(Poll::cost).collect();
    let (least, most) = (costs.iter().min(), costs.iter().max());
    let (least, most) = least.zip(most).context("the proxy saw no poll of a kind that must have occurred")?;
    Ok(Costs { polls: costs.len(), least: *least, most: *most })
}

/// One block's logs the other way: for each escrow one `eth_getLogs` per kind of event.
async fn ask_per_escrow(world: &World, block: u64) -> Result<Costs> {
    let proxy = Proxy::start(world.anvil.url()).await?;
    let chain = Chain::connect(proxy.url()).await;
    let mark = proxy.mark();
    let mut filters = vec![(world.factory.address, "EscrowDeployed")];
    for escrow in &world.escrows {
        filters.extend(["Approved", "EscrowReleased", "EscrowRefunded"].map(|name| (escrow.address, name)));
    }
    let number = format!("{block:#x}");
    let mut logs = 0;
    for (address, name) in filters {
        let topics: Vec<_> = common::chain::events()
            .filter(|event| event.name == name)
            .map(|event| event.selector())
            .collect();
        let filter =
            json!({ "address": address, "topics": [topics], "fromBlock": number, "toBlock": number });
        let answer = chain.rpc("eth_getLogs", json!([filter])).await;
        logs += answer.as_array().map_or(0, Vec::len);
    }
    let arrived = world
        .pubsub
        .messages()
        .iter()
        .filter(|message| message.attribute("block_number") == block.to_string())
        .count();
    ensure!(logs == arrived, "block {block}, asked per escrow, has {logs} logs; {arrived} messages arrived");
    let cost = Cost::of(&proxy.since(mark));
    Ok(Costs { polls: 1, least: cost, most: cost })
}

// ---- what is shown

fn say(text: &str) {
    println!("   {text}");
}

fn step(number: usize, title: &str) {
    println!("\n{number}. {title}");
}

fn heading() {
    say(&format!("{:44}{:>5}{:>10}{:>15}", "each", "times", "calls", "HTTP requests"));
}

fn row(what: &str, costs: &Costs) {
    let range = |of: fn(&Cost) -> usize| match (of(&costs.least), of(&costs.most)) {
        (least, most) if least == most => least.to_string(),
        (least, most) => format!("{least} to {most}"),
    };
    let (calls, requests) = (range(|cost| cost.calls), range(|cost| cost.requests));
    say(&format!("{what:44}{:>5}{calls:>10}{requests:>15}", costs.polls));
}

fn show_life(messages: &[Message], escrow: Address) -> Result<()> {
    let key = format!("{escrow:#x}");
    let life: Vec<&Message> = messages.iter().filter(|message| message.ordering_key == key).collect();
    say(&format!("ordering key {key}"));
    for message in &life {
        say(&line(message)?);
    }
    let approved = life.iter().find(|message| message.attribute("event_name") == "Approved");
    let approved = approved.context("the escrow has no Approved")?;
    println!();
    say("The first Approved, whole. Attributes:");
    for (name, value) in &approved.attributes {
        say(&format!("  {name}: {value}"));
    }
    say("Body:");
    for field in fields(&String::from_utf8_lossy(&approved.data)) {
        say(&format!("  {field}"));
    }
    Ok(())
}

/// A message on two lines.
fn line(message: &Message) -> Result<String> {
    let body: Value = serde_json::from_slice(&message.data).context("a message that is not JSON")?;
    let args = body["args"].as_object().context("a message without args")?;
    let args: Vec<String> = args
        .iter()
        .map(|(name, value)| format!("{name}={}", shortened(value.as_str().unwrap_or_default())))
        .collect();
    let event_id = body["event_id"].as_str().unwrap_or_default();
    let event_id: Vec<String> = event_id.split(':').map(shortened).collect();
    Ok(format!(
        "sequence {}  {:14}  block {:<3}  event_id {}\n               {}",
        body["sequence"],
        body["event_name"].as_str().unwrap_or_default(),
        body["block_number"],
        event_id.join(":"),
        args.join(" ")
    ))
}

/// A JSON object's fields, one a line, in the order they were sent in.
fn fields(object: &str) -> Vec<String> {
    let (mut lines, mut depth, mut in_string, mut before) = (vec![String::new()], 0, false, ' ');
    for letter in object.chars() {
        match letter {
            '"' if before != '\\' => in_string = !in_string,
            '{' | '[' if !in_string => depth += 1,
            '}' | ']' if !in_string => depth -= 1,
            _ => {}
        }
        lines.last_mut().expect("never empty").push(letter);
        if letter == ',' && depth == 1 && !in_string {
            lines.push(" ".to_owned());
        }
        before = letter;
    }
    lines
}

/// Hashes and addresses by their beginning and end.
fn shortened(text: &str) -> String {
    match (text.get(..6), text.get(text.len().saturating_sub(4)..)) {
        (Some(start), Some(end)) if text.starts_with("0x") && text.len() > 14 => format!("{start}…{end}"),
        _ => text.to_owned(),
    }
}

// ---- waiting

/// Whether it becomes so before patience ends.
async fn eventually(is_so: impl Fn() -> bool) -> bool {
    let wait = async {
        while !is_so() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.is_ok()
}

/// Cancelled at the first SIGINT or SIGTERM.
fn stop_signal() -> Result<CancellationToken> {
    use tokio::signal::unix::{SignalKind, signal};
    let stop = CancellationToken::new();
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let stopping = stop.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        stopping.cancel();
    });
    Ok(stop)
}
