"""What the cache tools make ahead of time is what training with the same flags looks for."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from library.core.errors import UserError
from library.data.cached import LatentCache, TextCache
from library.models.gemma2 import Gemma2Encoder, encode_prompts, load_gemma2
from library.models.gemma2_tokenizer import load_gemma2_tokenizer
from library.options.compute import ComputeOptions
from library.options.group import parse_options
from library.training.context import RunContext
from library.training.prepare import prepare
from networks.files import save_network
from networks.from_file import text_model
from networks.lora_lumina import create_text_network
from networks.request import NetworkRequest
from tests.picture_sets import manifest_of, write_picture, write_pictures
from tools import cache_latents, cache_text_encoder_outputs
from tools.cache_command import FAMILIES
from tools.make_nano_models import make_nano_kandinsky5

CAPTIONS = {"a": "a cat on a wall", "b": "two dogs, a ball", "c": "rain"}
SIZES = ((64, 64), (48, 64))
PROMPT = "You are a painter."
TOOLS = {"cache_latents": cache_latents, "cache_text_encoder_outputs": cache_text_encoder_outputs}
BOTH = [f"--{name}_to_disk" for name in TOOLS]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Command:
    """What a user types: the words about models and data, and what only training wants."""

    family: str
    words: tuple[str, ...]
    training: tuple[str, ...]

    def fill(self, name: str, *more: object, words: Sequence[str] | None = None) -> None:
        """Run a tool in this process, with `words` in place of those about models and data."""
        given = [*(self.words if words is None else words), *map(str, more)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [name, f"--family={self.family}", *given])
            TOOLS[name].main()

    def run(self, *more: str) -> RunContext:
        """Decide a training run."""
        family = FAMILIES[self.family]
        trainer = family.trainer(parse_options(family.options, [*self.words, *self.training, *more]))
        return RunContext.decide(trainer, prepare(trainer))

    def encodes_nothing(self, *more: str) -> tuple[LatentCache | None, TextCache | None]:
        """Let training fill its caches, and fail if it loads an encoder; return what it reads."""
        context = self.run(*more)
        with pytest.MonkeyPatch.context() as patch:
            for hook in ("load_vae", "load_text_encoders"):
                patch.setattr(type(context.trainer), hook, lambda *_: pytest.fail("something is missing"))
            context.inputs.fill_caches(context.prepared.manifest)
        return context.inputs.latent_cache, context.inputs.text_cache


@pytest.fixture(scope="module", autouse=True)
def one_thread(tmp_path_factory):
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("xdg")))
        yield


@pytest.fixture(scope="module")
def kandinsky5(tmp_path_factory):
    return make_nano_kandinsky5(tmp_path_factory.mktemp("kandinsky5"))


@pytest.fixture
def lumina(nano, tmp_path) -> Command:
    folder = write_pictures(tmp_path / "pictures", CAPTIONS, SIZES)
    manifest_of(folder, subset="caption_dropout_rate = 0.2\nflip_aug = true")
    words = (f"--gemma2={nano.gemma2}", f"--ae={nano.ae}", f"--system_prompt={PROMPT}")
    training = (f"--pretrained_model_name_or_path={nano.dit}", "--network_module=networks.lora_lumina")
    return Command(
        "lumina",
        (*words, f"--dataset_config={tmp_path / 'pictures.toml'}"),
        (*training, f"--output_dir={tmp_path}"),
    )


@pytest.fixture
def editing(kandinsky5, tmp_path) -> Command:
    """Three edits, one of another size, and a picture without a source."""
    folder = write_pictures(tmp_path / "pictures", CAPTIONS, SIZES)
    (tmp_path / "before").mkdir()
    for number, stem in enumerate(CAPTIONS):
        write_picture(
            tmp_path / "before" / f"{stem}.png", ((64, 64), (24, 32), (96, 64))[number], 20 + number
        )
    alone = write_pictures(tmp_path / "alone", {"d": "a field"})
    each = "caption_dropout_rate = 0.2\nflip_aug = true"
    subset = f"conditioning_data_dir = '{tmp_path / 'before'}'\n{each}\n[[datasets.subsets]]\n"
    subset += f"image_dir = '{alone}'\ncaption_extension = '.txt'\n{each}"
    manifest_of(folder, subset=subset, edits=True)
    return kandinsky_command(kandinsky5, tmp_path, kandinsky5.i2i, "--source_dropout_rate=0.3")


def kandinsky_command(paths, folder: Path, dit: Path, *more: str) -> Command:
    words = (
        *(f"--dit={dit}", f"--vae={paths.vae}", *more),
        *(f"--text_encoder_qwen={paths.qwen}", f"--text_encoder_clip={paths.clip}"),
        f"--dataset_config={folder / 'pictures.toml'}",
    )
    return Command(
        "kandinsky5", words, ("--network_module=networks.lora_kandinsky5", f"--output_dir={folder}")
    )


def counted(told: str) -> dict[str, tuple[int, int]]:
    """Return what was in the caches and what was encoded, by kind."""
    found = re.findall(r"(latents|texts): (\d+) in the cache, (\d+) to encode", told)
    return {kind: (int(there), int(missing)) for kind, there, missing in found}


def test_training_finds_the_latents(lumina, capsys):
    lumina.fill("cache_latents", "--mixed_precision=bf16")
    assert counted(capsys.readouterr().err) == {"latents": (0, 3)}
    for flag in ("--cache_latents", "--cache_latents_to_disk"):
        cache, _ = lumina.encodes_nothing(flag, "--mixed_precision=bf16")
        item = lumina.run().prepared.manifest.items[0]
        assert cache.get(item, flip=True).picture.shape == (16, 8, 8)


def test_training_finds_the_text_features(lumina, nano, capsys):
    lumina.fill("cache_text_encoder_outputs", "--cache_dtype=fp32")
    told = capsys.readouterr().err
    assert counted(told) == {"texts": (0, 4)}, "three captions and the empty one"
    _, cache = lumina.encodes_nothing("--cache_text_encoder_outputs", "--cache_dtype=fp32")
    trainer = (context := lumina.run()).trainer
    encoder = load_gemma2(nano.gemma2, device=CPU, dtype=torch.float32)
    tokenizer = load_gemma2_tokenizer(nano.gemma2)
    for item in context.prepared.manifest.items:
        (expected,) = encode_prompts(encoder, tokenizer, [trainer.format_prompt(item.text)], 256)
        torch.testing.assert_close(cache.condition(item, item.text).tokens_LD, expected.tokens_LD)


def test_base_weights_of_the_text_encoder_are_merged(lumina, nano, tmp_path, capsys):
    encoder = text_model(load_gemma2(nano.gemma2, device=CPU, dtype=torch.float32))
    network = create_text_network(encoder, NetworkRequest(dim=2, lr=1e-3))
    for layer in network.loras.values():
        nn.init.normal_(layer.up, std=0.3, generator=torch.Generator().manual_seed(1))
    save_network(tmp_path / "base.safetensors", network.export_state(), {})
    texts, base = "cache_text_encoder_outputs", f"--base_weights={tmp_path / 'base.safetensors'}"
    for more in ((), (base,), (base, "--base_weights_multiplier=0")):
        lumina.fill(texts, *more)
    told = re.findall(r"(\d) in the cache", capsys.readouterr().err)
    assert told == ["0", "0", "4"], "entries of its own, unless nothing of it is merged"
    (_, plain), (_, merged) = (lumina.encodes_nothing(BOTH[1], *more) for more in ((), (base,)))
    item = lumina.run().prepared.manifest.items[0]
    features = [cache.condition(item, item.text).tokens_LD.float() for cache in (plain, merged)]
    assert (features[0] - features[1]).abs().max() > 0.1


def test_both_tools_take_the_words_of_a_training_command(lumina, tmp_path, capsys):
    """Only what a tool is for is done: not the other cache, and none of the training."""
    words = [*lumina.words, *lumina.training, *BOTH, "--max_caption_variants=3", "--learning_rate=1"]
    config = tmp_path / "training.toml"
    config.write_text("[training]\nmixed_precision = 'bf16'\nmax_train_steps = 2\n")
    files = set(tmp_path.iterdir())
    for name, kind in zip(TOOLS, ("latents", "texts"), strict=True):
        lumina.fill(name, f"--config_file={config}", words=words)
        assert counted(capsys.readouterr().err).keys() == {kind}
    lumina.encodes_nothing(*BOTH, "--max_caption_variants=3", f"--config_file={config}")
    assert set(tmp_path.iterdir()) == files, "the caches are beside the pictures"


def test_kandinsky_from_text(kandinsky5, tmp_path, capsys):
    manifest_of(write_pictures(tmp_path / "pictures", CAPTIONS, SIZES), subset="flip_aug = true")
    command = kandinsky_command(kandinsky5, tmp_path, kandinsky5.t2i)
    told = [word for word in command.words if not word.startswith(("--dit", "--text", "--vae"))]
    encoders = [word for word in command.words if word.startswith("--text")]
    command.fill("cache_latents", f"--vae={kandinsky5.vae}", "--task=t2i", words=told)
    command.fill("cache_text_encoder_outputs", "--task=t2i-lite-sft", *encoders, words=told)
    assert counted(capsys.readouterr().err) == {"latents": (0, 3), "texts": (0, 3)}
    _, texts = command.encodes_nothing(*BOTH)
    item = command.run().prepared.manifest.items[0]
    condition = texts.condition(item, item.text)
    assert condition.pooled_D is not None and condition.tokens_LD.isfinite().all()


def test_kandinsky_that_edits(editing, capsys):
    """Sources, mirrored too, and the captions with them and without; a picture that has none."""
    editing.fill("cache_latents")
    editing.fill("cache_text_encoder_outputs")
    told = capsys.readouterr().err
    edits = len(CAPTIONS)
    with_source, without, alone = edits * 2 * 2, edits + 1, 2  # the empty caption too, in either folder
    assert counted(told) == {"latents": (0, 4), "texts": (0, with_source + without + alone)}
    assert "has no conditioning_data_dir: its 1 pictures are trained from their captions alone" in told
    latents, _ = editing.encodes_nothing(*BOTH)
    item = next(item for item in editing.run().prepared.manifest.items if item.source is not None)
    found = latents.get(item, flip=True)
    assert found.source.shape == found.picture.shape


def test_a_streamed_quantised_encoder(editing, capsys):
    """Quantising gives other entries; streaming gives the same."""
    name, quantised = "cache_text_encoder_outputs", "--text_encoder_quant=int8"
    for more in ((), (quantised, "--stream_text_encoder"), (quantised,)):
        editing.fill(name, *more)
    told = re.findall(r"(\d+) in the cache, (\d+) to encode", capsys.readouterr().err)
    assert [missing for _, missing in told] == ["18", "18", "0"]
    editing.encodes_nothing(BOTH[1], quantised, "--stream_text_encoder")


@pytest.mark.parametrize(
    "name, words, said",
    [
        ("cache_latents", ["--ae=nowhere.safetensors"], "nowhere.safetensors"),
        ("cache_latents", ["--ae={ae}", "--random_crop"], "random_crop"),
        ("cache_latents", ["--ae={gemma2}"], "looks like a Gemma2"),
        ("cache_latents", ["--ae={ae}", "--max_caption_variants=2"], "--max_caption_variants has no effect"),
        ("cache_latents", [], "missing: --ae."),
        (
            "cache_latents",
            ["--vae={ae}", "--task=t2i"],
            "Kandinsky's training script; add --family kandinsky5",
        ),
        ("cache_text_encoder_outputs", ["--ae={ae}"], "missing: --gemma2."),
        ("cache_text_encoder_outputs", ["--gemma2={ae}"], "is not a Gemma2"),
        ("cache_text_encoder_outputs", ["--gemma2={gemma2}", "--gemma=2"], "did you mean '--gemma2'"),
        (
            "cache_text_encoder_outputs",
            ["--gemma2={gemma2}", "--network_train_text_encoder"],
            "a LoRA on it would learn nothing",
        ),
    ],
)
def test_a_mistake_is_one_sentence(lumina, nano, tmp_path, name, words, said):
    data = f"--dataset_config={tmp_path / 'pictures.toml'}"
    given = [word.format(ae=nano.ae, gemma2=nano.gemma2) for word in words]
    with pytest.raises(UserError, match=re.escape(said)):
        lumina.fill(name, words=[*given, data])
    assert not (tmp_path / "pictures" / ".flow-cache").exists()


@pytest.mark.parametrize("name", TOOLS)
def test_kandinskys_task_must_be_told(editing, name):
    words = [word for word in editing.words if not word.startswith("--dit")]
    with pytest.raises(UserError, match="Give --task t2i or --task i2i, or name the model with --dit"):
        editing.fill(name, words=words)


def test_what_a_tool_has_no_use_for_is_told(lumina, capsys):
    lumina.fill("cache_text_encoder_outputs", "--vae_batch_size=2")
    assert "--vae_batch_size has no effect: it is about filling the latent cache" in capsys.readouterr().err


def test_a_family_that_is_not_there(lumina, capsys):
    with pytest.raises(SystemExit, match="2"):
        lumina.fill("cache_latents", "--family=flux")
    assert "invalid choice: 'flux' (choose from" in capsys.readouterr().err


def test_several_processes_share_the_work(editing, tmp_path, python):
    """As scripts, in two processes: each makes its part, and training finds both parts."""
    launcher = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --main_process_port 0".split()
    words = [*launcher, "tools/cache_text_encoder_outputs.py", "--family=kandinsky5", *editing.words]
    log = tmp_path / "log"
    with log.open("w") as err:
        script = python.start(words, os.environ | {"OMP_NUM_THREADS": "1"}, err=err.fileno())
        script.join(120)
    assert script.exitcode == 0, log.read_text()
    assert counted(log.read_text()) == {"texts": (0, 9)}, "process 0 speaks, of its half"
    editing.encodes_nothing(BOTH[1])


def test_a_compiled_autoencoder_makes_the_same_latents(lumina, tmp_path, monkeypatch, capsys):
    """Compiled by the backend that computes what is not compiled; the pictures differ in size."""
    made = partial(ComputeOptions, dynamo_backend="eager")
    monkeypatch.setattr("library.training.inputs.ComputeOptions", made)
    caches = []
    for flags in ((), ("--vae_torch_compile", "--vae_batch_size=2")):
        folder = tmp_path / f"cache{len(flags)}"
        lumina.fill("cache_latents", f"--cache_directory={folder}", "--cache_dtype=fp32", *flags)
        tensors = [load_file(path) for path in sorted(folder.rglob("*.safetensors"))]
        caches.append([tensor for each in tensors for tensor in each.values()])
    assert "compiling with eager" in capsys.readouterr().err and len(caches[0]) > 0
    for plain, compiled in zip(*caches, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-4)


def test_whether_it_can_be_compiled_is_found_out_first(lumina, monkeypatch):
    monkeypatch.setattr("library.nn.running.compiling.shutil.which", lambda name: None)
    monkeypatch.setattr(Gemma2Encoder, "__init__", lambda *_: pytest.fail("texts are encoded first"))
    context = lumina.run("--vae_torch_compile", *BOTH)
    with pytest.raises(UserError, match=r"--vae_torch_compile needs a C\+\+ compiler .* leave it out\."):
        context.inputs.fill_caches(context.prepared.manifest)
