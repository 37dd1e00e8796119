"""The tab "Picture": prompts and concepts for a picture, and where each concept is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
import markup
import numpy as np
from demo_models import Model, how_to_get
from examples import FIGURE_CONCEPTS, FIGURE_PROMPTS, figure_examples
from PIL import Image
from sessions import GONE, Sessions, in_a_sentence, read_upload

from medclip_hf.evaluation.zero_shot import classify_images, published_share_of_patches
from medclip_hf.explain.overlay import MAX_OPACITY, overlay_map
from medclip_hf.pipelines.inputs import shipped_vocabulary

VIEW_SIDE = 560  # pixels of the longer side
THUMBNAIL_SIDE = 96
MAX_TEXTS, MAX_LETTERS = 50, 300
KEY = "picture"


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
    shown = overlay_map(pixels, concept_map, value_range=(low, max(high, low + 1e-6)), max_opacity=opacity)
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


def build_picture_tab(models: Mapping[str, Model], sessions: Sessions) -> None:
    """Put the tab's components and what they do into the current page."""
    if not models:
        gr.HTML(markup.error_message(how_to_get("conceptclip")))
        return
    names = list(models)
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            upload = gr.File(
                label=f"Picture: PNG, JPEG, TIFF or DICOM, up to {sessions.max_picture_mb} MB",
                height=150,
                elem_id="picture-upload",
            )
            gr.Markdown("Or an example, drawn by a program:", elem_classes="mc-status")
            thumbs = gr.HTML(example_thumbnails(), js_on_load=markup.ON_LOAD, elem_id="picture-examples")
            concepts = gr.Dropdown(
                concept_choices(),
                value=list(FIGURE_CONCEPTS),
                multiselect=True,
                allow_custom_value=True,
                filterable=True,
                label="Concepts: pick, or type and press Enter",
                elem_id="picture-concepts",
            )
            prompts = gr.Dropdown(
                list(FIGURE_PROMPTS),
                value=list(FIGURE_PROMPTS),
                multiselect=True,
                allow_custom_value=True,
                label="Prompts: which one describes the picture?",
                elem_id="picture-prompts",
            )
            model = gr.Dropdown(names, value=names[0], label="Model", visible=len(names) > 1)
            button = gr.Button("Score the picture", variant="primary", elem_id="picture-run")
        with gr.Column(scale=3, min_width=300):
            message = gr.HTML(markup.status("Choose a picture."), elem_id="picture-message")
            view = gr.HTML(markup.placeholder("The picture and its heatmaps appear here."), elem_id="picture-view")
            opacity = gr.Slider(0.0, 1.0, value=MAX_OPACITY, step=0.05, label="Opacity", elem_id="picture-opacity")
            table = gr.HTML("", js_on_load=markup.ON_LOAD, elem_id="picture-table")
            prompt_table = gr.HTML("", elem_id="picture-prompt-table")

    shown: list[Any] = [message, view, table, prompt_table]

    def score(
        concept_texts: list[str], prompt_texts: list[str], name: str, share: float, request: gr.Request
    ) -> tuple[str, ...]:
        kept = sessions.of(request).values
        image = kept.get(KEY)
        if image is None:
            return markup.error_message("There is no picture yet: upload one, or choose an example."), "", "", ""
        kept.pop("annotation", None)
        bare = markup.picture(markup.fitted(image, VIEW_SIDE), "The picture")
        try:
            wanted = checked_texts(concept_texts, "concepts")
            described = checked_texts(prompt_texts, "prompts")
            if not wanted and not described:
                raise ValueError("There is nothing to look for: pick a concept, or type a prompt.")
            if name not in models:
                raise ValueError(f"There is no model {name}.")
            found = annotate(models[name], image, wanted) if wanted else Annotation(image, {}, {})
            answers = score_prompts(models[name], image, described) if described else []
        except ValueError as error:
            return markup.error_message(in_a_sentence(error)), bare, "", ""
        kept["annotation"], kept["concept"] = found, next(iter(found.scores), "")
        view_html = heatmap(found, kept["concept"], share) if found.scores else bare
        said = markup.status("Scored. Choose a concept in the table to see where it is.")
        return said, view_html, concept_table(found), prompt_answers(answers)

    def on_upload(
        path: str | None, c: list[str], p: list[str], m: str, o: float, request: gr.Request
    ) -> tuple[str, ...]:
        kept = sessions.of(request).values
        forget_picture(kept)
        received = sessions.received(request, path)
        if received is None:
            return markup.status("Choose a picture."), markup.placeholder("No picture."), "", ""
        try:
            kept[KEY] = read_upload(received)
        except ValueError as error:
            return markup.error_message(str(error)), markup.placeholder("No picture."), "", ""
        return score(c, p, m, o, request)

    def on_example(
        c: list[str], p: list[str], m: str, o: float, event: gr.EventData, request: gr.Request
    ) -> tuple[Any, ...]:
        forget_picture(sessions.of(request).values)
        sessions.of(request).values[KEY] = chosen_example(event)
        return (None, *score(c, p, m, o, request))

    def on_concept(share: float, event: gr.EventData, request: gr.Request) -> Any:
        sessions.of(request).values["concept"] = str(getattr(event, "choice", ""))
        return on_opacity(share, request)

    def on_opacity(share: float, request: gr.Request) -> Any:
        kept = sessions.of(request).values
        found = kept.get("annotation")
        if found is None:
            return markup.error_message(GONE) if "concept" in kept else gr.skip()
        if kept.get("concept") not in found.scores:
            return gr.skip()
        return heatmap(found, kept["concept"], min(max(float(share), 0.0), 1.0))

    inputs: list[Any] = [concepts, prompts, model, opacity]
    scored = button.click(score, inputs, shown, api_visibility="private")
    # A file that goes because an example comes is no wish of the visitor: hence not `change`.
    upload.upload(on_upload, [upload, *inputs], shown, api_visibility="private")
    upload.clear(on_upload, [upload, *inputs], shown, api_visibility="private")
    chosen = thumbs.click(on_example, inputs, [upload, *shown], api_visibility="private")
    for event in (scored, chosen):
        event.then(fn=None, js=markup.scroll_to("picture-message"))
    quick: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last", "api_visibility": "private"}
    table.click(on_concept, [opacity], [view], **quick)
    opacity.input(on_opacity, [opacity], [view], **quick)


def concept_table(found: Annotation) -> str:
    """Concepts with their scores, best first."""
    if not found.scores:
        return ""
    rows = [markup.Row(name, name, "", [score]) for name, score in found.scores.items()]
    return markup.score_table(
        ["Concept", "Probability"], rows, caption="Concepts, each by itself. Choose one to see where it is.",
        pressed=rows[0].choice,
    )  # fmt: skip


def prompt_answers(answers: Sequence[tuple[str, float]]) -> str:
    """Prompts with their probabilities."""
    if not answers:
        return ""
    return markup.plain_table(["Prompt", "Probability"], answers, caption="Prompts, one against the other.")


def chosen_example(event: gr.EventData) -> Image.Image:
    """The picture of the thumbnail that was clicked."""
    choice = str(getattr(event, "choice", ""))
    examples = figure_examples()
    return examples[int(choice) if choice.isdigit() and int(choice) < len(examples) else 0].image


def forget_picture(kept: dict[str, Any]) -> None:
    """Drop a picture and what was said of it."""
    for name in (KEY, "annotation", "concept"):
        kept.pop(name, None)
