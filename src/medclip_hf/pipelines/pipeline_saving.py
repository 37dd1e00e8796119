"""How our pipelines are saved: with model, processor and their own code, so that they work without the package.

This file travels to the Hub with every pipeline.
"""

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

# Task -> (file, class) for each model. Written to config.json as `custom_pipelines`, where transformers looks.
PIPELINES_OF_MODEL = {
    "conceptclip": {
        "medical-concept-annotation": ("pipeline_concept_annotation", "ConceptAnnotationPipeline"),
    },
    "fvlm": {
        "ct-zero-shot-classification": ("pipeline_ct", "CTZeroShotClassificationPipeline"),
        "ct-feature-extraction": ("pipeline_ct", "CTFeatureExtractionPipeline"),
    },
}
_SIBLING = re.compile(r"^\s*from\s+\.(\w+)\s+import", re.MULTILINE)
# In the package, what scores is not beside the pipelines; in a saved folder all files lie side by side.
_NEIGHBOUR_ROOMS = ("", "../evaluation")


def forget_pipelines(config: Any) -> None:
    """Take out of a loaded configuration which pipelines its folder carries.

    A folder that is written without their code must not name them; and transformers leaves classes there after loading
    one, which no JSON takes.
    """
    vars(config).pop("custom_pipelines", None)


def add_pipelines(folder: str | os.PathLike[str]) -> None:
    """Let the folder of a saved model carry its pipelines: their code, and their names in config.json.

    Args:
        folder: as the model's `save_pretrained` wrote it.

    Raises:
        ValueError: it holds no model that has pipelines.
    """
    path = Path(folder) / "config.json"
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not (entries := _entries(values.get("model_type", ""))):
        raise ValueError(f"{folder} holds no model with pipelines; those of {', '.join(PIPELINES_OF_MODEL)} have some.")
    copy_code(values["model_type"], folder)
    partial = path.with_name(".config.json.partial")
    partial.write_text(json.dumps(values | {"custom_pipelines": entries}, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def _entries(model_type: str) -> dict[str, dict[str, Any]]:
    tasks = PIPELINES_OF_MODEL.get(model_type, {})
    return {
        task: {"impl": f"{file}.{name}", "pt": ["AutoModel"], "type": "multimodal"}
        for task, (file, name) in tasks.items()
    }


def copy_code(model_type: str, folder: str | os.PathLike[str], source: Path | None = None) -> list[str]:
    """Copies the files of a model's pipelines, and all they reach by `from .sibling import name`, into a folder.

    Args:
        model_type: of the model.
        folder: that exists.
        source: where this file and those of the pipelines lie; None: beside this one.

    Raises:
        FileNotFoundError: a file is missing; the pipelines came from an incomplete folder.
    """
    source = source or Path(sys.modules[__name__].__file__ or "").parent
    waiting = sorted({file for file, _ in PIPELINES_OF_MODEL.get(model_type, {}).values()})
    copied: list[str] = []
    while waiting:
        name = waiting.pop()
        candidates = [source / room / f"{name}.py" for room in _NEIGHBOUR_ROOMS]
        path = next((path for path in candidates if path.is_file()), candidates[0])
        target = Path(folder) / path.name
        if not (target.exists() and target.samefile(path)):
            shutil.copyfile(path, target)
        copied.append(name)
        siblings = set(_SIBLING.findall(path.read_text(encoding="utf-8")))
        waiting += sorted(siblings - set(copied) - set(waiting))
    return [f"{name}.py" for name in copied]


def save_pipeline(pipe: Any, folder: str | os.PathLike[str], **kwargs: Any) -> None:
    """Saves model, processor and code of a pipeline.

    Args:
        pipe: with `model` and `processor`.
        folder: made if it is not there.
        **kwargs: what `save_pretrained` of model and processor take.

    Raises:
        ValueError: a file is in the way.
    """
    if Path(folder).is_file():
        raise ValueError(f"{folder} is a file. Name a folder to save the pipeline to.")
    pipe.model.save_pretrained(folder, **kwargs)
    pipe.processor.save_pretrained(folder, **kwargs)
    add_pipelines(folder)
