// A GPU that runs one block at a time, and of the block one thread at a time: for correctness, not for speed.
//
// The threads of a block are fibers. Each runs until it waits at a barrier or for the lanes of its warp; who runs next is
// drawn by a generator with a seed. The blocks of a launch run one after another in an order drawn likewise, and a launch
// has ended when launch() returns.
//
// Errors end the launch with std::runtime_error: a barrier that some threads never reach or reach at another place, a
// shuffle whose lanes do not all come or that reads a lane outside its mask, a grid or block beyond the limits.
// Shared memory holds rubbish (nan in any floating-point dtype) when a block begins.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace cuda_on_cpu {

constexpr unsigned kWarp = 32;

struct Dim {
  unsigned x, y, z;
};

// Where a thread waits. In C++ all threads have to meet at one place; PTX may hold an instruction twice.
struct Where {
  const char* file;
  int line;
  bool same_for_all;
};

void launch(Dim grid, Dim threads, size_t dynamic_shared, const std::function<void()>& body);

// For the thread that runs.
Dim thread_index();
Dim block_index();
Dim block_size();
Dim grid_size();
void barrier(Where where);
// All lanes of the mask meet; each gives a value and gets that of the lane it names, or its own.
uint64_t exchange(unsigned mask, uint64_t value, unsigned lane, bool own, Where where);
// All lanes of the mask meet; what they did to memory before is then done.
void meet(unsigned mask, Where where);
[[noreturn]] void fail(const std::string& what, Where where = {nullptr, 0, false});

// What the instructions of PTX read and write, at addresses that are multiples of the size. The copies are made here, so
// that AddressSanitizer need not look into the translated kernels.
//
// Shared memory is one array for a block. The check finds addresses past its end, what is read before it is written, and
// accesses of two threads, one of them a write, with no barrier between; but two may write the same value, as Triton's
// programs do. Of global memory, what one thread writes in a launch no other may read, or overwrite by another value.
void read_shared(uint64_t offset, size_t size, void* value, Where where);
void write_shared(uint64_t offset, size_t size, const void* value, Where where);
void read_global(uint64_t address, size_t size, void* value, Where where);
void write_global(uint64_t address, size_t size, const void* value, Where where);
void reserve_shared(size_t bytes);  // of the kernels' own declarations, beside what a launch asks for
// x with a relative error of at most 2^-bits, the same for the same x: an instruction that a GPU approximates.
double approximated(double x, double bits);

}  // namespace cuda_on_cpu
