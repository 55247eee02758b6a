/* The recurrent cells and the gradient of their matrices: crnn_np/cells.py on the device.

   Arrays, with T steps, B columns, D units, G gates (tanh 1, GRU 3: z, r, candidate):
     A, dA [T, B, G*D]; cache [T, B, 3*D] (z, r, candidate; GRU only); dH [T, B, D];
     event, carry [T, B]; s0, ds0 [B, D]; states [T + 1, B, D]; W_h [U, D, G*D];
     row [B], the row of W_h that a column uses.

   A pass over a window is one launch of B blocks, one for each column. Where `resident` is 1 the
   block first copies its matrix to shared memory, D * G*D reals behind the work arrays; otherwise
   each step reads it anew. Forward, the lanes of a warp take neighbouring columns of the matrix;
   backward, neighbouring elements of a row: in both no two lanes meet in one bank, and what is read
   from slow memory is read in whole lines. Input of the next step is loaded a step ahead. */
#include "common.cuh"

/* Room for n reals, a whole number of packs. */
__device__ inline int packed(int n)
{
    return (n + WIDTH - 1) / WIDTH * WIDTH;
}

/* Into how many parts the threads of a block cut the sums of `times`. */
__device__ inline int parts(int columns)
{
    int groups = (columns + 31) / 32, warps = blockDim.x / 32;
    return warps > groups ? warps / groups : 1;
}

/* partial[p, j] = part p of the sum over d of v[d] W[d, j], j < columns; `total` adds them up. */
__device__ __forceinline__ void times(const real *v, const real *W, int n, int stride, int columns,
                                      real *partial)
{
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int groups = (columns + 31) / 32, all = groups * parts(columns);
    int length = packed((n + parts(columns) - 1) / parts(columns));
    for (int item = warp; item < all; item += blockDim.x / 32) {
        int j = item % groups * 32 + lane, part = item / groups;
        if (j >= columns)
            continue;
        int d = part * length, end = min(n, d + length);
        const real *w = W + j;
        real sum = 0;
#pragma unroll 4
        for (; d + WIDTH <= end; d += WIDTH) {
            Pack h = *reinterpret_cast<const Pack *>(v + d);
#pragma unroll
            for (int k = 0; k < WIDTH; ++k)
                sum += h.v[k] * w[(d + k) * stride];
        }
        for (; d < end; ++d)
            sum += v[d] * w[d * stride];
        partial[part * columns + j] = sum;
    }
}

__device__ inline real total(const real *partial, int columns, int j)
{
    real sum = partial[j];
    for (int p = 1; p < parts(columns); ++p)
        sum += partial[p * columns + j];
    return sum;
}

/* Sums over the warp of four values: that of value k in lanes 8k to 8k + 7. */
__device__ inline real warp_sums(real a, real b, real c, real d)
{
    bool high = threadIdx.x & 16;
    real first = (high ? c : a) + __shfl_xor_sync(FULL, high ? a : c, 16);
    real second = (high ? d : b) + __shfl_xor_sync(FULL, high ? b : d, 16);
    high = threadIdx.x & 8;
    real sum = (high ? second : first) + __shfl_xor_sync(FULL, high ? first : second, 8);
    for (int bits = 4; bits; bits /= 2)
        sum += __shfl_xor_sync(FULL, sum, bits);
    return sum;
}

/* out[i] = sum over j < columns of W[i, j] v[j], i < n, four rows to a warp. */
__device__ __forceinline__ void times_transposed(const real *v, const real *W, int n, int stride,
                                                 int columns, real *out)
{
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int i = 4 * warp; i < n; i += blockDim.x / 8) {
        const real *w[4];
        real sum[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            w[k] = W + min(i + k, n - 1) * stride;
            sum[k] = 0;
        }
#pragma unroll 4
        for (int j = lane; j < columns; j += 32) {
            real x = v[j];
#pragma unroll
            for (int k = 0; k < 4; ++k)
                sum[k] += w[k][j] * x;
        }
        real got = warp_sums(sum[0], sum[1], sum[2], sum[3]);
        if (lane % 8 == 0 && i + lane / 8 < n)
            out[i + lane / 8] = got;
    }
}

__device__ inline void copy(const real *from, real *to, int n)
{
#pragma unroll 8
    for (int k = threadIdx.x; k < n; k += blockDim.x)
        to[k] = from[k];
}

/* What a thread needs of one step: the events, and its first element of up to five arrays. */
struct Input {
    real event, carry, next_carry, v[5];
};

/* Element i of an array of one step, known already where it is the thread's first. */
__device__ inline real element(const real *from, int i, real first)
{
    return i == threadIdx.x ? first : from[i];
}

/* ------------------------------------------------------------------ tanh */

__device__ __forceinline__ Input tanh_input(const real *A, const real *event, const real *carry,
                                            int t, int T, int B, int D)
{
    int b = blockIdx.x, cell = t * B + b;
    Input input = {0, 0, 1, {}};
    if (t >= T)
        return input;
    input.event = event[cell];
    if (t + 1 < T)
        input.next_carry = carry[cell + B];
    if (threadIdx.x < D)
        input.v[0] = A[(long long)cell * D + threadIdx.x];
    return input;
}

__device__ __forceinline__ void tanh_steps(
    const real *__restrict__ A, const real *W, const real *__restrict__ event,
    const real *__restrict__ carry, real init, real *states, int T, int B, int D,
    real *h, real *partial)
{
    int b = blockIdx.x;
    Input now = tanh_input(A, event, carry, 0, T, B, D);
    for (int t = 0; t < T; ++t) {
        Input next = tanh_input(A, event, carry, t + 1, T, B, D);
        times(h, W, D, D, D, partial);
        __syncthreads();
        const real *a = A + (long long)(t * B + b) * D;
        real *s = states + (long long)((t + 1) * B + b) * D;
        for (int i = threadIdx.x; i < D; i += blockDim.x) {
            real fresh = tanh(element(a, i, now.v[0]) + total(partial, D, i));
            real state = now.event * fresh + (1 - now.event) * h[i];
            s[i] = state;
            h[i] = before(now.next_carry, state, init);
        }
        __syncthreads();
        now = next;
    }
}

/* Shared memory: h [D], partial [max(threads, D)], W [D, D] where resident; each in whole packs. */
extern "C" __global__ void __launch_bounds__(1024)
tanh_forward(const real *__restrict__ A, const real *__restrict__ W_h, const int *__restrict__ row,
             const real *__restrict__ event, const real *__restrict__ carry, real init,
             const real *s0, real *states, int T, int B, int D, int resident)
{
    SHARED(real, h);
    real *partial = h + packed(D), *matrix = partial + packed(max(int(blockDim.x), D));
    int b = blockIdx.x;
    const real *W = W_h + (long long)row[b] * D * D;
    real c = T ? carry[b] : 1;
    for (int i = threadIdx.x; i < D; i += blockDim.x) {
        real s = s0[b * D + i];
        states[b * D + i] = s;
        h[i] = before(c, s, init);
    }
    if (resident)
        copy(W, matrix, D * D);
    __syncthreads();
    if (resident)
        tanh_steps(A, matrix, event, carry, init, states, T, B, D, h, partial);
    else
        tanh_steps(A, W, event, carry, init, states, T, B, D, h, partial);
}

__device__ __forceinline__ Input tanh_back_input(const real *dH, const real *states,
                                                 const real *event, const real *carry, int t,
                                                 int B, int D)
{
    int b = blockIdx.x, cell = t * B + b;
    Input input = {0, 0, 0, {}};
    if (t < 0)
        return input;
    input.event = event[cell];
    input.carry = carry[cell];
    if (threadIdx.x < D) {
        input.v[0] = dH[(long long)cell * D + threadIdx.x];
        input.v[1] = states[(long long)(cell + B) * D + threadIdx.x];
    }
    return input;
}

__device__ __forceinline__ void tanh_steps_back(
    const real *__restrict__ dH, const real *W, const real *__restrict__ event,
    const real *__restrict__ carry, const real *__restrict__ states, real *__restrict__ dA, int T,
    int B, int D, real *ds, real *da, real *product)
{
    int b = blockIdx.x;
    Input now = tanh_back_input(dH, states, event, carry, T - 1, B, D);
    for (int t = T - 1; t >= 0; --t) {
        Input next = tanh_back_input(dH, states, event, carry, t - 1, B, D);
        int cell = t * B + b;
        for (int i = threadIdx.x; i < D; i += blockDim.x) {
            real dh = element(dH + (long long)cell * D, i, now.v[0]) + ds[i];
            real h = element(states + (long long)(cell + B) * D, i, now.v[1]);
            real a = now.event * dh * (1 - h * h);
            dA[(long long)cell * D + i] = a;
            da[i] = a;
            ds[i] = (1 - now.event) * dh;
        }
        __syncthreads();
        times_transposed(da, W, D, D, D, product);
        __syncthreads();
        for (int i = threadIdx.x; i < D; i += blockDim.x)
            ds[i] = now.carry * (ds[i] + product[i]);
        now = next;
    }
}

/* Shared memory: ds, da, product [D], W [D, D] where resident; each in whole packs. */
extern "C" __global__ void __launch_bounds__(1024)
tanh_backward(const real *__restrict__ dH, const real *__restrict__ W_h,
              const int *__restrict__ row, const real *__restrict__ event,
              const real *__restrict__ carry, const real *__restrict__ states,
              real *__restrict__ ds0, real *__restrict__ dA, int T, int B, int D, int resident)
{
    SHARED(real, ds);
    real *da = ds + packed(D), *product = da + packed(D), *matrix = product + packed(D);
    int b = blockIdx.x;
    const real *W = W_h + (long long)row[b] * D * D;
    for (int i = threadIdx.x; i < D; i += blockDim.x)
        ds[i] = 0;
    if (resident) {
        copy(W, matrix, D * D);
        tanh_steps_back(dH, matrix, event, carry, states, dA, T, B, D, ds, da, product);
    } else {
        tanh_steps_back(dH, W, event, carry, states, dA, T, B, D, ds, da, product);
    }
    for (int i = threadIdx.x; i < D; i += blockDim.x)
        ds0[b * D + i] = ds[i];
}

/* ------------------------------------------------------------------- GRU */

__device__ __forceinline__ Input gru_input(const real *A, const real *event, const real *carry,
                                           int t, int T, int B, int D)
{
    int b = blockIdx.x, cell = t * B + b;
    Input input = {0, 0, 1, {}};
    if (t >= T)
        return input;
    input.event = event[cell];
    if (t + 1 < T)
        input.next_carry = carry[cell + B];
    if (threadIdx.x < D) {
        const real *a = A + (long long)cell * 3 * D + threadIdx.x;
        input.v[0] = a[0];
        input.v[1] = a[D];
        input.v[2] = a[2 * D];
    }
    return input;
}

__device__ __forceinline__ void gru_steps(
    const real *__restrict__ A, const real *W, const real *__restrict__ event,
    const real *__restrict__ carry, real init, real *states, real *__restrict__ cache, int T,
    int B, int D, int tanh_candidate, real *h, real *rh, real *z, real *partial)
{
    int b = blockIdx.x;
    Input now = gru_input(A, event, carry, 0, T, B, D);
    for (int t = 0; t < T; ++t) {
        Input next = gru_input(A, event, carry, t + 1, T, B, D);
        const real *a = A + (long long)(t * B + b) * 3 * D;
        real *kept = cache + (long long)(t * B + b) * 3 * D;
        real *s = states + (long long)((t + 1) * B + b) * D;
        times(h, W, D, 3 * D, 2 * D, partial);
        __syncthreads();
        for (int i = threadIdx.x; i < D; i += blockDim.x) {
            z[i] = sigmoid(element(a, i, now.v[0]) + total(partial, 2 * D, i));
            real r = sigmoid(element(a + D, i, now.v[1]) + total(partial, 2 * D, D + i));
            rh[i] = r * h[i];
            kept[i] = z[i];
            kept[D + i] = r;
        }
        __syncthreads();
        times(rh, W + 2 * D, D, 3 * D, D, partial);
        __syncthreads();
        for (int i = threadIdx.x; i < D; i += blockDim.x) {
            real sum = element(a + 2 * D, i, now.v[2]) + total(partial, D, i);
            real candidate = tanh_candidate ? tanh(sum) : sigmoid(sum);
            real fresh = (1 - z[i]) * h[i] + z[i] * candidate;
            real state = now.event * fresh + (1 - now.event) * h[i];
            kept[2 * D + i] = candidate;
            s[i] = state;
            h[i] = before(now.next_carry, state, init);
        }
        __syncthreads();
        now = next;
    }
}

/* Shared memory: h, rh, z [D], partial [max(threads, 2 D)], W [D, 3 D] where resident; each in
   whole packs. */
extern "C" __global__ void __launch_bounds__(1024)
gru_forward(const real *__restrict__ A, const real *__restrict__ W_h, const int *__restrict__ row,
            const real *__restrict__ event, const real *__restrict__ carry, real init,
            const real *s0, real *states, real *__restrict__ cache, int T, int B, int D,
            int tanh_candidate, int resident)
{
    SHARED(real, h);
    real *rh = h + packed(D), *z = rh + packed(D), *partial = z + packed(D);
    real *matrix = partial + packed(max(int(blockDim.x), 2 * D));
    int b = blockIdx.x;
    const real *W = W_h + (long long)row[b] * 3 * D * D;
    real c = T ? carry[b] : 1;
    for (int i = threadIdx.x; i < D; i += blockDim.x) {
        real s = s0[b * D + i];
        states[b * D + i] = s;
        h[i] = before(c, s, init);
    }
    if (resident)
        copy(W, matrix, 3 * D * D);
    __syncthreads();
    if (resident)
        gru_steps(A, matrix, event, carry, init, states, cache, T, B, D, tanh_candidate, h, rh, z,
                  partial);
    else
        gru_steps(A, W, event, carry, init, states, cache, T, B, D, tanh_candidate, h, rh, z,
                  partial);
}

__device__ __forceinline__ Input gru_back_input(const real *dH, const real *states,
                                                const real *cache, const real *event,
                                                const real *carry, int t, int B, int D)
{
    int b = blockIdx.x, cell = t * B + b;
    Input input = {0, 0, 0, {}};
    if (t < 0)
        return input;
    input.event = event[cell];
    input.carry = carry[cell];
    if (threadIdx.x < D) {
        input.v[0] = dH[(long long)cell * D + threadIdx.x];
        input.v[1] = states[(long long)cell * D + threadIdx.x];
        input.v[2] = cache[(long long)cell * 3 * D + threadIdx.x];
        input.v[3] = cache[(long long)cell * 3 * D + D + threadIdx.x];
        input.v[4] = cache[(long long)cell * 3 * D + 2 * D + threadIdx.x];
    }
    return input;
}

__device__ __forceinline__ void gru_steps_back(
    const real *__restrict__ dH, const real *W, const real *__restrict__ event,
    const real *__restrict__ carry, real init, const real *__restrict__ states,
    const real *__restrict__ cache, real *__restrict__ dA, int T, int B, int D,
    int tanh_candidate, real *ds, real *h, real *da, real *product)
{
    int b = blockIdx.x;
    Input now = gru_back_input(dH, states, cache, event, carry, T - 1, B, D);
    for (int t = T - 1; t >= 0; --t) {
        Input next = gru_back_input(dH, states, cache, event, carry, t - 1, B, D);
        long long cell = t * B + b;
        const real *kept = cache + cell * 3 * D;
        real *out = dA + cell * 3 * D;
        for (int i = threadIdx.x; i < D; i += blockDim.x) {
            real dh = element(dH + cell * D, i, now.v[0]) + ds[i];
            real z = element(kept, i, now.v[2]), candidate = element(kept + 2 * D, i, now.v[4]);
            h[i] = before(now.carry, element(states + cell * D, i, now.v[1]), init);
            da[i] = now.event * dh * (candidate - h[i]) * z * (1 - z);
            da[2 * D + i] = now.event * dh * z * slope(candidate, tanh_candidate);
            out[i] = da[i];
            out[2 * D + i] = da[2 * D + i];
            ds[i] = (1 - now.event * z) * dh;
        }
        __syncthreads();
        times_transposed(da + 2 * D, W + 2 * D, D, 3 * D, D, product);
        __syncthreads();
        for (int i = threadIdx.x; i < D; i += blockDim.x) {
            real r = element(kept + D, i, now.v[3]), drh = product[i];
            da[D + i] = drh * h[i] * r * (1 - r);
            out[D + i] = da[D + i];
            ds[i] += drh * r;
        }
        __syncthreads();
        times_transposed(da, W, D, 3 * D, 2 * D, product);
        __syncthreads();
        for (int i = threadIdx.x; i < D; i += blockDim.x)
            ds[i] = now.carry * (ds[i] + product[i]);
        now = next;
    }
}

/* Shared memory: ds, h, product [D], da [3 D], W [D, 3 D] where resident; each in whole packs. */
extern "C" __global__ void __launch_bounds__(1024)
gru_backward(const real *__restrict__ dH, const real *__restrict__ W_h,
             const int *__restrict__ row, const real *__restrict__ event,
             const real *__restrict__ carry, real init, const real *__restrict__ states,
             const real *__restrict__ cache, real *__restrict__ ds0, real *__restrict__ dA, int T,
             int B, int D, int tanh_candidate, int resident)
{
    SHARED(real, ds);
    real *h = ds + packed(D), *product = h + packed(D), *da = product + packed(D);
    real *matrix = da + packed(3 * D);
    int b = blockIdx.x;
    const real *W = W_h + (long long)row[b] * 3 * D * D;
    for (int i = threadIdx.x; i < D; i += blockDim.x)
        ds[i] = 0;
    if (resident) {
        copy(W, matrix, 3 * D * D);
        gru_steps_back(dH, matrix, event, carry, init, states, cache, dA, T, B, D, tanh_candidate,
                       ds, h, da, product);
    } else {
        gru_steps_back(dH, W, event, carry, init, states, cache, dA, T, B, D, tanh_candidate, ds,
                       h, da, product);
    }
    for (int i = threadIdx.x; i < D; i += blockDim.x)
        ds0[b * D + i] = ds[i];
}

/* ------------------------------------- the gradient of the recurrent matrices */

const int STEPS = 16, COLUMNS = 32; /* of a tile; it has threads / 2 rows */

/* A thread's part of a tile of dW_h: four rows, row_step apart, and four columns, 8 apart. */
struct Tile {
    int row, column, row_step, end; /* of the columns */
    real sum[4][4];
};

/* The sums of a tile over the cells from..to - 1, in the order b, t. A tile of a GRU lies in the
   columns of z and r, where dA is times h, or in those of the candidate, where it is times r h. */
__device__ __forceinline__ Tile tile_sums(const real *__restrict__ states,
                                          const real *__restrict__ cache,
                                          const real *__restrict__ dA,
                                          const real *__restrict__ carry, real init, int T, int B,
                                          int D, int G, int from, int to, real *left)
{
    int rows = blockDim.x / 2, across = (D + rows - 1) / rows;
    int plain = G == 1 ? D : 2 * D, plain_tiles = (plain + COLUMNS - 1) / COLUMNS;
    int index = blockIdx.y / across, d0 = blockIdx.y % across * rows;
    bool reset = index >= plain_tiles;
    int j0 = reset ? plain + (index - plain_tiles) * COLUMNS : index * COLUMNS;
    int row = threadIdx.x / 8, column = threadIdx.x % 8;
    real *right = left + STEPS * rows;
    Tile tile = {d0 + row, j0 + column, rows / 4, reset ? G * D : plain, {}};
    for (int n0 = from; n0 < to; n0 += STEPS) {
        for (int q = threadIdx.x; q < STEPS * rows; q += blockDim.x) {
            int n = n0 + q / rows, d = d0 + q % rows;
            real value = 0;
            if (n < to && d < D) {
                long long cell = n % T * B + n / T;
                value = before(carry[cell], states[cell * D + d], init);
                value *= reset ? cache[cell * 3 * D + D + d] : 1;
            }
            left[q] = value;
        }
        for (int q = threadIdx.x; q < STEPS * COLUMNS; q += blockDim.x) {
            int n = n0 + q / COLUMNS, j = j0 + q % COLUMNS;
            long long cell = n % T * B + n / T;
            right[q] = n < to && j < tile.end ? dA[cell * G * D + j] : 0;
        }
        __syncthreads();
#pragma unroll 4
        for (int k = 0; k < STEPS; ++k) {
            real a[4], b[4];
#pragma unroll
            for (int p = 0; p < 4; ++p) {
                a[p] = left[k * rows + row + p * tile.row_step];
                b[p] = right[k * COLUMNS + column + 8 * p];
            }
#pragma unroll
            for (int p = 0; p < 16; ++p)
                tile.sum[p / 4][p % 4] += a[p / 4] * b[p % 4];
        }
        __syncthreads();
    }
    return tile;
}

/* dW_h [B, D, G*D], or [1, D, G*D] where `pooled`.
   Grid: (B or 1, tiles) with tiles = ceil(D / (threads / 2)) * (ceil(D / 32), or for a GRU
   ceil(2 D / 32) + ceil(D / 32)). Shared memory: 16 * (threads / 2 + 32) reals. */
extern "C" __global__ void __launch_bounds__(256)
recurrent_gradient(const real *__restrict__ states, const real *__restrict__ cache,
                   const real *__restrict__ dA, const real *__restrict__ carry, real init,
                   real *__restrict__ dW_h, int T, int B, int D, int G, int pooled)
{
    SHARED(real, work);
    int b = blockIdx.x;
    Tile tile = tile_sums(states, cache, dA, carry, init, T, B, D, G, b * T,
                          (pooled ? B : b + 1) * T, work);
    real *out = dW_h + (long long)b * D * G * D;
#pragma unroll
    for (int p = 0; p < 16; ++p) {
        int i = tile.row + p / 4 * tile.row_step, j = tile.column + p % 4 * 8;
        if (i < D && j < tile.end)
            out[i * G * D + j] = tile.sum[p / 4][p % 4];
    }
}

/* The same product, and RMSprop on W_h[row[b]] and its accumulator ms in its place. A column
   without an event, or a window without one where `pooled`, leaves them alone. */
extern "C" __global__ void __launch_bounds__(256)
recurrent_update(const real *__restrict__ states, const real *__restrict__ cache,
                 const real *__restrict__ dA, const int *__restrict__ row,
                 const real *__restrict__ event, const real *__restrict__ carry, real init,
                 real *__restrict__ W_h, real *__restrict__ ms, real learning_rate, real rho,
                 real rest, real eps, int T, int B, int D, int G, int pooled)
{
    SHARED(real, work);
    int b = blockIdx.x, from = b * T, to = (pooled ? B : b + 1) * T;
    int events = 0;
    for (int n = from + threadIdx.x; n < to; n += blockDim.x)
        events |= event[n % T * B + n / T] > 0;
    if (!block_max(events))
        return;
    Tile tile =
        tile_sums(states, cache, dA, carry, init, T, B, D, G, from, to, work);
    long long first = (long long)row[b] * D * G * D;
#pragma unroll
    for (int p = 0; p < 16; ++p) {
        int i = tile.row + p / 4 * tile.row_step, j = tile.column + p % 4 * 8;
        if (i < D && j < tile.end)
            rmsprop(W_h + first + i * G * D + j, ms + first + i * G * D + j,
                    tile.sum[p / 4][p % 4], learning_rate, rho, rest, eps);
    }
}
