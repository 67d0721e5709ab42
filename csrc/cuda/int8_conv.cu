// Convolution of 8-bit codes as an implicit matrix product on tensor cores, the requantization fused.
//
// mma.sync.m16n8k32, sm_80 and later; Hopper runs it too (wgmma is not used). A block computes tile_m pixels of tile_n
// channels, `stages` tiles of 64 columns in flight by cp.async. Sums are exact integers modulo 2^32.
#include "device.cuh"
#include "fragments.h"
#include "launch.h"

namespace qat::cuda {
namespace {

struct Task {
  const uint8_t* x;
  const int8_t* weight;
  const int32_t* bias;
  const float* multiplier;
  const uint8_t* residual;
  uint8_t* y;
  ConvShape shape;
  Requantize requantize;
  uint32_t padding;  // the zero point in each of four bytes
  bool whole_rows;   // 16 bytes of y at a time
};

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

template <int bytes>
__device__ inline void copy_async(uint8_t* to, const void* from) {
  if constexpr (bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from) : "memory");
  }
}

__device__ inline void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int pending>
__device__ inline void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

__device__ inline void load_matrices(uint32_t (&r)[4], const uint8_t* at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(at))
               : "memory");
}

template <bool x_signed>
__device__ inline void multiply(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (x_signed) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

template <int tile_m_, int tile_n_, int warps_m_, int warps_n_, int stages_>
struct Tile {
  static constexpr int m = tile_m_, n = tile_n_, warps_m = warps_m_, warps_n = warps_n_, stages = stages_;
  static constexpr int threads = 32 * warps_m * warps_n;
  static constexpr int warp_m = m / warps_m, warp_n = n / warps_n;
  static constexpr int steps_m = warp_m / mma_m, steps_n = warp_n / mma_n;
  static constexpr int stage_bytes = (m + n) * tile_k;
  static constexpr int y_stride = n + chunk;  // rows of the result in other banks
  static constexpr int shared = stages * stage_bytes > m * y_stride ? stages * stage_bytes : m * y_stride;
  static_assert(m * chunks % threads == 0 && n * chunks % threads == 0 && warp_n % 16 == 0);
};

// One chunk of 16 columns of the left operand, `width` bytes at a time.
template <int width>
__device__ inline void fill_chunk(uint8_t* to, const Task& t, const Row& row, int32_t group, int32_t k) {
  if constexpr (width == 1) {
    uint32_t words[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      words[w] = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Element e = gather(t.shape, row, group, k + 4 * w + i);
        const uint32_t byte = e.source == Source::memory ? t.x[e.offset]
                              : e.source == Source::padding ? t.padding & 0xffu : 0u;
        words[w] |= byte << (8 * i);
      }
    }
    *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
  } else {
#pragma unroll
    for (int i = 0; i < chunk; i += width) {
      const Element e = gather(t.shape, row, group, k + i);
      if (e.source == Source::memory) {
        copy_async<width>(to + i, t.x + e.offset);
        continue;
      }
      const uint32_t word = e.source == Source::padding ? t.padding : 0u;
#pragma unroll
      for (int b = 0; b < width; b += 4) *reinterpret_cast<uint32_t*>(to + i + b) = word;
    }
  }
}

// One chunk of a row of weights.
template <int width>
__device__ inline void fill_weights(uint8_t* to, const int8_t* row, bool exists, int32_t k, int32_t depth) {
  if constexpr (width == 1) {
    uint32_t words[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      words[w] = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int32_t at = k + 4 * w + i;
        const uint32_t byte = exists && at < depth ? static_cast<uint8_t>(row[at]) : 0u;
        words[w] |= byte << (8 * i);
      }
    }
    *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
  } else {
#pragma unroll
    for (int i = 0; i < chunk; i += width) {
      if (exists && k + i < depth) {
        copy_async<width>(to + i, row + k + i);
        continue;
      }
#pragma unroll
      for (int b = 0; b < width; b += 4) *reinterpret_cast<uint32_t*>(to + i + b) = 0;
    }
  }
}

// The tile of codes in shared memory to y, with the residual.
template <class T>
__device__ inline void write_tile(const Task& t, const uint8_t* codes, int64_t first_m, int32_t first_n, int32_t group) {
  const ConvShape& s = t.shape;
  const int64_t pitch = int64_t{s.groups} * s.outputs;
  constexpr int pieces = T::n / chunk;
  for (int i = threadIdx.x; i < T::m * pieces; i += T::threads) {
    const int row = i / pieces, column = i % pieces * chunk;
    const int64_t m = first_m + row;
    const int32_t n = first_n + column;
    if (m >= s.rows() || n >= s.outputs) continue;
    const int64_t at = m * pitch + int64_t{group} * s.outputs + n;
    uint4 words = *reinterpret_cast<const uint4*>(codes + row * T::y_stride + column);
    uint4 others = make_uint4(0, 0, 0, 0);
    auto* own = reinterpret_cast<uint8_t*>(&words);
    auto* other = reinterpret_cast<uint8_t*>(&others);
    const int count = s.outputs - n < chunk ? s.outputs - n : chunk;
    if (t.requantize.add) {
      if (t.whole_rows) others = *reinterpret_cast<const uint4*>(t.residual + at);
#pragma unroll
      for (int b = 0; b < chunk; ++b) {
        if (!t.whole_rows && b < count) other[b] = t.residual[at + b];
        const int32_t own_code = code_of(own[b], t.requantize.y_signed);
        own[b] = static_cast<uint8_t>(
            add_codes(own_code, code_of(other[b], t.requantize.residual_signed), t.requantize));
      }
    }
    if (t.whole_rows) {
      *reinterpret_cast<uint4*>(t.y + at) = words;
      continue;
    }
#pragma unroll
    for (int b = 0; b < chunk; ++b) {
      if (b < count) t.y[at + b] = own[b];
    }
  }
}

template <class T, int width, bool x_signed>
__global__ void __launch_bounds__(T::threads) conv(const __grid_constant__ Task t) {
  extern __shared__ __align__(128) uint8_t memory[];
  const ConvShape& s = t.shape;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp % T::warps_m * T::warp_m, warp_column = warp / T::warps_m * T::warp_n;
  const auto group = static_cast<int32_t>(blockIdx.z);
  const int64_t first_m = int64_t{blockIdx.x} * T::m;
  const int32_t first_n = static_cast<int32_t>(blockIdx.y) * T::n;
  const int32_t depth = s.depth(), tiles = (depth + tile_k - 1) / tile_k;

  constexpr int a_chunks = T::m * chunks / T::threads, b_chunks = T::n * chunks / T::threads;
  Row rows[a_chunks];
#pragma unroll
  for (int i = 0; i < a_chunks; ++i) rows[i] = row_of(s, first_m + (threadIdx.x + i * T::threads) / chunks);

  const auto fill = [&](int tile) {
    uint8_t* a = memory + tile % T::stages * T::stage_bytes;
    uint8_t* b = a + T::m * tile_k;
#pragma unroll
    for (int i = 0; i < a_chunks; ++i) {
      const int c = threadIdx.x + i * T::threads;
      fill_chunk<width>(a + tile_offset(c / chunks, c % chunks), t, rows[i], group,
                        tile * tile_k + c % chunks * chunk);
    }
#pragma unroll
    for (int i = 0; i < b_chunks; ++i) {
      const int c = threadIdx.x + i * T::threads;
      const int32_t n = first_n + c / chunks;
      const int8_t* row = t.weight + (int64_t{group} * s.outputs + n) * depth;
      fill_weights<width>(b + tile_offset(c / chunks, c % chunks), row, n < s.outputs,
                          tile * tile_k + c % chunks * chunk, depth);
    }
  };

  int32_t sums[T::steps_m][T::steps_n][4] = {};
#pragma unroll
  for (int i = 0; i < T::stages - 1; ++i) {
    if (i < tiles) fill(i);
    commit();
  }
  for (int tile = 0; tile < tiles; ++tile) {
    wait<T::stages - 2>();
    __syncthreads();  // this tile is here, and nobody reads the one that is filled next
    if (tile + T::stages - 1 < tiles) fill(tile + T::stages - 1);
    commit();
    const uint8_t* a = memory + tile % T::stages * T::stage_bytes;
    const uint8_t* b = a + T::m * tile_k;
#pragma unroll
    for (int k = 0; k < tile_k / mma_k; ++k) {
      uint32_t left[T::steps_m][4], right[T::steps_n / 2][4];
      const Position from_a = a_source(lane), from_b = b_source(lane);
#pragma unroll
      for (int i = 0; i < T::steps_m; ++i) {
        load_matrices(left[i], a + tile_offset(warp_row + i * mma_m + from_a.row, 2 * k + from_a.column));
      }
#pragma unroll
      for (int j = 0; j < T::steps_n / 2; ++j) {
        load_matrices(right[j], b + tile_offset(warp_column + j * 16 + from_b.row, 2 * k + from_b.column));
      }
#pragma unroll
      for (int i = 0; i < T::steps_m; ++i) {
#pragma unroll
        for (int j = 0; j < T::steps_n; ++j) {
          multiply<x_signed>(sums[i][j], left[i], right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
  }
  wait<0>();
  __syncthreads();

#pragma unroll
  for (int j = 0; j < T::steps_n; ++j) {
    const int column = warp_column + j * mma_n + c_position(lane, 0).column;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t n = first_n + column + half;
      const int64_t channel = int64_t{group} * s.outputs + n;
      const bool exists = n < s.outputs;
      const auto bias = exists ? static_cast<uint32_t>(t.bias[channel]) : 0u;
      const float multiplier = exists ? t.multiplier[channel] : 0.0f;
#pragma unroll
      for (int i = 0; i < T::steps_m; ++i) {
#pragma unroll
        for (int r = half; r < 4; r += 2) {
          const int row = warp_row + i * mma_m + c_position(lane, r).row;
          const auto acc = static_cast<int32_t>(static_cast<uint32_t>(sums[i][j][r]) + bias);
          memory[row * T::y_stride + column + half] = static_cast<uint8_t>(requantize(acc, multiplier, t.requantize));
        }
      }
    }
  }
  __syncthreads();
  write_tile<T>(t, memory, first_m, first_n, group);
}

template <class T, int width, bool x_signed>
cudaError_t launch(const Task& task, cudaStream_t stream) {
  const auto kernel = conv<T, width, x_signed>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, T::shared);
  if (error != cudaSuccess) return error;
  const ConvShape& s = task.shape;
  const dim3 grid(static_cast<unsigned>((s.rows() + T::m - 1) / T::m),
                  static_cast<unsigned>((s.outputs + T::n - 1) / T::n), static_cast<unsigned>(s.groups));
  kernel<<<grid, T::threads, T::shared, stream>>>(task);
  return cudaGetLastError();
}

template <class T, int width>
cudaError_t launch(const Task& task, bool x_signed, cudaStream_t stream) {
  return x_signed ? launch<T, width, true>(task, stream) : launch<T, width, false>(task, stream);
}

using Large = Tile<128, 128, 2, 4, 4>;
using Small = Tile<64, 64, 2, 2, 4>;

template <int width>
cudaError_t launch(const Task& task, bool x_signed, cudaStream_t stream) {
  int device = 0, processors = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  const ConvShape& s = task.shape;
  const int64_t blocks = ((s.rows() + Large::m - 1) / Large::m) * ((s.outputs + Large::n - 1) / Large::n) * s.groups;
  // large tiles read less; small ones fill a device that few large ones would leave idle
  return s.outputs > Small::n && blocks >= processors ? launch<Large, width>(task, x_signed, stream)
                                                      : launch<Small, width>(task, x_signed, stream);
}

__global__ void fold(const int8_t* weight, const int32_t* bias, int32_t x_zero_point, int64_t rows, int64_t depth,
                     int32_t* out) {
  const int64_t row = int64_t{blockIdx.x} * (blockDim.x / 32) + threadIdx.x / 32;
  if (row >= rows) return;
  int32_t sum = 0;
  for (int64_t k = threadIdx.x % 32; k < depth; k += 32) sum += weight[row * depth + k];
  sum = __reduce_add_sync(0xffffffffu, sum);
  if (threadIdx.x % 32 != 0) return;
  const auto start = static_cast<uint32_t>(bias == nullptr ? 0 : bias[row]);
  out[row] = static_cast<int32_t>(start - static_cast<uint32_t>(x_zero_point) * static_cast<uint32_t>(sum));
}

}  // namespace

cudaError_t fold_zero_point(const int8_t* weight, const int32_t* bias, int32_t x_zero_point, int64_t rows,
                            int64_t depth, int32_t* out, cudaStream_t stream) {
  fold<<<static_cast<unsigned>((rows + 7) / 8), 256, 0, stream>>>(weight, bias, x_zero_point, rows, depth, out);
  return cudaGetLastError();
}

cudaError_t int8_conv(const void* x, bool x_signed, int32_t x_zero_point, const int8_t* weight, const int32_t* bias,
                      const float* multiplier, const ConvShape& shape, const Requantize& requantize,
                      const void* residual, void* y, cudaStream_t stream) {
  const bool whole = shape.outputs % chunk == 0 && is_aligned(y) && (residual == nullptr || is_aligned(residual));
  const Task task{static_cast<const uint8_t*>(x), weight, bias, multiplier, static_cast<const uint8_t*>(residual),
                  static_cast<uint8_t*>(y), shape, requantize,
                  (static_cast<uint32_t>(x_zero_point) & 0xffu) * 0x01010101u, whole};
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(weight);
  if (shape.inputs % 16 == 0 && addresses % 16 == 0) return launch<16>(task, x_signed, stream);
  if (shape.inputs % 4 == 0 && addresses % 4 == 0) return launch<4>(task, x_signed, stream);
  return launch<1>(task, x_signed, stream);
}

}  // namespace qat::cuda
