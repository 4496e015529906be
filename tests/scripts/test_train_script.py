"""The guide's training example on nano models, as a user types it."""

import json
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[2]
SYSTEM_PROMPT = "You are an assistant designed to generate high-quality images based on user prompts."


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Six of the example photographs in a dataset of their own; two held out."""
    folder = tmp_path_factory.mktemp("photos with spaces é")
    for name in ("astronaut", "cat", "coffee", "grass", "gravel", "rocket"):
        (source,) = (p for p in (ROOT / "examples/photos").glob(f"{name}.*") if p.suffix != ".txt")
        (folder / source.name).write_bytes(source.read_bytes())
        (folder / f"{name}.txt").write_text(source.with_suffix(".txt").read_text())
    config = folder / "my_lumina_dataset_config.toml"
    config.write_text(
        "[general]\ncaption_extension = '.txt'\nenable_bucket = true\nbucket_reso_steps = 16\n"
        "validation_split = 0.4\nflip_aug = true\nshuffle_caption = true\ncaption_dropout_rate = 0.2\n"
        f"[[datasets]]\nresolution = 64\nmin_bucket_reso = 32\nbatch_size = 2\n"
        f"[[datasets.subsets]]\nimage_dir = '{folder}'\nnum_repeats = 2\n"
    )
    return config


@pytest.fixture(scope="module")
def trained(photos, nano, run_script, tmp_path_factory):
    """The result and output folder of one run of the guide's example, with samples and logs on top."""
    folder = tmp_path_factory.mktemp("output")
    prompts = folder / "prompts.txt"
    prompts.write_text(
        "a cat --w 64 --h 48 --s 3 --d 0\n# a comment\n"
        "n scale model -- really --n blurry --w 64 --h 64 --s 3\n"
    )
    arguments = [
        *(f"--pretrained_model_name_or_path={nano.dit}", f"--gemma2={nano.gemma2}", f"--ae={nano.ae}"),
        *(f"--dataset_config={photos}", f"--output_dir={folder}", "--output_name=my_lumina_lora"),
        *("--save_model_as=safetensors", "--network_module=networks.lora_lumina"),
        *("--network_dim=8", "--network_alpha=8", "--learning_rate=1e-2"),
        *("--optimizer_type=AdamW", "--lr_scheduler=constant", "--timestep_sampling=nextdit_shift"),
        *("--discrete_flow_shift=6.0", "--model_prediction_type=raw", f"--system_prompt={SYSTEM_PROMPT}"),
        *("--max_train_epochs=3", "--save_every_n_epochs=1", "--mixed_precision=bf16"),
        *("--gradient_checkpointing", "--cache_latents", "--cache_text_encoder_outputs"),
        *(f"--sample_prompts={prompts}", "--sample_every_n_epochs=2", f"--logging_dir={folder / 'logs'}"),
        *("--seed=7", "--network_args", "attn_dim=4", "embedder_dims=[2,0,2]"),
    ]
    launcher = ["-m", "accelerate.commands.launch", "--num_cpu_threads_per_process", "1", "--cpu"]
    result = run_script(*launcher, ROOT / "lumina_train_network.py", *arguments)
    assert result.code == 0, result.err
    return result, folder


def metrics(folder):
    lines = (folder / "my_lumina_lora.metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_files_are_named_as_in_the_reference_tool(trained):
    _, folder = trained
    names = sorted(p.name for p in folder.glob("*.safetensors"))
    assert names == [f"my_lumina_lora{end}.safetensors" for end in ("-000001", "-000002", "")]
    assert not list(folder.glob(".tmp*"))


def test_keys_and_metadata(trained):
    _, folder = trained
    with safe_open(folder / "my_lumina_lora.safetensors", "pt") as file:
        keys, metadata = set(file.keys()), file.metadata()
        ranks = {k: file.get_tensor(k).shape[0] for k in keys if k.endswith("lora_down.weight")}
    assert ranks["lora_unet_layers_0_attention_qkv.lora_down.weight"] == 4
    assert ranks["lora_unet_layers_0_feed_forward_w1.lora_down.weight"] == 8
    assert ranks["lora_unet_x_embedder.lora_down.weight"] == 2
    assert not any(k.startswith("lora_unet_t_embedder") for k in keys)
    assert metadata["ss_network_module"] == "networks.lora_lumina"
    assert metadata["ss_base_model_version"] == "lumina2"
    assert metadata["ss_steps"] == str(metrics(folder)[-1]["step"])
    assert metadata["ss_epoch"] == "3"
    assert metadata["ss_seed"] == "7"
    assert metadata["ss_system_prompt"] == SYSTEM_PROMPT
    assert metadata["modelspec.architecture"] == "lumina-2/lora"
    assert metadata["modelspec.resolution"] == "64x64"


def test_the_network_learns(trained):
    losses = [r["loss/current"] for r in metrics(trained[1]) if "loss/current" in r]
    third = len(losses) // 3
    assert sum(losses[-third:]) < sum(losses[:third])


def test_validation_is_reported_every_epoch(trained):
    values = [r["loss/validation"] for r in metrics(trained[1]) if "loss/validation" in r]
    assert len(values) == 3
    assert values[-1] < values[0]


def test_sample_pictures(trained):
    files = sorted((trained[1] / "sample").glob("*.png"))
    assert [f.name.rsplit("_", 2)[0] for f in files] == [f"my_lumina_lora_e000002_{n:02d}" for n in (0, 1)]
    assert [Image.open(f).size for f in files] == [(64, 48), (64, 64)]
    assert files[0].name.endswith("_0.png")
    assert "n scale model -- really" in Image.open(files[1]).info["parameters"]


def test_tensorboard_has_the_losses(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (log,) = (trained[1] / "logs").glob("*/network_train")
    events = EventAccumulator(str(log)).Reload()
    logged = [event.value for event in events.Scalars("loss/current")]
    written = [r["loss/current"] for r in metrics(trained[1]) if "loss/current" in r]
    assert logged == pytest.approx(written, rel=1e-6)


def test_the_progress_line_has_the_form_that_front_ends_read(trained):
    last = [line for line in trained[0].err.replace("\r", "\n").splitlines() if line.startswith("steps:")][-1]
    assert "100%" in last
    assert ", avr_loss=" in last
    assert "it/s" in last or "s/it" in last


def test_ram_caches_leave_the_dataset_folder_alone(trained, photos):
    assert not [p for p in photos.parent.rglob("*") if p.suffix in (".safetensors", ".npz")]
