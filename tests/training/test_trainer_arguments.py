"""Every argument of `Trainer` and `TrainingArguments` works, or one sentence says that it does not."""

import copy
import dataclasses
import inspect
import re

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from torch.utils.data import Dataset as TorchDataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import HPSearchBackend

from epmvg_hf import EpmVGModel, EpmVGTrainer, EpmVGTrainingArguments, load_grounding_dataset
from tests.fixtures.models import ONE_STEP, tiny_model, tiny_processor
from tests.fixtures.paths import EXAMPLES
from tests.fixtures.tiny_teacher import TinyTeacher

# Arguments of a quiet step that decide nothing of what is tested here.
QUIET = {**ONE_STEP, "per_device_train_batch_size": 4, "learning_rate": 1e-3}


@pytest.fixture
def dataset() -> Dataset:
    return load_grounding_dataset("shapes", split="train", num_images=8)


@pytest.fixture
def make_trainer(tmp_path, dataset):
    """Makes a trainer from arguments of `EpmVGTrainer` and, in `arguments`, of `EpmVGTrainingArguments`."""

    def make(arguments=None, **parts) -> EpmVGTrainer:
        args = EpmVGTrainingArguments(**{"output_dir": str(tmp_path), **QUIET, **(arguments or {})})
        if "model_init" not in parts:
            parts = {"model": tiny_model(box_head="map"), **parts}
        defaults = {"args": args, "train_dataset": dataset, "eval_dataset": dataset}
        return EpmVGTrainer(**{**defaults, "processing_class": tiny_processor(), **parts})

    return make


# The table of examples/TRAINER.md ----------------------------------------------------------------------------------

# A value of each refused argument, other than its default.
REFUSED_ARGUMENTS = {
    "average_tokens_across_devices": False,
    "batch_eval_metrics": True,
    "debug": "underflow_overflow",
    "eval_do_concat_batches": False,
    "include_for_metrics": ["inputs"],
    "label_names": ["labels"],
    "label_smoothing_factor": 0.1,
    "length_column_name": "tokens",
    "liger_kernel_config": {"rope": True},
    "optim_target_modules": "all-linear",
    "parallelism_config": "any",
    "remove_unused_columns": True,
    "use_cache": True,
    "use_liger_kernel": True,
}
REFUSED_PARTS = {
    "compute_loss_func": lambda outputs, labels, num_items_in_batch: 0,
    "data_collator": lambda rows: rows,
    "preprocess_logits_for_metrics": lambda logits, labels: logits,
}


def _table() -> list[tuple[str, str]]:
    """Each argument that the table names, with its verdict."""
    page = (EXAMPLES / "TRAINER.md").read_text()
    rows = re.findall(r"^\| (`.+?) \| (works|refused|no meaning) \|", page, re.MULTILINE)
    return [(name, verdict) for names, verdict in rows for name in re.findall(r"`(\w+)`", names)]


def test_every_argument_of_transformers_stands_in_the_table_once():
    parts = list(inspect.signature(Trainer.__init__).parameters)[1:]
    arguments = [field.name for field in dataclasses.fields(TrainingArguments)]
    assert sorted(name for name, _ in _table()) == sorted(parts + arguments)


def test_what_the_table_calls_refused_is_refused(tmp_path, make_trainer):
    refused = {name for name, verdict in _table() if verdict == "refused"}
    assert refused == REFUSED_ARGUMENTS.keys() | REFUSED_PARTS.keys()
    for name, value in REFUSED_ARGUMENTS.items():
        with pytest.raises(ValueError, match=name):
            EpmVGTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **{name: value})
    for name, value in REFUSED_PARTS.items():
        with pytest.raises(ValueError, match=name):
            make_trainer(**{name: value})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy"),
        ({"train_sampling_strategy": "batch_rebalance"}, "train_sampling_strategy"),
        ({"include_num_input_tokens_seen": True}, "include_num_input_tokens_seen"),
        ({"include_num_input_tokens_seen": "non_padding", "cache_frozen_towers": True}, "cache_frozen_towers"),
        ({"optim": "galore_adamw", "optim_target_modules": None}, "optim must not be 'galore_adamw'"),
        ({"optim": "lomo"}, "optim must not be 'lomo'"),
        ({"fp16": True}, "fp16 .* CPU"),
        ({"max_expressions_per_image": 0}, "max_expressions_per_image must be at least 1, got 0"),
        ({"max_expressions_per_image": -2}, "max_expressions_per_image must be at least 1, got -2"),
        ({"frozen_parameters": ["vision_model", "text(model"]}, r"has 'text\(model', .* at position 4"),
        ({"frozen_parameters": [3]}, "frozen_parameters has 3"),
        ({"lr_drop_epochs": 2.0}, "lr_drop_epochs must be a list"),
        ({"vision_learning_rate": -1e-4}, "vision_learning_rate must not be negative"),
        ({"text_learning_rate": -1e-4}, "text_learning_rate must not be negative"),
        ({"freeze_backbone_epochs": -1}, "freeze_backbone_epochs must not be negative"),
    ],
)
def test_values_that_cannot_work_are_refused(tmp_path, arguments, words):
    with pytest.raises(ValueError, match=words):
        EpmVGTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **arguments)


# What works --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"train_sampling_strategy": "sequential"},
        {"auto_find_batch_size": True},
        {"dataloader_in_order": False, "dataloader_num_workers": 1, "dataloader_prefetch_factor": 1},
        {"eval_accumulation_steps": 1},
        {"eval_use_gather_object": True},
        {"eval_on_start": True, "ema_decay": 0.9},
        {"optim": "adafactor"},
        {"optim": "adamw_torch_8bit"},
        {"optim": "sgd", "optim_args": "momentum=0.9"},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-5}},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1},
        {"lr_scheduler_type": "greedy", "eval_strategy": "steps", "eval_steps": 1},
        {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "mean_iou"},
        {"full_determinism": True},
        {"accelerator_config": {"split_batches": True}},
        {"skip_memory_metrics": False},
        {"torch_empty_cache_steps": 1},
        {"enable_jit_checkpoint": True},
    ],
    ids=lambda arguments: "-".join(arguments),
)
def test_an_argument_works(make_trainer, arguments):
    trainer = make_trainer({"max_steps": 2, **arguments})
    with torch.compiler.set_stance("force_eager"):  # torchao would compile the step of its optimiser for half a minute
        trainer.train()
    assert trainer.state.global_step == 2
    assert {"eval_loss", "eval_mean_iou"} <= trainer.evaluate().keys()
    torch.use_deterministic_algorithms(False)


def test_memory_is_saved_by_activation_checkpointing_alone(make_trainer):
    plain, saving = make_trainer(), make_trainer({"activation_checkpointing": True})
    assert plain.train().training_loss == pytest.approx(saving.train().training_loss, rel=1e-6)
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(saving.model.state_dict()[name], value, msg=name)


def test_noise_on_the_words_is_for_training_only(make_trainer):
    plain, noisy = make_trainer(), make_trainer({"neftune_noise_alpha": 5.0})
    assert plain.evaluate()["eval_loss"] == noisy.evaluate()["eval_loss"]
    assert plain.train().training_loss != noisy.train().training_loss


def test_tokens_are_those_of_the_expressions(make_trainer):
    trainer = make_trainer({"include_num_input_tokens_seen": "non_padding"})
    expected = [batch["attention_mask"].sum().item() for batch in trainer.get_train_dataloader()]
    trainer.train()
    assert trainer.state.num_input_tokens_seen in expected


def test_evaluation_drops_no_rows(make_trainer, dataset):
    """`dataloader_drop_last` is for training: three images of the eight do not fill a batch."""
    trainer = make_trainer({"dataloader_drop_last": True, "per_device_eval_batch_size": 5, "max_steps": -1})
    assert len(trainer.predict(dataset).predictions) == len(dataset)
    expected = make_trainer({"per_device_eval_batch_size": 5}).evaluate()["eval_mean_iou"]
    assert trainer.evaluate()["eval_mean_iou"] == pytest.approx(expected)
    assert len(trainer.get_train_dataloader()) == 2 and trainer.args.dataloader_drop_last


def test_an_expression_without_a_token_is_named_before_the_training(make_trainer, dataset):
    texts = dataset["expression"][:]
    texts[3] = "\u200b"
    trainer = make_trainer()
    trainer.train_dataset = dataset.remove_columns("expression").add_column("expression", texts)
    with pytest.raises(ValueError, match=r"train_dataset, row 3: the expression .* has no token"):
        trainer.train()


def test_a_batch_that_is_larger_than_the_data_is_an_error_where_it_would_be_dropped(make_trainer):
    trainer = make_trainer({"dataloader_drop_last": True, "per_device_train_batch_size": 9})
    with pytest.raises(ValueError, match="leaves no batch: train_dataset has 8 images, and a batch takes 9"):
        trainer.train()


def test_another_dataset_is_evaluated_with_persistent_workers(make_trainer, dataset):
    trainer = make_trainer({"dataloader_num_workers": 1, "dataloader_persistent_workers": True})
    few = dataset.select(range(16))
    whole, part = trainer.evaluate(), trainer.evaluate(few)
    assert part["eval_mean_iou"] == pytest.approx(make_trainer().evaluate(few)["eval_mean_iou"])
    assert trainer.evaluate()["eval_mean_iou"] == pytest.approx(whole["eval_mean_iou"])


def test_only_the_loss_is_computed_where_only_the_loss_is_wanted(make_trainer, dataset):
    trainer = make_trainer({"prediction_loss_only": True})
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == make_trainer().evaluate()["eval_loss"]
    assert "eval_mean_iou" not in metrics
    output = trainer.predict(dataset)
    assert output.predictions is None and output.label_ids is None


def test_own_metrics_may_be_arrays_and_carry_the_prefix(make_trainer):
    def compute(evaluated):
        return {"widths": np.mean(evaluated.predictions[:, 2] - evaluated.predictions[:, 0]), "eval_rows": 1}

    trainer = make_trainer({"save_strategy": "steps", "eval_strategy": "steps"}, compute_metrics=compute)
    trainer.train()  # writes the metrics as JSON
    metrics = trainer.evaluate()
    assert type(metrics["eval_widths"]) is float and metrics["eval_rows"] == 1
    best = {"metric_for_best_model": "widths", "eval_strategy": "steps", "save_strategy": "best"}
    trainer = make_trainer(best, compute_metrics=compute)
    trainer.train()
    assert trainer.state.best_metric == trainer.evaluate()["eval_widths"]
    for odd in (None, [1.0]):
        with pytest.raises(ValueError, match="compute_metrics must return a dict"):
            make_trainer(compute_metrics=lambda evaluated, odd=odd: odd).evaluate()


def test_own_optimiser_class(make_trainer):
    arguments = {"vision_learning_rate": 1e-5}
    trainer = make_trainer(arguments, optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 1e-2, "momentum": 0.5}))
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is torch.optim.SGD
    assert {(group["lr"], group["momentum"]) for group in optimizer.param_groups} == {(1e-3, 0.5), (1e-5, 0.5)}
    with pytest.raises(ValueError, match="optimizer_cls_and_kwargs must be a pair"):
        make_trainer(optimizer_cls_and_kwargs=torch.optim.SGD)


def test_own_optimiser_brings_its_own_rates(make_trainer):
    model = tiny_model(box_head="map")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    trainer = make_trainer(model=model, optimizers=(optimizer, None))
    trainer.train()
    assert trainer.state.log_history[0]["learning_rate"] == 1e-2
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    for name, value in (("vision_learning_rate", 1e-4), ("text_learning_rate", 1e-4), ("lr_drop_epochs", [1])):
        with pytest.raises(ValueError, match=f"optimizers .* {name} must be None"):
            make_trainer({name: value}, model=model, optimizers=(optimizer, schedule))
    with pytest.raises(ValueError, match="optimizers must be a pair"):
        make_trainer(model=model, optimizers=optimizer)


def test_the_best_checkpoint_has_the_lowest_loss_of_a_term(tmp_path):
    def best(name):
        return EpmVGTrainingArguments(str(tmp_path), use_cpu=True, metric_for_best_model=name).greater_is_better

    assert [best(name) for name in ("loss", "loss_giou", "eval_a_loss_map", "mean_iou")] == [False] * 3 + [True]


@pytest.mark.parametrize("metric", ["accuracy", "eval_acc", "flosses"])
def test_a_metric_that_no_evaluation_gives_is_refused(make_trainer, metric):
    with pytest.raises(ValueError, match=f"metric_for_best_model is '{metric}', .* acc@0.5, acc@0.7, mean_iou"):
        make_trainer({"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": metric})


def test_the_metric_names_one_of_several_evaluation_sets(make_trainer, dataset):
    sets = {"a": dataset, "b": dataset.select(range(8))}
    arguments = {"eval_strategy": "steps", "save_strategy": "steps", "load_best_model_at_end": True}
    with pytest.raises(ValueError, match=r"metric_for_best_model is 'loss', .*a_mean_iou"):
        make_trainer(arguments, eval_dataset=sets)
    trainer = make_trainer({**arguments, "metric_for_best_model": "b_mean_iou"}, eval_dataset=sets)
    trainer.train()
    assert trainer.state.best_metric == trainer.state.log_history[-2]["eval_b_mean_iou"]


# What the trainer is made of ---------------------------------------------------------------------------------------


def test_plain_arguments_are_refused(tmp_path, make_trainer):
    for args in (TrainingArguments(output_dir=str(tmp_path), use_cpu=True), None):
        with pytest.raises(ValueError, match="args must be EpmVGTrainingArguments"):
            make_trainer(args=args)


def test_other_models_are_refused(make_trainer):
    for model in (EpmVGModel(tiny_model().config), torch.nn.Linear(2, 2), "outputs/demo"):
        with pytest.raises(ValueError, match=f"model must be an EpmVGForVisualGrounding.*{type(model).__name__}"):
            make_trainer(model=model)
    with pytest.raises(ValueError, match="model must be an EpmVGForVisualGrounding"):
        make_trainer(model_init=lambda: EpmVGModel(tiny_model().config))


def test_a_compiled_model_is_none_of_them(make_trainer):
    model = torch.compile(tiny_model(box_head="map"), backend="eager")
    assert make_trainer(model=model).model is model


def test_parts_of_a_processor_are_refused(make_trainer):
    processor = tiny_processor()
    for part in (processor.tokenizer, processor.image_processor):
        with pytest.raises(ValueError, match=f"processing_class must be an EpmVGProcessor.*{type(part).__name__}"):
            make_trainer(processing_class=part)


class Rows(TorchDataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return {}


def test_other_datasets_are_refused(make_trainer, dataset):
    rows = list(dataset.select(range(2)))
    for other in (rows, Rows(), iter(rows), "shapes"):
        for name in ("train_dataset", "eval_dataset", "caption_dataset"):
            with pytest.raises(ValueError, match=f"{name} must be a datasets.Dataset.*{type(other).__name__}"):
                make_trainer(**{name: other})
    splits = DatasetDict(train=dataset, validation=dataset)
    with pytest.raises(ValueError, match=r"train_dataset must be a datasets.Dataset.*one of its splits: train, valid"):
        make_trainer(train_dataset=splits)
    with pytest.raises(ValueError, match=r"eval_dataset\['b'\] must be a datasets.Dataset"):
        make_trainer(eval_dataset={"a": dataset, "b": rows})
    assert "eval_validation_mean_iou" in make_trainer(eval_dataset=splits).evaluate()
    for call in ("evaluate", "predict"):
        with pytest.raises(ValueError, match=r"dataset must be a datasets.Dataset.*list"):
            getattr(make_trainer(), call)(rows)


def test_one_pattern_may_stand_alone(make_trainer):
    trainer = make_trainer({"frozen_parameters": "text_model"})
    frozen = {name for name, parameter in trainer.model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in trainer.model.named_parameters() if "text_model" in name}
    with pytest.raises(ValueError, match=r"frozen_parameters .* leaves no parameter to train"):
        make_trainer({"frozen_parameters": [r"\w"]})


# A model for each run ----------------------------------------------------------------------------------------------


def _states(trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def test_model_init_begins_anew_in_each_run(make_trainer):
    """Two runs of one trainer, with everything that acts on the student, equal a run of a trainer of its own."""
    arguments = {
        "max_steps": -1, "num_train_epochs": 2, "frozen_parameters": ["text_model"], "ema_decay": 0.9,
        "freeze_backbone_epochs": 1, "cache_frozen_towers": True, "vision_learning_rate": 1e-4,
    }  # fmt: skip
    models = []

    def model_init():
        with torch.random.fork_rng():  # the order of the rows is drawn later
            models.append(tiny_model(box_head="map", frozen_batch_norm=True, teacher_projection_dim=24))
        return models[-1]

    expected = make_trainer(arguments, model=model_init(), teacher=TinyTeacher())
    expected.train()
    trainer = make_trainer(arguments, model_init=model_init, teacher=TinyTeacher())
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    for _ in range(2):
        result = trainer.train()
        assert result.training_loss == pytest.approx(expected.state.log_history[-1]["train_loss"])
        assert trainer.model is models[-1] and trainer.model.card_folder == trainer.args.output_dir
        for name, value in _states(expected).items():
            assert torch.equal(trainer.model.state_dict()[name], value), name
        assert sorted(map(str, kinds)) == sorted(str(type(c)) for c in trainer.callback_handler.callbacks)
    assert len({id(model) for model in models}) == 4


def test_model_init_that_builds_nothing_is_refused(make_trainer):
    model = tiny_model()
    trainer = make_trainer(model_init=lambda: model)
    with pytest.raises(ValueError, match="model_init must build a new model"):
        trainer.train()


class Trials:
    """A search that runs given trials one after the other, as a backend of transformers does."""

    trials: list[dict]
    runs: list

    @staticmethod
    def is_available():
        return True

    def ensure_available(self):
        pass

    def default_hp_space(self, trial):
        return trial

    def run(self, trainer, n_trials, direction, **kwargs):
        self.runs.clear()
        for trial in self.trials:
            trainer.objective = None
            trainer.train(trial=dict(trial))
            if trainer.objective is None:
                trainer.objective = trainer.compute_objective(trainer.evaluate())
            frozen = {name for name, parameter in trainer.model.named_parameters() if not parameter.requires_grad}
            self.runs.append((trainer.objective, frozen, copy.copy(trainer.args), _states(trainer)))
            trainer.model = trainer.model_wrapped = None  # as the backend of optuna does
        return min(objective for objective, *_ in self.runs)


@pytest.fixture
def trials(monkeypatch):
    Trials.runs = []
    # Trials of this backend are dictionaries.
    monkeypatch.setitem(Trainer.hyperparameter_search.__globals__["ALL_HYPERPARAMETER_SEARCH_BACKENDS"],
                        HPSearchBackend.WANDB, Trials)  # fmt: skip
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial)
    monkeypatch.setattr(EpmVGTrainer, "_get_output_dir", lambda self, trial: self.args.output_dir)
    return Trials


def test_a_search_tries_each_value_on_a_new_model(make_trainer, trials):
    trials.trials = [
        {"learning_rate": 1e-3, "vision_learning_rate": 1e-4, "frozen_parameters": "text_model", "ema_decay": 0.5},
        {"learning_rate": 5e-3, "vision_learning_rate": None, "frozen_parameters": "vision_model", "ema_decay": None},
        {"learning_rate": 1e-3, "max_expressions_per_image": 2, "freeze_backbone_epochs": 1},
        {"learning_rate": 1e-3, "vision_learning_rate": 1e-4, "frozen_parameters": "text_model", "ema_decay": 0.5},
    ]
    given = {"frozen_parameters": ["box_head"], "ema_decay": 0.9, "text_learning_rate": 1e-5}

    def model_init():
        return tiny_model(box_head="map")

    trainer = make_trainer(given, model_init=model_init)
    best = trainer.hyperparameter_search(backend="wandb", n_trials=4)
    objectives, frozen, arguments, states = zip(*trials.runs, strict=True)
    assert best == min(objectives)
    names = {name for name, _ in tiny_model(box_head="map").named_parameters()}
    for found, part in zip(frozen, ("text_model", "vision_model", "box_head", "text_model"), strict=True):
        assert found >= {name for name in names if part in name.split(".")}
        assert not any(other in name for other in {"text_model", "vision_model"} - {part} for name in found)
    assert [args.ema_decay for args in arguments] == [0.5, None, 0.9, 0.5]
    assert [args.vision_learning_rate for args in arguments] == [1e-4, None, None, 1e-4]
    # The same values give the same run, whatever was tried between.
    assert objectives[0] == objectives[3] != objectives[1]
    assert all(torch.equal(value, states[3][name]) for name, value in states[0].items())
    # A trial equals a run of its own.
    alone = make_trainer({**given, **trials.trials[0]}, model_init=model_init)
    alone.train()
    assert alone.evaluate()["eval_loss"] == objectives[0]
    # The search leaves the arguments as they were.
    assert (trainer.args.ema_decay, trainer.args.frozen_parameters) == (0.9, ["box_head"])
    assert trainer.args.learning_rate == QUIET["learning_rate"]


def test_a_trial_with_an_impossible_value_says_so(make_trainer, trials):
    trials.trials = [{"ema_decay": 1.5}]
    trainer = make_trainer(model_init=lambda: tiny_model(box_head="map"))
    with pytest.raises(ValueError, match=r"ema_decay must lie between 0 and 1, got 1.5"):
        trainer.hyperparameter_search(backend="wandb")


def test_a_search_says_what_it_needs(make_trainer, trials, dataset):
    with pytest.raises(ValueError, match="hyperparameter_search needs model_init"):
        make_trainer().hyperparameter_search(backend="wandb")
    trainer = make_trainer(model_init=lambda: tiny_model(box_head="map"))
    with pytest.raises(ValueError, match="direction='maximize' needs compute_objective"):
        trainer.hyperparameter_search(backend="wandb", direction="maximize")
    trials.trials = [{"learning_rate": 1e-3}]
    trainer.eval_dataset = {"a": dataset}
    with pytest.raises(ValueError, match=r"compute_objective.* eval_a_loss"):
        trainer.hyperparameter_search(backend="wandb")


# Resuming ----------------------------------------------------------------------------------------------------------

RESUMED = {
    "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "weight_decay": 0.1, "vision_learning_rate": 1e-4,
    "frozen_parameters": ["text_model"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"frozen_parameters": None},
            r"it trained \d+ parameters and this run trains \d+, .*\.text_model\..*frozen_parameters",
        ),
        ({"frozen_parameters": ["text_model", "vision_model"]}, r"trained \d+ parameters .* frozen_parameters"),
        ({"frozen_parameters": ["fusion.layers.0", "text_model"]}, r"frozen_parameters"),
        ({"vision_learning_rate": None}, r"learning rates .*0\.0001.* vision_learning_rate"),
        ({"vision_learning_rate": 2e-4}, r"learning rates .*0\.0001.*0\.0002.* vision_learning_rate"),
        ({"learning_rate": 2e-3}, r"learning rates .*0\.001.*0\.002.* learning_rate"),
        ({"weight_decay": 0.0}, r"weight decays .*0\.1.* weight_decay"),
        ({"weight_decay": 0.2}, r"weight decays .*0\.1.*0\.2.* weight_decay"),
    ],
)
def test_a_run_with_other_parameters_is_not_resumed(tmp_path, make_trainer, changes, words):
    make_trainer(RESUMED).train()
    resumed = make_trainer({**RESUMED, **changes}, model=tiny_model(seed=1, box_head="map"))
    before = _states(resumed)
    with pytest.raises(ValueError, match=f"checkpoint-2 cannot be resumed.*{words}"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(value, before[name]) for name, value in resumed.model.state_dict().items())


def test_an_adapter_does_not_resume_a_run_of_the_whole_model(tmp_path, make_trainer):
    peft = pytest.importorskip("peft")
    make_trainer(RESUMED).train()
    model = peft.get_peft_model(tiny_model(box_head="map"), peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    arguments = {**RESUMED, "frozen_parameters": None}
    with pytest.raises(ValueError, match=r"checkpoint-2 cannot be resumed.* adapter"):
        make_trainer(arguments, model=model).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_as_many_other_parameters_do_not_resume(tmp_path, make_trainer):
    """Their moments would go to parameters of the same shapes without a word."""
    layers = [f"model.fusion.layers.{number}." for number in (0, 1)]
    make_trainer({**RESUMED, "frozen_parameters": [layers[0]]}).train()
    resumed = make_trainer({**RESUMED, "frozen_parameters": [layers[1]]})
    with pytest.raises(ValueError, match=rf"only one of them trains {layers[0]}.*frozen_parameters"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("schedule", ["linear", "reduce_lr_on_plateau"])
def test_the_same_arguments_resume(tmp_path, make_trainer, schedule):
    arguments = {**RESUMED, "lr_scheduler_type": schedule, "eval_strategy": "steps", "eval_steps": 2}
    make_trainer(arguments).train()
    resumed = make_trainer(arguments, model_init=lambda: tiny_model(seed=1, box_head="map"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4
