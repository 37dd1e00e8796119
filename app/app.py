"""The web demo: pictures with ConceptCLIP, CT scans with fVLM, two models side by side. Research only.

    python app/app.py                                          # the models of `make demo`
    python app/app.py --conceptclip FOLDER_OR_REPO --fvlm FOLDER_OR_REPO

On a Space the same file runs; `CONCEPTCLIP_MODELS` and `FVLM_MODELS` (separated by commas) name the models there.
"""

import argparse
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

# Nothing is told to anybody, and nothing is asked of the network but the models that are named.
QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "DISABLE_TELEMETRY": "1"}


def read_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments of the command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conceptclip", action="append", metavar="MODEL", help="folder or Hub name; may come again")
    parser.add_argument("--fvlm", action="append", metavar="MODEL", help="folder or Hub name; may come again")
    parser.add_argument("--demo-output", type=Path, default=Path("demo_output"), help="what `make demo` wrote")
    parser.add_argument("--untrained", action="store_true", help="show untrained models where there are no others")
    parser.add_argument("--findings", type=Path, help="JSON list of {name, anatomy, absent, present} for the fVLMs")
    parser.add_argument("--device", help='such as "cpu" or "cuda:0"; default: the accelerator if there is one')
    parser.add_argument(
        "--host", default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), help="address to listen at"
    )
    parser.add_argument("--port", type=int, default=int(os.environ.get("GRADIO_SERVER_PORT", "7860")))
    parser.add_argument("--max-upload-mb", type=int, default=512, help="larger uploads are refused while they arrive")
    chosen = parser.parse_args(arguments)
    if chosen.max_upload_mb < 1:
        parser.error(f"--max-upload-mb must be at least 1, got {chosen.max_upload_mb}.")
    if not 0 < chosen.port < 65536:
        parser.error(f"--port must be between 1 and 65535, got {chosen.port}.")
    chosen.conceptclip = chosen.conceptclip or _named_in("CONCEPTCLIP_MODELS")
    chosen.fvlm = chosen.fvlm or _named_in("FVLM_MODELS")
    return chosen


def check_address(host: str, port: int) -> None:
    """Nothing, if the page can be served there: to be known before models are loaded.

    Raises:
        ValueError: somebody else listens there, or the machine has no such address.
    """
    try:
        family, kind, _, _, place = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except OSError as error:
        raise ValueError(f"cannot listen at {host}, port {port}: {error}. Name others by --host and --port.") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve the demo until it is interrupted; 2 where a model or file that was named cannot be used."""
    chosen = read_arguments(arguments)
    os.environ.update(QUIET)
    with tempfile.TemporaryDirectory(prefix="medclip_hf_demo_") as folder:
        uploads = Path(folder) / "uploads"
        uploads.mkdir()
        os.environ["GRADIO_TEMP_DIR"] = str(uploads)  # read when gradio is imported: everything goes with the process
        from demo_models import load_models

        try:
            check_address(chosen.host, chosen.port)
            models = load_models(chosen, Path(folder))
        except (ValueError, OSError) as error:
            sys.stderr.write(f"{error}\n")
            return 2
        from interface import build, launch
        from sessions import Sessions

        sessions = Sessions(uploads, max_bytes=chosen.max_upload_mb * 2**20)
        sessions.forget_idle_ones()
        page = build(models, sessions, Path(folder) / "examples")
        launch(page, host=chosen.host, port=chosen.port, max_upload_mb=chosen.max_upload_mb)
    return 0


def _named_in(variable: str) -> list[str]:
    return [name.strip() for name in os.environ.get(variable, "").split(",") if name.strip()]


if __name__ == "__main__":
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # as containers are stopped: uploads are removed all the same
    sys.exit(main())
