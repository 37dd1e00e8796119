r"""What a new hospital costs a CT model, and what an adapter wins back: base, LoRA and full fine-tuning on torsos.

    python benchmarks/hospital_shift.py --model demo_output/fvlm/per_anatomy_calibrated/final --output shift_results

The base is the fVLM of scripts/demo_fvlm.py. The new hospital has other noise, other spacing and other words in its
reports (`data.phantoms.other_hospital`); its patients are split into training, validation and test. Everything is
zero-shot: each model is asked with prompts, in the old words and in the new ones, on test patients of the old hospital
and of the new one. Drawing, engine, training (scripts/finetune_lora.py) and evaluation (scripts/evaluate_finetuned.py)
are those that a hospital would run.
"""

import argparse
import importlib.util
import json
import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from medclip_hf.data.ct.engine import EngineSettings, prepare_scans
from medclip_hf.data.ct.geometry import GeometryContract
from medclip_hf.data.ct.scan_index import read_scan_rows, write_scan_rows
from medclip_hf.data.ct.sources import ct_rate_sources
from medclip_hf.data.phantoms.other_hospital import reword, write_other_hospital
from medclip_hf.data.phantoms.torso_files import write_ct_rate
from medclip_hf.data.phantoms.torsos import TorsoSettings
from medclip_hf.explain.report import Table

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
# Findings, sizes and words of scripts/demo_fvlm.py, in which the base was trained.
TORSOS = TorsoSettings(
    in_plane_size=48,
    slice_spacing_mm=(6.0, 8.0),
    body_scale=(0.96, 1.04),
    max_shift_mm=4.0,
    noise_hu=(10.0, 25.0),
    prevalence=0.12,
    max_reconstructions=1,
    findings=(
        *("emphysema", "ground-glass opacity", "pleural effusion", "cardiomegaly"),
        *("pericardial effusion", "hiatal hernia", "aortic wall calcification"),
    ),
)
PROMPTS = {
    "Emphysema": ["Aeration of both lungs is natural.", "Emphysema in both lungs."],
    "Lung opacity": ["No mass or infiltration was detected in either lung.", "Ground-glass opacities in both lungs."],
    "Pleural effusion": ["Pleural effusion was not observed.", "Pleural effusion on the left."],
    "Cardiomegaly": ["The heart is not enlarged.", "Cardiomegaly."],
    "Pericardial effusion": ["Pericardial effusion-thickening was not observed.", "Pericardial effusion."],
    "Hiatal hernia": ["The esophagus is unremarkable.", "Hiatal hernia."],
    "Arterial wall calcification": [
        "The aorta is of normal caliber without wall calcification.",
        "Calcified plaques in the aortic wall.",
    ],
}
SPACING_MM = (8.0, 8.0, 8.0)
ALL_TARGETS = "query, key, value, attention_output, mlp_in, mlp_out"
LORA = ("method.mode=lora", "method.rank=16", "method.alpha=32", "training.learning_rate=5.0e-3")
METHODS = {
    "LoRA, rank 16": (*LORA, f"method.targets=[{ALL_TARGETS}]"),
    "LoRA, rank 16, words too": (*LORA, f"method.targets=[{ALL_TARGETS}, word_embeddings]"),
    "full": ("method.mode=full", "training.learning_rate=1.0e-3"),
}


@dataclass(frozen=True)
class Asked:
    """One row of the table: a model, at a hospital, in its words."""

    model: str
    hospital: str
    words: str


def main() -> None:
    """Draw, prepare, train, measure; prints the table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the demonstration's fVLM")
    parser.add_argument("--output", type=Path, required=True, help="folder of everything that is made")
    parser.add_argument("--train-patients", type=int, default=120, help="of the new hospital, a fifth for validation")
    parser.add_argument("--test-patients", type=int, default=120, help="of either hospital")
    parser.add_argument("--steps", type=int, default=120, help="of each training")
    parser.add_argument("--seed", type=int, default=100, help="of the new hospital; the base saw seed 0")
    parser.add_argument("--num-workers", type=int, default=1, help="processes that draw and prepare")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    prepare(options)
    for words, prompts in (("old", PROMPTS), ("new", reworded())):
        (options.output / f"{words}_words.yaml").write_text(yaml.safe_dump(prompts), encoding="utf-8")
    found = {
        Asked("base", "old", "old"): measure(options, options.model, "old", "old"),
        Asked("base", "new", "old"): measure(options, options.model, "new", "old"),
        Asked("base", "new", "new"): measure(options, options.model, "new", "new"),
    }
    seconds: dict[str, float] = {}
    for name, overrides in METHODS.items():
        run = options.output / name.replace(" ", "_").replace(",", "")
        start = time.perf_counter()
        train(options, run, overrides)
        seconds[name] = time.perf_counter() - start
        for words in ("old", "new"):
            found[Asked(name, "new", words)] = measure(options, run / "final", "new", words)
    print(table(found, seconds).as_text())
    results = [{**vars(asked), "figures": figures} for asked, figures in found.items()]
    (options.output / "results.json").write_text(json.dumps({"rows": results, "seconds": seconds}, indent=2) + "\n")


def reworded() -> dict[str, list[str]]:
    """The prompts as the new hospital words its reports."""
    return {name: [reword(text) for text in texts] for name, texts in PROMPTS.items()}


def prepare(options: argparse.Namespace) -> None:
    """Old hospital: test patients. New hospital: training, validation and test patients."""
    draw = {"settings": TORSOS, "num_workers": options.num_workers}
    write_ct_rate(options.output / "old_ct_rate", options.test_patients, split="valid", seed=0, **draw)
    new = options.output / "new_ct_rate"
    write_other_hospital(new, options.train_patients, split="train", seed=options.seed, **draw)
    write_other_hospital(new, options.test_patients, split="valid", seed=options.seed, **draw)
    settings = EngineSettings(contract=GeometryContract(spacing_mm_dhw=SPACING_MM))
    for hospital, source, split in (
        ("old", "validation", "test"),
        ("new", "train", "train"),
        ("new", "validation", "test"),
    ):
        prepare_scans(
            ct_rate_sources(options.output / f"{hospital}_ct_rate", source),
            options.output / hospital,
            split,
            settings,
            num_workers=options.num_workers,
            show_progress=False,
        )
    split_off_validation(options.output / "new")


def split_off_validation(folder: Path) -> None:
    """Every fifth patient of the training becomes one of the validation."""
    rows = read_scan_rows(folder, "train")
    chosen = set(sorted({row.patient_id for row in rows})[::5])
    write_scan_rows([row for row in rows if row.patient_id in chosen], folder, "validation")
    write_scan_rows([row for row in rows if row.patient_id not in chosen], folder, "train")


def train(options: argparse.Namespace, run: Path, overrides: tuple[str, ...]) -> None:
    """One training by scripts/finetune_lora.py."""
    settings = [
        f"model.from_pretrained={options.model}",
        f"data.folder={options.output / 'new'}",
        f"training.output_dir={run}",
        "training.num_epochs=null",
        f"training.max_steps={options.steps}",
        "training.batch_size_per_process=32",
        "training.micro_batch_size=null",
        "training.evaluate_every=25",
        "training.early_stopping_patience=null",
        "training.checkpoint_every=null",
        "training.progress_bar=false",
        "training.best_metric=auroc",
        "training.best_metric_mode=max",
        f"task.prompts={json.dumps(reworded())}",
        *overrides,
    ]
    recipe = SCRIPTS / "recipes" / "finetune_ct_reports.yaml"
    call("finetune_lora", ["--config", str(recipe), *(word for setting in settings for word in ("--set", setting))])


def measure(options: argparse.Namespace, model: Path, hospital: str, words: str) -> dict[str, Any]:
    """The figures of a model on the test patients of a hospital by scripts/evaluate_finetuned.py."""
    output = options.output / "evaluations" / f"{model.parent.name}_{hospital}_{words}"
    command_line = ["--model", str(model), "--data", str(options.output / hospital), "--output", str(output)]
    command_line += ["--prompts", str(options.output / f"{words}_words.yaml")]
    if hospital == "old":
        command_line += ["--validation-split", "none"]
    call("evaluate_finetuned", command_line)
    return json.loads((output / "evaluation.json").read_text(encoding="utf-8"))["figures"]


def call(script: str, command_line: list[str]) -> None:
    """Run a script as from the command line, in this process."""
    spec: Any = importlib.util.spec_from_file_location(script, SCRIPTS / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[script] = module
    spec.loader.exec_module(module)
    if code := module.main(command_line):
        raise SystemExit(f"{script} ended with {code}")


def table(found: dict[Asked, dict[str, Any]], seconds: dict[str, float]) -> Table:
    """One row for each model, hospital and wording."""
    rows = []
    for asked, figures in found.items():
        overall = figures["overall"]
        told = [text(overall.get(name)) for name in ("auroc", "auprc", "sensitivity_at_specificity")]
        taken = f"{seconds[asked.model]:.0f} s" if asked.model in seconds else ""
        size = f"{figures['num_samples']} of {figures['num_groups']}"
        rows.append([asked.model, asked.hospital, asked.words, *told, size, taken])
    header = ["model", "hospital", "words", "AUROC", "AUPRC", "sensitivity at 0.9", "scans of patients", "training"]
    return Table(header, rows, "Means of seven findings; 95 % intervals by bootstrap over patients.")


def text(figure: dict[str, Any] | None) -> str:
    """A figure and its interval."""
    if not figure or figure["value"] is None:
        return "undefined"
    return f"{figure['value']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})"


if __name__ == "__main__":
    main()
