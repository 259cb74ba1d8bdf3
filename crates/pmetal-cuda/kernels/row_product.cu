// The product of one row with matrices that are read once.
//
// Weights come by bulk copies into rings in shared memory, a ring to a warp: DEPTH chunks of CHUNK bytes.

struct Product {
    const T* weights[3];   // [rows, k] each; where gated, of gate and up, [n, k]
    const T* x;            // [k]
    const T* norm;         // [k], or null: x as it is
    const T* bias;         // of all weights' rows, or null
    const T* residual;     // [n], or null
    void* y;               // [n], of T or float
    uint ends[3];          // rows of the first weight, of the first two, of all
    uint pitches[3];
    uint n, k;
    uint gated;            // 1: y = silu(gate) * up
    uint wide;             // 1: y is float
    float eps;
};

FUNCTION void barrier_of_one(uint barrier) { asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory"); }

FUNCTION void copy_in(uint to, const void* from, uint bytes, uint barrier) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to),
                 "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier), "l"(0x12F0000000000000ull)
                 : "memory");
}

FUNCTION void wait_for_copy(uint barrier, uint parity) {
    asm volatile("{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
}

FUNCTION float group_sum(float x, float* partial) {
    x = simd_sum(x);
    if (LANE == 0) partial[SIMD] = x;
    BARRIER();
    return simd_sum(LANE < WARPS ? partial[LANE] : 0.0f);
}

// Puts the vector that is multiplied into shared memory, behind its norm where there is one.
FUNCTION void take_x(const Product& p, T* xs) {
    __shared__ float partial[WARPS];
    const uint quads = p.k / 4;
    if (p.norm == nullptr) {
        const uint4* from = reinterpret_cast<const uint4*>(p.x);
        for (uint i = THREAD; i < p.k / PER_VECTOR; i += 32 * WARPS) reinterpret_cast<uint4*>(xs)[i] = from[i];
        return;
    }
    float squares = 0.0f;
    for (uint i = THREAD; i < quads; i += 32 * WARPS) {
        const float4 v = load4(p.x, 4 * i);
        squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
        store4(xs, 4 * i, v);
    }
    const float scale = rsqrtf(group_sum(squares, partial) / float(p.k) + p.eps);
    for (uint i = THREAD; i < quads; i += 32 * WARPS) {
        const float4 v = load4(xs, 4 * i), w = load4(p.norm, 4 * i);
        store4(xs, 4 * i, make_float4(v.x * scale * w.x, v.y * scale * w.y, v.z * scale * w.z, v.w * scale * w.w));
    }
}

// A lane's part of the product of a chunk with its part of x; several sums, so that none waits for another.
FUNCTION float dot(const uint4* w, const uint4* x, uint vectors) {
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    #pragma unroll 8
    for (uint i = LANE; i < vectors; i += 32) {
        const uint4 raw = w[i], other = x[i];
        const Vector a = vector_of(raw), b = vector_of(other);
        #pragma unroll
        for (uint j = 0; j < PER_VECTOR; ++j) sums[j & 3] = fmaf(a.x[j], b.x[j], sums[j & 3]);
    }
    return sums[0] + sums[1] + (sums[2] + sums[3]);
}

FUNCTION const T* row_of(const Product& p, uint unit, uint row) {
    if (!p.gated) {
        row = unit < p.ends[0] ? 0 : unit < p.ends[1] ? 1 : 2;
        if (row > 0) unit -= p.ends[row - 1];
    }
    return p.weights[row] + ulong(unit) * p.pitches[row];
}

FUNCTION float at(const T* p, uint i) { return p == nullptr ? 0.0f : float(p[i]); }

// What a warp still has to ask for: of its units (a row, or the rows of gate and up) the rest, of the row at hand `left` bytes from `from` on.
struct Ahead {
    const Product& p;
    uint unit, end, row;
    const unsigned char* from;
    uint left;

    FUNCTION Ahead(const Product& p, uint first, uint end) : p(p), unit(first), end(end), row(0) { enter(); }

    FUNCTION bool done() const { return unit >= end; }

    FUNCTION void enter() {
        if (done()) return;
        from = reinterpret_cast<const unsigned char*>(row_of(p, unit, row));
        left = p.k * sizeof(T);
    }

    // Passes a chunk and returns its bytes.
    FUNCTION uint pass() {
        const uint bytes = min(left, CHUNK);
        from += bytes, left -= bytes;
        if (left == 0) {
            row ^= p.gated;
            if (row == 0) unit += WARPS;
            enter();
        }
        return bytes;
    }
};

/// y = op(norm(x) W^T + bias) + residual. Rows are dealt to the blocks in equal stretches, and within a block to its warps in turn.
KERNEL(product)(const __grid_constant__ Product p)
{
    extern __shared__ __align__(128) unsigned char room[];
    __shared__ ulong barriers[WARPS * DEPTH];
    T* const xs = reinterpret_cast<T*>(room);
    const uint bytes = p.k * sizeof(T);
    const unsigned char* const ring = room + ((bytes + 127) & ~127u) + SIMD * DEPTH * CHUNK;
    const uint ring_at = shared_address(ring), barriers_at = shared_address(barriers + SIMD * DEPTH);
    const uint first = uint(ulong(p.n) * GROUP_X / GROUPS_X) + SIMD, end = uint(ulong(p.n) * (GROUP_X + 1) / GROUPS_X);

    Ahead ahead(p, first, end);
    auto request = [&](uint slot) {
        const unsigned char* from = ahead.from;
        copy_in(ring_at + slot * CHUNK, from, ahead.pass(), barriers_at + 8 * slot);
    };
    if (LANE == 0) {
        for (uint slot = 0; slot < DEPTH; ++slot) barrier_of_one(barriers_at + 8 * slot);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        for (uint slot = 0; slot < DEPTH && !ahead.done(); ++slot) request(slot);
    }
    __syncwarp();
    wait_for_previous();
    take_x(p, xs);
    BARRIER();

    uint slot = 0, parity = 0;
    for (uint unit = first; unit < end; unit += WARPS) {
        float gate = 0.0f;
        for (uint row = 0; row <= p.gated; ++row) {
            float sum = 0.0f;
            for (uint start = 0; start < bytes; start += CHUNK) {
                const uint4* w = reinterpret_cast<const uint4*>(ring + slot * CHUNK);
                const uint4* x = reinterpret_cast<const uint4*>(room + start);
                wait_for_copy(barriers_at + 8 * slot, parity);
                sum += bytes - start >= CHUNK ? dot(w, x, CHUNK / 16) : dot(w, x, (bytes - start) / 16);
                __syncwarp();
                if (LANE == 0) {
                    if (!ahead.done()) request(slot);
                    else if (SIMD == 0) let_next_begin();
                }
                if (++slot == DEPTH) slot = 0, parity ^= 1;
            }
            const float whole = simd_sum(sum) + at(p.bias, unit + row * p.n);
            if (row < p.gated) {
                gate = whole;
            } else if (LANE == 0) {
                const float y = (p.gated ? gate / (1.0f + __expf(-gate)) * whole : whole) + at(p.residual, unit);
                if (p.wide) static_cast<float*>(p.y)[unit] = y;
                else static_cast<T*>(p.y)[unit] = T(y);
            }
        }
    }
}
