import errno
import json
import logging
from pathlib import Path

import pytest
import torch

from epmvg_hf import EpmVGTrainer, EpmVGTrainingArguments, load_grounding_dataset
from epmvg_hf.training.checkpoint_files import CHECKSUMS, describe_damage, find_checkpoint
from tests.fixtures.models import ONE_STEP, tiny_model, tiny_processor


def _trainer(folder: Path, seed: int = 0, **arguments) -> EpmVGTrainer:
    dataset = load_grounding_dataset("shapes", split="train", num_images=8)
    defaults = {**ONE_STEP, "output_dir": str(folder), "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    return EpmVGTrainer(
        model=tiny_model(seed=seed, box_head="map"),
        args=EpmVGTrainingArguments(**{**defaults, "per_device_train_batch_size": 4, **arguments}),
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=tiny_processor(),
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    _trainer(folder).train()
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of a finished training, whose files may be damaged."""
    for file in finished.rglob("*"):
        if file.is_file():
            copy = tmp_path / "run" / file.relative_to(finished)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    return tmp_path / "run"


def _delete(file: Path) -> None:
    file.unlink()


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def _zero_half(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


DAMAGES = [
    ("optimizer.pt", _delete, "optimizer.pt is missing"),
    ("scheduler.pt", _delete, "scheduler.pt is missing"),
    ("trainer_state.json", _cut, "trainer_state.json has [0-9,]+ bytes instead of"),
    ("model.safetensors", _zero_half, "the content of model.safetensors has changed"),
    (CHECKSUMS, _cut, f"{CHECKSUMS} cannot be read"),
]


@pytest.mark.parametrize(("name", "damage", "words"), DAMAGES, ids=[f"{d[0]} {d[1].__name__}" for d in DAMAGES])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(run, caplog, name, damage, words):
    damage(run / "checkpoint-3" / name)
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(run) == run / "checkpoint-2"
    assert f"resuming from {run}/checkpoint-2" in caplog.text and "checkpoint-3 (" in caplog.text
    trainer = _trainer(run, seed=1)
    with pytest.raises(ValueError, match=f"checkpoint-3 cannot be resumed from: {words}"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-3"))
    trainer.train(resume_from_checkpoint=True)
    straight = torch.load(run / "checkpoint-3" / "optimizer.pt") if name == "model.safetensors" else None
    assert trainer.state.global_step == 3 and describe_damage(run / "checkpoint-3") is None
    assert straight is None or straight["state"].keys()


def test_all_damaged_or_none_is_an_error(run, tmp_path):
    for step in (1, 2, 3):
        _delete(run / f"checkpoint-{step}" / "model.safetensors")
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be resumed from: checkpoint-3 \(model.safetensors"):
        _trainer(run).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="there is no checkpoint in"):
        _trainer(tmp_path / "empty").train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="checkpoint-9 cannot be resumed from: there is no such folder"):
        _trainer(run).train(resume_from_checkpoint=str(run / "checkpoint-9"))


def test_a_checkpoint_of_another_trainer_is_whole_if_it_has_its_last_file(run):
    (run / "checkpoint-3" / CHECKSUMS).unlink()
    assert find_checkpoint(run) == run / "checkpoint-3"
    (run / "checkpoint-3" / "trainer_state.json").unlink()
    assert find_checkpoint(run) == run / "checkpoint-2"


@pytest.mark.parametrize("part", ["save_model", "_save_optimizer_and_scheduler", "_save_rng_state"])
def test_what_fails_while_it_is_written_leaves_what_was_there(tmp_path, monkeypatch, part):
    trainer = _trainer(tmp_path)
    written = getattr(trainer, part)

    def fail_at_the_second(*args, **kwargs):
        written(*args, **kwargs)
        if trainer.state.global_step == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(trainer, part, fail_at_the_second)
    with pytest.raises(OSError, match=r"checkpoint-2 could not be written, because the disk .* full; .* checkpoint-1"):
        trainer.train()
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["checkpoint-1"]
    assert describe_damage(tmp_path / "checkpoint-1") is None


def test_the_same_step_is_saved_again(run):
    trainer = _trainer(run, seed=1)
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == [f"checkpoint-{step}" for step in (1, 2, 3)]
    assert describe_damage(run / "checkpoint-3") is None


def test_the_best_checkpoint_stays(tmp_path):
    arguments = {"save_total_limit": 1, "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"}
    arguments |= {"load_best_model_at_end": True, "greater_is_better": True}  # the highest loss is that of the first

    def names(folder: Path) -> list[str]:
        return sorted(path.name for path in folder.iterdir() if path.is_dir())

    trainer = _trainer(tmp_path / "a", **arguments, learning_rate=1e-2, max_steps=2)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best == str(tmp_path / "a" / "checkpoint-1") and "checkpoint-1" in names(tmp_path / "a")
    assert (
        json.loads((tmp_path / "a" / "checkpoint-1" / "trainer_state.json").read_text())["best_model_checkpoint"]
        == best
    )

    # Also where the folder of the run was moved before it was resumed.
    (tmp_path / "a").rename(tmp_path / "b")
    resumed = _trainer(tmp_path / "b", **arguments, learning_rate=1e-2, max_steps=4)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.best_model_checkpoint == str(tmp_path / "b" / "checkpoint-1")
    assert "checkpoint-1" in names(tmp_path / "b")
