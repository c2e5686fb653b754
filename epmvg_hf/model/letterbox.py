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
"""The geometry between an image and the square canvas that the model sees: where the picture lies, how boxes move."""

import dataclasses
import reprlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn
from transformers.image_transforms import center_to_corners_format, corners_to_center_format

# How many pixels a box may stick out of its image: some annotators round boxes outwards or include the last pixel.
MAX_OVERHANG = 1.0


@dataclasses.dataclass(frozen=True)
class Letterbox:
    """
    The places of B pictures on square canvases of one size. [`Letterbox.place`] decides them, and no other code of the
    package computes them again: pixels, labels and predicted boxes use the same letterbox, so they cannot disagree.

    The formula is that of TransVG's evaluation transform (djiajunustc/TransVG, `utils/transforms.py`): the sides of
    the resized picture are rounded to whole pixels, while boxes scale by the unrounded `ratio` in both directions.

    Attributes:
        ratio (`torch.DoubleTensor` of shape `(B,)`): canvas pixels per image pixel.
        top, left (`torch.LongTensor` of shape `(B,)`): first canvas row and column of the picture.
        height, width (`torch.LongTensor` of shape `(B,)`): size of the resized picture in canvas pixels.
        image_height, image_width (`torch.LongTensor` of shape `(B,)`): size of the original image in its own pixels.
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
        placements: Sequence[tuple[int, float, float]] | np.ndarray | torch.Tensor | None = None,
        do_resize: bool = True,
    ) -> "Letterbox":
        """
        Places B pictures on canvases.

        Args:
            image_sizes (`torch.LongTensor` of shape `(B, 2)` or list of `(height, width)`): image sizes in pixels.
            canvas (`int`): side of the canvas in pixels; the longer side of each picture is resized to it.
            pad_offset (`float`, *optional*, defaults to 0.5): share of the free canvas that lies above and left of the
                picture. 0.0 is the top-left corner, 0.5 the centre (TransVG's evaluation), 1.0 the bottom-right.
            placements (list of `(int, float, float)`, `np.ndarray` or `torch.Tensor` of shape `(B, 3)`, *optional*): a
                place for each image, which replaces `canvas` as the length of the longer side and `pad_offset`: the
                longer side of the picture in canvas pixels, the share of the free height above it, and the share of
                the free width left of it.
            do_resize (`bool`, *optional*, defaults to `True`): if `False`, the pictures keep their sizes (ratio 1).

        Raises:
            ValueError: an image has no pixels; an image does not fit the canvas and `do_resize` is `False`; or
                `placements` do not match the images or leave the canvas.
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
        placement = _to_rows(placements)
        if len(placement) != len(sizes):
            raise ValueError(f"`placements` must have one item for each image: got {len(placement)} for {len(sizes)}.")
        for index, (long_side, *shares) in enumerate(placement.tolist()):
            is_length = 1 <= long_side <= canvas and long_side == int(long_side)
            if not is_length or not all(0.0 <= share <= 1.0 for share in shares):
                raise ValueError(
                    f"Placement {index} is {(long_side, *shares)}, expected a longer side that is a whole number of "
                    f"pixels from 1 to {canvas}, and two shares from 0 to 1."
                )

        long_sides = placement[:, 0].long() if do_resize else sizes.amax(dim=1)
        ratio, new_sizes = _resize(sizes, long_sides)
        top, left = ((canvas - new_sizes) * placement[:, 1:]).floor().long().unbind(1)
        return cls(ratio, top, left, new_sizes[:, 0], new_sizes[:, 1], sizes[:, 0], sizes[:, 1], canvas)

    def to_tensor(self) -> torch.Tensor:
        """
        Packs the letterbox into one tensor, so that it can travel in a batch.

        Returns:
            `torch.LongTensor` of shape `(B, 4)`: (longer side of the picture in canvas pixels, top, left, side of the
            canvas). They are whole numbers because a batch that is cast to bfloat16 keeps those exactly; the unrounded
            ratio follows from them and the sizes of the images, see [`Letterbox.from_tensor`].
        """
        long_sides = torch.maximum(self.height, self.width)
        return torch.stack([long_sides, self.top, self.left, torch.full_like(self.top, self.canvas)], dim=1)

    @classmethod
    def from_tensor(cls, letterbox: torch.Tensor | np.ndarray, image_sizes: torch.Tensor | np.ndarray) -> "Letterbox":
        """
        Unpacks the tensor that [`Letterbox.to_tensor`] made.

        Args:
            letterbox (`torch.LongTensor` of shape `(B, 4)`): an image processor's `letterbox`.
            image_sizes (`torch.LongTensor` of shape `(B, 2)`): its `original_sizes`, (height, width) of each image.

        Returns:
            [`Letterbox`]: on the CPU.

        Raises:
            ValueError: the two have other shapes, or the canvases differ in size.
        """
        packed, sizes = (torch.as_tensor(values).cpu() for values in (letterbox, image_sizes))
        if packed.shape != (len(sizes), 4) or sizes.shape != (len(sizes), 2):
            raise ValueError(
                f"`letterbox` must have the shape (B, 4) and the sizes of the images (B, 2), but they have "
                f"{tuple(packed.shape)} and {tuple(sizes.shape)}."
            )
        long_sides, top, left, canvases = packed.unbind(1)
        if len(canvases.unique()) != 1:
            sides = canvases.unique().tolist()
            raise ValueError(f"The pictures of a batch must share one canvas side, but `letterbox` has {sides}.")
        ratio, new_sizes = _resize(sizes, long_sides)
        return cls(
            ratio, top, left, new_sizes[:, 0], new_sizes[:, 1], sizes[:, 0], sizes[:, 1], canvas=int(canvases[0])
        )

    def __len__(self) -> int:
        return len(self.ratio)

    def select(self, image_index: torch.Tensor) -> "Letterbox":
        """The letterboxes of the images numbered by `image_index` (`torch.LongTensor` of shape `(N,)`), one each."""
        names = (field.name for field in dataclasses.fields(self) if field.name != "canvas")
        return dataclasses.replace(self, **{name: getattr(self, name)[image_index] for name in names})

    def windows(self) -> Iterator[tuple[int, int, int, int]]:
        """For each image the rectangle of its picture on the canvas: (top, left, height, width)."""
        return zip(*(side.tolist() for side in (self.top, self.left, self.height, self.width)), strict=True)

    def to_labels(self, boxes: torch.Tensor) -> torch.Tensor:
        """
        Turns boxes of the images into labels.

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
        Turns labels or predicted boxes into boxes of the images: the inverse of [`Letterbox.to_labels`], then clipped.

        Args:
            boxes (`torch.Tensor` of shape `(B, 4)`): (centre x, centre y, width, height) in [0, 1] of the canvas.

        Returns:
            `torch.Tensor` of shape `(B, 4)`: (x0, y0, x1, y1) in pixels of the original image, clipped to it.
        """
        scale, offset = self._affine(boxes)
        corners = (center_to_corners_format(boxes) * self.canvas - offset) / scale
        width, height = self.image_width, self.image_height
        return corners.clamp(min=0).minimum(torch.stack([width, height, width, height], dim=1).to(boxes))

    def to_picture_maps(self, maps: torch.Tensor, visual_mask: torch.Tensor) -> list[torch.Tensor]:
        """
        Turns maps over the canvas into maps over the pictures. The edges of a picture seldom lie between two cells of
        the canvas, so the cells of its map are interpolated between those of the canvas that show the picture.

        Args:
            maps (`torch.FloatTensor` of shape `(B, grid_height, grid_width)`): one map over the canvas for each image.
            visual_mask (`torch.BoolTensor` of shape `(B, grid_height, grid_width)`): False on padding, whose values
                are not read.

        Returns:
            `list[torch.FloatTensor]`: for each image a map `(rows, columns)` that divides the whole picture evenly
            into cells about as large as those of the canvas.

        Example:

        ```python
        >>> import torch
        >>> from epmvg_hf.model.letterbox import Letterbox

        >>> letterbox = Letterbox.place([(480, 640)], canvas=320)  # the picture has the canvas rows 40 to 280
        >>> on_picture = torch.zeros(1, 8, 8, dtype=torch.bool)
        >>> on_picture[:, 1:7] = True
        >>> canvas_map = torch.arange(8.0)[None, :, None].expand(1, 8, 8)
        >>> (picture_map,) = letterbox.to_picture_maps(canvas_map, on_picture)
        >>> picture_map.shape, picture_map[:, 0]
        (torch.Size([6, 8]), tensor([1., 2., 3., 4., 5., 6.]))
        ```
        """
        return [
            _interpolate(canvas_map, on_picture, window, self.canvas)
            for canvas_map, on_picture, window in zip(maps, visual_mask, self.windows(), strict=True)
        ]

    def _affine(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale (B, 1) and offset (B, 4) from image to canvas pixels, in the dtype and on the device of `like`."""
        offset = torch.stack([self.left, self.top, self.left, self.top], dim=1)
        return self.ratio[:, None].to(like), offset.to(like)


def _interpolate(
    canvas_map: torch.Tensor, on_picture: torch.Tensor, window: tuple[int, int, int, int], canvas: int
) -> torch.Tensor:
    """The part of a map `(grid_height, grid_width)` that lies in a window (top, left, height, width) of the canvas."""
    points, parts = [], []
    for axis in (0, 1):
        # In cells of the canvas: where the picture begins, how long it is, and which of them show it.
        begin, length = (side * canvas_map.shape[axis] / canvas for side in (window[axis], window[axis + 2]))
        cells = on_picture.any(dim=1 - axis).nonzero()
        first, end = int(cells.min()), int(cells.max()) + 1
        parts.append(slice(first, end))
        count = max(1, round(length))
        centres = begin + (torch.arange(count) + 0.5) * length / count
        # grid_sample wants points from -1 to 1 between the outer edges of these cells.
        points.append((centres - first) / (end - first) * 2 - 1)
    y, x = torch.meshgrid(*points, indexing="ij")
    # Those beyond the centres of the outermost cells have the values of these, not of the padding beside them.
    return nn.functional.grid_sample(
        canvas_map[tuple(parts)][None, None],
        torch.stack([x, y], dim=-1)[None].to(canvas_map),
        padding_mode="border",
        align_corners=False,
    )[0, 0]


def _to_rows(placements: Sequence[tuple[int, float, float]] | np.ndarray | torch.Tensor) -> torch.Tensor:
    """Placements as a `torch.DoubleTensor` of shape `(B, 3)`."""
    expected = "`placements` must be three numbers for each image, an array of shape (B, 3), but they are"
    try:
        is_tensor = isinstance(placements, torch.Tensor)
        rows = torch.as_tensor(placements if is_tensor else np.asarray(placements, np.float64)).double().cpu()
    except (TypeError, ValueError):
        raise ValueError(f"{expected} {reprlib.repr(placements)}.") from None
    if rows.numel() and (rows.dim() != 2 or rows.shape[1] != 3):
        raise ValueError(f"{expected} of shape {tuple(rows.shape)}.")
    return rows.reshape(-1, 3)


def _resize(sizes: torch.Tensor, long_sides: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The ratio `(B,)` that makes the longer side of images of `sizes` `(B, 2)` as long as `long_sides` `(B,)`, and the
    sizes of the resized pictures `(B, 2)`.
    """
    # TransVG computes in Python, whose division and rounding (half to even) are those of torch's float64.
    ratio = long_sides.double() / sizes.amax(dim=1)
    return ratio, (sizes * ratio[:, None]).round().clamp(min=1).long()
