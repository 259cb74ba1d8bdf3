/// What first bytes say a file is, with what to do about it: the usual things that lie where weights or settings should. Four bytes at most.
const KINDS: [(&[u8], &str); 10] = [
    (b"vers", "a Git LFS pointer and not the file itself; run `git lfs pull`"),
    (b"<!", "a web page, so the download failed; fetch it again"),
    (b"<html", "a web page, so the download failed; fetch it again"),
    (b"PK\x03\x04", "a zip archive, as PyTorch's .bin and .pt files are; save it as safetensors"),
    (b"\x80\x02", "a pickle, which is never read; save it as safetensors"),
    (b"GGUF", "a GGUF file; name it .gguf"),
    (b"\x1f\x8b", "compressed with gzip; unpack it"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd; unpack it"),
    (b"\xff\xfe", "text in UTF-16; save it as UTF-8"),
    (b"\xfe\xff", "text in UTF-16; save it as UTF-8"),
];

/// What a file that is not what it should be is instead, where its first bytes tell: "a web page, …", and what to do.
pub fn what_it_is(bytes: &[u8]) -> Option<&'static str> {
    KINDS.into_iter().find(|(magic, _)| bytes.starts_with(magic)).map(|(_, kind)| kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_downloads_are_told() {
        assert!(what_it_is(b"<!DOCTYPE html>").is_some_and(|kind| kind.starts_with("a web page")));
        assert!(
            what_it_is(b"version https://git-lfs.github.com/spec/v1\n").is_some_and(|kind| kind.contains("lfs pull"))
        );
        assert_eq!(what_it_is(b"{}"), None);
        assert_eq!(what_it_is(b""), None);
    }
}
