"""`epmvg demo`: a web page on this machine that draws the boxes of expressions into an image."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from PIL import Image

from ..utils import needs_extra
from .grounder import SHIPPED_MODEL, load_grounder

if TYPE_CHECKING:
    import gradio as gr

    from ..model.pipeline_visual_grounding import VisualGroundingPipeline

COLUMNS = ["expression", "score", "xmin", "ymin", "xmax", "ymax"]
# What a visitor may ask for at once.
MAX_FILE_SIZE = "20mb"
MAX_EXPRESSIONS = 16
MAX_WAITING = 8  # requests; one is answered at a time
SHOWN_SIDE = 1280  # pixels of the drawn picture, enough for a screen
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
) -> tuple[Image.Image, list[list]]:
    """
    Finds the box of each line of a text.

    Args:
        grounder ([`VisualGroundingPipeline`]): the model.
        file (`str`, *optional*): the path of the image.
        text (`str`): one expression per line; empty lines are skipped.
        threshold (`float`, *optional*, defaults to 0.0): the lowest score of a box.

    Returns:
        `tuple[PIL.Image.Image, list[list]]`: the image with the boxes, at most `SHOWN_SIDE` wide and high, and for
        each expression a row of [`COLUMNS`], in pixels of the given image, whose box is empty if it was not found.

    Raises:
        ValueError: there is no image, or it cannot be read; there is no expression, or more than `MAX_EXPRESSIONS`.
    """
    from ..evaluation.drawing import draw_boxes
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
    results = grounder(image, expressions, threshold=threshold or None)
    scale = min(1.0, SHOWN_SIDE / max(image.size))
    picture = image.resize([max(1, round(side * scale)) for side in image.size]) if scale < 1 else image
    rows, boxes, labels = [], [], []
    for result in results:
        box = [] if result["box"] is None else list(result["box"].values())
        score = None if result["score"] is None else round(result["score"], 3)
        rows.append([result["text"], score, *[round(side, 1) for side in box]] + [None] * (4 - len(box)))
        if box:
            boxes.append([side * scale for side in box])
            labels.append(result["text"] if score is None else f"{result['text']} ({score:.2f})")
    return draw_boxes(picture, boxes, labels), rows


def make_page(grounder: "VisualGroundingPipeline") -> "gr.Interface":
    """The page of a model, not launched yet."""
    with needs_extra("epmvg demo", "demo"):
        import gradio as gr

    def answer(file: str | None, text: str, threshold: float) -> tuple[Image.Image, list[list], str]:
        begin = time.perf_counter()
        try:
            picture, rows = ground_lines(grounder, file, text, threshold)
        except ValueError as error:
            # The page shows the words of a `gr.Error`, but only "Error" for any other exception.
            raise gr.Error(str(error), print_exception=False) from error
        return picture, rows, f"{time.perf_counter() - begin:.2f} s"

    upload = gr.Image(label="Picture")
    # The file as it is: gradio would read it, and show no more than "Error" if it is no image. A class derived from
    # `gr.Image` would be a component that the page does not know.
    upload.preprocess = lambda payload: None if payload is None else payload.path  # type: ignore[method-assign]
    images = SHIPPED_MODEL.parents[1] / "examples" / "images"
    examples = [[str(images / name), text, 0.0] for name, text in EXAMPLES if (images / name).exists()]
    return gr.Interface(
        answer,
        inputs=[
            upload,
            gr.Textbox(lines=3, label="Expressions, one per line"),
            gr.Slider(0, 1, label="Lowest score of a box", step=0.01),
        ],
        outputs=[
            gr.Image(type="pil", label="Boxes"),
            gr.Dataframe(headers=COLUMNS, label="Pixels of the picture"),
            gr.Textbox(label="Time"),
        ],
        examples=examples or None,
        cache_examples=False,
        title=f"Visual grounding: {Path(grounder.model.name_or_path).name}",
        flagging_mode="never",
        analytics_enabled=False,
    )
