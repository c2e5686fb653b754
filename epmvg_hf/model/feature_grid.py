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
"""The grid of visual tokens: which map of the backbone has it, other maps on it, and its cells on the picture."""

import torch
from torch import nn


def choose_grid(grids: list[tuple[int, int]], canvas: tuple[int, int], stride: int) -> tuple[int, int]:
    """
    The first of the backbone's grids whose cells have `stride` pixels. Some backbones round up to whole cells.

    Args:
        grids (`list[tuple[int, int]]`): rows and columns of each feature map.
        canvas (`tuple[int, int]`): height and width of the pixels.
        stride (`int`): `config.backbone_stride`.

    Raises:
        ValueError: there is no such grid.
    """
    for grid in grids:
        if all(cells in (side // stride, -(-side // stride)) for cells, side in zip(grid, canvas, strict=True)):
            return grid
    found = " and ".join(f"{height} x {width}" for height, width in grids)
    raise ValueError(
        f"the backbone maps {canvas[0]} x {canvas[1]} pixels to {found} cells, but config.backbone_stride is {stride}"
    )


def resize_map(level: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """A feature map on another grid: the mean of the cells that fall together, or interpolated between them."""
    if level.shape[-2:] == grid:
        return level
    if level.shape[-2] >= grid[0]:
        return nn.functional.adaptive_avg_pool2d(level, grid)
    # Interpolation rounds in lower precisions, and some of them have no kernel for it.
    return nn.functional.interpolate(level.float(), size=grid, mode="bilinear").to(level.dtype)


def cells_on_picture(pixel_mask: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """
    Which cells show the picture: those whose left upper pixel does, as in DETR, or in a picture that is so thin that
    it has none of these, all that it touches.

    Args:
        pixel_mask (`torch.Tensor` of shape `(B, height, width)`): 1 on the picture, 0 on padding.
        grid (`tuple[int, int]`): rows and columns of the grid.

    Returns:
        `torch.BoolTensor` of shape `(B, *grid)`.
    """
    pixel_mask = pixel_mask[:, None].float()
    nearest = nn.functional.interpolate(pixel_mask, size=grid)[:, 0].bool()
    touched = nn.functional.adaptive_max_pool2d(pixel_mask, grid)[:, 0].bool()
    return nearest | (touched & ~nearest.any(dim=(1, 2), keepdim=True))


def only_on_picture(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Scores `(N, V)` over the cells with the lowest number where `mask`, likewise, is False: on padding."""
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
