r"""Files to walk through the guides with: a picture, a CT with its labels, a hospital's table, a benchmark. All drawn.

    python examples/draw_inputs.py --output inputs

Nobody's images: a program drew them, as it drew what the models of `make demo` learned from. What they hold is known,
so a score can be told right from wrong.
"""

import argparse
import csv
import json
import sys
import tempfile
from pathlib import Path

from medclip_hf.data.phantoms.figures import FigurePhantom, draw_figure
from medclip_hf.data.phantoms.findings import FINDINGS
from medclip_hf.data.phantoms.torso_files import write_ct_rate
from medclip_hf.data.phantoms.torsos import TorsoSettings

SEED = 11  # another than the demo's: its models have not seen these
NAMES = [finding.name for finding in FINDINGS]
TORSOS = TorsoSettings(
    in_plane_size=48, slice_spacing_mm=(6.0, 8.0), prevalence=0.3, max_studies=1, max_reconstructions=1
)


def main(command_line: list[str] | None = None) -> int:
    """Draw and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("inputs"), help="folder; files of the same names go")
    parser.add_argument("--num-films", type=int, default=100, help="of the hospital's table, two a patient")
    parser.add_argument("--num-figures", type=int, default=100, help="of the benchmark")
    options = parser.parse_args(command_line)
    if min(options.num_films, options.num_figures) < 1:
        sys.stderr.write("error: --num-films and --num-figures must be at least 1.\n")
        return 2

    options.output.mkdir(parents=True, exist_ok=True)
    example = draw_figure(SEED, "test", 0)
    (options.output / "figure.png").write_bytes(example.row.image_bytes)
    print(f"{options.output}/figure.png: {', '.join(example.findings)}")
    draw_scans(options.output)
    draw_hospital(options.output / "hospital", options.num_films)
    draw_benchmark(options.output / "benchmark", options.num_figures)
    return 0


def draw_scans(folder: Path) -> None:
    """Two scans with TotalSegmentator's labels, below `scans` and `labels`, and the first of them by itself."""
    with tempfile.TemporaryDirectory() as tree:
        for number, scan in enumerate(write_ct_rate(tree, 2, split="valid", seed=SEED, settings=TORSOS), start=1):
            labels = next(Path(tree, "dataset", "ts_seg").rglob(scan.name))
            for kind, written in (("scans", scan), ("labels", labels)):
                (folder / kind).mkdir(exist_ok=True)
                (folder / kind / f"patient_{number}.nii.gz").write_bytes(written.read_bytes())
    for kind, name in (("scans", "scan.nii.gz"), ("labels", "labels.nii.gz")):
        (folder / name).write_bytes((folder / kind / "patient_1.nii.gz").read_bytes())
    print(f"{folder}/scan.nii.gz with {folder}/labels.nii.gz; two in {folder}/scans with {folder}/labels")


def draw_hospital(folder: Path, count: int) -> None:
    """Films and their table, as a hospital exports them: who, what was written, which findings."""
    folder.mkdir(exist_ok=True)
    labelled = NAMES[:2]
    with (folder / "films.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["path", "patient_id", "report", *labelled])
        for number in range(count):
            figure = draw_figure(SEED, "train", number)
            (folder / f"film_{number}.png").write_bytes(figure.row.image_bytes)
            present = [int(name in figure.findings) for name in labelled]
            table.writerow([f"film_{number}.png", f"patient {number // 2}", figure.row.caption, *present])
    print(f"{folder}/films.csv: {count} films, labels {', '.join(labelled)}")


def draw_benchmark(folder: Path, count: int) -> None:
    """A task of its own for `scripts/evaluate.py`: pictures, a table of labels, and what is asked."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    figures: list[FigurePhantom] = [draw_figure(SEED, "test", number) for number in range(count)]
    with (folder / "test.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["image", *NAMES])
        for number, figure in enumerate(figures):
            (folder / "images" / f"{number}.png").write_bytes(figure.row.image_bytes)
            table.writerow([f"{number}.png", *(int(name in figure.findings) for name in NAMES)])
    task = {
        "task_type": "zero_shot_classification",
        "class_names": NAMES,
        "templates": ["{}", "showing {}."],
        "modality": "drawn",
        "layout": "multi_label_table",
        "is_multi_label": True,
    }
    (folder / "task.json").write_text(json.dumps(task, indent=2), encoding="utf-8")
    print(f"{folder}: a benchmark of {count} figures, {len(NAMES)} findings")


if __name__ == "__main__":
    sys.exit(main())
