use std::{
    env, fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use candle_core::Device;
use include_dir::{Dir, include_dir};
use pmetal_emulator::Emulator;

use crate::common::{Fixture, UNPACKED};

static MODELS: Dir = include_dir!("$CARGO_MANIFEST_DIR/../pmetal-models/tests/fixtures");
/// Rows to train on.
pub static ROWS: &str = include_str!("../../../pmetal-trainer/tests/fixtures/rows.jsonl");

/// Whether a GPU was named.
pub fn is_real() -> bool {
    env::var_os("PMETAL_TEST_DEVICE").is_some()
}

/// Runs `check` on every fixture that `wanted` takes, and says at the end which failed.
pub fn on_each(wanted: impl Fn(&Fixture) -> bool, check: impl Fn(&Device, &Fixture)) {
    on_device(|device| {
        let mut failed = Vec::new();
        for fixture in Fixture::all().into_iter().filter(wanted) {
            let agrees = catch_unwind(AssertUnwindSafe(|| check(device, &fixture))).is_ok();
            eprintln!("{}: {}", fixture.name, if agrees { "agrees" } else { "FAILED" });
            if !agrees {
                failed.push(fixture.name);
            }
        }
        assert!(failed.is_empty(), "{failed:?}");
    });
}

/// Runs a test on the device that was named, else with the emulator in the place of the CPU. One at a time: a stream that is captured
/// takes no other test's work.
pub fn on_device(test: impl FnOnce(&Device)) {
    static TURN: Mutex<()> = Mutex::new(());
    static DEVICE: OnceLock<Device> = OnceLock::new();
    static EMULATOR: OnceLock<Arc<Emulator>> = OnceLock::new();
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    UNPACKED.get_or_init(unpack);
    match env::var("PMETAL_TEST_DEVICE") {
        Ok(name) => test(DEVICE.get_or_init(|| pmetal_ops::device::open(name.parse().unwrap()).unwrap())),
        Err(_) => {
            let emulator = EMULATOR.get_or_init(|| Arc::new(Emulator::new())).clone();
            pmetal_ops::emulate(emulator, || test(&Device::Cpu));
        }
    }
}

/// Runs `f` by the CPU's own kernels, inside [`on_device`] too.
pub fn on_cpu<T: Send>(f: impl FnOnce() -> T + Send) -> T {
    // the emulator is of this thread
    std::thread::scope(|scope| scope.spawn(f).join().unwrap())
}

fn unpack() -> PathBuf {
    let folder = env::temp_dir().join(format!("pmetal-parity-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    MODELS.extract(&folder).unwrap();
    folder
}
