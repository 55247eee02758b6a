/* Rows of tables: windows read from the log, gather, sums over equal rows, RMSprop.

   Letters as in docs/architecture.rst; all arrays are in C order. A run is K windows, padded to T
   steps of B columns; c = t * B + b numbers the places of a window. Dropout is given by (start,
   threshold, factor), threshold 0 drops nothing. A sum goes over the places of a row in the order
   of the places, so it repeats bit for bit. */
#include "common.cuh"

__device__ inline real dropped(real value, u64 start, u64 element, u64 threshold, real factor)
{
    return keep(start, element, threshold) ? value * factor : real(0);
}

/* `windows.window` of a whole run, one thread for each place.

   indptr [U + 1], items: the log. user, begin, length, fresh, target_from [K, B]: the slices.
   x, event, carry [K, T, B]. key [K, T, B]: window * (n_items + 1) + item, n_items at padding.
   cell, y [K, T * B]: place and next item of each target, in the order of the places.
   number [K, T, B]: of the target at each place, -1 where there is none. */
extern "C" __global__ void read_windows(
    const long long *indptr, const int *items, const int *user, const long long *begin,
    const int *length, const unsigned char *fresh, const long long *target_from, int *x,
    real *event, real *carry, long long *key, int *cell, int *y, int *number, int K, int T, int B,
    int n_items)
{
    long long places = (long long)T * B, all = K * places;
    long long stride = (long long)gridDim.x * blockDim.x;
    for (long long q = (long long)blockIdx.x * blockDim.x + threadIdx.x; q < all; q += stride) {
        long long k = q / places;
        int c = int(q % places), t = c / B, b = c % B;
        int before = 0;
        bool here = false, counts = false;
        long long at = 0;
        for (int o = 0; o < B; ++o) {
            long long column = k * B + o, from = begin[column];
            long long first = indptr[user[column]], n = indptr[user[column] + 1] - first;
            long long low = max(target_from[column] - 1 - from, 0ll);
            long long high = min((long long)length[column], n - 1 - from);
            before += int(max(min((long long)t + (o < b), high) - low, 0ll));
            if (o == b) {
                at = first + from + t;
                here = t < length[column];
                counts = low <= t && t < high;
            }
        }
        x[q] = here ? items[at] : 0;
        event[q] = here;
        carry[q] = !(fresh[k * B + b] && t == 0);
        key[q] = k * (n_items + 1ll) + (here ? items[at] : n_items);
        number[q] = counts ? before : -1;
        if (counts) {
            cell[k * places + before] = c;
            y[k * places + before] = items[at + 1];
        }
    }
}

/* out[m] = table[index[m]] with dropout. Block (m, part of the columns). out [M, width]. */
extern "C" __global__ void gather(
    const real *table, const int *index, real *out, long long width, unsigned long long start,
    unsigned long long threshold, real factor)
{
    long long m = blockIdx.x;
    const real *row = table + index[m] * width;
    long long stride = (long long)gridDim.y * blockDim.x;
    for (long long j = (long long)blockIdx.y * blockDim.x + threadIdx.x; j < width; j += stride)
        out[m * width + j] = dropped(row[j], start, m * width + j, threshold, factor);
}

/* H[n] = the state after the place of cell n, with dropout. Block n. states [T + 1, B, D]. */
extern "C" __global__ void take_states(
    const real *states, const int *cell, real *H, int B, int D, unsigned long long start,
    unsigned long long threshold, real factor)
{
    long long n = blockIdx.x, c = cell[n];
    for (int d = threadIdx.x; d < D; d += blockDim.x)
        H[n * D + d] = dropped(states[(c + B) * D + d], start, c * D + d, threshold, factor);
}

/* The inverse: dH[c] = dH_cells[number[c]] with dropout, 0 where there is no target. Block c. */
extern "C" __global__ void spread_cells(
    const real *dH_cells, const int *number, real *dH, int D, unsigned long long start,
    unsigned long long threshold, real factor)
{
    long long c = blockIdx.x, n = number[c];
    for (int d = threadIdx.x; d < D; d += blockDim.x)
        dH[c * D + d] =
            n < 0 ? real(0) : dropped(dH_cells[n * D + d], start, c * D + d, threshold, factor);
}

/* The first sorted place after q that has another key; the keys are in order and end at n. */
__device__ inline long long segment_end(const long long *sorted, long long q, long long n)
{
    long long low = q + 1, high = n;
    while (low < high) {
        long long middle = (low + high) / 2;
        if (sorted[middle] == sorted[q])
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* Sum of column j over the sorted places q..end - 1. values [places, width], its places counted
   from `base` in `order`. */
__device__ inline real segment_sum(
    const real *__restrict__ values, const long long *__restrict__ order, long long q,
    long long end, long long base, long long width, long long j, u64 start, u64 threshold,
    real factor)
{
    real total = 0;
#pragma unroll 4
    for (long long p = q; p < end; ++p) {
        long long element = (order[p] - base) * width + j;
        total += dropped(values[element], start, element, threshold, factor);
    }
    return total;
}

/* sums[m] = sum of the values of one row. Block (m, part of the columns). sorted, order [n]: keys
   in ascending order, and the place of each; begin [M]: where each row begins in them. */
extern "C" __global__ void sum_rows(
    const real *values, const long long *sorted, const long long *order, const long long *begin,
    real *sums, long long n, long long width)
{
    long long m = blockIdx.x, stride = (long long)gridDim.y * blockDim.x;
    long long q = begin[m], end = segment_end(sorted, q, n);
    for (long long j = (long long)blockIdx.y * blockDim.x + threadIdx.x; j < width; j += stride)
        sums[m * width + j] = segment_sum(values, order, q, end, 0, width, j, 0, 0, real(1));
}

/* What RMSprop owes a row for the steps that it was left out of; 1 for the touched rule. */
__device__ inline real catch_up(const long long *stamp, long long row, long long step, int dense,
                                double decay)
{
    return dense ? real(pow(decay, double(step - 1 - stamp[row]))) : real(1);
}

/* RMSprop on the rows of a `RowGrad`. Block m. W, ms [R, width]; stamp [R] where dense. */
extern "C" __global__ void move_rows(
    real *W, real *ms, long long *stamp, const int *rows, const real *g, long long width,
    int dense, long long step, double decay, real learning_rate, real rho, real rest, real eps)
{
    long long m = blockIdx.x, row = rows[m];
    real late = catch_up(stamp, row, step, dense, decay);
    for (long long j = threadIdx.x; j < width; j += blockDim.x) {
        ms[row * width + j] *= late;
        rmsprop(W + row * width + j, ms + row * width + j, g[m * width + j], learning_rate, rho,
                rest, eps);
    }
    __syncthreads();
    if (dense && threadIdx.x == 0)
        stamp[row] = step;
}

/* Gradient of W_in's rows and RMSprop on them, for one window of a run.

   Block p has place base + p of the sorted keys, and works where a new row begins there. The
   window's keys begin with `key`. dA [T, B, width]; its dropout is that of `gather`. */
extern "C" __global__ void move_items(
    real *W, real *ms, long long *stamp, const real *dA, const long long *sorted,
    const long long *order, long long base, long long key, long long width, int dense,
    long long step, double decay, unsigned long long start, unsigned long long threshold,
    real factor, real learning_rate, real rho, real rest, real eps)
{
    long long q = base + blockIdx.x, row = sorted[q] - key;
    if (blockIdx.x > 0 && sorted[q - 1] == sorted[q])
        return;
    long long end = segment_end(sorted, q, base + gridDim.x);
    real late = catch_up(stamp, row, step, dense, decay);
    for (long long j = threadIdx.x; j < width; j += blockDim.x) {
        real g = segment_sum(dA, order, q, end, base, width, j, start, threshold, factor);
        ms[row * width + j] *= late;
        rmsprop(W + row * width + j, ms + row * width + j, g, learning_rate, rho, rest, eps);
    }
    __syncthreads();
    if (dense && threadIdx.x == 0)
        stamp[row] = step;
}

/* RMSprop on a whole array. */
extern "C" __global__ void move_dense(
    real *w, real *ms, const real *g, long long size, real learning_rate, real rho, real rest,
    real eps)
{
    long long stride = (long long)gridDim.x * blockDim.x;
    for (long long j = (long long)blockIdx.x * blockDim.x + threadIdx.x; j < size; j += stride)
        rmsprop(w + j, ms + j, g[j], learning_rate, rho, rest, eps);
}
