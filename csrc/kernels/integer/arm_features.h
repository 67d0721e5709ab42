// What the operating system says of an ARM processor.
#pragma once

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace qat {

#if defined(__aarch64__) && defined(__linux__)
// The bits are those of Linux' asm/hwcap.h, some of whose versions lack the names.
inline bool runs_neondot() { return (getauxval(AT_HWCAP) >> 20 & 1) != 0; }

// The depthwise kernels of that file use the dot product.
inline bool runs_i8mm() { return runs_neondot() && (getauxval(AT_HWCAP2) >> 13 & 1) != 0; }
#else
inline bool runs_neondot() { return false; }
inline bool runs_i8mm() { return false; }
#endif

}  // namespace qat
