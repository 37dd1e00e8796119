"""The import arrows of the house: who may import whom, and what may travel to the Hub."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "medclip_hf"
TRAVELLING_ROOMS = ("modeling/conceptclip", "modeling/fvlm", "processing/conceptclip", "processing/fvlm")

# A room may import from itself and from the rooms named here, and `register` of the package, whose own files may import
# everything.
ARROWS = {
    "data": set(),
    "modeling": set(),
    "processing": set(),
    "training": {"data", "modeling", "processing"},
    "evaluation": {"data", "modeling", "processing"},
    "explain": {"modeling", "processing"},
    "hub": {"data", "modeling", "processing"},
    "pipelines": {"data", "evaluation", "explain", "modeling", "processing"},
    "cli": {"data", "evaluation", "explain", "hub", "modeling", "pipelines", "processing"},
}


def imports_of(file: Path) -> Iterator[tuple[int, str]]:
    """(level, module) of every import statement of a file, also those inside functions."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "medclip_hf":
            yield from ((node.level, f"medclip_hf.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""


def room_files() -> list[Path]:
    return sorted(file for file in PACKAGE.rglob("*.py") if file.parent != PACKAGE)


@pytest.mark.parametrize("file", room_files(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_room_imports_only_the_rooms_below_it(file):
    room = file.relative_to(PACKAGE).parts[0]
    allowed = ARROWS[room] | {room, "register"}
    for _, module in imports_of(file):
        if module.split(".")[0] == "medclip_hf":
            parts = module.split(".")
            assert len(parts) > 1, f"{file} imports the whole package"
            assert parts[1] in allowed, f"{file} imports {module}; {room} may import {sorted(allowed)}"


@pytest.mark.parametrize("room", TRAVELLING_ROOMS)
def test_what_travels_to_the_hub_imports_only_siblings_and_what_the_hub_user_has(room):
    # Triton is asked for in a `try`, so its absence does not keep a model from loading.
    allowed = {"torch", "numpy", "transformers", "PIL", "triton", *sys.stdlib_module_names}
    for file in (PACKAGE / room).glob("*.py"):
        for level, module in imports_of(file):
            if level:
                assert level == 1, f"{file}: only `from .sibling import name` travels, not {level} dots"
                assert module, f"{file}: `from . import sibling` leaves the sibling behind"
                assert "." not in module, f"{file}: `from .sub.module import name` cannot be saved"
                assert (file.parent / f"{module}.py").is_file(), f"{file} imports .{module}, which is not beside it"
            else:
                assert module.split(".")[0] in allowed, f"{file} imports {module}, which a user of the Hub may lack"


def test_scripts_do_not_import_each_other():
    scripts = Path(__file__).resolve().parents[1] / "scripts"
    names = {file.stem for file in scripts.glob("*.py")}
    for file in scripts.glob("*.py"):
        assert not {module.split(".")[0] for _, module in imports_of(file)} & names, f"{file} imports another script"
