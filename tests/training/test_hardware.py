import json
import os
import platform
import subprocess
import sys

import pytest
import torch

from epmvg_hf.training import hardware
from epmvg_hf.training.hardware import choose_compute, choose_threads
from tests.fixtures.paths import ROOT


@pytest.mark.parametrize(("share", "precision", "attention"), [(0.5, "bf16", "eager"), (30.0, "no", None)])
def test_a_cpu_computes_in_what_it_is_fast_in(monkeypatch, share, precision, attention):
    monkeypatch.setattr(hardware, "_bfloat16_share", lambda: share)
    choice = choose_compute(torch.device("cpu"))
    assert (choice.precision, choice.attn_implementation) == (precision, attention)
    assert choice.reason == f"a bfloat16 product takes {share:.2g} times as long as a float32 one on this CPU"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="caps the instructions of x86")
def test_a_processor_without_the_instructions_is_not_asked_to_emulate_them():
    """The same processor, told to use AVX2 alone."""
    code = "import torch; from epmvg_hf.training.hardware import choose_compute\n"
    code += "print(choose_compute(torch.device('cpu')).precision)"
    capped = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **capped, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.stdout.split() == ["no"], result.stderr


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_other_devices(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    assert choose_compute(torch.device(device)).precision == ("bf16" if device == "cuda" else "no")


def test_the_users_threads_are_kept(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert choose_threads() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert choose_threads() == 1
    monkeypatch.delenv("OMP_NUM_THREADS")
    cores = choose_threads()
    assert cores == len(os.sched_getaffinity(0))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(2 * cores))
    assert choose_threads() == 1


@pytest.mark.parametrize("asked", [None, "1"])
def test_a_launchers_one_thread_is_not_the_users(tmp_path, asked):
    """`accelerate launch` says 1 to its processes in both cases."""
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os\nfrom epmvg_hf.training.hardware import choose_threads\n"
        "print(json.dumps([os.environ['OMP_NUM_THREADS'], choose_threads()]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("OMP_NUM_THREADS", None)
    if asked is not None:
        environment["OMP_NUM_THREADS"] = asked
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", str(script)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    said, chosen = json.loads(result.stdout.splitlines()[-1])
    assert said == "1" and chosen == (1 if asked else len(os.sched_getaffinity(0)))
