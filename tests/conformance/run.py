"""
Runs the common tests of transformers against EpmVG (`make conformance`), and reports how many passed and why others
were skipped.

The tests are not installed with transformers. They are part of its source distribution, which is downloaded once from
the package index to `.conformance`. The files in `overlay` are copied over it: test modules for EpmVG, and stand-ins
for a few files that the source distribution lacks. The exit status is 1 if a test fails, or is skipped for a reason
that is not listed below.

    python tests/conformance/run.py [arguments for pytest]
    RUN_SLOW=1 python tests/conformance/run.py       # also the slow tests: exports and torch.compile
    python tests/conformance/run.py --mutate leak    # on a copy of the package with a fault, which must be found
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
OVERLAY = Path(__file__).parent / "overlay"
WORK = ROOT / ".conformance"

# If fewer tests pass, some of them have not been found.
FEWEST_PASSES = 255

# The reasons for which a test may be skipped. Any other reason counts as a failure, because a model that lacks what a
# test looks for is skipped without a word.
SKIPS = {
    "needs hardware or a package that is not here": (
        r"test requires (multiple )?accelerators?|test requires (MPS|Flash Attention|deepspeed|bitsandbytes)"
        r"|test requires (the kernels|Torchcodec|librosa|Torchvision|ONNX)|This test requires an? (NVIDIA|AMD)"
    ),
    "slow: RUN_SLOW=1 runs it": r"test is slow",
    "another kind of model: causal or encoder-decoder, rotary positions, experts, resizable positions": (
        r"No (decoder-only|sequence-to-sequence) language modeling head|(does not|doesn't) (support|have) (\w+ )?rope"
        r"|no axial RoPE|does not support grouped_mm|no sparse experts|no `output_router_logits`"
        r"|does not have position embeddings|sliding window"
    ),
    "another kind of processor: chat, video, audio, image tokens within the text": (
        r"chat template|(video_processor|feature_extractor) attribute not present|_get_num_multimodal_tokens"
    ),
    "not declared, and not needed: modules kept in float32, tensor parallelism, old checkpoints renamed on loading": (
        r"_keep_in_fp32_modules|does not have a TP plan|No conversion found"
    ),
    "composite models have a test of their own for this": r"EpmVGModel does not support SDPA",
    "transformers' ResNet declares no attention implementations; runs with the transformer backbone": (
        r"Parts of this model don't support sdpa"
    ),
    "no image processor of transformers 5 has what this looks for": (
        r"No validation found for `preprocess`|does not have dict size or list image_mean"
    ),
}


class Mutation(NamedTuple):
    file: str
    old: str
    new: str


MUTATIONS = {
    "init": Mutation("model/modeling_epmvg.py", "        init.normal_(self.reg_token)\n", ""),
    "leak": Mutation(
        "model/modeling_epmvg.py",
        "last_hidden_state=self.visual_projection(encoded.last_hidden_state),",
        "last_hidden_state=self.visual_projection(encoded.last_hidden_state - encoded.last_hidden_state.mean(0)),",
    ),
    "sub_config": Mutation(
        "model/configuration_epmvg.py", '        "text_config": SubConfigSpec(AutoConfig, model_type="bert"),\n', ""
    ),
}


def download() -> Path:
    """The source distribution of the installed transformers, which is downloaded if it is not here yet."""
    release = version("transformers")
    archive = WORK / f"transformers-{release}.tar.gz"
    if not archive.exists():
        WORK.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        command += ["--no-build-isolation", "--dest", str(WORK), f"transformers=={release}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not archive.exists():
            print(done.stderr, file=sys.stderr)
            sys.exit(
                f"The conformance tests are part of the source distribution of transformers {release}, which pip "
                "could not download from the package index (its messages are above)."
            )
    return archive


def build_suite(archive: Path, suite: Path):
    """Copies the tests of the source distribution, and then the overlay, into the folder `suite`."""
    top = archive.name.removesuffix(".tar.gz")
    with tarfile.open(archive) as file:
        members = [member for member in file if member.name.startswith((f"{top}/tests/", f"{top}/pyproject.toml"))]
        for member in members:
            member.name = member.name.removeprefix(f"{top}/")
        file.extractall(suite, members=members, filter="data")
    shutil.copytree(OVERLAY, suite, dirs_exist_ok=True)
    for folder in [suite / "tests", *(suite / "tests").rglob("*/")]:
        (folder / "__init__.py").touch()


def mutate(name: str, folder: Path):
    """Copies the package into `folder` and puts the fault into the copy."""
    mutation, package = MUTATIONS[name], folder / "epmvg_hf"
    shutil.copytree(ROOT / "epmvg_hf", package, ignore=shutil.ignore_patterns("__pycache__"))
    source = (package / mutation.file).read_text()
    if source.count(mutation.old) != 1:
        sys.exit(f"The fault {name} has no place: {mutation.old.strip()!r} is not once in {mutation.file}.")
    (package / mutation.file).write_text(source.replace(mutation.old, mutation.new))


def run_pytest(suite: Path, package_root: Path, arguments: list[str]) -> ElementTree.ElementTree:
    """Runs the tests in another process, with the package in `package_root`, and returns pytest's report."""
    report = suite / "junit.xml"
    paths = [str(package_root), str(suite), *filter(None, [os.environ.get("PYTHONPATH")])]
    defaults = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    environment = {**defaults, **os.environ, **offline, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "pytest", "tests/models/epmvg", "--quiet", "--tb=short", f"--junitxml={report}"]
    command += ["-p", "no:cacheprovider", "-o", "log_cli=0", "-W", "ignore::pytest.PytestUnknownMarkWarning"]
    command += ["-W", "ignore::pytest.PytestConfigWarning"]  # the source distribution configures plugins
    subprocess.run([*command, *arguments], cwd=suite, env=environment)
    if not report.exists():
        sys.exit("pytest wrote no report: see its messages above.")
    return ElementTree.parse(report)


def outcome(case: ElementTree.Element) -> str:
    # A test that skips one class and fails with the next one has both entries, so failures are looked for first.
    return next((name for name in ("error", "failure", "skipped") if case.find(name) is not None), "passed")


def summarize(report: ElementTree.ElementTree, whole_suite: bool) -> bool:
    """Prints what happened, and returns whether there was no failure."""
    cases = list(report.iter("testcase"))
    counts = Counter(map(outcome, cases))
    reasons = Counter(case.find("skipped").get("message") for case in cases if outcome(case) == "skipped")
    failed = counts["failure"] + counts["error"]
    print(f"\nThe tests of transformers {version('transformers')}")
    print(f"  {counts['passed']} passed, {counts['skipped']} skipped, {failed} failed")
    unknown = dict(reasons)
    for why, pattern in SKIPS.items():
        matching = {reason: count for reason, count in reasons.items() if re.search(pattern, reason, re.IGNORECASE)}
        if matching:
            print(f"  {sum(matching.values())} skipped, {why}")
        for reason, count in sorted(matching.items(), key=lambda item: -item[1]):
            print(f"      {count} {reason}")
            unknown.pop(reason, None)
    for reason, count in unknown.items():
        print(f"  {count} skipped for a reason that is not known: {reason}")
    missing = whole_suite and counts["passed"] < FEWEST_PASSES
    if missing:
        print(f"  fewer than {FEWEST_PASSES} passed: tests have gone missing")
    return not (failed or unknown or missing)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutate", choices=MUTATIONS, help="put this fault into a copy of the package")
    options, arguments = parser.parse_known_args()
    archive = download()
    with tempfile.TemporaryDirectory() as folder:
        suite, package_root = Path(folder) / "suite", ROOT
        build_suite(archive, suite)
        if options.mutate is not None:
            package_root = Path(folder) / "mutated"
            mutate(options.mutate, package_root)
            arguments = ["-k", "EpmVGModelTest", "--tb=no", *arguments]
        report = run_pytest(suite, package_root, arguments)
    if options.mutate is None:
        sys.exit(not summarize(report, whole_suite=not arguments))
    failed = {case.get("name") for case in report.iter("testcase") if outcome(case) in ("failure", "error")}
    print(f"\nfault {options.mutate}: {len(failed)} tests fail\n  " + "\n  ".join(sorted(failed)))
    sys.exit(not failed)


if __name__ == "__main__":
    main()
