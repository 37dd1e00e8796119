"""Metrics, linear probe and retrieval against the plain scikit-learn and numpy statement, at equal figures.

    OMP_NUM_THREADS=1 python benchmarks/evaluation.py
    OMP_NUM_THREADS=1 python benchmarks/evaluation.py --only probe,retrieval --repeats 5

Both sides run by turns in one process; medians of their times and the ratio of these are printed, with the figures of
both, whose largest difference must be within rounding (of the optimisers' tolerance for the probe) or the run ends with
an error. The plain bootstrap is timed on fewer resamples, and its time is scaled up to as many as ours drew.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score

from medclip_hf.evaluation.classification import classification_figures
from medclip_hf.evaluation.comparisons import delong_test
from medclip_hf.evaluation.intervals import bootstrap_weights
from medclip_hf.evaluation.metrics import auroc_per_class
from medclip_hf.evaluation.probe import C_GRID, ProbeSplit, fit_probe
from medclip_hf.evaluation.retrieval import retrieval_recall
from medclip_hf.evaluation.zero_shot import scores_from_cosines

Floats = NDArray[np.float64]
_GRADIENT = 1e-6  # where both optimisers stop: at scikit-learn's 1e-4 weak penalties differ by a tenth of a probability


@dataclass(frozen=True)
class Side:
    """One way to a figure.

    Args:
        name: of the way.
        run: gives the figures.
        scale: what its time is multiplied by, where it does a part of the work.
    """

    name: str
    run: Callable[[], Floats]
    scale: float = 1.0


def compare(subject: str, plain: Side, ours: Side, repeats: int, tolerance: float) -> None:
    """Run both by turns and print medians, ratio and the largest difference of their figures.

    Raises:
        SystemExit: the figures differ by more than the tolerance.
    """
    seconds: dict[str, list[float]] = {plain.name: [], ours.name: []}
    figures: dict[str, Floats] = {}
    for _ in range(repeats):
        for side in (plain, ours):
            start = time.perf_counter()
            figures[side.name] = side.run()
            seconds[side.name].append((time.perf_counter() - start) * side.scale)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    gap = float(np.nanmax(np.abs(figures[plain.name] - figures[ours.name])))
    print(f"\n{subject}")
    for side in (plain, ours):
        note = f" (scaled by {side.scale:g})" if side.scale != 1 else ""
        spread = f"{min(seconds[side.name]):.3g} to {max(seconds[side.name]):.3g}"
        print(f"  {side.name:<44} {medians[side.name]:9.3g} s, {spread}{note}")
    print(f"  ratio {medians[plain.name] / medians[ours.name]:.3g}, largest difference of the figures {gap:.1e}")
    if gap > tolerance:
        raise SystemExit(f"{subject}: the figures differ by {gap:.2e}, more than {tolerance:.0e}")


def bootstrap(sizes: argparse.Namespace) -> None:
    """Intervals of AUROC, and of all figures, of 16 findings by patient."""
    rng = np.random.default_rng(0)
    labels = rng.random((sizes.patients, 16)) < 0.1
    scores = 1.0 / (1.0 + np.exp(-rng.normal(size=labels.shape) - labels))
    names, few = [str(k) for k in range(16)], 10

    def plain() -> Floats:
        drawn = []
        for block in bootstrap_weights(sizes.patients, None, few, seed=0):
            for weights in block:
                rows = np.repeat(np.arange(sizes.patients), weights.astype(int))
                drawn.append(roc_auc_score(labels[rows], scores[rows], average="macro"))
        return np.quantile(drawn, [0.025, 0.975])

    def ends(num_resamples: int) -> Floats:
        macro = auroc_per_class(scores, labels, names, num_resamples=num_resamples).macro
        return np.array([macro.low, macro.high])

    ours = ends(few)
    if np.abs(ours - plain()).max() > 1e-12:
        raise SystemExit("the bootstrap of AUROC draws other figures than scikit-learn on the repeated rows")
    wanted = 1000
    compare(
        f"AUROC of {sizes.patients} patients x 16 findings, {wanted} resamples (equal on the {few} that both draw)",
        Side("scikit-learn on the rows of each resample", plain, wanted / few),
        Side("ours", lambda: (ends(wanted), ours)[1]),
        sizes.repeats,
        1e-12,
    )
    start = time.perf_counter()
    figures = classification_figures(scores, labels, names, num_resamples=wanted)
    print(f"  all {len(figures.overall)} figures at once, overall and by class: {time.perf_counter() - start:.3g} s")
    expected = average_precision_score(labels, scores, average="macro")
    print(f"  AUPRC differs from scikit-learn's by {abs((figures.overall['auprc'].value or 0) - expected):.1e}")


def delong(sizes: argparse.Namespace) -> None:
    """DeLong's standard error, fast and as the formula is written."""
    rng = np.random.default_rng(0)
    labels = rng.random(sizes.patients) < 0.1
    first, second = rng.normal(size=(2, sizes.patients)) + labels

    def plain() -> Floats:
        components = []
        for values in (first, second):
            wins = values[labels][:, None] > values[~labels]
            components.append((wins.mean(axis=1), wins.mean(axis=0)))
        of_positives, of_negatives = (np.cov([one[side] for one in components]) for side in (0, 1))
        covariance = of_positives / labels.sum() + of_negatives / (~labels).sum()
        return np.array([np.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])])

    compare(
        f"DeLong's test, {sizes.patients} patients",
        Side("all pairs in numpy", plain),
        Side("ours", lambda: np.array([delong_test(first, second, labels).standard_error])),
        sizes.repeats,
        1e-12,
    )


def probe(sizes: argparse.Namespace) -> None:
    """The grid of C on one training set: one class of ten, and 14 findings."""
    rng = np.random.default_rng(0)
    classes = np.arange(sizes.train) % 10
    scales = np.exp(0.5 * rng.normal(size=sizes.width))  # features are never equally wide
    means = 0.1 * rng.normal(size=(10, sizes.width))
    features = (means[classes] + rng.normal(size=(sizes.train, sizes.width))) * scales / np.sqrt(sizes.width)
    findings = rng.random((sizes.train, 14)) < 1.0 / (1.0 + np.exp(2.0 - 30.0 * features[:, :14]))
    for name, labels in (("one class of 10", classes), ("14 findings", findings)):
        targets = [labels] if labels.ndim == 1 else list(labels.T)

        def plain(targets: list[Any] = targets) -> Floats:
            said = []
            for c in C_GRID:
                models = [
                    LogisticRegression(C=c, tol=_GRADIENT, max_iter=5000).fit(features, target) for target in targets
                ]
                tables = [model.predict_proba(features) for model in models]
                said.append(tables[0] if len(tables) == 1 else np.stack([table[:, 1] for table in tables], axis=1))
            return np.stack(said)

        def ours(labels: NDArray[Any] = labels) -> Floats:
            num_classes = 10 if labels.ndim == 1 else 14
            fitted = fit_probe(ProbeSplit(features, labels), num_classes, C_GRID, tolerance=_GRADIENT, max_steps=5000)
            return np.stack([fitted.probabilities(features, which) for which in range(len(C_GRID))])

        compare(
            f"Probe of {name}: {sizes.train} samples x {sizes.width} features, {len(C_GRID)} values of C",
            Side("scikit-learn, one fit after another", plain),
            Side("ours, all together", ours),
            sizes.repeats,
            0.01,  # of a probability: weak penalties leave it some room at this gradient
        )


def retrieval(sizes: argparse.Namespace) -> None:
    """Recall at 1, 5, 10, 50 and 200 both ways."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(sizes.gallery, 512)).astype(np.float32)
    texts = images + 2.5 * rng.normal(size=images.shape).astype(np.float32)
    ks = (1, 5, 10, 50, 200)

    def plain() -> Floats:
        left, right = (table / np.linalg.norm(table, axis=1, keepdims=True) for table in (images, texts))
        similarity = left @ right.T
        own = np.diag(similarity)
        ranks = ((similarity > own[:, None]).sum(axis=1), (similarity > own[None, :]).sum(axis=0))
        return np.array([(rank < k).mean() for rank in ranks for k in ks])

    def ours() -> Floats:
        return np.array(list(retrieval_recall(torch.from_numpy(images), torch.from_numpy(texts), ks).values()))

    compare(
        f"Retrieval among {sizes.gallery} images and texts, width 512",
        Side("dense similarity in numpy", plain),
        Side("ours, in chunks", ours),
        sizes.repeats,
        1.5 / sizes.gallery,  # equal within 1e-6 of a cosine counts as a tie in ours
    )


def zero_shot(sizes: argparse.Namespace) -> None:
    """Probabilities of 10,000 images for 100 classes from kept embeddings."""
    rng = torch.Generator().manual_seed(0)
    images = torch.nn.functional.normalize(torch.randn(10_000, 1152, generator=rng), dim=1)
    classes = torch.nn.functional.normalize(torch.randn(100, 1152, generator=rng), dim=1)

    def plain() -> Floats:
        logits = 100.0 * (images.numpy() @ classes.numpy().T).astype(np.float64)
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        return shares / shares.sum(axis=1, keepdims=True)

    def ours() -> Floats:
        return scores_from_cosines(images @ classes.T, logit_scale=100.0).global_scores

    compare("Zero-shot of 10,000 images x 100 classes", Side("numpy", plain), Side("ours", ours), sizes.repeats, 1e-4)


SUBJECTS = {"bootstrap": bootstrap, "delong": delong, "probe": probe, "retrieval": retrieval, "zero_shot": zero_shot}


def main() -> None:
    """Parse the sizes and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patients", type=int, default=5000)
    parser.add_argument("--train", type=int, default=2000, help="samples of the probe")
    parser.add_argument("--width", type=int, default=1152, help="of its features")
    parser.add_argument("--gallery", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default=",".join(SUBJECTS), help="subjects, with commas")
    sizes = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    for name in sizes.only.split(","):
        SUBJECTS[name](sizes)


if __name__ == "__main__":
    main()
