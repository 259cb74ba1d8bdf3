use sysinfo::{CpuRefreshKind, MemoryRefreshKind, RefreshKind, System};

/// Bytes of memory this machine has; none where the system does not say.
pub fn total_memory() -> Option<u64> {
    let memory = RefreshKind::nothing().with_memory(MemoryRefreshKind::nothing().with_ram());
    Some(System::new_with_specifics(memory).total_memory()).filter(|&bytes| bytes > 0)
}

/// What the maker calls this machine's CPU; none where the system does not say.
pub fn cpu_name() -> Option<String> {
    let cpus = System::new_with_specifics(RefreshKind::nothing().with_cpu(CpuRefreshKind::nothing()));
    cpus.cpus().first().map(|cpu| cpu.brand().trim().to_owned()).filter(|name| !name.is_empty())
}

/// The operating system and its version, as in `macOS 15.5`.
pub fn system() -> String {
    System::long_os_version().unwrap_or_else(|| std::env::consts::OS.into())
}
