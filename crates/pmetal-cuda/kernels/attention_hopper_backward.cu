// The backward of attention on Hopper, behind attention_hopper.cu: with P = exp(scale S - lse) and dP = dO Vᵀ, dV = Pᵀ dO,
// dS = P (dP - delta), dQ = scale dS K, dK = scale dSᵀ Q; where scores have a cap, with its slope in dS.

constexpr int STREAMED = 64;  // rows of a tile that streams past
constexpr int PAIR = 2 * TILE_BYTES<STREAMED>, FLOATS = STREAMED * 4;

__device__ __forceinline__ uint4 load_chunk(uint at) {
    uint4 x;
    asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(at) : "memory");
    return x;
}

// What the group that copies does.
__device__ __forceinline__ void load_dq(uint q_tile, uint dout_tile, uint out_tile, uint own_stats, uint pairs, Ring<1> own,
                                        Ring<DQ_STAGES> ring, Items list, const T* q, const T* k, const T* v, const T* dout, const T* out,
                                        const float* stats, const uint4* rows, const uint2* blocks, int tokens, int heads, int kv_heads,
                                        const Pitches& pitches, const Reach& reach) {
    const int thread = threadIdx.x - COMPUTING;
    Announcer announcer;
    for (int at; (at = list.next()) >= 0;) {
        const Item item(rows, blocks, at, heads);
        const int count = item.count(item.row.queries), kv_head = item.head / (heads / kv_heads);
        const u64 query = item.row.first_query + item.first, key = item.row.first_key;
        announcer.tell<0>();
        own.await_empty();
        load<ROWS, LOADING>(q_tile, q + query * pitches.q + item.head * D, pitches.q, count, thread);
        load<ROWS, LOADING>(dout_tile, dout + query * pitches.dout + item.head * D, pitches.dout, count, thread);
        load<ROWS, LOADING>(out_tile, out + query * pitches.out + item.head * D, pitches.out, count, thread);
        load_floats(own_stats, stats + (u64)item.head * tokens + query, ROWS, count, thread);
        announcer.asked(own.full());
        own.next();
        const int skipped = reach.skipped<STREAMED>(item.row.offset + item.first);
        for (int j = item.tiles<STREAMED>(count) - 1; j >= skipped; j--) {
            ring.await_empty();
            const uint pair = pairs + ring.stage * PAIR;
            const u64 from = key + j * STREAMED;
            const int left = item.row.keys - j * STREAMED;
            load<STREAMED, LOADING>(pair, k + from * pitches.k + kv_head * D, pitches.k, left, thread);
            load<STREAMED, LOADING>(pair + TILE_BYTES<STREAMED>, v + from * pitches.v + kv_head * D, pitches.v, left, thread);
            announcer.asked(ring.full());
            ring.next();
        }
    }
    announcer.tell<0>();
}

// dQ, and delta: it goes before the kernel of keys.
extern "C" __global__ void __launch_bounds__(COMPUTING + LOADING, 1)
attention_dq(const T* q, const T* k, const T* v, const T* dout, const T* out, const float* stats, float* delta, T* dq, const uint4* rows,
             const uint2* blocks, int items, int tokens, int heads, int kv_heads, Pitches pitches, float scale, Reach reach, float cap) {
    constexpr int STAGES = DQ_STAGES;
    const uint q_tile = first_tile(), dout_tile = q_tile + TILE_BYTES<ROWS>, out_tile = dout_tile + TILE_BYTES<ROWS>;
    const uint pairs = out_tile + TILE_BYTES<ROWS>, own_stats = pairs + STAGES * PAIR, barriers = own_stats + ROWS * 4;
    Ring<1> own(barriers);
    Ring<STAGES> ring(barriers + 16);
    if (threadIdx.x == 0) own.init(), ring.init();
    __syncthreads();
    Items list(items);
    if (threadIdx.x >= COMPUTING) {
        ROLE_OF_LOADING("40");
        load_dq(q_tile, dout_tile, out_tile, own_stats, pairs, own, ring, list, q, k, v, dout, out, stats, rows, blocks, tokens, heads,
                kv_heads, pitches, reach);
    } else {
        ROLE_OF_COMPUTING("232");
        const Scores scores(scale, cap);
        const uint own_dout = own_rows(dout_tile);
        for (int at; (at = list.next()) >= 0;) {
            const Item item(rows, blocks, at, heads);
            const int count = item.count(item.row.queries), limit = item.row.offset + item.first + own_row();
            // Tiles that the block sees, of which the group has its own, of which it sees the first whole.
            const int all = item.tiles<STREAMED>(count), before = uniform(group() * 64);
            const int skipped = reach.skipped<STREAMED>(item.row.offset + item.first);
            const int tiles = count > before ? item.tiles<STREAMED>(min(count, before + 64)) : IF_LIMITED(skipped);
            const int open = max(item.row.offset + item.first + before + 1, 0) / STREAMED;
            const int cut = reach.cut<STREAMED>(item.row.offset + item.first + min(count, before + 64) - 1);
            const int seen[2] = {reach.seen(limit), reach.seen(limit + 8)};
            float c[WIDTH / 2] = {}, s[STREAMED / 2], dp[STREAMED / 2], base[2], shift[2] = {};
            uint ds[STREAMED / 4] = {}, left[WIDTH / 4];
            own.await_full();
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int i = own_row() + 8 * r;
                asm volatile("ld.shared.f32 %0, [%1];" : "=f"(base[r]) : "r"(own_stats + i * 4) : "memory");
#pragma unroll
                for (int chunk = 0; chunk < WIDTH / 8; chunk += 4) {
                    const int mine = chunk + lane() % 4;
                    shift[r] += dot(load_chunk(place<ROWS>(dout_tile, i, mine)), load_chunk(place<ROWS>(out_tile, i, mine)));
                }
                shift[r] = quad_sum(shift[r]);
                const u64 number = (u64)item.head * tokens + item.row.first_query + item.first + i;
                if (lane() % 4 == 0 && i < count) delta[number] = shift[r];
            }
            load_left(left, q_tile);
            uint used = 0;
            auto step = [&](int j, bool masked) {
                const uint pair = uniform(pairs + ring.stage * PAIR);
                ring.await_full();
                multiply_left_transposed<STREAMED>(s, left, pair);
                multiply_transposed<STREAMED, ROWS>(dp, own_dout, pair + TILE_BYTES<STREAMED>);
                await_products<1>();
                if (used) release(used);
                used = ring.empty();
                ring.next();
                hold(s);
                hold(c);
                hold(ds);
#pragma unroll
                for (int e = 0; e < STREAMED / 2; e++) {
                    float slope;
                    const float weight = scores.weight(s[e], base[e / 2 % 2], slope);
                    s[e] = weight * slope;
                }
                if (masked) mask<STREAMED>(s, limit - j * STREAMED - lane() % 4 * 2, seen, 0);
                await_products<0>();
                hold(dp);
                if (j == skipped) release(own.empty());
#pragma unroll
                for (int e = 0; e < STREAMED / 2; e++) s[e] *= dp[e] - shift[e / 2 % 2];
                pack(ds, s);
                multiply_add<STREAMED>(c, ds, pair);
            };
            hold(c);
            int j = all - 1;
#pragma unroll 1
            for (; j >= tiles; j--) {
                ring.await_full();
                release(ring.empty());
                ring.next();
            }
#pragma unroll 1
            for (; j >= open; j--) step(j, true);
#pragma unroll 1
            for (; j >= IF_LIMITED(cut); j--) step(j, false);
            if constexpr (LIMITED) {
#pragma unroll 1
                for (; j >= skipped; j--) step(j, true);
            }
            await_products<0>();
            hold(c);
            if (used) release(used);
            if (tiles <= IF_LIMITED(skipped)) release(own.empty());
            own.next();
            const u64 query = item.row.first_query + item.first;
            store(c, scale, scale, dq + query * pitches.dq + item.head * D, pitches.dq, count);
        }
    }
}

// What the group that copies does.
__device__ __forceinline__ void load_dkv(uint k_tile, uint v_tile, uint pairs, uint floats, Ring<1> own, Ring<DKV_STAGES> ring, Items list,
                                         const T* q, const T* k, const T* v, const T* dout, const float* stats, const float* delta,
                                         const uint4* rows, const uint2* blocks, int tokens, int kv_heads, int shared_by,
                                         const Pitches& pitches, const Reach& reach) {
    const int thread = threadIdx.x - COMPUTING;
    Announcer announcer;
    for (int at; (at = list.next()) >= 0;) {
        const Item item(rows, blocks, at, kv_heads);
        const int count = item.count(item.row.keys);
        const u64 key = item.row.first_key + item.first;
        announcer.tell<0>();
        own.await_empty();
        load<ROWS, LOADING>(k_tile, k + key * pitches.k + item.head * D, pitches.k, count, thread);
        load<ROWS, LOADING>(v_tile, v + key * pitches.v + item.head * D, pitches.v, count, thread);
        announcer.asked(own.full());
        own.next();
        const int all = (reach.queries(item.row, item.first + count - 1) + STREAMED - 1) / STREAMED;
        const int skipped = max(item.first - item.row.offset, 0) / STREAMED;
        for (int head = item.head * shared_by; head < (item.head + 1) * shared_by; head++)
            for (int tile = skipped; tile < all; tile++) {
                ring.await_empty();
                const uint pair = pairs + ring.stage * PAIR, numbers = floats + ring.stage * 2 * FLOATS;
                const u64 query = item.row.first_query + tile * STREAMED, number = (u64)head * tokens + query;
                const int left = item.row.queries - tile * STREAMED;
                load<STREAMED, LOADING>(pair, q + query * pitches.q + head * D, pitches.q, left, thread);
                load<STREAMED, LOADING>(pair + TILE_BYTES<STREAMED>, dout + query * pitches.dout + head * D, pitches.dout, left, thread);
                // Queries beyond the row are zeros in all four, which adds nothing to any sum.
                load_floats(numbers, stats + number, STREAMED, left, thread);
                load_floats(numbers + FLOATS, delta + number, STREAMED, left, thread);
                announcer.asked(ring.full());
                ring.next();
            }
    }
    announcer.tell<0>();
}

// dK and dV. An item goes over all query heads of its key head; scores stand transposed, keys by queries.
extern "C" __global__ void __launch_bounds__(COMPUTING + LOADING, 1)
attention_dkv(const T* q, const T* k, const T* v, const T* dout, const float* stats, const float* delta, T* dk, T* dv, const uint4* rows,
              const uint2* blocks, int items, int tokens, int heads, int kv_heads, Pitches pitches, float scale, Reach reach, float cap) {
    constexpr int STAGES = DKV_STAGES, STAGE = PAIR + 2 * FLOATS;
    const uint k_tile = first_tile(), v_tile = k_tile + TILE_BYTES<ROWS>, pairs = v_tile + TILE_BYTES<ROWS>;
    const uint floats = pairs + STAGES * PAIR, barriers = pairs + STAGES * STAGE;
    const int shared_by = heads / kv_heads;
    Ring<1> own(barriers);
    Ring<STAGES> ring(barriers + 16);
    if (threadIdx.x == 0) own.init(), ring.init();
    __syncthreads();
    Items list(items);
    if (threadIdx.x >= COMPUTING) {
        ROLE_OF_LOADING("24");
        load_dkv(k_tile, v_tile, pairs, floats, own, ring, list, q, k, v, dout, stats, delta, rows, blocks, tokens, kv_heads, shared_by,
                 pitches, reach);
    } else {
        ROLE_OF_COMPUTING("240");
        const Scores scores(scale, cap);
        const uint own_k = own_rows(k_tile), own_v = own_rows(v_tile);
        for (int at; (at = list.next()) >= 0;) {
            const Item item(rows, blocks, at, kv_heads);
            const int count = item.count(item.row.keys), before = uniform(group() * 64), first = item.first + before;
            const int all = (reach.queries(item.row, item.first + count - 1) + STREAMED - 1) / STREAMED;
            const int skipped = max(item.first - item.row.offset, 0) / STREAMED;
            const int own_key = item.first + own_row(), whole = first + reach.times(first);
            const int times[2] = {reach.times(own_key), reach.times(own_key + 8)};
            // The group's own begin later; where it has no keys, never.
            const int begin = count > before ? min(max(first - item.row.offset, 0) / STREAMED, all) : all;
            float dk_sum[WIDTH / 2] = {}, dv_sum[WIDTH / 2] = {}, s[STREAMED / 2], dp[STREAMED / 2];
            // Holds P, then dS: there are no registers for both.
            uint p[STREAMED / 4] = {}, used = 0;
            hold(dk_sum);
            hold(dv_sum);
            own.await_full();
#pragma unroll 1
            for (int head = 0; head < shared_by; head++) {
                // Nobody is kept waiting for a place while this group waits.
                if (used && skipped < begin) {
                    await_products<0>();
                    release(used);
                    used = 0;
                }
#pragma unroll 1
                for (int tile = skipped; tile < begin; tile++) {
                    ring.await_full();
                    release(ring.empty());
                    ring.next();
                }
#pragma unroll 1
                for (int tile = begin; tile < all; tile++) {
                    const uint q_tile = uniform(pairs + ring.stage * PAIR), dout_tile = q_tile + TILE_BYTES<STREAMED>;
                    const uint base = floats + ring.stage * 2 * FLOATS, shift = base + FLOATS;
                    ring.await_full();
                    multiply_transposed<STREAMED, ROWS>(s, own_k, q_tile);
                    multiply_transposed<STREAMED, ROWS>(dp, own_v, dout_tile);
                    await_products<1>();
                    if (used) release(used);
                    used = ring.empty();
                    ring.next();
                    hold(s);
                    hold(p);
                    const int start = item.row.offset + tile * STREAMED;
                    const bool masked = start < first + 63 || (LIMITED && start + STREAMED > whole);
                    weigh_transposed<STREAMED>(s, p, scores, base, masked, own_key - start - lane() % 4 * 2, times);
                    multiply_add<STREAMED>(dv_sum, p, dout_tile);
                    await_products<1>();
                    hold(dp);
#pragma unroll
                    for (int i = 0; i < STREAMED / 8; i++) {
                        const float2 b = two_of(shift, i);
#pragma unroll
                        for (int e = 4 * i; e < 4 * i + 4; e++) s[e] *= dp[e] - (e % 2 ? b.y : b.x);
                    }
                    await_products<0>();
                    hold(p);
                    pack(p, s);
                    multiply_add<STREAMED>(dk_sum, p, q_tile);
                }
            }
            await_products<0>();
            hold(dk_sum);
            hold(dv_sum);
            if (used) release(used);
            release(own.empty());
            own.next();
            const u64 key = item.row.first_key + item.first;
            store(dk_sum, scale, scale, dk + key * pitches.dk + item.head * D, pitches.dk, count);
            store(dv_sum, 1, 1, dv + key * pitches.dv + item.head * D, pitches.dv, count);
        }
    }
}
