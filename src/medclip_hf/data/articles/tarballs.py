"""Articles in the older `oa_package` archives of PMC: one gzipped tarball an article, never unpacked to disk."""

from __future__ import annotations

import gzip
import os
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from medclip_hf.data.articles.jats import MAX_XML_BYTES, UnreadableArticle
from medclip_hf.data.articles.stores import (
    IMAGE_SUFFIXES,
    XML_SUFFIXES,
    ArticleFiles,
    ArticleRef,
    Graphics,
    KeepArticle,
    pmcid_in,
)
from medclip_hf.data.images import MAX_FILE_BYTES, UnreadableImage, path_inside

TARBALL_SUFFIXES = (".tar.gz", ".tgz")
MAX_UNPACKED_BYTES = 2 * 2**30  # videos and tables among them, which are passed over
MAX_HELD_BYTES = 512 * 2**20  # of the XML and the pictures of one article
_MEMBERS = 100_000

# What a member that is no regular file is called in the reason to drop it.
_REFUSED = "image is a link or a device"


class TarballStore:
    """Articles in tarballs below a folder, at any depth.

    Members are read into memory one article at a time. Links and devices are never followed, and where a member says
    it lies does not matter: only the last part of its name counts.

    Args:
        folder: the root.

    Raises:
        ValueError: where there is no such folder.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ValueError(f"no folder {folder}: name the folder that holds the tarballs")
        self.folder = folder

    def list_articles(self) -> Iterator[ArticleRef]:
        """All tarballs below the folder, by path."""
        for parent, folders, files in os.walk(self.folder):
            folders.sort()
            for file in sorted(file for file in files if file.lower().endswith(TARBALL_SUFFIXES)):
                path = (Path(parent) / file).relative_to(self.folder).as_posix()
                name = path[: -len(".tgz")] if path.lower().endswith(".tgz") else path[: -len(".tar.gz")]
                yield ArticleRef(name, path, pmcid_in(path))

    def read_article(self, ref: ArticleRef, check: KeepArticle | None = None) -> ArticleFiles:
        """One article; a tarball has no metadata to check before it is read."""
        path = path_inside(self.folder, ref.location)
        try:
            with gzip.open(path, "rb") as stream:
                package = _read_package(_Limited(stream))
        except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error, ValueError, OSError) as error:
            if isinstance(error, UnreadableArticle):
                raise
            raise UnreadableArticle("tarball broken", f"{path}: {error}") from error
        articles = sorted(name for name in package if name.lower().endswith(XML_SUFFIXES))
        nxml = [name for name in articles if name.lower().endswith(".nxml")]
        if not articles:
            raise UnreadableArticle("tarball without article", f"{path} holds no XML")
        content = package.pop((nxml or articles)[0])
        if content is None:
            raise UnreadableArticle("XML is a link or a device", str(path))
        return ArticleFiles(content, Graphics(package, lambda name: _picture(package, name)))


class _Limited:
    """A stream that stops a bomb: reading more than the limit is an error."""

    def __init__(self, stream: BinaryIO | gzip.GzipFile) -> None:
        self.stream = stream
        self.num_bytes = 0

    def read(self, size: int) -> bytes:
        content = self.stream.read(size)
        self.num_bytes += len(content)
        if self.num_bytes > MAX_UNPACKED_BYTES:
            raise UnreadableArticle("tarball too large", f"more than {MAX_UNPACKED_BYTES:,} bytes unpacked")
        return content


def _read_package(stream: _Limited) -> dict[str, bytes | None]:
    """XML and pictures by the last part of their names; None for what is no regular file, or too large."""
    package: dict[str, bytes | None] = {}
    num_held = 0
    with tarfile.open(fileobj=stream, mode="r|") as tarball:  # type: ignore[call-overload]
        for number, member in enumerate(tarball):
            tarball.members = []  # the stream would remember every member
            name = PurePosixPath(member.name.replace("\\", "/")).name
            if number >= _MEMBERS:
                raise UnreadableArticle("tarball too large", f"more than {_MEMBERS:,} members")
            if member.isdir() or name in package or not name.lower().endswith((*XML_SUFFIXES, *IMAGE_SUFFIXES)):
                continue
            limit = MAX_XML_BYTES if name.lower().endswith(XML_SUFFIXES) else MAX_FILE_BYTES
            file = tarball.extractfile(member) if member.isreg() and member.size <= limit else None
            package[name] = content = file.read() if file else None
            num_held += len(content or b"")
            if num_held > MAX_HELD_BYTES:
                raise UnreadableArticle("tarball too large", f"more than {MAX_HELD_BYTES:,} bytes of pictures")
    return package


def _picture(package: dict[str, bytes | None], name: str) -> bytes:
    content = package[name]
    if content is None:
        raise UnreadableImage(_REFUSED, f"{name}, or too large")
    if not content:
        raise UnreadableImage("image file empty", f"{name} has 0 bytes")
    return content
