"""The tab "CT scan": three planes to scroll, outlines of the anatomies, a table of findings with their windows."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
import markup
import numpy as np
from demo_models import Model, how_to_get
from examples import TorsoExample
from sessions import GONE, Sessions, check_volume, in_a_sentence
from slices import HU_WINDOWS, PLANES, Scan, box_on_grid, colours_of, plane_picture

from medclip_hf.data.ct.anatomy import merge_labels
from medclip_hf.data.ct.reading import read_volume
from medclip_hf.explain.ct_overlay import best_slice
from medclip_hf.pipelines.pipeline_ct import WHOLE_VOLUME

KEY, BOX, CHOSEN = "scan", "scan_box", "scan_finding"
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
    if labels is None and not is_whole:
        raise ValueError(_NO_MASK)
    check_volume(scan)
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


def build_ct_tab(models: Mapping[str, Model], sessions: Sessions, torsos: Sequence[TorsoExample]) -> None:
    """Put the tab's components and what they do into the current page."""
    if not models:
        gr.HTML(markup.error_message(how_to_get("fvlm")))
        return
    names = list(models)
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=280):
            scan_file = gr.File(
                label=f"CT scan: .nii or .nii.gz, up to {sessions.max_bytes >> 20} MB", height=140, elem_id="ct-upload"
            )
            mask_file = gr.File(label="Mask: TotalSegmentator label file", height=140, elem_id="ct-mask")
            gr.Markdown("Or an example, drawn by a program:", elem_classes="mc-status")
            pictures = [(str(i), np.asarray(torso.thumbnail), torso.name) for i, torso in enumerate(torsos)]
            thumbs = gr.HTML(markup.thumbnails(pictures, "Examples"), js_on_load=markup.ON_LOAD, elem_id="ct-examples")
            with gr.Accordion("More", open=False):
                version = gr.Radio(["v2", "v1"], value="v2", label="TotalSegmentator that made the mask")
                is_whole = gr.Checkbox(False, label="Score without a mask (whole volume; worse, flagged)")
            model = gr.Dropdown(names, value=names[0], label="Model", visible=len(names) > 1)
            button = gr.Button("Score the scan", variant="primary", elem_id="ct-run")
        with gr.Column(scale=3, min_width=300):
            message = gr.HTML(markup.status("Choose a scan."), elem_id="ct-message")
            with gr.Row(elem_classes="mc-planes"):
                views, sliders = [], []
                for plane in PLANES.values():
                    with gr.Column(min_width=230):
                        views.append(gr.HTML(markup.placeholder(plane), elem_id=f"ct-{plane.lower()}"))
                        sliders.append(
                            gr.Slider(
                                1, 2, value=1, step=1, label=f"{plane} slice", elem_id=f"ct-slider-{plane.lower()}"
                            )
                        )
            legend = gr.HTML("", elem_id="ct-legend")
            with gr.Row():
                hu_window = gr.Radio(list(HU_WINDOWS), value=next(iter(HU_WINDOWS)), label="Grey levels", scale=3)
                outlines = gr.Checkbox(
                    True, label="Outline the anatomies", elem_id="ct-outlines", min_width=160, scale=1
                )
            chosen = gr.HTML("", elem_id="ct-window")
            table = gr.HTML("", js_on_load=markup.ON_LOAD, elem_id="ct-table")

    def planes(kept: Mapping[str, Any], places: Sequence[int], window: str, has_outlines: bool) -> list[str]:
        scan, said = kept[KEY], kept.get(CHOSEN, "")
        return [
            plane_picture(scan, axis, place, window, has_outlines, kept.get(BOX), said)
            for axis, place in zip(PLANES, places, strict=True)
        ]

    def moved(scan: Scan, places: Sequence[int]) -> list[Any]:
        return [
            gr.Slider(minimum=1, maximum=max(2, size), value=place + 1)
            for size, place in zip(scan.values.shape, places, strict=True)
        ]

    def show(scan: Scan, window: str, has_outlines: bool, request: gr.Request) -> list[Any]:
        kept = sessions.of(request).values
        kept[KEY], kept[BOX], kept[CHOSEN] = scan, None, ""
        places = places_of(scan, None, None)
        depth, height, width = scan.values.shape
        spacing = " × ".join(f"{step:.2g}" for step in scan.spacing_mm_dhw)
        said = markup.status(f"{scan.name}: {depth} slices of {height} × {width}, voxels of {spacing} mm. Scored.")
        key = "" if scan.mask is None else markup.legend(colours_of(scan.anatomies))
        shown = planes(kept, places, window, has_outlines)
        return [said, *shown, *moved(scan, places), key, "", findings_table(scan)]

    def refuse(sentence: str, request: gr.Request) -> list[Any]:
        kept = sessions.of(request).values
        for name in (KEY, BOX, CHOSEN):
            kept.pop(name, None)
        empty = [markup.placeholder(plane) for plane in PLANES.values()]
        return [markup.error_message(sentence), *empty, *[gr.skip()] * 3, "", "", ""]

    def score(
        scan_path: str | None,
        mask_path: str | None,
        label_version: str,
        whole: bool,
        name: str,
        window: str,
        has_outlines: bool,
        request: gr.Request,
    ) -> list[Any]:
        scan, mask = sessions.received(request, scan_path), sessions.received(request, mask_path)
        if scan is None:
            return refuse("There is no scan yet: upload one, or choose an example.", request)
        if name not in models:
            return refuse(f"There is no model {name}.", request)
        try:
            return show(read_scan(models[name], scan, mask, label_version, whole), window, has_outlines, request)
        except ValueError as error:
            return refuse(in_a_sentence(error, scan, mask), request)

    def on_example(name: str, window: str, has_outlines: bool, event: gr.EventData, request: gr.Request) -> list[Any]:
        choice = str(getattr(event, "choice", ""))
        torso = torsos[int(choice) if choice.isdigit() and int(choice) < len(torsos) else 0]
        try:
            scan = read_scan(models[name], torso.scan, torso.labels, "v2", False, torso.name)
        except (KeyError, ValueError) as error:
            return [None, None, *refuse(in_a_sentence(error, torso.scan, torso.labels), request)]
        return [None, None, *show(replace(scan, drawn=torso.findings), window, has_outlines, request)]

    def on_finding(window: str, has_outlines: bool, event: gr.EventData, request: gr.Request) -> list[Any]:
        kept = sessions.of(request).values
        choice = str(getattr(event, "choice", ""))
        if KEY not in kept:
            return [*[gr.skip()] * 6, markup.error_message(GONE)]
        if not choice.isdigit() or int(choice) >= len(kept[KEY].rows):
            return [gr.skip()] * 7
        scan: Scan = kept[KEY]
        row = scan.rows[int(choice)]
        kept[BOX] = None if row["window"] is None else box_on_grid(row["window"], scan)
        kept[CHOSEN] = f"Window of {row['finding']}" if kept[BOX] else ""
        places = places_of(scan, row, kept[BOX])
        return [
            *planes(kept, places, window, has_outlines),
            *moved(scan, places),
            window_sentence(scan, row, kept[BOX]),
        ]

    def on_look(d: float, h: float, w: float, window: str, has_outlines: bool, request: gr.Request) -> list[Any]:
        kept = sessions.of(request).values
        if KEY not in kept:
            return [gr.skip()] * 3
        return planes(kept, [int(place) - 1 for place in (d, h, w)], window, has_outlines)

    looks: list[Any] = [hu_window, outlines]
    everything: list[Any] = [message, *views, *sliders, legend, chosen, table]
    run: dict[str, Any] = {"api_visibility": "private", "concurrency_id": "ct", "concurrency_limit": 1}
    scored = button.click(score, [scan_file, mask_file, version, is_whole, model, *looks], everything, **run)
    picked = thumbs.click(on_example, [model, *looks], [scan_file, mask_file, *everything], **run)
    for event in (scored, picked):
        event.then(fn=None, js=markup.scroll_to("ct-message"))
    quick: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last", "api_visibility": "private"}
    table.click(on_finding, looks, [*views, *sliders, chosen], **quick)
    for axis, slider in enumerate(sliders):
        slider.input(_one_plane(sessions, axis), [slider, *looks], [views[axis]], **quick)
    for control in (hu_window, outlines):
        control.input(on_look, [*sliders, *looks], views, **quick)


def _one_plane(sessions: Sessions, axis: int) -> Any:
    def on_scroll(place: float, window: str, has_outlines: bool, request: gr.Request) -> Any:
        kept = sessions.of(request).values
        if KEY not in kept:
            return gr.skip()
        return plane_picture(kept[KEY], axis, int(place) - 1, window, has_outlines, kept.get(BOX), kept.get(CHOSEN, ""))

    return on_scroll


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
