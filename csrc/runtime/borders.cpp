#include "borders.h"

#include <algorithm>

#include "error.h"

namespace qat {
namespace {

[[noreturn]] void fail(const std::string& name, const char* cause, const char* mend) {
  throw Error(QAT_INVALID_ARGUMENT, "tensor '" + name + "': " + cause + "; " + mend);
}

bool same_grid(const Array& a, const Array& b) {
  const Grid &p = a.grid, &q = b.grid;
  return a.type == b.type && p.scale == q.scale && p.zero_point == q.zero_point && p.qmin == q.qmin && p.qmax == q.qmax;
}

}  // namespace

const Array& border_codes(const Plan& plan, int32_t tensor, bool input) {
  const auto array = [&](int32_t i) -> const Array& { return plan.arrays[static_cast<size_t>(i)]; };
  const Array& border = array(tensor);
  if (is_codes(border.type)) return border;
  const Array* found = nullptr;
  for (const Operator& op : plan.operators) {
    const bool reads = std::find(op.inputs.begin(), op.inputs.end(), tensor) != op.inputs.end();
    if (input ? !reads : op.output != tensor) continue;
    const bool converts = op.kind == (input ? Kind::quantize : Kind::dequantize);
    if (!converts) fail(border.name, "is computed with in floats, so it has no codes", "use floats for it");
    const Array& codes = array(input ? op.output : op.inputs[0]);
    if (found != nullptr && !same_grid(*found, codes)) fail(border.name, "has several grids", "use floats for it");
    found = &codes;
  }
  if (found == nullptr) fail(border.name, "no operator makes codes of it or it of codes", "use floats for it");
  return *found;
}

}  // namespace qat
