// Matrix units of Metal.
//
// Causal attention over rows of different lengths on matrices of 8 x 8, forward and backward; heads of a width that is a multiple of 8, up
// to 64 or 128. A SIMD group multiplies matrices that it loads from threadgroup memory; where its lanes need elements, as in the softmax,
// they go through threadgroup memory again: which lane holds what inside a matrix is Metal's own affair. Factors of rows are multiplied
// in as diagonal matrices. Operands are of the dtype, sums and scores in float.
//
// q, out and their gradients are [tokens, heads * width], k and v [tokens, kv_heads * width], each with a pitch, a multiple of 4; lse and
// delta are [tokens, heads]. A row of `rows` is its first query, queries, first key, keys. Query i of a row sees its keys 0 ..= keys -
// queries + i, of these the last `window` and those of its own chunk of `chunk` keys; where `cap` is not zero, scores become cap *
// tanh(score / cap).
// Source: Dao, "FlashAttention-2", 2023; for caps Gemma Team, "Gemma 2", 2024.

struct MatrixAttentionParams {
    uint heads; uint kv_heads; uint width; float scale;
    uint window; uint chunk; float cap;
    uint q_pitch; uint k_pitch; uint v_pitch; uint out_pitch;
    uint dout_pitch; uint dq_pitch; uint dk_pitch; uint dv_pitch;
};
struct DeltaParams { uint n; uint heads; uint width; uint out_pitch; uint dout_pitch; };

typedef simdgroup_matrix<T, 8, 8> Operand;
typedef simdgroup_matrix<float, 8, 8> Matrix;

// From one row of a tile of BLOCKS blocks to the next; the 8 beyond them keep rows off the same banks.
#define PITCH(blocks) (8 * (blocks) + 8)
// The same for scores of 32 and of 16 keys.
#define WIDE 36
#define NARROW 20
#define LOWEST -3.0e38f
// Arrays of matrices live in registers only where every index is known.
#define UNROLL _Pragma("unroll")

struct Row { uint first_query; uint queries; uint first_key; uint keys; };
FUNCTION Row row_of(DEVICE_PTR(const uint) rows, uint row) {
    Row r;
    r.first_query = rows[4 * row];
    r.queries = rows[4 * row + 1];
    r.first_key = rows[4 * row + 2];
    r.keys = rows[4 * row + 3];
    return r;
}

// The first key that the query at a position of its row sees.
FUNCTION uint first_seen(uint position, MatrixAttentionParams params) {
    return max(position + 1 - min(position + 1, params.window), position / params.chunk * params.chunk);
}

// From how many positions a key is seen, its own the first.
FUNCTION uint times_seen(uint key, MatrixAttentionParams params) { return min(params.window, params.chunk - key % params.chunk); }

// Where a token's head begins.
FUNCTION ulong start_of(uint token, uint pitch, uint head, uint width) { return ulong(token) * pitch + head * width; }

// The threadgroup's tile and head, and the thread in it: a function does not see what a kernel sees.
struct Place { uint tile; uint head; uint index; uint threads; uint lane; uint simd; };

// Copies ROWS rows of a head, `pitch` apart from `start` on; rows from `count` on are zero.
template <uint ROWS, uint BLOCKS>
FUNCTION void stage(DEVICE_PTR(const T) from, ulong start, uint pitch, uint count, uint width, THREADGROUP_PTR(T) to, Place place) {
    for (uint i = place.index; i < ROWS * 2 * BLOCKS; i += place.threads) {
        const uint row = i / (2 * BLOCKS), column = 4 * (i % (2 * BLOCKS)), at = row * PITCH(BLOCKS) + column;
        if (column >= width) continue;
        const float4 x = row < count ? load4(from, start + ulong(row) * pitch + column) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        to[at] = T(x.x);
        to[at + 1] = T(x.y);
        to[at + 2] = T(x.z);
        to[at + 3] = T(x.w);
    }
}

// Writes the first `count` rows of a matrix; `room` holds 64 floats of this SIMD group.
FUNCTION void unload(Matrix sum, THREADGROUP_PTR(float) room, DEVICE_PTR(T) to, ulong start, uint pitch, uint count, uint lane) {
    SIMD_BARRIER();
    simdgroup_store(sum, room, 8);
    SIMD_BARRIER();
    const uint row = lane / 4, column = 2 * (lane % 4);
    if (row >= count) return;
    const ulong at = start + ulong(row) * pitch + column;
    to[at] = T(room[8 * row + column]);
    to[at + 1] = T(room[8 * row + column + 1]);
}

// Puts each row's factor, which its four lanes hold, on the diagonal of the matrix in `room`, which is zero elsewhere; a barrier lies
// behind the last use of `room`.
FUNCTION void set_diagonal(float factor, THREADGROUP_PTR(float) room, uint lane) {
    if (lane % 4 == 0) room[9 * (lane / 4)] = factor;
    SIMD_BARRIER();
}

// A product of a query and a key as a score, and the slope of it by the product.
template <bool CAPPED>
FUNCTION float score_of(float product, MatrixAttentionParams params, THREAD_REF(float) slope) {
    slope = params.scale;
    if (!CAPPED) return product * params.scale;
    // beyond 16 it is 1, and quick versions overflow
    const float share = tanh(fmin(fmax(product * params.scale / params.cap, -16.0f), 16.0f));
    slope *= 1.0f - share * share;
    return params.cap * share;
}

// Turns 8 x 32 products into probabilities by the maximum so far, and moves the maximum and the sum on. Four lanes share a row, which sees
// `seen` keys, the first of them `first` keys behind these, or before them (the number is then as great as unsigned ones get). Returns the
// factor on what was summed before.
template <bool CAPPED>
FUNCTION float soften(THREADGROUP_PTR(float) scores, uint first, uint seen, MatrixAttentionParams params, THREAD_REF(float) top,
                      THREAD_REF(float) total, uint lane) {
    float x[8], slope;
    float highest = top;
    UNROLL for (uint j = 0; j < 8; ++j) {
        const uint key = lane % 4 + 4 * j;
        x[j] = key - first < seen ? score_of<CAPPED>(scores[lane / 4 * WIDE + key], params, slope) : as_float(0xff800000u);
        highest = fmax(highest, x[j]);
    }
    highest = fmax(highest, simd_shuffle_xor(highest, 1));
    highest = fmax(highest, simd_shuffle_xor(highest, 2));
    float sum = 0.0f;
    UNROLL for (uint j = 0; j < 8; ++j) {
        const float p = exp(x[j] - highest);
        scores[lane / 4 * WIDE + lane % 4 + 4 * j] = p;
        sum += p;
    }
    sum += simd_shuffle_xor(sum, 1);
    sum += simd_shuffle_xor(sum, 2);
    const float factor = exp(top - highest);
    total = total * factor + sum;
    top = highest;
    return factor;
}

// 32 queries of a head in four SIMD groups of 8, over its keys 32 at a time. `tile` holds 32 rows; a SIMD group has 8 * WIDE floats of
// `scores` and 64 of `factors`.
template <uint BLOCKS, bool CAPPED>
FUNCTION void attend(DEVICE_PTR(const T) q, DEVICE_PTR(const T) k, DEVICE_PTR(const T) v, Row row, DEVICE_PTR(T) out,
                     DEVICE_PTR(float) lse, MatrixAttentionParams params, Place place, THREADGROUP_PTR(T) tile,
                     THREADGROUP_PTR(float) all_scores, THREADGROUP_PTR(float) all_factors) {
    const uint first = 32 * place.tile, width = params.width, lane = place.lane;
    if (first >= row.queries) return;
    const uint mine = first + 8 * place.simd, query = mine + lane / 4, before = row.keys - row.queries;
    const bool works = mine < row.queries;
    const uint kv_head = place.head / (params.heads / params.kv_heads);
    const ulong k_start = start_of(row.first_key, params.k_pitch, kv_head, width);
    const ulong v_start = start_of(row.first_key, params.v_pitch, kv_head, width);
    THREADGROUP_PTR(float) scores = all_scores + 8 * WIDE * place.simd;
    THREADGROUP_PTR(float) factors = all_factors + 64 * place.simd;
    factors[lane] = 0.0f;
    factors[lane + 32] = 0.0f;

    const Matrix zero = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    Operand queries[BLOCKS];
    Matrix sums[BLOCKS];
    stage<32, BLOCKS>(q, start_of(row.first_query + first, params.q_pitch, place.head, width), params.q_pitch, row.queries - first, width,
                      tile, place);
    BARRIER();
    UNROLL for (uint i = 0; i < BLOCKS; ++i) {
        sums[i] = zero;
        if (8 * i < width) simdgroup_load(queries[i], tile + 8 * place.simd * PITCH(BLOCKS) + 8 * i, PITCH(BLOCKS));
    }

    // not infinite: of the first keys a query may see none
    float top = LOWEST, total = 0.0f;
    const uint end = min(row.keys, before + first + 32), sees = first_seen(before + query, params);
    for (uint key = first_seen(before + first, params); key < end; key += 32) {
        BARRIER();
        stage<32, BLOCKS>(k, k_start + ulong(key) * params.k_pitch, params.k_pitch, row.keys - key, width, tile, place);
        BARRIER();
        if (works) {
            Matrix products[4];
            UNROLL for (uint b = 0; b < 4; ++b) products[b] = zero;
            UNROLL for (uint i = 0; i < BLOCKS; ++i) {
                if (8 * i >= width) continue;
                UNROLL for (uint b = 0; b < 4; ++b) {
                    Operand keys;
                    simdgroup_load(keys, tile + 8 * b * PITCH(BLOCKS) + 8 * i, PITCH(BLOCKS), ulong2(0, 0), true);
                    simdgroup_multiply_accumulate(products[b], queries[i], keys, products[b]);
                }
            }
            UNROLL for (uint b = 0; b < 4; ++b) simdgroup_store(products[b], scores + 8 * b, WIDE);
        }
        BARRIER();
        stage<32, BLOCKS>(v, v_start + ulong(key) * params.v_pitch, params.v_pitch, row.keys - key, width, tile, place);
        if (works) {
            const float factor = soften<CAPPED>(scores, sees - key, before + query + 1 - sees, params, top, total, lane);
            if (simd_max(factor < 1.0f ? 1u : 0u) > 0) {
                set_diagonal(factor, factors, lane);
                Matrix diagonal;
                simdgroup_load(diagonal, factors, 8);
                UNROLL for (uint i = 0; i < BLOCKS; ++i) simdgroup_multiply_accumulate(sums[i], diagonal, sums[i], zero);
            }
        }
        BARRIER();
        if (works) {
            UNROLL for (uint b = 0; b < 4; ++b) {
                Matrix weights;
                simdgroup_load(weights, scores + 8 * b, WIDE);
                UNROLL for (uint i = 0; i < BLOCKS; ++i) {
                    if (8 * i >= width) continue;
                    Operand values;
                    simdgroup_load(values, tile + 8 * b * PITCH(BLOCKS) + 8 * i, PITCH(BLOCKS));
                    simdgroup_multiply_accumulate(sums[i], weights, values, sums[i]);
                }
            }
        }
    }
    if (!works) return;
    set_diagonal(1.0f / total, factors, lane);
    Matrix diagonal;
    simdgroup_load(diagonal, factors, 8);
    const ulong start = start_of(row.first_query + mine, params.out_pitch, place.head, width);
    UNROLL for (uint i = 0; i < BLOCKS; ++i) {
        if (8 * i >= width) continue;
        Matrix result;
        simdgroup_multiply_accumulate(result, diagonal, sums[i], zero);
        unload(result, factors, out, start + 8 * i, params.out_pitch, row.queries - mine, lane);
    }
    if (lane % 4 == 0 && query < row.queries) lse[ulong(row.first_query + query) * params.heads + place.head] = top + log(total);
}

/// Fills `out` and `lse`, the log-sum-exp of each query; heads of at most 64. Threadgroups of 128: 32 queries, heads, rows.
KERNEL(attention_forward_64)(READ_ROWS(T, q, 0), READ_ROWS(T, k, 1), READ_ROWS(T, v, 2), READ(uint, rows, 3), WRITE_ROWS(T, out, 4),
                             WRITE(float, lse, 5), PARAMS(MatrixAttentionParams, 6))
{
    THREADGROUP(T, tile, 32 * PITCH(8));
    THREADGROUP(float, scores, 4 * 8 * WIDE);
    THREADGROUP(float, factors, 4 * 64);
    // the tiles with the most keys first
    const Place place = {GROUPS_X - 1 - GROUP_X, GROUP_Y, THREAD, THREADS, LANE, SIMD};
    attend<8, false>(q, k, v, row_of(rows, GROUP_Z), out, lse, params, place, tile, scores, factors);
}

/// The same for heads of at most 128.
KERNEL(attention_forward_128)(READ_ROWS(T, q, 0), READ_ROWS(T, k, 1), READ_ROWS(T, v, 2), READ(uint, rows, 3), WRITE_ROWS(T, out, 4),
                              WRITE(float, lse, 5), PARAMS(MatrixAttentionParams, 6))
{
    THREADGROUP(T, tile, 32 * PITCH(16));
    THREADGROUP(float, scores, 4 * 8 * WIDE);
    THREADGROUP(float, factors, 4 * 64);
    const Place place = {GROUPS_X - 1 - GROUP_X, GROUP_Y, THREAD, THREADS, LANE, SIMD};
    attend<16, false>(q, k, v, row_of(rows, GROUP_Z), out, lse, params, place, tile, scores, factors);
}

/// The same where scores have a cap.
KERNEL(attention_forward_capped)(READ_ROWS(T, q, 0), READ_ROWS(T, k, 1), READ_ROWS(T, v, 2), READ(uint, rows, 3), WRITE_ROWS(T, out, 4),
                                 WRITE(float, lse, 5), PARAMS(MatrixAttentionParams, 6))
{
    THREADGROUP(T, tile, 32 * PITCH(16));
    THREADGROUP(float, scores, 4 * 8 * WIDE);
    THREADGROUP(float, factors, 4 * 64);
    const Place place = {GROUPS_X - 1 - GROUP_X, GROUP_Y, THREAD, THREADS, LANE, SIMD};
    attend<16, true>(q, k, v, row_of(rows, GROUP_Z), out, lse, params, place, tile, scores, factors);
}

/// The sum of `out * dout` over the width of each of `n` queries and heads; a SIMD group each.
KERNEL(attention_delta)(READ_ROWS(T, out, 0), READ_ROWS(T, dout, 1), WRITE(float, delta, 2), PARAMS(DeltaParams, 3))
{
    const uint i = GROUP_X * SIMDS + SIMD;
    if (i >= params.n) return;
    const ulong start = start_of(i / params.heads, params.out_pitch, i % params.heads, params.width);
    const ulong dstart = start_of(i / params.heads, params.dout_pitch, i % params.heads, params.width);
    float sum = 0.0f;
    for (uint c = LANE; c < params.width; c += 32) sum += float(out[start + c]) * float(dout[dstart + c]);
    sum = simd_sum(sum);
    if (LANE == 0) delta[i] = sum;
}

// dq of 32 queries in four SIMD groups of 8, over the keys 16 at a time: with p = exp(score - lse), ds = slope * p * (dout vᵀ - delta),
// where slope is that of the score by q kᵀ, dq = ds k. `tiles` holds 32 rows; a SIMD group has twice 8 * NARROW floats of `all_scores`.
template <uint BLOCKS, bool CAPPED>
FUNCTION void to_queries(DEVICE_PTR(const T) dout, DEVICE_PTR(const T) q, DEVICE_PTR(const T) k, DEVICE_PTR(const T) v,
                         DEVICE_PTR(const float) lse, DEVICE_PTR(const float) delta, Row row, DEVICE_PTR(T) dq,
                         MatrixAttentionParams params, Place place, THREADGROUP_PTR(T) tiles, THREADGROUP_PTR(float) all_scores) {
    const uint first = 32 * place.tile, width = params.width, lane = place.lane;
    if (first >= row.queries) return;
    const uint mine = first + 8 * place.simd, query = mine + lane / 4, before = row.keys - row.queries;
    const bool works = mine < row.queries;
    const uint kv_head = place.head / (params.heads / params.kv_heads);
    const ulong k_start = start_of(row.first_key, params.k_pitch, kv_head, width);
    const ulong v_start = start_of(row.first_key, params.v_pitch, kv_head, width);
    THREADGROUP_PTR(float) scores = all_scores + 2 * 8 * NARROW * place.simd;
    THREADGROUP_PTR(float) slopes = scores + 8 * NARROW;
    THREADGROUP_PTR(T) value_tile = tiles + 16 * PITCH(BLOCKS);
    const ulong statistic = ulong(row.first_query + query) * params.heads + place.head;
    const float my_lse = query < row.queries ? lse[statistic] : 0.0f;
    const float my_delta = query < row.queries ? delta[statistic] : 0.0f;

    const Matrix zero = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    Operand queries[BLOCKS], douts[BLOCKS];
    Matrix sums[BLOCKS];
    stage<32, BLOCKS>(q, start_of(row.first_query + first, params.q_pitch, place.head, width), params.q_pitch, row.queries - first, width,
                      tiles, place);
    BARRIER();
    UNROLL for (uint i = 0; i < BLOCKS; ++i) {
        sums[i] = zero;
        if (8 * i < width) simdgroup_load(queries[i], tiles + 8 * place.simd * PITCH(BLOCKS) + 8 * i, PITCH(BLOCKS));
    }
    BARRIER();
    stage<32, BLOCKS>(dout, start_of(row.first_query + first, params.dout_pitch, place.head, width), params.dout_pitch, row.queries - first,
                      width, tiles, place);
    BARRIER();
    UNROLL for (uint i = 0; i < BLOCKS; ++i) {
        if (8 * i < width) simdgroup_load(douts[i], tiles + 8 * place.simd * PITCH(BLOCKS) + 8 * i, PITCH(BLOCKS));
    }

    const uint end = min(row.keys, before + first + 32), sees = first_seen(before + query, params), seen = before + query + 1 - sees;
    for (uint key = first_seen(before + first, params); key < end; key += 16) {
        BARRIER();
        stage<16, BLOCKS>(k, k_start + ulong(key) * params.k_pitch, params.k_pitch, row.keys - key, width, tiles, place);
        stage<16, BLOCKS>(v, v_start + ulong(key) * params.v_pitch, params.v_pitch, row.keys - key, width, value_tile, place);
        BARRIER();
        if (!works) continue;
        Matrix products[2], slope_products[2];
        UNROLL for (uint b = 0; b < 2; ++b) products[b] = slope_products[b] = zero;
        UNROLL for (uint i = 0; i < BLOCKS; ++i) {
            if (8 * i >= width) continue;
            UNROLL for (uint b = 0; b < 2; ++b) {
                Operand keys, values;
                simdgroup_load(keys, tiles + 8 * b * PITCH(BLOCKS) + 8 * i, PITCH(BLOCKS), ulong2(0, 0), true);
                simdgroup_load(values, value_tile + 8 * b * PITCH(BLOCKS) + 8 * i, PITCH(BLOCKS), ulong2(0, 0), true);
                simdgroup_multiply_accumulate(products[b], queries[i], keys, products[b]);
                simdgroup_multiply_accumulate(slope_products[b], douts[i], values, slope_products[b]);
            }
        }
        UNROLL for (uint b = 0; b < 2; ++b) {
            simdgroup_store(products[b], scores + 8 * b, NARROW);
            simdgroup_store(slope_products[b], slopes + 8 * b, NARROW);
        }
        SIMD_BARRIER();
        UNROLL for (uint j = 0; j < 4; ++j) {
            const uint at = lane / 4 * NARROW + lane % 4 + 4 * j;
            float slope;
            const float score = score_of<CAPPED>(scores[at], params, slope);
            const float p = key + lane % 4 + 4 * j - sees < seen ? exp(score - my_lse) : 0.0f;
            scores[at] = p * (slopes[at] - my_delta) * slope;
        }
        SIMD_BARRIER();
        UNROLL for (uint b = 0; b < 2; ++b) {
            Matrix weights;
            simdgroup_load(weights, scores + 8 * b, NARROW);
            UNROLL for (uint i = 0; i < BLOCKS; ++i) {
                if (8 * i >= width) continue;
                Operand keys;
                simdgroup_load(keys, tiles + 8 * b * PITCH(BLOCKS) + 8 * i, PITCH(BLOCKS));
                simdgroup_multiply_accumulate(sums[i], weights, keys, sums[i]);
            }
        }
    }
    if (!works) return;
    const ulong start = start_of(row.first_query + mine, params.dq_pitch, place.head, width);
    UNROLL for (uint i = 0; i < BLOCKS; ++i) {
        if (8 * i >= width) continue;
        unload(sums[i], scores, dq, start + 8 * i, params.dq_pitch, row.queries - mine, lane);
    }
}

// dk and dv of 32 keys, over the queries of all heads that share them 16 at a time, in eight SIMD groups: four multiply 8 keys each with
// the queries, four 8 values each with dout; then each sums its columns, one of eight in turn, of dv = pᵀ dout and dk = dsᵀ q.
// `tiles` holds 32 rows, `scores` and `slopes` 32 * NARROW floats each.
template <uint BLOCKS, bool CAPPED>
FUNCTION void to_keys(DEVICE_PTR(const T) dout, DEVICE_PTR(const T) q, DEVICE_PTR(const T) k, DEVICE_PTR(const T) v,
                      DEVICE_PTR(const float) lse, DEVICE_PTR(const float) delta, Row row, DEVICE_PTR(T) dk, DEVICE_PTR(T) dv,
                      MatrixAttentionParams params, Place place, THREADGROUP_PTR(T) tiles, THREADGROUP_PTR(float) scores,
                      THREADGROUP_PTR(float) slopes) {
    const uint first = 32 * place.tile, width = params.width, simd = place.simd;
    if (first >= row.keys) return;
    const uint before = row.keys - row.queries, block = simd % 4, group = params.heads / params.kv_heads;
    const uint k_pitch = params.k_pitch, v_pitch = params.v_pitch, q_pitch = params.q_pitch, dout_pitch = params.dout_pitch;
    const ulong k_start = start_of(row.first_key + first, k_pitch, place.head, width);
    const ulong v_start = start_of(row.first_key + first, v_pitch, place.head, width);
    THREADGROUP_PTR(T) dout_tile = tiles + 16 * PITCH(BLOCKS);
    const bool is_key = simd < 4;

    const Matrix zero = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    Operand own[BLOCKS];
    Matrix dk_sums[4][BLOCKS / 8], dv_sums[4][BLOCKS / 8];
    UNROLL for (uint b = 0; b < 4; ++b) {
        UNROLL for (uint c = 0; c < BLOCKS / 8; ++c) dk_sums[b][c] = dv_sums[b][c] = zero;
    }
    for (uint side = 0; side < 2; ++side) {
        BARRIER();
        if (side == 0) stage<32, BLOCKS>(k, k_start, k_pitch, row.keys - first, width, tiles, place);
        else stage<32, BLOCKS>(v, v_start, v_pitch, row.keys - first, width, tiles, place);
        BARRIER();
        if (is_key != (side == 0)) continue;
        UNROLL for (uint i = 0; i < BLOCKS; ++i) {
            if (8 * i < width) simdgroup_load(own[i], tiles + 8 * block * PITCH(BLOCKS) + 8 * i, PITCH(BLOCKS));
        }
    }

    // of scores a thread has two, 16 keys apart; the tile's last key is the last to be seen
    const uint my_key = first + place.index / 16, my_query = place.index % 16;
    const uint my_times[2] = {times_seen(my_key, params), times_seen(my_key + 16, params)};
    const uint last = min(first + 31, row.keys - 1), beyond = last + min(times_seen(last, params), row.keys - last);
    const uint end = beyond > before ? beyond - before : 0;
    for (uint head = group * place.head; head < group * (place.head + 1); ++head) {
        for (uint query = first > before ? first - before : 0; query < end; query += 16) {
            const ulong q_start = start_of(row.first_query + query, q_pitch, head, width);
            const ulong dout_start = start_of(row.first_query + query, dout_pitch, head, width);
            BARRIER();
            stage<16, BLOCKS>(q, q_start, q_pitch, row.queries - query, width, tiles, place);
            stage<16, BLOCKS>(dout, dout_start, dout_pitch, row.queries - query, width, dout_tile, place);
            BARRIER();
            THREADGROUP_PTR(T) partners = is_key ? tiles : dout_tile;
            Matrix products[2];
            UNROLL for (uint b = 0; b < 2; ++b) products[b] = zero;
            UNROLL for (uint i = 0; i < BLOCKS; ++i) {
                if (8 * i >= width) continue;
                UNROLL for (uint b = 0; b < 2; ++b) {
                    Operand partner;
                    simdgroup_load(partner, partners + 8 * b * PITCH(BLOCKS) + 8 * i, PITCH(BLOCKS), ulong2(0, 0), true);
                    simdgroup_multiply_accumulate(products[b], own[i], partner, products[b]);
                }
            }
            THREADGROUP_PTR(float) results = (is_key ? scores : slopes) + 8 * block * NARROW;
            UNROLL for (uint b = 0; b < 2; ++b) simdgroup_store(products[b], results + 8 * b, NARROW);
            BARRIER();
            UNROLL for (uint i = 0; i < 2; ++i) {
                const uint key = my_key + 16 * i, at_query = query + my_query, at = (key - first) * NARROW + my_query;
                float p = 0.0f, ds = 0.0f;
                if (at_query < row.queries && before + at_query - key < my_times[i]) {
                    const ulong statistic = ulong(row.first_query + at_query) * params.heads + head;
                    float slope;
                    const float score = score_of<CAPPED>(scores[at], params, slope);
                    p = exp(score - lse[statistic]);
                    ds = p * (slopes[at] - delta[statistic]) * slope;
                }
                scores[at] = p;
                slopes[at] = ds;
            }
            BARRIER();
            UNROLL for (uint c = 0; c < BLOCKS / 8; ++c) {
                const uint column = 8 * (simd + 8 * c);
                if (column >= width) continue;
                UNROLL for (uint b = 0; b < 2; ++b) {
                    Operand douts, queries;
                    simdgroup_load(douts, dout_tile + 8 * b * PITCH(BLOCKS) + column, PITCH(BLOCKS));
                    simdgroup_load(queries, tiles + 8 * b * PITCH(BLOCKS) + column, PITCH(BLOCKS));
                    UNROLL for (uint keys = 0; keys < 4; ++keys) {
                        Matrix p, ds;
                        simdgroup_load(p, scores + 8 * keys * NARROW + 8 * b, NARROW);
                        simdgroup_load(ds, slopes + 8 * keys * NARROW + 8 * b, NARROW);
                        simdgroup_multiply_accumulate(dv_sums[keys][c], p, douts, dv_sums[keys][c]);
                        simdgroup_multiply_accumulate(dk_sums[keys][c], ds, queries, dk_sums[keys][c]);
                    }
                }
            }
        }
    }

    BARRIER();
    UNROLL for (uint c = 0; c < BLOCKS / 8; ++c) {
        const uint column = 8 * (simd + 8 * c);
        if (column >= width) continue;
        UNROLL for (uint b = 0; b < 4; ++b) {
            const uint key = first + 8 * b, count = row.keys > key ? row.keys - key : 0;
            const ulong dk_start = start_of(row.first_key + key, params.dk_pitch, place.head, width) + column;
            const ulong dv_start = start_of(row.first_key + key, params.dv_pitch, place.head, width) + column;
            unload(dk_sums[b][c], scores + 64 * simd, dk, dk_start, params.dk_pitch, count, place.lane);
            unload(dv_sums[b][c], scores + 64 * simd, dv, dv_start, params.dv_pitch, count, place.lane);
        }
    }
}

/// Fills `dq`; heads of at most 64. Threadgroups of 128: 32 queries, heads, rows.
KERNEL(attention_dq_64)(READ_ROWS(T, dout, 0), READ_ROWS(T, q, 1), READ_ROWS(T, k, 2), READ_ROWS(T, v, 3), READ(float, lse, 4),
                        READ(float, delta, 5), READ(uint, rows, 6), WRITE_ROWS(T, dq, 7), PARAMS(MatrixAttentionParams, 8))
{
    THREADGROUP(T, tiles, 32 * PITCH(8));
    THREADGROUP(float, scores, 4 * 2 * 8 * NARROW);
    const Place place = {GROUPS_X - 1 - GROUP_X, GROUP_Y, THREAD, THREADS, LANE, SIMD};
    to_queries<8, false>(dout, q, k, v, lse, delta, row_of(rows, GROUP_Z), dq, params, place, tiles, scores);
}

/// The same for heads of at most 128.
KERNEL(attention_dq_128)(READ_ROWS(T, dout, 0), READ_ROWS(T, q, 1), READ_ROWS(T, k, 2), READ_ROWS(T, v, 3), READ(float, lse, 4),
                         READ(float, delta, 5), READ(uint, rows, 6), WRITE_ROWS(T, dq, 7), PARAMS(MatrixAttentionParams, 8))
{
    THREADGROUP(T, tiles, 32 * PITCH(16));
    THREADGROUP(float, scores, 4 * 2 * 8 * NARROW);
    const Place place = {GROUPS_X - 1 - GROUP_X, GROUP_Y, THREAD, THREADS, LANE, SIMD};
    to_queries<16, false>(dout, q, k, v, lse, delta, row_of(rows, GROUP_Z), dq, params, place, tiles, scores);
}

/// The same where scores have a cap.
KERNEL(attention_dq_capped)(READ_ROWS(T, dout, 0), READ_ROWS(T, q, 1), READ_ROWS(T, k, 2), READ_ROWS(T, v, 3), READ(float, lse, 4),
                            READ(float, delta, 5), READ(uint, rows, 6), WRITE_ROWS(T, dq, 7), PARAMS(MatrixAttentionParams, 8))
{
    THREADGROUP(T, tiles, 32 * PITCH(16));
    THREADGROUP(float, scores, 4 * 2 * 8 * NARROW);
    const Place place = {GROUPS_X - 1 - GROUP_X, GROUP_Y, THREAD, THREADS, LANE, SIMD};
    to_queries<16, true>(dout, q, k, v, lse, delta, row_of(rows, GROUP_Z), dq, params, place, tiles, scores);
}

/// Fills `dk` and `dv` of the keys that rows hold; heads of at most 64. Threadgroups of 256: 32 keys, key heads, rows.
KERNEL(attention_dkv_64)(READ_ROWS(T, dout, 0), READ_ROWS(T, q, 1), READ_ROWS(T, k, 2), READ_ROWS(T, v, 3), READ(float, lse, 4),
                         READ(float, delta, 5), READ(uint, rows, 6), UPDATE_ROWS(T, dk, 7), UPDATE_ROWS(T, dv, 8),
                         PARAMS(MatrixAttentionParams, 9))
{
    THREADGROUP(T, tiles, 32 * PITCH(8));
    THREADGROUP(float, scores, 32 * NARROW);
    THREADGROUP(float, slopes, 32 * NARROW);
    const Place place = {GROUP_X, GROUP_Y, THREAD, THREADS, LANE, SIMD};
    to_keys<8, false>(dout, q, k, v, lse, delta, row_of(rows, GROUP_Z), dk, dv, params, place, tiles, scores, slopes);
}

/// The same for heads of at most 128.
KERNEL(attention_dkv_128)(READ_ROWS(T, dout, 0), READ_ROWS(T, q, 1), READ_ROWS(T, k, 2), READ_ROWS(T, v, 3), READ(float, lse, 4),
                          READ(float, delta, 5), READ(uint, rows, 6), UPDATE_ROWS(T, dk, 7), UPDATE_ROWS(T, dv, 8),
                          PARAMS(MatrixAttentionParams, 9))
{
    THREADGROUP(T, tiles, 32 * PITCH(16));
    THREADGROUP(float, scores, 32 * NARROW);
    THREADGROUP(float, slopes, 32 * NARROW);
    const Place place = {GROUP_X, GROUP_Y, THREAD, THREADS, LANE, SIMD};
    to_keys<16, false>(dout, q, k, v, lse, delta, row_of(rows, GROUP_Z), dk, dv, params, place, tiles, scores, slopes);
}

/// The same where scores have a cap.
KERNEL(attention_dkv_capped)(READ_ROWS(T, dout, 0), READ_ROWS(T, q, 1), READ_ROWS(T, k, 2), READ_ROWS(T, v, 3), READ(float, lse, 4),
                             READ(float, delta, 5), READ(uint, rows, 6), UPDATE_ROWS(T, dk, 7), UPDATE_ROWS(T, dv, 8),
                             PARAMS(MatrixAttentionParams, 9))
{
    THREADGROUP(T, tiles, 32 * PITCH(16));
    THREADGROUP(float, scores, 32 * NARROW);
    THREADGROUP(float, slopes, 32 * NARROW);
    const Place place = {GROUP_X, GROUP_Y, THREAD, THREADS, LANE, SIMD};
    to_keys<16, true>(dout, q, k, v, lse, delta, row_of(rows, GROUP_Z), dk, dv, params, place, tiles, scores, slopes);
}
