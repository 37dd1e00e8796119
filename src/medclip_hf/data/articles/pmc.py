"""Articles of PubMed Central as figure rows: licence, retraction, captions and pictures of their figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path, PurePosixPath
from typing import Any

from medclip_hf.data.articles.bucket import BucketStore
from medclip_hf.data.articles.jats import OTHER_LICENSE, Article, ArticleFigure, UnreadableArticle, parse_article
from medclip_hf.data.articles.panel_captions import split_caption
from medclip_hf.data.articles.panels import take_apart
from medclip_hf.data.articles.stores import (
    IMAGE_SUFFIXES,
    ArticleFiles,
    ArticleMetadata,
    ArticleRef,
    ArticleStore,
    FolderStore,
)
from medclip_hf.data.articles.tarballs import TarballStore
from medclip_hf.data.images import UnreadableImage
from medclip_hf.data.records import FigureRow
from medclip_hf.data.stages import Drop

LICENSES = (
    *("CC0", "public domain", "CC BY", "CC BY-SA", "CC BY-ND", "CC BY-NC", "CC BY-NC-SA", "CC BY-NC-ND"),
    *("TDM", OTHER_LICENSE),  # TDM: author manuscripts, for text mining
)


def open_store(kind: str, path: str) -> ArticleStore:
    """The place where articles lie.

    Args:
        kind: ``"folder"``, ``"s3"`` (the layout of the PMC bucket, at any address that fsspec knows) or ``"tarballs"``.
        path: folder or address.

    Raises:
        ValueError: unknown kind, or nothing at the path.
    """
    if kind == "folder":
        return FolderStore(Path(path))
    if kind == "tarballs":
        return TarballStore(Path(path))
    if kind == "s3":
        return BucketStore(path)
    raise ValueError(f"articles lie in a 'folder', in 's3' or in 'tarballs', not in {kind!r}")


class ArticleSource:
    """Figures of the articles of a store, as the MedConcept engine reads them.

    Args:
        store: where the articles lie.
        licenses: those to keep, spelled as in `LICENSES`; empty keeps every one, and articles that state none.
        keep_retracted: keep figures of retracted articles.
        split_panels: take compound figures apart where caption and picture agree on the panels.

    Raises:
        ValueError: where a licence is not spelled as in `LICENSES`.
    """

    def __init__(
        self,
        store: ArticleStore,
        *,
        licenses: Sequence[str] = (),
        keep_retracted: bool = False,
        split_panels: bool = True,
    ) -> None:
        unknown = [name for name in licenses if name not in LICENSES]
        if unknown:
            raise ValueError(f"unknown licences {', '.join(map(repr, unknown))}: choose among {', '.join(LICENSES)}")
        self.store = store
        self.licenses = frozenset(licenses)
        self.keep_retracted = keep_retracted
        self.split_panels = split_panels

    def list_items(self) -> Iterator[dict[str, Any]]:
        """All articles."""
        return map(asdict, self.store.list_articles())

    def read(self, item: dict[str, Any]) -> Iterator[FigureRow | Drop]:
        """The figures of an article with their pictures, or the reasons why there are none."""
        ref = ArticleRef(**item)
        try:
            files = self.store.read_article(ref, self._check)
            article = self._parse(ref, files)
        except (UnreadableArticle, UnreadableImage) as error:
            yield Drop(error.reason, error.detail, ref.name)
            return
        if not article.figures:
            yield Drop("article without figures", "", ref.name)
        for figure in article.figures:
            yield from self._read_figure(ref, article, figure, files)
        for name in _unmentioned(files, article):
            yield Drop("file belongs to no figure", name, f"{ref.name}/{name}")

    def _parse(self, ref: ArticleRef, files: ArticleFiles) -> Article:
        article = parse_article(files.xml, pmcid=ref.pmcid)
        known = files.metadata or ArticleMetadata()
        license_code = known.license or article.license
        if self.licenses and not license_code:
            raise UnreadableArticle("licence not kept", "none stated")
        self._check(ArticleMetadata(license_code, article.is_retracted))
        return article

    def _check(self, metadata: ArticleMetadata) -> None:
        """Refuses what is known not to be wanted, before it is fetched."""
        if metadata.is_retracted and not self.keep_retracted:
            raise UnreadableArticle("article retracted", "")
        if self.licenses and metadata.license and metadata.license not in self.licenses:
            raise UnreadableArticle("licence not kept", metadata.license)

    def _read_figure(
        self, ref: ArticleRef, article: Article, figure: ArticleFigure, files: ArticleFiles
    ) -> Iterator[FigureRow | Drop]:
        row_id = f"{ref.name}/{figure.figure_id}"
        if figure.license and self.licenses and figure.license not in self.licenses:
            yield Drop("licence of the figure not kept", figure.license, row_id)
            return
        if not figure.caption:
            yield Drop("caption empty", figure.label, row_id)
            return
        if not figure.graphics:
            yield Drop("figure without file", figure.label, row_id)
            return
        known = files.metadata or ArticleMetadata()
        row = FigureRow(
            row_id=row_id,
            caption=figure.caption,
            pmcid=article.pmcid,
            pmid=article.pmid or known.pmid,
            figure_id=figure.figure_id,
            license=figure.license or known.license or article.license,
            cited_in=figure.cited_in,
        )
        for part, name in self._one_row_a_file(row, figure.graphics):
            try:
                part = replace(part, image_bytes=files.open_graphic(name))
            except UnreadableImage as error:
                yield Drop(error.reason, error.detail, part.row_id)
                continue
            yield from take_apart(part) if self.split_panels and len(figure.graphics) == 1 else (part,)

    def _one_row_a_file(self, row: FigureRow, names: Sequence[str]) -> Iterator[tuple[FigureRow, str]]:
        """A row without its picture, and the name of that, for each file of a figure.

        Several files carry the parts of the caption where there are as many of these, else all of it.
        """
        parts = split_caption(row.caption) if self.split_panels else ()
        for number, name in enumerate(names):
            if len(names) == 1:
                yield row, name
            elif len(parts) == len(names):
                part = parts[number]
                yield replace(row, row_id=f"{row.row_id}.{part.letter}", caption=part.text, panel=part.letter), name
            else:
                yield replace(row, row_id=f"{row.row_id}.{number + 1}", is_compound=True), name


def _unmentioned(files: ArticleFiles, article: Article) -> list[str]:
    """Picture files of which the article says nothing, not even under another suffix (thumbnails, conversions)."""
    if files.open_graphic.are_shared:
        return []
    mentioned = {_stem(name) for name in article.file_names}
    pictures = (name for name in files.open_graphic.names if name.lower().endswith(IMAGE_SUFFIXES))
    return [name for name in pictures if _stem(name) not in mentioned]


def _stem(name: str) -> str:
    path = PurePosixPath(name.lower().replace("\\", "/"))
    return path.stem if path.suffix in (*IMAGE_SUFFIXES, ".eps", ".pdf", ".svg") else path.name
