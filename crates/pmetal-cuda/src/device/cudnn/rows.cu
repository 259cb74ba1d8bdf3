// Where packed rows begin and how long they are, as cuDNN reads it.
//
// table [rows, 4]: first query, queries, first key, keys of each row. For slot s < slots, behind the last row as rows of length 0:
// lengths [slots], and offsets [widths, stride] of which the first slots + 1 count: the first token times each of the widths.
struct Widths { unsigned all[WIDTHS]; };

extern "C" __global__ void packed_rows(const unsigned* table, int* lengths, long long* offsets, unsigned rows, unsigned slots,
                                       unsigned stride, Widths widths) {
    unsigned slot = blockIdx.x * blockDim.x + threadIdx.x;
    if (slot > slots) {
        return;
    }
    const unsigned* row = table + 4 * (slot < rows ? slot : rows - 1);
    long long token = slot < rows ? row[0] : (long long)row[0] + row[1];
    if (slot < slots) {
        lengths[slot] = slot < rows ? row[1] : 0;
    }
#pragma unroll
    for (int i = 0; i < WIDTHS; i++) {
        offsets[i * stride + slot] = token * widths.all[i];
    }
}
