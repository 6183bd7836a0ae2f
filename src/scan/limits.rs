//! How much to ask at once: limits learnt from refusals.

use std::num::NonZeroU64;

/// Answers at the largest size that is borne before a size that was refused is tried again; doubled each time it is
/// refused then, up to [`LONGEST`].
const PATIENCE: u32 = 16;
const LONGEST: u32 = 1024;

/// Blocks a range and addresses a filter. A cap a provider names holds for the session; what was merely too much grows
/// back, first to just below what was refused, and after a while beyond.
#[derive(Clone, Debug)]
pub struct Limits {
    range: Size,
    addresses: Size,
    /// A filter without addresses was refused: address chunks from then on.
    by_address_only: bool,
}

impl Limits {
    /// As configured: `rpc.max_range` blocks, `rpc.max_addresses` addresses.
    pub fn new(max_range: NonZeroU64, max_addresses: usize) -> Self {
        let addresses = Size::new(max_addresses.max(1) as u64);
        Self { range: Size::new(max_range.get()), addresses, by_address_only: false }
    }

    /// Blocks to ask for next, at least 1.
    pub fn range(&self) -> u64 {
        self.range.now
    }

    /// Addresses in one filter, at least 1.
    pub fn addresses(&self) -> usize {
        self.addresses.now as usize
    }

    /// Whether one filter without addresses is better than chunks for `count` addresses.
    pub fn topics_only(&self, count: usize) -> bool {
        count > self.addresses() && !self.by_address_only
    }

    /// The provider bears at most `blocks`.
    pub fn cap(&mut self, blocks: NonZeroU64) {
        self.range.cap(blocks.get());
    }

    /// The provider suggests `blocks` for the range just refused.
    pub fn shrink(&mut self, blocks: u64) {
        self.range.now = blocks.clamp(1, self.range.cap);
    }

    /// A range of `blocks` was too much. `false`: it cannot be smaller.
    pub fn halve(&mut self, blocks: u64) -> bool {
        self.range.refuse(blocks)
    }

    /// The provider takes fewer addresses in one filter than the `asked`. `false`: there cannot be fewer.
    pub fn cap_addresses(&mut self, asked: usize) -> bool {
        let fewer = self.fewer_addresses(asked);
        self.addresses.cap(self.addresses.now);
        fewer
    }

    /// Fewer addresses in one filter than the `asked` may help, for now. `false`: there cannot be fewer.
    pub fn fewer_addresses(&mut self, asked: usize) -> bool {
        // One block was too much: it was not for the blocks that more of them were refused.
        self.range.refused = None;
        self.addresses.refuse(self.addresses.now.min(asked as u64))
    }

    /// The provider does not take filters without addresses.
    pub fn refuse_topics_only(&mut self) {
        self.by_address_only = true;
    }

    /// `blocks` with `addresses` in the largest filter were answered: try more next time, if that was all that is asked
    /// for now.
    pub fn grow(&mut self, blocks: u64, addresses: usize) {
        self.range.answered(blocks);
        self.addresses.answered(addresses as u64);
    }
}

/// A number of things asked for at once.
#[derive(Clone, Debug)]
struct Size {
    /// Never more.
    cap: u64,
    now: u64,
    /// The smallest that was refused lately.
    refused: Option<u64>,
    /// Answers in a row at the largest size below that.
    borne: u32,
    patience: u32,
}

impl Size {
    fn new(cap: u64) -> Self {
        Self { cap, now: cap, refused: None, borne: 0, patience: PATIENCE }
    }

    fn cap(&mut self, most: u64) {
        self.cap = self.cap.min(most.max(1));
        self.now = self.now.min(self.cap);
    }

    fn refuse(&mut self, asked: u64) -> bool {
        self.refused = Some(asked);
        self.borne = 0;
        self.now = (asked / 2).max(1);
        asked > 1
    }

    fn answered(&mut self, asked: u64) {
        if asked < self.now {
            return;
        }
        let Some(refused) = self.refused else {
            self.now = self.now.saturating_mul(2).min(self.cap);
            return;
        };
        // Half the way to what was refused, at most the double.
        let closer = self.now + (refused.saturating_sub(self.now) / 2).min(self.now);
        if closer > self.now && closer < refused {
            self.now = closer.min(self.cap);
            return;
        }
        self.borne += 1;
        if self.borne >= self.patience {
            self.refused = None;
            self.patience = (self.patience * 2).min(LONGEST);
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

    /// Asks so many times of a provider that bears so many blocks and does not say so; how often it refused.
    fn refusals(limits: &mut Limits, bears: u64, requests: usize) -> usize {
        let mut refused = 0;
        for _ in 0..requests {
            let asked = limits.range();
            if asked > bears {
                assert!(limits.halve(asked));
                refused += 1;
            } else {
                limits.grow(asked, 1);
            }
        }
        refused
    }

    #[test]
    fn a_cap_holds_and_a_dense_range_grows_back_to_it() {
        let mut limits = limits(2000, 1000);
        limits.cap(NonZeroU64::new(800).unwrap());
        assert_eq!(limits.range(), 800);
        assert!(limits.halve(800));
        assert_eq!(limits.range(), 400);
        refusals(&mut limits, u64::MAX, 40);
        assert_eq!(limits.range(), 800, "a cap is never exceeded");
    }

    #[test]
    fn a_limit_nobody_names_is_found_and_seldom_run_into_again() {
        for bears in [1, 2, 3, 7, 10, 128, 999, 1999] {
            let mut limits = limits(2000, 1000);
            let finding = refusals(&mut limits, bears, 60);
            assert!(finding <= 24, "{bears}: {finding} refusals to find it");
            let again = refusals(&mut limits, bears, 2000);
            assert!(again <= 60, "{bears}: {again} of 2000 refused");
        }
    }

    #[test]
    fn few_addresses_are_asked_for_while_many_are_refused_and_ranges_stay_wide() {
        let mut limits = limits(1, 1000);
        let asked = |limits: &Limits| limits.addresses().min(11);
        while asked(&limits) > 3 {
            let count = asked(&limits);
            assert!(limits.fewer_addresses(count));
        }
        assert_eq!(limits.addresses(), 2, "halved from what was asked, not from the thousand");
        limits.grow(1, 2);
        assert_eq!(limits.addresses(), 3);
    }

    #[test]
    fn a_short_last_range_does_not_count_as_borne() {
        let mut limits = limits(2000, 1000);
        limits.halve(2000);
        limits.grow(3, 1);
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
                    2 => { limits.cap_addresses(5); }
                    _ => limits.grow(limits.range(), limits.addresses()),
                }
                prop_assert!((1..=ceiling).contains(&limits.range()));
                prop_assert!(limits.addresses() >= 1);
            }
        }
    }
}
