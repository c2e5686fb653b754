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
"""The grounding loss: its terms, each a mean over the expressions that have a box, and their weighted sum."""

import torch
from torch import nn
from transformers.image_transforms import center_to_corners_format

from .configuration_epmvg import EpmVGConfig
from .feature_grid import only_on_picture


def grounding_loss(
    config: EpmVGConfig,
    pred_boxes: torch.Tensor,
    labels: torch.Tensor,
    consistency_map: torch.Tensor,
    visual_mask: torch.Tensor,
    score_logits: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """
    The loss of N predicted boxes: L1 and generalized IoU as in TransVG, with `config.box_head="map"` the divergence of
    the consistency map from the box, and with `config.score_head` the error of the scores.

    Args:
        config ([`EpmVGConfig`]): has the weights of the terms, `bbox_loss_coefficient`, `giou_loss_coefficient`,
            `map_loss_coefficient` and `score_loss_coefficient`, and says which terms there are.
        pred_boxes (`torch.FloatTensor` of shape `(N, 4)`): (cx, cy, w, h) in [0, 1] of the padded canvas.
        labels (`torch.FloatTensor` of shape `(N, 4)`): true boxes, likewise; a row of NaN or zeros has no box.
        consistency_map (`torch.FloatTensor` of shape `(N, grid_height * grid_width)`): logits over the feature grid.
        visual_mask (`torch.BoolTensor` of shape `(N, grid_height, grid_width)`): False on padding.
        score_logits (`torch.FloatTensor` of shape `(N,)`, *optional*): scores before the sigmoid, if the model has a
            score head.

    Returns:
        `tuple`: the loss, a scalar, and its unweighted terms `loss_bbox`, `loss_giou` and, if there are such,
        `loss_map` and `loss_score`.

    Example:

    ```python
    >>> import torch
    >>> from epmvg_hf import EpmVGConfig
    >>> from epmvg_hf.model.losses import grounding_loss

    >>> true = torch.tensor([[0.25, 0.5, 0.5, 1.0]])  # the left half
    >>> mask = torch.ones(1, 1, 2, dtype=torch.bool)
    >>> loss, terms = grounding_loss(EpmVGConfig(box_head="map"), true, true, torch.zeros(1, 2), mask)
    >>> loss, list(terms)  # the box is right, but the map prefers neither half: log 2
    (tensor(0.6931), ['loss_bbox', 'loss_giou', 'loss_map'])
    ```
    """
    terms = box_loss(pred_boxes, labels)
    loss = config.bbox_loss_coefficient * terms["loss_bbox"] + config.giou_loss_coefficient * terms["loss_giou"]
    if config.box_head == "map":
        target = box_map_target(labels, visual_mask)
        terms["loss_map"] = map_loss(consistency_map, target, visual_mask.flatten(1), row_mask=has_box(labels))
        loss = loss + config.map_loss_coefficient * terms["loss_map"]
    if score_logits is not None:
        terms["loss_score"] = score_loss(score_logits, pred_boxes, labels)
        loss = loss + config.score_loss_coefficient * terms["loss_score"]
    return loss, terms


def has_box(labels: torch.Tensor) -> torch.Tensor:
    """
    Tells which expressions have a box. Image captions have none: all four numbers of their boxes or labels are NaN.
    Expressions that name nothing in their image have none either, see [`is_absent`]. A row in which only some numbers
    are NaN is a mistake. It counts as a box, so that the mistake makes the loss NaN instead of going unnoticed.

    Args:
        labels (`torch.FloatTensor` of shape `(N, 4)`): labels or boxes, some of them NaN or zeros.

    Returns:
        `torch.BoolTensor` of shape `(N,)`.

    Example:

    ```python
    >>> import torch
    >>> from epmvg_hf.model.losses import has_box

    >>> has_box(torch.tensor([[0.5, 0.5, 0.2, 0.2], [float("nan")] * 4, [0.0, 0.0, 0.0, 0.0]]))
    tensor([ True, False, False])
    ```
    """
    return ~(labels.isnan().all(-1) | is_absent(labels))


def is_absent(labels: torch.Tensor) -> torch.Tensor:
    """
    Tells which expressions are known to name nothing in their image: all four numbers of their boxes or labels are 0.

    Args:
        labels (`torch.FloatTensor` of shape `(N, 4)`): labels or boxes.

    Returns:
        `torch.BoolTensor` of shape `(N,)`.

    Example:

    ```python
    >>> import torch
    >>> from epmvg_hf.model.losses import is_absent

    >>> is_absent(torch.tensor([[0.5, 0.5, 0.2, 0.2], [float("nan")] * 4, [0.0, 0.0, 0.0, 0.0]]))
    tensor([False, False,  True])
    ```
    """
    return (labels == 0).all(-1)


def box_loss(pred_boxes: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    The L1 loss, summed over the four coordinates, and the generalized IoU loss, as in TransVG (djiajunustc/TransVG,
    `utils/loss_utils.py`). TransVG takes the diagonal of an N x N matrix of IoUs; here only the N pairs are computed.

    Args:
        pred_boxes (`torch.FloatTensor` of shape `(N, 4)`): (cx, cy, w, h) in [0, 1] of the padded canvas.
        labels (`torch.FloatTensor` of shape `(N, 4)`): true boxes, likewise; a row of NaN has no box (see
            [`has_box`]).

    Returns:
        `dict[str, torch.FloatTensor]`: the scalars `loss_bbox` and `loss_giou`, means over the rows with a box; 0 if
        there is none.

    Example:

    ```python
    >>> import torch
    >>> from epmvg_hf.model.losses import box_loss

    >>> true = torch.tensor([[0.5, 0.5, 0.25, 0.25]])
    >>> box_loss(true + torch.tensor([0.25, 0, 0, 0]), true)  # beside each other
    {'loss_bbox': tensor(0.2500), 'loss_giou': tensor(1.)}
    ```
    """
    pred_boxes, labels = pred_boxes.float(), labels.float()
    rows = has_box(labels)
    # A row without a box compares a constant box with itself. Multiplying its loss by 0 would not do, since NaN * 0 is
    # NaN, in the backward pass too.
    pred_boxes, labels = (torch.where(rows[:, None], boxes, 0.5) for boxes in (pred_boxes, labels))
    l1 = (pred_boxes - labels).abs().sum(-1)
    giou = _generalized_iou_loss(center_to_corners_format(pred_boxes), center_to_corners_format(labels))
    return {"loss_bbox": _mean_over(l1, rows), "loss_giou": _mean_over(giou, rows)}


def score_loss(score_logits: torch.Tensor, pred_boxes: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    Binary cross-entropy of the predicted scores with the IoU that the predicted boxes have, which is 0 for an
    expression that names nothing in its image. IoU-Net (Jiang et al. 2018) and Mask Scoring R-CNN (Huang et al. 2019)
    predict the quality of a box likewise. No gradient flows into the boxes: they should be good, not predictable.

    Args:
        score_logits (`torch.FloatTensor` of shape `(N,)`): scores before the sigmoid.
        pred_boxes (`torch.FloatTensor` of shape `(N, 4)`): (cx, cy, w, h) in [0, 1] of the padded canvas.
        labels (`torch.FloatTensor` of shape `(N, 4)`): true boxes, likewise; zeros for what is not in the image (see
            [`is_absent`]). A row of NaN takes no part.

    Returns:
        `torch.FloatTensor` of shape `()`: the mean over the rows that are not NaN; 0 if there are none.

    Example:

    ```python
    >>> import torch
    >>> from epmvg_hf.model.losses import score_loss

    >>> box = torch.tensor([[0.5, 0.5, 0.2, 0.2]])
    >>> score_loss(torch.tensor([2.0]), box, labels=box), score_loss(torch.tensor([2.0]), box, labels=0 * box)
    (tensor(0.1269), tensor(2.1269))
    ```
    """
    boxes, labels = pred_boxes.detach().float(), labels.float()
    with_box = has_box(labels)
    boxes, targets = (torch.where(with_box[:, None], rows, 0.5) for rows in (boxes, labels))
    iou = paired_iou(center_to_corners_format(boxes), center_to_corners_format(targets))
    losses = nn.functional.binary_cross_entropy_with_logits(
        score_logits.float(), torch.where(with_box, iou, 0), reduction="none"
    )
    return _mean_over(losses, ~labels.isnan().all(-1))


def map_loss(
    consistency_map: torch.Tensor,
    target: torch.Tensor,
    mask: torch.Tensor,
    row_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    KL divergence from a target distribution over the positions of the feature grid to the softmax of a map over them.
    This is our reading of EpmVG, of which only the abstract is public. The target is either the box (see
    [`box_map_target`]) or the teacher's patch-text map (see [`teacher_map_target`]).

    Args:
        consistency_map (`torch.FloatTensor` of shape `(N, V)`): logits, row-major over the grid.
        target (`torch.FloatTensor` of shape `(N, V)`): distributions over the V positions, 0 where `mask` is False. A
            row of zeros adds 0 to the loss.
        mask (`torch.BoolTensor` of shape `(N, V)`): False on padding. A row that is False throughout adds 0.
        row_mask (`torch.BoolTensor` of shape `(N,)`, *optional*): which rows to average over; by default all. The
            other rows may hold anything, NaN included.

    Returns:
        `torch.FloatTensor` of shape `()`: the mean over these rows; 0 if there are none.

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
    scores = only_on_picture(scores, mask)
    target = torch.where(mask.any(-1, keepdim=True), target, 0)
    return nn.functional.kl_div(scores.log_softmax(-1), target, reduction="sum") / count


def box_map_target(labels: torch.Tensor, visual_mask: torch.Tensor) -> torch.Tensor:
    """
    The box as a distribution over the feature grid: the weight of a cell is the area that it shares with the box.

    Args:
        labels (`torch.FloatTensor` of shape `(N, 4)`): (cx, cy, w, h) in [0, 1] of the padded canvas; a row of NaN has
            no box (see [`has_box`]).
        visual_mask (`torch.BoolTensor` of shape `(N, grid_height, grid_width)`): False on padding.

    Returns:
        `torch.FloatTensor` of shape `(N, grid_height * grid_width)`; 0 on padding. Rows sum to 1, or to 0 if
        there is no box or it touches no unpadded cell; such a row adds nothing to the loss.

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
    # A missing box is replaced by an empty one, which shares no area with any cell.
    labels = torch.where(has_box(labels)[:, None], labels.float(), 0)
    cx, cy, width, height = labels.unbind(-1)
    in_columns = _overlap(cx - width / 2, cx + width / 2, grid_width)
    in_rows = _overlap(cy - height / 2, cy + height / 2, grid_height)
    area = (in_rows[:, :, None] * in_columns[:, None, :] * visual_mask).flatten(1)
    return area / area.sum(-1, keepdim=True).clamp(min=torch.finfo(area.dtype).tiny)


def _generalized_iou_loss(boxes: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """
    One minus the generalized IoU of N pairs of boxes (x0, y0, x1, y1) (Rezatofighi et al. 2019). It has the numbers of
    `torchvision.ops.generalized_box_iou_loss`, which selects the pairs that overlap, so that a GPU is waited for.
    """
    low, high = torch.maximum(boxes, others), torch.minimum(boxes, others)
    intersection, union = _intersection_and_union(boxes, others)
    hull = (low[:, 2] - high[:, 0]) * (low[:, 3] - high[:, 1])
    return 1 - (intersection / (union + 1e-7) - (hull - union) / (hull + 1e-7))


def paired_iou(boxes: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """The intersection over union `(N,)` of N pairs of boxes (x0, y0, x1, y1) in the same unit."""
    intersection, union = _intersection_and_union(boxes, others)
    return intersection / (union + 1e-7)


def _intersection_and_union(boxes: torch.Tensor, others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The areas `(N,)` that N pairs of boxes (x0, y0, x1, y1) share and cover together."""
    low, high = torch.maximum(boxes, others), torch.minimum(boxes, others)
    width, height = high[:, 2] - low[:, 0], high[:, 3] - low[:, 1]
    intersection = torch.where((width > 0) & (height > 0), width * height, 0)
    return intersection, _area(boxes) + _area(others) - intersection


def _area(boxes: torch.Tensor) -> torch.Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _mean_over(values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """
    Mean of `values` `(N,)` over the entries where `rows` `(N,)` is True; 0 if there are none. All shapes are fixed,
    because selecting the rows would make torch.compile break the graph.
    """
    return torch.where(rows, values, 0).sum() / rows.sum().clamp(min=1)


def _overlap(low: torch.Tensor, high: torch.Tensor, cells: int) -> torch.Tensor:
    """How much of the interval [low, high] lies in each of the `cells` equal parts of [0, 1]; shape `(N, cells)`."""
    edges = torch.linspace(0, 1, cells + 1, device=low.device)
    return (torch.minimum(high[:, None], edges[1:]) - torch.maximum(low[:, None], edges[:-1])).clamp(min=0)
