// Which instruction set the kernels use: the best one of this machine, chosen once on first use,
// lowered by BRANCHWISE_CPU_ISA or the op cpu_isa.
#pragma once

namespace branchwise {

enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx_bf16 = 4 };

Isa best_isa();     // what this CPU and its operating system support
Isa current_isa();  // what the kernels use now
void set_isa(Isa);  // throws if the machine lacks it

// The table `name` of the level in use; kernels that do not use AMX have none of that level.
#if defined(__x86_64__)
#define BW_KERNELS(name)                                                             \
  (::branchwise::current_isa() >= ::branchwise::Isa::avx512_bf16 ? avx512_bf16::name \
   : ::branchwise::current_isa() == ::branchwise::Isa::avx512    ? avx512::name      \
   : ::branchwise::current_isa() == ::branchwise::Isa::avx2      ? avx2::name        \
                                                                 : baseline::name)
#else
#define BW_KERNELS(name) baseline::name
#endif

}  // namespace branchwise
