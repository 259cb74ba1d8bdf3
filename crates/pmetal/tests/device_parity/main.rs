//! Models on a GPU against transformers, PEFT and our own CPU path. The binary carries its fixtures: copied to a machine with a GPU it runs
//! there by itself, as `PMETAL_TEST_DEVICE=cuda device_parity-…`. Without that variable the emulator plays the GPU.

mod capture;
mod checkpointing;
#[path = "../../../pmetal-models/tests/common/mod.rs"]
mod common;
mod curves;
mod device;
mod generation;
mod logits;
mod training;
