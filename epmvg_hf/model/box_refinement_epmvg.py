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
"""A second look at a predicted box: the visual tokens in it and around it say how to move its edges."""

import torch
from torch import nn
from transformers.utils.generic import maybe_autocast

from .configuration_epmvg import EpmVGConfig
from .feature_grid import only_on_picture

# Points on each axis, in widths or heights of the box from its centre. The edges lie at -0.5 and 0.5.
POINTS = (-0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75)
# How far below its highest value the consistency map is told apart.
MAP_RANGE = 10.0


class EpmVGBoxRefinement(nn.Module):
    """
    Corrects boxes by what lies at 7 x 7 points in and around each, as the second stage of a detector does (our
    reading; the corrections are those of R-CNN, Girshick et al. 2014, appendix C). A box head that reads means of
    tokens does not see where things end. New refinements leave boxes as they are.

    Args:
        config ([`EpmVGConfig`]): the architecture.
    """

    def __init__(self, config: EpmVGConfig):
        super().__init__()
        channels, hidden = config.d_model // 4, config.d_model // 2
        self.token_projection = nn.Linear(config.d_model, channels)
        self.reg_projection = nn.Linear(config.d_model, channels)
        self.hidden_layer = nn.Linear(len(POINTS) ** 2 * (channels + 1), hidden)
        self.correction = nn.Linear(hidden, 4)

    def forward(
        self,
        boxes: torch.Tensor,
        tokens: torch.Tensor,
        reg_state: torch.Tensor,
        consistency_map: torch.Tensor,
        visual_mask: torch.Tensor,
    ) -> torch.Tensor:
        """
        Args:
            boxes (`torch.FloatTensor` of shape `(N, 4)`): (cx, cy, w, h) in [0, 1] of the padded canvas.
            tokens (`torch.FloatTensor` of shape `(N, grid_height * grid_width, d_model)`): visual tokens, row-major.
            reg_state (`torch.FloatTensor` of shape `(N, d_model)`): state of `[REG]`.
            consistency_map (`torch.FloatTensor` of shape `(N, grid_height * grid_width)`): logits over the grid.
            visual_mask (`torch.BoolTensor` of shape `(N, grid_height, grid_width)`): False on padding.

        Returns:
            `torch.FloatTensor` of shape `(N, 4)`: the corrected boxes, likewise, float32.
        """
        mask = visual_mask.flatten(1)
        scores = only_on_picture(consistency_map.float(), mask)
        relevance = ((scores - scores.amax(-1, keepdim=True)) / MAP_RANGE).clamp(min=-1)
        seen = torch.relu(self.token_projection(tokens) + self.reg_projection(reg_state)[:, None])
        seen = seen.float().masked_fill(~mask[..., None], 0)
        seen = torch.cat([seen, relevance[..., None]], dim=-1)
        looked_at = sample_around(seen.transpose(1, 2).unflatten(-1, visual_mask.shape[1:]), boxes.detach())
        hidden = torch.relu(self.hidden_layer(looked_at.flatten(1).to(tokens.dtype)))
        move, stretch = self.correction(hidden).float().split(2, dim=-1)
        centre, size = boxes.split(2, dim=-1)
        return torch.cat([centre + move * size, size * stretch.exp()], dim=-1).clamp(0, 1)


def sample_around(maps: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """
    The values of maps at 7 x 7 points in and around boxes, interpolated between cells. Points beyond the canvas have
    the values of its edge.

    Args:
        maps (`torch.FloatTensor` of shape `(N, C, grid_height, grid_width)`): a map over the canvas for each box.
        boxes (`torch.FloatTensor` of shape `(N, 4)`): (cx, cy, w, h) in [0, 1] of the canvas.

    Returns:
        `torch.FloatTensor` of shape `(N, C, 7, 7)`: the first row lies a quarter of the height above the box, the
        second on its upper edge, the fourth in its middle; columns likewise.

    Example:

    ```python
    >>> import torch
    >>> from epmvg_hf.model.box_refinement_epmvg import sample_around

    >>> columns = torch.arange(8.0).expand(1, 1, 8, 8)  # the middle of the canvas lies between columns 3 and 4
    >>> sample_around(columns, torch.tensor([[0.5, 0.5, 0.5, 0.5]]))[0, 0, 3]
    tensor([0.5000, 1.5000, 2.5000, 3.5000, 4.5000, 5.5000, 6.5000])
    ```
    """
    steps = boxes.new_tensor(POINTS)
    x = boxes[:, :1] + boxes[:, 2:3] * steps
    y = boxes[:, 1:2] + boxes[:, 3:] * steps
    # grid_sample wants (x, y) from -1 to 1 between the outer edges of the canvas.
    points = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1) * 2 - 1
    # Points in bfloat16 would lie beside the edges of small boxes.
    with maybe_autocast(maps.device.type, enabled=False):
        return nn.functional.grid_sample(maps, points, padding_mode="border", align_corners=False)
