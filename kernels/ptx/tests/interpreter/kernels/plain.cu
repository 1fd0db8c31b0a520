// What the compiler makes of functions, divisions, switches, local arrays, calls, constants and reductions.
typedef unsigned int u32;
typedef long long s64;

extern "C" __global__ void unary(const float *__restrict__ x, float *__restrict__ y, int n, int what) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  float v = x[i], r = 0;
  switch (what) {
  case 0: r = erff(v); break;
  case 1: r = expf(v); break;
  case 2: r = sinf(v); break;
  case 3: r = cosf(v); break;
  case 4: r = logf(v); break;
  case 5: r = tanhf(v); break;
  case 6: r = sqrtf(v); break;
  case 7: r = rsqrtf(v); break;
  case 8: r = v / 1.3f; break;
  case 9: r = rintf(v) + floorf(v) + ceilf(v); break;
  }
  y[i] = r;
}

extern "C" __global__ void divisions(const int *__restrict__ a, const int *__restrict__ b, int *o, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  int p = a[i], q = b[i];
  s64 wide = (s64)p * 1000003 + q;
  o += i * 8;
  o[0] = p / q, o[1] = p % q, o[2] = (u32)p / (u32)q, o[3] = (u32)p % (u32)q;
  o[4] = (int)(wide / q), o[5] = (int)(wide % q), o[6] = p / 7, o[7] = (u32)p % 10u;
}

extern "C" __global__ void walk(const float *x, float *y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  float a[16], s = 0;
#pragma unroll 1
  for (int j = 0; j < 16; j++) a[j] = x[(i * 16 + j) % n];
  u32 c = 0;
#pragma unroll 1
  for (int j = 0; j < 100; j++) {
    u32 k = __float_as_uint(a[c]) % 16u;
    float sum = a[k] + a[c];
    a[c] = sum * 0.5f;
    c = (k + 1) % 16;
    if (sum > 1.5f) break;
  }
#pragma unroll 1
  for (int j = 0; j < 16; j++) s += a[j];
  y[i] = s;
}

__constant__ float table[8] = {1, 2, 3, 4, 5, 6, 7, 8.5f};
__device__ u32 calls = 5;
__device__ __noinline__ float power(float x, int n) {
  float s = x;
  for (int i = 0; i < n; i++) s = s * x + 1.f;
  return s;
}
extern "C" __global__ void call(float *y, int n) {
  y[threadIdx.x] = power(table[threadIdx.x & 7] * 0.125f, n);
  atomicAdd(&calls, 1u);
  if (threadIdx.x == 0) y[blockDim.x] = (float)atomicAdd(&calls, 0u);
}

extern "C" __global__ void __launch_bounds__(128) layer_norm(const float *__restrict__ x, const float *__restrict__ g, const float *__restrict__ b, float *__restrict__ y, int c, float eps) {
  __shared__ float part[4], stat[2];
  const float *r = x + (size_t)blockIdx.x * c;
  float mean = 0;
#pragma unroll 1
  for (int pass = 0; pass < 2; pass++) {
    float s = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < c; i += blockDim.x) s += pass ? (r[i] - mean) * (r[i] - mean) : r[i];
    for (int o = 16; o; o >>= 1) s += __shfl_xor_sync(~0u, s, o);
    if ((threadIdx.x & 31) == 0) part[threadIdx.x >> 5] = s;
    __syncthreads();
    if (threadIdx.x == 0) stat[pass] = (part[0] + part[1] + part[2] + part[3]) / c;
    __syncthreads();
    mean = stat[0];
  }
  float q = rsqrtf(stat[1] + eps);
#pragma unroll 1
  for (int i = threadIdx.x; i < c; i += blockDim.x) y[(size_t)blockIdx.x * c + i] = (r[i] - mean) * q * g[i] + b[i];
}

extern "C" __global__ void count(u32 *bins, float *sum, const u32 *x, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  atomicAdd(bins + (x[i] & 15), 1u);
  atomicMax(bins + 16, x[i]);
  atomicAdd(sum, (float)(x[i] & 255));
  u32 odd = __ballot_sync(__activemask(), x[i] & 1);
  if ((threadIdx.x & 31) == 0) atomicAdd(bins + 17, __popc(odd));
}
