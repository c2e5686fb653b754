import builtins
import subprocess
import sys

import pytest

import epmvg_hf


def test_every_public_name_is_there():
    for name in epmvg_hf.__all__:
        assert getattr(epmvg_hf, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'EpmVGDetector'"):
        epmvg_hf.EpmVGDetector  # noqa: B018


def test_inference_imports_no_training_library():
    """Neither data nor metrics nor plots nor the teacher are loaded by `import epmvg_hf`."""
    code = "import sys, epmvg_hf; print(*({'datasets', 'evaluate', 'matplotlib', 'open_clip'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


def test_a_missing_extra_says_what_to_install(monkeypatch):
    real_import = builtins.__import__

    def without_evaluate(name, *args, **kwargs):
        if name == "evaluate":
            raise ModuleNotFoundError("No module named 'evaluate'", name="evaluate")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_evaluate)
    monkeypatch.delitem(sys.modules, "epmvg_hf.grounding_accuracy", raising=False)
    with pytest.raises(ImportError, match=r'GroundingAccuracy needs evaluate: pip install "epmvg_hf\[train\]"'):
        epmvg_hf.GroundingAccuracy  # noqa: B018
