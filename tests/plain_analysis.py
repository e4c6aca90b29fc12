"""The statistics of a proxy's attention in plain NumPy and loops, as they are defined: slow and independent."""

from collections import Counter
from itertools import pairwise

import numpy as np


def ranked(mass_shql, samples):
    """Mean over samples of the masses sorted from largest to smallest: (h, q, k)."""
    return np.mean([[[sorted(row, reverse=True) for row in head] for head in mass_shql[s]] for s in samples], axis=0)


def drops(mass_shql, samples):
    """r1 − r2 of every head, mean over its queries."""
    curve = ranked(mass_shql, samples)
    return [float(np.mean([query[0] - query[1] for query in head])) for head in curve]


def otsu(values):
    """Of all midpoints between different neighbours, that with the least variance within the two groups."""
    ordered = sorted(values)
    best = None
    for low, high in pairwise(ordered):
        if low == high:
            continue
        cut = (low + high) / 2
        groups = [v for v in values if v <= cut], [v for v in values if v > cut]
        within = sum(sum((v - np.mean(group)) ** 2 for v in group) for group in groups)
        if best is None or within < best[0] - 1e-12:
            best = within, cut
    return best[1]


def vote(mass_hql, decisive):
    """l* of one sample, its votes, whether it is a tie, and the entropy of the votes in bits."""
    summed = mass_hql.sum(1)
    favourites = [int(np.argmax(summed[h])) for h in decisive]
    counts = Counter(favourites)
    most = max(counts.values())
    leading = sorted(layer for layer, count in counts.items() if count == most)
    total = {layer: sum(float(summed[h, layer]) for h in decisive) for layer in leading}
    winner = max(leading, key=lambda layer: (total[layer], -layer))
    shares = [count / len(favourites) for count in counts.values()]
    return winner, most, len(leading) > 1, -sum(p * np.log2(p) for p in shares)


def kappa(a, b):
    """Cohen's κ of two voters."""
    n = len(a)
    agreed = sum(x == y for x, y in zip(a, b, strict=True)) / n
    chance = sum((list(a).count(label) / n) * (list(b).count(label) / n) for label in {*a, *b})
    return (agreed - chance) / (1 - chance)


def token_shares(attention_hqlt, decisive, layer):
    """What share of a layer's mass goes to each token, over decisive heads and queries; NaN tokens stay NaN."""
    n_tokens = attention_hqlt.shape[-1]
    summed = [
        sum(float(attention_hqlt[h, q, layer, t]) for h in decisive for q in range(attention_hqlt.shape[1]))
        for t in range(n_tokens)
    ]
    known = [value for value in summed if value == value]
    return np.array([value / sum(known) for value in summed])
