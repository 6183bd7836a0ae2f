//! The commands' side of the socket.

use serde::Serialize;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use super::{ANSWERS, Answer, Desk, Refusal, Replies, Request, VERSION};

/// The longest answer that is read, in bytes: some times the largest message.
const ANSWER_BYTES: u64 = 256 << 20;

/// The answers to one request, as they come.
pub struct Answers {
    receiver: mpsc::Receiver<Answer>,
    /// Ends with whoever reads.
    _task: AbortOnDropHandle<()>,
}

impl Answers {
    /// From a desk in this process.
    pub fn of(desk: std::sync::Arc<Desk>, request: Request) -> Self {
        let (sender, receiver) = mpsc::channel(ANSWERS);
        let task = tokio::spawn(async move {
            let replies = Replies(sender);
            let last = match desk.answer(request, &replies).await {
                Ok(()) => Answer::End,
                Err(refusal) => Answer::Error(refusal),
            };
            let _ = replies.send(last).await;
        });
        Self { receiver, _task: AbortOnDropHandle::new(task) }
    }

    /// The next one. After [`Answer::End`] or [`Answer::Error`] there is none.
    pub async fn next(&mut self) -> Answer {
        let broken = || Answer::Error(Refusal::fault("the relayer ended before it had answered everything"));
        self.receiver.recv().await.unwrap_or_else(broken)
    }
}

/// Asks the relayer at the other end.
pub async fn ask(mut stream: UnixStream, request: &Request) -> Result<Answers, serde_json::Error> {
    #[derive(Serialize)]
    struct Whole<'a> {
        version: u32,
        request: &'a Request,
    }
    let mut line = serde_json::to_vec(&Whole { version: VERSION, request })?;
    line.push(b'\n');
    // Whoever takes no more of it may have said why.
    let _ = stream.write_all(&line).await;
    let (sender, receiver) = mpsc::channel(ANSWERS);
    let task = tokio::spawn(async move {
        let mut reading = BufReader::new(stream);
        let mut line = Vec::new();
        loop {
            line.clear();
            let read = (&mut reading).take(ANSWER_BYTES).read_until(b'\n', &mut line).await;
            // The channel's end says that it broke off.
            if read.is_err() || line.pop() != Some(b'\n') {
                return;
            }
            let answer = serde_json::from_slice(&line).unwrap_or_else(|error| {
                let why = format!("an answer that makes no sense ({error}): use the same program for both");
                Answer::Error(Refusal::fault(why))
            });
            let last = matches!(answer, Answer::End | Answer::Error(_));
            if sender.send(answer).await.is_err() || last {
                return;
            }
        }
    });
    Ok(Answers { receiver, _task: AbortOnDropHandle::new(task) })
}
