"""The flags about computing: what they come to, what they say, and what cannot be."""

import pytest

from library.core.errors import ConfigError
from library.options.compute import ComputeOptions


@pytest.mark.parametrize(
    ("given", "keeps"),
    [
        ({}, "selective"),
        ({"checkpoint_mode": "selective"}, "selective"),
        ({"checkpoint_mode": "none"}, "none"),
        ({"torch_compile": True}, "none"),
        ({"torch_compile": True, "dynamo_backend": "no"}, "selective"),
        ({"gradient_checkpointing": True}, "outputs"),
        ({"gradient_checkpointing": True, "torch_compile": True}, "full"),
        ({"gradient_checkpointing": True, "cpu_offload_checkpointing": True}, "offload"),
        ({"gradient_checkpointing": True, "checkpoint_mode": "selective"}, "selective"),
        ({"cpu_offload_checkpointing": True}, "selective"),
        ({"cpu_offload_checkpointing": True, "checkpoint_mode": "none"}, "none"),
    ],
)
def test_what_a_block_keeps(given, keeps):
    assert ComputeOptions(**given).keeps == keeps


def test_blocks_that_are_left_out_keep_what_they_would_without_checkpointing():
    every_second = {"gradient_checkpointing": True, "checkpoint_every_n_blocks": 2}
    assert ComputeOptions(**every_second).keeps_between("full") == ComputeOptions().keeps
    assert ComputeOptions(**every_second).keeps_between("selective") == "none"
    compiled = ComputeOptions(**every_second, torch_compile=True)
    assert compiled.keeps_between("full") == ComputeOptions(torch_compile=True).keeps


@pytest.mark.parametrize(
    ("given", "kernel"),
    [
        ({}, "auto"),
        ({"sdpa": True}, "torch"),
        ({"use_flash_attn": True}, "flash"),
        ({"use_flash_attn": True, "sdpa": True}, "flash"),
        ({"attn_mode": "varlen", "use_flash_attn": True, "sdpa": True}, "varlen"),
        ({"attn_mode": "sdpa"}, "sdpa"),
        ({"xformers": True, "mem_eff_attn": True}, "auto"),
    ],
)
def test_which_kernel_is_asked_for(given, kernel):
    assert ComputeOptions(**given).attention == kernel


@pytest.mark.parametrize(
    ("given", "sentences"),
    [
        ({"attn_mode": "varlen", "use_flash_attn": True}, ["use_flash_attn"]),
        ({"attn_mode": "flash", "use_flash_attn": True, "sdpa": True}, ["sdpa"]),
        ({"attn_mode": "torch", "sdpa": True}, []),
        ({"xformers": True, "mem_eff_attn": True}, ["xformers", "mem_eff_attn"]),
        ({"dynamo_backend": "no"}, []),
        ({"dynamo_backend": "tvm"}, ["dynamo_backend"]),
        ({"dynamo_backend": "no", "torch_compile": True}, ["torch_compile"]),
        ({"torch_compile": True}, []),
        ({"cpu_offload_checkpointing": True}, ["cpu_offload_checkpointing"]),
    ],
)
def test_flags_without_effect_are_told(given, sentences):
    told = list(ComputeOptions(**given).adjustments())
    assert [sentence.split()[0].removeprefix("--") for sentence in told] == sentences


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"attn_mode": "sage"}, "cannot train: SageAttention has no backward pass. Use flash or torch"),
        ({"checkpoint_mode": "full"}, "--checkpoint_mode full needs --gradient_checkpointing"),
        (
            {"checkpoint_mode": "none", "gradient_checkpointing": True},
            "none keeps everything, and --gradient_checkpointing is there to keep less; leave one",
        ),
        ({"checkpoint_every_n_blocks": 2}, "--checkpoint_every_n_blocks needs --gradient_checkpointing"),
        ({"checkpoint_every_n_blocks": 0}, "is 0; it must be 1 or more"),
        (
            {
                "gradient_checkpointing": True,
                "cpu_offload_checkpointing": True,
                "checkpoint_mode": "full",
            },
            "are two modes; choose one",
        ),
        ({"torch_compile": True, "dynamo_backend": "tvm"}, "one of inductor, aot_eager, eager"),
        (
            {"torch_compile": True, "checkpoint_mode": "selective"},
            "the compiler itself chooses .* --activation_memory_budget 0.5",
        ),
        (
            {"torch_compile": True, "checkpoint_mode": "outputs", "gradient_checkpointing": True},
            "outputs and --torch_compile do not go together",
        ),
        ({"activation_memory_budget": 0.5}, "--activation_memory_budget needs --torch_compile"),
        (
            {"fused_kernels": "triton", "torch_compile": True},
            "--fused_kernels triton and --torch_compile do not go together",
        ),
        (
            {"torch_compile": True, "activation_memory_budget": 0.5, "dynamo_backend": "eager"},
            "--dynamo_backend eager knows no --activation_memory_budget",
        ),
        ({"torch_compile": True, "activation_memory_budget": 1.5}, "is 1.5; it is a share, 0 to 1"),
    ],
)
def test_what_cannot_be_is_refused(given, reason):
    with pytest.raises(ConfigError, match=reason):
        ComputeOptions(**given)


def test_kernels_of_our_own_go_with_a_compiler_that_is_switched_off():
    options = ComputeOptions(fused_kernels="triton", torch_compile=True, dynamo_backend="no")
    assert not options.compiles and options.kernels == "triton"


def test_compiled_blocks_need_no_kernels_of_our_own():
    assert ComputeOptions().kernels == "auto"
    assert ComputeOptions(torch_compile=True).kernels == "torch"
