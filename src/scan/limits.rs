//! How much to ask at once: limits learnt from refusals.

use std::num::NonZeroU64;

/// Blocks a range and addresses a filter. A cap a provider names holds for the session; a range that was too
/// dense grows back.
#[derive(Clone, Debug)]
pub struct Limits {
    ceiling: u64,
    range: u64,
    addresses: usize,
}

impl Limits {
    /// As configured: `rpc.max_range` blocks, `rpc.max_addresses` addresses.
    pub fn new(max_range: NonZeroU64, max_addresses: usize) -> Self {
        Self { ceiling: max_range.get(), range: max_range.get(), addresses: max_addresses.max(1) }
    }

    /// Blocks to ask for next, at least 1.
    pub fn range(&self) -> u64 {
        self.range
    }

    /// Addresses in one filter, at least 1.
    pub fn addresses(&self) -> usize {
        self.addresses
    }

    /// The provider bears at most `blocks`.
    pub fn cap(&mut self, blocks: NonZeroU64) {
        self.ceiling = self.ceiling.min(blocks.get());
        self.range = self.range.min(self.ceiling);
    }

    /// The provider suggests `blocks` for the range just refused.
    pub fn shrink(&mut self, blocks: u64) {
        self.range = blocks.clamp(1, self.ceiling);
    }

    /// A range of `blocks` was too much. `false`: it cannot be smaller.
    pub fn halve(&mut self, blocks: u64) -> bool {
        self.range = (blocks / 2).max(1);
        blocks > 1
    }

    /// A filter was too wide. `false`: it cannot be narrower.
    pub fn fewer_addresses(&mut self) -> bool {
        let before = self.addresses;
        self.addresses = (before / 2).max(1);
        before > 1
    }

    /// A full range was answered: try more next time.
    pub fn grow(&mut self, blocks: u64) {
        if blocks >= self.range {
            self.range = self.range.saturating_mul(2).min(self.ceiling);
        }
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
                    2 => { limits.fewer_addresses(); }
                    _ => limits.grow(limits.range()),
                }
                prop_assert!((1..=ceiling).contains(&limits.range()));
                prop_assert!(limits.addresses() >= 1);
            }
        }
    }
}
