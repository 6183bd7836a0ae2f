//! The database: one message, one transaction.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result};
use rusqlite::{Connection, OptionalExtension, Transaction, params};
use serde::Serialize;
use serde_json::Value;

/// A message as the rules below need it; what is missing makes it a [`Rejected`](Applied::Rejected) one.
pub struct Message {
    /// Pub/Sub's own id: for what cannot be understood otherwise.
    pub id: String,
    pub attributes: HashMap<String, String>,
    pub data: Vec<u8>,
}

/// What became of a message. All of these are acknowledged.
#[derive(Debug, PartialEq, Eq)]
pub enum Applied {
    /// The ledger changed.
    Changed { event: String, escrow: String },
    /// It was applied before: a repeat, a replay, or the same event from a new store of the relayer.
    Known,
    /// No event that means anything here.
    Ignored { event: String },
    /// It cannot be understood; kept with the reason.
    Rejected { reason: String },
}

/// A row as `GET /escrows/{address}` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Escrow {
    pub address: String,
    pub payer: Option<String>,
    pub payee: Option<String>,
    pub amount: Option<String>,
    pub asset_symbol: &'static str,
    pub chain_id: i64,
    pub status: String,
    pub release_delay: Option<i64>,
    pub approvals_required: Option<i64>,
    pub approvals_count: i64,
    pub arbiter: Option<String>,
    pub transaction_hash: Option<String>,
    pub block_number: Option<i64>,
    pub created_at: String,
    pub updated_at: String,
}

/// How many rows the tables for people have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Counts {
    pub escrows: i64,
    pub events: i64,
    pub gaps: i64,
    pub rejected: i64,
}

pub struct Ledger {
    db: Connection,
}

impl Ledger {
    pub fn open(path: &Path) -> Result<Self> {
        let db = Connection::open(path).with_context(|| {
            format!("--database {} cannot be opened: give a file in a writable directory", path.display())
        })?;
        // An acknowledged message never comes again: what it changed must be on the disk before.
        db.execute_batch("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON;")?;
        db.execute_batch(include_str!("schema.sql")).with_context(|| {
            format!("--database {} is not a database of this program: give another file", path.display())
        })?;
        Ok(Self { db })
    }

    /// Applies a message, or finds that it was applied. After an error nothing of it was: it must not be acknowledged.
    pub fn apply(&mut self, message: &Message) -> Result<Applied> {
        let transaction = self.db.transaction()?;
        let applied = match Parsed::of(message) {
            Ok(parsed) => apply(&transaction, &parsed)?,
            Err(reason) => {
                transaction.execute(
                    "INSERT OR IGNORE INTO rejected (message_id, reason, data) VALUES (?1, ?2, ?3)",
                    params![message.id, reason, message.data],
                )?;
                Applied::Rejected { reason }
            }
        };
        transaction.commit()?;
        Ok(applied)
    }

    /// `None`: never heard of it.
    pub fn escrow(&self, address: &str) -> Result<Option<Escrow>> {
        let row = |row: &rusqlite::Row<'_>| {
            Ok(Escrow {
                address: row.get("address")?,
                payer: row.get("payer")?,
                payee: row.get("payee")?,
                amount: row.get("amount")?,
                asset_symbol: "ETH",
                chain_id: row.get("chain_id")?,
                status: row.get("status")?,
                release_delay: row.get("release_delay")?,
                approvals_required: row.get("approvals_required")?,
                approvals_count: row.get("approvals_count")?,
                arbiter: row.get("arbiter")?,
                transaction_hash: row.get("transaction_hash")?,
                block_number: row.get("block_number")?,
                created_at: row.get("created_at")?,
                updated_at: row.get("updated_at")?,
            })
        };
        let address = address.to_lowercase();
        Ok(self.db.query_row("SELECT * FROM escrows WHERE address = ?1", [address], row).optional()?)
    }

    pub fn counts(&self) -> Result<Counts> {
        let count = |table: &str| {
            self.db.query_row(&format!("SELECT count(*) FROM {table}"), [], |row| row.get::<_, i64>(0))
        };
        Ok(Counts {
            escrows: count("escrows")?,
            events: count("events")?,
            gaps: count("gaps")?,
            rejected: count("rejected")?,
        })
    }
}

/// A message of the relayer, understood.
struct Parsed {
    name: String,
    event_id: String,
    escrow: String,
    epoch: String,
    sequence: i64,
    body: Value,
}

impl Parsed {
    fn of(message: &Message) -> Result<Self, String> {
        let attribute = |name: &str| {
            message.attributes.get(name).cloned().ok_or_else(|| format!("it has no attribute {name}"))
        };
        let name = attribute("event_type").or_else(|_| attribute("event_name"))?;
        let sequence = attribute("sequence")?;
        let sequence = sequence.parse().map_err(|_| format!("its sequence is {sequence:?}"))?;
        let body: Value = serde_json::from_slice(&message.data)
            .map_err(|error| format!("its body is not JSON: {error}"))?;
        let parsed = Self {
            name,
            event_id: attribute("event_id")?,
            escrow: attribute("escrow")?.to_lowercase(),
            epoch: attribute("epoch")?,
            sequence,
            body,
        };
        match parsed.name.as_str() {
            "Retracted" => parsed.text("retracts").map(drop)?,
            "Approved" => parsed.text("approver").map(drop)?,
            _ => {}
        }
        if parsed.name != "Retracted" {
            parsed.integer("block_number").ok_or("its body has no block_number")?;
            parsed.integer("log_index").ok_or("its body has no log_index")?;
        }
        Ok(parsed)
    }

    fn text(&self, name: &str) -> Result<&str, String> {
        self.body[name].as_str().ok_or_else(|| format!("its body has no {name}"))
    }

    /// A JSON number, or text as the relayer writes the chain's integers.
    fn integer(&self, name: &str) -> Option<i64> {
        let value = &self.body[name];
        value.as_i64().or_else(|| value.as_str().and_then(|text| text.parse().ok()))
    }
}

fn apply(transaction: &Transaction<'_>, message: &Parsed) -> Result<Applied> {
    let Parsed { escrow, epoch, sequence, .. } = message;
    let last: Option<i64> = transaction.query_row(
        "SELECT max(sequence) FROM messages WHERE escrow = ?1 AND epoch = ?2",
        params![escrow, epoch],
        |row| row.get(0),
    )?;
    let new = transaction.execute(
        "INSERT OR IGNORE INTO messages (escrow, epoch, sequence) VALUES (?1, ?2, ?3)",
        params![escrow, epoch, sequence],
    )?;
    if new == 0 {
        return Ok(Applied::Known);
    }
    note_gap(transaction, message, last)?;
    let changed = match message.name.as_str() {
        "Retracted" => retract(transaction, message)?,
        "EscrowDeployed" | "Approved" | "EscrowReleased" | "EscrowRefunded" => stand(transaction, message)?,
        _ => return Ok(Applied::Ignored { event: message.name.clone() }),
    };
    if !changed {
        return Ok(Applied::Known);
    }
    refresh(transaction, escrow)?;
    Ok(Applied::Changed { event: message.name.clone(), escrow: escrow.clone() })
}

/// A gap is no reason to refuse what did arrive, but somebody has to know. Without one the first message a consumer sees
/// may have any number: its subscription is younger than the escrow.
fn note_gap(transaction: &Transaction<'_>, message: &Parsed, last: Option<i64>) -> Result<()> {
    let Parsed { escrow, epoch, sequence, .. } = message;
    match last {
        Some(last) if *sequence > last + 1 => {
            tracing::warn!(%escrow, %epoch, expected = last + 1, got = sequence, "A message of this escrow is missing");
            transaction.execute(
                "INSERT OR IGNORE INTO gaps (escrow, epoch, expected, got) VALUES (?1, ?2, ?3, ?4)",
                params![escrow, epoch, last + 1, sequence],
            )?;
        }
        Some(_) | None => {}
    }
    Ok(())
}

/// Records an event and what it says. `false`: it stands already.
fn stand(transaction: &Transaction<'_>, message: &Parsed) -> Result<bool> {
    let Parsed { name, event_id, escrow, .. } = message;
    let integer = |name: &str| message.integer(name);
    let new = transaction.execute(
        "INSERT OR IGNORE INTO events (event_id, escrow, name, block_number, log_index) VALUES (?1, ?2, ?3, ?4, ?5)",
        params![event_id, escrow, name, integer("block_number"), integer("log_index")],
    )?;
    if new == 0 {
        return Ok(false);
    }
    transaction.execute(
        "INSERT OR IGNORE INTO escrows (address, chain_id, created_at, updated_at)
         VALUES (?1, ?2, strftime('%Y-%m-%dT%H:%M:%fZ'), strftime('%Y-%m-%dT%H:%M:%fZ'))",
        params![escrow, integer("chain_id").unwrap_or(0)],
    )?;
    let text = |name: &str| message.body[name].as_str();
    match name.as_str() {
        "EscrowDeployed" => {
            // The older ABI has no arbiter. Nothing here touches the count: approvals may have come before.
            transaction.execute(
                "UPDATE escrows SET payer = ?2, payee = ?3, amount = ?4, release_delay = ?5, approvals_required = ?6,
                 arbiter = coalesce(?7, arbiter), transaction_hash = ?8, block_number = ?9 WHERE address = ?1",
                params![
                    escrow,
                    text("payer"),
                    text("payee"),
                    text("amount"),
                    integer("releaseDelay"),
                    integer("approvalsRequired"),
                    text("arbiter"),
                    text("transaction_hash"),
                    integer("block_number"),
                ],
            )?;
        }
        "Approved" => {
            tracing::info!(%event_id, "Processing approval for escrow {escrow}");
            transaction.execute(
                "INSERT INTO approvals (event_id, escrow, approver) VALUES (?1, ?2, ?3)",
                params![event_id, escrow, text("approver")],
            )?;
        }
        _ => {}
    }
    Ok(true)
}

/// Takes an event back, and forgets its id: should its block return to the chain, it comes again under the same one.
/// `false`: it does not stand.
fn retract(transaction: &Transaction<'_>, message: &Parsed) -> Result<bool> {
    let retracted = message.body["retracts"].as_str().expect("checked when it was parsed");
    tracing::info!(event_id = retracted, escrow = %message.escrow, "An event was taken back: its block left the chain");
    let gone = transaction.execute("DELETE FROM events WHERE event_id = ?1", [retracted])?;
    let left: i64 =
        transaction.query_row("SELECT count(*) FROM events WHERE escrow = ?1", [&message.escrow], |row| {
            row.get(0)
        })?;
    if left == 0 {
        transaction.execute("DELETE FROM escrows WHERE address = ?1", [&message.escrow])?;
    }
    Ok(gone > 0)
}

/// Makes the row agree with the events that stand: the count, and the newest end of life.
fn refresh(transaction: &Transaction<'_>, escrow: &str) -> Result<()> {
    transaction.execute(
        "UPDATE escrows SET
           approvals_count = (SELECT count(*) FROM approvals WHERE escrow = ?1),
           status = coalesce((
             SELECT CASE name WHEN 'EscrowReleased' THEN 'released' ELSE 'refunded' END FROM events
             WHERE escrow = ?1 AND name IN ('EscrowReleased', 'EscrowRefunded')
             ORDER BY block_number DESC, log_index DESC LIMIT 1), 'created'),
           updated_at = strftime('%Y-%m-%dT%H:%M:%fZ')
         WHERE address = ?1",
        [escrow],
    )?;
    Ok(())
}
