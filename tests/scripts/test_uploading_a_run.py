"""A run that uploads what it saves, and one that goes on from there while the hub takes nothing."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file

from tests.hub_stand_in import running_hub

ROOT = Path(__file__).resolve().parents[2]
REPO = "models/me/lora"


@pytest.fixture(scope="module")
def train(nano, run_script, tmp_path_factory):
    """Train for four steps on one photograph, in a folder of its own."""
    photos = tmp_path_factory.mktemp("photos")
    (photos / "1_cat").mkdir()
    (photos / "1_cat/cat.jpg").write_bytes((ROOT / "examples/photos/cat.jpg").read_bytes())
    (photos / "1_cat/cat.txt").write_text("a cat")

    def run(folder, hub, *arguments):
        result = run_script(
            ROOT / "lumina_train_network.py",
            *(f"--pretrained_model_name_or_path={nano.dit}", f"--gemma2={nano.gemma2}", f"--ae={nano.ae}"),
            *(f"--train_data_dir={photos}", "--resolution=64", "--caption_extension=.txt"),
            *("--network_module=networks.lora_lumina", "--network_dim=4", "--learning_rate=1e-2"),
            *("--max_train_steps=4", "--seed=3", "--max_data_loader_n_workers=0", "--ema"),
            *(f"--output_dir={folder}", "--output_name=lora", *arguments),
            HF_ENDPOINT=hub.url,
            HF_HUB_OFFLINE="0",
            HF_HUB_DISABLE_XET="1",
            HF_HOME=str(folder / "hf home"),
        )
        assert result.code == 0, result.err
        return result

    return run


def test_networks_and_states_are_uploaded_and_a_run_goes_on_from_the_hub(train, tmp_path):
    with running_hub("hf_secret") as hub:
        hub_flags = ["--huggingface_repo_id=me/lora", "--huggingface_token=hf_secret"]
        train(
            tmp_path / "first",
            hub,
            *(*hub_flags, "--save_every_n_steps=2", "--save_state", "--save_state_to_huggingface"),
            *("--async_upload", "--huggingface_path_in_repo=runs/1"),
        )
        files = hub.repositories[REPO].files
        networks = {name.removeprefix("runs/1/") for name in files if name.count("/") == 2}
        assert networks == {
            f"lora{end}{ema}.safetensors" for end in ("", "-step00000002") for ema in ("", "-ema")
        }
        for name in networks:
            assert files[f"runs/1/{name}"] == (tmp_path / "first" / name).read_bytes()
        assert json.loads(files["runs/1/lora-step00000002-state/state.json"])["state"]["step"] == 2
        assert "runs/1/lora-state/state.json" in files
        written = [path for path in (tmp_path / "first").glob("lora*") if path.is_file()]
        assert not any(b"hf_secret" in path.read_bytes() for path in written)

        place = "me/lora/runs/1/lora-step00000002-state"
        hub.refuse = True  # the run must end well all the same
        result = train(tmp_path / "second", hub, *hub_flags, f"--resume={place}", "--resume_from_huggingface")
        assert "was not uploaded" in result.err and "hf_secret" not in result.err
        for name in ("lora.safetensors", "lora-ema.safetensors"):
            resumed, straight = load_file(tmp_path / "second" / name), load(files[f"runs/1/{name}"])
            assert all(torch.equal(resumed[key], straight[key]) for key in straight)
