//! Where the hub is, where its cache is, and who asks: the environment variables of Python's `huggingface_hub`.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::{Error, Result};

const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// Settings of a [`Hub`](crate::Hub).
#[derive(Clone, Debug)]
pub struct Settings {
    /// The hub's address, without a slash at its end.
    pub endpoint: String,
    /// The cache's folder.
    pub cache: PathBuf,
    /// Sent to the endpoint, and to no other host.
    pub token: Option<String>,
    /// Ask the hub nothing.
    pub offline: bool,
    /// How long to wait for what.
    pub patience: Patience,
}

/// How long to wait for a server, and how often to come back.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// The wait after the first failure; each further one in a row doubles it.
    pub first_wait: Duration,
    /// The longest wait that a server may ask for with `Retry-After`.
    pub longest_wait: Duration,
    /// Failures in a row, no byte between them, after which a transfer is given up.
    pub failures: u32,
    /// How long a connection may take, and stay silent.
    pub silence: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            first_wait: Duration::from_secs(1),
            longest_wait: Duration::from_secs(330),
            failures: 5,
            silence: Duration::from_secs(60),
        }
    }
}

impl Settings {
    /// What the environment says: `HF_ENDPOINT`, `HF_HOME`, `HF_HUB_CACHE`, `HF_HUB_OFFLINE`, `HF_TOKEN`, `HF_TOKEN_PATH`, `XDG_CACHE_HOME`,
    /// and the older names of some of them.
    ///
    /// # Errors
    /// An endpoint that is no HTTP address, and a token that no header can carry.
    pub fn from_env() -> Result<Self> {
        Self::from_vars(&|name| std::env::var(name).ok(), std::env::home_dir().as_deref())
    }

    fn from_vars(var: &dyn Fn(&str) -> Option<String>, user_home: Option<&Path>) -> Result<Self> {
        let set = |names: &[&str]| names.iter().find_map(|name| var(name).filter(|value| !value.trim().is_empty()));
        let path = |names: &[&str]| set(names).map(|text| expand(&text, user_home));
        let home = path(&["HF_HOME"]).unwrap_or_else(|| {
            let caches =
                path(&["XDG_CACHE_HOME"]).unwrap_or_else(|| user_home.unwrap_or(Path::new(".")).join(".cache"));
            caches.join("huggingface")
        });
        let token_file = path(&["HF_TOKEN_PATH"]).unwrap_or_else(|| home.join("token"));
        let token = set(&["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"]).or_else(|| fs::read_to_string(token_file).ok());
        let token = token.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty());
        if token.as_ref().is_some_and(|token| !token.bytes().all(|b| b.is_ascii_graphic())) {
            return Err(Error::BadToken);
        }
        let endpoint = set(&["HF_ENDPOINT"]).unwrap_or_else(|| DEFAULT_ENDPOINT.into());
        let endpoint = endpoint.trim().trim_end_matches('/').to_owned();
        let address = endpoint.strip_prefix("https://").or_else(|| endpoint.strip_prefix("http://"));
        if address.is_none_or(|address| address.is_empty() || address.contains(char::is_whitespace)) {
            return Err(Error::BadEndpoint { endpoint });
        }
        Ok(Self {
            endpoint,
            cache: path(&["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"]).unwrap_or_else(|| home.join("hub")),
            token,
            offline: set(&["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"]).is_some_and(|value| is_true(&value)),
            patience: Patience::default(),
        })
    }
}

fn is_true(value: &str) -> bool {
    ["1", "true", "yes", "on"].contains(&value.trim().to_ascii_lowercase().as_str())
}

/// A path with `~` for the user's folder.
fn expand(text: &str, user_home: Option<&Path>) -> PathBuf {
    match (text.strip_prefix('~'), user_home) {
        (Some(""), Some(home)) => home.to_path_buf(),
        (Some(rest), Some(home)) if rest.starts_with('/') => home.join(rest.trim_start_matches('/')),
        _ => PathBuf::from(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(vars: &[(&str, &str)]) -> Result<Settings> {
        let var = |name: &str| vars.iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_string());
        Settings::from_vars(&var, Some(Path::new("/home/me")))
    }

    #[test]
    fn the_cache_is_where_python_has_it() {
        for (vars, cache) in [
            (vec![], "/home/me/.cache/huggingface/hub"),
            (vec![("XDG_CACHE_HOME", "/x")], "/x/huggingface/hub"),
            (vec![("XDG_CACHE_HOME", "/x"), ("HF_HOME", "~/hf")], "/home/me/hf/hub"),
            (vec![("HF_HOME", "/h"), ("HF_HUB_CACHE", "/c")], "/c"),
            (vec![("HF_HOME", "/h"), ("HF_HUB_CACHE", "")], "/h/hub"),
        ] {
            assert_eq!(settings(&vars).unwrap().cache, Path::new(cache), "{vars:?}");
        }
    }

    #[test]
    fn endpoint_and_offline() {
        let plain = settings(&[]).unwrap();
        assert_eq!((plain.endpoint.as_str(), plain.offline, plain.token), (DEFAULT_ENDPOINT, false, None));
        assert_eq!(settings(&[("HF_ENDPOINT", "http://h:1/")]).unwrap().endpoint, "http://h:1");
        for value in ["h:1", "ftp://h", "https://", "http://a b"] {
            assert!(settings(&[("HF_ENDPOINT", value)]).unwrap_err().to_string().contains("HF_ENDPOINT"), "{value}");
        }
        for (value, offline) in [("1", true), ("True", true), ("YES", true), ("on", true), ("0", false), ("no", false)]
        {
            assert_eq!(settings(&[("HF_HUB_OFFLINE", value)]).unwrap().offline, offline, "{value}");
        }
    }

    #[test]
    fn the_token_comes_from_a_variable_then_from_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let home = folder.path().to_str().unwrap();
        let token = |vars: &[(&str, &str)]| settings(vars).unwrap().token.unwrap_or_default();
        assert_eq!(token(&[("HF_HOME", home)]), "");
        fs::write(folder.path().join("token"), "of-the-file\n").unwrap();
        fs::write(folder.path().join("other"), "of-the-other").unwrap();
        let other = folder.path().join("other");
        assert_eq!(token(&[("HF_HOME", home)]), "of-the-file");
        assert_eq!(token(&[("HF_HOME", home), ("HF_TOKEN_PATH", other.to_str().unwrap())]), "of-the-other");
        assert_eq!(token(&[("HF_HOME", home), ("HUGGING_FACE_HUB_TOKEN", "old")]), "old");
        assert_eq!(token(&[("HF_HOME", home), ("HUGGING_FACE_HUB_TOKEN", "old"), ("HF_TOKEN", " new\n")]), "new");
        assert!(matches!(settings(&[("HF_TOKEN", "a\nb")]), Err(Error::BadToken)));
    }
}
