"""Logistic regression with an L2 penalty, for many strengths of it and many findings at once.

Each problem is scikit-learn's: mean log loss + ‖weights‖² / (2 · C · samples), intercept free. All problems share the
features, so one matrix product a step serves all of them where one fit at a time would read the features again for
each; a line search costs none at all, as logits are linear in the step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

_MEMORY = 10  # pairs of L-BFGS, as scipy's default
_ARMIJO, _SHRINK, _MAX_HALVINGS = 1e-4, 0.5, 30
_ROUNDING = 1e-14  # relative, of the loss: close to the optimum it cannot tell steps apart
_MAX_LOGITS = 40_000_000  # held at a time: 320 MB of float64


@dataclass(frozen=True)
class LogisticFit:
    """Linear classifiers, one a problem.

    Args:
        weight: (P, K, D).
        bias: (P, K).
        num_steps: of the problem that took longest.
        is_converged: (P,) bool: the largest entry of the gradient fell below the tolerance.
    """

    weight: Tensor
    bias: Tensor
    num_steps: int
    is_converged: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """(N, P, K) of features (N, D)."""
        flat = features.to(self.weight) @ self.weight.flatten(0, 1).T
        return flat.unflatten(1, self.bias.shape) + self.bias


def fit_softmax(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    inverse_penalties: Sequence[float],
    *,
    tolerance: float = 1e-4,
    max_steps: int = 1000,
) -> LogisticFit:
    """Multinomial classifiers, a problem for each C.

    Args:
        features: (N, D), finite.
        labels: (N,) integers below `num_classes`, each occurring.
        num_classes: K, at least 2.
        inverse_penalties: scikit-learn's C, positive.
        tolerance: of the largest entry of the gradient.
        max_steps: after which a problem is given back as not converged.
    """
    targets = torch.nn.functional.one_hot(labels.long(), num_classes).to(torch.float64)[:, None, :]
    weights = torch.full((len(labels), 1), 1.0 / len(labels), dtype=torch.float64, device=features.device)
    return _fit_in_parts(features, targets, weights, inverse_penalties, "softmax", tolerance, max_steps)


def fit_sigmoid(
    features: Tensor,
    targets: Tensor,
    inverse_penalties: Sequence[float],
    *,
    known: Tensor | None = None,
    tolerance: float = 1e-4,
    max_steps: int = 1000,
) -> LogisticFit:
    """Binary classifiers of F findings: problem c · F + f is finding f with the c-th C; K = 1.

    Args:
        features: (N, D), finite.
        targets: (N, F) bool, both values occurring among the known of each finding.
        inverse_penalties: scikit-learn's C, positive.
        known: (N, F) bool, targets that count; None: all.
        tolerance: as above.
        max_steps: as above.
    """
    counted = torch.ones_like(targets, dtype=torch.float64) if known is None else known.to(torch.float64)
    weights = counted / counted.sum(dim=0)
    findings = targets.to(torch.float64)[:, :, None]
    return _fit_in_parts(features, findings, weights, inverse_penalties, "sigmoid", tolerance, max_steps)


def _fit_in_parts(
    features: Tensor,
    targets: Tensor,
    weights: Tensor,
    inverse_penalties: Sequence[float],
    link: Literal["softmax", "sigmoid"],
    tolerance: float,
    max_steps: int,
) -> LogisticFit:
    """As many C at a time as memory allows; where features are wider than long, in the space that their rows span.

    There the fit is the same: a penalised weight vector has no part that no sample sees.
    """
    if not inverse_penalties or min(inverse_penalties) <= 0:
        raise ValueError(f"C must be positive, got {list(inverse_penalties)}")
    values = features.to(torch.float64)
    basis = None
    if len(values) < values.shape[1]:
        basis, triangular = torch.linalg.qr(values.T)  # values = triangularᵀ basisᵀ
        values = triangular.T
    num_samples, num_findings, num_classes = targets.shape
    at_once = max(1, _MAX_LOGITS // (num_samples * num_findings * num_classes))
    fits = []
    for first in range(0, len(inverse_penalties), at_once):
        part = torch.tensor(inverse_penalties[first : first + at_once], dtype=torch.float64, device=values.device)
        counts = (weights > 0).sum(dim=0)  # (findings,)
        penalties = (1.0 / (part[:, None] * counts)).flatten()
        repeats = len(part)
        problems = _Problems(values, targets.repeat(1, repeats, 1), weights.repeat(1, repeats), penalties, link)
        fits.append(_minimise(problems, tolerance, max_steps))
    weight = torch.cat([fit.weight for fit in fits])
    return LogisticFit(
        weight=weight if basis is None else weight @ basis.T,
        bias=torch.cat([fit.bias for fit in fits]),
        num_steps=max(fit.num_steps for fit in fits),
        is_converged=torch.cat([fit.is_converged for fit in fits]),
    )


class _Problems:
    """Loss and gradient of P problems on the same features; parameters are (P, K · (D + 1)), intercepts last."""

    def __init__(
        self, features: Tensor, targets: Tensor, weights: Tensor, penalties: Tensor, link: Literal["softmax", "sigmoid"]
    ) -> None:
        self.features, self.targets, self.weights, self.penalties, self.link = (
            features,
            targets,
            weights,
            penalties,
            link,
        )

    @property
    def num_parameters(self) -> int:
        """K · (D + 1)."""
        return self.targets.shape[2] * (self.features.shape[1] + 1)

    def narrowed(self, rows: Tensor) -> "_Problems":
        """Some of the problems."""
        return _Problems(self.features, self.targets[:, rows], self.weights[:, rows], self.penalties[rows], self.link)

    def logits(self, parameters: Tensor) -> Tensor:
        """(N, P, K)."""
        weight, bias = self._parts(parameters)
        return (self.features @ weight.flatten(0, 1).T).unflatten(1, bias.shape) + bias

    def losses(self, logits: Tensor) -> Tensor:
        """Mean log loss (P,), without penalty."""
        if self.link == "softmax":
            each = torch.logsumexp(logits, dim=2) - (logits * self.targets).sum(dim=2)
        else:
            each = torch.nn.functional.softplus(logits[..., 0]) - logits[..., 0] * self.targets[..., 0]
        return (each * self.weights).sum(dim=0)

    def penalty(self, parameters: Tensor, other: Tensor | None = None) -> Tensor:
        """‖weights‖² / (2 C samples), (P,), or the bilinear form of two parameters."""
        weight = self._parts(parameters)[0].flatten(1)
        return 0.5 * self.penalties * (weight * (weight if other is None else self._parts(other)[0].flatten(1))).sum(1)

    def gradient(self, parameters: Tensor, logits: Tensor) -> Tensor:
        """(P, K · (D + 1)) of loss and penalty."""
        said = torch.softmax(logits, dim=2) if self.link == "softmax" else torch.sigmoid(logits)
        residuals = (said - self.targets) * self.weights[..., None]
        weight, _ = self._parts(parameters)
        of_weight = (residuals.flatten(1).T @ self.features).reshape(weight.shape) + self.penalties[
            :, None, None
        ] * weight
        return torch.cat([of_weight, residuals.sum(dim=0)[..., None]], dim=2).flatten(1)

    def _parts(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        whole = parameters.unflatten(1, (self.targets.shape[2], -1))
        return whole[..., :-1], whole[..., -1]


def _minimise(problems: _Problems, tolerance: float, max_steps: int) -> LogisticFit:
    """L-BFGS on all problems together (Nocedal and Wright, algorithm 7.5); those that have converged step aside."""
    num_problems = len(problems.penalties)
    found = problems.features.new_zeros(num_problems, problems.num_parameters)
    is_converged = torch.zeros(num_problems, dtype=torch.bool, device=found.device)
    active = torch.arange(num_problems, device=found.device)
    parameters, logits = found.clone(), problems.logits(found)
    gradient = problems.gradient(parameters, logits)
    history: list[tuple[Tensor, Tensor, Tensor]] = []
    is_stuck = torch.zeros_like(is_converged)
    steps = 0
    for steps in range(max_steps + 1):
        is_flat = gradient.abs().amax(dim=1) <= tolerance
        done = is_flat | is_stuck
        if bool(done.any()):
            found[active[done]], is_converged[active[is_flat]] = parameters[done], True
            rest = (~done).nonzero()[:, 0]
            active, parameters, gradient, logits = active[rest], parameters[rest], gradient[rest], logits[:, rest]
            problems = problems.narrowed(rest)
            history = [(moved[rest], turned[rest], scale[rest]) for moved, turned, scale in history]
        if not len(active) or steps == max_steps:
            break
        direction = _direction(gradient, history)
        direction_logits = problems.logits(direction)
        lengths = _step_lengths(problems, parameters, logits, gradient, direction, direction_logits)
        moved = lengths[:, None] * direction
        parameters, logits = parameters + moved, logits + lengths[:, None] * direction_logits
        before, gradient = gradient, problems.gradient(parameters, logits)
        turned = gradient - before
        curvature = (moved * turned).sum(dim=1)
        scale = torch.where(curvature > 0, 1.0 / curvature.clamp(min=1e-300), torch.zeros_like(curvature))
        history = [*history[-(_MEMORY - 1) :], (moved, turned, scale)]
        is_stuck = lengths == 0
    found[active] = parameters
    whole = found.unflatten(1, (problems.targets.shape[2], -1))
    return LogisticFit(whole[..., :-1], whole[..., -1], steps, is_converged)


def _direction(gradient: Tensor, history: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Where to go, (P, M): the two loops of L-BFGS; before the first step, the gradient's unit vector downhill."""
    if not history:
        return -gradient / gradient.norm(dim=1, keepdim=True).clamp(min=1.0)
    direction, shares = -gradient, []
    for moved, turned, scale in reversed(history):
        share = scale * (moved * direction).sum(dim=1)
        shares.append(share)
        direction = direction - share[:, None] * turned
    moved, turned, scale = history[-1]
    length = (turned * turned).sum(dim=1)
    direction = direction * torch.where(scale > 0, 1.0 / (scale * length).clamp(min=1e-300), 1.0)[:, None]
    for (moved, turned, scale), share in zip(history, reversed(shares), strict=True):
        correction = share - scale * (turned * direction).sum(dim=1)
        direction = direction + correction[:, None] * moved
    return direction


def _step_lengths(
    problems: _Problems,
    parameters: Tensor,
    logits: Tensor,
    gradient: Tensor,
    direction: Tensor,
    direction_logits: Tensor,
) -> Tensor:
    """(P,) the first of 1, ½, ¼, … that lowers the objective enough; 0 where none does. No product with features."""
    slope = (gradient * direction).sum(dim=1)
    start = problems.losses(logits)
    linear, square = 2.0 * problems.penalty(parameters, direction), problems.penalty(direction)
    lengths = torch.ones_like(slope)
    for _ in range(_MAX_HALVINGS):
        change = problems.losses(logits + lengths[:, None] * direction_logits) - start
        change = change + lengths * linear + lengths**2 * square
        too_long = change > _ARMIJO * lengths * slope + _ROUNDING * start
        if not bool(too_long.any()):
            return lengths
        lengths = torch.where(too_long, _SHRINK * lengths, lengths)
    return torch.where(too_long, torch.zeros_like(lengths), lengths)
