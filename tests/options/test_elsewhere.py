"""Flags of other programs: none of them is one here, and what is said in their place can be written."""

from __future__ import annotations

import json
import re
from dataclasses import fields

import pytest

from library.core.errors import ConfigError
from library.options.elsewhere import OF_NETWORKS, OF_WHOLE_MODELS
from library.options.group import build_parser, parse_options
from library.options.inference_kandinsky5 import Kandinsky5InferenceOptions
from library.options.inference_lumina import LuminaInferenceOptions
from library.options.network import NetworkOptions
from library.options.optimizer import OptimizerOptions
from library.options.train import LuminaFinetuneOptions, LuminaTrainOptions
from library.options.train_kandinsky5 import Kandinsky5FinetuneOptions, Kandinsky5TrainOptions
from library.options.weights import WeightsOptions

SCRIPTS = (
    *(Kandinsky5TrainOptions, LuminaTrainOptions, Kandinsky5InferenceOptions, LuminaInferenceOptions),
    *(Kandinsky5FinetuneOptions, LuminaFinetuneOptions),
)


@pytest.mark.parametrize("options", SCRIPTS)
def test_what_is_proposed_is_there(options: type) -> None:
    parser = build_parser(options)
    flags = set(parser._option_string_actions)
    family = SCRIPTS[0::2] if "Kandinsky" in options.__name__ else SCRIPTS[1::2]
    known = {flag for script in family for flag in build_parser(script)._option_string_actions}
    assert parser.elsewhere
    for name, way_out in parser.elsewhere.items():
        assert f"--{name}" not in flags
        proposed = set(re.findall(r"--\w+", way_out.partition("Kandinsky's sample pictures")[0]))
        assert proposed <= known, (name, proposed - known)


@pytest.mark.parametrize(
    ("options", "word", "message"),
    [
        (Kandinsky5TrainOptions, "--system_prompt=x", "'--system_prompt': a flag of Lumina's scripts; "),
        (Kandinsky5TrainOptions, "--text_encoder_2_precision=x", ": use --text_encoder_quant. See --help."),
        (LuminaTrainOptions, "--dit=x", "'--dit': use --pretrained_model_name_or_path."),
        (LuminaTrainOptions, "--lora_rank", "'--lora_rank': use --network_dim."),
        (LuminaTrainOptions, "--model_type=full", "a whole model is trained by the ..._train.py scripts"),
        (
            LuminaTrainOptions,
            "--mem_eff_save",
            "it is about whole models, which the ..._train.py scripts train",
        ),
        (LuminaFinetuneOptions, "--model_type=full", "this script trains the model itself (full)"),
        (LuminaFinetuneOptions, "--network_module=x", "LoRAs, which the ..._train_network.py scripts train"),
        (LuminaFinetuneOptions, "--text_encoder_lr=0", "this one trains the model itself; leave it out."),
        (Kandinsky5FinetuneOptions, "--lora_rank=4", "LoRAs, which the ..._train_network.py scripts train"),
        (
            Kandinsky5FinetuneOptions,
            "--base_model_precision=x",
            "weights that are trained cannot be quantised",
        ),
        (Kandinsky5FinetuneOptions, "--gemma2=x", "--text_encoder_qwen and --text_encoder_clip."),
        (LuminaInferenceOptions, "--image=x", "it is a flag of Kandinsky's scripts"),
        (Kandinsky5InferenceOptions, "--gemma2_path=x", "--text_encoder_qwen and --text_encoder_clip."),
    ],
)
def test_a_flag_of_another_program_is_answered_with_the_way_out(
    options: type, word: str, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_options(options, [word])
    assert message in str(caught.value)
    assert "did you mean" not in str(caught.value)


def test_a_key_of_another_program_too(tmp_path) -> None:
    config = tmp_path / "simpletuner.json"
    config.write_text('{"model_family": "kandinsky5-image", "learning_rate": 1e-4}')
    with pytest.raises(ConfigError, match=r"unknown key 'model_family': which model it is, is read off"):
        parse_options(Kandinsky5TrainOptions, ["--config_file", str(config)])


# The keys of the config.json of SimpleTuner's guides to both models that are none here.
OF_THE_GUIDES = (
    *("base_model_precision", "checkpoint_step_interval", "data_backend_config", "disable_bucket_pruning"),
    *("eval_steps_interval", "evaluation_type", "flow_schedule_auto_shift", "hub_model_id", "lora_alpha"),
    *("lora_rank", "lora_type", "model_family", "model_type", "num_train_epochs", "optimizer"),
    *("push_checkpoints_to_hub", "push_to_hub", "quantize_via", "report_to", "tracker_project_name"),
    *("tracker_run_name", "use_ema", "validation_disable_unconditional", "validation_guidance"),
    *("validation_guidance_rescale", "validation_negative_prompt", "validation_num_inference_steps"),
    *("validation_prompt", "validation_prompt_library", "validation_resolution"),
    *("validation_step_interval", "user_prompt_library", "text_encoder_1_precision", "flow_schedule_shift"),
)


@pytest.mark.parametrize("options", (LuminaTrainOptions, Kandinsky5TrainOptions, LuminaFinetuneOptions))
def test_every_key_of_the_guides_is_answered_in_one_message(options: type, tmp_path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({f"--{key}": 1 for key in OF_THE_GUIDES} | {"--learning_rate": 1e-4}))
    with pytest.raises(ConfigError) as caught:
        parse_options(options, ["--config_file", str(config)])
    first, *lines = str(caught.value).splitlines()
    assert first == f"{config} has {len(OF_THE_GUIDES)} unknown keys:"
    for key, line in zip(OF_THE_GUIDES, lines, strict=True):
        assert line.startswith(f"  '{key}': ") and line.endswith(".") and "did you mean" not in line


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adamw_bf16", "the nearest is AdamW, and --full_bf16"),
        ("optimi-StableAdamW", "the nearest are AdamW"),
    ],
)
def test_an_optimizer_of_another_program_is_answered_with_the_nearest(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"--optimizer_type: '{name}' is SimpleTuner's; {message}"):
        OptimizerOptions(optimizer_type=name)


def test_what_one_kind_of_script_alone_has_is_known_to_the_other() -> None:
    network, whole = ({f.name for f in fields(group)} for group in (NetworkOptions, WeightsOptions))
    assert OF_NETWORKS.keys() == network - whole
    assert OF_WHOLE_MODELS.keys() == whole - network
