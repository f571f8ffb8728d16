// Compiles CUDA kernels with g++ and runs them on the CPU, thread by thread, so that a machine without a GPU
// can test them: arithmetic, indexing, barriers, warp collectives, shared memory and the code that launches
// them.
//
//   g++ -x c++ -std=c++20 -DLUNGKIT_EMULATE -include cuda_on_cpu.h kernel.cu
//
//   lungkit_emulator::launch("scale", grid, block, shared_bytes, [&] { scale(x, n); });
//
// One fibre a CUDA thread, one block after another. A thread runs until it waits at a barrier or in a warp
// collective; which one runs next is the order: forward, reverse or random. README.md says what this finds
// and what it cannot.
#pragma once

#include "approximations.h"
#include "collectives.h"
#include "device_functions.h"
#include "launch.h"
#include "runtime_api.h"
#include "tensor_cores.h"
#include "types.h"
