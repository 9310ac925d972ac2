"""Results of `ft merge`, `ft export` and `ft quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.formatting import engine_prompts, unbuilt

from ..output import show_json, show_result


def show_merge(verification: dict[str, Any], folder: Path, as_json: bool) -> None:
    """Print the folder of a merged model and its agreement with the trained one."""
    if as_json:
        show_json({"event": "merged", "folder": str(folder), **verification})
        return
    lines = [f"merged model: {folder} ({verification['dtype']})", _agreement(verification), *_engines(verification)]
    lines += _unbuilt(verification)
    if verification["dtype"] == "quantized":
        lines.append("loads in ft only; for transformers and vLLM: ft merge --dtype bfloat16")
    lines.append(f"usage: {folder / 'README.md'}")
    show_result("\n".join(lines))


def show_model_merge(verification: dict[str, Any], folder: Path, as_json: bool) -> None:
    """Print the folder of a model merged from several runs, and its agreement with each of them."""
    if as_json:
        show_json({"event": "combined", "folder": str(folder), **verification})
        return
    lines = [f"combined model: {folder} ({verification['dtype']})"]
    for name, found in verification["runs"].items():
        lines.append(
            f"{name}: same top-1 token as the run alone at {100 * found['top1_agreement']:.1f} % of "
            f"{found['positions']} positions of its rows, KL divergence {found['kl_divergence']:.1e}"
        )
        lines += _engines(found)
    lines += _unbuilt(verification)
    show_result("\n".join(lines))


def show_export(
    format: str,
    verification: dict[str, Any] | None,
    folder: Path,
    repository: str | None,
    address: str | None,
    as_json: bool,
) -> None:
    """Print the folder of an exported model, its agreement with the trained one, and where its usage is described."""
    if as_json:
        pushed = {} if repository is None else {"repository": repository, "address": address}
        show_json({"event": "exported", "folder": str(folder), **(verification or {}), **pushed})
        return
    lines = [f"exported {format}: {folder}" + (f" ({_type_of(verification)})" if verification else "")]
    if verification:
        lines += [_agreement(verification), *_engines(verification), *_unbuilt(verification)]
    if format == "prompt" and verification:
        usage = (
            "the folder's chat template inserts them"
            if verification["uses_chat_template"]
            else "start every text with `prompt` of export.json, and add no special tokens to it"
        )
        lines.append(f"the trained prompt is stored as new vocabulary tokens: {usage}")
    lines.append(f"usage: {folder / 'README.md'}")
    if address:
        lines.append(f"on the hub: {address}")
    show_result("\n".join(lines))


def _type_of(verification: dict[str, Any]) -> str:
    found: str = verification.get("dtype") or verification["type"]
    return found


def _agreement(verification: dict[str, Any]) -> str:
    """Agreement of written and trained logits, from a verification report."""
    return (
        f"verified on {verification['positions']} tokens of {verification['rows']} rows: largest logit difference "
        f"{verification['relative_difference']:.1e} of the largest logit (bound {verification['bound']:.0e}),\n"
        f"KL divergence {verification['kl_divergence']:.1e}, same top-1 token at "
        f"{100 * verification['top1_agreement']:.1f} % of positions"
    )


def _engines(verification: dict[str, Any]) -> list[str]:
    """In how many prompts engines have the tokens of the training, and the first prompt with others."""
    engines = verification["engines"]
    same = [f"{each['engine']} {each['prompts']} of {each['prompts']}" for each in engines if not each["differing"]]
    lines = [f"prompts with the tokens of the training: {', '.join(same)}"] if same else []
    return lines + [engine_prompts(each) for each in engines if each["differing"]]


def _unbuilt(report: dict[str, Any]) -> list[str]:
    """One line about tensors of the base that its class does not build, if there are any."""
    return [unbuilt(report["unbuilt"])] if report["unbuilt"] else []


def show_quantized(record: dict[str, Any], folder: Path, as_json: bool) -> None:
    """Print the folder of a quantized model, its size and its errors."""
    if as_json:
        show_json({"event": "quantized", "folder": str(folder), **record})
        return
    from rich.table import Table

    from ..terminal import Console

    table = Table(title=f"{record['layer_count']} layers in {record['kind']}", title_justify="left")
    table.add_column("")
    for column in ("before", "after"):
        table.add_column(column, justify="right")
    bits = [f"{record[name]:.3f}" for name in ("bits_per_weight_before", "bits_per_weight")]
    table.add_row("bits per weight of these layers", *bits)
    table.add_row("all weights, on disk", *(f"{record[name] / 1e6:.1f} MB" for name in ("bytes_before", "bytes_after")))
    rows = {
        "mean weight error": "weight_error",
        "mean layer output error": "output_error",
        "mean layer output error of round-to-nearest": "nearest_output_error",
    }
    for title, name in rows.items():
        if record[name] is not None:
            table.add_row(title, "", f"{100 * record[name]:.2f} %")
    Console().print(table)
    show_result("\n".join([f"quantized model: {folder}", *_unbuilt(record)]))
