// Adapters at their places beside the weights they belong to.

struct PlaceParams { uint pitch; };

/// Copies parts of `values` into `matrix`, whose rows lie `pitch` apart, in its dtype: `parts [parts, 5]` are the first value of each, its rows
/// and columns, and the row and column of the matrix where it begins. GROUP_Y is the part.
KERNEL(place_parts)(READ(float, values, 0), READ(uint, parts, 1), UPDATE(T, matrix, 2), PARAMS(PlaceParams, 3))
{
    const uint part = 5 * GROUP_Y;
    const uint first = parts[part], columns = parts[part + 2];
    const uint n = parts[part + 1] * columns;
    const ulong start = ulong(parts[part + 3]) * params.pitch + parts[part + 4];
    for (uint i = THREAD_IN_GRID; i < n; i += GRID_THREADS)
        matrix[start + ulong(i / columns) * params.pitch + i % columns] = T(values[first + i]);
}
