//! What a failed request means for the person who asked.

use crate::{
    Error, Settings,
    client::{Failure, Refusal},
    id::{Kind, RepoId},
};

/// What a request was about.
pub(crate) struct About<'a> {
    pub(crate) settings: &'a Settings,
    pub(crate) kind: Kind,
    pub(crate) repo: &'a RepoId,
    /// The file, where it was about one.
    pub(crate) file: Option<&'a str>,
}

impl About<'_> {
    /// Id and revision, as one says them.
    pub(crate) fn what(&self) -> String {
        match &self.repo.revision {
            Some(revision) => format!("{} at revision {revision}", self.repo.id),
            None => self.repo.id.clone(),
        }
    }

    /// The repository's page.
    fn page(&self) -> String {
        format!("{}/{}{}", self.settings.endpoint, self.kind.prefix(), self.repo.id)
    }

    /// The error for a failure.
    pub(crate) fn error(&self, failure: Failure) -> Error {
        match failure {
            Failure::Status(refusal) => self.refused(refusal),
            Failure::Stopped => Error::Stopped,
            Failure::Refused(error) => error,
            Failure::NoConnection { reason, .. } | Failure::Dropped { reason, .. } => {
                Error::Unreachable { endpoint: self.settings.endpoint.clone(), reason }
            }
        }
    }

    fn refused(&self, refusal: Refusal) -> Error {
        let Refusal { url, status, code, message, retry_after } = refusal;
        let (id, page, signed_in) = (self.repo.id.clone(), self.page(), self.settings.token.is_some());
        let endpoint = self.settings.endpoint.clone();
        match (code.as_str(), status) {
            ("GatedRepo", _) => Error::Gated { id, page, message },
            ("RevisionNotFound", _) => self.no_revision(),
            ("EntryNotFound", _) if self.file.is_some() => self.no_file(),
            // the hub says 401 for a repository that is not there, too, until it knows who asks
            ("RepoNotFound", _) => Error::RepoNotFound { endpoint, kind: self.kind.word(), id, signed_in },
            (_, 401) => Error::Unauthorized { id, signed_in, message },
            (_, 403) => Error::Forbidden { id, page, message },
            (_, 404) if self.file.is_some() => self.no_file(),
            (_, 404) => Error::RepoNotFound { endpoint, kind: self.kind.word(), id, signed_in },
            (_, 429) => {
                let seconds = retry_after.map_or(0, |wait| wait.as_secs());
                Error::RateLimited { endpoint, seconds, signed_in }
            }
            _ => Error::Http { url, status, message },
        }
    }

    /// The error for a revision that is not there.
    pub(crate) fn no_revision(&self) -> Error {
        let revision = self.repo.revision().to_owned();
        Error::RevisionNotFound { id: self.repo.id.clone(), revision, page: self.page() }
    }

    fn no_file(&self) -> Error {
        Error::FileNotFound {
            id: self.repo.id.clone(),
            file: self.file.unwrap_or_default().to_owned(),
            revision: self.repo.revision().to_owned(),
            page: self.page(),
        }
    }
}
