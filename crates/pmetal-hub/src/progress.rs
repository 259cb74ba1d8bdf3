/// Someone who watches downloads and uploads. Files come one after the other.
pub trait DownloadProgress {
    /// A file begins: its size in bytes where the server says it, and how many of them are here already. Called again where a file has to
    /// begin anew.
    fn start(&self, _file: &str, _total: Option<u64>, _already: u64) {}
    /// More bytes of the file have come.
    fn advance(&self, _file: &str, _bytes: u64) {}
    /// The file is whole.
    fn finish(&self, _file: &str) {}
    /// Something worth a line: a wait, a fallback.
    fn note(&self, _line: &str) {}
    /// True ends the transfer with [`Error::Stopped`](crate::Error::Stopped); what was loaded is kept.
    fn stopped(&self) -> bool {
        false
    }
}

/// Watches nothing.
impl DownloadProgress for () {}
