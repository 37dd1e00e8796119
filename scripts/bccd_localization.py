"""Where are the cells? Concept maps, gradient maps and baselines against the boxes of real blood smears (BCCD).

    python scripts/bccd_localization.py --data bccd --output bccd_output

Cuts windows from the training photographs, writes their captions from the boxes inside, and trains small ConceptCLIPs
from nothing: a short stage 1, and from it stage 2 and as many steps of IT-Align alone, for every seed and tower. Then
all maps are drawn on the official test photographs and measured. Broken off, it goes on where it was. Writes
`results.json`, `table.md` and pictures.
"""

import argparse
import json
import logging
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor
from transformers import AutoModel, AutoProcessor
from transformers.utils.logging import disable_progress_bar

import medclip_hf  # noqa: F401 - registers the Auto classes
from medclip_hf.data.bccd import CAPTION_START, CELL_KINDS, BloodSmear, read_smears, write_bccd
from medclip_hf.data.parquet import find_shards, record_to_row
from medclip_hf.data.records import FigureRow
from medclip_hf.data.stages import Drop
from medclip_hf.evaluation.annotation import annotation_figures, embed_prompts, score_images
from medclip_hf.evaluation.comparators import Method, attention_maps, gradient_maps, pooled_patch_maps
from medclip_hf.evaluation.encoders import make_encoder
from medclip_hf.evaluation.faithfulness import FaithfulnessCurves, faithfulness_curves, faithfulness_figures
from medclip_hf.evaluation.intervals import Interval
from medclip_hf.evaluation.localization import (
    best_threshold,
    case_figures,
    centre_prior,
    random_maps,
    summarise_cases,
)
from medclip_hf.evaluation.zero_shot import embed_classes
from medclip_hf.explain.overlay import draw_concept_panel, save_png
from medclip_hf.training.demonstration import start_training, wait_for

logger = logging.getLogger("bccd_localization")

SCRIPTS = Path(__file__).resolve().parent
WITH_PC_ALIGN, ALONE, UNTRAINED = "stage2", "it_align_alone", "untrained"
LABELS = {WITH_PC_ALIGN: "with PC-Align", ALONE: "IT-Align alone", UNTRAINED: "before training"}
NAMES = [kind.name for kind in CELL_KINDS]
TEMPLATES = tuple(f"{CAPTION_START} {{}}: {count}." for count in (1, 2, 3))
TILE = 160  # pixels of the photograph; 12 tiles cover it, each seen at the scale of a training window
STRIDE = 4  # every fourth pixel of photograph and boxes is measured; a patch covers 20
GRADIENT_METHODS: dict[str, Method] = {"Grad-CAM": "grad_cam", "gradient × input": "gradient_x_input"}
FIGURES = {
    "pointing": "peak inside",
    "iou_fixed": "IoU at 0.5",
    "iou_chosen": "IoU, threshold from validation",
    "iou_oracle": "IoU, best threshold of each case (oracle)",
    "auprc": "AUPRC",
    "energy": "energy inside",
}


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    stage1_steps: int = 150
    stage2_steps: int = 600
    windows_per_image: int = 24
    num_validation: int = 24  # photographs on which thresholds are chosen
    num_test: int | None = None  # None: all of the official list
    num_faithfulness: int = 100  # windows
    num_pictures: int = 4
    num_resamples: int = 1000


FULL = Plan()
QUICK = Plan(
    stage1_steps=2,
    stage2_steps=2,
    windows_per_image=1,
    num_validation=2,
    num_test=3,
    num_faithfulness=4,
    num_pictures=1,
    num_resamples=20,
)


@dataclass(frozen=True)
class Cases:
    """Pictures and the kinds of cells in them.

    Args:
        smears: photographs.
        kinds: per case the number of its kind in `CELL_KINDS`.
        smear_of_case: per case the number of its photograph.
        masks: (N, H, W), union of the boxes, every `STRIDE`-th pixel.
    """

    smears: list[BloodSmear]
    kinds: list[int]
    smear_of_case: list[int]
    masks: Tensor

    @property
    def names(self) -> list[str]:
        """Of the concept of each case."""
        return [NAMES[kind] for kind in self.kinds]


def parse_command_line(command_line: list[str] | None) -> argparse.Namespace:
    """The command line, or what stands for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="BCCD: annotations, images, splits")
    parser.add_argument("--output", type=Path, default=Path("bccd_output"), help="folder of all results")
    parser.add_argument("--seeds", type=int, default=3, help="how many trainings of each kind")
    parser.add_argument("--layers", type=int, nargs="+", default=[0], help="attention layers of the image towers")
    parser.add_argument("--quick", action="store_true", help="a few rows and steps, to see that everything runs")
    return parser.parse_args(command_line)


def main(command_line: list[str] | None = None) -> int:
    """Prepare, train, measure; 0, or 2 for a mistake in what was asked, 1 where a training failed."""
    options = parse_command_line(command_line)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    disable_progress_bar()
    plan = QUICK if options.quick else FULL
    try:
        if options.seeds < 1 or min(options.layers) < 0:
            raise ValueError(f"expected --seeds ≥ 1 and --layers ≥ 0, got {options.seeds} and {options.layers}")
        prepare(options.data, options.output, plan)
        for layers in options.layers:
            for seed in range(options.seeds):
                train(options.output, layers, seed, plan)
        print(measure(options.data, options.output, options.layers, range(options.seeds), plan))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except subprocess.CalledProcessError as error:  # it has said on stderr what was wrong
        sys.stderr.write(f"error: a training ended with code {error.returncode}\n")
        return 1
    return 0


def prepare(data: Path, output: Path, plan: Plan) -> None:
    """Windows for training and test, unless they are there."""
    for split in ("train", "test"):
        if not (output / "windows" / f"{split}.manifest.json").is_file():
            tallies = write_bccd(data, output / "windows", splits=[split], windows_per_image=plan.windows_per_image)
            logger.info("%d windows for %s, set aside: %s", tallies[split].kept, split, dict(tallies[split].dropped))


def run_folder(output: Path, layers: int, seed: int, name: str) -> Path:
    """Where one training lies."""
    return output / f"layers{layers}_seed{seed}" / name


def train(output: Path, layers: int, seed: int, plan: Plan) -> None:
    """Stage 1, then stage 2 and as many steps of IT-Align alone, whatever of it is not there yet."""
    stage1 = run_folder(output, layers, seed, "stage1")
    tower = f"model.config.vision_config.num_hidden_layers={layers}"
    steps = [f"training.max_steps={plan.stage1_steps}", f"training.seed={seed}", tower]
    train_once(output, stage1, "conceptclip_bccd_stage1.yaml", steps)
    source = f"model.from_pretrained={stage1 / 'final'}"
    steps = [f"training.max_steps={plan.stage2_steps}", f"training.seed={1000 + seed}", source]
    train_once(output, run_folder(output, layers, seed, WITH_PC_ALIGN), "conceptclip_bccd_stage2.yaml", steps)
    steps.append("loss.use_patch_concept_alignment=false")
    train_once(output, run_folder(output, layers, seed, ALONE), "conceptclip_bccd_stage2.yaml", steps)


def train_once(output: Path, folder: Path, recipe: str, overrides: list[str]) -> None:
    """One training, unless its model is there."""
    if (folder / "final" / "model.safetensors").is_file():
        return
    overrides = [
        f"data.folder={output / 'windows'}",
        f"training.output_dir={folder}",
        "training.progress_bar=false",
        *overrides,
    ]
    wait_for(start_training(SCRIPTS / "pretrain_conceptclip.py", SCRIPTS / "recipes" / recipe, overrides))
    logger.info("trained %s", folder)


def measure(data: Path, output: Path, towers: list[int], seeds: range, plan: Plan) -> str:
    """Measure everything; writes results, table and pictures; the table."""
    validation = load_cases(data, "validation", plan.num_validation)
    test = load_cases(data, "test", plan.num_test)
    windows = [record_to_row(r) for s in find_shards(output / "windows", "test") for r in pq.read_table(s).to_pylist()]
    rows: dict[str, dict[str, Tensor]] = baseline_figures(validation, test)
    results: dict[str, Any] = {"plan": asdict(plan), "seeds": len(seeds), "annotation": {}, "faithfulness": {}}
    for layers in towers:
        per_seed: list[dict[str, dict[str, Tensor]]] = []
        curves: dict[str, list[FaithfulnessCurves]] = {}
        for seed in seeds:
            logger.info("measuring the tower of %d layers, seed %d", layers, seed)
            models = {name: load(run_folder(output, layers, seed, name)) for name in (WITH_PC_ALIGN, ALONE)}
            per_seed.append(
                map_figures(models | {UNTRAINED: untrained(*models[WITH_PC_ALIGN], seed)}, validation, test)
            )
            for name, (model, processor) in models.items():
                key = f"{layers} layers, {name}"
                results["annotation"].setdefault(key, []).append(annotate(model, processor, windows))
            for name, found in faithfulness(*models[WITH_PC_ALIGN], windows[: plan.num_faithfulness]).items():
                curves.setdefault(name, []).append(found)
            if seed == seeds[0]:
                draw(models, test, output / "pictures" / f"layers{layers}", plan.num_pictures)
        for name in per_seed[0]:
            figures = [found[name] for found in per_seed]
            mean = {figure: torch.stack([f[figure] for f in figures]).mean(dim=0) for figure in figures[0]}
            rows[f"{layers} layers, {name}"] = mean
            results.setdefault("per_seed", {})[f"{layers} layers, {name}"] = [
                {figure: macro(values, test.names) for figure, values in found.items()} for found in figures
            ]
        results["faithfulness"][f"{layers} layers"] = summarise_faithfulness(curves, windows, plan)
    summaries = {
        name: summarise_cases(values, test.names, groups=test.smear_of_case, num_resamples=plan.num_resamples)
        for name, values in rows.items()
    }
    results["localization"] = {
        name: {
            "mean": {figure: asdict(value) for figure, value in mean.items()},
            "per_concept": {
                concept: {figure: asdict(value) for figure, value in figures.items()}
                for concept, figures in per_concept.items()
            },
        }
        for name, (per_concept, mean) in summaries.items()
    }
    (output / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    table = write_table(summaries, results)
    (output / "table.md").write_text(table, encoding="utf-8")
    return table


def load_cases(data: Path, split: str, limit: int | None) -> Cases:
    """The photographs of a split, and a case for every kind of cell in each."""
    smears: list[BloodSmear] = []
    for smear in read_smears(data, split):
        if isinstance(smear, Drop):
            logger.warning("%s set aside: %s", smear.row_id, smear.reason)
        elif limit is None or len(smears) < limit:
            smears.append(smear)
    kinds, smear_of_case, masks = [], [], []
    for number, smear in enumerate(smears):
        for kind, cell in enumerate(CELL_KINDS):
            mask = smear.mask(cell.label)[::STRIDE, ::STRIDE]
            if mask.any():
                kinds.append(kind)
                smear_of_case.append(number)
                masks.append(torch.from_numpy(mask.copy()))
    return Cases(smears, kinds, smear_of_case, torch.stack(masks))


def load(folder: Path) -> tuple[Any, Any]:
    """Model and processor of a training."""
    return AutoModel.from_pretrained(folder / "final").eval(), AutoProcessor.from_pretrained(folder / "final")


def untrained(model: Any, processor: Any, seed: int) -> tuple[Any, Any]:
    """The same network with weights as they are drawn."""
    torch.manual_seed(seed)
    return AutoModel.from_config(model.config).eval(), processor


def baseline_figures(validation: Cases, test: Cases) -> dict[str, dict[str, Tensor]]:
    """What maps reach that know nothing of the picture."""
    size = (480 // TILE * 8, 640 // TILE * 8)
    maps = {
        "centre prior": (centre_prior(len(validation.kinds), size), centre_prior(len(test.kinds), size)),
        "random map": (random_maps(len(validation.kinds), size, 1), random_maps(len(test.kinds), size, 2)),
    }
    return {name: measured(*pair, validation, test) for name, pair in maps.items()}


def map_figures(models: dict[str, tuple[Any, Any]], validation: Cases, test: Cases) -> dict[str, dict[str, Tensor]]:
    """Case figures of every kind of map of the two models of a seed."""
    figures = {}
    for split_maps in zip(case_maps(models, validation).items(), case_maps(models, test).items(), strict=True):
        (name, chosen_on), (_, maps) = split_maps
        figures[name] = measured(chosen_on, maps, validation, test)
    return figures


def measured(validation_maps: Tensor, test_maps: Tensor, validation: Cases, test: Cases) -> dict[str, Tensor]:
    """Case figures on the test photographs, with the threshold that is best on validation."""
    threshold = best_threshold(validation_maps, validation.masks)
    return case_figures(test_maps, test.masks, chosen_threshold=threshold)


def case_maps(models: dict[str, tuple[Any, Any]], cases: Cases) -> dict[str, Tensor]:
    """Every kind of map (cases, rows, columns)."""
    per_smear: dict[str, list[Tensor]] = {}
    for smear in cases.smears:
        for name, maps in all_maps(models, smear).items():
            per_smear.setdefault(name, []).append(maps)  # (kinds, rows, columns)
    return {
        name: torch.stack([maps[n][kind] for n, kind in zip(cases.smear_of_case, cases.kinds, strict=True)])
        for name, maps in per_smear.items()
    }


def all_maps(models: dict[str, tuple[Any, Any]], smear: BloodSmear) -> dict[str, Tensor]:
    """Every kind of map of a photograph, (kinds, rows, columns), stitched from its tiles."""
    found = {}
    for stage, (model, processor) in models.items():
        label = LABELS[stage]
        text_embeds, concept_embeds = embed_classes(model, processor, NAMES, TEMPLATES).averaged()
        pixels = processor(images=tiles_of(smear))["pixel_values"]
        if concept_embeds is not None:
            with torch.no_grad():
                found[f"{label}: concept maps"] = stitch(model.get_concept_maps(pixels, concept_embeds=concept_embeds))
        else:
            found[f"{label}: patches pooled one by one"] = stitch(pooled_patch_maps(model, pixels, text_embeds))
        for name, method in GRADIENT_METHODS.items():
            found[f"{label}: {name}"] = stitch(gradient_maps(model, pixels, text_embeds, method))
        attention = stitch(attention_maps(model, pixels)[:, None])
        found[f"{label}: attention"] = attention.expand(len(NAMES), -1, -1)
    return found


def tiles_of(smear: BloodSmear) -> list[Any]:
    """Squares that cover the photograph, row by row; BCCD's 640 × 480 pixels are a whole number of them."""
    image = smear.image()
    lefts, tops = range(0, image.width, TILE), range(0, image.height, TILE)
    return [image.crop((left, top, left + TILE, top + TILE)) for top in tops for left in lefts]


def stitch(tile_maps: Tensor, num_columns: int = 640 // TILE) -> Tensor:
    """Maps (K, rows, columns) of a photograph from those of its tiles (T, K, rows, columns)."""
    grid = tile_maps.unflatten(0, (-1, num_columns))  # (tile rows, tile columns, K, rows, columns)
    return grid.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)


def annotate(model: Any, processor: Any, windows: list[FigureRow]) -> dict[str, Any]:
    """AUC per kind of cell on held-out windows."""
    encoder = make_encoder(model, processor, name="bccd")
    prompts = embed_prompts(encoder, NAMES, TEMPLATES, [CAPTION_START])
    scores = score_images(encoder, [row.image_bytes for row in windows], prompts, top_patches=1, batch_size=64)
    labels = np.array([[kind.cui in {c.cui for c in row.concepts} for kind in CELL_KINDS] for row in windows])
    return annotation_figures(scores, labels, NAMES, num_resamples=0).as_dict()


def faithfulness(model: Any, processor: Any, windows: list[FigureRow]) -> dict[str, FaithfulnessCurves]:
    """Deletion and insertion curves of the whole-image cosine with a concept of each window, by map."""
    text_embeds, concept_embeds = embed_classes(model, processor, NAMES, TEMPLATES).averaged()
    cuis = [kind.cui for kind in CELL_KINDS]
    kinds = torch.tensor([cuis.index(row.concepts[0].cui) for row in windows])
    pixels = processor(images=[row.image_bytes for row in windows])["pixel_values"]
    case = torch.arange(len(windows))
    with torch.no_grad():
        maps = {"concept maps": model.get_concept_maps(pixels, concept_embeds=concept_embeds)[case, kinds]}
    maps["Grad-CAM"] = gradient_maps(model, pixels, text_embeds)[case, kinds]
    maps["random"] = random_maps(len(windows), tuple(maps["Grad-CAM"].shape[1:]))  # type: ignore[arg-type]

    def score(pictures: Tensor, cases: Tensor) -> Tensor:
        embeds = model(pixel_values=pictures, return_logits=False).image_embeds
        return (embeds * text_embeds[kinds[cases]]).sum(dim=-1)

    return {name: faithfulness_curves(score, pixels, some) for name, some in maps.items()}


def summarise_faithfulness(
    curves: dict[str, list[FaithfulnessCurves]], windows: list[FigureRow], plan: Plan
) -> dict[str, Any]:
    """Areas of all seeds together; windows of a photograph are drawn together."""
    joined = {
        name: FaithfulnessCurves(
            found[0].shares, torch.cat([f.deletion for f in found]), torch.cat([f.insertion for f in found])
        )
        for name, found in curves.items()
    }
    photographs = [row.row_id.rsplit("-", 1)[0] for row in windows[: plan.num_faithfulness]]
    groups = photographs * len(curves["random"])
    return {
        name: asdict(faithfulness_figures(c, joined["random"], groups=groups, num_resamples=plan.num_resamples))
        for name, c in joined.items()
        if name != "random"
    }


def macro(values: Tensor, names: list[str]) -> float:
    """Mean over concepts of the mean over cases."""
    is_kind = [[name == concept for name in names] for concept in dict.fromkeys(names)]
    return float(np.mean([float(values[torch.tensor(member)].mean()) for member in is_kind]))


def draw(models: dict[str, tuple[Any, Any]], cases: Cases, folder: Path, count: int) -> None:
    """Panels of the first photographs: the maps of both models, true boxes outlined."""
    for number, smear in enumerate(cases.smears[:count]):
        maps = all_maps(models, smear)
        outlines = [smear.mask(kind.label) for kind in CELL_KINDS]
        for name in ("with PC-Align: concept maps", "IT-Align alone: patches pooled one by one"):
            panel = draw_concept_panel(smear.image(), maps[name], NAMES, outlines=outlines, title=name)
            save_png(panel, folder / f"{number:02d}_{'concepts' if 'PC' in name else 'alone'}.png")


def write_table(summaries: dict[str, tuple[dict[str, dict[str, Interval]], dict[str, Interval]]], results: Any) -> str:
    """Markdown: means over the kinds of cells; then the peak inside, kind by kind; then the AUCs."""
    lines = [f"| maps | {' | '.join(FIGURES.values())} |", "|---" * (len(FIGURES) + 1) + "|"]
    for name, (_, mean) in summaries.items():
        lines.append(f"| {name} | {' | '.join(mean[figure].as_text('{:.2f}') for figure in FIGURES)} |")
    for figure in ("pointing", "auprc"):
        lines += ["", f"| {FIGURES[figure]} | {' | '.join(NAMES)} | per seed, mean of the kinds |", "|---" * 5 + "|"]
        for name, (per_concept, _) in summaries.items():
            cells = [per_concept[concept][figure].as_text("{:.2f}") for concept in NAMES]
            seeds = [f"{found[figure]:.2f}" for found in results["per_seed"].get(name, [])]
            lines.append(f"| {name} | {' | '.join(cells)} | {', '.join(seeds)} |")
    lines += ["", f"| AUC on windows, per seed | {' | '.join(NAMES)} | mean |", "|---" * 5 + "|"]
    for name, per_seed in results["annotation"].items():
        for kind in ("global_only", "local_only"):
            found = [figures[kind] for figures in per_seed if figures[kind] is not None]
            if found:
                cells = [", ".join(f"{f['per_class'][c]['value']:.2f}" for f in found) for c in NAMES]
                means = ", ".join(f"{f['macro']['value']:.2f}" for f in found)
                lines.append(f"| {name}, {kind.removesuffix('_only')} | {' | '.join(cells)} | {means} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
