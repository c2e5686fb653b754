"""What the page of `epmvg demo` shows below its picture: a table of the boxes, and the maps."""

import base64
import html
import io

from PIL import Image

COLUMNS = ["expression", "score", "xmin", "ymin", "xmax", "ymax"]
# The maps stand side by side, or below each other on a phone. An id outranks the styles that gradio has for tables,
# with which this one would be wider than a phone.
STYLE = """<style>
#found table { width: 100%; font-size: 0.85em; font-variant-numeric: tabular-nums; }
#found caption { text-align: left; }
#found :is(table, tr) { border: 0; }
#found :is(th, td) { padding: 0.4em 0 0.4em 0.5em; border-width: 0 0 1px 0; text-align: right; }
#found :is(th, td):first-child { min-width: 6em; padding-left: 0; text-align: left; overflow-wrap: anywhere; }
#found .maps { display: grid; gap: 1em; grid-template-columns: repeat(auto-fill, minmax(min(16em, 100%), 1fr)); }
#found figure { margin: 0; overflow-wrap: anywhere; }
#found img { width: 100%; }
</style>"""


def describe(rows: list[list], maps: list[tuple[Image.Image, str]], seconds: float) -> str:
    """
    Writes what was found as HTML that loads nothing.

    Args:
        rows (`list[list]`): for each expression its [`COLUMNS`]. The sides of a box that was not found are `None`.
        maps (`list[tuple[PIL.Image.Image, str]]`): pictures, each with its expression; there may be none.
        seconds (`float`): how long it took.

    Example:

    ```python
    >>> from epmvg_hf.commands.demo_answer import describe

    >>> describe([["a dog", 0.01, None, None, None, None]], [], seconds=0.2)
    '<style>...<td>a dog</td><td>0.010</td><td colspan="4">not found</td>...'
    ```
    """
    head = "".join(f'<th scope="col">{column}</th>' for column in COLUMNS)
    body = "".join(f"<tr>{_cells(*row)}</tr>" for row in rows)
    parts = [f"<table><caption>Boxes in pixels of the picture</caption><tr>{head}</tr>{body}</table>"]
    if maps:
        figures = "".join(_figure(picture, expression) for picture, expression in maps)
        parts.append(f'<p>Maps: bright is where the model sees the expression.</p><div class="maps">{figures}</div>')
    parts.append(f"<p>This took {seconds:.2f} s.</p>")
    return f'{STYLE}<div id="found">{"".join(parts)}</div>'


def _cells(expression: str, score: float | None, *box: float | None) -> str:
    """The cells of a row of the table."""
    texts = [html.escape(expression), "" if score is None else f"{score:.3f}"]
    sides = [f"{side:.1f}" for side in box if side is not None]
    cells = "".join(f"<td>{text}</td>" for text in texts + sides)
    return cells if sides else f'{cells}<td colspan="{len(box)}">not found</td>'


def _figure(picture: Image.Image, expression: str) -> str:
    """A picture, which is part of the HTML, above its expression."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90)
    source = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    words = html.escape(expression)
    return f'<figure><img src="{source}" alt="Map of: {words}"><figcaption>{words}</figcaption></figure>'
