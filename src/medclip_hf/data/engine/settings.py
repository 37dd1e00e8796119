"""What a run of the MedConcept engine is asked to do: one dataclass for each section of its recipe."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from medclip_hf.data.engine.dedup import DuplicateRules
from medclip_hf.data.engine.figure_type import FigureRules
from medclip_hf.data.images import MAX_PIXELS


@dataclass(frozen=True)
class SourceSettings:
    """Where figures come from.

    Args:
        kind: ``"folder"``: one folder an article; ``"s3"``: the layout of the PMC open-access bucket through fsspec;
            ``"tarballs"``: the older `oa_package` archives; ``"table"``: CSV, JSON lines or Parquet with an image and a
            caption a line.
        path: folder, bucket or file.
        images: folder that the image paths of a table start from; the folder of the table by default.
        licenses: those to keep, as `data.articles.pmc` spells them; empty keeps every licence.
        keep_retracted: keep figures of retracted articles.
        split_panels: take compound figures apart where caption and picture agree on the panels.
        items_per_unit: articles or table rows that are worked on, and lost by an interruption, together.
        reads_at_once: articles a worker reads at the same time; more than 1 hides the latency of a network.
        limit: stop after so many items; None takes all.
    """

    kind: Literal["folder", "s3", "tarballs", "table"]
    path: str
    images: str = ""
    licenses: tuple[str, ...] = ()
    keep_retracted: bool = False
    split_panels: bool = True
    items_per_unit: int = 200
    reads_at_once: int = 1
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.items_per_unit < 1 or self.reads_at_once < 1:
            raise ValueError(
                f"items_per_unit and reads_at_once must be at least 1, got {self.items_per_unit} and "
                f"{self.reads_at_once}"
            )


@dataclass(frozen=True)
class ImageRules:
    """Which images are good enough.

    Args:
        min_side: pixels of the shorter side.
        max_aspect: longer over shorter side.
        max_pixels: width × height; larger ones are refused before they are decoded.
        max_side: pixels of the longer side that are kept; larger images are reduced. None keeps every file as it is.
    """

    min_side: int = 64
    max_aspect: float = 6.0
    max_pixels: int = MAX_PIXELS
    max_side: int | None = None


@dataclass(frozen=True)
class CaptionRules:
    """Which captions are fit for training; see `data.engine.language`."""

    language: str = "English"
    min_words: int = 3
    max_chars: int = 10_000


@dataclass(frozen=True)
class DecontaminationSettings:
    """Which pictures must not be trained on.

    Args:
        folders: of evaluation images, searched with their subfolders; image files and Parquet files with an `image`
            column.
        min_cosine: of the model's embeddings from which on a picture counts as the same, where `model` names one.
    """

    folders: tuple[str, ...] = ()
    min_cosine: float = 0.97


@dataclass(frozen=True)
class ModelSettings:
    """An optional CLIP-like model that tells medical images from others, and their modality.

    Args:
        path: folder or Hub name of a model of `transformers` with image and text features; "" uses none.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``.
        batch_size: images at once.
    """

    path: str = ""
    device: str = "auto"
    batch_size: int = 64


@dataclass(frozen=True)
class ConceptSettings:
    """How concepts are found; see `data.concepts.extraction`.

    Args:
        vocabulary: ``"shipped"``, a JSON lines file, or a saved index; "" looks for no concepts.
        min_similarity: of a mention and the name that it is linked to.
        semantic_types: those to keep; empty keeps all.
        similar_spelling: also link words to names of similar spelling; with millions of names much the slower part.
        pipeline: a spaCy pipeline whose entities are mentions too, such as en_core_sci_sm; "" uses none.
        scispacy_index: folder with scispaCy's approximate index, asked for similar names in place of our exact search.
        entailment_model: of `transformers`, asks whether a concept is central to the caption; "" asks nothing.
        min_entailment: probability from which on it is.
        needs_concepts: drop figures in whose caption no concept was found.
    """

    vocabulary: str = "shipped"
    min_similarity: float = 0.8
    semantic_types: tuple[str, ...] = ()
    similar_spelling: bool = True
    pipeline: str = ""
    scispacy_index: str = ""
    entailment_model: str = ""
    min_entailment: float = 0.5
    needs_concepts: bool = False


@dataclass(frozen=True)
class SplitSettings:
    """What is held out: whole articles, the same share of every modality.

    Args:
        validation_share: of the figures.
        test_share: of the figures.
        seed: of the choice.
    """

    validation_share: float = 0.01
    test_share: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.validation_share, self.test_share) < 0 or self.validation_share + self.test_share >= 1:
            raise ValueError(
                "validation_share and test_share must be at least 0 and together below 1, got "
                f"{self.validation_share} and {self.test_share}"
            )


@dataclass(frozen=True)
class OutputSettings:
    """What is written where.

    Args:
        folder: of the data set; an interrupted run is continued there.
        rows_per_shard: of the Parquet files.
        keep_work: keep the intermediate files, which take about the disk of the data set again.
        title: of the data card.
    """

    folder: str
    rows_per_shard: int = 10_000
    keep_work: bool = False
    title: str = "Medical figures with captions and concepts"

    def __post_init__(self) -> None:
        if self.rows_per_shard < 1:
            raise ValueError(f"rows_per_shard must be at least 1, got {self.rows_per_shard}")


@dataclass(frozen=True)
class EngineSettings:
    """All sections of a recipe."""

    source: SourceSettings
    output: OutputSettings
    images: ImageRules = field(default_factory=ImageRules)
    captions: CaptionRules = field(default_factory=CaptionRules)
    duplicates: DuplicateRules = field(default_factory=DuplicateRules)
    decontamination: DecontaminationSettings = field(default_factory=DecontaminationSettings)
    figures: FigureRules = field(default_factory=FigureRules)
    model: ModelSettings = field(default_factory=ModelSettings)
    concepts: ConceptSettings = field(default_factory=ConceptSettings)
    splits: SplitSettings = field(default_factory=SplitSettings)

    def __post_init__(self) -> None:
        if self.figures.keep == "medical" and not self.model.path:
            raise ValueError(
                "figures.keep = 'medical' needs model.path, a CLIP-like model: without one only drawings can be told "
                "from pictures. Name a model or choose 'pictures'."
            )

    @property
    def folder(self) -> Path:
        """Where the data set lies."""
        return Path(self.output.folder)

    def identity(self) -> dict[str, Any]:
        """The settings that decide the content of the data set: what a continued run must agree in."""
        values = asdict(self)
        del values["output"]["folder"], values["output"]["keep_work"], values["source"]["reads_at_once"]
        del values["model"]["device"], values["model"]["batch_size"], values["duplicates"]["max_rows_in_memory"]
        return json.loads(json.dumps(values))

    def published(self) -> dict[str, Any]:
        """`identity` for everybody to read: names of files and folders in place of their paths on this disk."""
        return {section: _without_paths(values) for section, values in self.identity().items()}


SECTIONS: dict[str, type] = {
    "source": SourceSettings,
    "output": OutputSettings,
    "images": ImageRules,
    "captions": CaptionRules,
    "duplicates": DuplicateRules,
    "decontamination": DecontaminationSettings,
    "figures": FigureRules,
    "model": ModelSettings,
    "concepts": ConceptSettings,
    "splits": SplitSettings,
}


def short_digest(text: str) -> int:
    """64 bits of a digest: the same on every machine, unlike `hash`."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "little")


def _without_paths(value: Any) -> Any:
    """The last part of every path: folders of a private machine are nobody's business."""
    if isinstance(value, dict):
        return {key: _without_paths(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_paths(part) for part in value]
    return Path(value).name if isinstance(value, str) and "/" in value and "://" not in value else value
