// One launch of a translated kernel, for run_ptx.py.
#include <cstring>
#include <stdexcept>

#include "ptx_runtime.h"

// Addresses of the parameters in `parameters`. Returns 0, or 1 with a message.
extern "C" __attribute__((visibility("default"))) int cuda_on_cpu_launch(
    const char* name, const unsigned* grid, unsigned threads, unsigned shared_bytes, const void* const* parameters,
    char* message, unsigned message_size) {
  using namespace cuda_on_cpu;
  try {
    const auto found = translated().find(name);
    if (found == translated().end()) throw std::runtime_error(std::string("no kernel is called ") + name);
    const Kernel kernel = found->second;
    launch({grid[0], grid[1], grid[2]}, {threads, 1, 1}, shared_bytes, [&] { kernel(parameters); });
    return 0;
  } catch (const std::exception& error) {
    std::strncpy(message, error.what(), message_size - 1);
    return 1;
  }
}
