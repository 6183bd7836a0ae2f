//! Logical copies: all rows of all tables as bytes, and a store made of such bytes.
//!
//! A copy of the file itself, made while it is written, cannot be used: redb's pages move.

use std::hash::{DefaultHasher, Hasher};
use std::ops::ControlFlow;
use std::path::Path;
use std::{fs, io};

use redb::{
    Database, DatabaseError, Key, ReadTransaction, ReadableDatabase, ReadableTable, StorageError,
    TableDefinition, TableHandle, Value, WriteTransaction,
};

use super::opening::{DIGESTS, builder, now_micros, open_error, put_in_free_place, read_life, unfinished};
use super::schema::{
    ACKNOWLEDGED, BLOCKED, BLOCKS, EVENT_LOG, IDENTITY, Identity, LATE_READS, MARKS, META, QUARANTINE,
    REGISTRY, RESTORED_FROM, STANDING, UNAUDITED, damaged, encode,
};
use super::{Store, StoreError, unbroken};
use crate::event::BlockRef;

/// How large a piece is, in bytes: at least, on average beyond that, and at most if rows are smaller.
const LEAST: usize = 1 << 20;
const BEYOND: usize = 3 << 20;
const MOST: usize = 16 << 20;

/// Rows of one table that follow each other, as bytes: of each row the lengths of key and value, four bytes little-endian
/// each, then key and value as redb keeps them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The table.
    pub table: &'static str,
    /// How many rows.
    pub rows: u64,
    /// Their bytes.
    pub bytes: Vec<u8>,
}

/// When a store was made of a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Restored {
    /// The highest number of a copy there was.
    pub number: u64,
    /// The latest life of a store that any of them was of.
    pub after: Option<u64>,
}

/// What a copy is a copy of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Moment {
    /// The layout of tables and values.
    pub schema: u32,
    /// What the store was made for.
    pub identity: Identity,
    /// The life of the store.
    pub epoch: u64,
    /// The last block accepted.
    pub cursor: Option<BlockRef>,
    /// How many entries there ever were.
    pub entries: u64,
}

/// A table, whatever its types.
trait Rows {
    fn title(&'static self) -> &'static str;

    /// Hands all rows over, until told to stop.
    fn read(&self, from: &ReadTransaction, each: &mut EachRow<'_>) -> Result<ControlFlow<()>, StoreError>;

    /// Puts the rows of a piece in; how many.
    fn write(&'static self, to: &WriteTransaction, bytes: &[u8]) -> Result<u64, StoreError>;
}

type EachRow<'a> = dyn FnMut(&[u8], &[u8]) -> ControlFlow<()> + 'a;

impl<K: Key + 'static, V: Value + 'static> Rows for TableDefinition<'static, K, V> {
    fn title(&'static self) -> &'static str {
        self.name()
    }

    fn read(&self, from: &ReadTransaction, each: &mut EachRow<'_>) -> Result<ControlFlow<()>, StoreError> {
        for row in from.open_table(*self)?.iter()? {
            let (key, value) = row?;
            if each(K::as_bytes(&key.value()).as_ref(), V::as_bytes(&value.value()).as_ref()).is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    fn write(&'static self, to: &WriteTransaction, mut bytes: &[u8]) -> Result<u64, StoreError> {
        let mut table = to.open_table(*self)?;
        let mut rows = 0;
        while !bytes.is_empty() {
            let cut_off = || damaged(self.title(), "rows that are cut off".into());
            let (key, value, rest) = split_row(bytes).ok_or_else(cut_off)?;
            let fits = |width: Option<usize>, bytes: &[u8]| width.is_none_or(|width| width == bytes.len());
            if !fits(K::fixed_width(), key) || !fits(V::fixed_width(), value) {
                return Err(damaged(self.title(), "rows of another shape".into()));
            }
            table.insert(K::from_bytes(key), V::from_bytes(value))?;
            rows += 1;
            bytes = rest;
        }
        Ok(rows)
    }
}

/// All of them: a test compares the list with what is in a file.
static TABLES: [&(dyn Rows + Sync); 11] = [
    &META,
    &MARKS,
    &REGISTRY,
    &EVENT_LOG,
    &BLOCKS,
    &ACKNOWLEDGED,
    &QUARANTINE,
    &LATE_READS,
    &STANDING,
    &UNAUDITED,
    &BLOCKED,
];

/// Those of earlier layouts, which a copy may have: opening the store brings them to this one.
static EARLIER: [&(dyn Rows + Sync); 1] = [&DIGESTS];

fn push_row(bytes: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    for part in [key, value] {
        let length = u32::try_from(part.len()).expect("no key or value is larger than redb takes");
        bytes.extend_from_slice(&length.to_le_bytes());
    }
    bytes.extend_from_slice(key);
    bytes.extend_from_slice(value);
}

fn split_row(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let (key, rest) = bytes.split_first_chunk()?;
    let (value, rest) = rest.split_first_chunk()?;
    let (key, rest) = rest.split_at_checked(u32::from_le_bytes(*key) as usize)?;
    let (value, rest) = rest.split_at_checked(u32::from_le_bytes(*value) as usize)?;
    Some((key, value, rest))
}

/// Whether a piece ends with this row. Decided by its key, so that it is decided alike each time; the larger the row, the
/// more likely.
fn ends(size: usize, key: &[u8], value: &[u8]) -> bool {
    let mut hasher = DefaultHasher::new();
    hasher.write(key);
    let chance = (u64::MAX / BEYOND as u64).saturating_mul((key.len() + value.len()) as u64);
    size >= MOST || size >= LEAST && hasher.finish() < chance
}

impl Store {
    /// If it was made of a snapshot: the highest number there was of one.
    pub fn restored_from(&self) -> Result<Option<u64>, StoreError> {
        let read = self.db.begin_read()?;
        Ok(read.open_table(MARKS)?.get(RESTORED_FROM)?.map(|mark| mark.value()))
    }

    /// Hands all rows to `put`, as they stand at one moment, while everything goes on. `None`: `put` said to stop.
    ///
    /// Where a piece ends depends on the row it ends with: a change of some rows leaves the pieces without them as they
    /// were, so that copies made one after another have most pieces in common.
    pub fn copy(&self, mut put: impl FnMut(Piece) -> ControlFlow<()>) -> Result<Option<Moment>, StoreError> {
        let read = self.db.begin_read()?;
        for table in TABLES {
            let empty = || Piece { table: table.title(), rows: 0, bytes: Vec::new() };
            let mut piece = empty();
            let mut each = |key: &[u8], value: &[u8]| {
                piece.rows += 1;
                push_row(&mut piece.bytes, key, value);
                match ends(piece.bytes.len(), key, value) {
                    true => put(std::mem::replace(&mut piece, empty())),
                    false => ControlFlow::Continue(()),
                }
            };
            if table.read(&read, &mut each)?.is_break() || piece.rows > 0 && put(piece).is_break() {
                return Ok(None);
            }
        }
        let (life, progress) = read_life(&read)?.expect("an open store has a life");
        Ok(Some(Moment {
            schema: life.schema,
            identity: life.identity,
            epoch: life.epoch,
            cursor: progress.cursor.map(|(number, hash)| BlockRef { number, hash }),
            entries: progress.next_position,
        }))
    }
}

/// Makes a store at `path`, where there is none, of the pieces of a copy: in another life, since what was published after the
/// copy was made is not in it. It is there whole or not at all. `pieces` gives table and bytes, or breaks off with an error;
/// `at` says later when that was.
pub fn restore<E: From<StoreError>>(
    path: &Path,
    at: Restored,
    pieces: impl Iterator<Item = Result<(String, Vec<u8>), E>>,
) -> Result<(), E> {
    let db = begin(path)?;
    for piece in pieces {
        let (name, bytes) = piece?;
        unbroken(path, || load(&db, &name, &bytes))?;
    }
    unbroken(path, || begin_anew(&db, at))?;
    drop(db);
    Ok(put_in_free_place(path)?)
}

fn begin(path: &Path) -> Result<Database, StoreError> {
    let unfinished = unfinished(path);
    match fs::remove_file(&unfinished) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(open_error(path, DatabaseError::Storage(StorageError::Io(error))))
        }
        // What was there is what a crash left.
        Ok(()) | Err(_) => builder().create(unfinished).map_err(|error| open_error(path, error)),
    }
}

fn load(db: &Database, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
    let table = TABLES.into_iter().chain(EARLIER).find(|table| table.title() == name);
    let table = table.ok_or_else(|| damaged(name, "this program does not know it".into()))?;
    let transaction = db.begin_write()?;
    table.write(&transaction, bytes)?;
    transaction.commit()?;
    Ok(())
}

fn begin_anew(db: &Database, at: Restored) -> Result<(), StoreError> {
    let life = read_life(&db.begin_read()?)?;
    let (mut life, _) = life.ok_or_else(|| damaged("meta", "the copy has none".into()))?;
    life.epoch = now_micros().max(life.epoch.max(at.after.unwrap_or(0)) + 1);
    let transaction = db.begin_write()?;
    for table in TABLES {
        table.write(&transaction, &[])?;
    }
    transaction.open_table(META)?.insert(IDENTITY, encode(&life)?.as_slice())?;
    transaction.open_table(MARKS)?.insert(RESTORED_FROM, at.number)?;
    transaction.commit()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::event::BlockRange;
    use crate::store::schema::{Life, PROGRESS};
    use crate::store::standing::standing_in;
    use crate::store::tests::memory;
    use crate::store::{Added, lock};

    #[test]
    fn every_table_of_a_store_is_copied() {
        let store = memory();
        let read = store.db.begin_read().unwrap();
        let there: BTreeSet<String> =
            read.list_tables().unwrap().map(|table| table.name().to_owned()).collect();
        let copied: BTreeSet<String> = TABLES.into_iter().map(|table| table.title().to_owned()).collect();
        assert_eq!(copied, there);
    }

    #[test]
    fn a_copy_of_the_fourth_layout_goes_on_in_this_one() {
        let store = memory();
        let events = [((3, 1), 7), ((3, 4), 8), ((5, 0), 9)];
        let mut pieces = Vec::new();
        let moment = store.copy(|piece| {
            if !["meta", "standing"].contains(&piece.table) {
                pieces.push((piece.table.to_owned(), piece.bytes));
            }
            ControlFlow::Continue(())
        });
        let Moment { identity, epoch, .. } = moment.unwrap().unwrap();
        let mut meta = Vec::new();
        let life = Life { schema: 4, epoch, identity: identity.clone() };
        push_row(&mut meta, IDENTITY.as_bytes(), &encode(&life).unwrap());
        let progress = lock(&store.progress).clone();
        push_row(&mut meta, PROGRESS.as_bytes(), &encode(&progress).unwrap());
        pieces.push(("meta".to_owned(), meta));
        let mut digests = Vec::new();
        for (place, digest) in events {
            let (key, value) = (<(u64, u64)>::as_bytes(&place), u64::as_bytes(&digest));
            push_row(&mut digests, key.as_ref(), value.as_ref());
        }
        pieces.push(("digests".to_owned(), digests));

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("relayer.redb");
        let pieces = pieces.into_iter().map(Ok::<_, StoreError>);
        restore(&path, Restored { number: 1, after: None }, pieces).unwrap();
        let store = Store::open(&path, identity, None, Added::Leave).unwrap();
        let read = store.db.begin_read().unwrap();
        let standing = read.open_table(STANDING).unwrap();
        assert_eq!(standing_in(&standing, BlockRange::new(0, 9).unwrap()).unwrap(), events);
        assert!(read.list_tables().unwrap().all(|table| table.name() != "digests"));
    }

    #[test]
    fn rows_that_are_cut_off_or_have_another_shape_are_damage() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("relayer.redb");
        let mut row = Vec::new();
        push_row(&mut row, &7u64.to_le_bytes(), b"a value");
        let with = |table: &str, bytes: &[u8]| -> Result<(), StoreError> {
            restore(
                &path,
                Restored { number: 1, after: None },
                [Ok((table.to_owned(), bytes.to_vec()))].into_iter(),
            )
        };
        for length in 1..row.len() {
            let damaged = with("event_log", &row[..length]);
            assert!(matches!(damaged, Err(StoreError::Damaged { .. })), "{length} bytes: {damaged:?}");
        }
        for table in ["registry", "marks", "digests", "acknowledged", "no_such_table"] {
            assert!(matches!(with(table, &row), Err(StoreError::Damaged { .. })), "{table}");
        }
        assert!(matches!(with("event_log", &row), Err(StoreError::Damaged { .. })), "it has no identity");
        assert!(!path.exists());
    }
}
