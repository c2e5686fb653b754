"""
Writes checkpoints that are whole or not there, and what they hold beyond the weights of a plain model: their average,
or an adapter.
"""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints

from .adapters import has_own_adapter, load_adapter_weights
from .callbacks import BestCheckpointCallback, WeightAverage
from .card_trainer import CardTrainer
from .checkpoint_files import describe_damage, find_checkpoint, write_checksums
from .finite_steps import NonFiniteError
from .termination import TerminationCallback

# The folder within the output folder in which a checkpoint is written. What a killed run leaves there is never read.
UNFINISHED = ".unfinished_checkpoint"


class CheckpointTrainer(CardTrainer):
    """
    The part of [`EpmVGTrainer`] that saves and loads: where the weights are averaged, checkpoints hold the average
    and, beside it, the weights in training; a model with an adapter of its own saves and loads that alone.
    """

    _average: WeightAverage | None = None
    _unfinished: Path | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.add_callback(BestCheckpointCallback)
        self._termination = TerminationCallback(self.accelerator)
        if not self.args.enable_jit_checkpoint:  # which is transformers' own answer to the signal
            self.add_callback(self._termination)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(find_checkpoint(self.args.output_dir))
        elif resume_from_checkpoint:
            problem = describe_damage(resume_from_checkpoint)
            if problem is not None:
                raise ValueError(f"{resume_from_checkpoint} cannot be resumed from: {problem}")
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._termination.end()

    # Writing ---------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Has transformers write the checkpoint elsewhere and renames it when it is complete."""
        run_dir = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._unfinished = run_dir / UNFINISHED
        written, final = self._unfinished / name, run_dir / name
        try:
            if self.args.should_save:
                shutil.rmtree(self._unfinished, ignore_errors=True)  # of a run that was killed
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.state.best_model_checkpoint == str(written):
                self.state.best_model_checkpoint = str(final)
            if self.args.should_save:
                self.state.save_to_json(str(written / TRAINER_STATE_NAME))
                write_checksums(written)
                if final.exists():  # of an earlier run in the same folder, or of this step before it was resumed
                    final.rename(self._unfinished / "replaced")
                written.rename(final)
        except Exception as error:
            if self.args.should_save:
                shutil.rmtree(self._unfinished, ignore_errors=True)
            if _is_full(error, run_dir):
                kept = sorted(path.name for path in run_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
                left = f"; what was saved before is whole: {', '.join(kept)}" if kept else ""
                raise OSError(f"{name} could not be written, because the disk of {run_dir} is full{left}") from error
            raise
        finally:
            self._unfinished = None
        if self.args.should_save:
            shutil.rmtree(run_dir / UNFINISHED)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            rotate_checkpoints(
                str(run_dir), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True
            )

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._unfinished is None else str(self._unfinished)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._unfinished is None:  # the upload goes on in the background, so it must not begin before the renaming
            super()._push_from_checkpoint(checkpoint_folder)

    # Averages and adapters -------------------------------------------------------------------------------------

    def _average_weights(self, decay: float | None) -> WeightAverage | None:
        """The callback that averages the weights. The average is then evaluated and saved in place of the weights."""
        if decay is not None and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError("ema_decay needs whole weights on every process, which FSDP and DeepSpeed do not keep")
        self._average = None if decay is None else WeightAverage(decay)
        return self._average

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        """A context in which `self.model` is the average of the weights, if training keeps one."""
        trained = self.model
        if self._average is not None and self._average.model is not None:
            self.model = self._average.model.module
        try:
            yield
        finally:
            self.model = trained

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        saved = self.model.state_dict() if state_dict is None else state_dict
        wrong = [name for name, value in saved.items() if value.is_floating_point() and not value.isfinite().all()]
        if wrong:
            raise NonFiniteError(
                f"the model is not saved: NaN or infinity in {len(wrong)} of its {len(saved)} tensors, such as "
                f"{wrong[0]}"
            )
        with self._averaged_weights():
            super()._save(output_dir, state_dict)
        if self._average is not None and self._average.model is not None:
            self._average.save_trained(self.model, self.args.output_dir if output_dir is None else output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if has_own_adapter(self.model):
            load_adapter_weights(self.model, resume_from_checkpoint)  # the Trainer loads only those of a PeftModel
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._average is not None:
            self._average.checkpoint = resume_from_checkpoint

    def _load_best_model(self) -> None:
        if has_own_adapter(self.model):
            load_adapter_weights(self.model, self.state.best_model_checkpoint)
        else:
            super()._load_best_model()


def _is_full(error: BaseException | None, folder: Path) -> bool:
    """Whether an error, or one that caused it, is about a full disk. PyTorch and safetensors only say so in words."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left" in str(error) or "os error 28" in str(error):
            return True
        if "PytorchStreamWriter failed" in str(error) and shutil.disk_usage(folder).free < 1 << 20:
            return True
        error = error.__cause__ or error.__context__
    return False
