// Convolutions and linear layers as implicit products: out = epilogue(sum over sources, taps and channels).
//
// Rows are pixels of the result, columns its channels. The inner dimension is cut into chunks of 32 channels of one tap of one source, so that a
// chunk's numbers lie behind each other in each row; the last chunk of a tap is filled with zeros, in the weights too. Weights are
// `[phase][column][chunk][32]`. Four phases make a picture of twice the size (`Form::Upsample`).
#include "common.cuh"

// One input: `[batch, h, w, channels]`.
struct Source {
    u64 data;
    int channels;
    int batch;
    int h;
    int w;
    int stride;
    int wrap;  // 1: left and right are joined; 2: top and bottom
    int whole; // whether every chunk can be read 16 bytes at a time
    int pad;
};

// 32 channels or fewer of the pixel (dy, dx) away.
struct Chunk {
    short source;
    short dy;
    short dx;
    short count;
    int channel;
    int pad;
};

// `out = activation(sum + bias + image) * scale * gate + residual`; columns 2j and 2j + 1 are a value and its gate if `gated`.
struct Epilogue {
    u64 bias;
    u64 image;
    u64 slopes;
    u64 gate;
    u64 residual;
    u64 residual_len;
    int residual_kind;
    int image_len; // entries of columns
    int gate_len;  // entries of gate_wide columns
    int gate_wide;
    int gate_slot;
    int activation;
    float slope;
    float scale;
    int gated;
    int pixels; // rows of the result that belong to one picture
};

struct Product {
    u64 sources;
    u64 chunks; // of each phase
    u64 weights;
    u64 out;
    u64 partial; // sums [split][phase][row][column], where there are several splits
    int depth;   // chunks of a phase
    int splits;
    int phases;
    int rows; // of a phase
    int h;    // of a phase's picture
    int w;
    int columns;
    int out_kind;
    Epilogue epilogue;
};

const int CHUNK = 32;

// The row of the result that row `row` of a phase is.
__device__ __forceinline__ u32 result_row(const Product& p, int phase, u32 row) {
    if (p.phases == 1) return row;
    u32 line = row / p.w, x = row % p.w;
    u32 picture = line / p.h, y = line % p.h;
    return ((picture * p.h + y) * 2 + phase / 2) * (2 * p.w) + 2 * x + phase % 2;
}

__device__ __forceinline__ float biased(const Epilogue& e, int columns, u32 row, int column, float x) {
    if (e.bias) x += ((const float*)e.bias)[column];
    if (e.image) x += ((const float*)e.image)[u64(row / e.pixels % e.image_len) * columns + column];
    return x;
}

// Finishes one number: `column` of `columns` results.
__device__ __forceinline__ float finished(const Epilogue& e, int columns, u32 row, int column, float x) {
    x = activate(e.activation, e.slope, x);
    if (e.slopes) x = leaky(x, ((const float*)e.slopes)[column]);
    x *= e.scale;
    if (e.gate) x *= ((const float*)e.gate)[(u64(row / e.pixels % e.gate_len) * e.gate_wide + e.gate_slot) * columns + column];
    if (e.residual) {
        u64 i = u64(row) * columns + column;
        if (i >= e.residual_len) i %= e.residual_len;
        x += load(e.residual, e.residual_kind, i);
    }
    return x;
}

// Stores the sums of two neighbouring columns, of which the first is even.
__device__ __forceinline__ void put(const Product& p, u32 row, int column, float a, float b) {
    const Epilogue& e = p.epilogue;
    a = biased(e, p.columns, row, column, a);
    bool both = column + 1 < p.columns;
    if (both) b = biased(e, p.columns, row, column + 1, b);
    if (e.gated) {
        int half = p.columns / 2;
        store(p.out, p.out_kind, u64(row) * half + column / 2, finished(e, half, row, column / 2, a * gelu(b)));
        return;
    }
    u64 i = u64(row) * p.columns + column;
    a = finished(e, p.columns, row, column, a);
    if (!both) {
        store(p.out, p.out_kind, i, a);
        return;
    }
    b = finished(e, p.columns, row, column + 1, b);
    if (p.columns % 2) {
        store(p.out, p.out_kind, i, a);
        store(p.out, p.out_kind, i + 1, b);
    } else if (p.out_kind == BF16) {
        *(u32*)((u16*)p.out + i) = narrow2(a, b);
    } else {
        *(float2*)((float*)p.out + i) = make_float2(a, b);
    }
}

// Finishes a tile of sums that all threads have put into shared memory, rows of STRIDE numbers, once they are there: into the result, or beside those
// of the other splits.
template <int ROWS, int COLUMNS, int STRIDE, int THREADS>
__device__ __forceinline__ void settle(const Product& p, const float* tile, int phase, int split) {
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < ROWS * COLUMNS / 2; i += THREADS) {
        const int line = i / (COLUMNS / 2), side = i % (COLUMNS / 2) * 2;
        const u32 row = blockIdx.x * ROWS + line;
        const int column = blockIdx.y * COLUMNS + side;
        if (row >= p.rows || column >= p.columns) continue;
        const float2 sums = *(const float2*)(tile + line * STRIDE + side);
        if (p.splits == 1) {
            put(p, result_row(p, phase, row), column, sums.x, sums.y);
            continue;
        }
        float* to = (float*)p.partial + ((u64(split) * p.phases + phase) * p.rows + row) * p.columns + column;
        to[0] = sums.x;
        if (column + 1 < p.columns) to[1] = sums.y;
    }
}

// Where a row's pixel lies in a picture.
struct Pixel {
    int picture;
    int y;
    int x;
};

__device__ __forceinline__ Pixel pixel_of(const Product& p, u32 row) {
    // rows beyond the last read a picture like the others; what becomes of them is not stored
    if (row >= p.rows) row = 0;
    u32 line = row / p.w;
    return {int(line / p.h), int(line % p.h), int(row % p.w)};
}

// The number at which a pixel that a chunk reads begins; -1 outside of the picture.
__device__ __forceinline__ long long place(const Source& s, const Chunk& c, Pixel at) {
    int y = at.y * s.stride + c.dy, x = at.x * s.stride + c.dx;
    if (s.wrap & 1) x = (x % s.w + s.w) % s.w;
    if (s.wrap & 2) y = (y % s.h + s.h) % s.h;
    if (u32(y) >= u32(s.h) || u32(x) >= u32(s.w)) return -1;
    int picture = at.picture < s.batch ? at.picture : at.picture % s.batch;
    return ((long long)(picture * s.h + y) * s.w + x) * s.channels + c.channel;
}

// A tile of ROWS x COLUMNS by tensor cores, in WARPS_M x WARPS_N warps; STAGES chunks are on their way at a time.
template <int ROWS, int COLUMNS, int WARPS_M, int WARPS_N, int STAGES>
__device__ __forceinline__ void product_bf16(const Product& p, u8* memory) {
    const int THREADS = 32 * WARPS_M * WARPS_N;
    const int M = ROWS / WARPS_M / 16, N = COLUMNS / WARPS_N / 8;
    const int STEP = THREADS / 4; // rows that are read at once: four threads a row, 16 bytes each
    const int A = ROWS / STEP, B = COLUMNS / STEP;
    const int BYTES = CHUNK * 2, STAGE = (ROWS + COLUMNS) * BYTES;
    const int STRIDE = COLUMNS + 8; // of the sums in the end; eight rows in turn hit all banks
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int warp_row = warp / WARPS_N * (ROWS / WARPS_M), warp_column = warp % WARPS_N * (COLUMNS / WARPS_N);
    const u32 first_row = blockIdx.x * ROWS;
    const int first_column = blockIdx.y * COLUMNS;
    const int phase = blockIdx.z / p.splits, split = blockIdx.z % p.splits;
    const int from = int((long long)p.depth * split / p.splits), to = int((long long)p.depth * (split + 1) / p.splits);

    // what this thread reads: 8 numbers at `segment` of rows `line`, `line + STEP` ...
    const int segment = threadIdx.x % 4, line = threadIdx.x / 4;
    Pixel pixels[A];
    for (int i = 0; i < A; i++) pixels[i] = pixel_of(p, first_row + line + i * STEP);
    const Source* sources = (const Source*)p.sources;
    const Chunk* chunks = (const Chunk*)p.chunks + phase * p.depth;
    const u16* weights = (const u16*)p.weights + (u64(phase) * p.columns + first_column) * p.depth * CHUNK + segment * 8;
    const u32 base = shared_address(memory);
    // 16 bytes of a row lie where eight rows in turn hit all banks
    auto slot = [](int row, int segment) { return row * BYTES + (segment ^ (row / 2 % 4)) * 16; };

    auto fetch = [&](int chunk) {
        const Chunk c = chunks[chunk];
        const Source s = sources[c.source];
        const u32 stage = base + (chunk - from) % STAGES * STAGE;
        const int count = c.count - segment * 8;
#pragma unroll
        for (int i = 0; i < A; i++) {
            const long long at = place(s, c, pixels[i]);
            const u32 target = stage + slot(line + i * STEP, segment);
            const u16* numbers = (const u16*)s.data + at + segment * 8;
            if (s.whole) {
                const bool there = at >= 0 && count > 0;
                copy16(target, there ? numbers : (const u16*)s.data, there ? 16 : 0);
            } else {
                u32 words[4];
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    u32 low = at >= 0 && 2 * j < count ? numbers[2 * j] : 0;
                    u32 high = at >= 0 && 2 * j + 1 < count ? numbers[2 * j + 1] : 0;
                    words[j] = low | high << 16;
                }
                asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(target), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]) : "memory");
            }
        }
#pragma unroll
        for (int i = 0; i < B; i++) {
            const int row = line + i * STEP;
            const bool there = first_column + row < p.columns;
            const u16* numbers = weights + (u64(row) * p.depth + chunk) * CHUNK;
            copy16(stage + ROWS * BYTES + slot(row, segment), there ? numbers : (const u16*)p.weights, there ? 16 : 0);
        }
    };

    float sums[M][N][4] = {};
#pragma unroll 1
    for (int i = 0; i < STAGES - 1; i++) {
        if (from + i < to) fetch(from + i);
        copies_end();
    }
    for (int chunk = from; chunk < to; chunk++) {
        copies_wait<STAGES - 2>();
        // all have read what is overwritten now, and wrote what is read
        __syncthreads();
        if (chunk + STAGES - 1 < to) fetch(chunk + STAGES - 1);
        copies_end();
        const u32 a_tile = base + (chunk - from) % STAGES * STAGE, b_tile = a_tile + ROWS * BYTES;
#pragma unroll
        for (int k = 0; k < CHUNK / 16; k++) {
            u32 a[M][4], b[N / 2][4];
#pragma unroll
            for (int m = 0; m < M; m++) matrices(a[m], a_tile + slot(warp_row + m * 16 + lane % 16, k * 2 + lane / 16));
#pragma unroll
            for (int n = 0; n < N / 2; n++) matrices(b[n], b_tile + slot(warp_column + n * 16 + lane % 8 + lane / 16 * 8, k * 2 + lane / 8 % 2));
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int n = 0; n < N; n++) multiply(sums[m][n], a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
        }
    }
    copies_wait<0>();
    __syncthreads();

    float* tile = (float*)memory;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                *(float2*)(tile + (warp_row + m * 16 + half * 8 + lane / 4) * STRIDE + warp_column + n * 8 + lane % 4 * 2) = make_float2(sums[m][n][half * 2], sums[m][n][half * 2 + 1]);
    settle<ROWS, COLUMNS, STRIDE, THREADS>(p, tile, phase, split);
}

extern __shared__ __align__(128) u8 memory[];

extern "C" __global__ void __launch_bounds__(256) product_128(const __grid_constant__ Product p) { product_bf16<128, 128, 2, 4, 4>(p, memory); }

extern "C" __global__ void __launch_bounds__(128) product_64(const __grid_constant__ Product p) { product_bf16<64, 64, 2, 2, 4>(p, memory); }

// The same in 32-bit arithmetic: a tile of 64 x 64, each thread 4 x 4 of it.
extern "C" __global__ void __launch_bounds__(256) product_f32(const __grid_constant__ Product p) {
    const int TILE = 64;
    // rows are a little longer than a tile, so that a column of a chunk is written to several banks
    __shared__ __align__(16) float both[2 * CHUNK][TILE + 4];
    float (*a)[TILE + 4] = both, (*b)[TILE + 4] = both + CHUNK;
    const u32 first_row = blockIdx.x * TILE;
    const int first_column = blockIdx.y * TILE;
    const int phase = blockIdx.z / p.splits, split = blockIdx.z % p.splits;
    const int from = int((long long)p.depth * split / p.splits), to = int((long long)p.depth * (split + 1) / p.splits);
    const int segment = threadIdx.x % 4 * 8, line = threadIdx.x / 4;
    const Pixel pixel = pixel_of(p, first_row + line);
    const Source* sources = (const Source*)p.sources;
    const Chunk* chunks = (const Chunk*)p.chunks + phase * p.depth;
    const bool inside = first_column + line < p.columns;
    const float* weights = (const float*)p.weights + (u64(phase) * p.columns + (inside ? first_column + line : 0)) * p.depth * CHUNK + segment;
    const int row = threadIdx.x / 16 * 4, column = threadIdx.x % 16 * 4;
    float sums[4][4] = {};
    for (int chunk = from; chunk < to; chunk++) {
        const Chunk c = chunks[chunk];
        const Source s = sources[c.source];
        const long long at = place(s, c, pixel);
        const float* numbers = (const float*)s.data + at + segment;
        float x[8], w[8];
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
            if (s.whole) {
                float4 four = at >= 0 && segment + i < c.count ? *(const float4*)(numbers + i) : make_float4(0.f, 0.f, 0.f, 0.f);
                x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
            } else {
#pragma unroll
                for (int j = i; j < i + 4; j++) x[j] = at >= 0 && segment + j < c.count ? numbers[j] : 0.f;
            }
            float4 four = *(const float4*)(weights + u64(chunk) * CHUNK + i);
            w[i] = four.x, w[i + 1] = four.y, w[i + 2] = four.z, w[i + 3] = four.w;
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 8; i++) {
            a[segment + i][line] = x[i];
            b[segment + i][line] = inside ? w[i] : 0.f;
        }
        __syncthreads();
#pragma unroll 8
        for (int k = 0; k < CHUNK; k++) {
            const float4 left = *(const float4*)&a[k][row], right = *(const float4*)&b[k][column];
            const float l[4] = {left.x, left.y, left.z, left.w}, r[4] = {right.x, right.y, right.z, right.w};
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) sums[i][j] += l[i] * r[j];
        }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4; i++) *(float4*)&both[row + i][column] = make_float4(sums[i][0], sums[i][1], sums[i][2], sums[i][3]);
    settle<TILE, TILE, TILE + 4, 256>(p, &both[0][0], phase, split);
}

// Adds up the splits, always in the same order, and finishes: one thread for two columns, blocks of 32 x 8 of them.
extern "C" __global__ void __launch_bounds__(256) product_finish(const __grid_constant__ Product p) {
    const int column = (blockIdx.y * 32 + threadIdx.x % 32) * 2;
    const u32 row = blockIdx.x * 8 + threadIdx.x / 32;
    if (row >= p.rows || column >= p.columns) return;
    const bool both = column + 1 < p.columns;
    const u64 split = u64(p.phases) * p.rows * p.columns;
    const float* from = (const float*)p.partial + (u64(blockIdx.z) * p.rows + row) * p.columns + column;
    float a = 0.f, b = 0.f;
    for (int i = 0; i < p.splits; i++) {
        a += from[i * split];
        if (both) b += from[i * split + 1];
    }
    put(p, result_row(p, blockIdx.z, row), column, a, b);
}
