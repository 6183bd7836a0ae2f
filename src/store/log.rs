//! The rows of the event log: many entries in each, since a row costs more than the bytes in it.
//!
//! Constraints it keeps:
//!
//! 1. A row's key is the position of its first entry; the others follow it without a gap. What was taken out leaves an empty
//!    place behind, so positions stay what they are.
//! 2. Rows do not overlap, and none is without an entry. One that layout 3 wrote holds a single entry, and is read as such.

use std::ops::Range;

use redb::{AccessGuard, ReadableTable, Table};
use serde::Serialize;

use super::StoreError;
use super::schema::{Entry, VALUE_VERSION, compact, damaged, decode, decode_rest, encode_into};

/// Before the number of entries, their lengths and their bytes.
const PACKED_VERSION: u8 = 2;
/// The most entries in a row.
const ROW_ENTRIES: usize = 128;
/// The most bytes in a row of several entries: with its key it just fits into pages of 64 KiB, which redb gives out whole.
const ROW_BYTES: usize = (64 << 10) - 64;

type LogTable<'txn> = Table<'txn, u64, &'static [u8]>;

/// Appends entries to the log. What is appended is there once [`finish`](Self::finish) was called.
pub(super) struct Appender<'a, 'txn> {
    table: &'a mut LogTable<'txn>,
    first: u64,
    row: Row,
}

impl<'a, 'txn> Appender<'a, 'txn> {
    /// Appends at position `next`.
    pub fn new(table: &'a mut LogTable<'txn>, next: u64) -> Self {
        Self { table, first: next, row: Row::default() }
    }

    /// The position of the next entry.
    pub fn next_position(&self) -> u64 {
        self.first + self.row.lengths.len() as u64
    }

    /// Appends an [`Entry`], or what is encoded alike.
    pub fn append(&mut self, entry: &impl Serialize) -> Result<(), StoreError> {
        let before = self.row.bytes.len();
        encode_into(entry, &mut self.row.bytes, compact())?;
        let length = self.row.bytes.len() - before;
        if before > 0 && row_size(&self.row.lengths, &self.row.bytes) + 4 > ROW_BYTES {
            self.write(before)?;
        }
        self.row.lengths.push(length);
        match self.row.lengths.len() < ROW_ENTRIES {
            true => Ok(()),
            false => self.write(self.row.bytes.len()),
        }
    }

    /// Writes the entries gathered so far as a row, of which these are the bytes.
    fn write(&mut self, bytes: usize) -> Result<(), StoreError> {
        write_row(self.table, self.first, &self.row.lengths, &self.row.bytes[..bytes])?;
        self.first = self.next_position();
        self.row.lengths.clear();
        self.row.bytes.drain(..bytes);
        Ok(())
    }

    /// Writes what is not written yet. The position after the last entry.
    pub fn finish(mut self) -> Result<u64, StoreError> {
        self.write(self.row.bytes.len())?;
        Ok(self.first)
    }
}

/// The entries of a row, encoded; those taken out have length 0.
#[derive(Default)]
struct Row {
    lengths: Vec<usize>,
    bytes: Vec<u8>,
}

impl Row {
    /// Puts an entry into that place, after the ones before it.
    fn put(&mut self, place: u64, entry: &Encoded<'_>) -> Result<(), StoreError> {
        self.lengths.resize(place as usize, 0);
        let before = self.bytes.len();
        match entry {
            Encoded::Packed(bytes) => self.bytes.extend_from_slice(bytes),
            Encoded::Single(_) => encode_into(&entry.decode()?, &mut self.bytes, compact())?,
        }
        self.lengths.push(self.bytes.len() - before);
        Ok(())
    }
}

/// Writes a row, if there is something in it.
fn write_row(
    table: &mut LogTable<'_>,
    first: u64,
    lengths: &[usize],
    bytes: &[u8],
) -> Result<(), StoreError> {
    if bytes.is_empty() {
        return Ok(());
    }
    let mut value = table.insert_reserve(first, row_size(lengths, bytes))?;
    let value = value.as_mut();
    let (head, rest) = value.split_at_mut(2);
    let count = u8::try_from(lengths.len()).expect("no more than fit into a row");
    head.copy_from_slice(&[PACKED_VERSION, count]);
    let (places, content) = rest.split_at_mut(4 * lengths.len());
    for (place, length) in places.chunks_exact_mut(4).zip(lengths) {
        let length = u32::try_from(*length).expect("no entry is larger than a value may be");
        place.copy_from_slice(&length.to_le_bytes());
    }
    content.copy_from_slice(bytes);
    Ok(())
}

fn row_size(lengths: &[usize], bytes: &[u8]) -> usize {
    2 + 4 * lengths.len() + bytes.len()
}

/// The bytes of an entry, and which version of them.
enum Encoded<'a> {
    /// With its version byte: the only one of its row.
    Single(&'a [u8]),
    Packed(&'a [u8]),
}

impl Encoded<'_> {
    fn decode(&self) -> Result<Entry, StoreError> {
        match self {
            Self::Single(bytes) => decode("event_log", bytes),
            Self::Packed(bytes) => decode_rest("event_log", bytes, compact()),
        }
    }
}

/// The entries of a row by position, without those taken out.
fn unpack(first: u64, row: &[u8]) -> Result<Vec<(u64, Encoded<'_>)>, StoreError> {
    let cut = || damaged("event_log", format!("the row at {first} is cut off"));
    match row {
        [VALUE_VERSION, ..] => Ok(vec![(first, Encoded::Single(row))]),
        [PACKED_VERSION, count, rest @ ..] => {
            let (lengths, mut bytes) = rest.split_at_checked(4 * usize::from(*count)).ok_or_else(cut)?;
            let mut entries = Vec::with_capacity(usize::from(*count));
            for (position, length) in (first..).zip(lengths.chunks_exact(4)) {
                let length = u32::from_le_bytes(length.try_into().expect("four bytes"));
                let (entry, after) = bytes.split_at_checked(length as usize).ok_or_else(cut)?;
                bytes = after;
                if !entry.is_empty() {
                    entries.push((position, Encoded::Packed(entry)));
                }
            }
            match bytes.is_empty() {
                true => Ok(entries),
                false => Err(damaged("event_log", format!("the row at {first} is too long"))),
            }
        }
        [version, ..] => Err(damaged("event_log", format!("a row of version {version}"))),
        [] => Err(damaged("event_log", "an empty row".into())),
    }
}

/// The entries at these positions that are there, ascending; from both ends.
pub(super) fn entries(
    table: &impl ReadableTable<u64, &'static [u8]>,
    positions: Range<u64>,
) -> Result<impl DoubleEndedIterator<Item = Result<(u64, Entry), StoreError>>, StoreError> {
    let first_row = row_of(table, positions.start)?.unwrap_or(positions.start);
    let rows = table.range(first_row..positions.end.max(first_row))?;
    Ok(rows.flat_map(move |row| {
        let of_row = |(first, row): (AccessGuard<'_, u64>, AccessGuard<'_, &[u8]>)| {
            let mut entries = unpack(first.value(), row.value())?;
            entries.retain(|(position, _)| positions.contains(position));
            Ok(entries.into_iter().map(|(position, entry)| Ok((position, entry.decode()?))).collect())
        };
        row.map_err(StoreError::from).and_then(of_row).unwrap_or_else(|error| vec![Err(error)])
    }))
}

/// The row in which that position is, or would be.
fn row_of(table: &impl ReadableTable<u64, &'static [u8]>, position: u64) -> Result<Option<u64>, StoreError> {
    Ok(table.range(..=position)?.next_back().transpose()?.map(|(first, _)| first.value()))
}

/// Takes entries out.
pub(super) fn remove(table: &mut LogTable<'_>, positions: &mut [u64]) -> Result<(), StoreError> {
    positions.sort_unstable();
    let mut rest = &*positions;
    while let Some(&position) = rest.first() {
        let first = row_of(table, position)?.expect("an entry that is in the log");
        let row = table.remove(first)?.expect("just found").value().to_vec();
        let mut kept = Row::default();
        let entries = unpack(first, &row)?;
        let end = entries.last().map_or(first, |(last, _)| last + 1);
        let here = rest.iter().take_while(|position| **position < end).count().max(1);
        for (place, entry) in entries {
            if rest[..here].binary_search(&place).is_err() {
                kept.put(place - first, &entry)?;
            }
        }
        write_row(table, first, &kept.lengths, &kept.bytes)?;
        rest = &rest[here..];
    }
    Ok(())
}

/// Takes out everything below `end`.
pub(super) fn remove_below(table: &mut LogTable<'_>, end: u64) -> Result<(), StoreError> {
    if let Some(first) = row_of(table, end)?.filter(|first| *first < end) {
        let row = table.get(first)?.expect("just found").value().to_vec();
        let mut kept = Row::default();
        for (place, entry) in unpack(first, &row)?.into_iter().filter(|(place, _)| *place >= end) {
            kept.put(place - end, &entry)?;
        }
        write_row(table, end, &kept.lengths, &kept.bytes)?;
    }
    table.retain_in(..end, |_, _| false)?;
    Ok(())
}

/// How many entries there are.
pub(super) fn len(table: &impl ReadableTable<u64, &'static [u8]>) -> Result<u64, StoreError> {
    let mut count = 0;
    for row in table.iter()? {
        let (first, row) = row?;
        count += unpack(first.value(), row.value())?.len() as u64;
    }
    Ok(count)
}
