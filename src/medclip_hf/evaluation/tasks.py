"""The benchmark table: every data set that the two papers are known to have used, as data.

What is not known is None and stays None: no split size, licence or figure here is a guess. Sources of the figures:

    lab      the authors' page on the journal version of ConceptCLIP (August 2026)
    code     ConceptCLIP's released code and the split files beside it
    scored   per-volume scores of the released fVLM, published by a third party, compared with CT-RATE's labels anew
    paper    fVLM (ICLR 2025), where needed as others quote it

Other tasks are described by a JSON file with the same names (`read_task`).
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from medclip_hf.evaluation.ct_zero_shot import CT_RATE_FINDINGS, RAD_CHESTCT_TO_CT_RATE
from medclip_hf.evaluation.zero_shot import DEFAULT_TEMPLATES, check_prompts

TaskType = Literal[
    "zero_shot_classification",
    "retrieval",
    "visual_question_answering",
    "report_generation",
    "whole_slide_classification",
    "concept_annotation",
    "concept_bottleneck",
    "concept_localization",
    "ct_zero_shot",
]
Layout = Literal["image_folder", "label_table", "multi_label_table", "caption_lines", "ct_rate", "rad_chestct"]

# What runs a task of each type; those of scripts/evaluate.py itself first.
SCRIPT_OF_TYPE: dict[str, str] = {
    "zero_shot_classification": "scripts/evaluate.py",
    "retrieval": "scripts/evaluate.py",
    "ct_zero_shot": "scripts/evaluate.py",
    "visual_question_answering": "scripts/train_vqa.py",
    "report_generation": "scripts/train_report_generation.py",
    "whole_slide_classification": "scripts/score_slides.py",
    "concept_annotation": "scripts/annotate_images.py",
    "concept_bottleneck": "scripts/train_bottleneck.py",
    "concept_localization": "scripts/bccd_localization.py",
}
RETRIEVAL_KS = (1, 5, 10, 50, 200)


@dataclass(frozen=True)
class PublishedFigure:
    """A figure to compare with.

    Args:
        model: which reached it.
        protocol: how it was measured.
        metric: which figure.
        value: as published; percent where `metric` says so.
        source: see the head of this file.
        class_name: of one class; None: the whole task.
    """

    model: str
    protocol: str
    metric: str
    value: float
    source: str
    class_name: str | None = None


@dataclass(frozen=True)
class Task:
    """A data set, what is asked of it, and how.

    Args:
        name: unique, fit for a file name.
        title: for a reader.
        paper: "ConceptCLIP", "fVLM" or "medclip-hf" (ours).
        task_type: what is asked.
        modality: kind of picture; None where the table's sources do not say.
        class_names: in the order of the labels; None where they are not known.
        templates: prompts with ``{}`` for the class's name; None where none were published.
        prompt_names: what stands for each class in the prompts, where that is not its name.
        is_multi_label: each class is true or not by itself.
        layout: how it lies on disk, see `task_data`.
        label_file: of the table or lines, relative to the folder.
        split: that is tested.
        split_sizes: images, slides or pairs by split.
        split_files: who fixes the splits.
        metric: that the paper reports first.
        licence: of the data.
        access: how to get it.
        published: figures to compare with.
        notes: traps.
    """

    name: str
    title: str
    task_type: TaskType
    paper: str = "medclip-hf"
    modality: str | None = None
    class_names: tuple[str, ...] | None = None
    templates: tuple[str, ...] | None = None
    prompt_names: tuple[str, ...] | None = None
    is_multi_label: bool = False
    layout: Layout | None = None
    label_file: str | None = None
    split: str = "test"
    split_sizes: dict[str, int] | None = None
    split_files: str | None = None
    metric: str | None = None
    licence: str | None = None
    access: str | None = None
    published: tuple[PublishedFigure, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def script(self) -> str:
        """What runs it."""
        return SCRIPT_OF_TYPE[self.task_type]

    def prompts(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(names, templates) for zero-shot classification, the templates of `zero_shot` where none were published.

        Raises:
            ValueError: the classes are not known.
        """
        names = self.prompt_names or self.class_names
        if names is None:
            raise ValueError(
                f"the classes of {self.name} are not published. Name them in a task file, see docs/evaluation.md."
            )
        return check_prompts(names, self.templates or DEFAULT_TEMPLATES)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `read_task` reads it."""
        return asdict(self)


def task(name: str) -> Task:
    """The row of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}. Known are {', '.join(TASKS)}; or name a JSON file of your own.")
    return TASKS[name]


def read_task(path: Path) -> Task:
    """The task that a JSON file describes, with the fields of `Task`; `name`, `title` default to the file's name.

    Raises:
        ValueError: the file is no JSON object, has an unknown field, or a field of another kind.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no readable task file: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, it holds a {type(values).__name__}")
    known = {field.name for field in fields(Task)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{path} has the unknown fields {unknown}. Known are {sorted(known)}.")
    values.setdefault("name", path.parent.name if path.stem == "task" else path.stem)
    values.setdefault("title", values["name"])
    if values.get("task_type") not in get_args(TaskType) or values.get("layout") not in (None, *get_args(Layout)):
        raise ValueError(
            f"{path}: task_type is one of {list(get_args(TaskType))} and layout of {list(get_args(Layout))}, got "
            f"{values.get('task_type')!r} and {values.get('layout')!r}"
        )
    return _checked_task(values, path)


_TEXTS = ("name", "title", "paper", "modality", "label_file", "split_files", "metric", "licence", "access")


def _checked_task(values: dict[str, Any], path: Path) -> Task:
    for name in ("class_names", "templates", "prompt_names", "notes"):
        items = values.get(name)
        if items is None:
            continue
        if not isinstance(items, list) or not all(isinstance(item, str) and item.strip() for item in items):
            raise ValueError(f"{path}: {name} must be a list of strings, none empty, got {items!r}")
        values[name] = tuple(items)
    for name in _TEXTS:
        if name in values and not isinstance(values[name], str | None):
            raise ValueError(f"{path}: {name} must be a string, got {values[name]!r}")
    for name, kind in (("is_multi_label", bool), ("split", str)):
        if name in values and not isinstance(values[name], kind):
            raise ValueError(f"{path}: {name} must be a {kind.__name__}, got {values[name]!r}")
    if not str(values["name"]).replace("-", "").replace("_", "").isalnum():
        raise ValueError(f"{path}: the name {values['name']!r} must be of letters, digits, '-' and '_'")
    names, prompts = values.get("class_names"), values.get("prompt_names")
    if prompts is not None and (names is None or len(prompts) != len(names)):
        raise ValueError(f"{path}: prompt_names must name every one of class_names, in their order")
    try:
        values["published"] = tuple(PublishedFigure(**figure) for figure in values.get("published") or ())
    except TypeError as error:
        raise ValueError(f"{path}: a published figure is not as PublishedFigure has it: {error}") from error
    found = Task(**values)
    if names is not None:
        check_prompts(names, found.templates or DEFAULT_TEMPLATES)
    return found


# Published figures -----------------------------------------------------------------------------------------------

_CONCEPTCLIP = "ConceptCLIP"
_FVLM = "fVLM"
_TEST_THRESHOLD = "zero-shot, threshold chosen on the test labels"

# fVLM's released weights on CT-RATE's validation volumes, AUC by finding; source "scored".
_CT_RATE_AUC = {
    "Emphysema": 0.726,
    "Atelectasis": 0.666,
    "Lung nodule": 0.639,
    "Lung opacity": 0.724,
    "Pulmonary fibrotic sequela": 0.634,
    "Pleural effusion": 0.921,
    "Mosaic attenuation pattern": 0.849,
    "Peribronchial thickening": 0.670,
    "Consolidation": 0.836,
    "Bronchiectasis": 0.702,
    "Interlobular septal thickening": 0.792,
    "Cardiomegaly": 0.939,
    "Pericardial effusion": 0.855,
    "Coronary artery wall calcification": 0.859,
    "Hiatal hernia": 0.732,
    "Arterial wall calcification": 0.895,
}

_CT_RATE_PUBLISHED = (
    PublishedFigure(_FVLM, "zero-shot", "macro AUROC", 0.778, "paper"),
    PublishedFigure(_FVLM, _TEST_THRESHOLD, "accuracy", 0.718, "paper"),
    PublishedFigure(_FVLM, _TEST_THRESHOLD, "weighted F1", 0.751, "paper"),
    PublishedFigure(_FVLM, _TEST_THRESHOLD, "precision", 0.379, "paper"),
    PublishedFigure(_FVLM, "zero-shot", "macro AUROC", 0.7776, "scored"),
    PublishedFigure(_FVLM, _TEST_THRESHOLD, "accuracy", 0.723, "scored"),
    PublishedFigure(_FVLM, _TEST_THRESHOLD, "sensitivity", 0.719, "scored"),
    PublishedFigure(_FVLM, _TEST_THRESHOLD, "specificity", 0.725, "scored"),
    PublishedFigure(_FVLM, _TEST_THRESHOLD, "weighted F1", 0.753, "scored"),
    PublishedFigure(_FVLM, _TEST_THRESHOLD, "precision", 0.381, "scored"),
    *(PublishedFigure(_FVLM, "zero-shot", "AUROC", value, "scored", name) for name, value in _CT_RATE_AUC.items()),
    PublishedFigure("CT-CLIP VocabFine", "fine-tuned", "macro AUROC", 0.756, "paper"),
    PublishedFigure("ViSD-Boost", "zero-shot", "macro AUROC", 0.790, "its paper"),
)


def _wsi(name: str, title: str, sizes: dict[str, int], **more: Any) -> Task:
    """A slide task of ConceptCLIP with the protocol they share."""
    notes = more.pop("notes", ())
    return Task(
        name=name,
        title=title,
        task_type="whole_slide_classification",
        paper=_CONCEPTCLIP,
        modality="histopathology",
        split_sizes=sizes,
        split_files="CSV files in the ConceptCLIP repository",
        metric="macro AUROC, attention-based MIL",
        notes=notes,
        **more,
    )


_MUTATION_TRAP = (
    "the released split files say 'validation' where the released loader looks for 'val': its validation set is empty",
)

_ROWS = (
    Task(
        name="siim_acr",
        title="SIIM-ACR pneumothorax",
        task_type="zero_shot_classification",
        paper=_CONCEPTCLIP,
        modality="X-ray",
        class_names=("No Finding", "Pneumothorax"),
        templates=("a chest radiology presents {}",),
        layout="label_table",
        split_sizes={"train": 3449, "test": 863},
        split_files="CSV files in the ConceptCLIP repository",
        metric="AUROC",
        notes=("the release's linear probe extracts training features through the augmenting transform, once",),
    ),
    Task(
        name="chexpert",
        title="CheXpert",
        task_type="zero_shot_classification",
        paper=_CONCEPTCLIP,
        modality="X-ray",
        is_multi_label=True,
        layout="multi_label_table",
        metric="macro AUROC",
        notes=(
            "known from the fine-tuning code, which resamples it 50 times instead of 1,000; its classes and labels as "
            "used there are not published",
        ),
    ),
    Task(
        name="pmc_9k",
        title="PMC-9K",
        task_type="retrieval",
        paper=_CONCEPTCLIP,
        modality="figures of articles",
        layout="caption_lines",
        metric="recall@1, image to text",
        access="Hugging Face Hub, behind a form; lines with image and caption, the images from PubMed Central",
        published=(
            PublishedFigure(_CONCEPTCLIP, "retrieval", "image_to_text_recall@1, percent", 82.85, "lab"),
            PublishedFigure("BiomedCLIP", "retrieval", "image_to_text_recall@1, percent", 73.41, "lab"),
        ),
        notes=("about 9,000 pairs; exact number and rule of selection are not published",),
    ),
    Task(
        name="quilt_1m",
        title="QUILT-1M, test part",
        task_type="retrieval",
        paper=_CONCEPTCLIP,
        modality="histopathology",
        layout="caption_lines",
        split="val",
        split_sizes={"val": 11559},
        split_files="lines in the ConceptCLIP repository, with split 'val'",
        metric="recall@200, text to image",
        published=(
            PublishedFigure(_CONCEPTCLIP, "retrieval", "text_to_image_recall@200, percent", 32.50, "lab"),
            PublishedFigure("BiomedCLIP", "retrieval", "text_to_image_recall@200, percent", 19.62, "lab"),
        ),
        notes=(
            "an image has several captions; the release pairs row i with row i alone, so a right caption of the same "
            "image counts as wrong there",
        ),
    ),
    Task(
        name="slake",
        title="SLAKE, English",
        task_type="visual_question_answering",
        paper=_CONCEPTCLIP,
        metric="accuracy, overall",
        published=(PublishedFigure(_CONCEPTCLIP, "fine-tuned", "accuracy, percent", 83.86, "lab"),),
        notes=("497 answers, the answers of the test part among them, in the release",),
    ),
    Task(
        name="vqa_rad",
        title="VQA-RAD",
        task_type="visual_question_answering",
        paper=_CONCEPTCLIP,
        metric="accuracy, overall",
        published=(PublishedFigure(_CONCEPTCLIP, "fine-tuned", "accuracy, percent", 70.70, "lab"),),
    ),
    Task(
        name="mimic_cxr",
        title="MIMIC-CXR",
        task_type="report_generation",
        paper=_CONCEPTCLIP,
        modality="X-ray",
        metric="CheXbert macro F1",
        published=(
            PublishedFigure(_CONCEPTCLIP, "frozen tower, projection", "CheXbert macro F1, percent", 26.38, "lab"),
            PublishedFigure("best other model", "frozen tower, projection", "CheXbert macro F1, percent", 22.10, "lab"),
        ),
    ),
    Task(
        name="iu_xray",
        title="IU X-Ray",
        task_type="report_generation",
        paper=_CONCEPTCLIP,
        modality="X-ray",
        split_sizes={"train": 2069, "validation": 296, "test": 590},
        metric="BLEU-4",
        published=tuple(
            PublishedFigure(_CONCEPTCLIP, "frozen tower, projection", metric, value, "code")
            for metric, value in (
                *(("BLEU-1", 0.4731), ("BLEU-2", 0.3103), ("BLEU-3", 0.2240), ("BLEU-4", 0.1687)),
                *(("METEOR", 0.2171), ("ROUGE-L", 0.3808), ("CIDEr", 0.5060)),
                *(("CheXbert macro precision", 0.114), ("CheXbert macro recall", 0.072), ("CheXbert macro F1", 0.073)),
                *(("CheXbert micro F1", 0.521), ("CheXbert example F1", 0.427)),
            )
        ),
    ),
    _wsi(
        "bracs_3",
        "BRACS, three classes",
        {"train": 382, "validation": 54, "test": 109},
        class_names=("AT", "BT", "MT"),
        published=(PublishedFigure(_CONCEPTCLIP, "ABMIL", "macro AUROC, percent", 91.65, "lab"),),
    ),
    _wsi(
        "brca_tp53",
        "TCGA-BRCA, mutation of TP53",
        {"train": 438, "validation": 68, "test": 128},
        notes=_MUTATION_TRAP,
    ),
    _wsi("brca_ttn", "TCGA-BRCA, mutation of TTN", {"train": 438, "validation": 68, "test": 128}, notes=_MUTATION_TRAP),
    _wsi(
        "luad_tp53",
        "TCGA-LUAD, mutation of TP53",
        {"train": 313, "validation": 44, "test": 91},
        notes=_MUTATION_TRAP,
    ),
    Task(
        name="derm7pt",
        title="Derm7pt, seven concepts",
        task_type="concept_annotation",
        paper=_CONCEPTCLIP,
        modality="dermoscopy",
        templates=("This is dermatoscopy of {}.",),
        is_multi_label=True,
        split_sizes={"test": 395},
        metric="AUROC",
        notes=(
            "the release pools all image-concept pairs into one AUROC; the local score reads a padding position",
            "a second wording, 'dermoscopy', is reported apart; the negative prompt leaves the concept out",
        ),
    ),
    Task(
        name="wbcatt",
        title="WBCAtt, white blood cells",
        task_type="concept_bottleneck",
        paper=_CONCEPTCLIP,
        modality="blood smear",
        split_sizes={"train": 6169, "validation": 1030, "test": 3099},
        metric="AUROC",
        notes=("5 classes, 23 predefined concepts; the release chooses its checkpoint on the test AUROC",),
    ),
    Task(
        name="bccd",
        title="BCCD, cells of blood smears",
        task_type="concept_localization",
        modality="blood smear",
        class_names=("WBC", "RBC", "Platelets"),
        is_multi_label=True,
        split_files="train.txt, val.txt, test.txt of the repository",
        metric="pointing game",
        licence="MIT",
        access="github.com/Shenggan/BCCD_Dataset",
    ),
    Task(
        name="pmc_sample",
        title="the 70 figures shipped with ConceptCLIP",
        task_type="retrieval",
        modality="figures of articles",
        layout="caption_lines",
        label_file="metadata.jsonl",
        split="all",
        split_sizes={"all": 70},
        metric="recall@1, image to text",
        licence="open-access licences of the articles; repository MIT",
        access="github.com/JerrryNie/ConceptCLIP",
        notes=("far too small for a claim; the figures may have been trained on",),
    ),
    Task(
        name="ct_rate",
        title="CT-RATE, 16 findings",
        task_type="ct_zero_shot",
        paper=_FVLM,
        modality="CT",
        class_names=tuple(finding.name for finding in CT_RATE_FINDINGS),
        is_multi_label=True,
        layout="ct_rate",
        split="validation",
        split_sizes={"train": 47149, "validation": 3039},
        split_files="folders train and valid; labels in multi_abnormality_labels",
        metric="macro AUROC",
        licence="CC BY-NC-SA 4.0",
        access="Hugging Face Hub, ibrahimhamamci/CT-RATE, behind a form",
        published=_CT_RATE_PUBLISHED,
        notes=(
            "volumes, not studies, are counted: 3,039 of 1,564 studies of 1,304 patients; labels are those of a "
            "text classifier",
            "the published threshold is chosen on the test labels, the prompts were edited twice",
        ),
    ),
    Task(
        name="rad_chestct",
        title="Rad-ChestCT, 15 findings",
        task_type="ct_zero_shot",
        paper=_FVLM,
        modality="CT",
        class_names=tuple(finding for names in RAD_CHESTCT_TO_CT_RATE.values() for finding in names),
        is_multi_label=True,
        layout="rad_chestct",
        split="all",
        split_sizes={"train": 2286, "validation": 984, "test": 360},
        split_files="tables imgtrain, imgvalid, imgtest",
        metric="macro AUROC",
        access="Zenodo 6406114",
        published=(PublishedFigure("fVLM, as EXACT lists it", "zero-shot", "macro AUROC", 0.644, "EXACT's paper"),),
        notes=(
            "fVLM's own map of findings was not published; this one is HLIP's, on all 3,630 scans",
            "two sources disagree on fVLM's figure (0.644 and, from memory, 0.680)",
        ),
    ),
    Task(
        name="medvl_ct69k",
        title="MedVL-CT69K, 54 findings of 15 anatomies",
        task_type="ct_zero_shot",
        paper=_FVLM,
        modality="CT",
        is_multi_label=True,
        metric="macro AUROC",
        access="private",
        published=(
            PublishedFigure(_FVLM, "zero-shot", "macro AUROC", 0.813, "paper"),
            PublishedFigure("CLIP", "zero-shot", "macro AUROC", 0.684, "paper"),
            PublishedFigure("supervised", "supervised", "macro AUROC", 0.733, "paper"),
        ),
        notes=("272,124 scans of 69,086 patients; neither scans nor the names of the 54 findings are published",),
    ),
    Task(
        name="medvl_ct69k_reports",
        title="MedVL-CT69K, reports",
        task_type="report_generation",
        paper=_FVLM,
        modality="CT",
        metric="BLEU-4",
        access="private",
        notes=("measured with a private classifier of reports; figures are not published",),
    ),
)

TASKS: dict[str, Task] = {row.name: row for row in _ROWS}

# Figures published for groups of data sets whose members are not named.
GROUP_FIGURES = (
    PublishedFigure(_CONCEPTCLIP, "zero-shot, 39 data sets", "gain in AUROC over the best other, points", 6.81, "lab"),
    PublishedFigure(_CONCEPTCLIP, "zero-shot, CT group", "gain in AUROC over the best other, points", 10.73, "lab"),
    PublishedFigure(_CONCEPTCLIP, "zero-shot, ultrasound group", "gain in AUROC, points", 10.06, "lab"),
    PublishedFigure(_CONCEPTCLIP, "zero-shot, fundus group", "gain in AUROC, points", 8.98, "lab"),
    PublishedFigure(_CONCEPTCLIP, "linear probe at 1 %, X-ray group", "AUROC, percent", 71.48, "lab"),
    PublishedFigure("SigLIP-400M", "linear probe at 1 %, X-ray group", "AUROC, percent", 67.73, "lab"),
    PublishedFigure(_CONCEPTCLIP, "concept annotation, 5 data sets", "gain over PMC-CLIP, percent", 10.9, "lab"),
    PublishedFigure(_CONCEPTCLIP, "concept annotation, 5 data sets", "gain over BiomedCLIP, percent", 10.4, "lab"),
    PublishedFigure(_CONCEPTCLIP, "concept bottleneck", "gain in AUROC over the second best, points", 6.13, "lab"),
)


def with_split(row: Task, split: str | None, class_names: Sequence[str] | None = None) -> Task:
    """The task on another split, or with its classes named."""
    named = row if class_names is None else replace(row, class_names=tuple(class_names))
    return named if split is None else replace(named, split=split)
