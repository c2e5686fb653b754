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
"""Checks of what the model is called with."""

import torch


def the_one(**inputs: torch.Tensor | None) -> torch.Tensor:
    """The only one of the inputs that is given; a `ValueError` if there are none or several."""
    given = {name: value for name, value in inputs.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"expected one of {', '.join(inputs)}, got {' and '.join(given) or 'none of them'}")
    return next(iter(given.values()))


def check_visual(
    backbone_features: torch.Tensor | None, visual_tokens: torch.Tensor | None, visual_mask: torch.Tensor | None
) -> None:
    """A `ValueError` if what replaces the pixels comes without its mask, or is on another grid."""
    needs_mask = backbone_features is not None or visual_tokens is not None
    if needs_mask != (visual_mask is not None):
        raise ValueError(
            "visual_mask comes together with backbone_features or visual_tokens: it has the shape of their grid"
        )
    if visual_mask is None:
        return
    if backbone_features is not None and backbone_features[:, 0].shape != visual_mask.shape:
        raise ValueError(
            f"backbone_features have shape {tuple(backbone_features.shape)} and visual_mask "
            f"{tuple(visual_mask.shape)}, expected (B, C, grid_height, grid_width) and (B, grid_height, grid_width)"
        )
    if visual_tokens is not None and visual_tokens.shape[:2] != visual_mask.flatten(1).shape:
        raise ValueError(
            f"visual_tokens have shape {tuple(visual_tokens.shape)} and visual_mask {tuple(visual_mask.shape)}, "
            "expected (B, grid_height * grid_width, d_model) and (B, grid_height, grid_width)"
        )


def check_pairing(
    images: torch.Tensor, expressions: torch.Tensor, image_index: torch.Tensor | None, max_text_length: int
) -> None:
    """A `ValueError` if expressions are too long, or it is not known which image each of them is about."""
    num_images, (num_expressions, length) = images.shape[0], expressions.shape[:2]
    if length > max_text_length:
        raise ValueError(f"{length} tokens per expression, but config.max_text_length is {max_text_length}")
    if image_index is None and num_expressions != num_images:
        raise ValueError(
            f"{num_expressions} expressions for {num_images} images: pass image_index, the number of the image of each"
        )
    if image_index is not None and image_index.shape != (num_expressions,):
        raise ValueError(
            f"image_index has shape {tuple(image_index.shape)}, expected ({num_expressions},): one per expression"
        )
