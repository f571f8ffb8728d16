// What the half types' kernels ask of the hardware beyond CUDA C++: products of 16 x 16 by 16 x 8 blocks,
// loads of their operands from shared memory, and copies that run on while the warp computes. On devices
// before compute capability 8.0 the kernels are not launched. The emulator has forms of its own
// (tests/cuda_on_cpu/tensor_cores.h), which follow the same layouts of the operands over the lanes.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "dispatch.h"

namespace lungkit {

struct alignas(16) Bytes16 {
  uint32_t word[4];
};

#ifdef LUNGKIT_EMULATE

template <class Stored>
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  lungkit_emulator::multiply_add<Stored>(sum, a, b);
}
template <bool transposed>
void load_blocks(uint32_t (&blocks)[4], const void* row) {
  lungkit_emulator::load_blocks(blocks, row, transposed);
}
inline void copy_later(void* shared, const void* global, bool wanted) {
  lungkit_emulator::copy_later(shared, global, wanted);
}
inline void close_copies() {
  lungkit_emulator::close_copies();
}
template <int open>
void wait_for_copies() {
  lungkit_emulator::wait_for_copies(open);
}
template <class Stored>
uint32_t pack(float low, float high) {
  const Stored pair[2] = {static_cast<Stored>(low), static_cast<Stored>(high)};
  uint32_t bits;
  memcpy(&bits, pair, sizeof bits);
  return bits;
}
template <class Stored>
float2 unpack(uint32_t bits) {
  Stored pair[2];
  memcpy(pair, &bits, sizeof bits);
  return {static_cast<float>(pair[0]), static_cast<float>(pair[1])};
}

#else

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define LUNGKIT_SM80_ASM(...) asm volatile(__VA_ARGS__)
#else
#define LUNGKIT_SM80_ASM(...) __trap()
#endif

// sum += A B. With g = lane / 4 and t = lane % 4 a lane holds of A the pairs (row g, columns 2t, 2t + 1), (g
// + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8); of B (rows 2t, 2t + 1; column g) and (2t + 8; g); of the sum (g,
// 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
template <class Stored>
__device__ __forceinline__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<Stored, Half>) {
    LUNGKIT_SM80_ASM(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    LUNGKIT_SM80_ASM(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// Four 8 x 8 blocks of 2-byte elements. Lane 8 j + r gives the address of row r of block j (16 bytes,
// aligned); every lane gets of each block the pair (g; 2t, 2t + 1) or, transposed, (2t, 2t + 1; g).
template <bool transposed>
__device__ __forceinline__ void load_blocks(uint32_t (&blocks)[4], const void* row) {
  [[maybe_unused]] const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (transposed) {
    LUNGKIT_SM80_ASM("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(blocks[0]), "=r"(blocks[1]), "=r"(blocks[2]), "=r"(blocks[3])
                     : "r"(address)
                     : "memory");
  } else {
    LUNGKIT_SM80_ASM("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(blocks[0]), "=r"(blocks[1]), "=r"(blocks[2]), "=r"(blocks[3])
                     : "r"(address)
                     : "memory");
  }
}

// 16 bytes from global to shared memory, zeros where they are not wanted; complete after wait_for_copies().
__device__ __forceinline__ void copy_later(void* shared, const void* global, bool wanted) {
  [[maybe_unused]] const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  [[maybe_unused]] const int bytes = wanted ? 16 : 0;
  LUNGKIT_SM80_ASM("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                   :
                   : "r"(address), "l"(global), "r"(bytes)
                   : "memory");
}
__device__ __forceinline__ void close_copies() {
  LUNGKIT_SM80_ASM("cp.async.commit_group;" ::: "memory");
}
// Waits until at most `open` of this thread's closed groups of copies are on their way.
template <int open>
__device__ __forceinline__ void wait_for_copies() {
  LUNGKIT_SM80_ASM("cp.async.wait_group %0;" ::"n"(open) : "memory");
}

template <class Stored>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t bits = 0;
  if constexpr (std::is_same_v<Stored, Half>) {
    LUNGKIT_SM80_ASM("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  } else {
    LUNGKIT_SM80_ASM("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  }
  return bits;
}
template <class Stored>
__device__ __forceinline__ float2 unpack(uint32_t bits) {
  if constexpr (std::is_same_v<Stored, Half>) {
    float2 pair;
    asm("{.reg .f16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}"
        : "=f"(pair.x), "=f"(pair.y)
        : "r"(bits));
    return pair;
  } else {
    return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u)};
  }
}

#endif

// The operands of multiply_add from a matrix in shared memory whose rows start on 16 bytes. `by_depth`: its
// rows run along the depth of the product; otherwise along the rows of A, or the columns of B.
template <bool by_depth, class Stored>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const Stored* matrix, int stride, int row,
                                       int depth) {
  const int lane = threadIdx.x % 32, first = lane & 8, second = (lane & 16) / 2, r = lane & 7;
  const Stored* from = by_depth ? matrix + (depth + second + r) * stride + row + first
                                : matrix + (row + first + r) * stride + depth + second;
  load_blocks<by_depth>(a, from);
}
// Two blocks of columns, b[0 .. 1] and b[2 .. 3].
template <bool by_depth, class Stored>
__device__ __forceinline__ void load_b(uint32_t (&b)[2][2], const Stored* matrix, int stride, int depth,
                                       int column) {
  const int lane = threadIdx.x % 32, first = lane & 8, second = (lane & 16) / 2, r = lane & 7;
  const Stored* from = by_depth ? matrix + (depth + first + r) * stride + column + second
                                : matrix + (column + second + r) * stride + depth + first;
  uint32_t blocks[4];
  load_blocks<by_depth>(blocks, from);
  b[0][0] = blocks[0];
  b[0][1] = blocks[1];
  b[1][0] = blocks[2];
  b[1][1] = blocks[3];
}

}  // namespace lungkit
