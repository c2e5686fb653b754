"""`epmvg info` and `epmvg --version`."""

from importlib.metadata import version

from typer.testing import CliRunner

import epmvg_hf
from epmvg_hf.cli import app


def test_versions_extras_and_devices_are_told():
    output = CliRunner().invoke(app, ["info"]).output
    lines = dict(line.partition(": ")[::2] for line in output.splitlines()[1:])
    assert output.startswith(f"epmvg_hf {epmvg_hf.__version__}, Python 3.")
    assert f"torch {version('torch')}, " in lines["inference"] and f"datasets {version('datasets')}" in lines["train"]
    assert "cpu (" in lines["devices"]
    assert any(name.startswith("precision on ") for name in lines)


def test_the_version_is_shown():
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"epmvg_hf {epmvg_hf.__version__}\n")
