"""Which models the demo shows: those that were named, else those of `make demo`, else none, or untrained ones."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from examples import DRAWN_CT_FINDINGS

from medclip_hf.cli.loading import load_pipeline
from medclip_hf.hub.loading import model_type_of

TASKS = {"conceptclip": "medical-concept-annotation", "fvlm": "ct-zero-shot-classification"}
KINDS = {"conceptclip": "ConceptCLIP", "fvlm": "fVLM"}
FLAGS = {"conceptclip": "--conceptclip", "fvlm": "--fvlm"}
# Of `make demo`, best first.
DEMO_FOLDERS = {
    "conceptclip": {
        "demo ConceptCLIP": "conceptclip/stage2/final",
        "demo ConceptCLIP, IT-Align alone": "conceptclip/it_align_alone/final",
    },
    "fvlm": {
        "demo fVLM": "fvlm/per_anatomy_calibrated/final",
        "demo fVLM, false negatives not reduced": "fvlm/per_anatomy/final",
    },
}


@dataclass(frozen=True)
class Model:
    """A model that the demo shows.

    Args:
        pipe: its pipeline.
        findings: that an fVLM scores; None: those of CT-RATE.
        is_untrained: whether its weights are random.
        is_demo: whether it learned from drawings alone.
    """

    pipe: Any
    findings: tuple[Any, ...] | None = None
    is_untrained: bool = False
    is_demo: bool = False


@dataclass(frozen=True)
class Models:
    """The models of both kinds by the names that the page shows, best first; a kind may be missing."""

    conceptclip: dict[str, Model] = field(default_factory=dict)
    fvlm: dict[str, Model] = field(default_factory=dict)

    @property
    def untrained(self) -> list[str]:
        """Names of the models whose weights are random."""
        return [name for name, model in {**self.conceptclip, **self.fvlm}.items() if model.is_untrained]

    @property
    def has_demo(self) -> bool:
        """Whether a model is among them that learned from drawings alone."""
        return any(model.is_demo for model in (*self.conceptclip.values(), *self.fvlm.values()))


def load_models(chosen: argparse.Namespace, folder: Path) -> Models:
    """The models to show, loaded.

    Args:
        chosen: arguments of the command line.
        folder: for untrained models.

    Raises:
        ValueError: a model that was named cannot be used, or the file of findings.
    """
    findings = _read_findings(chosen.findings) if chosen.findings else None
    shown: dict[str, dict[str, Model]] = {}
    for kind, named in (("conceptclip", chosen.conceptclip), ("fvlm", chosen.fvlm)):
        if named:
            names = _short_names(named)
            shown[kind] = {name: _load(kind, place, chosen.device, findings) for name, place in names.items()}
            continue
        in_words = findings or DRAWN_CT_FINDINGS
        shown[kind] = {
            name: replace(_load(kind, str(chosen.demo_output / place), chosen.device, in_words), is_demo=True)
            for name, place in DEMO_FOLDERS[kind].items()
            if (chosen.demo_output / place / "config.json").is_file()
        }
        if not shown[kind] and chosen.untrained:
            from untrained import make_untrained

            made = _load(kind, str(make_untrained(kind, folder / f"untrained_{kind}")), chosen.device, in_words)
            shown[kind] = {f"untrained {KINDS[kind]}": replace(made, is_untrained=True)}
    return Models(**shown)


def named_model(models: Mapping[str, Model], name: str) -> Model:
    """The model that a visitor chose.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in models:
        raise ValueError(f"There is no model {name!r}. Choose one of {', '.join(models)}.")
    return models[name]


def how_to_get(kind: str) -> str:
    """What to do where no model of a kind is there, as a sentence."""
    return (
        "There is no model here. Train the demo models with `make demo` (about a quarter of an hour) and start this "
        f"page again, or name one: python app/app.py {FLAGS[kind]} FOLDER_OR_REPO. With --untrained the page can be "
        "tried without one."
    )


def _load(kind: str, place: str, device: str | None, findings: tuple[Any, ...] | None) -> Model:
    if (found := model_type_of(place)) != kind:
        raise ValueError(f"{place} is of type {found!r}, but {FLAGS[kind]} takes {kind!r}.")
    return Model(load_pipeline(TASKS[kind], place, device=device), findings if kind == "fvlm" else None)


def _short_names(places: Sequence[str]) -> dict[str, str]:
    """Each place by what a visitor sees of it: a Hub name, or the last two folders of a path of the server."""
    names: dict[str, str] = {}
    for place in places:
        path = Path(place).expanduser().resolve()
        name = f"{path.parent.name}/{path.name}" if path.is_dir() else place
        same = sum(other == name or other.startswith(f"{name} (") for other in names)
        names[f"{name} ({same + 1})" if same else name] = place
    return names


def _read_findings(path: Path) -> tuple[Any, ...]:
    from medclip_hf.evaluation.ct_zero_shot import Finding

    try:
        return tuple(Finding(**entry) for entry in json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f'{path}: expected a JSON list of {{"name": ..., "anatomy": ..., "absent": ..., "present": ...}} ({error}).'
        ) from error
