"""What was pushed loads by its name in other processes: without the package, from a mirror, pinned, and offline."""

import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import HfApi, constants
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from transformers import BertTokenizer
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from medclip_hf import ConceptCLIPConfig, ConceptCLIPModel, ConceptCLIPProcessor
from medclip_hf.hub.cards import ModelFacts
from medclip_hf.hub.push import push_folder, push_pretrained

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "chest", "left", "effusion", "a", "."]
TEXTS = ["left chest effusion.", "a chest."]
REPOSITORY, ADAPTER = "clinic/figures", "clinic/figures-adapter"

# Runs in a process of its own, with the Hub and the cache that its environment names.
STRANGER = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "medclip_hf":
            raise ModuleNotFoundError("medclip_hf is not installed here", name=name)

sys.meta_path.insert(0, Absent())
repo_id, revision, image, result = sys.argv[1:]

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import save_file
from transformers import AutoModel, AutoProcessor

folder = snapshot_download(repo_id, revision=revision)
model = AutoModel.from_pretrained(repo_id, revision=revision, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(repo_id, revision=revision, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
with torch.no_grad():
    by_name = model(**processor(images=image, text={TEXTS!r})).logits_per_image
    by_folder = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()(
        **AutoProcessor.from_pretrained(folder, trust_remote_code=True)(images=image, text={TEXTS!r})
    ).logits_per_image
assert torch.equal(by_name, by_folder)
with torch.no_grad():
    adapted = AutoModel.from_pretrained({ADAPTER!r}, trust_remote_code=True).eval()
    by_adapter = adapted(**processor(images=image, text={TEXTS!r})).logits_per_image
assert "medclip_hf" not in sys.modules
save_file({{"logits": by_name, "adapted": by_adapter}}, result)
"""


@pytest.fixture
def tiny(tmp_path):
    """(model, processor, file of an image, the model's scores of it)."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
    config = ConceptCLIPConfig(
        text_config={**sizes, "vocab_size": len(WORDS), "hidden_size": 8},
        vision_config={**sizes, "hidden_size": 16, "image_size": 12, "patch_size": 4, "hidden_act": "gelu"},
    )
    model = ConceptCLIPModel(config).eval()
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)})
    processor = ConceptCLIPProcessor(SiglipImageProcessorPil(size={"height": 12, "width": 12}), tokenizer)
    image = tmp_path / "figure.png"
    Image.effect_noise((30, 20), 60).convert("RGB").save(image)
    with torch.no_grad():
        logits = model(**processor(images=image, text=TEXTS)).logits_per_image
    return model, processor, image, logits


def run_elsewhere(folder, code, *arguments, **environment):
    """Runs the code in a process of its own, in another folder, with only the given Hub and cache."""
    told = {
        "HF_HOME": str(folder / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=kept | told,
        cwd=folder,
        timeout=120,
    )


def push_adapter_of(model, inputs, api):
    """Scores of the model with a random adapter, which is pushed with the name of its base."""
    settings = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, settings).eval()
    adapted.peft_config["default"].base_model_name_or_path = REPOSITORY
    pushed = push_pretrained([adapted], ADAPTER, api=api)
    assert set(pushed.files) == {"adapter_config.json", "adapter_model.safetensors"}
    with torch.no_grad():
        return adapted(**inputs).logits_per_image


def test_it_loads_by_name_without_the_package_from_a_mirror_pinned_and_offline(
    hub, hub_server, tiny, tmp_path, monkeypatch
):
    model, processor, image, logits = tiny
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    api = HfApi(endpoint=hub.url, token="hf_clinic")
    facts = ModelFacts(name="Figures", model_type="conceptclip", summary="A model of a test.")
    pushed = push_pretrained([model, processor], REPOSITORY, facts=facts, api=api)
    assert {"README.md", "config.json", "model.safetensors", "modeling_conceptclip.py"} <= set(pushed.files)
    with torch.no_grad():
        model.logit_bias.add_(1)
    push_pretrained([model, processor], REPOSITORY, api=api)  # the branch moves on, the commit stays
    adapted_logits = push_adapter_of(model, processor(images=image, text=TEXTS), api)

    mirror = hub_server.HubServer()
    mirror.repositories = hub.repositories
    hub.close()
    result = tmp_path / "result.safetensors"
    arguments = (REPOSITORY, pushed.commit, image, result)
    try:
        child = run_elsewhere(tmp_path, STRANGER, *arguments, HF_ENDPOINT=mirror.url, HF_TOKEN="hf_clinic")
    finally:
        mirror.close()
    assert child.returncode == 0, child.stderr
    assert torch.equal(load_file(result)["logits"], logits)
    torch.testing.assert_close(load_file(result)["adapted"], adapted_logits)

    result.unlink()
    child = run_elsewhere(tmp_path, STRANGER, *arguments, HF_ENDPOINT=mirror.url, HF_HUB_OFFLINE="1")
    assert child.returncode == 0, child.stderr
    assert torch.equal(load_file(result)["logits"], logits)


def test_rows_of_a_pushed_data_set_stream_in_another_process(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# Rows\n")
    pq.write_table(pa.table({"caption": ["left", "right"]}), folder / "train-00000.parquet")
    push_folder(folder, "clinic/rows", repo_type="dataset", api=HfApi(endpoint=hub.url, token="hf_clinic"))
    stream = (
        "from datasets import load_dataset\n"
        "print([row['caption'] for row in load_dataset('clinic/rows', split='train', streaming=True)])"
    )
    child = run_elsewhere(tmp_path, stream, HF_ENDPOINT=hub.url, HF_TOKEN="hf_clinic")
    assert child.returncode == 0, child.stderr
    assert child.stdout.strip() == "['left', 'right']"


def test_a_private_repository_is_shown_to_nobody_else(hub, tiny, tmp_path, monkeypatch):
    model, processor, _, _ = tiny
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    push_pretrained([model, processor], REPOSITORY, api=HfApi(endpoint=hub.url, token="hf_clinic"))
    download = f"import huggingface_hub; huggingface_hub.snapshot_download({REPOSITORY!r})"
    for environment in ({}, {"HF_TOKEN": "hf_guest"}):
        child = run_elsewhere(tmp_path, download, HF_ENDPOINT=hub.url, **environment)
        assert child.returncode == 1
        assert "RepositoryNotFoundError" in child.stderr
    assert not any("/resolve/" in line for line in hub.requests)
