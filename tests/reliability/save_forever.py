"""Save one state after another until killed, two kept: `python save_forever.py FOLDER FIRST_STEP`."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from library.core.files import sweep_leftovers  # noqa: E402
from library.options.saving import SavingOptions  # noqa: E402
from library.training.state.checkpoint import (  # noqa: E402
    Keep,
    StateRecord,
    prune_states,
    step_state_path,
    write_state,
)


def main() -> None:
    saving = SavingOptions(output_dir=Path(sys.argv[1]), output_name="kiwi")
    sweep_leftovers(saving.output_dir)
    record = StateRecord(step=0, events_done=True, serial=0, seed=7, world=1, steps_per_epoch=10, dataset="d")
    print("ready", flush=True)
    for step in range(int(sys.argv[2]), 10**8):

        def write(folder: Path, step: int = step) -> None:
            for part in ("network", "optimizer"):
                (folder / f"{part}.safetensors").write_bytes(random.Random(step).randbytes(200_000))

        path = step_state_path(saving, step)
        state = write_state(path, replace(record, step=step, serial=step), write)
        prune_states(saving, Keep(steps=1), state)


main()
