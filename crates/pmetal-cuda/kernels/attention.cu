// Attention over packed rows on tensor cores, forward and backward: softmax(scale · Q Kᵀ) V, where query i of a row sees keys
// 0 ..= keys - queries + i, or of these what `Reach` says; scores may have a cap. Tiled with a running softmax as in FlashAttention-2 (Dao
// 2023, arXiv:2307.08691): f32 scores, softmax and sums; probabilities are rounded to the inputs' dtype before they meet another matrix. No
// atomics: the same bits every time.
//
// All three kernels have one shape. A block owns 64 rows for each of its groups of four warps and keeps them in shared memory; tiles of the
// other side stream past, copied while the tile before is worked on. Queries own the forward and dQ, keys own dK and dV.
//
// q, out, dout, dq: [tokens, heads * D]; k, v, dk, dv: [kv_tokens, kv_heads * D], each with a pitch; rows: first query, queries, first key,
// keys of each; stats, delta: [heads, tokens], the log2-sum-exp2 of a query's scores and the dot product of its dout and out.
//
// This text stands behind attention_tiles.cuh and attention_softmax.cuh. The host defines how each kernel's work is cut: FORWARD_GROUPS,
// FORWARD_TILE (rows of a streamed tile, 64 or 128) and FORWARD_STAGES (tiles in shared memory at a time), the same of DQ and DKV.

// ---- Results ----

// Writes the group's 64 rows, each times its factor, through its part of a tile that it has done with; `count` rows of the block exist.
template <int ROWS>
__device__ __forceinline__ void store(const float (&c)[WIDTH / 2], float factor0, float factor1, uint tile, T* out, u64 stride, int count) {
    asm volatile("bar.sync %0, 128;" ::"r"(group() + 1) : "memory");
#pragma unroll
    for (int j = 0; j < WIDTH / 8; j++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float factor = r ? factor1 : factor0;
            asm volatile("st.shared.b32 [%0], %1;" ::"r"(place<ROWS>(tile, own_row() + 8 * r, j) + lane() % 4 * 4),
                         "r"(pack(c[4 * j + 2 * r] * factor, c[4 * j + 2 * r + 1] * factor)) : "memory");
        }
    __syncwarp();
    const int warp_row = threadIdx.x / 32 * 16;
#pragma unroll
    for (int i = lane(); i < 16 * PANELS * 8; i += 32) {
        const int row = warp_row + i / (PANELS * 8), chunk = i % (PANELS * 8);
        uint4 x;
        asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                     : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(place<ROWS>(tile, row, chunk)) : "memory");
        if (row < count && chunk * 8 < D) *(uint4*)(out + row * stride + chunk * 8) = x;
    }
}

// ---- Forward ----
// Grid: heads, rows, blocks of queries of the longest row. The last queries see most and go first.

extern "C" __global__ void __launch_bounds__(FORWARD_GROUPS * 128)
attention_forward(const T* q, const T* k, const T* v, T* out, float* stats, const uint4* rows, int tokens, int heads, int kv_heads,
                  Pitches pitches, float scale, Reach reach, float cap) {
    constexpr int GROUPS = FORWARD_GROUPS, ROWS = GROUPS * 64, TILE = FORWARD_TILE;
    static_assert(FORWARD_STAGES == 2, "keys are one tile ahead of values");
    const Row row(rows[blockIdx.y]);
    const int first = (gridDim.z - 1 - blockIdx.z) * ROWS, head = blockIdx.x;
    if (first >= row.queries) return;
    const int count = min(row.queries - first, ROWS);
    const u64 query = row.first_query + first, key = row.first_key, kv_head = head / (heads / kv_heads);
    k += key * pitches.k + kv_head * D, v += key * pitches.v + kv_head * D;
    const uint q_tile = first_tile(), k_tiles = q_tile + TILE_BYTES<ROWS>, v_tiles = k_tiles + 2 * TILE_BYTES<TILE>;
    const uint own_q = own_rows(q_tile);
    const int end = max(row.offset + first + count, 0), tiles = (end + TILE - 1) / TILE;
    const int limit = row.offset + first + own_row(), open = max(row.offset + first + 1, 0) / TILE;
    // Tiles behind `open` and before `cut` are seen in part.
    const int skipped = reach.skipped<TILE>(row.offset + first), cut = reach.cut<TILE>(row.offset + first + count - 1);
    const int seen[2] = {reach.seen(limit), reach.seen(limit + 8)};
    const Scores scores(scale, cap);

    float o[WIDTH / 2] = {}, s[TILE / 2], largest[2] = {-INF, -INF}, sum[2] = {}, shrink[2];
    uint p[TILE / 4] = {};
    auto tile_of = [&](uint of, int j) { return of + (j & 1) * TILE_BYTES<TILE>; };
    // Before the first tile that is seen there are only zeros: a branch would keep the assembler from running products under what follows.
    auto load_tile = [&](uint of, const T* from, uint pitch, int j) {
        const int left = j < IF_LIMITED(skipped) ? 0 : row.keys - j * TILE;
        load<TILE, GROUPS * 128>(tile_of(of, j), from + (long long)j * TILE * pitch, pitch, left, threadIdx.x);
    };
    // The scores of tile j become weights.
    auto weigh = [&](int j, bool masked) {
        hold(s);
        scores.unscale(s);
        // A thread's columns of the tile start at 2 (lane % 4).
        if (masked) mask<TILE>(s, limit - j * TILE - lane() % 4 * 2, seen, -INF);
        softmax<TILE>(s, largest, sum, shrink, scores.scale2);
        hold(s);
    };
    // The scores of a tile are multiplied ahead of the values of the tile before, whose product then runs under the softmax.
    auto step = [&](int j, bool masked) {
        await_loads();
        await_turn<GROUPS>();
        multiply_transposed<TILE, ROWS>(s, own_q, tile_of(k_tiles, j));
        multiply_add<TILE>(o, p, tile_of(v_tiles, j + 1));
        pass_turn<GROUPS>();
        load_tile(k_tiles, k, pitches.k, j - 1);
        load_tile(v_tiles, v, pitches.v, j);
        end_of_load();
        await_products<1>();
        weigh(j, masked);
        // No sum is negative: they are asked so that this branch, over which the assembler moves no wait, stands behind the weights.
        if (__any_sync(~0u, shrink[0] != 1 || shrink[1] != 1 || sum[0] + sum[1] < 0)) {
            await_products<0>();
            hold(o);
#pragma unroll
            for (int e = 0; e < WIDTH / 2; e++) o[e] *= shrink[e / 2 % 2];
        }
        await_products<0>();
        hold(o);
        hold(p);
        pack(p, s);
    };

    if (tiles > 0) {
        int j = tiles - 1;
        load<ROWS, GROUPS * 128>(q_tile, q + query * pitches.q + head * D, pitches.q, count, threadIdx.x);
        load_tile(k_tiles, k, pitches.k, j);
        end_of_load();
        await_loads();
        multiply_transposed<TILE, ROWS>(s, own_q, tile_of(k_tiles, j));
        load_tile(k_tiles, k, pitches.k, j - 1);
        load_tile(v_tiles, v, pitches.v, j);
        end_of_load();
        await_products<0>();
        weigh(j, true);
        pack(p, s);
        hold(o);
        if (group() == 1) pass_turn<GROUPS>();
#pragma unroll 1
        for (j--; j >= open; j--) step(j, true);
#pragma unroll 1
        for (; j >= IF_LIMITED(cut); j--) step(j, false);
        if constexpr (LIMITED) {
#pragma unroll 1
            for (; j >= skipped; j--) step(j, true);
        }
        if (group() == 0) await_turn<GROUPS>();
        await_loads();
        multiply_add<TILE>(o, p, tile_of(v_tiles, skipped));
        await_products<0>();
        hold(o);
    }

    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const float total = quad_sum(sum[r]);
        factor[r] = total > 0 ? 1 / total : 0;
        const int i = own_row() + 8 * r;
        // Infinite where a query sees no key: the backward then finds probabilities of 0.
        const u64 number = (u64)head * tokens + row.first_query + first + i;
        if (lane() % 4 == 0 && i < count) stats[number] = total > 0 ? largest[r] * scores.scale2 + log2f(total) : INF;
    }
    store<ROWS>(o, factor[0], factor[1], q_tile, out + query * pitches.out + head * D, pitches.out, count);
}

// ---- Backward ----
// With P = exp(scale S - lse) and dP = dO Vᵀ: dV = Pᵀ dO, dS = P (dP - delta), dQ = scale dS K, dK = scale dSᵀ Q. Where scores have
// a cap, its slope is in dS.

// Grid as of the forward. Writes delta as well: it goes before the kernel of keys.
extern "C" __global__ void __launch_bounds__(DQ_GROUPS * 128)
attention_dq(const T* q, const T* k, const T* v, const T* dout, const T* out, const float* stats, float* delta, T* dq, const uint4* rows,
             int tokens, int heads, int kv_heads, Pitches pitches, float scale, Reach reach, float cap) {
    constexpr int GROUPS = DQ_GROUPS, ROWS = GROUPS * 64, TILE = DQ_TILE, STAGES = DQ_STAGES;
    const Row row(rows[blockIdx.y]);
    const int first = (gridDim.z - 1 - blockIdx.z) * ROWS, head = blockIdx.x;
    if (first >= row.queries) return;
    const int count = min(row.queries - first, ROWS);
    const u64 query = row.first_query + first, key = row.first_key, kv_head = head / (heads / kv_heads);
    k += key * pitches.k + kv_head * D, v += key * pitches.v + kv_head * D;
    dout += query * pitches.dout + head * D, out += query * pitches.out + head * D;
    const uint q_tile = first_tile(), dout_tile = q_tile + TILE_BYTES<ROWS>, streamed = dout_tile + TILE_BYTES<ROWS>;
    const uint own_q = own_rows(q_tile), own_dout = own_rows(dout_tile);
    const int end = max(row.offset + first + count, 0), tiles = (end + TILE - 1) / TILE;
    const int limit = row.offset + first + own_row(), open = max(row.offset + first + 1, 0) / TILE;
    const int skipped = reach.skipped<TILE>(row.offset + first), cut = reach.cut<TILE>(row.offset + first + count - 1);
    const int seen[2] = {reach.seen(limit), reach.seen(limit + 8)};
    const Scores scores(scale, cap);

    float c[WIDTH / 2] = {}, s[TILE / 2], dp[TILE / 2];
    uint ds[TILE / 4] = {};
    float base[2], shift[2] = {};
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int i = own_row() + 8 * r;
        const u64 number = (u64)head * tokens + query + i;
        base[r] = i < count ? stats[number] : INF;
        for (int d = lane() % 4 * 8; d < D && i < count; d += 32)
            shift[r] += dot(*(const uint4*)(dout + (u64)i * pitches.dout + d), *(const uint4*)(out + (u64)i * pitches.out + d));
        shift[r] = quad_sum(shift[r]);
        if (lane() % 4 == 0 && i < count) delta[number] = shift[r];
    }
    constexpr int STAGE = 2 * TILE_BYTES<TILE>;
    uint at = streamed;
    auto after = [&](uint tile) { return tile + STAGE == streamed + STAGES * STAGE ? streamed : tile + STAGE; };
    auto load_tile = [&](int j, uint to) {
        const long long from = (long long)j * TILE;
        const int left = j < IF_LIMITED(skipped) ? 0 : row.keys - j * TILE;
        load<TILE, GROUPS * 128>(to, k + from * pitches.k, pitches.k, left, threadIdx.x);
        load<TILE, GROUPS * 128>(to + TILE_BYTES<TILE>, v + from * pitches.v, pitches.v, left, threadIdx.x);
        end_of_load();
    };
    auto step = [&](int j, bool masked) {
        await_loads();
        multiply_transposed<TILE, ROWS>(s, own_q, at);
        multiply_transposed<TILE, ROWS>(dp, own_dout, at + TILE_BYTES<TILE>);
        load_tile(j - 1, after(at));
        await_products<1>();
        hold(s);
        hold(c);
        hold(ds);
#pragma unroll
        for (int e = 0; e < TILE / 2; e++) {
            float slope;
            const float weight = scores.weight(s[e], base[e / 2 % 2], slope);
            s[e] = weight * slope;
        }
        if (masked) mask<TILE>(s, limit - j * TILE - lane() % 4 * 2, seen, 0);
        await_products<0>();
        hold(dp);
#pragma unroll
        for (int e = 0; e < TILE / 2; e++) s[e] *= dp[e] - shift[e / 2 % 2];
        pack(ds, s);
        multiply_add<TILE>(c, ds, at);
        if (STAGES == 2) await_products<0>();
        at = after(at);
    };

    load<ROWS, GROUPS * 128>(q_tile, q + query * pitches.q + head * D, pitches.q, count, threadIdx.x);
    load<ROWS, GROUPS * 128>(dout_tile, dout, pitches.dout, count, threadIdx.x);
    load_tile(tiles - 1, at);
    hold(c);
    int j = tiles - 1;
#pragma unroll 1
    for (; j >= open; j--) step(j, true);
#pragma unroll 1
    for (; j >= IF_LIMITED(cut); j--) step(j, false);
    if constexpr (LIMITED) {
#pragma unroll 1
        for (; j >= skipped; j--) step(j, true);
    }
    await_loads();
    await_products<0>();
    hold(c);
    store<ROWS>(c, scale, scale, q_tile, dq + query * pitches.dq + head * D, pitches.dq, count);
}

// Grid: key heads, rows, blocks of keys of the longest row. The first keys are seen most and go first. A block goes over all query heads
// of its key head; scores stand transposed, keys by queries.
extern "C" __global__ void __launch_bounds__(DKV_GROUPS * 128)
attention_dkv(const T* q, const T* k, const T* v, const T* dout, const float* stats, const float* delta, T* dk, T* dv, const uint4* rows,
              int tokens, int heads, int kv_heads, Pitches pitches, float scale, Reach reach, float cap) {
    constexpr int GROUPS = DKV_GROUPS, ROWS = GROUPS * 64, TILE = DKV_TILE, STAGES = DKV_STAGES, STAGE = 2 * TILE_BYTES<TILE> + 1024;
    const Row row(rows[blockIdx.y]);
    const int first = blockIdx.z * ROWS, kv_head = blockIdx.x, shared_by = heads / kv_heads;
    if (first >= row.keys) return;
    const int count = min(row.keys - first, ROWS);
    const u64 key = row.first_key + first;
    const uint k_tile = first_tile(), v_tile = k_tile + TILE_BYTES<ROWS>, streamed = v_tile + TILE_BYTES<ROWS>;
    const uint own_k = own_rows(k_tile), own_v = own_rows(v_tile);
    // Tiles of queries that see none of the block's keys are left out.
    const int all = (reach.queries(row, first + count - 1) + TILE - 1) / TILE, skipped = max(first - row.offset, 0) / TILE;
    const int times[2] = {reach.times(first + own_row()), reach.times(first + own_row() + 8)}, whole = first + reach.times(first);
    const Scores scores(scale, cap);

    float dk_sum[WIDTH / 2] = {}, dv_sum[WIDTH / 2] = {}, s[TILE / 2], dp[TILE / 2];
    uint p[TILE / 4] = {}, ds[TILE / 4] = {};
    uint at = streamed;
    auto after = [&](uint tile) { return tile + STAGE == streamed + STAGES * STAGE ? streamed : tile + STAGE; };
    // The head and tile at hand; beyond the last head there are only zeros.
    const int end = (kv_head + 1) * shared_by;
    int head = skipped < all ? kv_head * shared_by : end, tile = skipped;
    auto load_tile = [&](uint to) {
        const int start = tile * TILE, left = head < end ? row.queries - start : 0;
        const u64 query = row.first_query + start, number = (u64)head * tokens + query;
        load<TILE, GROUPS * 128>(to, q + query * pitches.q + head * D, pitches.q, left, threadIdx.x);
        load<TILE, GROUPS * 128>(to + TILE_BYTES<TILE>, dout + query * pitches.dout + head * D, pitches.dout, left, threadIdx.x);
        // Queries beyond the row are zeros in all four, which adds nothing to any sum.
        load_floats(to + 2 * TILE_BYTES<TILE>, stats + number, TILE, left, threadIdx.x);
        load_floats(to + 2 * TILE_BYTES<TILE> + 512, delta + number, TILE, left, threadIdx.x);
        end_of_load();
    };

    load<ROWS, GROUPS * 128>(k_tile, k + key * pitches.k + kv_head * D, pitches.k, count, threadIdx.x);
    load<ROWS, GROUPS * 128>(v_tile, v + key * pitches.v + kv_head * D, pitches.v, count, threadIdx.x);
    load_tile(at);
    hold(dk_sum);
    hold(dv_sum);
#pragma unroll 1
    while (head < end) {
        const int start = row.offset + tile * TILE;
        if (++tile == all) tile = skipped, head++;
        const uint q_tile = at, dout_tile = q_tile + TILE_BYTES<TILE>, base = dout_tile + TILE_BYTES<TILE>, shift = base + 512;
        await_loads();
        multiply_transposed<TILE, ROWS>(s, own_k, q_tile);
        multiply_transposed<TILE, ROWS>(dp, own_v, dout_tile);
        load_tile(after(at));
        await_products<1>();
        hold(s);
        hold(p);
        hold(ds);
        const bool masked = start < first + ROWS - 1 || (LIMITED && start + TILE > whole);
        weigh_transposed<TILE>(s, p, scores, base, masked, first + own_row() - start - lane() % 4 * 2, times);
        multiply_add<TILE>(dv_sum, p, dout_tile);
        await_products<1>();
        hold(dp);
#pragma unroll
        for (int i = 0; i < TILE / 8; i++) {
            const float2 b = two_of(shift, i);
#pragma unroll
            for (int e = 4 * i; e < 4 * i + 4; e++) s[e] *= dp[e] - (e % 2 ? b.y : b.x);
        }
        pack(ds, s);
        multiply_add<TILE>(dk_sum, ds, q_tile);
        if (STAGES == 2) await_products<0>();
        at = after(at);
    }
    // Without queries nobody has waited for the copies yet.
    await_loads();
    await_products<0>();
    hold(dk_sum);
    hold(dv_sum);
    store<ROWS>(dk_sum, scale, scale, k_tile, dk + key * pitches.dk + kv_head * D, pitches.dk, count);
    store<ROWS>(dv_sum, 1, 1, v_tile, dv + key * pitches.dv + kv_head * D, pitches.dv, count);
}
