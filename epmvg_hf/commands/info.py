"""`epmvg info`: what a report of a fault should say about the machine."""

import platform
from importlib.metadata import PackageNotFoundError, requires, version

import typer
from packaging.requirements import Requirement

from epmvg_hf import __version__


def info() -> None:
    """Print versions, extras, devices and the precision that is fast here, for a report of a fault."""
    typer.echo(f"epmvg_hf {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for extra, libraries in _libraries().items():
        typer.echo(f"{extra or 'inference'}: {', '.join(f'{name} {_version(name)}' for name in libraries)}")
    import torch

    devices = [f"cuda:{number} {torch.cuda.get_device_name(number)}" for number in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("mps")
    typer.echo(f"devices: {', '.join([*devices, f'cpu ({torch.get_num_threads()} threads)'])}")
    try:
        from ..training.hardware import choose_compute
    except ImportError as error:
        typer.echo(f"precision: unknown, {error}")
        return
    for device in [name.split()[0] for name in devices] or ["cpu"]:
        choice = choose_compute(torch.device(device))
        typer.echo(
            f"precision on {device}: {'float32' if choice.precision == 'no' else choice.precision} ({choice.reason})"
        )


def _libraries() -> dict[str, list[str]]:
    """The libraries of inference (under "") and of each extra, as the package's metadata lists them."""
    libraries: dict[str, list[str]] = {}
    for line in requires("epmvg_hf") or []:
        requirement = Requirement(line)
        extra = "" if requirement.marker is None else str(requirement.marker).partition("extra == ")[2].strip('"')
        if requirement.name != "epmvg_hf" and extra not in ("dev", "test"):
            libraries.setdefault(extra, []).append(requirement.name)
    return libraries


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"
