//! Messages as JSON lines on standard output or in a file.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::{Arc, Mutex};

use serde::Serialize;
use serde::ser::{SerializeMap, Serializer};
use serde_json::value::RawValue;

use crate::publish::{Message, Receipt, Sink, SinkError};
use crate::store::on_thread;

/// Writes one JSON object a line. A line is acknowledged when it is flushed; in a file, when it is synced.
pub struct Lines {
    target: Arc<Mutex<Target>>,
    name: &'static str,
}

enum Target {
    Stdout,
    File(File),
}

impl Lines {
    /// To standard output.
    pub fn stdout() -> Self {
        Self { target: Arc::new(Mutex::new(Target::Stdout)), name: "stdout" }
    }

    /// To the end of a file. A line that a crash cut short was never acknowledged: it is cut off, and comes again.
    pub fn file(path: &Path) -> io::Result<Self> {
        let mut file = OpenOptions::new().create(true).read(true).append(true).open(path)?;
        if let Err(TryLockError::WouldBlock) = file.try_lock() {
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, "another process writes to it"));
        }
        let whole = end_of_last_line(&mut file)?;
        file.set_len(whole)?;
        Ok(Self { target: Arc::new(Mutex::new(Target::File(file))), name: "file" })
    }
}

impl Sink for Lines {
    async fn publish(&self, run: Vec<Arc<Message>>) -> Receipt {
        let target = Arc::clone(&self.target);
        let count = run.len();
        let written = on_thread(move || {
            let lines = encode(&run)?;
            target.lock().expect("a writer panicked").write(&lines)
        });
        match written.await {
            Ok(()) => Receipt { acknowledged: count, failure: None },
            Err(error) => Receipt { acknowledged: 0, failure: Some(SinkError::Closed(error.to_string())) },
        }
    }

    fn is_sequential(&self) -> bool {
        true
    }

    fn name(&self) -> &'static str {
        self.name
    }
}

impl Target {
    fn write(&mut self, lines: &[u8]) -> io::Result<()> {
        match self {
            Self::Stdout => {
                let mut stdout = io::stdout().lock();
                stdout.write_all(lines)?;
                stdout.flush()
            }
            Self::File(file) => {
                let end = file.metadata()?.len();
                let written = file.write_all(lines).and_then(|()| file.sync_data());
                if written.is_err() {
                    // Nothing of it is acknowledged and all of it comes again: it must not stand there already.
                    let _ = file.set_len(end);
                }
                written
            }
        }
    }
}

#[derive(Serialize)]
struct Line<'a> {
    ordering_key: &'a str,
    #[serde(serialize_with = "as_map")]
    attributes: &'a [(&'static str, String)],
    data: &'a RawValue,
}

fn as_map<S: Serializer>(pairs: &&[(&'static str, String)], serializer: S) -> Result<S::Ok, S::Error> {
    let mut map = serializer.serialize_map(Some(pairs.len()))?;
    for (name, value) in *pairs {
        map.serialize_entry(name, value)?;
    }
    map.end()
}

fn encode(run: &[Arc<Message>]) -> io::Result<Vec<u8>> {
    let mut lines = Vec::new();
    for message in run {
        let data = serde_json::from_slice(&message.data)?;
        let line = Line { ordering_key: &message.ordering_key, attributes: &message.attributes, data };
        serde_json::to_writer(&mut lines, &line)?;
        lines.push(b'\n');
    }
    Ok(lines)
}

/// Where the last complete line ends, in bytes from the start.
fn end_of_last_line(file: &mut File) -> io::Result<u64> {
    const STEP: u64 = 64 << 10;
    let mut end = file.metadata()?.len();
    let mut part = Vec::new();
    while end > 0 {
        let start = end.saturating_sub(STEP);
        file.seek(SeekFrom::Start(start))?;
        part.clear();
        Read::by_ref(file).take(end - start).read_to_end(&mut part)?;
        if let Some(place) = part.iter().rposition(|byte| *byte == b'\n') {
            return Ok(start + place as u64 + 1);
        }
        end = start;
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(number: u64) -> Arc<Message> {
        Arc::new(Message {
            ordering_key: format!("key{number}"),
            attributes: vec![("sequence", number.to_string())],
            data: format!("{{\"sequence\":{number}}}").into_bytes().into(),
        })
    }

    #[tokio::test]
    async fn a_line_cut_short_by_a_crash_is_cut_off_and_the_rest_follows() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.jsonl");
        let sink = Lines::file(&path).unwrap();
        assert_eq!(sink.publish(vec![message(1), message(2)]).await.acknowledged, 2);
        drop(sink);
        let mut file = OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(b"{\"ordering_key\":\"key3\",\"attr").unwrap();
        let sink = Lines::file(&path).unwrap();
        assert_eq!(sink.publish(vec![message(3)]).await.acknowledged, 1);
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(
            text.lines().collect::<Vec<_>>(),
            [1, 2, 3].map(|n| format!(
                r#"{{"ordering_key":"key{n}","attributes":{{"sequence":"{n}"}},"data":{{"sequence":{n}}}}}"#
            ))
        );
    }
}
