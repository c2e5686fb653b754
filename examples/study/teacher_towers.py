"""A student whose backbones are the teacher's own towers, which is what CLIP-VG and HiVG do instead of distilling.

The towers are those of `configs/teachers/clip_tiny.json`: open_clip's ModifiedResNet and its causal text transformer.
"""

from typing import Any

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import TextTransformer
from torch import nn
from transformers import AutoBackbone, AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.modeling_outputs import BackboneOutput, BaseModelOutput

from epmvg_hf import ClipTeacher, EpmVGModel

# Pixels per cell of the last feature map of a ModifiedResNet.
STRIDE = 32


class ClipResNetConfig(BackboneConfigMixin, PreTrainedConfig):
    model_type = "ablation_clip_resnet"
    layers: list[int] | None = None
    width: int = 64

    def __post_init__(self, **kwargs: Any) -> None:
        self.stage_names = ["stage4"]
        kwargs.pop("out_indices", None), kwargs.pop("out_features", None)
        self.set_output_features_output_indices(out_features=["stage4"], out_indices=None)
        super().__post_init__(**kwargs)


class ClipResNetBackbone(BackboneMixin, PreTrainedModel):
    config_class = ClipResNetConfig
    has_attentions = False

    def __init__(self, config: ClipResNetConfig):
        super().__init__(config)
        self.num_features = [32 * config.width]
        self.tower = ModifiedResNet(config.layers, output_dim=1, heads=1, width=config.width)
        self.tower.attnpool = nn.Identity()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing to do: open_clip initialises the tower."""

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BackboneOutput:
        return BackboneOutput(feature_maps=(self.tower(pixel_values),))


class ClipTextConfig(PreTrainedConfig):
    model_type = "ablation_clip_text"
    hidden_size: int = 512
    vocab_size: int = 49408
    context_length: int = 77
    heads: int = 8
    layers: int = 12


class ClipTextModel(PreTrainedModel):
    config_class = ClipTextConfig

    def __init__(self, config: ClipTextConfig):
        super().__init__(config)
        self.tower = TextTransformer(
            context_length=config.context_length,
            vocab_size=config.vocab_size,
            width=config.hidden_size,
            heads=config.heads,
            layers=config.layers,
            output_dim=None,
            pool_type="none",
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing to do: open_clip initialises the tower."""

    def get_input_embeddings(self) -> nn.Module:
        return self.tower.token_embedding

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutput:
        # Attention is causal and padding comes last, so no token attends to padding.
        length = input_ids.shape[1]
        states = self.tower.token_embedding(input_ids) + self.tower.positional_embedding[:length]
        states = self.tower.transformer(states, attn_mask=self.tower.attn_mask[:length, :length])
        return BaseModelOutput(last_hidden_state=self.tower.ln_final(states))


AutoConfig.register(ClipResNetConfig.model_type, ClipResNetConfig)
AutoBackbone.register(ClipResNetConfig, ClipResNetBackbone)
AutoConfig.register(ClipTextConfig.model_type, ClipTextConfig)
AutoModel.register(ClipTextConfig, ClipTextModel)


def tower_configs(teacher: ClipTeacher) -> dict[str, PreTrainedConfig]:
    """`backbone_config` and `text_config` of a student whose backbones have the shapes of the teacher's towers."""
    vision, text = teacher.model_config["vision_cfg"], teacher.model_config["text_cfg"]
    return {
        "backbone_config": ClipResNetConfig(layers=vision["layers"], width=vision["width"]),
        "text_config": ClipTextConfig(
            hidden_size=text["width"],
            **{name: text[name] for name in ("vocab_size", "context_length", "heads", "layers")},
        ),
    }


def load_towers(model: EpmVGModel, teacher: ClipTeacher) -> None:
    """Copies the teacher's weights, except those of its poolings, to an `EpmVGModel` made from [`tower_configs`]."""
    vision = {n: t for n, t in teacher.clip.visual.state_dict().items() if not n.startswith("attnpool.")}
    model.vision_model.tower.load_state_dict(vision)
    tower = model.text_model.tower
    pooling = ("visual.", "logit_scale", "logit_bias", "text_projection")
    text = {n: t for n, t in teacher.clip.state_dict().items() if not n.startswith(pooling)}
    tower.load_state_dict(text)
