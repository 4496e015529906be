"""LyCORIS' kinds against the lycoris-lora package: outputs, gradients, files in both directions, merging."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lycoris import kohya
from safetensors.torch import save_file
from torch import Tensor, nn

from networks.files import inspect_lora
from networks.from_file import dit_paths
from networks.layer import linear_layers
from networks.lora import merge
from networks.lycoris.args import read_args
from networks.lycoris.layer import LycorisSize
from networks.lycoris.network import LycorisNetwork, sizes_of_file
from networks.lycoris.package import planned

Inputs = tuple[Tensor, Tensor, Tensor]
Make = Callable[..., nn.Module]

# By name: the rank, and arguments of both.
CASES: dict[str, tuple[int, dict[str, str]]] = {
    "lora": (3, {"algo": "lora"}),
    "lora-rs": (3, {"algo": "locon", "rs_lora": "True"}),
    "lora-dora": (3, {"algo": "lora", "dora_wd": "True"}),
    "loha": (3, {"algo": "loha"}),
    "loha-dora-in": (3, {"algo": "loha", "dora_wd": "True", "wd_on_output": "False"}),
    "loha-scalar": (3, {"algo": "loha", "use_scalar": "True"}),
    "lokr": (2, {"algo": "lokr", "factor": "2"}),
    "lokr-full": (2, {"algo": "lokr", "factor": "4", "full_matrix": "True"}),
    "lokr-both": (1, {"algo": "lokr", "decompose_both": "True"}),
    "lokr-unbalanced-scalar": (1, {"algo": "lokr", "unbalanced_factorization": "True", "use_scalar": "True"}),
    "lokr-dora": (1, {"algo": "lokr", "dora_wd": "True"}),
    "full": (4, {"algo": "full"}),
    "ia3": (4, {"algo": "ia3"}),
    "diag-oft": (4, {"algo": "diag-oft"}),
    "diag-oft-rescaled": (4, {"algo": "diag-oft", "rescaled": "True", "constraint": "0.01"}),
    "boft": (10, {"algo": "boft"}),
    "boft-rescaled": (10, {"algo": "boft", "rescaled": "True", "constraint": "0.01"}),
}


# What the package cannot read of its own: it does not look at shapes there, or expects fewer tensors.
UNREADABLE = ("ia3", "loha-dora-in", "lokr-unbalanced-scalar")


@pytest.fixture
def model(lumina_like: Make) -> nn.Module:
    return lumina_like(layers=1)


@pytest.fixture
def twin(lumina_like: Make) -> nn.Module:
    """The same model once more."""
    return lumina_like(layers=1)


KNOWN: dict[str, dict[str, LycorisSize]] = {}


@pytest.fixture
def sizes(case: str, lumina_like: Make) -> dict[str, LycorisSize]:
    """What the layers get in this case; the package is asked once."""
    if case not in KNOWN:
        dim, args = CASES[case]
        KNOWN[case] = planned(lumina_like(layers=1), read_args(args), dim=dim, alpha=2.0, text_encoder=False)
    return KNOWN[case]


@pytest.fixture
def network(model: nn.Module, sizes: dict[str, LycorisSize], randomise: Callable) -> LycorisNetwork:
    """Ours, with the weights of a trained one; not applied."""
    network = LycorisNetwork(model, sizes)
    randomise(network)
    return network


def package_network(model: nn.Module, case: str) -> nn.Module:
    """Make the package's own network, with the weights of a trained one; it is on the model afterwards."""
    dim, args = CASES[case]
    network = kohya.create_network(1.0, dim, 2.0, None, None, model, warn_on_unmatched=False, **args)
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for lora in network.unet_loras:
            for name, parameter in lora.named_parameters():
                size = 0.05 if "oft" in name else 0.2
                parameter.add_(torch.randn(parameter.shape, generator=random) * size)
    network.apply_to(None, model, False, True)
    return network


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


def saved(network: nn.Module, path: Path) -> Path:
    """Write a package network's file as it does it itself, but for the hashes."""
    save_file({key: t.detach().clone().contiguous() for key, t in network.state_dict().items()}, path)
    return path


def test_the_layers_and_tensors_are_those_of_the_package(
    case: str, network: LycorisNetwork, twin: nn.Module
) -> None:
    ours, theirs = network.export_state(), package_network(twin, case).state_dict()
    assert {key: tuple(t.shape) for key, t in ours.items()} == {k: tuple(t.shape) for k, t in theirs.items()}
    for key in ours:
        if key.endswith(".alpha"):
            assert ours[key] == pytest.approx(theirs[key].item(), rel=1e-6), key


def test_outputs_and_gradients_are_those_of_the_package(
    case: str, model: nn.Module, twin: nn.Module, inputs: Inputs, tmp_path: Path
) -> None:
    theirs = package_network(twin, case)
    file = inspect_lora(saved(theirs, tmp_path / "a.safetensors"))
    paths = dit_paths(file, linear_layers(model))
    ours = LycorisNetwork(model, sizes_of_file(model, file, paths))
    ours.load_state(file.read())
    before = model(*inputs)
    ours.apply_to(model)
    weights = torch.randn(before.shape, generator=torch.Generator().manual_seed(5))
    outputs = []
    for one in (twin, model):
        x = inputs[0].clone().requires_grad_()
        output = one(x, *inputs[1:])
        (output * weights).sum().backward()
        outputs.append((output.detach(), x.grad))
    (expected, expected_grad), (found, found_grad) = outputs
    assert (expected - before).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found_grad, expected_grad, rtol=1e-4, atol=1e-4)
    if "scalar" in case:  # a file has no scalar, so the factors that it is multiplied into differ
        return
    own = {f"{name}.{key}": p.grad for name, lora in ours.loras.items() for key, p in lora.tensors.items()}
    for lora in theirs.unet_loras:
        for name, parameter in lora.named_parameters():
            key = {"weight": "diff", "bias": "diff_b"}.get(name, name) if case == "full" else name
            gradient = own.pop(f"{lora.lora_name}.{key.removesuffix('.weight')}")
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-4, msg=key)
    assert not own


@pytest.mark.parametrize("case", [name for name in CASES if name not in UNREADABLE])
def test_the_package_reads_what_is_saved_here(
    network: LycorisNetwork, model: nn.Module, twin: nn.Module, inputs: Inputs, tmp_path: Path
) -> None:
    path = tmp_path / "network.safetensors"
    save_file(network.export_state(), path)
    theirs, _ = kohya.create_network_from_weights(1.0, str(path), None, None, twin)
    theirs.apply_to(None, twin, False, True)
    network.apply_to(model)
    torch.testing.assert_close(twin(*inputs).detach(), model(*inputs).detach(), rtol=1e-4, atol=1e-4)


def test_merging_gives_what_applying_gives(
    case: str, network: LycorisNetwork, model: nn.Module, inputs: Inputs
) -> None:
    plain, before = copy.deepcopy(model), model(*inputs)
    network.apply_to(model)
    for strength in (1.0, 0.3, -0.5):
        network.multiplier = strength
        merged = copy.deepcopy(plain)
        merge(merged, [network])
        torch.testing.assert_close(merged(*inputs), model(*inputs).detach(), rtol=1e-4, atol=1e-4)
    network.multiplier = 0.0
    merge(plain, [network])
    assert torch.equal(model(*inputs), before) and torch.equal(plain(*inputs), before)


@pytest.mark.parametrize("case", [name for name in CASES if "boft" not in name])
def test_strength_multiplies_the_change(network: LycorisNetwork, model: nn.Module) -> None:
    weight = model.layers[0].feed_forward["w1"].weight
    lora = network.loras["lora_unet_layers_0_feed_forward_w1"]
    whole = lora.delta(weight)
    assert whole.abs().max() > 1e-3
    network.multiplier = 0.25
    torch.testing.assert_close(lora.delta(weight), whole * 0.25, rtol=1e-5, atol=1e-6)


def test_a_new_network_has_no_effect(
    case: str, model: nn.Module, sizes: dict[str, LycorisSize], inputs: Inputs
) -> None:
    before = model(*inputs)
    for seed in (1, 2):
        network = LycorisNetwork(model, sizes, seed=seed)
        network.apply_to(model)
        if "dora" in case:  # dividing by a length and multiplying by it again rounds
            torch.testing.assert_close(model(*inputs), before, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(model(*inputs), before)
        network.remove()
        assert torch.equal(model(*inputs), before)
