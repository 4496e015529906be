"""Mistakes a user makes: one sentence, exit code 2, no traceback, nothing half-written."""

import shutil

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from library.core.checkpoint_files import open_checkpoint


class Case:
    """A command line that would train, in a folder of its own, to be spoilt by a test."""

    def __init__(self, folder, nano):
        self.folder = folder
        self.photos = folder / "photos"
        self.photos.mkdir()
        for name in ("a", "b"):
            Image.new("RGB", (96, 96), "teal").save(self.photos / f"{name}.png")
            (self.photos / f"{name}.txt").write_text(f"photo {name}")
        self.output = folder / "out"
        self.toml = {"resolution": "64", "extra": "", "subset": ""}
        self.flags = {
            "pretrained_model_name_or_path": nano.dit,
            "gemma2": nano.gemma2,
            "ae": nano.ae,
            "output_dir": self.output,
            "network_module": "networks.lora_lumina",
            "network_dim": "4",
            "max_train_steps": "1",
        }

    def words(self):
        config = self.folder / "data.toml"
        if not config.exists():
            config.write_text(
                '[general]\ncaption_extension = ".txt"\n'
                f"[[datasets]]\nresolution = {self.toml['resolution']}\n{self.toml['extra']}\n"
                f"[[datasets.subsets]]\nimage_dir = '{self.photos}'\n{self.toml['subset']}\n"
            )
        return [f"--{k}={v}" for k, v in self.flags.items()] + [f"--dataset_config={config}"]


@pytest.fixture
def case(tmp_path, nano):
    return Case(tmp_path, nano)


def copy_of(case, path, spoil):
    copy = case.folder / path.name
    shutil.copy(path, copy)
    spoil(copy)
    return copy


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flag(name, value):
    return lambda case: case.flags.__setitem__(name, value)


def toml(part, line):
    return lambda case: case.toml.__setitem__(part, line)


def photo(name, content):
    return lambda case: (case.photos / name).write_bytes(content)


def no_photos(case):
    for file in case.photos.iterdir():
        file.unlink()


def truncated_photo(case):
    truncate(case.photos / "a.png")


def blocked_output(case):
    case.output.write_text("a file is in the way")


def network_of_rank(rank, *, alone=False):
    """Start from a LoRA on one layer; `alone`: no other is to be trained."""

    def spoil(case):
        layer = "lora_unet_layers_0_feed_forward_w1"
        width = open_checkpoint(case.flags["pretrained_model_name_or_path"]).shape
        out_features, in_features = width("layers.0.feed_forward.w1.weight")
        tensors = {
            f"{layer}.lora_down.weight": np.zeros((rank, in_features), np.float32),
            f"{layer}.lora_up.weight": np.zeros((out_features, rank), np.float32),
            f"{layer}.alpha": np.ones((), np.float32),
        }
        case.flags["network_weights"] = case.folder / "start.safetensors"
        save_file(tensors, case.flags["network_weights"])
        if alone:
            case.flags["network_args"] = r"include_patterns=layers\.0\.feed_forward\.w1"

    return spoil


MISTAKES = {
    "misspelt flag": (
        flag("network_dimm", "4"),
        "unknown argument '--network_dimm'; did you mean '--network_dim'?",
    ),
    "LoRA of another rank": (
        network_of_rank(8, alone=True),
        "has rank 8, but 4 is wanted; the sizes must be",
    ),
    "LoRA of few layers": (network_of_rank(4), "lacks LoRAs for"),
    "nothing to train": (flag("network_args", "exclude_patterns=.*"), "leave no layer to train"),
    "more blocks than there are": (flag("blocks_to_swap", "7"), "but the model has 6 blocks"),
    "rank 0": (flag("network_dim", "0"), "--network_dim is 0"),
    "unknown sampling": (
        flag("timestep_sampling", "nextdit"),
        "argument --timestep_sampling: invalid choice",
    ),
    "missing model": (
        flag("ae", "nowhere.safetensors"),
        "There is no weight file or folder nowhere.safetensors",
    ),
    "repository instead of a model": (
        flag("ae", "Alpha-VLLM/Lumina-Image-2.0"),
        "run `hf download Alpha-VLLM/Lumina-Image-2.0 --local-dir Lumina-Image-2.0` and give that folder",
    ),
    "truncated model": (
        lambda case: case.flags.update(gemma2=copy_of(case, case.flags["gemma2"], truncate)),
        "is not a complete safetensors file",
    ),
    "wrong model": (lambda case: case.flags.update(ae=case.flags["gemma2"]), "Gemma2"),
    "swapped models": (lambda case: case.flags.update(gemma2=case.flags["ae"]), "autoencoder"),
    "misspelt dataset key": (toml("subset", "num_repeat = 2"), "did you mean 'num_repeats'?"),
    "missing dataset file": (
        lambda case: (case.folder / "data.toml").mkdir(),
        "data.toml",
    ),
    "size that does not fit": (toml("resolution", "100"), "100"),
    "bucket too large": (toml("extra", "enable_bucket = true\nmin_bucket_reso = 8000"), "min_bucket_reso"),
    "no pictures": (no_photos, "photos"),
    "caption in Latin-1": (photo("a.txt", "caf\xe9".encode("latin-1")), "a.txt is not UTF-8"),
    "zero-byte picture": (photo("a.png", b""), "a.png"),
    "truncated picture": (truncated_photo, "a.png"),
    "output in the way": (blocked_output, "is not a folder that can be written to"),
    "augmented latents cached": (
        lambda case: (
            case.flags.update(cache_latents_to_disk="") or case.toml.update(subset="color_aug = true")
        ),
        "color_aug",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_and_exit_code_2(name, case, run_script):
    spoil, message = MISTAKES[name]
    spoil(case)
    words = [word.removesuffix("=") for word in case.words()]
    result = run_script("lumina_train_network.py", *words)
    assert message in result.err
    assert result.code == 2
    assert "Traceback" not in result.err
    assert result.err.startswith("error: ")
    assert not case.output.is_dir() or not any(case.output.iterdir())


WITHOUT_TORCH = """
import runpy, sys
try:
    runpy.run_path("lumina_train_network.py", run_name="__main__")
finally:
    assert "torch" not in sys.modules
"""


@pytest.mark.parametrize(
    "name",
    ["misspelt flag", "swapped models", "misspelt dataset key", "truncated picture", "LoRA of another rank"],
)
def test_a_mistake_is_told_before_torch_is_imported(name, case, run_script):
    spoil, message = MISTAKES[name]
    spoil(case)
    result = run_script("-c", WITHOUT_TORCH, *case.words())
    assert result.code == 2 and result.err.startswith("error: ") and message in result.err


def test_help_lists_every_option_once(run_script):
    result = run_script("lumina_train_network.py", "--help", cold=True)
    assert result.code == 0
    flags = [word for line in result.out.splitlines() if line.startswith("  --") for word in line.split()[:1]]
    assert len(flags) == len(set(flags)) > 60
