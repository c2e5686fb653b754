#!/usr/bin/env python
"""Opens a web page on this machine that draws the boxes of expressions into an image.

python examples/web_demo.py                                     # the model that `make demo` trains
python examples/web_demo.py me/my-epmvg --device cuda:0 --share # also at a public address of gradio
"""

import argparse
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw
from transformers import pipeline

from epmvg_hf import VisualGroundingPipeline
from epmvg_hf.model.rgb_images import as_rgb, open_image
from epmvg_hf.utils import needs_extra

if TYPE_CHECKING:
    import gradio as gr

COLUMNS = ["expression", "xmin", "ymin", "xmax", "ymax"]


def ground(grounder: VisualGroundingPipeline, image: Image.Image | None, text: str) -> tuple[tuple, list[list]]:
    """
    Find the box of each line of `text`.

    Args:
        grounder ([`VisualGroundingPipeline`]): the model.
        image (`PIL.Image.Image`, *optional*): the image. The pipeline raises a `ValueError` if there is none.
        text (`str`): one expression per line; empty lines are skipped.

    Returns:
        `tuple[tuple, list[list]]`: the image with outlines and labels, as `gradio.AnnotatedImage` takes it, and one
        row of expression, xmin, ymin, xmax, ymax (pixels of the image) for each box.
    """
    results = grounder(image, [line.strip() for line in text.splitlines() if line.strip()])
    image = as_rgb(open_image(image, upright=True))  # as the pipeline sees it, and gives the boxes
    outlines, rows = [], []
    for result in results:
        box = list(result["box"].values())
        # Given a box, gradio would fill it with a colour and hide what is in it. So it gets a mask of the outline.
        mask = Image.new("L", image.size)
        ImageDraw.Draw(mask).rectangle(box, outline=1, width=max(2, max(image.size) // 250))
        outlines.append((np.asarray(mask), result["text"]))
        rows.append([result["text"], *(round(value, 1) for value in box)])
    return (image, outlines), rows


def make_page(model: str, device: str | None = None) -> "gr.Interface":
    """The page for the model in a folder or with a Hub id, not launched yet."""
    with needs_extra("web_demo.py", "demo"):
        import gradio as gr

    grounder = pipeline("visual-grounding", model=model, device=device)

    def answer(image: Image.Image | None, text: str) -> tuple:
        try:
            return ground(grounder, image, text)
        except ValueError as error:
            # The page shows the words of a `gr.Error`, but only "Error" for any other exception.
            raise gr.Error(str(error)) from error

    return gr.Interface(
        answer,
        inputs=[
            gr.Image(type="pil", image_mode=None, label="Picture"),  # any mode but None is what gradio converts to
            gr.Textbox(lines=4, label="Expressions, one per line"),
        ],
        outputs=[gr.AnnotatedImage(label="Boxes"), gr.Dataframe(headers=COLUMNS, label="Pixels of the picture")],
        title=f"Visual grounding: {model}",
        flagging_mode="never",
        analytics_enabled=False,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model",
        nargs="?",
        default="outputs/demo",
        help="Folder or Hub id of a trained model; outputs/demo by default.",
    )
    parser.add_argument("--device", help='Device, such as "cuda:0"; an accelerator by default, if there is one.')
    parser.add_argument(
        "--share", action="store_true", help="Also open a public address through the servers of gradio."
    )
    arguments = parser.parse_args()
    make_page(arguments.model, arguments.device).launch(share=arguments.share)
