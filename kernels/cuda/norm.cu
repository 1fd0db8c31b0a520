// Group norms in three passes (sums, factors, application), and norms of rows.
#include "common.cuh"

const int SIDES = 4;

// Values side by side along the channels; picture `i` reads entry `i` modulo their number.
struct Sides {
    View of[SIDES];
    int count;
    int pixels;
};

// Where a channel of all is: its side's picture, and numbers from one pixel to the next.
struct Place {
    u64 data;
    u64 first;
    int kind;
    int step;
};

__device__ __forceinline__ Place find(const Sides& sides, u32 picture, int channel) {
#pragma unroll
    for (int i = 0; i < SIDES; i++) {
        const View& side = sides.of[i];
        if (i + 1 == sides.count || channel < side.channels) {
            u64 entry = u64(sides.pixels) * side.channels;
            return {side.data, picture * entry % side.len + channel, side.kind, side.channels};
        }
        channel -= side.channels;
    }
    return {};
}

// A part of every picture, in pixels.
struct GroupSums {
    Sides sides;
    u64 sums; // [picture][part][channel] of two: distances from the picture's first pixel, and their squares
    int channels;
    int parts;
    int width; // of a picture
    int top;
    int left;
    int part_height;
    int part_width;
    int across; // threads along the channels, a power of two
};

// Blocks of 256 threads: `across` channels by as many lines of pixels; every line is a part.
extern "C" __global__ void __launch_bounds__(256) group_sums(const __grid_constant__ GroupSums p) {
    const int lines = 256 / p.across, part = blockIdx.x * lines + threadIdx.x / p.across;
    const u32 picture = blockIdx.y;
    const int count = p.part_height * p.part_width;
    for (int channel = threadIdx.x % p.across; channel < p.channels; channel += p.across) {
        const Place at = find(p.sides, picture, channel);
        const float origin = load(at.data, at.kind, at.first);
        float sum = 0.f, square = 0.f;
        for (int i = part; i < count; i += p.parts) {
            u64 pixel = u64(p.top + i / p.part_width) * p.width + p.left + i % p.part_width;
            float d = load(at.data, at.kind, at.first + pixel * at.step) - origin;
            sum += d;
            square += d * d;
        }
        float2* to = (float2*)p.sums + (u64(picture) * p.parts + part) * p.channels + channel;
        *to = make_float2(sum, square);
    }
}

struct GroupFactors {
    Sides sides;
    u64 sums;
    u64 given; // means and variances [given_len][2 * groups] in the place of sums
    u64 weight;
    u64 bias;
    u64 factors;    // scale and shift [picture][channel]
    u64 statistics; // or, where they are what is asked for, means and variances [picture][2 * groups]
    int given_len;
    int channels;
    int groups;
    int parts;
    int pixels; // that were summed
    float eps;
};

// The sum over a block of 128 threads, in every thread.
__device__ __forceinline__ double block_sum(double x, double* between) {
    for (int other = 16; other; other /= 2) x += __shfl_xor_sync(0xffffffff, x, other);
    __syncthreads();
    if (threadIdx.x % 32 == 0) between[threadIdx.x / 32] = x;
    __syncthreads();
    return between[0] + between[1] + between[2] + between[3];
}

// One group of one picture a block of 128 threads.
extern "C" __global__ void __launch_bounds__(128) group_factors(const __grid_constant__ GroupFactors p) {
    __shared__ double between[4];
    const int group = blockIdx.x, size = p.channels / p.groups;
    const u32 picture = blockIdx.y;
    double mean, variance;
    if (p.given) {
        const float* of = (const float*)p.given + u64(picture % p.given_len) * 2 * p.groups + group;
        mean = of[0];
        variance = of[p.groups];
    } else {
        // each channel's sums are distances from a number of its own; a thread takes parts of a channel, one channel after the other
        double sum = 0., square = 0.;
        const float2* sums = (const float2*)p.sums + u64(picture) * p.parts * p.channels + group * size;
        const Place first = find(p.sides, picture, group * size);
        const double origin = load(first.data, first.kind, first.first);
        for (int i = threadIdx.x; i < size * p.parts; i += 128) {
            const int channel = i % size, part = i / size;
            const float2 of = sums[u64(part) * p.channels + channel];
            const Place at = find(p.sides, picture, group * size + channel);
            // (x - a)^2 for x - b = d: d^2 + 2 d (b - a) + (b - a)^2, over as many pixels as the part has
            const double apart = load(at.data, at.kind, at.first) - origin;
            const double pixels = (p.pixels - part + p.parts - 1) / p.parts;
            sum += of.x + pixels * apart;
            square += of.y + apart * (2. * of.x + pixels * apart);
        }
        sum = block_sum(sum, between);
        square = block_sum(square, between);
        const double n = double(p.pixels) * size;
        mean = origin + sum / n;
        variance = square / n - (sum / n) * (sum / n);
        variance = variance < 0. ? 0. : variance;
    }
    if (p.statistics) {
        if (threadIdx.x == 0) {
            float* to = (float*)p.statistics + u64(picture) * 2 * p.groups + group;
            to[0] = float(mean);
            to[p.groups] = float(variance);
        }
        return;
    }
    const double norm = 1. / sqrt(variance + double(p.eps));
    for (int channel = group * size + threadIdx.x; channel < (group + 1) * size; channel += 128) {
        const double scale = norm * ((const float*)p.weight)[channel];
        ((float2*)p.factors)[u64(picture) * p.channels + channel] = make_float2(float(scale), float(((const float*)p.bias)[channel] - mean * scale));
    }
}

struct GroupApply {
    Sides sides;
    u64 factors;
    u64 out;
    int out_kind;
    int channels;
    int rows;
    int across;
    int activation;
    float slope;
};

extern "C" __global__ void __launch_bounds__(256) group_apply(const __grid_constant__ GroupApply p) {
    const u32 row = blockIdx.x * (256 / p.across) + threadIdx.x / p.across;
    if (row >= p.rows) return;
    const u32 picture = row / p.sides.pixels, pixel = row % p.sides.pixels;
    for (int channel = threadIdx.x % p.across; channel < p.channels; channel += p.across) {
        const Place at = find(p.sides, picture, channel);
        const float2 factors = ((const float2*)p.factors)[u64(picture) * p.channels + channel];
        const float x = load(at.data, at.kind, at.first + u64(pixel) * at.step) * factors.x + factors.y;
        store(p.out, p.out_kind, u64(row) * p.channels + channel, activate(p.activation, p.slope, x));
    }
}

enum Mode { LAYER, ADAPTIVE, RMS };

struct RowNorm {
    View x;
    u64 weight; // LAYER, RMS
    u64 bias;   // LAYER
    u64 values; // ADAPTIVE: [values_len][wide * width], of which `shift` and `scale` are places counted in widths
    u64 out;
    int values_len;
    int wide;
    int shift;
    int scale;
    int pixels; // rows of a sequence
    int out_kind;
    int width;
    int rows;
    int mode;
    float eps;
};

// One row of `width` numbers a warp, eight a block.
extern "C" __global__ void __launch_bounds__(256) row_norm(const __grid_constant__ RowNorm p) {
    const u32 row = blockIdx.x * 8 + threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    if (row >= p.rows) return;
    const u64 first = u64(row) * p.width;
    const float origin = p.mode == RMS ? 0.f : at(p.x, first);
    float mean = 0.f;
    if (p.mode != RMS) {
        float sum = 0.f;
        for (int i = lane; i < p.width; i += 32) sum += at(p.x, first + i) - origin;
        mean = origin + warp_sum(sum) / p.width;
    }
    float square = 0.f;
    for (int i = lane; i < p.width; i += 32) {
        float d = at(p.x, first + i) - mean;
        square += d * d;
    }
    const float norm = 1.f / sqrtf(warp_sum(square) / p.width + p.eps);
    const float* values = (const float*)p.values + (p.mode == ADAPTIVE ? u64(row / p.pixels % p.values_len) * p.wide * p.width : 0);
    for (int i = lane; i < p.width; i += 32) {
        float x = (at(p.x, first + i) - mean) * norm;
        if (p.mode == ADAPTIVE) x = x * (1.f + values[p.scale * p.width + i]) + values[p.shift * p.width + i];
        else if (p.mode == LAYER) x = x * ((const float*)p.weight)[i] + ((const float*)p.bias)[i];
        else x *= ((const float*)p.weight)[i];
        store(p.out, p.out_kind, first + i, x);
    }
}
