"""A `transformers.Trainer` that records the results of its evaluations and writes them into the model card."""

import dataclasses
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from huggingface_hub import CommitInfo
from transformers import Trainer
from transformers.trainer_utils import PredictionOutput, unwrap_peft_model

from ..model.card_mixin import PIPELINE_TAG, REPOSITORY
from .adapters import has_adapter
from .model_card import (
    METRICS,
    Evaluation,
    dataset_name,
    describe_training,
    find_base_models,
    make_card,
    strip_private_paths,
)


class CardTrainer(Trainer):
    """
    The part of [`EpmVGTrainer`] that shares a model: it records the results of the weights on each split, and writes
    the card that `push_to_hub` uploads.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        # The key is the dataset, the split and the optimizer step that the evaluated weights are from.
        self._evaluations: dict[tuple[str, str | None, int], Evaluation] = {}
        super().__init__(*args, **kwargs)

    def _hp_search_setup(self, trial: Any) -> None:
        # Each training calls this method once, when `model_init` has made its model.
        super()._hp_search_setup(trial)
        if self.model_init is not None:
            self._evaluations.clear()  # of the model before
        self._use_card_of_this_run()

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """
        Evaluates as `Trainer` does, and records the result for the model card.

        Args:
            eval_dataset (`datasets.Dataset` or `datasets.IterableDataset`, *optional*):
                The rows to evaluate on, by default the trainer's `eval_dataset`.
            ignore_keys (`list[str]`, *optional*): not used.
            metric_key_prefix (`str`, *optional*, defaults to `"eval"`): prefix of the metrics' names.

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
        if not isinstance(dataset, dict):  # for a dictionary, Trainer calls this method once for each of its datasets
            self._record_evaluation(dataset, metrics, metric_key_prefix)
        return metrics

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """
        Predicts the boxes of a dataset's expressions, and measures them if the dataset has true boxes.

        Args:
            test_dataset (`datasets.Dataset` or `datasets.IterableDataset`): the rows.
            ignore_keys (`list[str]`, *optional*): not used.
            metric_key_prefix (`str`, *optional*, defaults to `"test"`): prefix of the metrics' names.

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
        self._record_evaluation(test_dataset, output.metrics or {}, metric_key_prefix)
        return output

    def push_to_hub(self, *args: Any, **kwargs: Any) -> CommitInfo:
        """
        Saves the model with its processor and card in `args.output_dir`, and uploads that folder as `Trainer` does.

        Args:
            args, kwargs: arguments of `Trainer.push_to_hub` and of [`~EpmVGTrainer.create_model_card`].

        Returns:
            `CommitInfo`: the commit, with its `commit_url`.

        Example:

        ```python
        >>> commit = trainer.push_to_hub(license="apache-2.0")
        >>> commit.commit_url
        '.../me/mine/commit/...'
        ```
        """
        if self.hub_model_id is None:
            # Trainer creates the repository before it saves anything, so the weights would be lost if that failed.
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
        Writes a model card, README.md, into `args.output_dir`: how to use the model, its results, its training data
        and command, its teacher and its limits. The arguments are those of
        `Trainer.create_model_card` and `teacher`; `push_to_hub` takes them too.

        Args:
            language (`str` or `list[str]`, *optional*): languages of the expressions, such as `"en"`.
            license (`str`, *optional*): identifier of the weights' licence, such as `"apache-2.0"`.
            tags (`str` or `list[str]`, *optional*): further tags.
            model_name (`str`, *optional*): title of the card, by default the name of the folder `args.output_dir`.
            finetuned_from (`str`, *optional*):
                A model of the Hub that the training started from. Those that the model's configuration names are
                listed in any case.
            tasks (`str` or `list[str]`, *optional*): task on the Hub instead of `"zero-shot-object-detection"`.
            dataset_tags (`str` or `list[str]`, *optional*):
                Identifiers of the training data on the Hub, by default its name.
            dataset (`str` or `list[str]`, *optional*): name of the training data, by default the dataset's own.
            dataset_args (`str` or `list[str]`, *optional*): configuration of the training data, such as `"unc"`.
            teacher (`str`, *optional*): name of the teacher, by default the name under which it was loaded.

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
        model = self.accelerator.unwrap_model(self.model)
        training_data = None if self.train_dataset is None else dataset_name(self.train_dataset)
        data_names = _as_list(dataset) or _as_list(dataset_tags) or _as_list(training_data)
        base_models = find_base_models(self.model.config, finetuned_from)
        training = None
        if self.state.global_step > 0:
            data = self._describe_data(", ".join(data_names))
            training = describe_training(self, base_models, data, self._describe_teacher(teacher))
        card = make_card(
            model_name or folder.absolute().name,
            repository=self.hub_model_id or REPOSITORY,
            with_code=model.is_remote_code(),
            adapter_of=strip_private_paths(model.name_or_path) if has_adapter(model) else None,
            language=language,
            license=license,
            task=(_as_list(tasks) or [PIPELINE_TAG])[0],
            tags=_as_list(tags),
            datasets=_as_list(dataset_tags) or data_names,
            base_models=base_models,
            evaluations=self._evaluations_of_present_weights(training_data, ", ".join(_as_list(dataset_args))),
            training=training,
        )
        card.save(folder / "README.md")
        self._use_card_of_this_run()

    def _describe_data(self, name: str) -> str:
        """The training data, worded to follow "trained on" in the card."""
        raise NotImplementedError

    def _describe_teacher(self, name: str | None) -> str | None:
        """Sentences for the card about the teacher and what it taught, `None` without a teacher."""
        raise NotImplementedError

    def _use_card_of_this_run(self) -> None:
        """Makes `push_to_hub` of the model and processor upload the card of this run, not that of the old weights."""
        model = unwrap_peft_model(self.accelerator.unwrap_model(self.model))
        model.card_folder = self.processing_class.card_folder = self.args.output_dir

    def _record_evaluation(self, dataset: Dataset | IterableDataset, metrics: dict[str, float], prefix: str) -> None:
        metrics = {name.removeprefix(f"{prefix}_"): value for name, value in metrics.items()}
        if not METRICS.keys() & metrics.keys():  # the dataset has no boxes
            return
        evaluation = Evaluation(
            metrics,
            dataset=dataset_name(dataset) or "custom",
            split=None if dataset.split is None else str(dataset.split),
            expressions=None if isinstance(dataset, IterableDataset) else len(dataset),
        )
        place = (evaluation.dataset, evaluation.split, self._step_of_present_weights())
        known = self._evaluations.get(place)
        # What was measured on a few rows of a split, such as some to look at, does not take the place of all of them.
        if known is None or (evaluation.expressions or 0) >= (known.expressions or 0):
            self._evaluations[place] = evaluation

    def _evaluations_of_present_weights(self, training_data: str | None, config: str) -> list[Evaluation]:
        """The results of the present weights. `config` is the training data's configuration, "" if unknown."""
        return [
            dataclasses.replace(evaluation, config=config or None if dataset == (training_data or "custom") else None)
            for (dataset, _, step), evaluation in self._evaluations.items()
            if step == self._step_of_present_weights()
        ]

    def _step_of_present_weights(self) -> int:
        """The optimizer step after which the model had its present weights."""
        if self.is_in_train or not self.args.load_best_model_at_end or self.state.best_model_checkpoint is None:
            return self.state.global_step
        # `best_global_step` may be another step, at which no checkpoint was saved that could be loaded.
        return int(self.state.best_model_checkpoint.rpartition("-")[2])


def _as_list(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())
