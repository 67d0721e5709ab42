// Moving averages of ranges, as the observer of that name has them.
#pragma once

#include "host_device.h"

namespace qat::cuda {

// In double the difference of two floats cannot overflow, and a constant stays exactly itself.
QAT_HD float moved(float old, float value, double momentum) {
  const double from = old;
  return static_cast<float>(from + momentum * (static_cast<double>(value) - from));
}

// Moves a range towards that of a batch; the first batch sets it, and one without finite values leaves it.
QAT_HD void move_average(float& low, float& high, float batch_low, float batch_high, double momentum) {
  if (batch_low > batch_high) return;
  const bool first = low > high;
  low = first ? batch_low : moved(low, batch_low, momentum);
  high = first ? batch_high : moved(high, batch_high, momentum);
}

}  // namespace qat::cuda
