// Kernels for self_test.cpp: some right, and some wrong in the way that their name says.
#pragma once

#include <cstdint>

namespace {

constexpr unsigned full_warp = 0xffffffffu;

// Right kernels

// Every thread adds up its share, shuffles add up a warp, shared memory a block.
template <class T, int threads>
__device__ T block_sum(T value) {
  __shared__ T of_warps[32];
  for (unsigned delta = 16; delta > 0; delta /= 2) value += __shfl_down_sync(full_warp, value, delta);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = value;
  __syncthreads();
  T total = T(0);
  for (int warp = 0; warp < threads / 32; ++warp) total += of_warps[warp];
  __syncthreads();
  return total;
}

template <class T, int threads>
__global__ void __launch_bounds__(threads)
    sum_kernel(const T* __restrict__ x, int64_t n, T* __restrict__ sums) {
  T mine = T(0);
  const int64_t step = static_cast<int64_t>(gridDim.x) * threads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x; i < n; i += step)
    mine += __ldg(x + i);
  const T sum = block_sum<T, threads>(mine);
  const T again = block_sum<T, threads>(T(1));  // the shared array is used twice in a block
  if (threadIdx.x == 0) sums[blockIdx.x] = sum + again - T(threads);
}

// Inclusive prefix sum within each warp.
__global__ void warp_scan_kernel(const int* x, int* scan) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  int value = x[i];
  for (unsigned delta = 1; delta < 32; delta *= 2) {
    const int before = __shfl_up_sync(full_warp, value, delta);
    if (threadIdx.x % 32 >= delta) value += before;
  }
  scan[i] = value;
}

// (rows, columns) to (columns, rows) through a tile of dynamic shared memory whose rows are one element
// longer.
__global__ void transpose_kernel(const float* from, int rows, int columns, float* to) {
  LUNGKIT_DYNAMIC_SHARED(float, tile);
  const unsigned pitch = blockDim.x + 1;
  const int row = static_cast<int>(blockIdx.y * blockDim.y + threadIdx.y);
  const int column = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (row < rows && column < columns) tile[threadIdx.y * pitch + threadIdx.x] = from[row * columns + column];
  __syncthreads();
  const int to_row = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.y);
  const int to_column = static_cast<int>(blockIdx.y * blockDim.y + threadIdx.x);
  if (to_row < columns && to_column < rows)
    to[to_row * rows + to_column] = tile[threadIdx.x * pitch + threadIdx.y];
}

// Counts in shared memory, then adds them to the output: integers, so the order of additions does not matter.
__global__ void histogram_kernel(const uint8_t* x, int64_t n, int bins, unsigned long long* counts) {
  LUNGKIT_DYNAMIC_SHARED(unsigned, local);
  for (int bin = static_cast<int>(threadIdx.x); bin < bins; bin += static_cast<int>(blockDim.x))
    local[bin] = 0;
  __syncthreads();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) atomicAdd(&local[x[i]], 1u);
  __syncthreads();
  for (int bin = static_cast<int>(threadIdx.x); bin < bins; bin += static_cast<int>(blockDim.x)) {
    if (local[bin] != 0) atomicAdd(&counts[bin], local[bin]);
  }
}

// The block that finishes last adds up what all have written.
__global__ void last_block_sum_kernel(const int* x, int* partial, unsigned* finished, int* total) {
  const int sum = block_sum<int, 64>(x[blockIdx.x * 64 + threadIdx.x]);
  __shared__ bool last;
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = sum;
    __threadfence();
    last = atomicAdd(finished, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last || threadIdx.x != 0) return;
  *total = 0;
  for (unsigned block = 0; block < gridDim.x; ++block) *total += partial[block];
}

// Which lanes and threads have an odd index, asked in six ways.
__global__ void votes_kernel(int* answers) {
  const int odd = static_cast<int>(threadIdx.x % 2);
  int* const mine = answers + 6 * threadIdx.x;
  mine[0] = static_cast<int>(__ballot_sync(full_warp, odd));
  mine[1] = __any_sync(full_warp, odd);
  mine[2] = __all_sync(full_warp, odd);
  mine[3] = __syncthreads_count(odd);
  mine[4] = __syncthreads_or(threadIdx.x == 40);
  mine[5] = __syncthreads_and(threadIdx.x < 40);
}

// Shuffled whole, which nvcc would refuse.
struct Pair {
  int16_t first;
  float second;
};

// Lane arithmetic of every shuffle in groups of 8 lanes, with values of 1, 8 and 8 bytes.
__global__ void shuffles_kernel(int* lanes) {
  const int lane = static_cast<int>(threadIdx.x);
  int* const mine = lanes + 6 * lane;
  mine[0] = __shfl_sync(full_warp, lane, 11, 8);
  mine[1] = __shfl_up_sync(full_warp, lane, 3, 8);
  mine[2] = __shfl_down_sync(full_warp, static_cast<uint8_t>(lane), 3, 8);
  mine[3] = static_cast<int>(__shfl_xor_sync(full_warp, 1e10 + lane, 5, 8) - 1e10);
  mine[4] = __shfl_xor_sync(full_warp, lane, 8, 8);
  mine[5] = static_cast<int>(__shfl_sync(full_warp, Pair{1, static_cast<float>(lane)}, -1).second);
}

// Two halves of a warp each make their own number of shuffles under their own mask.
__global__ void half_warps_kernel(int* sums) {
  const bool upper = threadIdx.x >= 16;
  const unsigned mask = upper ? 0xffff0000u : 0x0000ffffu;
  int value = static_cast<int>(threadIdx.x);
  for (int delta = upper ? 8 : 4; delta > 0; delta /= 2) value += __shfl_xor_sync(mask, value, delta);
  __syncwarp();
  sums[threadIdx.x] = value;
}

// Threads exchange through shared memory within a warp, which __syncwarp keeps in step.
__global__ void neighbour_kernel(int* neighbours) {
  __shared__ int shared[64];
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncwarp();
  neighbours[threadIdx.x] = shared[threadIdx.x ^ 1];
}

__global__ void double_first_kernel(float* x, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  x[i] *= 2.0f;
}

__global__ void sum_arguments_kernel(int by_value, float scale, float* out) {
  by_value += 1;  // a thread's own copy
  if (threadIdx.x == 3) *out = scale * static_cast<float>(by_value);
}

// Wrong kernels

template <int threads>
__global__ void missing_barrier_kernel(const float* x, float* sum) {
  __shared__ float of_warps[32];
  float value = x[threadIdx.x];
  for (unsigned delta = 16; delta > 0; delta /= 2) value += __shfl_down_sync(full_warp, value, delta);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = value;
  if (threadIdx.x != 0) return;
  *sum = 0.0f;
  for (int warp = 0; warp < threads / 32; ++warp) *sum += of_warps[warp];
}

__global__ void missing_syncwarp_kernel(int* neighbours) {
  __shared__ int shared[64];
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  neighbours[threadIdx.x] = shared[threadIdx.x ^ 1];
}

// The second loop overwrites what slower threads still have to read.
__global__ void missing_second_barrier_kernel(int rounds, int* sums) {
  __shared__ int shared[64];
  int sum = 0;
  for (int round = 0; round < rounds; ++round) {
    shared[threadIdx.x] = round * 64 + static_cast<int>(threadIdx.x);
    __syncthreads();
    sum += shared[63 - threadIdx.x];
  }
  sums[threadIdx.x] = sum;
}

__global__ void float_atomics_kernel(const float* x, float* sum) {
  atomicAdd(sum, x[blockIdx.x * blockDim.x + threadIdx.x]);
}

// Leaves a value in shared memory, or reads what nobody in its block has written.
__global__ void stale_static_kernel(bool write, unsigned* out) {
  __shared__ unsigned shared;
  if (write) shared = 7;
  *out = shared;
}

__global__ void stale_dynamic_kernel(bool write, unsigned* out) {
  LUNGKIT_DYNAMIC_SHARED(unsigned, shared);
  if (write) shared[0] = 7;
  *out = shared[0];
}

__global__ void barrier_after_exit_kernel() {
  if (threadIdx.x >= 7) return;
  __syncthreads();
}

__global__ void two_barriers_kernel() {
  if (threadIdx.x < 7) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void exited_lane_kernel(float* out) {
  if (threadIdx.x < 8) *out = __shfl_down_sync(full_warp, 1.0f, 4);
}

__global__ void source_outside_mask_kernel(float* out) {
  if (threadIdx.x < 8) *out = __shfl_down_sync(0xffu, 1.0f, 4);
}

__global__ void caller_outside_mask_kernel(float* out) {
  *out = __shfl_sync(0xffu, 1.0f, 0);
}

__global__ void missing_lane_kernel(float* out) {
  *out = __shfl_sync(full_warp, 1.0f, 31);
}

__global__ void two_shuffles_kernel(float* out) {
  if (threadIdx.x < 16) {
    *out = __shfl_sync(full_warp, 1.0f, 0);
  } else {
    *out = __shfl_sync(full_warp, 2.0f, 0);
  }
}

__global__ void barrier_against_shuffle_kernel(float* out) {
  if (threadIdx.x < 16) {
    *out = __shfl_sync(full_warp, 1.0f, 0);
  } else {
    __syncthreads();
  }
}

__global__ void two_masks_kernel(float* out) {
  *out = __shfl_sync(threadIdx.x < 16 ? full_warp : 0xffff0000u, 1.0f, 20);
}

__global__ void odd_width_kernel(float* out) {
  *out = __shfl_sync(full_warp, 1.0f, 0, 12);
}

__global__ void trap_kernel() {
  if (threadIdx.x == 5) __trap();
}

__global__ void store_behind_global_kernel(float* x) {
  x[blockIdx.x * blockDim.x + threadIdx.x] = 1.0f;
}

__global__ void store_behind_dynamic_kernel(int shift) {
  LUNGKIT_DYNAMIC_SHARED(float, shared);
  shared[static_cast<int>(threadIdx.x) + shift] = 1.0f;
}

__global__ void store_behind_static_kernel(int shift, float* out) {
  __shared__ float shared[64];
  shared[static_cast<int>(threadIdx.x) + shift] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = shared[63 - threadIdx.x];
}

__global__ void signed_overflow_kernel(int value, int* out) {
  *out = value * static_cast<int>(blockDim.x);
}

__global__ void misaligned_load_kernel(const float* x, float* out) {
  *out = reinterpret_cast<const float4*>(x + threadIdx.x)->x;
}

// Overruns the thread's stack.
__device__ __attribute__((noinline)) int deep(volatile int* depth) {
  volatile char frame[1024];
  frame[0] = static_cast<char>(*depth);
  *depth = *depth + 1;
  return *depth < 0 ? frame[0] : deep(depth) + frame[0];
}

__global__ void endless_recursion_kernel(int* out) {
  volatile int depth = 0;
  *out = deep(&depth);
}

}  // namespace
