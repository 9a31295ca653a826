// Force-included into the CUDA sources of MegaBlocks 0.10.0 (NVCC_APPEND_FLAGS="-include <this file>").
//
// Why: csrc/cumsum.h passes a 7th argument, debug_synchronous, to cub::DeviceScan::ExclusiveSum and InclusiveSum. CUB 3,
// part of every CUDA 13 toolkit, no longer has these overloads, and MegaBlocks 0.10.0 does not compile.
// Upstream: https://github.com/NVIDIA/cccl/issues/3329 (removed on purpose, by https://github.com/NVIDIA/cccl/pull/3330).
//
// What: where CUB is 3 or newer, `DeviceScan` becomes a struct derived from CUB's own, with the two old overloads added.
// They drop the argument, which only ever asked for a synchronization after the kernel. Older CUB is left alone.
#pragma once

#ifdef __CUDACC__  // nvcc, and the tests' stand-in

// MegaBlocks defines this before it includes CUB; here CUB is included first.
#ifndef CUB_WRAPPED_NAMESPACE
#define CUB_WRAPPED_NAMESPACE megablocks
#endif

#include <cub/version.cuh>

#if CUB_VERSION >= 300000

#include <cub/cub.cuh>

namespace CUB_WRAPPED_NAMESPACE {
namespace cub {

struct DeviceScanWithDebugFlag : DeviceScan {
  using DeviceScan::ExclusiveSum;
  using DeviceScan::InclusiveSum;

  template <typename In, typename Out, typename Count>
  static cudaError_t ExclusiveSum(void* scratch, size_t& bytes, In in, Out out, Count count, cudaStream_t stream, bool) {
    return DeviceScan::ExclusiveSum(scratch, bytes, in, out, count, stream);
  }

  template <typename In, typename Out, typename Count>
  static cudaError_t InclusiveSum(void* scratch, size_t& bytes, In in, Out out, Count count, cudaStream_t stream, bool) {
    return DeviceScan::InclusiveSum(scratch, bytes, in, out, count, stream);
  }
};

}  // namespace cub
}  // namespace CUB_WRAPPED_NAMESPACE

#define DeviceScan DeviceScanWithDebugFlag

#endif  // CUB 3
#endif  // __CUDACC__
