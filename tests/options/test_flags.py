"""Every flag of sd-scripts is known: it works, is another name, or is refused with a reason."""

import pytest

from library.core.errors import ConfigError
from library.options.config_file import config_text
from library.options.group import build_parser, parse_options
from library.options.train import LuminaFinetuneOptions, LuminaTrainOptions
from tools.flag_table import PAGE, flags, page, sd_scripts_flags

NEEDED = {
    "pretrained_model_name_or_path": "dit.safetensors",
    "gemma2": "gemma2.safetensors",
    "ae": "ae.safetensors",
    "output_dir": "out",
    "train_data_dir": "photos",
}
WORDS = [f"--{name}={value}" for name, value in NEEDED.items()]
SCRIPTS = {LuminaTrainOptions: ["--network_module=networks.lora_lumina"], LuminaFinetuneOptions: []}
REFUSED = [(script, flag) for script in SCRIPTS for flag in flags(script) if flag.refusal]


def parse(*words, script=LuminaTrainOptions):
    return parse_options(script, [*WORDS, *SCRIPTS[script], *words])


@pytest.mark.parametrize(("script", "count"), [(LuminaTrainOptions, 213), (LuminaFinetuneOptions, 191)])
def test_every_flag_of_sd_scripts_is_known(script, count):
    known = {name.removeprefix("--") for name in build_parser(script)._option_string_actions}
    assert not set(sd_scripts_flags(script)) - known
    assert len(sd_scripts_flags(script)) == count


def test_the_page_is_made_from_the_parser():
    assert PAGE.read_text(encoding="utf-8") == page(), "run `python tools/flag_table.py`"
    for script in SCRIPTS:
        rows = {flag.name for flag in flags(script)}
        parser = build_parser(script)
        assert {f"--{name}" for name in rows} == set(parser._option_string_actions) - {"-h", "--help"}


def test_no_flag_of_sd_scripts_is_refused_that_works_there():
    """What sd-scripts does for Lumina and this version does not is known by name: it cannot grow unseen."""
    missing = {"full_fp16"}
    deepspeed = {"offload_param_device", "offload_param_nvme_path", "fp16_master_weights_and_gradients"}
    foreign = {"dataset_class", "use_sage_attn", "vae"}
    stable_diffusion = {"v2", "v_parameterization", "clip_skip", "max_token_length", "weighted_captions"}
    noise_prediction = {"min_snr_gamma", "scale_v_pred_loss_like_noise_pred", "v_pred_like_loss"}
    noise_prediction |= {"debiased_estimation_loss", "zero_terminal_snr"}
    of_kohya_ss = {"noise_offset_type"}
    allowed = of_kohya_ss | missing | deepspeed | foreign | stable_diffusion | noise_prediction
    assert {f.name for f in flags() if f.refusal} <= allowed
    # With whole models, fp8_base rounds the weights that are trained; the groups are said not to work there.
    allowed |= {"fused_optimizer_groups", "base_quant", "fp8_base", "fp8_base_unet", "fp8_scaled"}
    allowed |= {"quant_matmul", "sample_compare_base"}
    assert {f.name for f in flags(LuminaFinetuneOptions) if f.refusal} <= allowed


def test_words_about_a_lora_are_not_shown_where_none_is_trained():
    """Shared options speak of what is trained, or name the LoRA beside the model."""
    for flag in flags(LuminaFinetuneOptions):
        assert not flag.about.startswith("the network") and "of the network" not in flag.about, flag.name
        assert "trained network" not in flag.about, flag.name


@pytest.mark.parametrize(("script", "flag"), REFUSED, ids=lambda part: getattr(part, "name", ""))
def test_a_refused_flag_is_accepted_at_its_default_only(script, flag):
    if flag.default is False:
        words = [f"--{flag.name}"]
    else:
        words = [f"--{flag.name}=3"]
        for value in flag.refusal.harmless:
            if value is not None:
                parse(f"--{flag.name}={value}", script=script)
    with pytest.raises(ConfigError) as caught:
        parse(*words, script=script)
    assert str(caught.value) == f"--{flag.name} cannot be used here: {flag.refusal.reason}."


def test_all_refused_flags_of_a_command_line_are_named_at_once():
    with pytest.raises(ConfigError) as caught:
        parse("--v2", "--clip_skip=2", "--zero_terminal_snr")
    named = [line.split()[0] for line in str(caught.value).splitlines()]
    assert sorted(named) == ["--clip_skip", "--v2", "--zero_terminal_snr"]


def test_a_refused_flag_in_a_config_file(tmp_path):
    config = tmp_path / "gui.toml"
    config.write_text(
        "epoch = 4\nnoise_offset_type = 'Multires'\n"
        "v2 = false\nclip_skip = 1\nmin_snr_gamma = 0\nzero_terminal_snr = false\n"
    )
    parse(f"--config_file={config}")
    config.write_text("min_snr_gamma = 5\n")
    with pytest.raises(ConfigError, match="--min_snr_gamma cannot be used here"):
        parse(f"--config_file={config}")


def test_a_file_as_kohya_ss_writes_it(tmp_path):
    """What its form holds before anything is changed but the paths, and without what is empty there."""
    config = tmp_path / "config_lora-20250101-120000.toml"
    config.write_text(
        "bucket_no_upscale = true\nbucket_reso_steps = 64\ncache_latents = true\ncaption_extension = '.txt'\n"
        "clip_skip = 1\ndynamo_backend = 'no'\nenable_bucket = true\nepoch = 10\nhuber_c = 0.1\n"
        "gradient_accumulation_steps = 1\nhuber_scale = 1\nhuber_schedule = 'snr'\nlearning_rate = 0.0001\n"
        "loss_type = 'l2'\nlr_scheduler = 'constant'\nlr_scheduler_args = []\nlr_scheduler_num_cycles = 1\n"
        "lr_scheduler_power = 1\nlr_warmup_steps = 160\nmax_bucket_reso = 2000\nmax_grad_norm = 1\n"
        "max_data_loader_n_workers = 0\nmax_timestep = 1000\nmax_token_length = 75\nmax_train_steps = 1600\n"
        "min_bucket_reso = 256\nmixed_precision = 'bf16'\nnetwork_alpha = 1\nnetwork_args = []\n"
        "network_dim = 8\nnetwork_module = 'networks.lora_lumina'\nnetwork_train_unet_only = true\n"
        "noise_offset_type = 'Original'\noptimizer_args = []\noptimizer_type = 'AdamW'\n"
        "persistent_data_loader_workers = 1\nprior_loss_weight = 1\nresolution = '512,512'\n"
        "sample_prompts = 'out/prompt.txt'\nsample_sampler = 'euler_a'\nsave_every_n_epochs = 1\n"
        "save_model_as = 'safetensors'\nsave_precision = 'fp16'\ntext_encoder_lr = [0.0001]\n"
        "train_batch_size = 1\nunet_lr = 0.0001\nvae_batch_size = 4\nwandb_run_name = 'last'\n"
        "xformers = true\n"
    )
    options = parse(f"--config_file={config}")
    assert options.training.persistent_data_loader_workers
    told = {sentence.partition(" ")[0].removeprefix("--") for sentence in options.adjustments()}
    nothing_to_do = {
        "text_encoder_lr",
        "lr_warmup_steps",
        "sample_prompts",
        "sample_sampler",
        "wandb_run_name",
    }
    assert told == nothing_to_do | {"noise_offset_type", "epoch", "xformers"}


def test_why_full_fp16_is_refused():
    import torch

    def trained_in(dtype):
        weight = torch.nn.Parameter(torch.full((4,), 0.02, dtype=dtype))
        optimizer = torch.optim.AdamW([weight], lr=1e-4)
        for _ in range(3):
            weight.grad = torch.full_like(weight, 1e-3)
            optimizer.step()
        return weight

    assert not trained_in(torch.float16).isfinite().any()
    assert trained_in(torch.bfloat16).isfinite().all()


def test_other_names_of_a_flag():
    assert parse("--caption_extention=.txt").dataset.caption_extension == ".txt"
    assert parse("--caption_extension=.txt").dataset.caption_extension == ".txt"
    whole = parse("--skip_latents_validity_check", script=LuminaFinetuneOptions)
    assert whole.caching.skip_cache_check


def test_the_two_flags_that_fuse_backward_and_update():
    for flag in ("--fused_backward_pass", "--blockwise_fused_optimizers"):
        assert parse(flag, script=LuminaFinetuneOptions).trainee.fused
    assert not parse(script=LuminaFinetuneOptions).trainee.fused
    (sentence,) = parse("--fused_backward_pass").trainee.adjustments()
    assert sentence.startswith("--fused_backward_pass has no effect: ")


def test_how_a_whole_model_is_saved():
    def saving(*words):
        return parse(*words, script=LuminaFinetuneOptions).saving

    assert not saving().in_folder and saving().ending == ".safetensors"
    for words in (
        "--save_format=diffusers",
        "--save_model_as=diffusers_safetensors",
        "--save_model_as=diffusers",
    ):
        assert saving(words).in_folder and saving(words).ending == ""
    with pytest.raises(ConfigError, match="--save_model_as ckpt: a whole model is not saved as a pickle"):
        saving("--save_model_as=ckpt")
    with pytest.raises(ConfigError, match="invalid choice: 'kohya'"):
        saving("--save_format=kohya")
    told = list(parse("--mem_eff_save", "--use_safetensors", script=LuminaFinetuneOptions).adjustments())
    assert len(told) == 2 and all(" has no effect: a model is always " in sentence for sentence in told)


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--resolution=768,512", "--face_crop_aug_range=1.5,3", "--seed=0"),
        ("--lr_warmup_steps=5%", "--lr_scheduler=cosine"),
        ("--lr_warmup_steps=100%", "--lr_scheduler=cosine"),
        ("--network_args", "attn_dim=4", "embedder_dims=[2,0,2]", "--optimizer_args", "betas=(0.9, 0.99)"),
        ("--lr_warmup_steps=20", "--lr_scheduler=linear", "--learning_rate=2e-6", "--flip_aug"),
        (r"--caption_prefix=a \x41 'b' \"c\" é\u2028 # d", "--keep_tokens_separator=|||"),
        ("--training_comment=x = [1]\nwith two lines\tand a tab \x01",),
    ],
    ids=["defaults", "parsed", "share", "whole", "lists", "numbers", "quotes", "controls"],
)
def test_a_written_config_gives_the_same_options(words, tmp_path):
    options = parse(*words)
    config = tmp_path / "run.toml"
    config.write_text(config_text(options), encoding="utf-8")
    again = parse_options(LuminaTrainOptions, [f"--config_file={config}"])
    assert config_text(again) == config.read_text(encoding="utf-8")
    for name in ("optimizer", "training", "trainee", "caching", "timesteps", "metadata"):
        assert getattr(again, name) == getattr(options, name)
    assert again.dataset.caption_prefix == options.dataset.caption_prefix
    assert again.dataset.resolution == options.dataset.resolution
    assert again.model.ae.is_absolute()


def test_output_config_writes_a_new_file_and_leaves(tmp_path, capsys):
    target = tmp_path / "new"
    with pytest.raises(SystemExit) as left:
        parse("--output_config", f"--config_file={target}", "--network_dim=16")
    assert left.value.code == 0
    assert str(target.with_suffix(".toml")) in capsys.readouterr().out
    again = parse_options(LuminaTrainOptions, [f"--config_file={target}", "--network_alpha=2"])
    assert (again.trainee.network_dim, again.trainee.network_alpha) == (16, 2.0)
    with pytest.raises(ConfigError, match="would overwrite"):
        parse("--output_config", f"--config_file={target}")
    with pytest.raises(ConfigError, match="add --config_file"):
        parse("--output_config")


def test_what_is_refused_or_has_no_effect_is_not_in_the_file():
    text = config_text(parse())
    assert "network_dim = 4" in text
    foreign = [flag for flag in flags() if flag.refusal or flag.inert]
    assert not [flag.name for flag in foreign if f"\n{flag.name} =" in text]


def test_a_key_in_two_sections_is_an_error(tmp_path):
    config = tmp_path / "run.toml"
    config.write_text("[a]\nnetwork_dim = 4\n[b.c]\nnetwork_dim = 8\n")
    with pytest.raises(ConfigError, match="'network_dim' is there twice"):
        parse(f"--config_file={config}")


def test_a_list_for_a_flag_of_one_value_is_joined_as_on_the_command_line(tmp_path):
    config = tmp_path / "run.toml"
    config.write_text("resolution = [768, 512]\n")
    assert parse(f"--config_file={config}").dataset.resolution == (768, 512)
    config.write_text("network_dim = [4, 8]\n")
    with pytest.raises(ConfigError, match="--network_dim: invalid int value: '4,8'"):
        parse(f"--config_file={config}")
