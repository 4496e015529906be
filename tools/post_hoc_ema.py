"""Average the networks that a run saved on its way into one, as if a running average had been kept.

    python tools/post_hoc_ema.py --networks output/lora-*.safetensors output/lora.safetensors \\
        --output output/lora-averaged.safetensors --sigma_rel 0.15

The average over time t up to the last network at T is weighted by a profile:

    power        p(t) ~ t^gamma              --sigma_rel, the profile's width as a share of T
    exponential  p(t) ~ decay^(T - t)        --decay, per step, like --ema_decay of training

where each network stands for the steps since the one before it. The power profile and the relation of gamma
to sigma_rel are those of Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models"
(https://arxiv.org/abs/2312.02696, section 3.1 and appendix C). Other than a running average it costs nothing
in training, and its width can be tried out afterwards: save often (--save_every_n_steps), then average.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# Run as a file, the repository is not on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.core.checkpoint_files import Checkpoint, open_checkpoint  # noqa: E402
from library.core.entry import run_script  # noqa: E402
from library.core.errors import CheckpointError, ConfigError  # noqa: E402
from library.core.log import logger, setup_logging  # noqa: E402
from library.core.suggest import shorten  # noqa: E402
from library.options.group import REQUIRED, OptionGroup, option, parse_options  # noqa: E402

WIDEST = 12**-0.5  # sigma_rel of gamma = 0, the plain mean

_log = logger("post_hoc_ema")


@dataclass(frozen=True, kw_only=True)
class AverageOptions(OptionGroup):
    """Average."""

    networks: tuple[Path, ...] = option(REQUIRED, "network files of one run, at least two", nargs="+")
    output: Path = option(REQUIRED, "file for the average")
    sigma_rel: float | None = option(
        None,
        f"width of the power profile, above 0 and below {WIDEST:.4f}; 0.15 without --decay",
    )
    decay: float | None = option(None, "share that a step keeps of the exponential profile, between 0 and 1")
    steps: tuple[int, ...] | None = option(
        None, "step of each network, in the same order (default: what the files say)", nargs="+"
    )
    save_precision: str = option("float", "precision of the average", choices=("float", "fp16", "bf16"))

    def __post_init__(self) -> None:
        if len(self.networks) < 2:
            raise ConfigError("--networks names one file; an average needs at least two.")
        if self.sigma_rel is not None and self.decay is not None:
            raise ConfigError("--sigma_rel and --decay are two different profiles; give one of them.")
        if self.sigma_rel is not None and not 0 < self.sigma_rel < WIDEST:
            raise ConfigError(f"--sigma_rel is {self.sigma_rel}; it must be above 0 and below {WIDEST:.4f}.")
        if self.decay is not None and not 0 < self.decay < 1:
            raise ConfigError(f"--decay is {self.decay}; it must lie between 0 and 1.")
        if self.steps is not None and len(self.steps) != len(self.networks):
            raise ConfigError(f"--steps has {len(self.steps)} numbers for {len(self.networks)} networks.")
        if self.output.resolve() in {path.resolve() for path in self.networks}:
            raise ConfigError(f"--output {self.output} is one of the --networks; choose another name.")
        if self.output.suffix != ".safetensors":
            raise ConfigError(f"--output {self.output} must end in .safetensors.")


@dataclass(frozen=True)
class Options:
    """The options of this tool."""

    average: AverageOptions


def main() -> None:
    """Check the files by their headers, then average them."""
    options = parse_options(Options, description=__doc__.partition("\n")[0]).average
    setup_logging("INFO")
    checkpoints = [open_checkpoint(path) for path in options.networks]
    check_alike(checkpoints)
    steps = options.steps or [step_of(checkpoint) for checkpoint in checkpoints]
    order = sorted(range(len(steps)), key=steps.__getitem__)
    checkpoints, steps = [checkpoints[i] for i in order], [steps[i] for i in order]
    profile, told = profile_of(options, steps[-1])
    weights = weights_of(steps, profile)
    for checkpoint, step, weight in zip(checkpoints, steps, weights, strict=True):
        _log.info("step %d: %.4f of the average, %s", step, weight, checkpoint.path)
    write(options, checkpoints, weights, f"average ({told}) of steps {', '.join(map(str, steps))}")
    _log.info("saved %s", options.output)


def gamma_of(sigma_rel: float) -> float:
    """Return the exponent of the power profile whose standard deviation is `sigma_rel` of its length.

    The relation is sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), a cubic in gamma.
    """
    s = sigma_rel**-2
    roots = np.roots([1.0, 7.0, 16.0 - s, 12.0 - s])
    return float(roots[np.abs(roots.imag) < 1e-6].real.max())


def profile_of(options: AverageOptions, last_step: int) -> tuple[Callable[[float], float], str]:
    """Return how much of the profile lies before a step, up to 1 at the last one, and its description."""
    if options.decay is not None:
        decay = options.decay
        return lambda step: decay ** (last_step - step), f"exponential, decay {decay:g}"
    sigma_rel = options.sigma_rel or 0.15
    exponent = gamma_of(sigma_rel) + 1
    return lambda step: (step / last_step) ** exponent, f"power, sigma_rel {sigma_rel:g}"


def weights_of(steps: Sequence[int], before: Callable[[float], float]) -> list[float]:
    """Return each network's share: the part of the profile since the network before it.

    Raises:
        ConfigError: two networks are of the same step, or one of step 0 or less.
    """
    if len(set(steps)) < len(steps) or steps[0] < 1:
        raise ConfigError(
            f"the networks are of the steps {', '.join(map(str, steps))}; each must be of its own step, "
            f"from 1 on. Leave out copies and the running averages (-ema), or say the steps with --steps."
        )
    ends = [0.0, *(before(step) for step in steps)]
    return [end - start for start, end in zip(ends, ends[1:], strict=False)]


def step_of(checkpoint: Checkpoint) -> int:
    """Return the step at which a network was saved. Raises ConfigError if its metadata do not say."""
    text = checkpoint.metadata.get("ss_steps", "")
    if not text.isdecimal():
        raise ConfigError(f"{checkpoint.path} does not say its step (ss_steps); give --steps.")
    return int(text)


def check_alike(checkpoints: Sequence[Checkpoint]) -> None:
    """Check that all files hold the same tensors. Raises CheckpointError that names the odd one."""
    first = {name: info.shape for name, info in checkpoints[0].tensors.items()}
    for other in checkpoints[1:]:
        shapes = {name: info.shape for name, info in other.tensors.items()}
        if shapes != first:
            odd = sorted(name for name in shapes.keys() | first.keys() if shapes.get(name) != first.get(name))
            raise CheckpointError(
                f"{other.path} is not of the same network as {checkpoints[0].path}: they differ in "
                f"{shorten(odd)}."
            )


def write(
    options: AverageOptions, checkpoints: Sequence[Checkpoint], weights: Sequence[float], told: str
) -> None:
    """Average in fp32 and write the file, with the metadata of the last network."""
    from safetensors.torch import load_file
    from torch import Tensor  # here, after everything that can be checked without it

    from library.core.device import dtype_named
    from networks.files import save_network
    from networks.names import ALPHA, DORA, MAGNITUDE

    total: dict[str, Tensor] = {}
    for checkpoint, weight in zip(checkpoints, weights, strict=True):
        for name, tensor in load_file(checkpoint.path).items():
            if name.endswith(ALPHA):
                _require_same(name, tensor, total, checkpoint)
                total[name] = tensor
            elif name in total:
                total[name].add_(tensor.float(), alpha=weight)
            else:
                total[name] = tensor.float().mul_(weight)
    dtype = dtype_named(options.save_precision)
    state = {name: t if name.endswith((ALPHA, DORA, MAGNITUDE)) else t.to(dtype) for name, t in total.items()}
    save_network(options.output, state, checkpoints[-1].metadata | {"ss_weights": told})


def _require_same(name: str, tensor: object, total: Mapping[str, object], checkpoint: Checkpoint) -> None:
    if name in total and total[name] != tensor:
        raise CheckpointError(f"{checkpoint.path} has another '{name}' than the networks before it.")


if __name__ == "__main__":
    run_script(main)
