"""How this process was started, and what its launcher left undone. Torch-free, to be asked first of all.

Two things go wrong without a word otherwise. `accelerate launch --num_processes 2` starts a single process on
a computer without several GPUs. And MPI or Slurm start several that do not know each other, so that each
trains on its own and writes the same files.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from library.core.errors import ConfigError

_log = logging.getLogger("flow_scripts.launch")


@dataclass(frozen=True)
class _Starter:
    """Something that starts several processes: the variables in which it tells rank, number and place."""

    name: str
    rank: str
    world: str
    local_rank: str
    local_world: str


_MPI = (
    _Starter(
        "mpirun",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    _Starter("mpirun", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
# A batch script has the other variables of Slurm too; those of a step are there for what srun starts.
_SLURM = _Starter(
    "srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"
)
_DEFAULT_PORT = "29500"  # that of torchrun and accelerate

PLAIN_STAGES = (
    "DeepSpeed's stages 1 and 2 spread the optimizer's memory and gradients, which are a few megabytes with "
    "a LoRA; here every process keeps them, and the whole model, as without it"
)
WEIGHTS_STAY = (
    "weights that are spread over the GPUs stay there; leave it out, or keep weights in the computer's "
    "memory with --blocks_to_swap, without DeepSpeed"
)


def complete_launch() -> None:
    """Make this process one of those that the user asked for. Does nothing if it is, or is meant to be alone.

    Where `accelerate launch` started one process instead of several, this process becomes a launcher that
    starts them, and the function does not return.

    Raises:
        ConfigError: the launcher was asked for something that cannot be.
    """
    environment = os.environ
    adopt_deepspeed(environment)
    if "RANK" in environment:
        return
    adopt_rank(environment)
    if "RANK" not in environment:
        _start_the_others(environment)


def adopt_deepspeed(environment: MutableMapping[str, str]) -> None:
    """Translate what accelerate's configuration says of DeepSpeed: its stage 3 is FSDP2, others are nothing.

    Raises:
        ConfigError: weights are to be offloaded; or the configuration file cannot be read.
    """
    if environment.get("ACCELERATE_USE_DEEPSPEED", "").lower() != "true":
        return
    environment["ACCELERATE_USE_DEEPSPEED"] = (
        "false"  # else accelerate imports the package, which is not used
    )
    offloads = environment.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none")
    stage = _zero_stage(environment)
    if offloads.lower() not in ("none", "") and stage == 3:
        raise ConfigError(f"DeepSpeed's offload_param_device {offloads} cannot be used here: {WEIGHTS_STAY}.")
    if stage == 3:
        spread_model(environment)
    elif environment.get("RANK", "0") == "0":
        _log.warning("DeepSpeed's stage %d has no effect: %s", stage, PLAIN_STAGES)


def compiler_wishes(environment: Mapping[str, str], *, compiles: bool) -> Iterator[str]:
    """Yield a sentence if accelerate's configuration asks for torch.compile, which it has no say in here.

    compiles: whether the script was asked for it.
    """
    backend = environment.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend in ("no", ""):
        return
    told = f"dynamo_backend {backend} of accelerate's configuration has no effect"
    if compiles:
        yield f"{told}, nor have its other dynamo_ settings: --torch_compile and --dynamo_backend count"
    else:
        yield f"{told}: blocks are compiled with --torch_compile"


def spread_model(environment: MutableMapping[str, str]) -> None:
    """Ask for FSDP2, as accelerate's configuration does: every process keeps a part of the frozen model."""
    environment["ACCELERATE_USE_FSDP"] = "true"
    environment["FSDP_VERSION"] = "2"
    environment["FSDP_RESHARD_AFTER_FORWARD"] = "true"


def _zero_stage(environment: Mapping[str, str]) -> int:
    """Return DeepSpeed's stage: of accelerate's configuration, or of the DeepSpeed file that it names."""
    path = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if path.lower() in ("none", ""):
        return int(environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        return int(found.get("zero_optimization", {}).get("stage", 0))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"DeepSpeed's configuration file {path} cannot be read: {error}.") from error


def adopt_rank(environment: MutableMapping[str, str]) -> None:
    """Translate what MPI or Slurm say about this process into torch's variables (RANK, WORLD_SIZE, ...).

    Tasks of Slurm become one run only where MASTER_ADDR names the first computer: without it they may as well
    be runs of their own, each with its own options.

    Raises:
        ConfigError: MPI started processes on several computers and MASTER_ADDR does not name the first.
    """
    for starter in _MPI:
        if _number(environment, starter.world) > 1:
            if "MASTER_ADDR" not in environment and not _on_one_computer(environment, starter):
                raise ConfigError(
                    "mpirun started processes on several computers: export MASTER_ADDR, the first one's name."
                )
            _adopt(environment, starter)
            return
    tasks = _number(environment, _SLURM.world)
    if tasks > 1 and "MASTER_ADDR" in environment:
        _adopt(environment, _SLURM)
    elif tasks > 1 and environment.get(_SLURM.rank) == "0":
        _log.warning(
            "srun started %d tasks, and each is a run of its own. For one run of %d processes, "
            "export MASTER_ADDR first; see docs/multi_gpu.md.",
            *(tasks, tasks),
        )


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    return int(value) if value.isdecimal() else 1


def _on_one_computer(environment: Mapping[str, str], starter: _Starter) -> bool:
    return environment.get(starter.local_world) == environment[starter.world]


def _adopt(environment: MutableMapping[str, str], starter: _Starter) -> None:
    environment["RANK"] = environment[starter.rank]
    environment["WORLD_SIZE"] = environment[starter.world]
    environment["LOCAL_RANK"] = environment.get(starter.local_rank, environment[starter.rank])
    environment.setdefault("MASTER_ADDR", "127.0.0.1")
    environment.setdefault("MASTER_PORT", _DEFAULT_PORT)


# --- accelerate launch ---


def _start_the_others(environment: Mapping[str, str]) -> None:
    """Become a launcher of several processes if `accelerate launch` was asked for them and started one."""
    if "ACCELERATE_MIXED_PRECISION" not in environment or "MASTER_PORT" not in environment:
        return  # not started by it, or it was asked for one
    import psutil  # comes with accelerate

    try:
        parent = psutil.Process().parent()
        if parent is None or "MASTER_PORT" in parent.environ():
            return  # the variable is the user's own and says nothing
        words = several_processes_words(parent.cmdline(), sys.argv)
    except psutil.Error:
        return
    if words is None:
        return
    print("accelerate launch started one process for several; starting them now", file=sys.stderr, flush=True)
    if os.name == "posix":
        os.execv(words[0], words)  # this very process, so that signals reach it
    sys.exit(subprocess.run(words).returncode)


def several_processes_words(launcher: Sequence[str], script: Sequence[str]) -> list[str] | None:
    """Return the command line that makes `accelerate launch` start as many processes as it was asked for.

    Args:
        launcher: the command line that started this process; None is returned if it is not accelerate's.
        script: this script and its words, with which that command line ends.
    """
    words = list(launcher)
    own = words[: len(words) - len(script)]  # without the script
    if words[len(own) + 1 :] != list(script[1:]):
        return None
    for place, word in enumerate(own):
        if Path(word).stem == "accelerate" and own[place + 1 : place + 2] == ["launch"]:
            start = place + 2
        elif word == "accelerate.commands.launch" or Path(word).stem == "accelerate-launch":
            start = place + 1
        else:
            continue
        kept = [w for w in own[start:] if w != "--cpu"]  # it rules --multi_gpu out; its variable stays
        return [*own[:start], "--multi_gpu", *kept, *words[len(own) :]]
    return None
