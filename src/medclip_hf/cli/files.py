"""Which files a command works on, and which of them were set aside, with the reason."""

import csv
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

STANDARD_INPUT = "-"
_PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".dcm", ".dicom")
_VOLUME_ENDINGS = (".nii", ".nii.gz", ".npz")

Read = TypeVar("Read")


@dataclass
class SetAside:
    """Files that could not be used.

    Args:
        reasons: (file, reason).
        num_used: files that could.
    """

    reasons: list[tuple[str, str]] = field(default_factory=list)
    num_used: int = 0

    def reading(self, paths: Iterable[Path], read: Callable[[Path], Read]) -> Iterator[tuple[Path, Read]]:
        """Each file with what was read from it; those that cannot be read are noted and passed over."""
        for path in paths:
            try:
                found = read(path)
            except (ValueError, OSError) as error:
                self.add(path, error)
            else:
                self.num_used += 1
                yield path, found

    def add(self, path: Path, error: Exception) -> None:
        """Note a file and say so."""
        reason = " ".join((str(error) or type(error).__name__).split())
        self.reasons.append((str(path), reason))
        sys.stderr.write(f"set aside: {reason if str(path) in reason else f'{path}: {reason}'}\n")

    def write(self, path: Path) -> None:
        """A table of files and reasons; an old one goes where there are none."""
        if not self.reasons:
            path.unlink(missing_ok=True)
            return
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([("file", "reason"), *self.reasons])


def named_paths(names: Sequence[str]) -> list[Path]:
    """The paths of a command line; "-" stands for those on standard input, one a line.

    Raises:
        ValueError: there is none, or one does not exist.
    """
    listed: list[str] = []
    for name in names:
        if name == STANDARD_INPUT:
            listed += [line.rstrip("\r\n") for line in sys.stdin if line.strip()]
        else:
            listed.append(name)
    if not listed:
        raise ValueError("there is no file to work on: name files or folders, or '-' and give paths on standard input.")
    return [Path(name) for name in listed]


def pictures(paths: Iterable[Path]) -> Iterator[Path]:
    """Files that are named, and those in named folders, at any depth, that can be pictures.

    Raises:
        ValueError: a folder holds none.
    """
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        # A link to nowhere is set aside like any file that cannot be read.
        found = [file for file in sorted(path.rglob("*")) if not file.is_dir() and _is_picture(file)]
        if not found:
            raise ValueError(f"{path} holds no picture ({', '.join(_PICTURE_ENDINGS)}, or DICOM).")
        yield from found


def scans(paths: Iterable[Path]) -> Iterator[Path]:
    """Scans that are named, and those in named folders: NIfTI and npz files, and folders that hold DICOM files.

    Raises:
        ValueError: a folder holds none.
    """
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        found = list(_scans_in(path))
        if not found:
            raise ValueError(f"{path} holds no scan ({', '.join(_VOLUME_ENDINGS)}, or a folder of DICOM files).")
        yield from found


def scan_name(path: Path) -> str:
    """The name of a scan without the ending of its file."""
    name = path.name
    for ending in (".nii.gz", *_VOLUME_ENDINGS, ".dcm"):
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return name


def _scans_in(folder: Path) -> Iterator[Path]:
    entries = [entry for entry in sorted(folder.iterdir()) if not entry.name.startswith(".")]
    if any(entry.is_file() and _has_dicom_mark(entry) for entry in entries):
        yield folder
    for entry in entries:
        if entry.is_dir():
            if not folder.resolve().is_relative_to(entry.resolve()):  # a link back would list its scans again
                yield from _scans_in(entry)
        elif entry.name.lower().endswith(_VOLUME_ENDINGS):
            yield entry


def _is_picture(path: Path) -> bool:
    if path.name.startswith("."):
        return False
    return path.suffix.lower() in _PICTURE_ENDINGS or (path.suffix == "" and _has_dicom_mark(path))


def _has_dicom_mark(path: Path) -> bool:
    if not path.is_file():  # to open a pipe would wait for ever
        return False
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def shown(items: Iterable[Read], total: int, unit: str) -> Iterable[Read]:
    """The items with a progress bar on standard error, where a person can see it."""
    from tqdm import tqdm

    bar: Any = tqdm(items, total=total, unit=unit, disable=None, file=sys.stderr)
    return bar
