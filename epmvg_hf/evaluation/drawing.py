"""Boxes with their labels, and maps, drawn into an image of any size."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from ..model.rgb_images import as_rgb

# Okabe and Ito (2008), colours that people with any colour vision tell apart; the brightest first.
COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#cc79a7", "#d55e00", "#0072b2")

# From little to much, each brighter than the one before, so that people with any colour vision see the same order.
HEAT = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))
HEAT_ALPHA = 0.6

Rectangle = tuple[float, float, float, float]


def draw_boxes(
    image: Image.Image, boxes: Sequence[Sequence[float]], labels: Sequence[str], colours: Sequence[str] = COLOURS
) -> Image.Image:
    """
    Draws boxes, each with a label in the same colour. Lines and letters grow with the image. A label stands above its
    box where there is room, else within or below it, never outside of the image, and where it can on no other label.
    One that is wider than the image is shortened.

    Args:
        image (`PIL.Image.Image`): the image, of any mode, which stays as it is.
        boxes (`Sequence[Sequence[float]]`): xyxy pixels of the image.
        labels (`Sequence[str]`): one for each box.
        colours (`Sequence[str]`, *optional*): for the boxes in turn, as `PIL.ImageColor` knows them.

    Returns:
        `PIL.Image.Image`: an RGB image of the same size.

    Raises:
        ValueError: there are more or fewer labels than boxes.

    Example:

    ```python
    >>> from epmvg_hf.evaluation.drawing import draw_boxes

    >>> draw_boxes(image, [[24, 59, 57, 88]], ["the green triangle"]).size == image.size
    True
    ```
    """
    image = as_rgb(image).copy()
    draw = ImageDraw.Draw(image)
    side = min(image.size)
    line = max(1, round(side / 160))
    # On a phone a picture is shown as wide as the screen, however low it is, and its letters must be legible there.
    font = ImageFont.load_default(max(11, min(max(image.size) / 28, side / 14)))
    taken: list[Rectangle] = []
    numbered = list(enumerate(zip(boxes, labels, strict=True)))
    for number, (box, _) in numbered:
        draw.rectangle(_within(box, image.size), outline=colours[number % len(colours)], width=line)
    # All labels come after all boxes, so that no line crosses a word.
    for number, (box, label) in numbered:
        text = _shorten(label, font, image.width - 2 * line)
        left, top, right, bottom = font.getbbox(text)
        width, height = right - left + 2 * line, bottom - top + 2 * line
        if not text or height > image.height:
            continue
        x, y = _place(_within(box, image.size), (width, height), image.size, taken)
        taken.append((x, y, x + width, y + height))
        colour = colours[number % len(colours)]
        draw.rectangle((x, y, x + width - 1, y + height - 1), fill=colour)
        draw.text((x + line - left, y + line - top), text, fill=_readable_on(colour), font=font)
    return image


def draw_map(image: Image.Image, values: np.ndarray) -> Image.Image:
    """
    Lays a map over an image as heat, dark where it is 0 and bright where it is highest. The image shows through in
    gray, so that all colours are those of the map.

    Args:
        image (`PIL.Image.Image`): the image, of any mode, which stays as it is.
        values (`np.ndarray` of shape `(rows, columns)`): a map of numbers from 0, whose cells divide the whole image
            evenly, such as the `map` of [`VisualGroundingPipeline`]. Only their shares of the highest one count.

    Returns:
        `PIL.Image.Image`: an RGB image of the same size.

    Raises:
        ValueError: the map has other axes than rows and columns, no cells, or numbers that are negative or not finite.

    Example:

    ```python
    >>> import numpy as np
    >>> from epmvg_hf.evaluation.drawing import draw_map

    >>> draw_map(image, np.array([[0.1, 0.9], [0.0, 0.0]])).size == image.size  # the right upper quarter glows
    True
    ```
    """
    values = np.asarray(values, np.float32)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"a map must have rows and columns, but its shape is {values.shape}")
    if not np.isfinite(values).all() or values.min() < 0:
        raise ValueError(f"a map must have finite numbers from 0, but it has {values.min()} to {values.max()}")
    gray = as_rgb(image).convert("L").convert("RGB")
    shares = Image.fromarray(values / (values.max() or 1)).resize(image.size, Image.Resampling.BILINEAR)
    steps = np.linspace(0, 1, len(HEAT))
    heat = np.stack([np.interp(np.asarray(shares), steps, channel) for channel in zip(*HEAT, strict=True)], axis=-1)
    return Image.blend(gray, Image.fromarray(heat.round().astype(np.uint8)), HEAT_ALPHA)


def _within(box: Sequence[float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The first and last pixels of a box that ends before its right and lower sides."""
    x0, y0, x1, y1 = (round(side) for side in box)
    x0, y0 = min(max(x0, 0), size[0] - 1), min(max(y0, 0), size[1] - 1)
    return x0, y0, max(x0, min(x1, size[0]) - 1), max(y0, min(y1, size[1]) - 1)


def _shorten(label: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    text = " ".join(label.split())
    shown = text
    while shown and font.getlength(shown) > width:
        text = text[:-1]
        shown = f"{text.rstrip()}…" if text else ""
    return shown


def _place(
    box: tuple[int, int, int, int], label: tuple[float, float], size: tuple[int, int], taken: list[Rectangle]
) -> tuple[float, float]:
    """The left upper corner of a label, within the image."""
    (x0, y0, _, y1), (width, height) = box, label
    x = max(0, min(x0, size[0] - width))
    free = size[1] - height
    wanted = [y0 - height, y0, y1 + 1 - height, y1 + 1, *range(0, int(free) + 1, max(1, int(height)))]
    possible = [(x, y) for y in wanted if 0 <= y <= free] or [(x, max(0, min(y0, free)))]
    return next(
        (place for place in possible if not _overlaps((*place, place[0] + width, place[1] + height), taken)),
        possible[0],
    )


def _overlaps(rectangle: Rectangle, others: list[Rectangle]) -> bool:
    left, top, right, bottom = rectangle
    return any(left < x1 and x0 < right and top < y1 and y0 < bottom for x0, y0, x1, y1 in others)


def _readable_on(colour: str) -> str:
    red, green, blue = ImageColor.getrgb(colour)[:3]
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 110 else "white"
