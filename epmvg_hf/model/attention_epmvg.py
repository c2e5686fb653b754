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
"""Attention in DETR's manner: positions are added to queries and keys, but not to values."""

from collections.abc import Callable

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .configuration_epmvg import EpmVGConfig


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
    Attention in plain PyTorch, the implementation `"eager"`: the attended values `(batch, length, heads, head_dim)`
    and the attention weights `(batch, heads, length, length)`.
    """
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class EpmVGAttention(nn.Module):
    """Attention with `num_attention_heads` heads, which the two classes below use for self- and cross-attention."""

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

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The attended states `(batch, length, d_model)` of projected states, and the weights where they are known."""
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attended, weights = attention_interface(
            self,
            self._split_heads(query),
            self._split_heads(key),
            self._split_heads(value),
            attention_mask,
            dropout=self.config.dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(attended.reshape(query.shape)), weights

    def _split_heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.view(*states.shape[:2], -1, self.head_dim).transpose(1, 2)


class EpmVGSelfAttention(EpmVGAttention):
    """Attention of `hidden_states` `(batch, length, d_model)` to themselves."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_embeddings: torch.Tensor,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        positioned = hidden_states + position_embeddings
        return self._attend(
            self.q_proj(positioned), self.k_proj(positioned), self.v_proj(hidden_states), attention_mask, **kwargs
        )


class EpmVGCrossAttention(EpmVGAttention):
    """
    Attention of N expressions, `hidden_states` `(N, length, d_model)`, to the visual tokens of B pictures. The keys
    and values of a picture are computed once, however many expressions are about it.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_embeddings: torch.Tensor,
        visual_tokens: torch.Tensor,
        positioned_visual_tokens: torch.Tensor,
        image_index: torch.Tensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        key, value = self.k_proj(positioned_visual_tokens), self.v_proj(visual_tokens)
        return self._attend(
            self.q_proj(hidden_states + position_embeddings),
            for_each_expression(key, image_index),
            for_each_expression(value, image_index),
            attention_mask,
            **kwargs,
        )


def for_each_expression(image_states: torch.Tensor, image_index: torch.Tensor | None) -> torch.Tensor:
    """
    States of N expressions' images, `(N, ...)`, from those of B images, `(B, ...)`.

    Args:
        image_states (`torch.Tensor` of shape `(B, ...)`): one entry for each image.
        image_index (`torch.LongTensor` of shape `(N,)`, *optional*): the number of the image of each expression;
            without it the expressions belong to the images in order.

    Returns:
        `torch.Tensor`: if there is only one image, a view that takes no memory.
    """
    if image_index is None:
        return image_states
    if image_states.shape[0] == 1:
        return image_states.expand(image_index.shape[0], *image_states.shape[1:])
    return image_states.index_select(0, image_index)
