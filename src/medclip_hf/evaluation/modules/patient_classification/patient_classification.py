"""AUROC, AUPRC, F1, sensitivity, calibration and more, each with its bootstrap interval by patient."""

# `evaluate` reads the imports of this file line by line and wants one package each.
import datasets
import evaluate
import numpy

from medclip_hf.evaluation.classification import classification_figures

_DESCRIPTION = """
Figures of a classifier on medical test sets: AUROC (macro), AUPRC, sensitivity at a fixed specificity, accuracy,
balanced accuracy, sensitivity, specificity, precision, F1 (macro and micro), Brier score and calibration error, each
with a percentile interval of a bootstrap over patients. A class without positives is named and left out of means.
"""
_INPUTS = """
Args:
    predictions: for each sample K scores; probabilities if calibration and decisions are wanted.
    references: for each sample its class, an integer; with the configuration "multilabel" K times 0 or 1.
    class_names: K names; default "class 0", "class 1", ...
    groups: patient of each sample; default: every sample is its own.
    known: (N, K) bool, multilabel alone: what counts.
    thresholds, specificity, num_resamples, confidence, seed: as in medclip_hf.evaluation.classification.
Returns:
    each figure under its name, its interval under name_low and name_high (None where undefined); "undefined": classes
    without figures and why; "details": everything, by class too.
"""


class PatientClassification(evaluate.Metric):
    """Figures of a classifier with intervals by patient; configurations: "default" (one class each), "multilabel"."""

    def _info(self) -> evaluate.MetricInfo:
        score, label = datasets.Value("float64"), datasets.Value("int64")
        references = datasets.Sequence(label) if self.config_name == "multilabel" else label
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Sequence(score), "references": references}),
        )

    def _compute(self, predictions, references, class_names=None, **options):  # type: ignore[no-untyped-def]
        scores = numpy.asarray(predictions, dtype=numpy.float64)
        names = class_names if class_names is not None else [f"class {k}" for k in range(scores.shape[-1])]
        labels = numpy.asarray(references, dtype=numpy.int64)
        figures = classification_figures(scores, labels, names, **options)
        flat = {}
        for name, interval in figures.overall.items():
            flat |= {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
        return {**flat, "undefined": figures.undefined, "details": figures.as_dict()}
