//! Which parts of a range of memory are taken: runs of units, and lists of the free ones by length.
//!
//! A freed run joins its free neighbours, so that what one step left serves another whose tensors have other sizes. Source of the
//! lists: Masmano et al., "TLSF: a new dynamic memory allocator for real-time systems", 2004.

/// What is known of a unit. A run is described by its first unit, and by its last one as far as a neighbour asks.
#[derive(Clone, Copy, Default)]
pub(super) struct Unit {
    /// Units of the run.
    len: u32,
    state: State,
    /// The neighbours in the list of a free run, by their first units.
    previous: u32,
    next: u32,
}

#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
#[repr(u32)]
pub(super) enum State {
    // 0: a table of zero bytes is valid
    #[default]
    Taken = 0,
    /// Free, with what was last written there.
    Dirty,
    /// Free, and the system's: it reads as zeros, and takes no memory before it is written to.
    Clean,
}

/// Lists per power of two.
const STEPS: u32 = 8;
const LISTS: usize = 256;
const NONE: u32 = u32::MAX;

/// The list of runs of `len` units: lengths below eight have one each, above an eighth of a power of two shares one.
fn list_of(len: u32) -> usize {
    if len < STEPS {
        return len as usize;
    }
    let octave = len.ilog2() - STEPS.ilog2();
    (STEPS * (octave + 1) + (len >> octave) % STEPS) as usize
}

/// The runs of a range.
pub(super) struct Heap<'a> {
    units: &'a mut [Unit],
    /// No run lies behind.
    end: u32,
    heads: [u32; LISTS],
    /// A bit for each list that is not empty.
    filled: [u64; LISTS / 64],
    taken: u32,
    dirty: u32,
}

impl<'a> Heap<'a> {
    pub(super) const fn new(units: &'a mut [Unit]) -> Self {
        Self { units, end: 0, heads: [NONE; LISTS], filled: [0; LISTS / 64], taken: 0, dirty: 0 }
    }

    /// Units in use, and free ones that hold memory.
    pub(super) fn usage(&self) -> (u32, u32) {
        (self.taken, self.dirty)
    }

    /// A free run of at least `len` units, cut to `len`: its first unit, and whether it reads as zeros.
    pub(super) fn take(&mut self, len: u32) -> Option<(u32, bool)> {
        let list = list_of(len);
        let first = self.closest(list, len).or_else(|| self.closest(self.filled_from(list + 1)?, len))?;
        let Unit { len: found, state, .. } = self.units[first as usize];
        self.unlink(first);
        self.mark(first, len, State::Taken);
        if found > len {
            self.mark(first + len, found - len, state);
            self.link(first + len);
        }
        self.taken += len;
        Some((first, state == State::Clean))
    }

    /// The end that [`Heap::grow`] moves to; none where the range ends before.
    pub(super) fn end_with(&self, len: u32) -> Option<u32> {
        (self.end - self.last_free()).checked_add(len).filter(|&end| end as usize <= self.units.len())
    }

    /// As [`Heap::take`], with what is missing from behind the end, where [`Heap::end_with`] says that it fits.
    pub(super) fn grow(&mut self, len: u32) -> (u32, bool) {
        let free = self.last_free();
        let first = self.end - free;
        let clean = free == 0 || self.units[first as usize].state == State::Clean;
        if free > 0 {
            self.unlink(first);
        }
        self.end = first + len;
        self.mark(first, len, State::Taken);
        self.taken += len;
        (first, clean)
    }

    /// Frees the run that begins at `first`.
    pub(super) fn give(&mut self, first: u32) {
        let len = self.units[first as usize].len;
        self.taken -= len;
        self.free(first, len);
    }

    /// Units of the run at `first`.
    pub(super) fn len_of(&self, first: u32) -> u32 {
        self.units[first as usize].len
    }

    /// Frees what a taken run has beyond `len` units.
    pub(super) fn shorten(&mut self, first: u32, len: u32) {
        let rest = self.len_of(first) - len;
        if rest > 0 {
            self.mark(first, len, State::Taken);
            self.taken -= rest;
            self.free(first + len, rest);
        }
    }

    /// A dirty run, the longest or nearly so: its first unit and its length.
    pub(super) fn long_dirty_run(&self) -> Option<(u32, u32)> {
        let mut runs = (0..LISTS).rev().flat_map(|list| self.runs(list));
        let first = runs.find(|&first| self.units[first as usize].state == State::Dirty)?;
        Some((first, self.len_of(first)))
    }

    /// Notes that a dirty run's memory went back to the system.
    pub(super) fn cleaned(&mut self, first: u32) {
        let len = self.len_of(first);
        self.mark(first, len, State::Clean);
        self.dirty -= len;
    }

    /// Makes a free run of these units and its free neighbours.
    fn free(&mut self, mut first: u32, mut len: u32) {
        let behind = first + len;
        if behind < self.end && self.units[behind as usize].state != State::Taken {
            len += self.absorb(behind);
        }
        if first > 0 && self.units[first as usize - 1].state != State::Taken {
            let before = first - self.units[first as usize - 1].len;
            len += self.absorb(before);
            first = before;
        }
        self.mark(first, len, State::Dirty);
        self.link(first);
    }

    /// Takes a free run out of its list for a longer one, and returns its length.
    fn absorb(&mut self, first: u32) -> u32 {
        self.unlink(first);
        self.units[first as usize].len
    }

    /// Units of the free run before the end.
    fn last_free(&self) -> u32 {
        let last = self.end.checked_sub(1).map(|last| self.units[last as usize]);
        last.filter(|last| last.state != State::Taken).map_or(0, |last| last.len)
    }

    fn mark(&mut self, first: u32, len: u32, state: State) {
        for unit in [first, first + len - 1] {
            let unit = &mut self.units[unit as usize];
            (unit.len, unit.state) = (len, state);
        }
    }

    /// The first list from `list` on that is not empty.
    fn filled_from(&self, list: usize) -> Option<usize> {
        let word = list / 64;
        let here = self.filled.get(word)? & (u64::MAX << (list % 64));
        let mut words = std::iter::once(here).chain(self.filled[word + 1..].iter().copied()).zip(word..);
        words.find(|&(bits, _)| bits != 0).map(|(bits, word)| word * 64 + bits.trailing_zeros() as usize)
    }

    /// The shortest run of a list that has at least `len` units.
    fn closest(&self, list: usize, len: u32) -> Option<u32> {
        let lengths = self.runs(list).map(|first| (self.len_of(first), first));
        lengths.filter(|&(found, _)| found >= len).min().map(|(_, first)| first)
    }

    /// The first units of the runs in a list.
    fn runs(&self, list: usize) -> impl Iterator<Item = u32> + '_ {
        let some = |first: u32| (first != NONE).then_some(first);
        std::iter::successors(some(self.heads[list]), move |&first| some(self.units[first as usize].next))
    }

    /// Puts a marked free run in front of its list.
    fn link(&mut self, first: u32) {
        let unit = &mut self.units[first as usize];
        let list = list_of(unit.len);
        let next = std::mem::replace(&mut self.heads[list], first);
        (unit.previous, unit.next) = (NONE, next);
        if unit.state == State::Dirty {
            self.dirty += unit.len;
        }
        if next != NONE {
            self.units[next as usize].previous = first;
        }
        self.filled[list / 64] |= 1 << (list % 64);
    }

    fn unlink(&mut self, first: u32) {
        let Unit { len, state, previous, next } = self.units[first as usize];
        let list = list_of(len);
        if next != NONE {
            self.units[next as usize].previous = previous;
        }
        if previous != NONE {
            self.units[previous as usize].next = next;
        } else {
            self.heads[list] = next;
            if next == NONE {
                self.filled[list / 64] &= !(1 << (list % 64));
            }
        }
        if state == State::Dirty {
            self.dirty -= len;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every run from the first to the last: `(first, len, state)`.
    fn runs(heap: &Heap) -> Vec<(u32, u32, State)> {
        let mut runs = Vec::new();
        let mut first = 0;
        while first < heap.end {
            let Unit { len, state, .. } = heap.units[first as usize];
            let last = heap.units[(first + len - 1) as usize];
            assert_eq!((last.len, last.state), (len, state), "both ends say the same");
            runs.push((first, len, state));
            first += len;
        }
        runs
    }

    fn check(heap: &Heap, live: &[(u32, u32)]) {
        let runs = runs(heap);
        let of = |state| runs.iter().filter(move |run| run.2 == state);
        let mut live = live.to_vec();
        live.sort_unstable();
        assert_eq!(of(State::Taken).map(|run| (run.0, run.1)).collect::<Vec<_>>(), live);
        let sum = |state| of(state).map(|run| run.1).sum::<u32>();
        assert_eq!(heap.usage(), (sum(State::Taken), sum(State::Dirty)));
        assert!(
            runs.windows(2).all(|pair| pair.iter().any(|run| run.2 == State::Taken)),
            "free neighbours are one run"
        );
        let mut listed: Vec<u32> = (0..LISTS).flat_map(|list| heap.runs(list)).collect();
        listed.sort_unstable();
        let free = runs.iter().filter(|run| run.2 != State::Taken);
        assert_eq!(listed, free.map(|run| run.0).collect::<Vec<_>>());
    }

    fn place(heap: &mut Heap, len: u32) -> Option<(u32, u32)> {
        let found = heap.take(len).or_else(|| heap.end_with(len).map(|_| heap.grow(len)));
        found.map(|(first, _)| (first, len))
    }

    #[test]
    fn runs_stay_apart_and_free_ones_join() {
        let mut units = vec![Unit::default(); 5000];
        let mut heap = Heap::new(&mut units);
        let mut live: Vec<(u32, u32)> = Vec::new();
        for i in 0..20_000 {
            let number = crate::mix(7, &[i]);
            let pick = (number >> 20) as usize % live.len().max(1);
            match number % 16 {
                0..8 => live.extend(place(&mut heap, 1 + (number >> 40) as u32 % 400)),
                8 => heap.long_dirty_run().into_iter().for_each(|run| heap.cleaned(run.0)),
                9 if !live.is_empty() => {
                    live[pick].1 = live[pick].1.div_ceil(2);
                    heap.shorten(live[pick].0, live[pick].1);
                }
                _ if !live.is_empty() => heap.give(live.swap_remove(pick).0),
                _ => {}
            }
            check(&heap, &live);
        }
    }

    #[test]
    fn memory_that_was_cleaned_is_found_clean() {
        let mut units = vec![Unit::default(); 100];
        let mut heap = Heap::new(&mut units);
        assert_eq!([heap.grow(10), heap.grow(5)], [(0, true), (10, true)]);
        heap.give(0);
        assert_eq!(heap.take(4), Some((0, false)));
        assert_eq!(heap.long_dirty_run(), Some((4, 6)));
        heap.cleaned(4);
        assert_eq!(heap.long_dirty_run(), None);
        assert_eq!(heap.take(6), Some((4, true)));
        assert_eq!((heap.take(1), heap.end_with(86)), (None, None));
    }

    /// Saved tensors pile up in a forward and go in a backward that needs room of its own, for rows of another length each time.
    #[test]
    fn steps_of_many_shapes_take_little_more_than_the_largest() {
        let mut units = vec![Unit::default(); 1 << 20];
        let mut heap = Heap::new(&mut units);
        let weights: Vec<_> = (0..40).map(|i| place(&mut heap, 20 + i * 7 % 50)).collect();
        let mut most = 0;
        for step in 0..300 {
            let tokens = 200 + (crate::mix(3, &[step]) % 1800) as u32;
            let len = |share: u32| (tokens * share).div_ceil(512);
            let mut saved = Vec::new();
            for _ in 0..30 {
                let passing = place(&mut heap, len(31)).unwrap();
                saved.extend([18, 18, 6, 6, 48, 48, 48].map(|share| place(&mut heap, len(share)).unwrap()));
                heap.give(passing.0);
            }
            while let Some((first, _)) = saved.pop() {
                let passing = [place(&mut heap, len(48)).unwrap(), place(&mut heap, len(18)).unwrap()];
                most = most.max(heap.usage().0);
                heap.give(first);
                passing.into_iter().for_each(|run| heap.give(run.0));
            }
        }
        assert_eq!(weights.len(), 40);
        assert!(f64::from(heap.end) < 1.1 * f64::from(most), "{} units for {most}", heap.end);
    }
}
