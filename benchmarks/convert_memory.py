r"""Peak memory and time of converting an official checkpoint, against loading file, model and copy one after another.

    python benchmarks/convert_memory.py --checkpoint-mb 800

A random ConceptCLIP checkpoint of about that size (fp32, official names) is converted in a child process by
`hub.convert.convert_checkpoint`, and by the plain way: read the file, build the model, load it, save it. Peaks are
those of the whole process above its state after the imports. The mapped file counts as long as the system keeps its
pages.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

CHILD = """
import json, sys, threading, time
from pathlib import Path
import torch
import medclip_hf
from medclip_hf.hub import convert, convert_conceptclip
from medclip_hf.hub.convert_configs import conceptclip_config

way, source, target, overrides = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4])

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.startswith(("VmRSS", "RssAnon"))}
    return found["VmRSS"], found["RssAnon"]

start, peaks, done = resident(), [0.0, 0.0], False

def watch():
    while not done:
        for place, value in enumerate(resident()):
            peaks[place] = max(peaks[place], value)
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
began = time.perf_counter()
if way.startswith("ours"):
    if way == "ours":  # without the self-check, which runs the model twice and has no counterpart in the plain way
        convert.check_folder = lambda folder: {}
    convert.convert_checkpoint(source, target, config=overrides, with_processor=False)
else:
    official = {k: v.clone() for k, v in torch.load(source, weights_only=True)["state_dict"].items()}
    weights, _ = convert_conceptclip.from_official_state_dict(official)
    weights = {key: value.clone() for key, value in weights.items()}
    model = medclip_hf.ConceptCLIPModel(conceptclip_config(weights, overrides))
    model.load_state_dict(weights)
    model.save_pretrained(target)
seconds = time.perf_counter() - began
done = True
thread.join()
print(json.dumps({"seconds": seconds, "rss_mb": peaks[0] - start[0], "anonymous_mb": peaks[1] - start[1]}))
"""


def main() -> int:
    """Write the checkpoint, convert it both ways, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint-mb", type=int, default=800)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "official.pt"
        overrides = write_checkpoint(source, options.checkpoint_mb)
        size_mb = source.stat().st_size / 2**20
        print(f"file: {size_mb:.0f} MB")
        print("| way | seconds | peak RSS / file | peak anonymous memory / file |\n|---|---|---|---|")
        for way in ("plain", "ours", "ours, checked"):
            arguments = [way, str(source), f"{folder}/{way}", json.dumps(overrides)]
            child = subprocess.run(
                [sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, check=True
            )
            found = json.loads(child.stdout.splitlines()[-1])
            rss, anonymous = found["rss_mb"] / size_mb, found["anonymous_mb"] / size_mb
            print(f"| {way} | {found['seconds']:.1f} | {rss:.2f} | {anonymous:.2f} |")
    return 0


def write_checkpoint(path: Path, size_mb: int) -> dict[str, dict[str, int]]:
    """An official checkpoint of about that size, filled with noise; gives back the fields its shapes do not tell."""
    import torch

    from medclip_hf import ConceptCLIPConfig, ConceptCLIPModel
    from medclip_hf.hub.convert_conceptclip import to_official_state_dict

    layers = max(1, round((size_mb - 60) / 57))  # a pair of layers of both towers has 57 MB, the rest 60
    text = {"vocab_size": 2000, "num_hidden_layers": layers}
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "image_size": 224}
    config = ConceptCLIPConfig(
        text_config=text, vision_config={**vision, "patch_size": 16, "num_hidden_layers": layers, "hidden_act": "gelu"}
    )
    torch.manual_seed(0)
    torch.save({"epoch": 1, "state_dict": to_official_state_dict(ConceptCLIPModel(config).state_dict())}, path)
    return {}


if __name__ == "__main__":
    sys.exit(main())
