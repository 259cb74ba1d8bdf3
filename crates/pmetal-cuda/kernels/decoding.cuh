// What the kernels that make one token after another share.
//
// Such a token reads memory and computes next to nothing, so that what counts is that reading stops for as short as can be: a kernel begins
// before the one in front of it has ended (programmatic dependent launch), and what stands before `wait_for_previous` reads nothing that that one
// writes. The host defines WARPS, the warps of a block.

#define PER_VECTOR (16 / sizeof(T))

struct Vector { float x[16 / sizeof(T)]; };

FUNCTION Vector vector_of(const uint4& raw) {
    Vector v;
    #pragma unroll
    for (uint i = 0; i < PER_VECTOR; i += 4) {
        const float4 four = load4(reinterpret_cast<const T*>(&raw), i);
        v.x[i] = four.x, v.x[i + 1] = four.y, v.x[i + 2] = four.z, v.x[i + 3] = four.w;
    }
    return v;
}

FUNCTION uint shared_address(const void* p) { return uint(__cvta_generic_to_shared(p)); }

FUNCTION void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
FUNCTION void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
