"""Time, memory and numbers of one fVLM training step at the published size, against the published procedure.

    python benchmarks/fvlm_step.py --threads 2 --repeats 3

Both variants take the same weights, volumes, masks and texts. "plain" restates the procedure of the release: float
masks max-pooled for each anatomy, border check by the distinct labels of the faces, attention with its matrix of
weights, tokens pooled scan by scan with `nn.MultiheadAttention`, every text of every anatomy encoded and padded to 384
tokens, a loss anatomy by anatomy. "medclip-hf" is `FVLMObjective` on `FVLMModel`. Dropout is off, so that losses and
gradients can be compared; they are, in every run. The data part of the package's variant includes what its loader does
for the batch: finding which anatomies are complete.

Times are medians of repeats in turn; peak memory is that of a process of its own that runs one step, less what it held
before. Texts: eight different ones of 16 to 90 tokens. In CT-RATE about half of the texts of a batch repeat; none here.
"""

import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medclip_hf.modeling.fvlm import FVLMConfig, FVLMModel
from medclip_hf.modeling.fvlm.anatomy_masks_fvlm import anatomy_token_mask, complete_anatomies
from medclip_hf.modeling.fvlm.vision_fvlm import FVLMVisionLayer
from medclip_hf.training.objectives import FVLMObjective

PARTS = ("data", "image encoder", "pooling", "text encoder", "loss")
PUBLISHED_TEXT_LENGTH = 384
NUM_SCANS = 2
Batch = dict[str, Any]
Times = dict[str, float]


def main() -> None:
    """Measure in turn, compare the numbers, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a small model and volume, to try the script")
    parser.add_argument("--peak-of", choices=tuple(VARIANTS), help="print the peak memory of one variant in bytes")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak_of:
        inputs = build(arguments.tiny)
        print(peak_of(lambda: VARIANTS[arguments.peak_of](*inputs)))
        return
    peaks = {name: peak_in_own_process(name, arguments) for name in VARIANTS}
    model, batch = build(arguments.tiny)
    times: dict[str, list[Times]] = {name: [] for name in VARIANTS}
    losses, gradients = {}, {}
    for _ in range(arguments.repeats + 1):  # the first round warms up
        for name, step in VARIANTS.items():
            model.zero_grad()
            loss, parts = step(model, batch)
            times[name].append(parts)
            losses[name] = loss
            gradients[name] = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    report(arguments, {name: rounds[1:] for name, rounds in times.items()}, peaks, losses, gradients)


def build(is_tiny: bool) -> tuple[FVLMModel, Batch]:
    """The published model without dropout, and two scans with eight texts."""
    torch.manual_seed(0)
    text = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    vision: dict[str, Any] = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    if is_tiny:
        text |= {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
        vision |= {
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_attention_heads": 4,
            "image_size_dhw": (64, 96, 128),
        }
    config = FVLMConfig(text_config=text, vision_config=vision, pooling_dropout=0.0)
    model = FVLMModel(config).train()
    for head in model.anatomy_heads:
        nn.init.normal_(head.query, std=0.5)
    return model, make_batch(config)


def make_batch(config: FVLMConfig) -> Batch:
    """Scans with four ellipsoids inside, every anatomy of the first abnormal, and different texts everywhere."""
    generator = torch.Generator().manual_seed(1)
    size_dhw = config.vision_config.image_size_dhw
    axes = torch.meshgrid(*(torch.linspace(-1, 1, size) for size in size_dhw), indexing="ij")
    ellipsoids = [((0.0, -0.1, 0.0), (0.8, 0.7, 0.8)), ((0.2, 0.0, 0.2), (0.4, 0.35, 0.35))]
    ellipsoids += [((0.0, 0.5, 0.0), (0.7, 0.06, 0.05)), ((0.0, 0.6, 0.25), (0.7, 0.1, 0.08))]
    mask = torch.zeros(NUM_SCANS, *size_dhw, dtype=torch.uint8)
    for index, (centre, radii) in enumerate(ellipsoids):
        inside = sum(((axis - c) / r) ** 2 for axis, c, r in zip(axes, centre, radii, strict=True)) < 1
        mask[:, inside] = index + 1
    lengths = torch.tensor([90, 24, 16, 20, 70, 18, 16, 30])
    input_ids = torch.randint(1000, 30000, (len(lengths), int(lengths.max())), generator=generator)
    attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    return {
        "pixel_values": torch.rand(NUM_SCANS, 1, *size_dhw, generator=generator),
        "anatomy_mask": mask,
        "input_ids": input_ids * attention_mask,
        "attention_mask": attention_mask,
        "text_ids": torch.arange(len(lengths)),
        "text_index": torch.arange(len(lengths)).view(NUM_SCANS, 4),
        "is_abnormal": torch.tensor([[True] * 4, [False] * 4]),
    }


class Clock:
    """Seconds by part of a step."""

    def __init__(self) -> None:
        self.times: Times = defaultdict(float)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add what the block takes to a part."""
        start = time.perf_counter()
        yield
        self.times[name] += time.perf_counter() - start


def staged(output: Tensor) -> Tensor:
    """A leaf in place of a part's output, so that the backward pass of each part can be timed alone."""
    return output.detach().requires_grad_()


# The package's step ------------------------------------------------------------------------------------------------


def step_of_the_package(model: FVLMModel, batch: Batch) -> tuple[float, Times]:
    """Loss and seconds by part, with the model's own functions."""
    clock = Clock()
    config = model.config
    with clock.part("data"):
        token_mask = anatomy_token_mask(batch["anatomy_mask"], 4, config.vision_config.patch_size_dhw)
        is_complete = complete_anatomies(batch["anatomy_mask"], 4)
    with clock.part("image encoder"):
        levels = model.vision_model(batch["pixel_values"], feature_layers=config.feature_layers).feature_levels
    levels_leaf = staged(levels)
    with clock.part("pooling"):
        queries = torch.stack([head.query for head in model.anatomy_heads])
        pooled, _ = model.anatomy_pooling(queries, levels_leaf, token_mask)
        heads = zip(model.anatomy_heads, pooled.unbind(1), strict=True)
        anatomy_embeds = F.normalize(torch.stack([head(row) for head, row in heads], 1), dim=-1)
    anatomy_leaf = staged(anatomy_embeds)
    with clock.part("text encoder"):
        text_features = model.get_text_features(batch["input_ids"], batch["attention_mask"]).pooler_output
        text_embeds = F.normalize(text_features, dim=-1)
    text_leaf = staged(text_embeds)
    with clock.part("loss"):
        embeddings = {
            "anatomy_embeds": anatomy_leaf,
            "anatomy_present": token_mask.any(-1),
            "text_embeds": text_leaf,
            "logit_scale": model.logit_scale.exp(),
        }
        values = FVLMObjective(config.anatomies).compare(embeddings, {**batch, "is_complete": is_complete})
        values["loss"].backward()
    backward(clock, {"text encoder": (text_embeds, text_leaf), "pooling": (anatomy_embeds, anatomy_leaf)})
    backward(clock, {"image encoder": (levels, levels_leaf)})
    return values["loss"].item(), dict(clock.times)


def backward(clock: Clock, stages: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Go on from the gradients of the leaves."""
    for name, (output, leaf) in stages.items():
        with clock.part(name):
            output.backward(leaf.grad)


# The published procedure -------------------------------------------------------------------------------------------


def step_as_published(model: FVLMModel, batch: Batch) -> tuple[float, Times]:
    """Loss and seconds by part, with the same weights and the procedure of the release."""
    clock = Clock()
    anatomies = range(model.config.num_anatomies)
    with clock.part("data"):
        segmentation = batch["anatomy_mask"][:, None].float()
        token_flags = plain_token_flags(segmentation, model.config.vision_config.patch_size_dhw, anatomies)
        is_intact = plain_intact_flags(segmentation, anatomies)
    with clock.part("image encoder"):
        levels = plain_levels(model, batch["pixel_values"])
    levels_leaf = staged(levels)
    with clock.part("pooling"):
        pooling = multihead_attention_of(model)
        embeds = [plain_pooling(model, pooling, levels_leaf, token_flags, is_intact, a) for a in anatomies]
    embed_leaves = [staged(rows) for rows in embeds]
    with clock.part("text encoder"):
        texts = [plain_texts(model, batch, is_intact, anatomy) for anatomy in anatomies]
    text_leaves = [staged(rows) for rows in texts]
    with clock.part("loss"):
        loss = sum(
            plain_loss(model, embed_leaves[a], text_leaves[a], batch["is_abnormal"][is_intact[a], a]) for a in anatomies
        )
        loss.backward()
    for anatomy in anatomies:
        backward(clock, {"text encoder": (texts[anatomy], text_leaves[anatomy])})
    with clock.part("pooling"):
        torch.autograd.backward(embeds, [leaf.grad for leaf in embed_leaves])
        hand_over_gradients(model, pooling)
    backward(clock, {"image encoder": (levels, levels_leaf)})
    return loss.item(), dict(clock.times)


def plain_token_flags(segmentation: Tensor, patch_size_dhw: Any, anatomies: range) -> Tensor:
    """(B, A, P) bool by max-pooling a float mask for each anatomy."""
    flags = []
    for anatomy in anatomies:
        is_anatomy = (segmentation == anatomy + 1).float()
        flags.append(F.max_pool3d(is_anatomy, tuple(patch_size_dhw), tuple(patch_size_dhw)).flatten(1) > 0)
    return torch.stack(flags, dim=1)


def plain_intact_flags(segmentation: Tensor, anatomies: range) -> list[Tensor]:
    """For each anatomy (B,) bool: among the labels of the scan and not among those of its faces."""
    flags = []
    for scan in segmentation[:, 0]:
        labels = torch.unique(scan)
        faces = [scan.select(axis, index).flatten() for axis in range(3) for index in (0, -1)]
        touching = torch.unique(torch.cat(faces))
        flags.append([bool((labels == a + 1).any()) and not bool((touching == a + 1).any()) for a in anatomies])
    return list(torch.tensor(flags).T)


def plain_levels(model: FVLMModel, pixel_values: Tensor) -> Tensor:
    """(B, L, P, hidden): convolution, blocks with fused projections and explicit attention weights."""
    tower = model.vision_model
    embeddings = tower.embeddings
    weight, bias = embeddings.patch_embedding.weight, embeddings.patch_embedding.bias
    patches = F.conv3d(pixel_values, weight, bias, stride=embeddings.patch_embedding.stride)
    hidden_states = patches.flatten(2).transpose(1, 2) + embeddings.position_embedding
    levels = []
    for index, layer in enumerate(tower.layers):
        hidden_states = plain_block(layer, hidden_states)
        if index in model.config.feature_layers:
            levels.append(hidden_states)
    return torch.stack([*levels, tower.post_layernorm(hidden_states)], dim=1)


def plain_block(layer: FVLMVisionLayer, hidden_states: Tensor) -> Tensor:
    """One transformer block as einsum and softmax."""
    attention = layer.self_attn
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    weight, bias = torch.cat([p.weight for p in projections]), torch.cat([p.bias for p in projections])
    fused = F.linear(layer.layer_norm1(hidden_states), weight, bias)
    query, key, value = fused.unflatten(-1, (3, -1, attention.head_dim)).permute(2, 0, 3, 1, 4)
    weights = (torch.einsum("bhxd,bhyd->bhxy", query, key) * attention.scaling).softmax(dim=-1)
    attended = torch.einsum("bhxy,bhyd->bhxd", weights, value).transpose(1, 2).flatten(2)
    hidden_states = hidden_states + attention.out_proj(attended)
    return hidden_states + layer.mlp(layer.layer_norm2(hidden_states))


def multihead_attention_of(model: FVLMModel) -> nn.MultiheadAttention:
    """PyTorch's own module with the model's pooling weights."""
    hidden_size = model.config.vision_config.hidden_size
    heads = model.config.pooling_num_attention_heads
    module = nn.MultiheadAttention(hidden_size, heads, batch_first=True)
    module.load_state_dict(model.anatomy_pooling.state_dict())
    return module


def hand_over_gradients(model: FVLMModel, pooling: nn.MultiheadAttention) -> None:
    """What torch's module gathered counts as the model's."""
    own = dict(model.anatomy_pooling.named_parameters())
    for name, parameter in pooling.named_parameters():
        own[name].grad = parameter.grad


def plain_pooling(
    model: FVLMModel, pooling: nn.Module, levels: Tensor, flags: Tensor, is_intact: list[Tensor], anatomy: int
) -> Tensor:
    """(n, D) of one anatomy, scan by scan."""
    head = model.anatomy_heads[anatomy]
    rows = []
    for scan in is_intact[anatomy].nonzero()[:, 0].tolist():
        keys = torch.cat([level[flags[scan, anatomy]] for level in levels[scan]])[None]
        rows.append(pooling(head.query[None, None], keys, keys)[0][0, 0])
    return F.normalize(head(torch.stack(rows)), dim=-1)


def plain_texts(model: FVLMModel, batch: Batch, is_intact: list[Tensor], anatomy: int) -> Tensor:
    """(n, D) texts of one anatomy, all padded to 384 tokens, through eager attention."""
    rows = batch["text_index"][is_intact[anatomy], anatomy]
    padding = (0, PUBLISHED_TEXT_LENGTH - batch["input_ids"].shape[1])
    text_config = model.text_model.config
    implementation, text_config._attn_implementation = text_config._attn_implementation, "eager"
    outputs = model.text_model(
        input_ids=F.pad(batch["input_ids"][rows], padding),
        attention_mask=F.pad(batch["attention_mask"][rows], padding),
    )
    text_config._attn_implementation = implementation
    return F.normalize(model.text_projection(outputs.last_hidden_state[:, 0]), dim=-1)


def plain_loss(model: FVLMModel, images: Tensor, texts: Tensor, is_abnormal: Tensor) -> Tensor:
    """Soft cross-entropy of one anatomy; all texts differ, so positives are the diagonal and the pairs of normals."""
    targets = torch.eye(len(images))
    for row in range(len(images)):
        for column in range(len(images)):
            if not is_abnormal[row] and not is_abnormal[column]:
                targets[row, column] = 1.0
    targets = targets / targets.sum(1, keepdim=True)
    logits = images @ texts.T * model.logit_scale.exp()
    image_to_text = -(logits.log_softmax(1) * targets).sum(1).mean()
    text_to_image = -(logits.T.log_softmax(1) * targets).sum(1).mean()
    return (image_to_text + text_to_image) / 2


VARIANTS: dict[str, Callable[[FVLMModel, Batch], tuple[float, Times]]] = {
    "plain": step_as_published,
    "medclip-hf": step_of_the_package,
}


# Measuring and telling ---------------------------------------------------------------------------------------------


def peak_of(step: Callable[[], Any]) -> int:
    """Bytes that the process needs more after a step than before it."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def peak_in_own_process(name: str, arguments: argparse.Namespace) -> int:
    """Peak memory of one variant, measured where nothing ran before."""
    command = [sys.executable, __file__, "--peak-of", name, "--threads", str(arguments.threads)]
    command += ["--tiny"] if arguments.tiny else []
    environment = os.environ | {"MALLOC_TRIM_THRESHOLD_": "0"}
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout)


def report(
    arguments: argparse.Namespace,
    times: dict[str, list[Times]],
    peaks: dict[str, int],
    losses: dict[str, float],
    gradients: dict[str, dict[str, Tensor]],
) -> None:
    """Print the table and how far the numbers of both variants differ."""
    print(f"{platform.machine()}, torch {torch.__version__}, {arguments.threads} threads, {arguments.repeats} repeats")
    print(f"batch {NUM_SCANS}, float32, dropout off, forward and backward; median seconds (range of the whole step)\n")
    print(f"| {'part':<14} | {'plain':>9} | {'medclip-hf':>10} | {'ratio':>6} |")
    print("|---|---|---|---|")
    medians = {
        name: {part: statistics.median(r[part] for r in rounds) for part in PARTS} for name, rounds in times.items()
    }
    totals = {name: [sum(r.values()) for r in rounds] for name, rounds in times.items()}
    for part in PARTS:
        plain, ours = medians["plain"][part], medians["medclip-hf"][part]
        print(f"| {part:<14} | {plain:9.3f} | {ours:10.3f} | {plain / ours:6.2f} |")
    plain, ours = (statistics.median(totals[name]) for name in ("plain", "medclip-hf"))
    print(f"| {'step':<14} | {plain:9.3f} | {ours:10.3f} | {plain / ours:6.2f} |")
    plain_peak, our_peak = (peaks[name] / 2**30 for name in ("plain", "medclip-hf"))
    print(f"| {'peak GiB':<14} | {plain_peak:9.2f} | {our_peak:10.2f} | {plain_peak / max(our_peak, 1e-9):6.2f} |\n")
    for name, values in totals.items():
        print(f"{name}: {min(values):.2f} to {max(values):.2f} s")
    largest = max(float((gradients["plain"][key] - value).norm() / value.norm()) for key, value in compared(gradients))
    print(f"losses: {losses['plain']:.6f} and {losses['medclip-hf']:.6f}")
    print(f"largest relative difference of a parameter's gradient: {largest:.1e}")


def compared(gradients: dict[str, dict[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Parameters whose gradient is more than rounding: the bias of a key has none in exact arithmetic."""
    for key, value in gradients["medclip-hf"].items():
        if not key.endswith(("k_proj.bias", "key.bias")) and key != "anatomy_pooling.in_proj_bias":
            yield key, value


if __name__ == "__main__":
    main()
