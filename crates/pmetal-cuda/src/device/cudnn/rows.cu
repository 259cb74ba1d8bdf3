// Where packed rows begin and how long they are, as cuDNN reads it.
//
// table [rows, 4]: first query, queries, first key, keys of each row. For slot s < slots, behind the last row as rows of length 0:
// lengths [slots], and offsets [3, stride] of which the first slots + 1 count: the first token times each of three widths.
extern "C" __global__ void packed_rows(const unsigned* table, int* lengths, long long* offsets, unsigned rows, unsigned slots,
                                       unsigned stride, unsigned width_0, unsigned width_1, unsigned width_2) {
    unsigned slot = blockIdx.x * blockDim.x + threadIdx.x;
    if (slot > slots) {
        return;
    }
    const unsigned* row = table + 4 * (slot < rows ? slot : rows - 1);
    long long token = slot < rows ? row[0] : (long long)row[0] + row[1];
    if (slot < slots) {
        lengths[slot] = slot < rows ? row[1] : 0;
    }
    offsets[slot] = token * width_0;
    offsets[stride + slot] = token * width_1;
    offsets[2 * stride + slot] = token * width_2;
}
