//! The manifest of a snapshot: what it is of, and of which parts it is made. It is written last, and proves itself whole.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::store::{Identity, Moment};

/// Version of the manifest and of the parts.
const FORMAT: u32 = 1;
const PREFIX: &str = "snapshot-";
const SUFFIX: &str = ".json";

/// What a snapshot is of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of this file.
    pub format: u32,
    /// Later ones have higher numbers.
    pub number: u64,
    /// When it was made, as RFC 3339 writes it.
    pub made_at: String,
    /// The program that made it.
    pub made_by: String,
    /// The layout of the store.
    pub schema: u32,
    /// What the store was made for.
    pub identity: Identity,
    /// The life of the store.
    pub epoch: u64,
    /// The last block accepted, and its hash.
    pub cursor: Option<(u64, alloy::primitives::B256)>,
    /// How many messages there ever were.
    pub entries: u64,
    /// The rows.
    pub parts: Vec<Part>,
}

/// A piece of a table, in a file of its own that is named after what is in it: snapshots share those that did not change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// The table.
    pub table: String,
    /// How many rows.
    pub rows: u64,
    /// How many bytes.
    pub bytes: u64,
    /// SHA-256 of the bytes, in hexadecimal.
    pub sha256: String,
}

impl Part {
    /// Its file.
    pub fn file(&self) -> String {
        format!("parts/{}", self.sha256)
    }
}

impl Manifest {
    pub fn new(number: u64, moment: Moment, parts: Vec<Part>) -> Self {
        Self {
            format: FORMAT,
            number,
            made_at: humantime::format_rfc3339_seconds(std::time::SystemTime::now()).to_string(),
            made_by: concat!("relayer ", env!("CARGO_PKG_VERSION")).to_owned(),
            schema: moment.schema,
            identity: moment.identity,
            epoch: moment.epoch,
            cursor: moment.cursor.map(|block| (block.number, block.hash)),
            entries: moment.entries,
            parts,
        }
    }

    /// Its file.
    pub fn file(&self) -> String {
        format!("{PREFIX}{:012}{SUFFIX}", self.number)
    }

    /// The number in a file's name, if it is a manifest's.
    pub fn number_of(file: &str) -> Option<u64> {
        file.strip_prefix(PREFIX)?.strip_suffix(SUFFIX)?.parse().ok()
    }

    /// How many bytes its parts have.
    pub fn bytes(&self) -> u64 {
        self.parts.iter().map(|part| part.bytes).sum()
    }

    /// One line of JSON, and one with the SHA-256 of the first.
    pub fn encode(&self) -> Vec<u8> {
        let json = serde_json::to_string(self).expect("a manifest is JSON");
        format!("{json}\n{}\n", sha256(json.as_bytes())).into_bytes()
    }

    /// What was written, or why it is not that.
    pub fn decode(bytes: &[u8]) -> Result<Self, String> {
        let text = str::from_utf8(bytes).map_err(|_| "it is not text")?;
        let (json, sum) = text.split_once('\n').ok_or("it is cut off")?;
        if sum.trim_end() != sha256(json.as_bytes()) {
            return Err("it does not match its checksum".to_owned());
        }
        #[derive(Deserialize)]
        struct Format {
            format: u32,
        }
        match serde_json::from_str(json) {
            Ok(Format { format }) if format != FORMAT => {
                Err(format!("it has format {format}, this program knows {FORMAT}"))
            }
            Ok(_) | Err(_) => serde_json::from_str(json).map_err(|error| error.to_string()),
        }
    }
}

/// In hexadecimal.
pub(super) fn sha256(bytes: &[u8]) -> String {
    alloy::primitives::hex::encode(Sha256::digest(bytes))
}
