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
"""DETR's transformer decoder, which serves as fusion transformer of cheaper expressions than the encoder's."""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithCrossAttentions
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_epmvg import EpmVGCrossAttention, EpmVGSelfAttention, for_each_expression
from .base_epmvg import EpmVGPreTrainedModel
from .configuration_epmvg import EpmVGConfig
from .encoder_epmvg import EpmVGTransformerLayer


class EpmVGDecoderLayer(EpmVGTransformerLayer):
    """DETR's transformer decoder layer."""

    def __init__(self, config: EpmVGConfig, num_attention_heads: int, ffn_dim: int):
        super().__init__()
        self.self_attn = EpmVGSelfAttention(config, num_attention_heads)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.encoder_attn = EpmVGCrossAttention(config, num_attention_heads)
        self.encoder_attn_layer_norm = nn.LayerNorm(config.d_model)
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
        visual_tokens: torch.Tensor,
        positioned_visual_tokens: torch.Tensor,
        visual_mask: torch.Tensor | None,
        image_index: torch.Tensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        hidden_states = self.attend_to_itself(hidden_states, attention_mask, position_embeddings, **kwargs)
        attended, _ = self.encoder_attn(
            hidden_states,
            visual_mask,
            position_embeddings,
            visual_tokens,
            positioned_visual_tokens,
            image_index,
            **kwargs,
        )
        attended = nn.functional.dropout(attended, p=self.dropout, training=self.training)
        return self.feed_forward(self.encoder_attn_layer_norm(hidden_states + attended))


class EpmVGDecoder(EpmVGPreTrainedModel):
    """
    A stack of [`EpmVGDecoderLayer`] that reads visual tokens and leaves them as they are. An expression costs its own
    tokens only, and a picture of many expressions is projected to keys and values once.

    `inputs_embeds` `(N, length, d_model)` with `attention_mask` `(N, length)` are the expressions, `visual_tokens`
    `(B, V, d_model)` with `visual_mask` `(B, V)` the pictures. Both masks are False on padding.
    """

    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": EpmVGDecoderLayer,
        "attentions": EpmVGSelfAttention,
        "cross_attentions": EpmVGCrossAttention,
    }

    def __init__(self, config: EpmVGConfig, num_layers: int, num_attention_heads: int, ffn_dim: int):
        super().__init__(config)
        self.layers = nn.ModuleList(
            [EpmVGDecoderLayer(config, num_attention_heads, ffn_dim) for _ in range(num_layers)]
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
        visual_tokens: torch.Tensor,
        visual_mask: torch.Tensor,
        visual_position_embeddings: torch.Tensor,
        image_index: torch.Tensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithCrossAttentions:
        attention_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=inputs_embeds, attention_mask=attention_mask
        )
        visual_mask = for_each_expression(visual_mask, image_index)
        visual_mask = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=visual_mask,
            # Only the number of expressions, the number of visual tokens and the type are read of these states.
            encoder_hidden_states=visual_mask[..., None].to(inputs_embeds.dtype),
        )
        positioned_visual_tokens = visual_tokens + visual_position_embeddings
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask,
                position_embeddings,
                visual_tokens,
                positioned_visual_tokens,
                visual_mask,
                image_index,
                **kwargs,
            )
        return BaseModelOutputWithCrossAttentions(last_hidden_state=hidden_states)
