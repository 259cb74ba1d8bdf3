//! A kernel whose body each test writes.

use candle_core::{DType, Device, Tensor};
use pmetal_emulator::Emulator;
use pmetal_metal::{Access, Buffer, Call, Element, Grid, Kernel};

/// Its file.
pub const FILE: &str = "trial.metal";

static TRIAL: Kernel = Kernel {
    name: "trial",
    file: FILE,
    buffers: &[
        Buffer { name: "x", access: Access::Read, element: Element::T, rows: true },
        Buffer { name: "y", access: Access::Write, element: Element::T, rows: true },
        Buffer { name: "z", access: Access::Update, element: Element::F32, rows: false },
    ],
    params_size: 4,
};

/// A trial: `trial(x, y, z)` with `x [n]` and `y [n]` of T, which may be rows with a pitch, and `z [n]`, both `x` and `z` counting from 0.
pub struct Trial {
    pub functions: &'static str,
    pub dtype: DType,
    pub n: usize,
    pub grid: Grid,
}

/// One threadgroup of 64 threads on 64 elements of f32.
pub const TRIAL_OF_64: Trial =
    Trial { functions: "", dtype: DType::F32, n: 64, grid: Grid { groups: [1, 1, 1], threads: 64 } };

impl Trial {
    /// What `y` and `z` hold after `body`, or what was caught.
    pub fn run(&self, body: &str) -> Result<[Vec<f32>; 2], String> {
        let count: Vec<f32> = (0..self.n).map(|i| i as f32).collect();
        self.run_on(body, &count, &count)
    }

    /// [`Trial::run`] on other numbers.
    pub fn run_on(&self, body: &str, x: &[f32], z: &[f32]) -> Result<[Vec<f32>; 2], String> {
        let tensor = |data: &[f32]| Tensor::new(data, &Device::Cpu).unwrap();
        let z = tensor(z);
        let [x, y] = [x, &vec![0.0; self.n]].map(|data| tensor(data).to_dtype(self.dtype).unwrap());
        self.run_tensors(body, &x, &y, &z)?;
        Ok([y, z].map(|t| t.to_dtype(DType::F32).unwrap().to_vec1().unwrap()))
    }

    /// [`Trial::run`] on these tensors.
    pub fn run_tensors(&self, body: &str, x: &Tensor, y: &Tensor, z: &Tensor) -> Result<(), String> {
        let params = (self.n as u32).to_ne_bytes();
        let call = Call { kernel: &TRIAL, dtype: self.dtype, grid: self.grid, buffers: &[x, y, z], params: &params };
        call.launch(&self.emulator(body)).map_err(|e| e.to_string())
    }

    /// The emulator of `body`, which is not compiled yet.
    pub fn emulator(&self, body: &str) -> Emulator {
        let text = format!(
            "struct TrialParams {{ uint n; }};\n{}\nKERNEL(trial)(READ_ROWS(T, x, 0), WRITE_ROWS(T, y, 1), UPDATE(float, z, 2), \
             PARAMS(TrialParams, 3))\n{{\n{body}\n}}\n",
            self.functions
        );
        Emulator::of(FILE, &text, &[&TRIAL])
    }
}
