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
"""
Losses as pure functions, and the targets of `map_loss`. Each loss is a mean over expressions; those that compare
embeddings add a mean over images. No gradient reaches the teacher.
"""

import torch
from torch import nn


def has_box(labels: torch.Tensor) -> torch.Tensor:
    """
    Which expressions have a box. Image-caption data has none: such a row of `labels` is NaN throughout. (A row that is
    NaN in part is a mistake and counts as a box, so that it shows in the loss.)

    Args:
        labels (`torch.FloatTensor` of shape `(N, 4)`): boxes or NaN.

    Returns:
        `torch.BoolTensor` of shape `(N,)`.

    Example:

    ```python
    >>> import torch
    >>> from epmvg_hf.model.losses import has_box

    >>> has_box(torch.tensor([[0.5, 0.5, 0.2, 0.2], [float("nan")] * 4]))
    tensor([ True, False])
    ```
    """
    return ~labels.isnan().all(-1)


def box_loss(pred_boxes: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    L1 (summed over the four coordinates) and generalized IoU loss, as in TransVG (djiajunustc/TransVG:
    utils/loss_utils.py), but N pairs instead of the diagonal of N x N.

    Args:
        pred_boxes (`torch.FloatTensor` of shape `(N, 4)`): (cx, cy, w, h) in [0, 1] of the padded canvas.
        labels (`torch.FloatTensor` of shape `(N, 4)`): true boxes, likewise; rows of NaN have none (see [`has_box`]).

    Returns:
        `dict[str, torch.FloatTensor]` with the scalars `loss_bbox` and `loss_giou`, means over the rows with a box; 0
        if there is none.

    Raises:
        ImportError: torchvision is not installed.

    Example:

    ```python
    >>> import torch
    >>> from epmvg_hf.model.losses import box_loss

    >>> true = torch.tensor([[0.5, 0.5, 0.25, 0.25]])
    >>> box_loss(true + torch.tensor([0.25, 0, 0, 0]), true)  # beside each other
    {'loss_bbox': tensor(0.2500), 'loss_giou': tensor(1.)}
    ```
    """
    # Only training needs torchvision. Within `try`, shared code can be loaded without it (see `register_for_hub`).
    try:
        from torchvision.ops import box_convert, generalized_box_iou_loss
    except ImportError as error:
        raise ImportError("The loss needs torchvision: pip install torchvision") from error

    pred_boxes, labels = pred_boxes.float(), labels.float()
    rows = has_box(labels)
    # NaN * 0 is NaN, in the backward pass too. So a row without a box compares a constant box with itself.
    pred_boxes, labels = (torch.where(rows[:, None], boxes, 0.5) for boxes in (pred_boxes, labels))
    l1 = (pred_boxes - labels).abs().sum(-1)
    giou = generalized_box_iou_loss(box_convert(pred_boxes, "cxcywh", "xyxy"), box_convert(labels, "cxcywh", "xyxy"))
    return {"loss_bbox": _mean_over(l1, rows), "loss_giou": _mean_over(giou, rows)}


def map_loss(
    consistency_map: torch.Tensor,
    target: torch.Tensor,
    mask: torch.Tensor,
    row_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    KL divergence over positions from a target distribution to the softmax of a map over them. Our reading of
    EpmVG: the target is the teacher's patch-text map (see [`teacher_map_target`]), or the box itself (see
    [`box_map_target`]).

    Args:
        consistency_map (`torch.FloatTensor` of shape `(N, V)`): logits, row-major over the grid.
        target (`torch.FloatTensor` of shape `(N, V)`): distributions over the V positions, 0 where `mask` is False. A
            row of zeros adds 0.
        mask (`torch.BoolTensor` of shape `(N, V)`): False on padding. A row that is False throughout adds 0.
        row_mask (`torch.BoolTensor` of shape `(N,)`, *optional*): the rows to average over, all by default. The other
            rows may hold anything, NaN too.

    Returns:
        `torch.FloatTensor`, a scalar; 0 if no row is to be averaged over.

    Example:

    ```python
    >>> import torch
    >>> from epmvg_hf.model.losses import map_loss

    >>> target = torch.tensor([[0.5, 0.5, 0.0, 0.0]])
    >>> map_loss(torch.zeros(1, 4), target, mask=torch.ones(1, 4, dtype=torch.bool))  # log 2
    tensor(0.6931)
    ```
    """
    count: int | torch.Tensor = max(len(mask), 1)
    if row_mask is not None:
        mask, count = mask & row_mask[:, None], row_mask.sum().clamp(min=1)
    scores = consistency_map.float()
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    target = torch.where(mask.any(-1, keepdim=True), target, 0)
    return nn.functional.kl_div(scores.log_softmax(-1), target, reduction="sum") / count


def box_map_target(labels: torch.Tensor, visual_mask: torch.Tensor) -> torch.Tensor:
    """
    The box as a distribution over the feature grid: every cell weighs the area that it shares with the box.

    Args:
        labels (`torch.FloatTensor` of shape `(N, 4)`): (cx, cy, w, h) in [0, 1] of the padded canvas; rows of NaN have
            no box (see [`has_box`]).
        visual_mask (`torch.BoolTensor` of shape `(N, grid_height, grid_width)`): False on padding.

    Returns:
        `torch.FloatTensor` of shape `(N, grid_height * grid_width)`; 0 on padding, rows sum to 1 (to 0 where there
        is no box or it touches no unpadded cell, and such a row adds nothing to the loss).

    Example:

    ```python
    >>> import torch
    >>> from epmvg_hf.model.losses import box_map_target

    >>> labels = torch.tensor([[0.25, 0.5, 0.5, 1.0]])  # the left half
    >>> box_map_target(labels, torch.ones(1, 2, 3, dtype=torch.bool)).view(2, 3)
    tensor([[0.3333, 0.1667, 0.0000],
            [0.3333, 0.1667, 0.0000]])
    ```
    """
    grid_height, grid_width = visual_mask.shape[1:]
    # An empty box shares no area with any cell.
    labels = torch.where(has_box(labels)[:, None], labels.float(), 0)
    cx, cy, width, height = labels.unbind(-1)
    in_columns = _overlap(cx - width / 2, cx + width / 2, grid_width)
    in_rows = _overlap(cy - height / 2, cy + height / 2, grid_height)
    area = (in_rows[:, :, None] * in_columns[:, None, :] * visual_mask).flatten(1)
    return area / area.sum(-1, keepdim=True).clamp(min=torch.finfo(area.dtype).tiny)


def _mean_over(values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Mean of `values` `(N,)` where `rows` `(N,)` is True, 0 if nowhere; of fixed shapes, as torch.compile wants."""
    return torch.where(rows, values, 0).sum() / rows.sum().clamp(min=1)


def _overlap(low: torch.Tensor, high: torch.Tensor, cells: int) -> torch.Tensor:
    """Length `(N, cells)` of [low, high] within each of `cells` equal cells of [0, 1]."""
    edges = torch.linspace(0, 1, cells + 1, device=low.device)
    return (torch.minimum(high[:, None], edges[1:]) - torch.maximum(low[:, None], edges[:-1])).clamp(min=0)
