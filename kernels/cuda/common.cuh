// What all kernels share: numbers of two types, the pieces of tensor-core products, activations.
//
// Values are channels-last, `[batch, pixels, channels]`, and lie where the plan has put them; a value with fewer entries than its reader repeats.
// No header of CUDA's own is needed: NVRTC compiles each file as it stands. The structs are those of `src/plan/gpu/args.rs`, field by field.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

enum Kind { F32 = 0, BF16 = 1 };

// Numbers of a value: how many there are, and of what kind.
struct View {
    u64 data;
    u64 len;
    int kind;
    int channels;
};

__device__ __forceinline__ float wide(u16 bits) { return __uint_as_float(u32(bits) << 16); }

// Rounded to nearest even; what is not a number stays so.
__device__ __forceinline__ u16 narrow(float x) {
    u16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

// Two numbers as the processor wants operands: the first in the lower half.
__device__ __forceinline__ u32 narrow2(float low, float high) {
    u32 bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000); }

__device__ __forceinline__ float load(u64 data, int kind, u64 i) {
    return kind == BF16 ? wide(((const u16*)data)[i]) : ((const float*)data)[i];
}

__device__ __forceinline__ void store(u64 data, int kind, u64 i, float x) {
    if (kind == BF16) ((u16*)data)[i] = narrow(x);
    else ((float*)data)[i] = x;
}

// Number `i` of a value, which repeats beyond its end.
__device__ __forceinline__ float at(const View& x, u64 i) {
    if (i >= x.len) i %= x.len;
    return load(x.data, x.kind, i);
}

// As `crate::op::Activation`, in its order.
enum Activation { NONE, SILU, GELU, GELU_TANH, QUICK_GELU, MISH, RELU, LEAKY, SIGMOID };

__device__ __forceinline__ float leaky(float x, float slope) { return x < 0.f ? x * slope : x; }

__device__ __forceinline__ float gelu(float x) { return 0.5f * x * (1.f + erff(x * 0.70710678118654752f)); }

__device__ __forceinline__ float activate(int activation, float slope, float x) {
    switch (activation) {
        case SILU: return x / (1.f + expf(-x));
        case GELU: return gelu(x);
        case GELU_TANH: return x / (1.f + expf(-1.5957691216057308f * (x + 0.044715f * x * x * x)));
        case QUICK_GELU: return x / (1.f + expf(-1.702f * x));
        case MISH: {
            // beyond 20 the tanh is 1 to the last bit
            float n = expf(fminf(x, 20.f));
            float m = n * (n + 2.f);
            return x * (m / (m + 2.f));
        }
        // not fmaxf, which turns what is not a number into 0
        case RELU: return x < 0.f ? 0.f : x;
        case LEAKY: return leaky(x, slope);
        case SIGMOID: return 1.f / (1.f + expf(-x));
        default: return x;
    }
}

// The address of shared memory as instructions take it.
__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Copies 16 bytes to shared memory in the background, the last `16 - bytes` of them zeros.
__device__ __forceinline__ void copy16(u32 to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(__cvta_generic_to_global(from)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copies_end() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all groups of copies but the last `N`.
template <int N> __device__ __forceinline__ void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// Four 8x8 matrices; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void matrices(u32 (&r)[4], u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(from) : "memory");
}
__device__ __forceinline__ void matrices_transposed(u32 (&r)[4], u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(from) : "memory");
}

// c += a b for a [16, 16], b [16, 8]: lane l holds of c rows l / 4 and l / 4 + 8, columns l % 4 * 2 and the next.
__device__ __forceinline__ void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The sum over a warp, in every lane.
__device__ __forceinline__ float warp_sum(float x) {
    for (int other = 16; other; other /= 2) x += __shfl_xor_sync(0xffffffff, x, other);
    return x;
}
