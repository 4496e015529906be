"""Uploads and downloads, against a stand-in of the hub's HTTP interface on this machine."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from library.core.errors import CheckpointError, ConfigError
from library.core.files import hold, remove_directory, sweep_leftovers, write_bytes
from library.options.hub import HubFolder, HubOptions
from library.options.state import StateOptions
from library.training.output.hub import Uploads, check_uploads, fetch_state
from tests.hub_stand_in import StandIn, running_hub

ROOT = Path(__file__).resolve().parents[2]
REPO = "models/me/my-lora"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the stand-in speaks plain HTTP only
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub cache"))
    with running_hub() as hub:
        yield hub


def options(**given: object) -> HubOptions:
    return HubOptions(**({"huggingface_repo_id": "me/my-lora", "huggingface_token": "hf_right"} | given))


def network(folder: Path, name: str = "lora.safetensors", content: bytes = b"weights") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    return folder / name


def state(folder: Path) -> Path:
    network(folder, "network.safetensors", b"tensors")
    network(folder, "state.json", b'{"step": 3}')
    return folder


def test_files_arrive_in_a_private_repository(hub: StandIn, tmp_path: Path) -> None:
    uploads = Uploads(options(), hub.url)
    uploads.files([network(tmp_path), network(tmp_path, "lora-ema.safetensors", b"average")])
    assert hub.repositories[REPO].private
    assert hub.repositories[REPO].files == {
        "lora.safetensors": b"weights",
        "lora-ema.safetensors": b"average",
    }
    uploads.close()


def test_public_kind_and_folder(hub: StandIn, tmp_path: Path) -> None:
    given = options(
        huggingface_repo_visibility="public",
        huggingface_repo_type="dataset",
        huggingface_path_in_repo="/runs/first/",
    )
    Uploads(given, hub.url).files([network(tmp_path)])
    found = hub.repositories["datasets/me/my-lora"]
    assert not found.private
    assert found.files == {"runs/first/lora.safetensors": b"weights"}


def test_a_repository_that_is_there_is_used(hub: StandIn, tmp_path: Path) -> None:
    for content in (b"first", b"second"):
        Uploads(options(), hub.url).files([network(tmp_path, content=content)])
    assert hub.repositories[REPO].files == {"lora.safetensors": b"second"}


def test_a_state_arrives_whole_and_comes_back(hub: StandIn, tmp_path: Path) -> None:
    Uploads(options(huggingface_path_in_repo="runs"), hub.url).folder(state(tmp_path / "lora-state"))
    assert hub.repositories[REPO].commits == [
        ["runs/lora-state/network.safetensors", "runs/lora-state/state.json"]
    ]
    given = options(resume_from_huggingface=True)
    found = fetch_state(given, StateOptions(resume="me/my-lora/runs/lora-state:main:model"), hub.url)
    folder = Path(found.resume)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "network.safetensors": b"tensors",
        "state.json": b'{"step": 3}',
    }


def test_a_slow_upload_does_not_hold_up_training_and_outlives_its_file(hub: StandIn, tmp_path: Path) -> None:
    uploads = Uploads(options(async_upload=True), hub.url)
    hub.gate.clear()
    path = network(tmp_path)
    uploads.files([path])  # would wait for the gate
    path.unlink()  # as --save_last_n_steps does
    assert REPO not in hub.repositories or not hub.repositories[REPO].files
    hub.gate.set()
    uploads.close()
    assert hub.repositories[REPO].files == {"lora.safetensors": b"weights"}


@pytest.fixture(params=[True, False], ids=["links", "no links"])
def links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """File systems with hard links, and without."""

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    if not request.param:
        monkeypatch.setattr(os, "link", refuse)


LARGE = 3 * 2**20  # more than the buffers on the way


def test_what_is_replaced_while_it_is_sent_arrives_as_it_was(
    hub: StandIn, tmp_path: Path, links: None
) -> None:
    uploads = Uploads(options(async_upload=True), hub.url)
    hub.gate.clear()
    path = network(tmp_path / "out", content=b"1" * LARGE)
    uploads.files([path])
    assert hub.waiting.wait(10)
    write_bytes(path, b"2" * LARGE)
    uploads.files([path])
    hub.gate.set()
    uploads.close()
    assert list(hub.blobs.values()) == [b"1" * LARGE, b"2" * LARGE]
    assert hub.repositories[REPO].files == {path.name: b"2" * LARGE}
    assert list((tmp_path / "out").iterdir()) == [path]


def test_a_state_that_is_pruned_while_it_is_sent_arrives_whole(
    hub: StandIn, tmp_path: Path, links: None
) -> None:
    uploads = Uploads(options(async_upload=True), hub.url)
    hub.gate.clear()
    uploads.files([network(tmp_path / "out")])
    folder = state(tmp_path / "out" / "lora-state")
    uploads.folder(folder)
    remove_directory(folder)
    hub.gate.set()
    uploads.close()
    assert hub.repositories[REPO].files == {
        "lora.safetensors": b"weights",
        "lora-state/network.safetensors": b"tensors",
        "lora-state/state.json": b'{"step": 3}',
    }
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["lora.safetensors"]


UPLOADING = """
import sys, tracemalloc
from pathlib import Path
from library.options.hub import HubOptions
from library.training.output.hub import Uploads

uploads = Uploads(HubOptions(huggingface_repo_id="me/my-lora", huggingface_token="hf_right"), sys.argv[1])
uploads.files([Path(sys.argv[2])])  # with all that is imported for the first one
tracemalloc.start()
uploads.files([Path(sys.argv[3])])
print(tracemalloc.get_traced_memory()[1])
"""


def test_a_large_file_is_not_read_into_memory(hub: StandIn, tmp_path: Path) -> None:
    """In a process of its own: the stand-in keeps what it is sent."""
    large = tmp_path / "large.safetensors"
    with large.open("wb") as file:
        file.truncate(2**26)
    environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", UPLOADING, hub.url, str(network(tmp_path)), str(large)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(hub.repositories[REPO].files["large.safetensors"]) == 2**26
    assert int(done.stdout) < 2**26 / 8


def test_what_a_killed_run_was_uploading_is_swept_by_the_next(tmp_path: Path) -> None:
    network(tmp_path / "out")
    held = hold(tmp_path / "out" / "lora.safetensors")
    assert held.read_bytes() == b"weights"
    sweep_leftovers(tmp_path / "out")  # that of this process itself is not being read
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["lora.safetensors"]


def test_nobody_waits_for_an_upload_in_a_hurry(hub: StandIn, tmp_path: Path) -> None:
    """A run that is asked to stop saves its state at once; what is being sent arrives before the end."""
    hurry: list[bool] = []
    uploads = Uploads(options(), hub.url, hurried=lambda: bool(hurry))
    hub.gate.clear()
    asked = threading.Timer(0.3, hurry.append, [True])
    asked.start()
    uploads.files([network(tmp_path)])  # would wait for the gate
    assert hurry
    hub.gate.set()
    uploads.close()
    assert hub.repositories[REPO].files == {"lora.safetensors": b"weights"}


def test_a_file_that_has_gone_costs_a_warning(hub: StandIn, tmp_path: Path, caplog) -> None:
    Uploads(options(), hub.url).files([tmp_path / "gone.safetensors", network(tmp_path)])
    assert "gone.safetensors was not uploaded" in caplog.text
    assert list(hub.repositories[REPO].files) == ["lora.safetensors"]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_failures_cost_a_warning_and_the_next_upload_is_tried(
    hub: StandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture, asynchronous: bool
) -> None:
    hub.refuse = True
    with caplog.at_level(logging.WARNING):
        uploads = Uploads(options(async_upload=asynchronous), hub.url)
        uploads.files([network(tmp_path)])
        uploads.folder(tmp_path)
        uploads.close()
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 3
    assert "could not be made or reached" in messages[0] and "403" in messages[0]
    assert "lora.safetensors was not uploaded" in messages[1]
    assert not any("hf_right" in message for message in messages)
    hub.refuse = False
    uploads = Uploads(options(), hub.url)
    hub.refuse = True
    uploads.files([network(tmp_path)])
    hub.refuse = False
    uploads.files([network(tmp_path)])
    assert list(hub.repositories[REPO].files) == ["lora.safetensors"]


def test_a_hub_that_is_not_there_costs_a_warning(
    hub: StandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        Uploads(options(), "http://127.0.0.1:9").files([network(tmp_path)])
    assert len(caplog.records) == 2


@pytest.mark.parametrize("place", ["me/my-lora/other-state", "me/no-such-repository/lora-state"])
def test_a_state_that_is_not_there_ends_the_run(hub: StandIn, tmp_path: Path, place: str) -> None:
    Uploads(options(), hub.url).folder(state(tmp_path / "lora-state"))
    with pytest.raises(CheckpointError, match=f"--resume {place}"):
        fetch_state(options(resume_from_huggingface=True), StateOptions(resume=place), hub.url)


def test_places_on_the_hub() -> None:
    assert HubFolder.parse("me/lora/runs/1/state:v2:dataset") == HubFolder(
        "me/lora", "runs/1/state", "v2", "dataset"
    )
    assert HubFolder.parse("me/lora/state") == HubFolder("me/lora", "state", None, "model")


@pytest.mark.parametrize("text", ["lora", "me/lora", "me/lora/../x", "me/lora/state:main:thing", "a b/c/d"])
def test_what_is_no_place_on_the_hub(text: str) -> None:
    with pytest.raises(ConfigError, match="--resume"):
        HubFolder.parse(text)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"huggingface_repo_id": "my lora"}, "is not the name of a repository"),
        ({"huggingface_repo_id": "a/b", "huggingface_path_in_repo": "../x"}, "leads out of the repository"),
    ],
)
def test_mistakes(given: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HubOptions(**given)


@pytest.mark.parametrize(
    ("hub_options", "state_options", "message"),
    [
        ({"resume_from_huggingface": True}, {}, "needs the place"),
        ({"resume_from_huggingface": True}, {"resume": "latest"}, "needs the place"),
    ],
)
def test_flags_that_do_not_go_together(
    hub_options: dict[str, bool], state_options: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_uploads(options(**hub_options), StateOptions(**state_options))
