"""Where articles lie: small references that are listed once, each read into its XML, its pictures and its metadata."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple, Protocol

from medclip_hf.data.articles.jats import MAX_XML_BYTES, UnreadableArticle
from medclip_hf.data.images import UnreadableImage, path_inside, read_file

XML_SUFFIXES = (".xml", ".nxml")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".gif", ".webp", ".bmp", ".jp2")  # the best first
DRAWING_SUFFIXES = (".eps", ".ps", ".pdf", ".svg", ".ai", ".wmf", ".emf")


@dataclass(frozen=True)
class ArticleRef:
    """An article of a store, of plain values.

    Args:
        name: unique in the store; rows are named after it.
        location: where it lies, seen from the root of the store.
        pmcid: where the store knows it.
    """

    name: str
    location: str
    pmcid: str = ""


@dataclass(frozen=True)
class ArticleMetadata:
    """What the JSON file beside an article says, as the PMC bucket writes it; it goes before what the XML says.

    Args:
        license: its ``license_code``.
        is_retracted: its flag.
        pmid: digits.
    """

    license: str = ""
    is_retracted: bool = False
    pmid: str = ""

    @classmethod
    def from_json(cls, content: bytes) -> ArticleMetadata:
        """The metadata in a JSON file.

        Raises:
            UnreadableArticle: where it is no JSON object.
        """
        values = json_object(content)
        return cls(
            license=str(values.get("license_code") or ""),
            is_retracted=str(values.get("is_retracted")).lower() in ("true", "1", "yes"),
            pmid=str(values.get("pmid") or ""),
        )


def json_object(content: bytes) -> dict[str, Any]:
    """The object in a JSON file of an article.

    Raises:
        UnreadableArticle: where there is none.
    """
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UnreadableArticle("article metadata broken", str(error)[:200]) from error
    if not isinstance(values, dict):
        raise UnreadableArticle("article metadata broken", f"an object was expected, not {str(values)[:50]!r}")
    return values


class Graphics:
    """The picture files of one article; called with a name from its XML, it gives the bytes.

    Args:
        names: of the files that lie there.
        read: gives the bytes of one of them.
        are_shared: whether files of other articles lie among them.
    """

    def __init__(self, names: Iterable[str], read: Callable[[str], bytes], are_shared: bool = False) -> None:
        self.names = tuple(names)
        self.are_shared = are_shared
        self._read = read
        self._by_lower = {name.lower(): name for name in reversed(self.names)}

    def __call__(self, name: str) -> bytes:
        """The bytes of the file that an article calls `name`.

        Raises:
            UnreadableImage: where there is no such file, or it cannot be read.
        """
        return self._read(self.file_of(name))

    def file_of(self, name: str) -> str:
        """The file that is meant: articles leave out suffixes, and name formats that were converted since.

        Raises:
            UnreadableImage: where there is none, or the name leaves the folder of the article.
        """
        if ".." in PureWindowsPath(name).parts or PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor:
            raise UnreadableImage("image path outside its folder", f"{name[:200]!r}")
        files = self._by_lower
        wanted = PureWindowsPath(name).name.lower()
        stem, suffix = _split_suffix(wanted)
        exact = [] if suffix in DRAWING_SUFFIXES else [name.lower(), wanted]
        converted = [stem + other for other in IMAGE_SUFFIXES] + [wanted + other for other in IMAGE_SUFFIXES]
        for candidate in (*exact, *converted, wanted):
            if candidate in files:
                return files[candidate]
        drawings = [stem + other for other in DRAWING_SUFFIXES if stem + other in files]
        if drawings:
            return files[drawings[0]]
        raise UnreadableImage("image missing", f"{name[:200]!r} is not among {len(self.names)} files")


class ArticleFiles(NamedTuple):
    """An article: its XML, its pictures, and its metadata where the store has them."""

    xml: bytes
    open_graphic: Graphics
    metadata: ArticleMetadata | None = None


KeepArticle = Callable[[ArticleMetadata], None]


class ArticleStore(Protocol):
    """What the engine asks of a place where articles lie."""

    def list_articles(self) -> Iterator[ArticleRef]:
        """All articles, in an order that does not change while the engine runs."""

    def read_article(self, ref: ArticleRef, check: KeepArticle | None = None) -> ArticleFiles:
        """One article.

        Args:
            ref: from `list_articles`.
            check: called with the metadata before anything else is read; raises `UnreadableArticle` where the article
                is not wanted.

        Raises:
            UnreadableArticle: where it cannot be read, or is not wanted.
        """


class FolderStore:
    """Articles in a local folder: one folder an article, as PMC lays them out today and in its older packages.

    An article is an XML file with its pictures beside it, at any depth. In a folder that holds ``<folder>.xml`` or
    an ``.nxml`` file, other XML files are supplements. Symbolic links to folders are not followed.

    Args:
        folder: the root.

    Raises:
        ValueError: where there is no such folder.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ValueError(f"no folder {folder}: name the folder that holds the articles")
        self.folder = folder

    def list_articles(self) -> Iterator[ArticleRef]:
        """All articles below the folder, by path."""
        for parent, folders, files in os.walk(self.folder):
            folders.sort()
            place = Path(parent).relative_to(self.folder)
            for file in _article_files(place.name or self.folder.name, files):
                path = PurePosixPath(place.as_posix()) / file
                name = path.as_posix() if path.stem in folders else _name_of(path)
                yield ArticleRef(name, path.as_posix(), pmcid_in(path.as_posix()))

    def read_article(self, ref: ArticleRef, check: KeepArticle | None = None) -> ArticleFiles:
        """One article."""
        xml_path = path_inside(self.folder, ref.location)
        metadata = self._metadata(xml_path.with_suffix(".json"))
        if check and metadata:
            check(metadata)
        place = xml_path.parent
        try:
            content = read_file(xml_path, MAX_XML_BYTES)
            names = sorted(entry.name for entry in os.scandir(place) if not entry.is_dir())
        except UnreadableImage as error:
            raise UnreadableArticle(error.reason.replace("image", "XML", 1), error.detail) from error
        except OSError as error:
            raise UnreadableArticle("folder unreadable", f"{place}: {error.strerror}") from error
        are_shared = place.name != xml_path.stem and sum(name.lower().endswith(XML_SUFFIXES) for name in names) > 1
        graphics = Graphics(names, lambda name: read_file(path_inside(place, name)), are_shared)
        return ArticleFiles(content, graphics, metadata)

    def _metadata(self, path: Path) -> ArticleMetadata | None:
        if not path.is_file():
            return None
        try:
            return ArticleMetadata.from_json(read_file(path, 2**20))
        except UnreadableImage as error:
            raise UnreadableArticle("article metadata broken", error.detail) from error


def pmcid_in(path: str) -> str:
    """The last PMC number that a path names; "" where there is none."""
    found = re.findall(r"PMC\d+", path)
    return found[-1] if found else ""


def _article_files(folder: str, files: list[str]) -> list[str]:
    articles = sorted(file for file in files if file.lower().endswith(XML_SUFFIXES) and not file.startswith("."))
    if f"{folder}.xml" in articles:
        return [f"{folder}.xml"]
    return [file for file in articles if file.lower().endswith(".nxml")] or articles


def _name_of(path: PurePosixPath) -> str:
    """The folder where it is named like the file (as in the bucket), else the path; neither has the suffix."""
    return (path.parent if path.parent.name == path.stem else path.with_suffix("")).as_posix()


def _split_suffix(name: str) -> tuple[str, str]:
    suffix = PurePosixPath(name).suffix
    return (name.removesuffix(suffix), suffix) if suffix in (*IMAGE_SUFFIXES, *DRAWING_SUFFIXES) else (name, "")
