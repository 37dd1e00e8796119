"""The check before a push: every file that would be sent is searched for patients, people, paths and leftovers of runs.

What is searched: texts of all kinds, names of files, every string in Parquet files, metadata and tensor names of
safetensors and ONNX files, text chunks and EXIF of pictures. What is not: the numbers of tensors and the pixels of
pictures, in which no search of letters finds anything (pictures are told of as such where they do not belong).

A finding says what kind of thing stands where, never what it says.
"""

from __future__ import annotations

import contextlib
import getpass
import io
import json
import re
import socket
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from medclip_hf.data.engine.publish import PUBLISHED_FILES
from medclip_hf.data.hospital.folding import WORDS
from medclip_hf.data.hospital.search_set import SearchSet
from medclip_hf.hub.push_texts import (
    MIN_LETTERS,
    OVERLAP,
    encoded_texts,
    encoding_of,
    kind_of_magic,
    letters_in,
    unescaped,
)

RepoType = Literal["model", "dataset", "space"]

TEXT_BLOCK = 2**20  # characters searched at a time
MAX_FINDINGS_PER_FILE = 20
LARGE_FILE_BYTES = 50 * 10**9  # the Hub's limit for one file
MAX_HEADER_BYTES = 100 * 2**20  # of safetensors: its own limit

# What belongs into a repository of a model; anything else is told of.
_EXPECTED = {
    "model": {
        *(".safetensors", ".json", ".md", ".txt", ".py", ".jinja", ".model", ".yaml", ".yml", ".onnx", ".onnx_data"),
        *(".gitattributes",),
    },
    "dataset": {".parquet", ".json", ".jsonl", ".md", ".html", ".txt", ".yaml", ".yml", ".py", ".gitattributes"},
    "space": {
        *(".py", ".md", ".txt", ".json", ".toml", ".yaml", ".yml", ".html", ".css", ".js", ".svg", ".safetensors"),
        *(".gitattributes", ".jinja", ".model"),
    },
}
# Name patterns of what a run leaves behind (`training.checkpoints`, transformers, accelerate, trackers).
_LEFTOVERS = {
    "state of a training run": (
        *("*optimizer*.safetensors", "*random_state*", "*rng_state*", "scheduler*", "run_state.json"),
        *("objective*.safetensors", "trainer_state.json", "training_args*"),
        *("checkpoint-*/*", "checkpoints/*", "*/checkpoints/*"),
    ),
    "log": ("*.log", "*.out", "*.err", "events.out.tfevents*", "wandb/*", "runs/*", "mlruns/*", "*.jsonl", "nohup*"),
    "table": ("*.csv", "*.tsv", "*.xls", "*.xlsx", "*.ods", "*.sqlite", "*.db"),
    "volume or DICOM file": ("*.dcm", "*.dicom", "*.nii", "*.nii.gz", "*.mha", "*.nrrd", "*.zarr/*", "*.npz", "*.npy"),
    "key or secret": ("*.key", "*.pem", "*.identifiers.json", ".env", "*.env", "id_rsa*", "token"),
    "pickled file, which runs code when read": ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.joblib"),
}  # fmt: skip
_VOCABULARIES = ("vocab.txt", "vocab.json", "merges.txt", "tokenizer.json", "*.model", "*.jinja")
_PATH = re.compile(
    r"(?<![\w:/.<\\!])(?:"
    r"/(?:home|Users|users|root|mnt|media|data|scratch|srv|var|tmp|private|gpfs|lustre|nfs|nas|work|workspace|storage|"
    r"export|archive|pacs|projects?|shared?|Volumes|opt|usr|net)\d*/[\w.~-]+"
    r"|(?<=[\"'])/[\w.~-]+/[\w.~-]+"
    r"|[A-Za-z]:\\{1,2}(?!n\b|t\b)[\w .~-]+\\"
    r"|\\\\[\w.-]+\\[\w$.-]+"
    r"|file://"
    r"|~/[\w.-]+)"
)
_TOKEN = re.compile(r"\b(?:hf_[A-Za-z0-9]{30,}|AKIA[0-9A-Z]{16}|ghp_[A-Za-z0-9]{36}|sk-[A-Za-z0-9_-]{20,})\b")
_PRIVATE_KEY = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----")
_NO_TEXT = re.compile(r"[\0\udc80-\udcff]")  # bytes that are no letters in the encoding of the file
_BINARY = (".model", ".onnx")  # files that may hold more than text
_SENTENCE = 12  # characters; shorter runs of letters are chance among numbers
_COMMON_NAMES = frozenset({"root", "user", "admin", "ubuntu", "localhost", "runner", "docker", "jovyan", "hospital"})
_MIN_OWN_NAME = 4


@dataclass(frozen=True)
class Finding:
    """Why a file must not be sent.

    Args:
        file: path in the folder; without its name where the name itself identifies.
        place: where in it: a line, a column and row, a key.
        kind: of what was found.
    """

    file: str
    place: str
    kind: str

    def __str__(self) -> str:
        return f"{self.file}{f' ({self.place})' if self.place else ''}: {self.kind}"


@dataclass(frozen=True)
class Check:
    """What is searched for.

    Args:
        identifiers: of the patients, see `search_set`; None where the weights never saw a patient's data.
        allow_images: pictures may be among the files.
        allowed_words: parts of names that are harmless here ("brown" in "Brown University").
        own_names: of this user and machine.
    """

    identifiers: SearchSet | None
    allow_images: bool = False
    allowed_words: frozenset[str] = frozenset()
    own_names: tuple[str, ...] = ()

    def of_text(self, text: str, *, is_vocabulary: bool = False) -> Iterator[tuple[int, str]]:
        """(place, kind) of everything in a text that must not be sent, encoded texts and files within it included."""
        yield from self._of_plain_text(text, is_vocabulary)
        if (plain := unescaped(text)) != text:
            yield from self._of_plain_text(plain, is_vocabulary)
        for place, content in encoded_texts(text):
            if isinstance(content, bytes):
                if not (self.allow_images and kind_of_magic(content) == "picture"):
                    yield place, f"{kind_of_magic(content)} in a text"
            else:
                yield from ((place, f"{kind}, encoded") for _, kind in self._of_plain_text(content, is_vocabulary))

    def _of_plain_text(self, text: str, is_vocabulary: bool) -> Iterator[tuple[int, str]]:
        if not is_vocabulary:
            yield from ((match.start(), "path of a disk") for match in _PATH.finditer(text))
            for name in self.own_names:
                yield from ((m.start(), "name of this user or machine") for m in _word(name).finditer(text))
        yield from ((match.start(), "access token") for match in _TOKEN.finditer(text))
        yield from ((match.start(), "private key") for match in _PRIVATE_KEY.finditer(text))
        if self.identifiers is not None:
            for hit in self.identifiers.search(text, with_name_parts=not is_vocabulary):
                if not (hit.kind == "part of a name" and _word_at(text, hit.place) in self.allowed_words):
                    yield hit.place, f"{hit.kind} of a patient" if hit.kind != "part of a name" else hit.kind


def check_before_push(
    folder: Path | str,
    identifiers: SearchSet | None,
    repo_type: RepoType = "model",
    *,
    allow_images: bool = False,
    allowed_words: Iterable[str] = (),
) -> list[Finding]:
    """Everything that speaks against sending a folder; an empty list lets it go.

    Args:
        folder: that would be pushed.
        identifiers: what identifies the patients, as `scripts/prepare_hospital.py` leaves it beside the key.
        repo_type: "model", "dataset" or "space": each has files that belong there.
        allow_images: pictures may be among the files (of a model card, say).
        allowed_words: parts of names that are harmless here; full names and numbers cannot be allowed.

    Raises:
        ValueError: where there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    check = Check(identifiers, allow_images, frozenset(word.casefold() for word in allowed_words), own_names())
    findings: list[Finding] = []
    for number, (name, path) in enumerate(_files(folder, repo_type)):
        shown = name
        if not name.isprintable():
            shown = f"file {number + 1} (its name cannot be printed)"
            findings.append(Finding(shown, "name of the file", "line break, control sign or broken letter"))
        elif any(check.of_text(re.sub(r"[/\\]", "\n", name))):
            shown = f"file {number + 1} (its name is withheld)"
            findings.append(Finding(shown, "name of the file", "identifier, path or name"))
        found = ((place, kind) for place, kind in _of_file(folder, name, path, check, repo_type))
        for count, (place, kind) in enumerate(found, 1):
            if count > MAX_FINDINGS_PER_FILE:
                findings.append(Finding(shown, "", f"more than {MAX_FINDINGS_PER_FILE} findings"))
                break
            findings.append(Finding(shown, place, kind))
    return findings


def own_names() -> tuple[str, ...]:
    """The login and host names of this machine, as far as they are no everyday words."""
    names = set()
    with contextlib.suppress(OSError, KeyError):
        names.add(getpass.getuser())
    names.add(socket.gethostname().split(".")[0])
    return tuple(sorted(name for name in names if len(name) >= _MIN_OWN_NAME and name.casefold() not in _COMMON_NAMES))


def _files(folder: Path, repo_type: RepoType) -> Iterator[tuple[str, Path]]:
    """What a push would send: hidden files and caches stay behind, of a data set all but what is published."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        parts = name.split("/")
        if any(part == "__pycache__" for part in parts):
            continue
        if any(part.startswith(".") for part in parts) and parts[0] not in (
            ".eval_results",
            ".gitattributes",
            ".streamlit",
        ):
            continue
        if repo_type == "dataset" and not any(fnmatch(name, pattern) for pattern in PUBLISHED_FILES):
            continue
        if path.is_symlink() or not path.is_dir():
            yield name, path


def leads_out_of(folder: Path, path: Path) -> bool:
    """Whether a path of the folder is a link to something outside it, or in a circle."""
    try:
        return path.is_symlink() and not path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # of a circle, by the version of Python
        return True


def _of_file(folder: Path, name: str, path: Path, check: Check, repo_type: RepoType) -> Iterator[tuple[str, str]]:
    """(place, kind) of what is wrong with one file."""
    if leads_out_of(folder, path):
        yield "", "link out of the folder"
        return
    if not path.is_file():
        yield "", "neither file nor folder"
        return
    leftover = next((kind for kind, patterns in _LEFTOVERS.items() if _matches(name, patterns)), None)
    if leftover is not None and not (repo_type == "dataset" and name.endswith(".jsonl")):
        yield "", leftover
    if path.stat().st_size > LARGE_FILE_BYTES:
        yield "", "larger than the Hub allows"
    try:
        yield from _of_content(name, path, check, repo_type, leftover is not None)
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError, RecursionError) as error:
        yield "", f"cannot be searched ({type(error).__name__}): it is damaged, or not what its name says"


def _of_content(
    name: str, path: Path, check: Check, repo_type: RepoType, is_leftover: bool
) -> Iterator[tuple[str, str]]:
    with path.open("rb") as file:
        head = file.read(132)
    suffix = path.suffix.lower() or path.name
    if suffix == ".safetensors":
        yield from _of_safetensors(path, check)
        return
    if suffix == ".parquet":
        yield from _of_parquet(path, check)
        return
    if head[128:] == b"DICM":
        yield "", "volume or DICOM file"
        return
    kind = kind_of_magic(head)
    if kind == "picture" and _is_picture(path):
        if not check.allow_images:
            yield "", "picture (allow it if it shows no patient)"
        yield from _of_picture(path.read_bytes(), check)
        return
    if kind not in (None, "picture") and not is_leftover:
        yield "", kind or ""
        return
    if suffix not in _EXPECTED[repo_type] and not is_leftover:
        yield "", f"file that does not belong into a {repo_type}"
    if suffix == ".onnx_data":
        yield from _of_numbers(path, 0, check)
    elif suffix in _BINARY and b"\0" in head and encoding_of(path) == "utf-8":
        yield from _of_binary(path, check)
    else:
        yield from _of_stream(path, check, is_vocabulary=_matches(path.name, _VOCABULARIES))
        if path.name == "tokenizer.json":
            yield from _of_tokenizer(path, check)


def _of_stream(path: Path, check: Check, is_vocabulary: bool) -> Iterator[tuple[str, str]]:
    """Findings in a file of any kind, read as text a block at a time; what is no text cannot be searched."""
    line, rest, is_text = 1, "", True
    with path.open(encoding=encoding_of(path), errors="surrogateescape", newline="") as file:
        while block := file.read(TEXT_BLOCK):
            text = rest + block
            lines_before = rest.count("\n")
            seen: set[tuple[int, str]] = set()
            if is_text and (match := _NO_TEXT.search(block)):
                is_text = False
                yield f"line {line + lines_before + block.count(chr(10), 0, match.start())}", "no text in UTF-8"
            for place, kind in check.of_text(text, is_vocabulary=is_vocabulary):
                # What lies in the overlap was found in the block before.
                if place >= len(rest) - 1 or not rest:
                    where = (line + text.count("\n", 0, place), kind)
                    if where not in seen:
                        seen.add(where)
                        yield f"line {where[0]}", kind
            rest = text[-OVERLAP:]
            line += text.count("\n", 0, len(text) - len(rest))


def _of_tokenizer(path: Path, check: Check) -> Iterator[tuple[str, str]]:
    """Findings beside the list of words, where single names count: tokens that were added, settings."""
    values = json.loads(path.read_text(encoding="utf-8"))
    model = values.get("model", {})
    values["model"] = {name: value for name, value in model.items() if name not in ("vocab", "merges")}
    rest = json.dumps(values, ensure_ascii=False, indent=0)
    yield from {("beside the vocabulary", kind) for _, kind in check.of_text(rest)}


def _of_binary(path: Path, check: Check) -> Iterator[tuple[str, str]]:
    """Findings in what can be read of a binary file: its runs of plain letters, as ONNX files keep paths and notes."""
    for place, letters in letters_in(path, 0, among_numbers=False):
        for _, kind in check.of_text(letters, is_vocabulary=len(letters) < _SENTENCE):
            yield f"byte {place}", kind


def _of_numbers(path: Path, start: int, check: Check) -> Iterator[tuple[str, str]]:
    """Findings in the numbers of tensors, from a byte on: long runs of letters are no weights."""
    for place, letters in letters_in(path, start, among_numbers=True):
        for _, kind in check.of_text(letters, is_vocabulary=len(letters) < 2 * MIN_LETTERS):
            yield f"byte {place}", kind


def _of_safetensors(path: Path, check: Check) -> Iterator[tuple[str, str]]:
    """Findings in the header: metadata and names of tensors. Bytes behind the last tensor do not belong there."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > MAX_HEADER_BYTES:
            raise ValueError("header too large")
        header = json.loads(file.read(length))
    for key, value in (header.pop("__metadata__", None) or {}).items():
        yield from ((f"metadata {number_of(key)}", kind) for _, kind in check.of_text(f"{key}\n{value}"))
    names = _without_parameters("\n".join(header))
    yield from {("names of tensors", kind) for _, kind in check.of_text(names)}
    end = 0
    for first, last in sorted(tensor["data_offsets"] for tensor in header.values()):
        if first != end:
            break
        end = last
    if path.stat().st_size != 8 + length + end:
        yield "", "bytes that belong to no tensor"
    yield from _of_numbers(path, 8 + length, check)


def _without_parameters(names: str) -> str:
    """Names of tensors without the words that networks give them: Lora and Norm are names of people as well."""
    return re.sub(r"[A-Za-z]+", lambda word: "" if word[0].lower() in WORDS["parameters"] else word[0], names)


def number_of(key: str) -> str:
    """A metadata key as it may be shown: one of the usual ones, or nothing."""
    return repr(key) if key in ("format", "medclip_hf", "license", "author", "description") else "entry"


def _of_parquet(path: Path, check: Check) -> Iterator[tuple[str, str]]:
    """Findings in the footer and in every string; pictures by their text chunks."""
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    footer = {**(file.metadata.metadata or {}), **(file.schema_arrow.metadata or {})}
    for key, value in footer.items():
        if key == b"ARROW:schema":  # base64 of the schema, whose names and metadata are searched as they are
            continue
        text = value.decode("utf-8", "replace")
        yield from (("footer", kind) for _, kind in check.of_text(text, is_vocabulary=True))
    leaves = [file.schema.column(number).path for number in range(len(file.schema))]  # fields of fields as well
    yield from (("names of columns", kind) for _, kind in check.of_text("\n".join(leaves).replace(".", "\n")))
    shown = [_shown_column(name, number, check) for number, name in enumerate(file.schema_arrow.names, 1)]
    row = 0
    for batch in file.iter_batches(batch_size=64):
        for record in batch.to_pylist():
            for column, value in zip(shown, record.values(), strict=True):
                for text in _strings(value):
                    yield from ((f"{column}, row {row}", kind) for _, kind in check.of_text(text))
                for content in _byte_strings(value):
                    yield from ((f"{column}, row {row}: {p}", kind) for p, kind in _of_picture(content, check))
            row += 1


def _shown_column(name: str, number: int, check: Check) -> str:
    """A column as it may be named: by its number where its name identifies."""
    return f"column {number} (its name is withheld)" if any(check.of_text(name)) else f"column {name}"


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)
    elif value is not None and not isinstance(value, bytes | bool | int | float):  # dates and times
        yield str(value)


def _byte_strings(value: Any) -> Iterator[bytes]:
    if isinstance(value, bytes):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _byte_strings(inner)


def _of_picture(content: bytes, check: Check) -> Iterator[tuple[str, str]]:
    """Findings in what a picture carries beside its pixels; any text at all is told of."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            texts = {str(key): value for key, value in image.info.items() if isinstance(value, str | bytes)}
            exif = dict(image.getexif())
    except Exception:  # no picture, or a damaged one: its bytes are searched
        yield from (("bytes", kind) for _, kind in check.of_text(content.decode("latin-1")))
        return
    if exif or "exif" in texts:
        yield "EXIF", "header of a picture"
    for key, value in texts.items():
        if key in ("icc_profile", "exif", "jfif", "transparency", "version", "compression", "background"):
            continue
        text = value if isinstance(value, str) else value.decode("utf-8", "replace")
        yield "text chunk", "text beside the pixels of a picture"
        yield from (("text chunk", kind) for _, kind in check.of_text(text))
    tail = content[content.rfind(b"IEND") + 8 :] if content.startswith(b"\x89PNG") else b""
    if tail:
        yield "bytes behind its end", "hidden content of a picture"


def _is_picture(path: Path) -> bool:
    try:
        with Image.open(path):
            return True
    except Exception:  # text that begins with BM is no bitmap
        return False


def _matches(name: str, patterns: Iterable[str]) -> bool:
    small = name.lower()
    return any(fnmatch(small, pattern) or fnmatch(small.rsplit("/", 1)[-1], pattern) for pattern in patterns)


def _word(name: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![\w-]){re.escape(name)}(?![\w-])", re.IGNORECASE)


def _word_at(text: str, place: int) -> str:
    match = re.compile(r"[^\W_]+").match(text, place)
    return match[0].casefold() if match else ""
