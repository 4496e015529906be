"""The tables of a dataset configuration as typed models: the keys of each level, and their types."""

from __future__ import annotations

from typing import Annotated, Any

from library.core.errors import MissingPackageError
from library.core.suggest import did_you_mean
from library.data.config_report import Place, Report
from library.options.dataset import INTERPOLATIONS, size

try:
    from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
    from pydantic_core import ErrorDetails
except ModuleNotFoundError as error:
    raise MissingPackageError("pydantic", "Checking what a dataset is configured as") from error

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]
CountOrNone = Annotated[int, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]


def _as_size(value: Any) -> Any:
    """Accept 1024, "1024", "768,1024" for [768, 1024]."""
    if isinstance(value, int) and not isinstance(value, bool):
        return [value, value]
    if isinstance(value, str):
        try:
            return list(size(value))
        except ValueError:
            raise ValueError(f"must be a number or [width, height], not '{value}'") from None
    return list(value) if isinstance(value, tuple) else value


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _check_interval(value: list[float]) -> list[float]:
    if not 0 < value[0] <= value[1]:
        raise ValueError(f"must be [low, high] with 0 < low <= high, not {value}")
    return value


def _check_interpolation(value: str) -> str:
    if value not in INTERPOLATIONS:
        raise ValueError(f"must be one of {', '.join(INTERPOLATIONS)}, not '{value}'")
    return value


Interpolation = Annotated[str, AfterValidator(_check_interpolation)]
SizeList = Annotated[list[Count], Field(min_length=2, max_length=2), BeforeValidator(_as_size)]
Interval = Annotated[
    list[float], Field(min_length=2, max_length=2), BeforeValidator(_as_list), AfterValidator(_check_interval)
]


class SubsetKeys(BaseModel):
    """Keys of every level: said for all subsets, for those of a dataset, or for one."""

    model_config = ConfigDict(extra="forbid", strict=True)

    num_repeats: Count | None = None
    validation_split: Share | None = None
    recursive: bool | None = None
    cache_directory: Text | None = None
    cache_info: bool | None = None
    class_tokens: str | None = None
    custom_attributes: dict[str, Any] | None = None

    caption_extension: Text | None = None
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    caption_separator: Text | None = None
    shuffle_caption: bool | None = None
    keep_tokens: CountOrNone | None = None
    keep_tokens_separator: str | None = None
    secondary_separator: str | None = None
    enable_wildcard: bool | None = None
    caption_dropout_rate: Share | None = None
    caption_dropout_every_n_epochs: CountOrNone | None = None
    caption_tag_dropout_rate: Share | None = None
    token_warmup_min: CountOrNone | None = None
    token_warmup_step: Annotated[float, Field(ge=0.0)] | None = None

    color_aug: bool | None = None
    flip_aug: bool | None = None
    random_crop: bool | None = None
    face_crop_aug_range: Interval | None = None
    resize_interpolation: Interpolation | None = None


class GeneralTable(SubsetKeys):
    """`[general]`: what holds for all datasets."""

    resolution: SizeList | None = None
    batch_size: Count | None = None
    enable_bucket: bool | None = None
    min_bucket_reso: Count | None = None
    max_bucket_reso: Count | None = None
    bucket_reso_steps: Count | None = None
    bucket_no_upscale: bool | None = None
    validation_count: CountOrNone | None = None
    validation_seed: int | None = None
    network_multiplier: float | None = None


class DatasetTable(GeneralTable):
    """`[[datasets]]`: subsets that share a resolution and a batch size."""

    subsets: list[Any]
    validation: bool | None = None


class SubsetTable(SubsetKeys):
    """`[[datasets.subsets]]`: one folder or metadata file."""

    image_dir: Text | None = None
    is_reg: bool | None = None
    alpha_mask: bool | None = None
    metadata_file: Text | None = None
    conditioning_data_dir: Text | None = None


class OptionsTable(GeneralTable):
    """The command line's defaults, checked by the same rules."""

    alpha_mask: bool | None = None


_HOMES = (
    (GeneralTable, "[[datasets]] or [general]"),
    (DatasetTable, "[[datasets]]"),
    (SubsetTable, "[[datasets.subsets]]"),
)
_SENTENCES = {
    "missing": "is required",
    "int_type": "must be a whole number, not {input!r}",
    "int_from_float": "must be a whole number, not {input!r}",
    "float_type": "must be a number, not {input!r}",
    "bool_type": "must be true or false, not {input!r}",
    "string_type": "must be a text in quotes, not {input!r}",
    "string_too_short": "must not be empty",
    "list_type": "must be a list, not {input!r}",
    "dict_type": "must be a table, not {input!r}",
    "too_short": "must have 2 numbers, not {input!r}",
    "too_long": "must have 2 numbers, not {input!r}",
    "greater_than_equal": "is {input!r}; it must be {ge:g} or more",
    "less_than_equal": "is {input!r}; it must be {le:g} or less",
    "finite_number": "must be a finite number, not {input!r}",
    "value_error": "{error}",
}


def check_table(model: type[BaseModel], table: Any, place: Place, report: Report) -> dict[str, Any] | None:
    """Return the keys given in a table, checked; None if there are mistakes, which go to the report."""
    if not isinstance(table, dict):
        report.add(place, f"must be a table of keys, not {table!r}")
        return None
    try:
        checked = model.model_validate(table).model_dump(exclude_none=True)
    except ValidationError as error:
        for detail in error.errors():
            report.add((*place, *detail["loc"]), _sentence(detail, model))
        return None
    checked.pop("cache_info", None)  # what it asks for, remembering what is known of pictures, is always done
    return checked


def _sentence(detail: ErrorDetails, model: type[BaseModel]) -> str:
    if detail["type"] == "extra_forbidden":
        return _unknown_key(str(detail["loc"][-1]), model)
    pattern = _SENTENCES.get(detail["type"])
    if pattern is None:
        return f"{detail['msg']}, not {detail['input']!r}"
    return pattern.format(input=detail["input"], **detail.get("ctx", {}))


# What other trainers call folders of pictures, and of the pictures that those are edits of.
_ELSEWHERE = {
    **dict.fromkeys(("image_directory", "folder_path"), "image_dir"),
    **dict.fromkeys(("control_directory", "control_dir", "control_path"), "conditioning_data_dir"),
}


def _unknown_key(key: str, model: type[BaseModel]) -> str:
    for other, home in _HOMES:
        if key in other.model_fields and other is not model:
            return f"belongs in {home}, not here"
    if key in _ELSEWHERE:
        return f"unknown key; here it is called '{_ELSEWHERE[key]}', in [[datasets.subsets]]"
    return "unknown key" + (did_you_mean(key, model.model_fields) or ", with no similar one here")
