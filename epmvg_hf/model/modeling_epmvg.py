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
"""PyTorch EpmVG: a TransVG-compatible grounding student that reads B images and N expressions."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_BACKBONE_MAPPING, AutoModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import load_backbone
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.detr.modeling_detr import DetrSinePositionEmbedding
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .card_mixin import ModelCardMixin
from .configuration_epmvg import EpmVGConfig
from .losses import box_loss, box_map_target, has_box, map_loss
from .patch_backbone import without_pooling
from .pretrained_towers import FromTowersMixin


@dataclass
class EpmVGModelOutput(ModelOutput):
    """
    Outputs of [`EpmVGModel`] for B images, N expressions of L tokens and V visual tokens.

    Args:
        reg_state (`torch.FloatTensor` of shape `(N, d_model)`):
            Last state of the `[REG]` token, one per expression.
        consistency_map (`torch.FloatTensor` of shape `(N, V)`):
            Score (a logit) of every visual token for the expression, row-major over the feature grid. Padding is not
            masked: see `visual_mask`.
        similarity_map (`torch.FloatTensor` of shape `(N, V)`):
            The part of `consistency_map` that comes before fusion: similarity of the expression's mean text token with
            every visual token. What a teacher's patch-text map is distilled into.
        visual_tokens (`torch.FloatTensor` of shape `(B, V, d_model)`):
            Visual tokens before fusion.
        visual_mask (`torch.LongTensor` of shape `(B, grid_height, grid_width)`):
            1 where a visual token lies on the picture, 0 on padding. V is `grid_height * grid_width`.
        text_tokens (`torch.FloatTensor` of shape `(N, L, d_model)`):
            Text tokens before fusion.
        image_embeds (`torch.FloatTensor` of shape `(B, teacher_projection_dim)`, *optional*):
            Normalised image embedding in the teacher's space, taken before fusion; not for given `visual_tokens`.
        text_embeds (`torch.FloatTensor` of shape `(N, teacher_projection_dim)`, *optional*):
            Normalised expression embedding in the teacher's space, taken before fusion.
        last_hidden_state (`torch.FloatTensor` of shape `(N, 1 + L + V, d_model)`):
            Fused states of `[REG] . text . visual`.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*):
            States of the fusion transformer, its input first.
        attentions (`tuple(torch.FloatTensor)`, *optional*):
            Attention weights `(N, heads, 1 + L + V, 1 + L + V)` of the fusion transformer; empty unless the attention
            implementation is `"eager"`.
    """

    reg_state: torch.FloatTensor | None = None
    consistency_map: torch.FloatTensor | None = None
    similarity_map: torch.FloatTensor | None = None
    visual_tokens: torch.FloatTensor | None = None
    visual_mask: torch.LongTensor | None = None
    text_tokens: torch.FloatTensor | None = None
    image_embeds: torch.FloatTensor | None = None
    text_embeds: torch.FloatTensor | None = None
    last_hidden_state: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class EpmVGImageFeatures(BaseModelOutputWithPooling):
    """
    What [`EpmVGModel.get_image_features`] returns for B images with V visual tokens.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(B, V, d_model)`):
            Visual tokens before fusion, row-major over the feature grid: the model's `visual_tokens`.
        pooler_output (`torch.FloatTensor` of shape `(B, teacher_projection_dim)`, *optional*):
            Normalised image embedding in the teacher's space: the model's `image_embeds`.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*):
            States of the visual encoder, its input first.
        attentions (`tuple(torch.FloatTensor)`, *optional*):
            Attention weights `(B, heads, V, V)` of the visual encoder; empty unless the attention implementation is
            `"eager"`.
        visual_mask (`torch.LongTensor` of shape `(B, grid_height, grid_width)`):
            1 where a visual token lies on the picture, 0 on padding: the model's `visual_mask`.
    """

    visual_mask: torch.LongTensor | None = None


@dataclass
class EpmVGGroundingOutput(ModelOutput):
    """
    Outputs of [`EpmVGForVisualGrounding`]; the fields it shares with [`EpmVGModelOutput`] mean the same.

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*):
            Weighted sum of `loss_dict`, a mean over expressions with a box; only with `labels`.
        loss_dict (`dict[str, torch.FloatTensor]`, *optional*):
            Unweighted terms: `loss_bbox`, `loss_giou` and, with `box_head="map"`, `loss_map`.
        pred_boxes (`torch.FloatTensor` of shape `(N, 4)`):
            (cx, cy, w, h) in [0, 1] of the padded canvas. `EpmVGProcessor.post_process_grounding` turns them into
            pixels of the original image.
        reg_state, consistency_map, similarity_map, visual_mask, image_embeds, text_embeds, hidden_states, attentions:
            See [`EpmVGModelOutput`].
    """

    loss: torch.FloatTensor | None = None
    loss_dict: dict[str, torch.FloatTensor] | None = None
    pred_boxes: torch.FloatTensor | None = None
    reg_state: torch.FloatTensor | None = None
    consistency_map: torch.FloatTensor | None = None
    similarity_map: torch.FloatTensor | None = None
    visual_mask: torch.LongTensor | None = None
    image_embeds: torch.FloatTensor | None = None
    text_embeds: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Attention `(batch, length, heads, head_dim)` and its weights `(batch, heads, length, length)`, in plain PyTorch.
    """
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class EpmVGAttention(nn.Module):
    """Self-attention in which positions are added to queries and keys, not to values (DETR)."""

    def __init__(self, config: EpmVGConfig, num_attention_heads: int):
        super().__init__()
        self.config = config
        self.head_dim = config.d_model // num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(config.d_model, config.d_model)
        self.k_proj = nn.Linear(config.d_model, config.d_model)
        self.v_proj = nn.Linear(config.d_model, config.d_model)
        self.o_proj = nn.Linear(config.d_model, config.d_model)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_embeddings: torch.Tensor,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)
        positioned = hidden_states + position_embeddings
        query = self.q_proj(positioned).view(hidden_shape).transpose(1, 2)
        key = self.k_proj(positioned).view(hidden_shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attended, weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(attended.reshape(*input_shape, -1)), weights


class EpmVGEncoderLayer(GradientCheckpointingLayer):
    """Post-norm transformer encoder layer of DETR, used by the visual encoder and by the fusion transformer."""

    def __init__(self, config: EpmVGConfig, num_attention_heads: int, ffn_dim: int):
        super().__init__()
        self.self_attn = EpmVGAttention(config, num_attention_heads)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.fc1 = nn.Linear(config.d_model, ffn_dim)
        self.activation_fn = ACT2FN[config.activation_function]
        self.fc2 = nn.Linear(ffn_dim, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model)
        self.dropout = config.dropout

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_embeddings: torch.Tensor,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attended, _ = self.self_attn(hidden_states, attention_mask, position_embeddings, **kwargs)
        attended = nn.functional.dropout(attended, p=self.dropout, training=self.training)
        hidden_states = self.self_attn_layer_norm(hidden_states + attended)

        expanded = self.activation_fn(self.fc1(hidden_states))
        expanded = nn.functional.dropout(expanded, p=self.dropout, training=self.training)
        contracted = nn.functional.dropout(self.fc2(expanded), p=self.dropout, training=self.training)
        return self.final_layer_norm(hidden_states + contracted)


class EpmVGPreTrainedModel(ModelCardMixin, PreTrainedModel):
    """
    What [`EpmVGModel`] and [`EpmVGForVisualGrounding`] share: new weights, loading, saving, `push_to_hub` with a model
    card, gradient checkpointing and the attention implementations of transformers.

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
    _no_split_modules = ["EpmVGEncoderLayer"]  # noqa: RUF012 (read by transformers, never changed)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # The loss is a mean over this batch's expressions; EpmVGTrainer rescales it over accumulated batches.
    accepts_loss_kwargs = False

    def set_attn_implementation(self, attn_implementation: str | dict, allow_all_kernels: bool = False) -> None:
        """
        As in transformers, but a name for all parts spares a backbone that does not know it, such as a ResNet.

        Args:
            attn_implementation (`str` or `dict`): `"eager"`, `"sdpa"`, `"flash_attention_2"`, `"flex_attention"`, ...,
                or one for each part: `""` (both transformers of this package), `"backbone_config"`, `"text_config"`.
            allow_all_kernels (`bool`, *optional*, defaults to `False`): also kernels of unknown authors on the Hub.

        Raises:
            ValueError: there is no such implementation, or a part does not support it.
            ImportError: its library is not installed.

        Example:

        ```python
        >>> model.set_attn_implementation("eager")
        >>> outputs = model(**processor(images=image, text="the star"), output_attentions=True)
        >>> outputs.attentions[0].shape  # [REG], 4 tokens of text, 64 visual tokens
        torch.Size([1, 2, 69, 69])
        ```
        """
        backbone_config = self.config.backbone_config
        if isinstance(attn_implementation, str) and not _supports_attention(backbone_config, attn_implementation):
            attn_implementation = {"": attn_implementation, "text_config": attn_implementation}
        super().set_attn_implementation(attn_implementation, allow_all_kernels)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            # DETR and TransVG initialise their transformers with Xavier; the towers initialise themselves.
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)
        if isinstance(module, EpmVGModel):
            init.normal_(module.reg_token)
            # TransVG draws the whole table from N(0, 1), noise as loud as the tokens themselves. Here rows
            # start small, and the grid with the encoder's sine positions.
            init.normal_(module.fusion_positions, std=0.1)
            side = self.config.image_size // self.config.backbone_stride
            grid = torch.ones(1, side, side, dtype=torch.bool, device=module.fusion_positions.device)
            sine = module.sine_positions((1, 1, side, side), grid.device, torch.float32, grid).flatten(2)[0].T
            rows = torch.cat([module.fusion_positions[: 1 + self.config.max_text_length], sine.to(self.dtype)])
            init.copy_(module.fusion_positions, rows)
        elif isinstance(module, EpmVGForVisualGrounding) and self.config.box_head == "map":
            init.constant_(module.log_map_sharpness, math.log(2))
            # Start from the soft-argmax itself: no offset.
            init.zeros_(module.box_head[-1].weight)

    def _loaded_from(self) -> str:
        # Of a model with an adapter of its own, that is the base, whose card does not tell of the adapter.
        return "" if self._hf_peft_config_loaded else self.config.name_or_path

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        # With its code (see `register_for_hub`), both classes read the folder, whichever was saved. Without, nothing
        # may be left of the code of the folder that the model came from.
        self.config.__dict__.pop("auto_map", None)
        if self.is_remote_code():
            self.config.auto_map = {
                "AutoModel": "modeling_epmvg.EpmVGModel",
                "AutoModelForZeroShotObjectDetection": "modeling_epmvg.EpmVGForVisualGrounding",
            }
        super().save_pretrained(save_directory, **kwargs)


class EpmVGEncoder(EpmVGPreTrainedModel):
    """Stack of [`EpmVGEncoderLayer`]; `attention_mask` is `(batch, length)`, True where attention may go."""

    _can_record_outputs = {"hidden_states": EpmVGEncoderLayer, "attentions": EpmVGAttention}  # noqa: RUF012

    def __init__(self, config: EpmVGConfig, num_layers: int, num_attention_heads: int, ffn_dim: int):
        super().__init__(config)
        self.layers = nn.ModuleList(
            [EpmVGEncoderLayer(config, num_attention_heads, ffn_dim) for _ in range(num_layers)]
        )
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_embeddings: torch.Tensor,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        attention_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=inputs_embeds, attention_mask=attention_mask
        )
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask, position_embeddings, **kwargs)
        return BaseModelOutput(last_hidden_state=hidden_states)


class EpmVGVisualEncoder(EpmVGEncoder):
    """The DETR encoder: [`EpmVGEncoder`] with `encoder_layers` layers, counted when states are chosen by index."""

    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": OutputRecorder(EpmVGEncoderLayer, num_hidden_layers_key="encoder_layers"),
        "attentions": EpmVGAttention,
    }


class EpmVGModel(FromTowersMixin, EpmVGPreTrainedModel):
    """
    The bare grounding student: vision backbone and DETR encoder, text tower, and a fusion transformer over
    `[REG] . text . visual` (TransVG). The visual branch runs once per image, however many expressions it has.

    Args:
        config ([`EpmVGConfig`]): the architecture; the weights are new. [`~EpmVGModel.from_vision_text_pretrained`]
            starts from pretrained towers.

    Example:

    ```python
    >>> from epmvg_hf import EpmVGModel

    >>> model = EpmVGModel.from_pretrained("outputs/demo")
    >>> outputs = model(**processor(images=image, text=["the star", "the green triangle"]))
    >>> outputs.visual_tokens.shape, outputs.consistency_map.shape  # 1 image, 2 expressions, 8 x 8 visual tokens
    (torch.Size([1, 64, 16]), torch.Size([2, 64]))
    ```
    """

    def __init__(self, config: EpmVGConfig):
        super().__init__(config)
        if not _supports_attention(config.backbone_config, config.backbone_config._attn_implementation):
            config.backbone_config._attn_implementation = None
        self.vision_model = load_backbone(config)
        channels = sum(self.vision_model.channels)
        self.input_projection = nn.Conv2d(channels, config.d_model, kernel_size=1)
        self.sine_positions = DetrSinePositionEmbedding(config.d_model // 2, normalize=True)
        self.encoder = EpmVGVisualEncoder(
            config, config.encoder_layers, config.encoder_attention_heads, config.encoder_ffn_dim
        )
        self.visual_projection = nn.Linear(config.d_model, config.d_model)

        self.text_model = AutoModel.from_config(config.text_config, **without_pooling(config.text_config))
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.d_model)

        grid = config.image_size // config.backbone_stride
        self.reg_token = nn.Parameter(torch.empty(config.d_model))
        # Rows: [REG], max_text_length text tokens, then the grid row by row; so text padding never shifts the grid.
        self.fusion_positions = nn.Parameter(torch.empty(1 + config.max_text_length + grid * grid, config.d_model))
        self.fusion = EpmVGEncoder(config, config.fusion_layers, config.fusion_attention_heads, config.fusion_ffn_dim)

        if config.teacher_projection_dim is not None:
            width = config.teacher_projection_dim
            self.teacher_image_projection = nn.Linear(channels, width, bias=False)
            self.teacher_text_projection = nn.Linear(config.text_config.hidden_size, width, bias=False)

        self.post_init()

    def _batch_norms(self) -> list[nn.Module]:
        return [module for module in self.vision_model.modules() if isinstance(module, nn.BatchNorm2d)]

    def train(self, mode: bool = True) -> "EpmVGModel":
        """
        As in PyTorch, but with `config.frozen_batch_norm` the backbone's batch norms stay in evaluation mode, and are
        not trained.
        """
        super().train(mode)
        for norm in self._batch_norms():
            # Here, not in __init__: from_pretrained makes every parameter anew, and ends in eval().
            if self.config.frozen_batch_norm:
                norm.requires_grad_(False)
            if not norm.weight.requires_grad:
                norm.eval()
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.FloatTensor,
        pixel_mask: torch.LongTensor | None = None,
        original_sizes: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> EpmVGImageFeatures:
        r"""
        The visual branch alone. Its tokens may be kept and given to the model as often as expressions come.

        Args:
            pixel_values, pixel_mask, original_sizes:
                See [`EpmVGModel.forward`].

        Returns:
            [`EpmVGImageFeatures`]: or a tuple, with `return_dict=False`.

        Raises:
            ValueError: the backbone's cells are not of `config.backbone_stride` pixels.

        Example:

        ```python
        >>> features = model.get_image_features(**processor(images=image))
        >>> seen = {"visual_tokens": features.last_hidden_state, "visual_mask": features.visual_mask}
        >>> for expression in ("the man in blue", "the door"):
        ...     outputs = model(**processor(text=expression), **seen)
        ...     (result,) = processor.post_process_grounding(outputs, target_sizes=[(image.height, image.width)])
        ...     print(result["box"].shape)
        torch.Size([4])
        torch.Size([4])
        ```
        """
        feature_map, visual_mask = self._encode_pixels(pixel_values, pixel_mask)
        projected = self.input_projection(feature_map)
        # Cumulative sums over the grid want full precision, whatever the model runs in.
        positions = self.sine_positions(projected.shape, projected.device, torch.float32, visual_mask)
        encoded = self.encoder(
            projected.flatten(2).transpose(1, 2),
            attention_mask=visual_mask.flatten(1),
            position_embeddings=positions.flatten(2).transpose(1, 2).to(projected.dtype),
            return_dict=True,
            **kwargs,
        )
        image_embeds = None
        if self.config.teacher_projection_dim is not None:
            pooled = _masked_mean(feature_map.flatten(2).transpose(1, 2), visual_mask.flatten(1))
            image_embeds = nn.functional.normalize(self.teacher_image_projection(pooled), dim=-1)
        return EpmVGImageFeatures(
            last_hidden_state=self.visual_projection(encoded.last_hidden_state),
            pooler_output=image_embeds,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
            visual_mask=visual_mask.long(),
        )

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        r"""
        The text tower alone.

        Args:
            input_ids, attention_mask, inputs_embeds:
                See [`EpmVGModel.forward`].

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutputWithPooling`]: the tower's states. `last_hidden_state`
            `(N, L, text_config.hidden_size)` is what the model projects to its `text_tokens`, and `pooler_output`
            `(N, teacher_projection_dim)` are the model's `text_embeds`, if the config has such a width.

        Example:

        ```python
        >>> model.get_text_features(**processor(text=["the star", "a dog"])).last_hidden_state.shape
        torch.Size([2, 4, 16])
        ```
        """
        # Not every text tower knows inputs_embeds.
        tokens = {"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
        states = self.text_model(**tokens, attention_mask=attention_mask, return_dict=True, **kwargs)
        text_embeds = None
        if self.config.teacher_projection_dim is not None:
            pooled = _masked_mean(states.last_hidden_state, _token_mask(states.last_hidden_state, attention_mask))
            text_embeds = nn.functional.normalize(self.teacher_text_projection(pooled), dim=-1)
        return BaseModelOutputWithPooling(
            last_hidden_state=states.last_hidden_state,
            pooler_output=text_embeds,
            hidden_states=states.hidden_states,
            attentions=states.attentions,
        )

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor | None = None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        pixel_mask: torch.LongTensor | None = None,
        image_index: torch.LongTensor | None = None,
        original_sizes: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        visual_tokens: torch.FloatTensor | None = None,
        visual_mask: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> EpmVGModelOutput:
        r"""
        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, 3, height, width)`, *optional*):
                Normalised images on their canvas; not with `visual_tokens`.
            input_ids (`torch.LongTensor` of shape `(N, L)`, *optional*):
                Tokens of N expressions, L at most `max_text_length`; not with `inputs_embeds`.
            attention_mask (`torch.LongTensor` of shape `(N, L)`, *optional*):
                1 on tokens, 0 on padding; without it every token counts.
            pixel_mask (`torch.LongTensor` of shape `(B, height, width)`, *optional*):
                1 on the picture, 0 on padding; without it the picture fills the canvas.
            image_index (`torch.LongTensor` of shape `(N,)`, *optional*):
                The image that each expression belongs to; without it N must be B and they are paired in order.
            original_sizes (`torch.LongTensor` of shape `(B, 2)`, *optional*):
                Not used: accepted so that `model(**processor(...))` works, since post-processing needs it.
            inputs_embeds (`torch.FloatTensor` of shape `(N, L, text_config.hidden_size)`, *optional*):
                Instead of `input_ids`, token embeddings for a text tower that accepts them.
            visual_tokens (`torch.FloatTensor` of shape `(B, V, d_model)`, *optional*):
                Instead of `pixel_values`, what [`~EpmVGModel.get_image_features`] or an earlier call made of them.
            visual_mask (`torch.LongTensor` of shape `(B, grid_height, grid_width)`, *optional*):
                Comes with `visual_tokens`.

        Raises:
            ValueError: images or expressions are missing, given twice, or do not match.

        Returns:
            [`EpmVGModelOutput`]: or a tuple, with `return_dict=False`.

        Example:

        ```python
        >>> inputs = processor(images=[image, image], text=[["the star"], ["the circle", "the man"]])
        >>> inputs["image_index"]
        tensor([0, 1, 1])
        >>> outputs = model(**inputs)
        >>> outputs.visual_mask.shape, outputs.consistency_map.shape  # 2 images, 3 expressions
        (torch.Size([2, 8, 8]), torch.Size([3, 64]))
        ```
        """
        _check_either(pixel_values=pixel_values, visual_tokens=visual_tokens)
        _check_either(input_ids=input_ids, inputs_embeds=inputs_embeds)
        _check_visual(visual_tokens, visual_mask)
        images = pixel_values if visual_tokens is None else visual_tokens
        expressions = input_ids if inputs_embeds is None else inputs_embeds
        _check_pairing(images, expressions, image_index, self.config.max_text_length)
        # Recorded states are those of the fusion transformer; the towers before it must not record theirs.
        tower_kwargs = {name: value for name, value in kwargs.items() if not name.startswith("output_")}

        image_embeds = None
        if visual_tokens is None:
            image = self.get_image_features(pixel_values, pixel_mask, return_dict=True, **tower_kwargs)
            visual_tokens, visual_mask, image_embeds = image.last_hidden_state, image.visual_mask, image.pooler_output
        text = self.get_text_features(input_ids, attention_mask, inputs_embeds, return_dict=True, **tower_kwargs)
        text_tokens = self.text_projection(text.last_hidden_state)
        text_mask = _token_mask(text_tokens, attention_mask)

        own_visual, own_mask = visual_tokens, visual_mask.flatten(1).bool()
        if image_index is not None:
            own_visual, own_mask = own_visual[image_index], own_mask[image_index]
        count, length = text_tokens.shape[:2]
        reg = self.reg_token.expand(count, 1, -1)
        fused = self.fusion(
            torch.cat([reg, text_tokens, own_visual], dim=1),
            attention_mask=torch.cat([text_mask.new_ones(count, 1), text_mask, own_mask], dim=1),
            position_embeddings=self._fusion_positions(length, visual_mask.shape[1:]),
            return_dict=True,
            **kwargs,
        )
        reg_state, fused_visual = fused.last_hidden_state[:, 0], fused.last_hidden_state[:, 1 + length :]
        # What the two branches agree on before fusion is a short way for words to find what they name; then what
        # fusion adds to it.
        scale = self.config.d_model**-0.5
        similarity_map = torch.einsum("nd,nvd->nv", _masked_mean(text_tokens, text_mask), own_visual) * scale
        consistency_map = similarity_map + torch.einsum("nd,nvd->nv", reg_state, fused_visual) * scale

        return EpmVGModelOutput(
            reg_state=reg_state,
            consistency_map=consistency_map,
            similarity_map=similarity_map,
            visual_tokens=visual_tokens,
            visual_mask=visual_mask,
            text_tokens=text_tokens,
            image_embeds=image_embeds,
            text_embeds=text.pooler_output,
            last_hidden_state=fused.last_hidden_state,
            hidden_states=fused.hidden_states,
            attentions=fused.attentions,
        )

    def _encode_pixels(
        self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The backbone's maps as one `(B, C, grid_height, grid_width)` and the mask of its cells."""
        *lower, last = self.vision_model(pixel_values.to(self.dtype)).feature_maps
        grid = last.shape[-2:]
        feature_map = torch.cat([*(nn.functional.adaptive_avg_pool2d(level, grid) for level in lower), last], dim=1)
        stride = self.config.backbone_stride
        for cells, pixels in zip(grid, pixel_values.shape[-2:], strict=True):
            if cells not in (pixels // stride, -(-pixels // stride)):
                raise ValueError(
                    f"the backbone maps {pixels} pixels to {cells} cells, but config.backbone_stride is {stride}"
                )
        if pixel_mask is None:
            return feature_map, torch.ones(
                (pixel_values.shape[0], *grid), dtype=torch.bool, device=pixel_values.device
            )
        pixel_mask = pixel_mask[:, None].float()
        nearest = nn.functional.interpolate(pixel_mask, size=grid)[:, 0].bool()
        # DETR's nearest sampling can miss a picture thinner than the stride; then every cell it touches counts.
        touched = nn.functional.adaptive_max_pool2d(pixel_mask, grid)[:, 0].bool()
        return feature_map, nearest | (touched & ~nearest.any(dim=(1, 2), keepdim=True))

    def _fusion_positions(self, text_length: int, grid: tuple[int, int]) -> torch.Tensor:
        """Rows of the position table for `text_length` tokens and this grid, interpolated if it is another one."""
        first_visual = 1 + self.config.max_text_length
        before_visual, visual = self.fusion_positions[: 1 + text_length], self.fusion_positions[first_visual:]
        side = self.config.image_size // self.config.backbone_stride
        if tuple(grid) != (side, side):
            table = visual.view(1, side, side, -1).permute(0, 3, 1, 2)
            table = nn.functional.interpolate(table.float(), size=tuple(grid), mode="bicubic", align_corners=False)
            visual = table.to(visual.dtype).flatten(2)[0].T
        return torch.cat([before_visual, visual])[None]


class EpmVGForVisualGrounding(FromTowersMixin, EpmVGPreTrainedModel):
    """
    [`EpmVGModel`] with a box head: one box per expression, and the grounding loss when `labels` are given.

    Args:
        config ([`EpmVGConfig`]): the architecture; the weights are new. [`~EpmVGModel.from_vision_text_pretrained`]
            starts from pretrained towers.

    Example:

    ```python
    >>> from epmvg_hf import EpmVGForVisualGrounding

    >>> model = EpmVGForVisualGrounding.from_pretrained("outputs/demo")
    >>> outputs = model(**processor(images=image, text="the green triangle", boxes=[24, 59, 57, 88]))
    >>> sorted(outputs.loss_dict)
    ['loss_bbox', 'loss_giou', 'loss_map']
    ```
    """

    def __init__(self, config: EpmVGConfig):
        super().__init__(config)
        self.model = EpmVGModel(config)
        # TransVG's head reads [REG] alone; the map head also reads what the map points at.
        head_input = config.d_model if config.box_head == "reg" else 2 * config.d_model
        self.box_head = nn.Sequential(
            nn.Linear(head_input, config.d_model),
            nn.ReLU(),
            nn.Linear(config.d_model, config.d_model),
            nn.ReLU(),
            nn.Linear(config.d_model, 4),
        )
        if config.box_head == "map":
            # Of one entry, not none: FSDP cannot shard a scalar.
            self.log_map_sharpness = nn.Parameter(torch.empty(1))
        self.post_init()

    def get_image_features(self, *args: Any, **kwargs: Any) -> EpmVGImageFeatures:
        """
        [`EpmVGModel.get_image_features`]: the visual branch alone.

        Example:

        ```python
        >>> model.get_image_features(**processor(images=image)).last_hidden_state.shape  # (B, V, d_model)
        torch.Size([1, 64, 16])
        ```
        """
        return self.model.get_image_features(*args, **kwargs)

    def get_text_features(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        """
        [`EpmVGModel.get_text_features`]: the text tower alone.

        Example:

        ```python
        >>> model.get_text_features(**processor(text="the star")).last_hidden_state.shape  # (N, L, width)
        torch.Size([1, 4, 16])
        ```
        """
        return self.model.get_text_features(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor | None = None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        pixel_mask: torch.LongTensor | None = None,
        image_index: torch.LongTensor | None = None,
        original_sizes: torch.LongTensor | None = None,
        labels: torch.FloatTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        visual_tokens: torch.FloatTensor | None = None,
        visual_mask: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> EpmVGGroundingOutput:
        r"""
        Args:
            pixel_values, input_ids, attention_mask, pixel_mask, image_index, original_sizes, inputs_embeds,
            visual_tokens, visual_mask:
                See [`EpmVGModel.forward`].
            labels (`torch.FloatTensor` of shape `(N, 4)`, *optional*):
                True boxes, (cx, cy, w, h) in [0, 1] of the padded canvas, as the processor makes them from `boxes=`;
                rows of NaN, for expressions without a box, take no part in the loss.

        Returns:
            [`EpmVGGroundingOutput`]: or a tuple, with `return_dict=False`.

        Raises:
            ValueError: see [`EpmVGModel.forward`].
            ImportError: there are labels, whose loss needs torchvision, and it is not installed.

        Example:

        ```python
        >>> inputs = processor(images=image, text=["the man in blue", "the door"], return_tensors="pt")
        >>> outputs = model(**inputs)
        >>> outputs.pred_boxes.shape
        torch.Size([2, 4])
        >>> boxes = [result["box"] for result in processor.post_process_grounding(outputs, inputs)]
        ```
        """
        outputs = self.model(
            pixel_values=pixel_values,
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_mask=pixel_mask,
            image_index=image_index,
            inputs_embeds=inputs_embeds,
            visual_tokens=visual_tokens,
            visual_mask=visual_mask,
            return_dict=True,
            **kwargs,
        )
        own_mask = outputs.visual_mask.bool()
        if image_index is not None:
            own_mask = own_mask[image_index]
        if self.config.box_head == "reg":
            pred_boxes = self.box_head(outputs.reg_state).float().sigmoid()
        else:
            pred_boxes = self._boxes_from_map(outputs, own_mask)

        loss = loss_dict = None
        if labels is not None:
            loss_dict = box_loss(pred_boxes, labels)
            loss = (
                self.config.bbox_loss_coefficient * loss_dict["loss_bbox"]
                + self.config.giou_loss_coefficient * loss_dict["loss_giou"]
            )
            if self.config.box_head == "map":
                target = box_map_target(labels, own_mask)
                loss_dict["loss_map"] = map_loss(
                    outputs.consistency_map,
                    target,
                    own_mask.flatten(1),
                    row_mask=has_box(labels),
                )
                loss = loss + self.config.map_loss_coefficient * loss_dict["loss_map"]

        return EpmVGGroundingOutput(
            loss=loss,
            loss_dict=loss_dict,
            pred_boxes=pred_boxes,
            reg_state=outputs.reg_state,
            consistency_map=outputs.consistency_map,
            similarity_map=outputs.similarity_map,
            visual_mask=outputs.visual_mask,
            image_embeds=outputs.image_embeds,
            text_embeds=outputs.text_embeds,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _boxes_from_map(self, outputs: EpmVGModelOutput, visual_mask: torch.Tensor) -> torch.Tensor:
        """
        Centre: soft-argmax of the consistency map plus an offset of at most half the canvas; offset and size are
        regressed from `[REG]` and the visual tokens that the map points at.
        """
        grid_height, grid_width = visual_mask.shape[1:]
        # Two candidates that share the map would put the soft-argmax between them; sharper scores take a side.
        scores = outputs.consistency_map.float() * self.log_map_sharpness.float().exp()
        scores = scores.masked_fill(~visual_mask.flatten(1), torch.finfo(scores.dtype).min)
        weights = scores.softmax(dim=-1)

        x = (torch.arange(grid_width, device=scores.device) + 0.5) / grid_width
        y = (torch.arange(grid_height, device=scores.device) + 0.5) / grid_height
        per_cell = weights.view(-1, grid_height, grid_width)
        # Sums of products, not matrix products, which autocast would round to bfloat16: pixels of error.
        centre = torch.stack([(per_cell.sum(1) * x).sum(-1), (per_cell.sum(2) * y).sum(-1)], dim=-1)

        fused_visual = outputs.last_hidden_state[:, -visual_mask[0].numel() :]
        pointed_at = torch.einsum("nv,nvd->nd", weights.to(fused_visual.dtype), fused_visual)
        offset, size = self.box_head(torch.cat([outputs.reg_state, pointed_at], dim=-1)).float().split(2, dim=-1)
        return torch.cat([(centre + 0.5 * offset.tanh()).clamp(0, 1), size.sigmoid()], dim=-1)


def _supports_attention(backbone_config: PreTrainedConfig, name: str | None) -> bool:
    """Whether the backbone knows this attention implementation; convolutional ones have none, and only "eager"."""
    backbone = MODEL_FOR_BACKBONE_MAPPING[type(backbone_config)]
    if name == "sdpa":
        return backbone._supports_sdpa
    if name == "flex_attention":
        return backbone._supports_flex_attn
    return name in (None, "eager") or backbone._supports_flash_attn


def _masked_mean(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of `states` `(batch, length, width)` over the True positions of `mask` `(batch, length)`."""
    weights = mask.to(states.dtype)[..., None]
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1)


def _token_mask(states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """True on the tokens of `states` `(N, L, width)`; without an attention mask, that is everywhere."""
    if attention_mask is None:
        return torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
    return attention_mask.bool()


def _check_either(**inputs: torch.Tensor | None) -> None:
    given = [name for name, value in inputs.items() if value is not None]
    if len(given) != 1:
        raise ValueError(f"expected either {' or '.join(inputs)}, got {'both' if given else 'neither'}")


def _check_visual(visual_tokens: torch.Tensor | None, visual_mask: torch.Tensor | None) -> None:
    if (visual_tokens is None) != (visual_mask is None):
        raise ValueError("visual_tokens and visual_mask come together: the mask says which grid the tokens are")
    if visual_tokens is not None and visual_tokens.shape[:2] != visual_mask.flatten(1).shape:
        raise ValueError(
            f"visual_tokens have shape {tuple(visual_tokens.shape)} and visual_mask {tuple(visual_mask.shape)}, "
            "expected (B, grid_height * grid_width, d_model) and (B, grid_height, grid_width)"
        )


def _check_pairing(
    images: torch.Tensor, expressions: torch.Tensor, image_index: torch.Tensor | None, max_text_length: int
) -> None:
    num_images, (num_expressions, length) = images.shape[0], expressions.shape[:2]
    if length > max_text_length:
        raise ValueError(f"{length} tokens per expression, but config.max_text_length is {max_text_length}")
    if image_index is None and num_expressions != num_images:
        raise ValueError(
            f"{num_expressions} expressions for {num_images} images: pass image_index, which says the image of each"
        )
    if image_index is not None and image_index.shape != (num_expressions,):
        raise ValueError(
            f"image_index has shape {tuple(image_index.shape)}, expected ({num_expressions},): one per expression"
        )


__all__ = ["EpmVGForVisualGrounding", "EpmVGModel", "EpmVGPreTrainedModel"]
