use std::collections::BTreeMap;

/// Rows that are packed together at most: packs stay as full, and memory does not grow with the dataset.
const TOGETHER: usize = 1 << 17;

/// Rows put together into packs of nearly equal size. A pack stays a list of rows: attention never crosses from one to another.
#[derive(Debug, Clone, PartialEq)]
pub struct Packing {
    /// The rows of all packs, one pack behind another.
    rows: Vec<u32>,
    /// Where each pack ends in `rows`.
    ends: Vec<u32>,
    /// Tokens in packs by tokens the packs could hold, the emptiest pack aside (with one pack: that one).
    pub efficiency: f64,
}

impl Packing {
    /// Number of packs.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The rows of a pack, in order.
    pub fn pack(&self, pack: usize) -> &[u32] {
        let end = |pack: usize| self.ends.get(pack).map_or(0, |&end| end as usize);
        let start = pack.checked_sub(1).map_or(0, end);
        self.rows.get(start..end(pack)).unwrap_or_default()
    }
}

/// Best-fit decreasing: the longest row first, each into the fullest pack with room for it. A pack holds `max_seq_len`
/// tokens, or as many as the longest row has, if that is more (rows are cut before).
pub fn pack(lengths: &[u32], max_seq_len: usize) -> Packing {
    let capacity = (lengths.iter().copied().max().unwrap_or(0) as usize).max(max_seq_len);
    let mut packing = Packing { rows: Vec::with_capacity(lengths.len()), ends: Vec::new(), efficiency: 1.0 };
    let mut emptiest = usize::MAX;
    for (part, lengths) in lengths.chunks(TOGETHER).enumerate() {
        for (used, mut rows) in best_fit(lengths, capacity) {
            emptiest = emptiest.min(used);
            rows.sort_unstable();
            packing.rows.extend(rows.into_iter().map(|row| row + (part * TOGETHER) as u32));
            packing.ends.push(packing.rows.len() as u32);
        }
    }
    let total: u64 = lengths.iter().map(|&length| u64::from(length)).sum();
    let (used, counted) = match packing.len() {
        0 | 1 => (total, 1),
        packs => (total - emptiest as u64, packs - 1),
    };
    packing.efficiency = used as f64 / (counted * capacity).max(1) as f64;
    packing
}

/// Packs as their tokens and rows, the fullest first.
fn best_fit(lengths: &[u32], capacity: usize) -> Vec<(usize, Vec<u32>)> {
    let mut order: Vec<(u32, usize)> = (0..).zip(lengths.iter().map(|&length| length as usize)).collect();
    order.sort_by_key(|&(row, length)| (std::cmp::Reverse(length), row));
    let mut packs: Vec<(usize, Vec<u32>)> = Vec::new();
    // Packs by the room they have left.
    let mut open: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for (row, length) in order {
        let fitting = open.range_mut(length..).next().and_then(|(&room, packs)| Some((room, packs.pop()?)));
        let (pack, left) = match fitting {
            Some((room, pack)) => {
                if open.get(&room).is_some_and(Vec::is_empty) {
                    open.remove(&room);
                }
                (pack, room - length)
            }
            None => {
                packs.push((0, Vec::new()));
                (packs.len() - 1, capacity.saturating_sub(length))
            }
        };
        if let Some((used, rows)) = packs.get_mut(pack) {
            *used += length;
            rows.push(row);
        }
        open.entry(left).or_default().push(pack);
    }
    packs.sort_by_key(|(used, _)| std::cmp::Reverse(*used));
    packs
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packs(lengths: &[u32], max_seq_len: usize) -> Vec<Vec<u32>> {
        let packing = pack(lengths, max_seq_len);
        (0..packing.len()).map(|at| packing.pack(at).to_vec()).collect()
    }

    #[test]
    fn the_fullest_pack_with_room_takes_a_row() {
        // 6 and 5 open packs; 4 opens a third; 3 fits best with 5; 2 with 6.
        assert_eq!(packs(&[6, 5, 4, 3, 2], 8), [vec![0, 4], vec![1, 3], vec![2]]);
        assert_eq!(pack(&[6, 5, 4, 3, 2], 8).efficiency, 1.0);
        assert_eq!(packs(&[3, 3, 3], 4), [vec![0], vec![1], vec![2]]);
        assert_eq!(pack(&[3, 3, 3], 4).efficiency, 0.75);
    }

    #[test]
    fn every_row_is_packed_once_and_none_overflows() {
        let lengths: Vec<u32> = (0..TOGETHER as u32 + 2000).map(|row| 1 + (row * 7919) % 700).collect();
        let packing = pack(&lengths, 1024);
        let mut rows = packing.rows.clone();
        rows.sort_unstable();
        assert!(rows.into_iter().eq(0..lengths.len() as u32));
        for at in 0..packing.len() {
            assert!(packing.pack(at).iter().map(|&row| lengths[row as usize]).sum::<u32>() <= 1024);
        }
        assert!(packing.efficiency > 0.99, "{}", packing.efficiency);
    }

    #[test]
    fn corner_cases() {
        assert!(pack(&[], 8).is_empty());
        assert_eq!(packs(&[5, 3], 0), [vec![0], vec![1]]);
        assert_eq!(packs(&[3, 9], 8), [vec![1], vec![0]]);
    }
}
