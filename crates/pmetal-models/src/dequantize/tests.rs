use std::{fs, path::Path};

use half::bf16;
use serde_json::{Value, json};

use super::*;
use crate::safetensors_folder::SafetensorsFolder;

const NAMES: [&str; 7] = ["bytes", "fp8.weight", "ragged.weight", "bf16.weight", "stack", "experts.x", "plain"];

fn fixture() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/quantized")
}

fn config() -> Value {
    json!({"quantization_config": {"quant_method": "fp8", "weight_block_size": [2, 4]}})
}

fn expected() -> HashMap<String, Tensor> {
    candle_core::safetensors::load(fixture().join("expected.safetensors"), &Device::Cpu).unwrap()
}

/// So that not-a-number and the sign of zero count.
fn bits(tensor: &Tensor) -> Vec<u16> {
    tensor.flatten_all().unwrap().to_vec1::<bf16>().unwrap().into_iter().map(bf16::to_bits).collect()
}

#[test]
fn every_byte_of_fp8_is_what_torch_says() {
    let expected = expected()["bytes"].flatten_all().unwrap().to_vec1::<f32>().unwrap();
    for (byte, (got, want)) in fp8::NUMBERS.iter().zip(expected).enumerate() {
        let same = got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan());
        assert!(same, "{byte:#x}: {got}, wanted {want}");
    }
}

#[test]
fn tensors_are_those_that_transformers_decodes() {
    let (folder, expected) = (SafetensorsFolder::open(&fixture(), &config()).unwrap().unwrap(), expected());
    let mut names: Vec<&str> = folder.iter().map(|(name, _)| name).collect();
    names.sort_unstable();
    let mut wanted = NAMES;
    wanted.sort_unstable();
    assert_eq!(names, wanted);
    for name in &NAMES[1..] {
        let (entry, want) = (folder.get(name).unwrap(), &expected[*name]);
        assert_eq!((entry.dtype(), entry.shape.dims()), (Some(DType::BF16), want.dims()), "{name}");
        let whole = entry.weight(name, DType::BF16).unwrap().tensor().unwrap();
        assert_eq!((whole.dims(), bits(&whole)), (want.dims(), bits(want)), "{name}");
    }
}

#[test]
fn matrices_are_read_one_by_one() {
    let (folder, expected) = (SafetensorsFolder::open(&fixture(), &config()).unwrap().unwrap(), expected());
    for name in ["stack", "experts.x", "plain"] {
        let entry = folder.get(name).unwrap();
        for index in 0..2 {
            let want = expected[name].get(index).unwrap();
            let (slice, turned) = (
                entry.slice(name, index, DType::BF16).unwrap(),
                entry.slice_transposed(name, index, DType::BF16).unwrap(),
            );
            assert_eq!((slice.shape().dims(), bits(&slice.tensor().unwrap())), (want.dims(), bits(&want)), "{name}");
            let want = want.t().unwrap().contiguous().unwrap();
            assert_eq!((turned.dims(), bits(&turned)), (want.dims(), bits(&want)), "{name}, transposed");
        }
        assert!(entry.slice(name, 2, DType::BF16).is_err() && entry.slice_transposed(name, 2, DType::BF16).is_err());
    }
    assert!(folder.get("fp8.weight").unwrap().slice("fp8.weight", 1 << 20, DType::BF16).is_err());
}

#[test]
fn wide_matrices_are_transposed_tile_by_tile() {
    for (rows, width) in [(1, 1), (3, 31), (2, 32), (5, 33), (70, 97), (0, 4), (4, 0)] {
        let x: Vec<usize> = (0..rows * width).collect();
        let y = transpose(&x, width);
        assert!((0..rows * width).all(|i| y[(i % width) * rows + i / width] == x[i]), "{rows} by {width}");
        assert_eq!(y.len(), x.len());
    }
}

/// What is said about a file of these tensors, all their bytes zero.
fn refusal(config: &Value, tensors: &[(&str, &str, &[usize])]) -> String {
    let (mut header, mut end) = (json!({}), 0);
    for (name, dtype, shape) in tensors {
        let bytes = shape.iter().product::<usize>() * if *dtype == "F32" { 4 } else { 1 };
        header[*name] = json!({"dtype": dtype, "shape": shape, "data_offsets": [end, end + bytes]});
        end += bytes;
    }
    let header = header.to_string().into_bytes();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.resize(file.len() + end, 0);
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("model.safetensors"), file).unwrap();
    let read = |folder: SafetensorsFolder| {
        folder.iter().try_for_each(|(name, entry)| entry.weight(name, DType::BF16).map(drop))
    };
    SafetensorsFolder::open(folder.path(), config).and_then(|folder| read(folder.unwrap())).unwrap_err().to_string()
}

#[test]
fn what_does_not_fit_is_named() {
    let blocks = config();
    let fp8 =
        |scales: &[usize], dtype: &str| refusal(&blocks, &[("w", "F8_E4M3", &[6, 8]), ("w_scale_inv", dtype, scales)]);
    let mxfp4 = |blocks: &[usize], scales: &[usize]| {
        refusal(&json!({}), &[("x_blocks", "U8", blocks), ("x_scales", "U8", scales)])
    };
    for (said, parts) in [
        (fp8(&[3, 1], "F32"), ["w_scale_inv is F32 [3, 1]", "expected F32 [3, 2]"]),
        (fp8(&[6], "F32"), ["w_scale_inv is F32 [6]", "expected F32 [3, 2]"]),
        (fp8(&[3, 2], "I8"), ["w_scale_inv is I8 [3, 2]", "expected F32 [3, 2]"]),
        (
            refusal(&blocks, &[("w", "F8_E4M3", &[6]), ("w_scale_inv", "F32", &[1])]),
            ["tensor w is [6]", "only matrices"],
        ),
        (refusal(&blocks, &[("w", "F8_E4M3", &[6, 8])]), ["tensor w is F8_E4M3 without its scales", "expected F32"]),
        (mxfp4(&[2, 6, 3, 15], &[2, 6, 3]), ["x_blocks [2, 6, 3, 15]", "[n, rows, groups, 16]"]),
        (mxfp4(&[2, 6, 3, 16], &[2, 6, 4]), ["x_scales U8 [2, 6, 4]", "[n, rows, groups]"]),
        (mxfp4(&[6, 3, 16], &[6, 3]), ["x_blocks [6, 3, 16]", "[n, rows, groups, 16]"]),
        (mxfp4(&[0, 1, usize::MAX, 16], &[0, 1, usize::MAX]), ["x_blocks [0, 1,", "[n, rows, groups, 16]"]),
        (
            refusal(
                &json!({}),
                &[("x", "U8", &[1]), ("x_blocks", "U8", &[1, 1, 1, 16]), ("x_scales", "U8", &[1, 1, 1])],
            ),
            ["tensor x is there twice", "x_blocks"],
        ),
    ] {
        assert!(parts.iter().all(|part| said.contains(part)), "{said}, wanted {parts:?}");
    }
    for block in [json!([2]), json!([0, 4]), json!("2x4"), json!([2, -1])] {
        let said = refusal(&json!({"quantization_config": {"weight_block_size": block}}), &[]);
        assert!(said.contains("quantization_config.weight_block_size: expected two whole numbers"), "{said}");
    }
}
