"""Prompts typed at the keyboard."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest

from library.core.errors import ConfigError
from library.inference.console import typed_requests
from library.options.request import ImageRequest

START = ImageRequest(prompt="start", negative_prompt="ugly", width=64, height=64, seed=5)


def typed(text: str, monkeypatch: pytest.MonkeyPatch, start: ImageRequest = START) -> list[ImageRequest]:
    def complete(request: ImageRequest) -> ImageRequest:
        if request.lora_multipliers:
            raise ConfigError("no LoRAs here.")
        return replace(request, height=request.height or request.width)

    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    return list(typed_requests(start, complete))


def test_values_stay_until_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    found = typed("a --w 32 --d 9 --n -\n\nb\nEXIT\nc\n", monkeypatch)
    assert [(r.prompt, r.width, r.seed, r.negative_prompt) for r in found] == [
        ("a", 32, 9, ""),
        ("b", 32, 5, "ugly"),
    ]


def test_end_of_input_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [r.prompt for r in typed("a\nb", monkeypatch)] == ["a", "b"]


def test_options_alone_draw_the_prompt_again(monkeypatch: pytest.MonkeyPatch) -> None:
    found = typed("--s 3\nfox\n--s 4\n", monkeypatch)
    assert [(r.prompt, r.steps) for r in found] == [("start", 3), ("fox", 3), ("fox", 4)]


def test_a_mistake_is_explained_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = typed("a --w wide\nb --m 1\nc\n", monkeypatch)
    assert [(r.prompt, r.width) for r in found] == [("c", 64)]
    errors = capsys.readouterr().err
    assert "--w: 'wide' is not a whole number" in errors and "no LoRAs here" in errors


def test_what_is_filled_in_is_not_kept_for_the_next_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    found = typed("a\nb --w 32\nc --h 16\n", monkeypatch, replace(START, height=None))
    assert [(r.width, r.height) for r in found] == [(64, 64), (32, 32), (32, 16)]
