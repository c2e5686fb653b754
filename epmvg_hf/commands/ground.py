"""`epmvg ground`: boxes of expressions in image files."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from PIL import Image

from .grounder import load_grounder

if TYPE_CHECKING:
    from ..model.pipeline_visual_grounding import VisualGroundingPipeline

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def ground(
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="IMAGE... EXPRESSION...", help="Image files, folders or URLs, then expressions."),
    ],
    model: Annotated[str | None, typer.Option(help="Folder or Hub id of a model. [default: the shipped one]")] = None,
    threshold: Annotated[float | None, typer.Option(help="Lowest score of a box, from 0 to 1.", min=0, max=1)] = None,
    save: Annotated[
        Path | None, typer.Option(help="Picture to draw the boxes into; with several images, the folder for them.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON for each expression.")] = False,
    device: Annotated[str | None, typer.Option(help='Such as "cuda:0" or "cpu".')] = None,
) -> None:
    """
    Find the box of each expression in each image, in pixels: xmin, ymin, xmax, ymax.

    Each image gets a line for each expression. Lines of --json can be read again as data of your own.

    \b
        epmvg ground photo.jpg "the woman in the orange suit" "a dog" --threshold 0.3 --save boxes.png
        epmvg ground photos/ "the dog" --json > boxes.jsonl
    """
    images, expressions = _tell_apart(inputs)
    pictures = _pictures(images, save)
    grounder = load_grounder(model, device)
    for image in images:
        _ground_image(grounder, image, expressions, threshold, as_json, pictures.get(image))


def _tell_apart(inputs: list[str]) -> tuple[list[str], list[str]]:
    """The images, those of folders one by one, and the expressions, which begin with the first that is no image."""
    images: list[str] = []
    for number, argument in enumerate(inputs):
        path = Path(argument)
        if path.is_dir() and (found := sorted(str(file) for file in path.iterdir() if _is_named_image(file))):
            images += found
        elif argument.startswith(("http://", "https://")):
            images.append(argument)
        elif path.is_file():
            _check_image(argument)
            images.append(argument)
        elif _is_named_image(path):
            raise typer.BadParameter(f"there is no file {argument}")
        elif images:
            return images, inputs[number:]
        elif path.is_dir():
            raise typer.BadParameter(f"no image ({', '.join(SUFFIXES)}) is in the folder {argument}")
        else:
            raise typer.BadParameter(f"{argument!r} is no file, folder or URL; images come first, then expressions")
    raise typer.BadParameter("no expression follows the images, such as: epmvg ground photo.jpg 'the dog'")


def _is_named_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def _check_image(file: str) -> None:
    """Reads the header, which takes a millisecond, so that a wrong file is named before a model is loaded."""
    try:
        Image.open(file).close()
    except (OSError, Image.DecompressionBombError) as error:
        raise typer.BadParameter(f"{file} is no image that can be read ({error})") from error


def _pictures(images: list[str], save: Path | None) -> dict[str, Path]:
    """The picture of each image, checked before the work."""
    if save is None:
        return {}
    pictures = dict.fromkeys(images, save)
    if len(images) > 1 or save.is_dir():
        save.mkdir(parents=True, exist_ok=True)
        pictures = {image: save / f"{Path(image).stem}.png" for image in images}
    elif not _is_named_image(save):
        raise typer.BadParameter(f"--save {save} must end in one of {', '.join(SUFFIXES)}")
    if len(set(pictures.values())) < len(images):
        raise typer.BadParameter("two of the images have the same name, and their pictures in --save would, too")
    for image, picture in pictures.items():
        if picture.exists() and Path(image).exists() and picture.samefile(image):
            raise typer.BadParameter(f"--save would overwrite the image {image}")
        if not picture.parent.is_dir():
            raise typer.BadParameter(f"there is no folder {picture.parent} to save {picture.name} in")
    return pictures


def _ground_image(
    grounder: "VisualGroundingPipeline",
    image: str,
    expressions: list[str],
    threshold: float | None,
    as_json: bool,
    picture: Path | None,
) -> None:
    from ..evaluation.drawing import draw_boxes
    from ..model.rgb_images import as_rgb, open_image

    opened = as_rgb(open_image(image, upright=True))  # as the pipeline sees it, and gives the boxes
    results = grounder(opened, expressions, threshold=threshold)
    for line in _lines(image, results, as_json):
        typer.echo(line)
    if picture is not None:
        found = [result for result in results if result["box"] is not None]
        boxes = [list(result["box"].values()) for result in found]
        draw_boxes(opened, boxes, [result["text"] + _score(result) for result in found]).save(picture)
        typer.echo(f"drawn in {picture}", err=True)


def _lines(image: str, results: list[dict[str, Any]], as_json: bool) -> Iterator[str]:
    for result in results:
        box = None if result["box"] is None else [round(side, 1) for side in result["box"].values()]
        score = result["score"]
        if as_json:
            row = {"image": image, "expression": result["text"], "box": box}
            yield json.dumps(row | {"score": None if score is None else round(score, 4)}, ensure_ascii=False)
        else:
            yield f"{image}: {result['text']}: {'not found' if box is None else box}{_score(result)}"


def _score(result: dict[str, Any]) -> str:
    return "" if result["score"] is None else f" ({result['score']:.2f})"
