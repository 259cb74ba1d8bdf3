// Matrices of 8 x 8 that the 32 lanes of a SIMD group hold together, two elements each, with the names and arguments of the Metal Shading
// Language. Products are summed in float, and rounded to the result's type once.

namespace dialect {

struct ulong2 {
    ulong x, y;
    ulong2(ulong both) : x(both), y(both) {}
    ulong2(ulong x, ulong y) : x(x), y(y) {}
};

template <class E, int COLUMNS, int ROWS = COLUMNS> struct simdgroup_matrix {
    static_assert(COLUMNS == 8 && ROWS == 8, "matrices are 8 x 8");
    // Until it is filled it holds NaN.
    struct Elements {
        E of[2] = {E(as_float(0xffffffffu)), E(as_float(0xffffffffu))};
        E& operator[](uint i) { return of[i]; }
        const E& operator[](uint i) const { return of[i]; }
    };
    Elements& thread_elements() { return elements; }
    const Elements& thread_elements() const { return elements; }

  private:
    Elements elements;
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

// Where a lane's first element is; its second is in the next column.
inline uint row_of_lane(uint lane) { return (lane / 16) * 4 + (lane / 2) % 4; }
inline uint column_of_lane(uint lane) { return (lane / 8) % 2 * 4 + (lane % 2) * 2; }

template <class E, int C, int R = C> inline simdgroup_matrix<E, C, R> make_filled_simdgroup_matrix(E value) {
    simdgroup_matrix<E, C, R> m;
    m.thread_elements()[0] = value;
    m.thread_elements()[1] = value;
    return m;
}

// What the lanes must agree on as they load or store a matrix.
struct Tile {
    const emulator::Memory* memory;
    ulong start, pitch, x, y;
    bool transposed;
    bool operator==(const Tile& other) const {
        return memory == other.memory && start == other.start && pitch == other.pitch && x == other.x && y == other.y &&
               transposed == other.transposed;
    }
    ulong place(uint lane, uint i) const {
        const uint row = row_of_lane(lane), column = column_of_lane(lane) + i;
        return transposed ? (y + column) * pitch + x + row : (y + row) * pitch + x + column;
    }
    void meet(const char* name, int line) {
        emulator::meet<Tile>(name, line, *this, [](Tile* const* lanes) {
            for (uint i = 1; i < emulator::LANES; ++i) {
                if (!(*lanes[i] == *lanes[0])) emulator::fail("lanes 0 and %u load or store different matrices", i);
            }
        });
    }
};

template <class E, class Space>
inline void simdgroup_load(simdgroup_matrix<E, 8, 8>& m, emulator::Pointer<const E, Space> from, ulong elements_per_row = 8,
                           ulong2 origin = 0, bool transpose = false, int line = __builtin_LINE()) {
    Tile tile{from.memory, from.start, elements_per_row, origin.x, origin.y, transpose};
    tile.meet("simdgroup_load", line);
    for (uint i = 0; i < 2; ++i) m.thread_elements()[i] = from[tile.place(own_lane(), i)];
}
template <class E, class Space>
inline void simdgroup_load(simdgroup_matrix<E, 8, 8>& m, emulator::Pointer<E, Space> from, ulong elements_per_row = 8, ulong2 origin = 0,
                           bool transpose = false, int line = __builtin_LINE()) {
    simdgroup_load(m, emulator::Pointer<const E, Space>(from), elements_per_row, origin, transpose, line);
}
template <class E, class Space>
inline void simdgroup_store(simdgroup_matrix<E, 8, 8> m, emulator::Pointer<E, Space> to, ulong elements_per_row = 8, ulong2 origin = 0,
                            bool transpose = false, int line = __builtin_LINE()) {
    Tile tile{to.memory, to.start, elements_per_row, origin.x, origin.y, transpose};
    tile.meet("simdgroup_store", line);
    for (uint i = 0; i < 2; ++i) to[tile.place(own_lane(), i)] = m.thread_elements()[i];
}

template <class E> struct Product {
    float a[2], b[2], c[2];
    E d[2];
};

// d = a b + c.
template <class E, class A, class B>
inline void simdgroup_multiply_accumulate(simdgroup_matrix<E, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                                          const simdgroup_matrix<B, 8, 8>& b, const simdgroup_matrix<E, 8, 8>& c,
                                          int line = __builtin_LINE()) {
    Product<E> mine;
    for (uint i = 0; i < 2; ++i) {
        mine.a[i] = float(a.thread_elements()[i]);
        mine.b[i] = float(b.thread_elements()[i]);
        mine.c[i] = float(c.thread_elements()[i]);
    }
    emulator::meet<Product<E>>("simdgroup_multiply_accumulate", line, mine, [](Product<E>* const* lanes) {
        float a[8][8], b[8][8];
        for (uint lane = 0; lane < emulator::LANES; ++lane) {
            for (uint i = 0; i < 2; ++i) {
                const uint row = row_of_lane(lane), column = column_of_lane(lane) + i;
                a[row][column] = lanes[lane]->a[i];
                b[row][column] = lanes[lane]->b[i];
            }
        }
        for (uint lane = 0; lane < emulator::LANES; ++lane) {
            for (uint i = 0; i < 2; ++i) {
                float sum = lanes[lane]->c[i];
                for (uint k = 0; k < 8; ++k) sum += a[row_of_lane(lane)][k] * b[k][column_of_lane(lane) + i];
                lanes[lane]->d[i] = E(sum);
            }
        }
    });
    for (uint i = 0; i < 2; ++i) d.thread_elements()[i] = mine.d[i];
}
template <class E, class A, class B>
inline void simdgroup_multiply(simdgroup_matrix<E, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a, const simdgroup_matrix<B, 8, 8>& b,
                               int line = __builtin_LINE()) {
    simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<E, 8, 8>(E(0.0f)), line);
}

}  // namespace dialect
