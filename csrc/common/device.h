// Marks functions that CPU and GPU code share.
#pragma once

#if defined(__CUDACC__)
#define BW_HOST_DEVICE __host__ __device__
#define BW_INLINE __host__ __device__ __forceinline__
#else
#define BW_HOST_DEVICE
// Inlined always: a copy shared between ISA levels would have the instructions of one of them.
#define BW_INLINE [[gnu::always_inline]] inline
#endif
