"""Adapters of both models: where they sit, how they are added, told apart by their base, loaded and merged.

The target lists are explicit. PEFT's "all-linear" also catches layers that never get a gradient: SigLIP's pooling head
reads the weight of its `out_proj` without calling the layer, so an adapter there would stay at zero (and would stall
data-parallel training, which waits for its gradient).
"""

import hashlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from medclip_hf.modeling.conceptclip import ConceptCLIPModel
from medclip_hf.modeling.conceptclip import image_classification_conceptclip as conceptclip_head
from medclip_hf.modeling.fvlm import FVLMModel
from medclip_hf.modeling.fvlm import anatomy_classification_fvlm as fvlm_head
from medclip_hf.training.checkpoints import write_json

BASE_FACTS = "base_model.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_MAGNITUDE = ".lora_magnitude_vector"
HEAD = "classifier"  # name of the module that a classifier adds to its base
MODEL_CLASSES: dict[str, Any] = {
    "ConceptCLIPModel": ConceptCLIPModel,
    "ConceptCLIPForImageClassification": conceptclip_head.ConceptCLIPForImageClassification,
    "FVLMModel": FVLMModel,
    "FVLMForAnatomyClassification": fvlm_head.FVLMForAnatomyClassification,
}
_HEAD_FIELDS = {
    "ConceptCLIPForImageClassification": conceptclip_head.HEAD_FIELDS,
    "FVLMForAnatomyClassification": fvlm_head.HEAD_FIELDS,
}

# The blocks of each tower, and the layers of a block by what they do. Every one of them gets a gradient.
_BLOCKS = {
    "conceptclip": {"vision": r"vision_model\.encoder\.layers\.\d+", "text": r"text_model\.encoder\.layer\.\d+"},
    "fvlm": {"vision": r"vision_model\.layers\.\d+", "text": r"text_model\.encoder\.layer\.\d+"},
}
_LAYERS = {
    "vision": {
        "query": r"self_attn\.q_proj",
        "key": r"self_attn\.k_proj",
        "value": r"self_attn\.v_proj",
        "attention_output": r"self_attn\.out_proj",
        "mlp_in": r"mlp\.fc1",
        "mlp_out": r"mlp\.fc2",
    },
    "text": {
        "query": r"attention\.self\.query",
        "key": r"attention\.self\.key",
        "value": r"attention\.self\.value",
        "attention_output": r"attention\.output\.dense",
        "mlp_in": r"intermediate\.dense",
        "mlp_out": r"output\.dense",
    },
}
# Not in the blocks: for words that the pre-training never met, whose embeddings are as they were drawn.
_WORD_EMBEDDINGS = r"text_model\.embeddings\.word_embeddings"
TARGETS = (*_LAYERS["vision"], "word_embeddings")
_SAMPLED_VALUES = 256


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """How an adapter is made.

    Args:
        rank: of the update of each target.
        alpha: the update is scaled by alpha / rank.
        dropout: on the input of the update.
        use_dora: learn the magnitude of each column beside the update (Liu et al., "DoRA", 2024): a little slower.
        targets: layers of a block, out of `TARGETS`; "word_embeddings" is the text tower's table.
        towers: "vision", "text"; None: those that the model has.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    use_dora: bool = False
    targets: tuple[str, ...] = ("query", "value")
    towers: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"an adapter has rank >= 1, alpha > 0 and dropout in [0, 1), but rank {self.rank}, alpha {self.alpha} "
                f"and dropout {self.dropout} came."
            )
        _check_known("targets", self.targets, TARGETS)
        if self.towers is not None:
            _check_known("towers", self.towers, tuple(_LAYERS))


@dataclass(frozen=True)
class BaseFacts:
    """What an adapter must find in the base that it is put on, kept beside it as `base_model.json`.

    Args:
        model_class: of the model that was adapted.
        fingerprint: of the base's weights, see `fingerprint`.
        anatomies: of an fVLM; empty otherwise.
        head: fields of the configuration that a classifier adds to its base; empty without one.
    """

    model_class: str
    fingerprint: str
    anatomies: tuple[str, ...] = ()
    head: dict[str, Any] | None = None

    @classmethod
    def of(cls, model: Any) -> "BaseFacts":
        """The facts of a model that no adapter was added to yet."""
        name = type(model).__name__
        fields = {field: getattr(model.config, field, None) for field in _HEAD_FIELDS.get(name, ())}
        head = {field: value for field, value in fields.items() if value is not None}
        return cls(name, fingerprint(model), tuple(getattr(model.config, "anatomies", ())), head or None)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write them beside the adapter, with the file from which the Auto classes learn the labels.

        PEFT's own card is removed: it names the folder of the base, and says nothing else. The magnitudes of DoRA get
        the names by which transformers finds them.
        """
        (Path(folder) / "README.md").unlink(missing_ok=True)
        _name_magnitudes(Path(folder) / ADAPTER_WEIGHTS)
        facts = asdict(self)
        head = facts.pop("head")
        write_json(Path(folder) / BASE_FACTS, facts)
        if head:
            write_json(Path(folder) / conceptclip_head.HEAD_CONFIG, head)


@dataclass(frozen=True)
class SavedTogether:
    """Several things that are saved into one folder, in this order."""

    parts: tuple[Any, ...]

    def save_pretrained(self, folder: str | Path) -> None:
        """Save each into the folder."""
        for part in self.parts:
            part.save_pretrained(folder)


def _name_magnitudes(path: Path) -> None:
    """Give DoRA's magnitudes back the ".weight" that PEFT takes off their names.

    PEFT reads both forms; `from_pretrained` of transformers overlooks the short one, and draws fresh magnitudes with
    no more than a line in its report.
    """
    if not path.is_file():
        return
    with safe_open(path, "pt") as file:
        names, metadata = list(file.keys()), file.metadata()
        if not any(name.endswith(_MAGNITUDE) for name in names):
            return
        weights = {f"{name}.weight" if name.endswith(_MAGNITUDE) else name: file.get_tensor(name) for name in names}
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(weights, temporary, metadata=metadata)
    temporary.replace(path)


def target_pattern(model: Any, settings: AdapterSettings) -> str:
    """The regular expression that the full names of the adapted layers match, for PEFT's `target_modules`.

    Raises:
        ValueError: the model is none of ours, or has no such tower.
    """
    model_type = model.config.model_type
    if model_type not in _BLOCKS:
        raise ValueError(f"adapters are known for {sorted(_BLOCKS)}, but the model is a {model_type!r}.")
    has = [tower for tower in _LAYERS if hasattr(model, f"{tower}_model")]
    towers = settings.towers or tuple(has)
    if missing := [tower for tower in towers if tower not in has]:
        raise ValueError(
            f"{type(model).__name__} has no {missing[0]} tower to adapt: it has {has}. Set method.towers to null."
        )
    parts = []
    for tower in towers:
        layers = "|".join(_LAYERS[tower][target] for target in settings.targets if target in _LAYERS[tower])
        if layers:
            parts.append(rf"{_BLOCKS[model_type][tower]}\.({layers})")
        if tower == "text" and "word_embeddings" in settings.targets:
            parts.append(_WORD_EMBEDDINGS)
    if not parts:
        raise ValueError(f"none of method.targets={list(settings.targets)} is in the towers {list(towers)}.")
    return "|".join(parts)


def add_adapter(model: Any, settings: AdapterSettings, base_name: str) -> PeftModel:
    """The model with a fresh adapter that changes nothing yet; the base is frozen, a classifier's head is not.

    Scales and biases of the logits stay as the base has them.

    Args:
        model: one of `MODEL_CLASSES`.
        settings: of the adapter.
        base_name: folder or Hub name of the base, written into `adapter_config.json`; `from_pretrained` of the adapter
            folder reads the base from there.
    """
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        use_dora=settings.use_dora,
        target_modules=target_pattern(model, settings),
        modules_to_save=[HEAD] if hasattr(model, HEAD) else None,
        base_model_name_or_path=base_name,
    )
    model.name_or_path = base_name  # PEFT prefers it to the name in the config
    return get_peft_model(model, config)


def fingerprint(model: nn.Module) -> str:
    """A hash that tells one set of base weights from another, 64 hexadecimal digits.

    Of every tensor but a head's: name, shape and up to 256 evenly spaced values in bfloat16, so that a base loaded in
    float32 and in bfloat16 has the same one. Any training changes it; a model of 1e9 weights takes about a second.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if name.startswith(f"{HEAD}."):
            continue
        digest.update(f"{name} {tuple(value.shape)}\n".encode())
        digest.update(_sample(value).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def read_base_facts(folder: str | Path) -> BaseFacts:
    """What an adapter folder says of its base.

    Raises:
        ValueError: the folder holds no adapter of `scripts/finetune_lora.py`.
    """
    path = Path(folder) / BASE_FACTS
    if not (Path(folder) / "adapter_config.json").is_file():
        raise ValueError(f"{folder} holds no adapter: it has no adapter_config.json.")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        head_path = path.with_name(conceptclip_head.HEAD_CONFIG)
        head = json.loads(head_path.read_text(encoding="utf-8")) if head_path.is_file() else None
        if facts["model_class"] not in MODEL_CLASSES:
            raise ValueError(f"{path} names the model class {facts['model_class']!r}; known are {list(MODEL_CLASSES)}.")
        return BaseFacts(facts["model_class"], facts["fingerprint"], tuple(facts["anatomies"]), head)
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} does not say which base the adapter is for ({type(error).__name__}). Was the folder written by "
            "scripts/finetune_lora.py?"
        ) from error


def load_adapters(folders: Mapping[str, str | Path], *, base: str | None = None, dtype: Any = torch.float32) -> Any:
    """A base with one or several adapters on it, in eval mode; the first is active, `set_adapter(name)` switches.

    Args:
        folders: adapter name → folder. All must be for the same base and, where they have heads, the same labels.
        base: folder or Hub name; None: the one that the first adapter names.
        dtype: of the weights.

    Raises:
        ValueError: the base is another one than an adapter was trained on, or adapters do not go together.
    """
    if not folders:
        raise ValueError("no adapter folder came.")
    facts = {name: read_base_facts(folder) for name, folder in folders.items()}
    first = next(iter(facts))
    for name, other in facts.items():
        if other != facts[first]:
            raise ValueError(
                f"the adapters {first!r} and {name!r} do not go on one base: they differ in "
                f"{_differences(facts[first], other)}. Load them on a base each."
            )
    base = base or json.loads((Path(folders[first]) / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = load_base(base, facts[first], dtype=dtype)
    check_base(model, facts[first], base, str(folders[first]))
    try:
        adapted = PeftModel.from_pretrained(model, str(folders[first]), adapter_name=first)
        for name in [name for name in folders if name != first]:
            adapted.load_adapter(str(folders[name]), adapter_name=name)
    except (SafetensorError, RuntimeError, OSError) as error:
        named = ", ".join(str(folder) for folder in folders.values())
        raise ValueError(
            f"the weights of {named} are damaged or missing: {' '.join(str(error).split())[:300]}"
        ) from error
    adapted.set_adapter(first)
    return adapted.eval()


def load_base(base: str, facts: BaseFacts, *, dtype: Any = torch.float32) -> Any:
    """The base of an adapter, with a fresh head of its labels where it has one.

    Raises:
        ValueError: it cannot be loaded, or cannot take the head.
    """
    model_class: Any = MODEL_CLASSES[facts.model_class]
    try:
        config = AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise ValueError(f"the base {base} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(config, model_class.config_class):
        raise ValueError(
            f"the adapter is for a {model_class.config_class.model_type} model, but {base} is a {config.model_type}. "
            "Name the base that it was trained on."
        )
    if facts.head is not None:
        module = fvlm_head if facts.model_class.startswith("FVLM") else conceptclip_head
        config = module.config_with_head(config, facts.head)
    return load_pretrained(model_class, base, config, dtype=dtype)


def load_pretrained(model_class: Any, base: str, config: Any, *, dtype: Any = torch.float32) -> Any:
    """The pre-trained model at `base`, of which nothing but a head may be fresh.

    Raises:
        ValueError: it cannot be loaded, or lacks weights.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # that a head is fresh is meant; whatever else is missing is an error
    try:
        loaded = model_class.from_pretrained(base, config=config, dtype=dtype, output_loading_info=True)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"the base {base} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    except RuntimeError as error:  # transformers' own words speak of an argument that nobody gave
        raise ValueError(f"the weights of the base {base} do not fit its configuration. Get a whole copy.") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    model, info = loaded
    lacking = sorted(name for name in info["missing_keys"] if not name.startswith(f"{HEAD}."))
    misshapen = sorted(str(key) for key in info["mismatched_keys"])
    if lacking or misshapen:
        raise ValueError(
            f"the base {base} is no complete {model_class.__name__}: {len(lacking)} weights are missing"
            f"{f', such as {lacking[0]}' if lacking else ''}, of another shape are {misshapen or 'none'}."
        )
    return model


def check_base(model: Any, facts: BaseFacts, base: str, adapter: str) -> None:
    """Raise a ValueError where `model` is not the base that an adapter was trained on."""
    anatomies = tuple(getattr(model.config, "anatomies", ()))
    if anatomies != facts.anatomies:
        raise ValueError(
            f"the adapter {adapter} is for a base with the anatomies {list(facts.anatomies)}, but {base} has "
            f"{list(anatomies)}. Name its own base."
        )
    if fingerprint(model) != facts.fingerprint:
        raise ValueError(
            f"the adapter {adapter} was trained on other weights than those of {base}. Name its own base, or train "
            "an adapter for this one."
        )


def merge_adapter(folder: str | Path, *, base: str | None = None) -> Any:
    """A plain model with the adapter's updates inside its weights, in eval mode.

    Raises:
        ValueError: see `load_adapters`.
    """
    return load_adapters({"default": folder}, base=base).merge_and_unload().eval()


def require_4bit() -> None:
    """Raise a ValueError where a 4-bit base cannot be had here."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("method.quantization=4bit needs bitsandbytes: pip install 'medclip-hf[qlora]'")
    if not torch.cuda.is_available():
        raise ValueError("method.quantization=4bit needs a CUDA device, and there is none. Set it to none.")


def quantized_base(model_class: Any, base: str, **kwargs: Any) -> Any:
    """The base with the linear layers of its blocks in 4 bits (NF4, double quantisation), ready for an adapter.

    Heads, projections and pooling keep their precision: some of them are read without being called.
    """
    from peft import prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=[
            "head",
            "text_projection",
            "patch_projection",
            "token_projection",
            "anatomy_pooling",
            "anatomy_heads",
            HEAD,
        ],
    )
    model = model_class.from_pretrained(base, quantization_config=settings, **kwargs)
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def _sample(value: Tensor) -> Tensor:
    """At most 256 values of a tensor, evenly spaced, in bfloat16 on the CPU."""
    flat = value.detach().reshape(-1)
    places = torch.linspace(0, max(len(flat) - 1, 0), min(len(flat), _SAMPLED_VALUES), dtype=torch.float64)
    return flat[places.round().long().to(flat.device)].to("cpu", torch.bfloat16)


def _differences(one: BaseFacts, other: BaseFacts) -> str:
    return ", ".join(name for name, value in asdict(one).items() if value != asdict(other)[name])


def _check_known(what: str, asked: Sequence[str], known: Sequence[str]) -> None:
    if not asked or (unknown := sorted(set(asked) - set(known))):
        raise ValueError(f"{what} must be some of {list(known)}, but {list(asked) if not asked else unknown} came.")
