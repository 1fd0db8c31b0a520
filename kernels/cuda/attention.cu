// softmax(q k^T scale + bias) v, without a matrix of scores (Dao, "FlashAttention-2", arXiv 2307.08691).
#include "common.cuh"

// q [q_batch, queries, heads * width]; k and v [kv_batch, keys, heads * width]; sequence `i` reads entry `i` modulo their number.
struct Attention {
    u64 q;
    u64 k;
    u64 v;
    u64 out;
    u64 bias; // [head][query - key + keys - 1], added to scores
    int q_batch;
    int kv_batch;
    int queries;
    int keys;
    int heads;
    int width;
    int kind;
    int causal;
    float scale;
    int pad;
};

// Rows of shared tiles are eight numbers longer than what they hold, so that eight rows in turn hit all banks.
template <int WIDE> struct Tile { static const int ROW = (WIDE + 8) * 2; };

// Copies ROWS rows, from `row` on, of `from`, of which `rows` rows and `width` columns are there: the others become zeros.
template <int ROWS, int WIDE, int THREADS>
__device__ __forceinline__ void fetch(u32 to, const u16* from, int stride, int row, int rows, int width) {
#pragma unroll
    for (int i = 0; i < (ROWS * (WIDE / 8) + THREADS - 1) / THREADS; i++) {
        const int piece = i * THREADS + threadIdx.x;
        if (ROWS * (WIDE / 8) % THREADS != 0 && piece >= ROWS * (WIDE / 8)) break;
        const int line = piece / (WIDE / 8), column = piece % (WIDE / 8) * 8;
        const bool inside = row + line < rows && column < width;
        copy16(to + line * Tile<WIDE>::ROW + column * 2, inside ? from + (long long)(row + line) * stride + column : from, inside ? 16 : 0);
    }
}

// What a warp knows of its 16 queries: of rows lane / 4 and lane / 4 + 8 the largest score so far, in powers of two, the sum of weights, and OUT
// columns of weighted values.
template <int OUT> struct Rows {
    float out[OUT / 8][4] = {};
    float most[2] = {-infinity(), -infinity()};
    float sum[2] = {};
};

// Adds products of WIDE numbers of queries and keys to scores of 16 queries and KEYS keys.
template <int WIDE, int KEYS>
__device__ __forceinline__ void score(float (&scores)[KEYS / 8][4], u32 q_rows, u32 k_tile) {
    const int lane = threadIdx.x % 32, ROW = Tile<WIDE>::ROW;
#pragma unroll
    for (int d = 0; d < WIDE / 16; d++) {
        u32 a[4];
        matrices(a, q_rows + lane % 16 * ROW + (d * 16 + lane / 16 * 8) * 2);
#pragma unroll
        for (int n = 0; n < KEYS / 16; n++) {
            u32 b[4];
            matrices(b, k_tile + (n * 16 + lane % 8 + lane / 16 * 8) * ROW + (d * 16 + lane / 8 % 2 * 8) * 2);
            multiply(scores[2 * n], a, b[0], b[1]);
            multiply(scores[2 * n + 1], a, b[2], b[3]);
        }
    }
}

// Makes scores of `keys` keys weights, and adds OUT columns of values by them.
template <int OUT, int KEYS>
__device__ __forceinline__ void weigh(Rows<OUT>& rows, float (&scores)[KEYS / 8][4], float scale, int keys, u32 v_tile) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) scores[n][i] = n * 8 + lane % 4 * 2 + i % 2 < keys ? scores[n][i] * scale : -infinity();
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float top = rows.most[half];
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) top = fmaxf(top, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
        top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 2));
        const float shrink = exp2f(rows.most[half] - top);
        rows.most[half] = top;
        float own = 0.f;
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int i = 2 * half; i < 2 * half + 2; i++) {
                scores[n][i] = exp2f(scores[n][i] - top);
                own += scores[n][i];
            }
        rows.sum[half] = rows.sum[half] * shrink + own;
#pragma unroll
        for (int n = 0; n < OUT / 8; n++) {
            rows.out[n][2 * half] *= shrink;
            rows.out[n][2 * half + 1] *= shrink;
        }
    }
#pragma unroll
    for (int key = 0; key < KEYS / 16; key++) {
        const u32 a[4] = {narrow2(scores[2 * key][0], scores[2 * key][1]), narrow2(scores[2 * key][2], scores[2 * key][3]),
                          narrow2(scores[2 * key + 1][0], scores[2 * key + 1][1]), narrow2(scores[2 * key + 1][2], scores[2 * key + 1][3])};
#pragma unroll
        for (int n = 0; n < OUT / 16; n++) {
            u32 b[4];
            matrices_transposed(b, v_tile + (key * 16 + lane % 16) * Tile<OUT>::ROW + (n * 16 + lane / 16 * 8) * 2);
            multiply(rows.out[2 * n], a, b[0], b[1]);
            multiply(rows.out[2 * n + 1], a, b[2], b[3]);
        }
    }
}

// Stores a warp's results, of which `queries` rows and `width` columns are wanted.
template <int OUT>
__device__ __forceinline__ void put(const Rows<OUT>& rows, u16* out, int stride, int queries, int width) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float all = rows.sum[half];
        all += __shfl_xor_sync(0xffffffff, all, 1);
        all += __shfl_xor_sync(0xffffffff, all, 2);
        const int query = half * 8 + lane / 4;
        if (query >= queries) continue;
        u16* to = out + (long long)query * stride;
#pragma unroll
        for (int n = 0; n < OUT / 8; n++) {
            const int column = n * 8 + lane % 4 * 2;
            if (column < width) *(u32*)(to + column) = narrow2(rows.out[n][2 * half] / all, rows.out[n][2 * half + 1] / all);
        }
    }
}

const int QUERIES = 64, THREADS = 128;

// Where a block's queries, keys, values and results begin: one head of one sequence.
struct Head {
    const u16* q;
    const u16* k;
    const u16* v;
    u16* out;
    int stride;
};

__device__ __forceinline__ Head head_of(const Attention& p, int head) {
    const int stride = p.heads * p.width;
    const u64 first = u64(head) * p.width, kv = u64(blockIdx.z % p.kv_batch) * p.keys * stride + first;
    return {(const u16*)p.q + u64(blockIdx.z % p.q_batch) * p.queries * stride + first, (const u16*)p.k + kv, (const u16*)p.v + kv,
            (u16*)p.out + u64(blockIdx.z) * p.queries * stride + first, stride};
}

extern __shared__ __align__(128) u8 memory[];

// 64 queries of one head a block of four warps, each 16 of them; keys by KEYS. The width is a multiple of 8 and at most WIDE.
template <int WIDE, int KEYS>
__device__ __forceinline__ void flash(const Attention& p) {
    const int ROW = Tile<WIDE>::ROW, TILE = KEYS * ROW;
    const int warp = threadIdx.x / 32, first = blockIdx.x * QUERIES;
    const Head head = head_of(p, blockIdx.y);
    const u32 q_tile = shared_address(memory), tiles = q_tile + QUERIES * ROW;
    fetch<QUERIES, WIDE, THREADS>(q_tile, head.q, head.stride, first, p.queries, p.width);
    fetch<KEYS, WIDE, THREADS>(tiles, head.k, head.stride, 0, p.keys, p.width);
    fetch<KEYS, WIDE, THREADS>(tiles + TILE, head.v, head.stride, 0, p.keys, p.width);
    copies_end();
    Rows<WIDE> rows;
    const float scale = p.scale * 1.44269504088896341f;
    for (int key = 0, at = 0; key < p.keys; key += KEYS, at ^= 1) {
        copies_wait<0>();
        // all have what was copied, and are done with what is overwritten now
        __syncthreads();
        const u32 k_tile = tiles + at * 2 * TILE, next = tiles + (at ^ 1) * 2 * TILE;
        if (key + KEYS < p.keys) {
            fetch<KEYS, WIDE, THREADS>(next, head.k, head.stride, key + KEYS, p.keys, p.width);
            fetch<KEYS, WIDE, THREADS>(next + TILE, head.v, head.stride, key + KEYS, p.keys, p.width);
        }
        copies_end();
        float scores[KEYS / 8][4] = {};
        score<WIDE, KEYS>(scores, q_tile + warp * 16 * ROW, k_tile);
        weigh<WIDE, KEYS>(rows, scores, scale, p.keys - key, k_tile + TILE);
    }
    copies_wait<0>();
    put<WIDE>(rows, head.out + (long long)(first + warp * 16) * head.stride, head.stride, p.queries - first - warp * 16, p.width);
}

// Heads of any width that is a multiple of 8 and more than 64, as the autoencoders have them: queries and keys come 64 columns at a time, and a block
// makes 128 columns of the result; blockIdx.y counts these within heads.
extern "C" __global__ void __launch_bounds__(128) flash_wide(const __grid_constant__ Attention p) {
    const int PART = 64, OUT = 128, KEYS = 64;
    const int ROW = Tile<PART>::ROW, STAGE = (QUERIES + KEYS) * ROW;
    const int warp = threadIdx.x / 32, first = blockIdx.x * QUERIES;
    const int slices = (p.width + OUT - 1) / OUT, slice = blockIdx.y % slices * OUT;
    const int parts = (p.width + PART - 1) / PART;
    const Head head = head_of(p, blockIdx.y / slices);
    const u32 stages = shared_address(memory), v_tile = stages + 2 * STAGE;
    auto part = [&](int stage, int key, int column) {
        const u32 to = stages + stage * STAGE;
        fetch<QUERIES, PART, THREADS>(to, head.q + column, head.stride, first, p.queries, p.width - column);
        fetch<KEYS, PART, THREADS>(to + QUERIES * ROW, head.k + column, head.stride, key, p.keys, p.width - column);
    };
    part(0, 0, 0);
    copies_end();
    Rows<OUT> rows;
    const float scale = p.scale * 1.44269504088896341f;
    int stage = 0;
    for (int key = 0; key < p.keys; key += KEYS) {
        float scores[KEYS / 8][4] = {};
        for (int i = 0; i < parts; i++, stage ^= 1) {
            copies_wait<0>();
            __syncthreads();
            // the values come with the second part, and are there when that is
            if (i == 0) fetch<KEYS, OUT, THREADS>(v_tile, head.v + slice, head.stride, key, p.keys, p.width - slice);
            if (i + 1 < parts) part(stage ^ 1, key, (i + 1) * PART);
            else if (key + KEYS < p.keys) part(stage ^ 1, key + KEYS, 0);
            copies_end();
            const u32 q_rows = stages + stage * STAGE + warp * 16 * ROW;
            score<PART, KEYS>(scores, q_rows, stages + stage * STAGE + QUERIES * ROW);
        }
        weigh<OUT, KEYS>(rows, scores, scale, p.keys - key, v_tile);
    }
    copies_wait<0>();
    put<OUT>(rows, head.out + (long long)(first + warp * 16) * head.stride + slice, head.stride, p.queries - first - warp * 16, p.width - slice);
}

#define FLASH(WIDE, KEYS) \
    extern "C" __global__ void __launch_bounds__(128) flash_##WIDE(const __grid_constant__ Attention p) { flash<WIDE, KEYS>(p); }
FLASH(32, 64)
FLASH(48, 64)
FLASH(64, 64)
FLASH(80, 64)
FLASH(128, 32)
FLASH(160, 32)

// Any width up to 32 * PARTS, in 32-bit arithmetic, with biases and causal: one query of one head a warp, four a block.
template <int PARTS>
__device__ __forceinline__ void plain(const Attention& p) {
    const int lane = threadIdx.x % 32, query = blockIdx.x * 4 + threadIdx.x / 32;
    if (query >= p.queries) return;
    const int head = blockIdx.y, stride = p.heads * p.width;
    const u64 own = u64(head) * p.width;
    const u64 q = (u64(blockIdx.z % p.q_batch) * p.queries + query) * stride + own;
    const u64 kv = u64(blockIdx.z % p.kv_batch) * p.keys * stride + own;
    float of_query[PARTS], out[PARTS] = {};
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
        const int column = i * 32 + lane;
        of_query[i] = column < p.width ? load(p.q, p.kind, q + column) : 0.f;
    }
    float most = -infinity(), sum = 0.f;
    const int keys = p.causal && query + 1 < p.keys ? query + 1 : p.keys;
    for (int key = 0; key < keys; key++) {
        const u64 row = kv + u64(key) * stride;
        float score = 0.f;
#pragma unroll
        for (int i = 0; i < PARTS; i++) {
            const int column = i * 32 + lane;
            if (column < p.width) score += of_query[i] * load(p.k, p.kind, row + column);
        }
        score = warp_sum(score) * p.scale;
        if (p.bias) score += ((const float*)p.bias)[u64(head) * (p.queries + p.keys - 1) + query - key + p.keys - 1];
        const float top = fmaxf(most, score), shrink = expf(most - top), weight = expf(score - top);
        most = top;
        sum = sum * shrink + weight;
#pragma unroll
        for (int i = 0; i < PARTS; i++) {
            const int column = i * 32 + lane;
            out[i] *= shrink;
            if (column < p.width) out[i] += weight * load(p.v, p.kind, row + column);
        }
    }
    const u64 to = (u64(blockIdx.z) * p.queries + query) * stride + own;
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
        const int column = i * 32 + lane;
        // without keys there is nothing
        if (column < p.width) store(p.out, p.kind, to + column, keys > 0 ? out[i] / sum : 0.f);
    }
}

#define PLAIN(WIDE) \
    extern "C" __global__ void __launch_bounds__(128) plain_##WIDE(const __grid_constant__ Attention p) { plain<WIDE / 32>(p); }
PLAIN(64)
PLAIN(160)
PLAIN(512)
