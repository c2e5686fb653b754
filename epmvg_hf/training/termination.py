"""Saves a checkpoint and ends the training when the machine's scheduler gives notice with SIGTERM."""

import logging
import os
import signal
import threading
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .late_flag import LateFlag

logger = logging.getLogger(__name__)

# EX_TEMPFAIL of sysexits.h, "try again later": schedulers and restart policies run a job again that ends with it.
EXIT_CODE = os.EX_TEMPFAIL


class TerminationCallback(TrainerCallback):
    """
    Watches for SIGTERM while the trainer trains. After the step that is running, a checkpoint is saved, without an
    evaluation, and the process exits with the code 75. `train(resume_from_checkpoint=True)` goes on from there. With
    several processes it is enough that one of them gets the signal, and all save the same step.

    The `enable_jit_checkpoint` of transformers goes on to the end of `train()` and exits with 0, as if all steps had
    been done; it may also save in the middle of a step.

    Args:
        accelerator (`Accelerator`): connects the processes.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self._requested = False
        self._is_ending = False
        self._of_all: LateFlag | None = None
        self._handler_before: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._requested = self._is_ending = False
        self._of_all = None
        # Python allows it in the main thread alone. A training may begin several times, to find its batch size.
        if self._handler_before is None and threading.current_thread() is threading.main_thread():
            self._handler_before = signal.signal(signal.SIGTERM, self._request)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._is_requested():
            self._is_ending = True
            control.should_evaluate, control.should_save, control.should_training_stop = False, True, True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._is_ending:
            self._requested = False
            logger.warning("SIGTERM: step %d is saved, and the training ends here", state.global_step)
            # Otherwise threads of gloo can abort the process while Python ends, with an exit code of their own.
            self.accelerator.end_training()
            raise SystemExit(EXIT_CODE)

    def end(self) -> None:
        """
        Gives the signal back to whom it belonged before the training, however that ended. If it came after the last
        step, it is sent again, so that it ends what would follow.
        """
        if self._handler_before is not None:
            signal.signal(signal.SIGTERM, self._handler_before)
            self._handler_before = None
            if self._requested:
                os.kill(os.getpid(), signal.SIGTERM)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._requested = True

    def _is_requested(self) -> bool:
        """Whether any process got the signal. All processes have the same answer at the same step."""
        if self.accelerator.num_processes == 1:
            return self._requested
        requests = torch.tensor(float(self._requested), device=self.accelerator.device)
        previous, self._of_all = self._of_all, LateFlag(self.accelerator.reduce(requests, reduction="sum") > 0)
        return previous is not None and previous.read()
