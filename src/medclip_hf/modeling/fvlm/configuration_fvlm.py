"""Configuration of fVLM: a 3-D vision transformer, a BERT text tower and one head for each anatomy."""

from dataclasses import fields
from typing import Any

from transformers import BertConfig
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec, strict

from .spelling_fvlm import check_spelling

# An anatomy is a bit of a 64-bit integer; one bit is the background's, one that of unknown ids, one is the sign.
MAX_ANATOMIES = 61


@strict
class FVLMVisionConfig(PreTrainedConfig):
    """Configuration of `FVLMVisionModel`; the defaults are the published ViT-B.

    Args:
        hidden_size: width of the tokens.
        intermediate_size: width inside the MLPs.
        num_hidden_layers: number of transformer blocks.
        num_attention_heads: heads of every block; divides `hidden_size`.
        num_channels: channels of a volume; CT has one.
        image_size_dhw: voxels (depth, height, width) of the training crops; sets the number of learned positions.
            Volumes of other sizes get interpolated positions.
        patch_size_dhw: voxels (depth, height, width) of a patch; divides `image_size_dhw`.
        hidden_act: activation of the MLPs; the release uses the exact GELU.
        layer_norm_eps: 1e-5 in the release, neither ViT's 1e-12 nor MAE's 1e-6.
        hidden_dropout: probability after the position embedding, the attention and both MLP layers.
        attention_dropout: probability on the attention weights.
        initializer_range: standard deviation of the initial weights.
    """

    model_type = "fvlm_vision_model"
    base_config_key = "vision_config"

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 1
    image_size_dhw: tuple[int, ...] | list[int] = (112, 256, 352)
    patch_size_dhw: tuple[int, ...] | list[int] = (16, 16, 32)
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    hidden_dropout: float | int = 0.1
    attention_dropout: float | int = 0.1
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        check_spelling(type(self).__name__, kwargs, [field.name for field in fields(type(self))])
        self.image_size_dhw = tuple(self.image_size_dhw)
        self.patch_size_dhw = tuple(self.patch_size_dhw)
        super().__post_init__(**kwargs)
        if len(self.image_size_dhw) != 3 or len(self.patch_size_dhw) != 3:
            raise ValueError(
                "image_size_dhw and patch_size_dhw hold three numbers (depth, height, width), but "
                f"{self.image_size_dhw} and {self.patch_size_dhw} came."
            )
        if any(
            patch < 1 or size < patch or size % patch
            for size, patch in zip(self.image_size_dhw, self.patch_size_dhw, strict=True)
        ):
            raise ValueError(
                f"image_size_dhw {self.image_size_dhw} must be a multiple of patch_size_dhw {self.patch_size_dhw}."
            )

    @property
    def grid_size_dhw(self) -> tuple[int, int, int]:
        """Number of patches along (depth, height, width) of a training crop; 7 x 16 x 11 by default."""
        depth, height, width = (
            size // patch for size, patch in zip(self.image_size_dhw, self.patch_size_dhw, strict=True)
        )
        return depth, height, width


@strict
class FVLMConfig(PreTrainedConfig):
    """Configuration of `FVLMModel`; the defaults are the model released for CT-RATE.

    Args:
        text_config: `BertConfig` or its dict. By default BERT-base with CXR-BERT's dropout of 0.25.
        vision_config: `FVLMVisionConfig` or its dict.
        anatomies: names of the anatomies. The order is that of the ids in `anatomy_mask`: voxels of `anatomies[i]`
            hold i + 1, the background holds 0. This is the one place where the list is kept.
        projection_dim: width of the space in which volumes and texts are compared.
        feature_layers: 0-based blocks whose outputs, not layer-normed, are pooled besides the final normed tokens.
        pooling_num_attention_heads: heads of the attention that pools an anatomy's tokens.
        pooling_dropout: probability on the weights of that attention.
        logit_scale_init_value: initial log of the logit scale; 2.6593 = -ln 0.07, the published temperature.

    Examples:
        >>> from medclip_hf.modeling.fvlm.configuration_fvlm import FVLMConfig
        >>> FVLMConfig(anatomies=["lung", "liver"]).num_anatomies
        2
    """

    model_type = "fvlm"
    sub_configs_defaults = {  # noqa: RUF012 - read by the base class, which declares it a ClassVar
        "text_config": SubConfigSpec(
            BertConfig, init_kwargs={"hidden_dropout_prob": 0.25, "attention_probs_dropout_prob": 0.25}
        ),
        "vision_config": SubConfigSpec(FVLMVisionConfig),
    }

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    anatomies: tuple[str, ...] | list[str] = ("lung", "heart", "esophagus", "aorta")
    projection_dim: int = 256
    feature_layers: tuple[int, ...] | list[int] = (3, 6, 9)
    pooling_num_attention_heads: int = 4
    pooling_dropout: float | int = 0.1
    logit_scale_init_value: float = 2.6592600369327779

    def __post_init__(self, **kwargs: Any) -> None:
        check_spelling(type(self).__name__, kwargs, [field.name for field in fields(type(self))])
        self.anatomies = tuple(self.anatomies)
        self.feature_layers = tuple(self.feature_layers)
        super().__post_init__(**kwargs)
        self._check_anatomies()
        self._check_feature_layers()

    @property
    def num_anatomies(self) -> int:
        """Number of anatomies."""
        return len(self.anatomies)

    def _check_anatomies(self) -> None:
        if not 1 <= len(self.anatomies) <= MAX_ANATOMIES:
            raise ValueError(f"anatomies holds 1 to {MAX_ANATOMIES} names, but {len(self.anatomies)} came.")
        if len(set(self.anatomies)) < len(self.anatomies) or not all(name.strip() for name in self.anatomies):
            raise ValueError(f"anatomies must be distinct names that are not empty, but {self.anatomies} came.")

    def _check_feature_layers(self) -> None:
        vision_config: Any = self.vision_config
        num_layers = vision_config.num_hidden_layers
        if any(not 0 <= layer < num_layers for layer in self.feature_layers):
            raise ValueError(
                f"feature_layers {self.feature_layers} must be 0-based indices of the {num_layers} blocks of the "
                "vision tower. Name fewer or other layers for a shallower tower."
            )


__all__ = ["FVLMConfig", "FVLMVisionConfig"]
