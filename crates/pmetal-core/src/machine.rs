use sysinfo::{MemoryRefreshKind, RefreshKind, System};

/// Bytes of memory this machine has; none where the system does not say.
pub fn total_memory() -> Option<u64> {
    let memory = RefreshKind::nothing().with_memory(MemoryRefreshKind::nothing().with_ram());
    Some(System::new_with_specifics(memory).total_memory()).filter(|&bytes| bytes > 0)
}
