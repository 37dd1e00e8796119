"""What is installed, what is missing, and how to get it: versions, devices, decoders, programs, caches."""

import importlib.util
import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

_CORE = (
    "medclip-hf",
    "torch",
    "transformers",
    "huggingface_hub",
    "tokenizers",
    "safetensors",
    "datasets",
    "accelerate",
    "peft",
    "numpy",
    "pyarrow",
    "pillow",
)
_EXTRAS = ("ct", "medconcept", "evaluation", "wsi", "hospital", "app", "onnx", "qlora", "ray", "track")
_PROGRAMS = {
    "TotalSegmentator": "makes anatomy masks of CT scans: pip install TotalSegmentator",
    "tesseract": "finds text burned into images: install the package tesseract-ocr of your system",
    "java": "runs METEOR, a figure of report generation: install a Java runtime",
}
# What archives send besides uncompressed pixels.
_TRANSFER_SYNTAXES = (
    "JPEGBaseline8Bit",
    "JPEGExtended12Bit",
    "JPEGLossless",
    "JPEGLosslessSV1",
    "JPEGLSLossless",
    "JPEGLSNearLossless",
    "JPEG2000Lossless",
    "JPEG2000",
    "HTJ2KLossless",
    "RLELossless",
)
_CACHES = ("HF_HOME", "HF_HUB_CACHE", "HF_XET_CACHE", "HF_ASSETS_CACHE")


def examine() -> dict[str, Any]:
    """Everything that `medclip-hf doctor` tells, as plain values; a token is never among them."""
    packages = {name: _version(name) for name in _CORE}
    extras = {name: _missing_of_extra(name) for name in _EXTRAS}
    decoders = _decoders()
    programs = {name: shutil.which(name) for name in _PROGRAMS}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "extras": {name: {"missing": missing} for name, missing in extras.items()},
        "devices": _devices(),
        "dicom_decoders": decoders,
        "programs": programs,
        "caches": _caches(),
        "hub": _hub(),
        "advice": _advice(packages, extras, decoders, programs),
    }


def is_sound(found: dict[str, Any]) -> bool:
    """Whether all that the package cannot do without is there."""
    return all(found["packages"].values())


def print_tables(found: dict[str, Any]) -> None:
    """The same for people."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    sections = {
        "versions": {"python": found["python"], **found["packages"]},
        "extras": {
            name: "complete" if not entry["missing"] else f"missing: {', '.join(entry['missing'])}"
            for name, entry in found["extras"].items()
        },
        "devices": found["devices"],
        "decoders for compressed DICOM": {
            name: ", ".join(plugins) or "[red]none[/red]" for name, plugins in found["dicom_decoders"].items()
        },
        "programs": {name: path or "not installed" for name, path in found["programs"].items()},
        "caches": {name: f"{entry['path']} ({entry['free_gb']} GB free)" for name, entry in found["caches"].items()},
        "Hub": found["hub"],
    }
    for title, rows in sections.items():
        table = Table(title=title, title_justify="left", show_header=False, min_width=60)
        for name, value in rows.items():
            table.add_row(name, "[red]not installed[/red]" if value is None else str(value))
        console.print(table)
    for line in found["advice"]:
        console.print(f"- {line}", markup=False)
    console.print("Everything that was looked for is there." if not found["advice"] else "", end="\n")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _missing_of_extra(extra: str) -> list[str]:
    """The packages of an extra that are not installed, out of the metadata of this package."""
    from packaging.requirements import Requirement

    missing = []
    for line in requires("medclip-hf") or ():
        requirement = Requirement(line)
        if requirement.marker is None or not requirement.marker.evaluate({"extra": extra}):
            continue
        if requirement.marker.evaluate({"extra": ""}) or requirement.name == "medclip-hf":
            continue  # asked for without the extra too, or another extra of ours
        if _version(requirement.name) is None:
            missing.append(requirement.name)
    return missing


def _devices() -> dict[str, str]:
    devices = {"cpu": f"{os.cpu_count()} cores"}
    if importlib.util.find_spec("torch") is None:
        return devices
    import torch

    devices["cpu"] += f", torch uses {torch.get_num_threads()} threads"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gigabytes = properties.total_memory / 2**30
        bf16 = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16"
        devices[f"cuda:{index}"] = f"{properties.name}, {gigabytes:.0f} GB, {bf16}"
    if torch.backends.mps.is_available():
        devices["mps"] = "Apple GPU"
    return devices


def _decoders() -> dict[str, list[str]]:
    """Transfer syntax -> the plugins of pydicom that decode it here."""
    if importlib.util.find_spec("pydicom") is None:
        return {}
    from pydicom import uid
    from pydicom.pixels import get_decoder

    found: dict[str, list[str]] = {}
    for name in _TRANSFER_SYNTAXES:
        try:
            found[name] = list(get_decoder(getattr(uid, name)).available_plugins)
        except (AttributeError, NotImplementedError):
            found[name] = []
    return found


def _caches() -> dict[str, dict[str, Any]]:
    from huggingface_hub import constants

    places = {name: Path(str(getattr(constants, name))) for name in _CACHES if hasattr(constants, name)}
    modules = os.environ.get("HF_MODULES_CACHE", str(places["HF_HOME"] / "modules"))
    places["HF_MODULES_CACHE"] = Path(modules)
    return {
        name: {"path": str(path), "exists": path.is_dir(), "free_gb": _free_gb(path)} for name, path in places.items()
    }


def _free_gb(path: Path) -> float | None:
    """Free space where a folder is or would be."""
    there = next((parent for parent in (path, *path.parents) if parent.exists()), None)
    return None if there is None else round(shutil.disk_usage(there).free / 1e9, 1)


def _hub() -> dict[str, str]:
    from huggingface_hub import constants, get_token

    return {
        "endpoint": constants.ENDPOINT,
        "offline": "yes (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else "no",
        "token": "found" if get_token() else "none: public repositories only (hf auth login)",
    }


def _advice(
    packages: dict[str, str | None],
    extras: dict[str, list[str]],
    decoders: dict[str, list[str]],
    programs: dict[str, str | None],
) -> list[str]:
    advice = [f"{name} is missing: pip install medclip-hf" for name, found in packages.items() if found is None]
    advice += [
        f"pip install 'medclip-hf[{extra}]' brings {', '.join(missing)}" for extra, missing in extras.items() if missing
    ]
    without = [name for name, plugins in decoders.items() if not plugins]
    if without:
        cure = "pylibjpeg-openjpeg" if without == ["HTJ2KLossless"] else "python-gdcm"
        advice.append(f"no decoder for DICOM in {', '.join(without)}: pip install {cure}")
    if not decoders:
        advice.append("DICOM cannot be read: pip install 'medclip-hf[ct]'")
    advice += [f"{name} is not installed; it {_PROGRAMS[name]}" for name, path in programs.items() if path is None]
    if sys.version_info >= (3, 13) and "scispacy" in extras.get("medconcept", []):
        advice.append("scispacy has no wheels beyond Python 3.12")
    return advice
