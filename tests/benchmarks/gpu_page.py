"""The tables and the Markdown page of `make bench-gpu`, from its JSON files alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]

SIDES = {"ft": "ft", "trl": "TRL"}

PART_TITLES = {
    1: "Part 1: full rows, the largest and the smallest shape",
    2: "Part 2: short rows, full fine-tuning, Llama-3.2-3B",
    3: "Part 3: kernels, gradient checkpointing, estimated memory",
}


def read_records(folder: Path) -> list[Record]:
    """All records of a folder, in order."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
    return [record for record in found if str(record.get("schema", "")).startswith("bench-gpu/")]


def table(records: Sequence[Record]) -> str:
    """Speed, memory, MFU and losses; a row for each case."""
    columns = ["shape", "method", "rows", "settings", "trainer", "tokens/s", "beside TRL", "MFU", "peak memory"]
    columns += ["loss, first to last", "largest loss difference", "warm-up", "status"]
    return _table(columns, [_row(record, _counterpart(record, records)) for record in records])


def page(folder: Path) -> str:
    """The page of all records in a folder."""
    records = read_records(folder)
    lines = ["# ft beside TRL on one GPU", ""]
    if not records:
        return "\n".join([*lines, "There are no results.", ""])
    for name, values in (
        ("Device", _distinct(record.get("device_name") for record in records)),
        ("Versions", _distinct(_versions(record) for record in records)),
        ("Commit", _distinct(record["commit"] for record in records)),
        ("Date", _distinct(record["date"][:10] for record in records)),
        ("Peak", _distinct(_flops(record) for record in records)),
    ):
        lines.append(f"- {name}: {'; '.join(values) or 'unknown'}")
    steps = records[0]["steps"]
    lines += [
        f"- Steps: {steps['warm_up']} warm-up, then {steps['steady']} steady ones, of which tokens/s is the median; "
        f"step {steps['traced']} is traced",
        f"- {records[0]['formula']}",
        "- Weights and tokens are random. Both trainers load the same weights and see the same rows in the same order.",
        "",
    ]
    if any(record["is_tiny"] for record in records):
        lines += ["The shapes are tiny: these numbers show that the benchmark runs, and nothing else.", ""]
    for part in sorted({record["part"] for record in records}):
        of_part = [record for record in records if record["part"] == part]
        lines += [f"## {PART_TITLES.get(part, f'Part {part}')}", "", table(of_part), ""]
    lines += _traces(records) + _estimates(records) + _failures(records)
    return "\n".join(lines)


def _row(record: Record, counterpart: Record | None) -> list[str]:
    case, losses = record["case"], record.get("losses")
    speed, memory = record.get("tokens_per_second"), record.get("peak_memory")
    other = counterpart.get("tokens_per_second") if counterpart else None
    warm_up, mfu = record.get("warm_up_seconds"), record.get("mfu")
    return [
        case["shape"],
        case["kind"],
        case["rows"],
        _settings(record),
        SIDES[case["side"]],
        f"{speed:,.0f}" if speed else "",
        f"{speed / other:.2f}x" if speed and other and case["side"] == "ft" else "",
        f"{mfu:.1%}" if mfu else "",
        _memory(memory),
        f"{losses[0]:.4f} to {losses[-1]:.4f}" if losses else "",
        _difference(losses, (counterpart or {}).get("losses")) if case["side"] == "ft" else "",
        f"{warm_up:.1f} s" if warm_up is not None else "",
        record["status"],
    ]


def _counterpart(record: Record, records: Iterable[Record]) -> Record | None:
    """The record of the same run by the other trainer."""

    def run_of(each: Record) -> Record:
        return {**each["case"], "side": None, "part": each["part"]}

    others = (each for each in records if each["case"]["side"] != record["case"]["side"])
    return next((each for each in others if run_of(each) == run_of(record)), None)


def _traces(records: Sequence[Record]) -> list[str]:
    traced = [record for record in records if record.get("trace")]
    if not traced:
        return []
    columns = ["case", "traced step", "GPU idle, traced", "GPU idle, untraced", "kernels", "launch calls"]
    columns += ["synchronizations", "top kernels by time"]
    rows = []
    for record in traced:
        trace = record["trace"]
        kernels = trace["top_kernels"] or trace.get("top_operators", [])
        rows.append(
            [
                record["name"],
                f"{trace['seconds']:.3f} s",
                _share(trace["gpu_idle_share"]),
                _share(trace.get("gpu_idle_share_untraced")),
                f"{trace['kernels']:,}",
                f"{sum(trace['kernel_launches'].values()):,}",
                f"{sum(trace['synchronizations'].values())} in {trace['synchronization_seconds']:.3f} s",
                "; ".join(
                    f"{_code(kernel['name'][:60])} {kernel['seconds'] / trace['seconds']:.0%}" for kernel in kernels[:5]
                ),
            ]
        )
    return ["## One step under the profiler", "", _table(columns, rows), ""]


def _estimates(records: Sequence[Record]) -> list[str]:
    planned = [record for record in records if record.get("estimated_memory")]
    if not planned:
        return []
    rows = []
    for record in planned:
        estimated, measured = record["estimated_memory"]["peak"], record.get("peak_memory") or {}
        largest = max(measured.values(), default=None)
        parts = record["estimated_memory"]["parts"]
        rows.append(
            [
                record["name"],
                f"{estimated / 1e9:.2f} GB",
                f"{(estimated - parts.get('libraries', 0)) / 1e9:.2f} GB",
                _memory(measured),
                f"{(estimated - parts.get('libraries', 0)) / largest - 1:+.1%}" if largest else "",
            ]
        )
    columns = ["case", "estimated peak", "without libraries", "measured peak memory", "estimated over largest measured"]
    return ["## Estimated and measured memory", "", _table(columns, rows), ""]


def _failures(records: Sequence[Record]) -> list[str]:
    lines = []
    for record in records:
        if "reason" in record:
            lines.append(f"- {record['name']}: {record['status']}, {record['reason']}")
        if record.get("error"):
            lines += ["", "  ```", *(f"  {line}" for line in record["error"]), "  ```", ""]
    return ["## Cases without a full result", "", *lines, ""] if lines else []


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _settings(record: Record) -> str:
    case = record["case"]
    settings = [f"kernels {case['kernels']}"] if case["kernels"] != "auto" else []
    if case["checkpointing"]:
        settings.append(f"checkpointing {case['checkpointing']}".lower())
    if record["settings"].get("liger") and "liger-kernel" in record.get("versions", {}):
        settings.append("Liger")
    return ", ".join(settings)


def _memory(peaks: dict[str, int] | None) -> str:
    return ", ".join(f"{size / 1e9:.2f} GB {kind}" for kind, size in (peaks or {}).items())


def _difference(losses: list[float] | None, others: list[float] | None) -> str:
    """The largest difference of two loss curves, over the steps that both have."""
    pairs = list(zip(losses or [], others or [], strict=False))
    return f"{max(abs(one - other) for one, other in pairs):.4f}" if pairs else ""


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _code(text: str) -> str:
    return f"`{text.replace('`', '')}`"


def _versions(record: Record) -> str | None:
    versions = record.get("versions")
    return ", ".join(f"{name} {number}" for name, number in versions.items()) if versions else None


def _flops(record: Record) -> str | None:
    peak = record.get("peak_flops")
    return f"{peak / 1e12:,.0f} TFLOP/s" if peak else None


def _distinct(values: Iterable[str | None]) -> list[str]:
    """The values that are there, each once, in order."""
    return list(dict.fromkeys(value for value in values if value))
