"""Which samples models get right together: dominance, similarity, disagreement, votes.

Correctness is an array of bool, (model, sample): c_i = 1 where model i is right, mu_i = P(c_i = 1).
Probabilities are shares of the samples, so the identities here hold exactly, not on average.
"""

from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "TripleBounds",
    "disagreement_matrix",
    "dominance_matrix",
    "dominance_over",
    "independent_dominance",
    "mean_dominance",
    "plurality_vote",
    "similarity_matrix",
    "triple_bounds",
]

Ties = Literal["lowest_class", "first_model"]


def dominance_matrix(correct: ArrayLike) -> NDArray[np.float64]:
    """Dominance probabilities: zeta[i, j] = P(model i is right and model j is wrong).

    A stronger model that dominates a weaker one is right wherever the weaker one is. Exactly:

    - zeta_ij - zeta_ji = mu_i - mu_j, and zeta_ii = 0;
    - 0 <= zeta_ij <= min(mu_i, 1 - mu_j);
    - zeta_ik <= zeta_ij + zeta_jk, for any three models: where i is right and k is wrong, j is
      either wrong (then "i right, j wrong") or right (then "j right, k wrong").

    Example:
        >>> dominance_matrix([[True, True, False, False], [True, False, True, True]]).tolist()
        [[0.0, 0.25], [0.5, 0.0]]

    Args:
        correct: Where each model is right, (model, sample), bool.

    Returns:
        (model, model), fractions of the samples.

    Raises:
        ValueError: If ``correct`` has no model or no sample, or holds other values than 0 and 1.

    Source:
        H. Mania and S. Sra 2020, "Why do classifier accuracies show linear trends under
        distribution shift?", arXiv:2012.15483.
    """
    c = _correctness(correct).astype(np.int64)
    zeta: NDArray[np.float64] = c @ (1 - c).T / c.shape[1]
    return zeta


def similarity_matrix(correct: ArrayLike) -> NDArray[np.float64]:
    """Similarities: s[i, j] = P(c_i = c_j), both right or both wrong = 1 - zeta_ij - zeta_ji.

    Its complement is a distance: 1 - s_ik <= (1 - s_ij) + (1 - s_jk).

    Example:
        >>> similarity_matrix([[True, True, False, False], [True, False, True, True]]).tolist()
        [[1.0, 0.25], [0.25, 1.0]]

    Args:
        correct: As in `dominance_matrix`.

    Returns:
        (model, model), fractions of the samples.

    Raises:
        ValueError: As `dominance_matrix`.
    """
    c = _correctness(correct).astype(np.int64)
    alike: NDArray[np.float64] = (c @ c.T + (1 - c) @ (1 - c).T) / c.shape[1]
    return alike


def independent_dominance(correct: ArrayLike) -> NDArray[np.float64]:
    """What `dominance_matrix` would be if errors were independent: mu_i (1 - mu_j).

    Example:
        >>> independent_dominance([[True, True, False, False], [True, False, True, True]]).tolist()
        [[0.0, 0.125], [0.375, 0.0]]

    Args:
        correct: As in `dominance_matrix`.

    Returns:
        (model, model), fractions; 0 on the diagonal, where i and j are one model.

    Raises:
        ValueError: As `dominance_matrix`.
    """
    accuracy = _correctness(correct).mean(axis=1)
    product: NDArray[np.float64] = np.outer(accuracy, 1 - accuracy)
    np.fill_diagonal(product, 0)
    return product


def mean_dominance(correct: ArrayLike) -> float:
    """Mean over pairs of P(the weaker model is right and the stronger one is wrong).

    Weaker and stronger by accuracy on these samples; the two are the same for equal models.

    Example:
        >>> mean_dominance([[True, True, False, False], [True, False, True, True]])
        0.25

    Args:
        correct: As in `dominance_matrix`, at least 2 models.

    Returns:
        A fraction of the samples.

    Raises:
        ValueError: As `dominance_matrix`, and if there is only one model.
    """
    zeta = dominance_matrix(correct)
    if len(zeta) < 2:
        raise ValueError("dominance compares models: give at least 2, got 1")
    # zeta_ij - zeta_ji = mu_i - mu_j: the smaller of the two is that of the weaker model.
    pairs = np.triu_indices(len(zeta), 1)
    return float(np.minimum(zeta, zeta.T)[pairs].mean())


def dominance_over(correct: ArrayLike, other: ArrayLike) -> NDArray[np.float64]:
    """P(the model is right and ``other`` is wrong), of each model: of members over their vote.

    Example:
        >>> dominance_over([[True, True, False], [True, False, False]], [True, False, True])
        array([0.33333333, 0.        ])

    Args:
        correct: Where each model is right, (model, sample), bool.
        other: Where the one other classifier is right, (sample,), bool.

    Returns:
        (model,), fractions of the samples.

    Raises:
        ValueError: As `dominance_matrix`, and if the numbers of samples differ.
    """
    members, vote = _correctness(correct), np.asarray(other)
    if vote.shape != members.shape[1:]:
        raise ValueError(
            f"correct has {members.shape[1]} samples, and other has shape {vote.shape}: "
            "compare both on the same samples"
        )
    share: NDArray[np.float64] = (members & ~_correctness(vote[None])).mean(axis=1)
    return share


def disagreement_matrix(predictions: ArrayLike) -> NDArray[np.float64]:
    """Disagreement: d[i, j] = P(models i and j predict different classes).

    Unlike dissimilarity (1 - `similarity_matrix`) it counts two models that are wrong in different
    ways. It is a distance, at least the dissimilarity, and the same for two classes.

    Example:
        >>> disagreement_matrix([[0, 1, 2, 2], [0, 1, 1, 0]]).tolist()
        [[0.0, 0.5], [0.5, 0.0]]

    Args:
        predictions: Predicted class of each model, (model, sample), integers from 0.

    Returns:
        (model, model), fractions of the samples.

    Raises:
        ValueError: If ``predictions`` has another shape or type.
    """
    classes = _classes(predictions)
    return np.stack([(classes != row).mean(axis=1) for row in classes])


def plurality_vote(predictions: ArrayLike, *, ties: Ties = "lowest_class") -> NDArray[np.int64]:
    """The class with most votes, for each sample.

    Example:
        >>> plurality_vote([[3, 2], [0, 2], [3, 1]]).tolist()
        [3, 2]
        >>> plurality_vote([[3], [0]]).tolist(), plurality_vote([[3], [0]], ties="first_model")
        ([0], array([3]))

    Args:
        predictions: Predicted class of each model, (model, sample), integers from 0.
        ties: Between classes with equally many votes decides the lower class number
            (``"lowest_class"``: depends on no order of models, favours low numbers) or the model
            that comes first among those who voted for one of them (``"first_model"``: list the
            model that you trust most first). Of five CIFAR-10 models the choice moves the
            accuracy by about 0.1 points.

    Returns:
        (sample,), classes.

    Raises:
        ValueError: If ``predictions`` has another shape or type, or ``ties`` is unknown.
    """
    classes = _classes(predictions)
    if ties not in ("lowest_class", "first_model"):
        raise ValueError(f"ties must be 'lowest_class' or 'first_model', got {ties!r}")
    samples = np.arange(classes.shape[1])
    votes = np.zeros((classes.shape[1], int(classes.max()) + 1), dtype=np.int64)
    for row in classes:
        votes[samples, row] += 1
    winner: NDArray[np.int64] = votes.argmax(axis=1)
    if ties == "first_model":
        leads = votes[samples, classes] == votes.max(axis=1)  # (model, sample)
        winner = classes[leads.argmax(axis=0), samples]
    return winner


@dataclass(frozen=True)
class TripleBounds:
    """How far the middle of three models is from the chord of the others, and the bound on it.

    Args:
        models: (triple, 3), indices: weakest, middle, strongest by accuracy in distribution.
        deviation: (triple,), accuracy of the middle model on the shifted set minus the chord;
            fractions.
        lower: (triple,), lower bound on the deviation.
        upper: (triple,), upper bound.
    """

    models: NDArray[np.int64]
    deviation: NDArray[np.float64]
    lower: NDArray[np.float64]
    upper: NDArray[np.float64]

    @property
    def bound(self) -> NDArray[np.float64]:
        """Bound on the size of the deviation, (triple,), fractions."""
        return np.maximum(-self.lower, self.upper)


def triple_bounds(correct: ArrayLike, shifted: ArrayLike) -> TripleBounds:
    r"""Bounds how far three models are from one line, by dominance and by closeness of the sets.

    Why models lie on a line at all: let i, j, k be models in order of accuracy, mu_i < mu_k, and
    w = P(c_j = 1 | c_i = 0, c_k = 1) the share of what k adds to i that j knows already; primes are
    the shifted set. Theorem: with the slope s = (mu'_k - mu'_i) / (mu_k - mu_i) of the chord
    through i and k, the middle model's height above the chord,

        D = mu'_j - mu'_i - s (mu_j - mu_i),

    lies within

        (w' - w) (mu'_k - mu'_i) - zeta'_ij - s zeta_jk  <=  D
        D  <=  (w' - w) (mu'_k - mu'_i) + zeta'_jk + s zeta_ij              (s >= 0),

    zeta_ij and zeta_jk changing places in the terms with s where s < 0. If a weaker model is never
    right where a stronger one is wrong (dominance 0) and w' = w, the three points are collinear.

    Proof. Let p_abc = P(c_i = a, c_j = b, c_k = c). Then w (p_001 + p_011) = p_011 and
    mu_j - mu_i = p_010 + p_011 - p_100 - p_101, mu_k - mu_i = p_001 + p_011 - p_100 - p_110, so

        d := mu_j - mu_i - w (mu_k - mu_i) = p_010 + w p_110 - (1 - w) p_100 - p_101,

    and with 0 <= w <= 1, zeta_ij = p_100 + p_101 and zeta_jk = p_010 + p_110, this gives
    -zeta_ij <= d <= zeta_jk. Likewise d' with w' on the shifted set. Since
    s w (mu_k - mu_i) = w (mu'_k - mu'_i), it is D = (w' - w) (mu'_k - mu'_i) + d' - s d. Where
    c_i = 0, c_k = 1 never happens on the shifted set, w' is free and taken as w.

    On the 4,060 triples of the 30 published models (CIFAR-10 to CIFAR-10.1 v4 and v6) the middle
    model is 0.8 points from the chord in the mean, and the bound is 7 points: dominance as small as
    it is there explains a line roughly, and not as closely as models keep to it.

    Example:
        >>> nested = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]
        >>> bounds = triple_bounds(nested, nested)
        >>> bounds.models.tolist(), bounds.deviation.tolist(), bounds.bound.tolist()
        ([[0, 1, 2]], [0.0], [0.0])

    Args:
        correct: Where each model is right in distribution, (model, sample), bool.
        shifted: The same models on the shifted set, (model, other sample), bool.

    Returns:
        The deviations with their bounds, for every three models whose weakest and strongest
        differ in accuracy.

    Raises:
        ValueError: If there are fewer than 3 models, the numbers of models differ, or all are
            equally accurate.

    Source:
        The two assumptions (low dominance, similar probabilities on both sets) are those of
        Mania and Sra 2020, arXiv:2012.15483. The statement and the proof are given here in full and
        are our own, not a quotation of their theorem, which may have other constants.
    """
    here, there = _correctness(correct), _correctness(shifted, name="shifted")
    if len(here) != len(there):
        raise ValueError(f"correct has {len(here)} models, and shifted has {len(there)}")
    if len(here) < 3:
        raise ValueError(f"a triple needs at least 3 models, got {len(here)}")
    mu, shifted_mu = here.mean(axis=1), there.mean(axis=1)
    order = np.argsort(mu, kind="stable")
    triples = np.array(list(combinations(order.tolist(), 3)), dtype=np.int64)
    triples = triples[mu[triples[:, 0]] < mu[triples[:, 2]]]
    if not len(triples):
        raise ValueError("all models are equally accurate: no chord has a slope")
    i, j, k = triples.T
    gap, shifted_gap = mu[k] - mu[i], shifted_mu[k] - shifted_mu[i]
    slope = shifted_gap / gap
    share, shifted_share = _known_share(here, triples), _known_share(there, triples)
    moved = np.where(np.isnan(shifted_share), 0.0, shifted_share - share) * shifted_gap
    zeta, shifted_zeta = dominance_matrix(here), dominance_matrix(there)
    rise = np.stack([-slope * zeta[j, k], slope * zeta[i, j]])  # the ends of -s d
    return TripleBounds(
        models=triples,
        deviation=shifted_mu[j] - shifted_mu[i] - slope * (mu[j] - mu[i]),
        lower=moved - shifted_zeta[i, j] + rise.min(axis=0),
        upper=moved + shifted_zeta[j, k] + rise.max(axis=0),
    )


def _known_share(correct: NDArray[np.bool_], triples: NDArray[np.int64]) -> NDArray[np.float64]:
    """P(c_j = 1 | c_i = 0, c_k = 1) for each triple; NaN where the condition never happens."""
    share = np.full(len(triples), np.nan)
    for first, last in np.unique(triples[:, [0, 2]], axis=0):
        (rows,) = np.nonzero((triples[:, 0] == first) & (triples[:, 2] == last))
        added = correct[:, ~correct[first] & correct[last]]
        if added.shape[1]:
            share[rows] = added[triples[rows, 1]].mean(axis=1)
    return share


def _correctness(correct: ArrayLike, *, name: str = "correct") -> NDArray[np.bool_]:
    array = np.asarray(correct)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(
            f"{name} must be (model, sample) with at least one of each, got shape {array.shape}"
        )
    if array.dtype != np.bool_ and not np.isin(array, (0, 1)).all():
        raise ValueError(
            f"{name} must hold True where a model is right, else False; got other values. "
            "For predicted classes write: predictions == labels"
        )
    return array.astype(np.bool_)


def _classes(predictions: ArrayLike) -> NDArray[np.int64]:
    array = np.asarray(predictions)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(
            "predictions must be (model, sample) with at least one of each, "
            f"got shape {array.shape}"
        )
    if not np.issubdtype(array.dtype, np.integer) or array.min() < 0:
        raise ValueError(
            "predictions must be class numbers, integers from 0, got "
            f"{array.dtype} from {array.min()}: take argmax over classes first"
        )
    return array.astype(np.int64)
