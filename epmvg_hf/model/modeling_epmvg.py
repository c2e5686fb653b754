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
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from transformers import AutoModel
from transformers import initialization as init
from transformers.backbone_utils import load_backbone
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithCrossAttentions,
    BaseModelOutputWithPooling,
)
from transformers.models.detr.modeling_detr import DetrSinePositionEmbedding
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import maybe_autocast

from .attention_epmvg import for_each_expression
from .base_epmvg import EpmVGPreTrainedModel, supports_attention
from .box_refinement_epmvg import EpmVGBoxRefinement
from .configuration_epmvg import EpmVGConfig
from .decoder_epmvg import EpmVGDecoder
from .encoder_epmvg import EpmVGEncoder, EpmVGVisualEncoder
from .feature_grid import cells_on_picture, choose_grid, only_on_picture, resize_map
from .losses import grounding_loss
from .model_inputs import check_pairing, check_visual, the_one
from .outputs_epmvg import EpmVGGroundingOutput, EpmVGImageFeatures, EpmVGModelOutput
from .patch_backbone import without_pooling
from .pretrained_towers import FromTowersMixin


class EpmVGModel(FromTowersMixin, EpmVGPreTrainedModel):
    """
    The grounding student without its box head, built like TransVG: a vision backbone with a DETR encoder, a text
    tower, and a fusion transformer over `[REG]`, text tokens and visual tokens. The visual branch runs once per image,
    however many expressions the image has. With `config.fusion_type="decoder"`, only `[REG]` and text tokens go
    through the fusion transformer, which reads the visual tokens.

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
        if not supports_attention(config.backbone_config, config.backbone_config._attn_implementation):
            config.backbone_config._attn_implementation = None
        self.vision_model = load_backbone(config)
        self._has_depthwise = any(isinstance(m, nn.Conv2d) and m.groups > 1 for m in self.vision_model.modules())
        channels = sum(self.vision_model.channels)
        self.input_projection = nn.Conv2d(channels, config.d_model, kernel_size=1)
        self.sine_positions = DetrSinePositionEmbedding(config.d_model // 2, normalize=True)
        self.encoder = EpmVGVisualEncoder(
            config, config.encoder_layers, config.encoder_attention_heads, config.encoder_ffn_dim
        )
        self.visual_projection = nn.Linear(config.d_model, config.d_model)

        self.text_model = AutoModel.from_config(config.text_config, **without_pooling(config.text_config))
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.d_model)
        if config.projection_norm:
            self.input_projection_norm = nn.LayerNorm(config.d_model)
            self.text_projection_norm = nn.LayerNorm(config.d_model)

        grid = config.image_size // config.backbone_stride
        self.reg_token = nn.Parameter(torch.empty(config.d_model))
        # The table has a row for [REG], for each of max_text_length tokens, and for each cell of the grid. Those of
        # the grid come after those of the longest text, so that they do not shift with the length of a batch's texts.
        self.fusion_positions = nn.Parameter(torch.empty(1 + config.max_text_length + grid * grid, config.d_model))
        fusion = EpmVGEncoder if config.fusion_type == "encoder" else EpmVGDecoder
        self.fusion = fusion(config, config.fusion_layers, config.fusion_attention_heads, config.fusion_ffn_dim)

        if config.teacher_projection_dim is not None:
            width = config.teacher_projection_dim
            self.teacher_image_projection = nn.Linear(config.d_model, width, bias=False)
            self.teacher_text_projection = nn.Linear(config.d_model, width, bias=False)

        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is not self:
            return
        init.normal_(self.reg_token)
        # TransVG draws the whole table from N(0, 1), which is noise as large as the tokens themselves. Here the rows
        # of [REG] and text start small, and those of the grid as the sine positions that the visual encoder uses.
        init.normal_(self.fusion_positions, std=0.1)
        side = self.config.image_size // self.config.backbone_stride
        grid = torch.ones(1, side, side, dtype=torch.bool, device=self.fusion_positions.device)
        sine = self.sine_positions((1, 1, side, side), grid.device, torch.float32, grid).flatten(2)[0].T
        rows = torch.cat([self.fusion_positions[: 1 + self.config.max_text_length], sine.to(self.dtype)])
        init.copy_(self.fusion_positions, rows)

    def train(self, mode: bool = True) -> "EpmVGModel":
        """
        Sets the mode as in PyTorch, except for the backbone's batch norms: with `config.frozen_batch_norm` they are
        not trained and stay in evaluation mode, and except for a tower of which nothing is trained: all of it stays
        in evaluation mode, so that it is a fixed function, whose outputs can be computed once.
        """
        super().train(mode)
        for norm in self.vision_model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                # This cannot be done in __init__, because from_pretrained replaces the parameters afterwards. It ends
                # with a call of eval(), which calls this method.
                if self.config.frozen_batch_norm:
                    norm.requires_grad_(False)
                if not norm.weight.requires_grad:
                    norm.eval()
        for tower in (self.vision_model, self.text_model):
            if not any(parameter.requires_grad for parameter in tower.parameters()):
                tower.eval()
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.FloatTensor | None = None,
        pixel_mask: torch.LongTensor | None = None,
        original_sizes: torch.LongTensor | None = None,
        letterbox: torch.LongTensor | None = None,
        backbone_features: torch.FloatTensor | None = None,
        visual_mask: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> EpmVGImageFeatures:
        r"""
        Runs the visual branch alone. Its tokens can be kept and given to the model again with every new expression.

        Args:
            pixel_values, pixel_mask, original_sizes, letterbox, backbone_features, visual_mask:
                See [`EpmVGModel.forward`].

        Returns:
            [`EpmVGImageFeatures`]: or a tuple, with `return_dict=False`.

        Raises:
            ValueError: no map of the backbone has cells of `config.backbone_stride` pixels.

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
        the_one(pixel_values=pixel_values, backbone_features=backbone_features)
        if backbone_features is None:
            feature_map, mask = self.encode_pixels(pixel_values, pixel_mask)
        else:
            feature_map, mask = backbone_features.to(self.dtype), visual_mask.bool()
        projected = self.input_projection(feature_map)
        # Sine positions are made of cumulative sums over the grid, which lower precisions round too much.
        positions = self.sine_positions(projected.shape, projected.device, torch.float32, mask)
        tokens = projected.flatten(2).transpose(1, 2)
        if self.config.projection_norm:
            tokens = self.input_projection_norm(tokens)
        encoded = self.encoder(
            tokens,
            attention_mask=mask.flatten(1),
            position_embeddings=positions.flatten(2).transpose(1, 2).to(projected.dtype),
            return_dict=True,
            **kwargs,
        )
        visual_tokens = self.visual_projection(encoded.last_hidden_state)
        return EpmVGImageFeatures(
            last_hidden_state=visual_tokens,
            pooler_output=self._image_embeds(visual_tokens, mask),
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
            visual_mask=mask.long(),
        )

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        text_hidden_states: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        r"""
        Runs the text tower alone.

        Args:
            input_ids, attention_mask, inputs_embeds, text_hidden_states:
                See [`EpmVGModel.forward`].

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutputWithPooling`]: the tower's states. The model projects
            `last_hidden_state` `(N, L, text_config.hidden_size)` to its `text_tokens`. If the config has a
            `teacher_projection_dim`, `pooler_output` `(N, teacher_projection_dim)` are the model's `text_embeds`.

        Example:

        ```python
        >>> model.get_text_features(**processor(text=["the star", "a dog"])).last_hidden_state.shape
        torch.Size([2, 4, 16])
        ```
        """
        states = self._run_text_tower(input_ids, attention_mask, inputs_embeds, text_hidden_states, **kwargs)
        text_embeds = None
        if self.config.teacher_projection_dim is not None:
            text_tokens = self._project_text(states.last_hidden_state)
            text_embeds = self._text_embeds(text_tokens, _token_mask(text_tokens, attention_mask))
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
        letterbox: torch.LongTensor | None = None,
        backbone_features: torch.FloatTensor | None = None,
        text_hidden_states: torch.FloatTensor | None = None,
        skip_fusion: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> EpmVGModelOutput:
        r"""
        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, 3, height, width)`, *optional*):
                Normalised images on their canvases; not together with `backbone_features` or `visual_tokens`.
            input_ids (`torch.LongTensor` of shape `(N, L)`, *optional*):
                Tokens of N expressions, at most `config.max_text_length` each; not together with `inputs_embeds` or
                `text_hidden_states`.
            attention_mask (`torch.LongTensor` of shape `(N, L)`, *optional*):
                1 on tokens, 0 on padding; without it nothing is padding.
            pixel_mask (`torch.LongTensor` of shape `(B, height, width)`, *optional*):
                1 on the picture, 0 on padding; without it the picture fills the canvas.
            image_index (`torch.LongTensor` of shape `(N,)`, *optional*):
                The number of the image that each expression is about. Without it the expressions belong to the images
                in order, one each.
            original_sizes (`torch.LongTensor` of shape `(B, 2)`, *optional*):
                Not used. Like `letterbox`, it is accepted so that `model(**inputs)` works with what the processor
                returned, where [`~EpmVGProcessor.post_process_grounding`] finds it.
            letterbox (`torch.LongTensor` of shape `(B, 4)`, *optional*):
                Not used, see `original_sizes`.
            inputs_embeds (`torch.FloatTensor` of shape `(N, L, text_config.hidden_size)`, *optional*):
                Token embeddings instead of `input_ids`, if the text tower accepts them.
            visual_tokens (`torch.FloatTensor` of shape `(B, V, d_model)`, *optional*):
                Visual tokens instead of `pixel_values`, from [`~EpmVGModel.get_image_features`] or an earlier call.
            visual_mask (`torch.LongTensor` of shape `(B, grid_height, grid_width)`, *optional*):
                The mask that was returned with `visual_tokens` or `backbone_features` and is given together with them.
            backbone_features (`torch.FloatTensor` of shape `(B, C, grid_height, grid_width)`, *optional*):
                What [`~EpmVGModel.encode_pixels`] returned, instead of `pixel_values`: where the vision backbone is
                not trained, it need not run again. Given together with `visual_mask`.
            text_hidden_states (`torch.FloatTensor` of shape `(N, L, text_config.hidden_size)`, *optional*):
                What [`~EpmVGModel.get_text_features`] returned as `last_hidden_state`, instead of `input_ids`; their
                `attention_mask` is given as well.
            skip_fusion (`bool`, *optional*, defaults to `False`):
                Whether to stop before fusion, with the outputs that a teacher teaches: `similarity_map`,
                `image_embeds`, `text_embeds` and the tokens. All others are then `None`.

        Raises:
            ValueError: images or expressions are missing or given in two ways, or their numbers do not match.

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
        images = the_one(pixel_values=pixel_values, backbone_features=backbone_features, visual_tokens=visual_tokens)
        expressions = the_one(input_ids=input_ids, inputs_embeds=inputs_embeds, text_hidden_states=text_hidden_states)
        check_visual(backbone_features, visual_tokens, visual_mask)
        check_pairing(images, expressions, image_index, self.config.max_text_length)
        # `output_attentions` and `output_hidden_states` ask for the states of the fusion transformer, not of the
        # towers.
        tower_kwargs = {name: value for name, value in kwargs.items() if not name.startswith("output_")}

        if visual_tokens is None:
            image = self.get_image_features(
                pixel_values,
                pixel_mask,
                backbone_features=backbone_features,
                visual_mask=visual_mask,
                return_dict=True,
                **tower_kwargs,
            )
            visual_tokens, visual_mask, image_embeds = image.last_hidden_state, image.visual_mask, image.pooler_output
        else:
            image_embeds = self._image_embeds(visual_tokens, visual_mask.bool())
        states = self._run_text_tower(input_ids, attention_mask, inputs_embeds, text_hidden_states, **tower_kwargs)
        text_tokens = self._project_text(states.last_hidden_state)
        text_mask = _token_mask(text_tokens, attention_mask)
        # This map gives words a direct way to what they name, since its gradient does not pass through the fusion
        # transformer. The second term of the consistency map is what fusion adds.
        similarity_map = _similarity(
            _masked_mean(text_tokens, text_mask), for_each_expression(visual_tokens, image_index)
        )
        before_fusion = {
            "similarity_map": similarity_map,
            "visual_tokens": visual_tokens,
            "visual_mask": visual_mask,
            "text_tokens": text_tokens,
            "image_embeds": image_embeds,
            "text_embeds": self._text_embeds(text_tokens, text_mask),
        }
        if skip_fusion:
            return EpmVGModelOutput(**before_fusion)

        fused, map_tokens = self._fuse(text_tokens, text_mask, visual_tokens, visual_mask, image_index, **kwargs)
        reg_state = fused.last_hidden_state[:, 0]
        return EpmVGModelOutput(
            **before_fusion,
            reg_state=reg_state,
            consistency_map=similarity_map + _similarity(reg_state, map_tokens),
            map_tokens=map_tokens,
            last_hidden_state=fused.last_hidden_state,
            hidden_states=fused.hidden_states,
            attentions=fused.attentions,
            cross_attentions=fused.cross_attentions,
        )

    def _run_text_tower(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        text_hidden_states: torch.Tensor | None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        if text_hidden_states is not None:
            return BaseModelOutput(last_hidden_state=text_hidden_states.to(self.dtype))
        # Some text towers have no argument `inputs_embeds`, so it is only passed if it is given.
        tokens = {"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
        return self.text_model(**tokens, attention_mask=attention_mask, return_dict=True, **kwargs)

    def _project_text(self, states: torch.Tensor) -> torch.Tensor:
        tokens = self.text_projection(states)
        return self.text_projection_norm(tokens) if self.config.projection_norm else tokens

    # Both embeddings are made of the tokens that enter fusion, not of what the towers gave, so that what a teacher
    # teaches them also reaches the projections, which are all there is to teach where the towers are frozen.

    def _image_embeds(self, visual_tokens: torch.Tensor, visual_mask: torch.Tensor) -> torch.Tensor | None:
        if self.config.teacher_projection_dim is None:
            return None
        pooled = _masked_mean(visual_tokens, visual_mask.flatten(1))
        return nn.functional.normalize(self.teacher_image_projection(pooled), dim=-1)

    def _text_embeds(self, text_tokens: torch.Tensor, text_mask: torch.Tensor) -> torch.Tensor | None:
        if self.config.teacher_projection_dim is None:
            return None
        return nn.functional.normalize(self.teacher_text_projection(_masked_mean(text_tokens, text_mask)), dim=-1)

    def _fuse(
        self,
        text_tokens: torch.Tensor,
        text_mask: torch.Tensor,
        visual_tokens: torch.Tensor,
        visual_mask: torch.Tensor,
        image_index: torch.Tensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[BaseModelOutputWithCrossAttentions, torch.Tensor]:
        """The outputs of the fusion transformer, and `map_tokens` of [`EpmVGModelOutput`]."""
        count, length = text_tokens.shape[:2]
        expressions = torch.cat([self.reg_token.expand(count, 1, -1), text_tokens], dim=1)
        expression_mask = torch.cat([text_mask.new_ones(count, 1), text_mask], dim=1)
        positions = self._fusion_positions(length, visual_mask.shape[1:])
        visual_mask = visual_mask.flatten(1).bool()
        if self.config.fusion_type == "encoder":
            paired_tokens = for_each_expression(visual_tokens, image_index)
            paired_mask = for_each_expression(visual_mask, image_index)
            fused = self.fusion(
                torch.cat([expressions, paired_tokens], dim=1),
                attention_mask=torch.cat([expression_mask, paired_mask], dim=1),
                position_embeddings=positions,
                return_dict=True,
                **kwargs,
            )
            return fused, fused.last_hidden_state[:, 1 + length :]
        positions, visual_positions = positions.split([1 + length, visual_tokens.shape[1]], dim=1)
        fused = self.fusion(
            expressions,
            attention_mask=expression_mask,
            position_embeddings=positions,
            visual_tokens=visual_tokens,
            visual_mask=visual_mask,
            visual_position_embeddings=visual_positions,
            image_index=image_index,
            return_dict=True,
            **kwargs,
        )
        # Attention adds positions to keys only, so visual tokens hardly know where they are. With the positions, the
        # state of [REG] can point to the leftmost of two dogs.
        return fused, for_each_expression(visual_tokens + visual_positions, image_index)

    def encode_pixels(
        self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        r"""
        Runs the vision backbone alone, as far as its outputs depend on no other part of the model.

        Args:
            pixel_values, pixel_mask:
                See [`EpmVGModel.forward`].

        Returns:
            `tuple`: the backbone's maps, brought to the grid of `config.backbone_stride` and joined to
            `(B, C, grid_height, grid_width)`, and a mask `(B, grid_height, grid_width)` that is True on the picture:
            `backbone_features` and `visual_mask` of [`EpmVGModel.forward`].

        Raises:
            ValueError: no map of the backbone has cells of `config.backbone_stride` pixels.

        Example:

        ```python
        >>> inputs = processor(images=image, text="the star")
        >>> features, mask = model.model.encode_pixels(inputs["pixel_values"], inputs["pixel_mask"])
        >>> features.shape
        torch.Size([1, 16, 8, 8])
        >>> tokens = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        >>> model(backbone_features=features, visual_mask=mask, **tokens).pred_boxes.shape
        torch.Size([1, 4])
        ```
        """
        # On a CPU, convolutions are faster on pixels whose channels stand last in memory.
        pixels = pixel_values.to(self.dtype, memory_format=torch.channels_last)
        # On a CPU, depthwise convolutions learn faster in float32 than in bfloat16. This context is for CPUs alone.
        in_float32 = self._has_depthwise and torch.is_grad_enabled()
        in_float32 = in_float32 and any(weight.requires_grad for weight in self.vision_model.parameters())
        with maybe_autocast("cpu", enabled=False) if in_float32 else nullcontext():
            maps = self.vision_model(pixels).feature_maps
        grid = choose_grid(
            [tuple(level.shape[-2:]) for level in maps], tuple(pixel_values.shape[-2:]), self.config.backbone_stride
        )
        feature_map = torch.cat([resize_map(level, grid) for level in maps], dim=1)
        if pixel_mask is None:
            pixel_mask = torch.ones_like(pixel_values[:, 0])
        return feature_map, cells_on_picture(pixel_mask, grid)

    def _fusion_positions(self, text_length: int, grid: tuple[int, int]) -> torch.Tensor:
        """
        The rows of the position table for `text_length` tokens and for this grid. If it is not the grid of
        `config.image_size`, its rows are interpolated.
        """
        first_visual = 1 + self.config.max_text_length
        before_visual, visual = self.fusion_positions[: 1 + text_length], self.fusion_positions[first_visual:]
        side = self.config.image_size // self.config.backbone_stride
        if tuple(grid) != (side, side):
            table = visual.view(1, side, side, -1).permute(0, 3, 1, 2)
            table = nn.functional.interpolate(table.float(), size=tuple(grid), mode="bicubic", align_corners=False)
            visual = table.to(visual.dtype).flatten(2)[0].T
        return torch.cat([before_visual, visual])[None]


# The entries of a batch that `EpmVGForVisualGrounding` reads. The other entries are for post-processing, metrics or a
# teacher.
MODEL_INPUTS = (
    "pixel_values",
    "pixel_mask",
    "input_ids",
    "attention_mask",
    "image_index",
    "labels",
    "backbone_features",
    "visual_mask",
    "text_hidden_states",
)


class EpmVGForVisualGrounding(FromTowersMixin, EpmVGPreTrainedModel):
    """
    [`EpmVGModel`] with a box head: it returns one box per expression and, if `labels` are given, the grounding loss.

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
        # TransVG's head reads only the state of [REG]. The map head also reads the visual tokens that the map points
        # to.
        head_input = config.d_model if config.box_head == "reg" else 2 * config.d_model
        self.box_head = nn.Sequential(
            nn.Linear(head_input, config.d_model),
            nn.ReLU(),
            nn.Linear(config.d_model, config.d_model),
            nn.ReLU(),
            nn.Linear(config.d_model, 4),
        )
        if config.box_refinement:
            self.box_refinement = EpmVGBoxRefinement(config)
        if config.score_head:
            # Beside what the box head reads, it sees the box itself and the highest value of the map.
            self.score_head = nn.Sequential(
                nn.Linear(head_input + 5, config.d_model), nn.ReLU(), nn.Linear(config.d_model, 1)
            )
        if config.box_head == "map":
            # It has one entry instead of being a scalar because FSDP cannot shard scalars.
            self.log_map_sharpness = nn.Parameter(torch.empty(1))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self and self.config.box_head == "map":
            init.constant_(self.log_map_sharpness, math.log(2))
            # All offsets are 0 at first, so that training starts from the soft-argmax itself.
            init.zeros_(self.box_head[-1].weight)
        # A model that is loaded and has all other weights is not initialised itself, only this layer of it is.
        if self.config.box_refinement and module is self.box_refinement.correction:
            init.zeros_(module.weight)

    def get_image_features(self, *args: Any, **kwargs: Any) -> EpmVGImageFeatures:
        """
        Runs the visual branch alone, see [`EpmVGModel.get_image_features`].

        Example:

        ```python
        >>> model.get_image_features(**processor(images=image)).last_hidden_state.shape  # (B, V, d_model)
        torch.Size([1, 64, 16])
        ```
        """
        return self.model.get_image_features(*args, **kwargs)

    def get_text_features(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        """
        Runs the text tower alone, see [`EpmVGModel.get_text_features`].

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
        letterbox: torch.LongTensor | None = None,
        backbone_features: torch.FloatTensor | None = None,
        text_hidden_states: torch.FloatTensor | None = None,
        skip_fusion: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> EpmVGGroundingOutput:
        r"""
        Args:
            pixel_values, input_ids, attention_mask, pixel_mask, image_index, original_sizes, letterbox, inputs_embeds,
            visual_tokens, visual_mask, backbone_features, text_hidden_states, skip_fusion:
                See [`EpmVGModel.forward`]. Without fusion there are neither boxes nor a loss.
            labels (`torch.FloatTensor` of shape `(N, 4)`, *optional*):
                True boxes, (cx, cy, w, h) in [0, 1] of the padded canvas, which the processor makes of its `boxes`. A
                row of NaN stands for an expression without a box and takes no part in the loss; a row of zeros stands
                for one that names nothing in its image, from which only the scores learn.

        Returns:
            [`EpmVGGroundingOutput`]: or a tuple, with `return_dict=False`.

        Raises:
            ValueError: see [`EpmVGModel.forward`].

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
            backbone_features=backbone_features,
            text_hidden_states=text_hidden_states,
            skip_fusion=skip_fusion,
            return_dict=True,
            **kwargs,
        )
        if skip_fusion:
            return EpmVGGroundingOutput(
                similarity_map=outputs.similarity_map,
                visual_mask=outputs.visual_mask,
                image_embeds=outputs.image_embeds,
                text_embeds=outputs.text_embeds,
            )
        paired_mask = for_each_expression(outputs.visual_mask.bool(), image_index)
        if self.config.box_head == "reg":
            head_states = outputs.reg_state
            pred_boxes = self.box_head(head_states).float().sigmoid()
        else:
            pred_boxes, head_states = self._boxes_from_map(outputs, paired_mask)
        if self.config.box_refinement:
            pred_boxes = self.box_refinement(
                pred_boxes, outputs.map_tokens, outputs.reg_state, outputs.consistency_map, paired_mask
            )
        score_logits = None
        if self.config.score_head:
            score_logits = self._score(pred_boxes, head_states, outputs.consistency_map, paired_mask)

        loss = loss_dict = None
        if labels is not None:
            loss, loss_dict = grounding_loss(
                self.config, pred_boxes, labels, outputs.consistency_map, paired_mask, score_logits
            )

        return EpmVGGroundingOutput(
            loss=loss,
            loss_dict=loss_dict,
            pred_boxes=pred_boxes,
            scores=None if score_logits is None else score_logits.sigmoid(),
            reg_state=outputs.reg_state,
            consistency_map=outputs.consistency_map,
            similarity_map=outputs.similarity_map,
            visual_mask=outputs.visual_mask,
            image_embeds=outputs.image_embeds,
            text_embeds=outputs.text_embeds,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
        )

    def _boxes_from_map(
        self, outputs: EpmVGModelOutput, visual_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The boxes of the map head, and the states `(N, 2 * d_model)` that it reads. The centre of a box is the
        soft-argmax of the consistency map plus an offset of at most half the canvas; offset and size are regressed
        from `[REG]` and the visual tokens that the map points to.
        """
        grid_height, grid_width = visual_mask.shape[1:]
        # If two candidates shared the map, the soft-argmax would lie between them. Sharper scores choose one of them.
        scores = outputs.consistency_map.float() * self.log_map_sharpness.float().exp()
        weights = only_on_picture(scores, visual_mask.flatten(1)).softmax(dim=-1)

        x = (torch.arange(grid_width, device=scores.device) + 0.5) / grid_width
        y = (torch.arange(grid_height, device=scores.device) + 0.5) / grid_height
        per_cell = weights.view(-1, grid_height, grid_width)
        # Under autocast these sums stay in float32. Matrix products would be in bfloat16, an error of some pixels.
        centre = torch.stack([(per_cell.sum(1) * x).sum(-1), (per_cell.sum(2) * y).sum(-1)], dim=-1)

        attended = torch.einsum("nv,nvd->nd", weights.to(outputs.map_tokens.dtype), outputs.map_tokens)
        head_states = torch.cat([outputs.reg_state, attended], dim=-1)
        offset, size = self.box_head(head_states).float().split(2, dim=-1)
        return torch.cat([(centre + 0.5 * offset.tanh()).clamp(0, 1), size.sigmoid()], dim=-1), head_states

    def _score(
        self,
        pred_boxes: torch.Tensor,
        head_states: torch.Tensor,
        consistency_map: torch.Tensor,
        visual_mask: torch.Tensor,
    ) -> torch.Tensor:
        """The scores of the boxes before the sigmoid, float32 of shape `(N,)`."""
        peak = only_on_picture(consistency_map, visual_mask.flatten(1)).amax(-1, keepdim=True)
        # Boxes are to be good, not easy to judge, so the scores give them no gradient.
        evidence = torch.cat([pred_boxes.detach(), peak], dim=-1).to(head_states.dtype)
        return self.score_head(torch.cat([head_states, evidence], dim=-1)).float().squeeze(-1)


def _similarity(state: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """
    Scaled products `(N, V)` of a state `(N, d_model)` with tokens `(N, V, d_model)`, always in float32: a map in
    bfloat16 would move the centres of boxes.
    """
    with maybe_autocast(state.device.type, enabled=False):
        return torch.einsum("nd,nvd->nv", state.float(), tokens.float()) * state.shape[-1] ** -0.5


def _masked_mean(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of `states` `(batch, length, width)` over the True positions of `mask` `(batch, length)`."""
    weights = mask.to(states.dtype)[..., None]
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1)


def _token_mask(states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """A mask `(N, L)` that is False on the padding of `states` `(N, L, width)`; without `attention_mask` all True."""
    if attention_mask is None:
        return torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
    return attention_mask.bool()


__all__ = ["EpmVGForVisualGrounding", "EpmVGModel", "EpmVGPreTrainedModel"]
