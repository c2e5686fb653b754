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
"""The transformer encoder that serves as visual encoder and as fusion transformer."""

from collections.abc import Callable

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .base_epmvg import EpmVGPreTrainedModel
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
    """DETR's self-attention: position embeddings are added to queries and keys, but not to values."""

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
    """DETR's transformer encoder layer, which normalises after each residual connection."""

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


class EpmVGEncoder(EpmVGPreTrainedModel):
    """A stack of [`EpmVGEncoderLayer`]. Its `attention_mask` `(batch, length)` is False on padding."""

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
    """
    The DETR encoder. transformers asks a class how many layers it has when states are recorded by index; this one has
    `config.encoder_layers` of them, the fusion transformer `config.num_hidden_layers`.
    """

    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": OutputRecorder(EpmVGEncoderLayer, num_hidden_layers_key="encoder_layers"),
        "attentions": EpmVGAttention,
    }
