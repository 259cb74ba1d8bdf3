//! Damage that follows from a seed: the same bytes on every machine, so that what a test finds can be found again.

/// Numbers that lengths, counts and offsets are replaced with.
const LENGTHS: [u64; 8] = [0, 1, 255, 1 << 20, 1 << 31, 1 << 40, (1 << 60) + 7, u64::MAX];

/// What a text file's bytes are replaced with: ends of strings and objects, numbers beyond every range, other kinds of values, and
/// texts that mean something to a tokenizer or a template.
const WORDS: [&[u8]; 24] = [
    b"\"",
    b"{",
    b"}",
    b"[",
    b"]",
    b"null",
    b"true",
    b"\"x\"",
    b"[]",
    b"{}",
    b"0",
    b"-1",
    b"1e308",
    b"-1e999",
    b"18446744073709551616",
    b"4294967296",
    b"67108864",
    b"0.1",
    b"\\u0000",
    b"\\ud800",
    b"\xff\xfe",
    b"\xe2\x96\x81",
    b"{{",
    b"{% for m in messages %}",
];

/// A source of damaged copies.
pub struct Damage {
    state: u64,
}

impl Damage {
    /// Starts from a seed.
    pub fn new(seed: u64) -> Self {
        Self { state: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1 }
    }

    /// A number below `end`, 0 where that is 0. Marsaglia, "Xorshift RNGs", 2003.
    fn below(&mut self, end: usize) -> usize {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        (self.state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % end.max(1)
    }

    fn one_of<T: Copy, const N: usize>(&mut self, of: &[T; N]) -> T {
        of[self.below(N)]
    }

    /// A copy with one to four faults. Half of all copies are hurt near their beginning only, where the headers are.
    pub fn copy(&mut self, seed: &[u8]) -> Vec<u8> {
        let mut bytes = seed.to_vec();
        let header = if self.below(2) == 0 { 2048 } else { usize::MAX };
        for _ in 0..=self.below(4) {
            let end = bytes.len().min(header);
            self.hurt(&mut bytes, end);
        }
        bytes
    }

    fn hurt(&mut self, bytes: &mut Vec<u8>, end: usize) {
        let at = self.below(end);
        match self.below(8) {
            0 => bytes.truncate(at),
            1 if !bytes.is_empty() => bytes[at] ^= 1 << self.below(8),
            2 => overwrite(bytes, at, &[self.below(256) as u8]),
            3 => {
                let length = self.one_of(&LENGTHS);
                overwrite(bytes, at, &length.to_le_bytes());
            }
            4 => {
                let length = self.one_of(&LENGTHS) as u32;
                overwrite(bytes, at, &length.to_le_bytes());
            }
            5 => self.splice(bytes, at),
            6 => {
                let word = self.one_of(&WORDS);
                bytes.splice(at..at, word.iter().copied());
            }
            _ => self.replace_word(bytes, at),
        }
    }

    /// Moves a piece of the file somewhere else, or drops it.
    fn splice(&mut self, bytes: &mut Vec<u8>, at: usize) {
        let length = 1 + self.below(64);
        let from = self.below(bytes.len());
        let piece: Vec<u8> = bytes.iter().copied().skip(from).take(length).collect();
        let end = (at + self.below(64)).min(bytes.len());
        let kept = if self.below(3) == 0 { Vec::new() } else { piece };
        bytes.splice(at.min(end)..end, kept);
    }

    /// Puts a word in place of the number, name or string around a byte.
    fn replace_word(&mut self, bytes: &mut Vec<u8>, at: usize) {
        let part = |byte: &u8| byte.is_ascii_alphanumeric() || b"_.-+\"<|>".contains(byte);
        let start = bytes.iter().take(at).rposition(|byte| !part(byte)).map_or(0, |before| before + 1);
        let end = bytes.iter().skip(start).position(|byte| !part(byte)).map_or(bytes.len(), |length| start + length);
        let word = self.one_of(&WORDS);
        bytes.splice(start..end, word.iter().copied());
    }
}

fn overwrite(bytes: &mut [u8], at: usize, with: &[u8]) {
    for (byte, &new) in bytes.iter_mut().skip(at).zip(with) {
        *byte = new;
    }
}
