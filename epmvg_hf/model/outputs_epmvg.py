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
"""The outputs of the models."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput


@dataclass
class EpmVGModelOutput(ModelOutput):
    """
    Outputs of [`EpmVGModel`] for B images, N expressions of L tokens, and V visual tokens per image.

    Args:
        reg_state (`torch.FloatTensor` of shape `(N, d_model)`):
            Last state of the `[REG]` token of each expression.
        consistency_map (`torch.FloatTensor` of shape `(N, V)`):
            How well every visual token fits the expression, as logits, row-major over the feature grid. Scores on
            padding mean nothing: mask them with `visual_mask`.
        similarity_map (`torch.FloatTensor` of shape `(N, V)`):
            The part of `consistency_map` that is known before fusion: the similarity of the expression's mean text
            token with every visual token. A teacher's patch-text map is distilled into it.
        visual_tokens (`torch.FloatTensor` of shape `(B, V, d_model)`):
            Visual tokens before fusion.
        visual_mask (`torch.LongTensor` of shape `(B, grid_height, grid_width)`):
            1 where a visual token lies on the picture, 0 on padding. V is `grid_height * grid_width`.
        text_tokens (`torch.FloatTensor` of shape `(N, L, d_model)`):
            Text tokens before fusion.
        image_embeds (`torch.FloatTensor` of shape `(B, teacher_projection_dim)`, *optional*):
            Mean of the visual tokens, projected into the teacher's space and normalised.
        text_embeds (`torch.FloatTensor` of shape `(N, teacher_projection_dim)`, *optional*):
            Mean of the text tokens, projected into the teacher's space and normalised.
        map_tokens (`torch.FloatTensor` of shape `(N, V, d_model)`):
            Visual tokens of each expression's image, with which `reg_state` is compared to make the consistency map:
            the fused ones, or those before fusion with their positions if `config.fusion_type` is `"decoder"`.
        last_hidden_state (`torch.FloatTensor` of shape `(N, 1 + L + V, d_model)`):
            Fused states of `[REG] . text . visual`; `(N, 1 + L, d_model)` of `[REG] . text` for a decoder.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*):
            States of the fusion transformer, its input first.
        attentions (`tuple(torch.FloatTensor)`, *optional*):
            Weights `(N, heads, length, length)` of the fusion transformer's self-attention over as many states as
            `last_hidden_state` has; empty unless the attention implementation is `"eager"`.
        cross_attentions (`tuple(torch.FloatTensor)`, *optional*):
            Weights `(N, heads, 1 + L, V)` of a decoder's attention to the visual tokens, likewise; `None` for an
            encoder.
    """

    reg_state: torch.FloatTensor | None = None
    consistency_map: torch.FloatTensor | None = None
    similarity_map: torch.FloatTensor | None = None
    visual_tokens: torch.FloatTensor | None = None
    visual_mask: torch.LongTensor | None = None
    text_tokens: torch.FloatTensor | None = None
    map_tokens: torch.FloatTensor | None = None
    image_embeds: torch.FloatTensor | None = None
    text_embeds: torch.FloatTensor | None = None
    last_hidden_state: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    cross_attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class EpmVGImageFeatures(BaseModelOutputWithPooling):
    """
    Outputs of [`EpmVGModel.get_image_features`] for B images with V visual tokens each.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(B, V, d_model)`):
            Visual tokens before fusion, row-major over the feature grid: `visual_tokens` of [`EpmVGModelOutput`].
        pooler_output (`torch.FloatTensor` of shape `(B, teacher_projection_dim)`, *optional*):
            Normalised image embedding in the teacher's space: `image_embeds` of [`EpmVGModelOutput`].
        hidden_states (`tuple(torch.FloatTensor)`, *optional*):
            States of the visual encoder, its input first.
        attentions (`tuple(torch.FloatTensor)`, *optional*):
            Attention weights `(B, heads, V, V)` of the visual encoder; empty unless the attention implementation is
            `"eager"`.
        visual_mask (`torch.LongTensor` of shape `(B, grid_height, grid_width)`):
            1 where a visual token lies on the picture, 0 on padding.
    """

    visual_mask: torch.LongTensor | None = None


@dataclass
class EpmVGGroundingOutput(ModelOutput):
    """
    Outputs of [`EpmVGForVisualGrounding`] for B images and N expressions.

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*):
            Weighted sum of `loss_dict`, a mean over the expressions with a box; only with `labels`.
        loss_dict (`dict[str, torch.FloatTensor]`, *optional*):
            The unweighted terms of the loss: `loss_bbox`, `loss_giou`, with `box_head="map"` `loss_map`, and with
            `score_head` `loss_score`.
        pred_boxes (`torch.FloatTensor` of shape `(N, 4)`):
            (cx, cy, w, h) in [0, 1] of the padded canvas. [`~EpmVGProcessor.post_process_grounding`] turns them into
            pixels of the original image.
        scores (`torch.FloatTensor` of shape `(N,)`, *optional*):
            How good the boxes are, in [0, 1]: near 0 if what the expression names is not in the image. `None` for a
            model without `config.score_head`.
        reg_state, consistency_map, similarity_map, visual_mask, image_embeds, text_embeds, hidden_states, attentions,
        cross_attentions:
            See [`EpmVGModelOutput`].
    """

    loss: torch.FloatTensor | None = None
    loss_dict: dict[str, torch.FloatTensor] | None = None
    pred_boxes: torch.FloatTensor | None = None
    scores: torch.FloatTensor | None = None
    reg_state: torch.FloatTensor | None = None
    consistency_map: torch.FloatTensor | None = None
    similarity_map: torch.FloatTensor | None = None
    visual_mask: torch.LongTensor | None = None
    image_embeds: torch.FloatTensor | None = None
    text_embeds: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    cross_attentions: tuple[torch.FloatTensor, ...] | None = None
