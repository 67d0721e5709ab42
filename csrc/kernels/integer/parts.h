// Work that is cut into as many parts as there are threads, each with memory of its own.
#pragma once

#include <cstdint>

#include "view.h"

namespace qat {

// Calls body(part) for every part.
template <class Body>
void run_parts(const Threads& threads, int64_t parts, const Body& body) {
  if (parts == 1) return body(0);
  const Task task = [](int64_t begin, int64_t end, void* context) {
    for (int64_t part = begin; part < end; ++part) (*static_cast<const Body*>(context))(part);
  };
  threads.run(threads.pool, 0, parts, 1, task, const_cast<Body*>(&body));
}

}  // namespace qat
