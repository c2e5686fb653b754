"""
Pushing a model or processor to the Hub together with a model card.

This file travels with shared models (see `register_for_hub`), so the text of the general card is part of it:
transformers copies only Python files.
"""

import os
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from transformers.utils import PushToHubMixin

# The Hub has no task for visual grounding; this is the nearest one that it has.
PIPELINE_TAG = "zero-shot-object-detection"
TAGS = ("visual-grounding", "referring-expression-comprehension", "epmvg")

# Stands for the repository in cards that are written before it is known. `ModelCardMixin` replaces it when it uploads
# a card.
REPOSITORY = "OWNER/NAME"

# The card of a training run (`training/model_card_template.md`) extends this Jinja template and fills its blocks.
GENERAL_CARD = """\
---
{{ card_data }}
---

# {{ title }}

This model takes an image and an expression, such as "the man in the blue hat left of the door", and returns the one
box in the image that the expression refers to. It was made with the Python package `epmvg_hf`, which implements a
grounding transformer in the manner of TransVG for 🤗 transformers.

## Use

The package is installed from its source: run `pip install .` in a checkout of the `epmvg_hf` repository. Then:

```python
import epmvg_hf  # registers the task "visual-grounding"
from transformers import pipeline

grounder = pipeline("visual-grounding", model="{{ repository }}")
grounder("image.jpg", ["the dog on the left", "the cat"])
# [{"score": ..., "box": {"xmin": ..., "ymin": ..., "xmax": ..., "ymax": ...}, "text": "the dog on the left"}, ...]
```

Boxes are in pixels of the image as it is displayed.
{%- block adapter %}{% endblock %}
{%- if with_code %}

The model also runs without the package, with the code that this repository contains. Read that code before you trust
it:

```python
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor
from transformers.image_utils import load_image

model = AutoModelForZeroShotObjectDetection.from_pretrained("{{ repository }}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{{ repository }}", trust_remote_code=True)
inputs = processor(images=load_image("image.jpg"), text=["the dog on the left", "the cat"])
boxes = [result["box"] for result in processor.post_process_grounding(model(**inputs), inputs)]
```
{%- endif %}
{%- block results %}{% endblock %}

## Limits

* Every expression gets exactly one box, even if the image shows no such object or several of them. The score
  tells whether the box is right; a model without a score head (`score_head` in `config.json`) gives no score.
* The processor truncates expressions to its `max_text_length` tokens.
* Only what is listed under "Evaluation", if anything, has been measured. Other images, other kinds of expressions and
  other languages have not. The model inherits the biases of its training data and of its pretrained parts.
* The weights are subject to the licence stated in this card, if there is one, and to the terms of the training data
  and of the pretrained parts.

## Citation

The idea of the distillation is that of EpmVG. Only its abstract is public, so the losses and their weights are the
package's **own reading** of it, and no number in this card is the paper's.

```bibtex
@article{wang2023epmvg,
  title={Bridging Modality Gap for Visual Grounding with Effective Cross-modal Distillation},
  author={Wang, Jiaxi and Hu, Wenhui and Liu, Xueyang and Wu, Beihu and Qiu, Yuting and Cai, YingYing},
  journal={arXiv preprint arXiv:2312.17648},
  year={2023}
}
```

"""


class ModelCardMixin(PushToHubMixin):
    """
    Lets `push_to_hub` of a model or processor upload an informative card. transformers alone would upload a form in
    which nothing is filled in.

    The card is the first of these that exists: README.md of `card_folder`, or of the folder that the weights or the
    tokenizer were loaded from; the card that the repository already has; the [`general_card`].

    Attributes:
        card_folder (`str` or `os.PathLike`, *optional*):
            Folder whose README.md describes the present weights. [`EpmVGTrainer`] sets it to its output folder: after
            training, the card of the folder that the weights were loaded from no longer describes them.
    """

    card_folder: str | os.PathLike | None = None
    _auto_class: str | None
    _card_to_push: ModelCard | None = None

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("push_to_hub"):
            # transformers will overwrite README.md of `save_directory`, which may be the very card to push.
            self._card_to_push = self._read_card()
        return super().save_pretrained(save_directory, *args, **kwargs)

    def _loaded_from(self) -> str:
        """The folder or Hub repository that this was loaded from, or an empty string."""
        raise NotImplementedError

    def _read_card(self) -> ModelCard | None:
        folder = self.card_folder or self._loaded_from()
        readme = Path(folder) / "README.md"
        # Without a folder, `readme` would be that of the working directory.
        return ModelCard.load(readme) if folder and readme.is_file() else None

    def _upload_modified_files(
        self, working_dir: str | os.PathLike, repo_id: str, files_timestamps: dict[str, float], **kwargs: Any
    ) -> Any:
        card, self._card_to_push = self._card_to_push or self._read_card(), None
        if card is None and not HfApi().file_exists(repo_id, "README.md", token=kwargs.get("token")):
            card = general_card(repo_id.split("/")[-1], repo_id, with_code=self._auto_class is not None)
        if card is not None:
            # The only useful part of the form that transformers wrote is the tags that the caller asked for.
            readme = Path(working_dir) / "README.md"
            requested_tags = ModelCard.load(readme).data.get("tags") if readme.is_file() else None
            card.data["tags"] = list(dict.fromkeys([*(card.data.get("tags") or ()), *(requested_tags or ())]))
            card.text = card.text.replace(REPOSITORY, repo_id)
            card.save(readme)
        return super()._upload_modified_files(working_dir, repo_id, files_timestamps, **kwargs)


def general_card(title: str, repository: str = REPOSITORY, with_code: bool = False) -> ModelCard:
    """
    A card for weights about which nothing is known except that they belong to a grounding model.

    Args:
        title (`str`): title of the card.
        repository (`str`, *optional*, defaults to `"OWNER/NAME"`): where the examples in the card load the model from.
        with_code (`bool`, *optional*, defaults to `False`):
            Whether the repository contains the model's code, see `register_for_hub`.

    Returns:
        `ModelCard`: the card.

    Example:

    ```python
    >>> from epmvg_hf.model.card_mixin import general_card

    >>> card = general_card("My model", "me/my-epmvg")
    >>> card.data.pipeline_tag, 'model="me/my-epmvg"' in card.text
    ('zero-shot-object-detection', True)
    ```
    """
    data = ModelCardData(library_name="transformers", pipeline_tag=PIPELINE_TAG, tags=list(TAGS))
    return ModelCard.from_template(
        data, template_str=GENERAL_CARD, title=title, repository=repository, with_code=with_code
    )
