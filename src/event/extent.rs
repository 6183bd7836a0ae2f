//! How large the values of an encoding are, counted before anything is decoded: an encoding may name one place many
//! times, and a few kilobytes of it decode to gigabytes.

use std::iter::repeat_n;

use alloy::dyn_abi::DynSolType;

const WORD: usize = 32;
/// What values may take beyond what their data has, in bytes. A compiler's encoding never takes more.
const SLACK: usize = 1 << 20;

/// Whether the values in `data` are hardly larger than `data` itself. Of what does not decode it may say either.
pub(super) fn is_bounded(types: &[DynSolType], data: &[u8]) -> bool {
    fits(types, data, data.len().saturating_add(SLACK))
}

/// Whether the values in `data` take no more than that many bytes.
pub(super) fn fits(types: &[DynSolType], data: &[u8], bytes: usize) -> bool {
    Extent { data, left: bytes }.sequence(types.iter(), 0).is_some()
}

struct Extent<'a> {
    data: &'a [u8],
    left: usize,
}

impl Extent<'_> {
    fn spend(&mut self, bytes: usize) -> Option<()> {
        self.left = self.left.checked_sub(bytes)?;
        Some(())
    }

    /// Values whose heads stand one after the other from `start` on; their offsets count from there. `None`: too large.
    fn sequence<'t>(&mut self, types: impl Iterator<Item = &'t DynSolType>, start: usize) -> Option<()> {
        let mut head = start;
        for ty in types {
            // Nothing is left to decode.
            if head >= self.data.len() {
                break;
            }
            let words = if ty.is_dynamic() { 1 } else { ty.minimum_words().max(1) };
            self.spend(words.saturating_mul(WORD))?;
            self.tail(ty, start, head)?;
            head = head.saturating_add(words.saturating_mul(WORD));
        }
        Some(())
    }

    fn tail(&mut self, ty: &DynSolType, start: usize, head: usize) -> Option<()> {
        if !ty.is_dynamic() {
            return Some(());
        }
        let Some(place) = self.number(head).map(|offset| start.saturating_add(offset)) else {
            return Some(());
        };
        let inside = place.saturating_add(WORD);
        match ty {
            DynSolType::Bytes | DynSolType::String => {
                let length = self.number(place).filter(|length| *length <= self.data.len());
                self.spend(length.unwrap_or(0))
            }
            DynSolType::Array(item) => {
                self.sequence(repeat_n(&**item, self.number(place).unwrap_or(0)), inside)
            }
            DynSolType::FixedArray(item, count) => self.sequence(repeat_n(&**item, *count), place),
            DynSolType::Tuple(members) => self.sequence(members.iter(), place),
            DynSolType::Bool
            | DynSolType::Int(_)
            | DynSolType::Uint(_)
            | DynSolType::FixedBytes(_)
            | DynSolType::Address
            | DynSolType::Function => Some(()),
        }
    }

    /// The word there, if it is a length or an offset that can be.
    fn number(&self, at: usize) -> Option<usize> {
        let word = self.data.get(at..at.checked_add(WORD)?)?;
        let (high, low) = word.split_at(WORD - 8);
        let low = u64::from_be_bytes(low.try_into().expect("eight bytes"));
        high.iter().all(|byte| *byte == 0).then(|| usize::try_from(low).ok())?
    }
}
