//! New heads announced over a web socket are relayed at once, and whatever becomes of that socket, polling is the net:
//! nothing is lost. Real binary, real chain; between the two a proxy that counts, breaks off and goes silent.

mod common;

use std::sync::{Arc, Mutex};

use common::relay::faults::{Fault, Faults};
use common::relay::proxy::Proxy;
use common::{Anvil, Contract, Line, Running, World};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, copy};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};

const ANNOUNCED: &str = "New heads are announced over the web socket";
const NO_MORE: &str = "New heads are announced no more";

/// What the wire does with connections.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Forward,
    /// They end, and new ones end at once.
    Cut,
    /// They stay, new ones are accepted, and nothing is forwarded any more.
    Silent,
}

/// A proxy before a web socket that reads along what is asked.
struct Wire {
    port: u16,
    mode: watch::Sender<Mode>,
    asked: Arc<Mutex<Vec<Value>>>,
    accepting: AbortHandle,
}

impl Wire {
    async fn to(node: u16) -> Wire {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("there is a free port");
        let port = listener.local_addr().expect("it has an address").port();
        let mode = watch::Sender::new(Mode::Forward);
        let asked = Arc::default();
        let (modes, record) = (mode.clone(), Arc::clone(&asked));
        let accepting = tokio::spawn(async move {
            let mut connections = JoinSet::new(); // they end with this task
            loop {
                let (stream, _) = listener.accept().await.expect("connections can be accepted");
                while connections.try_join_next().is_some() {}
                connections.spawn(connection(stream, node, modes.subscribe(), Arc::clone(&record)));
            }
        });
        Wire { port, mode, asked, accepting: accepting.abort_handle() }
    }

    fn url(&self) -> String {
        format!("ws://127.0.0.1:{}", self.port)
    }

    fn turn(&self, mode: Mode) {
        self.mode.send_replace(mode);
    }

    /// The calls made so far, with their parameters.
    fn asked(&self) -> Vec<Value> {
        self.asked.lock().expect("no panic while held").clone()
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// One connection, until it ends or is ended. One that was silent once is never heard again.
async fn connection(
    mut client: TcpStream,
    node: u16,
    mut modes: watch::Receiver<Mode>,
    asked: Arc<Mutex<Vec<Value>>>,
) -> Option<()> {
    if *modes.borrow_and_update() == Mode::Forward {
        let mut node = TcpStream::connect(("127.0.0.1", node)).await.ok()?;
        let (from_client, mut to_client) = client.split();
        let (mut from_node, to_node) = node.split();
        tokio::select! {
            _ = read_along(from_client, to_node, &asked) => return None,
            _ = copy(&mut from_node, &mut to_client) => return None,
            changed = modes.changed() => changed.ok()?,
        }
    }
    modes.wait_for(|mode| *mode == Mode::Cut).await.ok()?;
    None
}

/// Forwards the handshake and the frames, and writes down what the frames ask for.
async fn read_along(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWriteExt + Unpin,
    asked: &Mutex<Vec<Value>>,
) -> Option<()> {
    let mut handshake = vec![];
    while !handshake.ends_with(b"\r\n\r\n") {
        handshake.push(from.read_u8().await.ok()?);
    }
    to.write_all(&handshake).await.ok()?;
    loop {
        let (frame, payload) = frame(&mut from).await?;
        if let Ok(request) = serde_json::from_slice::<Value>(&payload) {
            let calls = match request {
                Value::Array(calls) => calls,
                call => vec![call],
            };
            let calls = calls.into_iter().map(|call| json!([call["method"], call["params"]]));
            asked.lock().expect("no panic while held").extend(calls);
        }
        to.write_all(&frame).await.ok()?;
    }
}

/// A frame of a client as it came, and what it holds: RFC 6455, section 5.2.
async fn frame(from: &mut (impl AsyncRead + Unpin)) -> Option<(Vec<u8>, Vec<u8>)> {
    let mut frame = vec![0; 2];
    from.read_exact(&mut frame).await.ok()?;
    let longer = match frame[1] & 0x7f {
        126 => 2,
        127 => 8,
        _ => 0,
    };
    let mut rest = vec![0; longer + 4];
    from.read_exact(&mut rest).await.ok()?;
    let (length, mask) = rest.split_at(longer);
    let length = match longer {
        0 => u64::from(frame[1] & 0x7f),
        _ => length.iter().fold(0, |length, byte| length << 8 | u64::from(*byte)),
    };
    let mut payload = vec![0; length as usize];
    from.read_exact(&mut payload).await.ok()?;
    let plain = payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask).collect();
    frame.extend_from_slice(&rest);
    frame.extend_from_slice(&payload);
    Some((frame, plain))
}

/// A relayer that has read everything there is and hears of new heads; polls come too late for any test.
async fn listening(world: &mut World, urls: &str) -> Running {
    polling(world, urls, 3600.0).await
}

async fn polling(world: &mut World, urls: &str, seconds: f64) -> Running {
    world.setup.set("RPC_URL", urls);
    world.setup.set("POLL_INTERVAL_SECONDS", seconds);
    world.setup.set("RELAYER_RPC__TIMEOUT", "1s");
    // What else is asked now and then.
    world.setup.set("RELAYER_AUDIT__SAMPLE_INTERVAL", "off");
    world.setup.set("RELAYER_AUDIT__CALLS_PER_HOUR", 0);
    let mut relayer = world.setup.start(&["run"]);
    relayer.wait_logged(ANNOUNCED).await;
    relayer.wait_read(world.chain.block_number().await).await;
    relayer
}

/// An escrow's life in blocks of their own, each relayed before the next: how many messages there were then.
async fn live(world: &World, relayer: &mut Running, before: usize) -> usize {
    let escrow = world.factory.create_escrow().await;
    relayer.wait_for_lines(before + 1).await;
    for (place, function) in ["approve", "release"].into_iter().enumerate() {
        escrow.send(function, &[]).await;
        relayer.wait_for_lines(before + 2 + place).await;
    }
    before + 3
}

/// What it printed is the chain, once.
async fn relayed_exactly(world: &World, relayer: Running) {
    let truth = world.truth().await;
    truth.assert_is(&relayer.stop().await.lines());
}

#[tokio::test]
async fn announced_blocks_are_relayed_at_once_however_long_the_polls_are_apart() {
    let mut world = World::new().await;
    let url = world.anvil.ws_url();
    let mut relayer = listening(&mut world, &url).await;
    let mut lines = 0;
    for _ in 0..3 {
        lines = live(&world, &mut relayer, lines).await;
    }
    relayed_exactly(&world, relayer).await;
}

#[tokio::test]
async fn announcements_of_one_provider_wake_the_reading_from_another() {
    let mut world = World::new().await;
    let read = Proxy::start(&world.anvil.url()).await;
    let announcing = Wire::to(world.anvil.port()).await;
    let urls = format!("{},{}", read.url(), announcing.url());
    let mut relayer = listening(&mut world, &urls).await;
    live(&world, &mut relayer, 0).await;
    relayed_exactly(&world, relayer).await;

    let logs = |requests: &[String]| requests.iter().filter(|method| *method == "eth_getLogs").count();
    let methods = |calls: Vec<Value>| -> Vec<String> {
        calls.iter().map(|call| call[0].as_str().expect("a method").to_owned()).collect()
    };
    let announcer = methods(announcing.asked());
    assert!(announcer.contains(&"eth_subscribe".to_owned()), "{announcer:?}");
    assert_eq!(logs(&announcer), 0, "{announcer:?}");
    let reader: Vec<String> =
        read.requests().iter().flat_map(|request| request.methods()).map(str::to_owned).collect();
    assert!(logs(&reader) >= 3, "{reader:?}");
}

#[tokio::test]
async fn a_web_socket_of_another_chain_is_never_listened_to_and_the_next_one_is() {
    let mut world = World::new().await;
    let other = Anvil::new().chain_id(77).spawn().await.expect("anvil starts");
    let astray = Wire::to(other.port()).await;
    let urls = format!("{},{},{}", world.anvil.url(), astray.url(), world.anvil.ws_url());
    let mut relayer = listening(&mut world, &urls).await;
    live(&world, &mut relayer, 0).await;
    assert!(!astray.asked().iter().any(|call| call[0] == "eth_subscribe"), "{:?}", astray.asked());
    let truth = world.truth().await;
    let stopped = relayer.stop().await;
    truth.assert_is(&stopped.lines());
    let said = stopped.stderr.lines().filter(|line| line.contains("ERROR") && line.contains("77"));
    assert_eq!(said.count(), 1, "{}", stopped.stderr);
}

#[tokio::test]
async fn a_block_announced_before_the_provider_that_is_read_has_it_is_relayed_long_before_the_next_poll() {
    let mut world = World::new().await;
    let read = Faults::start(&world.anvil.url()).await;
    let urls = format!("{},{}", read.url(), world.anvil.ws_url());
    let mut relayer = listening(&mut world, &urls).await;
    let lines = live(&world, &mut relayer, 0).await;
    // Behind when it is asked for the block, and when it is looked at again.
    let passed = read.requests();
    read.on_request(move |number, _| if number < passed + 3 { Fault::Behind(1) } else { Fault::Pass });
    world.factory.create_escrow().await;
    relayer.wait_for_lines(lines + 1).await;
    relayed_exactly(&world, relayer).await;
}

#[tokio::test]
async fn an_announced_block_costs_one_call_for_its_logs_and_none_for_its_header() {
    let mut world = World::new().await;
    let escrow = world.factory.create_escrow().await;
    let wire = Wire::to(world.anvil.port()).await;
    let mut relayer = listening(&mut world, &wire.url()).await;
    relayer.wait_for_lines(1).await;
    // What the first of them is asked beside comes before the second is asked for.
    escrow.send("approve", &[]).await;
    relayer.wait_for_lines(2).await;
    let mut expected = vec![];
    let from = wire.asked().len();
    for place in 0..5 {
        let approved = escrow.send("approve", &[]).await;
        relayer.wait_for_lines(3 + place).await;
        expected.push(json!(["eth_getLogs", approved.block_hash]));
    }
    relayed_exactly(&world, relayer).await;

    let asked = wire.asked().split_off(from);
    let hashes: Vec<Value> = asked.iter().map(|call| json!([call[0], call[1][0]["blockHash"]])).collect();
    assert_eq!(hashes, expected, "{asked:#?}");
}

/// Breaks the web socket of `urls` by `mode`, mends it, and looks that nothing is lost and announcements are back.
async fn a_broken_socket_is_noticed(mode: Mode, urls: impl Fn(&World, &Wire) -> String) {
    let mut world = World::new().await;
    let wire = Wire::to(world.anvil.port()).await;
    let urls = urls(&world, &wire);
    let alone = !urls.contains(',');
    let mut relayer = polling(&mut world, &urls, 0.2).await;
    let mut lines = live(&world, &mut relayer, 0).await;

    wire.turn(mode);
    if alone {
        // Nobody can be asked meanwhile.
        escrow_with_a_life(&world).await;
        relayer.wait_logged(NO_MORE).await;
        lines += 3;
    } else {
        // Silence is noticed by the blocks that polls find and nobody announced.
        for _ in 0..2 {
            lines = live(&world, &mut relayer, lines).await;
        }
        relayer.wait_logged(NO_MORE).await;
        lines = live(&world, &mut relayer, lines).await;
    }

    wire.turn(Mode::Forward);
    relayer.wait_for_lines(lines).await;
    relayer.wait_logged_times(ANNOUNCED, 2).await;
    live(&world, &mut relayer, lines).await;
    relayed_exactly(&world, relayer).await;
}

async fn escrow_with_a_life(world: &World) -> Contract {
    let escrow = world.factory.create_escrow().await;
    escrow.send("approve", &[]).await;
    escrow.send("release", &[]).await;
    escrow
}

fn beside_another(world: &World, wire: &Wire) -> String {
    format!("{},{}", world.anvil.url(), wire.url())
}

#[tokio::test]
async fn a_socket_that_breaks_off_beside_another_provider_loses_nothing_and_announces_again() {
    a_broken_socket_is_noticed(Mode::Cut, beside_another).await;
}

#[tokio::test]
async fn a_socket_that_falls_silent_beside_another_provider_loses_nothing_and_announces_again() {
    a_broken_socket_is_noticed(Mode::Silent, beside_another).await;
}

#[tokio::test]
async fn the_only_provider_s_socket_that_breaks_off_loses_nothing_and_announces_again() {
    a_broken_socket_is_noticed(Mode::Cut, |_, wire| wire.url()).await;
}

#[tokio::test]
async fn the_only_provider_s_socket_that_falls_silent_loses_nothing_and_announces_again() {
    a_broken_socket_is_noticed(Mode::Silent, |_, wire| wire.url()).await;
}

#[tokio::test]
async fn a_fork_among_announced_blocks_is_followed_and_what_it_took_is_withdrawn() {
    let mut world = World::new().await;
    let escrow = world.factory.create_escrow().await;
    world.chain.mine(3).await;
    let url = world.anvil.ws_url();
    let mut relayer = listening(&mut world, &url).await;
    for (place, function) in ["approve", "release"].into_iter().enumerate() {
        escrow.send(function, &[]).await;
        relayer.wait_for_lines(2 + place).await;
    }
    world.chain.reorg(2).await;
    // The new branch grows by an announced block.
    escrow.send("approve", &[]).await;
    let lines = relayer
        .wait_until("the withdrawals and what is new", |lines| {
            lines.iter().filter(|line| line.is_retraction()).count() == 2
                && !lines.last().is_some_and(Line::is_retraction)
        })
        .await;
    assert_eq!(lines.len(), 6);
    let truth = world.truth().await;
    truth.assert_is_net(&relayer.stop().await.lines());
}
