//! How much to ask at once, and in which way: limits learnt from refusals and from what answers cost.

use std::num::NonZeroU64;

use crate::config::Filter;

/// Answers at the largest size that is borne before a size that was refused is tried again; doubled each time it is
/// refused then, up to [`LONGEST`].
const PATIENCE: u32 = 16;
const LONGEST: u32 = 1024;
/// Logs that one answer should have at most, so that what is under way fits into memory.
const LOGS_AT_ONCE: u64 = 10_000;
/// So many logs of contracts that are not ours cost as much as a call.
const LOGS_WORTH_A_CALL: f64 = 1_000.0;
/// The other way must be so much cheaper before it is gone.
const WORTH_A_CHANGE: f64 = 0.7;
/// What was measured counts less with each range that is read the other way: in the end it is tried again.
const FORGET: f64 = 0.99;

/// How escrows' logs are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// By the addresses, so many in a filter.
    Addresses,
    /// By the topics alone; the registry picks out what is ours.
    Everyone,
}

/// Blocks a range and addresses a filter. A cap a provider names holds for the session; what was merely too much grows
/// back, first to just below what was refused, and after a while beyond.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Blocks of a range, by addresses and for everyone.
    range: Size,
    everyone: Size,
    addresses: Size,
    filter: Filter,
    /// A filter without addresses was refused: address chunks for so many answers, and then another try. It may have been
    /// for another reason.
    everyone_refused: u32,
    everyone_patience: u32,
    /// Logs a block of contracts that are not ours, as measured.
    foreign: f64,
    way: Way,
}

impl Limits {
    /// As configured: `rpc.max_range` blocks, `rpc.max_addresses` addresses, `rpc.filter`.
    pub fn new(max_range: NonZeroU64, max_addresses: usize, filter: Filter) -> Self {
        let range = Size::new(max_range.get());
        let addresses = Size::new(max_addresses.max(1) as u64);
        let (everyone, way) = (range.clone(), Way::Addresses);
        let (everyone_refused, everyone_patience) = (0, PATIENCE);
        Self { range, everyone, addresses, filter, everyone_refused, everyone_patience, foreign: 0.0, way }
    }

    /// The cheaper way to ask for `count` addresses, in calls a block; the one in use, unless the other is clearly
    /// cheaper.
    pub fn way(&mut self, count: usize) -> Way {
        self.way = match self.filter {
            Filter::Topics if self.everyone_refused == 0 => Way::Everyone,
            Filter::Addresses | Filter::Topics => Way::Addresses,
            Filter::Auto if self.everyone_refused > 0 || count <= self.addresses() => Way::Addresses,
            Filter::Auto => {
                let range = self.everyone.now as f64;
                let everyone = (1.0 + self.foreign * range / LOGS_WORTH_A_CALL) / range;
                let addresses = count.div_ceil(self.addresses()) as f64 / self.range.now as f64;
                match self.way {
                    Way::Addresses if everyone < addresses * WORTH_A_CHANGE => Way::Everyone,
                    Way::Everyone if addresses < everyone * WORTH_A_CHANGE => Way::Addresses,
                    as_before => as_before,
                }
            }
        };
        self.way
    }

    /// The same for blocks asked for one by one.
    pub fn way_by_hash(&self, count: usize) -> Way {
        let chunks = count.div_ceil(self.addresses()) as f64;
        match self.filter {
            _ if self.everyone_refused > 0 => Way::Addresses,
            Filter::Topics => Way::Everyone,
            Filter::Auto if chunks > 1.0 && chunks > 1.0 + self.foreign / LOGS_WORTH_A_CALL => Way::Everyone,
            Filter::Auto | Filter::Addresses => Way::Addresses,
        }
    }

    /// Blocks to ask for next, at least 1.
    pub fn range(&self, way: Way) -> u64 {
        match way {
            Way::Addresses => self.range.now,
            Way::Everyone => self.everyone.now,
        }
    }

    /// Blocks that can be asked for without addresses; 0: none.
    pub fn everyone(&self) -> u64 {
        let never = self.everyone_refused > 0 || self.filter == Filter::Addresses;
        if never { 0 } else { self.everyone.now }
    }

    fn size(&mut self, way: Way) -> &mut Size {
        match way {
            Way::Addresses => &mut self.range,
            Way::Everyone => &mut self.everyone,
        }
    }

    /// Addresses in one filter, at least 1.
    pub fn addresses(&self) -> usize {
        self.addresses.now as usize
    }

    /// The provider bears at most `blocks`, whatever is asked about them.
    pub fn cap(&mut self, blocks: NonZeroU64) {
        self.range.cap(blocks.get());
        self.everyone.cap(blocks.get());
    }

    /// The provider suggests `blocks` for the range just refused.
    pub fn shrink(&mut self, way: Way, blocks: u64) {
        let size = self.size(way);
        size.now = blocks.clamp(1, size.cap);
    }

    /// A range of `blocks` was too much. `false`: it cannot be smaller.
    pub fn halve(&mut self, way: Way, blocks: u64) -> bool {
        self.size(way).refuse(blocks)
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

    /// The provider does not take filters without addresses, or did not this time.
    pub fn refuse_everyone(&mut self) {
        self.everyone_refused = self.everyone_patience;
        self.everyone_patience = (self.everyone_patience * 2).min(LONGEST);
    }

    /// `blocks` with `addresses` in the largest filter were answered with `logs`: try more next time, if that was all that
    /// is asked for now, and not more than fits into memory.
    pub fn grow(&mut self, way: Way, blocks: u64, addresses: usize, logs: usize) {
        let size = self.size(way);
        size.answered(blocks);
        if logs as u64 > LOGS_AT_ONCE {
            size.now = size.now.min((blocks * LOGS_AT_ONCE / logs as u64).max(1));
        }
        match way {
            Way::Addresses => {
                self.addresses.answered(addresses as u64);
                self.foreign *= FORGET;
                self.everyone_refused = self.everyone_refused.saturating_sub(1);
            }
            Way::Everyone => {}
        }
    }

    /// So many logs of others came with `blocks` that were asked for without addresses.
    pub fn saw_others(&mut self, blocks: u64, logs: usize) {
        let seen = logs as f64 / blocks as f64;
        self.foreign = self.foreign.midpoint(seen);
    }
}

/// A number of things asked for at once.
#[derive(Clone, Debug)]
pub(crate) struct Size {
    /// Never more.
    cap: u64,
    /// To ask for next, at least 1.
    pub now: u64,
    /// The smallest that was refused lately.
    refused: Option<u64>,
    /// Answers in a row at the largest size below that.
    borne: u32,
    patience: u32,
}

impl Size {
    pub fn new(cap: u64) -> Self {
        Self { cap, now: cap, refused: None, borne: 0, patience: PATIENCE }
    }

    /// More are never borne.
    pub fn cap(&mut self, most: u64) {
        self.cap = self.cap.min(most.max(1));
        self.now = self.now.min(self.cap);
    }

    /// So many were too many. `false`: there cannot be fewer.
    pub fn refuse(&mut self, asked: u64) -> bool {
        self.refused = Some(asked);
        self.borne = 0;
        self.now = (asked / 2).max(1);
        asked > 1
    }

    /// So many were borne.
    pub fn answered(&mut self, asked: u64) {
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
        Limits::new(NonZeroU64::new(range).unwrap(), addresses, Filter::Auto)
    }

    /// Asks so many times of a provider that bears so many blocks and does not say so; how often it refused.
    fn refusals(limits: &mut Limits, bears: u64, requests: usize) -> usize {
        let mut refused = 0;
        for _ in 0..requests {
            let asked = limits.range(Way::Addresses);
            if asked > bears {
                assert!(limits.halve(Way::Addresses, asked));
                refused += 1;
            } else {
                limits.grow(Way::Addresses, asked, 1, 0);
            }
        }
        refused
    }

    #[test]
    fn a_cap_holds_and_a_dense_range_grows_back_to_it() {
        let mut limits = limits(2000, 1000);
        limits.cap(NonZeroU64::new(800).unwrap());
        assert_eq!(limits.range(Way::Addresses), 800);
        assert!(limits.halve(Way::Addresses, 800));
        assert_eq!(limits.range(Way::Addresses), 400);
        refusals(&mut limits, u64::MAX, 40);
        assert_eq!(limits.range(Way::Addresses), 800, "a cap is never exceeded");
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
        limits.grow(Way::Addresses, 1, 2, 0);
        assert_eq!(limits.addresses(), 3);
    }

    #[test]
    fn a_short_last_range_does_not_count_as_borne() {
        let mut limits = limits(2000, 1000);
        limits.halve(Way::Addresses, 2000);
        limits.grow(Way::Addresses, 3, 1, 0);
        assert_eq!(limits.range(Way::Addresses), 1000);
    }

    #[test]
    fn the_cheaper_way_is_taken_and_kept_until_the_other_is_clearly_cheaper() {
        let mut limits = limits(1000, 10);
        assert_eq!(limits.way(10), Way::Addresses, "one filter is enough");
        assert_eq!(limits.way(50), Way::Everyone, "five calls or one");
        limits.saw_others(1000, 6000);
        assert_eq!(limits.way(50), Way::Everyone, "three logs a block, by and by: as much as four calls");
        (0..9).for_each(|_| limits.saw_others(1000, 10_000));
        assert_eq!(limits.way(50), Way::Addresses, "ten a block: as much as eleven calls");
        assert_eq!(limits.way(5000), Way::Everyone, "or five hundred");
        limits.halve(Way::Everyone, 4);
        assert_eq!(limits.way(1000), Way::Addresses, "two blocks at a time cost more calls");
        assert_eq!(limits.way_by_hash(1000), Way::Everyone);
        limits.refuse_everyone();
        assert_eq!((limits.way(100_000), limits.way_by_hash(1000)), (Way::Addresses, Way::Addresses));
        let told = |filter| Limits::new(NonZeroU64::new(1000).unwrap(), 10, filter).way(1000);
        assert_eq!((told(Filter::Addresses), told(Filter::Topics)), (Way::Addresses, Way::Everyone));
    }

    #[test]
    fn that_nobody_takes_filters_without_addresses_is_tried_again_less_and_less() {
        let mut limits = limits(1000, 10);
        let mut refused = Vec::new();
        for answer in 0..10_000 {
            if limits.way_by_hash(1000) == Way::Everyone {
                limits.refuse_everyone();
                refused.push(answer);
            }
            limits.grow(Way::Addresses, 1, 10, 0);
        }
        assert!((4..=16).contains(&refused.len()), "{refused:?}");
    }

    #[test]
    fn dense_blocks_are_asked_for_in_smaller_ranges() {
        let mut limits = limits(2000, 1000);
        limits.grow(Way::Addresses, 2000, 1, 100_000);
        assert_eq!(limits.range(Way::Addresses), 200);
        limits.grow(Way::Addresses, 200, 1, 4000);
        assert_eq!(limits.range(Way::Addresses), 400);
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
                    1 => { let asked = limits.range(Way::Addresses); prop_assert_eq!(limits.halve(Way::Addresses, asked), asked > 1); }
                    2 => { limits.cap_addresses(5); }
                    _ => limits.grow(Way::Addresses, limits.range(Way::Addresses), limits.addresses(), 0),
                }
                prop_assert!((1..=ceiling).contains(&limits.range(Way::Addresses)));
                prop_assert!(limits.addresses() >= 1);
            }
        }
    }
}
