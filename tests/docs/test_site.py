"""The docs site builds without a warning, and its pages speak of files and code that exist."""

import os
import re
import subprocess
import sys

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
