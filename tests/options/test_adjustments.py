"""A flag of sd-scripts that has no effect in its company is accepted, and one sentence tells so."""

import pytest

from library.core.errors import ConfigError
from library.options.group import parse_options
from library.options.train import LuminaTrainOptions
from library.training.optim.lr import learning_rate_schedule

NEEDED = {
    "pretrained_model_name_or_path": "dit.safetensors",
    "gemma2": "gemma2.safetensors",
    "ae": "ae.safetensors",
    "output_dir": "out",
    "network_module": "networks.lora_lumina",
}
ADAFACTOR = "Adafactor finds its rate by relative steps"


def parse(*words, data="--train_data_dir=photos"):
    needed = [f"--{name}={value}" for name, value in NEEDED.items()]
    return parse_options(LuminaTrainOptions, [*needed, data, *words])


# The words, then how each sentence begins: the flags named, and a part of the reason.
WITHOUT_EFFECT = {
    "batches of a cache that is not made": (
        ["--vae_batch_size=4", "--vae_torch_compile", "--text_encoder_batch_size=2"],
        {
            "vae_batch_size": "--cache_latents is not",
            "vae_torch_compile": "--cache_latents is not",
            "text_encoder_batch_size": "--cache_text_encoder_out",
        },
    ),
    "check of a cache in memory": (
        ["--cache_latents", "--skip_cache_check"],
        {"skip_cache_check": "no cache is kept on disk"},
    ),
    "offloaded inputs without checkpoints": (
        ["--cpu_offload_checkpointing"],
        {"cpu_offload_checkpointing": "--gradient_checkpointing is not given"},
    ),
    "steps and epochs": (
        ["--max_train_steps=10", "--max_train_epochs=2"],
        {"max_train_steps": "--max_train_epochs is given"},
    ),
    "two kinds of attention": (["--sdpa", "--use_flash_attn"], {"sdpa": "--use_flash_attn is given"}),
    "repeats of folders that tell them": (["--dataset_repeats=3"], {"dataset_repeats": "folders' names"}),
    "files to keep, none saved": (
        ["--save_last_n_epochs=3", "--save_last_n_steps=100"],
        {"save_last_n_epochs": "--save_every_n_epochs", "save_last_n_steps": "--save_every_n_steps"},
    ),
    "two intervals of saving": (
        ["--save_every_n_epochs=1", "--save_n_epoch_ratio=4"],
        {"save_every_n_epochs": "--save_n_epoch_ratio decides"},
    ),
    "a tracker that is not there": (
        ["--wandb_run_name=x", "--wandb_api_key=k", "--log_prefix=p", "--log_config"],
        {
            "log_prefix": "no tracker",
            "log_config": "no tracker",
            "wandb_run_name": "W&B",
            "wandb_api_key": "",
        },
    ),
    "nothing to skip": (
        ["--skip_until_initial_step"],
        {"skip_until_initial_step": "starts at the beginning"},
    ),
    "strengths of no noise": (
        [
            "--noise_offset_random_strength",
            "--ip_noise_gamma_random_strength",
            "--multires_noise_discount=0.2",
        ],
        {
            "noise_offset_random_strength": "--noise_offset is not given",
            "ip_noise_gamma_random_strength": "--ip_noise_gamma is not given",
            "multires_noise_discount": "--multires_noise_iterations is not given",
        },
    ),
    "a Huber loss that is not the loss": (
        ["--huber_c=0.2", "--huber_schedule=constant", "--huber_scale=2"],
        {"huber_schedule": "--loss_type is l2", "huber_c": "--loss_type is l2", "huber_scale": ""},
    ),
    "a density beside another": (
        ["--weighting_scheme=logit_normal", "--timestep_sampling=nextdit_shift", "--logit_mean=0.5"],
        {
            "weighting_scheme logit_normal": "drawn by nextdit_shift",
            "logit_mean": "--timestep_sampling sigma",
        },
    ),
    "a width that is not read": (
        ["--timestep_sampling=uniform", "--sigmoid_scale=2"],
        {"sigmoid_scale": "sigmoid or shift or flux_shift"},
    ),
    "SD3's weight": (
        ["--weighting_scheme=sigma_sqrt"],
        {"weighting_scheme sigma_sqrt": "plain velocity loss"},
    ),
    "waves of a scheduler without waves, as kohya_ss writes them": (
        ["--lr_scheduler=cosine", "--lr_scheduler_num_cycles=10", "--lr_scheduler_power=2"],
        {"lr_scheduler_num_cycles": "cosine has none", "lr_scheduler_power": "cosine has none"},
    ),
    "a warm-up of a constant rate": (
        ["--lr_scheduler=constant", "--lr_warmup_steps=100"],
        {"lr_warmup_steps": "constant has none; constant_with_warmup has a warm-up"},
    ),
    "the default of a scheduler's class": (
        ["--lr_scheduler=cosine", "--lr_scheduler_args", "last_epoch=-1"],
        {"lr_scheduler_args": "cosine has none"},
    ),
    "what every file of kohya_ss has": (
        ["--epoch=10", "--noise_offset_type=Original"],
        {"epoch": "--max_train_steps decide", "noise_offset_type": "kohya_ss shows; those decide"},
    ),
    "two schedulers": (
        ["--lr_scheduler=cosine", "--lr_scheduler_type=StepLR", "--lr_scheduler_args", "step_size=2"],
        {"lr_scheduler": "--lr_scheduler_type StepLR makes the whole schedule"},
    ),
    "a schedule for Adafactor": (
        ["--optimizer_type=Adafactor", "--lr_scheduler=cosine", "--lr_warmup_steps=10", "--unet_lr=1e-4"],
        {"unet_lr": ADAFACTOR, "lr_scheduler": ADAFACTOR, "lr_warmup_steps": ADAFACTOR},
    ),
    "uploads to nowhere": (
        ["--async_upload", "--huggingface_repo_visibility=public"],
        {"huggingface_repo_visibility": "nothing is uploaded", "async_upload": "nothing is uploaded"},
    ),
    "states that are not saved": (
        ["--huggingface_repo_id=me/lora", "--save_state_to_huggingface", "--save_state_every_n_minutes=0"],
        {"save_state_to_huggingface": "no states are saved"},
    ),
    "prompts that are never drawn, as GUIs write them": (
        ["--sample_prompts=nowhere.txt", "--sample_sampler=euler_a"],
        {"sample_prompts": "nothing says when", "sample_sampler": "nothing says when"},
    ),
    "a sampler for other models": (
        ["--sample_prompts=p.txt", "--sample_at_first", "--sample_sampler=euler_a"],
        {"sample_sampler euler_a": "drawn with euler"},
    ),
    "a rate for what is left as it is, as GUIs write it": (
        ["--network_train_unet_only", "--text_encoder_lr", "5e-5"],
        {"text_encoder_lr": "leaves the text encoder as it is"},
    ),
    "rates for several text encoders": (
        ["--text_encoder_lr", "5e-5", "1e-5"],
        {"text_encoder_lr 1e-05": "one text encoder"},
    ),
    "a rate for the DiT, which is not trained": (
        ["--network_train_text_encoder_only", "--unet_lr=1e-4"],
        {"unet_lr": "leaves the DiT as it is"},
    ),
    "sizes that the file tells": (
        ["--dim_from_weights", "--network_weights=a.safetensors", "--network_dim=8", "--network_alpha=4"],
        {"network_dim": "from --network_weights", "network_alpha": "from --network_weights"},
    ),
    "wrappers and kernels that are not here": (
        ["--mem_eff_attn", "--ddp_static_graph", "--ddp_gradient_as_bucket_view", "--fused_backward_pass"],
        {
            "fused_backward_pass": "",
            "mem_eff_attn": "memory is saved already",
            "ddp_gradient_as_bucket_view": "DistributedDataParallel",
            "ddp_static_graph": "DistributedDataParallel",
        },
    ),
}


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_it_is_accepted_and_told(name):
    words, expected = WITHOUT_EFFECT[name]
    told = parse(*words).adjustments()
    assert len(told) == len(expected)
    for sentence, (flag, reason) in zip(told, expected.items(), strict=True):
        assert sentence.startswith(f"--{flag} has no effect: ") and reason in sentence


def test_a_dataset_configuration_wins_over_folders():
    told = parse("--reg_data_dir=reg", "--train_data_dir=photos", data="--dataset_config=data.toml")
    assert [sentence.partition(" ")[0] for sentence in told.adjustments()] == [
        "--train_data_dir",
        "--reg_data_dir",
    ]


def test_nothing_is_told_of_flags_that_have_an_effect():
    words = [
        *("--cache_latents", "--vae_batch_size=4", "--gradient_checkpointing", "--cpu_offload_checkpointing"),
        *("--save_every_n_epochs=1", "--save_last_n_epochs=2", "--lr_scheduler=cosine_with_restarts"),
        *("--lr_scheduler_num_cycles=3", "--lr_warmup_steps=5", "--loss_type=huber", "--huber_c=0.2"),
        *(
            "--timestep_sampling=sigma",
            "--weighting_scheme=logit_normal",
            "--logit_mean=0.1",
            "--unet_lr=1e-4",
        ),
        *("--sample_prompts=p.txt", "--sample_at_first", "--sample_sampler=heun", "--noise_offset=0.1"),
        *("--noise_offset_random_strength", "--network_train_unet_only", "--logging_dir=l", "--log_prefix=p"),
    ]
    assert parse(*words).adjustments() == ()
    assert parse().adjustments() == ()


def test_a_schedule_without_effect_has_none():
    """Words that are told to have no effect change no rate of any step."""
    relative = parse("--optimizer_type=Adafactor", "--lr_scheduler=cosine", "--lr_warmup_steps=5").optimizer
    falling = parse("--lr_scheduler=cosine", "--lr_decay_steps=50", "--lr_scheduler_num_cycles=7").optimizer
    plain = parse("--lr_scheduler=cosine").optimizer
    wanted = learning_rate_schedule(plain, 40)
    constant = learning_rate_schedule(parse("--lr_warmup_steps=20").optimizer, 40)
    for step in range(40):
        assert constant(step, [1.0]) == [1.0]
        assert learning_rate_schedule(relative, 40)(step, [1.0]) == [1.0]
        assert learning_rate_schedule(falling, 40)(step, [1.0]) == wanted(step, [1.0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--noise_offset_type=Pyramid"], "these are Original and Multires"),
        (["--model_prediction_type=additive"], "use raw"),
        (["--full_bf16"], "needs --mixed_precision bf16"),
        (["--network_train_unet_only", "--network_train_text_encoder_only"], "contradict"),
        (["--clip_skip=2"], "cannot be used here"),
        (["--min_snr_gamma=5"], "cannot be used here"),
        (["--ema_decay=0.9"], "add --ema"),
    ],
)
def test_what_would_train_something_else_is_an_error(words, message):
    with pytest.raises(ConfigError, match=message):
        parse(*words)


def test_a_stage_of_deepspeed_alone_asks_for_nothing():
    from library.options.deepspeed import DeepSpeedOptions

    assert list(DeepSpeedOptions(zero_stage=3).adjustments()) == [
        "--zero_stage has no effect: --deepspeed is not given"
    ]
    assert not DeepSpeedOptions(zero_stage=3).spreads_model
    assert DeepSpeedOptions(deepspeed=True, zero_stage=3).spreads_model
    (told,) = DeepSpeedOptions(deepspeed=True).adjustments()
    assert told.startswith("--deepspeed --zero_stage 2 has no effect")
