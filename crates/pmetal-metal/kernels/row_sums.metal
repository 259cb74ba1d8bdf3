// Weighted sums of rows that a list names, and the gradients of the weights: how tokens come to their experts and back. A pitch is the distance
// between rows; `quads` groups of four of a row are moved whole: all of them, or none where rows do not begin at aligned places.

struct SumRowsParams { uint width; uint quads; uint rows; uint entries; uint x_pitch; uint y_pitch; };

// `lists` holds where the entries of each of the `rows` rows of y begin and the last ends, then each entry's row of x, then the number of its
// weight. A threadgroup has a row; entries are added in their order.

/// `y[r]` is the sum of the rows of `x` that the list of row `r` names.
KERNEL(sum_rows)(READ_ROWS(T, x, 0), READ(uint, lists, 1), WRITE_ROWS(T, y, 2), PARAMS(SumRowsParams, 3))
{
    const uint first = lists[GROUP_X], last = lists[GROUP_X + 1], rows = params.rows + 1;
    const ulong to = ulong(GROUP_X) * params.y_pitch;
    for (uint i = THREAD; i < params.quads; i += THREADS) {
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        for (uint e = first; e < last; ++e) {
            const float4 v = load4(x, ulong(lists[rows + e]) * params.x_pitch + 4 * i);
            sum = make_float4(sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w);
        }
        store4(y, to + 4 * i, sum);
    }
    for (uint i = 4 * params.quads + THREAD; i < params.width; i += THREADS) {
        float sum = 0.0f;
        for (uint e = first; e < last; ++e) sum += float(x[ulong(lists[rows + e]) * params.x_pitch + i]);
        y[to + i] = T(sum);
    }
}

/// `y[r]` is the sum of the rows of `x` that the list of row `r` names, each times its weight.
KERNEL(sum_weighted_rows)(READ_ROWS(T, x, 0), READ(uint, lists, 1), READ(float, weights, 2), WRITE_ROWS(T, y, 3), PARAMS(SumRowsParams, 4))
{
    const uint first = lists[GROUP_X], last = lists[GROUP_X + 1], rows = params.rows + 1, numbers = rows + params.entries;
    const ulong to = ulong(GROUP_X) * params.y_pitch;
    for (uint i = THREAD; i < params.quads; i += THREADS) {
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        for (uint e = first; e < last; ++e) {
            const float w = weights[lists[numbers + e]];
            const float4 v = load4(x, ulong(lists[rows + e]) * params.x_pitch + 4 * i);
            sum = make_float4(sum.x + w * v.x, sum.y + w * v.y, sum.z + w * v.z, sum.w + w * v.w);
        }
        store4(y, to + 4 * i, sum);
    }
    for (uint i = 4 * params.quads + THREAD; i < params.width; i += THREADS) {
        float sum = 0.0f;
        for (uint e = first; e < last; ++e) {
            sum += weights[lists[numbers + e]] * float(x[ulong(lists[rows + e]) * params.x_pitch + i]);
        }
        y[to + i] = T(sum);
    }
}

struct DotRowsParams { uint width; uint entries; uint dy_pitch; uint x_pitch; };

/// The gradients of the weights of `sum_weighted_rows`: `lists` holds each entry's row of dy, then its row of x, then the number of its weight,
/// where the product of both goes. A SIMD group has an entry.
KERNEL(dot_rows)(READ_ROWS(T, dy, 0), READ_ROWS(T, x, 1), READ(uint, lists, 2), WRITE(float, dots, 3), PARAMS(DotRowsParams, 4))
{
    const uint e = GROUP_X * SIMDS + SIMD;
    if (e >= params.entries) return;
    const ulong a = ulong(lists[e]) * params.dy_pitch, b = ulong(lists[params.entries + e]) * params.x_pitch;
    float sum = 0.0f;
    for (uint i = LANE; i < params.width; i += 32) sum += float(dy[a + i]) * float(x[b + i]);
    sum = simd_sum(sum);
    if (LANE == 0) dots[lists[2 * params.entries + e]] = sum;
}
