use std::path::PathBuf;

use crate::{DownloadProgress, Error, Result, Settings, Upload, Uploaded, Wanted, client::Client, snapshot, upload};

/// A hub and its cache.
pub struct Hub {
    client: Client,
}

impl Hub {
    /// A hub with these settings. Asks nothing yet.
    pub fn new(settings: Settings) -> Self {
        Self { client: Client::new(settings) }
    }

    /// The hub that the environment names.
    ///
    /// # Errors
    /// Where a variable has a value that cannot be meant.
    pub fn from_env() -> Result<Self> {
        Ok(Self::new(Settings::from_env()?))
    }

    /// Downloads what is wanted and not there yet, and returns the snapshot's folder, or the file where one was chosen.
    ///
    /// # Errors
    /// Where the hub refuses, cannot be reached and the cache has no whole snapshot, a transfer breaks off again and again, a file is not
    /// what was announced, or the disk cannot take it.
    pub fn download(&self, wanted: &Wanted, progress: &dyn DownloadProgress) -> Result<PathBuf> {
        snapshot::download(&self.client, wanted, progress)
    }

    /// Uploads the folder of an adapter or model as one commit, and makes the repository where there is none.
    ///
    /// # Errors
    /// Where the hub refuses or cannot be reached, the folder holds no model, or a file cannot be read.
    pub fn upload(&self, what: &Upload, progress: &dyn DownloadProgress) -> Result<Uploaded> {
        let settings = &self.client.settings;
        match (settings.offline, &settings.token) {
            (true, _) => Err(Error::OfflineUpload),
            (_, None) => Err(Error::NoToken),
            _ => upload::upload(&self.client, what, progress),
        }
    }
}
