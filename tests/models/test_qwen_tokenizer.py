"""Qwen's and CLIP's tokenizers against transformers' from the same files; and where they are looked for."""

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer, Qwen2Tokenizer

from library.core.errors import CheckpointError, ConfigError
from library.models.clip_tokenizer import find_clip_tokenizer
from library.models.qwen_tokenizer import find_qwen_tokenizer
from tools.nano.kandinsky5_text import QWEN_IDS, write_clip_tokenizer, write_qwen_tokenizer

TEXTS = [
    "", " ", "a", "A cat", "a  cat ", " a cat\n", "\n", "\n\n a\n\nb", "\r\n", "a\r\n\tb", "\t", " \n ",
    "It's the dog's; they'LL say I'M, WE'VE", "Don’t", "3.14159 1,000,000 2024-02-29", "①Ⅷ½", "   x",
    "(masterpiece:1.2), [best quality], score_9_up, 1girl", "https://example.org/a?b=c&d=%20#e",
    "C++ && || !=", "naïve façade ΑΒΓ Съешь", "e\u0301 o\u0308 \u1e69\u0323", "ﬁ ™", "𝕄𝕒𝕥𝕙", "İstanbul ẞ",
    "大規模言語モデルの漢字かな交じり文。", "안녕하세요 세계", "مرحبا بالعالم",
    "नमस्ते", "สวัสดีชาวโลก",
    "😀", "👩‍🚀 🏳️‍🌈", "a😀b 🎉🎉  🎉",
    "\u00a0a\u00a0b", "\u3000", "a\u200bb", "\ufeffa", "\x00", "a\x7f", "\u2028",
    "<|im_start|>user\na cat<|im_end|>", "a<|im_end|>b", " <|image_pad|> ", "<|im_start|", "im_end|>",
    "<|endoftext|>", "a <|endoftext|> cat", "<|startoftext|>a", "<|ENDOFTEXT|> a", "</w>", "a</w> b",
    "<tool_call>x</tool_call>", "<|fim_pad|>", "#version: 0.2",
    "the image of the quantity " * 300, "x" * 4000, "大" * 500,
]  # fmt: skip
ANY_TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40)
ODD_TEXT = st.lists(st.sampled_from([*" \n\ta's<|>é大", "<|im_end|>", "<|endoftext|>", "the", " image"])).map(
    "".join
)
KINDS = {
    "qwen": (write_qwen_tokenizer, find_qwen_tokenizer, Qwen2Tokenizer),
    "clip": (write_clip_tokenizer, find_clip_tokenizer, CLIPTokenizer),
}


@pytest.fixture(scope="module", params=["tokenizer.json", "vocab.json"])
def folder(request, tmp_path_factory):
    """A folder with both tokenizers, each in a folder of its flag's name."""
    folder = tmp_path_factory.mktemp("tokenizers")
    slow = request.param == "vocab.json"
    for kind, (write, _, _) in KINDS.items():
        write(folder / f"{kind}_tokenizer", slow=slow)
        assert (folder / f"{kind}_tokenizer" / request.param).is_file()
    return folder


@pytest.fixture(scope="module")
def qwen(folder):
    return find_qwen_tokenizer(folder / "qwen.safetensors").build()


@pytest.fixture(scope="module")
def clip(folder):
    return find_clip_tokenizer(folder / "clip_l.safetensors").build()


@pytest.fixture(scope="module")
def qwen_oracle(folder):
    return Qwen2Tokenizer.from_pretrained(folder / "qwen_tokenizer")


@pytest.fixture(scope="module")
def clip_oracle(folder):
    return CLIPTokenizer.from_pretrained(folder / "clip_tokenizer")


def oracle_clip_ids(oracle, text):
    """What the official code gives to CLIP, up to the token that CLIP is read at."""
    ids = oracle(text, max_length=77, truncation=True, padding="max_length")["input_ids"]
    assert len(ids) == 77 and oracle.pad_token_id == oracle.eos_token_id
    return ids[: ids.index(oracle.eos_token_id) + 1]


def test_qwen_ids_equal_transformers(qwen, qwen_oracle):
    assert {text: qwen.ids(text) for text in TEXTS} == {
        text: qwen_oracle(text)["input_ids"] for text in TEXTS
    }
    assert all(qwen.count(text) == len(qwen.ids(text)) for text in TEXTS)


def test_clip_ids_equal_transformers(clip, clip_oracle):
    assert {text: clip.ids(text) for text in TEXTS} == {
        text: oracle_clip_ids(clip_oracle, text) for text in TEXTS
    }


@settings(max_examples=150)
@given(text=ANY_TEXT | ODD_TEXT)
def test_ids_of_any_text_equal_transformers(qwen, qwen_oracle, clip, clip_oracle, text):
    assert qwen.ids(text) == qwen_oracle(text)["input_ids"]
    assert clip.ids(text) == oracle_clip_ids(clip_oracle, text)


def test_a_long_text_of_clip_keeps_its_end(clip):
    short, long = clip.ids("a cat"), clip.ids("a cat " * 100)
    assert len(long) == 77 and long[-1] == short[-1] and long.count(short[-1]) == 1
    assert clip.count("a cat " * 100) == 2 + 100 * (clip.count("a cat") - 2)


def test_special_tokens_are_read_in_a_text(qwen):
    ids = qwen.ids("a<|im_end|><|image_pad|>")
    assert ids[1:] == [QWEN_IDS["<|im_end|>"], QWEN_IDS["<|image_pad|>"]]
    assert qwen.image_pad_id == QWEN_IDS["<|image_pad|>"]


def test_published_special_tokens_where_no_configuration_lists_them(folder, qwen, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        write_qwen_tokenizer(tmp_path, slow=True)
        assert (tmp_path / name).is_file()
    (tmp_path / "tokenizer_config.json").unlink()
    alone = find_qwen_tokenizer(tmp_path).build()
    assert [alone.ids(text) for text in TEXTS] == [qwen.ids(text) for text in TEXTS]


# ---- where they are looked for


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slow", [False, True])
def test_places(kind, slow, tmp_path):
    write, find, _ = KINDS[kind]
    pipeline, single = tmp_path / "pipeline", tmp_path / "single"
    encoder, tokenizer = (
        ("text_encoder", "tokenizer") if kind == "qwen" else ("text_encoder_2", "tokenizer_2")
    )
    write(pipeline / tokenizer, slow=slow)
    write(single / f"{kind}_tokenizer", slow=slow)
    write(tmp_path / "model", slow=slow)
    (pipeline / encoder).mkdir()
    name = "vocab.json + merges.txt" if slow else "tokenizer.json"
    for weights in (pipeline, pipeline / encoder, pipeline / encoder / "model.safetensors.index.json"):
        assert find(weights).origin == str(pipeline / tokenizer / name)
    for weights in (single / "x.safetensors", single):
        assert find(weights).origin == str(single / f"{kind}_tokenizer" / name)
    for weights in (tmp_path / "model", tmp_path / "model" / "model.safetensors"):
        assert find(weights).origin == str(tmp_path / "model" / name)
    named = tmp_path / "model" / ("merges.txt" if slow else "tokenizer.json")
    for path in (named, named.parent, pipeline):
        assert find(single, path).digest == find(single).digest
    assert find(single, named).origin == str(tmp_path / "model" / name)


def test_the_processor_folder_of_a_pipeline(tmp_path):
    write_qwen_tokenizer(tmp_path / "processor")
    assert find_qwen_tokenizer(tmp_path).origin == str(tmp_path / "processor" / "tokenizer.json")
    assert (tmp_path / "processor" / "preprocessor_config.json").is_file()


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize(("kind", "repository"), [
    ("qwen", "models--Qwen--Qwen2.5-VL-7B-Instruct"), ("clip", "models--openai--clip-vit-large-patch14"),
])  # fmt: skip
def test_from_the_hub_cache_without_a_network(kind, repository, slow, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", None)
    write, find, _ = KINDS[kind]
    folder = tmp_path / "hub" / repository
    write(folder / "snapshots" / "abc", slow=slow)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    assert str(folder) in find(tmp_path / "x.safetensors", None, tmp_path / "hub").origin


@pytest.mark.parametrize("kind", KINDS)
def test_nowhere(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError) as caught:
        KINDS[kind][1](tmp_path / "models" / "x.safetensors", None, tmp_path / "empty")
    message = str(caught.value)
    for told in ("no tokenizer.json or vocab.json with merges.txt", f"--{kind}_tokenizer", "x.safetensors",
                 str(tmp_path / "models" / f"{kind}_tokenizer"), str(tmp_path / "tokenizer")):  # fmt: skip
        assert told in message


@pytest.mark.parametrize("kind", KINDS)
def test_named_paths_that_are_none(kind, tmp_path):
    find = KINDS[kind][1]
    with pytest.raises(ConfigError, match="neither tokenizer.json nor vocab.json with merges.txt"):
        find(tmp_path, tmp_path)
    with pytest.raises(ConfigError, match=f"--{kind}_tokenizer .*nothing.json.* no such file"):
        find(tmp_path, tmp_path / "nothing.json")
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(ConfigError, match="merges.txt cannot be read"):
        find(tmp_path, tmp_path / "vocab.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.json": b"{}"}, "not a readable tokenizer.json"),
        ({"vocab.json": b"{", "merges.txt": b""}, "vocab.json of .* is not readable JSON"),
        ({"vocab.json": b'{"a": "b"}', "merges.txt": b""}, "is not a vocabulary"),
        ({"vocab.json": b'{"a": 0, "b": 1}', "merges.txt": b"a b\n"}, "merges 'a b', which does not go with"),
        ({"vocab.json": b'{"a": 0}', "merges.txt": b"a\n"}, "merges 'a', which does not go with"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(kind, change, message, tmp_path):
    for name, content in change.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        KINDS[kind][1](tmp_path).build()


def test_a_damaged_list_of_special_tokens(tmp_path):
    write_qwen_tokenizer(tmp_path, slow=True)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"x": {}}}))
    with pytest.raises(CheckpointError, match="added_tokens_decoder"):
        find_qwen_tokenizer(tmp_path).build()


def test_the_tokenizer_of_another_model(tmp_path):
    write_qwen_tokenizer(tmp_path / "qwen")
    write_clip_tokenizer(tmp_path / "clip")
    with pytest.raises(CheckpointError, match=r"is not CLIP's tokenizer: it has no <\|startoftext\|>"):
        find_clip_tokenizer(tmp_path, tmp_path / "qwen").build()
    with pytest.raises(
        CheckpointError, match=r"is not the tokenizer of Qwen2.5-VL: it has no <\|im_start\|>"
    ):
        find_qwen_tokenizer(tmp_path, tmp_path / "clip").build()


def test_the_digest_is_of_everything_that_decides_ids(tmp_path):
    digests = set()
    write_qwen_tokenizer(tmp_path, slow=True)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        digests.add(find_qwen_tokenizer(tmp_path).digest)
        content = (tmp_path / name).read_text()
        (tmp_path / name).write_text(content.rstrip("\n ") + "\n\n")
    digests.add(find_qwen_tokenizer(tmp_path).digest)
    assert len(digests) == 4


def test_needs_neither_torch_nor_transformers(folder):
    code = (
        "import sys; from pathlib import Path; folder = Path(sys.argv[1]);"
        "from library.models.qwen_tokenizer import find_qwen_tokenizer as qwen;"
        "from library.models.clip_tokenizer import find_clip_tokenizer as clip;"
        "import library.models.clip_text_format, library.models.kandinsky5_prompt;"
        "qwen(folder).build().ids('a'); clip(folder).build().ids('a');"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)
