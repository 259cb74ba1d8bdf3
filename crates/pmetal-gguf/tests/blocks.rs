//! Every block format against llama.cpp's Python package; see `scripts/make-gguf-fixtures.py`.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use pmetal_gguf::GgufFile;

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures");

fn numbers(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn every_block_format_decodes_to_the_reference_numbers() {
    let file = GgufFile::open(Path::new(FIXTURES).join("blocks.gguf")).unwrap();
    let expected =
        candle_core::safetensors::load(Path::new(FIXTURES).join("blocks.safetensors"), &Device::Cpu).unwrap();
    assert_eq!(file.tensors().len(), 16);
    for tensor in file.tensors() {
        assert_eq!(tensor.block_type(), tensor.name);
        let wanted = &expected[&tensor.name];
        let found = file.dequantize(&tensor.name, DType::F32).unwrap();
        assert_eq!(found.dims(), wanted.dims(), "{}", tensor.name);
        for (found, wanted) in numbers(&found).into_iter().zip(numbers(wanted)) {
            // The order of a product's factors may differ: two roundings.
            assert!((found - wanted).abs() <= 3e-7 * wanted.abs().max(1e-3), "{}: {found} {wanted}", tensor.name);
        }
        for dtype in [DType::BF16, DType::F16] {
            let rounded = file.dequantize(&tensor.name, dtype).unwrap();
            assert_eq!(rounded.dtype(), dtype);
            assert_eq!(numbers(&rounded), numbers(&found.to_dtype(dtype).unwrap()), "{}", tensor.name);
        }
    }
}

#[test]
fn what_cannot_be_decoded_is_named() {
    let file = GgufFile::open(Path::new(FIXTURES).join("blocks.gguf")).unwrap();
    let error = file.dequantize("Q9_0", DType::F32).unwrap_err().to_string();
    assert!(error.contains("tensor 'Q9_0' is missing; download"), "{error}");
    let error = file.dequantize("Q4_0", DType::U8).unwrap_err().to_string();
    assert!(error.contains("into u8"), "{error}");
}
