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

    def _affine(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale (B, 1) and offset (B, 4) from image to canvas pixels, in the dtype and on the device of `like`."""
        offset = torch.stack([self.left, self.top, self.left, self.top], dim=1)
        return self.ratio[:, None].to(like), offset.to(like)


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
