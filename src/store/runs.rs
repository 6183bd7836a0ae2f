//! Runs of numbers that stand together: positions acknowledged above the watermark, blocks not audited yet.

use std::collections::BTreeMap;
use std::ops::Range;

use redb::{ReadTransaction, ReadableTable, Table, WriteTransaction};

use super::StoreError;
use super::schema::{ACKNOWLEDGED, MARKS, WATERMARK};

/// Which entries are acknowledged, as of one moment: everything it says stays true.
#[derive(Debug)]
pub struct Acknowledged {
    watermark: u64,
    runs: BTreeMap<u64, u64>,
}

impl Acknowledged {
    /// Of these positions.
    pub(super) fn among(read: &ReadTransaction, positions: Range<u64>) -> Result<Self, StoreError> {
        let watermark = watermark(&read.open_table(MARKS)?)?;
        let table = read.open_table(ACKNOWLEDGED)?;
        let before = table.range(..positions.start)?.next_back();
        let runs = before.into_iter().chain(table.range(positions)?);
        let runs = runs.map(|run| run.map(|(start, end)| (start.value(), end.value())));
        Ok(Self { watermark, runs: runs.collect::<Result<_, _>>()? })
    }

    /// Whether the entry at that position was acknowledged by then.
    pub fn contains(&self, position: u64) -> bool {
        let run = self.runs.range(..=position).next_back();
        position < self.watermark || run.is_some_and(|(_, end)| position < *end)
    }

    /// The first position that may not be.
    pub fn watermark(&self) -> u64 {
        self.watermark
    }
}

/// Every entry below it is acknowledged.
pub(super) fn watermark(marks: &impl ReadableTable<&'static str, u64>) -> Result<u64, StoreError> {
    Ok(marks.get(WATERMARK)?.map_or(0, |mark| mark.value()))
}

/// Adds positions to the acknowledged runs and moves the watermark over the run that reaches it.
pub(super) fn acknowledge(transaction: &WriteTransaction, positions: &mut [u64]) -> Result<(), StoreError> {
    positions.sort_unstable();
    let mut runs = transaction.open_table(ACKNOWLEDGED)?;
    let mut marks = transaction.open_table(MARKS)?;
    let mut rest = &positions[..];
    while let Some(&start) = rest.first() {
        let length =
            rest.iter().zip(start..).take_while(|(position, expected)| *position == expected).count();
        add_run(&mut runs, start, start + length as u64)?;
        rest = &rest[length..];
    }
    let watermark = watermark(&marks)?;
    let reached = runs.get(watermark)?.map(|end| end.value());
    if let Some(end) = reached {
        runs.remove(watermark)?;
        marks.insert(WATERMARK, end)?;
    }
    Ok(())
}

/// The end of the run that a number is in.
pub(super) fn run_end(runs: &impl ReadableTable<u64, u64>, number: u64) -> Result<Option<u64>, StoreError> {
    let run = runs.range(..=number)?.next_back().transpose()?;
    Ok(run.map(|(_, end)| end.value()).filter(|end| number < *end))
}

/// Inserts `[start, end)`, merged with the runs it touches.
pub(super) fn add_run(
    runs: &mut Table<'_, u64, u64>,
    mut start: u64,
    mut end: u64,
) -> Result<(), StoreError> {
    let before =
        runs.range(..start)?.next_back().transpose()?.map(|(start, end)| (start.value(), end.value()));
    if let Some((earlier, touching)) = before
        && touching == start
    {
        start = earlier;
    }
    let after = runs.remove(end)?.map(|end| end.value());
    end = after.unwrap_or(end);
    runs.insert(start, end)?;
    Ok(())
}

/// Takes everything from `from` on out of the runs.
pub(super) fn cut_runs(runs: &mut Table<'_, u64, u64>, from: u64) -> Result<(), StoreError> {
    runs.retain_in(from.., |_, _| false)?;
    let last = runs.last()?.map(|(start, end)| (start.value(), end.value()));
    if let Some((start, end)) = last
        && end > from
    {
        runs.insert(start, from)?;
    }
    Ok(())
}

/// Takes `[from, end)`, which lies within one run or begins before it, out of the runs.
pub(super) fn take_run(runs: &mut Table<'_, u64, u64>, from: u64, end: u64) -> Result<(), StoreError> {
    let overlapping: Vec<(u64, u64)> = runs
        .range(..end)?
        .map(|run| run.map(|(start, end)| (start.value(), end.value())))
        .collect::<Result<_, _>>()?;
    for (start, run_end) in overlapping.into_iter().filter(|(_, run_end)| *run_end > from) {
        runs.remove(start)?;
        if start < from {
            runs.insert(start, from)?;
        }
        if run_end > end {
            runs.insert(end, run_end)?;
        }
    }
    Ok(())
}
