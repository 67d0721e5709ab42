// Threads for a lambda, and sizes of elements.
#pragma once

#include "view.h"

namespace qat {

// Elements that are worth a thread's while.
constexpr int64_t grain_elements = 16384;

// Calls function(begin, end) for parts of [0, count), of which each is `elements` elements of work.
template <class Function>
void parallel(const Threads& threads, int64_t count, int64_t elements, const Function& function) {
  if (count <= 0) return;
  const int64_t grain = elements >= grain_elements ? 1 : grain_elements / (elements > 0 ? elements : 1);
  const auto task = [](int64_t begin, int64_t end, void* context) {
    (*static_cast<const Function*>(context))(begin, end);
  };
  if (threads.count <= 1 || count <= grain) {
    function(int64_t{0}, count);
  } else {
    threads.run(threads.pool, 0, count, grain, task, const_cast<Function*>(&function));
  }
}

inline int64_t width_of(Type type) {
  switch (type) {
    case Type::u16:
    case Type::s16: return 2;
    case Type::s32:
    case Type::f32: return 4;
    default: return 1;
  }
}

inline const void* at(const void* data, Type type, int64_t index) {
  return static_cast<const char*>(data) + index * width_of(type);
}

inline void* at(void* data, Type type, int64_t index) { return static_cast<char*>(data) + index * width_of(type); }

inline bool same_codes(const View& a, const View& b) {
  const Grid &p = a.grid, &q = b.grid;
  return a.type == b.type && p.scale == q.scale && p.zero_point == q.zero_point && p.qmin == q.qmin && p.qmax == q.qmax;
}

}  // namespace qat
