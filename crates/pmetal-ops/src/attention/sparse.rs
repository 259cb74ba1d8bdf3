//! Attention over selected keys, and their selection. DeepSeek-AI, "DeepSeek-V3.2", 2025.
//!
//! By plain candle on every device, one head and one block of queries at a time: no more scores exist at once. The backward forms the weights
//! again.

use candle_core::{D, DType, Tensor};

use super::{AttentionSpec, Reach, Rows, check};
use crate::{
    Error, Result,
    autograd::{Value, one, only},
    profile,
};

const OP: &str = "sparse_attention";

/// Scores that exist at a time, roughly.
const SCORES: usize = 1 << 24;

/// As [`super::attention`] of a plain `spec`, but each query sees only the keys that it selected: `selected[t]` are their places in the row of
/// query `t`, none of them behind the query itself. Places that come twice count once.
///
/// # Errors
/// Where shapes do not fit, a query sees no key, or one that it may not see.
pub fn sparse_attention(
    q: &Value,
    k: &Value,
    v: &Value,
    selected: &[Vec<u32>],
    rows: &Rows,
    spec: AttentionSpec,
) -> Result<Value> {
    let _span = profile::span(OP);
    check(q.tensor(), k.tensor(), v.tensor(), None, rows, &spec)?;
    if !spec.is_plain() {
        return Err(Error::operand(OP, "reach and softcap", (Reach::All, None::<f32>), (spec.reach, spec.softcap)));
    }
    let (blocks, dtype) = (blocks(selected, rows, q.tensor().dim(0)?)?, q.tensor().dtype());
    let wide = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
    let [q_t, k_t, v_t] = [q, k, v].map(|x| x.tensor().detach());
    let heads = Heads { q: q_t, k: k_t, v: v_t, spec, wide };
    let outs = blocks.iter().map(|block| heads.forward(block)).collect::<candle_core::Result<Vec<_>>>()?;
    let out = Tensor::cat(&outs, 0)?.to_dtype(dtype)?;
    Ok(one(Value::record(vec![out], &[q, k, v], move |grads| {
        let dout = only(grads, OP)?;
        let [dq, dk, dv] = heads.backward(&blocks, &dout)?;
        Ok([dq, dk, dv].map(|grad| grad.to_dtype(dtype).map(Some)).into_iter().collect::<candle_core::Result<_>>()?)
    })))
}

/// For each query the places of the `top_k` largest `scores [queries, keys]` (f32, or what converts to it), in rising order: of the keys up to its
/// own, which for the first query is `first_position`; all of them where there are no more. Of equal scores the first come first.
///
/// # Errors
/// Where `scores` is no matrix.
pub fn top_keys(scores: &Tensor, top_k: usize, first_position: usize) -> Result<Vec<Vec<u32>>> {
    let (_, keys) = scores.dims2()?;
    let rows = scores.to_dtype(DType::F32)?.to_vec2::<f32>()?;
    let top_of = |(query, row): (usize, Vec<f32>)| {
        let seen = keys.min(first_position + query + 1);
        let mut places: Vec<u32> = (0..seen as u32).collect();
        // -0 is 0
        let score = |place: &u32| row[*place as usize] + 0.0;
        if top_k < seen {
            places.select_nth_unstable_by(top_k, |a, b| score(b).total_cmp(&score(a)).then(a.cmp(b)));
            places.truncate(top_k);
            places.sort_unstable();
        }
        places
    };
    Ok(rows.into_iter().enumerate().map(top_of).collect())
}

/// Queries of one row, and the keys of that row.
struct Block {
    first: usize,
    queries: usize,
    kv_first: usize,
    keys: usize,
    /// Of each query.
    selected: Vec<Vec<u32>>,
}

fn blocks(selected: &[Vec<u32>], rows: &Rows, queries: usize) -> Result<Vec<Block>> {
    if selected.len() != queries {
        return Err(Error::operand(OP, "queries with a selection", queries, selected.len()));
    }
    let mut blocks = Vec::new();
    for s in rows.segments() {
        let most = (SCORES / s.kv_len.max(1)).max(1);
        for start in (0..s.q_len).step_by(most) {
            let (first, queries) = (s.q_start + start, most.min(s.q_len - start));
            let selected = selected[first..first + queries].to_vec();
            for (i, places) in selected.iter().enumerate() {
                let own = s.kv_len - s.q_len + start + i;
                if places.is_empty() || places.iter().any(|&place| place as usize > own) {
                    let reason = format!("query {} selected {places:?}, not some of keys 0 to {own}", first + i);
                    return Err(Error::Lengths { op: OP, reason });
                }
            }
            blocks.push(Block { first, queries, kv_first: s.kv_start, keys: s.kv_len, selected });
        }
    }
    Ok(blocks)
}

impl Block {
    /// 0 where a query sees a key, else minus infinity: `[queries, keys]`.
    fn mask(&self, like: &Tensor, dtype: DType) -> candle_core::Result<Tensor> {
        let mut mask = vec![f32::NEG_INFINITY; self.queries * self.keys];
        for (row, places) in mask.chunks_exact_mut(self.keys).zip(&self.selected) {
            places.iter().for_each(|&place| row[place as usize] = 0.0);
        }
        Tensor::from_vec(mask, (self.queries, self.keys), like.device())?.to_dtype(dtype)
    }
}

struct Heads {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    wide: DType,
}

impl Heads {
    /// Head `head` of rows `first ..` of `x`.
    fn head(&self, x: &Tensor, (first, rows): (usize, usize), head: usize) -> candle_core::Result<Tensor> {
        let width = self.spec.head_dim;
        x.narrow(0, first, rows)?.narrow(1, head * width, width)?.to_dtype(self.wide)?.contiguous()
    }

    /// The key and value heads of a block, by their number.
    fn keys(&self, block: &Block, head: usize) -> candle_core::Result<[Tensor; 2]> {
        let rows = (block.kv_first, block.keys);
        Ok([self.head(&self.k, rows, head)?, self.head(&self.v, rows, head)?])
    }

    fn weights(&self, q: &Tensor, k: &Tensor, mask: &Tensor) -> candle_core::Result<Tensor> {
        let scores = ((q.matmul(&k.t()?)? * f64::from(self.spec.scale))? + mask)?;
        let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
        weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)
    }

    fn forward(&self, block: &Block) -> candle_core::Result<Tensor> {
        let mask = block.mask(&self.q, self.wide)?;
        let group = self.spec.heads / self.spec.kv_heads;
        let mut outs = Vec::with_capacity(self.spec.heads);
        for kv_head in 0..self.spec.kv_heads {
            let [k, v] = self.keys(block, kv_head)?;
            for head in kv_head * group..(kv_head + 1) * group {
                let q = self.head(&self.q, (block.first, block.queries), head)?;
                outs.push(self.weights(&q, &k, &mask)?.matmul(&v)?);
            }
        }
        Tensor::cat(&outs, 1)
    }

    /// The gradients of q, k and v. Keys that no row has get none.
    fn backward(&self, blocks: &[Block], dout: &Tensor) -> candle_core::Result<[Tensor; 3]> {
        let zeros = |x: &Tensor| Tensor::zeros(x.dims(), self.wide, x.device());
        let [dq, dk, dv] = [zeros(&self.q)?, zeros(&self.k)?, zeros(&self.v)?];
        for block in blocks {
            let [of_q, of_k, of_v] = self.backward_of(block, dout)?;
            dq.slice_set(&of_q, 0, block.first)?;
            // a row may have several blocks
            for (all, part) in [(&dk, of_k), (&dv, of_v)] {
                let before = all.narrow(0, block.kv_first, block.keys)?;
                all.slice_set(&(before + part)?, 0, block.kv_first)?;
            }
        }
        Ok([dq, dk, dv])
    }

    /// With weights `P`, `dP = dO Vᵀ` and `dS = scale P (dP - rowsum(P dP))`: `dQ = dS K`, `dK = dSᵀ Q`, `dV = Pᵀ dO`.
    fn backward_of(&self, block: &Block, dout: &Tensor) -> candle_core::Result<[Tensor; 3]> {
        let mask = block.mask(&self.q, self.wide)?;
        let (group, queries) = (self.spec.heads / self.spec.kv_heads, (block.first, block.queries));
        let [mut dqs, mut dks, mut dvs] = [Vec::new(), Vec::new(), Vec::new()];
        for kv_head in 0..self.spec.kv_heads {
            let [k, v] = self.keys(block, kv_head)?;
            let [mut dk, mut dv] = [k.zeros_like()?, v.zeros_like()?];
            for head in kv_head * group..(kv_head + 1) * group {
                let (q, dout) = (self.head(&self.q, queries, head)?, self.head(dout, queries, head)?);
                let weights = self.weights(&q, &k, &mask)?;
                let dweights = dout.matmul(&v.t()?)?;
                let inner = (&weights * &dweights)?.sum_keepdim(D::Minus1)?;
                let dscores = ((&weights * dweights.broadcast_sub(&inner)?)? * f64::from(self.spec.scale))?;
                dqs.push(dscores.matmul(&k)?);
                dk = (dk + dscores.t()?.matmul(&q)?)?;
                dv = (dv + weights.t()?.matmul(&dout)?)?;
            }
            dks.push(dk);
            dvs.push(dv);
        }
        Ok([Tensor::cat(&dqs, 1)?, Tensor::cat(&dks, 1)?, Tensor::cat(&dvs, 1)?])
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::testing::{assert_close, check_op, random};

    const SPEC: AttentionSpec =
        AttentionSpec { heads: 4, kv_heads: 2, head_dim: 6, scale: 0.4, reach: Reach::All, softcap: None };
    const LENGTHS: [usize; 3] = [3, 1, 5];

    /// Some of the keys up to each query, its own not always among them.
    fn selection() -> Vec<Vec<u32>> {
        let of = |len: usize| (0..len as u32).map(|own| (0..=own).filter(|key| key % 3 != 1 || own % 4 == 1).collect());
        LENGTHS.into_iter().flat_map(of).collect()
    }

    /// Dense attention of all tokens with a mask.
    fn dense(t: &[Tensor], visible: &[Vec<usize>]) -> candle_core::Result<Vec<Tensor>> {
        let (queries, keys) = (t[0].dim(0)?, t[1].dim(0)?);
        let mut mask = vec![f64::NEG_INFINITY; queries * keys];
        for (query, seen) in visible.iter().enumerate() {
            seen.iter().for_each(|key| mask[query * keys + key] = 0.0);
        }
        let mask = Tensor::from_vec(mask, (queries, keys), &Device::Cpu)?;
        let of_head = |head: usize| {
            let part = |x: &Tensor, head: usize| x.narrow(1, 6 * head, 6)?.contiguous();
            let (q, k, v) = (part(&t[0], head)?, part(&t[1], head / 2)?, part(&t[2], head / 2)?);
            let exponentials = ((q.matmul(&k.t()?)? * f64::from(SPEC.scale))? + &mask)?.exp()?;
            exponentials.matmul(&v)?.broadcast_div(&exponentials.sum_keepdim(1)?)
        };
        Ok(vec![Tensor::cat(&(0..4).map(of_head).collect::<candle_core::Result<Vec<_>>>()?, 1)?])
    }

    #[test]
    fn it_is_dense_attention_with_a_mask() {
        let (rows, selected) = (Rows::packed(&LENGTHS), selection());
        let starts = LENGTHS.iter().scan(0, |next, &len| {
            let start = *next;
            *next += len;
            Some(std::iter::repeat_n(start, len))
        });
        let shifted =
            |(start, places): (usize, &Vec<u32>)| places.iter().map(|&place| start + place as usize).collect();
        let visible: Vec<Vec<usize>> = starts.flatten().zip(&selected).map(shifted).collect();
        check_op(
            &[random(&[9, 24], 1), random(&[9, 12], 2), random(&[9, 12], 3)],
            move |t| dense(t, &visible),
            |v| Ok(vec![sparse_attention(&v[0], &v[1], &v[2], &selected, &rows, SPEC)?]),
        );
    }

    #[test]
    fn a_cached_row_continues_where_it_stopped() {
        let rows = Rows::cached(&[2, 1], &[5, 7], 8);
        let selected = [vec![0, 3], vec![4, 1, 2], vec![6, 0]];
        let visible = [vec![0, 3], vec![4, 1, 2], vec![14, 8]];
        let inputs = [random(&[3, 24], 1), random(&[16, 12], 2), random(&[16, 12], 3)];
        let want = dense(&inputs, &visible).unwrap();
        let [q, k, v] = inputs.map(|t| Value::constant(t.to_dtype(DType::F32).unwrap()));
        let got = sparse_attention(&q, &k, &v, &selected, &rows, SPEC).unwrap();
        assert_close(&want[0], got.tensor(), 1e-5, "cached");
    }

    #[test]
    fn what_a_query_may_not_see_is_refused() {
        let [q, k, v] = [(4, 1), (2, 2), (2, 3)].map(|(heads, seed)| Value::constant(random(&[2, heads * 6], seed)));
        let run = |selected: &[Vec<u32>], spec| sparse_attention(&q, &k, &v, selected, &Rows::packed(&[2]), spec);
        assert!(run(&[vec![0], vec![1]], SPEC).is_ok());
        for wrong in [vec![vec![1], vec![1]], vec![vec![0], vec![]], vec![vec![0]]] {
            assert!(run(&wrong, SPEC).is_err(), "{wrong:?}");
        }
        assert!(run(&[vec![0], vec![1]], AttentionSpec { softcap: Some(3.0), ..SPEC }).is_err());
    }

    #[test]
    fn the_largest_scores_up_to_the_own_key() {
        let scores = [[1f32, 9.0, 9.0, 9.0, 9.0], [0.5, 3.0, 0.5, 9.0, 9.0], [-0.0, 0.0, -1.0, 0.0, 9.0]];
        let scores = Tensor::new(&scores, &Device::Cpu).unwrap();
        assert_eq!(top_keys(&scores, 2, 0).unwrap(), [vec![0], vec![0, 1], vec![0, 1]]);
        assert_eq!(top_keys(&scores, 2, 2).unwrap(), [[1, 2], [1, 3], [0, 4]].map(Vec::from));
        assert_eq!(top_keys(&scores, 9, 1).unwrap(), [vec![0, 1], vec![0, 1, 2], vec![0, 1, 2, 3]]);
    }
}
