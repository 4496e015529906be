"""The tokenizer against transformers' own from the same SentencePiece model; and where it is looked for."""

import io
import itertools
import subprocess
import sys

import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import GemmaTokenizer

from library.core.errors import CheckpointError, ConfigError
from library.models.gemma2_tokenizer import find_tokenizer, format_prompt, load_gemma2_tokenizer

WHITESPACE = ["".join(run) for n in (1, 2, 3) for run in itertools.product(" \n\t", repeat=n)]
ALPHABETS = [
    "naïve façade, Ærøskøbing, žluťoučký kůň",
    "Съешь же ещё этих мягких французских булок",
    "大規模言語モデルの漢字かな交じり文",
    "안녕하세요 세계",
    "مرحبا بالعالم",
    "שלום עולם",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "e\u0301 o\u0308 \u1e69\u0323",
    "ﬁ ﬂ ½ Ⅷ ℃ ™ ①",
    "𝕄𝕒𝕥𝕙 𝔣𝔯𝔞𝔨𝔱𝔲𝔯",
]
EMOJI = ["😀", "👩‍🚀", "🏳️‍🌈", "👍🏽", "🇩🇪🇯🇵", "a😀b 🎉🎉  🎉", "☺️", "❤\ufe0f"]
SPECIAL = [
    "<bos>", "<eos>", "<pad>", "<unk>", "<mask>", "<bos>a cat<eos>", "a <pad> b", " <bos> ", "<bos", "bos>",
    "<<bos>>", "<start_of_turn>user\nhi<end_of_turn>\n", "<b>bold</b>", "<b", "<Prompt Start>", "<0x41>",
    "<0x0A>", "[multimodal]", "▁", "▁▁", "▁▁▁ ▁a▁", "a▁b c", "\u2581 \u2581",
]  # fmt: skip
CONTROLS = [
    "\x00",
    "a\x00b",
    "\r",
    "\r\n",
    "a\r\nb",
    "\x0b\x0c",
    "\x7f",
    "\u0085",
    "\u2028",
    "\u2029",
    "\ufeffa",
]
SPACES = ["\u00a0", "a\u00a0b", "\u2003", "\u3000", "\u200b", "a\u200bb", "\u202eabc", "\u2060"]
RUNS = [" " * n + tail for n in (4, 5, 6, 7, 8, 9, 16, 31, 32, 33, 70) for tail in ("", "a")]
LINES = ["a" + "\n" * n + "b" for n in (4, 5, 6, 7, 31, 32, 40)]
TAGS = [
    "1girl, solo, long hair, blue eyes, (masterpiece:1.2), [best quality]", "score_9, score_8_up",
    "a,b,,c, ,d",
    "a cat -- the best; \"quoted\" 'single' `code` $x^2$ {a|b} \\n \\\\",
    "https://example.org/a?b=c&d=%20#e",
    "e-mail@x.yz", "CamelCaseAndALLCAPS", "under_scores__and___more", "3.14159 1,000,000 2024-02-29 12:34",
    "-1 +2 ±3 1e-5", "#ff00ff", "C++ && || !=", "…—–‘’“”", "a" * 300, "ab" * 700, "", " ", "a", "A", ".",
    "a portrait photograph of a woman " * 60,
    "You are an assistant designed to generate high-quality images. <Prompt Start> a cat",
]  # fmt: skip
NOUNS = ["a small red astronaut", "MANY galaxies", "galaxies", "photographer with a camera"]
PHRASES = [noun + tail for noun in NOUNS for tail in ("", ".", " \n", ", a texture", "\tx")]
STRINGS = [
    *WHITESPACE, *(f"a{run}b" for run in WHITESPACE), *(f"{run}a" for run in WHITESPACE), *ALPHABETS, *EMOJI,
    *SPECIAL, *CONTROLS, *SPACES, *RUNS, *LINES, *TAGS, *PHRASES,
]  # fmt: skip


def other_model():
    """A second SentencePiece model: no whitespace pieces, no user-defined ones, longer merges."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick  brown fox jumps over the lazy dog", "aaaa bbbb abab  baba"] * 9),
        model_writer=model,
        model_type="bpe",
        vocab_size=310,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        bos_piece="<bos>",
        eos_piece="<eos>",
        user_defined_symbols=["<mask>"],
        minloglevel=2,
    )
    return model.getvalue()


@pytest.fixture(scope="module", params=["nano", "other"])
def folder(request, nano_in, tmp_path_factory):
    """A folder with a tokenizer.model."""
    if request.param == "nano":
        return nano_in("diffusers").tokenizer
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.model").write_bytes(other_model())
    return folder


@pytest.fixture(scope="module")
def oracle(folder):
    return GemmaTokenizer.from_pretrained(folder, add_bos_token=True)


@pytest.fixture(scope="module", params=["tokenizer.model", "tokenizer.json"])
def tokenizer(request, folder, oracle, tmp_path_factory):
    """Ours, from the SentencePiece model and from the tokenizer.json that transformers makes of it."""
    file = folder / "tokenizer.model"
    if request.param == "tokenizer.json":
        saved = tmp_path_factory.mktemp("saved")
        oracle.save_pretrained(saved)
        file = saved / "tokenizer.json"
    return load_gemma2_tokenizer(folder, file)


def test_ids_equal_transformers(tokenizer, oracle):
    assert len(set(STRINGS)) > 200
    assert {s: tokenizer.ids(s) for s in STRINGS} == {s: oracle(s)["input_ids"] for s in STRINGS}


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
def test_ids_of_any_text_equal_transformers(tokenizer, oracle, text):
    assert tokenizer.ids(text) == oracle(text)["input_ids"]


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet=" \n\tab▁<bos>é", max_size=30))
def test_ids_of_repetitive_text_equal_transformers(tokenizer, oracle, text):
    assert tokenizer.ids(text) == oracle(text)["input_ids"]


def test_truncation_equals_transformers(tokenizer, oracle):
    text = "a portrait photograph of a woman " * 60
    for limit in (1, 2, 7, 256):
        expected = oracle(text, max_length=limit, truncation=True)["input_ids"]
        assert tokenizer.ids(text, limit) == expected
    assert tokenizer.count(text) == len(tokenizer.ids(text)) > 256


# ---- where it is looked for


@pytest.mark.parametrize("layout", ["original", "comfyui", "all_in_one"])
def test_inside_the_weights(nano_in, layout):
    source = find_tokenizer(nano_in(layout).gemma2)
    assert "spiece_model" in source.origin
    assert (
        source.contents["tokenizer.model"]
        == (nano_in("diffusers").tokenizer / "tokenizer.model").read_bytes()
    )


@pytest.mark.parametrize("place", ["the index", "the folder", "a file in the folder", "the pipeline"])
def test_beside_the_weights(nano_in, place):
    paths = nano_in("sharded")
    folder = paths.gemma2.parent
    path = {
        "the index": paths.gemma2,
        "the folder": folder,
        "a file in the folder": folder / "model-00001-of-00003.safetensors",
        "the pipeline": folder.parent,
    }[place]
    assert find_tokenizer(path).origin == str(paths.tokenizer / "tokenizer.model")


def test_a_given_one_wins(nano_in, tmp_path):
    (tmp_path / "mine.model").write_bytes(other_model())
    given_path = tmp_path / "mine.model"
    assert find_tokenizer(nano_in("original").gemma2, given_path).origin == str(given_path)
    assert find_tokenizer(nano_in("original").gemma2, nano_in("diffusers").tokenizer).digest == (
        find_tokenizer(nano_in("original").gemma2).digest
    )


@pytest.fixture
def bare_weights(nano_in, tmp_path):
    """Weights with no tokenizer inside or beside."""
    file = tmp_path / "models" / "text_encoders" / "gemma2.safetensors"
    file.parent.mkdir(parents=True)
    save_file({k: t for k, t in load_file(nano_in("original").gemma2).items() if k != "spiece_model"}, file)
    return file


def test_from_the_hub_cache(nano_in, bare_weights, tmp_path):
    repository = tmp_path / "hub" / "models--google--gemma-2-2b"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc").mkdir(parents=True)
    GemmaTokenizer.from_pretrained(nano_in("diffusers").tokenizer).save_pretrained(
        repository / "snapshots" / "abc"
    )
    found = load_gemma2_tokenizer(bare_weights, cache_dir=tmp_path / "hub")
    assert found.ids("a cat") == load_gemma2_tokenizer(nano_in("original").gemma2).ids("a cat")


def test_nowhere(bare_weights, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="--gemma2_tokenizer") as caught:
        find_tokenizer(bare_weights, cache_dir=tmp_path / "empty")
    assert str(bare_weights) in str(caught.value)


def test_given_paths_that_are_none(nano_in, tmp_path):
    weights = nano_in("original").gemma2
    with pytest.raises(ConfigError, match="holds neither"):
        find_tokenizer(weights, tmp_path)
    with pytest.raises(ConfigError, match="no such file"):
        find_tokenizer(weights, tmp_path / "tokenizer.model")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"{}", "not a readable tokenizer.json"),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}', "no <bos> token"),
        ("tokenizer.model", b"\xff\xff\xff\xff", "damaged"),
        ("tokenizer.model", b"", "not a SentencePiece model of BPE"),
    ],
)
def test_files_that_are_none(nano_in, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_gemma2_tokenizer(nano_in("original").gemma2, tmp_path)
    assert name in str(caught.value)


def test_a_damaged_spiece_tensor(nano_in, tmp_path):
    tensors = load_file(nano_in("original").gemma2)
    tensors["spiece_model"] = torch.full((50,), 255, dtype=torch.uint8)
    save_file(tensors, tmp_path / "gemma2.safetensors")
    with pytest.raises(CheckpointError, match="spiece_model.*damaged"):
        load_gemma2_tokenizer(tmp_path / "gemma2.safetensors")


def test_needs_neither_torch_nor_transformers(nano_in):
    code = (
        "import sys; from library.models.gemma2_tokenizer import load_gemma2_tokenizer;"
        "from library.models.gemma2_format import inspect_gemma2; path = sys.argv[1];"
        "from library.models.flux_vae_format import inspect_flux_vae;"
        "inspect_gemma2(path); load_gemma2_tokenizer(path).ids('a cat');"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(nano_in("original").gemma2)], check=True)


# ---- prompts


@pytest.mark.parametrize(
    ("system", "caption", "prompt"),
    [
        ("", "a cat", "a cat"),
        ("", "", ""),
        ("You draw.", "a cat", "You draw. <Prompt Start> a cat"),
        ("You draw.", "", "You draw. <Prompt Start> "),
        ("You draw. <Prompt Start>", "a cat", "You draw. <Prompt Start> a cat"),
        ("You draw. <Prompt Start> ", "a cat", "You draw. <Prompt Start> a cat"),
        ("You draw.", "<Prompt Start> a cat", "You draw. <Prompt Start> a cat"),
        ("You draw. <Prompt Start>", "<Prompt Start> a cat", "You draw. <Prompt Start> a cat"),
        ("You draw.", "I paint. <Prompt Start> a cat", "I paint. <Prompt Start> a cat"),
        ("", "I paint. <Prompt Start> a cat", "I paint. <Prompt Start> a cat"),
    ],
)
def test_prompt_start_stands_once(system, caption, prompt):
    assert format_prompt(system, caption) == prompt
