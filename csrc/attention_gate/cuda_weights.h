// Adds up the blocks' parts of the gradients of the weights: a thread a slice of the blocks, then the slices,
// in an order that depends on the number of blocks alone.
#pragma once

#include <cstdint>

namespace lungkit {

constexpr int weights_columns = 32, weights_slices = 16;

template <class Weight>
__global__ void __launch_bounds__(weights_columns* weights_slices)
    gate_weights_kernel(const float* __restrict__ partial, int blocks, int product, int inner,
                        Weight* __restrict__ grad_w_x, Weight* __restrict__ grad_w_psi,
                        Weight* __restrict__ grad_b_psi) {
  __shared__ double of_slice[weights_slices][weights_columns];
  const int column = threadIdx.x % weights_columns, slice = threadIdx.x / weights_columns;
  const int width = product + inner + 1, k = blockIdx.x * weights_columns + column;
  double sum = 0;
  if (k < width) {
#pragma unroll 8
    for (int b = slice; b < blocks; b += weights_slices) {
      sum += static_cast<double>(partial[static_cast<int64_t>(b) * width + k]);
    }
  }
  of_slice[slice][column] = sum;
  __syncthreads();
  if (slice != 0 || k >= width) return;
#pragma unroll
  for (int s = 1; s < weights_slices; ++s) sum += of_slice[s][column];
  const auto value = static_cast<Weight>(static_cast<float>(sum));
  if (k < product) {
    if (grad_w_x != nullptr) grad_w_x[k] = value;
  } else if (grad_w_psi != nullptr) {
    if (k < product + inner) {
      grad_w_psi[k - product] = value;
    } else {
      *grad_b_psi = value;
    }
  }
}

}  // namespace lungkit
