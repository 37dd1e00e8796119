"""What a file says beneath its letters: escapes, entities, percent signs, base64 and hexadecimal digits resolved."""

from __future__ import annotations

import base64
import binascii
import html
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

MIN_LETTERS = 16  # printable bytes in a row among the numbers of tensors: chance makes a hundred in a gigabyte
OVERLAP = 512  # of two blocks: no identifier is longer
MIN_ENCODED = 16  # signs of a run that may be base64 or hexadecimal digits
MIN_EMBEDDED = 64  # signs of one that may be a whole file
# First bytes of files, and what kind of file they tell.
MAGICS: tuple[tuple[bytes, str], ...] = (
    (b"\x89PNG\r\n", "picture"),
    (b"\xff\xd8\xff", "picture"),
    (b"GIF8", "picture"),
    (b"II*\0", "picture"),
    (b"MM\0*", "picture"),
    (b"BM", "picture"),
    (b"RIFF", "picture, sound or video"),
    (b"PK\x03\x04", "archive or pickled file"),
    (b"\x80\x02", "pickled file, which runs code when read"),
    (b"\x80\x03", "pickled file, which runs code when read"),
    (b"\x80\x04", "pickled file, which runs code when read"),
    (b"\x80\x05", "pickled file, which runs code when read"),
    (b"\x1f\x8b", "archive"),
    (b"BZh", "archive"),
    (b"\xfd7zXZ", "archive"),
    (b"\x28\xb5\x2f\xfd", "archive"),
    (b"7z\xbc\xaf", "archive"),
    (b"Rar!", "archive"),
    (b"\x89HDF", "table"),
    (b"SQLite format", "table"),
    (b"%PDF", "document"),
    (b"{\\rtf", "document"),
    (b"\xd0\xcf\x11\xe0", "document"),
)
_MIN_MAGIC = 4  # bytes: shorter ones begin other things as well
_ESCAPE = re.compile(
    r"\\(?:\\|u(?P<u>[0-9a-fA-F]{4})|x(?P<x>[0-9a-fA-F]{2})|(?P<space>[ntr]))"
    r"|(?P<entity>&(?:#\d{2,7}|#[xX][0-9a-fA-F]{2,6}|[a-zA-Z]{2,10});)|(?P<percent>(?:%[0-9a-fA-F]{2})+)"
)
_ENCODED = re.compile(rf"(?<![\w+/-])[A-Za-z0-9+/_-]{{{MIN_ENCODED},}}={{0,2}}")
_HEXADECIMAL = re.compile(r"(?:[0-9a-fA-F]{2})+")
_MIN_RUN = 6  # letters in a row in a binary file that is no mere numbers
# Bytes that are letters as "1", others as "0": a search for a row of "1" is faster than a pattern by far.
_LETTERS = bytes(49 if 0x20 <= byte <= 0x7E or byte >= 0xA0 else 48 for byte in range(256))
_PLAIN_LETTERS = bytes(49 if 0x20 <= byte <= 0x7E else 48 for byte in range(256))


def kind_of_magic(content: bytes) -> str | None:
    """What kind of file begins like this; None for text and anything else."""
    return next((kind for magic, kind in MAGICS if content.startswith(magic)), None)


def unescaped(text: str) -> str:
    r"""The text with ``\u00e4``, ``\n``, ``&auml;`` and ``%C3%A4`` as the letters they stand for, each in its place.

    Invisible hyphens fill what is left of an escape: the text stays as long as it was, and a search overlooks them.
    """
    return _ESCAPE.sub(_letters_of, text) if "\\" in text or "&" in text or "%" in text else text


def _letters_of(match: re.Match[str]) -> str:
    if code := match["u"] or match["x"]:
        letters = chr(int(code, 16))
    elif match["entity"]:
        letters = html.unescape(match["entity"])
    elif match["percent"]:
        letters = unquote(match["percent"], errors="replace")
    else:
        letters = " " if match["space"] else match[0]
    return re.sub(r"[\r\n]", " ", letters).ljust(len(match[0]), "\u00ad")


def encoded_texts(text: str) -> Iterator[tuple[int, str | bytes]]:
    """(place, what stands there in base64 or hexadecimal digits): text, or the bytes of a whole file in the text."""
    for match in _ENCODED.finditer(text):
        for content in _decoded(match[0]):
            if len(match[0]) >= MIN_EMBEDDED and any(
                content.startswith(magic) for magic, _ in MAGICS if len(magic) >= _MIN_MAGIC or magic == b"\xff\xd8\xff"
            ):
                yield match.start(), content
            elif (letters := _as_text(content)) is not None:
                yield match.start(), letters


def _decoded(run: str) -> Iterator[bytes]:
    if _HEXADECIMAL.fullmatch(run):
        yield bytes.fromhex(run)
    plain = run.rstrip("=").translate({ord("-"): "+", ord("_"): "/"})
    try:
        yield base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError):
        return


def _as_text(content: bytes) -> str | None:
    try:
        letters = content.decode("utf-8")
    except UnicodeDecodeError:
        return None
    return letters if letters.isprintable() or not re.search(r"[^\s\x20-\x7e\u00a0-\uffff]", letters) else None


def encoding_of(path: Path) -> str:
    """The encoding that a file's first bytes tell of; UTF-8 where they tell of none."""
    with path.open("rb") as file:
        head = file.read(4)
    if head in (b"\xff\xfe\0\0", b"\0\0\xfe\xff"):
        return "utf-32"
    return "utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8"


def letters_in(path: Path, start: int, *, among_numbers: bool, block: int = 2**22) -> Iterator[tuple[int, str]]:
    """(byte, letters) of what can be read in a binary file, from a byte on.

    Args:
        path: of the file.
        start: where to begin.
        among_numbers: the bytes are the numbers of tensors, in which short runs of letters are chance.
        block: bytes to read at a time.
    """
    table, length = (_PLAIN_LETTERS, MIN_LETTERS) if among_numbers else (_LETTERS, _MIN_RUN)
    with path.open("rb") as file:
        file.seek(start)
        rest = b""
        while content := file.read(block):
            whole = rest + content
            for first, last in _runs(whole.translate(table), length):
                if last > len(rest):
                    yield start + first, whole[first:last].decode("latin-1")
            rest = whole[-OVERLAP:]
            start += len(whole) - len(rest)


def _runs(marks: bytes, length: int) -> Iterator[tuple[int, int]]:
    """(first, behind the last) of every row of so many "1" or more."""
    wanted, last = b"1" * length, 0
    while (first := marks.find(wanted, last)) >= 0:
        last = marks.find(b"0", first)
        last = len(marks) if last < 0 else last
        yield first, last
