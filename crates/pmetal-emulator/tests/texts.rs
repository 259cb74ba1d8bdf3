//! Every kernel text of `pmetal-metal` compiles under the strict prelude for every dtype.

use candle_core::DType;
use pmetal_emulator::Emulator;

#[test]
fn every_text_compiles_for_every_dtype() {
    let emulator = Emulator::new();
    let mut refused = Vec::new();
    for file in emulator.files() {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            if let Err(e) = emulator.compile(file, dtype) {
                refused.push(format!("{file} for {dtype:?}: {e}"));
            }
        }
    }
    assert!(refused.is_empty(), "{}", refused.join("\n"));
}
