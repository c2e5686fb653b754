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
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec

from .patch_backbone import PatchBackboneConfig


@strict
class EpmVGConfig(PreTrainedConfig):
    r"""
    Configuration of [`EpmVGModel`] and [`EpmVGForVisualGrounding`]. The defaults give the architecture of TransVG
    (djiajunustc/TransVG): ResNet-50, six DETR encoder layers, BERT-base, six fusion layers, 640 pixels, 20 tokens.

    Args:
        backbone_config (`PreTrainedConfig` or `dict`, *optional*, defaults to a ResNet-50 with its last stage):
            Vision backbone: any configuration that `AutoBackbone` accepts. If it has several feature maps
            (`out_features`), they are brought to the grid of one of them (`backbone_stride`) and concatenated: finer
            ones are averaged, coarser ones interpolated.
        text_config (`PreTrainedConfig` or `dict`, *optional*, defaults to BERT-base):
            Text tower: any configuration for which `AutoModel` gives a text encoder, which turns `input_ids` into a
            `last_hidden_state` and is not an encoder-decoder.
        backbone_stride (`int`, *optional*, defaults to 32):
            Pixels per cell of the grid, which is that of one of the backbone's feature maps. Together with
            `image_size` it gives the number of visual tokens, each of which has a row in the position table.
        d_model (`int`, *optional*, defaults to 256):
            Width of the visual encoder and of the fusion transformer.
        projection_norm (`bool`, *optional*, defaults to `False`):
            Whether image features and text tokens pass a layer norm after they are projected to `d_model`. Towers that
            were trained apart give numbers of different size, often several times those that a transformer starts
            well from. TransVG has no such norms.
        encoder_layers (`int`, *optional*, defaults to 6):
            Layers of the DETR encoder that follows the vision backbone; with 0 there is none.
        encoder_attention_heads (`int`, *optional*, defaults to 8):
            Attention heads of the visual encoder.
        encoder_ffn_dim (`int`, *optional*, defaults to 2048):
            Feed-forward width of the visual encoder.
        fusion_type (`str`, *optional*, defaults to `"encoder"`):
            `"encoder"` fuses `[REG]`, text tokens and visual tokens by attention of all to all, as TransVG does. With
            `"decoder"` only `[REG]` and the text tokens are updated, by attention to themselves and to the visual
            tokens, as in DETR's decoder. Then a further expression of a picture costs a small part of what it costs
            with an encoder.
        fusion_layers (`int`, *optional*, defaults to 6):
            Layers of the fusion transformer.
        fusion_attention_heads (`int`, *optional*, defaults to 8):
            Attention heads of the fusion transformer.
        fusion_ffn_dim (`int`, *optional*, defaults to 2048):
            Feed-forward width of the fusion transformer.
        activation_function (`str`, *optional*, defaults to `"relu"`):
            Activation of the feed-forward layers.
        dropout (`float`, *optional*, defaults to 0.1):
            Dropout in both transformers, applied to attention weights, feed-forward activations and residual branches.
        image_size (`int`, *optional*, defaults to 640):
            Side of the square canvas in pixels. The model also accepts other canvases, for which it interpolates the
            visual rows of the position table.
        max_text_length (`int`, *optional*, defaults to 20):
            Largest number of text tokens per expression, special tokens included.
        box_head (`str`, *optional*, defaults to `"reg"`):
            `"reg"` regresses the box from the state of the `[REG]` token, as TransVG does. `"map"` takes the centre of
            the box from a sharpened soft-argmax over the consistency map plus a bounded offset, which converges much
            faster.
        box_refinement (`bool`, *optional*, defaults to `False`):
            Whether a second look at the visual tokens in and around the box corrects it.
        score_head (`bool`, *optional*, defaults to `False`):
            Whether the model predicts how good its boxes are: `scores` in [0, 1], near 0 if what the expression names
            is not in the image. Without it `scores` are `None`.
        frozen_batch_norm (`bool`, *optional*, defaults to `True`):
            Whether the batch norms of the vision backbone keep their statistics and weights in training, as in DETR
            and TransVG. Set it to `False` for a backbone that is trained from scratch.
        bbox_loss_coefficient (`float`, *optional*, defaults to 1.0):
            Weight of the L1 loss.
        giou_loss_coefficient (`float`, *optional*, defaults to 1.0):
            Weight of the generalized IoU loss.
        map_loss_coefficient (`float`, *optional*, defaults to 1.0):
            Weight of the loss that draws the consistency map into the box; only with `box_head="map"`.
        score_loss_coefficient (`float`, *optional*, defaults to 1.0):
            Weight of the loss of the scores; only with `score_head`.
        teacher_projection_dim (`int`, *optional*):
            Width of the teacher's image-text space. If it is given, the model has two projections into that space, of
            the mean of its visual tokens before fusion and of that of its text tokens. Their outputs `image_embeds`
            and `text_embeds` are compared with the teacher's in training.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of new weights, except those that are Xavier initialised.

    Raises:
        `huggingface_hub.errors.StrictDataclassError`: a setting has the wrong type, or a value that no model can have.

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
    keys_to_ignore_at_inference = ["loss_dict", "hidden_states", "attentions", "cross_attentions"]  # noqa: RUF012

    backbone_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    backbone_stride: int = 32
    d_model: int = 256
    projection_norm: bool = False
    encoder_layers: int = 6
    encoder_attention_heads: int = 8
    encoder_ffn_dim: int = 2048
    fusion_type: str = "encoder"
    fusion_layers: int = 6
    fusion_attention_heads: int = 8
    fusion_ffn_dim: int = 2048
    activation_function: str = "relu"
    dropout: float | int = 0.1
    image_size: int = 640
    max_text_length: int = 20
    box_head: str = "reg"
    box_refinement: bool = False
    score_head: bool = False
    frozen_batch_norm: bool = True
    bbox_loss_coefficient: float | int = 1.0
    giou_loss_coefficient: float | int = 1.0
    map_loss_coefficient: float | int = 1.0
    score_loss_coefficient: float | int = 1.0
    teacher_projection_dim: int | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        backbone = self.backbone_config
        if isinstance(backbone, dict) and backbone.get("model_type") == PatchBackboneConfig.model_type:
            # AutoConfig looks classes up by name. If two folders with shared code were loaded, one would get the class
            # of the other.
            self.backbone_config = PatchBackboneConfig(**backbone)
        for name, settings in (("backbone_config", self.backbone_config), ("text_config", self.text_config)):
            kind = settings.get("model_type") if isinstance(settings, dict) else None
            if isinstance(settings, dict) and not (isinstance(kind, str) and kind in CONFIG_MAPPING):
                raise ValueError(f"the model_type of {name} is {kind!r:.80}, which transformers does not know")
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Raises a `ValueError` for settings that no model can have. Called for every new configuration."""
        if self.box_head not in ("reg", "map"):
            raise ValueError(f'box_head is {self.box_head!r}, expected "reg" or "map"')
        if self.fusion_type not in ("encoder", "decoder"):
            raise ValueError(f'fusion_type is {self.fusion_type!r}, expected "encoder" or "decoder"')
        for heads in ("encoder_attention_heads", "fusion_attention_heads"):
            if self.d_model % getattr(self, heads):
                raise ValueError(f"d_model ({self.d_model}) is not a multiple of {heads} ({getattr(self, heads)})")
        if self.d_model % 4:
            # Sine positions have d_model / 2 channels for each axis, one half of them sines and the other cosines.
            raise ValueError(f"d_model ({self.d_model}) is not a multiple of 4")


__all__ = ["EpmVGConfig"]
