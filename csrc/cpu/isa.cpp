#include "cpu/isa.h"

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <tuple>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "common/check.h"
#include "cpu/kernels/memory.h"

namespace branchwise {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16"};

Isa from_environment() {
  const char* wanted = std::getenv("BRANCHWISE_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return best_isa();
  for (int level = 0; level < static_cast<int>(std::size(kNames)); ++level) {
    if (std::strcmp(wanted, kNames[level]) != 0) continue;
    BW_CHECK(level <= static_cast<int>(best_isa()), "BRANCHWISE_CPU_ISA=", wanted,
             ": this machine only supports up to ", kNames[static_cast<int>(best_isa())]);
    return static_cast<Isa>(level);
  }
  fail("BRANCHWISE_CPU_ISA=", wanted,
       ": must be one of baseline, avx2, avx512, avx512_bf16, amx_bf16");
}

std::atomic<int> chosen{-1};

#if defined(__x86_64__)
// Linux gives a process tile registers when it asks for them.
bool has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBf16) == 0 || (d & kTile) == 0)
    return false;
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

Isa find_best_isa() {
#if defined(__x86_64__)
  // The builtins also ask the operating system whether it saves the wide registers.
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c")))
    return Isa::baseline;
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")))
    return Isa::avx2;
  if (!__builtin_cpu_supports("avx512bf16")) return Isa::avx512;
  return has_amx() ? Isa::amx_bf16 : Isa::avx512_bf16;
#else
  return Isa::baseline;
#endif
}

bool is_amd() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

}  // namespace

extern const bool amd_memory;
const bool amd_memory = is_amd();

Isa best_isa() {
  static const Isa best = find_best_isa();
  return best;
}

Isa current_isa() {
  int level = chosen.load(std::memory_order_relaxed);
  if (level < 0) {
    level = static_cast<int>(from_environment());
    chosen.store(level, std::memory_order_relaxed);
  }
  return static_cast<Isa>(level);
}

void set_isa(Isa isa) {
  const int level = static_cast<int>(isa);
  BW_CHECK(level >= 0 && level <= static_cast<int>(best_isa()),
           "cpu_isa: request must be between 0 and ", static_cast<int>(best_isa()), " (",
           kNames[static_cast<int>(best_isa())], ") on this machine, got ", level);
  chosen.store(level, std::memory_order_relaxed);
}

std::tuple<int64_t, int64_t> cpu_isa(int64_t request) {
  if (request >= 0) set_isa(static_cast<Isa>(request));
  return {static_cast<int64_t>(current_isa()), static_cast<int64_t>(best_isa())};
}

}  // namespace branchwise

STABLE_TORCH_LIBRARY_IMPL(branchwise, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&branchwise::cpu_isa));
}
