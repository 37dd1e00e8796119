r"""A model meets a scanner that stores bright as dark; an adapter of 20,000 weights makes up for much of it.

    make demo    # once: trains the small model that is used here by default
    python examples/lora.py --output lora_output

Draws figures of the "new hospital" (inverted grey values), trains a LoRA adapter on their captions with
`scripts/finetune_lora.py`, loads the adapter by `AutoModel.from_pretrained`, and compares it with the model it adapts,
on figures that neither has seen: zero-shot AUC with 95 % bootstrap intervals. Two to four minutes on a CPU.
"""

import argparse
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps
from transformers import AutoModel, AutoProcessor

import medclip_hf  # noqa: F401 - makes the Auto classes know the models
from medclip_hf.data.phantoms.figures import draw_figures, write_figure_phantoms
from medclip_hf.data.phantoms.findings import FINDINGS
from medclip_hf.evaluation.metrics import auroc_per_class
from medclip_hf.evaluation.zero_shot import classify_images, published_share_of_patches

DEMO_MODEL = "demo_output/conceptclip/stage2/final"
SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
CLASS_NAMES = [finding.name for finding in FINDINGS]
TEMPLATES = ("{} and other findings.", "showing {} and other findings.")


def main(command_line: list[str] | None = None) -> int:
    """Draw, train, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO_MODEL, help="folder or Hub name of a ConceptCLIP")
    parser.add_argument("--output", type=Path, default=Path("lora_output"))
    parser.add_argument("--num-train", type=int, default=1000)
    parser.add_argument("--num-test", type=int, default=200)
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args(command_line)

    draw_new_hospital(options.output / "figures", options.num_train)
    trained = subprocess.run(train_command(options), check=False)
    if trained.returncode:
        return trained.returncode

    # The folder of an adapter names its base: one call loads both.
    processor = AutoProcessor.from_pretrained(options.model)
    test = list(draw_figures(seed=1, split="test", count=options.num_test))
    for name, folder in (("as it was", options.model), ("with adapter", options.output / "adapter" / "final")):
        model = AutoModel.from_pretrained(folder).eval()
        print(f"{name:>12}: {mean_auc(model, processor, test)}")
    return 0


def draw_new_hospital(folder: Path, count: int) -> None:
    """Shards of figures with inverted grey values, for training and validation."""
    for shard in write_figure_phantoms(folder, {"train": count, "validation": 64}, seed=1):
        table = pq.read_table(shard)
        field = table.schema.field("image")
        images = [{"bytes": inverted(row["bytes"]), "path": None} for row in table["image"].to_pylist()]
        column = pa.array(images, type=field.type)
        pq.write_table(table.set_column(table.schema.get_field_index("image"), field, column), shard)


def inverted(png: bytes) -> bytes:
    """The same picture, bright for dark."""
    buffer = io.BytesIO()
    ImageOps.invert(Image.open(io.BytesIO(png)).convert("RGB")).save(buffer, format="PNG")
    return buffer.getvalue()


def train_command(options: argparse.Namespace) -> list[str]:
    """The command line of the training, which could as well be typed."""
    settings = [
        f"model.from_pretrained={options.model}",
        f"data.folder={options.output / 'figures'}",
        f"training.output_dir={options.output / 'adapter'}",
        "training.num_epochs=null",
        f"training.max_steps={options.steps}",
        f"training.evaluate_every={options.steps}",
        f"training.checkpoint_every={options.steps}",
        "training.learning_rate=2.0e-3",
        "method.towers=[vision]",
        "method.targets=[query, value, mlp_in, mlp_out]",
    ]
    sets = [word for setting in settings for word in ("--set", setting)]
    script = SCRIPTS / "finetune_lora.py"
    return [sys.executable, str(script), "--config", str(SCRIPTS / "recipes" / "finetune_image_text.yaml"), *sets]


def mean_auc(model, processor, figures) -> str:
    """Zero-shot AUC, mean over the findings, on inverted figures."""
    images = [255 - figure.image for figure in figures]
    vision = model.config.vision_config
    top_patches = published_share_of_patches((vision.image_size // vision.patch_size) ** 2)
    scores = classify_images(
        model, processor, images, CLASS_NAMES, TEMPLATES, activation="sigmoid", top_patches=top_patches
    )
    labels = np.array([[name in figure.findings for name in CLASS_NAMES] for figure in figures])
    return auroc_per_class(scores.mixed_scores, labels, CLASS_NAMES, num_resamples=200).macro.as_text()


if __name__ == "__main__":
    sys.exit(main())
