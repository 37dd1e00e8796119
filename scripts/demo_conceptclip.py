"""ConceptCLIP from nothing to a checkpoint that scores and explains, on drawn figures, in minutes on two CPU cores.

    python scripts/demo_conceptclip.py --output demo_output/conceptclip

Draws the figures, trains both stages with `accelerate launch scripts/pretrain_conceptclip.py`, and beside the second
stage the same number of steps of IT-Align alone. A new process then loads the models with `AutoModel` and measures on
figures that no training saw. Prints a table; writes `report.html`, `results.json` and pictures.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.utils.logging import disable_progress_bar

import medclip_hf  # noqa: F401 - registers the Auto classes
from medclip_hf.data.phantoms.figures import FigurePhantom, draw_figures, write_figure_phantoms
from medclip_hf.data.phantoms.findings import FINDINGS
from medclip_hf.evaluation.localization import mask_share, pointing_game
from medclip_hf.evaluation.metrics import ClassAUROC, Interval, auroc_per_class, mean_with_interval
from medclip_hf.evaluation.retrieval import retrieval_recall
from medclip_hf.evaluation.zero_shot import classify_images, embed_classes, published_share_of_patches
from medclip_hf.explain.overlay import draw_concept_panel, encode_png, save_png
from medclip_hf.explain.report import Paragraph, Picture, Section, Table, write_report
from medclip_hf.training.demonstration import claim_folder, start_training, wait_for

logger = logging.getLogger("demo_conceptclip")

SCRIPTS = Path(__file__).resolve().parent
STAGE_1, STAGE_2, IT_ALIGN_ALONE = "stage1", "stage2", "it_align_alone"
CLASS_NAMES = [finding.name for finding in FINDINGS]
# A caption mostly names several findings, and a prompt scores best that reads like one. Chosen on the validation split.
TEMPLATES = ("{} and other findings.", "showing {} and other findings.", "{} and other findings can be seen.")


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    num_train: int
    num_test: int
    stage1_steps: int
    stage2_steps: int
    num_gallery: int = 100
    num_pictures: int = 6
    num_resamples: int = 1000
    image_size: int = 64
    seed: int = 0


FULL = Plan(num_train=5000, num_test=400, stage1_steps=100, stage2_steps=1600)
QUICK = Plan(
    num_train=48, num_test=24, stage1_steps=2, stage2_steps=2, num_gallery=10, num_pictures=1, num_resamples=50
)


@dataclass(frozen=True)
class Evaluation:
    """What one model reached on the test figures.

    Args:
        mixed: AUC per finding of the published score, global and local half and half.
        global_only: of the whole-image score.
        local_only: of the best patches; None without patch heads.
        recall_at_1: image → text, in a gallery.
        pointing: share of findings whose map peaks inside the true region.
    """

    mixed: ClassAUROC
    global_only: ClassAUROC
    local_only: ClassAUROC | None
    recall_at_1: float
    pointing: Interval


def main(command_line: list[str] | None = None) -> int:
    """Draw, train, and measure in a new process; with --measure that last part alone. The exit code."""
    options = parse_command_line(command_line)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    plan = QUICK if options.quick else FULL
    if options.measure:
        print(measure(options.output, plan))
        return 0
    try:
        run(options.output, plan, ["--quick"] * options.quick)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except subprocess.CalledProcessError as error:  # it has said on stderr what was wrong
        sys.stderr.write(f"error: a part of the demo ended with code {error.returncode}: {' '.join(error.cmd)}\n")
        return 1
    return 0


def run(folder: Path, plan: Plan, options: list[str]) -> None:
    """The whole demo, with the time that each part took in the log."""
    start = time.perf_counter()
    claim_folder(folder)
    write_figure_phantoms(folder / "phantoms", {"train": plan.num_train}, seed=plan.seed, size=plan.image_size)
    logger.info("%3.0f s: drew %d figures for training", time.perf_counter() - start, plan.num_train)
    train_all(folder, plan)
    logger.info("%3.0f s: trained", time.perf_counter() - start)
    command = [sys.executable, str(Path(__file__).resolve()), "--measure", "--output", str(folder), *options]
    subprocess.run(command, check=True)
    logger.info("%3.0f s: done", time.perf_counter() - start)


def parse_command_line(command_line: list[str] | None) -> argparse.Namespace:
    """The command line, or what stands for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo_output/conceptclip"), help="folder of all results")
    parser.add_argument("--quick", action="store_true", help="a few rows and steps, to see that everything runs")
    parser.add_argument("--measure", action="store_true", help="only measure the models that lie in the folder")
    return parser.parse_args(command_line)


def train_all(folder: Path, plan: Plan) -> None:
    """Train stage 1; then from it, at the same time, stage 2 and as many steps of IT-Align alone."""
    num_cores = os.cpu_count() or 1
    steps_1 = [f"training.max_steps={plan.stage1_steps}"]
    wait_for(start(folder, STAGE_1, "conceptclip_demo_stage1.yaml", steps_1, min(2, num_cores)))
    source = f"model.from_pretrained={folder / STAGE_1 / 'final'}"
    steps_2 = [source, f"training.max_steps={plan.stage2_steps}"]
    alone = ["loss.use_patch_concept_alignment=false"]
    stage_2 = start(folder, STAGE_2, "conceptclip_demo_stage2.yaml", steps_2, 1)
    comparison = start(folder, IT_ALIGN_ALONE, "conceptclip_demo_stage2.yaml", steps_2 + alone, 1)
    wait_for(stage_2, comparison)


def start(folder: Path, name: str, recipe: str, overrides: list[str], num_threads: int) -> subprocess.Popen[bytes]:
    """A running training of the demo."""
    shows_progress = sys.stderr.isatty() and name != IT_ALIGN_ALONE  # which runs beside another bar
    overrides = [
        f"data.folder={folder / 'phantoms'}",
        f"training.output_dir={folder / name}",
        f"training.progress_bar={str(shows_progress).lower()}",
        *overrides,
    ]
    script = SCRIPTS / "pretrain_conceptclip.py"
    return start_training(script, SCRIPTS / "recipes" / recipe, overrides, num_threads=num_threads)


def measure(folder: Path, plan: Plan) -> str:
    """Measure the trained models and an untrained one; writes report, results and pictures; the table to print."""
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    disable_progress_bar()
    trained = AutoModel.from_pretrained(folder / STAGE_2 / "final").eval()
    alone = AutoModel.from_pretrained(folder / IT_ALIGN_ALONE / "final").eval()
    torch.manual_seed(plan.seed)
    untrained = AutoModel.from_config(AutoConfig.from_pretrained(folder / STAGE_2 / "final")).eval()
    processor = AutoProcessor.from_pretrained(folder / STAGE_2 / "final")
    figures = list(draw_figures(plan.seed, "test", plan.num_test, plan.image_size))

    models = {"before training": untrained, "IT-Align alone": alone, "with PC-Align": trained}
    evaluations = {name: evaluate(model, processor, figures, plan) for name, model in models.items()}
    blind_guess = float(mask_share(torch.from_numpy(np.concatenate([figure.masks for figure in figures]))).mean())
    pictures = draw_pictures(trained, alone, processor, figures[: plan.num_pictures])
    for number, picture in enumerate(pictures):
        save_png(picture, folder / "pictures" / f"{number:02d}.png")
    results = {"plan": asdict(plan), "blind_guess": blind_guess}
    results |= {name: asdict(evaluation) for name, evaluation in evaluations.items()}
    (folder / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")

    tables = [summary_table(evaluations, blind_guess, plan), finding_table(evaluations)]
    report = write_demo_report(folder / "report.html", tables, pictures, plan)
    text = "\n\n".join(table.as_text() for table in tables)
    return f"\n{text}\n\nPictures: {folder / 'pictures'}\nReport: {report}"


def evaluate(model: Any, processor: Any, figures: list[FigurePhantom], plan: Plan) -> Evaluation:
    """Zero-shot AUC, recall at 1 and pointing game of one model."""
    labels = np.array([[name in figure.findings for name in CLASS_NAMES] for figure in figures])
    scores = classify_images(
        model,
        processor,
        [figure.image for figure in figures],
        CLASS_NAMES,
        TEMPLATES,
        activation="sigmoid",
        top_patches=published_share_of_patches(model.vision_model.embeddings.num_patches),
    )
    hits = [
        pointing_game(own_maps(maps, figure), torch.from_numpy(figure.masks)).numpy()
        for maps, figure in zip(finding_maps(model, processor, figures), figures, strict=True)
    ]
    figure_of_hit = np.repeat(np.arange(len(figures)), [len(figure.findings) for figure in figures])
    resampling = {"num_resamples": plan.num_resamples, "seed": plan.seed}
    return Evaluation(
        mixed=auroc_per_class(scores.mixed_scores, labels, CLASS_NAMES, **resampling),
        global_only=auroc_per_class(scores.global_scores, labels, CLASS_NAMES, **resampling),
        local_only=None
        if scores.local_scores is None
        else auroc_per_class(scores.local_scores, labels, CLASS_NAMES, **resampling),
        recall_at_1=gallery_recall(model, processor, figures[: plan.num_gallery]),
        pointing=mean_with_interval(np.concatenate(hits), groups=figure_of_hit, **resampling),
    )


@torch.no_grad()
def finding_maps(model: Any, processor: Any, figures: list[FigurePhantom]) -> torch.Tensor:
    """Where the model sees each finding: cosine maps (figures, findings, rows, columns).

    With PC-Align, patches against concepts. A model of IT-Align alone has no space for patches, so each patch goes
    through the tower's pooling head by itself, as if it were the whole image, and is compared with the prompt: the
    nearest thing to a concept map that its training shaped.
    """
    text_embeds, concept_embeds = embed_classes(model, processor, CLASS_NAMES, TEMPLATES).averaged()
    pixel_values = processor(images=[figure.image for figure in figures])["pixel_values"]
    if concept_embeds is not None:
        return model.get_concept_maps(pixel_values, concept_embeds=concept_embeds)
    patches = model.get_image_features(pixel_values).last_hidden_state  # (B, P, D)
    side = round(patches.shape[1] ** 0.5)
    vectors = model.vision_model.head(patches.flatten(0, 1)[:, None]).unflatten(0, patches.shape[:2])
    vectors = torch.nn.functional.normalize(vectors, dim=-1)
    return (text_embeds @ vectors.transpose(1, 2)).unflatten(2, (side, side))


def own_maps(maps: torch.Tensor, figure: FigurePhantom) -> torch.Tensor:
    """Those of a figure's maps (findings, rows, columns) whose findings are in it, in the order of its masks."""
    return maps[[CLASS_NAMES.index(name) for name in figure.findings]]


@torch.no_grad()
def gallery_recall(model: Any, processor: Any, figures: list[FigurePhantom]) -> float:
    """Image → text recall at 1 among the captions of these figures."""
    inputs = processor(images=[figure.image for figure in figures], text=[figure.row.caption for figure in figures])
    outputs = model(**inputs, return_logits=False)
    return retrieval_recall(outputs.image_embeds, outputs.text_embeds, ks=(1,))["image_to_text_recall@1"]


def draw_pictures(trained: Any, alone: Any, processor: Any, figures: list[FigurePhantom]) -> list[NDArray[np.uint8]]:
    """Per figure a panel of its findings' maps, with PC-Align above IT-Align alone; true regions outlined."""
    pictures = []
    for figure in figures:
        panels = []
        for name, model in (("with PC-Align", trained), ("IT-Align alone", alone)):
            own = own_maps(finding_maps(model, processor, [figure])[0], figure)
            title = f"{figure.row.modality}, {name}"
            panels.append(
                draw_concept_panel(figure.image, own, figure.findings, outlines=list(figure.masks), title=title)
            )
        pictures.append(stack(panels))
    return pictures


def stack(panels: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Panels one above the other on white."""
    width = max(panel.shape[1] for panel in panels)
    padded = [np.pad(panel, ((0, 0), (0, width - panel.shape[1]), (0, 0)), constant_values=255) for panel in panels]
    return np.concatenate(padded)


def summary_table(evaluations: dict[str, Evaluation], blind_guess: float, plan: Plan) -> Table:
    """One column a model."""
    rows = [
        [
            "Zero-shot AUC, mean over findings, published mixed score",
            *(e.mixed.macro.as_text() for e in evaluations.values()),
        ],
        [
            "Zero-shot AUC, mean over findings, global score alone",
            *(e.global_only.macro.as_text() for e in evaluations.values()),
        ],
        [
            "Zero-shot AUC, mean over findings, local score alone",
            *("none" if e.local_only is None else e.local_only.macro.as_text() for e in evaluations.values()),
        ],
        [f"Image → text recall@1, {plan.num_gallery} pairs", *(f"{e.recall_at_1:.0%}" for e in evaluations.values())],
        ["Peak of the map inside the true region", *(e.pointing.as_text("{:.0%}") for e in evaluations.values())],
    ]
    caption = (
        f"{plan.num_test} held-out figures; 95 % intervals by bootstrap over figures. A blind guess points into the "
    )
    return Table(["", *evaluations], rows, caption + f"true region in {blind_guess:.0%} of cases.")


def finding_table(evaluations: dict[str, Evaluation]) -> Table:
    """One row a finding: AUC of the mixed score."""
    rows = [[name, *(e.mixed.per_class[name].as_text() for e in evaluations.values())] for name in CLASS_NAMES]
    return Table(["AUC per finding, mixed score", *evaluations], rows, "Zero-shot AUC of the published mixed score.")


def write_demo_report(path: Path, tables: list[Table], pictures: list[NDArray[np.uint8]], plan: Plan) -> Path:
    """Path of the report written."""
    how = (
        f"A small ConceptCLIP was trained from nothing on {plan.num_train} drawn figures with captions: "
        f"{plan.stage1_steps} steps of image-text alignment (IT-Align), then {plan.stage2_steps} steps with "
        "patch-concept alignment (PC-Align) beside it. For comparison the second stage was also run without PC-Align, "
        "for as many steps and on the same batches. Every figure below is of other figures than those trained on."
    )
    scores = (
        "The published score mixes the probability of the whole image with that of its best patches, half and half, "
        "over three templates. The best patches are 18 % of all, as the published 128 are of 729. "
        "Without PC-Align there is no patch score: the mixed score is the global one."
    )
    maps = (
        "Map: cosine of each patch with the concept; IT-Align alone has no patch space, so each patch goes through the "
        "image tower's pooling head by itself and is compared with the prompt. Cyan: true region."
    )
    drawn = [
        Picture(encode_png(pixels), f"Held-out figure {number}: maps of its findings, with and without PC-Align.")
        for number, pixels in enumerate(pictures)
    ]
    sections = [
        Section("What was done", [Paragraph(how)]),
        Section("What it reached", [Paragraph(scores), *tables]),
        Section("Where it looks", [Paragraph(maps), *drawn]),
    ]
    return write_report(path, "ConceptCLIP on drawn figures", sections)


if __name__ == "__main__":
    sys.exit(main())
