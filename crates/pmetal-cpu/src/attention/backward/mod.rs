//! The gradient of attention, with the probabilities computed again tile by tile from the statistics of the forward.
//!
//! The keys and the queries of a row are cut into pieces where rows are few and long. A piece of keys then meets one piece of queries
//! after the other; in every round each piece of either kind takes part once, so that pieces work side by side and their
//! gradients are still summed in an order that depends on the shapes alone.

mod sweep;

use self::sweep::{Keys, Sweep};
use super::operands::{Cut, HeadRows, room_for};
use super::tiles::{KEYS, MAX_LANES, PANELS, Tiles};
use super::wide::Wide;
use super::{AttentionShape, Segment};
use crate::Element;
use crate::elementwise::convert_slice;
use crate::scratch::with_scratch;
use crate::shared::Shared;
use crate::tasks::for_each_task;

/// The gradients of `q`, `k` and `v` from that of the result, `dout`, and what the forward gave, `out` and `lse`.
///
/// With `p = exp(scale * q k^T - lse)`: `dv = p^T dout`, `ds = scale * p * (dout v^T - rowsum(dout * out))`, `dq = ds k`,
/// `dk = ds^T q`. `dk` and `dv` are summed over the query heads of a group in f32 and rounded once. Shapes are those of
/// [`crate::attention_forward`]; the gradients are overwritten, zero for tokens that belong to no row. Where bf16 is multiplied
/// as it is, `p` and `ds` are rounded to it.
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
    shape.check("attention_backward", segments, q.len(), lse.len(), k.len(), v.len());
    for (name, len) in [("dout", dout.len()), ("out", out.len()), ("dq", dq.len())] {
        assert_eq!(q.len(), len, "attention_backward: {name}");
    }
    assert!(dk.len() == k.len() && dv.len() == k.len(), "attention_backward: dk and dv");
    if segments.iter().map(|s| s.q_len).sum::<usize>() * shape.heads * shape.head_dim < q.len() {
        dq.fill(T::ZERO);
    }
    if segments.iter().map(|s| s.kv_len).sum::<usize>() * shape.kv_heads * shape.head_dim < k.len() {
        dk.fill(T::ZERO);
        dv.fill(T::ZERO);
    }
    let (dq, dk, dv) = (Shared::new(dq), Shared::new(dk), Shared::new(dv));
    let inputs = Inputs { dout, q, k, v, out, lse, shape, dq: &dq, dk: &dk, dv: &dv };
    #[cfg(target_arch = "x86_64")]
    if super::avx512_bf16::serves::<T>(shape.head_dim) {
        return inputs.run::<super::avx512_bf16::Dots>(segments);
    }
    inputs.run::<Wide>(segments);
}

/// Rows times key-value heads that keep enough threads busy without being cut.
const ENOUGH: usize = 32;

/// The shortest piece of a row.
const PIECE: usize = 512;

/// What all tasks share.
struct Inputs<'a, T> {
    dout: &'a [T],
    q: &'a [T],
    k: &'a [T],
    v: &'a [T],
    out: &'a [T],
    lse: &'a [f32],
    shape: &'a AttentionShape,
    dq: &'a Shared<'a, T>,
    dk: &'a Shared<'a, T>,
    dv: &'a Shared<'a, T>,
}

impl<T: Element> Inputs<'_, T> {
    fn run<K: Tiles>(&self, segments: &[Segment]) {
        let segments = segments.iter().filter(|s| s.kv_len > 0);
        let pieces = ENOUGH.div_ceil((segments.clone().count() * self.shape.kv_heads).max(1));
        let (mut heads, mut room) = (Vec::new(), 0);
        for segment in segments {
            let piece = segment.kv_len.div_ceil(pieces).next_multiple_of(PIECE);
            for kv_head in 0..self.shape.kv_heads {
                let head = Head { inputs: self, segment, kv_head, piece, sums: room };
                if head.pieces() > 1 {
                    room += head.pieces() * (head.key_room::<K>() + head.query_room::<K>());
                }
                heads.push(head);
            }
        }
        with_scratch(room, |sums| {
            let sums = Shared::new(sums);
            let cut = heads.iter().filter(|h| h.pieces() > 1).flat_map(|h| (0..h.pieces()).map(move |i| (h, i)));
            let cut: Vec<_> = cut.collect();
            for_each_task(cut.len(), |i| {
                let (head, piece) = cut[i];
                head.key_sums::<K>(&sums, piece).fill(0.0);
                head.query_sums::<K>(&sums, piece).fill(0.0);
            });
            for round in 0..heads.iter().map(Head::pieces).max().unwrap_or(0) {
                let tasks: Vec<_> = heads.iter().flat_map(|head| head.meetings(round)).collect();
                for_each_task(tasks.len(), |i| tasks[i].run::<K>(&sums));
            }
            for_each_task(cut.len(), |i| {
                let (head, piece) = cut[i];
                head.store_keys::<K>(piece, head.key_sums::<K>(&sums, piece));
                let dq = head.query_sums::<K>(&sums, piece).chunks_exact(head.block_room::<K>());
                head.blocks::<K>(piece).zip(dq).for_each(|(block, dq)| head.store_queries::<K>(block, dq));
            });
        });
    }
}

/// A row and one of its key-value heads, with the query heads of its group.
struct Head<'a, T> {
    inputs: &'a Inputs<'a, T>,
    segment: &'a Segment,
    kv_head: usize,
    /// Keys, or queries, of a piece.
    piece: usize,
    /// Where the sums of the pieces begin, if there are several.
    sums: usize,
}

/// Queries of a head of the group that go through the keys together.
#[derive(Clone, Copy)]
struct Block {
    head: usize,
    first: usize,
    count: usize,
}

impl<T: Element> Head<'_, T> {
    fn pieces(&self) -> usize {
        self.segment.kv_len.div_ceil(self.piece)
    }

    /// The pieces of keys and queries that meet in a round.
    fn meetings(&self, round: usize) -> impl Iterator<Item = Meeting<'_, T>> {
        let pieces = self.pieces();
        let rounds = if round < pieces { 0..pieces } else { 0..0 };
        rounds.map(move |keys| Meeting { head: self, keys, queries: (keys + round) % pieces }).filter(move |meeting| {
            let last = ((meeting.queries + 1) * self.piece).min(self.segment.q_len);
            let first = meeting.queries * self.piece;
            let meets = last > first
                && self.segment.visible(last - 1) > meeting.keys * self.piece
                && self.inputs.shape.first_seen(self.segment, first) < (meeting.keys + 1) * self.piece;
            // the gradients of keys without queries are zero, which someone must write
            meets || pieces == 1
        })
    }

    /// The query blocks of a piece.
    fn blocks<K: Tiles>(&self, piece: usize) -> impl Iterator<Item = Block> {
        let (first, block) = (piece * self.piece, PANELS * K::lanes());
        let (end, group) = ((first + self.piece).min(self.segment.q_len), self.inputs.shape.group());
        let heads = self.kv_head * group..(self.kv_head + 1) * group;
        heads.flat_map(move |head| {
            (first..end).step_by(block).map(move |first| Block { head, first, count: block.min(end - first) })
        })
    }

    /// The first key of a piece and how many there are.
    fn keys(&self, piece: usize) -> (usize, usize) {
        let first = piece * self.piece;
        (first, self.piece.min(self.segment.kv_len - first))
    }

    /// Elements of a head, rounded up to whole columns of [`Tiles::query_products`].
    fn width<K: Tiles>(&self) -> usize {
        self.inputs.shape.head_dim.next_multiple_of(K::lanes())
    }

    /// Size of the sums of a piece of keys, `dk [keys][width]` and `dv`.
    fn key_room<K: Tiles>(&self) -> usize {
        2 * self.segment.kv_len.min(self.piece).next_multiple_of(K::rows()) * self.width::<K>()
    }

    /// Size of the sums of a block of queries, `dq [PANELS][head_dim][lanes]`.
    fn block_room<K: Tiles>(&self) -> usize {
        PANELS * self.inputs.shape.head_dim.next_multiple_of(K::token_panel()) * K::lanes()
    }

    /// Size of the sums of a piece of queries.
    fn query_room<K: Tiles>(&self) -> usize {
        self.inputs.shape.group() * self.piece.div_ceil(PANELS * K::lanes()) * self.block_room::<K>()
    }

    #[allow(clippy::mut_from_ref)]
    fn key_sums<'b, K: Tiles>(&self, sums: &'b Shared<f32>, piece: usize) -> &'b mut [f32] {
        let room = self.key_room::<K>();
        // SAFETY: a piece of keys takes part in one task at a time.
        unsafe { sums.part(self.sums + piece * room, room) }
    }

    #[allow(clippy::mut_from_ref)]
    fn query_sums<'b, K: Tiles>(&self, sums: &'b Shared<f32>, piece: usize) -> &'b mut [f32] {
        let room = self.query_room::<K>();
        // SAFETY: a piece of queries takes part in one task at a time.
        unsafe { sums.part(self.sums + self.pieces() * self.key_room::<K>() + piece * room, room) }
    }

    /// Some tokens of the head in the keys or values.
    fn key_rows<'b>(&self, x: &'b [T], (first, count): (usize, usize)) -> HeadRows<'b, T> {
        let shape = self.inputs.shape;
        HeadRows::new(x, self.segment.kv_start + first, count, shape.kv_heads, self.kv_head, shape.head_dim)
    }

    /// A block's tokens in the queries, results or gradients.
    fn query_rows<'b>(&self, x: &'b [T], block: Block) -> HeadRows<'b, T> {
        let shape = self.inputs.shape;
        HeadRows::new(x, self.segment.q_start + block.first, block.count, shape.heads, block.head, shape.head_dim)
    }

    /// Writes the gradients of a piece of keys and values.
    fn store_keys<K: Tiles>(&self, piece: usize, sums: &[f32]) {
        let (shape, width, (first, count)) = (self.inputs.shape, self.width::<K>(), self.keys(piece));
        let d = shape.head_dim;
        let (dk, dv) = sums.split_at(sums.len() / 2);
        for i in 0..count {
            let at = ((self.segment.kv_start + first + i) * shape.kv_heads + self.kv_head) * d;
            // SAFETY: a key and a key-value head belong to one task, because rows are disjoint (`check`).
            let (dk_row, dv_row) = unsafe { (self.inputs.dk.part(at, d), self.inputs.dv.part(at, d)) };
            convert_slice(&dk[i * width..][..d], dk_row);
            convert_slice(&dv[i * width..][..d], dv_row);
        }
    }

    /// Writes the gradients of a block of queries.
    fn store_queries<K: Tiles>(&self, block: Block, dq: &[f32]) {
        let (shape, lanes) = (self.inputs.shape, K::lanes());
        let d = shape.head_dim;
        with_scratch(lanes * d, |rows| {
            for (panel, dq) in dq.chunks_exact(dq.len() / PANELS).enumerate().take(block.count.div_ceil(lanes)) {
                K::turn(dq, &[1.0; MAX_LANES], d, rows);
                for (i, row) in rows.chunks_exact(d).enumerate().take(block.count - panel * lanes) {
                    let query = self.segment.q_start + block.first + panel * lanes + i;
                    // SAFETY: a query and a head belong to one task, because rows are disjoint (`check`).
                    convert_slice(row, unsafe { self.inputs.dq.part((query * shape.heads + block.head) * d, d) });
                }
            }
        });
    }
}

/// A piece of keys and one of queries.
struct Meeting<'a, T> {
    head: &'a Head<'a, T>,
    keys: usize,
    queries: usize,
}

impl<T: Element> Meeting<'_, T> {
    fn run<K: Tiles>(&self, sums: &Shared<f32>) {
        let (head, whole) = (self.head, self.head.pieces() == 1);
        let (d, lanes, piece) = (head.inputs.shape.head_dim, K::lanes(), head.keys(self.keys));
        let (padded, block) = (piece.1.next_multiple_of(K::rows()), PANELS * lanes);
        let rows = padded * K::pitch(d);
        let of_keys = [rows, rows, d.next_multiple_of(K::token_panel()) * padded];
        let columns = block * head.width::<K>();
        let of_queries = [block * d, block * d, columns, columns, block * KEYS, block * KEYS, lanes * KEYS];
        let own = if whole { [head.key_room::<K>(), head.block_room::<K>()] } else { [0, 0] };
        let f32s = [lanes * KEYS, lanes * KEYS, own[0], own[1]];
        let packed = of_keys.iter().chain(&of_queries).map(|&len| room_for::<K::Packed>(len)).sum::<usize>();
        with_scratch(packed + f32s.map(room_for::<f32>).iter().sum::<usize>(), |scratch| {
            let mut scratch = Cut(scratch);
            let [key_rows, value_rows, key_tokens] = of_keys.map(|len| scratch.take(len));
            let [q, dout, q_columns, dout_columns, p, ds, turned] = of_queries.map(|len| scratch.take(len));
            let [scores, dp, own_keys, own_queries] = f32s.map(|len| scratch.take(len));
            let (k, v) = (head.key_rows(head.inputs.k, piece), head.key_rows(head.inputs.v, piece));
            K::pack_rows(k, key_rows);
            K::pack_rows(v, value_rows);
            K::pack_tokens(k, padded, key_tokens);
            own_keys.fill(0.0);
            let key_sums = if whole { own_keys } else { head.key_sums::<K>(sums, self.keys) };
            let (dk, dv) = key_sums.split_at_mut(key_sums.len() / 2);
            let keys = Keys::<K> { first: piece.0, count: piece.1, padded, key_rows, value_rows, key_tokens };
            let mut tiles = Sweep::<K> {
                segment: head.segment,
                d,
                width: head.width::<K>(),
                shape: head.inputs.shape,
                keys,
                q,
                dout,
                q_columns,
                dout_columns,
                dk,
                dv,
                scores,
                dp,
                p,
                ds,
                turned,
                lse: [[0.0; MAX_LANES]; PANELS],
                delta: [[0.0; MAX_LANES]; PANELS],
            };
            for (i, block) in head.blocks::<K>(self.queries).enumerate() {
                let seen = head.inputs.shape.first_seen(head.segment, block.first)
                    ..head.segment.visible(block.first + block.count - 1);
                if seen.end <= piece.0 || seen.start >= piece.0 + piece.1 {
                    continue;
                }
                tiles.load(head, block);
                if whole {
                    own_queries.fill(0.0);
                    tiles.run(block, own_queries);
                    head.store_queries::<K>(block, own_queries);
                } else {
                    let room = head.block_room::<K>();
                    tiles.run(block, &mut head.query_sums::<K>(sums, self.queries)[i * room..][..room]);
                }
            }
            if whole {
                head.store_keys::<K>(self.keys, key_sums);
            }
        });
    }
}
