// AVX2 and FMA without VNNI (x86-64). The build compiles this file with their options.
#include "isa.h"

#ifdef __AVX2__
#include "avx2_vector.h"

namespace qat {
const Int8Kernels* int8_avx2() { return &table; }
}  // namespace qat

#else

namespace qat {
const Int8Kernels* int8_avx2() { return nullptr; }
}  // namespace qat

#endif
