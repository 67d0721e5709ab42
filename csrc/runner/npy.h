// Arrays in files: .npy (numpy's format, versions 1 to 3), or the plain bytes of the elements.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace runner {

// What is wrong with a file or an argument, and the mend; `status` is the exit status.
class Failure : public std::runtime_error {
 public:
  explicit Failure(const std::string& message, int status = 2) : std::runtime_error(message), status_(status) {}
  int status() const { return status_; }

 private:
  int status_;
};

// Elements in row-major order, little endian.
struct NpyArray {
  bool raw = false;    // the file has no header: neither type nor sizes are known
  std::string type;    // "f4", "u1", "i1", "u2", "i2", or what else the file says
  std::vector<int64_t> sizes;
  std::vector<uint8_t> data;
};

std::vector<uint8_t> read_file(const std::string& path);

// A file that ends in .npy must be one; others are taken as plain bytes if they do not begin as one.
NpyArray read_npy(const std::string& path);

// Plain bytes unless the name ends in .npy.
void write_npy(const std::string& path, const NpyArray& array);

// "2x3x4".
std::string spell_sizes(const std::vector<int64_t>& sizes);

}  // namespace runner
