"""--dry_run and --debug_dataset: told and drawn, nothing trained; and the saved configuration."""

import re

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def command(nano, tmp_path_factory):
    """A command line on four pictures: two square, one wide, one with a mask; one has a long caption."""
    photos = tmp_path_factory.mktemp("data") / "2_thing"
    photos.mkdir()
    for name, size, colour in (
        ("red", (96, 96), "red"),
        ("green", (64, 64), "green"),
        ("wide", (160, 90), "blue"),
    ):
        Image.new("RGB", size, colour).save(photos / f"{name}.png")
        (photos / f"{name}.txt").write_text(f"{name} picture")
    half = Image.new("RGBA", (64, 64), (255, 255, 255, 255))
    half.paste((255, 255, 255, 0), (0, 0, 32, 64))
    half.save(photos / "half.png")
    (photos / "half.txt").write_text("one, two, three, four, " * 30)
    return [
        *(f"--pretrained_model_name_or_path={nano.dit}", f"--gemma2={nano.gemma2}", f"--ae={nano.ae}"),
        *(f"--train_data_dir={photos.parent}", "--caption_extension=.txt", "--resolution=64"),
        *("--enable_bucket", "--bucket_reso_steps=16", "--min_bucket_reso=32", "--train_batch_size=2"),
        *("--network_module=networks.lora_lumina", "--network_dim=4", "--max_train_epochs=2"),
        *("--gemma2_max_token_length=50", "--cache_latents", "--cache_text_encoder_outputs"),
        *("--alpha_mask", "--masked_loss"),
    ]


@pytest.fixture(scope="module")
def rehearsed(command, run_script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    result = run_script("lumina_train_network.py", *command, f"--output_dir={folder}", "--dry_run")
    assert result.code == 0, result.err
    return result.out, folder


def test_the_report_says_what_a_run_would_do(rehearsed):
    out, _ = rehearsed
    assert "dataset 0, 64x64: 3 pictures, 6 with repeats, batches of 2; cut off 0.0% on average" in out
    assert re.search(r"dataset 0, 80x48: 1 pictures, 2 with repeats, batches of 2; cut off [1-9]", out)
    assert "8 pictures an epoch, repeats counted, in 4 batches" in out
    assert "8 steps in all, 2 epochs" in out
    assert "1 longer than the text encoder takes" in out
    assert "cut to 50: " in out
    assert "latents: 0 of 4 are there already, 4 to encode" in out
    assert "filling the text cache: " in out and "filling the latent cache: " in out
    assert "--max_train_epochs decides the number of steps: 8" in out
    assert "no --seed is given" in out


def test_trained_numbers_and_memory_are_those_of_the_model(rehearsed, nano):
    from safetensors import safe_open

    out, _ = rehearsed
    with safe_open(nano.dit, "pt") as file:
        count = sum(file.get_tensor(key).numel() for key in file.keys())
    shown = float(re.search(r"transformer: ([\d.]+) MiB", out)[1])
    assert shown == pytest.approx(4 * count / 2**20, rel=0.02)
    trained = int(re.search(r"([\d,]+) trained numbers", out)[1].replace(",", ""))
    parts = re.findall(r"^    \w+: ([\d,]+) on \d+ layers", out, re.M)
    assert trained == sum(int(part.replace(",", "")) for part in parts) > 0
    for what, size in (("network", 4), ("gradients", 4), ("optimizer", 8)):  # fp32, and AdamW's two averages
        told = float(re.search(rf"^    {what}: ([\d.]+) MiB", out, re.M)[1])
        assert told == pytest.approx(size * trained / 2**20, abs=0.051)


def test_the_sheet_shows_crops_masks_and_captions(rehearsed):
    _, folder = rehearsed
    sheet = np.asarray(Image.open(folder / "dry_run.png").convert("RGB")).reshape(-1, 3)
    for colour in ((255, 0, 0), (0, 128, 0), (0, 0, 255)):
        assert (sheet == colour).all(1).sum() > 2000
    tinted = np.abs(sheet.astype(int) - (255, 64, 112)).max(1) <= 2
    assert tinted.sum() > 1000  # half of a picture is masked
    assert [p.name for p in folder.iterdir()] == ["dry_run.png"]


def test_average_and_trained_text_encoder_are_part_of_the_estimate(rehearsed, command, run_script, tmp_path):
    def size(out, what):
        return float(re.search(rf"{what}: ([\d.]+) MiB", out)[1])

    words = [word for word in command if "text_encoder_outputs" not in word]
    words += [f"--output_dir={tmp_path}", "--dry_run", "--ema", "--network_train_text_encoder"]
    out = run_script("lumina_train_network.py", *words).out
    trained = int(re.search(r"([\d,]+) trained numbers", out)[1].replace(",", ""))
    assert size(out, r"running average \(EMA\)") == pytest.approx(4 * trained / 2**20, abs=0.06)
    assert size(out, "activations of the text encoder") > 0.5
    assert size(out, "  text encoder") > 0
    assert "running average" not in rehearsed[0] and "of the text encoder" not in rehearsed[0]


def test_captions_of_another_ending_are_warned_of(command, run_script, tmp_path):
    words = [*command, f"--output_dir={tmp_path}", "--caption_extension=.caption", "--dry_run"]
    result = run_script("lumina_train_network.py", *words)
    assert "warning: class tokens stand in for the captions of 4 pictures" in result.out
    assert "give --caption_extension .txt" in result.out


def test_a_rehearsal_says_where_a_resumed_run_goes_on(command, run_script, tmp_path):
    words = [*command, f"--output_dir={tmp_path}", "--seed=3"]
    assert run_script("lumina_train_network.py", *words, "--save_state").code == 0
    words = [*command, f"--output_dir={tmp_path}", "--resume=latest", "--max_train_epochs=3", "--dry_run"]
    out = run_script("lumina_train_network.py", *words).out
    assert "seed 3" in out and "a random one" not in out
    assert "last-state, after step 8 of 12" in out
    assert "last.safetensors is there already" not in out
    assert out.count("--max_train_epochs is 3 from here on; it was 2") == 1


def test_checkpointing_makes_the_estimate_smaller(rehearsed, command, run_script, tmp_path):
    def size(out):
        return float(re.search(r"activations of the largest batch: ([\d.]+) MiB", out)[1])

    words = [f"--output_dir={tmp_path}", "--dry_run", "--gradient_checkpointing"]
    assert size(run_script("lumina_train_network.py", *command, *words).out) < 0.5 * size(rehearsed[0])


def test_encoders_are_not_looked_at_where_nothing_is_left_to_encode(nano, tmp_path, monkeypatch):
    """A text encoder takes seconds to import."""
    from library.training.look.dry_run import Rehearsal
    from lumina_train_network import LuminaTrainer
    from tests.training.assembled import command, context_of, write_pictures

    config = write_pictures(tmp_path / "pictures", [(32, 32), (48, 32)])
    words = command(nano, config, tmp_path / "out", "--cache_latents_to_disk")
    words += ["--cache_text_encoder_outputs_to_disk", "--console_log_level=INFO"]
    context = context_of(words)
    context.inputs.fill_caches(context.prepared.manifest)
    for loads in ("load_text_encoders", "load_vae"):
        monkeypatch.setattr(LuminaTrainer, loads, lambda *_: pytest.fail("loaded"))
    out = "\n".join(Rehearsal(context.trainer, context.prepared).report())
    assert "texts: 2 of 2 are there already, 0 to encode, kept on disk" in out
    assert "memory of tensors while training: " in out and "filling the" not in out


def test_debug_dataset_draws_every_picture(command, run_script, tmp_path):
    result = run_script("lumina_train_network.py", *command, f"--output_dir={tmp_path}", "--debug_dataset")
    assert result.code == 0, result.err
    assert "drew 1 sheet(s) of 4 pictures" in result.out
    assert Image.open(tmp_path / "debug_dataset" / "0001.png").size[0] > 1000


def test_the_saved_configuration_repeats_the_run(command, run_script, tmp_path):
    extra = ["--max_timestep=900", "--noise_offset=0.05", "--learning_rate=1e-3", "--output_name=first"]
    first = run_script("lumina_train_network.py", *command, f"--output_dir={tmp_path / 'a'}", *extra)
    assert first.code == 0, first.err
    config = tmp_path / "a" / "first.config.toml"
    again = run_script("lumina_train_network.py", f"--config_file={config}", f"--output_dir={tmp_path / 'b'}")
    assert again.code == 0, again.err
    one, two = (load_file(tmp_path / folder / "first.safetensors") for folder in ("a", "b"))
    assert one.keys() == two.keys()
    assert all(one[key].equal(two[key]) for key in one)
    told = "first.safetensors is there already, and this run replaces it when it ends"
    assert told not in first.err + again.err
    third = run_script("lumina_train_network.py", f"--config_file={config}", "--max_train_epochs=1")
    assert third.code == 0 and f"WARNING {tmp_path / 'a' / told}" in third.err
