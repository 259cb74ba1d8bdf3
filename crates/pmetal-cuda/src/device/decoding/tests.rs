//! Which heads the texts are compiled for.

use super::*;
use crate::device::nvrtc::takes;

fn heads(dtype: DType, heads: usize, kv_heads: usize, head_dim: usize) -> Heads {
    let spec = AttentionSpec { heads, kv_heads, head_dim, scale: 1.0, reach: Reach::All, softcap: None };
    Heads::new(dtype, &spec)
}

fn compile(text: &str, dtype: DType, sizes: &[(&str, usize)]) -> Result<()> {
    let (text, options) = source(text, dtype, sizes)?;
    takes("decoding.cuh", &text, &options.iter().map(String::as_str).collect::<Vec<_>>(), 90)
}

/// Needs the compiler, but no GPU.
#[test]
fn texts_compile_for_every_dtype_and_heads_of_many_widths() -> Result<()> {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        compile(PRODUCT, dtype, &PRODUCT_SIZES)?;
        for (queries, keys, head_dim) in [(32, 8, 128), (9, 3, 64), (4, 4, 16), (8, 1, 128), (4, 1, 256)] {
            let heads = heads(dtype, queries, keys, head_dim);
            if heads.fit() {
                compile(ATTENTION, dtype, &heads.sizes())?;
            }
        }
        compile(ATTENTION, dtype, &Heads { limited: true, ..heads(dtype, 32, 8, 128) }.sizes())?;
    }
    Ok(())
}

#[test]
fn heads_that_the_text_does_not_take() {
    let fits = |dtype, queries, keys, head_dim| heads(dtype, queries, keys, head_dim).fit();
    assert!(fits(DType::BF16, 32, 8, 128) && fits(DType::F32, 9, 3, 64) && fits(DType::F16, 2, 2, 8));
    assert!(!fits(DType::BF16, 32, 8, 96) && !fits(DType::F32, 4, 4, 256) && !fits(DType::BF16, 16, 1, 128));
    assert!(!fits(DType::BF16, 6, 4, 64) && !fits(DType::F64, 4, 4, 64) && !fits(DType::BF16, 4, 0, 64));
}
