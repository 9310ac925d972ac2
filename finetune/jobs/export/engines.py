"""Inference engines that read a written model, as far as they make tokens of a prompt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from finetune.data.documents import Conversation, Message, PlainText
from finetune.data.text_tokens import Affixes
from finetune.jobs.export.ollama import Turns
from finetune.models.loading.chat_template_guard import render
from finetune.models.writing.gguf_vocabulary import GgufVocabulary


@dataclass(frozen=True)
class RunPrompt:
    """A prompt of a run.

    Attributes:
        document: The prompt with the answer that it asks for.
        text: The prompt as text, without what the tokenizer adds.
        ids: Its tokens in training and generation.
    """

    document: Conversation | PlainText
    text: str
    ids: list[int]


class Engine(ABC):
    """An inference engine that reads a written model.

    Attributes:
        name: Its name.
        by: How its tokens are found here.
        hint: What a user of the engine can do about a difference; may be empty.
    """

    name: str
    by: str
    hint: str = ""

    @abstractmethod
    def prompt_ids(self, prompt: RunPrompt) -> list[int] | None:
        """The tokens of a prompt; None for one that the engine has no form for."""

    @abstractmethod
    def text_ids(self, text: str) -> list[int]:
        """The tokens of a text, with nothing added."""


class Vllm(Engine):
    """vLLM, which reads the tokenizer of a folder through transformers.

    Args:
        folder: The written folder.
        trained: Tokenizer of the run; its date is the one that the chat template writes.
    """

    name, by = "vLLM", "transformers, with the tokenizer of this folder"

    def __init__(self, folder: Path, trained: PreTrainedTokenizerBase) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        self.tokenizer.today = getattr(trained, "today", None)
        affixes = Affixes.of(self.tokenizer)
        if affixes.after:
            begin = self.tokenizer.decode(list(affixes.before))
            self.hint = "with text prompts send add_special_tokens: false" + (
                f", and begin them with {begin}" if begin else ""
            )

    def prompt_ids(self, prompt: RunPrompt) -> list[int] | None:
        """See the base class."""
        document = prompt.document
        if isinstance(document, PlainText):
            return list(self.tokenizer(document.prompt)["input_ids"])
        try:
            text = render(
                self.tokenizer,
                [_as_request(message) for message in document.messages[:-1]],
                tools=list(document.tools) or None,
                add_generation_prompt=True,
                **document.template_arguments,
            )
        except Exception:  # the template rejects the form that vLLM gives it: there are no tokens
            return []
        return self.text_ids(text)

    def text_ids(self, text: str) -> list[int]:
        """See the base class."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


class LlamaCpp(Engine):
    """llama.cpp, which reads a GGUF file.

    Its tokens are those of llama-cpp-python where it is installed, and else those of the file's vocabulary.

    Args:
        file: The GGUF file.
        vocabulary: The vocabulary in it.
    """

    name = "llama.cpp"

    def __init__(self, file: Path, vocabulary: GgufVocabulary) -> None:
        self.vocabulary = vocabulary
        self._llama = _llama_cpp(file)
        self.by = "llama-cpp-python" if self._llama else "the vocabulary and flags of the file"

    def prompt_ids(self, prompt: RunPrompt) -> list[int] | None:
        """See the base class."""
        if isinstance(prompt.document, PlainText):
            return self.rendered_ids(prompt.text)
        # Its own Jinja renders the chat template. It removes a beginning of text that it adds itself.
        return self.rendered_ids(self.vocabulary.without_bos(prompt.text))

    def rendered_ids(self, text: str) -> list[int]:
        """The tokens of a rendered prompt, with the beginning of text that the engine adds."""
        bos = [self.vocabulary.special["bos"]] if self.vocabulary.adds_bos else []
        return bos + self.text_ids(text)

    def text_ids(self, text: str) -> list[int]:
        """See the base class."""
        if self._llama is not None:
            return list(self._llama.tokenize(text.encode(), add_bos=False, special=True))
        return self.vocabulary.ids(text)


class Ollama(Engine):
    """Ollama: llama.cpp, with the template of a Modelfile.

    Args:
        turns: The template; None for text as it is.
        llama_cpp: The engine in it.
    """

    name = "Ollama"

    def __init__(self, turns: Turns | None, llama_cpp: LlamaCpp) -> None:
        self.turns, self.llama_cpp = turns, llama_cpp
        self.by = f"the Modelfile's template, and {llama_cpp.by}"
        self.hint = "Ollama's templates write messages as they are, white space included" if turns else ""

    def prompt_ids(self, prompt: RunPrompt) -> list[int] | None:
        """See the base class."""
        if isinstance(prompt.document, PlainText) or self.turns is None:
            return self.llama_cpp.rendered_ids(prompt.text)
        messages = prompt.document.messages[:-1]
        roles = {"user", "assistant"} | ({"system"} if self.turns.system else set())
        if prompt.document.tools or any(each.role not in roles or each.tool_calls for each in messages):
            return None
        return self.llama_cpp.rendered_ids(self.turns.write(messages))

    def text_ids(self, text: str) -> list[int]:
        """See the base class."""
        return self.llama_cpp.text_ids(text)


def _as_request(message: Message) -> dict[str, Any]:
    """A message in the form that vLLM hands to a chat template, with a call's arguments as a plain object."""
    turn: dict[str, Any] = {**message.extra, "role": message.role, "content": message.content}
    if message.tool_calls:
        turn["tool_calls"] = [dict(call) for call in message.tool_calls]
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    if message.reasoning:
        turn |= dict.fromkeys(("reasoning", "reasoning_content"), message.reasoning)
    return turn


def _llama_cpp(file: Path) -> Any:
    """The file's vocabulary in llama-cpp-python; None where it is not installed or does not load."""
    with suppress(ImportError, OSError, RuntimeError, ValueError):
        return import_module("llama_cpp").Llama(str(file), vocab_only=True, verbose=False)
    return None
