use std::path::Path;

use crate::{Error, Result};

/// Reads little-endian fields from a mapped file and never past its end. Errors name what was being read.
pub(crate) struct Cursor<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    position: usize,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(path: &'a Path, bytes: &'a [u8]) -> Self {
        Self { path, bytes, position: 0 }
    }

    pub(crate) fn position(&self) -> usize {
        self.position
    }

    /// The next `count` bytes, or an [`Error::Truncated`] about `what`.
    pub(crate) fn take(&mut self, count: u64, what: &str) -> Result<&'a [u8]> {
        let rest = self.bytes.get(self.position..).unwrap_or_default();
        let taken = usize::try_from(count).ok().and_then(|count| rest.get(..count));
        let Some(taken) = taken else {
            return Err(Error::Truncated {
                path: self.path.to_path_buf(),
                what: what.to_string(),
                offset: self.position as u64,
                expected: count,
                found: rest.len() as u64,
            });
        };
        self.position += taken.len();
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N as u64, what)?);
        Ok(array)
    }

    pub(crate) fn magic(&mut self) -> Result<[u8; 4]> {
        self.array("the magic number")
    }

    pub(crate) fn u32(&mut self, what: &str) -> Result<u32> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self, what: &str) -> Result<u64> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A string: its length in eight bytes, then its bytes. Bytes that are not UTF-8 become U+FFFD.
    pub(crate) fn string(&mut self, what: &str) -> Result<String> {
        let length = self.u64(what)?;
        Ok(String::from_utf8_lossy(self.take(length, what)?).into_owned())
    }

    pub(crate) fn malformed(&self, what: String, expected: impl Into<String>, found: impl ToString) -> Error {
        Error::Malformed { path: self.path.to_path_buf(), what, expected: expected.into(), found: found.to_string() }
    }
}
