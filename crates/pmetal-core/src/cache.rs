use std::{env, path::PathBuf};

/// A folder for what can be made again: `$PMETAL_CACHE/NAME`, else `pmetal/NAME` in the user's cache folder; none where the system names no
/// such folder. It need not be there yet.
pub fn cache_folder(name: &str) -> Option<PathBuf> {
    if let Some(folder) = env::var_os("PMETAL_CACHE") {
        return Some(PathBuf::from(folder).join(name));
    }
    let home = || env::home_dir().filter(|home| home.is_absolute());
    let user = match env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|path| path.is_absolute()) {
        Some(cache) => cache,
        None if cfg!(target_os = "macos") => home()?.join("Library/Caches"),
        None => home()?.join(".cache"),
    };
    Some(user.join("pmetal").join(name))
}
