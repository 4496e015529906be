"""kandinsky5_train_network.py from end to end on nano models, in this process: runs, and users' mistakes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from kandinsky5_train_network import Kandinsky5Trainer
from library.core.errors import UserError
from library.models.kandinsky5 import load_kandinsky5
from library.models.kandinsky5_files import check_models
from library.options.group import parse_options
from library.options.network import NetworkOptions
from library.options.quant import QuantOptions
from library.options.train_kandinsky5 import Kandinsky5TrainOptions
from library.training.prepare import prepare
from networks.files import save_network
from networks.module import install_network
from tests.parity.runs import flags, write_config, write_pictures
from tests.warm_python import ColdPython, WarmPython
from tools.make_nano_models import make_nano_kandinsky5
from tools.nano.kandinsky5_layouts import NanoKandinsky5Paths

RESULTS = {
    "fox": ((64, 64), "a red fox on the table"),
    "cup": ((64, 64), "a coffee cup, on a wooden table"),
    "city": ((80, 48), "dark city lights"),
    "face": ((64, 64), ""),
}
SOURCES = {"fox": (64, 64), "cup": (128, 128), "city": (40, 24), "face": (90, 60)}


class Nano:
    """The nano models, datasets for both tasks, and what runs have in common."""

    def __init__(self, folder: Path, models: NanoKandinsky5Paths) -> None:
        self.folder, self.models = folder, models
        results = write_pictures(folder / "after", RESULTS)
        write_pictures(folder / "before", {name: (size, "") for name, size in SOURCES.items()}, seed=6)
        self.plain = write_config(folder / "t2i.toml", results)
        sources = f"conditioning_data_dir = '{folder / 'before'}'\nflip_aug = true"
        self.pairs = write_config(folder / "i2i.toml", results, subset=sources)
        (folder / "prompts.txt").write_text(
            "a red fox --w 64 --h 64 --s 1 --d 1 --ci before/cup.png\ngo --w 64 --h 48 --s 1 --ci -\n"
        )

    def flags(self, task: str, output: Path) -> dict[str, object]:
        """A short run for a task."""
        return {
            "dit": getattr(self.models, task),
            "text_encoder_qwen": self.models.qwen,
            "text_encoder_clip": self.models.clip,
            "vae": self.models.vae,
            "dataset_config": self.pairs if task == "i2i" else self.plain,
            "cache_directory": self.folder / "caches",
            "cache_latents_to_disk": True,
            "cache_text_encoder_outputs_to_disk": True,
            "output_dir": output,
            "output_name": "kiwi",
            "network_module": "networks.lora_kandinsky5",
            "network_dim": 2,
            "learning_rate": 1e-2,
            "seed": 7,
            "max_train_steps": 2,
            "max_data_loader_n_workers": 0,
            "console_log_level": "WARNING",
        }


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nano]:
    torch.set_num_threads(1)  # at this size threads cost more than they bring
    folder = tmp_path_factory.mktemp("kandinsky é")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield Nano(folder, make_nano_kandinsky5(folder / "models"))


def trainer(options: Mapping[str, object]) -> Kandinsky5Trainer:
    return Kandinsky5Trainer(parse_options(Kandinsky5TrainOptions, flags(options)))


def losses(folder: Path) -> dict[int, float]:
    records = map(json.loads, (folder / "kiwi.metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["loss/current"] for record in records if "loss/current" in record}


# --- runs ---


@pytest.mark.parametrize("task", ["t2i", "i2i"])
def test_a_run_leaves_a_network_previews_and_its_settings(nano: Nano, tmp_path: Path, task: str) -> None:
    prompts = nano.folder / "prompts.txt"
    if task == "t2i":
        prompts = tmp_path / "text.txt"
        prompts.write_text("a red fox --w 64 --h 64 --s 1 --d 1\ngo --w 64 --h 48 --s 1\n")
    sampled = {"sample_prompts": prompts, "sample_every_n_epochs": 1, "save_every_n_epochs": 1}
    more = {"mixed_precision": "bf16", "gradient_checkpointing": True, "max_train_epochs": 1}
    more |= {"tread_routes": ("1:-2:0.5",)}
    output = tmp_path / "out"
    path = trainer(nano.flags(task, output) | sampled | more).train()
    assert path == output / "kiwi.safetensors"
    names = {file.name for file in output.iterdir()}
    assert names == {path.name, "kiwi.config.toml", "kiwi.metrics.jsonl", "kiwi.samples.png", "sample"}
    pictures = sorted((output / "sample").glob("kiwi_e000001_*.png"))
    assert [Image.open(picture).size for picture in pictures] == [(64, 64), (64, 48)]
    with safe_open(path, "pt") as file:
        assert file.metadata()["ss_kandinsky5_task"] == task
        assert file.metadata()["ss_network_module"] == "networks.lora_kandinsky5"
        ups = [key for key in file.keys() if key.endswith(".lora_up.weight")]
        assert len(ups) == 52 and all(file.get_tensor(key).any() for key in ups)


def test_a_resumed_run_of_edits_is_an_uninterrupted_one_bit_for_bit(nano: Nano, tmp_path: Path) -> None:
    def run(name: str, **more: object) -> Path:
        dropped = {"source_dropout_rate": 0.5, "network_dropout": 0.1, "max_train_steps": 4}
        trainer(nano.flags("i2i", tmp_path / name) | dropped | more).train()
        return tmp_path / name

    whole = run("whole")
    leg = run("legs", max_train_steps=1, save_state_on_train_end=True)
    assert run("legs", resume="latest") == leg
    assert len(losses(whole)) == 4 and losses(whole) == losses(leg)
    expected, found = (load_file(folder / "kiwi.safetensors") for folder in (whole, leg))
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())
    always = run("always", source_dropout_rate=None)
    assert losses(always) != losses(whole)


@pytest.mark.parametrize("layout", ["comfyui", "sharded"])
def test_the_nano_models_of_other_layouts_can_be_used(tmp_path: Path, layout: str) -> None:
    models = make_nano_kandinsky5(tmp_path, layout=layout)
    for task in ("t2i", "i2i"):
        files = (getattr(models, task), models.qwen, models.clip, models.vae)
        assert check_models(*files, task=task, quant=QuantOptions()).params.task == task


LAUNCHER = "-m accelerate.commands.launch --use_fsdp --fsdp_version 2 --num_processes 2 --main_process_port 0"


def test_two_processes_train_as_one_also_with_a_model_that_is_spread(
    nano: Nano, tmp_path: Path, python: WarmPython | ColdPython
) -> None:
    single = tmp_path / "single.toml"
    single.write_text(nano.pairs.read_text().replace("batch_size = 2", "batch_size = 1"))
    usual = nano.flags("i2i", tmp_path / "one") | {"source_dropout_rate": 0.5}
    usual |= {"tread_routes": ("0:1:0.5", "-1:-1:0.25")}
    trainer(usual).train()
    jobs = []
    for sharded in (False, True):
        output = tmp_path / ("spread" if sharded else "two")
        options = usual | {"dataset_config": single, "output_dir": output}
        jobs.append((sharded, ["kandinsky5_train_network.py", *flags(options)]))
    (tmp_path / "jobs").write_text("".join(json.dumps(job) + "\n" for job in jobs))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (tmp_path / "log").open("w") as log:
        words = [*LAUNCHER.split(), "tests/reliability/sharding_worker.py", str(tmp_path / "jobs")]
        script = python.start(words, environment, log.fileno(), log.fileno())
        script.join(120)
        script.kill()
    assert script.exitcode == 0, (tmp_path / "log").read_text()
    one, two, spread = (load_file(tmp_path / name / "kiwi.safetensors") for name in ("one", "two", "spread"))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert losses(tmp_path / "two") == losses(tmp_path / "spread")
    for key, tensor in two.items():
        torch.testing.assert_close(tensor, one[key], rtol=1e-3, atol=1e-4)
        assert torch.equal(tensor, spread[key]), key


# --- what is told of captions ---


def test_captions_that_clip_cuts_are_told_once_and_in_the_dry_run(
    nano: Nano, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "long"
    shutil.copytree(nano.folder / "after", folder)
    for name in ("fox", "cup"):
        (folder / f"{name}.txt").write_text(f"{name} " * 80)
    told = {
        "dataset_config": write_config(tmp_path / "d.toml", folder),
        "cache_directory": tmp_path / "caches",
    }
    usual = nano.flags("t2i", tmp_path / "out") | told
    trainer(usual | {"dry_run": True}).train()
    captions = capsys.readouterr().out.partition("Captions")[2].partition("Steps")[0]
    assert "0 longer than the text encoder takes" in captions
    assert "2 longer than CLIP takes (77 tokens)" in captions
    warning = "2 of 4 texts that were encoded are longer than CLIP takes, which are cut"
    trainer(usual).train()
    said = capsys.readouterr().err
    assert said.count(warning) == 1 and said.count("longer than") == 1
    uncached = usual | {"cache_text_encoder_outputs_to_disk": False, "qwen_max_token_length": 60}
    trainer(uncached).train()
    said = capsys.readouterr().err
    assert said.count("CLIP takes the first 77 of ") == 1
    assert said.count("the text encoder takes the first 60 of ") == 1


def test_nothing_is_said_of_text_encoders_that_cannot_be_trained(
    nano: Nano, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer(nano.flags("t2i", tmp_path / "out") | {"console_log_level": "INFO", "max_train_steps": 1}).train()
    said = capsys.readouterr().err
    assert "LoRA on " in said and "only the DiT" not in said


# --- flags without effect ---


def test_flags_about_sources_have_no_effect_without_sources(nano: Nano, tmp_path: Path) -> None:
    given = {"source_dropout_rate": 0.5, "edit_prompt_crop": "52", "scheduler_scale": 5}
    given |= {"timestep_sampling": "sigmoid", "discrete_flow_shift": 5}

    def told(kind: str, **more: object) -> list[str]:
        """The flags that adjustments are about, of which each is told once."""
        sentences = prepare(trainer(nano.flags(kind, tmp_path) | given | more)).adjustments
        return sorted(s.split()[0].removeprefix("--") for s in sentences if " has no effect: " in s)

    without_effect = sorted(given.keys() - {"timestep_sampling"})
    assert told("t2i") == told("t2i", task="t2i") == without_effect
    assert told("i2i", dataset_config=nano.plain) == without_effect
    assert told("i2i", timestep_sampling="shift") == ["scheduler_scale"]
    previews = {"sample_prompts": nano.folder / "prompts.txt", "sample_at_first": True}
    assert told("i2i", **previews) == ["discrete_flow_shift"]


# --- mistakes ---

Spoil = Callable[[Nano, Path], Mapping[str, object]]


def model(flag: str, other: str) -> Spoil:
    """Name another of the models with a flag."""
    return lambda nano, _: {flag: getattr(nano.models, other)}


def dataset(*, resolution: int = 64, caption: str | None = None, broken: bool = False) -> Spoil:
    """A dataset of one pair, of which something is wrong."""

    def write(nano: Nano, folder: Path) -> Mapping[str, object]:
        for part in ("after", "before"):
            (folder / part).mkdir()
            for ending in (".png", ".txt"):
                shutil.copy(nano.folder / part / f"fox{ending}", folder / part)
        if caption is not None:
            (folder / "after/fox.txt").write_text(caption)
        if broken:
            shutil.copy(folder / "after/fox.txt", folder / "before/fox.png")
        sources = f"conditioning_data_dir = '{folder / 'before'}'"
        config = write_config(folder / "d.toml", folder / "after", resolution=resolution, subset=sources)
        return {"dataset_config": config}

    return write


def start(options: Mapping[str, object], *, task: str = "t2i", **made_with: object) -> Spoil:
    """Start from a LoRA that was made with other options, maybe for the other task."""

    def write(nano: Nano, folder: Path) -> Mapping[str, object]:
        network = NetworkOptions(network_module="networks.lora_kandinsky5", **{"network_dim": 2} | made_with)
        model = load_kandinsky5(getattr(nano.models, task), device=torch.device("cpu"), dtype=torch.float32)
        made = install_network(network, model, list, seed=0, learning_rate=1.0)
        save_network(folder / "start.safetensors", made.export_state(), {})
        return {"network_weights": folder / "start.safetensors"} | options

    return write


def prompts(line: str) -> Spoil:
    """A file with one sample prompt."""

    def write(nano: Nano, folder: Path) -> Mapping[str, object]:
        (folder / "prompts.txt").write_text(line)
        return {"sample_prompts": folder / "prompts.txt", "sample_at_first": True}

    return write


def given(**options: object) -> Spoil:
    return lambda *_: options


def without_a_pair(nano: Nano, folder: Path) -> Mapping[str, object]:
    spoilt = dataset()(nano, folder)
    (folder / "before/fox.png").rename(folder / "before/wolf.png")
    return spoilt


MARK = "turn <|image_pad|> red"
MISTAKES: dict[str, tuple[str, Spoil, str]] = {
    "swapped encoders": ("t2i", model("text_encoder_qwen", "clip"), "looks like a CLIP text encoder"),
    "Qwen for CLIP": ("t2i", model("text_encoder_clip", "qwen"), "looks like a Qwen2.5-VL"),
    "autoencoder for the DiT": ("t2i", model("dit", "vae"), "looks like an image autoencoder"),
    "DiT for the autoencoder": ("t2i", model("vae", "t2i"), "looks like a Kandinsky 5 transformer"),
    "tokenizer of CLIP": ("t2i", model("qwen_tokenizer", "clip"), r"not the tokenizer of Qwen2\.5-VL"),
    "tokenizer of Qwen": ("t2i", model("clip_tokenizer", "qwen"), "not CLIP's tokenizer"),
    "another task": ("t2i", given(task="i2i"), r"--task is i2i, but .* draws from text \(t2i\)"),
    "Lumina's module": (
        "t2i",
        given(network_module="networks.lora_lumina"),
        "give --network_module networks.lora_kandinsky5",
    ),
    "LoRAs on text encoders": ("t2i", given(network_train_text_encoder=True), "have no LoRAs here"),
    "Lumina's flag": ("t2i", given(gemma2="x"), "unknown argument '--gemma2': .*--text_encoder_qwen"),
    "SimpleTuner's flag": ("t2i", given(flow_schedule_shift="3"), "use --discrete_flow_shift"),
    "sources for a model of text": ("t2i", dataset(), "train an image-to-image model"),
    "no source": ("i2i", without_a_pair, "1 picture in .*after without a source picture .*: fox.png"),
    "broken source": ("i2i", dataset(broken=True), "before/fox.png cannot be decoded"),
    "too large": ("i2i", dataset(resolution=2560), r"fox.png: a picture of 2560x2560 pixels is too large"),
    "mark in a caption": ("i2i", dataset(caption=MARK), r"has <\|image_pad\|> in it"),
    "mark in a sample prompt": ("i2i", prompts(f"{MARK} --ci {{}}"), r"has <\|image_pad\|> in it"),
    "sample of a text model": ("t2i", prompts("a --ci {}"), "this model makes pictures from text alone"),
    "sample too large": ("t2i", prompts("a --w 2560 --h 64"), "picture of 2560x64 pixels is too large"),
    "LoRA of another rank": ("t2i", start({}, network_dim=4), "has rank 4, but 2 is wanted; .*--dim_from_we"),
    "LoRA of other layers": (
        "t2i",
        start({"network_args": "train_blocks=text"}),
        "has LoRAs for 40 layers that would get none",
    ),
    "LoRA of the other task": (
        "i2i",
        start({"dim_from_weights": True}, network_args=("embedder_dims=[2,2,2,2]",)),
        "visual_embeddings_in_layer' is for a layer of .*another task",
    ),
    "nothing to train": ("t2i", given(network_args="exclude_patterns=.*"), "leave no layer to train"),
    "attention without a GPU": ("t2i", given(attn_mode="flash"), "needs a CUDA device, not cpu"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_before_anything_is_written(nano: Nano, tmp_path: Path, name: str) -> None:
    task, spoil, message = MISTAKES[name]
    options = nano.flags(task, tmp_path / "out") | spoil(nano, tmp_path)
    file = tmp_path / "prompts.txt"
    if file.exists():
        file.write_text(file.read_text().format(nano.folder / "before/fox.png"))
    with pytest.raises(UserError, match=message) as caught:
        trainer(options).train()
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())
