"""Uploading results to the Hugging Face hub, and going on from a state that lies there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields

from library.core.errors import ConfigError
from library.options.group import OptionGroup, option

_NOT_ONLY_UPLOADS = ("huggingface_repo_id", "huggingface_token", "resume_from_huggingface")


@dataclass(frozen=True, kw_only=True)
class HubOptions(OptionGroup):
    """Hugging Face hub.

    Everything is saved in --output_dir as always and uploaded from there. An upload that fails is reported
    and left out; training goes on.
    """

    huggingface_repo_id: str | None = option(
        None,
        "upload every saved file to this repository; it is made if there is none",
        metavar="OWNER/NAME",
    )
    huggingface_repo_type: str = option(
        "model", "kind of the repository", choices=("model", "dataset", "space")
    )
    huggingface_path_in_repo: str = option("", "folder in the repository (default: its top)")
    huggingface_token: str | None = option(
        None, "access token with the right to write; better: run `hf auth login` once", saved=False
    )
    huggingface_repo_visibility: str = option(
        "private", "who may see a repository that is made", choices=("private", "public")
    )
    async_upload: bool = option(False, "go on training while files are uploaded")
    save_state_to_huggingface: bool = option(False, "upload the states of --save_state too")
    resume_from_huggingface: bool = option(
        False,
        "--resume names a folder on the hub: owner/name/folder, and :revision:type behind it if need be",
    )

    def __post_init__(self) -> None:
        if self.huggingface_repo_id is not None and not _is_repo_id(self.huggingface_repo_id):
            raise ConfigError(
                f"--huggingface_repo_id '{self.huggingface_repo_id}' is not the name of a repository, "
                f"which is owner/name in letters, digits, '-', '_' and '.'."
            )
        if ".." in self.huggingface_path_in_repo.split("/"):
            raise ConfigError(
                f"--huggingface_path_in_repo '{self.huggingface_path_in_repo}' leads out of the repository."
            )

    def adjustments(self) -> Iterator[str]:
        """Yield a sentence for each flag about uploads if nothing is uploaded."""
        yield from super().adjustments()
        if self.huggingface_repo_id is None:
            names = [f.name for f in fields(self) if f.name not in _NOT_ONLY_UPLOADS]
            yield from self.without_effect(names, "nothing is uploaded (--huggingface_repo_id)")


@dataclass(frozen=True)
class HubFolder:
    """A folder in a repository of the hub. `revision`: branch, tag or commit; None for the main branch."""

    repo_id: str
    path: str
    revision: str | None
    repo_type: str

    @classmethod
    def parse(cls, text: str) -> HubFolder:
        """Read owner/name/folder[:revision[:type]]. Raises ConfigError."""
        place, _, rest = text.partition(":")
        revision, _, repo_type = rest.partition(":")
        owner_and_name, folders = place.strip("/").split("/")[:2], place.strip("/").split("/")[2:]
        repo_id = "/".join(owner_and_name)
        if not _is_repo_id(repo_id) or not folders or ".." in folders:
            raise ConfigError(
                f"--resume {text}: with --resume_from_huggingface it names a folder on the hub, as "
                f"owner/name/folder, owner/name/folder:revision or owner/name/folder:revision:type."
            )
        if repo_type not in ("", "model", "dataset", "space"):
            raise ConfigError(
                f"--resume {text}: '{repo_type}' is no type; there are model, dataset and space."
            )
        return cls(repo_id, "/".join(folders), revision or None, repo_type or "model")


def _is_repo_id(text: str) -> bool:
    name = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
    return re.fullmatch(rf"{name}/{name}", text) is not None
