//! How outputs are cut: into ranges whose scales are at hand together, and these into blocks, each of which
//! one thread computes. Neither is cut inside a unit, some panels of outputs (`scales::unit`).

use std::ops::Range;

/// Outputs of a block of decoded weights, at most.
pub(super) const BLOCK_OUTPUTS: usize = 288;

/// Parts that can be handed to threads one by one.
pub(super) trait Parts: ExactSizeIterator<Item = Range<usize>> + Send {}
impl<I: ExactSizeIterator<Item = Range<usize>> + Send> Parts for I {}

/// Cut into ranges of `most` outputs at most, if that is a unit or more, all of nearly one size.
pub(super) fn ranges(outputs: usize, unit: usize, most: usize) -> impl Parts {
    let units = outputs.div_ceil(unit);
    cut(0..outputs, unit, units.div_ceil((most / unit).max(1)))
}

/// Cut into blocks of [`BLOCK_OUTPUTS`] at most, as many for each thread and all of nearly one size.
pub(super) fn blocks(range: Range<usize>, unit: usize, threads: usize) -> impl Parts {
    let units = range.len().div_ceil(unit);
    let rounds = units.div_ceil(BLOCK_OUTPUTS / unit * threads);
    cut(range, unit, (rounds * threads).min(units))
}

/// Cut into `count` parts, larger ones first, whose sizes differ by a unit at most; only the last one may
/// end between units.
fn cut(range: Range<usize>, unit: usize, count: usize) -> impl Parts {
    let units = range.len().div_ceil(unit);
    let (each, more) = (units / count.max(1), units % count.max(1));
    (0..count).map(move |part| {
        let at = |part: usize| range.end.min(range.start + (part * each + part.min(more)) * unit);
        at(part)..at(part + 1)
    })
}

#[cfg(test)]
mod tests {
    use super::{BLOCK_OUTPUTS, blocks, ranges};
    use crate::gemm::tile::PANEL;
    use proptest::prelude::*;

    /// Parts follow each other from `range.start` to `range.end`; their units differ by one at most.
    fn check(
        parts: impl ExactSizeIterator<Item = std::ops::Range<usize>>,
        range: std::ops::Range<usize>,
        unit: usize,
        most: usize,
    ) -> Result<(), TestCaseError> {
        let parts: Vec<_> = parts.collect();
        let mut at = range.start;
        for part in &parts {
            prop_assert!(part.start == at && part.end > at && part.len() <= most, "{parts:?}");
            prop_assert!((part.start - range.start).is_multiple_of(unit), "{parts:?}");
            at = part.end;
        }
        prop_assert_eq!(at, range.end);
        let units = || parts.iter().map(|part| part.len().div_ceil(unit));
        prop_assert!(units().max().unwrap_or(0) <= units().min().unwrap_or(0) + 1, "{parts:?}");
        Ok(())
    }

    proptest! {
        #[test]
        fn parts_cover_everything_once_and_are_even(
            outputs in 0..20_000_usize,
            threads in 1..20_usize,
            unit in prop_oneof![Just(PANEL), Just(2 * PANEL)],
            most in 1..20_000_usize,
        ) {
            check(ranges(outputs, unit, most), 0..outputs, unit, most.max(unit))?;
            for range in ranges(outputs, unit, most) {
                let parts = blocks(range.clone(), unit, threads);
                let (count, units) = (parts.len(), range.len().div_ceil(unit));
                prop_assert!(count.is_multiple_of(threads) || count == units, "{count} for {threads}");
                check(parts, range, unit, BLOCK_OUTPUTS)?;
            }
        }
    }
}
