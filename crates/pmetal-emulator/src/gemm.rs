//! Matrix products, by the CPU's own.

use candle_core::{CpuStorage, DType, InplaceOp1, Layout, Tensor, WithDType};
use half::{bf16, f16};
use pmetal_cpu::{Element, Mat, matmul};
use pmetal_metal::{Gemm, Result};

use crate::refused;

/// Computes what [`pmetal_metal::Gpu::gemm`] promises.
pub(crate) fn gemm(product: &Gemm) -> Result<()> {
    product.sizes()?;
    match product.a.dtype() {
        DType::F32 => product_of::<f32>(product),
        DType::F16 => product_of::<f16>(product),
        DType::BF16 => product_of::<bf16>(product),
        other => Err(refused(format!("a product of matrices of {other:?}"))),
    }
}

fn product_of<T: Element + WithDType>(product: &Gemm) -> Result<()> {
    // Copies: the result may lie in the same storage, which candle locks.
    let a = product.a.flatten_all()?.to_vec1::<T>()?;
    let b = product.b.flatten_all()?.to_vec1::<T>()?;
    product.c.inplace_op1(&Product { product, a, b })?;
    Ok(())
}

struct Product<'a, T> {
    product: &'a Gemm<'a>,
    a: Vec<T>,
    b: Vec<T>,
}

impl<T: Element> Product<'_, T> {
    fn compute<C: Element>(&self, c: &mut [C], layout: &Layout) -> candle_core::Result<()> {
        let Gemm { a, b, alpha, beta, .. } = *self.product;
        let view = |data, t: &Tensor, transposed: bool| {
            let (rows, cols) = t.dims2()?;
            let view = Mat::new(data, rows, cols);
            candle_core::Result::Ok(if transposed { view.t() } else { view })
        };
        let a = view(&self.a, a, self.product.a_transposed)?;
        let b = view(&self.b, b, self.product.b_transposed)?;
        let &[rows, columns] = layout.dims() else { candle_core::bail!("gemm: a result that is no matrix") };
        let pitch = layout.stride()[0].max(columns);
        let start = layout.start_offset();
        if rows > 0 {
            matmul(&mut c[start..start + (rows - 1) * pitch + columns], pitch, a, b, alpha, beta);
        }
        Ok(())
    }
}

impl<T: Element> InplaceOp1 for Product<'_, T> {
    fn name(&self) -> &'static str {
        "gemm"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        match storage {
            CpuStorage::F32(c) => self.compute(c, layout),
            CpuStorage::F16(c) => self.compute(c, layout),
            CpuStorage::BF16(c) => self.compute(c, layout),
            _ => candle_core::bail!("gemm: a result of another dtype"),
        }
    }
}
