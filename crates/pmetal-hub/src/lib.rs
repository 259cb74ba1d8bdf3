//! Models and datasets of the Hugging Face Hub by id: found in the cache that Python's `huggingface_hub` shares, else downloaded into it;
//! and folders uploaded to it.
//!
//! [`locate`] is what takes a path or an id wherever a path is taken. [`Hub`] is the same with settings of one's own, for single files, a
//! folder outside the cache, and uploads.
//!
//! The requests are made with `ureq` and not with the `hf-hub` crate. Version 1.0 of that begins a file again from its first byte when the
//! connection drops, gives up on a body that ends early, does not read `Retry-After`, checks neither length nor sha256, and takes a cached
//! snapshot for whole without looking; around it come tokio, reqwest, hyper and the Xet client. Files that the hub keeps in Xet storage
//! come through its plain HTTP bridge here.

mod cache;
mod client;
mod download;
mod error;
mod hub;
mod id;
mod local_dir;
mod locate;
mod progress;
mod refusal;
mod retry;
mod select;
mod settings;
mod snapshot;
mod upload;
mod url;

pub use error::{Error, Result};
pub use hub::Hub;
pub use id::{Kind, RepoId, is_repo_id};
pub use locate::locate;
pub use progress::DownloadProgress;
pub use select::Choice;
pub use settings::{Patience, Settings};
pub use snapshot::Wanted;
pub use upload::{Upload, Uploaded};
