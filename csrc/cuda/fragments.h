// Where the lanes of a warp hold the elements of mma.m16n8k32 (8-bit operands, 32-bit sums), and where tiles lie in
// shared memory. Source: PTX ISA, "Matrix Fragments for mma.m16n8k32" and "ldmatrix". Tests compute a product through
// these maps on the host.
#pragma once

#include "host_device.h"

namespace qat::cuda {

constexpr int mma_m = 16, mma_n = 8, mma_k = 32;

struct Position {
  int row, column;
};

// Byte `i` of 0..15 of A (16 x 32): register i / 4, byte i % 4.
QAT_HD constexpr Position a_position(int lane, int i) {
  return {lane / 4 + ((i / 4) % 2 ? 8 : 0), (lane % 4) * 4 + i % 4 + (i >= 8 ? 16 : 0)};
}

// Byte `i` of 0..7 of B (32 x 8), row k and column n.
QAT_HD constexpr Position b_position(int lane, int i) {
  return {(lane % 4) * 4 + i % 4 + (i >= 4 ? 16 : 0), lane / 4};
}

// Sum `i` of 0..3 of C (16 x 8).
QAT_HD constexpr Position c_position(int lane, int i) {
  return {lane / 4 + (i >= 2 ? 8 : 0), (lane % 4) * 2 + i % 2};
}

// A tile in shared memory: rows of 64 bytes in four chunks of 16, exchanged so that eight rows of the same chunk, what
// one phase of ldmatrix reads, lie in different banks.
constexpr int tile_k = 64, chunk = 16, chunks = tile_k / chunk;

QAT_HD constexpr int tile_offset(int row, int chunk_index) {
  return row * tile_k + (chunk_index ^ ((row / 2) % chunks)) * chunk;
}

// The row and the chunk (of the two of one k step) whose address a lane gives to ldmatrix.x4, so that registers 0..3 are
// those of A. Matrix j is read at the addresses of lanes 8 * j ... 8 * j + 7.
QAT_HD constexpr Position a_source(int lane) { return {lane % 16, lane / 16}; }

// The same for two neighbouring B of 8 columns, stored as rows of n: registers 0, 1 of the first, 2, 3 of the second.
QAT_HD constexpr Position b_source(int lane) { return {lane % 8 + (lane / 16) * 8, (lane / 8) % 2}; }

}  // namespace qat::cuda
