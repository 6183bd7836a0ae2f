//! The registry in memory: which addresses are watched.

use std::collections::HashMap;
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
