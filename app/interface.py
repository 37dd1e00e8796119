"""The page: its head, its tabs, and how it is served."""

import logging
import sys
import traceback
from pathlib import Path
from typing import Any

import gradio as gr
import markup
from compare_tab import CompareTab
from ct_tab import CTTab
from demo_models import Models, how_to_get
from examples import draw_torsos
from picture_tab import PictureTab
from sessions import Sessions

logger = logging.getLogger(__name__)

UNEXPECTED = "That did not work: the server could not use what was sent. Reload the page and try again."
_FONTS = ("system-ui", "sans-serif")  # of the visitor's machine: none is fetched
_CACHE_SECONDS = (300, 3600)  # how often is looked for files, and how old they may get; those of a session go with it


class Page(gr.Blocks):
    """A page that says a sentence where Gradio says "Error" alone: to a forged path, to an argument of a wrong kind."""

    async def process_api(self, *args: Any, **options: Any) -> dict[str, Any]:
        """As Gradio's; what no tab foresaw becomes a sentence, and a line in the log that tells nothing of them."""
        try:
            return await super().process_api(*args, **options)
        except gr.Error:
            raise
        except Exception as error:  # whatever it was, the visitor learns only that it was
            last = traceback.extract_tb(error.__traceback__)[-1]
            logger.error("%s in %s, line %s", type(error).__name__, last.filename, last.lineno)
            raise gr.Error(UNEXPECTED, print_exception=False) from None


def build(models: Models, sessions: Sessions, examples: Path) -> gr.Blocks:
    """The page for some models.

    Args:
        models: to show.
        sessions: where visitors' data are kept.
        examples: folder for the drawn scans; made.
    """
    with Page(title="medclip-hf demo", analytics_enabled=False, delete_cache=_CACHE_SECONDS) as page:
        gr.HTML(
            '<div class="mc-head"><h1>medclip-hf</h1><p>Pictures with ConceptCLIP, CT scans with fVLM: scores, and '
            f'what they rest on.</p></div><div class="mc-device">{markup.NOTICE}</div>'
        )
        if models.has_demo:
            gr.HTML(f'<p class="mc-status">{markup.DEMO_NOTICE}</p>')
        if models.untrained:
            gr.HTML(
                f'<div class="mc-untrained" role="alert">{" and ".join(models.untrained)}: '
                "the weights are random, and so is every number of theirs.</div>"
            )
        with gr.Tabs():
            with gr.Tab("Picture", id="picture"):
                if models.conceptclip:
                    PictureTab(models.conceptclip, sessions)
                else:
                    gr.HTML(markup.error_message(how_to_get("conceptclip")))
            with gr.Tab("CT scan", id="ct"):
                if models.fvlm:
                    CTTab(models.fvlm, sessions, draw_torsos(examples))
                else:
                    gr.HTML(markup.error_message(how_to_get("fvlm")))
            with gr.Tab("Compare", id="compare"):
                if models.conceptclip:
                    CompareTab(models.conceptclip, sessions)
                else:
                    gr.HTML(markup.error_message(how_to_get("conceptclip")))
        gr.HTML(
            '<p class="mc-status">Uploads stay on this server while the page is open, and are removed when it is '
            "closed, at the latest after an hour. The examples are drawn by a program and show nobody.</p>"
        )

        def leave(request: gr.Request) -> None:
            sessions.end(request)

        page.unload(leave)
    page.queue(max_size=32, default_concurrency_limit=2, api_open=False)
    return page


def launch(page: gr.Blocks, *, host: str, port: int, max_upload_mb: int) -> None:
    """Serve the page at one address, without a public link; returns when it is interrupted."""
    _, url, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        inbrowser=False,
        quiet=True,
        prevent_thread_lock=True,
        show_error=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        footer_links=[],
        max_file_size=f"{max_upload_mb}mb",
        theme=_theme(),
        css_paths=Path(__file__).with_name("style.css"),
    )
    sys.stdout.write(f"Open {url} in a browser; Ctrl+C ends it.\n")
    sys.stdout.flush()
    page.block_thread()


def _theme() -> gr.themes.Base:
    """Colours with enough contrast to be read, and fonts of the visitor's machine."""
    theme = gr.themes.Base(
        primary_hue="teal", neutral_hue="slate", font=_FONTS, font_mono=("ui-monospace", "monospace")
    )
    return theme.set(
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
        color_accent="*primary_700",
        slider_color="*primary_700",
        checkbox_background_color_selected="*primary_700",
        checkbox_background_color_selected_dark="*primary_500",
    )
