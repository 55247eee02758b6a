/* CUDA kernels compiled as C++: what they use of CUDA, and a launch.

   The blocks of a launch run one after another, those of a cooperative launch all at once. The
   threads of a block run in lock-step as fibers, each up to its next barrier, or (EMULATOR_THREADS)
   as real threads, which the sanitizers understand. Shared memory is filled with 0xFF (NaN) before
   each block. Threads that do not all arrive at one barrier stop the launch with a message. */
#pragma once
#include <math.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>

#define __global__
#define __device__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("shared_memory")))
#define SHARED(type, name) type *name = reinterpret_cast<type *>(emulator::here->dynamic)
#define POLL(counter) emulator::poll(counter, __LINE__)
#define __threadfence() emulator::fence()
#define atomicAdd(counter, value) emulator::add(counter, value)
#define __syncthreads() emulator::wait(emulator::BLOCK, __LINE__)
#define __syncwarp(...) emulator::wait(emulator::WARP, __LINE__)
#define __shfl_down_sync(mask, value, delta) \
    emulator::shuffle(mask, value, emulator::lane() + int(delta), __LINE__)
#define __shfl_xor_sync(mask, value, bits) \
    emulator::shuffle(mask, value, emulator::lane() ^ int(bits), __LINE__)

using std::max;
using std::min;

template <class T>
static inline T __ldg(const T *p)
{
    return *p;
}

template <class T>
static inline T __ldcg(const T *p)
{
    return *p;
}

extern "C" unsigned char __start_shared_memory[] __attribute__((weak));
extern "C" unsigned char __stop_shared_memory[] __attribute__((weak));

namespace emulator {

enum Scope { BLOCK, WARP };
struct Index {
    unsigned x, y, z;
};
struct Kernel {
    const char *name;
    void (*call)(void **arguments);
};

const int MOST = 1024, GUARD = 64;

char message[256];
Index block_size, grid_size;

/* Plain stores that no sanitizer and no library function looks at. */
__attribute__((no_sanitize("address"), noinline)) void fill(unsigned char *from, unsigned char *to)
{
    for (volatile unsigned char *p = from; p < to; ++p)
        *p = 0xFF;
}

void diverged(const char *what, int line, Index block)
{
    snprintf(message, sizeof message,
             "barrier in line %d, block (%u, %u): %s", line, block.x, block.y, what);
}

}  // namespace emulator

#define blockIdx emulator::here->index
#define blockDim emulator::block_size
#define gridDim emulator::grid_size
#define threadIdx emulator::thread_index

#ifdef EMULATOR_THREADS
#include "emulator_threads.hpp"
#else
#include "emulator_fibers.hpp"
#endif

namespace emulator {

inline int lane()
{
    return threadIdx.x % 32;
}

template <class T>
T shuffle(unsigned mask, T value, int from, int line)
{
    static_assert(sizeof(T) <= sizeof here->slots[0][0], "a register of at most 8 bytes");
    if (mask != 0xffffffffu) {
        fprintf(stderr, "shuffle in line %d: the mask is not full\n", line);
        abort();
    }
    unsigned long long *slot = here->slots[shuffles()++ % 2] + threadIdx.x / 32 * 32;
    memcpy(slot + lane(), &value, sizeof value);
    wait(WARP, line);
    memcpy(&value, slot + (from < 32 ? from : lane()), sizeof value);
    return value;
}

}  // namespace emulator
