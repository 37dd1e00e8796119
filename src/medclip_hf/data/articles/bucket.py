"""Articles in the bucket of PMC, laid out as since 2026, through fsspec: only what the licence filter keeps is fetched.

    metadata/PMC13901.1.json                                   licence, retraction, addresses with their MD5
    PMC13901.1/PMC13901.1.xml, PMC13901.1/some-figure.jpg      one folder for each version of an article
    inventory-reports/pmc-oa-opendata/metadata/<day>/manifest.json     names the gzipped CSV files of the inventory

Source: README.txt of the bucket ``pmc-oa-opendata``, read in 2026.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import logging
import random
import re
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

import fsspec
import numpy as np

from medclip_hf.data.articles.jats import MAX_XML_BYTES, UnreadableArticle
from medclip_hf.data.articles.stores import (
    ArticleFiles,
    ArticleMetadata,
    ArticleRef,
    Graphics,
    KeepArticle,
    json_object,
)
from medclip_hf.data.images import MAX_FILE_BYTES, UnreadableImage

logger = logging.getLogger(__name__)

INVENTORY = "inventory-reports/pmc-oa-opendata/metadata"
_DAY = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}-\d{2}Z")
_METADATA_KEY = re.compile(r"metadata/PMC(\d{1,12})\.(\d{1,4})\.json")
_ARTICLE = re.compile(r"PMC\d{1,12}\.\d{1,4}")
_MAX_METADATA_BYTES = 4 * 2**20
_MAX_VERSIONS = 10_000

Result = TypeVar("Result")


@dataclass(frozen=True)
class RetryRules:
    """How often a request is repeated that failed for a reason that may pass: throttling, a cut line, half a body.

    Args:
        attempts: in all.
        first_wait_s: before the second one; each later wait is twice as long, and shortened by up to half at random.
        max_wait_s: of one wait.
    """

    attempts: int = 7
    first_wait_s: float = 0.5
    max_wait_s: float = 30.0

    def wait_s(self, attempt: int) -> float:
        """Seconds to wait after the failure of the given attempt, from 0."""
        return min(self.max_wait_s, self.first_wait_s * 2**attempt) * random.uniform(0.5, 1.0)


class BucketStore:
    """The newest version of every article in the bucket, or in a copy of it.

    Args:
        address: of the root, ``"s3://pmc-oa-opendata"`` (needs the package s3fs; nobody signs in) or any that fsspec
            knows.
        retry: of requests.

    Raises:
        ValueError: where fsspec cannot open the address.
    """

    def __init__(self, address: str, retry: RetryRules | None = None) -> None:
        self.address = address
        self.retry = retry or RetryRules()
        try:
            options = {"anon": True} if address.startswith("s3://") else {}
            self.files, root = fsspec.core.url_to_fs(address, **options)
        except ImportError as error:
            raise ValueError(
                f"{address} needs a package: pip install s3fs (or that of your protocol): {error}"
            ) from error
        except ValueError as error:
            raise ValueError(f"fsspec cannot open {address}: {error}") from error
        self.root = root.rstrip("/")

    def list_articles(self) -> Iterator[ArticleRef]:
        """The newest version of each article in the newest inventory, by number.

        Raises:
            ValueError: where there is no inventory, or it is broken.
        """
        articles, versions = array("q"), array("q")
        for key in self._inventory_keys():
            if match := _METADATA_KEY.fullmatch(key):
                articles.append(int(match[1]))
                versions.append(int(match[2]))
        # One number an article and version, 8 million of them in some hundred megabytes.
        both = np.sort(np.array(articles, np.int64) * _MAX_VERSIONS + np.array(versions, np.int64))
        is_newest = np.append(both[1:] // _MAX_VERSIONS != both[:-1] // _MAX_VERSIONS, True)[: len(both)]
        for number in both[is_newest]:
            pmcid = f"PMC{number // _MAX_VERSIONS}"
            name = f"{pmcid}.{number % _MAX_VERSIONS}"
            yield ArticleRef(name, name, pmcid)

    def read_article(self, ref: ArticleRef, check: KeepArticle | None = None) -> ArticleFiles:
        """One article: its metadata first, then its XML where `check` lets it pass, each picture when it is opened."""
        name = ref.location
        if not _ARTICLE.fullmatch(name):
            raise UnreadableArticle("article name unknown", f"{name[:100]!r} is not like PMC13901.1")
        content = self._article_file(f"metadata/{name}.json", "", _MAX_METADATA_BYTES)
        values, metadata = json_object(content), ArticleMetadata.from_json(content)
        if check:
            check(metadata)
        try:
            media = dict(_file_and_md5(str(address), name) for address in values.get("media_urls") or ())
            _, xml_md5 = _file_and_md5(str(values.get("xml_url") or ""), name)
        except (TypeError, ValueError) as error:
            raise UnreadableArticle("article metadata broken", f"{name}: {error}") from error
        xml = self._article_file(f"{name}/{name}.xml", xml_md5, MAX_XML_BYTES)
        media.pop("", None)
        return ArticleFiles(xml, Graphics(media, lambda file: self._picture(f"{name}/{file}", media[file])), metadata)

    # --- requests ----------------------------------------------------------------------------------------------------

    def _article_file(self, key: str, md5: str, max_bytes: int) -> bytes:
        try:
            return self._fetch(key, md5, max_bytes)
        except FileNotFoundError as error:
            raise UnreadableArticle("article missing", key) from error
        except OSError as error:
            raise UnreadableArticle("article not fetched", f"{key}: {error}") from error

    def _picture(self, key: str, md5: str) -> bytes:
        try:
            content = self._fetch(key, md5, MAX_FILE_BYTES)
        except FileNotFoundError as error:
            raise UnreadableImage("image missing", key) from error
        except OSError as error:
            raise UnreadableImage("image not fetched", f"{key}: {error}") from error
        if not content:
            raise UnreadableImage("image file empty", f"{key} has 0 bytes")
        return content

    def _fetch(self, key: str, md5: str, max_bytes: int) -> bytes:
        """A whole object, compared with its digest where that is known."""
        return self._patiently(lambda: self._fetch_once(key, md5, max_bytes), key)

    def _fetch_once(self, key: str, md5: str, max_bytes: int) -> bytes:
        # One byte more than allowed tells that there is more: the size need not be asked for.
        content = self.files.cat_file(f"{self.root}/{key}", start=0, end=max_bytes + 1)
        if len(content) > max_bytes:
            raise _Hopeless(f"more than {max_bytes:,} bytes")
        if md5 and hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
            raise OSError(f"its {len(content):,} bytes differ from the digest of the metadata")
        if key.endswith(".json"):  # these have no digest; half a body is no JSON
            json.loads(content)
        return content

    def _patiently(self, request: Callable[[], Result], what: str) -> Result:
        for attempt in range(self.retry.attempts):
            try:
                return request()
            except (FileNotFoundError, PermissionError, _Hopeless):
                raise
            except Exception as error:  # the libraries behind fsspec raise types of their own for throttling
                if attempt + 1 == self.retry.attempts:
                    raise OSError(f"{self.retry.attempts} attempts failed, the last with {error!r}"[:500]) from error
                wait_s = self.retry.wait_s(attempt)
                logger.debug("%s: %r; trying again in %.1f s", what, error, wait_s)
                time.sleep(wait_s)
        raise AssertionError("a rule of no attempts")

    # --- the inventory ------------------------------------------------------------------------------------------

    def _inventory_keys(self) -> Iterator[str]:
        for path in self._inventory_files():
            yield from self._keys_of(path)

    def _inventory_files(self) -> list[str]:
        folder = f"{self.root}/{INVENTORY}"
        try:
            entries = self._patiently(lambda: self.files.ls(folder, detail=False), folder)
            days = sorted(
                entry.rstrip("/") for entry in entries if _DAY.fullmatch(entry.rstrip("/").rpartition("/")[2])
            )
            if not days:
                raise FileNotFoundError(folder)
            newest = days[-1].rpartition("/")[2]
            manifest = json.loads(self._fetch(f"{INVENTORY}/{newest}/manifest.json", "", _MAX_METADATA_BYTES))
            return [str(file["key"]) for file in manifest["files"]]
        except OSError as error:
            raise ValueError(f"{self.address} has no inventory below {INVENTORY}: {error}") from error
        except (KeyError, TypeError) as error:
            raise ValueError(f"the inventory of {self.address} of {newest} is broken: {error!r}") from error

    def _keys_of(self, path: str) -> Iterator[str]:
        """Keys of one gzipped CSV file (bucket, key, date, digest), some hundred megabytes for the whole bucket."""
        try:
            content = self._patiently(lambda: self.files.cat_file(f"{self.root}/{path}"), path)
            with gzip.open(io.BytesIO(content), "rt", encoding="utf-8", newline="") as file:
                for line in csv.reader(file):
                    if len(line) > 1:
                        yield line[1]
        except (OSError, EOFError, csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"the inventory {path} of {self.address} cannot be read: {error}. Try again.") from error


class _Hopeless(OSError):
    """A failure that another attempt would meet again."""


def _file_and_md5(address: str, article: str) -> tuple[str, str]:
    """Name and digest in ``s3://bucket/PMC1.1/figure.jpg?md5=…``; names outside the article's folder become ""."""
    parts: Any = urlsplit(address)
    folder, _, name = unquote(parts.path).strip("/").rpartition("/")
    digest = parse_qs(parts.query).get("md5", [""])[0].lower()
    return (name if folder == article else ""), digest
