"""Randomly initialised towers, saved as their authors do: the folders that a user names on the Hub."""

from pathlib import Path

import torch
from conftest import tiny_tokenizer
from transformers import (
    BertConfig,
    BertForMaskedLM,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    ConvNextConfig,
    ConvNextForImageClassification,
    DetrConfig,
    DetrForObjectDetection,
    DetrImageProcessor,
    Dinov2Config,
    Dinov2Model,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ResNetConfig,
    ResNetForImageClassification,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaTokenizer,
    SwinConfig,
    SwinForImageClassification,
    TimmBackboneConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

TRANSFORMER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
DETR = {"d_model": 32, "num_queries": 4, "encoder_layers": 2, "decoder_layers": 1} | {
    f"{part}_{name}": value
    for part in ("encoder", "decoder")
    for name, value in (("attention_heads", 8), ("ffn_dim", 32))
}
# Of a grounding model that starts from them.
SIZES = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32} | {
    "fusion_layers": 1, "fusion_attention_heads": 2, "fusion_ffn_dim": 32, "max_text_length": 12
}  # fmt: skip
STATISTICS = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}

# Pixels per cell of their last feature map.
STRIDES = {
    "detr": 8, "detr_timm": 32, "resnet": 8, "swin": 8, "convnext": 8, "dinov2": 14, "vit": 8, "clip": 8
}  # fmt: skip


def save_vision_tower(kind: str, folder: Path) -> str:
    torch.manual_seed(0)
    if kind == "clip":
        return save_clip(folder)
    model = {
        "detr": lambda: DetrForObjectDetection(
            DetrConfig(backbone_config=ResNetConfig(**RESNET, out_features=["stage1", "stage2"]), **DETR)
        ),
        "detr_timm": lambda: DetrForObjectDetection(
            DetrConfig(backbone_config=TimmBackboneConfig(backbone="test_resnet", out_indices=[1, 2, 3, 4]), **DETR)
        ),
        "resnet": lambda: ResNetForImageClassification(ResNetConfig(**RESNET)),
        "swin": lambda: SwinForImageClassification(
            SwinConfig(image_size=48, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=3)
        ),
        "convnext": lambda: ConvNextForImageClassification(
            ConvNextConfig(num_stages=2, hidden_sizes=[8, 16], depths=[1, 1])
        ),
        "dinov2": lambda: Dinov2Model(Dinov2Config(**TRANSFORMER, mlp_ratio=2, image_size=28, patch_size=14)),
        "vit": lambda: ViTForImageClassification(ViTConfig(**TRANSFORMER, image_size=32, patch_size=8)),
    }[kind]()
    _draw_statistics(model)
    model.save_pretrained(folder)
    processor = DetrImageProcessor if kind.startswith("detr") else ViTImageProcessor
    processor(**STATISTICS).save_pretrained(folder)
    return str(folder)


def save_text_tower(kind: str, folder: Path, positions: int = 20) -> str:
    torch.manual_seed(1)
    if kind == "clip":
        return save_clip(folder)
    if kind == "roberta":
        # Positions count from the padding token on, as in the published one: 22 make 20 tokens.
        model = RobertaForMaskedLM(RobertaConfig(**TRANSFORMER, vocab_size=300, max_position_embeddings=22))
        special = {token: index for index, token in enumerate(("<s>", "<pad>", "</s>", "<unk>"))}
        tokenizer = RobertaTokenizer(vocab=_bytes(special, "<mask>"), merges=[])
    elif kind == "distilbert":
        sizes = {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2}
        model = DistilBertForMaskedLM(DistilBertConfig(**sizes, vocab_size=40, max_position_embeddings=20))
        tokenizer = tiny_tokenizer()
    else:
        model = BertForMaskedLM(BertConfig(**TRANSFORMER, vocab_size=40, max_position_embeddings=positions))
        tokenizer = tiny_tokenizer()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_clip(folder: Path, layers: int = 3, positions: int = 20) -> str:
    torch.manual_seed(2)
    vocabulary = _bytes({}, *(f"{chr(code)}</w>" for code in range(97, 123)), "<|startoftext|>", "<|endoftext|>")
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[])
    model = CLIPModel(
        CLIPConfig(
            vision_config={**TRANSFORMER, "image_size": 32, "patch_size": 8, "num_hidden_layers": layers},
            text_config={
                **TRANSFORMER,
                "vocab_size": len(tokenizer),
                "max_position_embeddings": positions,
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id,
            },
            projection_dim=8,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(**STATISTICS).save_pretrained(folder)
    return str(folder)


def _bytes(vocabulary: dict[str, int], *further: str) -> dict[str, int]:
    """A byte-level vocabulary of printable characters, "Ġ" being the space."""
    for token in (*map(chr, range(33, 127)), "Ġ", *further):
        vocabulary.setdefault(token, len(vocabulary))
    return vocabulary


@torch.no_grad()
def _draw_statistics(model: torch.nn.Module) -> None:
    """Batch norms whose every number matters: new ones do nothing."""
    for module in model.modules():
        buffers = dict(module.named_buffers(recurse=False))
        if "running_var" in buffers:
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                tensor.uniform_(0.5, 1.5)
