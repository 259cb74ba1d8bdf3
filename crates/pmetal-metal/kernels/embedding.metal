// Rows of a table by their numbers, and the gradient of that. `quads` groups of four of a row are moved whole: all of them, or none where
// rows do not begin at aligned places.

struct EmbeddingParams { uint width; uint quads; };

/// `y[t] = table[ids[t]]`: `table [vocab, width]`, `y [tokens, width]`. A threadgroup has a token.
KERNEL(embedding)(READ(T, table, 0), READ(uint, ids, 1), WRITE(T, y, 2), PARAMS(EmbeddingParams, 3))
{
    const ulong from = ulong(ids[GROUP_X]) * params.width, to = ulong(GROUP_X) * params.width;
    for (uint i = THREAD; i < params.quads; i += THREADS) store4(y, to + 4 * i, load4(table, from + 4 * i));
    for (uint i = 4 * params.quads + THREAD; i < params.width; i += THREADS) y[to + i] = table[from + i];
}

struct EmbeddingGradParams { uint width; uint quads; uint unique; };

/// Adds the rows of `dy [tokens, width]` to those of `dtable [vocab, width]`, those of one id in the order of the tokens. `groups` holds the
/// `unique` ids, where the tokens of each begin and the last ends, and the tokens. A threadgroup has an id.
KERNEL(embedding_grad)(READ(T, dy, 0), READ(uint, groups, 1), UPDATE(float, dtable, 2), PARAMS(EmbeddingGradParams, 3))
{
    const uint unique = params.unique, width = params.width;
    const ulong to = ulong(groups[GROUP_X]) * width;
    const uint first = groups[unique + GROUP_X], last = groups[unique + GROUP_X + 1], tokens = 2 * unique + 1;
    for (uint i = THREAD; i < params.quads; i += THREADS) {
        float4 sum = load4(dtable, to + 4 * i);
        for (uint k = first; k < last; ++k) {
            const float4 v = load4(dy, ulong(groups[tokens + k]) * width + 4 * i);
            sum = make_float4(sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w);
        }
        store4(dtable, to + 4 * i, sum);
    }
    for (uint i = 4 * params.quads + THREAD; i < width; i += THREADS) {
        float sum = dtable[to + i];
        for (uint k = first; k < last; ++k) sum += float(dy[ulong(groups[tokens + k]) * width + i]);
        dtable[to + i] = sum;
    }
}
