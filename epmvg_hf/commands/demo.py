"""`epmvg demo`: a web page on this machine that draws the boxes of expressions into an image."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from PIL import Image

from ..utils import needs_extra
from .demo_answer import describe
from .grounder import SHIPPED_MODEL, load_grounder

if TYPE_CHECKING:
    import gradio as gr

    from ..model.pipeline_visual_grounding import VisualGroundingPipeline

# What a visitor may ask for at once.
MAX_FILE_SIZE = "20mb"
MAX_EXPRESSIONS = 16
MAX_WAITING = 8  # requests; one is answered at a time
SHOWN_SIDE = 1280  # pixels of the drawn picture, enough for a screen
MAP_SIDE = 640  # pixels of the picture under a map; there is one for each expression
EXAMPLES = [("astronaut.jpg", "the woman in the orange suit\nthe flag"), ("horses.jpg", "the brown horse")]


def demo(
    model: Annotated[str | None, typer.Argument(help="Folder or Hub id. [default: the shipped model]")] = None,
    device: Annotated[str | None, typer.Option(help='Such as "cuda:0" or "cpu".')] = None,
    port: Annotated[int | None, typer.Option(help="Of the local address; the first free one from 7860 on.")] = None,
) -> None:
    """
    Open a web page that grounds expressions in images. Only this machine can reach it.

    \b
        epmvg demo
        epmvg demo me/my-epmvg --device cuda:0
    """
    page = make_page(load_grounder(model, device))
    page.queue(max_size=MAX_WAITING).launch(
        server_name="127.0.0.1", server_port=port, share=False, max_file_size=MAX_FILE_SIZE
    )


def ground_lines(
    grounder: "VisualGroundingPipeline", file: str | None, text: str, threshold: float = 0.0
) -> tuple[Image.Image, list[list], list[tuple[Image.Image, str]]]:
    """
    Finds the box of each line of a text, and shows where the model sees what it names.

    Args:
        grounder ([`VisualGroundingPipeline`]): the model.
        file (`str`, *optional*): the path of the image.
        text (`str`): one expression per line; empty lines are skipped.
        threshold (`float`, *optional*, defaults to 0.0): the lowest score of a box.

    Returns:
        `tuple`: the image with the boxes, a `PIL.Image.Image` at most `SHOWN_SIDE` wide and high; for each expression
        a row of `COLUMNS`, in pixels of the given image, with four times `None` if it was not found; and for each
        expression a picture of its map and box, at most `MAP_SIDE` wide and high, and the expression itself. Without
        `config.box_head="map"` there are no such pictures.

    Raises:
        ValueError: there is no image, or it cannot be read; there is no expression, or more than `MAX_EXPRESSIONS`.
    """
    from ..evaluation.drawing import COLOURS, draw_boxes, draw_map
    from ..model.rgb_images import as_rgb, open_image

    expressions = [line.strip() for line in text.splitlines() if line.strip()]
    if len(expressions) > MAX_EXPRESSIONS:
        raise ValueError(f"{len(expressions)} expressions are too many, expected at most {MAX_EXPRESSIONS}")
    if file is None or not expressions:
        raise ValueError("expected a picture and at least one expression")
    try:
        image = as_rgb(open_image(file, upright=True))  # as the pipeline sees it, and gives the boxes
    except ValueError as error:  # which names a temporary file
        raise ValueError(f"{Path(file).name} is no image that can be read") from error
    has_maps = grounder.model.config.box_head == "map"
    results = grounder(image, expressions, threshold=threshold or None, return_maps=has_maps)
    picture, scale = _fit(image, SHOWN_SIDE)
    small, small_scale = _fit(image, MAP_SIDE)
    rows, boxes, labels, colours, maps = [], [], [], [], []
    for number, result in enumerate(results):
        colour = COLOURS[number % len(COLOURS)]
        box = [] if result["box"] is None else list(result["box"].values())
        score = None if result["score"] is None else round(result["score"], 3)
        rows.append([result["text"], score, *([round(side, 1) for side in box] or [None] * 4)])
        if box:
            boxes.append([side * scale for side in box])
            labels.append(result["text"] if score is None else f"{result['text']} ({score:.2f})")
            colours.append(colour)
        if has_maps:
            outline = [[side * small_scale for side in box]] if box else []
            heat = draw_boxes(draw_map(small, result["map"]), outline, [""] * len(outline), [colour])
            maps.append((heat, result["text"]))
    return draw_boxes(picture, boxes, labels, colours), rows, maps


def _fit(image: Image.Image, side: int) -> tuple[Image.Image, float]:
    """The image, smaller if one of its sides would be longer than `side` pixels, and by which factor it is smaller."""
    scale = min(1.0, side / max(image.size))
    return image.resize([max(1, round(pixels * scale)) for pixels in image.size]) if scale < 1 else image, scale


def make_page(grounder: "VisualGroundingPipeline") -> "gr.Interface":
    """The page of a model, not launched yet."""
    with needs_extra("epmvg demo", "demo"):
        import gradio as gr

    def answer(file: str | None, text: str, threshold: float) -> tuple[Image.Image, str]:
        begin = time.perf_counter()
        try:
            picture, rows, maps = ground_lines(grounder, file, text, threshold)
        except ValueError as error:
            # The page shows the words of a `gr.Error`, but only "Error" for any other exception.
            raise gr.Error(str(error), print_exception=False) from error
        return picture, describe(rows, maps, time.perf_counter() - begin)

    upload = gr.Image(label="Picture")
    # The file as it is: gradio would read it, and show no more than "Error" if it is no image. A class derived from
    # `gr.Image` would be a component that the page does not know.
    upload.preprocess = lambda payload: None if payload is None else payload.path  # type: ignore[method-assign]
    images = SHIPPED_MODEL.parents[1] / "examples" / "images"
    examples = [[str(images / name), text] for name, text in EXAMPLES if (images / name).exists()]
    expressions = gr.Textbox(lines=3, label="Expressions, one per line")
    page = gr.Interface(
        answer,
        inputs=[upload, expressions, gr.Slider(0, 1, label="Lowest score of a box", step=0.01)],
        outputs=[
            # A label would cover a corner of the picture, and gradio's third button would send it elsewhere.
            gr.Image(type="pil", label="Boxes", show_label=False, buttons=["download", "fullscreen"]),
            gr.HTML(),
        ],
        title=f"Visual grounding: {Path(grounder.model.name_or_path).name}",
        description="To find the boxes, press Shift+Enter after the expressions, or the button.",
        submit_btn="Find",
        flagging_mode="never",
        analytics_enabled=False,
    )

    def choose_example(number: int) -> list[str]:
        return examples[number]

    if examples:
        with page:
            # The `examples` of `gr.Interface` would replace `upload` by another one, which reads the file itself.
            shown = gr.Dataset(components=[upload, expressions], samples=examples, label="Examples", type="index")
            shown.click(choose_example, shown, [upload, expressions])
    return page
