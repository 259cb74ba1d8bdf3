use std::collections::BTreeMap;

/// Rows put together into packs of nearly equal size. A pack stays a list of rows: attention never crosses from one to another.
#[derive(Debug, Clone, PartialEq)]
pub struct Packing {
    /// Indices of the rows of each pack; the emptiest pack is the last.
    pub packs: Vec<Vec<usize>>,
    /// Tokens in packs by tokens the packs could hold, the last pack aside (with one pack: that one).
    pub efficiency: f64,
}

/// Best-fit decreasing: the longest row first, each into the fullest pack with room for it. A pack holds `max_seq_len`
/// tokens, or as many as the longest row has, if that is more (rows are cut before).
pub fn pack(lengths: &[usize], max_seq_len: usize) -> Packing {
    let capacity = lengths.iter().copied().max().unwrap_or(0).max(max_seq_len);
    let mut order: Vec<(usize, usize)> = lengths.iter().copied().enumerate().collect();
    order.sort_by_key(|&(row, length)| (std::cmp::Reverse(length), row));

    let mut packs: Vec<(usize, Vec<usize>)> = Vec::new();
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
    let counted = packs.len().saturating_sub(1).max(1);
    let used: usize = packs.iter().take(counted).map(|(used, _)| used).sum();
    let efficiency = used as f64 / (counted * capacity).max(1) as f64;
    let in_order = |(_, mut rows): (usize, Vec<usize>)| {
        rows.sort_unstable();
        rows
    };
    Packing { packs: packs.into_iter().map(in_order).collect(), efficiency }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fullest_pack_with_room_takes_a_row() {
        // 6 and 5 open packs; 4 opens a third; 3 fits best with 5; 2 with 6.
        let packing = pack(&[6, 5, 4, 3, 2], 8);
        assert_eq!(packing.packs, [vec![0, 4], vec![1, 3], vec![2]]);
        assert_eq!(packing.efficiency, 1.0);
        let packing = pack(&[3, 3, 3], 4);
        assert_eq!(packing.packs, [vec![0], vec![1], vec![2]]);
        assert_eq!(packing.efficiency, 0.75);
    }

    #[test]
    fn every_row_is_packed_once_and_none_overflows() {
        let lengths: Vec<usize> = (0..2000).map(|row| 1 + (row * 7919) % 700).collect();
        let packing = pack(&lengths, 1024);
        let mut rows: Vec<usize> = packing.packs.concat();
        rows.sort_unstable();
        assert_eq!(rows, (0..2000).collect::<Vec<_>>());
        assert!(packing.packs.iter().all(|pack| pack.iter().map(|&row| lengths[row]).sum::<usize>() <= 1024));
        assert!(packing.efficiency > 0.99, "{}", packing.efficiency);
    }

    #[test]
    fn corner_cases() {
        assert!(pack(&[], 8).packs.is_empty());
        assert_eq!(pack(&[5, 3], 0).packs, [vec![0], vec![1]]);
        assert_eq!(pack(&[3, 9], 8).packs, [vec![1], vec![0]]);
    }
}
