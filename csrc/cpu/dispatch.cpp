// Compiled once, without level flags.
#include "dispatch.h"

#include <pthread.h>

#include <atomic>
#include <stdexcept>

#include "kernels.h"
#include "parallel.h"

namespace endomamba {

namespace baseline {
extern const Kernels table;
}
#ifdef ENDOMAMBA_HAS_AVX2
namespace avx2 {
extern const Kernels table;
}
#endif
#ifdef ENDOMAMBA_HAS_AVX512
namespace avx512 {
extern const Kernels table;
}
#endif
#ifdef ENDOMAMBA_HAS_AVX512BF16
namespace avx512bf16 {
extern const Kernels table;
}
#endif

namespace {

std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> tables;
  [[maybe_unused]] const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                                     __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#ifdef ENDOMAMBA_HAS_AVX512BF16
  if (wide && __builtin_cpu_supports("avx512bf16")) tables.push_back(&avx512bf16::table);
#endif
#ifdef ENDOMAMBA_HAS_AVX512
  if (wide) tables.push_back(&avx512::table);
#endif
#ifdef ENDOMAMBA_HAS_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) tables.push_back(&avx2::table);
#endif
  tables.push_back(&baseline::table);
  return tables;
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> table{supported().front()};
  return table;
}

std::atomic<bool> forked{false};
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

bool in_forked_child() { return forked.load(std::memory_order_relaxed); }

std::vector<std::string> levels() {
  std::vector<std::string> names;
  for (const Kernels* table : supported()) names.emplace_back(table->level);
  return names;
}

void set_level(const std::string& level) {
  for (const Kernels* table : supported())
    if (level == table->level) {
      current() = table;
      return;
    }
  std::string known;
  for (const std::string& name : levels()) known += (known.empty() ? "" : ", ") + name;
  throw std::invalid_argument("set_level: level must be one of " + known + " on this machine, got " + level);
}

}  // namespace endomamba
