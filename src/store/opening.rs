//! Opening the file: whose it is, and whether it is whole.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use redb::{
    Database, DatabaseError, ReadTransaction, ReadableDatabase, ReadableTable, StorageError, TableDefinition,
    WriteTransaction,
};

use super::schema::{
    ACKNOWLEDGED, BLOCKED, BLOCKS, DIGESTS_FROM, EVENT_LOG, IDENTITY, IN_DOUBT, Identity, Kind, LATE_READS,
    Life, MARKS, META, PROGRESS, PRUNED_BLOCK, Progress, QUARANTINE, REGISTRY, SCHEMA, STANDING, UNAUDITED,
    WATERMARK, decode, encode,
};
use super::standing::Standing;
use super::{StoreError, log, write_progress};

/// Memory redb may use for pages, in bytes; its own default is 1 GiB.
const CACHE_BYTES: usize = 48 << 20;

pub(super) fn builder() -> redb::Builder {
    let mut builder = Database::builder();
    builder.set_cache_size(CACHE_BYTES);
    builder
}

pub(super) fn open_error(path: &Path, error: DatabaseError) -> StoreError {
    let path = path.to_owned();
    match error {
        DatabaseError::DatabaseAlreadyOpen => StoreError::Locked { path },
        DatabaseError::Storage(StorageError::Io(source)) => match source.kind() {
            io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof => {
                StoreError::Damaged { what: format!("{} is not a redb file ({source})", path.display()) }
            }
            io::ErrorKind::StorageFull | io::ErrorKind::FileTooLarge | io::ErrorKind::QuotaExceeded => {
                StoreError::Io(format!("{}: {source}", path.display()))
            }
            io::ErrorKind::NotFound => {
                let remedy = "its directory does not exist: create it, or mount the volume".to_owned();
                StoreError::Unwritable { path, source, remedy }
            }
            _ => {
                let remedy = "set storage.path to a file in a directory this user may write".to_owned();
                StoreError::Unwritable { path, source, remedy }
            }
        },
        other => StoreError::Damaged { what: format!("{}: {other}", path.display()) },
    }
}

/// A new store, under another name until it is whole: a crash leaves no half of a file in its place.
pub(super) fn create(
    path: &Path,
    identity: &Identity,
    start_block: Option<u64>,
) -> Result<Database, StoreError> {
    if start_block.is_none() {
        return Err(StoreError::NoStartBlock { path: path.to_owned() });
    }
    let unfinished = unfinished(path);
    let db = match builder().create(&unfinished).map_err(|error| open_error(path, error)) {
        Ok(db) if read_life(&db.begin_read()?)?.is_none() => db,
        // What a crash left; nothing was ever published from it.
        Ok(_) | Err(StoreError::Damaged { .. }) => {
            let failed = |source| open_error(path, DatabaseError::Storage(StorageError::Io(source)));
            fs::remove_file(&unfinished).map_err(failed)?;
            builder().create(&unfinished).map_err(|error| open_error(path, error))?
        }
        Err(error) => return Err(error),
    };
    begin_life(&db, path, identity, start_block)?;
    put_in_place(path)?;
    Ok(db)
}

/// The name a store has until it is whole.
pub(super) fn unfinished(path: &Path) -> PathBuf {
    let mut unfinished = path.as_os_str().to_owned();
    unfinished.push(".new");
    PathBuf::from(unfinished)
}

/// Gives a store that is whole its name, for good.
pub(super) fn put_in_place(path: &Path) -> Result<(), StoreError> {
    let failed = |source| open_error(path, DatabaseError::Storage(StorageError::Io(source)));
    fs::rename(unfinished(path), path).map_err(failed)?;
    sync_folder(path)
}

/// The same, if nobody has that name by now.
pub(super) fn put_in_free_place(path: &Path) -> Result<(), StoreError> {
    let failed = |source| open_error(path, DatabaseError::Storage(StorageError::Io(source)));
    fs::hard_link(unfinished(path), path).map_err(failed)?;
    fs::remove_file(unfinished(path)).map_err(failed)?;
    sync_folder(path)
}

fn sync_folder(path: &Path) -> Result<(), StoreError> {
    let failed = |source| open_error(path, DatabaseError::Storage(StorageError::Io(source)));
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    File::open(folder.unwrap_or(Path::new("."))).and_then(|folder| folder.sync_all()).map_err(failed)
}

pub(super) fn read_life(read: &ReadTransaction) -> Result<Option<(Life, Progress)>, StoreError> {
    let meta = match read.open_table(META) {
        Ok(meta) => meta,
        Err(redb::TableError::TableDoesNotExist(_)) => {
            return match read.list_tables()?.next() {
                // Killed between making the file and its first commit: nothing was lost.
                None => Ok(None),
                Some(_) => Err(StoreError::Damaged { what: "it has tables, but not a relayer's".into() }),
            };
        }
        Err(error) => return Err(StoreError::Damaged { what: error.to_string() }),
    };
    let life =
        meta.get(IDENTITY)?.ok_or_else(|| StoreError::Damaged { what: "it has no identity".into() })?;
    let progress =
        meta.get(PROGRESS)?.ok_or_else(|| StoreError::Damaged { what: "it has no cursor".into() })?;
    Ok(Some((decode("meta", life.value())?, decode("meta", progress.value())?)))
}

pub(super) fn begin_life(
    db: &Database,
    path: &Path,
    identity: &Identity,
    start_block: Option<u64>,
) -> Result<(Life, Progress), StoreError> {
    let start_block = start_block.ok_or_else(|| StoreError::NoStartBlock { path: path.to_owned() })?;
    let life = Life { schema: SCHEMA, epoch: now_micros(), identity: identity.clone() };
    let progress = Progress { start_block, cursor: None, next_position: 0, finalized: None };
    let transaction = db.begin_write()?;
    {
        transaction.open_table(META)?.insert(IDENTITY, encode(&life)?.as_slice())?;
        let mut marks = transaction.open_table(MARKS)?;
        marks.insert(WATERMARK, 0)?;
        marks.insert(IN_DOUBT, 0)?;
        transaction.open_table(REGISTRY)?;
        transaction.open_table(EVENT_LOG)?;
        transaction.open_table(BLOCKS)?;
        transaction.open_table(ACKNOWLEDGED)?;
        transaction.open_table(QUARANTINE)?;
        transaction.open_table(LATE_READS)?;
        transaction.open_table(STANDING)?;
        transaction.open_table(UNAUDITED)?;
        transaction.open_table(BLOCKED)?;
        write_progress(&transaction, &progress)?;
    }
    transaction.commit()?;
    Ok((life, progress))
}

pub(super) fn now_micros() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64)
}

/// (block, log index) → digest, in layouts 3 and 4.
pub(super) const DIGESTS: TableDefinition<(u64, u64), u64> = TableDefinition::new("digests");

/// Brings a file of an older layout to this one.
pub(super) fn migrate(db: &Database, life: &mut Life) -> Result<(), StoreError> {
    match life.schema {
        SCHEMA => return Ok(()),
        1..SCHEMA => {}
        newer => {
            return Err(StoreError::Damaged {
                what: format!("it has layout version {newer}, this program knows {SCHEMA}"),
            });
        }
    }
    let transaction = db.begin_write()?;
    transaction.open_table(LATE_READS)?;
    transaction.open_table(UNAUDITED)?;
    transaction.open_table(BLOCKED)?;
    match life.schema {
        ..3 => digest_log(&transaction)?,
        // Layout 3 made them otherwise: that the events stand is all that is known of them.
        3 => pack_digests(&transaction, |_| 0)?,
        4 => pack_digests(&transaction, |digest| digest)?,
        // Builds before the layout was raised wrote it, others of them did not know it.
        5.. => drop(transaction.open_table(MARKS)?.remove(IN_DOUBT)?),
    }
    life.schema = SCHEMA;
    transaction.open_table(META)?.insert(IDENTITY, encode(life)?.as_slice())?;
    transaction.commit()?;
    Ok(())
}

/// Puts the digests, a row for each until layout 4, into rows for each block.
fn pack_digests(transaction: &WriteTransaction, kept: impl Fn(u64) -> u64) -> Result<(), StoreError> {
    {
        let single = transaction.open_table(DIGESTS)?;
        let mut table = transaction.open_table(STANDING)?;
        let mut standing = Standing::of(&mut table);
        for row in single.iter()? {
            let (place, digest) = row?;
            standing.put(place.value(), kept(digest.value()))?;
        }
        standing.finish()?;
    }
    transaction.delete_table(DIGESTS)?;
    Ok(())
}

/// Notes which events of the log stand: what they say was not kept.
fn digest_log(transaction: &WriteTransaction) -> Result<(), StoreError> {
    let mut table = transaction.open_table(STANDING)?;
    let mut standing = Standing::of(&mut table);
    let log = transaction.open_table(EVENT_LOG)?;
    for entry in log::entries(&log, 0..u64::MAX)? {
        let (_, entry) = entry?;
        let key = (entry.block_number, entry.log_index);
        match entry.kind {
            Kind::Event => standing.put(key, 0)?,
            Kind::Retraction { .. } => standing.remove(key)?,
        }
    }
    standing.finish()?;
    let mut marks = transaction.open_table(MARKS)?;
    let pruned = marks.get(PRUNED_BLOCK)?.map(|mark| mark.value());
    marks.insert(DIGESTS_FROM, pruned.map_or(0, |block| block + 1))?;
    Ok(())
}

/// Whether what a store was made for, `stored`, is what is asked of it now, events that were added aside; an error names what
/// differs.
pub fn fits(path: &Path, stored: &Identity, asked: &Identity) -> Result<(), StoreError> {
    compare(path, stored, asked).map(drop)
}

/// What the store was made for against what is asked of it now. The signatures that were added; anything else that
/// differs is refused.
pub(super) fn compare(path: &Path, stored: &Identity, asked: &Identity) -> Result<Vec<String>, StoreError> {
    let mut differences = Vec::new();
    let mut differ = |what: &str, stored: String, asked: String| {
        if stored != asked {
            differences.push(format!("  {what}: the store has {stored}, the configuration {asked}"));
        }
    };
    differ("chain.id", stored.chain_id.to_string(), asked.chain_id.to_string());
    differ("factory.address", format!("{:#x}", stored.factory), format!("{:#x}", asked.factory));
    differ("sink", stored.sink.clone(), asked.sink.clone());
    differ("sink.ordering", stored.ordering.clone(), asked.ordering.clone());
    for lost in stored.signatures.iter().filter(|signature| !asked.signatures.contains(signature)) {
        differences.push(format!("  signatures: the store has `{lost}`, the configuration has not"));
    }
    let is_new = |signature: &&String| !stored.signatures.contains(signature);
    let added: Vec<String> = asked.signatures.iter().filter(is_new).cloned().collect();
    if differences.is_empty() {
        return Ok(added);
    }
    differences.extend(
        added.iter().map(|added| format!("  signatures: the configuration has `{added}`, the store has not")),
    );
    Err(StoreError::OtherIdentity {
        path: path.to_owned(),
        differences: differences.join("\n"),
        remedy: "Use the configuration this store was made with, or set storage.path to a new file: it will be read \
                 from chain.start_block and published whole.",
    })
}
