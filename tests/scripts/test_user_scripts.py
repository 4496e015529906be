"""Shell scripts as users have them for sd-scripts, run unchanged on nano models.

The shell itself takes each script apart: `accelerate` is a function there that writes down its words. Those
behind the name of the program are then trained with, in the folder that the shell was in.
"""

import json
import subprocess
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

from library.core.errors import ConfigError
from library.options.group import parse_options
from library.options.train import LuminaTrainOptions
from lumina_train_network import LuminaTrainer

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(__file__).parent / "user_scripts"
PHOTOS = ("cat.jpg", "coffee.jpg", "grass.jpg", "rocket.jpg")


@pytest.fixture
def folder(nano, tmp_path, monkeypatch):
    """A folder with all that the scripts name."""
    for name, path in (("lumina-image-2", nano.dit), ("gemma-2-2b", nano.gemma2), ("ae", nano.ae)):
        (tmp_path / f"{name}.safetensors").symlink_to(path)
    _photos(tmp_path / "img" / "2_sks cat", PHOTOS[:2])
    _photos(tmp_path / "reg" / "1_cat", PHOTOS[2:])
    _photos(tmp_path / "pictures", PHOTOS)
    (tmp_path / "my_lumina_dataset_config.toml").write_text(
        '[general]\ncaption_extension = ".txt"\nshuffle_caption = true\n'
        '[[datasets]]\nresolution = 64\nbatch_size = 4\n[[datasets.subsets]]\nimage_dir = "pictures"\n'
    )
    names = [Path(name).with_suffix(".png").name for name in PHOTOS]
    captions = {name: {"caption": f"a {{fine|good}} photo of {name}", "tags": "photo"} for name in names}
    (tmp_path / "meta.json").write_text(json.dumps(captions))
    (tmp_path / "prompts.txt").write_text(
        "# prompts\nsks cat, best quality --n low quality, worst --w 64 --h 72 --d 1 --l 4 --g 3.5 --s 3\n"
        "a cup of coffee --w 64 --h 64 --d 0 --s 3 --ctr 0.25 --rcfg 1.0 --ss euler_a\n"
    )
    (tmp_path / "prompts.toml").write_text(
        '[prompt]\nwidth = 64\nheight = 64\nsample_steps = 3\n[[prompt.subset]]\nprompt = "grass"\n'
    )
    (tmp_path / "run.toml").write_text(
        'pretrained_model_name_or_path = "lumina-image-2.safetensors"\ngemma2 = "gemma-2-2b.safetensors"\n'
        'ae = "ae.safetensors"\ntrain_data_dir = "img"\nresolution = 64\ncaption_extension = ".txt"\n'
        'output_dir = "output"\noutput_name = "cards"\nmax_train_steps = 2\nv2 = false\nclip_skip = 1\n'
        'network_module = "networks.lora_lumina"\nnetwork_args = ["attn_dim=4"]\nlr_scheduler_args = []\n'
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _photos(folder, names):
    folder.mkdir(parents=True)
    for name in names:
        with Image.open(ROOT / "examples/photos" / name) as photo:
            photo.convert("RGBA").resize((80, 64)).save(folder / Path(name).with_suffix(".png"))
        (folder / Path(name).with_suffix(".txt")).write_text(f"a photo, of {name[:-4]}, sharp\n")


def commands(script, folder):
    """Return the words that each `accelerate` of the script is given behind the program's name."""
    recorder = 'accelerate() { printf "%s\\0" "$@"; printf "\\n\\0"; }; source "$1"'
    shell = ["bash", "-euc", recorder, "bash", SCRIPTS / script]
    done = subprocess.run(shell, cwd=folder, capture_output=True, text=True, check=True)
    calls = [call.split("\0")[:-1] for call in done.stdout.split("\n\0")[:-1]]
    for words in calls:
        (program,) = (n for n, word in enumerate(words) if word.endswith("lumina_train_network.py"))
        yield words[program + 1 :]


def train(script, folder):
    for words in commands(script, folder):
        yield LuminaTrainer(parse_options(LuminaTrainOptions, words)).train()


def steps(folder, name):
    lines = map(json.loads, (folder / "output" / f"{name}.metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if "loss/current" in line]


def without_effect(err):
    """Return the flags that the log says to have no effect."""
    told = [line.partition("--")[2] for line in err.splitlines() if "has no effect: " in line]
    return {line.split()[0] for line in told}


def networks(folder):
    return sorted(path.name for path in (folder / "output").glob("*.safetensors"))


def test_the_guide(folder, capsys):
    for name in PHOTOS[1:]:
        (folder / "pictures" / name).with_suffix(".png").unlink()
    (path,) = train("guide.sh", folder)
    assert steps(folder, "my_lumina_lora")[-1] == 10
    assert len(networks(folder)) == 10 and path.name == "my_lumina_lora.safetensors"
    assert without_effect(capsys.readouterr().err) == set()


def test_the_command_line_of_a_gui(folder, capsys):
    (path,) = train("gui.sh", folder)
    assert steps(folder, "last")[-1] == 6
    assert without_effect(capsys.readouterr().err) == {
        *("lr_scheduler_num_cycles", "mem_eff_attn", "multires_noise_discount", "sample_prompts"),
        *("sample_sampler", "save_last_n_steps_state", "text_encoder_lr", "wandb_run_name", "xformers"),
        "log_tracker_name",
    }
    with safe_open(path, "pt") as file:
        assert not any(key.startswith("lora_te") for key in file.keys())
        assert {file.get_slice(key).get_dtype() for key in file.keys() if "down" in key} == {"F16"}


def test_a_style(folder, capsys):
    (path,) = train("style.sh", folder)
    err = capsys.readouterr().err
    assert without_effect(err) == {"g"}
    assert "line 2: the height 72 becomes 64" in err and "line 3: the sampler euler_a is not used" in err
    assert len(list((folder / "output/sample").glob("neta_style_*.png"))) == 6
    with safe_open(path, "pt") as file:
        ranks = {key: file.get_slice(key).get_shape()[0] for key in file.keys() if "down" in key}
        metadata = file.metadata()
    assert ranks["lora_unet_layers_0_feed_forward_w1.lora_down.weight"] == 16
    assert ranks["lora_unet_noise_refiner_0_attention_qkv.lora_down.weight"] == 8
    assert metadata["ss_num_validation_images"] != "0"


def test_a_character(folder, capsys):
    (path,) = train("character.sh", folder)
    assert steps(folder, "sks_v1")[-1] == 4
    assert networks(folder) == ["sks_v1-step00000002.safetensors", "sks_v1.safetensors"]
    assert without_effect(capsys.readouterr().err) == {"text_encoder_lr", "weighting_scheme"}
    with safe_open(path, "pt") as file:
        assert file.metadata()["ss_num_reg_images"] != "0"


def test_little_memory(folder, capsys):
    (path,) = train("adafactor.sh", folder)
    assert steps(folder, "low_vram")[-1] == 8
    assert without_effect(capsys.readouterr().err) == set()
    assert list((folder / "output/sample").glob("low_vram_000005_00_*.png"))
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    told = {"title": "Low VRAM", "author": "me", "description": "cups, cats", "license": "CC0-1.0"}
    told |= {"tags": "photo,film", "usage_hint": "weight 0.8", "trigger_phrase": "on film"}
    told |= {"merged_from": "nothing", "preprocessor": "none", "is_negative_embedding": "false"}
    assert {key: metadata[f"modelspec.{key}"] for key in told} == told
    assert metadata["ss_training_comment"] == "8 GB card"


def test_words_that_would_train_something_else_are_answered(folder, capsys):
    (words,) = commands("thread.sh", folder)
    with pytest.raises(ConfigError) as caught:
        parse_options(LuminaTrainOptions, words)
    (sentence,) = str(caught.value).splitlines()
    assert sentence.startswith("--min_snr_gamma cannot be used here: ")
    place = words.index("--min_snr_gamma")
    del words[place : place + 2]
    LuminaTrainer(parse_options(LuminaTrainOptions, words)).train()
    assert without_effect(capsys.readouterr().err) == {"xformers"}
    assert steps(folder, "thread")[-1] == 3


def test_two_evenings(folder, capsys):
    assert list(train("resume.sh", folder)) == [Path("output/evening.safetensors")] * 2
    assert steps(folder, "evening") == [1, 2, 3, 4]  # none twice, none left out
    assert without_effect(capsys.readouterr().err) == set()


def test_a_rented_machine(folder, capsys):
    expected = {
        *("ddp_gradient_as_bucket_view", "ddp_static_graph", "fused_backward_pass", "async_upload"),
        *("save_state_to_huggingface", "lr_scheduler"),
    }
    (words,) = commands("cards.sh", folder)
    LuminaTrainer(parse_options(LuminaTrainOptions, [*words, "--dry_run"])).train()
    assert without_effect(capsys.readouterr().out.partition("\nAdjusted\n")[2]) == expected
    LuminaTrainer(parse_options(LuminaTrainOptions, words)).train()
    assert without_effect(capsys.readouterr().err) == expected


def test_a_text_encoder_and_only_a_look(folder, capsys):
    (words,) = commands("text_encoder.sh", folder)
    assert words.pop() == "--debug_dataset"
    assert list(train("text_encoder.sh", folder)) == [Path("output/debug_dataset")]
    assert (folder / "output/debug_dataset/0001.png").exists()
    LuminaTrainer(parse_options(LuminaTrainOptions, words)).train()
    assert steps(folder, "both")[-1] == 2
    assert without_effect(capsys.readouterr().err) == {"text_encoder_lr"}
