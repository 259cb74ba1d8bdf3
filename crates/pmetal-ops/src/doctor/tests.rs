use std::{collections::BTreeSet, sync::Arc};

use candle_core::{DType, Device, Tensor};
use pmetal_emulator::Emulator;
use pmetal_metal::{
    AttentionRows, AttentionSpec, Call, Error, Facts, Gemm, Gpu, Grid, Memory, Result, Statistics, attention_backward,
    attention_forward, kernels, pitch,
};

use super::*;
use crate::emulate;

/// The emulator as a GPU like Metal's: attention on matrix units, and products that another kernel finishes. One kernel may be wrong.
struct Mac {
    emulator: Emulator,
    wrong: Option<Wrong>,
}

#[derive(Clone, Copy)]
enum Wrong {
    /// It adds a little to what it wrote last.
    Off(&'static str),
    /// It does not run.
    Refused(&'static str),
}

impl Mac {
    /// The checks of `ops`, but for those that would take the emulator long and reach no other kernel.
    fn examined(wrong: Option<Wrong>, ops: &[&str]) -> Vec<Check> {
        let gpu = Arc::new(Self { emulator: Emulator::new(), wrong });
        let long = [checks::LONG_ROWS, checks::LONG_WINDOWS];
        let operations = checks::ALL.iter().filter(|it| ops.contains(&it.op) && !long.contains(&it.name));
        emulate(gpu, || examine(&Device::Cpu, operations, false, |_| {})).unwrap()
    }
}

impl Gpu for Mac {
    fn launch(&self, call: &Call) -> Result<()> {
        match self.wrong {
            Some(Wrong::Refused(name)) if name == call.kernel.name => {
                Err(Error::Device { device: "Mac".into(), reason: format!("no {name} today") })
            }
            Some(Wrong::Off(name)) if name == call.kernel.name => {
                self.emulator.launch(call)?;
                let y = call.buffers[call.buffers.len() - 1];
                Ok(y.slice_set(&(y + 0.25)?, 0, 0)?)
            }
            _ => self.emulator.launch(call),
        }
    }

    fn gemm(&self, product: &Gemm) -> Result<()> {
        if product.alpha == 1.0 && product.beta == 0.0 {
            return self.emulator.gemm(product);
        }
        let c = product.c;
        let target = Tensor::zeros(c.shape(), c.dtype(), c.device())?;
        self.emulator.gemm(&Gemm { c: &target, alpha: 1.0, beta: 0.0, ..*product })?;
        let (width, pitch) = (c.dim(1)? as u64, pitch(c).unwrap_or_default() as u64);
        let (alpha, beta) = (product.alpha, product.beta);
        let params = kernels::EpilogueParams { n: c.elem_count() as u64, width, pitch, alpha, beta };
        kernels::gemm_epilogue(self, c.dtype(), Grid::cover(c.elem_count(), 4), &target, c, params)
    }

    fn attention_forward(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        out: &Tensor,
        rows: &AttentionRows,
        spec: &AttentionSpec,
    ) -> Result<Option<Statistics>> {
        Ok(attention_forward(self, [q, k, v], out, rows, spec)?.map(Statistics::Natural))
    }

    fn attention_backward(
        &self,
        dout: &Tensor,
        qkv: [&Tensor; 3],
        out: &Tensor,
        stats: &Tensor,
        grads: [&Tensor; 3],
        rows: &AttentionRows,
        spec: &AttentionSpec,
    ) -> Result<()> {
        let stats = stats.reshape((stats.elem_count() / spec.heads, spec.heads))?;
        attention_backward(self, dout, qkv, out, &stats, grads, rows, spec)
    }

    fn synchronize(&self) -> Result<()> {
        self.emulator.synchronize()
    }

    fn memory(&self) -> Result<Memory> {
        self.emulator.memory()
    }

    fn reset_peak(&self) -> Result<()> {
        self.emulator.reset_peak()
    }

    fn facts(&self) -> Facts {
        self.emulator.facts()
    }
}

fn failed(checks: &[Check]) -> BTreeSet<&str> {
    checks.iter().filter(|check| check.failure.is_some()).map(|check| check.operation).collect()
}

#[test]
fn every_kernel_is_launched_by_a_check_and_right() {
    let ops: Vec<&str> = checks::ALL.iter().map(|operation| operation.op).collect();
    let checks = Mac::examined(None, &ops);
    let wrong: Vec<_> = checks.iter().filter(|check| check.failure.is_some()).collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
    for dtype in [DType::F32, DType::BF16, DType::F16].map(|dtype| dtype.as_str()) {
        let of_dtype = checks.iter().filter(|check| check.dtype == dtype);
        let launched: BTreeSet<_> = of_dtype.flat_map(|check| check.kernels.iter().copied()).collect();
        let missing = kernels::ALL.iter().chain(kernels::METAL_ALL).map(|kernel| kernel.name);
        let missing: Vec<_> = missing.filter(|name| !launched.contains(name)).collect();
        // some kernels exist for one dtype alone
        let not_here: &[&str] = match dtype {
            "f32" => &["add_assign", "from_f32", "to_f32", "adamw_with_copy"],
            _ => &["adamw", "sample_token"],
        };
        assert!(missing.iter().all(|name| not_here.contains(name)), "{dtype}: {missing:?}");
    }
}

#[test]
fn the_cpu_is_right() {
    let checks = examine(&Device::Cpu, checks::ALL, false, |_| {}).unwrap();
    let wrong: Vec<_> = checks.iter().filter(|check| check.failure.is_some()).collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
    let operations: BTreeSet<_> = checks.iter().map(|check| check.operation).collect();
    assert!(operations.len() >= 10 && !operations.contains("attention_matrix"), "{operations:?}");
}

#[test]
fn a_wrong_kernel_is_found_and_its_operation_alone_is_switched_off() {
    let checks = Mac::examined(Some(Wrong::Off("rope")), &["rms_norm", "rope", "gated_activation"]);
    assert_eq!(failed(&checks), ["rope"].into());
    let failure = checks.iter().find_map(|check| check.failure.clone()).unwrap();
    assert!(failure.starts_with("differs by "), "{failure}");

    let checks = Mac::examined(Some(Wrong::Refused("attention_dq_128")), &["rope", "attention_matrix"]);
    assert_eq!(failed(&checks), ["attention_matrix"].into());
    let failure = checks.iter().find_map(|check| check.failure.clone()).unwrap();
    assert!(failure.contains("no attention_dq_128 today"), "{failure}");
    assert_eq!(
        judged(["rope".into(), "gone".into()].into(), &checks),
        ["attention_matrix", "gone"].map(Into::into).into()
    );
}

#[test]
fn verdicts_are_kept_for_their_machine_until_nothing_fails() {
    let space = tempfile::tempdir().unwrap();
    let folder = space.path().join("doctor");
    let subject = Subject { device: "GPU (of 80 GB)".into(), driver: "1.2".into(), version: "0.1.0".into() };
    let off: BTreeSet<String> = ["attention_matrix".to_owned()].into();
    assert!(verdict::read(&folder, &subject).is_empty());
    verdict::write(&folder, &subject, &BTreeSet::new()).unwrap();
    verdict::write(&folder, &subject, &off).unwrap();
    let names: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["gpu-of-80-gb-1.2-0.1.0.json"]);
    assert_eq!(verdict::read(&folder, &subject), off);
    assert!(verdict::read(&folder, &Subject { driver: "1.3".into(), ..subject.clone() }).is_empty());
    std::fs::write(folder.join(&names[0]), "{").unwrap();
    assert!(verdict::read(&folder, &subject).is_empty());
    verdict::write(&folder, &subject, &BTreeSet::new()).unwrap();
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 0);
}
