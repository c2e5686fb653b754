"""Trainings that are killed and resumed end as if nothing had happened. interruptions.py kills at random moments."""

import signal
from functools import partial

import pytest

from epmvg_hf.training.checkpoint_files import describe_damage, find_checkpoint
from tests.training.interruptions import KINDS, count_writes_and_kill, kill_at, start, train, train_with_kills


@pytest.mark.parametrize("kind", KINDS)
def test_killed_trainings_end_bit_equal(tmp_path, kind):
    expected, _ = train_with_kills(kind, tmp_path / "straight", [])
    moments = (3, 14)  # within the second of four epochs, in an evaluation or a save
    in_steps = [partial(kill_at, moment) for moment in moments]
    # Among the files of the prepared data, of the caches or the first checkpoint, and of a checkpoint.
    in_writes = [partial(count_writes_and_kill, moment) for moment in (8, 17, 9)]
    ended, killed = train_with_kills(kind, tmp_path / "killed", [*in_writes, *in_steps])
    assert ended == expected and killed >= 4


def test_each_change_of_a_file_may_be_the_last(tmp_path):
    """Whichever file is about to be written, renamed or deleted: the newest checkpoint is whole, if there is one."""
    for moment in range(1, 100, 4):
        folder = tmp_path / str(moment)
        process = start("best model, accumulation", folder, partial(count_writes_and_kill, moment), 4)
        process.join()
        if any((folder / "run").glob("checkpoint-*")):
            assert describe_damage(find_checkpoint(folder / "run")) is None
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert 20 < moment < 99


def test_a_training_that_had_ended_is_resumed(tmp_path):
    train("best model, accumulation", tmp_path, max_steps=2)
    train("best model, accumulation", tmp_path, max_steps=2)
