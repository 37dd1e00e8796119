"""The tab "Compare": what two models say of the same picture, and where each of them looks."""

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr
import markup
from demo_models import Model, named_model
from picture_tab import (
    EVERY_CLICK,
    MODEL_EVENT,
    QUICK_EVENT,
    VIEW_SIDE,
    Annotation,
    annotate,
    checked_texts,
    chosen_example,
    concept_box,
    darkness,
    example_thumbnails,
    forget,
    heatmap,
    upload_box,
)
from sessions import GONE, Sessions, in_a_sentence, read_upload

from medclip_hf.explain.overlay import MAX_OPACITY

KEY, FOUND, CONCEPT = "compared_picture", "compared", "compared_concept"
ALONE = (
    "There is one model alone, so it stands on both sides. Name a second one: python app/app.py --conceptclip FIRST "
    "--conceptclip SECOND."
)


class CompareTab:
    """The tab's components and what they do, put into the current page.

    Args:
        models: by name, at least one.
        sessions: where the picture and what was said of it are kept.
    """

    def __init__(self, models: Mapping[str, Model], sessions: Sessions) -> None:
        self.models, self.sessions = models, sessions
        if len(models) == 1:
            gr.HTML(markup.status(ALONE))
        self._lay_out_inputs()
        self._lay_out_results()
        self._connect()

    def _lay_out_inputs(self) -> None:
        names = list(self.models)
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                self.upload = upload_box("compare", self.sessions)
                gr.Markdown("Or an example, drawn by a program:", elem_classes="mc-status")
                self.thumbs = gr.HTML(example_thumbnails(), js_on_load=markup.ON_LOAD, elem_id="compare-examples")
            with gr.Column(scale=3, min_width=300):
                with gr.Row():
                    self.left = gr.Dropdown(names, value=names[0], label="Left model", min_width=200)
                    self.right = gr.Dropdown(names, value=names[:2][-1], label="Right model", min_width=200)
                self.concepts = concept_box("compare")
                self.button = gr.Button("Compare", variant="primary", elem_id="compare-run")

    def _lay_out_results(self) -> None:
        self.message = gr.HTML(markup.status("Choose a picture."), elem_id="compare-message")
        with gr.Row(equal_height=False):
            self.views: list[Any] = [
                gr.HTML(markup.placeholder(f"{side.capitalize()} model"), elem_id=f"compare-{side}", min_width=280)
                for side in ("left", "right")
            ]
        self.opacity = gr.Slider(0.0, 1.0, value=MAX_OPACITY, step=0.05, label="Opacity", elem_id="compare-opacity")
        self.table = gr.HTML("", js_on_load=markup.ON_LOAD, elem_id="compare-table")

    def _connect(self) -> None:
        inputs: list[Any] = [self.concepts, self.left, self.right, self.opacity]
        shown: list[Any] = [self.message, *self.views, self.table]
        compared = self.button.click(self.compare, inputs, shown, **MODEL_EVENT)
        self.upload.upload(self.on_upload, [self.upload, *inputs], shown, **MODEL_EVENT)
        self.upload.clear(self.on_upload, [self.upload, *inputs], shown, **MODEL_EVENT)
        chosen = self.thumbs.click(self.on_example, inputs, [self.upload, *shown], **MODEL_EVENT | EVERY_CLICK)
        for event in (compared, chosen):
            event.then(fn=None, js=markup.scroll_to("compare-message"))
        clicked = self.table.click(self.on_concept, [self.opacity], self.views, **QUICK_EVENT | EVERY_CLICK)
        clicked.then(fn=None, js=markup.scroll_to("compare-message"))
        self.opacity.input(self.on_opacity, [self.opacity], self.views, **QUICK_EVENT)

    def compare(
        self, concepts: list[str], left: str, right: str, opacity: float, request: gr.Request
    ) -> tuple[str, ...]:
        """Message, both views and the table for the picture of the session."""
        kept = self.sessions.of(request).values
        image = kept.get(KEY)
        if image is None:
            return markup.error_message("There is no picture yet: upload one, or choose an example."), "", "", ""
        forget(kept, FOUND)
        try:
            if not (wanted := checked_texts(concepts, "concepts")):
                raise ValueError("There is nothing to look for: pick a concept.")
            found = tuple(annotate(named_model(self.models, name), image, wanted) for name in (left, right))
        except ValueError as error:
            bare = markup.picture(markup.fitted(image, VIEW_SIDE), "The picture")
            return markup.error_message(in_a_sentence(error)), bare, bare, ""
        kept[FOUND], kept[CONCEPT] = found, next(iter(found[0].scores))
        return (
            markup.status("Compared." + darkness(image)),
            *both_views(kept, opacity),
            table_of_both(found, left, right),
        )

    def on_upload(
        self, path: str | None, concepts: list[str], left: str, right: str, opacity: float, request: gr.Request
    ) -> tuple[str, ...]:
        """As `compare`, for a file that came or went."""
        kept = self.sessions.of(request).values
        forget(kept, KEY, FOUND, CONCEPT)
        received = self.sessions.received(request, path)
        empty = (markup.placeholder("Left model"), markup.placeholder("Right model"), "")
        if received is None:
            return (markup.status("Choose a picture."), *empty)
        try:
            kept[KEY] = read_upload(received)
        except ValueError as error:
            return (markup.error_message(str(error)), *empty)
        return self.compare(concepts, left, right, opacity, request)

    def on_example(
        self, concepts: list[str], left: str, right: str, opacity: float, event: gr.EventData, request: gr.Request
    ) -> tuple[Any, ...]:
        """No upload any more, then as `compare`."""
        kept = self.sessions.of(request).values
        forget(kept, FOUND, CONCEPT)
        kept[KEY] = chosen_example(event)
        return (None, *self.compare(concepts, left, right, opacity, request))

    def on_concept(self, opacity: float, event: gr.EventData, request: gr.Request) -> Any:
        """Both heatmaps of the concept that was clicked."""
        self.sessions.of(request).values[CONCEPT] = str(getattr(event, "choice", ""))
        return self.on_opacity(opacity, request)

    def on_opacity(self, opacity: float, request: gr.Request) -> Any:
        """Both heatmaps of the chosen concept."""
        kept = self.sessions.of(request).values
        if FOUND not in kept and CONCEPT in kept:
            return markup.error_message(GONE), gr.skip()
        if FOUND not in kept or kept.get(CONCEPT) not in kept[FOUND][0].scores:
            return gr.skip(), gr.skip()
        return both_views(kept, opacity)


def both_views(kept: Mapping[str, Any], opacity: float) -> tuple[str, str]:
    """The heatmaps of the chosen concept by both models, each on its own scale: their spaces have none in common."""
    left, right = (heatmap(found, kept[CONCEPT], opacity) for found in kept[FOUND])
    return left, right


def table_of_both(found: Sequence[Annotation], left: str, right: str) -> str:
    """Concepts with the scores of both models, in the order of the left one."""
    rows = [markup.Row(name, name, "", [score, found[1].scores[name]]) for name, score in found[0].scores.items()]
    return markup.score_table(
        ["Concept", "Left", "Right"],
        rows,
        caption=f"Probability of each concept. Left: {left}. Right: {right}. Choose a concept to see where both look.",
        pressed=rows[0].choice,
    )
