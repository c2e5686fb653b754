"""The model card of a training run: what was trained, on which data, by which command, and how well it grounds."""

import dataclasses
import os
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Template
from transformers import PreTrainedConfig, Trainer, TrainingArguments
from transformers.modelcard import extract_hyperparameters_from_trainer, make_markdown_table, parse_log_history

from ..model.card_mixin import GENERAL_CARD, PIPELINE_TAG, REPOSITORY, TAGS

METRICS = {"acc@0.5": "Acc@0.5", "acc@0.7": "Acc@0.7", "mean_iou": "mean IoU"}

_TEMPLATE = Path(__file__).with_name("model_card_template.md")

# Columns of `parse_log_history` that the card shows; the others are the single terms of the loss.
_HISTORY_COLUMNS = ("Step", "Epoch", "Training Loss", "Validation Loss", "Acc@0.5", "Mean Iou")

# `datasets` names a dataset after the format of its files if it has no other name, and this package names the user's
# own data "custom". In a card, such names would say nothing.
_GENERIC_DATASET_NAMES = (
    "arrow", "csv", "custom", "generator", "imagefolder", "json", "pandas", "parquet", "text", "webdataset",
)  # fmt: skip


@dataclasses.dataclass
class Evaluation:
    """
    The results of a model on one split of a dataset.

    Args:
        metrics (`dict[str, float]`): `acc@0.5`, `acc@0.7` and `mean_iou`, each in [0, 1]; other keys are ignored.
        dataset (`str`, *optional*, defaults to `"custom"`): name of the dataset.
        split (`str`, *optional*): name of the split.
        expressions (`int`, *optional*): number of evaluated expressions, which is unknown for a stream.
        config (`str`, *optional*): configuration of the dataset, such as `"unc"`.

    Example:

    ```python
    >>> from epmvg_hf.training.model_card import Evaluation

    >>> evaluation = Evaluation({"acc@0.5": 0.5, "mean_iou": 0.5}, "shapes", "test", expressions=8000)
    >>> evaluation.metrics["acc@0.5"], evaluation.split
    (0.5, 'test')
    ```
    """

    metrics: dict[str, float]
    dataset: str = "custom"
    split: str | None = None
    expressions: int | None = None
    config: str | None = None


def make_card(
    model_name: str,
    *,
    repository: str = REPOSITORY,
    with_code: bool = False,
    adapter_of: str | None = None,
    language: str | list[str] | None = None,
    license: str | None = None,
    task: str = PIPELINE_TAG,
    tags: Iterable[str] = (),
    datasets: Iterable[str] = (),
    base_models: Iterable[str] = (),
    evaluations: Sequence[Evaluation] = (),
    training: dict[str, Any] | None = None,
) -> ModelCard:
    """
    Makes the card of a trained model: the general card of `model.card_mixin`, with the results and the training.

    Args:
        model_name (`str`): title of the card.
        repository (`str`, *optional*, defaults to `"OWNER/NAME"`):
            Repository that the model will be uploaded to. `push_to_hub` replaces the default by the real one.
        with_code (`bool`, *optional*, defaults to `False`):
            Whether the code is uploaded with the model, see `register_for_hub`.
        adapter_of (`str`, *optional*): name of the base model if the model is a PEFT adapter.
        language (`str` or `list[str]`, *optional*): languages of the expressions, such as `"en"`.
        license (`str`, *optional*): identifier of the weights' licence, such as `"apache-2.0"`.
        task (`str`, *optional*, defaults to `"zero-shot-object-detection"`): the model's task on the Hub.
        tags (`Iterable[str]`, *optional*): further tags.
        datasets (`Iterable[str]`, *optional*): names of the training data.
        base_models (`Iterable[str]`, *optional*): models of the Hub that the training started from.
        evaluations (`Sequence[Evaluation]`, *optional*): the results of the model.
        training (`dict[str, Any]`, *optional*): the training, as [`describe_training`] returns it.

    Returns:
        `ModelCard`: the card.

    Example:

    ```python
    >>> from epmvg_hf.training.model_card import Evaluation, make_card

    >>> evaluation = Evaluation({"acc@0.5": 0.5}, "shapes", "test", expressions=8000)
    >>> card = make_card("my-epmvg", license="apache-2.0", evaluations=[evaluation])
    >>> "| shapes | test | 8,000 | 0.5000 | - | - |" in card.text
    True
    >>> card.save("README.md")
    ```
    """
    base_models = list(base_models)
    data = ModelCardData(
        language=language,
        license=license,
        library_name="transformers" if adapter_of is None else "peft",
        pipeline_tag=task,
        tags=list(dict.fromkeys([*TAGS, *tags])),
        datasets=[_dataset_id(name) for name in datasets] or None,
        base_model=base_models or None,
        base_model_relation="adapter" if base_models and adapter_of is not None else None,
        metrics=["accuracy"],
        model_name=model_name,
        eval_results=[result for evaluation in evaluations for result in _eval_results(evaluation, task)] or None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        general_card=Template(GENERAL_CARD),
        title=model_name,
        repository=repository,
        with_code=with_code,
        adapter_of=adapter_of,
        evaluations=evaluations,
        metrics=METRICS,
        training=training,
    )


def describe_training(trainer: Trainer, base_models: Sequence[str], data: str, teacher: str | None) -> dict[str, Any]:
    """
    Collects what the card's section on training shows.

    Args:
        trainer (`Trainer`): the trainer after training.
        base_models (`Sequence[str]`): models of the Hub that the training started from, see [`find_base_models`].
        data (`str`): the training data, worded to follow "trained on" in a sentence.
        teacher (`str`, *optional*): sentences about the teacher and what it taught.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    started_from = " and ".join(f"`{name}`" for name in base_models)
    if not started_from:
        started_from = "a saved model" if trainer.model.config.name_or_path else "scratch"
    _, history, _ = parse_log_history(trainer.state.log_history)
    # All rows of the table must have the same columns, but an evaluation of data without boxes has no accuracy.
    rows = [row for row in history or () if row.keys() >= set(_HISTORY_COLUMNS)]
    return {
        "num_parameters": model.num_parameters(),
        "num_trained_parameters": model.num_parameters(only_trainable=True),
        "started_from": started_from,
        "data": data,
        "teacher": teacher,
        "command": training_command(sys.argv, trainer.args.world_size),
        "settings": {**extract_hyperparameters_from_trainer(trainer), **_settings_of_this_package(trainer.args)},
        "history": make_markdown_table([{name: row[name] for name in _HISTORY_COLUMNS} for row in rows]).strip(),
        "libraries": {name: version(name) for name in ("epmvg_hf", "transformers", "torch", "datasets")},
    }


def find_base_models(config: PreTrainedConfig, finetuned_from: str | None = None) -> list[str]:
    """
    Finds the models of the Hub that a model, or one of its towers, started from.

    Args:
        config (`PreTrainedConfig`): the model's configuration. Names of existing folders in it are left out.
        finetuned_from (`str`, *optional*): a further model.
    """
    configs = [config, *(getattr(config, name) for name in config.sub_configs)]
    names = dict.fromkeys([finetuned_from, *(part.name_or_path for part in configs)])
    return [name for name in names if name and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not Path(name).exists()]


def dataset_name(dataset: Dataset | IterableDataset) -> str | None:
    """The name of a dataset, or `None` if it has no name of its own."""
    name = dataset.info.dataset_name
    return None if name in _GENERIC_DATASET_NAMES else name


def training_command(argv: Sequence[str], world_size: int) -> str | None:
    """
    The command line of a training in a form that can be published: without access tokens and private paths.

    Args:
        argv (`Sequence[str]`): `sys.argv` of one of the processes.
        world_size (`int`): the number of processes.

    Returns:
        `str`: the command, or `None` if it ran neither `epmvg` nor a Python file, such as in a notebook.
    """
    program = Path(argv[0])
    is_epmvg = program.stem == "epmvg" or program.parts[-2:] == ("epmvg_hf", "__main__.py")
    if program.suffix != ".py" and not is_epmvg:
        return None
    arguments = []
    is_secret = False
    for argument in argv[1:]:
        if is_secret and not argument.startswith("--"):
            is_secret = False
            continue
        option, equals, _ = argument.partition("=")
        is_secret = re.fullmatch(r"--.*(token|key|secret|password)", option) is not None
        if is_secret:
            # In "--hub_token=X" the value is already gone; in "--hub_token X" it is the next argument.
            is_secret = not equals
            continue
        arguments.append(strip_private_paths(argument))
    if is_epmvg:
        processes = [] if world_size == 1 else ["--num_processes", str(world_size)]
        return shlex.join(["epmvg", *arguments, *processes])
    launcher = "python" if world_size == 1 else f"accelerate launch --num_processes {world_size}"
    return f"{launcher} {shlex.join([strip_private_paths(argv[0]), *arguments])}"


def strip_private_paths(text: str) -> str:
    """
    Removes from a text, such as an argument of a command line, what its paths reveal about the machine. Absolute paths
    below the working directory become relative to it, and only the last name of other absolute paths stays.

    Args:
        text (`str`): a path or a text with paths, such as `"--data_dir=/home/me/data"` or `"local-dir:~/clip"`.
    """
    if "://" in text:
        return text
    option, equals, value = text.rpartition("=")
    path = Path(os.path.expanduser(value))  # noqa: PTH111 (Path.expanduser raises for an unknown user)
    if path.is_absolute():
        shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path.name
        return f"{option}{equals}{shown}"
    # A path within other text, such as "local-dir:/home/me/clip" or JSON, begins after a character that no path has.
    return re.sub(r"(?<![\w./~-])[~/]/?(?:[^\s\"',:/]+/)*([^\s\"',:/]+)", r"\1", text)


def _settings_of_this_package(args: TrainingArguments) -> dict[str, Any]:
    """Arguments that `TrainingArguments` does not have, where they differ from their defaults, except for folders."""
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    return {
        field.name: value
        for field in dataclasses.fields(args)
        if field.name not in known
        and (value := getattr(args, field.name)) != field.default
        and not field.name.endswith("_dir")
    }


def _eval_results(evaluation: Evaluation, task: str) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=task,
            task_name="Visual Grounding",
            dataset_type=_dataset_id(evaluation.dataset),
            dataset_name=evaluation.dataset,
            dataset_config=evaluation.config,
            dataset_split=evaluation.split,
            metric_type="accuracy" if metric.startswith("acc") else metric,
            metric_name=title,
            metric_value=round(evaluation.metrics[metric], 4),
        )
        for metric, title in METRICS.items()
        if metric in evaluation.metrics
    ]


def _dataset_id(name: str) -> str:
    """A dataset's name with the characters that the Hub accepts in metadata: "refcoco+" becomes "refcocoplus"."""
    return re.sub(r"[^\w.-]", "_", name.replace("+", "plus"))
