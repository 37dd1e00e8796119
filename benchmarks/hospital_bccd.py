r"""LoRA, DoRA and a linear probe against full fine-tuning, on real images: cells in windows of blood smears (BCCD).

    python benchmarks/hospital_bccd.py --data bccd --model demo_output/conceptclip/stage2/final --output bccd_results

Windows are cut from the official training, validation and test photographs; the labels say which kinds of cells a
window holds (by its boxes). BCCD does not name patients: a photograph stands for one, in the splits and in the
intervals. All methods start from the same small ConceptCLIP, see the same rows, keep their best validation and are
measured by scripts/evaluate_finetuned.py on the same test windows; the base itself is asked with prompts.
"""

import argparse
import importlib.util
import json
import logging
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from medclip_hf.data.bccd import CELL_KINDS, cut_windows, read_smears
from medclip_hf.data.hospital.rows import DatasetFacts, HospitalRow, write_dataset_facts, write_hospital_rows
from medclip_hf.data.stages import Drop
from medclip_hf.explain.report import Table

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
SPLITS = ("train", "validation", "test")
FULL_RATE, ADAPTER_RATE, PROBE_RATE = 1e-3, 5e-3, 1e-2  # for small models; not searched for
METHODS: dict[str, tuple[str, ...]] = {
    "linear probe": ("method.mode=linear_probe", f"training.learning_rate={PROBE_RATE}"),
    "LoRA, rank 8": ("method.mode=lora", f"training.learning_rate={ADAPTER_RATE}"),
    "DoRA, rank 8": ("method.mode=lora", "method.use_dora=true", f"training.learning_rate={ADAPTER_RATE}"),
    "full": ("method.mode=full", f"training.learning_rate={FULL_RATE}"),
    "full, layer decay 0.7": (
        "method.mode=full",
        "training.layer_decay=0.7",
        f"training.learning_rate={FULL_RATE}",
    ),
}
ALL_TARGETS = "[query, key, value, attention_output, mlp_in, mlp_out]"
PROMPTS = {kind.name: ["No cells.", f"{kind.name.capitalize()}."] for kind in CELL_KINDS}


def main() -> None:
    """Prepare, train, measure; prints the table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of BCCD")
    parser.add_argument("--model", type=Path, required=True, help="folder of a small ConceptCLIP")
    parser.add_argument("--output", type=Path, required=True, help="folder of everything that is made")
    parser.add_argument("--windows", type=int, default=6, help="of each photograph")
    parser.add_argument("--steps", type=int, default=150, help="of each training")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    prepared = options.output / "prepared"
    counts = prepare(options.data, prepared, options.windows, options.seed)
    prompts = options.output / "prompts.yaml"
    prompts.write_text(yaml.safe_dump(PROMPTS), encoding="utf-8")
    found = {"base, zero-shot": measure(options.model, prepared, options.output / "base", "--prompts", str(prompts))}
    trained = {"base, zero-shot": (0, 0.0)}
    for name, overrides in METHODS.items():
        run = options.output / name.replace(" ", "_").replace(",", "")
        start = time.perf_counter()
        train(options, prepared, run, overrides)
        trained[name] = (num_trained(run / "final"), time.perf_counter() - start)
        found[name] = measure(run / "final", prepared, run / "evaluation")
    print(table(found, trained, counts).as_text())
    results = {"counts": counts, "figures": found, "trained": trained}
    (options.output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def prepare(source: Path, folder: Path, windows: int, seed: int) -> dict[str, Any]:
    """The windows of all splits as rows of a hospital; a photograph is a patient."""
    folder.mkdir(parents=True, exist_ok=True)
    classes = tuple(kind.name for kind in CELL_KINDS)
    counts: dict[str, Any] = {}
    for number, split in enumerate(SPLITS):
        rows = []
        for place, smear in enumerate(read_smears(source, split)):
            if isinstance(smear, Drop):
                print(f"{split}: {smear.row_id} left out: {smear.reason}")
                continue
            rng = np.random.default_rng((seed, number, place))
            for figure in cut_windows(smear, windows, (96, 288), 64, rng):
                present = {concept.name for concept in figure.concepts}
                labels = tuple((name, name in present) for name in classes)
                rows.append(HospitalRow(replace(figure), f"photograph-{split}-{place}", "", labels))
        write_hospital_rows(rows, folder, split)
        positives = {name: sum(dict(row.labels)[name] for row in rows) for name in classes}
        counts[split] = {"rows": len(rows), "patients": len({row.patient_id for row in rows}), "positives": positives}
    write_dataset_facts(DatasetFacts("figures", "multi_label", classes, counts, {}, {}, {}), folder)
    return counts


def train(options: argparse.Namespace, prepared: Path, run: Path, overrides: tuple[str, ...]) -> None:
    """One training by scripts/finetune_lora.py."""
    settings = [
        f"model.from_pretrained={options.model}",
        f"data.folder={prepared}",
        f"training.output_dir={run}",
        f"method.targets={ALL_TARGETS}",
        "training.num_epochs=null",
        f"training.max_steps={options.steps}",
        f"training.seed={options.seed}",
        "training.evaluate_every=25",
        "training.early_stopping_patience=6",
        "training.progress_bar=false",
        *overrides,
    ]
    recipe = SCRIPTS / "recipes" / "finetune_classification.yaml"
    call("finetune_lora", ["--config", str(recipe), *(word for setting in settings for word in ("--set", setting))])


def measure(model: Path, prepared: Path, output: Path, *more: str) -> dict[str, Any]:
    """The figures of a model on the test windows by scripts/evaluate_finetuned.py."""
    call(
        "evaluate_finetuned", ["--model", str(model), "--data", str(prepared), "--output", str(output), *map(str, more)]
    )
    evaluation = json.loads((output / "evaluation.json").read_text(encoding="utf-8"))
    return evaluation["figures"] | {"ece_before_temperature": evaluation["ece_before_temperature"]}


def call(script: str, command_line: list[str]) -> None:
    """Run a script as from the command line, in this process."""
    spec: Any = importlib.util.spec_from_file_location(script, SCRIPTS / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[script] = module
    spec.loader.exec_module(module)
    if code := module.main(command_line):
        raise SystemExit(f"{script} ended with {code}")


def num_trained(folder: Path) -> int:
    """Bytes of the weights that a method leaves behind."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def table(found: dict[str, Any], trained: dict[str, tuple[int, float]], counts: dict[str, Any]) -> Table:
    """One row a method."""
    names = ("auroc", "auprc", "sensitivity_at_specificity", "ece")
    rows = []
    for method, figures in found.items():
        size, seconds = trained[method]
        told = [text(figures["overall"].get(name)) for name in names]
        rows.append(
            [method, f"{size / 1000:.0f} kB", f"{seconds:.0f} s", *told, text(figures["ece_before_temperature"])]
        )
    header = ["method", "weights", "training", "AUROC", "AUPRC", "sensitivity at 0.9", "ECE", "ECE before temperature"]
    told = ", ".join(f"{split} {entry['rows']} windows of {entry['patients']}" for split, entry in counts.items())
    return Table(header, rows, f"Means of three labels; 95 % intervals by photograph. Photographs: {told}.")


def text(figure: dict[str, Any] | None) -> str:
    """A figure and its interval."""
    if not figure or figure["value"] is None:
        return "undefined"
    return f"{figure['value']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})"


if __name__ == "__main__":
    main()
