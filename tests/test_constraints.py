"""The two files of exact versions and the ranges of pyproject.toml say the same."""

import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.fixtures.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = [line for extra in PROJECT["optional-dependencies"].values() for line in extra]
REQUIREMENTS = [Requirement(line) for line in [*PROJECT["dependencies"], *EXTRAS]]
PINNED = [each for each in REQUIREMENTS if each.name != "epmvg_hf"]


def pins_of(file: str) -> dict[str, str]:
    lines = [line for line in (ROOT / file).read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


@pytest.mark.parametrize("requirement", PINNED, ids=str)
def test_every_range_was_tried_at_both_ends(requirement):
    name = canonicalize_name(requirement.name)
    lowest, newest = (pins_of(file)[name] for file in ("constraints-lowest.txt", "constraints.txt"))
    assert lowest in requirement.specifier and newest in requirement.specifier
    # A library that is named in several extras has the highest of its lower bounds.
    ranges = [each.specifier for each in PINNED if each.name == requirement.name]
    bounds = [Version(each.version) for specifier in ranges for each in specifier if each.operator == ">="]
    assert Version(lowest) == max(bounds)
