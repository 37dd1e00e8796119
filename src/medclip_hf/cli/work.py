"""What the commands compute: files in, rows out."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from medclip_hf.cli.files import SetAside, scan_name, shown
from medclip_hf.cli.tables import Kind

Row = dict[str, Any]

IMAGE_EMBEDDING: dict[str, Kind] = {"file": "text", "embedding": "vector"}
CT_EMBEDDING: dict[str, Kind] = {"file": "text", "anatomy": "text", "embedding": "vector", "flags": "texts"}
IMAGE_SCORES: dict[str, Kind] = {
    "file": "text",
    "label": "text",
    "score": "number",
    "global_score": "number",
    "local_score": "number",
}
CT_SCORES: dict[str, Kind] = {
    "file": "text",
    "anatomy": "text",
    "finding": "text",
    "probability": "number",
    "window_start_dhw": "vector",
    "window_size_dhw": "vector",
    "flags": "texts",
}
ANNOTATIONS: dict[str, Kind] = {
    "file": "text",
    "rank": "integer",
    "label": "text",
    "cui": "text",
    "score": "number",
    "global_score": "number",
    "local_score": "number",
    "left": "integer",
    "top": "integer",
    "right": "integer",
    "bottom": "integer",
}


def embed_images(pipe: Any, paths: Sequence[Path], aside: SetAside, batch_size: int) -> Iterator[Row]:
    """One row a picture."""
    import torch

    pictures = aside.reading(shown(paths, len(paths), "image"), _picture)
    while batch := list(islice(pictures, batch_size)):
        pixel_values = pipe.processor(images=[image for _, image in batch])["pixel_values"].to(pipe.device)
        with torch.inference_mode():
            vectors = pipe.model(pixel_values=pixel_values).image_embeds.float().cpu().numpy()
        for (path, _), vector in zip(batch, vectors, strict=True):
            yield {"file": str(path), "embedding": vector}


def annotate_images(
    pipe: Any, paths: Sequence[Path], aside: SetAside, batch_size: int, **options: Any
) -> Iterator[Row]:
    """One row a concept of a picture, best first."""
    for path, entries in _run(pipe, paths, _picture, aside, batch_size, **options):
        for rank, entry in enumerate(entries, 1):
            box = entry["box"] or (None,) * 4
            numbers = {name: entry[name] for name in ("label", "cui", "score", "global_score", "local_score")}
            places = dict(zip(("left", "top", "right", "bottom"), box, strict=True))
            yield {"file": str(path), "rank": rank, **numbers, **places}


def classify_images(
    pipe: Any,
    paths: Sequence[Path],
    aside: SetAside,
    batch_size: int,
    labels: Sequence[str],
    templates: Sequence[str] | None,
    activation: Any,
) -> Iterator[Row]:
    """One row a label of a picture, by the published protocol."""
    from medclip_hf.evaluation.zero_shot import DEFAULT_TEMPLATES
    from medclip_hf.evaluation.zero_shot import classify_images as classify

    used: list[Path] = []

    def images() -> Iterator[Any]:
        for path, image in aside.reading(shown(paths, len(paths), "image"), _picture):
            used.append(path)
            yield image

    first = next(stream := images(), None)
    if first is None:
        return
    scores = classify(
        pipe.model,
        pipe.processor,
        _with_first(first, stream),
        list(labels),
        tuple(templates or DEFAULT_TEMPLATES),
        activation=activation,
        use_bias=activation == "sigmoid",
        batch_size=batch_size,
    )
    local = scores.local_scores
    for row, path in enumerate(used):
        for place, label in enumerate(labels):
            yield {
                "file": str(path),
                "label": label,
                "score": float(scores.mixed_scores[row, place]),
                "global_score": float(scores.global_scores[row, place]),
                "local_score": None if local is None else float(local[row, place]),
            }


def embed_scans(
    pipe: Any, paths: Sequence[Path], aside: SetAside, batch_size: int, reading: Mapping[str, Any]
) -> Iterator[Row]:
    """One row an anatomy of a scan; an anatomy that is not in it has no embedding."""
    for path, found in _run(pipe, paths, _prepared(pipe, reading), aside, batch_size):
        for name, window, vector, flags in zip(
            found["anatomies"], found["windows"], found["embeddings"], found["flags"], strict=True
        ):
            embedding = None if window is None else vector
            yield {"file": str(path), "anatomy": name, "embedding": embedding, "flags": flags}


def classify_scans(
    pipe: Any,
    paths: Sequence[Path],
    aside: SetAside,
    batch_size: int,
    reading: Mapping[str, Any],
    findings: Any,
) -> Iterator[Row]:
    """One row a finding of a scan."""
    for path, rows in _run(pipe, paths, _prepared(pipe, reading), aside, batch_size, findings=findings):
        for row in rows:
            window = row["window"] or {}
            places = {f"window_{name}": window.get(name) for name in ("start_dhw", "size_dhw")}
            names = ("anatomy", "finding", "probability", "flags")
            yield {"file": str(path), **{name: row[name] for name in names}, **places}


def masks_of(masks: Path | None) -> Any:
    """A function from a scan to its label file: the file itself, or <scan>.nii.gz in a folder; None without masks.

    Raises:
        ValueError: there is no such file or folder.
    """
    if masks is None:
        return lambda path: None
    if masks.is_dir():
        return lambda path: masks / f"{scan_name(path)}.nii.gz"
    if not masks.is_file():
        raise ValueError(f"--masks {masks} is no label file and no folder of them.")
    return lambda path: masks


def _prepared(pipe: Any, reading: Mapping[str, Any]) -> Any:
    """A function that reads a scan as the pipeline takes it."""
    find_mask = reading["find_mask"]
    options = {name: value for name, value in reading.items() if name != "find_mask" and value is not None}
    return lambda path: pipe.prepare(path, mask=find_mask(path), **options)


def _picture(path: Path) -> Any:
    from medclip_hf.pipelines.inputs import read_picture  # here, as it loads PyTorch

    return read_picture(path)


def _run(
    pipe: Any, paths: Sequence[Path], read: Any, aside: SetAside, batch_size: int, **options: Any
) -> Iterator[tuple[Path, Any]]:
    """(file, result) of every file that can be read, through the pipeline in batches."""
    waiting: deque[Path] = deque()

    def inputs() -> Iterator[Any]:
        for path, found in aside.reading(shown(paths, len(paths), "file"), read):
            waiting.append(path)
            yield found

    for result in pipe(inputs(), batch_size=batch_size, **options):
        yield waiting.popleft(), result


def _with_first(first: Any, rest: Iterable[Any]) -> Iterator[Any]:
    yield first
    yield from rest
