"""Patch embeddings in the space of images and texts, for those vision towers of open_clip that have them."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer


def pooled_and_patches(visual: nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Image embeddings `(B, e)` and patch embeddings `(B, grid_height, grid_width, e)`, not yet normalised to length 1.

    CLIP is trained to compare pooled image embeddings with texts. Which patch embeddings can be compared with texts
    too depends on how the tower pools: see the functions below.

    Args:
        visual (`nn.Module`): the vision tower of an open_clip model.
        pixels (`torch.FloatTensor` of shape `(B, 3, S, S)`): at the tower's resolution, normalised.

    Raises:
        `ValueError`: No comparable patch embeddings are known for this kind of vision tower.

    Example:

    ```python
    >>> import torch
    >>> from epmvg_hf.distillation.patch_embeddings import pooled_and_patches

    >>> pixels = torch.zeros(1, 3, teacher.image_size, teacher.image_size)
    >>> pooled, patches = pooled_and_patches(teacher.clip.visual, pixels)
    >>> pooled.shape, patches.shape
    (torch.Size([1, 128]), torch.Size([1, 8, 8, 128]))
    ```
    """
    embeds = patch_embedder(visual)
    if embeds is None:
        raise ValueError(
            f"no patch embeddings that can be compared with texts are known for the vision tower "
            f"{type(visual).__name__} and its pooling: use output_patches=False."
        )
    return embeds(visual, pixels)


def patch_embedder(visual: nn.Module) -> Callable | None:
    """The function that computes [`pooled_and_patches`] for this kind of tower, or `None` if there is none."""
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer
    from timm.models import EfficientNet, ResNet

    if isinstance(visual, ModifiedResNet):
        return _resnet_embeds
    if isinstance(visual, TimmModel) and isinstance(visual.trunk, (EfficientNet, ResNet)):
        return _timm_embeds if visual.trunk.global_pool.pool_type == "avg" else None
    if isinstance(visual, VisionTransformer) and visual.attn_pool is None:
        blocks = visual.transformer.resblocks
        plain_attention = isinstance(blocks[-1].attn, nn.MultiheadAttention)
        if visual.pool_type == "tok" and plain_attention and len(blocks) > 1:
            return _class_token_vit_embeds
        if visual.pool_type == "avg":
            return _average_vit_embeds
    return None


def _resnet_embeds(visual: "ModifiedResNet", pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    For a ResNet: each patch embedding is what the attention pool would return if it attended to that position only,
    that is, the value and output projections of the last feature map, as in MaskCLIP (Zhou et al. 2022;
    chongzhou96/MaskCLIP: maskclip_head.py) and DenseCLIP (Rao et al. 2022). MaskCLIP leaves out the position
    embedding. It is kept here because the pool's own values contain it: with a single head, the pooled embedding is
    exactly a weighted mean of the patch embeddings and of the embedding of the mean feature.
    """
    features = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(pixels)))))
    pool = visual.attnpool
    positions = features.flatten(2).mT + pool.positional_embedding[1:].to(features.dtype)
    patches = pool.c_proj(pool.v_proj(positions))
    return pool(features), patches.unflatten(1, features.shape[2:])


def _class_token_vit_embeds(visual: "VisionTransformer", pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    For a ViT with a class token: the last block is reduced to the value and output projections of each token. Its full
    attention would mix into every token what the class token needs from the whole image, so that tokens no longer
    describe their own patch. The idea is MaskCLIP's (Zhou et al. 2022). MaskCLIP's published code for ViT keeps the
    block's residual connection and MLP (chongzhou96/MaskCLIP: vit.py). Both are left out here, as in FeatUp
    (mhamilton723/FeatUp), because they blur the maps (ClearCLIP, Lan et al. 2024).
    """
    block = visual.transformer.resblocks[-1]
    attention = block.attn
    before_last = len(visual.transformer.resblocks) - 2
    output = visual.forward_intermediates(pixels, indices=[before_last], output_fmt="NLC")
    # The projections of queries, keys and values are packed in this order.
    value_weight, value_bias = attention.in_proj_weight.chunk(3)[2], attention.in_proj_bias.chunk(3)[2]
    values = nn.functional.linear(block.ln_1(output["image_intermediates"][0]), value_weight, value_bias)
    tokens = visual.ln_post(block.ls_1(attention.out_proj(values)))
    return output["image_features"], (tokens @ visual.proj).unflatten(1, visual.grid_size)


def _average_vit_embeds(visual: "VisionTransformer", pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    For a ViT that averages its tokens: each patch embedding is what the tower would return if its average were over
    that token only. If the layer norm comes before the average (`final_ln_after_pool=False`), the pooled embedding is
    exactly the mean of the patch embeddings.
    """
    last = len(visual.transformer.resblocks) - 1
    output = visual.forward_intermediates(pixels, indices=[last], output_fmt="NLC")
    tokens = visual.ln_post(output["image_intermediates"][0])
    return output["image_features"], (tokens @ visual.proj).unflatten(1, visual.grid_size)


def _timm_embeds(visual: "TimmModel", pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    For a convolutional network of timm that averages its last feature map: each patch embedding is what the tower
    would return if its average were over that cell only. With a linear projection, the pooled embedding is the mean of
    the patch embeddings.
    """
    features = visual.trunk.forward_features(pixels)
    return visual.head(visual.trunk.forward_head(features)), visual.head(features.permute(0, 2, 3, 1))
