import io

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, TrainerCallback

from epmvg_hf import (
    EpmVGDataCollator,
    EpmVGForVisualGrounding,
    EpmVGProcessor,
    EpmVGTrainer,
    EpmVGTrainingArguments,
    ImageGroups,
    load_grounding_dataset,
)
from epmvg_hf.evaluation.accuracy import paired_iou
from epmvg_hf.evaluation.score_quality import measure_calibration
from tests.fixtures.models import ONE_STEP, tiny_model
from tests.fixtures.paths import DISTRIBUTED
from tests.fixtures.process_groups import run_script
from tests.fixtures.tiny_teacher import TinyTeacher


@pytest.fixture
def dataset():
    return load_grounding_dataset("shapes", split="train", num_images=16)


def _trainer(folder, processor, dataset, model=None, callbacks=None, **arguments) -> EpmVGTrainer:
    defaults = {
        **ONE_STEP,
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
    }
    return EpmVGTrainer(
        model=model or tiny_model(box_head="map"),
        args=EpmVGTrainingArguments(**{**defaults, **arguments}),
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=processor,
        callbacks=callbacks,
    )


def _uneven(dataset):
    """Drop rows so that images have between 1 and 8 expressions."""
    keep, seen = [], {}
    for row, image_id in enumerate(dataset["image_id"]):
        seen[image_id] = seen.get(image_id, 0) + 1
        if seen[image_id] <= 1 + hash(int(image_id[-6:])) * 5 % 8:
            keep.append(row)
    return dataset.select(keep)


def test_accumulated_batches_equal_one_batch(tmp_path, processor, dataset):
    """1 x 8 and 4 x 2: same loss, terms and gradient norm, though the small batches differ in expressions."""
    dataset = _uneven(dataset).shard(2, 0, contiguous=True)
    assert len(ImageGroups(dataset)) == 8

    def first_log(**arguments):
        # Batch norm depends on the batch; everything else must not.
        model = tiny_model(box_head="map", frozen_batch_norm=True)
        trainer = _trainer(tmp_path, processor, dataset, model=model, **arguments)
        trainer.train()
        return trainer.state.log_history[0]

    whole = first_log()
    parts = first_log(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    for key in ("loss", "grad_norm", "loss_bbox", "loss_giou", "loss_map"):
        assert whole[key] == pytest.approx(parts[key], rel=1e-5), key
    assert whole["loss"] == pytest.approx(whole["loss_bbox"] + whole["loss_giou"] + whole["loss_map"], rel=1e-5)


def test_accumulated_batches_with_absent_rows_equal_one_batch(tmp_path, processor):
    """The small batches differ in how many of their rows have boxes and in how many of them are scored."""
    shown = load_grounding_dataset("shapes", split="train", num_images=8)
    gone = [row % 8 < row // 8 for row in range(len(shown))]  # none of the first image, seven of the last
    rows = shown.map(lambda row, index: {"box": None if gone[index] else row["box"]}, with_indices=True)
    rows = rows.add_column("absent", gone)

    def first_log(**arguments):
        config = {"score_head": True, "score_loss_coefficient": 3.0, "frozen_batch_norm": True}
        trainer = _trainer(tmp_path, processor, rows, model=tiny_model(box_head="map", **config), **arguments)
        trainer.train()
        return trainer.state.log_history[0]

    whole = first_log()
    parts = first_log(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    terms = ("loss_bbox", "loss_giou", "loss_map", "loss_score")
    for key in ("loss", "grad_norm", *terms):
        assert whole[key] == pytest.approx(parts[key], rel=1e-5), key
    assert whole["loss"] == pytest.approx(sum(whole[term] for term in terms[:3]) + 3 * whole["loss_score"], rel=1e-5)


def test_scores_are_rated_and_calibrated(tmp_path, processor, dataset):
    rows = dataset.add_column("absent", [row % 8 == 3 for row in range(len(dataset))])
    rows = rows.map(lambda row: {"box": None if row["absent"] else row["box"]})
    trainer = _trainer(tmp_path, processor, rows, model=tiny_model(box_head="map", score_head=True))
    metrics = trainer.evaluate()
    output = trainer.predict(rows)
    # The rows of the dataset that have a box are the first three and last four of each image.
    present = np.array([row % 8 != 3 for row in range(len(rows))])
    assert trainer.scores.shape == (len(rows),) and np.isnan(output.label_ids[~present]).all()
    boxes = np.array(rows["box"][:], dtype=object)[present].tolist()
    iou = paired_iou(output.predictions[present], np.array(boxes))
    assert metrics["eval_mean_iou"] == pytest.approx(iou.mean(), abs=1e-5)
    pairs = trainer.scores[present][:, None] - trainer.scores[~present]
    expected = (pairs > 0).mean() + (pairs == 0).mean() / 2
    assert metrics["eval_presence_auroc"] == pytest.approx(expected)
    error = measure_calibration(trainer.scores[present], iou >= 0.5).error
    assert metrics["eval_calibration_error"] == pytest.approx(error)

    # An untrained model is hardly ever right. Let half of the boxes be right, those of the higher scores more often.
    ranks = np.argsort(np.argsort(trainer.scores))
    right = np.random.default_rng(0).random(len(rows)) < ranks / len(rows)
    rows = dataset.map(lambda row, index: {"box": _inside(output.predictions[index], right[index])}, with_indices=True)
    scores = trainer.scores
    calibration = trainer.calibrate_scores(rows)
    trainer.predict(rows)
    assert calibration["calibration_error_of_other_half"] < calibration["calibration_error"]
    assert calibration["scale"] > 0 and np.array_equal(np.argsort(trainer.scores), np.argsort(scores))
    assert trainer.scores.mean() == pytest.approx(right.mean(), abs=0.01)
    assert trainer.evaluate(rows)["eval_calibration_error"] < calibration["calibration_error"]


def _inside(box: np.ndarray, right: bool) -> list[float]:
    """A box within another one that has an IoU of 0.9 or 0.2 with it."""
    xmin, ymin, xmax, ymax = box.tolist()
    return [xmin, ymin, xmax, ymin + (ymax - ymin) * (0.9 if right else 0.2)]


def test_calibration_needs_scores(tmp_path, processor, dataset):
    with pytest.raises(ValueError, match="the model has no score head"):
        _trainer(tmp_path, processor, dataset).calibrate_scores()


def test_evaluation_counts_every_row_once_in_dataset_order(tmp_path, processor, dataset):
    dataset = _uneven(dataset).shuffle(seed=0)
    trainer = _trainer(tmp_path, processor, dataset, per_device_eval_batch_size=3)
    output = trainer.predict(dataset)
    np.testing.assert_array_equal(output.label_ids, np.array(dataset["box"], np.float32))

    # An independent loop, one row at a time.
    model = trainer.model.eval()
    collator = EpmVGDataCollator(processor)
    expected = []
    for row in dataset:
        batch = collator([row])
        batch.pop("boxes")
        with torch.no_grad():
            outputs = model(**batch)
        expected.append(processor.post_process_grounding(outputs, batch)[0]["box"].numpy())
    np.testing.assert_allclose(output.predictions, np.stack(expected), atol=1e-3)

    metrics = trainer.evaluate()
    assert {"eval_acc@0.5", "eval_acc@0.7", "eval_mean_iou", "eval_loss", "eval_loss_bbox", "eval_loss_map"} <= set(
        metrics
    )
    assert metrics["eval_mean_iou"] == pytest.approx(output.metrics["test_mean_iou"])


def test_streamed_rows_train_and_evaluate_alike(tmp_path, processor, dataset):
    streamed = load_grounding_dataset("shapes", split="train", num_images=16, streaming=True)
    model = tiny_model(box_head="map")
    metrics = _trainer(tmp_path, processor, dataset, model=model).evaluate()
    trainer = _trainer(tmp_path, processor, streamed, model=model)
    streamed_metrics = trainer.evaluate()
    for name in ("eval_acc@0.5", "eval_mean_iou", "eval_loss"):
        assert streamed_metrics[name] == pytest.approx(metrics[name], rel=1e-5)
    trainer.train()
    assert trainer.state.global_step == 1


def test_stream_workers_lose_no_row(tmp_path, processor):
    """Several shards, read by two workers that each count from 0."""
    dataset = load_grounding_dataset("shapes", split="train", num_images=110)
    streamed = load_grounding_dataset("shapes", split="train", num_images=110, streaming=True)
    assert streamed.num_shards > 2
    model = tiny_model(box_head="map")
    whole = _trainer(tmp_path, processor, dataset, model=model).predict(dataset)
    by_workers = _trainer(tmp_path, processor, dataset, model=model, dataloader_num_workers=2).predict(streamed)
    assert len(by_workers.predictions) == len(dataset)
    assert by_workers.metrics["test_mean_iou"] == pytest.approx(whole.metrics["test_mean_iou"], rel=1e-5)


def test_several_evaluation_sets_with_persistent_workers(tmp_path, processor, dataset):
    sets = {"a": dataset.select(range(40)), "b": dataset.select(range(64, 128))}
    trainer = _trainer(tmp_path, processor, dataset, dataloader_num_workers=1, dataloader_persistent_workers=True)
    trainer.eval_dataset = sets
    together = trainer.evaluate()
    alone = _trainer(tmp_path, processor, dataset, model=trainer.model)
    for name, part in sets.items():
        expected = alone.evaluate(part)["eval_mean_iou"]
        assert together[f"eval_{name}_mean_iou"] == pytest.approx(expected, rel=1e-5)


def test_workers_change_neither_pixels_nor_losses(tmp_path, processor, dataset):
    """Workers send bytes, which are normalised in the main process."""
    losses, batches = [], []
    for workers in (0, 1):
        model = tiny_model(box_head="map")
        trainer = _trainer(tmp_path, processor, dataset, model=model, augment=False, dataloader_num_workers=workers)
        batch = next(iter(trainer.get_eval_dataloader()))
        assert (batch["pixel_values"].dtype == torch.uint8) == (workers > 0)
        batches.append(trainer._prepare_inputs(batch))
        losses.append((trainer.train().training_loss, trainer.evaluate()["eval_loss"]))
    assert losses[0] == losses[1]
    assert batches[0].keys() == batches[1].keys()
    assert all(torch.equal(values, batches[1][name]) for name, values in batches[0].items())


def test_large_jpegs_are_reduced_for_augmented_training_only(tmp_path, processor, dataset):
    def enlarge(row):
        file = io.BytesIO()
        row["image"].resize((400, 300)).save(file, format="JPEG")
        return {"image": {"bytes": file.getvalue(), "path": None}, "box": [8.0, 8.0, 100.0, 200.0]}

    large = dataset.select(range(16)).map(enlarge)
    for augment, size in ((True, (100, 75)), (False, (400, 300))):  # 100 pixels are more than 1.5 times the canvas
        trainer = _trainer(tmp_path, processor, large, augment=augment)
        assert trainer.get_train_dataloader().dataset[0].image.size == size
        assert trainer.get_eval_dataloader().dataset[0].image.size == (400, 300)
    trainer = _trainer(tmp_path, processor, large)
    trainer.train()
    assert trainer.predict(large).label_ids.tolist() == [[8.0, 8.0, 100.0, 200.0]] * 16


def test_rows_without_boxes_are_predicted(tmp_path, processor, dataset):
    trainer = _trainer(tmp_path, processor, dataset)
    output = trainer.predict(dataset.remove_columns("box"))
    np.testing.assert_allclose(output.predictions, trainer.predict(dataset).predictions, atol=1e-4)
    assert output.label_ids is None and "test_acc@0.5" not in output.metrics


def test_own_loss_function_is_refused(processor, dataset):
    with pytest.raises(ValueError, match="takes no compute_loss_func"):
        _arguments = EpmVGTrainingArguments(use_cpu=True)
        EpmVGTrainer(tiny_model(), _arguments, processing_class=processor, compute_loss_func=lambda *_: 0)


def test_learning_rates_per_part(tmp_path, processor, dataset):
    trainer = _trainer(
        tmp_path, processor, dataset, vision_learning_rate=1e-5, text_learning_rate=2e-5, weight_decay=0.1
    )
    trainer.create_optimizer()
    rate_and_decay = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in trainer.optimizer.param_groups
        for parameter in group["params"]
    }
    named = dict(trainer.model.named_parameters())
    assert set(rate_and_decay) == {id(parameter) for parameter in named.values()}
    expected = {
        "model.vision_model.embedder.embedder.convolution.weight": (1e-5, 0.1),
        "model.encoder.layers.0.fc1.bias": (1e-5, 0.0),
        "model.input_projection.weight": (1e-5, 0.1),
        "model.text_model.encoder.layer.0.output.dense.weight": (2e-5, 0.1),
        "model.text_projection.weight": (1e-3, 0.1),
        "model.visual_projection.weight": (1e-3, 0.1),
        "model.fusion.layers.0.self_attn_layer_norm.weight": (1e-3, 0.0),
        "box_head.0.weight": (1e-3, 0.1),
    }
    assert {name: rate_and_decay[id(named[name])] for name in expected} == expected


def test_a_new_encoder_has_a_rate_of_its_own(tmp_path, processor, dataset):
    model = tiny_model(box_head="map", projection_norm=True)
    rates = {"vision_learning_rate": 1e-5, "encoder_learning_rate": 2e-4}
    trainer = _trainer(tmp_path, processor, dataset, model=model, **rates)
    names = {name: group["lr"] for group in trainer.create_optimizer().param_groups for name in group["param_names"]}
    assert names["model.vision_model.embedder.embedder.convolution.weight"] == 1e-5
    for name in ("encoder.layers.0.fc1.bias", "input_projection.weight", "input_projection_norm.weight"):
        assert names[f"model.{name}"] == 2e-4
    assert names["model.text_projection_norm.weight"] == 1e-3


def test_settings_of_the_augmentation(tmp_path, processor, dataset):
    settings = {"flip": 1.0, "crop": 0, "color_jitter_probability": 0, "min_scale": 1.0}
    trainer = _trainer(tmp_path, processor, dataset, augment=True, augmentation_kwargs=settings)
    group = ImageGroups(dataset.filter(lambda row: row["kind"] == "attribute"))[0]
    batch = trainer.train_collator([group])
    scale = 64 / max(group.image.size)
    mirrored = group.image.width - group.boxes[:, [2, 0]].mean(1)
    expected = (mirrored - group.image.width / 2) * scale / 64
    centres = batch["labels"][:, 0].numpy()
    # Where the picture lies on the canvas is drawn, so only distances between boxes are known.
    np.testing.assert_allclose(centres - centres[0], expected - expected[0], atol=1e-5)
    with pytest.raises(TypeError, match="flipped"):
        _trainer(tmp_path, processor, dataset, augmentation_kwargs={"flipped": 1})


def test_backbones_freeze_for_the_first_epochs(tmp_path, processor, dataset):
    class Snapshots(TrainerCallback):
        states = ()

        def on_epoch_end(self, args, state, control, model, **kwargs):
            self.states += ({name: value.clone() for name, value in model.state_dict().items()},)

    snapshots, model = Snapshots(), tiny_model(box_head="map")
    start = {name: value.clone() for name, value in model.state_dict().items()}
    _trainer(
        tmp_path, processor, dataset, model=model, callbacks=[snapshots],
        max_steps=-1, num_train_epochs=2, freeze_backbone_epochs=1,
    ).train()  # fmt: skip

    def changed(before, after) -> set[str]:
        return {
            name.removeprefix("model.").split(".")[0] for name in before if not torch.equal(before[name], after[name])
        }

    assert all(parameter.requires_grad for parameter in model.parameters())
    first, second = snapshots.states
    assert not {"vision_model", "text_model"} & changed(start, first)
    assert {"fusion", "encoder", "reg_token", "box_head"} <= changed(start, first)
    assert {"vision_model", "text_model"} <= changed(first, second)


def test_frozen_parameters_are_never_trained(tmp_path, processor, dataset):
    model = tiny_model(box_head="map")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    patterns = [r"vision_model\.(embedder|encoder\.stages\.0)\.", "text_model.*word_embeddings"]
    trainer = _trainer(
        tmp_path, processor, dataset, model=model, max_steps=-1, num_train_epochs=2, freeze_backbone_epochs=1,
        weight_decay=0.1, frozen_parameters=patterns,
    )  # fmt: skip
    trainer.train()
    unchanged = {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])}
    assert unchanged == {
        name
        for name in before
        if name.startswith(("model.vision_model.embedder.", "model.vision_model.encoder.stages.0."))
        and not name.endswith(("running_mean", "running_var", "num_batches_tracked"))
    } | {"model.text_model.embeddings.word_embeddings.weight"}
    with pytest.raises(ValueError, match="frozen_parameters has 'vison', which is found in no parameter's name"):
        _trainer(tmp_path, processor, dataset, frozen_parameters=["vison"])


class Rates(TrainerCallback):
    """The learning rates of the text tower and of the rest, at each step."""

    def __init__(self):
        self.rates = []

    def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
        self.rates.append(sorted({group["lr"] for group in optimizer.param_groups}))


def _rates(tmp_path, processor, dataset, **arguments) -> list[list[float]]:
    rates = Rates()
    _trainer(
        tmp_path, processor, dataset, callbacks=[rates], max_steps=-1, num_train_epochs=3, learning_rate=1e-2,
        text_learning_rate=1e-3, **arguments,
    ).train()  # fmt: skip
    return rates.rates


def test_learning_rates_drop_by_epochs(tmp_path, processor, dataset):
    """An epoch has two steps, and the rates of all parts drop alike."""
    rates = _rates(tmp_path, processor, dataset, lr_drop_epochs=[1, 2], warmup_steps=1)
    factors = [0, 1, 0.1, 0.1, 0.01, 0.01]
    np.testing.assert_allclose(rates[1:], [[1e-3 * factor, 1e-2 * factor] for factor in factors[1:]])
    assert rates[0] == [0]


def test_learning_rates_follow_a_cosine(tmp_path, processor, dataset):
    rates = _rates(tmp_path, processor, dataset, lr_scheduler_type="cosine")
    factors = [(1 + np.cos(np.pi * step / 6)) / 2 for step in range(6)]
    np.testing.assert_allclose(rates, [[1e-3 * factor, 1e-2 * factor] for factor in factors])


def test_gradients_are_clipped_over_all_parts(tmp_path, processor, dataset):
    model = tiny_model(box_head="map", frozen_batch_norm=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = _trainer(
        tmp_path, processor, dataset, model=model, optim="sgd", learning_rate=1.0, max_grad_norm=0.01,
        lr_scheduler_type="constant",
    )  # fmt: skip
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] > 0.1
    step = torch.cat([(value - before[name]).flatten() for name, value in model.state_dict().items()])
    assert step.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_mixed_precision_trains_weights_in_float32(tmp_path, processor, dataset):
    def first_log(**arguments):
        model = tiny_model(box_head="map", frozen_batch_norm=True)
        trainer = _trainer(tmp_path, processor, dataset, model=model, **arguments)
        trainer.train()
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        return trainer.state.log_history[0]

    whole, mixed = first_log(), first_log(bf16=True)
    assert mixed["loss"] != whole["loss"]
    assert mixed["loss"] == pytest.approx(whole["loss"], rel=0.02)


def test_training_stops_early(tmp_path, processor, dataset):
    """Training stops by the validation metric, which a learning rate of 0 does not improve."""
    trainer = _trainer(
        tmp_path, processor, dataset, callbacks=[EarlyStoppingCallback(early_stopping_patience=2)], max_steps=8,
        learning_rate=0.0, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="acc@0.5", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 3
    assert trainer.state.best_metric == trainer.evaluate()["eval_acc@0.5"]


def test_a_batch_size_that_fits_is_found(tmp_path, processor, dataset):
    """Images of a batch, of which at most three fit into this memory."""
    trainer = _trainer(tmp_path, processor, dataset, auto_find_batch_size=True, max_steps=-1, num_train_epochs=1)
    sizes, compute_loss = [], trainer.compute_loss

    def with_little_memory(model, inputs, **kwargs):
        sizes.append(len(inputs["pixel_values"]))
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return compute_loss(model, inputs, **kwargs)

    trainer.compute_loss = with_little_memory
    trainer.train()
    fitting = [size for size in sizes if size <= 3]
    assert max(sizes) == 8 and max(fitting) >= 2 and sum(fitting) == 16
    assert trainer.state.global_step == len(fitting)


def test_best_checkpoint_is_kept_and_loads(tmp_path, processor, dataset):
    trainer = _trainer(
        tmp_path, processor, dataset, max_steps=4, eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, save_total_limit=1, load_best_model_at_end=True, metric_for_best_model="mean_iou",
        greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    scores = [log["eval_mean_iou"] for log in trainer.state.log_history if "eval_mean_iou" in log]
    assert len(scores) == 4 and trainer.state.best_metric == max(scores)
    assert trainer.evaluate()["eval_mean_iou"] == pytest.approx(max(scores))

    best = trainer.state.best_model_checkpoint
    model = EpmVGForVisualGrounding.from_pretrained(best)
    assert all(torch.equal(value, trainer.model.state_dict()[name]) for name, value in model.state_dict().items())
    assert EpmVGProcessor.from_pretrained(best).max_text_length == processor.max_text_length


@pytest.mark.parametrize(("step", "workers"), [(2, 0), (3, 0), (3, 2)], ids=["end of epoch", "within", "workers"])
def test_resumed_training_is_bit_equal(tmp_path, processor, dataset, step, workers):
    arguments = {
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 4,
        "augment": True,
        "max_expressions_per_image": 3,
        "dataloader_num_workers": workers,
    }
    straight = _trainer(tmp_path / "a", processor, dataset, **arguments)
    straight.train()
    resumed = _trainer(tmp_path / "b", processor, dataset, model=tiny_model(seed=1, box_head="map"), **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


class RefuseToWait(TorchDispatchMode):
    """Fails where a GPU would be waited for: where a number is read, or a size depends on values."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        masks = args[1] if function.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put_) else []
        waits = {torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select}
        assert function.overloadpacket not in waits
        assert not any(mask is not None and mask.dtype == torch.bool for mask in masks)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("terms", [{}, {"relation_loss_coefficient": 1.0, "feature_loss_coefficient": 1.0}])
def test_no_step_waits_for_the_device(tmp_path, processor, dataset, terms, monkeypatch):
    """Apart from transformers, which looks whether a mask of attention hides anything."""
    monkeypatch.setattr("transformers.masking_utils._ignore_bidirectional_mask_sdpa", lambda *args: False)
    model = tiny_model(box_head="map", teacher_projection_dim=24)
    args = EpmVGTrainingArguments(str(tmp_path), **ONE_STEP, **terms)
    assert not args.logging_nan_inf_filter  # it reads each loss
    assert args.optim == "adamw_torch_fused"
    trainer = EpmVGTrainer(
        model, args, train_dataset=dataset, processing_class=processor, teacher=TinyTeacher() if terms else None
    )
    batches = iter(list(trainer.get_train_dataloader()))
    with monkeypatch.context() as patch, RefuseToWait():
        for name in ("tolist", "numpy"):  # on a CPU they read the memory without a function that PyTorch dispatches
            patch.setattr(torch.Tensor, name, None)
        (batch,), counts = trainer.get_batch_samples(batches, 1, torch.device("cpu"))
        trainer.training_step(model, batch, counts)
    with pytest.raises(AssertionError), RefuseToWait():
        counts[0].item()


def test_a_few_steps_learn(tmp_path, processor, dataset):
    few = dataset.select(range(16))
    trainer = _trainer(tmp_path, processor, few, max_steps=60, logging_steps=20, learning_rate=5e-3)
    before = trainer.evaluate()["eval_mean_iou"]
    trainer.train()
    assert trainer.evaluate()["eval_mean_iou"] > before + 0.1


def test_processor_is_needed(tmp_path):
    with pytest.raises(ValueError, match="needs processing_class"):
        EpmVGTrainer(tiny_model(), EpmVGTrainingArguments(output_dir=str(tmp_path), use_cpu=True))


def test_data_loader_workers_decode_images(processor, dataset):
    loader = DataLoader(ImageGroups(dataset), batch_size=5, num_workers=1, collate_fn=EpmVGDataCollator(processor))
    rows = torch.cat([batch["row_index"] for batch in loader])
    assert rows.tolist() == list(range(len(dataset)))


def test_two_processes_equal_one(tmp_path):
    """Half the images on each of two processes, with other numbers of expressions: same loss, gradients, boxes."""
    script = DISTRIBUTED / "training.py"
    single, double = run_script(script, tmp_path / "one", 1, "4"), run_script(script, tmp_path / "two", 2, "2")
    assert double["processes"] == 2
    for name in single["log"]:
        assert double["log"][name] == pytest.approx(single["log"][name], rel=1e-4), name
    # 5 images over 2 processes: one image is filled up, and no row is lost or doubled.
    np.testing.assert_allclose(double["predictions"], single["predictions"], atol=1e-3)
    np.testing.assert_array_equal(double["references"], single["references"])
    for name in ("eval_acc@0.5", "eval_mean_iou"):
        assert double["metrics"][name] == pytest.approx(single["metrics"][name], rel=1e-5)
    # What is evaluated is what is saved, also of statistics that each process has of its own.
    np.testing.assert_allclose(double["evaluated"], double["saved"], atol=1e-3)
    # Twenty steps, with the teacher, of 37 and of 39 images: an epoch's last step counts each of its images once.
    for one_long, two_long in zip(single["long"], double["long"], strict=True):
        assert len(one_long["logs"]) == 20
        for one_step, two_steps in zip(one_long["logs"], two_long["logs"], strict=True):
            assert two_steps == pytest.approx(one_step, rel=1e-5)
        np.testing.assert_allclose(two_long["gradients"], one_long["gradients"], rtol=1e-5, atol=1e-5)
        assert two_long["metrics"] == pytest.approx(one_long["metrics"], rel=1e-5)


def test_two_processes_read_shards_of_a_stream_each(tmp_path):
    """One process has more rows than the other: no row is lost, and neither waits for the other in training."""
    result = run_script(DISTRIBUTED / "stream.py", tmp_path / "run", 2, "2")
    assert result["step"] == 8
    assert result["rows"] == [17, 17]
    assert result["mean_iou"][0] == pytest.approx(result["mean_iou"][1], rel=1e-5)
