//! Prefix codes of limited length: the shortest there are, by package-merge (Larmore and Hirschberg 1990).

/// The lengths of the best code of at most `limit` bits for symbols that occur so often, the most frequent first.
///
/// There are at most 2^`limit` of them.
pub fn lengths(counts: &[u64], limit: usize) -> Vec<usize> {
    let symbols = counts.len();
    let mut lengths = vec![0; symbols];
    if symbols < 2 {
        // A decoder has to go on.
        lengths.fill(1);
        return lengths;
    }
    // For each bit of a code: the counts of symbols, and of pairs of what was there before, the rarest first; and which
    // are symbols.
    let mut bits: Vec<Vec<bool>> = Vec::with_capacity(limit);
    let mut packages: Vec<u64> = Vec::new();
    for _ in 0..limit {
        let mut leaves = counts.iter().rev().copied().peekable();
        let mut others = packages.iter().copied().peekable();
        let mut merged = Vec::with_capacity(symbols + packages.len());
        let mut is_symbol = Vec::with_capacity(merged.capacity());
        while leaves.peek().is_some() || others.peek().is_some() {
            let takes_leaf = match (leaves.peek(), others.peek()) {
                (Some(leaf), Some(other)) => leaf <= other,
                (leaf, _) => leaf.is_some(),
            };
            merged.extend(if takes_leaf { leaves.next() } else { others.next() });
            is_symbol.push(takes_leaf);
        }
        packages = merged.chunks_exact(2).map(|pair| pair[0] + pair[1]).collect();
        bits.push(is_symbol);
    }
    // The cheapest of the last list; of each list those that the packages taken from the next one are made of.
    let mut taken = 2 * symbols - 2;
    for is_symbol in bits.iter().rev() {
        let leaves = is_symbol[..taken].iter().filter(|&&is_symbol| is_symbol).count();
        lengths[symbols - leaves..].iter_mut().for_each(|length| *length += 1);
        taken = 2 * (taken - leaves);
    }
    lengths
}

/// Codes of these lengths, none a beginning of another: their bits, the first one lowest.
pub fn codes(lengths: &[usize]) -> Vec<u32> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|&symbol| lengths[symbol]);
    let mut codes = vec![0; lengths.len()];
    let (mut next, mut last) = (0u32, 0);
    for symbol in order {
        let length = lengths[symbol];
        next <<= length - last;
        codes[symbol] = next.reverse_bits() >> (32 - length);
        (next, last) = (next + 1, length);
    }
    codes
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Fractions of the space of codes that they take, in units of 2^-16.
    fn space(lengths: &[usize]) -> u64 {
        lengths.iter().map(|&length| 1 << (16 - length)).sum()
    }

    #[test]
    fn short_codes_for_what_is_frequent() {
        assert_eq!(lengths(&[8, 4, 2, 1, 1], 10), [1, 2, 3, 4, 4]);
        assert_eq!(lengths(&[8, 4, 2, 1, 1], 3), [1, 3, 3, 3, 3]);
        assert_eq!(lengths(&[5, 5, 5, 5], 2), [2, 2, 2, 2]);
        assert_eq!(lengths(&[7], 10), [1]);
    }

    #[test]
    fn no_code_is_longer_and_none_begins_another() {
        for (symbols, limit) in [(2, 1), (3, 10), (100, 7), (1000, 10), (1024, 10)] {
            // Halves again and again: without a limit the rarest would have a code as long as the list.
            let counts: Vec<u64> = (0..symbols).map(|rank| 1 << (50 - rank.min(50))).collect();
            let lengths = lengths(&counts, limit);
            assert!(lengths.iter().all(|length| (1..=limit).contains(length)));
            assert!(lengths.is_sorted());
            assert_eq!(space(&lengths), 1 << 16, "{symbols} symbols");
            let codes = codes(&lengths);
            let mut owners = vec![0; 1 << limit];
            for (code, length) in codes.into_iter().zip(lengths) {
                (0..1 << (limit - length)).for_each(|rest: usize| owners[rest << length | code as usize] += 1);
            }
            assert!(owners.iter().all(|&count| count == 1));
        }
    }
}
