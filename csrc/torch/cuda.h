// What the registrations of the GPU share: devices, streams, errors.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cuda_runtime_api.h>

#include "dense.h"

// In libtorch_cuda alone; weak, so that the library also loads beside a torch that was built without CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                  void** ret_stream);

namespace qat::tensors {

using torch::headeronly::ScalarType;

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

}  // namespace qat::tensors
