"""GRPO once more, written from the papers with Python floats and loops: slow, plain, and nobody's fast code.

Nothing here imports the code under test, and no tensor is used.  A completion is a list of numbers as long
as it is: there is no padding and no mask.
"""

import math


def advantages(groups, scale, ddof, eps):
    """A list of groups, each a list of rewards, to the same of advantages."""
    everything = [reward for group in groups for reward in group]
    centred = [[reward - mean(group) for reward in group] for group in groups]
    result = []
    for group, differences in zip(groups, centred):
        if scale == "group":
            divisor = deviation(group, ddof) + eps
        elif scale == "batch":
            divisor = deviation(everything, ddof) + eps
        elif scale == "centred-batch":
            divisor = deviation([x for row in centred for x in row], ddof) + eps
        else:
            divisor = 1.0
        if scale == "leave-one-out":
            row = [reward - mean(group[:i] + group[i + 1 :]) for i, reward in enumerate(group)]
        else:
            row = [difference / divisor for difference in differences]
        result.append(row)
    return result


def mean(numbers):
    return math.fsum(numbers) / len(numbers)


def deviation(numbers, ddof):
    return math.sqrt(math.fsum((x - mean(numbers)) ** 2 for x in numbers) / (len(numbers) - ddof))


def kl(p, q, kind):
    """One token's estimate of D(p || q) from its two log-probabilities; q is the reference's."""
    if kind == "k1":
        return p - q
    if kind == "k2":
        return 0.5 * (p - q) ** 2
    return math.exp(q) / math.exp(p) - math.log(math.exp(q) / math.exp(p)) - 1


def loss(
    completions, old, reference, A, *,
    clip_low, clip_high, beta, kl_kind, level, aggregate, surrogate, kl_weighted, length, frozen=None,
    tau_positive=1.0, tau_negative=1.05, k_positive=2.0, lambda_positive=3.0, k_negative=3.0, lambda_negative=2.0,
):
    """The loss of lists of log-probabilities, one list a completion.

    `frozen` are the log-probabilities at which CISPO's and VESPO's weights stand still while differences are taken.
    """
    frozen = completions if frozen is None else frozen
    sequences = []
    for i, tokens in enumerate(completions):
        terms = []
        for t, p in enumerate(tokens):
            r = ratio(tokens, old[i], t, level)
            if surrogate == "sapo":
                tau = tau_positive if A[i] > 0 else tau_negative
                gain = 4 / tau / (1 + math.exp(-tau * (r - 1))) * A[i]
            elif surrogate == "vespo":
                w = math.exp(math.fsum(frozen[i])) / math.exp(math.fsum(old[i]))
                k, lam = (k_positive, lambda_positive) if A[i] >= 0 else (k_negative, lambda_negative)
                gain = w**k * math.exp(lam) * math.exp(-lam * w) * A[i] * p
            elif surrogate == "cispo":
                gain = clip(ratio(frozen[i], old[i], t, level), clip_low, clip_high) * A[i] * p
            else:
                gain = min(r * A[i], clip(r, clip_low, clip_high) * A[i])
            penalty = kl(p, reference[i][t], kl_kind) if beta else 0.0
            terms.append(-gain + beta * (r * penalty if kl_weighted else penalty))
        sequences.append(terms)
    total = math.fsum(x for terms in sequences for x in terms)
    if aggregate == "sequence":
        return math.fsum(mean(terms) for terms in sequences if terms) / len(sequences)
    if aggregate == "token":
        return total / sum(len(terms) for terms in sequences)
    return total / (length * len(sequences))


def ratio(tokens, old, t, level):
    if level == "token":
        return math.exp(tokens[t]) / math.exp(old[t])
    return (math.exp(sum(tokens)) / math.exp(sum(old))) ** (1 / len(tokens))


def clip(r, low, high):
    if low is not None and r < 1 - low:
        return 1 - low
    if high is not None and r > 1 + high:
        return 1 + high
    return r


def gradient(completions, *arguments, step=1e-5, **options):
    """Central differences of `loss` by every log-probability, as lists of the same lengths."""
    result = []
    for i, tokens in enumerate(completions):
        row = []
        for t in range(len(tokens)):
            values = []
            for sign in (1, -1):
                moved = [list(tokens_) for tokens_ in completions]
                moved[i][t] += sign * step
                values.append(loss(moved, *arguments, frozen=completions, **options))
            row.append((values[0] - values[1]) / (2 * step))
        result.append(row)
    return result
