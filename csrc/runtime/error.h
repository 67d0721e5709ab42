// What the API turns into a status and a message.
#pragma once

#include <stdexcept>
#include <string>

#include "qat_runtime.h"

namespace qat {

class Error : public std::runtime_error {
 public:
  Error(qat_status status, const std::string& message) : std::runtime_error(message), status_(status) {}
  qat_status status() const { return status_; }

 private:
  qat_status status_;
};

// A plan that contradicts itself; `where` names the tensor or operator.
[[noreturn]] inline void fail_plan(const std::string& where, const std::string& cause) {
  throw Error(QAT_INVALID_PLAN, where + ": " + cause + "; write the plan again, or with the version of this runner");
}

}  // namespace qat
