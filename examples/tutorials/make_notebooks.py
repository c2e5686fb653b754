#!/usr/bin/env python
"""
Writes a notebook beside each tutorial, with the same cells and without outputs.

python examples/tutorials/make_notebooks.py

The scripts are what is edited and tested. They are in the "percent" format, which VS Code, PyCharm and Jupyter with
jupytext open as notebooks themselves; where there is none of these, the notebooks do.
"""

import json
import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def make_notebook(script: str) -> str:
    """The notebook of a script whose cells begin with `# %%`, or with `# %% [markdown]` and are comments."""
    cells = []
    for number, (kind, text) in enumerate(re.findall(r"^# %%(.*)\n((?:(?!# %%).*\n)*)", script, re.MULTILINE)):
        is_markdown = kind.strip() == "[markdown]"
        source = re.sub(r"^# ?", "", text, flags=re.MULTILINE) if is_markdown else text
        cell: dict[str, Any] = {"cell_type": "markdown" if is_markdown else "code", "id": f"cell-{number}"}
        cell |= {"metadata": {}, "source": source.strip().splitlines(keepends=True)}
        cells.append(cell if is_markdown else cell | {"execution_count": None, "outputs": []})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    notebook = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for script in sorted(FOLDER.glob("*.py")):
        if script.name != Path(__file__).name:
            script.with_suffix(".ipynb").write_text(make_notebook(script.read_text()))
