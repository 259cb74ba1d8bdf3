//! Checks the kernels of a device on the machine in front of us, and remembers which failed.
//!
//! Every operation runs forward and backward on the device, in each dtype, and on the host by its plain-candle reference in f64 on the same
//! rounded inputs. An operation that lies further apart than its dtype's rounding explains, or fails, is switched off on this machine (by
//! device, driver and version of the program): [`crate::device::open`] lets it compute by its reference, until a later examination finds it
//! right.

mod checks;
pub(crate) mod compare;
mod measure;
mod prepare;
#[cfg(test)]
mod tests;
mod verdict;

use std::collections::BTreeSet;

use candle_core::{DType, Device, Tensor};
use pmetal_core::DeviceChoice;
use pmetal_metal::launches;
use serde::Serialize;

pub use self::measure::Rates;
use self::{
    checks::{Operation, Prepared, Run, Size},
    compare::{relative_error, results},
    verdict::Subject,
};
use crate::{
    Result, device,
    place::{gpu_of, is_off, switch_off, without},
};

/// A device, and what it is.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// As `--device` takes it.
    pub device: String,
    /// Its maker's name.
    pub name: String,
    /// Its driver's version; for a CPU the system's.
    pub driver: String,
    /// What it can do, for people.
    pub features: Vec<String>,
    /// Bytes of its memory, where the system tells.
    pub memory_total: Option<u64>,
    /// Bytes of it that this program's tensors take.
    pub memory_live: u64,
}

/// What became of one operation in one dtype.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// What was checked.
    pub name: &'static str,
    /// The operation it belongs to, which is switched off where this failed.
    pub operation: &'static str,
    /// The dtype of activations.
    pub dtype: &'static str,
    /// The largest error of an output, relative to the largest value. None where it failed before there was an output.
    pub forward_error: Option<f64>,
    /// The same of gradients, where there are any.
    pub backward_error: Option<f64>,
    /// The largest error that rounding explains.
    pub tolerance: f64,
    /// Microseconds of a forward at a realistic size.
    pub forward_us: Option<f64>,
    /// Microseconds of forward and backward.
    pub forward_backward_us: Option<f64>,
    /// The kernels that were launched, where they are our own texts.
    pub kernels: BTreeSet<&'static str>,
    /// What is wrong.
    pub failure: Option<String>,
}

/// What was found out about a device.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The device.
    #[serde(flatten)]
    pub machine: Machine,
    /// Every check, in the order in which they ran.
    pub checks: Vec<Check>,
    /// Speeds; none where they could not be measured: too little memory, or a device that does not answer.
    pub rates: Option<Rates>,
    /// Operations that compute by their reference on this machine from now on.
    pub switched_off: BTreeSet<String>,
    /// Why the next run will not know of it: the folder that it is kept in cannot be written.
    #[serde(skip)]
    pub not_kept: Option<String>,
}

/// What there is to tell while an examination goes on.
pub enum Progress<'a> {
    /// The device is open.
    Opened(&'a Machine),
    /// A check is done.
    Checked(&'a Check),
}

/// Examines the device that was asked for, and keeps what it found for later runs.
///
/// # Errors
/// Where the device does not open, has no memory left, or a reference fails.
pub fn run(choice: DeviceChoice, mut watch: impl FnMut(Progress)) -> Result<Report> {
    let device = device::open_as_is(choice)?;
    let machine = machine(&device)?;
    watch(Progress::Opened(&machine));
    let checks = examine(&device, checks::ALL, true, |check| watch(Progress::Checked(check)))?;
    let rates = rates(&device).ok();
    let subject = subject(&device)?;
    let folder = verdict::folder();
    let before = folder.as_ref().map(|folder| verdict::read(folder, &subject)).unwrap_or_default();
    let switched_off = judged(before, &checks);
    let kept = folder.map(|folder| verdict::write(&folder, &subject, &switched_off));
    let not_kept = kept.and_then(|kept| kept.err()).map(|e| e.to_string());
    Ok(Report { machine, checks, rates, switched_off, not_kept })
}

/// What a device reaches at most: a large product, a copy, a reading.
///
/// # Errors
/// Where the device has no memory left for them, or does not answer.
pub fn rates(device: &Device) -> Result<Rates> {
    measure::rates(device)
}

/// Switches off what an examination of this machine found wrong, and says so.
pub(crate) fn heed(device: &Device) -> Result<()> {
    let Some(folder) = verdict::folder().filter(|folder| folder.is_dir()) else { return Ok(()) };
    for op in verdict::read(&folder, &subject(device)?) {
        if !is_off(&op) {
            tracing::warn!(
                "the kernels of {op} failed `pmetal doctor` on this machine and are not used: this run is slower"
            );
            switch_off([op]);
        }
    }
    Ok(())
}

fn subject(device: &Device) -> Result<Subject> {
    let (device, driver) = match device::facts(device)? {
        Some(facts) => (facts.name, facts.driver),
        None => (format!("cpu {}", pmetal_cpu::Level::current()), String::new()),
    };
    Ok(Subject { device, driver, version: env!("CARGO_PKG_VERSION").into() })
}

fn machine(device: &Device) -> Result<Machine> {
    let name = device::name(device);
    Ok(match (device::facts(device)?, device::memory(device)?) {
        (Some(facts), Some(memory)) => Machine {
            device: name,
            name: facts.name,
            driver: facts.driver,
            features: facts.features,
            memory_total: Some(memory.total),
            memory_live: memory.live,
        },
        _ => Machine {
            device: name,
            name: pmetal_core::cpu_name().unwrap_or_else(|| std::env::consts::ARCH.into()),
            driver: pmetal_core::system(),
            features: vec![pmetal_cpu::Level::current().to_string(), format!("{} threads", pmetal_cpu::threads())],
            memory_total: pmetal_core::total_memory(),
            memory_live: pmetal_cpu::live_bytes() as u64,
        },
    })
}

/// What is switched off after an examination: what failed, and what failed before and was not reached.
fn judged(mut off: BTreeSet<String>, checks: &[Check]) -> BTreeSet<String> {
    for check in checks {
        off.remove(check.operation);
    }
    off.extend(checks.iter().filter(|check| check.failure.is_some()).map(|check| check.operation.to_owned()));
    off
}

/// Runs those checks that concern the device. Where the device no longer answers after a failure, the rest is left out.
fn examine<'a>(
    device: &Device,
    operations: impl IntoIterator<Item = &'a Operation>,
    timed: bool,
    mut done: impl FnMut(&Check),
) -> Result<Vec<Check>> {
    let is_cpu = gpu_of(device)?.is_none();
    let mut found = Vec::new();
    for operation in operations.into_iter().filter(|operation| operation.on_cpu || !is_cpu) {
        for &dtype in operation.dtypes {
            let Some(mut check) = compared(operation, device, dtype)? else { continue };
            if timed && check.failure.is_none() {
                time(operation, device, dtype, &mut check);
            }
            done(&check);
            let failed = check.failure.is_some();
            found.push(check);
            if failed && !answers(device) {
                return Ok(found);
            }
        }
    }
    Ok(found)
}

fn answers(device: &Device) -> bool {
    let sent = [1f32, 2.0];
    Tensor::new(&sent, device).and_then(|t| (t * 2.0)?.to_vec1::<f32>()).is_ok_and(|back| back == [2.0, 4.0])
}

/// An operation in one dtype against its reference; none where the device has no kernel of that kind.
fn compared(operation: &Operation, device: &Device, dtype: DType) -> Result<Option<Check>> {
    let mut check = Check {
        name: operation.name,
        operation: operation.op,
        dtype: dtype.as_str(),
        forward_error: None,
        backward_error: None,
        tolerance: (operation.tolerance)(dtype),
        forward_us: None,
        forward_backward_us: None,
        kernels: BTreeSet::new(),
        failure: None,
    };
    let mut served = false;
    for &size in operation.sizes {
        let reference = Run { device: &Device::Cpu, dtype: DType::F64, rounded: dtype };
        let want = without(operation.op, || compute(&(operation.prepare)(&reference, size)?))?;
        let run = Run { device, dtype, rounded: dtype };
        let ready = on_device(operation, || (operation.prepare)(&run, size));
        let (got, kernels) = launches(|| ready.and_then(|ready| on_device(operation, || compute(&ready))));
        // what a device has no matrix units for, it leaves to the plain kernels
        if operation.op == checks::MATRIX_ATTENTION.op && kernels.contains("attention_plain") {
            continue;
        }
        served = true;
        check.kernels.extend(kernels);
        let errors = got.and_then(|got| Ok((worst(&want.0, &got.0)?, worst(&want.1, &got.1)?)));
        match errors {
            Ok((forward, backward)) => {
                check.forward_error = larger(check.forward_error, forward);
                check.backward_error = larger(check.backward_error, backward);
            }
            Err(error) if error.is_out_of_memory() => return Err(error),
            Err(error) => {
                check.failure = Some(error.to_string());
                return Ok(Some(check));
            }
        }
    }
    let error = larger(check.forward_error, check.backward_error).unwrap_or(0.0);
    if error > check.tolerance {
        check.failure =
            Some(format!("differs by {error:.1e} of the largest value, {:.0e} is allowed", check.tolerance));
    }
    Ok(served.then_some(check))
}

fn on_device<T>(operation: &Operation, f: impl FnOnce() -> T) -> T {
    match operation.without {
        Some(other) => without(other, f),
        None => f(),
    }
}

/// Outputs, and the gradients of leaves and parameters.
fn compute(ready: &Prepared) -> Result<(Vec<Tensor>, Vec<Tensor>)> {
    let (outputs, mut grads) = results(&ready.leaves, |leaves| (ready.forward)(leaves))?;
    for param in ready.arena.iter().flat_map(|arena| arena.params()) {
        grads.push(param.grad()?);
    }
    Ok((outputs, grads))
}

fn worst(want: &[Tensor], got: &[Tensor]) -> Result<Option<f64>> {
    let mut most = None;
    for (want, got) in want.iter().zip(got) {
        most = larger(most, Some(relative_error(want, got)?));
    }
    Ok(most)
}

fn larger(a: Option<f64>, b: Option<f64>) -> Option<f64> {
    a.into_iter().chain(b).reduce(f64::max)
}

/// Fills in the times. A device without the memory for them, or that fails only now, leaves them out or says so.
fn time(operation: &Operation, device: &Device, dtype: DType, check: &mut Check) {
    let Size { rows, width } = operation.timed;
    // a CPU is a tenth of a GPU or less
    let rows = if device.is_cpu() { rows.div_ceil(4) } else { rows };
    let run = Run { device, dtype, rounded: dtype };
    let measured = on_device(operation, || {
        let ready = (operation.prepare)(&run, Size { rows, width })?;
        measure::times(device, &ready)
    });
    match measured {
        Ok((forward, both)) => (check.forward_us, check.forward_backward_us) = (Some(forward), both),
        Err(error) if error.is_out_of_memory() => {}
        Err(error) => check.failure = Some(error.to_string()),
    }
}
