"""The tab "Compare": what two models say of the same picture, and where each of them looks."""

from collections.abc import Mapping
from typing import Any

import gradio as gr
import markup
from demo_models import Model, how_to_get
from examples import FIGURE_CONCEPTS
from picture_tab import (
    VIEW_SIDE,
    annotate,
    checked_texts,
    chosen_example,
    concept_choices,
    example_thumbnails,
    heatmap,
)
from sessions import GONE, Sessions, in_a_sentence, read_upload

from medclip_hf.explain.overlay import MAX_OPACITY

PICTURE, FOUND, CONCEPT = "compared_picture", "compared", "compared_concept"


def build_compare_tab(models: Mapping[str, Model], sessions: Sessions) -> None:
    """Put the tab's components and what they do into the current page."""
    if not models:
        gr.HTML(markup.error_message(how_to_get("conceptclip")))
        return
    names = list(models)
    if len(names) == 1:
        gr.HTML(
            markup.status(
                "There is one model alone, so it stands on both sides. Name a second one: python app/app.py "
                "--conceptclip FIRST --conceptclip SECOND."
            )
        )
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            upload = gr.File(
                label=f"Picture: PNG, JPEG, TIFF or DICOM, up to {sessions.max_picture_mb} MB",
                height=150,
                elem_id="compare-upload",
            )
            gr.Markdown("Or an example, drawn by a program:", elem_classes="mc-status")
            thumbs = gr.HTML(example_thumbnails(), js_on_load=markup.ON_LOAD, elem_id="compare-examples")
        with gr.Column(scale=3, min_width=300):
            with gr.Row():
                left = gr.Dropdown(names, value=names[0], label="Left model", min_width=200)
                right = gr.Dropdown(names, value=names[min(1, len(names) - 1)], label="Right model", min_width=200)
            concepts = gr.Dropdown(
                concept_choices(),
                value=list(FIGURE_CONCEPTS),
                multiselect=True,
                allow_custom_value=True,
                label="Concepts: pick, or type and press Enter",
                elem_id="compare-concepts",
            )
            button = gr.Button("Compare", variant="primary", elem_id="compare-run")
    message = gr.HTML(markup.status("Choose a picture."), elem_id="compare-message")
    with gr.Row(equal_height=False):
        views = [gr.HTML(markup.placeholder("Left model"), elem_id="compare-left", min_width=280)]
        views.append(gr.HTML(markup.placeholder("Right model"), elem_id="compare-right", min_width=280))
    opacity = gr.Slider(0.0, 1.0, value=MAX_OPACITY, step=0.05, label="Opacity", elem_id="compare-opacity")
    table = gr.HTML("", js_on_load=markup.ON_LOAD, elem_id="compare-table")
    shown: list[Any] = [message, *views, table]

    def compare(texts: list[str], first: str, second: str, share: float, request: gr.Request) -> tuple[str, ...]:
        kept = sessions.of(request).values
        image = kept.get(PICTURE)
        if image is None:
            return markup.error_message("There is no picture yet: upload one, or choose an example."), "", "", ""
        kept.pop(FOUND, None)
        try:
            if not (wanted := checked_texts(texts, "concepts")):
                raise ValueError("There is nothing to look for: pick a concept.")
            if first not in models or second not in models:
                raise ValueError(f"There is no model {first if first not in models else second}.")
            found = tuple(annotate(models[name], image, wanted) for name in (first, second))
        except ValueError as error:
            bare = markup.picture(markup.fitted(image, VIEW_SIDE), "The picture")
            return markup.error_message(in_a_sentence(error)), bare, bare, ""
        kept[FOUND], kept[CONCEPT] = found, next(iter(found[0].scores))
        rows = [markup.Row(name, name, "", [score, found[1].scores[name]]) for name, score in found[0].scores.items()]
        scores = markup.score_table(
            ["Concept", f"Left: {first}", f"Right: {second}"],
            rows,
            caption="Probability of each concept by each model. Choose one to see where both look.",
            pressed=kept[CONCEPT],
        )
        return (markup.status("Compared."), *both_views(kept, share), scores)

    def on_upload(
        path: str | None, texts: list[str], first: str, second: str, share: float, request: gr.Request
    ) -> tuple[str, ...]:
        kept = sessions.of(request).values
        for name in (PICTURE, FOUND, CONCEPT):
            kept.pop(name, None)
        received = sessions.received(request, path)
        empty = (markup.placeholder("Left model"), markup.placeholder("Right model"), "")
        if received is None:
            return (markup.status("Choose a picture."), *empty)
        try:
            kept[PICTURE] = read_upload(received)
        except ValueError as error:
            return (markup.error_message(str(error)), *empty)
        return compare(texts, first, second, share, request)

    def on_example(
        texts: list[str], first: str, second: str, share: float, event: gr.EventData, request: gr.Request
    ) -> tuple[Any, ...]:
        sessions.of(request).values[PICTURE] = chosen_example(event)
        return (None, *compare(texts, first, second, share, request))

    def on_concept(share: float, event: gr.EventData, request: gr.Request) -> Any:
        sessions.of(request).values[CONCEPT] = str(getattr(event, "choice", ""))
        return on_opacity(share, request)

    def on_opacity(share: float, request: gr.Request) -> Any:
        kept = sessions.of(request).values
        if FOUND not in kept and CONCEPT in kept:
            return markup.error_message(GONE), gr.skip()
        if FOUND not in kept or kept.get(CONCEPT) not in kept[FOUND][0].scores:
            return gr.skip(), gr.skip()
        return both_views(kept, share)

    inputs: list[Any] = [concepts, left, right, opacity]
    compared = button.click(compare, inputs, shown, api_visibility="private")
    upload.upload(on_upload, [upload, *inputs], shown, api_visibility="private")
    upload.clear(on_upload, [upload, *inputs], shown, api_visibility="private")
    chosen = thumbs.click(on_example, inputs, [upload, *shown], api_visibility="private")
    for event in (compared, chosen):
        event.then(fn=None, js=markup.scroll_to("compare-message"))
    quick: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last", "api_visibility": "private"}
    table.click(on_concept, [opacity], views, **quick)
    opacity.input(on_opacity, [opacity], views, **quick)


def both_views(kept: Mapping[str, Any], share: float) -> tuple[str, str]:
    """The heatmaps of the chosen concept by both models, each on its own scale: their spaces have none in common."""
    first, second = (heatmap(found, kept[CONCEPT], min(max(float(share), 0.0), 1.0)) for found in kept[FOUND])
    return first, second
