"""What the two model folders share is the same word for word, since each folder travels alone to the Hub."""

import ast
from pathlib import Path

MODELING = Path(__file__).resolve().parents[2] / "src" / "medclip_hf" / "modeling"
MARK = "# Same as in "


def functions_of(folder: Path) -> dict[str, tuple[str, bool]]:
    """Name, without that of the model -> the function's source, and whether it is marked as a twin."""
    found = {}
    for file in sorted(folder.glob("*.py")):
        source = file.read_text(encoding="utf-8")
        lines = source.splitlines()
        rest = next((n for n, line in enumerate(lines) if line.startswith(MARK) and "from here on" in line), len(lines))
        for owner in [ast.parse(source), *ast.walk(ast.parse(source))]:
            if not isinstance(owner, ast.Module | ast.ClassDef):
                continue
            prefix = f"{owner.name.removeprefix('ConceptCLIP').removeprefix('FVLM')}." if hasattr(owner, "name") else ""
            for node in owner.body:
                if isinstance(node, ast.FunctionDef):
                    first = min([node.lineno, *(one.lineno for one in node.decorator_list)]) - 1
                    is_twin = first > rest or (MARK in lines[first - 1] and "but for" not in lines[first - 1])
                    found[f"{prefix}{node.name}"] = ("\n".join(lines[first : node.end_lineno]), is_twin)
    return found


def test_functions_marked_as_twins_are_the_same_and_equal_ones_are_marked():
    ours, theirs = (functions_of(MODELING / name) for name in ("conceptclip", "fvlm"))
    wrong = {}
    for name in sorted(ours.keys() & theirs.keys()):
        (source, is_twin), (other, is_other_twin) = ours[name], theirs[name]
        if (is_twin or is_other_twin) and source != other:
            wrong[name] = "marked as the same and different"
        elif source == other and not (is_twin and is_other_twin) and name != "__init__":
            wrong[name] = "the same and not marked in both folders"
    for name, (_, is_twin) in [*ours.items(), *theirs.items()]:
        if is_twin and not (name in ours and name in theirs):
            wrong[name] = "marked and without a twin"
    assert wrong == {}


def test_the_spelling_files_are_the_same_but_for_the_mark():
    texts = [(MODELING / name / f"spelling_{name}.py").read_text().splitlines() for name in ("conceptclip", "fvlm")]
    assert [line for line in texts[0] if not line.startswith(MARK)] == [
        line for line in texts[1] if not line.startswith(MARK)
    ]
