/* The recurrent cells where all columns share one matrix that is too large for a block: what
   cells.cu has, on a grid whose blocks all run at once and keep the matrix between them.

   Arrays as in cells.cu, with W_h [1, D, G*D], and two that the blocks share:
     left [1, or 2 for a GRU, T, B, D]: the state before each step, and r times it. The backward
     pass writes it too: transposed and times dA it is the gradient of W_h;
     counters [gridDim.y * 32]: zero before the first launch of all.

   Grid: (ceil(D / units), ceil(B / columns)). Block (p, q) has the units p * units.. of the columns
   q * columns.., and in shared memory, for the whole window, what they are multiplied with: forward
   the units' columns of W_h, backward their rows. The blocks of one q read each other's vectors
   from `left` forward, from dA backward, where each step has a place of its own, and meet at a
   barrier twice a step, once for tanh. Of the three products of a GRU's step the one that no other
   block waits for, z's, runs while they arrive.

   A product is [columns, D] times [D, units]. Each warp takes a part of the D, and in it 8 times 4
   lanes take one k each and EACH units each. The sums of the 8 are added by shuffles, those of the
   warps in their order, so the results do not depend on `units`, `columns` or the grid by a bit.

   Shared memory: slices [G, units, K], vectors [K, tile], partial [warps, tile, units], where K is
   D rounded up to a multiple of threads / 4, and a tile has 8 columns, or 1 where columns == 1.
   `units` is a multiple of 20 (EACH is 5) or else of 12 (3): odd, so that the 32 lanes are in 32
   banks. Each k of a warp costs 40 fused products a lane and 9 to 13 reads of 128 bytes. */
#include "common.cuh"

const int K_LANES = 8, UNIT_LANES = 4;

/* What a block knows: the window, its units from `unit` on and its columns from `column` on, its
   barrier and its shared memory. */
struct Pass {
    int T, B, D, unit, units, column, columns, K;
    const real *event, *carry;
    real init;
    unsigned *counter;
    real *slices, *vectors, *partial;
};

__device__ inline Pass pass(const real *event, const real *carry, real init, unsigned *counters,
                            int T, int B, int D, int G, int units, int columns, real *shared)
{
    int multiple = blockDim.x / UNIT_LANES, K = (D + multiple - 1) / multiple * multiple;
    int unit = blockIdx.x * units, column = blockIdx.y * columns;
    real *vectors = shared + G * units * K, *partial = vectors + (columns > 1 ? 8 : 1) * K;
    return {T, B, D, unit, units, column, min(columns, B - column), K, event, carry, init,
            counters + 32 * blockIdx.y, shared, vectors, partial};
}

__device__ inline int wide(int units)
{
    return units % 20 ? 12 : 20;
}

/* Copy the block's slices of W_h, zero beyond D: element k, i of slice g is W_h[k, g*D + i] or,
   where `rows`, W_h[i, g*D + k]. They lie in groups of WIDE units, each [K, WIDE]. */
template <int WIDE>
__device__ __forceinline__ void load_groups(const real *__restrict__ W_h, int G, bool rows,
                                            const Pass &p)
{
    int groups = p.units / WIDE;
    long long k_step = rows ? 1 : G * p.D, i_step = rows ? G * p.D : 1;
    for (int n = 0; n < G * groups; ++n) {
        int unit = p.unit + n % groups * WIDE;
        for (int k = threadIdx.x; k < p.K; k += blockDim.x) {
            const real *from = W_h + n / groups * p.D + min(k, p.D - 1) * k_step;
            Pack got[WIDE / WIDTH];
#pragma unroll
            for (int i = 0; i < WIDE; ++i)
                got[i / WIDTH].v[i % WIDTH] = from[min(unit + i, p.D - 1) * i_step];
#pragma unroll
            for (int i = 0; i < WIDE; ++i)
                if (k >= p.D || unit + i >= p.D)
                    got[i / WIDTH].v[i % WIDTH] = 0;
#pragma unroll
            for (int q = 0; q < WIDE / WIDTH; ++q)
                reinterpret_cast<Pack *>(p.slices + (n * p.K + k) * WIDE)[q] = got[q];
        }
    }
}

__device__ inline void load(const real *W_h, int G, bool rows, const Pass &p)
{
    if (wide(p.units) == 20)
        load_groups<20>(W_h, G, rows, p);
    else
        load_groups<12>(W_h, G, rows, p);
}

/* vectors[k, b] = from[b * stride + k] of at most C columns. Beyond D, where the slices are zero,
   and beyond the columns the last one is repeated. */
template <int C>
__device__ __forceinline__ void stage(const real *from, int stride, int columns, const Pass &p)
{
    const int N = C < WIDTH ? C : WIDTH, PARTS = C / N; /* a thread has N columns */
    const int AHEAD = 6; /* loads of a column on their way: the second-level cache is far */
    struct alignas(N * sizeof(real)) Part {
        real v[N];
    };
    int part = threadIdx.x % PARTS, step = blockDim.x / PARTS;
    const real *row[N];
#pragma unroll
    for (int n = 0; n < N; ++n)
        row[n] = from + (long long)min(part * N + n, columns - 1) * stride;
    for (int first = threadIdx.x / PARTS; first < p.K; first += AHEAD * step) {
        Part got[AHEAD];
#pragma unroll
        for (int a = 0; a < AHEAD; ++a)
#pragma unroll
            for (int n = 0; n < N; ++n)
                got[a].v[n] = __ldcg(row[n] + min(first + a * step, p.D - 1));
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) {
            int k = first + a * step;
            if (k < p.K)
                reinterpret_cast<Part *>(p.vectors)[k * PARTS + part] = got[a];
        }
    }
}

/* partial[warp, b, i] = the warp's part of the sum over k of vectors[k, b] slice[k, i]. */
template <int C, int EACH>
__device__ __forceinline__ void times(const real *slice, const Pass &p)
{
    const int WIDE = EACH * UNIT_LANES;
    int warp = threadIdx.x / 32, k_lane = threadIdx.x % 32 / UNIT_LANES;
    int length = p.K / (blockDim.x / 32), from = warp * length + k_lane;
    int i0 = threadIdx.x % UNIT_LANES * EACH;
    for (int first = 0; first < p.units; first += WIDE) {
        const real *w = slice + first * p.K + i0;
        real sum[C][EACH] = {};
#pragma unroll 2
        for (int k = from; k < (warp + 1) * length; k += K_LANES) {
            alignas(16) real x[C];
            if (C == 1)
                x[0] = p.vectors[k];
            else
#pragma unroll
                for (int b = 0; b < C; b += WIDTH)
                    *reinterpret_cast<Pack *>(x + b) =
                        *reinterpret_cast<const Pack *>(p.vectors + k * C + b);
#pragma unroll
            for (int i = 0; i < EACH; ++i) {
                real y = w[k * WIDE + i];
#pragma unroll
                for (int b = 0; b < C; ++b)
                    sum[b][i] += x[b] * y;
            }
        }
        /* Of two lanes each keeps half of the columns and gives the rest away, until it has one. */
#pragma unroll
        for (int bits = 16, half = C / 2; bits >= UNIT_LANES; bits /= 2, half /= 2) {
            bool high = threadIdx.x & bits;
#pragma unroll
            for (int i = 0; i < EACH; ++i) {
                if (C == 1)
                    sum[0][i] += __shfl_xor_sync(FULL, sum[0][i], bits);
#pragma unroll
                for (int b = 0; b < half; ++b)
                    sum[b][i] = (high ? sum[b + half][i] : sum[b][i])
                        + __shfl_xor_sync(FULL, high ? sum[b][i] : sum[b + half][i], bits);
            }
        }
        if (k_lane < C)
#pragma unroll
            for (int i = 0; i < EACH; ++i)
                p.partial[(warp * C + k_lane) * p.units + first + i0 + i] = sum[0][i];
    }
}

/* One of the block's units in one of its columns, the `n`th from column `tile` on. */
struct Place {
    bool there;
    int b, i;
};

__device__ inline Place place(int n, int tile, const Pass &p)
{
    int b = tile + n / p.units, i = p.unit + n % p.units;
    return {b < p.columns && i < p.D, p.column + b, i};
}

/* Its index in an array [T, B, D]. */
__device__ inline long long element(int t, Place at, const Pass &p)
{
    return ((long long)t * p.B + at.b) * p.D + at.i;
}

/* use(place) for each of the block's units in each of its columns. */
template <class Use>
__device__ __forceinline__ void each_place(const Pass &p, Use use)
{
    for (int n = threadIdx.x; n < p.columns * p.units; n += blockDim.x) {
        Place at = place(n, 0, p);
        if (at.there)
            use(at);
    }
}

/* The columns' vectors, from[b * stride + k], times slice g: use(place, read(place), sum), where
   what `read` loads is under way during the product. Not `fetch`: the vectors are those of the
   product before, and still there if they are one tile. */
template <int C, class Read, class Use>
__device__ __forceinline__ void product(const real *from, int stride, bool fetch, int g,
                                        const Pass &p, Read read, Use use)
{
    const real *slice = p.slices + g * p.units * p.K;
    for (int tile = 0; tile < p.columns; tile += C) {
        Place at = place(threadIdx.x, tile, p);
        auto input = read(at);
        if (fetch || p.columns > C)
            stage<C>(from + (long long)(p.column + tile) * stride, stride, p.columns - tile, p);
        __syncthreads();
        if (wide(p.units) == 20)
            times<C, 5>(slice, p);
        else
            times<C, 3>(slice, p);
        __syncthreads();
        for (int n = threadIdx.x; n < C * p.units; n += blockDim.x) {
            if (n >= blockDim.x) {
                at = place(n, tile, p);
                input = read(at);
            }
            if (!at.there)
                continue;
            real sum = p.partial[n];
#pragma unroll 4
            for (int w = 1; w < blockDim.x / 32; ++w)
                sum += p.partial[w * C * p.units + n];
            use(at, input, sum);
        }
    }
}

/* states[0] = s0, and the state before the first step. */
__device__ inline void begin(const real *s0, real *states, real *left, const Pass &p)
{
    each_place(p, [&](Place at) {
        long long e = element(0, at, p);
        real s = s0[e];
        states[e] = s;
        if (p.T)
            left[e] = before(p.carry[at.b], s, p.init);
    });
}

/* What the end of a step needs of one unit. */
struct Input {
    real a, h, z, event, next_carry;
};

__device__ inline Input input(const real *A, int G, int g, const real *left, int t, Place at,
                              const Pass &p)
{
    int cell = t * p.B + at.b;
    Input now = {0, 0, 0, 0, 1};
    if (!at.there)
        return now;
    now.a = A[((long long)cell * G + g) * p.D + at.i];
    now.h = left[element(t, at, p)];
    now.event = p.event[cell];
    if (t + 1 < p.T)
        now.next_carry = p.carry[cell + p.B];
    return now;
}

__device__ inline void end(real fresh, Input now, real *states, real *left, int t, Place at,
                           const Pass &p)
{
    real state = now.event * fresh + (1 - now.event) * now.h;
    states[element(t + 1, at, p)] = state;
    if (t + 1 < p.T)
        left[element(t + 1, at, p)] = before(now.next_carry, state, p.init);
}

/* ------------------------------------------------------------------ tanh */

template <int C>
__device__ __forceinline__ void tanh_steps(const real *A, real *states, real *left, const Pass &p)
{
    for (int t = 0; t < p.T; ++t) {
        grid_wait(p.counter, grid_arrive(p.counter));
        product<C>(
            left + (long long)t * p.B * p.D, p.D, true, 0, p,
            [&](Place at) { return input(A, 1, 0, left, t, at, p); },
            [&](Place at, Input now, real sum) {
                end(tanh(now.a + sum), now, states, left, t, at, p);
            });
    }
}

extern "C" __global__ void __launch_bounds__(256)
pooled_tanh_forward(const real *A, const real *W_h, const real *event, const real *carry,
                    real init, const real *s0, real *states, real *left, unsigned *counters,
                    int T, int B, int D, int units, int columns)
{
    SHARED(real, shared);
    Pass p = pass(event, carry, init, counters, T, B, D, 1, units, columns, shared);
    load(W_h, 1, false, p);
    begin(s0, states, left, p);
    if (columns == 1)
        tanh_steps<1>(A, states, left, p);
    else
        tanh_steps<8>(A, states, left, p);
}

/* What a step back needs of one unit: ds and carry of the step after it, the rest of its own. */
struct TanhBack {
    real ds, next_carry, event, carry, dh, state, next_state;
};

__device__ inline TanhBack tanh_input_back(const real *dH, const real *states, const real *ds0,
                                           int t, Place at, const Pass &p)
{
    int cell = t * p.B + at.b;
    TanhBack back = {};
    if (!at.there)
        return back;
    if (t + 1 < p.T) {
        back.ds = ds0[element(0, at, p)];
        back.next_carry = p.carry[cell + p.B];
    }
    if (t >= 0) {
        back.event = p.event[cell];
        back.carry = p.carry[cell];
        back.dh = dH[element(t, at, p)];
        back.state = states[element(t, at, p)];
        back.next_state = states[element(t + 1, at, p)];
    }
    return back;
}

/* ds of the step after t is complete with `sum`; and, but for t = -1, what step t adds to it. */
__device__ inline void tanh_back(TanhBack back, real sum, real *ds0, real *dA, real *left, int t,
                                 Place at, const Pass &p)
{
    real ds = back.next_carry * (back.ds + sum);
    if (t >= 0) {
        real dh = back.dh + ds;
        left[element(t, at, p)] = before(back.carry, back.state, p.init);
        dA[element(t, at, p)] = back.event * dh * (1 - back.next_state * back.next_state);
        ds = (1 - back.event) * dh;
    }
    ds0[element(0, at, p)] = ds;
}

template <int C>
__device__ __forceinline__ void tanh_steps_back(const real *dH, const real *states, real *ds0,
                                                real *dA, real *left, const Pass &p)
{
    for (int t = p.T - 1; t >= 0; --t) {
        grid_wait(p.counter, grid_arrive(p.counter));
        product<C>(
            dA + (long long)t * p.B * p.D, p.D, true, 0, p,
            [&](Place at) { return tanh_input_back(dH, states, ds0, t - 1, at, p); },
            [&](Place at, TanhBack back, real sum) {
                tanh_back(back, sum, ds0, dA, left, t - 1, at, p);
            });
    }
}

extern "C" __global__ void __launch_bounds__(256)
pooled_tanh_backward(const real *dH, const real *W_h, const real *event, const real *carry,
                     real init, const real *states, real *ds0, real *dA, real *left,
                     unsigned *counters, int T, int B, int D, int units, int columns)
{
    SHARED(real, shared);
    Pass p = pass(event, carry, init, counters, T, B, D, 1, units, columns, shared);
    load(W_h, 1, true, p);
    each_place(p, [&](Place at) {
        tanh_back(tanh_input_back(dH, states, ds0, T - 1, at, p), 0, ds0, dA, left, T - 1, at, p);
    });
    if (columns == 1)
        tanh_steps_back<1>(dH, states, ds0, dA, left, p);
    else
        tanh_steps_back<8>(dH, states, ds0, dA, left, p);
}

/* ------------------------------------------------------------------- GRU */

template <int C>
__device__ __forceinline__ void gru_steps(const real *A, real *states, real *cache, real *left,
                                          int tanh_candidate, const Pass &p)
{
    real *reset = left + (long long)p.T * p.B * p.D;
    for (int t = 0; t < p.T; ++t) {
        long long first = (long long)t * p.B * p.D;
        auto kept = [&](Place at) { return cache + ((long long)t * p.B + at.b) * 3 * p.D + at.i; };
        grid_wait(p.counter, grid_arrive(p.counter));
        product<C>(
            left + first, p.D, true, 1, p,
            [&](Place at) { return input(A, 3, 1, left, t, at, p); },
            [&](Place at, Input now, real sum) {
                real r = sigmoid(now.a + sum);
                kept(at)[p.D] = r;
                reset[element(t, at, p)] = r * now.h;
            });
        unsigned arrived = grid_arrive(p.counter);
        product<C>(
            left + first, p.D, false, 0, p,
            [&](Place at) { return input(A, 3, 0, left, t, at, p); },
            [&](Place at, Input now, real sum) { kept(at)[0] = sigmoid(now.a + sum); });
        grid_wait(p.counter, arrived);
        product<C>(
            reset + first, p.D, true, 2, p,
            [&](Place at) {
                Input now = input(A, 3, 2, left, t, at, p);
                now.z = at.there ? kept(at)[0] : 0;
                return now;
            },
            [&](Place at, Input now, real sum) {
                sum += now.a;
                real candidate = tanh_candidate ? tanh(sum) : sigmoid(sum);
                kept(at)[2 * p.D] = candidate;
                end((1 - now.z) * now.h + now.z * candidate, now, states, left, t, at, p);
            });
    }
}

extern "C" __global__ void __launch_bounds__(256)
pooled_gru_forward(const real *A, const real *W_h, const real *event, const real *carry,
                   real init, const real *s0, real *states, real *cache, real *left,
                   unsigned *counters, int T, int B, int D, int tanh_candidate, int units,
                   int columns)
{
    SHARED(real, shared);
    Pass p = pass(event, carry, init, counters, T, B, D, 3, units, columns, shared);
    load(W_h, 3, false, p);
    begin(s0, states, left, p);
    if (columns == 1)
        gru_steps<1>(A, states, cache, left, tanh_candidate, p);
    else
        gru_steps<8>(A, states, cache, left, tanh_candidate, p);
}

/* As TanhBack. */
struct GruBack {
    real ds, next_carry, event, carry, dh, state, z, r, candidate;
};

__device__ inline GruBack gru_input_back(const real *dH, const real *states, const real *cache,
                                         const real *ds0, int t, Place at, const Pass &p)
{
    int cell = t * p.B + at.b;
    GruBack back = {};
    if (!at.there)
        return back;
    if (t + 1 < p.T) {
        back.ds = ds0[element(0, at, p)];
        back.next_carry = p.carry[cell + p.B];
    }
    if (t >= 0) {
        const real *kept = cache + (long long)cell * 3 * p.D + at.i;
        back.event = p.event[cell];
        back.carry = p.carry[cell];
        back.dh = dH[element(t, at, p)];
        back.state = states[element(t, at, p)];
        back.z = kept[0];
        back.r = kept[p.D];
        back.candidate = kept[2 * p.D];
    }
    return back;
}

/* As tanh_back, but for what step t has of r. */
__device__ inline void gru_back(GruBack back, real sum, real *ds0, real *dA, real *left,
                                int tanh_candidate, int t, Place at, const Pass &p)
{
    real ds = back.next_carry * (back.ds + sum);
    if (t >= 0) {
        real dh = back.dh + ds, h = before(back.carry, back.state, p.init), z = back.z;
        real *da = dA + ((long long)t * p.B + at.b) * 3 * p.D + at.i;
        left[element(t, at, p)] = h;
        left[element(p.T + t, at, p)] = back.r * h;
        da[0] = back.event * dh * (back.candidate - h) * z * (1 - z);
        da[2 * p.D] = back.event * dh * z * slope(back.candidate, tanh_candidate);
        ds = (1 - back.event * z) * dh;
    }
    ds0[element(0, at, p)] = ds;
}

template <int C>
__device__ __forceinline__ void gru_steps_back(const real *dH, const real *states,
                                               const real *cache, real *ds0, real *dA, real *left,
                                               int tanh_candidate, const Pass &p)
{
    struct Own {
        real ds, h, r;
    };
    for (int t = p.T - 1; t >= 0; --t) {
        real *da = dA + (long long)t * p.B * 3 * p.D;
        grid_wait(p.counter, grid_arrive(p.counter));
        product<C>(
            da + 2 * p.D, 3 * p.D, true, 2, p,
            [&](Place at) {
                Own own = {};
                if (at.there)
                    own = {ds0[element(0, at, p)], left[element(t, at, p)],
                           cache[((long long)t * p.B + at.b) * 3 * p.D + p.D + at.i]};
                return own;
            },
            [&](Place at, Own own, real drh) {
                da[(long long)at.b * 3 * p.D + p.D + at.i] = drh * own.h * own.r * (1 - own.r);
                ds0[element(0, at, p)] = own.ds + drh * own.r;
            });
        unsigned arrived = grid_arrive(p.counter);
        product<C>(
            da, 3 * p.D, true, 0, p,
            [&](Place at) { return at.there ? ds0[element(0, at, p)] : 0; },
            [&](Place at, real ds, real sum) { ds0[element(0, at, p)] = ds + sum; });
        grid_wait(p.counter, arrived);
        product<C>(
            da + p.D, 3 * p.D, true, 1, p,
            [&](Place at) { return gru_input_back(dH, states, cache, ds0, t - 1, at, p); },
            [&](Place at, GruBack back, real sum) {
                gru_back(back, sum, ds0, dA, left, tanh_candidate, t - 1, at, p);
            });
    }
}

extern "C" __global__ void __launch_bounds__(256)
pooled_gru_backward(const real *dH, const real *W_h, const real *event, const real *carry,
                    real init, const real *states, const real *cache, real *ds0, real *dA,
                    real *left, unsigned *counters, int T, int B, int D, int tanh_candidate,
                    int units, int columns)
{
    SHARED(real, shared);
    Pass p = pass(event, carry, init, counters, T, B, D, 3, units, columns, shared);
    load(W_h, 3, true, p);
    each_place(p, [&](Place at) {
        GruBack back = gru_input_back(dH, states, cache, ds0, T - 1, at, p);
        gru_back(back, 0, ds0, dA, left, tanh_candidate, T - 1, at, p);
    });
    if (columns == 1)
        gru_steps_back<1>(dH, states, cache, ds0, dA, left, tanh_candidate, p);
    else
        gru_steps_back<8>(dH, states, cache, ds0, dA, left, tanh_candidate, p);
}
