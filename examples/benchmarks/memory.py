"""The most memory that a model and what is done with it need."""

import multiprocessing
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import psutil
import torch

# What is imported before the memory is measured, once for all processes that measure it.
PRELOAD = [
    "torchvision",
    "epmvg_hf.model.modeling_epmvg",
    "transformers.models.bert.modeling_bert",
    "transformers.models.grounding_dino.modeling_grounding_dino",
    "transformers.models.owlv2.modeling_owlv2",
]


def peak_megabytes(make_action: Callable[[], Callable[[], object]], device: torch.device) -> float:
    """
    What making an action, with its model, and running it twice takes at most, beyond what was in use before. On a CPU
    a process of its own measures it, because memory that was once used and freed stays with a process.

    Args:
        make_action (`Callable`): makes the action. For a CPU it can be pickled.
        device (`torch.device`): where the action runs.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        action = make_action()
        action()  # which may need memory only once, to choose its kernels
        torch.cuda.reset_peak_memory_stats(device)
        action()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        return executor.submit(_resident_megabytes, make_action, torch.get_num_threads()).result()


def _resident_megabytes(make_action: Callable[[], Callable[[], object]], threads: int) -> float:
    """
    The work of the process. Pages of files do not count, of which most are the libraries' code. The peak is read from
    Linux, because that of `resource.getrusage` cannot be started anew after the model was made.
    """
    torch.set_num_threads(threads)
    process = psutil.Process()
    memory = process.memory_info()
    before = memory.rss - memory.shared
    action = make_action()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    action()
    action()
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    return (1024 * int(peak[1]) - process.memory_info().shared - before) / 1e6
