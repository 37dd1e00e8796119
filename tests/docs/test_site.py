"""The docs site builds without a warning, and its pages speak of files and code that exist."""

import ast
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

FILES_NAMED = re.compile(
    r"(?<![\w/.-])((?:scripts|benchmarks|examples|app|tests|src)/[\w./-]+\.(?:py|yaml|slurm|md))\b"
)
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def pages(repository):
    return sorted((repository / "docs").rglob("*.md"))


def test_it_builds_with_warnings_as_errors(repository, tmp_path):
    pytest.importorskip("mkdocs")
    child = subprocess.run(
        # Not --quiet: what is not logged is not counted, and then nothing is strict.
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=repository,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == 0, child.stdout + child.stderr
    reference = (tmp_path / "site" / "api" / "hub" / "index.html").read_text(encoding="utf-8")
    assert "medclip_hf.hub.push.push_folder" in reference
    card = (tmp_path / "site" / "models" / "fvlm" / "index.html").read_text(encoding="utf-8")
    assert "Limits and bias" in card
    for page in (tmp_path / "site").rglob("*.html"):  # reading the docs tells nobody else that you do
        loaded = re.findall(r'<(?:script|link|img|iframe)[^>]+(?:src|href)="(https?:[^"]+)', page.read_text("utf-8"))
        assert not [address for address in loaded if "canonical" not in address], page


def test_every_page_is_in_the_navigation(repository):
    text = (repository / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"[\w/]+\.md", yaml.dump(yaml.safe_load(text)["nav"])))
    assert listed == {page.relative_to(repository / "docs").as_posix() for page in pages(repository)}


def test_every_file_that_the_docs_name_exists(repository):
    for page in [*pages(repository), *(repository / "model_cards").glob("*.md"), repository / "README.md"]:
        for name in FILES_NAMED.findall(page.read_text(encoding="utf-8")):
            assert (repository / name).is_file(), f"{page.name} names {name}"


def test_python_in_the_docs_is_python(repository):
    for page in [*pages(repository), repository / "README.md"]:
        for block in PYTHON_BLOCK.findall(page.read_text(encoding="utf-8")):
            compile(block, str(page), "exec")


def test_every_recipe_is_in_the_table_of_recipes(repository):
    page = (repository / "docs" / "recipes.md").read_text(encoding="utf-8")
    recipes = {path.name for path in (repository / "scripts" / "recipes").glob("*.yaml")}
    assert recipes == set(re.findall(r"`(\w+\.yaml)`", page))


COMMAND = re.compile(
    r"(?:(?P<script>(?:scripts|benchmarks|examples|app)/\w+\.py)|^\s*(?P<tool>medclip-hf) \w+)(?P<rest>.*)"
)
FLAG = re.compile(r"(?<=\s)--[a-z][\w-]*")


def commands(text):
    """(script or tool, its flags) of each command line that a page shows in a code block."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        found = COMMAND.search(line)
        if found and (line.startswith("    ") or re.match(r"(python|accelerate|medclip-hf|[A-Z_]+=)", line)):
            arguments = found["rest"].split(" #")[0].split("|")[0]
            yield found["script"] or "src/medclip_hf/cli/main.py", FLAG.findall(arguments)


def flags_of(repository, script):
    """A pattern of every flag that a script, or a module that it imports from, writes down."""
    tree = ast.parse((repository / script).read_text(encoding="utf-8"))
    modules = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    rooms = (repository / "src", (repository / script).parent)
    paths = [room / (module.replace(".", "/") + ".py") for module in modules for room in rooms]
    return re.compile("|".join({"--help"}.union(*map(flags_in, [repository / script, *filter(Path.is_file, paths)]))))


@cache
def flags_in(path):
    """Patterns of the flags that a file writes down."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):  # f"--{name}-column"
            parts = [part.value if isinstance(part, ast.Constant) else None for part in node.values]
        elif isinstance(node, ast.arg) and "cli" in path.parts:  # Typer names a flag after its argument
            parts = ["--", node.arg.replace("_", "-")]
        else:
            parts = [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else [None]
        if (parts[0] or "").startswith("--"):
            found.add("".join(".+" if part is None else re.escape(part) for part in parts))
    return found


def test_every_flag_that_the_docs_show_exists(repository):
    shown = {}
    for page in [*pages(repository), *(repository / "model_cards").glob("*.md"), repository / "README.md"]:
        for script, flags in commands(page.read_text(encoding="utf-8")):
            shown.setdefault(script, {}).update(dict.fromkeys(flags, page.name))
    assert len(shown) > 20
    for script, flags in shown.items():
        known = flags_of(repository, script)
        assert not [f"{flag} of {script} in {page}" for flag, page in flags.items() if not known.fullmatch(flag)]
