/* What every kernel file begins with: the type `real`, sums over a block, random bits.

   Compiled with -DREAL=float or -DREAL=double. A block is one-dimensional and a whole number of
   warps; sums are taken in an order that depends on the size of the block alone, so that a run
   repeats bit for bit. */
#pragma once

typedef REAL real;
typedef unsigned long long u64;

#ifndef INFINITY /* the run-time compiler has no math.h */
#define INFINITY __int_as_float(0x7f800000)
#endif

/* The dynamic shared memory of the block, under a name and a type. */
#ifndef SHARED
#define SHARED(type, name)                                       \
    extern __shared__ __align__(16) unsigned char shared_bytes[]; \
    type *name = reinterpret_cast<type *>(shared_bytes)
#endif

enum : unsigned { FULL = 0xffffffffu }; /* all lanes of a warp */
const u64 GOLDEN = 0x9E3779B97F4A7C15ull;

/* Sum over the threads of the block, the same bits in each of them. All threads must call it. */
template <class T>
__device__ T block_sum(T value)
{
    __shared__ T partial[32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    for (int offset = 16; offset; offset /= 2)
        value += __shfl_down_sync(FULL, value, offset);
    if (lane == 0)
        partial[warp] = value;
    __syncthreads();
    value = partial[0];
    for (int w = 1; w < warps; ++w)
        value += partial[w];
    __syncthreads();
    return value;
}

/* Maximum over the threads of the block. All threads must call it. */
template <class T>
__device__ T block_max(T value)
{
    __shared__ T partial[32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    for (int offset = 16; offset; offset /= 2) {
        T other = __shfl_down_sync(FULL, value, offset);
        value = other > value ? other : value;
    }
    if (lane == 0)
        partial[warp] = value;
    __syncthreads();
    value = partial[0];
    for (int w = 1; w < warps; ++w)
        value = partial[w] > value ? partial[w] : value;
    __syncthreads();
    return value;
}

/* Logistic function, as `cells.sigmoid`. */
__device__ inline real sigmoid(real x)
{
    return real(0.5) + real(0.5) * tanh(real(0.5) * x);
}

/* Finaliser of SplitMix64, as `windows.mix`. */
__device__ inline u64 mix(u64 z)
{
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

/* Dropout of one element, as `windows.dropout_keep`: start = mix(key + stream), element its
   index in [T, B, width], threshold = `windows.dropout_threshold`. */
__device__ inline bool keep(u64 start, u64 element, u64 threshold)
{
    return mix(start + (element + 1) * GOLDEN) >> 40 >= threshold;
}

/* One step of RMSprop on one element, as `optim.rmsprop`; rest = 1 - rho. */
__device__ inline void rmsprop(
    real *w, real *ms, real g, real learning_rate, real rho, real rest, real eps)
{
    real square = *ms * rho + rest * g * g;
    *ms = square;
    *w -= learning_rate * g / sqrt(square + eps);
}
