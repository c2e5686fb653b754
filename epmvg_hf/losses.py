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
"""Losses as pure functions, each a mean over expressions."""

import torch
from torch import nn


def box_loss(pred_boxes: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    L1 (summed over the four coordinates) and generalized IoU loss, as in TransVG (djiajunustc/TransVG:
    utils/loss_utils.py), but N pairs instead of the diagonal of N x N.

    Args:
        pred_boxes (`torch.FloatTensor` of shape `(N, 4)`): (cx, cy, w, h) in [0, 1] of the padded canvas.
        labels (`torch.FloatTensor` of shape `(N, 4)`): true boxes, likewise.

    Returns:
        `dict[str, torch.FloatTensor]` with the scalars `loss_bbox` and `loss_giou`.
    """
    # Only training needs torchvision; inference works without it.
    from torchvision.ops import box_convert, generalized_box_iou_loss

    pred_boxes, labels = pred_boxes.float(), labels.float()
    giou = generalized_box_iou_loss(
        box_convert(pred_boxes, "cxcywh", "xyxy"), box_convert(labels, "cxcywh", "xyxy"), reduction="mean"
    )
    return {"loss_bbox": (pred_boxes - labels).abs().sum(-1).mean(), "loss_giou": giou}


def map_loss(consistency_map: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    KL divergence over positions from a target distribution to the softmax of the consistency map. Our reading of
    EpmVG: the target is the teacher's patch-text map, or the box itself (see [`box_map_target`]).

    Args:
        consistency_map (`torch.FloatTensor` of shape `(N, V)`): logits, row-major over the grid.
        target (`torch.FloatTensor` of shape `(N, V)`): distributions over the V positions, 0 where `mask` is False.
        mask (`torch.BoolTensor` of shape `(N, V)`): False on padding.
    """
    scores = consistency_map.float()
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return nn.functional.kl_div(scores.log_softmax(-1), target, reduction="batchmean")


def box_map_target(labels: torch.Tensor, visual_mask: torch.Tensor) -> torch.Tensor:
    """
    The box as a distribution over the feature grid: every cell weighs the area that it shares with the box.

    Args:
        labels (`torch.FloatTensor` of shape `(N, 4)`): (cx, cy, w, h) in [0, 1] of the padded canvas.
        visual_mask (`torch.BoolTensor` of shape `(N, grid_height, grid_width)`): False on padding.

    Returns:
        `torch.FloatTensor` of shape `(N, grid_height * grid_width)`; 0 on padding, rows sum to 1 (to 0 where the box
        touches no unpadded cell, and such a row adds nothing to the loss).
    """
    grid_height, grid_width = visual_mask.shape[1:]
    cx, cy, width, height = labels.float().unbind(-1)
    in_columns = _overlap(cx - width / 2, cx + width / 2, grid_width)
    in_rows = _overlap(cy - height / 2, cy + height / 2, grid_height)
    area = (in_rows[:, :, None] * in_columns[:, None, :] * visual_mask).flatten(1)
    return area / area.sum(-1, keepdim=True).clamp(min=torch.finfo(area.dtype).tiny)


def _overlap(low: torch.Tensor, high: torch.Tensor, cells: int) -> torch.Tensor:
    """Length `(N, cells)` of [low, high] within each of `cells` equal cells of [0, 1]."""
    edges = torch.linspace(0, 1, cells + 1, device=low.device)
    return (torch.minimum(high[:, None], edges[1:]) - torch.maximum(low[:, None], edges[:-1])).clamp(min=0)
