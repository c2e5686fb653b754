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
"""DETR's transformer encoder, which serves as visual encoder and, in TransVG's manner, as fusion transformer."""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithCrossAttentions
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention_epmvg import EpmVGSelfAttention
from .base_epmvg import EpmVGPreTrainedModel
from .configuration_epmvg import EpmVGConfig


class EpmVGTransformerLayer(GradientCheckpointingLayer):
    """
    What DETR's encoder and decoder layers do alike; both normalise after each residual connection. Each of them makes
    its modules itself, because their order decides which random numbers a new model starts with.
    """

    def attend_to_itself(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_embeddings: torch.Tensor,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """Self-attention with its residual connection; all states are `(batch, length, d_model)`."""
        attended, _ = self.self_attn(hidden_states, attention_mask, position_embeddings, **kwargs)
        attended = nn.functional.dropout(attended, p=self.dropout, training=self.training)
        return self.self_attn_layer_norm(hidden_states + attended)

    def feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The feed-forward network with its residual connection, the last part of a layer."""
        expanded = self.activation_fn(self.fc1(hidden_states))
        expanded = nn.functional.dropout(expanded, p=self.dropout, training=self.training)
        contracted = nn.functional.dropout(self.fc2(expanded), p=self.dropout, training=self.training)
        return self.final_layer_norm(hidden_states + contracted)


class EpmVGEncoderLayer(EpmVGTransformerLayer):
    """DETR's transformer encoder layer."""

    def __init__(self, config: EpmVGConfig, num_attention_heads: int, ffn_dim: int):
        super().__init__()
        self.self_attn = EpmVGSelfAttention(config, num_attention_heads)
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
        return self.feed_forward(self.attend_to_itself(hidden_states, attention_mask, position_embeddings, **kwargs))


class EpmVGEncoder(EpmVGPreTrainedModel):
    """A stack of [`EpmVGEncoderLayer`]. Its `attention_mask` `(batch, length)` is False on padding."""

    _can_record_outputs = {"hidden_states": EpmVGEncoderLayer, "attentions": EpmVGSelfAttention}  # noqa: RUF012

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
    ) -> BaseModelOutputWithCrossAttentions:
        attention_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=inputs_embeds, attention_mask=attention_mask
        )
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask, position_embeddings, **kwargs)
        return BaseModelOutputWithCrossAttentions(last_hidden_state=hidden_states)


class EpmVGVisualEncoder(EpmVGEncoder):
    """
    The DETR encoder. transformers asks a class how many layers it has when states are recorded by index; this one has
    `config.encoder_layers` of them, the fusion transformer `config.num_hidden_layers`.
    """

    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": OutputRecorder(EpmVGEncoderLayer, num_hidden_layers_key="encoder_layers"),
        "attentions": EpmVGSelfAttention,
    }
