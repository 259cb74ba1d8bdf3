//! How the work of attention's kernels is cut, and which text they are compiled of.

use candle_core::cuda_backend::{WrapErr, cudarc::driver::sys};
use pmetal_metal::{AttentionSpec, Reach, Result};

use super::super::CudaGpu;

/// The text for every chip since sm_80.
const TILED: &str = concat!(
    include_str!("../../../kernels/attention_tiles.cuh"),
    include_str!("../../../kernels/attention_softmax.cuh"),
    "#line 1 \"attention.cu\"\n",
    include_str!("../../../kernels/attention.cu")
);

/// The text for Hopper, where heads are wider than 64.
const HOPPER: &str = concat!(
    include_str!("../../../kernels/attention_tiles.cuh"),
    include_str!("../../../kernels/attention_softmax.cuh"),
    include_str!("../../../kernels/attention_rings.cuh"),
    "#line 1 \"attention_hopper.cu\"\n",
    include_str!("../../../kernels/attention_hopper.cu"),
    "#line 1 \"attention_hopper_backward.cu\"\n",
    include_str!("../../../kernels/attention_hopper_backward.cu")
);

/// The widest heads that these kernels take.
pub(crate) const WIDEST: usize = 128;

/// What the kernels are compiled for beside a dtype and a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Variant {
    head_dim: usize,
    /// Whether queries see less than every key up to their own.
    limited: bool,
    /// Whether scores have a cap.
    capped: bool,
}

impl Variant {
    pub(super) fn of(spec: &AttentionSpec) -> Self {
        Self { head_dim: spec.head_dim, limited: spec.reach != Reach::All, capped: spec.softcap.is_some() }
    }
}

/// How a kernel's work is cut, as its text has the host define.
#[derive(Clone, Copy)]
pub(super) struct Cut {
    /// Groups of four warps that compute in a block, each with 64 rows of its own.
    groups: usize,
    /// Rows of a tile that streams past: 64 or 128.
    tile: usize,
    /// Tiles in shared memory at a time.
    stages: usize,
    /// Groups that only copy; their blocks go through a list of items, those of other kernels have one each.
    copying: usize,
    /// Bytes of shared memory.
    pub(super) shared: usize,
}

impl Cut {
    pub(super) fn rows(self) -> usize {
        self.groups * 64
    }

    pub(super) fn threads(self) -> usize {
        (self.groups + self.copying) * 128
    }

    pub(super) fn is_listed(self) -> bool {
        self.copying > 0
    }

    fn options(self, kernel: &str) -> [String; 3] {
        [("GROUPS", self.groups), ("TILE", self.tile), ("STAGES", self.stages)]
            .map(|(name, value)| format!("-D{kernel}_{name}={value}"))
    }
}

/// The cuts of the three kernels for heads of one width.
#[derive(Clone, Copy)]
pub(super) struct Plan {
    variant: Variant,
    pub(super) forward: Cut,
    pub(super) dq: Cut,
    pub(super) dkv: Cut,
}

impl Plan {
    /// The cuts measured best on an H100 and an H200, with wgmma and without; the latter fit every chip since sm_80.
    pub(super) fn of(gpu: &CudaGpu, variant: Variant) -> Result<Option<Self>> {
        let (capability, head_dim) = (gpu.context.compute_capability().w()?, variant.head_dim);
        if capability < (8, 0) || head_dim == 0 || head_dim > WIDEST || !head_dim.is_multiple_of(8) {
            return Ok(None);
        }
        let shared = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        let shared = usize::try_from(gpu.context.attribute(shared).w()?).unwrap_or_default();
        let plan = Self::for_capability(capability, variant);
        let needed = plan.forward.shared.max(plan.dq.shared).max(plan.dkv.shared);
        Ok((needed <= shared).then_some(plan))
    }

    fn for_capability(capability: (i32, i32), variant: Variant) -> Self {
        match (capability, variant.head_dim) {
            ((9, 0), ..=64) => Self::cut(variant, 0, [(1, 64, 2), (1, 64, 3), (1, 64, 3)]),
            ((9, 0), _) => Self::cut(variant, 1, [(2, 128, 2), (2, 64, 4), (2, 64, 4)]),
            _ => Self::cut(variant, 0, [(1, 64, 2); 3]),
        }
    }

    /// From groups that copy, and groups, tile and stages of each kernel.
    fn cut(variant: Variant, copying: usize, cuts: [(usize, usize, usize); 3]) -> Self {
        let bytes = |rows: usize| rows * variant.head_dim.next_multiple_of(64) * 2;
        // barriers, and what begins tiles on a multiple of 1024 bytes
        const MORE: usize = 1024 + 256;
        // own rows: queries; queries, their gradients and where there is room the results; keys and values
        let own = [1, 2 + copying, 2];
        // floats: the statistics of own rows; those of a stage's
        let floats = |kernel, rows: usize, stages: usize| match kernel {
            1 => rows * 4 * copying,
            2 => stages * if copying > 0 { 512 } else { 1024 },
            _ => 0,
        };
        let [forward, dq, dkv] = [0, 1, 2].map(|kernel| {
            let (groups, tile, stages) = cuts[kernel];
            let rows = groups * 64;
            let shared = bytes(own[kernel] * rows + stages * 2 * tile) + floats(kernel, rows, stages) + MORE;
            Cut { groups, tile, stages, copying, shared }
        });
        Self { variant, forward, dq, dkv }
    }

    /// Name and text of the kernels.
    pub(super) fn text(&self) -> (&'static str, &'static str) {
        if self.forward.is_listed() { ("attention_hopper.cu", HOPPER) } else { ("attention.cu", TILED) }
    }

    /// What the host defines for it.
    pub(super) fn options(&self, dtype: &str) -> Vec<String> {
        let kernels = [("FORWARD", self.forward), ("DQ", self.dq), ("DKV", self.dkv)];
        let cuts = kernels.into_iter().flat_map(|(kernel, cut)| cut.options(kernel));
        let Variant { head_dim, limited, capped } = self.variant;
        let flags = [("LIMITED", limited), ("CAPPED", capped)].map(|(name, on)| format!("-D{name}={}", u8::from(on)));
        [format!("-D{dtype}"), format!("-DD={head_dim}")].into_iter().chain(flags).chain(cuts).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::nvrtc;

    /// Needs the compiler, but no GPU.
    #[test]
    fn every_plan_compiles_without_headers() -> Result<()> {
        for (capability, dtype, head_dim, limited, capped) in [
            (80, "BF16", 128, false, false),
            (80, "BF16", 128, true, true),
            (90, "BF16", 128, false, false),
            (90, "BF16", 128, true, false),
            (90, "F16", 72, true, true),
            (90, "F16", 64, false, true),
            (120, "F16", 8, true, false),
        ] {
            let variant = Variant { head_dim, limited, capped };
            let plan = Plan::for_capability((capability / 10, capability % 10), variant);
            let (file, text) = plan.text();
            let options = plan.options(dtype);
            nvrtc::takes(file, text, &options.iter().map(String::as_str).collect::<Vec<_>>(), capability)?;
        }
        Ok(())
    }

    #[test]
    fn a_hopper_has_the_shared_memory() {
        for head_dim in (8..=WIDEST).step_by(8) {
            let plan = Plan::for_capability((9, 0), Variant { head_dim, limited: false, capped: false });
            assert!([plan.forward, plan.dq, plan.dkv].iter().all(|cut| cut.shared <= 227 * 1024), "{head_dim}");
        }
    }
}
