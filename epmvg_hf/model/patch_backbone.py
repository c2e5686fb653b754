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
"""CLIP's vision tower and ViT as backbones, since `AutoBackbone` of transformers does not accept them."""

import inspect
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    MODEL_MAPPING,
    AutoBackbone,
    AutoConfig,
    CLIPVisionConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.configuration_utils import SubConfigSpec
from transformers.modeling_outputs import BackboneOutput


@strict
class PatchBackboneConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""
    Configuration of [`PatchBackbone`].

    Args:
        tower_config (`CLIPVisionConfig`, `ViTConfig` or `dict`, *optional*, defaults to CLIP's ViT-B/32):
            The vision transformer.
        out_features (`list[str]`, *optional*, defaults to the last):
            Which feature maps to return: `"stem"` is the input of the first layer, `"stage1"` its output, `"stage2"`
            the output of the second layer, and so on.
        out_indices (`list[int]`, *optional*):
            The feature maps by their numbers instead of their names; `"stem"` is 0.

    Raises:
        ValueError: the tower is neither a CLIP nor a ViT, or has no such feature map.

    Example:

    ```python
    >>> from epmvg_hf.model.patch_backbone import PatchBackboneConfig

    >>> config = PatchBackboneConfig(out_features=["stage4", "stage12"])
    >>> config.tower_config.model_type, config.out_indices
    ('clip_vision_model', [4, 12])
    ```
    """

    model_type = "epmvg_patch_backbone"
    sub_configs_defaults = {  # noqa: RUF012 (read by transformers, never changed)
        "tower_config": SubConfigSpec(AutoConfig, model_type="clip_vision_model")
    }

    tower_config: dict | PreTrainedConfig | None = None
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        chosen = {name: kwargs.pop(name, None) for name in ("out_features", "out_indices")}
        kwargs.pop("stage_names", None)  # saved configs have them, but they follow from the tower
        super().__post_init__(**kwargs)
        tower: PreTrainedConfig = self.tower_config  # the call above has made a config of a dictionary
        if tower.model_type not in ("clip_vision_model", "vit"):
            raise ValueError(f"tower_config is of type {tower.model_type!r}, expected clip_vision_model or vit")
        self.stage_names = ["stem", *(f"stage{layer}" for layer in range(1, tower.num_hidden_layers + 1))]
        self.set_output_features_output_indices(**chosen)


class PatchBackbone(BackboneMixin, PreTrainedModel):
    """
    Returns the patch tokens of a vision transformer as feature maps `(B, hidden_size, height / patch, width / patch)`,
    without the class token. The map of the last stage is the tower's `last_hidden_state`, that of an earlier stage the
    output of its layer. Position embeddings are interpolated to the size of the image.

    Args:
        config ([`PatchBackboneConfig`]): the tower, and which of its maps to return; the weights are new.

    Example:

    ```python
    >>> import torch
    >>> from transformers import CLIPVisionConfig
    >>> from epmvg_hf.model.patch_backbone import PatchBackbone, PatchBackboneConfig

    >>> tower = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    >>> backbone = PatchBackbone(PatchBackboneConfig(tower_config=tower))
    >>> backbone(torch.zeros(1, 3, 96, 64)).feature_maps[0].shape  # patches of 32 pixels
    torch.Size([1, 32, 3, 2])
    ```
    """

    config: PatchBackboneConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: PatchBackboneConfig):
        super().__init__(config)
        tower: PreTrainedConfig = config.tower_config
        self.patch_size = tower.patch_size
        self.num_features = [tower.hidden_size] * len(config.stage_names)
        # The pooling layer and CLIP's last norm are left out. Only the class token passes through them, so their
        # weights would never get a gradient.
        self.tower = MODEL_MAPPING[type(tower)](tower, **without_pooling(tower))
        if isinstance(tower, CLIPVisionConfig):
            self.tower.post_layernorm = nn.Identity()
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BackboneOutput:
        """
        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, 3, height, width)`): normalised images.

        Returns:
            `BackboneOutput`: `feature_maps`, one `(B, hidden_size, height / patch, width / patch)` for each of
            `config.out_features`.
        """
        outputs = self.tower(pixel_values, interpolate_pos_encoding=True, output_hidden_states=True, return_dict=True)
        states = (*outputs.hidden_states[:-1], outputs.last_hidden_state)
        height, width = (side // self.patch_size for side in pixel_values.shape[-2:])
        return BackboneOutput(
            feature_maps=tuple(
                states[index][:, 1:].transpose(1, 2).unflatten(2, (height, width)).contiguous()
                for index in self.out_indices
            )
        )


def without_pooling(tower_config: PreTrainedConfig) -> dict[str, bool]:
    """
    The keyword argument that builds a tower without its pooling layer, if it has one. The grounding model does not
    read the pooled state, so the layer would never get a gradient.
    """
    signature = inspect.signature(MODEL_MAPPING[type(tower_config)].__init__)
    return {"add_pooling_layer": False} if "add_pooling_layer" in signature.parameters else {}


# Registered here and not in `__init__.py`, which does not travel with shared code (see `register_for_hub`).
AutoBackbone.register(PatchBackboneConfig, PatchBackbone)

__all__ = ["PatchBackbone", "PatchBackboneConfig"]
