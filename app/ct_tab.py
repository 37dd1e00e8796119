"""The tab "CT scan": three planes to scroll, outlines of the anatomies, a table of findings with their windows."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
import markup
import numpy as np
from demo_models import Model, named_model
from examples import TorsoExample
from picture_tab import EVERY_CLICK, QUICK_EVENT, forget
from sessions import GONE, Sessions, check_volume, in_a_sentence
from slices import HU_WINDOWS, PLANES, Scan, box_on_grid, colours_of, plane_picture

from medclip_hf.data.ct.anatomy import merge_labels
from medclip_hf.data.ct.reading import read_volume
from medclip_hf.explain.ct_overlay import best_slice
from medclip_hf.pipelines.pipeline_ct import WHOLE_VOLUME

KEY, BOX, CHOSEN, EXAMPLE = "scan", "scan_box", "scan_finding", "torso"
MODEL_EVENT: dict[str, Any] = {"api_visibility": "private", "concurrency_id": "fvlm", "concurrency_limit": 1}
_NO_MASK = (
    "fVLM scores each anatomy inside its mask. Upload the label file that TotalSegmentator made of this scan, or tick "
    "“Score without a mask”, which is worse and flagged."
)


def read_scan(
    model: Model, scan: Path, labels: Path | None, label_version: Any, is_whole: bool, name: str = ""
) -> Scan:
    """A scan on its own grid with the scores of its findings.

    Raises:
        ValueError: it cannot be used, in a sentence without the server's path.
    """
    check_volume(scan)
    if labels is None and not is_whole:
        raise ValueError(_NO_MASK)
    if labels is not None:
        check_volume(labels)
    orientation = model.pipe.image_processor.orientation
    anatomies = tuple(model.pipe.model.config.anatomies)
    options = {"mask": labels, "label_version": label_version} if labels is not None else {"without_mask": WHOLE_VOLUME}
    try:
        rows = model.pipe(model.pipe.prepare(scan, **options), findings=model.findings)
        # The model's grid is coarser than the file's, so what is shown is read once more.
        volume = read_volume(scan, orientation=orientation)
        mask = None
        if labels is not None:
            stored = read_volume(labels, orientation=orientation)
            mask = merge_labels(stored.values, label_version, anatomies, labels.name)
    except (OSError, MemoryError, ValueError) as error:
        raise ValueError(in_a_sentence(error, scan, labels)) from error
    return Scan(
        name or scan.name, np.asarray(volume.values), mask, volume.affine, volume.spacing_mm_dhw, anatomies, rows
    )


def findings_table(scan: Scan) -> str:
    """Findings by anatomy, with what lowers the trust in each."""
    order = {name: place for place, name in enumerate(scan.anatomies)}
    rows = sorted(enumerate(scan.rows), key=lambda pair: (order[pair[1]["anatomy"]], -(pair[1]["probability"] or 0.0)))
    entries = []
    for place, row in rows:
        notes = [] if scan.drawn is None else ["drawn" if row["finding"] in scan.drawn else "not drawn"]
        notes += row["flags"]
        entries.append(markup.Row(str(place), row["finding"], row["anatomy"], [row["probability"]], "; ".join(notes)))
    return markup.score_table(
        ["Finding", "Probability"],
        entries,
        caption="Findings, anatomy by anatomy. Choose one to see the window that was scored.",
        note_title="Notes",
    )


def places_of(scan: Scan, row: Mapping[str, Any] | None, box: Any) -> list[int]:
    """Where to look along depth, height and width: most of the anatomy, else the middle of the window or the scan."""
    mask = None
    if scan.mask is not None:
        mask = scan.mask > 0 if row is None else scan.mask == scan.anatomies.index(row["anatomy"]) + 1
    if mask is not None and mask.any():
        return [best_slice(mask, axis) for axis in PLANES]
    bounds = box or tuple((0, size) for size in scan.values.shape)
    return [(start + end) // 2 for start, end in bounds]


class CTTab:
    """The tab's components and what they do, put into the current page.

    Args:
        models: by name, at least one.
        sessions: where the scan and what was said of it are kept.
        torsos: examples.
    """

    def __init__(self, models: Mapping[str, Model], sessions: Sessions, torsos: Sequence[TorsoExample]) -> None:
        self.models, self.sessions, self.torsos = models, sessions, torsos
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=280):
                self._lay_out_inputs()
            with gr.Column(scale=3, min_width=300):
                self._lay_out_results()
        self._connect()

    def _lay_out_inputs(self) -> None:
        names, limit = list(self.models), self.sessions.max_bytes >> 20
        self.scan_file = gr.File(label=f"CT scan: .nii or .nii.gz, up to {limit} MB", height=140, elem_id="ct-upload")
        self.mask_file = gr.File(label="Mask: TotalSegmentator label file", height=140, elem_id="ct-mask")
        gr.Markdown("Or an example, drawn by a program:", elem_classes="mc-status")
        pictures = [(str(i), np.asarray(torso.thumbnail), torso.name) for i, torso in enumerate(self.torsos)]
        examples = markup.thumbnails(pictures, "Examples")
        self.thumbs = gr.HTML(examples, js_on_load=markup.ON_LOAD, elem_id="ct-examples")
        with gr.Accordion("More", open=False):
            self.version = gr.Radio(["v2", "v1"], value="v2", label="TotalSegmentator that made the mask")
            self.is_whole = gr.Checkbox(False, label="Score without a mask (whole volume; worse, flagged)")
        self.model = gr.Dropdown(names, value=names[0], label="Model", visible=len(names) > 1)
        self.button = gr.Button("Score the scan", variant="primary", elem_id="ct-run")

    def _lay_out_results(self) -> None:
        self.message = gr.HTML(markup.status("Choose a scan."), elem_id="ct-message")
        self.views: list[Any] = []
        self.sliders: list[Any] = []
        with gr.Row(elem_classes="mc-planes"):
            for plane in PLANES.values():
                name = plane.lower()
                with gr.Column(min_width=230):
                    self.views.append(gr.HTML(markup.placeholder(plane), elem_id=f"ct-{name}"))
                    slider = gr.Slider(1, 2, value=1, step=1, label=f"{plane} slice", elem_id=f"ct-slider-{name}")
                    self.sliders.append(slider)
        self.legend = gr.HTML("", elem_id="ct-legend")
        levels = list(HU_WINDOWS)
        self.hu_window = gr.Radio(levels, value=levels[0], label="Grey levels")
        self.outlines = gr.Checkbox(True, label="Outline the anatomies", elem_id="ct-outlines")
        self.chosen = gr.HTML("", elem_id="ct-window")
        self.table = gr.HTML("", js_on_load=markup.ON_LOAD, elem_id="ct-table")

    def _connect(self) -> None:
        looks: list[Any] = [self.hu_window, self.outlines]
        shown: list[Any] = [self.message, *self.views, *self.sliders, self.legend, self.chosen, self.table]
        files: list[Any] = [self.scan_file, self.mask_file]
        options: list[Any] = [self.version, self.is_whole, self.model]
        scored = self.button.click(self.score, [*files, *options, *looks], shown, **MODEL_EVENT)
        picked = self.thumbs.click(self.on_example, [self.model, *looks], [*files, *shown], **MODEL_EVENT | EVERY_CLICK)
        for event in (scored, picked):
            event.then(fn=None, js=markup.scroll_to("ct-message"))
        found: list[Any] = [*self.views, *self.sliders, self.chosen]
        clicked = self.table.click(self.on_finding, looks, found, **QUICK_EVENT | EVERY_CLICK)
        clicked.then(fn=None, js=markup.scroll_to("ct-message"))
        for axis, slider in enumerate(self.sliders):
            slider.input(self._scroll(axis), [slider, *looks], [self.views[axis]], **QUICK_EVENT)
        for control in (self.hu_window, self.outlines):
            control.input(self.on_look, [*self.sliders, *looks], self.views, **QUICK_EVENT)

    def score(
        self,
        scan_path: str | None,
        mask_path: str | None,
        label_version: str,
        is_whole: bool,
        name: str,
        window: str,
        has_outlines: bool,
        request: gr.Request,
    ) -> list[Any]:
        """Message, planes, sliders, legend, window and table for the uploaded scan."""
        scan, mask = self.sessions.received(request, scan_path), self.sessions.received(request, mask_path)
        torso = self.sessions.of(request).values.get(EXAMPLE)
        if scan is None and torso is not None:  # once more, by another model
            return self._score_torso(torso, name, window, has_outlines, request)
        if scan is None:
            return self._refuse("There is no scan yet: upload one, or choose an example.", request)
        try:
            found = read_scan(named_model(self.models, name), scan, mask, label_version, is_whole)
        except ValueError as error:
            return self._refuse(in_a_sentence(error, scan, mask), request)
        forget(self.sessions.of(request).values, EXAMPLE)
        return self._show(found, name, window, has_outlines, request)

    def on_example(
        self, name: str, window: str, has_outlines: bool, event: gr.EventData, request: gr.Request
    ) -> list[Any]:
        """No uploads any more, then as `score`."""
        choice = str(getattr(event, "choice", ""))
        torso = self.torsos[int(choice) if choice.isdigit() and int(choice) < len(self.torsos) else 0]
        self.sessions.of(request).values[EXAMPLE] = torso
        return [None, None, *self._score_torso(torso, name, window, has_outlines, request)]

    def on_finding(self, window: str, has_outlines: bool, event: gr.EventData, request: gr.Request) -> list[Any]:
        """Planes, sliders and sentence for the finding that was clicked."""
        kept = self.sessions.of(request).values
        choice = str(getattr(event, "choice", ""))
        if KEY not in kept:
            return [*[gr.skip()] * 6, markup.error_message(GONE)]
        scan: Scan = kept[KEY]
        if not choice.isdigit() or int(choice) >= len(scan.rows):
            return [gr.skip()] * 7
        row = scan.rows[int(choice)]
        kept[BOX] = None if row["window"] is None else box_on_grid(row["window"], scan)
        kept[CHOSEN] = f"Window of {row['finding']}" if kept[BOX] else ""
        places = places_of(scan, row, kept[BOX])
        said = window_sentence(scan, row, kept[BOX])
        return [*planes(kept, places, window, has_outlines), *sliders_at(scan, places), said]

    def on_look(self, d: float, h: float, w: float, window: str, has_outlines: bool, request: gr.Request) -> list[Any]:
        """All planes again, with other grey levels or outlines."""
        kept = self.sessions.of(request).values
        if KEY not in kept:
            return [gr.skip()] * 3
        return planes(kept, [int(place) - 1 for place in (d, h, w)], window, has_outlines)

    def _scroll(self, axis: int) -> Any:
        def on_scroll(place: float, window: str, has_outlines: bool, request: gr.Request) -> Any:
            kept = self.sessions.of(request).values
            if KEY not in kept:
                return gr.skip()
            chosen = kept.get(CHOSEN, "")
            return plane_picture(kept[KEY], axis, int(place) - 1, window, has_outlines, kept.get(BOX), chosen)

        return on_scroll

    def _score_torso(
        self, torso: TorsoExample, name: str, window: str, has_outlines: bool, request: gr.Request
    ) -> list[Any]:
        try:
            scan = read_scan(named_model(self.models, name), torso.scan, torso.labels, "v2", False, torso.name)
        except ValueError as error:
            return self._refuse(in_a_sentence(error, torso.scan, torso.labels), request)
        return self._show(replace(scan, drawn=torso.findings), name, window, has_outlines, request)

    def _show(self, scan: Scan, name: str, window: str, has_outlines: bool, request: gr.Request) -> list[Any]:
        kept = self.sessions.of(request).values
        kept[KEY], kept[BOX], kept[CHOSEN] = scan, None, ""
        places = places_of(scan, None, None)
        depth, height, width = scan.values.shape
        spacing = " × ".join(f"{step:.2g}" for step in scan.spacing_mm_dhw)
        said = markup.status(
            f"{scan.name}: {depth} slices of {height} × {width}, voxels of {spacing} mm. Scored by {name}."
        )
        key = "" if scan.mask is None else markup.legend(colours_of(scan.anatomies))
        shown = planes(kept, places, window, has_outlines)
        return [said, *shown, *sliders_at(scan, places), key, "", findings_table(scan)]

    def _refuse(self, sentence: str, request: gr.Request) -> list[Any]:
        forget(self.sessions.of(request).values, KEY, BOX, CHOSEN)
        empty = [markup.placeholder(plane) for plane in PLANES.values()]
        return [markup.error_message(sentence), *empty, *[gr.skip()] * 3, "", "", ""]


def planes(kept: Mapping[str, Any], places: Sequence[int], window: str, has_outlines: bool) -> list[str]:
    """The three slices of the scan of a session."""
    return [
        plane_picture(kept[KEY], axis, place, window, has_outlines, kept.get(BOX), kept.get(CHOSEN, ""))
        for axis, place in zip(PLANES, places, strict=True)
    ]


def sliders_at(scan: Scan, places: Sequence[int]) -> list[Any]:
    """The sliders with a scan's numbers of slices, each at a place counted from 0."""
    return [
        gr.Slider(minimum=1, maximum=max(2, size), value=place + 1)
        for size, place in zip(scan.values.shape, places, strict=True)
    ]


def window_sentence(scan: Scan, row: Mapping[str, Any], box: Any) -> str:
    """What the frame in the slices is."""
    if row["window"] is None:
        return markup.error_message(f"{row['finding']}: not scored, since {row['anatomy']} is not in the scan.")
    size = " × ".join(
        f"{(end - start) * step:.0f}" for (start, end), step in zip(box, scan.spacing_mm_dhw, strict=True)
    )
    slices = f"axial slices {box[0][0] + 1} to {box[0][1]}"
    flags = f" {'; '.join(row['flags'])}." if row["flags"] else ""
    return markup.status(
        f"{row['finding']} ({row['anatomy']}), probability {row['probability']:.2f}: the dashed frame is the window "
        f"that was scored, {size} mm, {slices}.{flags}"
    )
