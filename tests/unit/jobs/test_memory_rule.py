"""The rule of thumb by which `ft init` chooses settings."""

from __future__ import annotations

import pytest

from finetune.jobs.memory_rule import USABLE_SHARE, BaseSize, Settings, largest_that_fits, least, memory_bytes

BASES = {
    "SmolLM2-135M": BaseSize(134_515_008, 576, 30),
    "Llama-2-7B": BaseSize(6_738_415_616, 4096, 32),
    "Llama-2-70B": BaseSize(68_976_648_192, 8192, 80),
}


def test_a_7b_base_in_4_bits_fits_a_card_of_12_gb_and_in_16_bits_does_not():
    base = BASES["Llama-2-7B"]
    assert memory_bytes(Settings("nf4", True, 1), base, 512, 2) < 0.85 * 12e9
    assert memory_bytes(Settings("none", True, 1), base, 512, 2) > 12e9


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
@pytest.mark.parametrize("memory", [4e9, 8e9, 12e9, 24e9, 48e9, 80e9])
@pytest.mark.parametrize("row_tokens", [128, 2048, 16_384])
def test_what_is_chosen_fits_and_what_gives_up_less_does_not(base: BaseSize, memory: float, row_tokens: int):
    chosen = largest_that_fits(base, row_tokens, round(memory), 2, 16)
    if chosen is None:
        assert memory_bytes(least(16), base, row_tokens, 2) > USABLE_SHARE * memory
        return
    assert memory_bytes(chosen, base, row_tokens, 2) <= USABLE_SHARE * memory
    if chosen.storage != "none":
        assert memory_bytes(Settings("none", True, 1), base, row_tokens, 2) > USABLE_SHARE * memory
    if chosen.micro_batch_size < 8:
        larger = Settings(chosen.storage, chosen.gradient_checkpointing, 2 * chosen.micro_batch_size)
        assert memory_bytes(larger, base, row_tokens, 2) > USABLE_SHARE * memory


def test_more_of_anything_takes_more():
    base = BASES["Llama-2-7B"]
    least_bytes = memory_bytes(Settings("nf4", True, 1), base, 128, 2)
    for settings, row_tokens, bytes_a_number in (
        (Settings("none", True, 1), 128, 2),
        (Settings("nf4", False, 1), 128, 2),
        (Settings("nf4", True, 2), 128, 2),
        (Settings("nf4", True, 1), 256, 2),
        (Settings("nf4", True, 1), 128, 4),
    ):
        assert memory_bytes(settings, base, row_tokens, bytes_a_number) > least_bytes


@pytest.mark.parametrize("base", [BASES["Llama-2-7B"], BASES["Llama-2-70B"]], ids=["7B", "70B"])
def test_the_usual_shape_of_a_size_is_near_a_real_one(base: BaseSize):
    usual = BaseSize.of_parameters(base.parameters)
    assert usual.width == pytest.approx(base.width, rel=0.15)
    assert usual.blocks == pytest.approx(base.blocks, rel=0.15)
