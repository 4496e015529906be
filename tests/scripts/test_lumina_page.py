"""docs/lumina.md, docs/finetuning.md: their commands are accepted by the programs, and links lead somewhere.

Here they are only taken apart; test_user_scripts.py, test_train_script.py and others run ones like them.
"""

import re
import subprocess
from pathlib import Path

import pytest

from library.options.group import parse_options
from library.options.inference_lumina import LuminaInferenceOptions
from library.options.train import LuminaFinetuneOptions, LuminaTrainOptions
from library.options.train_kandinsky5 import Kandinsky5FinetuneOptions

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = {
    "lumina_train_network.py": LuminaTrainOptions,
    "lumina_train.py": LuminaFinetuneOptions,
    "kandinsky5_train.py": Kandinsky5FinetuneOptions,
    "lumina_minimal_inference.py": LuminaInferenceOptions,
}
# `python` and `accelerate` write down their words; nothing else is done.
RECORDER = """
python() { printf "%s\\0" "$@"; printf "\\n\\0"; }
accelerate() { python "$@"; }
git() { :; }; cd() { :; }; source() { :; }; pip() { :; }; mv() { :; }; python3() { :; }
"""


def commands(page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    for block in re.findall(r"```sh\n(.*?)```", text, re.S):
        done = subprocess.run(["bash", "-euc", RECORDER + block], capture_output=True, text=True, check=True)
        yield from (call.split("\0")[:-1] for call in done.stdout.split("\n\0")[:-1])


def test_every_command_is_accepted(tmp_path, monkeypatch):
    (tmp_path / "output").mkdir()
    saved = tmp_path / "output" / "my_lora.config.toml"  # what the page's first run leaves
    monkeypatch.chdir(tmp_path)
    told = []
    for words in commands("lumina.md"):
        program = next(word for word in words if word.endswith(".py") or word == "-c")
        if program not in OPTIONS:
            assert program == "-c" or (ROOT / program).is_file()
            continue
        arguments = words[words.index(program) + 1 :]
        options = parse_options(OPTIONS[program], arguments)
        if "--output_name" in arguments and not saved.exists():
            parse_with_output_config(arguments, saved)
        told += options.adjustments() if program == "lumina_train_network.py" else []
    assert saved.exists() and told == []


def test_every_command_of_full_fine_tuning_is_accepted():
    seen, told = [], []
    for words in commands("finetuning.md"):
        program = next(word for word in words if word.endswith(".py"))
        options = parse_options(OPTIONS[program], words[words.index(program) + 1 :])
        told += options.adjustments() if program.endswith("_train.py") else []
        seen.append(program)
    assert seen == ["lumina_train.py", "kandinsky5_train.py", "lumina_minimal_inference.py"] and told == []


def parse_with_output_config(arguments, path):
    with pytest.raises(SystemExit):
        parse_options(LuminaTrainOptions, [*arguments, "--output_config", f"--config_file={path}"])


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
