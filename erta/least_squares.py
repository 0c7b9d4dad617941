"""The least squares of a fitted solver: six terms a step, from the products of terms and target alone. Pure functions.

    x[k+1] = x[k] + sum_f c[f] F_f,    F = (v_k, v_{k-1}, v_{k-2}, x, x - x_{k-1}, x - x_{k-2})

or nine, where the guidance branches are told apart: then their contrasts d_k, d_{k-1}, d_{k-2} follow (`erta.branches`).

A prompt's *products* are the inner products of target and terms, in that order, 7 x 7 or 10 x 10: all that any fit, error or
cross-validation needs of it. Below, F is the number of terms.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from erta.solver import Solver

MEMORY = 3
TERMS = ("v", "v1", "v2", "x", "x-x1", "x-x2")
CONTRASTS = ("d", "d1", "d2")
RIDGES = (1e-6, 1e-4, 1e-2)  # that cross-validation chooses from
FLOOR = 1e-3  # of the median error, added to each prompt's before weighting
ROUNDS = 3
NOTHING = 1e-12


def features_of(
    outputs: list[np.ndarray], latents: list[np.ndarray], contrasts: list[np.ndarray] | None = None
) -> np.ndarray:
    """The terms, (P, F, M), from what the last nodes had, newest first; zero where there is none."""
    count = len(TERMS) if contrasts is None else len(TERMS) + len(CONTRASTS)
    found = np.zeros((len(latents[0]), count, latents[0].shape[1]), np.float64)
    for lag, contrast in enumerate(contrasts or ()):
        found[:, len(TERMS) + lag] = contrast
    for lag, output in enumerate(outputs):
        found[:, lag] = output
    found[:, 3] = latents[0]
    for lag, latent in enumerate(latents[1:], 1):
        found[:, 3 + lag] = latents[0].astype(np.float64) - latent
    return found


def as_tables(coefficients: np.ndarray) -> dict[str, np.ndarray]:
    """Coefficients (K, F) of the terms as those of outputs, latents, and contrasts if they are among them, (K, 3) each."""
    latent = np.stack([coefficients[:, 3:6].sum(axis=1), -coefficients[:, 4], -coefficients[:, 5]], axis=1)
    found = {"velocity": coefficients[:, :3], "latent": latent}
    return found if coefficients.shape[1] == len(TERMS) else {**found, "contrast": coefficients[:, len(TERMS) :]}


def as_terms(solver: Solver) -> np.ndarray:
    """A solver of memory 3 or less in the six terms, (K, 6); the way back from `as_tables`."""
    found = np.zeros((solver.num_steps, len(TERMS)))
    found[:, : solver.memory] = solver.velocity[..., 0]
    found[:, 4 : 3 + solver.memory] = -solver.latent[:, 1:, 0]
    found[:, 3] = solver.latent[:, 0, 0] - found[:, 4:].sum(axis=1)
    return found


def products_of(target: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Products of target (P, M) and terms (P, F, M) with each other, float64 (P, F + 1, F + 1)."""
    both = np.concatenate([target[:, None].astype(np.float64), features], axis=1)
    return both @ both.transpose(0, 2, 1)


def solve(
    products: np.ndarray, own: np.ndarray, terms: Sequence[int], ridge: float, weighted: bool = True
) -> np.ndarray:
    """Coefficients (F,) that fit the target: weighted ridge least squares over prompts, towards the rule `own` (F,).

    `products` (P, F + 1, F + 1) of the target and the terms. A term that is zero everywhere, or not among `terms`, gets none.
    """
    used = [term for term in terms if products[:, 1 + term, 1 + term].max() > 0]
    found = np.zeros(len(own))
    if not used:
        return found
    rows = [0, *(1 + term for term in used)]
    small = products[:, rows][:, :, rows]
    towards = own[used]
    weights = np.ones(len(small))
    for _ in range(ROUNDS if weighted else 1):
        total = np.tensordot(weights, small, axes=1)
        features, size = total[1:, 1:], np.diag(total)[1:]
        damped = features + np.diag((ridge + NOTHING) * size + np.finfo(float).tiny)
        coefficients = towards + np.linalg.solve(damped, total[1:, 0] - features @ towards)
        left = squared_errors(small, coefficients)
        weights = 1 / (left + FLOOR * np.median(left) + np.finfo(float).tiny)
        weights = weights / weights.max()
    found[used] = coefficients
    return found


def squared_errors(products: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    """What is left of the target in each prompt, (P,), from products (P, f + 1, f + 1) and coefficients (f,)."""
    left = np.concatenate([[1.0], -coefficients])
    return np.maximum(np.einsum("a,pab,b->p", left, products, left), 0)


def leave_one_out(
    products: np.ndarray, own: np.ndarray, terms: Sequence[int], ridge: float, weighted: bool = True
) -> np.ndarray:
    """For each prompt the coefficients that all others give, (P, F)."""
    everyone = np.arange(len(products))
    return np.stack([solve(products[everyone != one], own, terms, ridge, weighted) for one in everyone])


def best_setting(
    products: np.ndarray, own: np.ndarray, terms: int | None, ridge: float | None, weighted: bool
) -> tuple[list[int], float]:
    """Terms and ridge of one step: what is given, else whose error on left-out prompts is smallest, in decibels.

    `terms` counts the first six. With contrasts among the terms, how many of those are taken is chosen after it, all if `terms` is
    given.
    """
    ridges = [ridge] if ridge is not None else list(RIDGES)
    contrasts = list(range(len(TERMS), len(own)))
    if len(products) < 2 or (terms is not None and ridge is not None):
        return [*range(terms or len(TERMS)), *contrasts], ridges[len(ridges) // 2]
    counts, fixed = (range(1, len(TERMS) + 1), []) if terms is None else ([terms], contrasts)
    settings = [([*range(count), *fixed], one) for count in counts for one in ridges]

    def score(setting: tuple[list[int], float]) -> float:
        held_out = leave_one_out(products, own, *setting, weighted)
        left = [squared_errors(products[one : one + 1], held_out[one])[0] for one in range(len(products))]
        return float(np.mean(np.log(np.array(left) + np.finfo(float).tiny)))

    best = min(settings, key=score)
    if terms is None and contrasts:
        more = [([*best[0], *contrasts[:count]], one) for count in range(1, len(contrasts) + 1) for one in ridges]
        best = min([best, *more], key=score)
    return best
