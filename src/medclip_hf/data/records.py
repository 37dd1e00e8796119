"""One dataclass per kind of row that the data engines write and the trainers read."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ConceptMention:
    """A concept of a vocabulary (UMLS by default) at one place of a caption.

    `caption[start_char:end_char]` is the mention: characters of the raw caption, end exclusive.
    """

    cui: str
    name: str
    start_char: int
    end_char: int
    similarity: float = 1.0  # of mention and vocabulary entry, in [0, 1]
    semantic_type: str = ""
    is_negated: bool = False  # "no pneumothorax"
    is_uncertain: bool = False  # "possible pneumothorax"


@dataclass(frozen=True)
class FigureRow:
    """A figure with its caption and the concepts of the caption: one row of ConceptCLIP's training set.

    Exactly one of `image_path` (relative to the folder of the data set) and `image_bytes` (an encoded file) is given.
    """

    row_id: str  # unique in the data set
    caption: str
    concepts: tuple[ConceptMention, ...] = ()
    image_path: str | None = None
    image_bytes: bytes | None = field(default=None, repr=False)
    pmcid: str = ""
    pmid: str = ""
    figure_id: str = ""
    license: str = ""
    modality: str = ""
    panel: str = ""  # letter of the panel, where a compound figure was taken apart
    is_compound: bool = False  # several panels in one picture that could not be told apart
    cited_in: tuple[str, ...] = ()  # titles of the sections that cite the figure


@dataclass(frozen=True)
class AnatomyText:
    """What a report says of one anatomy; both texts empty where it is silent."""

    anatomy: str
    findings: str
    impression: str
    is_abnormal: bool


@dataclass(frozen=True)
class ScanRow:
    """A CT volume in the array store with what its report says of each anatomy: one row of fVLM's training set."""

    scan_id: str  # unique: one reconstruction
    study_id: str
    patient_id: str  # pseudonymous
    store_path: str  # relative to the folder of the data set
    shape_dhw: tuple[int, int, int]  # voxels
    spacing_mm_dhw: tuple[float, float, float]
    anatomies_present: tuple[str, ...]  # those with at least one voxel
    anatomy_texts: tuple[AnatomyText, ...] = ()
    labels: tuple[tuple[str, bool], ...] = ()  # (finding, present), where the source has them
