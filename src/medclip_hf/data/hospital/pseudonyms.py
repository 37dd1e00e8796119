"""Keyed hashes in place of identifiers: whoever lacks the key can neither undo nor guess them.

A plain hash of a patient number is no protection, since all numbers of a hospital can be tried in seconds. HMAC-SHA256
with a key of 256 bits cannot be tried without the key, and stays the same from run to run with it.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import stat
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KEY_BYTES = 32
PSEUDONYM_HEX_DIGITS = 32  # 128 bits: no two of a billion identifiers meet

_KEY_TEXT = re.compile(rf"[0-9a-f]{{{2 * KEY_BYTES}}}\n?")


@dataclass(frozen=True)
class Pseudonyms:
    """Hashes of one key.

    Args:
        key: 32 secret bytes; never shown, not even in a traceback.
    """

    key: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.key) != KEY_BYTES:
            raise ValueError(f"a key has {KEY_BYTES} bytes, got {len(self.key)}")

    def of(self, domain: str, *parts: str) -> str:
        """32 hexadecimal digits for an identifier; the same identifier in another domain has nothing in common.

        Args:
            domain: what is hashed: "patient", "study", "row", ...
            parts: the identifier; several parts are kept apart, ("a", "bc") is not ("ab", "c").
        """
        message = "\x1f".join((domain, *parts)).encode("utf-8", "surrogatepass")
        return hmac.digest(self.key, message, "sha256").hex()[:PSEUDONYM_HEX_DIGITS]

    def patient(self, identifier: str) -> str:
        """The pseudonym of a patient, however the number was typed (see `normal_identifier`)."""
        return self.of("patient", normal_identifier(identifier))

    @property
    def key_check(self) -> str:
        """Eight digits by which two runs tell whether they have the same key; they tell nothing else of it."""
        return self.of("key check")[:8]

    def facts(self) -> dict[str, Any]:
        """What may be told of the scheme."""
        return {"algorithm": "HMAC-SHA256", "bits": 4 * PSEUDONYM_HEX_DIGITS, "key_check": self.key_check}


def normal_identifier(identifier: str) -> str:
    """One spelling for an identifier that was typed in several.

    Case, white space, full-width digits and the leading zeros of a plain number (which spreadsheets drop) do not make
    another patient: were they to, one patient could stand in two splits.
    """
    text = "".join(unicodedata.normalize("NFKC", identifier).casefold().split())
    return (text.lstrip("0") or "0") if text.isdigit() else text


def read_or_create_key(path: Path, *forbidden: Path) -> Pseudonyms:
    """The key in a file, which is created (mode 0600) where there is none.

    Args:
        path: of the key; it stays with the user.
        forbidden: folders that will be shared, where the key must not lie.

    Raises:
        ValueError: a key inside such a folder, readable by others, or damaged.
    """
    resolved = path.expanduser().resolve()
    for folder in forbidden:
        if resolved.is_relative_to(folder.expanduser().resolve()):
            raise ValueError(f"the key {path} lies inside {folder}, which may be shared. Name a file outside of it.")
    if not resolved.exists():
        _create_key(resolved)
    return Pseudonyms(_read_key(resolved))


def digest_of_file(path: Path, pseudonyms: Pseudonyms) -> str:
    """A keyed digest of a file's bytes: it tells whether a file changed and, without the key, nothing else."""
    digest = hmac.new(pseudonyms.key, b"file\x1f", hashlib.sha256)
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()[:PSEUDONYM_HEX_DIGITS]


def _create_key(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(KEY_BYTES) + "\n")
    except FileExistsError:  # another process was faster: its key is the key
        return
    except OSError as error:
        raise ValueError(f"cannot create the key {path}: {error.strerror}. Name another file.") from error


def _read_key(path: Path) -> bytes:
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise ValueError(f"the key {path} is no regular file")
        if os.name == "posix" and mode & 0o077:
            raise ValueError(f"the key {path} can be read by others (mode {mode & 0o777:o}). Run: chmod 600 {path}")
        text = path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the key {path} ({type(error).__name__})") from error
    if not _KEY_TEXT.fullmatch(text):
        raise ValueError(
            f"{path} is no key: expected {2 * KEY_BYTES} hexadecimal digits. With a damaged key the pseudonyms of "
            "earlier runs cannot be made again; restore it from a copy, or name a new file for a new key."
        )
    return bytes.fromhex(text)
