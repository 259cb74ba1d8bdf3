// Attention over packed rows on Hopper (sm_90a), forward and backward, for heads wider than 64: what attention.cu computes, by the same
// formulas, with warps that only copy.
//
// A block has two groups of four warps that compute, each for 64 rows of its own, and a third that copies tiles ahead of both. Tiles lie
// in rings; each place has two barriers, full and empty, so that nobody waits for anybody but for a tile, and one group's softmax runs
// under the other's products. A block goes from item to item: 128 rows of a head, from a list that begins with those that meet most. No
// atomics: the same bits every time.
//
// Tensors, rows, stats and delta are those of attention.cu; blocks: row and first query (or key) of 128 each. The host defines DQ_STAGES
// and DKV_STAGES, tiles in shared memory at a time. This text stands behind attention_tiles.cuh, attention_softmax.cuh and
// attention_rings.cuh, the backward in attention_hopper_backward.cu behind it.

constexpr int KEYS = 128;  // of a tile

// What the group that copies does.
__device__ __forceinline__ void load_forward(uint q_tile, uint k_tiles, uint v_tiles, Ring<1> qs, Ring<2> ks, Ring<2> vs, Items list,
                                             const T* q, const T* k, const T* v, const uint4* rows, const uint2* blocks, int heads,
                                             int kv_heads, const Pitches& pitches, const Reach& reach) {
    const int thread = threadIdx.x - COMPUTING;
    Announcer announcer;
    for (int at; (at = list.next()) >= 0;) {
        const Item item(rows, blocks, at, heads);
        const int count = item.count(item.row.queries), kv_head = item.head / (heads / kv_heads);
        const u64 query = item.row.first_query + item.first, key = item.row.first_key;
        announcer.tell<0>();
        qs.await_empty();
        load<ROWS, LOADING>(q_tile, q + query * pitches.q + item.head * D, pitches.q, count, thread);
        announcer.asked(qs.full());
        qs.next();
        // Keys are one tile ahead of values.
        const int tiles = item.tiles<KEYS>(count), skipped = reach.skipped<KEYS>(item.row.offset + item.first);
        for (int j = tiles - 1; j >= skipped - 1; j--) {
            if (j >= skipped) {
                ks.await_empty();
                const T* from = k + (key + j * KEYS) * pitches.k + kv_head * D;
                load<KEYS, LOADING>(k_tiles + ks.stage * TILE_BYTES<KEYS>, from, pitches.k, item.row.keys - j * KEYS, thread);
                announcer.asked(ks.full());
                ks.next();
            }
            if (j < tiles - 1) {
                vs.await_empty();
                const T* from = v + (key + (j + 1) * KEYS) * pitches.v + kv_head * D;
                load<KEYS, LOADING>(v_tiles + vs.stage * TILE_BYTES<KEYS>, from, pitches.v, item.row.keys - (j + 1) * KEYS, thread);
                announcer.asked(vs.full());
                vs.next();
            }
        }
    }
    announcer.tell<0>();
}

extern "C" __global__ void __launch_bounds__(COMPUTING + LOADING, 1)
attention_forward(const T* q, const T* k, const T* v, T* out, float* stats, const uint4* rows, const uint2* blocks, int items, int tokens,
                  int heads, int kv_heads, Pitches pitches, float scale, Reach reach, float cap) {
    const uint q_tile = first_tile(), k_tiles = q_tile + TILE_BYTES<ROWS>, v_tiles = k_tiles + 2 * TILE_BYTES<KEYS>;
    const uint barriers = v_tiles + 2 * TILE_BYTES<KEYS>;
    Ring<1> qs(barriers);
    Ring<2> ks(barriers + 16), vs(barriers + 48);
    if (threadIdx.x == 0) qs.init(), ks.init(), vs.init();
    __syncthreads();
    Items list(items);
    if (threadIdx.x >= COMPUTING) {
        ROLE_OF_LOADING("40");
        load_forward(q_tile, k_tiles, v_tiles, qs, ks, vs, list, q, k, v, rows, blocks, heads, kv_heads, pitches, reach);
    } else {
        ROLE_OF_COMPUTING("232");
        const Scores scores(scale, cap);
        const uint own_q = own_rows(q_tile);
        if (group() == 1) pass_turn<2>();
        for (int at; (at = list.next()) >= 0;) {
            const Item item(rows, blocks, at, heads);
            const int count = item.count(item.row.queries), tiles = item.tiles<KEYS>(count);
            const int limit = item.row.offset + item.first + own_row();
            const int before = uniform(group() * 64), open = max(item.row.offset + item.first + before + 1, 0) / KEYS;
            // Tiles behind `open` and before `cut` are seen in part.
            const int skipped = reach.skipped<KEYS>(item.row.offset + item.first);
            const int cut = reach.cut<KEYS>(item.row.offset + item.first + min(count, before + 64) - 1);
            const int seen[2] = {reach.seen(limit), reach.seen(limit + 8)};
            if (count <= before) {
                // Without rows of its own the group takes no part but its turns.
                qs.await_full();
                release(qs.empty());
                qs.next();
#pragma unroll 1
                for (int j = skipped; j < tiles; j++) {
                    ks.await_full();
                    release(ks.empty());
                    ks.next();
                    if (j > skipped) await_turn<2>(), pass_turn<2>();
                    vs.await_full();
                    release(vs.empty());
                    vs.next();
                }
                continue;
            }
            float o[WIDTH / 2] = {}, s[KEYS / 2], largest[2] = {-INF, -INF}, sum[2] = {}, shrink[2];
            uint p[KEYS / 4] = {};
            auto weigh = [&](int j, bool masked) {
                hold(s);
                scores.unscale(s);
                if (masked) mask<KEYS>(s, limit - j * KEYS - lane() % 4 * 2, seen, -INF);
                softmax<KEYS>(s, largest, sum, shrink, scores.scale2);
                hold(s);
            };
            // The scores of a tile are multiplied ahead of the values of the tile before, whose product then runs under the softmax.
            auto step = [&](int j, bool masked) {
                const uint k_tile = uniform(k_tiles + ks.stage * TILE_BYTES<KEYS>), v_tile = uniform(v_tiles + vs.stage * TILE_BYTES<KEYS>);
                ks.await_full();
                await_turn<2>();
                multiply_transposed<KEYS, ROWS>(s, own_q, k_tile);
                vs.await_full();
                multiply_add<KEYS>(o, p, v_tile);
                pass_turn<2>();
                await_products<1>();
                release(ks.empty());
                ks.next();
                if (j == skipped) release(qs.empty());
                weigh(j, masked);
                // No sum is negative: they are asked so that this branch, over which the assembler moves no wait, stands behind the
                // weights.
                if (__any_sync(~0u, shrink[0] != 1 || shrink[1] != 1 || sum[0] + sum[1] < 0)) {
                    await_products<0>();
                    hold(o);
#pragma unroll
                    for (int e = 0; e < WIDTH / 2; e++) o[e] *= shrink[e / 2 % 2];
                }
                await_products<0>();
                hold(o);
                hold(p);
                release(vs.empty());
                vs.next();
                pack(p, s);
            };

            qs.await_full();
            int j = tiles - 1;
            if (tiles > 0) {
                ks.await_full();
                multiply_transposed<KEYS, ROWS>(s, own_q, k_tiles + ks.stage * TILE_BYTES<KEYS>);
                await_products<0>();
                release(ks.empty());
                ks.next();
            }
            if (tiles <= skipped + 1) release(qs.empty());
            if (tiles > 0) {
                weigh(j, true);
                pack(p, s);
                hold(o);
#pragma unroll 1
                for (j--; j >= open; j--) step(j, true);
#pragma unroll 1
                for (; j >= IF_LIMITED(cut); j--) step(j, false);
                if constexpr (LIMITED) {
#pragma unroll 1
                    for (; j >= skipped; j--) step(j, true);
                }
                vs.await_full();
                multiply_add<KEYS>(o, p, v_tiles + vs.stage * TILE_BYTES<KEYS>);
                await_products<0>();
                hold(o);
                release(vs.empty());
                vs.next();
            }
            qs.next();

            float factor[2];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const float total = quad_sum(sum[r]);
                factor[r] = total > 0 ? 1 / total : 0;
                const int i = own_row() + 8 * r;
                // Infinite where a query sees no key: the backward then finds probabilities of 0.
                const u64 number = (u64)item.head * tokens + item.row.first_query + item.first + i;
                if (lane() % 4 == 0 && i < count) stats[number] = total > 0 ? largest[r] * scores.scale2 + log2f(total) : INF;
            }
            const u64 query = item.row.first_query + item.first;
            store(o, factor[0], factor[1], out + query * pitches.out + item.head * D, pitches.out, count);
        }
        if (group() == 0) await_turn<2>();
    }
}
