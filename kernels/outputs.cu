/* The softmax over all items (Eqs. 10, 19, 20): training in tiles of items, and scoring.

   Logits are [N, I] with rows of `stride` elements. A tile is `tile` items, the last one shorter.
   Every exponential is taken of a logit minus the largest of its tile, so no logit is too large or
   too small. Sums of exponentials are in double. */
#include "common.cuh"

/* E = exp(logit - shift) in place, for one tile of one event. Block (n, t).

   shift, sum [tiles, N]: the tile's largest logit, and the sum of its E. target [N]: the logit of
   the event's item y [N]. Rows and tiles are whole packs: those of a shorter last tile go on in the
   row's padding, which gets zeros. */
extern "C" __global__ void softmax_tile(
    real *__restrict__ E, const int *__restrict__ y, real *__restrict__ shift,
    double *__restrict__ sum, real *__restrict__ target, long long stride, int n_items, int tile)
{
    long long n = blockIdx.x, N = gridDim.x, t = blockIdx.y;
    real *row = E + n * stride + t * tile;
    Pack *packs = reinterpret_cast<Pack *>(row);
    int size = int(min((long long)tile, n_items - t * tile));
    real largest = -INFINITY;
    for (int i = threadIdx.x; i * WIDTH < size; i += blockDim.x) {
        Pack pack = packs[i];
#pragma unroll
        for (int k = 0; k < WIDTH; ++k)
            if (i * WIDTH + k < size)
                largest = pack.v[k] > largest ? pack.v[k] : largest;
    }
    if (threadIdx.x == 0 && y[n] / tile == t)
        target[n] = row[y[n] % tile];
    largest = block_max(largest);
    double total = 0;
    for (int i = threadIdx.x; i * WIDTH < size; i += blockDim.x) {
        Pack pack = packs[i];
        real part = 0;
#pragma unroll
        for (int k = 0; k < WIDTH; ++k) {
            pack.v[k] = i * WIDTH + k < size ? exp(pack.v[k] - largest) : real(0);
            part += pack.v[k];
        }
        packs[i] = pack;
        total += part;
    }
    total = block_sum(total);
    if (threadIdx.x == 0) {
        shift[t * N + n] = largest;
        sum[t * N + n] = total;
    }
}

/* Loss and dH of one event, and what dW_out = sum over tiles of E^T G needs. Block n.

   U [tiles, N, D]: E W_out of each tile; overwritten with G, h times scale / S on the tile's shift.
   E of the target's tile gets the common shift and S is taken off at the target, so that the
   product brings the target's part of dW_out along. H, dH [N, D]. loss [N].

   With K > 0 the softmax is distribution 0 of a mixture: share [N, K] and others [N] are what
   `mix_forward` leaves, p [N, K] gets p_0, and the gradients are times r_0. */
extern "C" __global__ void softmax_finish(
    real *__restrict__ E, const int *__restrict__ y, const real *__restrict__ shift,
    const double *__restrict__ sum, const real *__restrict__ target, real *__restrict__ U,
    const real *__restrict__ H, const real *__restrict__ W_out, const double *share,
    const double *others, double *p, double *__restrict__ loss, real *__restrict__ dH,
    long long stride, int n_items, int tiles, int tile, int D, int K, real scale)
{
    long long n = blockIdx.x, N = gridDim.x;
    int own = y[n] / tile, at = y[n] % tile;
    real largest = -INFINITY;
    for (int t = threadIdx.x; t < tiles; t += blockDim.x)
        largest = shift[t * N + n] > largest ? shift[t * N + n] : largest;
    largest = block_max(largest);
    double S = 0;
    for (int t = threadIdx.x; t < tiles; t += blockDim.x)
        S += sum[t * N + n] * exp(shift[t * N + n] - largest);
    S = block_sum(S);
    double nll = log(S) + (double(largest) - double(target[n]));
    if (K) {
        double p_0 = exp(-nll), own = share[n * K] * p_0, total = others[n] + own;
        nll = -log(total);
        scale *= real(own / total);
        if (threadIdx.x == 0)
            p[n * K] = p_0;
    }
    if (threadIdx.x == 0)
        loss[n] = nll;

    real inverse = real(1 / S);
    for (int d = threadIdx.x; d < D; d += blockDim.x) {
        real u = 0, g = H[n * D + d] * (scale * inverse);
#pragma unroll 4
        for (int t = 0; t < tiles; ++t) {
            real factor = exp(shift[t * N + n] - largest);
            real *place = U + (t * N + n) * D + d;
            u += *place * factor;
            *place = t == own ? g : g * factor;
        }
        dH[n * D + d] = (u * inverse - W_out[(long long)y[n] * D + d]) * scale;
    }

    real *row = E + n * stride + (long long)own * tile, factor = exp(shift[own * N + n] - largest);
    int size = int(min((long long)tile, n_items - (long long)own * tile));
    if (factor != 1)
        for (int i = threadIdx.x; i * WIDTH < size; i += blockDim.x) {
            Pack pack = reinterpret_cast<Pack *>(row)[i];
#pragma unroll
            for (int k = 0; k < WIDTH; ++k)
                pack.v[k] *= factor;
            reinterpret_cast<Pack *>(row)[i] = pack;
        }
    if (threadIdx.x == at / WIDTH % blockDim.x) /* the thread that has row[at] in the loop */
        row[at] -= real(S);
}

/* target[n] = h_n W_out[y_n], the sum in the order of `each_logit`. One thread for each event. */
extern "C" __global__ void score_target(
    const real *H, const real *W_out, const int *y, real *target, int N, int D)
{
    int n = blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= N)
        return;
    real logit = 0;
    for (int k = 0; k < D; ++k)
        logit = fma(H[(long long)n * D + k], W_out[(long long)y[n] * D + k], logit);
    target[n] = logit;
}

/* Sums of one tile of items. Block (events, t).

   largest, sum, above [tiles, N]: largest logit, sum of exp(logit - largest), items that score no
   less than the target. */
extern "C" __global__ void score_tile(
    const real *H, const real *W_out, const real *target, real *largest, double *sum, int *above,
    int N, int n_items, int tile, int D)
{
    long long first = (long long)blockIdx.y * tile, last = min(first + tile, (long long)n_items);
    real aim[EACH], m[EACH];
    double S[EACH];
    int count[EACH];
    for (int e = 0; e < EACH; ++e) {
        aim[e] = of_event(e) < N ? target[of_event(e)] : real(0);
        m[e] = -INFINITY;
        S[e] = count[e] = 0;
    }
    each_logit(H, W_out, N, D, first, last, [&](int e, long long, real l) {
        count[e] += !(l < aim[e]);
        if (l > m[e]) {
            S[e] = S[e] * exp(m[e] - l) + 1;
            m[e] = l;
        } else
            S[e] += exp(l - m[e]);
    });
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
        for (int offset = LANES / 2; offset; offset /= 2) {
            real other = __shfl_down_sync(FULL, m[e], offset);
            double more = __shfl_down_sync(FULL, S[e], offset);
            count[e] += __shfl_down_sync(FULL, count[e], offset);
            real top = other > m[e] ? other : m[e];
            if (top > -INFINITY)
                S[e] = S[e] * exp(m[e] - top) + more * exp(other - top);
            m[e] = top;
        }
        long long n = of_event(e);
        if (threadIdx.x % LANES == 0 && n < N) {
            largest[(long long)blockIdx.y * N + n] = m[e];
            sum[(long long)blockIdx.y * N + n] = S[e];
            above[(long long)blockIdx.y * N + n] = count[e];
        }
    }
}

/* nll and rank of each target from the tiles' sums. One thread for each event. */
extern "C" __global__ void score_finish(
    const real *largest, const double *sum, const int *above, const real *target, double *nll,
    int *rank, int N, int tiles)
{
    int n = blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= N)
        return;
    real m = -INFINITY;
    int count = 0;
    for (long long t = 0; t < tiles; ++t) {
        m = largest[t * N + n] > m ? largest[t * N + n] : m;
        count += above[t * N + n];
    }
    double S = 0;
    for (long long t = 0; t < tiles; ++t)
        S += sum[t * N + n] * exp(largest[t * N + n] - m);
    nll[n] = log(S) + (double(m) - double(target[n]));
    rank[n] = count;
}
