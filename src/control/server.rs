//! The running relayer's side of the socket.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader, BufWriter};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, info, warn};

use super::socket::{Named, listen};
use super::{ANSWERS, Answer, Desk, Refusal, Replies, Request, VERSION, socket_path};

/// Connections at once.
const CONNECTIONS: usize = 64;
/// A request is said within this time, or not at all.
const REQUEST_WITHIN: Duration = Duration::from_secs(5);
/// The longest request, in bytes: that of [`IMPORTED_AT_ONCE`](super::IMPORTED_AT_ONCE) escrows.
const REQUEST_BYTES: u64 = 4 << 20;
/// How often whoever waits is told that somebody is still there; whoever has gone is noticed then.
const SIGN_OF_LIFE: Duration = Duration::from_secs(5);
/// After an error of the listener.
const PAUSE: Duration = Duration::from_secs(1);

/// Answers until it is dropped; then nobody is connected any more, and the socket is gone.
pub struct Serving {
    _name: Named,
    _task: AbortOnDropHandle<()>,
}

/// Answers requests at the socket beside that store, which this process has open. Without one it goes on, and says so.
pub fn serve(store: &Path, desk: Desk) -> Option<Serving> {
    match listen(store) {
        Ok((listener, name)) => {
            let task = AbortOnDropHandle::new(tokio::spawn(accept(listener, Arc::new(desk))));
            Some(Serving { _name: name, _task: task })
        }
        Err(error) => {
            warn!(
                %error, socket = %socket_path(store).display(),
                "No socket for commands: they have to wait until this relayer is stopped. If its path is too long or cannot \
                 be written, set storage.path to a short one in a directory this user may write"
            );
            None
        }
    }
}

async fn accept(listener: UnixListener, desk: Arc<Desk>) {
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                debug!(%error, "A connection was not accepted");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        let (desk, room) = (Arc::clone(&desk), Arc::clone(&room).try_acquire_owned());
        connections.spawn(async move {
            let served = match room {
                Ok(_room) => converse(stream, &desk).await,
                Err(_) => refuse(stream, "too many commands at once: try again in a moment").await,
            };
            if let Err(error) = served {
                debug!(%error, "A command went away");
            }
        });
    }
}

async fn refuse(stream: UnixStream, why: &str) -> io::Result<()> {
    let mut stream = stream;
    timeout(REQUEST_WITHIN, write(&mut stream, &Answer::Error(Refusal::fault(why)))).await?
}

async fn converse(stream: UnixStream, desk: &Desk) -> io::Result<()> {
    let (reading, writing) = stream.into_split();
    let mut line = Vec::new();
    let mut reading = BufReader::new(reading).take(REQUEST_BYTES);
    let read = timeout(REQUEST_WITHIN, reading.read_until(b'\n', &mut line)).await;
    let request = match read {
        Err(_) => Err(Refusal::usage("no request came within 5 s")),
        Ok(read) => {
            read?;
            parse(&line)
        }
    };
    let mut writing = BufWriter::new(writing);
    let request = match request {
        Ok(request) => request,
        Err(refusal) => {
            write(&mut writing, &Answer::Error(refusal)).await?;
            return timeout(REQUEST_WITHIN, writing.flush()).await?;
        }
    };
    info!(request = name(&request), "A command is answered");
    let (answering, answers) = mpsc::channel(ANSWERS);
    let answer = async {
        let replies = Replies(answering);
        let last = match desk.answer(request, &replies).await {
            Ok(()) => Answer::End,
            Err(refusal) => Answer::Error(refusal),
        };
        // Nobody may be there any more.
        let _ = replies.send(last).await;
    };
    tokio::select! {
        // It ends with its channel: only a client that has gone ends it before.
        written = write_all(writing, answers) => written,
        () = async { answer.await; std::future::pending().await } => Ok(()),
    }
}

/// A line of another version is told apart before anything else of it is read.
fn parse(line: &[u8]) -> Result<Request, Refusal> {
    #[derive(Deserialize)]
    struct Versioned {
        version: u32,
    }
    #[derive(Deserialize)]
    struct Whole {
        request: Request,
    }
    let Some(line) = line.strip_suffix(b"\n") else {
        let why = match line.len() as u64 == REQUEST_BYTES {
            true => "the request is too long",
            false => "the request is not whole: it ends with a newline",
        };
        return Err(Refusal::usage(why));
    };
    let malformed = |error| Refusal::usage(format!("the request is not one: {error}"));
    let Versioned { version } = serde_json::from_slice(line).map_err(malformed)?;
    if version != VERSION {
        return Err(Refusal::usage(format!(
            "the relayer that runs speaks version {VERSION} of the commands' protocol, this command version {version}: use \
             the same program for both"
        )));
    }
    Ok(serde_json::from_slice::<Whole>(line).map_err(malformed)?.request)
}

fn name(request: &Request) -> &'static str {
    match request {
        Request::Status => "status",
        Request::Escrows => "escrows",
        Request::Import { .. } => "import",
        Request::Discover { .. } => "discover",
        Request::Outbox { .. } => "outbox",
        Request::Show { .. } => "show",
        Request::Discard { .. } => "discard",
        Request::Retry { .. } => "retry",
        Request::Replay { .. } => "replay",
        Request::Snapshot => "snapshot",
        Request::Verify { .. } => "verify",
    }
}

async fn write_all(
    mut writing: impl AsyncWrite + Unpin,
    mut answers: mpsc::Receiver<Answer>,
) -> io::Result<()> {
    loop {
        let answer = match answers.try_recv() {
            Ok(answer) => Some(answer),
            Err(_) => {
                writing.flush().await?;
                timeout(SIGN_OF_LIFE, answers.recv()).await.unwrap_or(Some(Answer::Waiting))
            }
        };
        match answer {
            Some(answer) => write(&mut writing, &answer).await?,
            None => return Ok(()),
        }
    }
}

async fn write(writing: &mut (impl AsyncWrite + Unpin), answer: &Answer) -> io::Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    writing.write_all(&line).await
}
