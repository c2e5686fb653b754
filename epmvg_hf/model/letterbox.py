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
"""Where a picture lies on the square canvas, and how boxes move between the two."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from transformers.image_transforms import center_to_corners_format, corners_to_center_format


@dataclasses.dataclass(frozen=True)
class Letterbox:
    """
    The places of B pictures on square canvases of one size. Built by [`Letterbox.place`], the only geometry of the
    package: pixels, labels and predicted boxes all go through it, so they cannot disagree.

    The formula is that of TransVG's evaluation transform (djiajunustc/TransVG, `utils/transforms.py`): the picture's
    sides are rounded to whole pixels, while boxes scale by the unrounded `ratio` in both directions.

    Attributes:
        ratio (`torch.DoubleTensor` of shape `(B,)`): canvas pixels per image pixel.
        top, left (`torch.LongTensor` of shape `(B,)`): first canvas row and column of the picture.
        height, width (`torch.LongTensor` of shape `(B,)`): size of the resized picture in canvas pixels.
        image_height, image_width (`torch.LongTensor` of shape `(B,)`): size of the image as given, in its own pixels.
        canvas (`int`): side of the canvas in pixels.

    Example:

    ```python
    >>> import torch
    >>> from epmvg_hf.model.letterbox import Letterbox

    >>> letterbox = Letterbox.place([(480, 640)], canvas=320)
    >>> list(letterbox.windows())
    [(40, 0, 240, 320)]
    >>> labels = letterbox.to_labels(torch.tensor([[0.0, 0.0, 640.0, 480.0]]))
    >>> labels
    tensor([[0.5000, 0.5000, 1.0000, 0.7500]])
    >>> letterbox.to_pixels(labels)
    tensor([[  0.,   0., 640., 480.]])
    ```
    """

    ratio: torch.Tensor
    top: torch.Tensor
    left: torch.Tensor
    height: torch.Tensor
    width: torch.Tensor
    image_height: torch.Tensor
    image_width: torch.Tensor
    canvas: int

    @classmethod
    def place(
        cls,
        image_sizes: torch.Tensor | np.ndarray | Sequence[tuple[int, int]],
        canvas: int,
        pad_offset: float = 0.5,
        placements: Sequence[tuple[int, float, float]] | None = None,
        do_resize: bool = True,
    ) -> "Letterbox":
        """
        Places B pictures on canvases.

        Args:
            image_sizes (`torch.LongTensor` of shape `(B, 2)` or list of `(height, width)`): image sizes in pixels.
            canvas (`int`): side of the canvas in pixels; the longer side of each picture is resized to it.
            pad_offset (`float`, defaults to 0.5): share of the free canvas before the picture, in both directions.
                0.0 is the top-left corner, 0.5 the centre (TransVG's evaluation), 1.0 the bottom-right corner.
            placements (list of `(int, float, float)`, *optional*): for each image, instead of `canvas` and
                `pad_offset`, its longer side in canvas pixels, and the shares of the free height above and of the
                free width left of it.
            do_resize (`bool`, defaults to `True`): if `False`, the pictures keep their sizes (ratio 1).

        Raises:
            ValueError: an image has no pixels, does not fit the canvas (without resizing), or a placement is off.
        """
        sizes = torch.as_tensor(image_sizes, dtype=torch.int64, device="cpu").reshape(-1, 2)
        for index, (height, width) in enumerate(sizes.tolist()):
            if height < 1 or width < 1:
                raise ValueError(f"Image {index} has no pixels: its size is {height} x {width} (height x width).")
            if not do_resize and max(height, width) > canvas:
                raise ValueError(
                    f"With do_resize=False every image must fit the canvas of {canvas} x {canvas}, but image {index} "
                    f"has {height} x {width} pixels (height x width)."
                )

        if placements is None:
            placements = [(canvas, pad_offset, pad_offset)] * len(sizes)
        elif not do_resize:
            raise ValueError("`placements` set the size of the pictures, so they need do_resize=True.")
        elif len(placements) != len(sizes):
            raise ValueError(
                f"`placements` must have one item for each image: got {len(placements)} for {len(sizes)}."
            )
        for index, (long_side, *shares) in enumerate(placements):
            if not (1 <= long_side <= canvas and all(0.0 <= share <= 1.0 for share in shares)):
                raise ValueError(
                    f"Placement {index} is {(long_side, *shares)}, expected a longer side from 1 to {canvas} pixels "
                    "and shares from 0 to 1."
                )

        # In float64, torch's division, rounding (half to even) and floor are those of TransVG's Python.
        placement = torch.tensor(placements, dtype=torch.float64).reshape(-1, 3)
        if do_resize:
            ratio = placement[:, 0] / sizes.amax(dim=1)
            new_sizes = (sizes * ratio[:, None]).round().clamp(min=1).long()
        else:
            ratio = torch.ones(len(sizes), dtype=torch.float64)
            new_sizes = sizes
        offsets = ((canvas - new_sizes) * placement[:, 1:]).floor().long()
        (top, left), (height, width), (image_height, image_width) = (
            pairs.unbind(1) for pairs in (offsets, new_sizes, sizes)
        )
        return cls(ratio, top, left, height, width, image_height, image_width, canvas)

    def select(self, image_index: torch.Tensor) -> "Letterbox":
        """The letterboxes of the images numbered by `image_index` (`torch.LongTensor` of shape `(N,)`), one each."""
        names = (field.name for field in dataclasses.fields(self) if field.name != "canvas")
        return dataclasses.replace(self, **{name: getattr(self, name)[image_index] for name in names})

    def windows(self) -> Iterator[tuple[int, int, int, int]]:
        """For each image the rectangle of its picture on the canvas: (top, left, height, width)."""
        return zip(*(side.tolist() for side in (self.top, self.left, self.height, self.width)), strict=True)

    def to_labels(self, boxes: torch.Tensor) -> torch.Tensor:
        """
        Boxes of the images -> labels.

        Args:
            boxes (`torch.Tensor` of shape `(B, 4)`): one box (x0, y0, x1, y1) for each image, in its pixels, 0-based,
                half-open.

        Returns:
            `torch.Tensor` of shape `(B, 4)`: (centre x, centre y, width, height) in [0, 1] of the canvas, in the dtype
            of `boxes`; neither clipped nor rounded, so that [`Letterbox.to_pixels`] gives the boxes back.
        """
        scale, offset = self._affine(boxes)
        return corners_to_center_format(boxes * scale + offset) / self.canvas

    def to_pixels(self, boxes: torch.Tensor) -> torch.Tensor:
        """
        Labels or predicted boxes -> boxes of the images: the inverse of [`Letterbox.to_labels`], then clipped.

        Args:
            boxes (`torch.Tensor` of shape `(B, 4)`): (centre x, centre y, width, height) in [0, 1] of the canvas.

        Returns:
            `torch.Tensor` of shape `(B, 4)`: (x0, y0, x1, y1) in pixels of the image as given, clipped to it.
        """
        scale, offset = self._affine(boxes)
        corners = (center_to_corners_format(boxes) * self.canvas - offset) / scale
        width, height = self.image_width, self.image_height
        return corners.clamp(min=0).minimum(torch.stack([width, height, width, height], dim=1).to(boxes))

    def _affine(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale (B, 1) and offset (B, 4) from image to canvas pixels, in the dtype and on the device of `like`."""
        offset = torch.stack([self.left, self.top, self.left, self.top], dim=1)
        return self.ratio[:, None].to(like), offset.to(like)
