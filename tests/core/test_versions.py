"""A torch that is too old, or not there, is told in a sentence before it is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from library.core import versions
from library.core.errors import ConfigError, MissingPackageError
from library.core.versions import require_torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("found", ["2.11.0", "2.13.0+cpu", "2.14.0.dev20261101", "3.0", "from source"])
def test_new_enough(monkeypatch, found):
    monkeypatch.setattr(versions, "version", lambda _: found)
    require_torch()


@pytest.mark.parametrize("found", ["2.10.1+cu128", "2.9.0", "1.13"])
def test_too_old(monkeypatch, found):
    monkeypatch.setattr(versions, "version", lambda _: found)
    with pytest.raises(
        ConfigError, match=rf"torch {found[:3]}.* is installed, and 2\.11 or a later one is needed"
    ):
        require_torch()


def test_not_installed(monkeypatch):
    def missing(name):
        raise versions.PackageNotFoundError(name)

    monkeypatch.setattr(versions, "version", missing)
    with pytest.raises(MissingPackageError, match="the package 'torch'"):
        require_torch()


@pytest.mark.parametrize("script", ["lumina_train_network.py", "lumina_minimal_inference.py"])
def test_a_script_says_so(nano, tmp_path, script):
    """With an old torch, which cannot even be imported, before the real one."""
    installed = tmp_path / "torch-2.8.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.8.0\n")
    (tmp_path / "torch.py").write_text("raise AttributeError('an old torch')")
    words = [f"--pretrained_model_name_or_path={nano.dit}", f"--output_dir={tmp_path / 'out'}"]
    if script == "lumina_train_network.py":
        words += [f"--gemma2={nano.gemma2}", f"--ae={nano.ae}", f"--train_data_dir={tmp_path}"]
        words += ["--output_name=x", "--network_module=networks.lora_lumina"]
    else:
        words += [f"--gemma2_path={nano.gemma2}", f"--ae_path={nano.ae}", "--prompt=x"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, script, *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2 and "error: torch 2.8.0 is installed" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
