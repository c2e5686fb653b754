"""Models that a user could pick instead of ours: an equivalent of TransVG, and two detectors of transformers."""

from dataclasses import dataclass

import torch
from torch import nn
from torchvision.models import resnet
from torchvision.ops import box_convert, generalized_box_iou
from torchvision.ops.misc import FrozenBatchNorm2d
from transformers import (
    BertConfig,
    BertModel,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    Owlv2Config,
    Owlv2ForObjectDetection,
    SwinConfig,
)


@dataclass(frozen=True)
class TransVGSizes:
    """The sizes of TransVG (djiajunustc/TransVG), with a ResNet-50 and BERT-base."""

    depths: tuple[int, ...] = (3, 4, 6, 3)
    bert: tuple[int, int, int] = (768, 12, 12)  # width, layers, heads
    width: int = 256
    heads: int = 8
    layers: int = 6
    ffn: int = 2048
    canvas: int = 640
    tokens: int = 20


# Sizes with which the benchmark itself can be tried quickly.
TINY_TRANSVG = TransVGSizes(depths=(1, 1, 1, 1), bert=(32, 1, 2), width=32, heads=2, layers=1, ffn=32, canvas=128)


class TransVG(nn.Module):
    """
    What TransVG computes, from modules that everybody has: torchvision's ResNet with frozen batch norms,
    `nn.TransformerEncoder` for the visual encoder and for the fusion, and transformers' BERT with eager attention. It
    reads one picture for every expression. Only one thing is left out, to its advantage: positions are added once
    before an encoder, and not again in each of its layers.
    """

    def __init__(self, sizes: TransVGSizes):
        super().__init__()
        # PyTorch's own fast path for encoders takes three times as long as its usual path on a CPU, with masks. This
        # switch is global, but no other model here has such encoders.
        torch.backends.mha.set_fastpath_enabled(False)
        full = resnet.ResNet(resnet.Bottleneck, list(sizes.depths), norm_layer=FrozenBatchNorm2d)
        self.backbone = nn.Sequential(*list(full.children())[:-2])  # without the pooling and the classifier
        self.input_projection = nn.Conv2d(full.fc.in_features, sizes.width, kernel_size=1)
        cells = (sizes.canvas // 32) ** 2
        self.visual_positions = nn.Parameter(torch.randn(cells, sizes.width))
        self.visual_encoder = make_encoder(sizes)
        width, layers, heads = sizes.bert
        self.bert = BertModel(
            BertConfig(
                hidden_size=width,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                intermediate_size=4 * width,
                attn_implementation="eager",
            ),
            add_pooling_layer=False,
        )
        self.visual_projection = nn.Linear(sizes.width, sizes.width)
        self.text_projection = nn.Linear(width, sizes.width)
        self.reg_token = nn.Parameter(torch.randn(sizes.width))
        self.fusion_positions = nn.Parameter(torch.randn(1 + sizes.tokens + cells, sizes.width))
        self.fusion = make_encoder(sizes)
        self.box_head = nn.Sequential(
            nn.Linear(sizes.width, sizes.width),
            nn.ReLU(),
            nn.Linear(sizes.width, sizes.width),
            nn.ReLU(),
            nn.Linear(sizes.width, 4),
        )

    def forward(
        self,
        pixel_values: torch.Tensor,
        pixel_mask: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        The boxes `(N, 4)`, cxcywh in [0, 1], for N pictures `(N, 3, canvas, canvas)` with masks `(N, canvas, canvas)`
        and N expressions with ids and masks `(N, tokens)`, and with labels `(N, 4)` the loss. The masks are 1 on the
        picture and on words.
        """
        visual = self.input_projection(self.backbone(pixel_values))
        side = visual.shape[-1]
        mask = nn.functional.interpolate(pixel_mask[:, None].float(), size=(side, side))[:, 0]
        visual_padding = mask.flatten(1) == 0
        visual = visual.flatten(2).transpose(1, 2) + self.visual_positions
        visual = self.visual_projection(self.visual_encoder(visual, src_key_padding_mask=visual_padding))
        text = self.text_projection(self.bert(input_ids, attention_mask=attention_mask).last_hidden_state)

        reg = self.reg_token.expand(len(text), 1, -1)
        padding = torch.cat([visual_padding.new_zeros(len(text), 1), attention_mask == 0, visual_padding], dim=1)
        fused = torch.cat([reg, text, visual], dim=1) + self.fusion_positions
        boxes = self.box_head(self.fusion(fused, src_key_padding_mask=padding)[:, 0]).float().sigmoid()
        return {"pred_boxes": boxes} if labels is None else {"pred_boxes": boxes, "loss": loss_of(boxes, labels)}


def make_encoder(sizes: TransVGSizes) -> nn.TransformerEncoder:
    """An encoder as DETR's and TransVG's, with the norms after the sums."""
    layer = nn.TransformerEncoderLayer(sizes.width, sizes.heads, sizes.ffn, batch_first=True)
    # Nested tensors only take masks whose padding is at the end, and that of a picture is on both sides.
    return nn.TransformerEncoder(layer, sizes.layers, enable_nested_tensor=False)


def loss_of(boxes: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The sum of L1 and generalised IoU loss of boxes `(N, 4)`, cxcywh, as in TransVG."""
    corners, wanted = (box_convert(of, "cxcywh", "xyxy") for of in (boxes, labels))
    return (boxes - labels).abs().sum(-1).mean() + (1 - generalized_box_iou(corners, wanted).diag()).mean()


def make_transvg(quick: bool) -> TransVG:
    """TransVG with random weights."""
    return TransVG(TINY_TRANSVG if quick else TransVGSizes())


def make_grounding_dino(quick: bool) -> GroundingDinoForObjectDetection:
    """GroundingDINO-tiny, whose sizes are the defaults of transformers, with random weights."""
    if not quick:
        return GroundingDinoForObjectDetection(GroundingDinoConfig())
    swin = SwinConfig(
        embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], out_features=["stage2", "stage3", "stage4"]
    )
    bert = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 10}
    return GroundingDinoForObjectDetection(GroundingDinoConfig(backbone_config=swin, text_config=bert, **sizes))


def make_owlv2(quick: bool) -> Owlv2ForObjectDetection:
    """OWLv2-base as `owlv2-base-patch16-ensemble`, with a canvas of 960 pixels, with random weights."""
    if not quick:
        return Owlv2ForObjectDetection(Owlv2Config(vision_config={"image_size": 960}))
    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision, text = {**tower, "image_size": 64}, tower
    return Owlv2ForObjectDetection(Owlv2Config(vision_config=vision, text_config=text, projection_dim=32))
