//! The rows of an attention, as its kernels read them.

use candle_core::Tensor;

/// The rows of an attention, on the host and on the device.
#[derive(Clone, Debug)]
pub struct AttentionRows {
    /// `[rows, 4]` u32 on the device: first query, queries, first key, keys of each row.
    pub table: Tensor,
    /// `[n, 2]` u32 on the device: row and first query of every [`AttentionRows::BLOCK`] queries, those that see most keys first.
    pub query_blocks: Tensor,
    /// `[n, 2]` u32 on the device: row and first key of every [`AttentionRows::BLOCK`] keys, those that most queries see first.
    pub key_blocks: Tensor,
    /// Rows.
    pub rows: usize,
    /// Queries of the longest row.
    pub max_q_len: usize,
    /// Keys of the longest row.
    pub max_kv_len: usize,
    /// Whether queries and keys are the same tokens: no cache.
    pub packed: bool,
}

impl AttentionRows {
    /// Queries or keys of a block.
    pub const BLOCK: usize = 128;

    /// Of each row its first query, queries, first key and keys; of the keys it has at least as many. `upload` takes numbers to the device.
    ///
    /// # Errors
    /// Those of `upload`.
    pub fn new<E: From<candle_core::Error>>(
        rows: &[[usize; 4]],
        upload: impl FnOnce(&[u32]) -> Result<Tensor, E>,
    ) -> Result<Self, E> {
        // the keys that a block's last query sees, and the queries that see its first key
        let query_blocks = blocks(
            rows,
            |&[_, queries, _, _]| queries,
            |&[_, queries, _, keys], first| keys - queries + queries.min(first + Self::BLOCK),
        );
        let key_blocks = blocks(
            rows,
            |&[_, _, _, keys]| keys,
            |&[_, queries, _, keys], first| queries - first.saturating_sub(keys - queries),
        );
        let (table, queries) = (4 * rows.len(), query_blocks.len());
        let numbers: Vec<u32> =
            rows.iter().flatten().map(|&n| n as u32).chain(query_blocks).chain(key_blocks).collect();
        let all = upload(&numbers)?;
        let pairs = |start: usize, len: usize| all.narrow(0, start, len)?.reshape((len / 2, 2));
        Ok(Self {
            table: all.narrow(0, 0, table)?.reshape((rows.len(), 4))?,
            query_blocks: pairs(table, queries)?,
            key_blocks: pairs(table + queries, numbers.len() - table - queries)?,
            rows: rows.len(),
            max_q_len: rows.iter().map(|row| row[1]).max().unwrap_or(0),
            max_kv_len: rows.iter().map(|row| row[3]).max().unwrap_or(0),
            packed: rows.iter().all(|row| row[0] == row[2] && row[1] == row[3]),
        })
    }
}

/// Row and start of every block of each row's `len`, of those with most `work` first.
fn blocks(
    rows: &[[usize; 4]],
    len: impl Fn(&[usize; 4]) -> usize,
    work: impl Fn(&[usize; 4], usize) -> usize,
) -> Vec<u32> {
    let all = rows.iter().enumerate().flat_map(|(index, row)| {
        let starts = (0..len(row)).step_by(AttentionRows::BLOCK);
        starts.map(|first| (work(row, first), index, first)).collect::<Vec<_>>()
    });
    let mut all: Vec<_> = all.collect();
    all.sort_by_key(|&(work, ..)| std::cmp::Reverse(work));
    all.into_iter().flat_map(|(_, index, first)| [index as u32, first as u32]).collect()
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn blocks_with_most_work_come_first() {
        let table = [[0, 300, 0, 300], [300, 2, 300, 2], [302, 0, 302, 9], [302, 130, 400, 500]];
        let upload = |numbers: &[u32]| Tensor::from_slice(numbers, numbers.len(), &Device::Cpu);
        let rows = AttentionRows::new::<candle_core::Error>(&table, upload).unwrap();
        let of = |t: &Tensor| t.to_vec2::<u32>().unwrap();
        assert_eq!(of(&rows.table), table.map(|row| row.map(|n| n as u32).to_vec()));
        // keys seen: 500, 498, 300, 256, 128, 2
        assert_eq!(of(&rows.query_blocks), [[3, 128], [3, 0], [0, 256], [0, 128], [0, 0], [1, 0]]);
        // queries that see a block's first key: 300, 172, 130 three times, 116, 44, 2, none
        let keys = [[0, 0], [0, 128], [3, 0], [3, 128], [3, 256], [3, 384], [0, 256], [1, 0], [2, 0]];
        assert_eq!(of(&rows.key_blocks), keys);
        assert_eq!((rows.rows, rows.max_q_len, rows.max_kv_len, rows.packed), (4, 300, 500, false));
    }
}
