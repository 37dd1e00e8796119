"""Fixtures that several test files share: where reference values and real data lie."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("MEDCLIP_HF_SHARED", REPOSITORY.parent / "shared"))


def _folder(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"{name} not found under {SHARED}: set MEDCLIP_HF_SHARED to the folder that holds it")
    return folder


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Folder of the reference values computed with the official code; skips where absent."""
    return _folder("goldens")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the small real data sets (pmc_sample, bccd, ct); skips where absent."""
    return _folder("data")
