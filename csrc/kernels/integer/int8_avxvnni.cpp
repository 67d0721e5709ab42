// AVX2 with VNNI on 256 bits (x86-64: Alder Lake and later). The build compiles this file with its options.
#include "isa.h"

#ifdef __AVXVNNI__
#include "avx2_vector.h"

namespace qat {
const Int8Kernels* int8_avxvnni() { return &table; }
}  // namespace qat

#else

namespace qat {
const Int8Kernels* int8_avxvnni() { return nullptr; }
}  // namespace qat

#endif
