"""Model cards: the README.md of what is pushed to the Hub. Imports no sibling, since shared code takes it along."""

import dataclasses
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from transformers.utils import PushToHubMixin

PIPELINE_TAG = "zero-shot-object-detection"  # the Hub knows no visual grounding; this is its nearest task
TAGS = ("visual-grounding", "referring-expression-comprehension", "epmvg")
REPOSITORY = "OWNER/NAME"  # until it is known where the card goes
METRICS = {"acc@0.5": "Acc@0.5", "acc@0.7": "Acc@0.7", "mean_iou": "mean IoU"}

_USE = """\
An image and an expression ("the man in the blue hat left of the door") in, the one box that it means out. Made with
the package `epmvg_hf`: a grounding transformer in the manner of TransVG, for 🤗 transformers.

## Use

With the package installed:

```python
import epmvg_hf  # brings the task "visual-grounding"
from transformers import pipeline

grounder = pipeline("visual-grounding", model="OWNER/NAME")
grounder("image.jpg", ["the dog on the left", "the cat"])
# [{"box": {"xmin": ..., "ymin": ..., "xmax": ..., "ymax": ...}, "text": "the dog on the left"}, ...]
```

Boxes are pixels of the image as displayed.
"""

_USE_CODE = """\
Without the package, by the code that is part of this repository (read it before you trust it):

```python
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor
from transformers.image_utils import load_image

model = AutoModelForZeroShotObjectDetection.from_pretrained("OWNER/NAME", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("OWNER/NAME", trust_remote_code=True)
inputs = processor(images=load_image("image.jpg"), text=["the dog on the left", "the cat"])
boxes = [result["box"] for result in processor.post_process_grounding(model(**inputs), inputs)]
```
"""

_USE_ADAPTER = """\
This is an adapter: it needs `pip install peft` and its base model, `BASE`, which is loaded along with it from where
`adapter_config.json` says.
"""

_LIMITS = """\
## Limits

* Every expression gets exactly one box, also when the image has nothing of the kind or several; there is no score to
  tell such cases.
* Expressions are cut after `max_text_length` tokens of the processor.
* What is not under "Evaluation" has not been measured: other images, other kinds of expressions, other languages. The
  model has the biases of its data and of its pretrained parts.
* Weights come under the licence that is stated above, if one is, and under the terms of the data and of the pretrained
  parts they were made from.

## Citation

The idea of the distillation is that of EpmVG; its losses and their weights are the package's **own reading** of it,
and no number here is the paper's.

```bibtex
@article{wang2023epmvg,
  title={Bridging Modality Gap for Visual Grounding with Effective Cross-modal Distillation},
  author={Wang, Jiaxi and Hu, Wenhui and Liu, Xueyang and Wu, Beihu and Qiu, Yuting and Cai, YingYing},
  journal={arXiv preprint arXiv:2312.17648},
  year={2023}
}
```
"""


@dataclasses.dataclass
class Evaluation:
    """
    What a model reached on a split.

    Args:
        metrics (`dict[str, float]`): `acc@0.5`, `acc@0.7` and `mean_iou`, each in [0, 1].
        dataset (`str`, *optional*): name of the dataset.
        split (`str`, *optional*): name of the split.
        expressions (`int`, *optional*): how many rows were evaluated; not known of a stream.
        config (`str`, *optional*): configuration of the dataset, such as `"unc"`.

    Example:

    ```python
    >>> from epmvg_hf.model.card_mixin import Evaluation

    >>> reached = Evaluation({"acc@0.5": 0.5, "mean_iou": 0.5}, "shapes", "test", expressions=8000)
    >>> reached.metrics["acc@0.5"], reached.split
    (0.5, 'test')
    ```
    """

    metrics: dict[str, float]
    dataset: str | None = None
    split: str | None = None
    expressions: int | None = None
    config: str | None = None


class ModelCardMixin(PushToHubMixin):
    """
    `push_to_hub` of a model or processor with a card that says something. It is, best first, the README.md of the
    folder it came from (or of the training run, see `card_folder`), the one that the repository already has, or a
    general one.

    Attributes:
        card_folder (`str` or `os.PathLike`, *optional*): folder whose README.md tells of these weights. Set by
            [`EpmVGTrainer`]; else it is the folder that the weights or the tokenizer were loaded from.
    """

    card_folder: str | os.PathLike | None = None
    _auto_class: str | None
    _card: ModelCard | None = None

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("push_to_hub"):
            # Now: transformers writes its empty form into the folder, which may be the one with the card.
            self._card = self._read_card()
        return super().save_pretrained(save_directory, *args, **kwargs)

    def _loaded_from(self) -> str:
        """The folder or Hub repository that this was loaded from, empty if it was not."""
        raise NotImplementedError

    def _read_card(self) -> ModelCard | None:
        folder = self.card_folder or self._loaded_from()
        readme = Path(folder) / "README.md"
        return ModelCard.load(readme) if folder and readme.is_file() else None

    def _upload_modified_files(
        self, working_dir: str | os.PathLike, repo_id: str, files_timestamps: dict[str, float], **kwargs: Any
    ) -> Any:
        readme = Path(working_dir) / "README.md"
        card, self._card = self._card or self._read_card(), None
        if card is None and not HfApi().file_exists(repo_id, "README.md", token=kwargs.get("token")):
            card = make_card(repo_id.split("/")[-1], with_code=self._auto_class is not None)
        if card is not None:
            # What transformers wrote is an empty form, but has the tags that the caller asked for.
            wanted = ModelCard.load(readme).data.get("tags") if readme.is_file() else None
            card.data["tags"] = list(dict.fromkeys([*(card.data.get("tags") or ()), *(wanted or ())]))
            card.text = card.text.replace(REPOSITORY, repo_id)
            card.save(readme)
        return super()._upload_modified_files(working_dir, repo_id, files_timestamps, **kwargs)


def make_card(
    model_name: str,
    *,
    with_code: bool = False,
    adapter_of: str | None = None,
    language: str | list[str] | None = None,
    license: str | None = None,
    task: str = PIPELINE_TAG,
    tags: Iterable[str] = (),
    datasets: Sequence[str] = (),
    base_models: Sequence[str] = (),
    evaluations: Sequence[Evaluation] = (),
    training: str = "",
) -> ModelCard:
    """
    The card of a model.

    Args:
        model_name (`str`): its title.
        with_code (`bool`, *optional*, defaults to `False`): whether the code goes along, see `register_for_hub`.
        adapter_of (`str`, *optional*): of a PEFT adapter, the base model's name.
        language (`str` or `list[str]`, *optional*): languages of the expressions, such as `"en"`.
        license (`str`, *optional*): identifier of the weights' licence, such as `"apache-2.0"`.
        task (`str`, *optional*, defaults to `"zero-shot-object-detection"`): task on the Hub, its `pipeline_tag`.
        tags (`Iterable[str]`, *optional*): further tags.
        datasets (`Sequence[str]`, *optional*): what it was trained on.
        base_models (`Sequence[str]`, *optional*): models of the Hub that it started from.
        evaluations (`Sequence[Evaluation]`, *optional*): what it reached.
        training (`str`, *optional*): Markdown about its training, see [`~card_trainer.describe_training`].

    Returns:
        `ModelCard`: where it says how to use the model, `OWNER/NAME` stands for the repository.

    Example:

    ```python
    >>> from epmvg_hf.model.card_mixin import Evaluation, make_card

    >>> reached = Evaluation({"acc@0.5": 0.5}, "shapes", "test", expressions=8000)
    >>> card = make_card("my-epmvg", license="apache-2.0", evaluations=[reached])
    >>> "| shapes | test | 8,000 | 0.5000 | - | - |" in card.text
    True
    >>> card.save("README.md")
    ```
    """
    data = ModelCardData(
        language=language,
        license=license,
        library_name="transformers" if adapter_of is None else "peft",
        pipeline_tag=task,
        tags=list(dict.fromkeys([*TAGS, *tags])),
        datasets=list(datasets) or None,
        base_model=list(base_models) or None,
        base_model_relation="adapter" if base_models and adapter_of is not None else None,
        metrics=["accuracy"],
        model_name=model_name,
        eval_results=[result for evaluation in evaluations for result in _eval_results(evaluation, task)] or None,
    )
    parts = [f"# {model_name}", _USE]
    if adapter_of is not None:
        parts.append(_USE_ADAPTER.replace("BASE", adapter_of))
    if with_code:
        parts.append(_USE_CODE)
    if evaluations:
        parts.append(_evaluation_table(evaluations))
    parts += [training, _LIMITS]
    body = "\n\n".join(part.strip() for part in parts if part)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")


def dataset_id(name: str) -> str:
    """A dataset's name as the Hub takes it in metadata."""
    return re.sub(r"[^\w.-]", "_", name.replace("+", "plus"))


def _eval_results(evaluation: Evaluation, task: str) -> list[EvalResult]:
    name = evaluation.dataset or "custom"
    return [
        EvalResult(
            task_type=task,
            task_name="Visual Grounding",
            dataset_type=dataset_id(name),
            dataset_name=name,
            dataset_config=evaluation.config,
            dataset_split=evaluation.split,
            metric_type="accuracy" if metric.startswith("acc") else metric,
            metric_name=title,
            metric_value=round(evaluation.metrics[metric], 4),
        )
        for metric, title in METRICS.items()
        if metric in evaluation.metrics
    ]


def _evaluation_table(evaluations: Sequence[Evaluation]) -> str:
    lines = [
        "## Evaluation\n",
        f"| dataset | split | expressions | {' | '.join(METRICS.values())} |",
        "| --- | --- | --- |" + " --- |" * len(METRICS),
    ]
    for evaluation in evaluations:
        dataset = " ".join(filter(None, (evaluation.dataset or "custom", evaluation.config)))
        count = "-" if evaluation.expressions is None else f"{evaluation.expressions:,}"
        values = [f"{evaluation.metrics[name]:.4f}" if name in evaluation.metrics else "-" for name in METRICS]
        lines.append(f"| {' | '.join([dataset, evaluation.split or '-', count, *values])} |")
    lines.append("\nEvery expression counts once; a box is right if its IoU with the true one is at least 0.5 (0.7).")
    return "\n".join(lines)
