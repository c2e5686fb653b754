"""One training from the command line: data, teacher and student, the training, and what is left of it in a folder."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from datasets import Dataset, concatenate_datasets
from transformers import EarlyStoppingCallback, set_seed

from .. import register_for_hub
from ..data.loading import load_grounding_dataset
from ..data.readers.custom import SUFFIXES
from ..distillation.clip_teacher import ClipTeacher
from ..distillation.teacher_boxes import add_teacher_boxes
from ..evaluation.accuracy import find_boxes
from ..evaluation.blind_baselines import blind_accuracy
from ..evaluation.training_curves import draw_training_curves
from ..model.modeling_epmvg import EpmVGForVisualGrounding
from ..training.trainer import EpmVGTrainer
from ..training.training_args import EpmVGTrainingArguments
from .arguments import ARGUMENTS, CardArguments, DataArguments, ModelArguments
from .command_line import check_output_dir, checkpoint_to_resume, parse_arguments, show_own_messages, use_hardware
from .predictions import accuracy_by_kind, draw_some, write_predictions
from .student import make_model, with_lora
from .training_rows import confirmed_rows, split_labelled

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)


def run_training(
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    card_arguments: CardArguments,
    arguments: EpmVGTrainingArguments,
) -> None:
    """
    Trains and evaluates a model, draws its predictions and writes its model card.

    Args:
        model_arguments, data_arguments, card_arguments, arguments: what [`parse`] gives.

    Raises:
        ValueError, FileNotFoundError: arguments contradict each other, or data, teacher or model cannot be used. All
            of that is found before the training begins.
    """
    check(data_arguments, arguments)
    if arguments.should_log:
        show_own_messages()
    set_seed(arguments.seed)
    if card_arguments.share_code:
        register_for_hub()
    attention = use_hardware(arguments)
    if model_arguments.attn_implementation is None:
        model_arguments.attn_implementation = attention

    teacher = load_teacher(model_arguments, data_arguments, arguments)
    # Before the training, so that a split that is missing does not end it after hours.
    test_dataset = (
        load_evaluation(data_arguments, arguments, data_arguments.test_split) if arguments.do_predict else None
    )
    eval_dataset = load_evaluation(data_arguments, arguments, data_arguments.eval_split) if arguments.do_eval else None
    name_unused_test_split(data_arguments, arguments)
    # All training expressions give a new model its vocabulary, also those whose boxes are not used.
    train_dataset = load_split(data_arguments, arguments, data_arguments.train_split)
    expressions = train_dataset["expression"]
    train_dataset, caption_dataset = choose_rows(train_dataset, teacher, data_arguments, arguments)

    projected = teacher.embed_dim if teacher is not None and arguments.distils_embeddings else None
    model, processor = make_model(model_arguments, expressions, projected)
    if data_arguments.calibrate_scores and not model.config.score_head:
        raise ValueError("calibrate_scores is true, but the model has no score_head: set calibrate_scores to false")
    if model_arguments.map_loss_coefficient is not None:
        model.config.map_loss_coefficient = model_arguments.map_loss_coefficient
    student: EpmVGForVisualGrounding | PeftModel = model
    if model_arguments.lora_rank is not None:
        student = with_lora(model, model_arguments.lora_rank, model_arguments.lora_target_modules)
    patience = data_arguments.early_stopping_patience
    trainer = EpmVGTrainer(
        model=student,
        args=arguments,
        callbacks=None if patience is None else [EarlyStoppingCallback(patience)],
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
        teacher=teacher if arguments.distils else None,
        caption_dataset=caption_dataset,
    )
    trained = student.num_parameters(only_trainable=True)
    total = student.num_parameters() / 1e6
    logger.info("%d training expressions, %.1f M parameters, %d of them trained", len(train_dataset), total, trained)

    if arguments.do_train:
        train(trainer, data_arguments.calibrate_scores)
    if eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if test_dataset is not None:
        test(trainer, train_dataset, test_dataset, data_arguments)
    write_card(trainer, data_arguments, card_arguments)
    # Threads of gloo that are still connected when Python ends can abort a training that is done.
    trainer.accelerator.end_training()


def parse(command_line: list[str]) -> tuple[ModelArguments, DataArguments, CardArguments, EpmVGTrainingArguments]:
    """The arguments of a training, see [`~command_line.parse_arguments`]."""
    return parse_arguments(ARGUMENTS, "Trains and evaluates a visual grounding model.", command_line, "epmvg train")


def check(data_arguments: DataArguments, arguments: EpmVGTrainingArguments) -> None:
    """Refuses what cannot end well before anything is loaded."""
    check_output_dir(arguments)
    if data_arguments.calibrate_scores and arguments.do_train and not arguments.do_eval:
        raise ValueError(
            "calibrate_scores needs do_eval, which gives the rows for it: set it to true, or calibrate_scores to false"
        )
    if data_arguments.picture_rows < 0:
        raise ValueError(f"picture_rows is {data_arguments.picture_rows}, expected 0 or more")
    if data_arguments.max_eval_rows is not None and data_arguments.max_eval_rows < 1:
        raise ValueError(f"max_eval_rows is {data_arguments.max_eval_rows}, expected at least 1")
    without_labels = data_arguments.num_labelled_images is None
    if data_arguments.confirmed_model is not None and (without_labels or data_arguments.teacher_boxes):
        raise ValueError("confirmed_model needs num_labelled_images, and goes without teacher_boxes")


def load_teacher(
    model_arguments: ModelArguments, data_arguments: DataArguments, arguments: EpmVGTrainingArguments
) -> ClipTeacher | None:
    """The teacher, if the training needs one."""
    draws, confirms = data_arguments.teacher_boxes, data_arguments.confirmed_model is not None
    if not arguments.do_train or not (arguments.distils or draws or confirms):
        return None
    if model_arguments.teacher_name in (None, "none"):
        if draws or confirms:
            name = "teacher_boxes is true" if draws else "confirmed_model is given"
            raise ValueError(f"{name}, but there is no teacher: name one with teacher_name")
        return None
    pretrained = model_arguments.teacher_pretrained
    return ClipTeacher.from_pretrained(model_arguments.teacher_name, None if pretrained == "none" else pretrained)


def load_split(data_arguments: DataArguments, arguments: EpmVGTrainingArguments, split: str) -> Dataset:
    """The rows of a split, which one process prepares while the others wait."""
    with arguments.main_process_first(desc=f"preparing {split}"):
        return load_grounding_dataset(
            data_arguments.dataset_name,
            data_dir=data_arguments.data_dir,
            split=split,
            split_by=data_arguments.split_by,
            image_dir=data_arguments.image_dir,
            box_format=data_arguments.box_format,
            missing_images=data_arguments.missing_images,
            errors=data_arguments.errors,
            num_images=data_arguments.num_train_images if split == data_arguments.train_split else None,
            absent_per_image=data_arguments.absent_per_image,
        )


def load_evaluation(data_arguments: DataArguments, arguments: EpmVGTrainingArguments, split: str) -> Dataset:
    """The rows of a split, or the first of them."""
    dataset = load_split(data_arguments, arguments, split)
    limit = data_arguments.max_eval_rows
    return dataset if limit is None else dataset.select(range(min(limit, len(dataset))))


def name_unused_test_split(data_arguments: DataArguments, arguments: EpmVGTrainingArguments) -> None:
    """Says that own data has a split which nothing evaluates, because the arguments do not ask for that."""
    if arguments.do_predict or data_arguments.dataset_name != "custom" or data_arguments.data_dir is None:
        return
    split = data_arguments.test_split
    if any((Path(data_arguments.data_dir) / f"{split}{suffix}").exists() for suffix in SUFFIXES):
        logger.info("there is also a split %s, which is evaluated with --do_predict true", split)


def choose_rows(
    dataset: Dataset,
    teacher: ClipTeacher | None,
    data_arguments: DataArguments,
    arguments: EpmVGTrainingArguments,
) -> tuple[Dataset, Dataset | None]:
    """Rows to train on, with boxes of the data or of the teacher, and further ones for the teacher alone."""
    labelled, others = split_labelled(dataset, data_arguments.num_labelled_images, data_arguments.teacher_boxes)
    if teacher is None:
        if others is not None:
            logger.warning("%d rows without boxes are not used, because there is no teacher", len(others))
        return labelled, None
    if data_arguments.teacher_boxes:
        teacher.to(arguments.device)
        parts = [part for part in (labelled, others) if part is not None and len(part) > 0]
        return concatenate_datasets([add_teacher_boxes(part, teacher) for part in parts]), None
    if data_arguments.confirmed_model is not None and others is not None:
        teacher.to(arguments.device)
        others = confirmed_rows(data_arguments.confirmed_model, others, teacher, arguments)
    return labelled, others


def train(trainer: EpmVGTrainer, calibrate_scores: bool) -> None:
    """Trains, and saves the model (the best checkpoint, with `load_best_model_at_end`), metrics, state and curves."""
    result = trainer.train(resume_from_checkpoint=checkpoint_to_resume(trainer.args))
    trainer.save_model()
    if calibrate_scores:
        for name, value in trainer.calibrate_scores().items():
            logger.info("calibration of the scores: %s %.3f", name.replace("_", " "), value)
        trainer.save_model()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    history = trainer.state.log_history
    if trainer.is_world_process_zero() and any("loss" in entry or "eval_loss" in entry for entry in history):
        draw_training_curves(history, Path(trainer.args.output_dir) / "curves.png")


def test(trainer: EpmVGTrainer, train_dataset: Dataset, test_dataset: Dataset, data_arguments: DataArguments) -> None:
    """Evaluates the test split beside what needs no image, and writes and draws the predictions."""
    output = trainer.predict(test_dataset)
    metrics = dict(output.metrics)
    if trainer.is_world_process_zero():
        blind = blind_accuracy(train_dataset, test_dataset)
        by_kind = accuracy_by_kind(test_dataset, output.predictions)
        metrics.update({f"test_acc@0.5_{group.name}": group.accuracy for group in by_kind})
        metrics.update({f"test_blind_{name}": value for name, value in blind.items()})
        folder = Path(trainer.args.output_dir)
        boxes, _ = find_boxes(test_dataset["box"][:], "test data")
        write_predictions(folder / "predictions.jsonl", test_dataset, output.predictions, boxes, trainer.scores)
        logger.info("wrote %s, the worst first", folder / "predictions.jsonl")
        if data_arguments.picture_rows:
            draw_some(folder / "predictions.png", test_dataset, output.predictions, boxes, data_arguments.picture_rows)
        print(f"\nAcc@0.5 on {data_arguments.dataset_name} {data_arguments.test_split}")
        print(f"{output.metrics['test_acc@0.5']:8.3f}  this model")
        for place, group in enumerate(by_kind):
            worst = ", the worst" if place == 0 else ""
            print(f"{group.accuracy:8.3f}  of {group.count} expressions of the kind {group.name}{worst}")
        for name, value in blind.items():
            print(f"{value:8.3f}  blind: {name.replace('_', ' ')}")
    trainer.log_metrics("test", metrics)
    trainer.save_metrics("test", metrics)


def write_card(trainer: EpmVGTrainer, data_arguments: DataArguments, card_arguments: CardArguments) -> None:
    """Writes the model card, and pushes the folder if the arguments ask for that."""
    english = None if data_arguments.dataset_name == "custom" else "en"
    facts = {
        "license": card_arguments.license,
        "language": card_arguments.language or english,
        "dataset_args": data_arguments.split_by,
    }
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**facts)
    else:
        trainer.create_model_card(**facts)
