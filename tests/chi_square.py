"""Pearson's statistic for the tests of sampled texts."""

import torch


def chi_square(counts, law, total):
    """Statistic over the cells of expectation 5 or more, the rest taken together; and a limit six deviations above
    its mean."""
    big = law * total >= 5
    observed = torch.cat([counts[big], counts[~big].sum()[None]]).double()
    expected = torch.cat([law[big], law[~big].sum()[None]]).double() * total
    degrees = int(big.sum())
    statistic = ((observed - expected) ** 2 / expected.clamp(min=1e-9)).sum()
    return float(statistic), degrees + 6 * (2 * degrees) ** 0.5
