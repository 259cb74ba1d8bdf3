//! The gradient of attention.

use crate::Element;
use crate::attention::{AttentionShape, Segment};

/// The gradients of q, k and v.
#[allow(clippy::too_many_arguments)]
pub fn attention_backward<T: Element>(
    dout: &[T],
    q: &[T],
    k: &[T],
    v: &[T],
    out: &[T],
    lse: &[f32],
    segments: &[Segment],
    shape: &AttentionShape,
    dq: &mut [T],
    dk: &mut [T],
    dv: &mut [T],
) {
    let (h, d, group) = (shape.heads, shape.head_dim, shape.heads / shape.kv_heads);
    let (mut dq32, mut dk32, mut dv32) = (vec![0.0f32; dq.len()], vec![0.0f32; dk.len()], vec![0.0f32; dv.len()]);
    for s in segments {
        for i in 0..s.q_len {
            for head in 0..h {
                let at = ((s.q_start + i) * h + head) * d;
                let kv = |j: usize| ((s.kv_start + j) * shape.kv_heads + head / group) * d;
                let delta: f32 = (0..d).map(|e| dout[at + e].to_f32() * out[at + e].to_f32()).sum();
                for j in 0..s.kv_len - s.q_len + i + 1 {
                    let b = kv(j);
                    let score: f32 = (0..d).map(|e| q[at + e].to_f32() * k[b + e].to_f32()).sum();
                    let p = (score * shape.scale - lse[(s.q_start + i) * h + head]).exp();
                    let dp: f32 = (0..d).map(|e| dout[at + e].to_f32() * v[b + e].to_f32()).sum();
                    let ds = p * (dp - delta) * shape.scale;
                    for e in 0..d {
                        dv32[b + e] += p * dout[at + e].to_f32();
                        dq32[at + e] += ds * k[b + e].to_f32();
                        dk32[b + e] += ds * q[at + e].to_f32();
                    }
                }
            }
        }
    }
    crate::convert(&dq32, dq);
    crate::convert(&dk32, dk);
    crate::convert(&dv32, dv);
}
