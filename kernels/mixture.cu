/* The mixture of the softmax with pointers into the past and the other users' counts (outputs.py).

   Columns are the users of a window, or single cells; cell n is at place cell[n] = t * columns + b,
   the event first + start[b] + t of its user. Lag i = 0 is the latest event. What the pointers
   make of it is computed anew in each kernel: nothing of the size of the memory is stored. */
#include "common.cuh"

const int MATCHES = 5, STATIC = 3, OWN = MATCHES + 1; /* columns of nu */

/* Where a cell is: its user's first event, its own, and how many events the pointers reach. */
struct Place {
    long long user, first, at;
    int count;
};

__device__ inline Place place_of(int b, int t, const int *user, const long long *start,
                                 const long long *indptr, int memory)
{
    Place place;
    place.user = user[b];
    place.first = indptr[place.user];
    place.at = place.first + start[b] + t;
    place.count = int(min((long long)memory, place.at - place.first + 1));
    return place;
}

/* How much the context of the event at lag i matches the present one, as `outputs.recall`. */
__device__ inline int match_of(const int *items, Place place, int i)
{
    long long s = place.at - i, inside = s - place.first;
    bool one = inside >= 1 && items[s - 1] == items[place.at];
    bool two = inside >= 2 && items[s - 2] == items[place.at - 1];
    if (!one)
        return two;
    return 2 + two + (two && inside >= 3 && items[s - 3] == items[place.at - 2]);
}

/* Score of lag i for a pointer with tau [L, MATCHES] and the user's nu [OWN]. */
__device__ inline real score_of(const real *tau, const real *nu, const int *bucket,
                                const real *ramp, int i, int match)
{
    return tau[bucket[i] * MATCHES + match] + nu[match] + nu[MATCHES] * ramp[i];
}

/* Everything of a cell but the softmax over all items. Block n, cell n.

   Pointers: shift [N, P] is the largest score, mass [N, P] the sum of exp(score - shift). Gate:
   given [N, F + D] = (features, h), hidden [N, Q + 1], its last column 1; share [N, K] = g. p
   [N, K] but for column 0; others [N] = sum of g_k p_k without k = 0. */
extern "C" __global__ void mix_forward(
    const int *cell, const int *user, const long long *start, const int *y,
    const long long *indptr, const int *items, const float *features, const double *experts,
    const real *tau, const real *nu, const real *gate_in, const real *gate_out,
    const real *gate_user, const int *bucket, const real *ramp, const real *H, real *shift,
    double *mass, real *given, real *hidden, double *share, double *p, double *others,
    int columns, int memory, int buckets, int pointers, int F, int D, int Q)
{
    __shared__ double partial[1024];
    long long n = blockIdx.x;
    int K = STATIC + pointers, width = F + D, tid = threadIdx.x, size = blockDim.x;
    int b = cell[n] % columns, t = cell[n] / columns;
    Place place = place_of(b, t, user, start, indptr, memory);
    share += n * K;
    p += n * K;
    given += n * width;
    hidden += n * (Q + 1);

    for (int k = 0; k < pointers; ++k) {
        const real *own_tau = tau + k * buckets * MATCHES;
        const real *own_nu = nu + (place.user * pointers + k) * OWN;
        real largest = -INFINITY;
        for (int i = tid; i < place.count; i += size) {
            real s = score_of(own_tau, own_nu, bucket, ramp, i, match_of(items, place, i));
            largest = s > largest ? s : largest;
        }
        largest = block_max(largest);
        double every = 0, hit = 0;
        for (int i = tid; i < place.count; i += size) {
            real s = score_of(own_tau, own_nu, bucket, ramp, i, match_of(items, place, i));
            double w = exp(s - largest);
            every += w;
            hit += items[place.at - i] == y[n] ? w : 0;
        }
        every = block_sum(every);
        hit = block_sum(hit);
        if (tid == 0) {
            shift[n * pointers + k] = largest;
            mass[n * pointers + k] = every;
            p[STATIC + k] = hit / every;
        }
    }

    for (int i = tid; i < width; i += size)
        given[i] = i < F ? real(features[place.at * F + i]) : H[n * D + i - F];
    if (tid == 0) {
        p[1] = experts[place.at * 2];
        p[2] = experts[place.at * 2 + 1];
        hidden[Q] = 1;
    }
    __syncthreads();
    for (int q0 = 0; q0 < Q; q0 += size) { /* neighbours read neighbours: several rows at once */
        int units = min(Q - q0, size), rows = size / units, row = tid / units;
        double sum = 0;
        for (int i = row; row < rows && i < width; i += rows)
            sum += double(given[i]) * gate_in[(long long)i * Q + q0 + tid % units];
        partial[tid] = sum;
        __syncthreads();
        if (tid < units) {
            for (int r = 1; r < rows; ++r)
                sum += partial[r * units + tid];
            hidden[q0 + tid] = tanh(sum);
        }
        __syncthreads();
    }
    int lane = tid % 32;
    for (int k = tid / 32; k < K; k += size / 32) {
        double sum = 0;
        for (int q = lane; q <= Q; q += 32)
            sum += double(hidden[q]) * gate_out[(long long)q * K + k];
        for (int offset = 16; offset; offset /= 2)
            sum += __shfl_down_sync(FULL, sum, offset);
        if (lane == 0)
            share[k] = sum + gate_user[place.user * K + k];
    }
    __syncthreads();
    if (tid == 0) {
        double largest = -INFINITY, total = 0, rest = 0;
        for (int k = 0; k < K; ++k)
            largest = share[k] > largest ? share[k] : largest;
        for (int k = 0; k < K; ++k)
            total += share[k] = exp(share[k] - largest);
        for (int k = 0; k < K; ++k)
            share[k] /= total;
        for (int k = 1; k < K; ++k)
            rest += share[k] * p[k];
        others[n] = rest;
    }
}

/* Gradients of the gate's layers, times scale. Block n, cell n; p_0 is in p by now.

   dgate [N, K] = dL/dlogits of the gate, dhidden [N, Q] before the tanh; pull [N, P] is what
   dL/dscores goes with (`mix_scores`). */
extern "C" __global__ void mix_gate(
    const real *gate_out, const real *hidden, const double *mass, const double *share,
    const double *p, const double *others, real *dgate, real *dhidden, double *pull, int pointers,
    int Q, real scale)
{
    long long n = blockIdx.x;
    int K = STATIC + pointers;
    share += n * K;
    p += n * K;
    double factor = scale / (others[n] + share[0] * p[0]);
    for (int k = threadIdx.x; k < K; k += blockDim.x) {
        dgate[n * K + k] = share[k] * (scale - factor * p[k]);
        if (k >= STATIC)
            pull[n * pointers + k - STATIC] = factor * share[k] / mass[n * pointers + k - STATIC];
    }
    __syncthreads();
    for (int q = threadIdx.x; q < Q; q += blockDim.x) {
        double d = 0, h = hidden[n * (Q + 1) + q];
        for (int k = 0; k < K; ++k)
            d += double(dgate[n * K + k]) * gate_out[(long long)q * K + k];
        dhidden[n * Q + q] = d * (1 - h * h);
    }
}

/* Sums of dL/dscores of one column and pointer over a piece of the lags: block (b, k; piece).

   A piece is of one bucket and at most blockDim.x lags; piece [pieces + 1] has their bounds.
   number [T, columns] is the cell at each place, or -1. parts [columns, P, pieces, OWN]: the sum
   for each match, and that of all with the ramp. */
extern "C" __global__ void mix_scores(
    const int *number, const int *user, const long long *start, const int *y,
    const long long *indptr, const int *items, const real *tau, const real *nu, const int *bucket,
    const real *ramp, const real *shift, const double *p, const double *pull, const int *piece,
    double *parts, int columns, int T, int memory, int buckets, int pointers)
{
    int b = blockIdx.x / pointers, k = blockIdx.x % pointers, K = STATIC + pointers;
    int low = piece[blockIdx.y], lags = piece[blockIdx.y + 1] - low;
    int rows = blockDim.x / lags, row = threadIdx.x / lags, i = low + threadIdx.x % lags;
    tau += k * buckets * MATCHES;
    nu += ((long long)user[b] * pointers + k) * OWN;
    double sum[MATCHES] = {}, all = 0;
    for (int t = row; row < rows && t < T; t += rows) {
        long long n = number[t * columns + b];
        if (n < 0)
            continue;
        Place place = place_of(b, t, user, start, indptr, memory);
        if (i >= place.count)
            continue;
        int match = match_of(items, place, i);
        real w = exp(score_of(tau, nu, bucket, ramp, i, match) - shift[n * pointers + k]);
        double target = items[place.at - i] == y[n];
        double d = pull[n * pointers + k] * w * (p[n * K + STATIC + k] - target);
        for (int c = 0; c < MATCHES; ++c)
            sum[c] += c == match ? d : 0;
        all += d;
    }
    parts += ((long long)blockIdx.x * gridDim.y + blockIdx.y) * OWN;
    for (int c = 0; c < MATCHES; ++c) {
        double total = block_sum(sum[c]);
        if (threadIdx.x == 0)
            parts[c] = total;
    }
    all = block_sum(all * ramp[i]);
    if (threadIdx.x == 0)
        parts[MATCHES] = all;
}

/* dtau [P, L, MATCHES] from the parts of `mix_scores`: block (bucket, k).

   The pieces of a bucket begin with of_bucket [L + 1]. */
extern "C" __global__ void mix_tau(
    const double *parts, const int *of_bucket, real *dtau, int columns, int pieces)
{
    int low = of_bucket[blockIdx.x], count = of_bucket[blockIdx.x + 1] - low;
    double sum[MATCHES] = {};
    for (long long q = threadIdx.x; q < (long long)columns * count; q += blockDim.x) {
        long long column = q / count * gridDim.y + blockIdx.y;
        const double *part = parts + (column * pieces + low + q % count) * OWN;
        for (int c = 0; c < MATCHES; ++c)
            sum[c] += part[c];
    }
    for (int c = 0; c < MATCHES; ++c) {
        double total = block_sum(sum[c]);
        if (threadIdx.x == 0)
            dtau[(blockIdx.y * gridDim.x + blockIdx.x) * MATCHES + c] = total;
    }
}

/* dnu [columns, P, OWN] and dgate_user [columns, K] of block b's column, and how many cells it
   has in touched [columns]. */
extern "C" __global__ void mix_column(
    const int *number, const double *parts, const real *dgate, real *dnu, real *dgate_user,
    int *touched, int columns, int T, int pointers, int pieces)
{
    long long b = blockIdx.x;
    int K = STATIC + pointers, here = 0;
    for (int j = threadIdx.x; j < pointers * OWN; j += blockDim.x) {
        const double *part = parts + (b * pointers + j / OWN) * pieces * OWN + j % OWN;
        double sum = 0;
        for (int q = 0; q < pieces; ++q)
            sum += part[q * OWN];
        dnu[b * pointers * OWN + j] = sum;
    }
    for (int k = threadIdx.x; k < K; k += blockDim.x) {
        double sum = 0;
        for (int t = 0; t < T; ++t) {
            long long n = number[t * columns + b];
            sum += n < 0 ? real(0) : dgate[n * K + k];
        }
        dgate_user[b * K + k] = sum;
    }
    for (int t = threadIdx.x; t < T; t += blockDim.x)
        here += number[t * columns + b] >= 0;
    here = block_sum(here);
    if (threadIdx.x == 0)
        touched[b] = here;
}

/* RMSprop on one element of a block, or of the row that a column has in it. */
__device__ inline void move_row(real *w, real *ms, const real *g, long long e, int width,
                                const int *user, const int *touched, real learning_rate, real rho,
                                real rest, real eps)
{
    long long b = e / width, place = user[b] * (long long)width + e % width;
    if (touched[b])
        rmsprop(w + place, ms + place, g[e], learning_rate, rho, rest, eps);
}

/* RMSprop on the mixture's own parameters, of nu and gate_user on the rows with a cell. */
extern "C" __global__ void mix_move(
    real *tau, real *nu, real *gate_in, real *gate_out, real *gate_user, real *ms_tau, real *ms_nu,
    real *ms_gate_in, real *ms_gate_out, real *ms_gate_user, const real *dtau, const real *dnu,
    const real *dgate_in, const real *dgate_out, const real *dgate_user, const int *user,
    const int *touched, int columns, int n_tau, int n_nu, int n_gate_in, int n_gate_out, int K,
    real learning_rate, real rho, real rest, real eps)
{
    long long stride = (long long)gridDim.x * blockDim.x;
    long long all = (long long)n_tau + n_gate_in + n_gate_out + columns * (long long)(n_nu + K);
    for (long long j = (long long)blockIdx.x * blockDim.x + threadIdx.x; j < all; j += stride) {
        long long e = j;
        if (e < n_tau) {
            rmsprop(tau + e, ms_tau + e, dtau[e], learning_rate, rho, rest, eps);
            continue;
        }
        e -= n_tau;
        if (e < n_gate_in) {
            rmsprop(gate_in + e, ms_gate_in + e, dgate_in[e], learning_rate, rho, rest, eps);
            continue;
        }
        e -= n_gate_in;
        if (e < n_gate_out) {
            rmsprop(gate_out + e, ms_gate_out + e, dgate_out[e], learning_rate, rho, rest, eps);
            continue;
        }
        e -= n_gate_out;
        if (e < (long long)columns * n_nu)
            move_row(nu, ms_nu, dnu, e, n_nu, user, touched, learning_rate, rho, rest, eps);
        else
            move_row(gate_user, ms_gate_user, dgate_user, e - (long long)columns * n_nu, K, user,
                     touched, learning_rate, rho, rest, eps);
    }
}

/* row[item] += value of each thread with an item, not -1. All threads of the block must call it.

   A thread adds to the items that are its own, in the order of the threads: equal items meet. */
__device__ void spread(double *row, int item, double value)
{
    __shared__ int whose[1024], items[1024];
    __shared__ double values[1024];
    __syncthreads();
    whose[threadIdx.x] = item < 0 ? -1 : item % int(blockDim.x);
    items[threadIdx.x] = item;
    values[threadIdx.x] = value;
    __syncthreads();
    for (int j = 0; j < int(blockDim.x); ++j)
        if (whose[j] == int(threadIdx.x))
            row[items[j]] += values[j];
}

/* Probability of an item: by the softmax, by the other users' unigram, by all else. */
__device__ inline double blended(real logit, double offset, double flat, double common, double extra)
{
    return double(exp(logit + real(offset))) + flat * common + extra;
}

/* What an event gives to single items, and from when on another item is before the target.

   Block n, cell n, after `mix_forward` and the softmax's nll [N] (of the target alone; the
   mixture's replaces it). extra [N, I] begins as 0. level [N, 3]: offset of a logit above the
   target's, flat, the probability that an item gets for each event of the other users, and the
   cut. The counts are `history.Counts`, smoothing and least history.SMOOTHING and FLOOR. */
extern "C" __global__ void mix_extra(
    const int *cell, const int *user, const long long *start, const int *y,
    const long long *indptr, const int *items, const real *tau, const real *nu, const int *bucket,
    const real *ramp, const real *shift, const double *mass, const double *share,
    const double *others, const long long *begin, const long long *follower,
    const long long *times, const long long *unigram, const long long *own_indptr,
    const int *own_items, double *extra, double *level, double *nll, int columns, int memory,
    int buckets, int pointers, int n_items, long long everything, double smoothing, double least,
    double tie)
{
    long long n = blockIdx.x;
    int tid = threadIdx.x, size = blockDim.x;
    int b = cell[n] % columns, t = cell[n] / columns;
    Place place = place_of(b, t, user, start, indptr, memory);
    const double *g = share + n * (STATIC + pointers);
    const int *own = own_items + own_indptr[place.user];
    long long n_own = own_indptr[place.user + 1] - own_indptr[place.user];
    int x = items[place.at];
    double *row = extra + n * n_items;

    long long here = 0; /* events of the other users after x */
    for (long long q = begin[x] + tid; q < begin[x + 1]; q += size) {
        here += times[q];
        row[follower[q]] = double(times[q]);
    }
    for (long long s = tid; s + 1 < n_own; s += size)
        here -= own[s] == x;
    double context = double(block_sum(here)) + smoothing;
    for (long long s0 = 0; s0 + 1 < n_own; s0 += size) {
        long long s = s0 + tid;
        bool after = s + 1 < n_own && own[s] == x;
        if (block_sum(int(after)))
            spread(row, after ? own[s + 1] : -1, -1.0);
    }
    __syncthreads();
    for (long long q = begin[x] + tid; q < begin[x + 1]; q += size)
        row[follower[q]] *= g[1] / context;

    double flat = (g[2] + g[1] * smoothing / context) / (everything - n_own + least * n_items);
    for (long long s0 = 0; s0 < n_own; s0 += size)
        spread(row, s0 + tid < n_own ? own[s0 + tid] : -1, -flat);

    for (int i0 = 0; i0 < place.count; i0 += size) {
        int i = i0 + tid;
        double value = 0;
        if (i < place.count) {
            int match = match_of(items, place, i);
            for (int k = 0; k < pointers; ++k) {
                real s = score_of(tau + k * buckets * MATCHES,
                                  nu + (place.user * pointers + k) * OWN, bucket, ramp, i, match);
                double w = exp(s - shift[n * pointers + k]);
                value += g[STATIC + k] * w / mass[n * pointers + k];
            }
        }
        spread(row, i < place.count ? items[place.at - i] : -1, value);
    }
    __syncthreads();
    if (tid == 0) {
        double offset = log(g[0]) - nll[n];
        double own_p = blended(0, offset, flat, unigram[y[n]] + least, row[y[n]]);
        nll[n] = -log(others[n] + g[0] * exp(-nll[n]));
        level[n * 3] = offset;
        level[n * 3 + 1] = flat;
        level[n * 3 + 2] = own_p * (1 - tie);
    }
}

/* Items of one tile whose probability reaches the event's cut. Block (events, t).

   target [N], logits of y summed in the order of `each_logit`. above [tiles, N]. */
extern "C" __global__ void mix_count(
    const real *H, const real *W_out, const real *target, const double *level,
    const double *extra, const long long *unigram, int *above, int N, int n_items, int tile, int D,
    double least)
{
    long long first = (long long)blockIdx.y * tile, last = min(first + tile, (long long)n_items);
    int count[EACH] = {};
    each_logit(H, W_out, N, D, first, last, [&](int e, long long i, real logit) {
        long long n = of_event(e);
        double p = blended(logit - target[n], level[n * 3], level[n * 3 + 1], unigram[i] + least,
                           extra[n * n_items + i]);
        count[e] += !(p < level[n * 3 + 2]);
    });
    for (int e = 0; e < EACH; ++e) {
        for (int offset = LANES / 2; offset; offset /= 2)
            count[e] += __shfl_down_sync(FULL, count[e], offset);
        long long n = of_event(e);
        if (threadIdx.x % LANES == 0 && n < N)
            above[(long long)blockIdx.y * N + n] = count[e];
    }
}

/* rank [N] from the tiles' counts. One thread for each event. */
extern "C" __global__ void mix_rank(const int *above, int *rank, int N, int tiles)
{
    int n = blockIdx.x * blockDim.x + threadIdx.x, count = 0;
    for (long long t = 0; n < N && t < tiles; ++t)
        count += above[t * N + n];
    if (n < N)
        rank[n] = count;
}
