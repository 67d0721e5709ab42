// What launch.h needs of CUDA, for the emulation.
#pragma once

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline const char* cudaGetErrorString(cudaError_t) { return "an emulated error"; }
