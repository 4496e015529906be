"""The file of a trained model: what the model computes with, and more where there is room for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from library.models.lumina2 import load_nextdit
from library.models.lumina2_format import original_layout
from library.options.saving import ModelSavingOptions
from library.training.events import Moment
from library.training.output.model_file import ModelFile
from tests.training.test_metadata import make_facts
from tools.make_nano_models import make_nano_models

MOMENT = Moment(step=3, epoch=1, epoch_ended=False, run_ended=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    dit = make_nano_models(tmp_path_factory.mktemp("nano")).dit
    return load_nextdit(dit, device=torch.device("cpu"), dtype=torch.bfloat16)


def exact(parameter: nn.Parameter) -> Tensor:
    """A little more than the weight: what only fp32 can tell."""
    return parameter.detach().float() * (1 + 2**-9)


@pytest.mark.parametrize("precision", [None, "bf16", "float"])
def test_it_has_the_weights_of_the_model_or_all_that_is_known_of_them(
    model: nn.Module, tmp_path: Path, precision: str | None
) -> None:
    saving = ModelSavingOptions(output_dir=tmp_path, save_precision=precision)
    file = ModelFile(model, original_layout(model.params), make_facts(), saving, exact=exact)
    file.write(tmp_path / "model.safetensors", MOMENT)
    written = load_file(tmp_path / "model.safetensors")
    for name, parameter in model.named_parameters():
        dtype = {None: parameter.dtype, "bf16": torch.bfloat16, "float": torch.float32}[precision]
        wanted = parameter if parameter.dtype == dtype else exact(parameter).to(dtype)
        assert torch.equal(written[name], wanted), name
