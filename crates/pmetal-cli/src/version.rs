use std::sync::LazyLock;

/// What `--version` says: the release, and the commit where the build was told (`PMETAL_COMMIT`).
pub static VERSION: LazyLock<String> = LazyLock::new(|| {
    let release = env!("CARGO_PKG_VERSION");
    match option_env!("PMETAL_COMMIT") {
        Some(commit) => format!("{release} ({commit})"),
        None => release.to_owned(),
    }
});
