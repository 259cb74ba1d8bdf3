//! Requests: redirects, who gets the token, retries.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom, Take},
    path::PathBuf,
    time::SystemTime,
};

use serde_json::Value;
use ureq::{
    Agent, Body, SendBody,
    http::{Request as HttpRequest, Response as HttpResponse},
};

use crate::{
    DownloadProgress, Error, Patience, Result, Settings,
    retry::{Tries, retry_after},
    url::{join, same_origin},
};

const MAX_HOPS: usize = 10;
/// No answer of the hub's API that we ask for is longer.
const MAX_JSON: u64 = 256 << 20;
const MAX_MESSAGE: u64 = 64 << 10;

/// What is sent.
#[derive(Clone)]
pub(crate) enum Payload<'a> {
    Nothing,
    Bytes(&'a [u8]),
    /// A range of a file, whose way is shown under a name.
    Part {
        path: PathBuf,
        offset: u64,
        length: u64,
        name: &'a str,
        total: u64,
    },
}

/// A request, before redirects.
#[derive(Clone)]
pub(crate) struct Request<'a> {
    pub(crate) method: &'static str,
    pub(crate) url: String,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) payload: Payload<'a>,
    /// Without the token, wherever it goes.
    pub(crate) anonymous: bool,
}

impl<'a> Request<'a> {
    pub(crate) fn new(method: &'static str, url: impl Into<String>) -> Self {
        Self { method, url: url.into(), headers: Vec::new(), payload: Payload::Nothing, anonymous: false }
    }

    pub(crate) fn header(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }

    /// The address itself gives access.
    pub(crate) fn anonymous(mut self) -> Self {
        self.anonymous = true;
        self
    }

    pub(crate) fn payload(mut self, payload: Payload<'a>) -> Self {
        self.payload = payload;
        self
    }
}

/// An answer, and where it came from after redirects.
pub(crate) struct Answer {
    pub(crate) url: String,
    inner: HttpResponse<Body>,
}

impl Answer {
    pub(crate) fn status(&self) -> u16 {
        self.inner.status().as_u16()
    }

    pub(crate) fn header(&self, name: &str) -> Option<String> {
        Some(self.inner.headers().get(name)?.to_str().ok()?.to_owned())
    }

    /// The body, to read from. It ends early with an error where the connection does.
    pub(crate) fn into_reader(self) -> impl Read {
        self.inner.into_body().into_reader()
    }

    /// The body as JSON.
    pub(crate) fn json(self) -> Result<Value, Failure> {
        let url = self.url.clone();
        let mut text = Vec::new();
        let read = self.into_reader().take(MAX_JSON).read_to_end(&mut text);
        read.map_err(|e| Failure::Dropped { url: url.clone(), reason: e.to_string() })?;
        serde_json::from_slice(&text)
            .map_err(|e| Failure::Refused(Error::Protocol { url, reason: format!("expected JSON: {e}") }))
    }

    /// Where a redirect leads.
    fn location(&self) -> Option<String> {
        let redirects = matches!(self.status(), 301 | 302 | 303 | 307 | 308);
        redirects.then(|| self.header("location")).flatten().map(|location| join(&self.url, &location))
    }
}

/// A status that is no success, with what the server says about it.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) url: String,
    pub(crate) status: u16,
    /// `X-Error-Code`.
    pub(crate) code: String,
    /// `X-Error-Message`, or the `error` of the body.
    pub(crate) message: String,
    pub(crate) retry_after: Option<std::time::Duration>,
}

/// Why a request came to nothing, before it is known what it was for.
#[derive(Debug)]
pub(crate) enum Failure {
    /// No connection was made.
    NoConnection { url: String, reason: String },
    /// A connection ended before its time.
    Dropped { url: String, reason: String },
    /// The server refuses.
    Status(Refusal),
    /// Someone asked to stop.
    Stopped,
    /// An error that is complete in itself.
    Refused(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Refused(error)
    }
}

/// Makes requests for one hub.
pub(crate) struct Client {
    agent: Agent,
    pub(crate) settings: Settings,
}

impl Client {
    pub(crate) fn new(settings: Settings) -> Self {
        let silence = Some(settings.patience.silence);
        let config = Agent::config_builder()
            .http_status_as_error(false)
            // followed here: the token must not travel along
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("pmetal/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(silence.map(|limit| limit.min(std::time::Duration::from_secs(15))))
            .timeout_per_read(silence)
            .timeout_per_write(silence)
            .build();
        Self { agent: config.new_agent(), settings }
    }

    /// Sends until there is an answer that means success, as often as patience allows.
    pub(crate) fn send(&self, request: &Request, progress: &dyn DownloadProgress) -> Result<Answer, Failure> {
        let mut tries = Tries::new(self.settings.patience, progress);
        loop {
            match self.send_once(request, false, progress) {
                Ok(answer) => return Ok(answer),
                Err(failure) => tries.after(failure)?,
            }
        }
    }

    /// The same with another patience, and reads the answer as JSON.
    pub(crate) fn json(
        &self,
        request: &Request,
        patience: Patience,
        progress: &dyn DownloadProgress,
    ) -> Result<Value, Failure> {
        Ok(self.json_and_link(request, patience, progress)?.0)
    }

    /// The same, with the address of the next page where there is one.
    pub(crate) fn json_and_link(
        &self,
        request: &Request,
        patience: Patience,
        progress: &dyn DownloadProgress,
    ) -> Result<(Value, Option<String>), Failure> {
        let mut tries = Tries::new(patience, progress);
        loop {
            let answer = self.send_once(request, false, progress);
            let read = answer.and_then(|answer| {
                let link = answer.header("link").and_then(|link| next_page(&link));
                let link = link.map(|link| join(&answer.url, &link));
                Ok((answer.json()?, link))
            });
            match read {
                Ok(read) => return Ok(read),
                Err(failure) => tries.after(failure)?,
            }
        }
    }

    /// Sends once and follows redirects. With `at_the_hub` it stops at a redirect that tells the ETag, or leads elsewhere with one.
    pub(crate) fn send_once(
        &self,
        request: &Request,
        at_the_hub: bool,
        progress: &dyn DownloadProgress,
    ) -> Result<Answer, Failure> {
        let mut url = request.url.clone();
        for _ in 0..=MAX_HOPS {
            let answer = self.hop(request, &url, progress)?;
            let Some(next) = answer.location() else { return accepted(answer) };
            let tells = answer.header("x-linked-etag").is_some()
                || (answer.header("etag").is_some() && !same_origin(&self.settings.endpoint, &next));
            if at_the_hub && tells {
                return Ok(answer);
            }
            url = next;
        }
        Err(Error::Protocol { url: request.url.clone(), reason: format!("more than {MAX_HOPS} redirects") }.into())
    }

    fn hop(&self, request: &Request, url: &str, progress: &dyn DownloadProgress) -> Result<Answer, Failure> {
        let mut builder = HttpRequest::builder().method(request.method).uri(url).header("accept-encoding", "identity");
        let trusted = !request.anonymous && same_origin(&self.settings.endpoint, url);
        if let Some(token) = self.settings.token.as_ref().filter(|_| trusted) {
            builder = builder.header("authorization", format!("Bearer {token}"));
        }
        for (name, value) in &request.headers {
            builder = builder.header(name, value);
        }
        let bad =
            |e: ureq::http::Error| Failure::Refused(Error::Protocol { url: url.to_owned(), reason: e.to_string() });
        let sent = match &request.payload {
            Payload::Nothing => self.agent.run(builder.body(()).map_err(bad)?),
            Payload::Bytes(bytes) => self.agent.run(builder.body(*bytes).map_err(bad)?),
            Payload::Part { path, offset, length, name, total } => {
                let mut file = File::open(path).map_err(pmetal_core::Error::io("read", path)).map_err(Error::from)?;
                let sought = file.seek(SeekFrom::Start(*offset));
                sought.map_err(pmetal_core::Error::io("read", path)).map_err(Error::from)?;
                progress.start(name, Some(*total), *offset);
                let mut part = Watched { part: file.take(*length), name, progress };
                let builder = builder.header("content-length", length.to_string());
                self.agent.run(builder.body(SendBody::from_reader(&mut part)).map_err(bad)?)
            }
        };
        match sent {
            Ok(inner) => Ok(Answer { url: url.to_owned(), inner }),
            Err(error) => Err(failed(url, &error)),
        }
    }
}

/// Counts what is read of a file that is sent.
struct Watched<'a> {
    part: Take<File>,
    name: &'a str,
    progress: &'a dyn DownloadProgress,
}

impl Read for Watched<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if self.progress.stopped() {
            return Err(std::io::Error::other("stopped"));
        }
        let read = self.part.read(buffer)?;
        self.progress.advance(self.name, read as u64);
        Ok(read)
    }
}

fn accepted(answer: Answer) -> Result<Answer, Failure> {
    if (200..300).contains(&answer.status()) {
        return Ok(answer);
    }
    let header = |name: &str| answer.header(name);
    let (url, status) = (without_query(&answer.url), answer.status());
    let code = header("x-error-code").unwrap_or_default();
    let retry_after = retry_after(header, SystemTime::now());
    let message = header("x-error-message").unwrap_or_default();
    let message = if message.is_empty() { message_of(answer) } else { message };
    Err(Failure::Status(Refusal { url, status, code, message, retry_after }))
}

/// The `error` of a JSON body.
fn message_of(answer: Answer) -> String {
    let mut text = Vec::new();
    let read = answer.into_reader().take(MAX_MESSAGE).read_to_end(&mut text);
    let json: Option<Value> = read.ok().and_then(|_| serde_json::from_slice(&text).ok());
    json.and_then(|json| Some(json.get("error")?.as_str()?.to_owned())).unwrap_or_default()
}

/// An address that may be shown: a signature in its query gives access.
fn without_query(url: &str) -> String {
    url.split('?').next().unwrap_or(url).to_owned()
}

fn failed(url: &str, error: &ureq::Error) -> Failure {
    use std::io::ErrorKind::{ConnectionRefused, HostUnreachable, NetworkUnreachable};
    let (url, reason) = (without_query(url), error.to_string());
    match error {
        ureq::Error::Io(e) if matches!(e.kind(), ConnectionRefused | HostUnreachable | NetworkUnreachable) => {
            Failure::NoConnection { url, reason }
        }
        ureq::Error::HostNotFound | ureq::Error::ConnectionFailed | ureq::Error::ConnectProxyFailed(_) => {
            Failure::NoConnection { url, reason }
        }
        ureq::Error::Timeout(ureq::Timeout::Connect | ureq::Timeout::Resolve) => Failure::NoConnection { url, reason },
        ureq::Error::Io(_) | ureq::Error::Timeout(_) | ureq::Error::Protocol(_) => Failure::Dropped { url, reason },
        _ => Failure::Refused(Error::Protocol { url, reason }),
    }
}

/// The target of `<…>; rel="next"`.
fn next_page(link: &str) -> Option<String> {
    let next = link.split(',').find(|part| part.contains("rel=\"next\""))?;
    Some(next.split_once('<')?.1.split_once('>')?.0.to_owned())
}
