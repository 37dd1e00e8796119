"""Report generation: reports of a model, and whether they state the same findings as those that were written."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medclip_hf.data.reports.decomposition import decompose_report
from medclip_hf.evaluation.intervals import Interval, bootstrap_weights, percentile_interval

PICTURE_INPUTS = ("pixel_values", "view_mask", "anatomy_mask", "anatomy_token_mask")
# Of IU X-Ray, as published.
PUBLISHED_GENERATION = {
    "num_beams": 3,
    "do_sample": False,
    "min_new_tokens": 40,
    "max_new_tokens": 100,
    "repetition_penalty": 2.0,
    "length_penalty": 2.0,
}

Labeller = Callable[[str], Collection[str]]


@dataclass(frozen=True)
class ClinicalFigures:
    """Findings of generated reports against those of the written ones.

    Args:
        overall: "macro_f1", "macro_precision", "macro_recall" over the findings that the written reports hold,
            "micro_...", and "example_f1", the mean over reports (1 where neither report has a finding).
        per_finding: finding to its precision, recall and F1.
        undefined: findings that no written report holds, left out of the macro means.
        num_positive: written reports with each finding.
        num_reports: compared.
    """

    overall: dict[str, Interval]
    per_finding: dict[str, dict[str, Interval]]
    undefined: tuple[str, ...]
    num_positive: dict[str, int]
    num_reports: int

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return vars(self) | {
            "overall": {name: interval.as_dict() for name, interval in self.overall.items()},
            "per_finding": {
                finding: {name: interval.as_dict() for name, interval in figures.items()}
                for finding, figures in self.per_finding.items()
            },
        }


def write_reports(
    model: Any, tokenizer: Any, batches: Iterable[Mapping[str, Any]], **generation_kwargs: Any
) -> Iterator[tuple[str, str]]:
    """(row id, report) of every row of the batches, in their order.

    Args:
        model: a `ConceptCLIPForReportGeneration` or `FVLMForReportGeneration`; put into evaluation mode for the time.
        tokenizer: of its language model.
        batches: with `row_ids` and the inputs that make up the picture, as the collators of training give them.
        generation_kwargs: of the language model's `generate`, for instance `PUBLISHED_GENERATION`.

    Raises:
        ValueError: a prompt without a token.
    """
    prompt = tokenizer(model.config.prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    if prompt.shape[1] == 0:
        raise ValueError("model.config.prompt has no token: the language model needs a text to go on from.")
    end = tokenizer.eos_token_id
    padding = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    generation_kwargs = {"eos_token_id": end, "pad_token_id": padding} | generation_kwargs
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            if not batch["row_ids"]:
                continue
            picture = {name: batch[name].to(model.device) for name in PICTURE_INPUTS if name in batch}
            picture["pixel_values"] = picture["pixel_values"].to(model.dtype)
            tokens = model.generate(**picture, input_ids=prompt.to(model.device), **generation_kwargs)
            texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
            yield from zip(batch["row_ids"], (text.strip() for text in texts), strict=True)
    finally:
        model.train(was_training)


def clinical_figures(
    generated: Sequence[str],
    references: Sequence[str],
    labeller: Labeller,
    findings: Sequence[str],
    *,
    groups: ArrayLike | None = None,
    num_resamples: int = 1000,
    seed: int = 0,
) -> ClinicalFigures:
    """Precision, recall and F1 of the findings that a labeller reads from the reports, with intervals by patient.

    Args:
        generated: N reports of a model.
        references: N reports that were written.
        labeller: text → the findings that it states as present; for instance CheXbert behind a function, or
            `anatomy_labeller(...)`. Its own mistakes are in the figures: it reads both reports.
        findings: all that it can give.
        groups: (N,) patient of each report; None: every report is its own.
        num_resamples: of the bootstrap; 0: no intervals.
        seed: of the bootstrap.

    Raises:
        ValueError: numbers of reports that differ, no report, or a finding that is not among those named.
    """
    if len(generated) != len(references) or not len(references):
        raise ValueError(f"each report needs its reference and there must be one: {len(generated)}, {len(references)}.")
    said, true = _label(generated, labeller, findings), _label(references, labeller, findings)
    columns = [said & true, said & ~true, ~said & true]
    counts = np.concatenate(columns, axis=1).astype(np.float64)  # (N, 3 * K): hits, false alarms, misses
    overlap = (2.0 * columns[0].sum(axis=1)) / np.maximum(said.sum(axis=1) + true.sum(axis=1), 1)
    example_f1 = np.where(said.any(axis=1) | true.any(axis=1), overlap, 1.0)
    defined = np.flatnonzero(true.any(axis=0))

    def figures_of(weights: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        """Figure name to its values, one a row of weights (R, N); per finding (R, K)."""
        hits, alarms, misses = np.split(weights @ counts, 3, axis=1)
        by_finding = _rates(hits, alarms, misses)
        micro = _rates(*(part.sum(axis=1) for part in (hits, alarms, misses)))
        macro = {name: values[:, defined].mean(axis=1) for name, values in by_finding.items()} if len(defined) else {}
        return {
            **{f"finding_{name}": values for name, values in by_finding.items()},
            **{f"macro_{name}": values for name, values in macro.items()},
            **{f"micro_{name}": values for name, values in micro.items()},
            "example_f1": weights @ example_f1 / weights.sum(axis=1),
        }

    point = figures_of(np.ones((1, len(said))))
    drawn = [figures_of(block) for block in bootstrap_weights(len(said), groups, num_resamples, seed)]

    def interval(name: str, column: int | None = None) -> Interval:
        place = slice(None) if column is None else (slice(None), column)
        values = np.concatenate([np.zeros(0), *(block[name][place] for block in drawn)])
        return percentile_interval(float(point[name][place][0]), values, 0.95)

    rates = ("precision", "recall", "f1")
    return ClinicalFigures(
        overall={name: interval(name) for name in point if not name.startswith("finding_")},
        per_finding={findings[k]: {rate: interval(f"finding_{rate}", int(k)) for rate in rates} for k in defined},
        undefined=tuple(name for k, name in enumerate(findings) if k not in defined),
        num_positive=dict(zip(findings, true.sum(axis=0).tolist(), strict=True)),
        num_reports=len(said),
    )


def anatomy_labeller(anatomies: Sequence[str]) -> Labeller:
    """A labeller that needs no model: the anatomies of which a report states something abnormal.

    It reads by the rules of `data.reports` (terms, negations, clauses), made for English reports of chest and CT.

    Args:
        anatomies: names of the lexicon.
    """

    def label(text: str) -> list[str]:
        told = decompose_report(text, "", anatomies, normal_rule="findings_too")
        return [entry.anatomy for entry in told if entry.is_abnormal]

    return label


def _label(texts: Sequence[str], labeller: Labeller, findings: Sequence[str]) -> NDArray[np.bool_]:
    """(N, K): which findings each text states."""
    places = {finding: place for place, finding in enumerate(findings)}
    labels = np.zeros((len(texts), len(findings)), dtype=bool)
    for row, text in enumerate(texts):
        for finding in labeller(text):
            if finding not in places:
                raise ValueError(f"the labeller gave {finding!r}, which is none of the findings {list(findings)}.")
            labels[row, places[finding]] = True
    return labels


def _rates(
    hits: NDArray[np.float64], alarms: NDArray[np.float64], misses: NDArray[np.float64]
) -> dict[str, NDArray[np.float64]]:
    """Precision, recall and F1; 0 where there is nothing to divide by, as a finding never said was never right."""
    return {
        "precision": hits / np.maximum(hits + alarms, 1e-12),
        "recall": hits / np.maximum(hits + misses, 1e-12),
        "f1": 2 * hits / np.maximum(2 * hits + alarms + misses, 1e-12),
    }
