"""Maps that other methods draw of the same model, to compare concept maps with: gradients, occlusion, attention.

Gradients and occlusion come from Captum, attention from the tower's own attention weights. All of them explain the
score of the whole image, which every two-tower model has, also one that was never trained on patches.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

Method = Literal["grad_cam", "gradient_x_input", "integrated_gradients", "occlusion"]
METHODS: tuple[Method, ...] = ("grad_cam", "gradient_x_input", "integrated_gradients", "occlusion")
_INTEGRATION_STEPS = 16


class WholeImageScore(nn.Module):
    """Cosine (B, K) of whole images with texts, with the patches before pooling laid out as a grid on the way.

    Args:
        model: a `ConceptCLIPModel`, or any with a SigLIP tower `vision_model` that has a pooling `head`.
        text_embeds: (K, D), L2-normalised.
        interpolate_pos_encoding: for images of another size than the configured.

    Raises:
        ValueError: the model has no such tower.
    """

    def __init__(self, model: Any, text_embeds: Tensor, *, interpolate_pos_encoding: bool = False) -> None:
        super().__init__()
        if not hasattr(getattr(model, "vision_model", None), "head"):
            raise ValueError(
                f"{type(model).__name__} has no SigLIP tower with a pooling head: its patches cannot be laid out as a "
                "grid before pooling."
            )
        self.tower = model.vision_model
        self.patch_size = model.config.vision_config.patch_size
        self.interpolate_pos_encoding = interpolate_pos_encoding
        self.grid = nn.Identity()  # where Grad-CAM looks: (B, hidden, rows, columns)
        self.text_embeds: Tensor
        self.register_buffer("text_embeds", text_embeds, persistent=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """The cosines of (B, 3, H, W) with every text."""
        patches = self.tower(pixel_values, interpolate_pos_encoding=self.interpolate_pos_encoding).last_hidden_state
        rows, columns = (side // self.patch_size for side in pixel_values.shape[2:])
        grid = self.grid(patches.transpose(1, 2).unflatten(2, (rows, columns)))
        pooled = self.tower.head(grid.flatten(2).transpose(1, 2))
        return nn.functional.normalize(pooled, dim=-1) @ self.text_embeds.T


def gradient_maps(
    model: Any,
    pixel_values: Tensor,
    text_embeds: Tensor,
    method: Method = "grad_cam",
    *,
    interpolate_pos_encoding: bool = False,
) -> Tensor:
    """What of each image speaks for each text, (B, K, rows, columns), by a method of Captum.

    - ``grad_cam``: Selvaraju et al., 2017, on the grid of patches before pooling, negative parts cut off;
    - ``gradient_x_input`` and ``integrated_gradients`` (Sundararajan et al., 2017, from a grey image): summed over
      channels and averaged over each patch;
    - ``occlusion`` (Zeiler and Fergus, 2014): loss of cosine where one patch after another is grey.

    Args:
        model: see `WholeImageScore`; in evaluation mode.
        pixel_values: (B, 3, H, W), normalised so that 0 is grey.
        text_embeds: (K, D), L2-normalised.
        method: one of `METHODS`.
        interpolate_pos_encoding: for images of another size than the configured.

    Raises:
        ValueError: unknown method, another kind of model.
        ImportError: without Captum.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    score = WholeImageScore(model, text_embeds, interpolate_pos_encoding=interpolate_pos_encoding)
    was_trained = {parameter: parameter.requires_grad for parameter in score.parameters()}
    score.requires_grad_(method == "grad_cam")  # the others need gradients of pixels alone
    try:
        attribute = _attribution(score, method)
        maps = [attribute(pixel_values, text) for text in range(len(text_embeds))]
    finally:
        for parameter, requires_grad in was_trained.items():
            parameter.requires_grad_(requires_grad)
    return torch.stack(maps, dim=1).detach()


@torch.no_grad()
def attention_maps(model: Any, pixel_values: Tensor, *, interpolate_pos_encoding: bool = False) -> Tensor:
    """How much each patch is attended to when the image is pooled, (B, rows, columns): one map for all texts.

    The pooling head's attention, carried back through the layers by attention rollout (Abnar and Zuidema, 2020):
    a · Π (½ Aₗ + ½ I), heads averaged.

    Args:
        model: see `WholeImageScore`; its attention implementation is "eager" meanwhile, which shows its weights.
        pixel_values: (B, 3, H, W).
        interpolate_pos_encoding: for images of another size than the configured.
    """
    tower = model.vision_model
    implementation = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    try:
        output = tower(pixel_values, output_attentions=True, interpolate_pos_encoding=interpolate_pos_encoding)
    finally:
        tower.set_attn_implementation(implementation)
    patches = output.last_hidden_state
    probe = tower.head.probe.expand(len(patches), -1, -1)
    flow = tower.head.attention(probe, patches, patches, need_weights=True)[1]  # (B, 1, P)
    for weights in reversed(output.attentions):  # (B, heads, P, P)
        flow = 0.5 * (flow @ weights.mean(dim=1) + flow)
    rows, columns = (side // model.config.vision_config.patch_size for side in pixel_values.shape[2:])
    return flow[:, 0].unflatten(1, (rows, columns))


@torch.no_grad()
def pooled_patch_maps(
    model: Any, pixel_values: Tensor, text_embeds: Tensor, *, interpolate_pos_encoding: bool = False
) -> Tensor:
    """Cosine maps (B, K, rows, columns) without patch heads: each patch pooled as if it were the whole image.

    The nearest thing to a concept map that image-text alignment alone has shaped.

    Args:
        model: see `WholeImageScore`.
        pixel_values: (B, 3, H, W).
        text_embeds: (K, D), L2-normalised.
        interpolate_pos_encoding: for images of another size than the configured.
    """
    tower = model.vision_model
    patches = tower(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding).last_hidden_state  # (B, P, hidden)
    vectors = tower.head(patches.flatten(0, 1)[:, None]).unflatten(0, patches.shape[:2])
    vectors = nn.functional.normalize(vectors, dim=-1)
    rows, columns = (side // model.config.vision_config.patch_size for side in pixel_values.shape[2:])
    return (text_embeds @ vectors.transpose(1, 2)).unflatten(2, (rows, columns))


def _attribution(score: WholeImageScore, method: Method) -> Callable[[Tensor, int], Tensor]:
    """(pixel_values, number of the text) -> maps (B, rows, columns)."""
    try:
        from captum import attr
    except ImportError as error:
        raise ImportError("gradient maps need Captum: pip install 'medclip-hf[evaluation]'") from error
    size = score.patch_size
    if method == "grad_cam":
        grad_cam = attr.LayerGradCam(score, score.grid)
        return lambda pixels, text: grad_cam.attribute(pixels, target=text, relu_attributions=True)[:, 0]
    if method == "gradient_x_input":
        by_input = attr.InputXGradient(score)
        return lambda pixels, text: _per_patch(by_input.attribute(pixels.clone().requires_grad_(), target=text), size)
    if method == "integrated_gradients":
        integrated = attr.IntegratedGradients(score)
        return lambda pixels, text: _per_patch(
            integrated.attribute(
                pixels.clone().requires_grad_(),
                target=text,
                n_steps=_INTEGRATION_STEPS,
                internal_batch_size=max(16, len(pixels)),
            ),
            size,
        )
    occlusion = attr.Occlusion(score)

    @torch.no_grad()
    def occlude(pixels: Tensor, text: int) -> Tensor:
        window = (3, size, size)
        return _per_patch(occlusion.attribute(pixels, window, strides=window, target=text), size)

    return occlude


def _per_patch(pixel_maps: Tensor, patch_size: int) -> Tensor:
    """Maps (B, rows, columns) of (B, 3, H, W): summed over channels, averaged over each patch."""
    return nn.functional.avg_pool2d(pixel_maps.sum(dim=1, keepdim=True), patch_size)[:, 0]
