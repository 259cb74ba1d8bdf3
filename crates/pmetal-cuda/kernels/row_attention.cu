// Attention of one query over the keys in a cache.
//
// The host defines HEAD_DIM, GROUP (the queries of a key's head), SPLITS (the blocks that share a head's keys) and LIMITED: 1 where the query
// sees of the keys up to its own the last `window`, and of these those of its own chunk of `chunk` keys, else 0.

struct Attention {
    const T* qkv;          // [heads + 2 kv_heads, HEAD_DIM]
    const T* q_norm;       // [HEAD_DIM], or null
    const T* k_norm;
    const float* inv_freq; // [HEAD_DIM / 2]
    const uint* position;  // [1]: keys in the cache before this one
    T* keys;               // [capacity, kv_heads, HEAD_DIM]
    T* values;
    T* out;                // [heads, HEAD_DIM]
    uint kv_heads;
    float scale, eps;
    uint window, chunk;
};

#define TEAM (HEAD_DIM / PER_VECTOR)
#define TEAMS (32 * WARPS / TEAM)
#define AHEAD (GROUP > 4 ? 3 : 5)
#define PAIRS ((HEAD_DIM / 2 + 31) / 32)

FUNCTION Vector vector_at(const T* p) { return vector_of(*reinterpret_cast<const uint4*>(p)); }

// The angles of the pairs of a head that a lane turns.
struct Angles {
    float sine[PAIRS], cosine[PAIRS];

    FUNCTION Angles(const float* inv_freq, float position) {
        #pragma unroll
        for (uint i = 0; i < PAIRS; ++i) {
            const uint pair = LANE + 32 * i;
            if (pair < HEAD_DIM / 2) sincosf(position * inv_freq[pair], &sine[i], &cosine[i]);
        }
    }
};

// A head of a query or a key, normalised where there is a norm and turned, by a warp.
FUNCTION void turn(const T* x, const T* norm, float eps, const Angles& angles, T* y) {
    float low[PAIRS], high[PAIRS], squares = 0.0f;
    #pragma unroll
    for (uint i = 0; i < PAIRS; ++i) {
        const uint pair = LANE + 32 * i;
        const bool there = pair < HEAD_DIM / 2;
        low[i] = there ? float(x[pair]) : 0.0f;
        high[i] = there ? float(x[pair + HEAD_DIM / 2]) : 0.0f;
        squares += low[i] * low[i] + high[i] * high[i];
    }
    const float scale = norm == nullptr ? 1.0f : rsqrtf(simd_sum(squares) / HEAD_DIM + eps);
    #pragma unroll
    for (uint i = 0; i < PAIRS; ++i) {
        const uint pair = LANE + 32 * i;
        if (pair >= HEAD_DIM / 2) continue;
        float b = low[i], c = high[i];
        if (norm != nullptr) {
            b = float(T(b * scale * float(norm[pair])));
            c = float(T(c * scale * float(norm[pair + HEAD_DIM / 2])));
        }
        y[pair] = T(b * angles.cosine[i] - c * angles.sine[i]);
        y[pair + HEAD_DIM / 2] = T(c * angles.cosine[i] + b * angles.sine[i]);
    }
}

FUNCTION void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// What another block of the cluster has in its shared memory in the same place.
FUNCTION float of_block(const float* own, uint block) {
    uint there;
    float x;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(own)), "r"(block));
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(there) : "memory");
    return x;
}

// The softmax over some keys for all queries of a group, as a lane of a team holds it.
struct Softmax {
    float top[GROUP], sum[GROUP];
    Vector value[GROUP];

    FUNCTION void meet(float factor, uint g, float weight, const Vector& v) {
        sum[g] = fmaf(sum[g], factor, weight);
        #pragma unroll
        for (uint j = 0; j < PER_VECTOR; ++j) value[g].x[j] = fmaf(value[g].x[j], factor, weight * v.x[j]);
    }
};

FUNCTION float team_sum(float x) {
    #pragma unroll
    for (uint mask = TEAM / 2; mask > 0; mask /= 2) x += simd_shuffle_xor(x, mask);
    return x;
}

#define LOWEST -3.0e38f

/// One query of every head over the keys of its row: turns the query and the new key, puts the new key and its value into the cache, and
/// attends. Grid `[SPLITS, kv_heads]` in clusters of SPLITS: a block has a stretch of the keys of one head for its whole group of queries,
/// and merges the stretches for a part of the result.
KERNEL(attend)(const __grid_constant__ Attention a)
{
    // the queries, the new key, its value
    __shared__ __align__(16) T fresh[GROUP + 2][HEAD_DIM];
    __shared__ float shares[WARPS][GROUP][HEAD_DIM];
    __shared__ float tops[WARPS][GROUP], sums[WARPS][GROUP];
    __shared__ float own[GROUP][HEAD_DIM], own_top[GROUP], own_sum[GROUP];
    const uint head = GROUP_Y, heads = a.kv_heads * GROUP;
    const uint position = *a.position, team = THREAD / TEAM, lane = THREAD % TEAM;
    const uint lowest = LIMITED ? max(position + 1 - min(position + 1, a.window), position / a.chunk * a.chunk) : 0;
    const uint per = (position - lowest + SPLITS) / SPLITS;
    const uint first = lowest + per * GROUP_X, end = min(first + per, position + 1);
    const ulong stride = ulong(a.kv_heads) * HEAD_DIM;
    const T* const keys = a.keys + head * HEAD_DIM + PER_VECTOR * lane;
    const T* const values = a.values + head * HEAD_DIM + PER_VECTOR * lane;

    uint4 k[AHEAD], v[AHEAD];
    auto fetch = [&](uint base) {
        #pragma unroll
        for (uint i = 0; i < AHEAD; ++i) {
            const uint key = base + i * TEAMS;
            k[i] = v[i] = make_uint4(0, 0, 0, 0);
            if (key < min(end, position)) {
                k[i] = *reinterpret_cast<const uint4*>(keys + key * stride);
                v[i] = *reinterpret_cast<const uint4*>(values + key * stride);
            }
        }
    };
    fetch(first + team);
    const Angles angles(a.inv_freq, float(position));
    let_next_begin();
    wait_for_previous();

    for (uint i = SIMD; i < GROUP + 2; i += WARPS) {
        const T* const x = a.qkv + (i < GROUP ? head * GROUP + i : heads + (i - GROUP) * a.kv_heads + head) * HEAD_DIM;
        if (i < GROUP + 1) {
            turn(x, i < GROUP ? a.q_norm : a.k_norm, a.eps, angles, fresh[i]);
        } else {
            for (uint j = LANE; j < HEAD_DIM; j += 32) fresh[i][j] = x[j];
        }
    }
    BARRIER();
    if (first <= position && position < end) {
        for (uint i = THREAD; i < HEAD_DIM; i += 32 * WARPS) {
            a.keys[position * stride + head * HEAD_DIM + i] = fresh[GROUP][i];
            a.values[position * stride + head * HEAD_DIM + i] = fresh[GROUP + 1][i];
        }
    }

    Vector q[GROUP];
    Softmax state;
    #pragma unroll
    for (uint g = 0; g < GROUP; ++g) {
        q[g] = vector_at(&fresh[g][PER_VECTOR * lane]);
        state.top[g] = LOWEST, state.sum[g] = 0.0f;
        for (uint j = 0; j < PER_VECTOR; ++j) state.value[g].x[j] = 0.0f;
    }
    auto meet = [&](uint base) {
        float scores[AHEAD][GROUP];
        #pragma unroll
        for (uint i = 0; i < AHEAD; ++i) {
            if (base + i * TEAMS == position) {
                k[i] = *reinterpret_cast<const uint4*>(&fresh[GROUP][PER_VECTOR * lane]);
                v[i] = *reinterpret_cast<const uint4*>(&fresh[GROUP + 1][PER_VECTOR * lane]);
            }
            const Vector key = vector_of(k[i]);
            #pragma unroll
            for (uint g = 0; g < GROUP; ++g) {
                float dot = 0.0f;
                #pragma unroll
                for (uint j = 0; j < PER_VECTOR; ++j) dot = fmaf(key.x[j], q[g].x[j], dot);
                dot = team_sum(dot) * a.scale;
                scores[i][g] = base + i * TEAMS < end ? dot : LOWEST;
            }
        }
        #pragma unroll
        for (uint g = 0; g < GROUP; ++g) {
            float top = state.top[g];
            #pragma unroll
            for (uint i = 0; i < AHEAD; ++i) top = fmaxf(top, scores[i][g]);
            float factor = __expf(state.top[g] - top);
            state.top[g] = top;
            #pragma unroll
            for (uint i = 0; i < AHEAD; ++i) {
                const float weight = base + i * TEAMS < end ? __expf(scores[i][g] - top) : 0.0f;
                state.meet(factor, g, weight, vector_of(v[i]));
                factor = 1.0f;
            }
        }
    };
    // teams of a warp go together: shuffles are the warp's
    for (uint base = first + team; base - team % (32 / TEAM) < end; base += AHEAD * TEAMS) {
        if (base != first + team) fetch(base);
        meet(base);
    }

    // the teams of a warp, then the warps, then the stretches
    #pragma unroll
    for (uint g = 0; g < GROUP; ++g) {
        #pragma unroll
        for (uint mask = TEAM; mask < 32; mask *= 2) {
            const float other = simd_shuffle_xor(state.top[g], mask), top = fmaxf(state.top[g], other);
            const float factor = __expf(state.top[g] - top);
            state.top[g] = top;
            state.sum[g] *= factor;
            state.sum[g] += simd_shuffle_xor(state.sum[g], mask);
            for (uint j = 0; j < PER_VECTOR; ++j) {
                state.value[g].x[j] *= factor;
                state.value[g].x[j] += simd_shuffle_xor(state.value[g].x[j], mask);
            }
        }
        if (LANE < TEAM) {
            for (uint j = 0; j < PER_VECTOR; ++j) shares[SIMD][g][PER_VECTOR * lane + j] = state.value[g].x[j];
        }
        if (LANE == 0) tops[SIMD][g] = state.top[g], sums[SIMD][g] = state.sum[g];
    }
    BARRIER();
    for (uint i = THREAD; i < GROUP * HEAD_DIM; i += 32 * WARPS) {
        const uint g = i / HEAD_DIM, at = i % HEAD_DIM;
        float top = LOWEST, sum = 0.0f, value = 0.0f;
        for (uint w = 0; w < WARPS; ++w) top = fmaxf(top, tops[w][g]);
        for (uint w = 0; w < WARPS; ++w) {
            const float factor = __expf(tops[w][g] - top);
            sum += factor * sums[w][g];
            value += factor * shares[w][g][at];
        }
        own[g][at] = value;
        if (at == 0) own_top[g] = top, own_sum[g] = sum;
    }
    cluster_barrier();
    for (uint i = GROUP_X * 32 * WARPS + THREAD; i < GROUP * HEAD_DIM; i += SPLITS * 32 * WARPS) {
        const uint g = i / HEAD_DIM;
        float their_top[SPLITS], their_sum[SPLITS], theirs[SPLITS], top = LOWEST, sum = 0.0f, value = 0.0f;
        #pragma unroll
        for (uint s = 0; s < SPLITS; ++s) {
            their_top[s] = of_block(&own_top[g], s);
            their_sum[s] = of_block(&own_sum[g], s);
            theirs[s] = of_block(&own[g][i % HEAD_DIM], s);
        }
        #pragma unroll
        for (uint s = 0; s < SPLITS; ++s) top = fmaxf(top, their_top[s]);
        #pragma unroll
        for (uint s = 0; s < SPLITS; ++s) {
            const float factor = __expf(their_top[s] - top);
            sum += factor * their_sum[s];
            value += factor * theirs[s];
        }
        a.out[head * GROUP * HEAD_DIM + i] = T(value / sum);
    }
    // no block's memory goes while another reads it
    cluster_barrier();
}
