#include "npy.h"

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>

namespace runner {
namespace {

constexpr char magic[] = "\x93NUMPY";
constexpr size_t magic_bytes = 6, prefix_bytes = 10, alignment = 64;

struct Close {
  void operator()(std::FILE* file) const { std::fclose(file); }
};
using File = std::unique_ptr<std::FILE, Close>;

bool ends_in_npy(const std::string& path) {
  return path.size() >= 4 && path.compare(path.size() - 4, 4, ".npy") == 0;
}

// The header is a Python dictionary with three known keys: {'descr': '<f4', 'fortran_order': False, 'shape': (1, 3), }.
class Header {
 public:
  Header(const std::string& text, const std::string& path) : text_(text), path_(path) {}

  // What follows a key.
  size_t value(const char* key) const {
    const std::string quoted = std::string("'") + key + "'";
    size_t at = text_.find(quoted);
    if (at == std::string::npos) fail();
    at = skip(at + quoted.size());
    if (at >= text_.size() || text_[at] != ':') fail();
    return skip(at + 1);
  }

  std::string type() const {
    const size_t at = value("descr");
    if (at >= text_.size() || text_[at] != '\'') fail();
    const size_t end = text_.find('\'', at + 1);
    if (end == std::string::npos) fail();
    return text_.substr(at + 1, end - at - 1);
  }

  bool fortran_order() const { return text_.compare(value("fortran_order"), 4, "True") == 0; }

  std::vector<int64_t> sizes() const {
    size_t at = value("shape");
    if (at >= text_.size() || text_[at] != '(') fail();
    std::vector<int64_t> found;
    for (at = skip(at + 1); at < text_.size() && text_[at] != ')'; at = skip(at)) {
      int64_t size = 0;
      const size_t start = at;
      for (; at < text_.size() && text_[at] >= '0' && text_[at] <= '9'; ++at) {
        if (size > INT32_MAX) fail();
        size = size * 10 + (text_[at] - '0');
      }
      if (at == start) fail();
      found.push_back(size);
      at = skip(at);
      if (at < text_.size() && text_[at] == ',') ++at;
    }
    if (at >= text_.size()) fail();
    return found;
  }

 private:
  size_t skip(size_t at) const {
    while (at < text_.size() && text_[at] == ' ') ++at;
    return at;
  }
  [[noreturn]] void fail() const {
    throw Failure(path_ + ": its .npy header is damaged; save it again with numpy.save");
  }

  const std::string& text_;
  const std::string& path_;
};

}  // namespace

std::vector<uint8_t> read_file(const std::string& path) {
  const File file(std::fopen(path.c_str(), "rb"));
  if (!file) throw Failure(path + ": cannot be read (" + std::strerror(errno) + "); give an existing file");
  std::vector<uint8_t> bytes;
  // an empty file is still no null pointer
  bytes.reserve(1);
  uint8_t buffer[1 << 16];
  for (size_t n; (n = std::fread(buffer, 1, sizeof buffer, file.get())) > 0;) {
    bytes.insert(bytes.end(), buffer, buffer + n);
  }
  // a folder opens, and then cannot be read
  if (std::ferror(file.get()) != 0) {
    throw Failure(path + ": cannot be read (" + std::strerror(errno) + "); give an existing file");
  }
  return bytes;
}

NpyArray read_npy(const std::string& path) {
  NpyArray array;
  array.data = read_file(path);
  const std::vector<uint8_t>& bytes = array.data;
  if (bytes.size() < magic_bytes || std::memcmp(bytes.data(), magic, magic_bytes) != 0) {
    if (ends_in_npy(path)) {
      throw Failure(path + ": is no .npy file; save it with numpy.save, or give plain bytes another name");
    }
    array.raw = true;
    return array;
  }
  const Failure truncated(path + ": ends too early; copy or save it again");
  if (bytes.size() < prefix_bytes) throw truncated;
  const uint8_t version = bytes[6];
  if (version < 1 || version > 3) {
    throw Failure(path + ": is .npy version " + std::to_string(version) + "; save it again with numpy.save");
  }
  // versions 2 and 3 have four bytes for the length
  const size_t wide = version == 1 ? 2 : 4;
  if (bytes.size() < 8 + wide) throw truncated;
  size_t length = 0;
  for (size_t i = 0; i < wide; ++i) length |= size_t{bytes[8 + i]} << 8 * i;
  if (length > bytes.size() - 8 - wide) throw truncated;
  const std::string text(reinterpret_cast<const char*>(bytes.data()) + 8 + wide, length);
  const Header header(text, path);
  const std::string type = header.type();
  if (header.fortran_order()) throw Failure(path + ": is in Fortran order; save numpy.ascontiguousarray of it");
  if (type.size() < 2 || type[0] == '>') throw Failure(path + ": has type " + type + "; save it little endian");
  array.type = type.substr(1);
  array.sizes = header.sizes();
  array.data.erase(array.data.begin(), array.data.begin() + static_cast<int64_t>(8 + wide + length));
  return array;
}

void write_npy(const std::string& path, const NpyArray& array) {
  std::string head;
  if (ends_in_npy(path)) {
    std::string text = "{'descr': '" + std::string(array.type.back() == '1' ? "|" : "<") + array.type +
                       "', 'fortran_order': False, 'shape': (";
    for (int64_t size : array.sizes) text += std::to_string(size) + ", ";
    text += "), }";
    const size_t size = prefix_bytes + text.size() + 1;
    text += std::string((size + alignment - 1) / alignment * alignment - size, ' ') + "\n";
    head = std::string(magic, magic_bytes) + std::string("\x01\x00", 2);
    head += static_cast<char>(text.size() & 0xff);
    head += static_cast<char>(text.size() >> 8);
    head += text;
  }
  std::FILE* const file = std::fopen(path.c_str(), "wb");
  bool done = file != nullptr && std::fwrite(head.data(), 1, head.size(), file) == head.size() &&
              std::fwrite(array.data.data(), 1, array.data.size(), file) == array.data.size();
  const int cause = errno;
  if (file != nullptr) done = std::fclose(file) == 0 && done;
  if (!done) throw Failure(path + ": cannot be written (" + std::strerror(cause) + "); choose a writable folder", 1);
}

std::string spell_sizes(const std::vector<int64_t>& sizes) {
  std::string text;
  for (int64_t size : sizes) text += (text.empty() ? "" : "x") + std::to_string(size);
  return text.empty() ? "a scalar" : text;
}

}  // namespace runner
