# Copyright 2026 The EpmVG HF authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""EpmVG model configuration."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec

from .patch_backbone import PatchBackboneConfig


@strict
class EpmVGConfig(PreTrainedConfig):
    r"""
    Configuration of [`EpmVGModel`] and [`EpmVGForVisualGrounding`]. The defaults give the architecture of TransVG
    (djiajunustc/TransVG): ResNet-50, six DETR encoder layers, BERT-base, six fusion layers, 640 pixels, 20 tokens.

    Args:
        backbone_config (`PreTrainedConfig` or `dict`, *optional*, defaults to a ResNet-50 with its last stage):
            Vision backbone, any configuration that `AutoBackbone` accepts. Several feature maps (`out_features`) are
            averaged to the cells of the last one and concatenated.
        text_config (`PreTrainedConfig` or `dict`, *optional*, defaults to BERT-base):
            Text tower, any configuration that `AutoModel` turns into a text encoder (`input_ids` to
            `last_hidden_state`; no encoder-decoder).
        backbone_stride (`int`, *optional*, defaults to 32):
            Pixels per cell of the backbone's last feature map. With `image_size` it sets the number of visual rows
            of the position table.
        d_model (`int`, *optional*, defaults to 256):
            Width of the visual encoder and of the fusion transformer.
        encoder_layers (`int`, *optional*, defaults to 6):
            Layers of the DETR encoder behind the vision backbone; 0 leaves it out.
        encoder_attention_heads (`int`, *optional*, defaults to 8):
            Attention heads of the visual encoder.
        encoder_ffn_dim (`int`, *optional*, defaults to 2048):
            Feed-forward width of the visual encoder.
        fusion_layers (`int`, *optional*, defaults to 6):
            Layers of the fusion transformer over `[REG] . text . visual`.
        fusion_attention_heads (`int`, *optional*, defaults to 8):
            Attention heads of the fusion transformer.
        fusion_ffn_dim (`int`, *optional*, defaults to 2048):
            Feed-forward width of the fusion transformer.
        activation_function (`str`, *optional*, defaults to `"relu"`):
            Activation in the feed-forward layers.
        dropout (`float`, *optional*, defaults to 0.1):
            Dropout of both transformers: attention weights, feed-forward activations and residual branches.
        image_size (`int`, *optional*, defaults to 640):
            Side in pixels of the square canvas. Other canvas sizes work too: the visual rows of the position table
            are then interpolated.
        max_text_length (`int`, *optional*, defaults to 20):
            Largest number of text tokens, special tokens included.
        box_head (`str`, *optional*, defaults to `"reg"`):
            `"reg"` regresses the box from the `[REG]` token (TransVG). `"map"` takes the box's centre from a
            sharpened soft-argmax over the consistency map plus a bounded offset, which converges much faster.
        frozen_batch_norm (`bool`, *optional*, defaults to `True`):
            Whether the batch norms of the vision backbone keep their statistics and weights, as in DETR and TransVG.
            Set it to `False` for a backbone that is trained from scratch.
        bbox_loss_coefficient (`float`, *optional*, defaults to 1.0):
            Weight of the L1 loss.
        giou_loss_coefficient (`float`, *optional*, defaults to 1.0):
            Weight of the generalized IoU loss.
        map_loss_coefficient (`float`, *optional*, defaults to 1.0):
            Weight of the loss that draws the consistency map into the box; only used with `box_head="map"`.
        teacher_projection_dim (`int`, *optional*):
            Width of the teacher's image-text space. When given, the model has the two projections whose outputs
            `image_embeds` and `text_embeds` are compared with the teacher in training.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation for the weights that are not Xavier initialised.

    Raises:
        `huggingface_hub.errors.StrictDataclassError`: a setting is of the wrong type, or no model can have it.

    Example:

    ```python
    >>> from epmvg_hf import EpmVGConfig

    >>> config = EpmVGConfig(box_head="map", image_size=512, max_text_length=40)
    >>> config.backbone_config.model_type, config.text_config.model_type
    ('resnet', 'bert')
    ```
    """

    model_type = "epmvg"
    sub_configs_defaults = {  # noqa: RUF012 (read by transformers, never changed)
        "backbone_config": SubConfigSpec(AutoConfig, model_type="resnet", init_kwargs={"out_features": ["stage4"]}),
        "text_config": SubConfigSpec(AutoConfig, model_type="bert"),
    }
    attribute_map = {  # noqa: RUF012
        "hidden_size": "d_model",
        "num_attention_heads": "encoder_attention_heads",
        "num_hidden_layers": "fusion_layers",
    }
    keys_to_ignore_at_inference = ["loss_dict", "hidden_states", "attentions"]  # noqa: RUF012

    backbone_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    backbone_stride: int = 32
    d_model: int = 256
    encoder_layers: int = 6
    encoder_attention_heads: int = 8
    encoder_ffn_dim: int = 2048
    fusion_layers: int = 6
    fusion_attention_heads: int = 8
    fusion_ffn_dim: int = 2048
    activation_function: str = "relu"
    dropout: float | int = 0.1
    image_size: int = 640
    max_text_length: int = 20
    box_head: str = "reg"
    frozen_batch_norm: bool = True
    bbox_loss_coefficient: float | int = 1.0
    giou_loss_coefficient: float | int = 1.0
    map_loss_coefficient: float | int = 1.0
    teacher_projection_dim: int | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        backbone = self.backbone_config
        if isinstance(backbone, dict) and backbone.get("model_type") == PatchBackboneConfig.model_type:
            # Not by name from AutoConfig: two folders with shared code would take each other's class.
            self.backbone_config = PatchBackboneConfig(**backbone)
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Raises a `ValueError` for settings that no model can have. Called for every new configuration."""
        if self.box_head not in ("reg", "map"):
            raise ValueError(f'box_head is {self.box_head!r}, expected "reg" or "map"')
        for heads in ("encoder_attention_heads", "fusion_attention_heads"):
            if self.d_model % getattr(self, heads):
                raise ValueError(f"d_model ({self.d_model}) is not a multiple of {heads} ({getattr(self, heads)})")
        if self.d_model % 4:
            # Sine positions give each axis d_model / 2 channels, half of them sines and half cosines.
            raise ValueError(f"d_model ({self.d_model}) is not a multiple of 4")


__all__ = ["EpmVGConfig"]
