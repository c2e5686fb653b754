"""A `transformers.Trainer` that writes model cards: what was trained on what, by which command, what it reached."""

import dataclasses
import os
import re
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from huggingface_hub import CommitInfo
from transformers import PreTrainedConfig, Trainer, TrainingArguments
from transformers.modelcard import extract_hyperparameters_from_trainer, make_markdown_table, parse_log_history
from transformers.trainer_utils import PredictionOutput, TrainOutput, unwrap_peft_model

from ..model.card_mixin import METRICS, PIPELINE_TAG, REPOSITORY, Evaluation, dataset_id, make_card
from .adapters import has_adapter

# What `datasets` calls a dataset that it read from files of a format.
_FORMATS = ("arrow", "csv", "generator", "imagefolder", "json", "pandas", "parquet", "text", "webdataset")


class CardTrainer(Trainer):
    """
    The part of [`EpmVGTrainer`] that shares a model: it keeps what the weights reached on each split, and writes the
    card that `push_to_hub` uploads.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        # By dataset, split and the optimizer step of the weights.
        self._evaluations: dict[tuple[str | None, str | None, int], Evaluation] = {}
        super().__init__(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in `Trainer`; from now on the model has this run's card."""
        self._own_card()
        return super().train(*args, **kwargs)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """
        Evaluates, as in `Trainer`, and notes the result for the model card.

        Args:
            eval_dataset (`datasets.Dataset` or `datasets.IterableDataset`, *optional*): the trainer's own by default.
            ignore_keys (`list[str]`, *optional*): not used.
            metric_key_prefix (`str`, *optional*, defaults to `"eval"`): what names begin with.

        Returns:
            `dict[str, float]`: `eval_acc@0.5`, `eval_acc@0.7` and `eval_mean_iou` in [0, 1], `eval_loss` with its
            terms, and times in seconds.

        Example:

        ```python
        >>> metrics = trainer.evaluate()
        >>> [name for name in metrics if "acc" in name]
        ['eval_acc@0.5', 'eval_acc@0.7']
        ```
        """
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        if not isinstance(dataset, dict):  # those of a dictionary come here one by one
            self._note_evaluation(dataset, metrics, metric_key_prefix)
        return metrics

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """
        The boxes of a dataset's expressions, and what they reach where the dataset has boxes.

        Args:
            test_dataset (`datasets.Dataset` or `datasets.IterableDataset`): the rows.
            ignore_keys (`list[str]`, *optional*): not used.
            metric_key_prefix (`str`, *optional*, defaults to `"test"`): what names of metrics begin with.

        Returns:
            `PredictionOutput`: `predictions` and `label_ids`, `np.ndarray` of shape `(N, 4)`, xyxy pixels of the
            images in the order of the rows; `metrics` as in [`~EpmVGTrainer.evaluate`].

        Example:

        ```python
        >>> output = trainer.predict(dataset)
        >>> output.predictions.shape, output.label_ids[0].tolist()
        ((32, 4), [59.0, 97.0, 87.0, 125.0])
        ```
        """
        output = super().predict(test_dataset, ignore_keys, metric_key_prefix)
        self._note_evaluation(test_dataset, output.metrics or {}, metric_key_prefix)
        return output

    def push_to_hub(self, *args: Any, **kwargs: Any) -> CommitInfo:
        """
        Saves the model with its processor and its card, and uploads them, as in `Trainer`; but everything lies in
        `args.output_dir` before the Hub is asked for anything.

        Args:
            args, kwargs: those of `Trainer.push_to_hub` and of [`~EpmVGTrainer.create_model_card`].

        Returns:
            `CommitInfo`: where it is.

        Example:

        ```python
        >>> trainer.push_to_hub(license="apache-2.0").commit_url
        'https://huggingface.co/me/mine/commit/...'
        ```
        """
        if self.hub_model_id is None:
            self.save_model(_internal_call=True)
        return super().push_to_hub(*args, **kwargs)

    def create_model_card(
        self,
        language: str | list[str] | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        teacher: str | None = None,
    ) -> None:
        """
        Writes README.md into `args.output_dir`: how to use the model, what it reached, what it was trained on and by
        which command, its teacher, its limits. Arguments are those of `Trainer` (and `push_to_hub` hands its own on).

        Args:
            language (`str` or `list[str]`, *optional*): languages of the expressions, such as `"en"`.
            license (`str`, *optional*): identifier of the weights' licence, such as `"apache-2.0"`.
            tags (`str` or `list[str]`, *optional*): further tags.
            model_name (`str`, *optional*): title; the last name of `args.output_dir` unless given.
            finetuned_from (`str`, *optional*): a model of the Hub that this one started from. Those that the
                configuration knows of are named anyhow.
            tasks (`str` or `list[str]`, *optional*): task on the Hub instead of `"zero-shot-object-detection"`.
            dataset_tags (`str` or `list[str]`, *optional*): the training data on the Hub; what the dataset calls
                itself unless given.
            dataset (`str` or `list[str]`, *optional*): the training data's name, likewise.
            dataset_args (`str` or `list[str]`, *optional*): its configuration, such as `"unc"`.
            teacher (`str`, *optional*): the teacher's name; what it was loaded by unless given.

        Example:

        ```python
        >>> from pathlib import Path

        >>> trainer.create_model_card(license="apache-2.0", language="en")
        >>> "license: apache-2.0" in Path("outputs/mine/README.md").read_text()
        True
        ```
        """
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir)
        known = None if self.train_dataset is None else dataset_name(self.train_dataset)
        names = _listed(dataset) or _listed(dataset_tags) or _listed(known)
        base_models = hub_models(self.model.config, finetuned_from)
        config = ", ".join(_listed(dataset_args)) or None
        model = self.accelerator.unwrap_model(self.model)
        card = make_card(
            model_name or folder.absolute().name,
            with_code=model.is_remote_code(),
            adapter_of=public(model.name_or_path) if has_adapter(model) else None,
            language=language,
            license=license,
            task=(_listed(tasks) or [PIPELINE_TAG])[0],
            tags=_listed(tags),
            datasets=_listed(dataset_tags) or [dataset_id(name) for name in names if name != "custom"],
            base_models=base_models,
            evaluations=[
                dataclasses.replace(evaluation, config=config if evaluation.dataset == known else None)
                for (_, _, step), evaluation in self._evaluations.items()
                if step == self._step_of_weights()
            ],
            training=""
            if self.state.global_step == 0
            else describe_training(
                self, base_models, self._describe_data(", ".join(names)), self._describe_teacher(teacher)
            ),
        )
        if self.hub_model_id is not None:
            card.text = card.text.replace(REPOSITORY, self.hub_model_id)
        card.save(folder / "README.md")
        self._own_card()

    def _own_card(self) -> None:
        """From now on the model in memory has this run's card, and not that of the folder it was loaded from."""
        model = unwrap_peft_model(self.accelerator.unwrap_model(self.model))
        model.card_folder = self.processing_class.card_folder = self.args.output_dir

    def _describe_data(self, name: str) -> str:
        """What the model was trained on, a phrase for the card."""
        raise NotImplementedError

    def _describe_teacher(self, name: str | None) -> str | None:
        """Who taught the model what, sentences for the card; `None` without a teacher."""
        raise NotImplementedError

    def _note_evaluation(self, dataset: Dataset | IterableDataset, metrics: dict[str, float], prefix: str) -> None:
        values = {name.removeprefix(f"{prefix}_"): value for name, value in metrics.items()}
        if not METRICS.keys() & values.keys():
            return
        name, split = dataset_name(dataset), None if dataset.split is None else str(dataset.split)
        count = None if isinstance(dataset, IterableDataset) else len(dataset)
        self._evaluations[name, split, self._step_of_weights()] = Evaluation(values, name, split, count)

    def _step_of_weights(self) -> int:
        """The optimizer step that the model's weights are of."""
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end and not self.is_in_train else None
        # Not `best_global_step`: weights of the best evaluation that were not saved cannot be loaded.
        return self.state.global_step if best is None else int(best.rpartition("-")[2])


def describe_training(trainer: Trainer, base_models: Sequence[str], data: str, teacher: str | None) -> str:
    """
    The card's section on training.

    Args:
        trainer (`Trainer`): the trainer after training.
        base_models (`Sequence[str]`): models of the Hub that it started from.
        data (`str`): what it was trained on, a phrase.
        teacher (`str`, *optional*): who taught it what, sentences.
    """
    start = ", ".join(f"[{name}](https://huggingface.co/{name})" for name in base_models)
    if not start:
        start = "a saved model" if trainer.model.config.name_or_path else "scratch"
    model = trainer.accelerator.unwrap_model(trainer.model)
    size = f"{model.num_parameters() / 1e6:.1f} M parameters"
    if has_adapter(model):
        size += f", of which the adapter's {model.num_parameters(only_trainable=True):,} were trained"
    lines = ["## Training\n", f"{size}, from {start}, on {data}."]
    if teacher is not None:
        lines.append(f"\n{teacher}")
    command = training_command(sys.argv, trainer.args.world_size)
    if command is not None:
        lines.append(f"\n```bash\n{command}\n```")
    settings = {**extract_hyperparameters_from_trainer(trainer), **_own_settings(trainer.args)}
    lines += ["", *(f"* `{name}`: {value}" for name, value in settings.items())]
    _, history, _ = parse_log_history(trainer.state.log_history)
    columns = ("Step", "Epoch", "Training Loss", "Validation Loss", "Acc@0.5", "Mean Iou")
    table = [{name: row[name] for name in columns} for row in history or () if row.keys() >= set(columns)]
    if table:
        lines += ["\nWhile it was trained:\n", make_markdown_table(table)]
    libraries = ("epmvg_hf", "transformers", "torch", "datasets")
    lines.append("\n" + ", ".join(f"{name} {version(name)}" for name in libraries) + ".")
    return "\n".join(lines)


def training_command(argv: Sequence[str], world_size: int) -> str | None:
    """
    The command line of this process without what is nobody's business: tokens are left out, and paths outside the
    working folder cut to their last name. `None` if it was no script.
    """
    script = Path(argv[0])
    if script.suffix != ".py":
        return None
    arguments = []
    secret = False
    for argument in argv[1:]:
        option = argument.partition("=")[0]
        if secret and not argument.startswith("--"):
            secret = False
            continue
        secret = re.fullmatch(r"--.*(token|key|secret|password)", option) is not None
        if secret:
            secret = "=" not in argument
            continue
        arguments.append(public(argument))
    launcher = "python" if world_size == 1 else f"accelerate launch --num_processes {world_size}"
    return f"{launcher} {shlex.join([public(argv[0]), *arguments])}"


def public(text: str) -> str:
    """`text` with paths relative to the working folder, those elsewhere cut to their last name."""
    if "://" in text:
        return text
    option, equals, value = text.rpartition("=")
    path = Path(os.path.expanduser(value))  # noqa: PTH111 (Path.expanduser raises for a user it does not know)
    if path.is_absolute():
        shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path.name
        return f"{option}{equals}{shown}"
    # Within something else, such as "local-dir:/home/me/clip" or JSON.
    return re.sub(r"(?<![\w./~-])[~/]/?(?:[^\s\"',:/]+/)*([^\s\"',:/]+)", r"\1", text)


def hub_models(config: PreTrainedConfig, finetuned_from: str | None = None) -> list[str]:
    """The models of the Hub that a model started from, as a whole and in its towers; folders are none."""
    configs = [config, *(getattr(config, name) for name in config.sub_configs)]
    names = dict.fromkeys([finetuned_from, *(part.name_or_path for part in configs)])
    return [name for name in names if name and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not Path(name).exists()]


def dataset_name(dataset: Dataset | IterableDataset) -> str | None:
    """What a dataset is called, if it is more than a file format."""
    name = dataset.info.dataset_name
    return None if name in _FORMATS else name


def _own_settings(args: TrainingArguments) -> dict[str, Any]:
    """What `args` set beyond `TrainingArguments`, where it is not the default; no folders."""
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    return {
        field.name: value
        for field in dataclasses.fields(args)
        if field.name not in known
        and (value := getattr(args, field.name)) != field.default
        and not field.name.endswith("_dir")
    }


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())
