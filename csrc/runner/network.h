// A plan and its sessions, and the arrays that go in and out.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "../runtime/qat_runtime.h"
#include "npy.h"
#include "options.h"

namespace runner {

struct FreePlan {
  void operator()(qat_plan* plan) const { qat_plan_free(plan); }
};
struct FreeSession {
  void operator()(qat_session* session) const { qat_session_free(session); }
};
using Session = std::unique_ptr<qat_session, FreeSession>;

// An input or output, and what the files of it hold.
struct Border {
  qat_tensor_info info;   // as the plan has it
  qat_tensor_info codes;  // how its codes are read, where it has some
  bool convert;           // the files hold the other one of floats and codes
  qat_type file_type;
};

class Network {
 public:
  // Throws Failure, as all of this.
  explicit Network(const Options& options);

  const qat_plan* plan() const { return plan_.get(); }
  const std::vector<Border>& inputs() const { return inputs_; }
  const std::vector<Border>& outputs() const { return outputs_; }

  Session open(int64_t batch) const;

 private:
  std::vector<Border> borders(bool input, Elements wanted) const;

  const Options& options_;
  std::unique_ptr<qat_plan, FreePlan> plan_;
  std::vector<Border> inputs_, outputs_;
};

// "f4" and its like; bytes of an element.
const char* npy_type(qat_type type);
size_t type_bytes(qat_type type);

// Of the runtime's last call on this thread.
[[noreturn]] void fail_runtime(int status, const std::string& where);

// The array as the plan takes it: of its type, and of the sizes of `batch`, which is found here if it is 0.
std::vector<uint8_t> take_input(const Border& border, const std::string& path, int64_t* batch);

// Sizes for a batch.
std::vector<int64_t> sizes_of(const qat_tensor_info& info, int64_t batch);

// What the files hold of what the plan has computed.
NpyArray give_output(const Border& border, int64_t batch, const std::vector<uint8_t>& bytes);

}  // namespace runner
