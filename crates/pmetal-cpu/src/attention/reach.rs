//! How far back queries see.

/// What a query sees of the keys up to its own. Positions count from the row's first key.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Reach {
    /// All of them.
    #[default]
    All,
    /// The last so many, its own among them.
    Window(usize),
    /// Those of its own chunk, `position / n`.
    Chunk(usize),
}

impl Reach {
    /// The first key that the query at `position` sees.
    #[inline(always)]
    pub(crate) fn first(self, position: usize) -> usize {
        match self {
            Self::All => 0,
            Self::Window(keys) => (position + 1).saturating_sub(keys),
            Self::Chunk(keys) => position / keys * keys,
        }
    }

    /// The first position behind `key` whose query does not see it.
    #[inline(always)]
    pub(crate) fn end(self, key: usize) -> usize {
        match self {
            Self::All => usize::MAX,
            Self::Window(keys) => key.saturating_add(keys),
            Self::Chunk(keys) => (key / keys + 1).saturating_mul(keys),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_and_end_say_the_same() {
        for reach in [Reach::All, Reach::Window(1), Reach::Window(5), Reach::Chunk(1), Reach::Chunk(4)] {
            for (position, key) in (0..20).flat_map(|position| (0..=position).map(move |key| (position, key))) {
                assert_eq!(reach.first(position) <= key, position < reach.end(key), "{reach:?}, {position}, {key}");
            }
        }
    }
}
