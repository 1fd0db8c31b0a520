// The operations that are rare or small: each number of the result by itself.
#include "common.cuh"

// In the order of `Pointwise` in `src/plan/gpu/pointwise.rs`.
enum What {
    ACTIVATE, PRELU, SHIFT, ADD, MULTIPLY, GEGLU, ADD_CHANNELS, SCALE_SHIFT, AFFINE, GATE, JOIN, TOKENS, PATCHIFY, UNPATCHIFY_CHANNELS_FIRST,
    UNPATCHIFY_CHANNELS_LAST, UPSAMPLE, AVERAGE_POOL, SINUSOID, EMBED, ADD_POSITIONS, ROTATE, PLACE
};

struct Pointwise {
    View a;
    View b;
    u64 table; // numbers
    u64 places; // row of the table for each pixel
    u64 out;
    int what;
    int out_kind;
    int rows;
    int channels;
    int pixels;  // rows of a picture
    int across;  // threads along the channels, a power of two
    int activation;
    float slope;
    float scale;
    float shift;
    int i[6];
};

__device__ float number(const Pointwise& p, u32 row, int j) {
    const u64 c = p.channels, same = row * c + j;
    switch (p.what) {
        case ACTIVATE: return activate(p.activation, p.slope, at(p.a, same));
        case PRELU: return leaky(at(p.a, same), ((const float*)p.table)[j]);
        case SHIFT: return at(p.a, same) + ((const float*)p.table)[j];
        case ADD: return at(p.a, same) + at(p.b, same);
        case MULTIPLY: return at(p.a, same) * at(p.b, same);
        case GEGLU: return at(p.a, row * 2 * c + j) * gelu(at(p.a, (row * u64(2) + 1) * c + j));
        case ADD_CHANNELS: return at(p.a, same) + at(p.b, row / p.pixels * c + j);
        case SCALE_SHIFT: {
            u64 first = row / p.pixels * 2 * c;
            return at(p.a, same) * (1.f + at(p.b, first + j)) + at(p.b, first + c + j);
        }
        case AFFINE: return at(p.a, same) * p.scale + p.shift;
        case GATE: return at(p.a, same) * at(p.b, u64(row / p.pixels) * p.b.channels + u64(p.i[0]) * c + j);
        case JOIN: {
            // rows of each sequence's first part, then of its second
            u32 sequence = row / p.pixels, token = row % p.pixels;
            if (token < p.i[0]) return at(p.a, (u64(sequence) * p.i[0] + token) * c + j);
            return at(p.b, (u64(sequence) * p.i[1] + token - p.i[0]) * c + j);
        }
        case TOKENS: return at(p.a, (u64(row / p.pixels) * p.i[0] + p.i[1] + row % p.pixels) * c + j);
        case PATCHIFY: {
            // i: height, width, patch
            u32 picture = row / p.pixels, token = row % p.pixels;
            int h = p.i[0], w = p.i[1], patch = p.i[2];
            u32 across = w / patch;
            int channel = j / (patch * patch), dy = j / patch % patch, dx = j % patch;
            u64 y = u64(picture) * h + token / across * patch + dy;
            return at(p.a, (y * w + token % across * patch + dx) * p.a.channels + channel);
        }
        case UNPATCHIFY_CHANNELS_FIRST:
        case UNPATCHIFY_CHANNELS_LAST: {
            u32 picture = row / p.pixels, pixel = row % p.pixels;
            int h = p.i[0], w = p.i[1], patch = p.i[2];
            u32 y = pixel / (w * patch), x = pixel % (w * patch);
            u64 token = (u64(picture) * h + y / patch) * w + x / patch;
            int dy = y % patch, dx = x % patch;
            u64 place = p.what == UNPATCHIFY_CHANNELS_FIRST ? (j * patch + dy) * patch + dx : u64(dy * patch + dx) * c + j;
            return at(p.a, token * c * patch * patch + place);
        }
        case UPSAMPLE: {
            // i: height and width of the source, then of the result
            u32 picture = row / p.pixels, y = row % p.pixels / p.i[3], x = row % p.i[3];
            u64 pixel = (u64(picture) * p.i[0] + u64(y) * p.i[0] / p.i[2]) * p.i[1] + u64(x) * p.i[1] / p.i[3];
            return at(p.a, pixel * c + j);
        }
        case AVERAGE_POOL: {
            int h = p.i[0], w = p.i[1];
            int across = (w + 1) / 2;
            u32 picture = row / p.pixels;
            int y = row % p.pixels / across * 2, x = row % across * 2;
            int rows = h - y < 2 ? h - y : 2, columns = w - x < 2 ? w - x : 2;
            float sum = 0.f;
            for (int dy = 0; dy < rows; dy++)
                for (int dx = 0; dx < columns; dx++) sum += at(p.a, ((u64(picture) * h + y + dy) * w + x + dx) * c + j);
            return sum / (rows * columns);
        }
        case SINUSOID: {
            // i: cosines first; scale: ln(10000) / (half - shift)
            int half = p.channels / 2;
            if (j >= 2 * half) return 0.f;
            float angle = at(p.a, row) * expf(p.scale * (j % half) / p.shift);
            return (j < half) == (p.i[0] != 0) ? cosf(angle) : sinf(angle);
        }
        case EMBED: {
            float id = at(p.a, row);
            return id >= 0.f && id < p.i[0] ? ((const float*)p.table)[u64(id) * c + j] : __int_as_float(0x7fc00000);
        }
        case ADD_POSITIONS: {
            u32 pixel = row % p.pixels;
            u32 place = p.places ? ((const u32*)p.places)[pixel] : pixel;
            return at(p.a, same) + ((const float*)p.table)[place * c + j];
        }
        case ROTATE: {
            // pairs of each head turn by the cosines and sines [pixel][width / 2] of `table`
            int width = p.channels / p.i[0], pair = j % width / 2;
            const float2 turn = ((const float2*)p.table)[u64(row % p.pixels) * (width / 2) + pair];
            float x = at(p.a, same), y = at(p.a, same ^ 1);
            return j % 2 == 0 ? x * turn.x - y * turn.y : x * turn.x + y * turn.y;
        }
        // a piece of a wider row
        case PLACE: return at(p.a, same);
        default: return 0.f;
    }
}

// Blocks of 256 threads: `across` channels by as many rows.
extern "C" __global__ void __launch_bounds__(256) pointwise(const __grid_constant__ Pointwise p) {
    const u32 row = blockIdx.x * (256 / p.across) + threadIdx.x / p.across;
    if (row >= p.rows) return;
    const u64 stride = p.what == PLACE ? p.i[0] : p.channels, first = p.what == PLACE ? p.i[1] : 0;
    for (int j = threadIdx.x % p.across; j < p.channels; j += p.across) store(p.out, p.out_kind, row * stride + first + j, number(p, row, j));
}

struct Means {
    View x;
    u64 out; // [picture][channel], f32
    int pixels;
    int channels;
};

// One channel of one picture a warp, eight a block.
extern "C" __global__ void __launch_bounds__(256) means(const __grid_constant__ Means p) {
    const int channel = blockIdx.x * 8 + threadIdx.x / 32;
    if (channel >= p.channels) return;
    double sum = 0.;
    for (int pixel = threadIdx.x % 32; pixel < p.pixels; pixel += 32) sum += at(p.x, (u64(blockIdx.y) * p.pixels + pixel) * p.channels + channel);
    for (int other = 16; other; other /= 2) sum += __shfl_xor_sync(0xffffffff, sum, other);
    if (threadIdx.x % 32 == 0) ((float*)p.out)[u64(blockIdx.y) * p.channels + channel] = float(sum / p.pixels);
}
