//! How much to ask at once: limits learnt from refusals.

use std::num::NonZeroU64;

/// Blocks a range and addresses a filter. A cap a provider names holds for the session; a range that was too
/// dense grows back.
#[derive(Clone, Debug)]
pub struct Limits {
    range_cap: u64,
    range: u64,
    address_cap: usize,
    addresses: usize,
    /// A filter without addresses was refused: address chunks from then on.
    by_address_only: bool,
}

impl Limits {
    /// As configured: `rpc.max_range` blocks, `rpc.max_addresses` addresses.
    pub fn new(max_range: NonZeroU64, max_addresses: usize) -> Self {
        let (range, addresses) = (max_range.get(), max_addresses.max(1));
        Self { range_cap: range, range, address_cap: addresses, addresses, by_address_only: false }
    }

    /// Blocks to ask for next, at least 1.
    pub fn range(&self) -> u64 {
        self.range
    }

    /// Addresses in one filter, at least 1.
    pub fn addresses(&self) -> usize {
        self.addresses
    }

    /// Whether one filter without addresses is better than chunks for `count` addresses.
    pub fn topics_only(&self, count: usize) -> bool {
        count > self.addresses && !self.by_address_only
    }

    /// The provider bears at most `blocks`.
    pub fn cap(&mut self, blocks: NonZeroU64) {
        self.range_cap = self.range_cap.min(blocks.get());
        self.range = self.range.min(self.range_cap);
    }

    /// The provider suggests `blocks` for the range just refused.
    pub fn shrink(&mut self, blocks: u64) {
        self.range = blocks.clamp(1, self.range_cap);
    }

    /// A range of `blocks` was too much. `false`: it cannot be smaller.
    pub fn halve(&mut self, blocks: u64) -> bool {
        self.range = (blocks / 2).max(1);
        blocks > 1
    }

    /// The provider takes fewer addresses than were asked for. `false`: there cannot be fewer.
    pub fn cap_addresses(&mut self) -> bool {
        let fewer = self.fewer_addresses();
        self.address_cap = self.addresses;
        fewer
    }

    /// Fewer addresses may help, for now. `false`: there cannot be fewer.
    pub fn fewer_addresses(&mut self) -> bool {
        let before = self.addresses;
        self.addresses = (before / 2).max(1);
        before > 1
    }

    /// The provider does not take filters without addresses.
    pub fn refuse_topics_only(&mut self) {
        self.by_address_only = true;
    }

    /// `blocks` were answered: try more next time, if that was all that is asked for now.
    pub fn grow(&mut self, blocks: u64) {
        if blocks >= self.range {
            self.range = self.range.saturating_mul(2).min(self.range_cap);
        }
        self.addresses = self.addresses.saturating_mul(2).min(self.address_cap);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn limits(range: u64, addresses: usize) -> Limits {
        Limits::new(NonZeroU64::new(range).unwrap(), addresses)
    }

    #[test]
    fn a_cap_holds_and_a_dense_range_grows_back_to_it() {
        let mut limits = limits(2000, 1000);
        limits.cap(NonZeroU64::new(800).unwrap());
        assert_eq!(limits.range(), 800);
        assert!(limits.halve(800));
        assert_eq!(limits.range(), 400);
        limits.grow(400);
        limits.grow(800);
        limits.grow(800);
        assert_eq!(limits.range(), 800, "a cap is never exceeded");
    }

    #[test]
    fn a_short_last_range_does_not_count_as_borne() {
        let mut limits = limits(2000, 1000);
        limits.halve(2000);
        limits.grow(3);
        assert_eq!(limits.range(), 1000);
    }

    proptest! {
        #[test]
        fn whatever_is_refused_a_range_stays_between_one_block_and_the_cap(
            max in 1u64..10_000, steps in prop::collection::vec((0u8..4, 1u64..20_000), 0..60),
        ) {
            let mut limits = limits(max, 7);
            let mut ceiling = max;
            for (kind, blocks) in steps {
                match kind {
                    0 => { limits.cap(NonZeroU64::new(blocks).unwrap()); ceiling = ceiling.min(blocks); }
                    1 => { let asked = limits.range(); prop_assert_eq!(limits.halve(asked), asked > 1); }
                    2 => { limits.cap_addresses(); }
                    _ => limits.grow(limits.range()),
                }
                prop_assert!((1..=ceiling).contains(&limits.range()));
                prop_assert!(limits.addresses() >= 1);
            }
        }
    }
}
