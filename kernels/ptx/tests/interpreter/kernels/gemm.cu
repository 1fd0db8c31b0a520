// C[M, N] = A[M, K] · B[N, K]ᵀ: bf16 in, f32 out. Tiles of 64 × 64 × 32 in four warps, three stages of cp.async, swizzled rows.
typedef unsigned short u16;
typedef unsigned int u32;
#define BM 64
#define BN 64
#define BK 32
#define STAGES 3

__device__ __forceinline__ u32 address(const void *p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ int place(int row, int piece) { return row * BK + ((piece ^ ((row >> 1) & 3)) << 3); }

__device__ __forceinline__ void tile(u16 *to, const u16 *from, int first, int rows, int k0, int K) {
#pragma unroll 1
  for (int i = threadIdx.x; i < 64 * BK / 8; i += 128) {
    int r = i >> 2, c = i & 3, inside = first + r < rows && k0 + c * 8 < K;
    const u16 *source = from + (size_t)(inside ? first + r : 0) * K + (inside ? k0 + c * 8 : 0);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address(to + place(r, c))), "l"(source), "r"(inside ? 16 : 0));
  }
}

extern "C" __global__ void __launch_bounds__(128) gemm(const u16 *__restrict__ A, const u16 *__restrict__ B, float *__restrict__ C, int M, int N, int K) {
  extern __shared__ __align__(128) u16 smem[];
  u16 *a_tiles = smem, *b_tiles = smem + STAGES * BM * BK;
  int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, wm = warp & 1, wn = warp >> 1;
  int m0 = blockIdx.y * BM, n0 = blockIdx.x * BN, steps = (K + BK - 1) / BK;
  float acc[2][4][4] = {};
#pragma unroll 1
  for (int s = 0; s < STAGES - 1; s++) {
    if (s < steps) {
      tile(a_tiles + s * BM * BK, A, m0, M, s * BK, K);
      tile(b_tiles + s * BN * BK, B, n0, N, s * BK, K);
    }
    asm volatile("cp.async.commit_group;\n");
  }
#pragma unroll 1
  for (int step = 0; step < steps; step++) {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(STAGES - 2));
    __syncthreads();
    int ahead = step + STAGES - 1;
    if (ahead < steps) {
      tile(a_tiles + ahead % STAGES * BM * BK, A, m0, M, ahead * BK, K);
      tile(b_tiles + ahead % STAGES * BN * BK, B, n0, N, ahead * BK, K);
    }
    asm volatile("cp.async.commit_group;\n");
    const u16 *sa = a_tiles + step % STAGES * BM * BK, *sb = b_tiles + step % STAGES * BN * BK;
#pragma unroll 1
    for (int half = 0; half < 2; half++) {
      u32 a[2][4], b[2][4];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        int r = wm * 32 + i * 16 + (lane & 15), c = half * 2 + (lane >> 4);
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                     : "=r"(a[i][0]), "=r"(a[i][1]), "=r"(a[i][2]), "=r"(a[i][3]) : "r"(address(sa + place(r, c))));
        r = wn * 32 + i * 16 + (lane & 7) + ((lane >> 4) << 3), c = half * 2 + ((lane >> 3) & 1);
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                     : "=r"(b[i][0]), "=r"(b[i][1]), "=r"(b[i][2]), "=r"(b[i][3]) : "r"(address(sb + place(r, c))));
      }
#pragma unroll
      for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
          asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
                       : "+f"(acc[i][j][0]), "+f"(acc[i][j][1]), "+f"(acc[i][j][2]), "+f"(acc[i][j][3])
                       : "r"(a[i][0]), "r"(a[i][1]), "r"(a[i][2]), "r"(a[i][3]), "r"(b[j >> 1][(j & 1) * 2]), "r"(b[j >> 1][(j & 1) * 2 + 1]));
    }
  }
  asm volatile("cp.async.wait_all;\n");
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) {
      int r = m0 + wm * 32 + i * 16 + (lane >> 2), c = n0 + wn * 32 + j * 8 + (lane & 3) * 2;
#pragma unroll
      for (int h = 0; h < 2; h++)
        if (r + h * 8 < M && c < N) *(float2 *)(C + (size_t)(r + h * 8) * N + c) = make_float2(acc[i][j][h * 2], acc[i][j][h * 2 + 1]);
    }
}
