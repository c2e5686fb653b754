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
"""Images from anywhere and of any type as RGB with levels from 0 to 255, or an error where these cannot be known."""

import base64
import io
import os
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import httpx
from PIL import Image, ImageOps

# A tolerance for fractions and levels that were computed. Half a level of 255, so it changes no picture.
ROUNDING = 0.5 / 255


def open_image(source: Any, timeout: float | None = None, upright: bool = False) -> Image.Image:
    """
    Reads an image in the mode in which it is stored, while `load_image` of transformers converts it as Pillow does.

    Args:
        source (`str`, `os.PathLike` or `PIL.Image.Image`): the path of an image file, an http(s) URL, base64 data, or
            an image, which may not have read its file yet.
        timeout (`float`, *optional*): the seconds to wait for an image from the web.
        upright (`bool`, *optional*, defaults to `False`): whether to turn it by its EXIF orientation, as programs that
            display images do.

    Raises:
        ValueError: the image cannot be read, for whatever reason.

    Example:

    ```python
    >>> from epmvg_hf.model.rgb_images import open_image

    >>> open_image("scene.png").size
    (113, 128)
    ```
    """
    try:
        image = source if isinstance(source, Image.Image) else Image.open(_find(source, timeout))
        image.load()
        return ImageOps.exif_transpose(image) if upright else image
    except Exception as error:
        # Pillow, file systems and HTTP clients raise many types, most of which do not say which image it was.
        named = isinstance(source, str | os.PathLike)
        given = f"{os.fspath(source)!r:.100}" if named else f"a value of type {type(source).__name__}"
        raise ValueError(
            f"`image` is {given}, which cannot be read ({type(error).__name__}): expected a PIL image, the path of an "
            "image file, an http(s) URL or base64 data."
        ) from error


def as_rgb(image: Image.Image, name: str = "The image") -> Image.Image:
    """
    Makes an RGB image, 8 bits per channel, of an image of any mode. Pillow's own `convert("RGB")` cuts 16-bit levels
    off at 255, so that they become white, takes fractions for levels, so that they become black, and shows the colour
    that happens to lie under transparent pixels.

    * 16-bit gray (`"I;16"` and its kinds) is divided by 257, which makes 65,535 the level 255.
    * 32-bit gray (`"I"`) with values up to 255 is taken as it is. With values up to 65,535 it is taken as 16-bit gray,
      because that is how Pillow reads files of 16 bits that it has no other mode for, such as PGM.
    * Gray of floating point (`"F"`) is scaled as [`to_levels`] scales arrays.
    * What is transparent is blended with white.

    Args:
        image (`PIL.Image.Image`): the image.
        name (`str`, *optional*): what an error calls the image.

    Returns:
        `PIL.Image.Image`: the image itself if it is an RGB image without transparency, or else a new one.

    Raises:
        ValueError: the image is of mode `"I"` or `"F"` and its values can be neither levels nor fractions.

    Example:

    ```python
    >>> import numpy as np
    >>> from PIL import Image
    >>> from epmvg_hf.model.rgb_images import as_rgb

    >>> gray = Image.fromarray(np.array([[0, 32896, 65535]], np.uint16))
    >>> [as_rgb(gray).getpixel((x, 0)) for x in range(3)]
    [(0, 0, 0), (128, 128, 128), (255, 255, 255)]
    ```
    """
    if image.mode[0] in "IF":
        image = _to_8_bits(image, name)
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")  # the only mode that Pillow converts it to
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def to_tensor(array: np.ndarray, name: str = "The image") -> torch.Tensor:
    """
    The values of an array as a tensor, which shares its memory where torch can: it knows no foreign byte order and no
    negative strides (as of `array[..., ::-1]`), and warns about arrays that cannot be written to.

    Args:
        array (`np.ndarray`): an array of any shape.
        name (`str`, *optional*): what an error calls the array.

    Raises:
        ValueError: torch has no such type of numbers.

    Example:

    ```python
    >>> import numpy as np
    >>> from epmvg_hf.model.rgb_images import to_tensor

    >>> to_tensor(np.array([1, 2, 3], ">u2")[::-1])
    tensor([3, 2, 1], dtype=torch.uint16)
    ```
    """
    shareable = array.flags.writeable and min(array.strides, default=0) >= 0
    try:
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="K", copy=not shareable))
    except TypeError:
        raise ValueError(f"{name} has values of the type {array.dtype}, expected integers or floats.") from None


def to_levels(values: torch.Tensor, name: str = "The image") -> torch.Tensor:
    """
    Levels from 0 to 255 of an image as a tensor of any type. Bytes are levels already. The type of 16-bit unsigned
    integers says that 65,535 is white, and that of booleans that `True` is. Floats within [0, 1] are fractions of
    white, those within [0, 255] are levels, as are all other integers, which must lie within [0, 255].

    Args:
        values (`torch.Tensor`): a tensor of any shape.
        name (`str`, *optional*): what an error calls the image.

    Returns:
        `torch.ByteTensor` of the same shape: the rounded levels.

    Raises:
        ValueError: values are not finite or lie outside of these ranges; or all are less than 2 but some beyond 1, so
            that they could be overshooting fractions as well as levels of an almost black picture.

    Example:

    ```python
    >>> import torch
    >>> from epmvg_hf.model.rgb_images import to_levels

    >>> to_levels(torch.tensor([0.0, 0.5, 1.0]))
    tensor([  0, 128, 255], dtype=torch.uint8)
    ```
    """
    if values.dtype == torch.uint8:
        return values
    if values.dtype == torch.bool:
        return values.to(torch.uint8) * 255
    if values.dtype == torch.uint16:
        return ((values.to(torch.int32) + 128) // 257).to(torch.uint8)
    if values.is_complex():
        raise ValueError(f"{name} has values of the type {values.dtype}, expected integers or floats.")
    numbers = values.float() if values.is_floating_point() else values.long()
    if not numbers.numel():
        return numbers.to(torch.uint8)  # which has no pixels, and that is reported where images are placed
    low, high = (extreme.item() for extreme in numbers.aminmax())
    given = f"{name} has {str(values.dtype).removeprefix('torch.')} values"
    if low != low:
        raise ValueError(f"{given} that are not numbers (NaN).")
    given = f"{given} from {low:.6g} to {high:.6g}"
    is_float = numbers.is_floating_point()
    if not (low >= -ROUNDING and high <= 255 + ROUNDING):
        others = "fractions from 0 to 1" if is_float else "the type uint16 with levels from 0 to 65535"
        raise ValueError(
            f"{given}, expected levels from 0 to 255 or {others}; do_rescale=False takes an array as it is."
        )
    if is_float and high < 2:
        if high > 1 + ROUNDING:
            raise ValueError(f"{given}, which may be fractions beyond 1 or levels of an almost black picture.")
        numbers = numbers * 255
    return numbers.float().round_().clamp_(0, 255).to(torch.uint8)


def blend_with_white(pixels: torch.Tensor) -> torch.Tensor:
    """
    Makes RGB of RGBA as [`as_rgb`] does, to the same levels.

    Args:
        pixels (`torch.ByteTensor` of shape `(4, H, W)`): levels, the last channel being the opacity.

    Returns:
        `torch.ByteTensor` of shape `(3, H, W)`.

    Example:

    ```python
    >>> import torch
    >>> from epmvg_hf.model.rgb_images import blend_with_white

    >>> blend_with_white(torch.tensor([0, 100, 200, 51], dtype=torch.uint8).reshape(4, 1, 1)).flatten()
    tensor([204, 224, 244], dtype=torch.uint8)
    ```
    """
    colours, opacity = pixels.int().split([3, 1])
    return ((colours * opacity + 255 * (255 - opacity) + 127) // 255).to(torch.uint8)


def _find(source: Any, timeout: float | None) -> Any:
    """What Pillow can open: a path, or a file of the data."""
    if not isinstance(source, str):
        return os.fspath(source)
    if source.startswith(("http://", "https://")):
        return io.BytesIO(httpx.get(source, timeout=timeout, follow_redirects=True).content)
    if os.path.exists(source):  # noqa: PTH110 (Path.exists raises an error for data longer than a path can be)
        return source
    try:
        return io.BytesIO(base64.b64decode("".join(source.rpartition(",")[2].split()), validate=True))
    except ValueError:
        raise ValueError("neither a file nor base64 data") from None


def _to_8_bits(image: Image.Image, name: str) -> Image.Image:
    """Gray with 8 bits, of gray with more; transparency that is given as a level becomes a channel."""
    values = np.asarray(image)
    if image.mode == "I" and 255 < values.max(initial=0) <= 65535 and values.min() >= 0:
        values = values.astype(np.uint16)
    gray = Image.fromarray(to_levels(to_tensor(values, name), name).numpy())
    transparent = image.info.get("transparency")
    if transparent is not None:
        gray.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return gray
