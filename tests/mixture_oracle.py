"""The mixture output stated a second time, slowly, for the tests: one event, from its definition.

Nothing of the package is used here. Sequences are lists of lists of items. As in `oracle`, the
parameters may have leading axes (`...`) and complex numbers, so that `oracle.gradient` can hand in
one perturbed copy for each element of a block.
"""

import math

import numpy as np

# What follows is not in the definitions of the features; it is as tallies.py has it: where the
# running averages start, what each is multiplied with, and the decays exactly.
NOVELTY = (2 ** (-1 / 20), 1.0, 2.0, 2.0)  # decay, new items, events, factor
NOVELTY_LATELY = (0.75, 0.5, 1.0, 1.0)
REPEATS = (0.9, 0.3, 2.0)  # decay, average, factor
BIGRAM_HITS = (0.9, 0.5, 2.0)
DEPTH = (0.9, 2.0, 0.5)


def share(flags, decay, start, weight, factor):
    """Weighted mean of flags, the latest with weight 1, upon what was there at the start."""
    n = len(flags)
    ages = [decay ** (n - 1 - j) for j in range(n)]
    found = start * decay**n + sum(a * flag for a, flag in zip(ages, flags, strict=True))
    return factor * found / (weight * decay**n + sum(ages))


def average(values, decay, start, factor):
    """Exponential moving average of values."""
    n = len(values)
    terms = [(1 - decay) * decay ** (n - 1 - j) * v for j, v in enumerate(values)]
    return factor * (start * decay**n + sum(terms))


def last(items, item, before):
    """Latest position of an item below `before`, or None."""
    return max((j for j in range(before) if items[j] == item), default=None)


def features(items, times):
    """The counts after the last of `items`, given how often it is in the others' training parts."""
    t = len(items) - 1
    x = items[t]
    lags, new, repeats, hits = [], [], [], []
    for j, item in enumerate(items):
        p = last(items, item, j)
        new.append(p is None)
        if p is not None:
            lags.append(math.log(j - p))
        repeats.append(j > 0 and items[j - 1] == item)
        if j > 0:
            q = last(items, items[j - 1], j - 1)
            if q is not None:
                hits.append(items[q + 1] == item)
    pairs = sum(items[j - 1 : j + 1] == items[t - 1 :] for j in range(1, t))
    distinct = len(set(items))
    p = last(items, x, t)
    return {
        "one": 1,
        "length": math.log(1 + t) / 4 - 1,
        "novelty": share(new, *NOVELTY),
        "novelty_lately": share(new, *NOVELTY_LATELY),
        "context": math.log(1 + items[:t].count(x)),
        "context_pair": math.log(1 + pairs),
        "lag": 0 if p is None else math.log(t - p) / 3,
        "new": p is None,
        "repeats": average(repeats, *REPEATS),
        "bigram_hits": average(hits, *BIGRAM_HITS),
        "depth": average(lags, *DEPTH),
        "others_context": math.log(1 + times) / 4,
        "distinct": math.log(1 + distinct) / 4,
        "repeat": repeats[t],
        "variety": math.log((1 + distinct) / (1 + t)),
    }


def unigram(counted, user, n_items):
    """P(item) by the training parts of the other users."""
    others = [x for u, items in enumerate(counted) if u != user for x in items]
    total = len(others) + 0.1 * n_items
    return [(others.count(i) + 0.1) / total for i in range(n_items)]


def bigram(counted, user, x, n_items):
    """P(item after x) by the training parts of the other users."""
    rows = [items for u, items in enumerate(counted) if u != user]
    after = [b for items in rows for a, b in zip(items[:-1], items[1:], strict=True) if a == x]
    common = unigram(counted, user, n_items)
    return [(after.count(i) + common[i]) / (len(after) + 1) for i in range(n_items)]


def buckets(memory):
    """Bucket of each lag: floor(2 log2(lag)) = floor(log2(lag^2)), numbered densely.

    The last lag goes with the one before, from the third on.
    """
    number = {}
    lags = [min(lag, max(memory - 1, 2)) for lag in range(1, memory + 1)]
    return [number.setdefault((lag * lag).bit_length(), len(number)) for lag in lags]


NONE, SKIP, ONE, TWO, THREE = range(5)


def match(items, s):
    """How what came before position s matches the end of `items`, which the next one follows."""

    def same(back):
        return 0 <= s - back and items[s - back] == items[len(items) - back]

    if not same(1):
        return SKIP if s >= 2 and same(2) else NONE
    if not (s >= 2 and same(2)):
        return ONE
    return THREE if s >= 3 and same(3) else TWO


def softmax(scores):
    """Of a list of numbers [...]."""
    top = max(np.max(np.real(s)) for s in scores)
    raised = [np.exp(s - top) for s in scores]
    return [r / sum(raised) for r in raised]


def pointer(items, tau, nu, memory, n_items):
    """One pointer's distribution, a list of I [...]: tau [..., L, 5], nu [..., 6]."""
    bucket = buckets(memory)
    n = min(memory, len(items))
    scores = []
    for lag in range(1, n + 1):
        code = match(items, len(items) - lag)
        ramp = math.log(lag) / 4
        scores.append(tau[..., bucket[lag - 1], code] + nu[..., code] + nu[..., 5] * ramp)
    p = [0.0] * n_items
    for lag, alpha in enumerate(softmax(scores), 1):
        p[items[-lag]] = p[items[-lag]] + alpha
    return p


def gate(f, h, gate_in, gate_out, gate_user):
    """Share of each distribution, a list of K [...]."""
    given = [*f, *(h[..., d] for d in range(h.shape[-1]))]
    Q, K = gate_in.shape[-1], gate_out.shape[-1]
    hidden = []
    for q in range(Q):
        hidden.append(np.tanh(sum(v * gate_in[..., i, q] for i, v in enumerate(given))))
    hidden.append(1.0)
    return softmax(
        [
            gate_user[..., k] + sum(v * gate_out[..., q, k] for q, v in enumerate(hidden))
            for k in range(K)
        ]
    )


def network(h, W_out):
    """The softmax over all items, a list of I [...]."""
    D = h.shape[-1]
    rows = range(W_out.shape[-2])
    return softmax([sum(h[..., d] * W_out[..., i, d] for d in range(D)) for i in rows])


def distributions(items, experts, h, W_out, tau, nu, memory):
    """The K distributions of one event, given two lists of I for the other users."""
    n_items = W_out.shape[-2]
    pointers = range(tau.shape[-3])
    return [
        network(h, W_out),
        *experts,
        *(pointer(items, tau[..., p, :, :], nu[..., p, :], memory, n_items) for p in pointers),
    ]


def mixed(shares, p):
    """The mixture of K distributions over I items."""
    return [sum(g * q[i] for g, q in zip(shares, p, strict=True)) for i in range(len(p[0]))]


def rank(p, y, tie=0.0):
    """1 + how many other items are as likely, or less likely by a relative `tie`."""
    return 1 + sum(q >= p[y] * (1 - tie) for i, q in enumerate(p) if i != y)
