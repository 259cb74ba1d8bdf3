//! When to come back after a failure.

use std::{
    thread,
    time::{Duration, SystemTime},
};

use crate::{DownloadProgress, Error, Patience, Result, client::Failure};

/// A wait is cut into pieces of this length, so that a request to stop is heard.
const PIECE: Duration = Duration::from_millis(100);

/// Counts failures in a row and waits after each.
pub(crate) struct Tries<'a> {
    patience: Patience,
    progress: &'a dyn DownloadProgress,
    failures: u32,
}

impl<'a> Tries<'a> {
    pub(crate) fn new(patience: Patience, progress: &'a dyn DownloadProgress) -> Self {
        Self { patience, progress, failures: 0 }
    }

    /// Something came through: failures are counted anew.
    pub(crate) fn reset(&mut self) {
        self.failures = 0;
    }

    pub(crate) fn failures(&self) -> u32 {
        self.failures
    }

    /// Waits and returns, or gives the failure back where coming again is of no use.
    pub(crate) fn after(&mut self, failure: Failure) -> Result<(), Failure> {
        let Some((reason, wait)) = self.wait_of(&failure) else { return Err(failure) };
        self.failures += 1;
        // a server that cannot be connected to is seldom back within seconds
        let allowed = if matches!(failure, Failure::NoConnection { .. }) {
            self.patience.failures.min(3)
        } else {
            self.patience.failures
        };
        if self.failures >= allowed {
            return Err(failure);
        }
        self.progress.note(&format!("{reason}; trying again in {}", seconds(wait)));
        pause(wait, self.progress).map_err(|_| Failure::Stopped)
    }

    /// What to say and how long to wait; `None` where the same request would fail again, or the server asks for more than our patience.
    fn wait_of(&self, failure: &Failure) -> Option<(String, Duration)> {
        let backoff = self.patience.first_wait * 2u32.saturating_pow(self.failures.min(10));
        match failure {
            Failure::NoConnection { url, reason } => Some((format!("cannot reach {}: {reason}", host(url)), backoff)),
            Failure::Dropped { url, reason } => {
                Some((format!("the connection to {} broke: {reason}", host(url)), backoff))
            }
            Failure::Status(refusal) => {
                let wait = refusal.retry_after.unwrap_or(backoff);
                let again = matches!(refusal.status, 408 | 429) || refusal.status >= 500;
                let reason = format!("{} answers {}", host(&refusal.url), refusal.status);
                (again && wait <= self.patience.longest_wait).then_some((reason, wait))
            }
            Failure::Stopped | Failure::Refused(_) => None,
        }
    }
}

/// Sleeps, listening for a request to stop.
pub(crate) fn pause(wait: Duration, progress: &dyn DownloadProgress) -> Result<()> {
    let mut left = wait;
    while !left.is_zero() {
        if progress.stopped() {
            return Err(Error::Stopped);
        }
        let piece = left.min(PIECE);
        thread::sleep(piece);
        left -= piece;
    }
    Ok(())
}

fn host(url: &str) -> &str {
    url.split_once("://").and_then(|(_, rest)| rest.split('/').next()).unwrap_or(url)
}

fn seconds(wait: Duration) -> String {
    if wait.subsec_millis() == 0 { format!("{} s", wait.as_secs()) } else { format!("{:.1} s", wait.as_secs_f64()) }
}

/// The wait that a server asks for: `Retry-After` in seconds or as a date, or the reset of a `RateLimit` header (`…;t=55`) that is used up.
pub(crate) fn retry_after(header: impl Fn(&str) -> Option<String>, now: SystemTime) -> Option<Duration> {
    if let Some(value) = header("retry-after") {
        let value = value.trim();
        if let Ok(seconds) = value.parse() {
            return Some(Duration::from_secs(seconds));
        }
        if let Ok(date) = httpdate::parse_http_date(value) {
            return Some(date.duration_since(now).unwrap_or_default());
        }
    }
    let limit = header("ratelimit")?;
    let field = |name: &str| limit.split(';').find_map(|part| part.trim().strip_prefix(name)?.parse::<u64>().ok());
    (field("r=") == Some(0)).then(|| field("t=").map(Duration::from_secs))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_are_read_in_every_form() {
        let now = httpdate::parse_http_date("Sun, 06 Nov 1994 08:49:37 GMT").unwrap();
        for (name, value, expected) in [
            ("retry-after", "120", Some(120)),
            ("retry-after", "Sun, 06 Nov 1994 08:50:00 GMT", Some(23)),
            ("retry-after", "Sunday, 06-Nov-94 08:49:38 GMT", Some(1)),
            ("retry-after", "Sun, 06 Nov 1994 08:00:00 GMT", Some(0)),
            ("retry-after", "soon", None),
            ("retry-after", "-1", None),
            ("ratelimit", "\"api\";r=0;t=55", Some(55)),
            ("ratelimit", "\"api\";r=12;t=55", None),
        ] {
            let header = |asked: &str| (asked == name).then(|| value.to_owned());
            assert_eq!(retry_after(header, now), expected.map(Duration::from_secs), "{value}");
        }
    }
}
