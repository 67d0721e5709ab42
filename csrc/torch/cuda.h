// What the registrations of the GPU share: devices, streams, errors, and tensors of its memory.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <cuda_runtime_api.h>

#include "../cuda/launch.h"
#include "operands.h"

// In libtorch_cuda alone; weak, so that the library also loads beside a torch that was built without CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                  void** ret_stream);

namespace qat::ops::gpu {

inline void check_cuda(const Tensor& tensor, const char* name, int32_t device) {
  check(tensor.is_cuda() && tensor.get_device_index() == device,
        std::string(name) + " is not on CUDA device " + std::to_string(device) + "; give tensors of one device");
}

inline void check_type(const Tensor& tensor, const char* name, ScalarType type, const char* type_name) {
  check(tensor.scalar_type() == type, std::string(name) + " is not " + type_name + "; convert it");
}

inline void check_launch(cudaError_t error, const char* what) {
  check(error == cudaSuccess, std::string(what) + " was not launched: " + cudaGetErrorString(error));
}

inline void check_values(const Tensor& tensor, const char* name, int32_t device) {
  check_cuda(tensor, name, device);
  check_number(tensor, name);
}

inline void check_state(const Tensor& tensor, const char* name, ScalarType type, int64_t count, int32_t device) {
  check_cuda(tensor, name, device);
  check_buffer(tensor, name, type, count);
}

// Makes the device of a tensor the current one, and knows its stream.
class Device {
 public:
  explicit Device(const Tensor& x) : index(x.is_cuda() ? x.get_device_index() : 0), guard_(index) {
    check(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA; install a CUDA build of it");
    void* found = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &found));
    stream = static_cast<cudaStream_t>(found);
  }

  int32_t index;
  cudaStream_t stream;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

// On the device of `x`, not initialized.
inline Tensor new_cuda(const Tensor& x, const std::vector<int64_t>& sizes, ScalarType type) {
  return torch::stable::new_empty(x, sizes, type);
}

inline Tensor new_bits(const Tensor& x, bool wanted) {
  return new_cuda(x, {wanted ? (x.numel() + 7) / 8 : 0}, ScalarType::Byte);
}

inline uint8_t* bits_or_null(const Tensor& bits, bool wanted) {
  return wanted ? bits.mutable_data_ptr<uint8_t>() : nullptr;
}

inline int64_t channels_of(const Tensor& x, int64_t axis) { return axis == -1 ? 1 : x.size(axis); }

// As float32, and on the device: a division by a number of the host is another one.
inline Tensor grid_values(const Tensor& given, const char* name, int64_t count, const Tensor& x) {
  check_cuda(given, name, x.get_device_index());
  check_count(given, name, count, x);
  const Tensor values = torch::stable::contiguous(given);
  return values.scalar_type() == ScalarType::Float ? values : torch::stable::to(values, ScalarType::Float);
}

inline ExtremaTensors new_extrema(const Tensor& x, int64_t axis, cudaStream_t stream) {
  const std::vector<int64_t> sizes = axis == -1 ? std::vector<int64_t>{} : std::vector<int64_t>{x.size(axis)};
  const ExtremaTensors made{new_cuda(x, sizes, ScalarType::Float), new_cuda(x, sizes, ScalarType::Float),
                            new_cuda(x, {}, ScalarType::Long)};
  check_launch(qat::cuda::clear_extrema(made.out(), made.low.numel(), stream), "observe_minmax");
  return made;
}

// The buffers of a quantizer whose range is a moving average, one value a channel.
struct Buffers {
  const Tensor &low, &high, &scale, &zero_point, &tracked;

  void check(int64_t channels, int32_t device) const {
    check_state(low, "low", ScalarType::Float, channels, device);
    check_state(high, "high", ScalarType::Float, channels, device);
    check_state(scale, "scale", ScalarType::Float, channels, device);
    check_state(zero_point, "zero_point", ScalarType::Int, channels, device);
    check_state(tracked, "tracked", ScalarType::Long, 1, device);
  }

  qat::cuda::Tracking tracking(double momentum, const qat::GridRule& rule) const {
    return {{low.mutable_data_ptr<float>(), high.mutable_data_ptr<float>(), scale.mutable_data_ptr<float>(),
             zero_point.mutable_data_ptr<int32_t>()},
            tracked.mutable_data_ptr<int64_t>(),
            static_cast<float>(momentum),
            rule};
  }
};

}  // namespace qat::ops::gpu
