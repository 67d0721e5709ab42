// Functions that compile for the host, and by nvcc for the device too.
#pragma once

#ifdef __CUDACC__
#define QAT_HD __host__ __device__ inline
#else
#define QAT_HD inline
#endif
