"""What the page keeps of a visitor, in memory, and how it goes; which uploads are refused, and in what words."""

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from medclip_hf.data.images import UnreadableImage, decode_image, open_image, read_file
from medclip_hf.pipelines.inputs import read_picture
from medclip_hf.processing.conceptclip import to_rgb

MAX_PICTURE_BYTES = 64 * 2**20
MAX_SIDE = 2048  # pixels that are kept: several times what a model sees, and 12 MB of memory at most
MAX_VOXELS = 2**28  # 1024 slices of 512 × 512
MAX_IDLE_S = 3600.0
_SWEEP_EVERY_S = 60.0
GONE = "Nothing is here any more: what was scored is forgotten when the connection is lost. Please score it again."
NIFTI_ENDINGS = (".nii", ".nii.gz")
_ZIP, _GZIP, _DICOM_MARK, _DICOM_PREAMBLE = b"PK", b"\x1f\x8b", b"DICM", 128


class Visitor(Protocol):
    """Who asks: a request of Gradio."""

    session_hash: str | None


@dataclass
class Session:
    """One open page.

    Args:
        values: whatever the tabs keep, by their names.
        files: uploads of the visitor that are still on disk.
        last_seen: of `time.monotonic`.
    """

    values: dict[str, Any] = field(default_factory=dict)
    files: set[Path] = field(default_factory=set)
    last_seen: float = 0.0


class Sessions:
    """All open pages; what belongs to one goes when its tab is closed, or after an hour without a word.

    Args:
        folder: where uploads arrive; nothing outside of it is ever removed.
        max_bytes: of an upload.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder.resolve(), max_bytes
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()

    @property
    def max_picture_mb(self) -> int:
        """Of an upload that is a picture."""
        return min(self.max_bytes, MAX_PICTURE_BYTES) >> 20

    def of(self, visitor: Visitor) -> Session:
        """What is kept of the visitor who asks."""
        now = time.monotonic()
        with self._lock:
            self._forget_idle(now)
            session = self._sessions.setdefault(str(visitor.session_hash), Session())
            session.last_seen = now
            return session

    def forget_idle_ones(self) -> None:
        """Forget, from now on and in a thread of its own, every session that was silent for an hour."""

        def sweep() -> None:
            while True:
                time.sleep(_SWEEP_EVERY_S)
                with self._lock:
                    self._forget_idle(time.monotonic())

        threading.Thread(target=sweep, daemon=True).start()

    def end(self, visitor: Visitor) -> None:
        """Forget a visitor: memory and files."""
        with self._lock:
            self._forget(str(visitor.session_hash))

    def received(self, visitor: Visitor, upload: str | None) -> Path | None:
        """The path of an upload, which from now on goes with its session."""
        if not upload:
            return None
        path = Path(upload)
        self.of(visitor).files.add(path)
        return path

    def _forget_idle(self, now: float) -> None:
        for name in [name for name, one in self._sessions.items() if now - one.last_seen > MAX_IDLE_S]:
            self._forget(name)

    def _forget(self, name: str) -> None:
        ended = self._sessions.pop(name, None)
        if ended is None:
            return
        # Equal files of two visitors are one file on disk.
        held = {path for session in self._sessions.values() for path in session.files}
        for path in ended.files - held:
            if path.resolve().is_relative_to(self.folder):
                path.unlink(missing_ok=True)


def read_upload(path: Path) -> Image.Image:
    """The picture of an upload as RGB, upright, its longer side at most `MAX_SIDE`.

    Raises:
        ValueError: in a sentence, without the server's path.
    """
    head = _head(path)
    try:
        if path.stat().st_size > MAX_PICTURE_BYTES:
            raise ValueError(
                f"{path.name} has {path.stat().st_size / 2**20:.0f} MB; pictures may have "
                f"{MAX_PICTURE_BYTES >> 20} MB. Scale it down first."
            )
        if head.startswith(_ZIP):
            raise ValueError(f"{path.name} is a zip archive, and archives are not opened. Upload the picture itself.")
        if path.name.lower().endswith(NIFTI_ENDINGS):
            raise ValueError(f"{path.name} is a volume. Upload it in the tab “CT scan”.")
        if head[_DICOM_PREAMBLE:] == _DICOM_MARK:
            return _kept(read_picture(path))
        # Only decoders without an interpreter behind them.
        return _kept(decode_image(open_image(read_file(path, MAX_PICTURE_BYTES), path.name), path.name))
    except UnreadableImage as error:
        raise ValueError(
            f"{path.name} cannot be read as a picture: {error.reason}. Upload a PNG, JPEG, TIFF, BMP, WebP or "
            "DICOM file."
        ) from error
    except (OSError, ValueError) as error:
        raise ValueError(in_a_sentence(error, path)) from error


def _kept(image: Any) -> Image.Image:
    picture = to_rgb(image)
    picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.BICUBIC)
    return picture


def check_volume(path: Path) -> None:
    """Refuse what is no NIfTI volume, or one too large, from its name and header alone.

    Raises:
        ValueError: in a sentence, without the server's path.
    """
    head = _head(path)
    if head.startswith(_ZIP):
        raise ValueError(f"{path.name} is a zip archive, and archives are not opened. Upload the .nii or .nii.gz file.")
    if head[_DICOM_PREAMBLE:] == _DICOM_MARK:
        raise ValueError(
            f"{path.name} is one DICOM file. Convert the series to NIfTI (dcm2niix), or score its folder with "
            "`medclip-hf classify`."
        )
    if not path.name.lower().endswith(NIFTI_ENDINGS):
        raise ValueError(f"{path.name} is no NIfTI file: its name must end with .nii or .nii.gz.")
    if path.name.lower().endswith(".gz") != head.startswith(_GZIP):
        raise ValueError(f"{path.name} is damaged or misnamed: .nii.gz is compressed, .nii is not.")
    import nibabel

    try:
        image: Any = nibabel.load(path)
        shape = tuple(int(size) for size in image.shape)
    except Exception as error:  # hostile headers raise any type; each is the file's fault
        raise ValueError(f"{path.name} cannot be read as NIfTI. Is it truncated? Copy it again.") from error
    voxels = 1
    for size in shape:
        voxels *= size
    if voxels > MAX_VOXELS:
        shown = " × ".join(map(str, shape))
        raise ValueError(f"{path.name} has {shown} voxels; at most {MAX_VOXELS / 1e6:.0f} million are read here.")


def in_a_sentence(error: BaseException, *paths: Path | None) -> str:
    """The first line of an error with the names of files in place of the server's paths."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    for path in paths:
        if path is not None:
            text = text.replace(str(path), path.name)
    return text


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_DICOM_PREAMBLE + len(_DICOM_MARK))
    except OSError as error:
        raise ValueError(f"{path.name} is not there any more. Upload it again.") from error
