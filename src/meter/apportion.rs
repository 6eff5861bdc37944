//! Dividing a whole number without losing or making any: the largest remainder method (Hamilton).

use std::cmp::Reverse;

/// Divides `total` in proportion to `weights`. The parts sum to `total`, and each is within one of
/// its exact share. What rounding leaves goes to the largest remainders, and among equal ones to
/// the smallest `tie`, then to the first. Weights that are all zero count as equal; nobody gets
/// anything where there is nobody.
pub(super) fn apportion<K: Ord>(total: u64, weights: &[(u64, K)]) -> Vec<u64> {
    let sum: u128 = weights.iter().map(|(weight, _)| u128::from(*weight)).sum();
    let (sum, equal) = if sum == 0 { (weights.len() as u128, true) } else { (sum, false) };
    let mut parts = Vec::with_capacity(weights.len());
    let mut remainders = Vec::with_capacity(weights.len());
    for (index, (weight, tie)) in weights.iter().enumerate() {
        let weight = if equal { 1 } else { *weight };
        let (part, remainder) = exact_share(total, weight, sum);
        parts.push(part);
        remainders.push((Reverse(remainder), tie, index));
    }
    // Fewer than one whole is left for each part, so this many are in range.
    let left = total.saturating_sub(parts.iter().sum()) as usize;
    if left > 0 && left < remainders.len() {
        remainders.select_nth_unstable(left);
    }
    for (_, _, index) in remainders.iter().take(left) {
        parts[*index] += 1;
    }
    parts
}

/// `total * weight / sum` and what remains. In 64 bits where that is enough, as it is at every
/// step: a division of 128 bits takes several times as long.
fn exact_share(total: u64, weight: u64, sum: u128) -> (u64, u128) {
    match (total.checked_mul(weight), u64::try_from(sum)) {
        (Some(exact), Ok(sum)) => (exact / sum, (exact % sum).into()),
        _ => {
            let exact = u128::from(total) * u128::from(weight);
            ((exact / sum) as u64, exact % sum)
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check(total: u64, weights: &[u64], expected: &[u64]) {
        let keyed: Vec<_> = weights.iter().map(|weight| (*weight, ())).collect();
        assert_eq!(apportion(total, &keyed), expected, "{total} over {weights:?}");
    }

    #[test]
    fn the_largest_remainders_get_what_is_left() {
        check(10, &[1, 1, 1], &[4, 3, 3]);
        check(10, &[0, 1, 2], &[0, 3, 7]);
        check(1, &[1, 5, 3], &[0, 1, 0]);
        check(7, &[0, 0], &[4, 3]);
        check(0, &[3, 4], &[0, 0]);
        check(9, &[], &[]);
        check(u64::MAX, &[u64::MAX, u64::MAX], &[u64::MAX / 2 + 1, u64::MAX / 2]);
    }

    proptest! {
        #[test]
        fn parts_sum_to_the_whole_and_are_within_one(
            total: u64,
            weights in prop::collection::vec((0u64..1 << 50, 0u8..3), 1..40),
        ) {
            let parts = apportion(total, &weights);
            prop_assert_eq!(parts.iter().map(|part| u128::from(*part)).sum::<u128>(), total.into());
            let sum: u128 = weights.iter().map(|(weight, _)| u128::from(*weight)).sum();
            for (part, (weight, _)) in parts.iter().zip(&weights).filter(|_| sum > 0) {
                let floor = u128::from(total) * u128::from(*weight) / sum;
                prop_assert!((floor..=floor + 1).contains(&u128::from(*part)));
                prop_assert!(*weight > 0 || *part == 0, "nothing for nothing");
            }
        }

        #[test]
        fn the_order_of_parts_does_not_matter(
            total: u64,
            weights in prop::collection::vec(0u64..50, 1..20),
            turn: prop::sample::Index,
        ) {
            let mut keyed: Vec<_> = weights.iter().copied().zip(0u32..).collect();
            let straight = apportion(total, &keyed);
            let turn = turn.index(keyed.len());
            keyed.rotate_left(turn);
            let mut turned = apportion(total, &keyed);
            turned.rotate_right(turn);
            prop_assert_eq!(straight, turned);
        }
    }
}
