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
"""Image processor class for EpmVG (torchvision backend)."""

import os
from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    PILImageResampling,
    SizeDict,
    infer_channel_dimension_format,
)
from transformers.processing_utils import ImagesKwargs
from transformers.utils import ModelOutput, TensorType

from .letterbox import Letterbox
from .rgb_images import as_rgb, blend_with_white, open_image, to_levels, to_tensor


class EpmVGImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg] # a TypedDict
    r"""
    pad_offset (`float`, *optional*, defaults to 0.5):
        Share of the free canvas that lies above and left of the picture: 0.0 puts it into the top-left corner, 0.5
        into the centre.
    placements (`list[tuple[int, float, float]]`, or `np.ndarray` or `torch.Tensor` of shape `(B, 3)`, *optional*):
        A place for each image of this call: the longer side of the picture in canvas pixels, the share of the free
        height above it, and the share of the free width left of it. Training draws them at random.
    as_bytes (`bool`, *optional*, defaults to `False`):
        Whether this call leaves colours as bytes, for [`~EpmVGImageProcessor.from_bytes`] to normalise them later.
        Between the processes of a data loader, and on the way to a GPU, a batch is then 5 times smaller.
    """

    pad_offset: float | int | None
    placements: list | tuple | np.ndarray | torch.Tensor | None  # [`Letterbox.place`] looks into them
    as_bytes: bool | None


class EpmVGImageProcessorMixin(BaseImageProcessor):
    """The settings and the geometry of both backends."""

    model_input_names = ["pixel_values", "pixel_mask", "original_sizes", "letterbox"]  # noqa: RUF012

    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"height": 640, "width": 640}  # noqa: RUF012
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    do_pad = True
    pad_offset = 0.5

    def _standardize_kwargs(self, size: Any = None, pad_offset: float | None = None, **kwargs: Any) -> dict:
        """Checks the settings here because this method sees both the saved settings and those of a call."""
        kwargs = super()._standardize_kwargs(size=size, **kwargs)
        size = kwargs["size"]
        if size is None or size.height is None or size.height != size.width or size.height < 1:
            given = size if size is None else dict(size)
            raise ValueError(f'`size` must be a square canvas {{"height": S, "width": S}}, but it is {given}.')
        if pad_offset is None or not 0.0 <= pad_offset <= 1.0:
            raise ValueError(f"`pad_offset` must be a share from 0 to 1, but it is {pad_offset}.")
        return {**kwargs, "pad_offset": pad_offset}

    def to_dict(self) -> dict:
        settings = super().to_dict()
        settings.pop("auto_map", None)
        if self._auto_class is not None:
            # Code is shared along (see `register_for_hub`). transformers would name the saved backend's class alone,
            # and then nobody could load the other one.
            settings["auto_map"] = {
                "AutoImageProcessor": {
                    "torchvision": "image_processing_epmvg.EpmVGImageProcessor",
                    "pil": "image_processing_pil_epmvg.EpmVGImageProcessorPil",
                }
            }
        return settings

    def post_process_object_detection(
        self,
        outputs: ModelOutput,
        threshold: float = 0.1,
        target_sizes: torch.Tensor | list[tuple[int, int]] | None = None,
    ) -> list[dict[str, torch.Tensor]]:
        """
        The detections that `pipeline("zero-shot-object-detection")` asks for: of each expression its box, if its score
        is high enough. [`~EpmVGProcessor.post_process_grounding`] says the same in the terms of grounding.

        Args:
            outputs ([`ModelOutput`]): has `pred_boxes` (N, 4) and `scores` (N,), as [`EpmVGForVisualGrounding`]
                returns them.
            threshold (`float`, *optional*, defaults to 0.1): boxes whose score is not higher are left out.
            target_sizes (`torch.Tensor` of shape `(N, 2)` or list): for each expression the (height, width) of its
                image in pixels.

        Returns:
            `list[dict]`: for each expression `scores` (k,), `labels` (k,), all 0 because an expression is one label,
            and `boxes` (k, 4), xyxy pixels of the image, where k is 0 or 1.

        Raises:
            ValueError: the model has no score head, or `target_sizes` do not match.

        Example:

        ```python
        >>> import torch

        >>> outputs = model(**processor(images=image, text="the star"))
        >>> outputs.scores = torch.tensor([0.9])  # of a model with a score head
        >>> sizes = [(image.height, image.width)]
        >>> (found,) = processor.image_processor.post_process_object_detection(outputs, 0.5, sizes)
        >>> found["boxes"].shape
        torch.Size([1, 4])
        ```
        """
        scores = outputs.get("scores")
        if scores is None:
            raise ValueError(
                "detections need a score for every box, and this model has no score head (config.score_head): use "
                'pipeline("visual-grounding") with the labels as expressions'
            )
        sizes = torch.as_tensor(target_sizes if target_sizes is not None else [])
        if sizes.shape != (len(scores), 2):
            raise ValueError(
                f"`target_sizes` must be one (height, width) for each of the {len(scores)} expressions, but its shape "
                f"is {tuple(sizes.shape)}."
            )
        boxes = self.letterbox(sizes).to_pixels(outputs.pred_boxes.float())
        scores = scores.float().cpu()
        return [
            {"scores": score[kept], "labels": torch.zeros(int(kept.sum()), dtype=torch.long), "boxes": box[kept]}
            for score, box, kept in zip(scores[:, None], boxes[:, None], scores[:, None] > threshold, strict=True)
        ]

    def unnormalize(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        Undoes the normalisation. A CLIP teacher, for one, normalises with another mean and standard deviation.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, 3, S, S)`): what this image processor returned.

        Returns:
            `torch.FloatTensor` of shape `(B, 3, S, S)`: colours in [0, 1]; padding has the mean colour.

        Example:

        ```python
        >>> pixel_values = processor(images=image)["pixel_values"]
        >>> colours = processor.image_processor.unnormalize(pixel_values)
        >>> colours[0, :, 0, 0]  # in a corner, which is padding
        tensor([0.4850, 0.4560, 0.4060])
        ```
        """
        if not self.do_normalize:
            return pixel_values
        mean, std = (
            torch.tensor(values, dtype=pixel_values.dtype, device=pixel_values.device)[:, None, None]
            for values in (self.image_mean, self.image_std)
        )
        return pixel_values * std + mean

    def from_bytes(self, inputs: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """
        Makes what a call returns from what a call with `as_bytes=True` returned, on the device where that lies.

        Args:
            inputs ([`BatchFeature`] or `dict`): inputs of the model. They are changed if their `pixel_values` are
                bytes, or else come back as they are.

        Returns:
            `inputs`, with `pixel_values` `(B, 3, S, S)`, float32, and `pixel_mask` `(B, S, S)`, int64, as a call
            without `as_bytes` with the settings of this image processor makes them.

        Example:

        ```python
        >>> import torch

        >>> image_processor = processor.image_processor
        >>> inputs = image_processor(image, as_bytes=True, return_tensors="pt")
        >>> inputs["pixel_values"].dtype, inputs["pixel_mask"].dtype
        (torch.uint8, torch.bool)
        >>> expected = image_processor(image, return_tensors="pt")["pixel_values"]
        >>> torch.equal(image_processor.from_bytes(inputs)["pixel_values"], expected)
        True
        ```
        """
        pixels = inputs.get("pixel_values")
        if pixels is None or pixels.dtype != torch.uint8:
            return inputs
        mask = inputs["pixel_mask"]
        pixels = pixels.to(torch.float32, memory_format=torch.contiguous_format)
        mean, std = level_statistics(
            self.do_rescale, self.rescale_factor, self.do_normalize, self.image_mean, self.image_std, pixels.device
        )
        inputs["pixel_values"] = pixels.sub_(mean).div_(std).masked_fill_(~mask[:, None], 0)
        inputs["pixel_mask"] = mask.long()
        return inputs

    def letterbox(self, image_sizes: torch.Tensor | np.ndarray | list[tuple[int, int]], **kwargs: Any) -> Letterbox:
        """
        Computes where images of these sizes lie on the canvas. The geometry of a batch that was already prepared is in
        its entry `letterbox`.

        Args:
            image_sizes (`torch.LongTensor` of shape `(B, 2)` or list of `(height, width)`): image sizes in pixels.
            kwargs: any of `size`, `do_resize`, `do_pad`, `pad_offset` and `placements` that differ from the settings
                of this image processor. Its other keyword arguments do not move the picture and are ignored.

        Returns:
            [`Letterbox`]: the places of the B pictures.

        Raises:
            ValueError: an image cannot be placed, see [`Letterbox.place`]; or it leaves padding and `do_pad` is
                `False`.

        Example:

        ```python
        >>> letterbox = processor.image_processor.letterbox([(480, 640)])
        >>> list(letterbox.windows())  # (top, left, height, width) of the picture on a canvas of 64 x 64 pixels
        [(8, 0, 48, 64)]
        ```
        """
        settings: dict[str, Any] = {"do_resize": self.do_resize, "do_pad": self.do_pad, "size": self.size}
        settings |= {"pad_offset": self.pad_offset, "default_to_square": self.default_to_square, **kwargs}
        settings = self._standardize_kwargs(**settings)
        canvas = settings["size"].height
        letterbox = Letterbox.place(
            image_sizes, canvas, settings["pad_offset"], settings.get("placements"), settings["do_resize"]
        )
        if not settings["do_pad"]:
            for index, (_, _, height, width) in enumerate(letterbox.windows()):
                if (height, width) != (canvas, canvas):
                    raise ValueError(
                        f"With do_pad=False every picture must fill the canvas of {canvas} x {canvas}, but that of "
                        f"image {index} has {height} x {width} pixels (height x width)."
                    )
        return letterbox

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """
        Reads images that are given by name. The method of transformers would turn them by their EXIF orientation, so
        that a file and the PIL image opened from it would differ.

        Args:
            image_url_or_urls: an image, or a list of images or of such lists. Those of type `str` or `os.PathLike`
                are read by [`~rgb_images.open_image`], the others come back as they are.

        Example:

        ```python
        >>> processor.image_processor.fetch_images("scene.png").size
        (113, 128)
        ```
        """
        if isinstance(image_url_or_urls, list | tuple):
            return [self.fetch_images(image) for image in image_url_or_urls]
        return open_image(image_url_or_urls) if isinstance(image_url_or_urls, str | os.PathLike) else image_url_or_urls

    def _prepare_images_structure(self, images: Any, expected_ndims: int = 3) -> list:
        return list(single_images(self.fetch_images(images)))

    def _prepare_image_like_inputs(
        self,
        images: Any,
        *args: Any,
        do_convert_rgb: bool | None = None,
        do_rescale: bool | None = None,
        rescale_factor: float | None = None,
        input_data_format: str | ChannelDimension | None = None,
        **kwargs: Any,
    ) -> list:
        """Scales the values of each image by what its type means, before a backend sees it without its number."""
        scaled_already = not do_rescale or rescale_factor == 1
        levels = [
            as_levels(image, f"Image {index}", do_convert_rgb, not scaled_already, input_data_format)
            for index, image in enumerate(self._prepare_images_structure(images))
        ]
        first = ChannelDimension.FIRST
        return super()._prepare_image_like_inputs(
            levels, *args, do_convert_rgb=do_convert_rgb, input_data_format=first, **kwargs
        )

    def _preprocess(
        self,
        images: list[torch.Tensor] | list[np.ndarray],
        do_resize: bool,
        resample: "PILImageResampling | int | None",
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | tuple[float, ...] | None,
        image_std: float | tuple[float, ...] | None,
        return_tensors: str | TensorType | None,
        as_bytes: bool | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        channels = count_channels(images)
        original_sizes = torch.tensor([image.shape[-2:] for image in images])
        letterbox = self.letterbox(original_sizes, do_resize=do_resize, **kwargs)

        side = letterbox.canvas
        device = images[0].device if isinstance(images[0], torch.Tensor) else torch.device("cpu")
        mean, std = level_statistics(do_rescale, rescale_factor, do_normalize, image_mean, image_std, device)
        if as_bytes:
            # The channels of a pixel stay side by side, as in the pictures: parting them takes three times as long.
            pixel_values = zeros((len(images), side, side, channels), torch.uint8, device).permute(0, 3, 1, 2)
        else:
            pixel_values = zeros((len(images), channels, side, side), torch.float32, device)
        pixel_mask = zeros((len(images), side, side), torch.bool if as_bytes else torch.int64, device)
        for index, (top, left, height, width) in enumerate(letterbox.windows()):
            image = images[index]
            if do_resize:
                image = self.resize(image, SizeDict(height=height, width=width), resample)
            image = image if isinstance(image, torch.Tensor) else torch.tensor(image)
            if as_bytes and image.dtype != torch.uint8:
                raise ValueError(f"`as_bytes` needs images of bytes, but image {index} has the type {image.dtype}.")
            picture = pixel_values[index, :, top : top + height, left : left + width]
            picture.copy_(image)
            if not as_bytes:  # The numbers are written once, to where they stay, and changed there.
                picture.sub_(mean).div_(std)
            pixel_mask[index, top : top + height, left : left + width] = 1

        data = {"pixel_values": pixel_values, "pixel_mask": pixel_mask}
        data |= {"original_sizes": original_sizes, "letterbox": letterbox.to_tensor()}
        return BatchFeature(data, tensor_type=return_tensors)


def single_images(images: Any) -> Iterator[Any]:
    """Lists the images in nested lists and in batches, which are arrays with 4 dimensions."""
    if isinstance(images, list | tuple) or (isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 4):
        for part in images:
            yield from single_images(part)
    else:
        yield images


def as_levels(
    image: Any,
    name: str,
    do_convert_rgb: bool | None,
    do_rescale: bool,
    input_data_format: str | ChannelDimension | None,
) -> Image.Image | torch.Tensor:
    """
    Makes an RGB image, or a tensor with the channels first, of an image of any type.

    Args:
        image (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor`): the image.
        name (`str`): what an error calls the image.
        do_convert_rgb (`bool`, *optional*): whether transparency is blended with white, and other modes become RGB.
        do_rescale (`bool`): whether the values of an array are scaled by what its type means; else they stay as they
            are. Bytes are levels from 0 to 255 in both cases.
        input_data_format (`str` or `ChannelDimension`, *optional*): where an array has its channels.

    Returns:
        `PIL.Image.Image` of mode RGB, or a tensor of shape `(channels, height, width)`: bytes, or float32 if
        `do_rescale` is `False` and the array does not have bytes.

    Raises:
        ValueError: it is no image, it has a shape that no image has, or its values have no known meaning.
    """
    if isinstance(image, Image.Image):
        if do_convert_rgb:
            return as_rgb(image, name)
        if image.mode in ("P", "PA"):
            raise ValueError(f"{name} has a palette, so its pixels need do_convert_rgb=True to become colours.")
        image = np.array(image)
    if not isinstance(image, np.ndarray | torch.Tensor):
        raise ValueError(
            f"{name} is a value of type {type(image).__name__}, expected a PIL image, an array, a tensor, or the "
            "path, http(s) URL or base64 data of an image."
        )
    pixels = image if isinstance(image, torch.Tensor) else to_tensor(image, name)
    shape = tuple(pixels.shape)
    expected = "expected (height, width), or that with 1, 3 or 4 channels before or after it (gray, RGB or RGBA)"
    if pixels.ndim == 2:
        pixels = pixels[None]
    elif pixels.ndim != 3 or (input_data_format is None and not {shape[0], shape[-1]} & {1, 3, 4}):
        raise ValueError(f"{name} has the shape {shape}, {expected}.")
    elif (input_data_format or infer_channel_dimension_format(pixels, (1, 3, 4))) == ChannelDimension.LAST:
        pixels = pixels.permute(2, 0, 1)
    if do_convert_rgb and len(pixels) not in (1, 3, 4):
        raise ValueError(f"{name} has the shape {shape}, {expected}.")

    if do_rescale:
        pixels = to_levels(pixels, name)
    elif pixels.dtype != torch.uint8:
        pixels = pixels.float()
    if do_convert_rgb and len(pixels) == 4 and pixels.dtype == torch.uint8:
        pixels = blend_with_white(pixels)
    return pixels


def count_channels(images: list) -> int:
    """
    The number of channels that channels-first images share.

    Raises:
        ValueError: there is no image, or their numbers differ (which takes `do_convert_rgb=False`).
    """
    channels = {image.shape[0] for image in images}
    if not channels:
        raise ValueError("`images` is empty, expected at least one image.")
    if len(channels) > 1:
        raise ValueError(f"The images of a batch differ in their numbers of channels: {sorted(channels)}.")
    return channels.pop()


def to_array(image: Image.Image) -> np.ndarray:
    """
    The pixels of an RGB image as an array (height, width, 3). `np.array(image)` copies all of it three times. Here the
    copies are strips of 1/4 MB, which stay in the cache of the processor: half of the time for a photo.
    """
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    rows = max(1, 2**16 // max(1, image.width))
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        pixels[top:bottom] = np.asarray(image.crop((0, top, image.width, bottom)))
    return pixels


def level_statistics(
    do_rescale: bool,
    rescale_factor: float,
    do_normalize: bool,
    image_mean: float | Sequence[float] | None,
    image_std: float | Sequence[float] | None,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Mean and standard deviation of the levels of an image, each of shape `(C, 1, 1)` or `(1, 1, 1)`, such that
    `(levels - mean) / std` rescales and normalises, as far as the settings ask for it.
    """
    mean = torch.tensor(image_mean if do_normalize else 0.0, device=device).reshape(-1, 1, 1)
    std = torch.tensor(image_std if do_normalize else 1.0, device=device).reshape(-1, 1, 1)
    levels = 1.0 / rescale_factor if do_rescale else 1.0
    return mean * levels, std * levels


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """
    A tensor of zeros. On the CPU, NumPy allocates it: NumPy takes pages from the system that are zero already, while
    torch writes every zero. This halves the time of a batch of 640 x 640 pixels.
    """
    if device.type == "cpu":
        return torch.from_numpy(np.zeros(shape, torch.empty(0, dtype=dtype).numpy().dtype))
    return torch.zeros(shape, dtype=dtype, device=device)


class EpmVGImageProcessor(EpmVGImageProcessorMixin, TorchvisionBackend):
    r"""
    Resizes images to a square canvas without changing their aspect ratio: the longer side gets the length of the
    canvas, and the rest of it is padded with 0 after normalisation. With the default settings this is the evaluation
    transform of TransVG (djiajunustc/TransVG, `datasets/transforms.py`). Some pixels differ from TransVG's by one of
    255 levels, because TransVG resizes with PIL; those of [`EpmVGImageProcessorPil`] (`backend="pil"`) are the same.

    Images are PIL images, arrays or tensors (channels first or last; gray ones with or without a channel axis), paths,
    http(s) URLs or base64 data. EXIF orientation is **not** applied, in files neither: boxes refer to the pixels as
    they are stored. For an array with a side of 3 pixels pass `input_data_format`, because that side cannot be told
    from the channels.

    What the numbers of an image mean follows from their type, and both backends round them to the same levels from 0
    to 255 before they resize. Bytes are levels. Of 16 bits (`uint16`, or a mode of PIL that begins with `"I;16"`),
    65,535 is white, of booleans, `True` is. Floats within [0, 1] are fractions of white; floats within [0, 255], and
    integers of other types, are levels. Everything else is an error. With `do_rescale=False` or `rescale_factor=1`,
    the values of arrays have already been scaled and are taken as they are, but PIL images are levels nevertheless.
    Transparent pixels are blended with white.

    Args:
        size (`dict[str, int]`, *optional*, defaults to `{"height": 640, "width": 640}`):
            The canvas, which must be square.
        pad_offset (`float`, *optional*, defaults to 0.5):
            Share of the free canvas that lies above and left of the picture: 0.0 is the top-left corner, 0.5 the
            centre.
        do_resize (`bool`, *optional*, defaults to `True`):
            If `False`, pictures keep their sizes and must fit the canvas.
        do_pad (`bool`, *optional*, defaults to `True`):
            If `False`, pictures must fill the canvas.
        kwargs:
            The other common options (`resample`, `do_rescale`, `rescale_factor`, `do_normalize`, `image_mean`,
            `image_std`, `do_convert_rgb`), by default bilinear with antialias and ImageNet statistics.

    A call returns a `BatchFeature` with

    - **pixel_values** (`torch.FloatTensor` of shape `(B, 3, S, S)`),
    - **pixel_mask** (`torch.LongTensor` of shape `(B, S, S)`) -- 1 on the picture, 0 on padding,
    - **original_sizes** (`torch.LongTensor` of shape `(B, 2)`) -- (height, width) of the images as given,
    - **letterbox** (`torch.LongTensor` of shape `(B, 4)`) -- where this call placed the pictures, which
      [`~EpmVGProcessor.post_process_grounding`] reads: (longer side of the picture on the canvas, top, left, S).

    It raises a `ValueError` for images without pixels, for values without a known meaning, for files that cannot be
    read, and for settings that place a picture off the canvas.

    Example:

    ```python
    >>> from epmvg_hf import EpmVGImageProcessor

    >>> image_processor = EpmVGImageProcessor(size={"height": 224, "width": 224})
    >>> inputs = image_processor(image, return_tensors="pt")
    >>> inputs["pixel_values"].shape, inputs["original_sizes"]
    (torch.Size([1, 3, 224, 224]), tensor([[128, 113]]))
    ```
    """

    valid_kwargs = EpmVGImageProcessorKwargs

    def process_image(self, image: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if isinstance(image, Image.Image) and image.mode == "RGB":
            # The channels of a pixel stay side by side, as PIL has them: torchvision resizes such bytes in less than
            # half of the time, to the same values.
            return torch.from_numpy(to_array(image)).permute(2, 0, 1).to(kwargs.get("device"))
        return super().process_image(image, *args, **kwargs)

    def resize(self, image: torch.Tensor, size: SizeDict, *args: Any, **kwargs: Any) -> torch.Tensor:
        if size.height == size.width == 1:
            # To make one pixel of bytes, torch needs the channels of a pixel side by side, or fails an internal check.
            image = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        return super().resize(image, size, *args, **kwargs)


__all__ = ["EpmVGImageProcessor", "EpmVGImageProcessorKwargs"]
