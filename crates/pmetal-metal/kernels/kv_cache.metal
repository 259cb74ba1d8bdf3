// Copies of consecutive rows into places of a larger tensor.

struct WriteRowsParams { uint width; uint aligned; };

/// Copies the rows of each run (GROUP_Y): `runs [runs, 3]` has the first row of `x`, its place in `target`, and how many; rows of `width`.
KERNEL(write_rows)(READ(T, x, 0), READ(uint, runs, 1), UPDATE(T, target, 2), PARAMS(WriteRowsParams, 3))
{
    const ulong from = ulong(runs[3 * GROUP_Y]) * params.width;
    const ulong to = ulong(runs[3 * GROUP_Y + 1]) * params.width;
    const ulong n = ulong(runs[3 * GROUP_Y + 2]) * params.width, quads = params.aligned ? n / 4 : 0;
    for (ulong i = THREAD_IN_GRID; i < quads; i += GRID_THREADS) store4(target, to + 4 * i, load4(x, from + 4 * i));
    for (ulong i = 4 * quads + THREAD_IN_GRID; i < n; i += GRID_THREADS) target[to + i] = x[from + i];
}
