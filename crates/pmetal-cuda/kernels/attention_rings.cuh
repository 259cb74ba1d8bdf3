// Blocks of warps that compute and warps that copy, on Hopper (sm_90a): rings of tiles between them, lists of items that a block goes
// through, and what each side begins and ends with. Stands behind attention_tiles.cuh and attention_softmax.cuh.

constexpr int ROWS = 128;  // of an item
constexpr int COMPUTING = 256, LOADING = 128;

// ---- Barriers and rings ----

__device__ __forceinline__ void init_barrier(uint barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void arrive(uint barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void await(uint barrier, uint parity) {
    asm volatile("{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@done bra DONE;\nbra AGAIN;\nDONE:\n}" ::"r"(barrier), "r"(parity) : "memory");
}

// Places that are filled and emptied in turn; each side walks it by itself.
template <int STAGES> struct Ring {
    uint barriers;
    int stage = 0;
    uint round = 0;
    __device__ __forceinline__ Ring(uint barriers) : barriers(barriers) {}
    __device__ __forceinline__ uint full() const { return barriers + 16 * stage; }
    __device__ __forceinline__ uint empty() const { return barriers + 16 * stage + 8; }
    __device__ __forceinline__ void await_full() const { await(full(), round); }
    __device__ __forceinline__ void await_empty() const { await(empty(), round ^ 1); }
    __device__ __forceinline__ void next() {
        if (++stage == STAGES) stage = 0, round ^= 1;
    }
    // One arrival for each warp that copies, and for each that computes.
    __device__ __forceinline__ void init() const {
        for (int i = 0; i < STAGES; i++) init_barrier(barriers + 16 * i, LOADING / 32), init_barrier(barriers + 16 * i + 8, COMPUTING / 32);
    }
};

// A warp that computes has done with a place.
__device__ __forceinline__ void release(uint empty) {
    __syncwarp();
    if (lane() == 0) arrive(empty);
}

// Tells of tiles that have come: always one behind what was asked for last, so that two are on their way.
struct Announcer {
    uint waiting = 0;
    template <int PENDING> __device__ __forceinline__ void tell() {
        if (waiting == 0) return;
        asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncwarp();
        if (lane() == 0) arrive(waiting);
        waiting = 0;
    }
    // The copies that were started belong to this barrier.
    __device__ __forceinline__ void asked(uint full) {
        end_of_load();
        tell<1>();
        waiting = full;
    }
};

// ---- Items ----

// The 128 rows of a head that a block works on next; the first and the last of a round go to one block in turn, since items get smaller.
struct Items {
    int turn = 0, end;
    __device__ __forceinline__ Items(int end) : end(end) {}
    __device__ __forceinline__ int next() {
        const int at = turn * gridDim.x + (turn & 1 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
        turn++;
        return at < end ? at : -1;
    }
};

struct Item {
    Row row;
    int first, head;
    __device__ __forceinline__ Item(const uint4* rows, const uint2* blocks, int at, int heads)
        : row(uniform(rows[blocks[at / heads].x])), first(uniform(blocks[at / heads].y)), head(at % heads) {}
    __device__ __forceinline__ int count(int of) const { return min(of - first, ROWS); }
    // Tiles of keys that the first `n` queries see.
    template <int TILE> __device__ __forceinline__ int tiles(int n) const { return (max(row.offset + first + n, 0) + TILE - 1) / TILE; }
};

// The group that copies gives registers to those that compute: a block begins with 168 for each thread, and has no more in all.
#define ROLE_OF_LOADING(registers) asm volatile("setmaxnreg.dec.sync.aligned.u32 " registers ";")
#define ROLE_OF_COMPUTING(registers) asm volatile("setmaxnreg.inc.sync.aligned.u32 " registers ";")

// ---- Operands and results ----

// The group's 64 rows of a tile as a left operand in registers.
__device__ __forceinline__ void load_left(uint (&to)[WIDTH / 4], uint tile) {
    const int i = lane() / 8, j = lane() % 8;
#pragma unroll
    for (int k = 0; k < WIDTH / 16; k++)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(to[4 * k]), "=r"(to[4 * k + 1]), "=r"(to[4 * k + 2]), "=r"(to[4 * k + 3])
                     : "r"(place<ROWS>(tile, threadIdx.x / 32 * 16 + i % 2 * 8 + j, 2 * k + i / 2)) : "memory");
}

// Writes the group's 64 rows, each times its factor; neighbours swap words so that a row's 32 bytes go at once.
__device__ __forceinline__ void store(const float (&c)[WIDTH / 2], float factor0, float factor1, T* out, uint pitch, int count) {
    const int odd = lane() & 1, row = own_row();
    out += (u64)row * pitch;
#pragma unroll
    for (int j = 0; j < WIDTH / 8; j += 2)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float factor = r ? factor1 : factor0;
            const uint left = pack(c[4 * j + 2 * r] * factor, c[4 * j + 2 * r + 1] * factor);
            const uint right = pack(c[4 * j + 4 + 2 * r] * factor, c[4 * j + 5 + 2 * r] * factor);
            const uint other = __shfl_xor_sync(~0u, odd ? left : right, 1);
            const int column = 8 * (j + odd) + 2 * (lane() % 4 - odd);
            if (row + 8 * r < count && column < D)
                *(uint2*)(out + (u64)(8 * r) * pitch + column) = odd ? make_uint2(other, right) : make_uint2(left, other);
        }
}
