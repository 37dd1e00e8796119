"""The tab "Picture": prompts and concepts for a picture, and where each concept is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
import markup
import numpy as np
from demo_models import Model, named_model
from examples import FIGURE_CONCEPTS, FIGURE_PROMPTS, figure_examples
from PIL import Image
from sessions import GONE, Sessions, in_a_sentence, read_upload

from medclip_hf.evaluation.zero_shot import classify_images, published_share_of_patches
from medclip_hf.explain.overlay import MAX_OPACITY, overlay_map
from medclip_hf.pipelines.inputs import shipped_vocabulary

VIEW_SIDE = 560  # pixels of the longer side
THUMBNAIL_SIDE = 96
MAX_TEXTS, MAX_LETTERS = 50, 300
_DARK = 32  # of 255
KEY, FOUND, CONCEPT = "picture", "annotation", "concept"
# One question at a time for a model; what is quick need not wait for it.
MODEL_EVENT: dict[str, Any] = {"api_visibility": "private", "concurrency_id": "conceptclip", "concurrency_limit": 1}
QUICK_EVENT: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "trigger_mode": "always_last"}
# What was clicked stands in the event. Gradio repeats the first event where it leaves out those in between
# ("always_last"), or drops the others ("once"); answered one by one, what is shown in the end is what is marked.
EVERY_CLICK: dict[str, Any] = {"trigger_mode": "multiple", "concurrency_limit": 1}


@dataclass(frozen=True)
class Annotation:
    """What a model says of a picture.

    Args:
        image: RGB.
        scores: of each concept, in [0, 1], best first.
        maps: of each concept, (rows, columns); None where the model has none.
    """

    image: Image.Image
    scores: dict[str, float]
    maps: dict[str, np.ndarray | None]


def concept_choices() -> list[str]:
    """What can be picked: the concepts of the drawn figures, then those that the package ships."""
    return list(dict.fromkeys([*FIGURE_CONCEPTS, *(name for name, _ in shipped_vocabulary())]))


def annotate(model: Model, image: Image.Image, concepts: Sequence[str]) -> Annotation:
    """Concepts of a picture by one model."""
    entries = model.pipe(image, concepts=list(concepts), top_k=None)
    scores = {entry["label"]: entry["score"] for entry in entries}
    return Annotation(image, scores, {entry["label"]: entry["map"] for entry in entries})


def checked_texts(texts: Sequence[str] | None, what: str) -> list[str]:
    """Texts without blanks and repetitions.

    Raises:
        ValueError: too many, or one too long.
    """
    kept = list(dict.fromkeys(text.strip() for text in texts or () if text.strip()))
    if len(kept) > MAX_TEXTS:
        raise ValueError(f"{len(kept)} {what} are too many: at most {MAX_TEXTS} at a time.")
    if any(len(text) > MAX_LETTERS for text in kept):
        raise ValueError(f"One of the {what} is longer than {MAX_LETTERS} letters: shorten it.")
    return kept


def score_prompts(model: Model, image: Image.Image, prompts: Sequence[str]) -> list[tuple[str, float]]:
    """Which of the prompts describes the picture, best first; the probabilities share 1."""
    vision = model.pipe.model.config.vision_config
    scores = classify_images(
        model.pipe.model,
        model.pipe.processor,
        [image],
        prompts,
        ("{}",),
        top_patches=published_share_of_patches((vision.image_size // vision.patch_size) ** 2),
    ).mixed_scores[0]
    return sorted(zip(prompts, map(float, scores), strict=True), key=lambda pair: -pair[1])


def heatmap(annotation: Annotation, concept: str, opacity: float) -> str:
    """The picture with a concept's map over it. All maps of a picture share one range: what is absent stays pale."""
    pixels = markup.fitted(annotation.image, VIEW_SIDE)
    concept_map = annotation.maps.get(concept)
    if concept_map is None:
        return markup.picture(
            pixels, "The picture", "This model has no concept maps (it was not trained with patches)."
        )
    maps = [values for values in annotation.maps.values() if values is not None]
    low, high = float(min(values.min() for values in maps)), float(max(values.max() for values in maps))
    shown = overlay_map(
        pixels, concept_map, value_range=(low, max(high, low + 1e-6)), max_opacity=min(max(opacity, 0.0), 1.0)
    )
    caption = f"{concept}: probability {annotation.scores[concept]:.2f}. Bright where patches resemble the concept."
    return markup.picture(shown, f"Heatmap of {concept} over the picture", caption) + markup.colour_bar(
        low, high, "cosine similarity"
    )


def example_thumbnails() -> str:
    """The drawn figures as buttons."""
    return markup.thumbnails(
        [
            (str(place), markup.fitted(example.image, THUMBNAIL_SIDE), example.name)
            for place, example in enumerate(figure_examples())
        ],
        "Examples",
    )


class PictureTab:
    """The tab's components and what they do, put into the current page.

    Args:
        models: by name, at least one.
        sessions: where the picture and what was said of it are kept.
    """

    def __init__(self, models: Mapping[str, Model], sessions: Sessions) -> None:
        self.models, self.sessions = models, sessions
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                self._lay_out_inputs()
            with gr.Column(scale=3, min_width=300):
                self._lay_out_results()
        self._connect()

    def _lay_out_inputs(self) -> None:
        names = list(self.models)
        self.upload = upload_box("picture", self.sessions)
        gr.Markdown("Or an example, drawn by a program:", elem_classes="mc-status")
        self.thumbs = gr.HTML(example_thumbnails(), js_on_load=markup.ON_LOAD, elem_id="picture-examples")
        self.concepts = concept_box("picture")
        self.prompts = gr.Dropdown(
            list(FIGURE_PROMPTS),
            value=list(FIGURE_PROMPTS),
            multiselect=True,
            allow_custom_value=True,
            label="Prompts: which one describes the picture?",
            elem_id="picture-prompts",
        )
        self.model = gr.Dropdown(names, value=names[0], label="Model", visible=len(names) > 1)
        self.button = gr.Button("Score the picture", variant="primary", elem_id="picture-run")

    def _lay_out_results(self) -> None:
        self.message = gr.HTML(markup.status("Choose a picture."), elem_id="picture-message")
        self.view = gr.HTML(markup.placeholder("The picture and its heatmaps appear here."), elem_id="picture-view")
        self.opacity = gr.Slider(0.0, 1.0, value=MAX_OPACITY, step=0.05, label="Opacity", elem_id="picture-opacity")
        self.table = gr.HTML("", js_on_load=markup.ON_LOAD, elem_id="picture-table")
        self.prompt_table = gr.HTML("", elem_id="picture-prompt-table")

    def _connect(self) -> None:
        inputs: list[Any] = [self.concepts, self.prompts, self.model, self.opacity]
        shown: list[Any] = [self.message, self.view, self.table, self.prompt_table]
        scored = self.button.click(self.score, inputs, shown, **MODEL_EVENT)
        # A file that goes because an example comes is no wish of the visitor: hence not `change`.
        self.upload.upload(self.on_upload, [self.upload, *inputs], shown, **MODEL_EVENT)
        self.upload.clear(self.on_upload, [self.upload, *inputs], shown, **MODEL_EVENT)
        chosen = self.thumbs.click(self.on_example, inputs, [self.upload, *shown], **MODEL_EVENT | EVERY_CLICK)
        for event in (scored, chosen):
            event.then(fn=None, js=markup.scroll_to("picture-message"))
        clicked = self.table.click(self.on_concept, [self.opacity], [self.view], **QUICK_EVENT | EVERY_CLICK)
        clicked.then(fn=None, js=markup.scroll_to("picture-message"))
        self.opacity.input(self.on_opacity, [self.opacity], [self.view], **QUICK_EVENT)

    def score(
        self, concepts: list[str], prompts: list[str], name: str, opacity: float, request: gr.Request
    ) -> tuple[str, ...]:
        """Message, view and both tables for the picture of the session."""
        kept = self.sessions.of(request).values
        image = kept.get(KEY)
        if image is None:
            return markup.error_message("There is no picture yet: upload one, or choose an example."), "", "", ""
        kept.pop(FOUND, None)
        bare = markup.picture(markup.fitted(image, VIEW_SIDE), "The picture")
        try:
            found, answers = self._ask(name, image, concepts, prompts)
        except ValueError as error:
            return markup.error_message(in_a_sentence(error)), bare, "", ""
        kept[FOUND], kept[CONCEPT] = found, next(iter(found.scores), "")
        view = heatmap(found, kept[CONCEPT], opacity) if found.scores else bare
        said = f"Scored by {name}." + " Choose a concept in the table to see where it is." * bool(found.scores)
        return markup.status(said + darkness(image)), view, concept_table(found), prompt_answers(answers)

    def _ask(
        self, name: str, image: Image.Image, concepts: Sequence[str], prompts: Sequence[str]
    ) -> tuple[Annotation, list[tuple[str, float]]]:
        wanted, described = checked_texts(concepts, "concepts"), checked_texts(prompts, "prompts")
        if not wanted and not described:
            raise ValueError("There is nothing to look for: pick a concept, or type a prompt.")
        model = named_model(self.models, name)
        found = annotate(model, image, wanted) if wanted else Annotation(image, {}, {})
        return found, score_prompts(model, image, described) if described else []

    def on_upload(
        self, path: str | None, concepts: list[str], prompts: list[str], name: str, opacity: float, request: gr.Request
    ) -> tuple[str, ...]:
        """As `score`, for a file that came or went."""
        kept = self.sessions.of(request).values
        forget(kept, KEY, FOUND, CONCEPT)
        received = self.sessions.received(request, path)
        if received is None:
            return markup.status("Choose a picture."), markup.placeholder("No picture."), "", ""
        try:
            kept[KEY] = read_upload(received)
        except ValueError as error:
            return markup.error_message(str(error)), markup.placeholder("No picture."), "", ""
        return self.score(concepts, prompts, name, opacity, request)

    def on_example(
        self,
        concepts: list[str],
        prompts: list[str],
        name: str,
        opacity: float,
        event: gr.EventData,
        request: gr.Request,
    ) -> tuple[Any, ...]:
        """No upload any more, then as `score`."""
        kept = self.sessions.of(request).values
        forget(kept, FOUND, CONCEPT)
        kept[KEY] = chosen_example(event)
        return (None, *self.score(concepts, prompts, name, opacity, request))

    def on_concept(self, opacity: float, event: gr.EventData, request: gr.Request) -> Any:
        """The heatmap of the concept that was clicked."""
        self.sessions.of(request).values[CONCEPT] = str(getattr(event, "choice", ""))
        return self.on_opacity(opacity, request)

    def on_opacity(self, opacity: float, request: gr.Request) -> Any:
        """The heatmap of the chosen concept."""
        kept = self.sessions.of(request).values
        if FOUND not in kept:
            return markup.error_message(GONE) if CONCEPT in kept else gr.skip()
        if kept.get(CONCEPT) not in kept[FOUND].scores:
            return gr.skip()
        return heatmap(kept[FOUND], kept[CONCEPT], opacity)


def upload_box(tab: str, sessions: Sessions) -> gr.File:
    """Where a picture is uploaded."""
    label = f"Picture: PNG, JPEG, TIFF or DICOM, up to {sessions.max_picture_mb} MB"
    return gr.File(label=label, height=150, elem_id=f"{tab}-upload")


def concept_box(tab: str) -> gr.Dropdown:
    """Where concepts are picked or typed."""
    return gr.Dropdown(
        concept_choices(),
        value=list(FIGURE_CONCEPTS),
        multiselect=True,
        allow_custom_value=True,
        label="Concepts: pick, or type and press Enter",
        elem_id=f"{tab}-concepts",
    )


def concept_table(found: Annotation) -> str:
    """Concepts with their scores, best first."""
    if not found.scores:
        return ""
    rows = [markup.Row(name, name, "", [score]) for name, score in found.scores.items()]
    return markup.score_table(
        ["Concept", "Probability"],
        rows,
        caption="Concepts, each by itself. Choose one to see where it is.",
        pressed=rows[0].choice,
    )


def prompt_answers(answers: Sequence[tuple[str, float]]) -> str:
    """Prompts with their probabilities."""
    if not answers:
        return ""
    caption = "Prompts, one against the other."
    if len(answers) == 1:
        caption = "One prompt alone always has probability 1: add another for it to be compared with."
    return markup.plain_table(["Prompt", "Probability"], answers, caption=caption)


def darkness(image: Image.Image) -> str:
    """What to say of a picture that is all but black, as 12 bits are when they are stored in 16; else nothing."""
    brightest = max(high for _, high in image.getextrema())
    if brightest >= _DARK:
        return ""
    return (
        f" The picture is all but black: its brightest value is {brightest} of 255, so the scores mean little. Export "
        "it with a grey-level window, or upload the DICOM file."
    )


def chosen_example(event: gr.EventData) -> Image.Image:
    """The picture of the thumbnail that was clicked."""
    choice = str(getattr(event, "choice", ""))
    examples = figure_examples()
    return examples[int(choice) if choice.isdigit() and int(choice) < len(examples) else 0].image


def forget(kept: dict[str, Any], *names: str) -> None:
    """Drop what a session keeps under some names."""
    for name in names:
        kept.pop(name, None)
