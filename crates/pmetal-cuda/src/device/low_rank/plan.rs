//! How the kernels of `low_rank.cu` cut their work, as data.

/// Members of a launch: what the text's `MEMBERS` says.
pub(super) const MEMBERS: usize = 8;
pub(super) const THREADS: usize = 256;
/// Rows of a tile.
pub(super) const ROWS: usize = 32;
/// Rows of `b` that are copied at a time.
pub(super) const B_ROWS: usize = 128;
/// What begins the tiles on a multiple of 1024 bytes.
const ALIGNMENT: usize = 1024;
/// More tiles than this in shared memory at a time were no faster.
const MOST_STAGES: usize = 10;
/// Rows that a block's start and end take as long as.
const LOST_ROWS: usize = 64;

/// What the text has the host define.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Plan {
    /// Ranks of each member.
    pub(super) ranks: usize,
    /// Columns of `dy` of a block.
    pub(super) columns: usize,
    /// Tiles in shared memory at a time.
    stages: usize,
}

/// What a plan depends on of the device.
#[derive(Clone, Copy, Debug)]
pub(super) struct Chip {
    /// Its multiprocessors.
    pub(super) processors: usize,
    /// Bytes of shared memory that a block may have.
    pub(super) shared: usize,
}

impl Plan {
    /// The plan for members of `(outputs, ranks)`; none where their ranks are not the same, the chip has too little shared memory, or a product
    /// for each gradient was measured faster, which it is from 48 ranks on.
    pub(super) fn of(chip: Chip, members: &[(usize, usize)]) -> Option<Self> {
        let ranks = [16, 32].into_iter().find(|&size| members.iter().all(|&(_, ranks)| ranks == size))?;
        let outputs: usize = members.iter().map(|(outputs, _)| outputs).sum();
        // parts of du weigh against columns of dy, parts of dB against rows: blocks of a small dy are about square
        let columns = if outputs >= 3072 { 512 } else { 256 };
        let plan = Self { ranks, columns, stages: 0 };
        // the barriers of the tiles lie beside them
        let room = chip.shared.checked_sub(plan.bytes() + 1024)?;
        let stages = (room / plan.stage_bytes()).min(MOST_STAGES);
        (stages >= 2).then_some(Self { stages, ..plan })
    }

    /// What the compiler is told.
    pub(super) fn options(&self, dtype: &str) -> Vec<String> {
        let numbers = [("RANKS", self.ranks), ("COLUMNS", self.columns), ("STAGES", self.stages)];
        let numbers = numbers.into_iter().map(|(name, value)| format!("-D{name}={value}"));
        [format!("-D{dtype}")].into_iter().chain(numbers).collect()
    }

    /// Shared memory of a block: its tiles, before them the parts of two tiles of `du`, and before those a block's part of `b`.
    pub(super) fn bytes(&self) -> usize {
        let parts = 2 * THREADS / 32 * ROWS * self.ranks * 4;
        ALIGNMENT + parts.max(2 * self.columns * self.ranks) + self.stages * self.stage_bytes()
    }

    fn stage_bytes(&self) -> usize {
        2 * ROWS * (self.columns + self.ranks)
    }
}

/// Rows cut among blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cut {
    /// Rows of a block.
    pub(super) rows: usize,
    /// Blocks that share out all rows.
    pub(super) splits: usize,
}

impl Cut {
    /// The cut of `tokens` rows that is done first when each multiprocessor has one block at a time, and `slices` blocks have the same rows.
    pub(super) fn of(chip: Chip, tokens: usize, slices: usize) -> Self {
        let cut = |splits: usize| {
            let rows = tokens.div_ceil(splits).next_multiple_of(ROWS);
            Self { rows, splits: tokens.div_ceil(rows) }
        };
        let cost = |cut: &Self| (slices * cut.splits).div_ceil(chip.processors) * (cut.rows + LOST_ROWS);
        // still finer cuts gain nothing
        let most = (4 * chip.processors / slices.max(1)).clamp(1, tokens.div_ceil(ROWS).max(1));
        (1..=most).map(cut).min_by_key(cost).unwrap_or(Self { rows: ROWS, splits: 1 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const H200: Chip = Chip { processors: 132, shared: 232_448 };
    const RTX: Chip = Chip { processors: 170, shared: 101_376 };

    #[test]
    fn cuts_hold_all_rows_and_fill_the_chip() {
        for tokens in [1, 31, 512, 1000, 8192, 65_536] {
            for slices in [1, 2, 8, 12, 56, 400] {
                let cut = Cut::of(H200, tokens, slices);
                assert!(cut.rows.is_multiple_of(ROWS) && cut.rows * cut.splits >= tokens, "{tokens} {slices} {cut:?}");
                assert!(cut.rows * (cut.splits - 1) < tokens, "{tokens} {slices} {cut:?}: a block without rows");
            }
        }
        assert_eq!(Cut::of(H200, 8192, 8), Cut { rows: 512, splits: 16 });
        assert_eq!(Cut::of(H200, 8192, 12), Cut { rows: 768, splits: 11 });
    }

    #[test]
    fn plans_are_for_members_of_the_same_few_ranks() {
        let plan = |chip, members: &[_]| Plan::of(chip, members).map(|plan| (plan.ranks, plan.columns));
        assert_eq!(plan(H200, &[(2048, 16), (1024, 16), (1024, 16)]), Some((16, 512)));
        assert_eq!(plan(H200, &[(1024, 16)]), Some((16, 256)));
        assert_eq!(plan(H200, &[(2048, 32), (1024, 32)]), Some((32, 512)));
        assert_eq!(plan(H200, &[(64, 32), (128, 16)]), None);
        assert_eq!(plan(H200, &[(1024, 64)]), None);
        assert_eq!(plan(RTX, &[(1024, 16)]), Some((16, 256)));
        assert_eq!(plan(RTX, &[(4096, 16)]), None);
        for ranks in [16, 32] {
            let plan = Plan::of(H200, &[(4096, ranks)]).unwrap();
            assert!(plan.bytes() + 8 * plan.stages <= H200.shared, "{plan:?}");
        }
    }
}
