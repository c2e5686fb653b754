import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import TrainerCallback

from epmvg_hf import EpmVGTrainer, EpmVGTrainingArguments, load_grounding_dataset
from tests.fixtures.models import ONE_STEP, tiny_model, tiny_processor
from tests.fixtures.paths import ROOT
from tests.fixtures.process_groups import with_notice


class Terminate(TrainerCallback):
    """Sends the notice of a scheduler within a step."""

    def __init__(self, step: int):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def _trainer(folder: Path, callbacks=None) -> EpmVGTrainer:
    dataset = load_grounding_dataset("shapes", split="train", num_images=8)
    # Of what is saved only the best would stay, were the training to end as one that is complete.
    arguments = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1} | {
        "load_best_model_at_end": True,
        "save_total_limit": 1,
        "metric_for_best_model": "loss",
        "max_steps": 4,
        "learning_rate": 1e-2,
        "greater_is_better": True,
    }
    return EpmVGTrainer(
        model=tiny_model(box_head="map"),
        args=EpmVGTrainingArguments(
            **{**ONE_STEP, **arguments}, output_dir=str(folder), per_device_train_batch_size=4
        ),
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=tiny_processor(),
        callbacks=callbacks,
    )


def test_a_notice_saves_the_step_and_ends_with_a_code_to_try_again(tmp_path):
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ending:
        _trainer(tmp_path, [Terminate(step=3)]).train()
    assert ending.value.code == 75 and signal.getsignal(signal.SIGTERM) is handler
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["global_step"] == 3
    resumed = _trainer(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4 and signal.getsignal(signal.SIGTERM) is handler


@pytest.fixture
def notices():
    """The notices that arrive outside of the training."""
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    yield seen
    signal.signal(signal.SIGTERM, before)


class Fail(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs) -> None:
        raise RuntimeError("out of memory")


def test_a_training_that_fails_gives_the_signal_back(tmp_path, notices):
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError, match="out of memory"):
        _trainer(tmp_path, [Fail()]).train()
    assert signal.getsignal(signal.SIGTERM) is handler and notices == []


class TerminateAtTheEnd(TrainerCallback):
    def on_train_end(self, args, state, control, **kwargs) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_notice_after_the_last_step_ends_what_would_follow(tmp_path, notices):
    trainer = _trainer(tmp_path, [TerminateAtTheEnd()])
    trainer.train()
    assert trainer.state.global_step == 4 and notices == [signal.SIGTERM]


SCRIPT = """
import os, signal, sys
from tests.training.test_termination import Terminate, _trainer

class OnOneProcess(Terminate):
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if args.process_index == 1:
            super().on_pre_optimizer_step(args, state, control, **kwargs)

_trainer(sys.argv[1], [OnOneProcess(step=1)]).train()
"""


def test_a_notice_to_one_process_ends_all_at_the_same_step(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = with_notice({**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, tmp_path)
    result = subprocess.run(
        [*command, str(tmp_path / "train.py"), str(tmp_path / "run")], env=environment, capture_output=True, text=True
    )
    assert result.returncode != 0 and "exitcode  : 75" in result.stderr, result.stderr[-3000:]
    assert "still open" not in result.stderr
    saved = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert saved[-1] == "checkpoint-2", saved  # the request of step 1 is known to both after step 2
