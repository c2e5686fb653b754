#!/usr/bin/env python
"""A web page on this machine: a picture and expressions in, their boxes out.

python examples/web_demo.py                                     # outputs/demo, which `make demo` trains
python examples/web_demo.py me/my-epmvg --device cuda:0 --share # also under a public address of gradio's
"""

import argparse
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw
from transformers import pipeline
from transformers.image_utils import load_image

from epmvg_hf import VisualGroundingPipeline
from epmvg_hf.utils import needs_extra

if TYPE_CHECKING:
    import gradio as gr

COLUMNS = ["expression", "xmin", "ymin", "xmax", "ymax"]


def ground(grounder: VisualGroundingPipeline, image: Image.Image | None, text: str) -> tuple[tuple, list[list]]:
    """The picture with a box for each line of `text`, as `gradio.AnnotatedImage` takes it, and the rows of a table."""
    results = grounder(image, [line.strip() for line in text.splitlines() if line.strip()])
    image = load_image(image)  # upright, as the boxes are
    outlines, rows = [], []
    for result in results:
        box = list(result["box"].values())
        # By itself, gradio would fill a box with a colour, and what is in it could not be seen for what it is.
        mask = Image.new("L", image.size)
        ImageDraw.Draw(mask).rectangle(box, outline=1, width=max(2, max(image.size) // 250))
        outlines.append((np.asarray(mask), result["text"]))
        rows.append([result["text"], *(round(value, 1) for value in box)])
    return (image, outlines), rows


def make_page(model: str, device: str | None = None) -> "gr.Interface":
    """The page of a model, a folder or Hub id."""
    with needs_extra("web_demo.py", "demo"):
        import gradio as gr

    grounder = pipeline("visual-grounding", model=model, device=device)

    def answer(image: Image.Image | None, text: str) -> tuple:
        try:
            return ground(grounder, image, text)
        except ValueError as error:
            raise gr.Error(str(error)) from error  # any other exception is no more than "Error" on the page

    return gr.Interface(
        answer,
        inputs=[gr.Image(type="pil", label="Picture"), gr.Textbox(lines=4, label="Expressions, one per line")],
        outputs=[gr.AnnotatedImage(label="Boxes"), gr.Dataframe(headers=COLUMNS, label="Pixels of the picture")],
        title=f"Visual grounding: {model}",
        flagging_mode="never",
        analytics_enabled=False,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="outputs/demo", help="folder or Hub id, by default outputs/demo")
    parser.add_argument("--device", help='such as "cuda:0"; by default an accelerator if there is one')
    parser.add_argument("--share", action="store_true", help="also open a public address, through gradio's servers")
    arguments = parser.parse_args()
    make_page(arguments.model, arguments.device).launch(share=arguments.share)
