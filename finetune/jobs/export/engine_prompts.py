"""Prompts of a run as inference engines tokenize them, compared with the tokens that the run was trained on.

A few rows of the training data and some fixed conversations or texts are compared. An engine that makes other tokens
of a prompt gives the model an input that it has not been trained on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from finetune.data.chat_template import ChatTemplate
from finetune.data.documents import Conversation, Document, Message, PlainText
from finetune.data.rows import excerpt
from finetune.data.text_tokens import Affixes
from finetune.errors import DataError, ModelError, RefusedError
from finetune.formatting import counted
from finetune.jobs.export.engines import Engine, RunPrompt, Vllm
from finetune.jobs.load.trained_run import FineTunedRun
from finetune.run.events import EventHandler

logger = logging.getLogger(__name__)

ROWS = 3
"""Training rows that are compared."""

_CALL = {"type": "function", "id": "call00001", "function": {"name": "add", "arguments": {"terms": [2, 40]}}}
_TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add numbers.",
        "parameters": {"type": "object", "properties": {"terms": {"type": "array", "items": {"type": "number"}}}},
    },
}
_ANSWER = Message("assistant", "")

CONVERSATIONS = (
    Conversation((Message("system", "Answer briefly."), Message("user", "What is 2 + 40?"), _ANSWER)),
    Conversation((Message("user", "Name a bird."), Message("assistant", "A wren."), Message("user", "More?"), _ANSWER)),
    Conversation(
        (
            Message("user", "Add 2 and 40."),
            Message("assistant", "", (_CALL,)),
            Message("tool", "42", tool_call_id="call00001", extra={"name": "add"}),
            _ANSWER,
        ),
        (_TOOL,),
    ),
    Conversation((Message("user", "  Two spaces first,\n\n\tthen a tab, 12345 and a line break\n"), _ANSWER)),
)
"""A system message, two turns, a call of a tool, and white space at both ends."""

TEXTS = (
    PlainText("The capital of France is", " Paris"),
    PlainText("  Two spaces first,\n\n\tthen a tab, 12345 and a line break\n", "End"),
)


@dataclass(frozen=True)
class Difference:
    """The first place at which a prompt has other tokens.

    Attributes:
        prompt: The beginning of the prompt.
        position: Number of the token, counted from 0.
        trained: The token in training, with its id; empty where the prompt ends before.
        engine: The token in the engine, likewise.
    """

    prompt: str
    position: int
    trained: str
    engine: str


@dataclass(frozen=True)
class PromptAgreement:
    """How many prompts an engine tokenizes as the training did.

    Attributes:
        engine: The engine's name.
        by: How its tokens were found.
        prompts: Number of compared prompts.
        differing: Number of prompts with other tokens.
        first: The first difference.
    """

    engine: str
    by: str
    prompts: int
    differing: int
    first: Difference | None


def run_prompts(trained: FineTunedRun, on_event: EventHandler) -> list[RunPrompt]:
    """Prompts of some training rows, then fixed ones; prompts that the run cannot use are left out."""
    encoder = trained.context.encoder
    template = ChatTemplate(trained.context.tokenizer)
    fixed: Sequence[Document] = CONVERSATIONS if trained.record.uses_chat_template else TEXTS
    prompts = []
    for document in (*_rows(trained, on_event), *fixed):
        with suppress(DataError, ModelError):
            asked = encoder.prompt(document, "the prompt")
            if asked is None:
                continue
            if isinstance(document, PlainText):
                prompts.append(RunPrompt(document, document.prompt, asked.ids))
            elif isinstance(document, Conversation):
                conversation = _before_answer(document)
                conversation = replace(conversation, messages=tuple(template.joined(conversation.messages)))
                text = template.render(
                    conversation.messages[:-1],
                    "the prompt",
                    tools=document.tools,
                    arguments=document.template_arguments,
                    generation_prompt=True,
                )
                prompts.append(RunPrompt(conversation, text, asked.ids))
    return prompts


def engine_adds_bos(trained: FineTunedRun, prompts: Sequence[RunPrompt]) -> bool:
    """Whether an engine must put the beginning of text before prompts: the tokenizer does, and so did the training.

    Conversations are trained as the chat template writes them. It may write no beginning of text where the tokenizer
    would add one.
    """
    bos = trained.context.tokenizer.bos_token_id
    before = Affixes.of(trained.context.tokenizer).before
    if bos is None or before[:1] != (bos,):
        return False
    return not trained.record.uses_chat_template or any(prompt.ids[:1] == [bos] for prompt in prompts)


def compare(
    engines: Sequence[Engine], prompts: Sequence[RunPrompt], tokenizer: PreTrainedTokenizerBase
) -> list[PromptAgreement]:
    """Compare the tokens of prompts in engines with those of the training; each engine that differs is a warning.

    Args:
        engines: The engines.
        prompts: Prompts of the run.
        tokenizer: The run's tokenizer.

    Raises:
        RefusedError: An engine makes other tokens of the text of every prompt: what was written is not the run's
            tokenizer.
    """
    found = []
    for engine in engines:
        _refuse_other_vocabulary(engine, prompts, tokenizer)
        agreement = _compared(engine, prompts, tokenizer)
        if agreement.first is not None:
            logger.warning("%s", _described(agreement, engine.hint))
        found.append(agreement)
    return found


def compare_vllm(trained: FineTunedRun, folder: Path, on_event: EventHandler) -> list[PromptAgreement]:
    """Compare prompts of a run in vLLM, which reads the tokenizer of a written folder; see `compare`."""
    tokenizer = trained.context.tokenizer
    return compare([Vllm(folder, tokenizer)], run_prompts(trained, on_event), tokenizer)


def as_json(engines: Sequence[PromptAgreement]) -> list[dict[str, Any]]:
    """The entry `engines` of a verification report."""
    return [asdict(each) for each in engines]


def _compared(engine: Engine, prompts: Sequence[RunPrompt], tokenizer: PreTrainedTokenizerBase) -> PromptAgreement:
    compared = [(prompt, ids) for prompt in prompts if (ids := engine.prompt_ids(prompt)) is not None]
    differing = [(prompt, ids) for prompt, ids in compared if ids != prompt.ids]
    first = _difference(*differing[0], tokenizer) if differing else None
    return PromptAgreement(engine.name, engine.by, len(compared), len(differing), first)


def _refuse_other_vocabulary(engine: Engine, prompts: Sequence[RunPrompt], tokenizer: PreTrainedTokenizerBase) -> None:
    differences = []
    for prompt in prompts:
        own, found = list(tokenizer(prompt.text, add_special_tokens=False)["input_ids"]), engine.text_ids(prompt.text)
        if own == found:
            return
        differences.append(_difference(replace(prompt, ids=own), found, tokenizer))
    if differences:
        raise RefusedError(
            f"{engine.name} would make other tokens of every prompt than the training: {_place(differences[0])}",
            where=f"tokenizer ({engine.by})",
            hint="use the versions of the libraries that provenance.json names, or ft generate",
        )


def _difference(prompt: RunPrompt, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Difference:
    pairs = zip(prompt.ids, ids, strict=False)
    position = next((at for at, (own, found) in enumerate(pairs) if own != found), min(len(prompt.ids), len(ids)))
    shown = [
        f"{tokenizer.decode([each[position]])!r} ({each[position]})" if position < len(each) else ""
        for each in (prompt.ids, ids)
    ]
    return Difference(excerpt(prompt.text), position, *shown)


def _described(agreement: PromptAgreement, hint: str) -> str:
    assert agreement.first is not None
    count = f"{agreement.differing} of {counted(agreement.prompts, 'prompt')}"
    what = f"{agreement.engine} makes other tokens of {count} than the training: {_place(agreement.first)}"
    return f"{what}; {hint}" if hint else what


def _place(difference: Difference) -> str:
    return (
        f"token {difference.position} of {difference.prompt!r} is {difference.engine or 'missing'}, "
        f"in training {difference.trained or 'missing'}"
    )


def _rows(trained: FineTunedRun, on_event: EventHandler) -> Iterator[Document]:
    for located in trained.context.read_data(on_event).train[:ROWS].documents():
        yield located.document


def _before_answer(conversation: Conversation) -> Conversation:
    """The conversation up to its last answer."""
    last = max(turn for turn, message in enumerate(conversation.messages) if message.role == "assistant")
    return replace(conversation, messages=conversation.messages[: last + 1])
