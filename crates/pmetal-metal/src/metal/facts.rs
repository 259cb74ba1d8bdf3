//! What a Metal device is.

use candle_core::MetalDevice;
use objc2_foundation::NSProcessInfo;
use objc2_metal::{MTLDevice as _, MTLGPUFamily};

use crate::Facts;

/// Families from the newest on, with the chips that began them.
const FAMILIES: [(MTLGPUFamily, &str); 6] = [
    (MTLGPUFamily::Apple10, "GPU family Apple 10 (M5)"),
    (MTLGPUFamily::Apple9, "GPU family Apple 9 (M3)"),
    (MTLGPUFamily::Apple8, "GPU family Apple 8 (M2)"),
    (MTLGPUFamily::Apple7, "GPU family Apple 7 (M1)"),
    (MTLGPUFamily::Apple6, "GPU family Apple 6"),
    (MTLGPUFamily::Mac2, "GPU family Mac 2 (no Apple GPU)"),
];

pub(super) fn name(device: &MetalDevice) -> String {
    device.metal_device().as_ref().name().to_string()
}

/// Whether the device multiplies matrices of SIMD groups: Apple's GPUs from the M1 on.
pub(super) fn has_matrices(device: &MetalDevice) -> bool {
    device.metal_device().as_ref().supportsFamily(MTLGPUFamily::Apple7)
}

pub(super) fn facts(device: &MetalDevice) -> Facts {
    let raw = device.metal_device().as_ref();
    let mut features = Vec::new();
    features.extend(FAMILIES.iter().find(|(family, _)| raw.supportsFamily(*family)).map(|(_, name)| name.to_string()));
    for (family, version) in [(MTLGPUFamily::Metal4, "Metal 4"), (MTLGPUFamily::Metal3, "Metal 3")] {
        if raw.supportsFamily(family) {
            features.push(version.into());
        }
    }
    if has_matrices(device) {
        features.push("simdgroup_matrix".into());
    }
    if raw.hasUnifiedMemory() {
        features.push("unified memory".into());
    }
    features.push(format!("buffers of at most {} MiB", raw.maxBufferLength() >> 20));
    features.push(format!("{} KiB of threadgroup memory", raw.maxThreadgroupMemoryLength() >> 10));
    let system = NSProcessInfo::processInfo().operatingSystemVersionString();
    Facts { name: name(device), driver: format!("macOS {system}"), features }
}
