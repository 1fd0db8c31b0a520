// o = softmax(q · kᵀ · scale) · v with an online softmax: one head of 16 per blockIdx.y, bf16, two warps of 16 rows, 16 keys a step.
typedef unsigned short u16;
typedef unsigned int u32;
#define D 16

__device__ __forceinline__ u32 address(const void *p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ u32 pair(float low, float high) {
  u32 out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(out) : "f"(high), "f"(low));
  return out;
}
__device__ __forceinline__ void product(float *c, const u32 *a, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

extern "C" __global__ void __launch_bounds__(64) attention(const u16 *__restrict__ q, const u16 *__restrict__ k, const u16 *__restrict__ v, u16 *__restrict__ o, int s, float scale) {
  __shared__ __align__(16) u16 keys[16 * D], values[16 * D];
  const float none = __int_as_float(0xff800000);
  size_t head = (size_t)blockIdx.y * s * D;
  q += head, k += head, v += head, o += head;
  int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, r0 = blockIdx.x * 32 + (threadIdx.x >> 5) * 16;
  u32 a[4];
#pragma unroll
  for (int h = 0; h < 4; h++) {
    int r = r0 + g + (h & 1) * 8;
    a[h] = r < s ? *(const u32 *)(q + (size_t)r * D + t * 2 + (h >> 1) * 8) : 0u;
  }
  float acc[2][4] = {}, most[2] = {none, none}, sum[2] = {0, 0};
#pragma unroll 1
  for (int j0 = 0; j0 < s; j0 += 16) {
    __syncthreads();
    {
      int r = (threadIdx.x & 31) >> 1, c = threadIdx.x & 1, inside = j0 + r < s;
      size_t from = (size_t)(inside ? j0 + r : 0) * D + c * 8;
      u16 *to = (threadIdx.x < 32 ? keys : values) + r * D + c * 8;
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address(to)), "l"((threadIdx.x < 32 ? k : v) + from), "r"(inside ? 16 : 0));
      asm volatile("cp.async.commit_group;\ncp.async.wait_group 0;\n");
    }
    __syncthreads();
    float p[2][4] = {};
#pragma unroll
    for (int n = 0; n < 2; n++) {
      u32 b0, b1;
      asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];\n" : "=r"(b0), "=r"(b1) : "r"(address(keys + (n * 8 + (lane & 7)) * D + ((lane >> 3) & 1) * 8)));
      product(p[n], a, b0, b1);
#pragma unroll
      for (int h = 0; h < 4; h++) p[n][h] = j0 + n * 8 + t * 2 + (h & 1) < s ? p[n][h] * scale : none;
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float m = fmaxf(fmaxf(most[h], fmaxf(p[0][h * 2], p[0][h * 2 + 1])), fmaxf(p[1][h * 2], p[1][h * 2 + 1]));
      m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
      m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
      float f = __expf(most[h] - m);
      most[h] = m, sum[h] *= f;
#pragma unroll
      for (int n = 0; n < 2; n++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          acc[n][h * 2 + i] *= f;
          p[n][h * 2 + i] = __expf(p[n][h * 2 + i] - m);
          sum[h] += p[n][h * 2 + i];
        }
    }
    u32 x[4] = {pair(p[0][0], p[0][1]), pair(p[0][2], p[0][3]), pair(p[1][0], p[1][1]), pair(p[1][2], p[1][3])};
#pragma unroll
    for (int n = 0; n < 2; n++) {
      u32 b0, b1;
      asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];\n" : "=r"(b0), "=r"(b1) : "r"(address(values + (lane & 15) * D + n * 8)));
      product(acc[n], x, b0, b1);
    }
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
    sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
    float scale = 1.f / sum[h];
    int r = r0 + g + h * 8;
    if (r < s)
      for (int n = 0; n < 2; n++) *(u32 *)(o + (size_t)r * D + n * 8 + t * 2) = pair(acc[n][h * 2] * scale, acc[n][h * 2 + 1] * scale);
  }
}
