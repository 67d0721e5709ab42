// torch's threads for the runner of csrc/runtime.
#include <torch/csrc/stable/ops.h>

#include "../runtime/qat_runtime.h"

// A `qat_parallel`; torch's own setting says how many threads run.
extern "C" QAT_API void qat_torch_parallel(void*, int64_t begin, int64_t end, int64_t grain, qat_task task,
                                           void* task_context) {
  torch::stable::parallel_for(begin, end, grain, [&](int64_t b, int64_t e) { task(b, e, task_context); });
}
