//! The registry in memory: which addresses are watched, and which will be once their history is read.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use alloy::primitives::Address;
use redb::ReadableTable;

use super::StoreError;
use super::schema::{Escrow, EscrowState, decode};

/// Every escrow watched, an address once.
#[derive(Debug, Default)]
pub struct Registry {
    /// Place of each in `watched`.
    places: HashMap<Address, usize>,
    watched: Arc<Vec<Address>>,
    /// Escrows that are joining: the late read that reads them, and the first block of theirs that counts.
    joining: BTreeMap<Address, (u64, u64)>,
    /// Watched escrows whose earlier announcement was found late: its block, and the first block that was read.
    uncovered: BTreeMap<Address, (u64, u64)>,
    /// Escrows that were imported: the first block of theirs that counts, which no announcement says.
    imported: BTreeMap<Address, u64>,
}

impl Registry {
    pub(super) fn load(
        table: &impl ReadableTable<&'static [u8; 20], &'static [u8]>,
    ) -> Result<Self, StoreError> {
        let mut registry = Self::default();
        for row in table.iter()? {
            let (address, value) = row?;
            registry
                .set(Address::from(*address.value()), Some(&decode::<Escrow>("registry", value.value())?));
        }
        Ok(registry)
    }

    /// Makes memory agree with a row that was committed.
    pub(super) fn set(&mut self, address: Address, row: Option<&Escrow>) {
        match row.filter(|escrow| escrow.is_imported()) {
            Some(escrow) => self.imported.insert(address, escrow.covered_from),
            None => self.imported.remove(&address),
        };
        match row.filter(|it| it.state == EscrowState::Active && it.announced.0 < it.covered_from) {
            Some(escrow) => self.uncovered.insert(address, (escrow.announced.0, escrow.covered_from)),
            None => self.uncovered.remove(&address),
        };
        match row.map(|escrow| (escrow.state, escrow.covered_from)) {
            Some((EscrowState::Joining { late_read }, from)) => {
                self.joining.insert(address, (late_read, from));
            }
            Some((EscrowState::Active | EscrowState::Withdrawn, _)) | None => {
                self.joining.remove(&address);
            }
        }
        let watch = row.is_some_and(|escrow| escrow.state == EscrowState::Active);
        match (watch, self.places.get(&address).copied()) {
            (true, None) => {
                self.places.insert(address, self.watched.len());
                Arc::make_mut(&mut self.watched).push(address);
            }
            (false, Some(place)) => {
                let watched = Arc::make_mut(&mut self.watched);
                watched.swap_remove(place);
                if let Some(moved) = watched.get(place) {
                    self.places.insert(*moved, place);
                }
                self.places.remove(&address);
            }
            (true, Some(_)) | (false, None) => {}
        }
    }

    /// Whether the address is watched.
    pub fn contains(&self, address: &Address) -> bool {
        self.places.contains_key(address)
    }

    /// Whether a log of this address in this block is an event of a watched escrow.
    pub fn counts(&self, address: &Address, block: u64) -> bool {
        self.contains(address) && self.imported.get(address).is_none_or(|from| block >= *from)
    }

    /// Whether the address is registered, and its history is still being read.
    pub fn is_joining(&self, address: &Address) -> bool {
        self.joining.contains_key(address)
    }

    /// The escrows whose history that late read fetches, each with the first block of its that counts.
    pub fn joining(&self, late_read: u64) -> impl Iterator<Item = (Address, u64)> {
        let of_it = self.joining.iter().filter(move |(_, (read, _))| *read == late_read);
        of_it.map(|(address, (_, from))| (*address, *from))
    }

    /// Watched escrows with blocks that a late read has yet to read: the first of these, and the first one after them.
    pub fn uncovered(&self) -> impl Iterator<Item = (Address, (u64, u64))> {
        self.uncovered.iter().map(|(address, blocks)| (*address, *blocks))
    }

    /// How many are watched.
    pub fn len(&self) -> usize {
        self.watched.len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.watched.is_empty()
    }

    /// All that are watched, shared: as they were when asked.
    pub fn watched(&self) -> Arc<Vec<Address>> {
        Arc::clone(&self.watched)
    }
}
