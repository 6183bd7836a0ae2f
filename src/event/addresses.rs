//! Lists of contracts, as they stand in filters.

use std::sync::{Arc, OnceLock};

use alloy::primitives::Address;
use serde::{Serialize, Serializer};
use serde_json::value::RawValue;

/// Contracts to ask for, shared, with their text: the same list goes out with each new block.
#[derive(Clone, Debug, Default)]
pub struct Addresses(Arc<Listed>);

#[derive(Debug, Default)]
struct Listed {
    list: Vec<Address>,
    text: OnceLock<Box<RawValue>>,
}

impl Addresses {
    /// No address: a filter for any contract.
    pub fn any() -> Self {
        Self::default()
    }

    /// The addresses.
    pub fn list(&self) -> &[Address] {
        &self.0.list
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.0.list.len()
    }

    /// Whether it asks for any contract.
    pub fn is_empty(&self) -> bool {
        self.0.list.is_empty()
    }

    /// Whether both are the same list in memory.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Changes the list; whoever has it keeps the one before.
    pub fn change(&mut self, change: impl FnOnce(&mut Vec<Address>)) {
        match Arc::get_mut(&mut self.0) {
            Some(listed) => {
                listed.text = OnceLock::new();
                change(&mut listed.list);
            }
            None => {
                let mut list = self.0.list.clone();
                change(&mut list);
                *self = list.into();
            }
        }
    }
}

impl From<Vec<Address>> for Addresses {
    fn from(list: Vec<Address>) -> Self {
        Self(Arc::new(Listed { list, text: OnceLock::new() }))
    }
}

impl Serialize for Addresses {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let text = || serde_json::value::to_raw_value(&self.0.list).expect("addresses are plain JSON");
        self.0.text.get_or_init(text).serialize(serializer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_follows_the_list_and_who_has_it_keeps_the_one_before() {
        let (one, two) = (Address::repeat_byte(1), Address::repeat_byte(2));
        let text = |addresses: &Addresses| serde_json::to_string(addresses).unwrap();
        let mut addresses = Addresses::from(vec![one]);
        assert_eq!(text(&addresses), format!("[\"{one:#x}\"]"));
        addresses.change(|list| list.push(two));
        assert_eq!(text(&addresses), format!("[\"{one:#x}\",\"{two:#x}\"]"));
        let kept = addresses.clone();
        addresses.change(|list| list.clear());
        assert_eq!((kept.len(), addresses.len(), kept.is(&addresses)), (2, 0, false));
        assert_eq!(text(&addresses), "[]");
    }
}
