"""Where the time of an action goes."""

from pathlib import Path

import torch
from timing import Action
from torch.profiler import ProfilerActivity, profile


def write_profile(file: Path, action: Action, device: torch.device) -> None:
    """Writes a table of the operations of an action into a text file, those that cost most first."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
    sort_by = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    file.write_text(profiler.key_averages().table(sort_by=sort_by, row_limit=30, max_name_column_width=60))
