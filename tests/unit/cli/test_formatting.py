"""Events and results as text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cli.formatting import data_table, event_line, seconds_left
from cli.views.training import rank_lines, result_lines
from finetune import formatting
from finetune.run.events import Event, Phase, Progress, StepMetrics, TrainingFinished, TrainingStarted, ValidationResult

STARTED = TrainingStarted(
    run_directory="runs/tickets",
    model="org/name",
    method="lora",
    quantization="nf4",
    trainable_parameters=4_884_480,
    total_parameters=139_400_000,
    train_rows=950,
    validation_rows=50,
    target_tokens=12_345,
    total_steps=60,
    compute_dtype="bfloat16",
)
STEP = StepMetrics(
    step=10,
    total_steps=60,
    epoch=0.17,
    loss=1.23456,
    gradient_norm=0.5,
    learning_rate=2e-4,
    tokens=4000,
    tokens_per_second=411.6,
    peak_memory_bytes=2_500_000_000,
    seconds=20.0,
)
FINISHED = TrainingFinished(
    run_directory="runs/tickets",
    trained="runs/tickets/adapter",
    standalone_by="merge",
    steps=60,
    loss=0.9,
    validation_loss_before=2.5,
    validation_loss=1.25,
    tokens=24_000,
    seconds=120.0,
    peak_memory_bytes=2_500_000_000,
)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1k"),
        (1234, "1.23k"),
        (999_499, "999k"),
        (999_999, "1M"),
        (4_884_480, "4.88M"),
        (999_999_999, "1B"),
        (70_553_706_496, "70.6B"),
        (671e9, "671B"),
    ],
)
def test_count_has_three_digits_and_a_unit(number: float, text: str):
    assert formatting.count(number) == text


def test_count_has_no_exponent():
    assert not any(
        "e" in formatting.count(step * 10**power) for power in range(12) for step in (1, 9.994, 9.996, 9.9999)
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (0.4, "0:00"),
        (59.6, "1:00"),
        (95, "1:35"),
        (3599.7, "1:00:00"),
        (3661, "1:01:01"),
        (90000, "25:00:00"),
    ],
)
def test_duration_is_formatted_like_a_clock(seconds: float, text: str):
    assert formatting.duration(seconds) == text


def test_memory_is_in_decimal_gb():
    assert formatting.memory(2_500_000_000) == "2.5 GB"


def test_seconds_left_uses_the_mean_step_time():
    assert seconds_left(STEP) == 100
    assert seconds_left(replace(STEP, step=60)) == 0


def test_start_line_has_model_trainable_fraction_rows_steps_and_directory():
    text = str(event_line(STARTED))
    assert "org/name in nf4, lora: 4.88M of 139M parameters are trainable (3.50 %), computing in bfloat16" in text
    assert "950 training rows, 50 validation rows, 12.3k target tokens per epoch, 60 steps" in text
    assert "run directory: runs/tickets" in text
    assert "peak memory" not in text  # no estimate was made
    planned = str(event_line(replace(STARTED, planned_memory_bytes=2_640_000_000)))
    assert "per epoch, 60 steps, estimated peak memory 2.6 GB" in planned


def test_start_line_omits_quantization_and_validation_if_there_are_none():
    text = str(event_line(replace(STARTED, quantization="none", validation_rows=0)))
    assert "org/name, lora" in text
    assert "validation" not in text


def test_step_line_has_loss_gradient_norm_rate_memory_and_pace():
    expected = "step 10/60  loss 1.2346  grad 0.5  lr 2.00e-04  2.5 GB  412 tok/s  1:40 left"
    assert event_line(STEP) == expected


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (Phase("saving"), "saving ..."),
        (
            ValidationResult(step=60, loss=1.25, perplexity=3.49, rows=50),
            "validation loss 1.2500, perplexity 3.49 (step 60, 50 rows)",
        ),
        (Progress("answering", 3, 8), None),
        (Progress("answering", 8, 8), "answering: 8 rows"),
        (Progress("tokenizing", 256, None), None),
        (Progress("tokenizing", 102_400, None), "tokenizing: 102400 rows so far"),
        (FINISHED, None),
    ],
)
def test_event_line_of_other_events(event: Event, text: str | None):
    assert event_line(event) == text


def test_result_compares_validation_loss_before_and_after():
    assert result_lines(FINISHED) == [
        "trained 60 steps in 2:00, 24k tokens (200 tok/s), peak memory 2.5 GB",
        "validation loss 2.5000 -> 1.2500",
    ]


def test_result_without_validation_has_one_line():
    assert len(result_lines(replace(FINISHED, validation_loss_before=None, validation_loss=None))) == 1


def test_run_of_one_step_has_one_step():
    assert "per epoch, 1 step\n" in str(event_line(replace(STARTED, total_steps=1)))
    assert result_lines(replace(FINISHED, steps=1))[0].startswith("trained 1 step in")


def test_ranks_are_a_table_unless_it_is_too_wide():
    assert rank_lines(None, Path("runs/a")) == []
    few = {f"layers.{block}.{kind}_proj": 3 for block in range(2) for kind in "qkv"}
    lines = rank_lines(few, Path("runs/a"))
    assert lines[0] == "ranks per layer; their history: runs/a/ranks.svg"
    assert len(lines) == 5
    many = {f"layers.0.experts.{number}.down_proj": 3 for number in range(30)}
    assert len(rank_lines(many, Path("runs/a"))) == 1


def numbers(**others: object) -> dict[str, object]:
    lengths = {"shortest": 3, "p50": 95, "p90": 100, "p95": 105, "p99": 109, "longest": 2048}
    rows = {"read": 10_000, "used": 9_950, "too_long": 40, "untrainable": 10, "tokens": 945_250}
    return {**rows, "share_trained": 0.35, "lengths": lengths, "duplicates": 123, **others}


def test_data_table_fits_80_characters_and_names_every_source_and_the_total():
    sources = [{**numbers(), "source": f"/some/where/{'deep/' * 20}{name}.jsonl", "format": "chat"} for name in "ab"]
    report = {"train": {**numbers(in_validation=7), "sources": sources}, "validation": {**numbers(), "sources": []}}
    lines = data_table({**report, "packing": {"packs": 12, "pack_length": 1024, "fill": 0.987}})
    assert max(map(len, lines)) <= 80
    assert lines[1].split()[-2:] == ["duplicates", "validation"]
    assert lines[2].startswith("train: ")
    assert lines[2].endswith("/a.jsonl (chat)")
    assert lines[4] == "  dropped: 40 too long, 10 without target tokens"
    assert lines[8] == "train: all"
    assert lines[9].split() == ["10000", "50", "9950", "945k", "35", "%", "95", "109", "2048", "123", "7"]
    assert lines[-1] == "12 packs of 1024 tokens, 98.7 % filled"


def test_data_table_lists_dropped_rows_by_reason_within_80_characters():
    reasons = {
        "rejected by the chat template": 12,
        "empty answer": 3,
        "omitted by the chat template": 4,
        "malformed": 1,
    }
    facts = {**numbers(too_long=0, bad=reasons, source="rows.jsonl", format="chat")}
    del facts["untrainable"]
    report = {"train": {**facts, "sources": [facts]}, "validation": {**facts, "sources": []}}
    lines = data_table(report)
    assert lines[3].split()[:3] == ["10000", "20", "9950"]
    listed = " ".join(line.strip() for line in lines[4:])
    assert listed == "dropped: " + ", ".join(f"{rows} {reason}" for reason, rows in reasons.items())
    assert max(map(len, lines)) <= 80
    assert data_table({**report, "train": {"sources": [{**facts, "bad": {}}]}})[4:] == []
