#include "machine.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <unordered_map>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

// __shared__ variables of C++ lie in this section (include/cuda_runtime.h).
extern "C" char __start_cuda_shared __attribute__((weak, visibility("hidden")));
extern "C" char __stop_cuda_shared __attribute__((weak, visibility("hidden")));

namespace cuda_on_cpu {
namespace {

constexpr size_t kStack = 256 << 10;

class Stack {  // with a page below it that ends the process when it is touched
 public:
  Stack() : memory_(mmap(nullptr, kStack + kGuard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) {
    if (memory_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory_, kGuard, PROT_NONE);
  }
  ~Stack() { munmap(memory_, kStack + kGuard); }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;
  void* begin() const { return static_cast<char*>(memory_) + kGuard; }

 private:
  static constexpr size_t kGuard = 4096;
  void* memory_;
};

enum class State { kReady, kAtBarrier, kInExchange, kEnded };

struct Fiber {
  ucontext_t context;
  Stack stack;
  Dim index;
  unsigned number;  // in the block
  State state;
  Where where;      // it waits, or waited last
  uint64_t value;   // what it gives in an exchange, then what it got
  unsigned mask, lane;
  bool own;
  void* fake_stack = nullptr;
};

// What is known of a byte of PTX's shared memory in the block that runs.
struct SharedByte {
  uint32_t writer, reader;              // thread number + 1; 0: none since the last barrier of the block
  uint32_t writer_turn, reader_turn;    // how often the thread's warp had met before
  bool written, several_readers, several_warps;
};

struct Machine {
  std::mutex one_launch;
  std::mt19937_64 random{1};
  bool in_order = false;
  uint64_t seed = 1;
  unsigned most_rows = 65535;  // of a grid, in y and z
  std::vector<std::unique_ptr<Fiber>> fibers;
  ucontext_t host;
  const void* host_stack = nullptr;
  size_t host_stack_size = 0;
  Fiber* running = nullptr;
  const std::function<void()>* body = nullptr;
  Dim grid{}, threads{}, block{};
  uint64_t block_number = 0;
  std::string failure;
  long launches = 0, blocks = 0, barriers = 0, exchanges = 0;

  size_t declared_shared = 0;
  std::vector<char> shared;
  std::vector<SharedByte> shared_bytes;
  std::vector<uint32_t> turns;  // how often each warp of the block has met
  std::unordered_map<uint64_t, uint64_t> owners;  // of bytes of global memory: who wrote them in this launch
  std::unordered_map<uint64_t, uint64_t> readers; // who read them; kSeveral
};

constexpr uint64_t kSeveral = ~0ull;

Machine& machine() {
  static Machine m;
  return m;
}

std::string place_of(Where where) {
  Machine& m = machine();
  const auto text = [](Dim d) {
    return "(" + std::to_string(d.x) + "," + std::to_string(d.y) + "," + std::to_string(d.z) + ")";
  };
  std::string place;
  if (where.file) place += std::string(" at ") + where.file + ":" + std::to_string(where.line);
  place += ", block " + text(m.block);
  if (m.running) place += ", thread " + text(m.running->index);
  return place;
}

// Leaves the running fiber; comes back when the host lets it run again.
void leave(bool for_ever) {
  Machine& m = machine();
  Fiber& fiber = *m.running;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_ever ? nullptr : &fiber.fake_stack, m.host_stack, m.host_stack_size);
#else
  (void)for_ever;
#endif
  swapcontext(&fiber.context, &m.host);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &m.host_stack, &m.host_stack_size);
#endif
}

void start() {
  Machine& m = machine();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &m.host_stack, &m.host_stack_size);
#endif
  (*m.body)();
  m.running->state = State::kEnded;
  leave(true);
}

void run(Fiber& fiber) {
  Machine& m = machine();
  m.running = &fiber;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, fiber.stack.begin(), kStack);
#endif
  swapcontext(&m.host, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  m.running = nullptr;
  if (!m.failure.empty()) throw std::runtime_error("CUDA on a CPU: " + m.failure);
}

__attribute__((no_sanitize("address"))) void spoil_shared() {
  Machine& m = machine();
  const uint64_t rubbish = m.random() | 0x7fc07fc07fc07fc0ull;  // nan as float64, float32, float16 and bfloat16
  if (&__start_cuda_shared) {
    for (volatile char* p = &__start_cuda_shared; p < &__stop_cuda_shared; ++p) {
      *p = static_cast<char>(rubbish >> 8 * ((p - &__start_cuda_shared) % 8));
    }
  }
  for (size_t i = 0; i < m.shared.size(); ++i) m.shared[i] = static_cast<char>(rubbish >> 8 * (i % 8));
  std::fill(m.shared_bytes.begin(), m.shared_bytes.end(), SharedByte{});
  m.turns.assign(1024 / kWarp, 0);
}

void prepare_fibers(size_t count) {
  Machine& m = machine();
  while (m.fibers.size() < count) m.fibers.push_back(std::make_unique<Fiber>());
  for (size_t i = 0; i < count; ++i) {
    Fiber& fiber = *m.fibers[i];
    const unsigned n = static_cast<unsigned>(i);
    fiber.index = {n % m.threads.x, n / m.threads.x % m.threads.y, n / m.threads.x / m.threads.y};
    fiber.number = n;
    fiber.state = State::kReady;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.begin();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, start, 0);
  }
}

// No thread can run. All wait at one barrier: it opens. Else they wait for ever.
void open_barrier(size_t count) {
  Machine& m = machine();
  const Fiber* waiting = nullptr;
  for (size_t i = 0; i < count; ++i) {
    const Fiber& fiber = *m.fibers[i];
    if (fiber.state == State::kInExchange) {
      fail("a shuffle waits for lanes that do not come", fiber.where);
    }
    if (fiber.state == State::kAtBarrier) {
      if (waiting && fiber.where.same_for_all &&
          (fiber.where.line != waiting->where.line || std::strcmp(fiber.where.file, waiting->where.file))) {
        fail("threads wait at different barriers", fiber.where);
      }
      waiting = &fiber;
    }
  }
  for (size_t i = 0; i < count; ++i) {
    if (m.fibers[i]->state == State::kEnded) fail("threads wait at a barrier and others have ended", waiting->where);
  }
  for (size_t i = 0; i < count; ++i) m.fibers[i]->state = State::kReady;
  for (SharedByte& byte : m.shared_bytes) {
    const bool written = byte.written;
    byte = SharedByte{};
    byte.written = written;
  }
  ++m.barriers;
}

void run_block(size_t count) {
  Machine& m = machine();
  ++m.blocks;
  spoil_shared();
  prepare_fibers(count);
  // either all threads take turns, or one warp runs as far as it can while the others stand still: only the second
  // shows that a barrier is missing between a write and a read
  const bool by_warp = !m.in_order && m.random() % 2;
  unsigned warp = ~0u;
  std::vector<Fiber*> ready;
  for (;;) {
    ready.clear();
    bool all_ended = true;
    for (size_t i = 0; i < count; ++i) {
      Fiber& fiber = *m.fibers[i];
      all_ended = all_ended && fiber.state == State::kEnded;
      if (fiber.state == State::kReady) ready.push_back(&fiber);
    }
    if (all_ended) return;
    if (ready.empty()) {
      open_barrier(count);
      continue;
    }
    if (!m.in_order) std::shuffle(ready.begin(), ready.end(), m.random);
    if (by_warp) {
      const auto elsewhere = [&](const Fiber* fiber) { return fiber->number / kWarp != warp; };
      if (std::all_of(ready.begin(), ready.end(), elsewhere)) warp = ready[0]->number / kWarp;
      ready.erase(std::remove_if(ready.begin(), ready.end(), elsewhere), ready.end());
    }
    for (Fiber* fiber : ready) run(*fiber);
  }
}

void check_alignment(uint64_t address, size_t size, Where where) {
  if (address % size) {
    fail("an access of " + std::to_string(size) + " bytes at an address that is not a multiple", where);
  }
}

// Where an access of shared memory begins. `written` is what it writes, null for a read.
char* shared_memory(uint64_t offset, size_t size, const void* written, Where where) {
  check_alignment(offset, size, where);
  Machine& m = machine();
  if (offset + size > m.shared.size()) {
    fail("an access to shared memory ends at byte " + std::to_string(offset + size) + " of " +
         std::to_string(m.shared.size()), where);
  }
  const bool write = written != nullptr;
  const uint32_t thread = m.running->number + 1, warp = m.running->number / kWarp, turn = m.turns[warp];
  const auto ordered = [&](uint32_t other, uint32_t turn_of_other) {  // by a meeting of the warp
    return other == thread || ((other - 1) / kWarp == warp && turn_of_other < turn);
  };
  for (uint64_t i = offset; i < offset + size; ++i) {
    SharedByte& byte = m.shared_bytes[i];
    if (!write && !byte.written) fail("shared memory is read before anything is written there", where);
    const bool same = write && m.shared[i] == static_cast<const char*>(written)[i - offset];
    bool race = byte.writer && !same && !ordered(byte.writer, byte.writer_turn);
    if (write && byte.reader) {
      const bool only_reader = !byte.several_readers && byte.reader == thread;
      race = race || byte.several_warps || !(only_reader || ((byte.reader - 1) / kWarp == warp && byte.reader_turn < turn));
    }
    if (race) fail("two threads use the same shared memory, one of them writes, and no barrier is between", where);
    if (write) {
      byte = {thread, 0, turn, 0, true, false, false};
    } else {
      byte.several_readers = byte.several_readers || (byte.reader && byte.reader != thread);
      byte.several_warps = byte.several_warps || (byte.reader && (byte.reader - 1) / kWarp != warp);
      byte.reader = thread, byte.reader_turn = turn;
    }
  }
  return m.shared.data() + offset;
}

void global_access(uint64_t address, size_t size, const void* written, Where where) {
  check_alignment(address, size, where);
  Machine& m = machine();
  const uint64_t threads = uint64_t(m.threads.x) * m.threads.y * m.threads.z;
  const uint64_t thread = m.block_number * threads + m.running->number;
  // accesses of a kernel are of 2 bytes at least, or single bytes, which are told apart
  const size_t step = size % 2 ? 1 : 2;
  for (uint64_t i = address; i < address + size; i += step) {
    const auto owner = m.owners.find(i);
    const bool same =
        written && !std::memcmp(reinterpret_cast<void*>(i), static_cast<const char*>(written) + (i - address), step);
    if (owner != m.owners.end() && owner->second != thread && !same) {
      fail(std::string(written ? "two threads write" : "a thread reads what another has written to") +
           " the same global memory in the same launch", where);
    }
    if (written) {
      const auto reader = m.readers.find(i);
      if (reader != m.readers.end() && reader->second != thread) {
        fail("a thread writes global memory that another has read in the same launch", where);
      }
      m.owners[i] = thread;
    } else {
      const auto [reader, added] = m.readers.try_emplace(i, thread);
      if (!added && reader->second != thread) reader->second = kSeveral;
    }
  }
}

}  // namespace

void fail(const std::string& what, Where where) {
  Machine& m = machine();
  const std::string text = what + place_of(where);
  if (!m.running) throw std::runtime_error("CUDA on a CPU: " + text);
  m.failure = text;  // the host throws it; this fiber never runs again
  leave(true);
  __builtin_unreachable();
}

Dim thread_index() { return machine().running->index; }
Dim block_index() { return machine().block; }
Dim block_size() { return machine().threads; }
Dim grid_size() { return machine().grid; }

void barrier(Where where) {
  Fiber& fiber = *machine().running;
  fiber.where = where;
  fiber.state = State::kAtBarrier;
  leave(false);
}

uint64_t exchange(unsigned mask, uint64_t value, unsigned lane, bool own, Where where) {
  Machine& m = machine();
  Fiber& fiber = *m.running;
  const unsigned first = fiber.number / kWarp * kWarp, count = m.threads.x * m.threads.y * m.threads.z;
  if (!(mask >> (fiber.number % kWarp) & 1)) fail("a lane is not in the mask it gives to a shuffle", where);
  if (!own && (lane >= kWarp || !(mask >> lane & 1))) fail("a shuffle reads a lane outside its mask", where);
  fiber.value = value, fiber.mask = mask, fiber.lane = lane, fiber.own = own, fiber.where = where;
  fiber.state = State::kInExchange;
  ++m.exchanges;

  bool complete = true;
  for (unsigned i = 0; i < kWarp; ++i) {
    if (!(mask >> i & 1)) continue;
    if (first + i >= count) fail("a shuffle waits for a lane that the block does not have", where);
    const Fiber& other = *m.fibers[first + i];
    if (other.state == State::kEnded) fail("a shuffle waits for a lane that has ended", where);
    if (other.state == State::kInExchange && other.mask != mask) fail("lanes meet with different masks", where);
    if (other.state == State::kInExchange && where.same_for_all &&
        (other.where.line != where.line || std::strcmp(other.where.file, where.file))) {
      fail("lanes meet in different shuffles", where);
    }
    complete = complete && other.state == State::kInExchange;
  }
  if (complete) {
    uint64_t given[kWarp];
    for (unsigned i = 0; i < kWarp; ++i) given[i] = mask >> i & 1 ? m.fibers[first + i]->value : 0;
    for (unsigned i = 0; i < kWarp; ++i) {
      if (!(mask >> i & 1)) continue;
      Fiber& other = *m.fibers[first + i];
      other.value = other.own ? given[i] : given[other.lane];
      other.state = State::kReady;
    }
  } else {
    leave(false);
  }
  return fiber.value;
}

void reserve_shared(size_t bytes) {
  Machine& m = machine();
  m.declared_shared = std::max(m.declared_shared, bytes);
}

void meet(unsigned mask, Where where) {
  Machine& m = machine();
  const unsigned warp = m.running->number / kWarp;
  const bool last = [&] {  // to come: the others wait
    for (unsigned i = 0; i < kWarp; ++i) {
      const unsigned other = warp * kWarp + i;
      if (mask >> i & 1 && other != m.running->number && m.fibers[other]->state != State::kInExchange) return false;
    }
    return true;
  }();
  if (last && mask == ~0u) ++m.turns[warp];  // before any of them goes on
  exchange(mask, 0, 0, true, where);
}

void read_shared(uint64_t offset, size_t size, void* value, Where where) {
  std::memcpy(value, shared_memory(offset, size, nullptr, where), size);
}

void write_shared(uint64_t offset, size_t size, const void* value, Where where) {
  std::memcpy(shared_memory(offset, size, value, where), value, size);
}

void read_global(uint64_t address, size_t size, void* value, Where where) {
  global_access(address, size, nullptr, where);
  std::memcpy(value, reinterpret_cast<const void*>(address), size);
}

void write_global(uint64_t address, size_t size, const void* value, Where where) {
  global_access(address, size, value, where);
  std::memcpy(reinterpret_cast<void*>(address), value, size);
}

double approximated(double x, double bits) {
  if (!std::isfinite(x) || x == 0) return x;
  uint64_t hash;  // a hash of x and the seed: the same input gives the same output, as on a GPU
  std::memcpy(&hash, &x, sizeof hash);
  hash ^= machine().seed * 0x9E3779B97F4A7C15ull;
  hash = (hash ^ (hash >> 30)) * 0xBF58476D1CE4E5B9ull;
  hash = (hash ^ (hash >> 27)) * 0x94D049BB133111EBull;
  hash ^= hash >> 31;
  const double error = static_cast<double>(static_cast<int64_t>(hash)) * 0x1p-63;  // in [-1, 1)
  return x * (1 + error * std::exp2(-bits));
}

void launch(Dim grid, Dim threads, size_t dynamic_shared, const std::function<void()>& body) {
  Machine& m = machine();
  const std::lock_guard<std::mutex> guard(m.one_launch);
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z, count = uint64_t(threads.x) * threads.y * threads.z;
  if (!blocks || !count || count > 1024 || threads.z > 64 || grid.x > 0x7fffffffu || grid.y > m.most_rows ||
      grid.z > m.most_rows) {
    throw std::runtime_error("CUDA: invalid configuration argument");
  }
  ++m.launches;
  m.grid = grid, m.threads = threads, m.body = &body;
  m.failure.clear(), m.owners.clear(), m.readers.clear();
  m.shared.assign(m.declared_shared + dynamic_shared, 0);
  m.shared_bytes.assign(m.shared.size(), SharedByte{});
  std::vector<uint64_t> order(blocks);
  for (uint64_t i = 0; i < blocks; ++i) order[i] = i;
  if (!m.in_order) std::shuffle(order.begin(), order.end(), m.random);
  for (const uint64_t i : order) {
    m.block_number = i;
    m.block = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y)};
    run_block(count);
  }
}

}  // namespace cuda_on_cpu

// For emulated.py.
extern "C" {

// The order of threads and blocks, and the errors of approximated instructions, from here on; 0: threads and blocks in
// their own order.
__attribute__((visibility("default"))) void cuda_on_cpu_schedule(uint64_t seed) {
  auto& m = cuda_on_cpu::machine();
  m.in_order = seed == 0;
  m.seed = seed;
  m.random.seed(seed);
}

// How many rows a grid may have in y and z, so that a small case reaches the limit of a GPU.
__attribute__((visibility("default"))) void cuda_on_cpu_most_rows(unsigned rows) {
  cuda_on_cpu::machine().most_rows = rows;
}

// launches, blocks, barriers, and lanes that took part in exchanges, since the process began
__attribute__((visibility("default"))) void cuda_on_cpu_counts(long* counts) {
  const auto& m = cuda_on_cpu::machine();
  counts[0] = m.launches, counts[1] = m.blocks, counts[2] = m.barriers, counts[3] = m.exchanges;
}
}
