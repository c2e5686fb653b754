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
"""Image processor class for EpmVG (PIL backend)."""

from typing import Any

import numpy as np
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_base import BatchFeature
from transformers.image_utils import PILImageResampling, SizeDict
from transformers.utils import TensorType

from .image_processing_epmvg import EpmVGImageProcessorKwargs, EpmVGImageProcessorMixin, count_channels


class EpmVGImageProcessorPil(EpmVGImageProcessorMixin, PilBackend):
    r"""
    [`EpmVGImageProcessor`] on PIL and NumPy, without torchvision: the same settings, outputs and errors. It resizes
    with PIL as TransVG does, so with the default settings its pixels equal TransVG's.

    EXIF orientation is **not** applied: boxes refer to the pixels as they are stored.

    Example:

    ```python
    >>> from epmvg_hf import EpmVGImageProcessorPil

    >>> image_processor = EpmVGImageProcessorPil(size={"height": 224, "width": 224})
    >>> inputs = image_processor(image, return_tensors="pt")
    >>> inputs["pixel_values"].shape, inputs["original_sizes"]
    (torch.Size([1, 3, 224, 224]), tensor([[128, 113]]))
    ```
    """

    valid_kwargs = EpmVGImageProcessorKwargs

    def _preprocess(
        self,
        images: list[np.ndarray],
        do_resize: bool,
        resample: "PILImageResampling | int | None",
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | tuple[float, ...] | None,
        image_std: float | tuple[float, ...] | None,
        return_tensors: str | TensorType | None,
        **kwargs: Any,
    ) -> BatchFeature:
        channels = count_channels(images)
        original_sizes = np.array([image.shape[-2:] for image in images], dtype=np.int64)
        letterbox = self.letterbox(original_sizes, do_resize=do_resize, **kwargs)

        side = letterbox.canvas
        pixel_values = np.zeros((len(images), channels, side, side), dtype=np.float32)
        pixel_mask = np.zeros((len(images), side, side), dtype=np.int64)
        for index, (top, left, height, width) in enumerate(letterbox.windows()):
            image = images[index]
            if do_resize:
                image = self.resize(image, SizeDict(height=height, width=width), resample)
            if do_rescale:
                image = self.rescale(image, rescale_factor)
            if do_normalize:
                image = self.normalize(image, image_mean, image_std)
            pixel_values[index, :, top : top + height, left : left + width] = image
            pixel_mask[index, top : top + height, left : left + width] = 1

        data = {"pixel_values": pixel_values, "pixel_mask": pixel_mask}
        data |= {"original_sizes": original_sizes, "letterbox": letterbox.to_tensor().numpy()}
        return BatchFeature(data, tensor_type=return_tensors)


__all__ = ["EpmVGImageProcessorPil"]
