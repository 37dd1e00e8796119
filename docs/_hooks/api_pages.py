"""One page of the API reference for each package of `medclip_hf`, made from the docstrings of its modules."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "medclip_hf"
FOLDER = "api"


def on_config(config: Any) -> Any:
    """Add the pages to the navigation, after all that is written by hand."""
    pages = [{name: f"{FOLDER}/{name}.md"} for name in packages()]
    config.nav.append({"API": pages})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages themselves: each lists the modules of its package."""
    for name, modules in packages().items():
        lines = [f"# medclip_hf.{name}", ""]
        for module in modules:
            lines += [f"::: {module}", ""]
        files.append(File.generated(config, f"{FOLDER}/{name}.md", content="\n".join(lines)))
    return files


def packages() -> dict[str, list[str]]:
    """Name of a package below `medclip_hf` -> its modules; packages without modules of their own are left out."""
    found = {}
    for init in sorted(PACKAGE.rglob("__init__.py")):
        name = ".".join(init.parent.relative_to(PACKAGE).parts)
        modules = [f"medclip_hf.{name}.{path.stem}" for path in sorted(init.parent.glob("[a-z]*.py"))]
        if name and modules:
            found[name] = modules
    return found
