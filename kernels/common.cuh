/* What every kernel file begins with: the type `real`, sums over a block, a barrier of the
   grid, random bits.

   Compiled with -DREAL=float or -DREAL=double. A block is one-dimensional and a whole number of
   warps; sums are taken in an order that depends on the size of the block alone, so that a run
   repeats bit for bit. */
#pragma once

typedef REAL real;
typedef unsigned long long u64;

const int WIDTH = 16 / sizeof(real);

struct alignas(16) Pack {
    real v[WIDTH];
};

#ifndef INFINITY /* the run-time compiler has no math.h */
#define INFINITY __int_as_float(0x7f800000)
#endif

/* The dynamic shared memory of the block, under a name and a type. */
#ifndef SHARED
#define SHARED(type, name)                                       \
    extern __shared__ __align__(16) unsigned char shared_bytes[]; \
    type *name = reinterpret_cast<type *>(shared_bytes)
#endif

/* A counter as it is now in global memory. */
#ifndef POLL
#define POLL(counter) (*reinterpret_cast<volatile unsigned *>(counter))
#endif

enum : unsigned { FULL = 0xffffffffu }; /* all lanes of a warp */
const u64 GOLDEN = 0x9E3779B97F4A7C15ull;

/* A barrier of the gridDim.x blocks that have one blockIdx.y, in two halves, of which each block
   calls the first, then the second; only in a cooperative launch. The counter is theirs alone and
   once zero: the additions of all of them turn its highest bit and leave the others.

   Writes of a block before the first half are seen by __ldcg of any of them after the second:
   __syncthreads and thread 0's fence put them before the addition, and its fence after the poll
   puts the poll before what the block reads. */
__device__ inline unsigned grid_arrive(unsigned *counter)
{
    __syncthreads();
    if (threadIdx.x)
        return 0;
    __threadfence();
    return atomicAdd(counter, blockIdx.x ? 1u : 0x80000001u - gridDim.x);
}

/* `arrived` is what grid_arrive returned. */
__device__ inline void grid_wait(unsigned *counter, unsigned arrived)
{
    if (threadIdx.x == 0) {
        while (!((POLL(counter) ^ arrived) >> 31)) {
        }
        __threadfence();
    }
    __syncthreads();
}

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

/* State before a step: the last one, or `init` where a sequence begins. */
__device__ inline real before(real carry, real state, real init)
{
    return carry * state + (1 - carry) * init;
}

/* Derivative of the candidate's nonlinearity, tanh or logistic. */
__device__ inline real slope(real candidate, int tanh_candidate)
{
    return tanh_candidate ? 1 - candidate * candidate : candidate * (1 - candidate);
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

/* Logits of a tile of items first..last - 1 in registers only: use(e, item, logit) is called by one
   thread for each of them, e = 0..EACH - 1 its event, of_event(e).

   A thread has EACH events by EACH items at a time; LANES threads share their events, of which the
   block has blockDim.x / LANES * EACH, at most 64. A logit is one chain of fused products
   over k = 0..D-1, so equal rows of W_out tie to the bit. All threads of the block must call it.
   H [N, D], W_out [I, D]. */
const int LANES = 16, EACH = 4;

__device__ inline long long of_event(int e)
{
    int groups = blockDim.x / LANES;
    return (long long)blockIdx.x * groups * EACH + threadIdx.x / LANES + e * groups;
}

template <class Use>
__device__ void each_logit(const real *H, const real *W_out, int N, int D, long long first,
                           long long last, Use use)
{
    const int DEPTH = 16, ITEMS = LANES * EACH;
    __shared__ real h[64][DEPTH + 1], w[ITEMS][DEPTH + 1];
    int lane = threadIdx.x % LANES, group = threadIdx.x / LANES, groups = blockDim.x / LANES;
    int events = groups * EACH;
    long long first_event = (long long)blockIdx.x * events;
    for (long long i0 = first; i0 < last; i0 += ITEMS) {
        real logit[EACH][EACH] = {};
        for (int k0 = 0; k0 < D; k0 += DEPTH) {
            __syncthreads();
            for (int q = threadIdx.x; q < events * DEPTH; q += blockDim.x) {
                long long n = first_event + q / DEPTH, k = k0 + q % DEPTH;
                h[q / DEPTH][q % DEPTH] = n < N && k < D ? H[n * D + k] : real(0);
            }
            for (int q = threadIdx.x; q < ITEMS * DEPTH; q += blockDim.x) {
                long long i = i0 + q / DEPTH, k = k0 + q % DEPTH;
                w[q / DEPTH][q % DEPTH] = i < last && k < D ? W_out[i * D + k] : real(0);
            }
            __syncthreads();
            for (int k = 0; k < DEPTH; ++k)
#pragma unroll
                for (int e = 0; e < EACH; ++e)
#pragma unroll
                    for (int i = 0; i < EACH; ++i)
                        logit[e][i] = fma(h[group + e * groups][k], w[lane + i * LANES][k],
                                          logit[e][i]);
        }
#pragma unroll
        for (int e = 0; e < EACH; ++e)
#pragma unroll
            for (int i = 0; i < EACH; ++i)
                if (of_event(e) < N && i0 + lane + i * LANES < last)
                    use(e, i0 + lane + i * LANES, logit[e][i]);
    }
}
