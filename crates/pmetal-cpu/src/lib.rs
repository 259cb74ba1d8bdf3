//! CPU kernels of PMetal on slices: products, attention, norms, loss, optimizer; no graph.
//!
//! Every kernel takes row-major slices, contiguous unless it says otherwise, of any [`Element`]; arithmetic and
//! reductions are f32 inside. Work is cut into chunks whose borders depend on the shapes alone, and partial sums are
//! added in a fixed order, so the same inputs give the same bits for any number of threads.
//!
//! Lengths that do not fit together are errors of the program, not of its user: kernels assert, naming themselves.
//! Callers check what comes from outside before they get here.

mod activation;
mod alloc;
mod attention;
mod attention_decode;
mod cross_entropy;
mod element;
mod elementwise;
mod embedding;
mod gemm;
mod gemv;
mod layer_norm;
mod level;
mod math;
mod norm;
mod norm_rope;
mod norm_row;
mod optimizer;
mod random;
mod room;
mod rope;
mod row_sums;
mod scaled;
mod scratch;
mod shared;
mod simd;
mod tasks;
mod vector;

pub use activation::{
    clamped_backward, clamped_forward, geglu_backward, geglu_forward, swiglu_backward, swiglu_forward,
};
pub use alloc::{PoolAllocator, live_bytes, peak_bytes, reset_peak};
pub use attention::{
    AttentionShape, MAX_HEAD_DIM, Reach, Segment, attention_backward, attention_forward, attention_sinks,
    attention_sinks_backward,
};
pub use cross_entropy::{cross_entropy_losses, cross_entropy_rows, softcap};
pub use element::Element;
pub use elementwise::{add_assign, add_assign_mixed, bias_add, bias_grad, convert, dropout};
pub use embedding::{gather_rows, scatter_add_rows};
pub use gemm::{Arithmetic, Left, Mat, PackedWeight, Right, matmul, multiply};
pub use gemv::{FewRows, MAX_ROWS, few_rows};
pub use layer_norm::{LayerNormStatistics, layer_norm_backward, layer_norm_forward, layer_norm_weight_gradient};
pub use level::Level;
pub use norm::{add_rms_norm_forward, rms_norm_backward, rms_norm_forward};
pub use norm_rope::{HeadAngles, rms_norm_rope_backward, rms_norm_rope_forward};
pub use optimizer::{AdamW, Factors, adamw, sum_of_squares};
pub use random::{mix, normal, uniform};
pub use room::room;
pub use rope::{HeadLayout, rope, rope_into};
pub use row_sums::{Columns, RowLists, copy_columns, dot_rows, sum_rows};
pub use scaled::{scale_rows, sum_heads};
pub use tasks::threads;
