// Adapters at their places beside the weights they belong to, in all matrices of a model at once.
//
// This text stands behind the shared prelude; T is the dtype of the matrices. It does what `place_parts` of the shared text does for one.

// Where the copy of a part begins, its first value, its rows and columns, and how far the matrix's rows lie apart.
struct Place { T* to; unsigned long long first; uint rows, columns, pitch, unused; };

extern "C" __global__ void place_all(const float* values, const Place* places) {
    const Place place = places[blockIdx.y];
    const uint n = place.rows * place.columns;
    for (uint i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
        const uint row = i / place.columns;
        place.to[(unsigned long long)row * place.pitch + (i - row * place.columns)] = T(values[place.first + i]);
    }
}
