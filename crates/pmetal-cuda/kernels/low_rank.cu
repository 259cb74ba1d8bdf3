// The gradients of low-rank adapters on tensor cores, in one pass over the large operand:
//
//     low_rank_outputs    parts of du = scale dy b and of dB = dyᵀ u    dy [tokens, N], b [N, R], u and du [tokens, R]
//     low_rank_sums       their sums
//
// Every member's columns are multiples of 64, its ranks of 16. Tiles come by the tensor memory accelerator of sm_90 and newer: one thread asks
// for them, and what lies beyond a matrix is zeros. Products are mma.sync: the tensor cores wait for memory here, not the other way round. The
// host defines BF16 or F16, and
//
//     RANKS      ranks of each member: 16 or 32
//     COLUMNS    columns of dy of a block of low_rank_outputs: 128, 256 or 512
//     STAGES     tiles in shared memory at a time
//
// Parts are added up in their order, so every run gives the same bits.

typedef unsigned short T;
typedef unsigned int uint;
typedef unsigned long long u64;

#ifdef BF16
#define DTYPE "bf16"
#else
#define DTYPE "f16"
#endif

constexpr int WARPS = 8, THREADS = WARPS * 32, MEMBERS = 8;

__device__ __forceinline__ int lane() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp() { return threadIdx.x / 32; }

// ---- Tiles ----
// A tile of n rows lies in shared memory as panels of WIDTH columns, 64 or 16, one after the other; in a panel the 16-byte chunks of a row
// change places so that eight rows are read without bank conflicts: the swizzles of 128 and of 32 bytes.

template <int WIDTH> __device__ __forceinline__ uint place(uint panel, int row, int chunk) {
    return panel + row * WIDTH * 2 + (WIDTH == 64 ? (chunk ^ row) & 7 : (chunk ^ row >> 2) & 1) * 16;
}

// Where tiles may begin: swizzles want 1024 bytes.
__device__ __forceinline__ unsigned char* memory() {
    extern __shared__ unsigned char dynamic[];
    return dynamic + (-(uint)__cvta_generic_to_shared(dynamic) & 1023);
}

__device__ __forceinline__ uint shared_address(const void* at) { return (uint)__cvta_generic_to_shared(at); }

// A matrix as the host encodes it: cut into panels, of which boxes are copied.
struct alignas(64) Map {
    u64 words[16];
};

// Starts copying a box: panels from `panel` on, of each the rows from `row` on.
__device__ __forceinline__ void copy(uint to, const Map& map, int panel, int row, uint barrier) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];"
                 ::"r"(to), "l"(&map), "r"(0), "r"(row), "r"(panel), "r"(barrier) : "memory");
}

// Tiles that come one after the other, STAGES of them at a time: each place has a barrier that says when its tile is there.
struct Pipeline {
    uint barriers;

    __device__ __forceinline__ Pipeline() {
        __shared__ u64 storage[STAGES];
        barriers = shared_address(storage);
        if (threadIdx.x == 0) {
            for (int i = 0; i < STAGES; i++) asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(barriers + i * 8) : "memory");
            asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        }
        __syncthreads();
    }

    // Its barrier, which then waits for `bytes`.
    __device__ __forceinline__ uint expect(int step, uint bytes) const {
        const uint barrier = barriers + step % STAGES * 8;
        asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
        return barrier;
    }

    // Waits for a step's tile; behind it all threads are also done with the step before.
    __device__ __forceinline__ void await(int step) const {
        asm volatile("{.reg .pred done; again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1; @!done bra again;}"
                     ::"r"(barriers + step % STAGES * 8), "r"(step / STAGES & 1) : "memory");
        __syncthreads();
    }
};

// ---- Products ----
// mma.sync on 16 x 8 x 16: of the rows lane / 4 and lane / 4 + 8 of a product a lane has columns 2 (lane % 4) and the next.

// c [16, 16] += a b, for the two halves of b.
__device__ __forceinline__ void mma(float (&c)[2][4], const uint (&a)[4], const uint (&b)[4]) {
#pragma unroll
    for (int half = 0; half < 2; half++)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." DTYPE "." DTYPE ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(c[half][0]), "+f"(c[half][1]), "+f"(c[half][2]), "+f"(c[half][3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[2 * half]), "r"(b[2 * half + 1]));
}

#define LDMATRIX(KIND, to, at) \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" KIND ".shared.b16 {%0,%1,%2,%3}, [%4];" \
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(at))

// 16 x 16 of a panel from `row` and `column` on, as an operand: the rows of a left one are its rows, of a transposed left one its columns; over
// the rows of a transposed right one is summed.
template <int WIDTH> __device__ __forceinline__ void left(uint (&to)[4], uint panel, int row, int column) {
    LDMATRIX("", to, place<WIDTH>(panel, row + lane() % 16, column / 8 + lane() / 16));
}
template <int WIDTH> __device__ __forceinline__ void left_transposed(uint (&to)[4], uint panel, int row, int column) {
    LDMATRIX(".trans", to, place<WIDTH>(panel, row + lane() % 8 + lane() / 16 * 8, column / 8 + lane() / 8 % 2));
}
template <int WIDTH> __device__ __forceinline__ void right_transposed(uint (&to)[4], uint panel, int row, int column) {
    LDMATRIX(".trans", to, place<WIDTH>(panel, row + lane() % 16, column / 8 + lane() / 16));
}

__device__ __forceinline__ uint pack(float low, float high) {
    uint both;
    asm("cvt.rn." DTYPE "x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

// Puts a product [16, 16] at its place in rows of `pitch` floats.
__device__ __forceinline__ void put(float* to, int pitch, const float (&c)[2][4]) {
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int low = 0; low < 2; low++)
            *(float2*)(to + (lane() / 4 + 8 * low) * pitch + half * 8 + lane() % 4 * 2) = make_float2(c[half][2 * low], c[half][2 * low + 1]);
}

__device__ __forceinline__ void add(float4& sum, const float4& x) {
    sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
}

// ---- Kernels ----
// Members are cut into slices of COLUMNS of their columns, tokens into `splits` of `rows` each.

struct Member {
    // Its columns of dy and rows of b, and the first of its slices.
    int output, outputs, slice, slices;
    // Its columns of b, u and du; RANKS of them, of which `used` have gradients.
    int rank, used;
    float scale;
    // Whether the gradient [outputs, used] is written; else it is added to.
    int fresh;
    float* db;
};

struct Backward {
    // Panels of 64 columns of dy, of 16 of the others. Boxes of dy [32 rows, COLUMNS], of b [128, 16], of u [32, RANKS].
    Map dy, b, u;
    T* du;
    int du_pitch, tokens, members, slices;
    // How the tokens are cut, `rows` in multiples of 32.
    int rows, splits;
    // [slices, tokens, RANKS] and [splits, slices, COLUMNS, RANKS].
    float *du_parts, *db_parts;
    Member member[MEMBERS];
};

// The member that slice `slice` is of.
__device__ __forceinline__ const Member& member_of(const Backward& p, int slice) {
    int m = 0;
    while (m + 1 < p.members && p.member[m + 1].slice <= slice) m++;
    return p.member[m];
}

// A warp has COLUMNS / 8 columns of the block's. Of du it has then but a part for each tile of 32 rows; the parts of a tile are added up while
// the next one is computed.
extern "C" __global__ void __launch_bounds__(THREADS, 1) low_rank_outputs(const __grid_constant__ Backward p) {
    constexpr int ROWS = 32, OWN = COLUMNS / WARPS, TILES = RANKS / 16, PARTS = WARPS * ROWS * RANKS;
    constexpr int STAGE = ROWS * (COLUMNS + RANKS) * 2, SMALL = COLUMNS * RANKS * 2, FIRST = 2 * PARTS * 4 > SMALL ? 2 * PARTS * 4 : SMALL;
    const Member& member = member_of(p, blockIdx.x);
    const int column = member.output + ((int)blockIdx.x - member.slice) * COLUMNS;
    const int row = blockIdx.y * p.rows, rows = min(p.rows, p.tokens - row), steps = (rows + ROWS - 1) / ROWS;
    float* all_parts = (float*)memory();
    const uint small = shared_address(memory()), tiles = small + FIRST;
    const Pipeline pipeline;
    auto start = [&](int step) {
        if (threadIdx.x != 0 || step >= steps) return;
        const uint tile = tiles + step % STAGES * STAGE, barrier = pipeline.expect(step, step == 0 ? STAGE + SMALL : STAGE);
        const int at = row + step * ROWS;
        copy(tile, p.dy, column / 64, at, barrier);
        copy(tile + ROWS * COLUMNS * 2, p.u, member.rank / 16, at, barrier);
        if (step == 0)
            for (int r = 0; r < TILES; r++)
                for (int n = 0; n < COLUMNS; n += 128) copy(small + (r * COLUMNS + n) * 32, p.b, member.rank / 16 + r, column + n, barrier);
    };
#pragma unroll 1
    for (int step = 0; step < STAGES - 1; step++) start(step);

    pipeline.await(0);
    uint b[OWN / 16][TILES][4];
#pragma unroll
    for (int n = 0; n < OWN / 16; n++)
#pragma unroll
        for (int r = 0; r < TILES; r++) right_transposed<16>(b[n][r], small + r * COLUMNS * 32, warp() * OWN + n * 16, 0);

    float* du_parts = p.du_parts + ((size_t)blockIdx.x * p.tokens + row) * RANKS;
    auto sum_of = [&](int step) {
        const float* parts = all_parts + step % 2 * PARTS;
        for (int i = threadIdx.x; i < ROWS * RANKS / 4; i += THREADS) {
            if (step * ROWS + i / (RANKS / 4) >= rows) break;
            float4 sum = *(float4*)(parts + i * 4);
#pragma unroll
            for (int part = 1; part < WARPS; part++) add(sum, *(float4*)(parts + part * ROWS * RANKS + i * 4));
            *(float4*)(du_parts + step * ROWS * RANKS + i * 4) = sum;
        }
    };
    float db[OWN / 16][TILES][2][4] = {};
    for (int step = 0; step < steps; step++) {
        pipeline.await(step);
        start(step + STAGES - 1);
        if (step > 0) sum_of(step - 1);
        const uint tile = tiles + step % STAGES * STAGE;
#pragma unroll
        for (int t = 0; t < ROWS; t += 16) {
            uint rows_of_u[TILES][4];
#pragma unroll
            for (int r = 0; r < TILES; r++) right_transposed<16>(rows_of_u[r], tile + ROWS * COLUMNS * 2 + r * ROWS * 32, t, 0);
            float du[TILES][2][4] = {};
#pragma unroll
            for (int n = 0; n < OWN / 16; n++) {
                const int own = warp() * OWN + n * 16;
                const uint panel = tile + own / 64 * ROWS * 128;
                uint rows_of_dy[4], columns_of_dy[4];
                left<64>(rows_of_dy, panel, t, own % 64);
                left_transposed<64>(columns_of_dy, panel, t, own % 64);
#pragma unroll
                for (int r = 0; r < TILES; r++) {
                    mma(du[r], rows_of_dy, b[n][r]);
                    mma(db[n][r], columns_of_dy, rows_of_u[r]);
                }
            }
#pragma unroll
            for (int r = 0; r < TILES; r++) put(all_parts + step % 2 * PARTS + (warp() * ROWS + t) * RANKS + r * 16, RANKS, du[r]);
        }
    }
    __syncthreads();
    sum_of(steps - 1);
    float* db_parts = p.db_parts + (((size_t)blockIdx.y * p.slices + blockIdx.x) * COLUMNS + warp() * OWN) * RANKS;
#pragma unroll
    for (int n = 0; n < OWN / 16; n++)
#pragma unroll
        for (int r = 0; r < TILES; r++) put(db_parts + n * 16 * RANKS + r * 16, RANKS, db[n][r]);
}

__device__ __forceinline__ void add(float4& sum, const float* parts, size_t stride, int count) {
#pragma unroll 8
    for (int part = 0; part < count; part++) add(sum, *(const float4*)(parts + part * stride));
}

// A thread has four ranks: first of rows of du, behind them of rows of dB.
extern "C" __global__ void __launch_bounds__(THREADS) low_rank_sums(const __grid_constant__ Backward p) {
    constexpr int FOURS = RANKS / 4;
    const int i = blockIdx.x * THREADS + threadIdx.x, r = i % FOURS * 4, du_rows = p.members * p.tokens;
    float4 sum = {};
    if (i / FOURS < du_rows) {
        const Member& member = p.member[i / FOURS / p.tokens];
        const int row = i / FOURS % p.tokens;
        add(sum, p.du_parts + ((size_t)member.slice * p.tokens + row) * RANKS + r, (size_t)p.tokens * RANKS, member.slices);
        *(uint2*)(p.du + (size_t)row * p.du_pitch + member.rank + r) =
            make_uint2(pack(member.scale * sum.x, member.scale * sum.y), pack(member.scale * sum.z, member.scale * sum.w));
        return;
    }
    const int row = i / FOURS - du_rows, slice = row / COLUMNS;
    if (slice >= p.slices) return;
    const Member& member = member_of(p, slice);
    const int n = row - member.slice * COLUMNS;
    if (n >= member.outputs) return;
    add(sum, p.db_parts + (size_t)row * RANKS + r, (size_t)p.slices * COLUMNS * RANKS, p.splits);
    float* db = member.db + (size_t)n * member.used + r;
    const float own[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int k = 0; k < 4; k++)
        if (r + k < member.used) db[k] = member.fresh ? own[k] : db[k] + own[k];
}
