"""The card of a model: what it is, what it was made from, what was measured, and what it must not be used for."""

import html
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from huggingface_hub import ModelCardData

from medclip_hf.data.parquet import write_text_atomically
from medclip_hf.hub.results import MeasuredFigure, checked_repository_id, eval_results

EVAL_RESULTS = Path(".eval_results", "medclip_hf.yaml")

# Of the Hub's tasks, those that a model of this package can carry: another word would leave the page without a task.
PIPELINE_TAGS = (
    "feature-extraction",
    "image-classification",
    "image-feature-extraction",
    "image-text-to-text",
    "image-to-text",
    "visual-question-answering",
    "zero-shot-image-classification",
)

DISCLAIMER = (
    "**Not a medical device.** Nothing here is validated for diagnosis, and no output may guide the care of a patient."
)

_CITATIONS = {
    "conceptclip": """@article{nie2026conceptclip,
  title   = {An explainable biomedical foundation model via large-scale concept-enhanced vision-language pre-training},
  author  = {Nie, Yuxiang and He, Sunan and Bie, Yequan and others},
  journal = {Nature Biomedical Engineering},
  year    = {2026},
  doi     = {10.1038/s41551-026-01764-x}
}""",
    "fvlm": """@inproceedings{shui2025fvlm,
  title     = {Large-scale and Fine-grained Vision-language Pre-training for Enhanced {CT} Image Understanding},
  author    = {Shui, Zhongyi and Zhang, Jianpeng and Cao, Weiwei and others},
  booktitle = {International Conference on Learning Representations},
  year      = {2025},
  note      = {arXiv:2501.14548}
}""",
}

_MISUSE = (
    "Diagnosis, triage or treatment of a patient, alone or as a second opinion.",
    "Images of another kind, another body region or another wording of prompts than those it was measured on, without "
    "measuring again.",
    "Finding out who a patient is, or joining records of patients across sources.",
)

_LIMITS = {
    "conceptclip": (
        "A score compares an image with the prompts given: it is no probability of disease, and it changes with the "
        "wording of the prompts.",
        "A heatmap shows which patches a score rests on. It does not show that the score is right, and the best patch "
        "may be an artefact, such as a marker or a tube.",
        "Texts of more than 77 tokens are cut.",
    ),
    "fvlm": (
        "Scans must come in Hounsfield units, with known orientation and a mask of the anatomies; wrong values or a "
        "wrong orientation are the first cause of wrong results.",
        "A finding is looked for inside its anatomy alone; what lies outside the named anatomies is not seen.",
        "A score compares an anatomy with a pair of prompts: prompts must be worded as the reports of training are.",
    ),
}

_LINK = re.compile(r"https?://[^\s()<>\[\]\\]+|\w[\w.-]*")


@dataclass(frozen=True)
class ModelFacts:
    """What a card tells about one model or adapter.

    Args:
        name: of the model.
        model_type: which of the two systems it is.
        summary: one or two sentences for the top of the page.
        license: identifier that the Hub knows, as "apache-2.0"; "other" needs `license_name` and `license_link`.
        license_name: name of another licence.
        license_link: address of another licence, or the name of its file beside the card.
        pipeline_tag: one of `PIPELINE_TAGS`; None for what has no task of the Hub, as CT.
        base_model: `owner/name` of what it was started from, where that is on the Hub. A folder is no base model.
        base_model_relation: how it came from `base_model`.
        is_adapter: whether the weights are an adapter of PEFT instead of a whole model.
        auto_class: class of transformers that loads it.
        datasets: `owner/name` of training data on the Hub; other data are described in `training_data`.
        metrics: identifiers of metrics for the page's head, as "roc_auc".
        languages: of the texts, as "en".
        tags: beyond those that every card has.
        training_data: in words: source, size, how patients were separated, what was removed.
        training: name and value of what matters of the recipe.
        figures: what was measured, on data that training did not see.
        intended_use: what it was made for.
        limits: beyond those of the architecture, as groups of patients that the data lack.

    Raises:
        ValueError: an unknown task, a licence without a name or address, a base model or data set that is no
            repository id.
    """

    name: str
    model_type: Literal["conceptclip", "fvlm"]
    summary: str
    license: str = "apache-2.0"
    license_name: str | None = None
    license_link: str | None = None
    pipeline_tag: str | None = None
    base_model: str | None = None
    base_model_relation: Literal["adapter", "finetune", "merge", "quantized"] | None = None
    is_adapter: bool = False
    auto_class: str = "AutoModel"
    datasets: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ("roc_auc",)
    languages: tuple[str, ...] = ("en",)
    tags: tuple[str, ...] = ()
    training_data: str = ""
    training: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    figures: tuple[MeasuredFigure, ...] = ()
    intended_use: str = "Research on medical vision-language models."
    limits: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.name.strip() or not self.summary.strip():
            raise ValueError("A card needs the model's name and a summary of one sentence.")
        if self.model_type not in _LIMITS:
            raise ValueError(f"model_type must be one of {sorted(_LIMITS)}, not {self.model_type!r}.")
        if self.pipeline_tag is not None and self.pipeline_tag not in PIPELINE_TAGS:
            raise ValueError(f"pipeline_tag must be one of {PIPELINE_TAGS} or None, not {self.pipeline_tag!r}.")
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", self.license):
            raise ValueError(f"license must be an identifier of the Hub, as 'apache-2.0', not {self.license!r}.")
        if self.license == "other" and not (self.license_name and self.license_link):
            raise ValueError("The licence 'other' needs license_name and license_link.")
        if self.license_link and not _LINK.fullmatch(self.license_link):
            raise ValueError(
                f"license_link must be an address, https://..., or the name of a file beside the card, not "
                f"{self.license_link!r}."
            )
        if not self.auto_class.isidentifier():
            raise ValueError(f"auto_class must be the name of a class of transformers, not {self.auto_class!r}.")
        if self.base_model is not None:
            checked_repository_id(self.base_model, "base_model")
        for name in self.datasets:
            checked_repository_id(name, "datasets")


def model_card(facts: ModelFacts) -> str:
    """The text of `README.md`: metadata that the Hub reads, then the sections of a model card.

    Texts are escaped and absolute paths in them are cut to their last part, for a card is public.
    """
    sections = [
        ("", _introduction(facts)),
        ("Use", _use(facts)),
        ("Intended use and misuse", _plain(facts.intended_use) + "\n\nNot for:\n\n" + _bullets(_MISUSE)),
        ("Training data", _plain(facts.training_data) or "Not described."),
        ("Training", _training_table(facts.training)),
        ("Evaluation", _figures_table(facts.figures)),
        ("Limits and bias", _bullets((*_LIMITS[facts.model_type], *facts.limits))),
        ("Licence", _licence(facts)),
        ("Citation", f"```bibtex\n{_CITATIONS[facts.model_type]}\n```"),
    ]
    body = "\n\n".join(f"## {title}\n\n{text}" if title else text for title, text in sections)
    return f"---\n{_metadata(facts).to_yaml()}\n---\n\n{body}\n"


def write_card(folder: str | Path, facts: ModelFacts) -> None:
    """Write `README.md` into the model's folder, and `.eval_results/medclip_hf.yaml` where a test set is on the Hub.

    Raises:
        ValueError: where there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder. Save the model there first, then write its card.")
    write_text_atomically(folder / "README.md", model_card(facts))
    results = eval_results(facts.figures)
    if results is not None:
        (folder / EVAL_RESULTS).parent.mkdir(exist_ok=True)
        write_text_atomically(folder / EVAL_RESULTS, results)
    else:
        (folder / EVAL_RESULTS).unlink(missing_ok=True)  # of an earlier model in this folder


def _metadata(facts: ModelFacts) -> ModelCardData:
    """The head of the page; what is None is left out."""
    return ModelCardData(
        language=list(facts.languages),
        license=facts.license,
        license_name=facts.license_name,
        license_link=facts.license_link,
        library_name="peft" if facts.is_adapter else "transformers",
        pipeline_tag=facts.pipeline_tag,
        tags=["medical", "medclip-hf", facts.model_type, *facts.tags],
        datasets=list(facts.datasets) or None,
        base_model=facts.base_model,
        metrics=list(facts.metrics) or None,
        base_model_relation=facts.base_model_relation,
    )


def _introduction(facts: ModelFacts) -> str:
    kind = "An adapter of" if facts.is_adapter else "A model of"
    architecture = {
        "conceptclip": "ConceptCLIP: towers for 2-D images and texts, aligned as wholes and concept by concept",
        "fvlm": "fVLM: towers for CT volumes and reports, aligned anatomy by anatomy",
    }[facts.model_type]
    return f"# {_plain(facts.name)}\n\n{_plain(facts.summary)}\n\n{kind} {architecture}.\n\n{DISCLAIMER}"


def _use(facts: ModelFacts) -> str:
    processor = "" if facts.is_adapter else "\nprocessor = AutoProcessor.from_pretrained(repo_id, revision=commit)"
    lines = [
        "```python",
        f"from transformers import {facts.auto_class}" + ("" if facts.is_adapter else ", AutoProcessor"),
        "",
        "import medclip_hf  # makes the Auto classes know the model",
        "",
        'repo_id, commit = "OWNER/NAME", "COMMIT"  # a commit pins the weights',
        f"model = {facts.auto_class}.from_pretrained(repo_id, revision=commit).eval(){processor}",
        "```",
    ]
    stranger = (
        "Without the package, `trust_remote_code=True` runs the code that lies beside the weights: pin `revision` to a "
        "commit whose code you have read."
    )
    return "\n".join(lines) + ("" if facts.is_adapter else f"\n\n{stranger}")


def _training_table(training: Mapping[str, str | int | float | bool]) -> str:
    if not training:
        return "Not described."
    return _table(["setting", "value"], [[name, str(value)] for name, value in training.items()])


def _figures_table(figures: tuple[MeasuredFigure, ...]) -> str:
    if not figures:
        return "Nothing was measured."
    rows = [[one.data, one.protocol, one.metric, one.as_text(), one.size_as_text()] for one in figures]
    has_interval = any(one.low is not None for one in figures)
    note = "\n\nIn brackets: 95 % bootstrap intervals, by patient where patients are counted." if has_interval else ""
    return _table(["data", "protocol", "metric", "value", "measured on"], rows) + note


def _licence(facts: ModelFacts) -> str:
    if facts.license == "other":
        return f"Weights: [{_plain(facts.license_name or '')}]({facts.license_link}). Code: Apache-2.0."
    return f"Weights: {facts.license}. Code: Apache-2.0."


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return "\n".join(lines + [f"| {' | '.join(map(_plain, row))} |" for row in rows])


def _bullets(texts: tuple[str, ...]) -> str:
    return "\n".join(f"- {_plain(text)}" for text in texts)


_PATH = re.compile(r"(?:~|[A-Za-z]:)?[/\\].*[/\\]")
_PATH_IN_A_TEXT = re.compile(r"(?<![\w/:.])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\|]+[/\\])+")


def _plain(text: str) -> str:
    """One line that Markdown and the HTML inside it leave alone, without folders of somebody's disk."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    is_path = _PATH.match(line)  # as a whole, so that names of folders may hold spaces
    without_folders = line[is_path.end() :] if is_path else _PATH_IN_A_TEXT.sub("", line)
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", html.escape(without_folders, quote=False))
