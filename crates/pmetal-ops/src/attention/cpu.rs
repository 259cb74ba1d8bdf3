//! Attention by the CPU's kernels.

use candle_core::Tensor;
use pmetal_cpu::{AttentionShape, attention_backward, attention_forward, attention_sinks, attention_sinks_backward};

use super::{AttentionSpec, OP, Reach, Rows};
use crate::{
    Result,
    kernel::{View, for_dtype, room, tensor},
};

fn shape(spec: &AttentionSpec) -> AttentionShape {
    let &AttentionSpec { heads, kv_heads, head_dim, scale, reach, softcap } = spec;
    let reach = match reach {
        Reach::All => pmetal_cpu::Reach::All,
        Reach::Window(keys) => pmetal_cpu::Reach::Window(keys),
        Reach::Chunk(keys) => pmetal_cpu::Reach::Chunk(keys),
    };
    AttentionShape { heads, kv_heads, head_dim, scale, reach, softcap }
}

/// The result and the log-sum-exp of each query and head; `sinks` are f32.
pub(super) fn forward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    sinks: Option<&Tensor>,
    rows: &Rows,
    spec: &AttentionSpec,
) -> Result<Vec<Tensor>> {
    let (qv, kv, vv) = (View::of_tensor(q, OP)?, View::of_tensor(k, OP)?, View::of_tensor(v, OP)?);
    let mut lse = vec![0f32; q.dim(0)? * spec.heads];
    for_dtype!(OP, q.dtype(), T => {
        let mut out = room::<T>(q.elem_count());
        let (q_s, k_s, v_s) = (qv.slice::<T>()?, kv.slice::<T>()?, vv.slice::<T>()?);
        attention_forward(q_s, k_s, v_s, rows.segments(), &shape(spec), &mut out, &mut lse);
        if let Some(sinks) = sinks {
            attention_sinks(View::of_tensor(sinks, OP)?.slice::<f32>()?, &mut out, &mut lse);
        }
        Ok(vec![tensor(out, q.shape().clone())?, tensor(lse, (q.dim(0)?, spec.heads))?])
    })
}

/// The gradients of q, k and v.
pub(super) fn backward(
    dout: &Tensor,
    [q, k, v]: [&Tensor; 3],
    out: &Tensor,
    lse: &Tensor,
    rows: &Rows,
    spec: &AttentionSpec,
) -> Result<[Tensor; 3]> {
    let (dv_, qv, kv, vv) =
        (View::of_tensor(dout, OP)?, View::of_tensor(q, OP)?, View::of_tensor(k, OP)?, View::of_tensor(v, OP)?);
    let (ov, lv) = (View::of_tensor(out, OP)?, View::of_tensor(lse, OP)?);
    for_dtype!(OP, q.dtype(), T => {
        let (mut dq, mut dk, mut dv) =
            (room::<T>(q.elem_count()), room::<T>(k.elem_count()), room::<T>(v.elem_count()));
        attention_backward(
            dv_.slice::<T>()?, qv.slice::<T>()?, kv.slice::<T>()?, vv.slice::<T>()?, ov.slice::<T>()?, lv.slice::<f32>()?,
            rows.segments(), &shape(spec), &mut dq, &mut dk, &mut dv,
        );
        Ok([tensor(dq, q.shape().clone())?, tensor(dk, k.shape().clone())?, tensor(dv, v.shape().clone())?])
    })
}

/// The gradient of the sinks, f32.
pub(super) fn backward_of_sinks(sinks: &Tensor, dout: &Tensor, out: &Tensor, lse: &Tensor) -> Result<Tensor> {
    let (sv, dv, ov, lv) =
        (View::of_tensor(sinks, OP)?, View::of_tensor(dout, OP)?, View::of_tensor(out, OP)?, View::of_tensor(lse, OP)?);
    let dsinks = for_dtype!(OP, out.dtype(), T => {
        Ok(attention_sinks_backward(sv.slice::<f32>()?, dv.slice::<T>()?, ov.slice::<T>()?, lv.slice::<f32>()?))
    })?;
    tensor(dsinks, sinks.shape().clone())
}
