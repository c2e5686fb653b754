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
"""The base class of the models."""

import json
import os
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from transformers import MODEL_FOR_BACKBONE_MAPPING
from transformers import initialization as init
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import is_peft_available

from .card_mixin import ModelCardMixin
from .configuration_epmvg import EpmVGConfig
from .folded_batch_norm import fold_batch_norms


class EpmVGPreTrainedModel(ModelCardMixin, PreTrainedModel):
    """
    The base class of [`EpmVGModel`] and [`EpmVGForVisualGrounding`]. It initialises new weights, loads and saves,
    pushes to the Hub with a model card, and chooses among transformers' attention implementations.

    Example:

    ```python
    >>> model.save_pretrained("outputs/mine")
    >>> type(model).from_pretrained("outputs/mine").num_parameters() == model.num_parameters()
    True
    ```
    """

    config: EpmVGConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["EpmVGEncoderLayer", "EpmVGDecoderLayer"]  # noqa: RUF012 (read by transformers, never changed)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # The loss is a mean over the expressions of one batch, and EpmVGTrainer weighs the batches that it accumulates. So
    # the Trainer of transformers must not pass `num_items_in_batch` for the model to divide by.
    accepts_loss_kwargs = False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Self:
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except OSError as error:
            if (problem := _problem_with_adapter(pretrained_model_name_or_path)) is not None:
                raise OSError(problem) from error
            raise

    def set_attn_implementation(self, attn_implementation: str | dict, allow_all_kernels: bool = False) -> None:
        """
        Sets the attention implementation, as in transformers. A single name also works when the backbone does not
        support it, as a ResNet does not: it then applies to all other parts.

        Args:
            attn_implementation (`str` or `dict`): `"eager"`, `"sdpa"`, `"flash_attention_2"`, `"flex_attention"` and
                so on, or one for each part: `""` for visual encoder and fusion transformer, `"backbone_config"` and
                `"text_config"` for the towers.
            allow_all_kernels (`bool`, *optional*, defaults to `False`): whether kernels of any author on the Hub may
                be used.

        Raises:
            ValueError: there is no such implementation, or a part other than the backbone does not support it.
            ImportError: the library of the implementation is not installed.

        Example:

        ```python
        >>> model.set_attn_implementation("eager")
        >>> outputs = model(**processor(images=image, text="the star"), output_attentions=True)
        >>> outputs.attentions[0].shape  # [REG], 4 tokens of text, 64 visual tokens
        torch.Size([1, 2, 69, 69])
        ```
        """
        backbone_config = self.config.backbone_config
        if isinstance(attn_implementation, str) and not supports_attention(backbone_config, attn_implementation):
            attn_implementation = {"": attn_implementation, "text_config": attn_implementation}
        super().set_attn_implementation(attn_implementation, allow_all_kernels)

    @torch.no_grad()
    def resize_canvas(self, image_size: int) -> Self:
        """
        Prepares the model, in place, for training on another canvas. The visual rows of the position table are
        interpolated to the new grid, where each cell then learns its own. A model that is not trained on it reads
        other canvases as it is, and interpolates its table at each call. The processor has its own
        `image_processor.size`.

        Args:
            image_size (`int`): side of the square canvas in pixels.

        Returns:
            The model itself, with the new `config.image_size`.

        Raises:
            ValueError: the canvas is smaller than a cell of the grid.

        Example:

        ```python
        >>> model = model.resize_canvas(96)
        >>> processor.image_processor.size = {"height": 96, "width": 96}
        >>> model(**processor(images=image, text="the star")).visual_mask.shape
        torch.Size([1, 12, 12])
        ```
        """
        model = self.base_model
        side = image_size // self.config.backbone_stride
        if side < 1:
            raise ValueError(
                f"image_size is {image_size}, expected at least one cell of {self.config.backbone_stride} pixels "
                "(config.backbone_stride)"
            )
        rows = model._fusion_positions(self.config.max_text_length, (side, side))[0]
        model.fusion_positions = nn.Parameter(rows.clone(), requires_grad=model.fusion_positions.requires_grad)
        self.config.image_size = model.config.image_size = image_size
        return self

    def optimize_for_inference(self) -> Self:
        """
        Makes the vision backbone faster, in place, for a model that is not trained further. Batch norms are folded
        into the convolutions before them, and convolutions read their weights with the channels last. The boxes are
        those of before up to rounding, and a model that is saved afterwards loads like any other.

        Returns:
            The model itself, in evaluation mode.

        Example:

        ```python
        >>> inputs = processor(images=image, text="the star")
        >>> before = model(**inputs).pred_boxes
        >>> model.optimize_for_inference()(**inputs).pred_boxes.allclose(before, atol=1e-5)
        True
        ```
        """
        self.eval()
        backbone = self.base_model.vision_model
        side = self.config.image_size
        fold_batch_norms(backbone, torch.zeros(1, 3, side, side, dtype=self.dtype, device=self.device))
        backbone.to(memory_format=torch.channels_last)
        return self

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            # DETR and TransVG initialise their transformers with Xavier; the towers initialise themselves.
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    def _loaded_from(self) -> str:
        # With an adapter loaded, `name_or_path` is the base model's, whose card does not describe the adapter.
        return "" if self._hf_peft_config_loaded else self.config.name_or_path

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        # If the code is shared along (see `register_for_hub`), both classes can load the folder, whichever of them was
        # saved. If not, `auto_map` must go even if the model came from a folder with code: its files are not copied.
        self.config.__dict__.pop("auto_map", None)
        if self.is_remote_code():
            self.config.auto_map = {
                "AutoModel": "modeling_epmvg.EpmVGModel",
                "AutoModelForZeroShotObjectDetection": "modeling_epmvg.EpmVGForVisualGrounding",
            }
        super().save_pretrained(save_directory, **kwargs)


def _problem_with_adapter(folder: str | os.PathLike) -> str | None:
    """Why a folder could not be loaded, if it holds an adapter alone: transformers' error does not mention that."""
    file = Path(folder) / "adapter_config.json"
    if not file.is_file() or (file.parent / "config.json").is_file():
        return None
    if not is_peft_available():
        return f"{folder} is an adapter, which needs peft: pip install peft."
    base = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    return (
        f"{folder} is an adapter whose base model could not be loaded from {base}, as its {file.name} names it: "
        "correct base_model_name_or_path there, or load the base model from where it is and then call its "
        f"load_adapter({str(folder)!r})."
    )


def supports_attention(backbone_config: PreTrainedConfig, name: str | None) -> bool:
    """Whether a backbone has this attention implementation; a convolutional one only takes `"eager"` and `None`."""
    backbone = MODEL_FOR_BACKBONE_MAPPING[type(backbone_config)]
    if name == "sdpa":
        return backbone._supports_sdpa
    if name == "flex_attention":
        return backbone._supports_flex_attn
    return name in (None, "eager") or backbone._supports_flash_attn
