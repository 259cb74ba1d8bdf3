//! Which vector and matrix instructions the kernels use: chosen once, when the first kernel runs.

use std::{fmt, sync::OnceLock};

use pulp::Arch;

/// A set of instructions. Kernels that have no form of their own for a level run the one of the widest set below it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// Plain Rust, for any CPU.
    Portable,
    /// x86-64 with AVX2 and FMA.
    Avx2,
    /// x86-64 with AVX-512 (F, CD, BW, DQ, VL).
    Avx512,
    /// [`Level::Avx512`] with dot products of bf16.
    Avx512Bf16,
    /// [`Level::Avx512Bf16`] with tiles of bf16 (AMX).
    Amx,
    /// aarch64.
    Neon,
    /// aarch64 with dot products of bf16.
    NeonBf16,
}

/// The variable that names a level below the machine's own, for tests and comparisons.
const VARIABLE: &str = "PMETAL_CPU_LEVEL";

impl Level {
    /// All of them, with the names that `PMETAL_CPU_LEVEL` takes.
    const NAMES: [(&str, Self); 7] = [
        ("portable", Self::Portable),
        ("avx2", Self::Avx2),
        ("avx512", Self::Avx512),
        ("avx512-bf16", Self::Avx512Bf16),
        ("amx", Self::Amx),
        ("neon", Self::Neon),
        ("neon-bf16", Self::NeonBf16),
    ];

    /// The level kernels run at: the machine's highest, or the one that the environment variable `PMETAL_CPU_LEVEL` names (`portable`,
    /// `avx2`, `avx512`, `avx512-bf16`, `amx`, `neon`, `neon-bf16`) where the machine has it.
    pub fn current() -> Self {
        static LEVEL: OnceLock<Level> = OnceLock::new();
        *LEVEL.get_or_init(|| {
            let wanted = std::env::var(VARIABLE).unwrap_or_default();
            let named = Self::NAMES.iter().find(|(name, _)| *name == wanted);
            named.map(|&(_, level)| level).filter(|level| level.is_present()).unwrap_or_else(Self::highest)
        })
    }

    fn highest() -> Self {
        let mut levels = Self::NAMES.iter().rev().map(|&(_, level)| level);
        levels.find(|level| level.is_present()).unwrap_or(Self::Portable)
    }

    /// Whether this machine has the level's instructions.
    pub fn is_present(self) -> bool {
        match self {
            Self::Portable => true,
            Self::Avx2 => avx2().is_some(),
            Self::Avx512 => avx512().is_some(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => avx512().is_some() && std::arch::is_x86_feature_detected!("avx512bf16"),
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Self::Amx => Self::Avx512Bf16.is_present() && crate::gemm::amx::is_present(),
            #[cfg(target_arch = "aarch64")]
            Self::Neon => neon().is_some(),
            #[cfg(target_arch = "aarch64")]
            Self::NeonBf16 => neon().is_some() && std::arch::is_aarch64_feature_detected!("bf16"),
            _ => false,
        }
    }

    /// Whether AVX-512's instructions for bf16 may be used.
    pub(crate) fn has_avx512_bf16(self) -> bool {
        matches!(self, Self::Avx512Bf16 | Self::Amx)
    }

    /// The widest of pulp's instruction sets that this level includes.
    pub(crate) fn arch(self) -> Arch {
        let found = match self {
            Self::Portable => None,
            Self::Avx2 => avx2(),
            Self::Avx512 | Self::Avx512Bf16 | Self::Amx => avx512(),
            Self::Neon | Self::NeonBf16 => neon(),
        };
        found.unwrap_or(Arch::Scalar)
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Self::Portable => "portable",
            Self::Avx2 => "AVX2",
            Self::Avx512 => "AVX-512",
            Self::Avx512Bf16 => "AVX-512 BF16",
            Self::Amx => "AMX",
            Self::Neon => "NEON",
            Self::NeonBf16 => "NEON BF16",
        })
    }
}

#[cfg(target_arch = "x86_64")]
fn avx2() -> Option<Arch> {
    pulp::x86::V3::try_new().map(Arch::V3)
}

#[cfg(target_arch = "x86_64")]
fn avx512() -> Option<Arch> {
    pulp::x86::V4::try_new().map(Arch::V4)
}

#[cfg(not(target_arch = "x86_64"))]
fn avx2() -> Option<Arch> {
    None
}

#[cfg(not(target_arch = "x86_64"))]
fn avx512() -> Option<Arch> {
    None
}

#[cfg(target_arch = "aarch64")]
fn neon() -> Option<Arch> {
    pulp::aarch64::Neon::try_new().map(Arch::Neon)
}

#[cfg(not(target_arch = "aarch64"))]
fn neon() -> Option<Arch> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_level_asked_for_is_taken_where_the_machine_has_it() {
        let wanted = std::env::var(VARIABLE).unwrap_or_default();
        for (name, level) in Level::NAMES {
            if name == wanted && level.is_present() {
                assert_eq!(Level::current(), level);
            }
        }
        assert!(Level::current().is_present());
    }
}
