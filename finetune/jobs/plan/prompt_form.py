"""The form of prompts that `ft init` writes into a recipe: chosen by what the tokenizer has, with the reason."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from finetune.data.chat_template import ChatTemplate
from finetune.data.documents import PlainText
from finetune.data.encode import is_inside_word
from finetune.data.inspect import DatasetSummary
from finetune.errors import ModelError
from finetune.models.chat_templates.families import CONTROL_TOKENS, families_for
from finetune.models.loading.template_settings import set_template
from finetune.recipe.sections.data import CompletionSource, ConversationSource, InstructionSource, SourceSection
from finetune.recipe.sections.prompt_text import ALPACA

WITH_TOOLS = "chatml"
"""The family whose template has tools and calls."""

SEPARATED = "{instruction}\n\n"
"""The text of a prompt that an empty line separates from its completion."""

OF_WORDS = "vicuna"
"""The family for turns that are marked by words."""


@dataclass(frozen=True)
class PromptForm:
    """A form of prompts.

    Attributes:
        why: What was chosen, and the reason.
        source: The source with the keys that the form needs; None where it stays as it is.
        chat_template: `model.chat_template`; None where the recipe does not set it.
    """

    why: str
    source: SourceSection | None = None
    chat_template: str | None = None

    def applied_to(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Set the chat template of a tokenizer as the recipe will."""
        of_source = self.source.prompt_text if self.source else None
        set_template(tokenizer, of_source or self.chat_template, {})

    def in_source(self, seen: DatasetSummary) -> DatasetSummary:
        """The summary of a data set with the source as the recipe will have it."""
        return seen if self.source is None else seen.with_source(self.source)


def choose_form(seen: DatasetSummary, tokenizer: PreTrainedTokenizerBase) -> PromptForm | None:
    """The form of prompts for a data set and a tokenizer; None for rows that need no chat template.

    Raises:
        ModelError: The tokenizer has no chat template, and no family of templates fits it and the rows.
    """
    source = seen.source
    if not isinstance(source, ConversationSource):
        return None
    if isinstance(source, CompletionSource) and not source.chat_template:
        return _completion_form(seen, source, tokenizer)
    if tokenizer.chat_template:
        return _own_form(seen, tokenizer)
    base = "the tokenizer has no chat template (a base)"
    if isinstance(source, InstructionSource) and tokenizer.eos_token:
        why = f"prompts in Alpaca's wording (template: {ALPACA}): {base}, and the rows are instructions"
        return PromptForm(why, source.model_copy(update={"template": ALPACA}))
    family, reason = _family(seen, tokenizer)
    return PromptForm(f"prompts in the form of {family} (model.chat_template): {base}{reason}", chat_template=family)


def _completion_form(
    seen: DatasetSummary, source: CompletionSource, tokenizer: PreTrainedTokenizerBase
) -> PromptForm | None:
    """The form of prompts and completions: turns for an instruct model; with a separator where a base has none."""
    if tokenizer.chat_template:
        return PromptForm(
            "prompts and completions as turns of the model's own chat template (chat_template: true): it is an "
            "instruct model",
            source.model_copy(update={"chat_template": True}),
        )
    texts = [document for document, _ in seen.sample if isinstance(document, PlainText)]
    if not tokenizer.eos_token or not any(is_inside_word(each.prompt, each.completion) for each in texts):
        return None
    settings = source.model_dump(exclude_unset=True, exclude={"format", "prompt", "completion", "chat_template"})
    columns = {"instruction": source.prompt, "output": source.completion}
    return PromptForm(
        "an empty line between prompt and completion (template): they would meet inside a word otherwise",
        InstructionSource.model_validate({**settings, "format": "instruction", **columns, "template": SEPARATED}),
    )


def _own_form(seen: DatasetSummary, tokenizer: PreTrainedTokenizerBase) -> PromptForm:
    """The form of a tokenizer with a chat template: that template, unless the rows have tools and it has none."""
    lacks_tools = seen.has_tools and not ChatTemplate(tokenizer).mentions("tools")
    if lacks_tools and WITH_TOOLS in families_for(tokenizer):
        return PromptForm(
            f"prompts in the form of {WITH_TOOLS} (model.chat_template): the rows have tools, which the model's own "
            "chat template leaves out",
            chat_template=WITH_TOOLS,
        )
    return PromptForm("prompts in the model's own chat template: its tokenizer has one")


def _family(seen: DatasetSummary, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """A family of templates, and what of the tokenizer it was chosen for."""
    fitting = families_for(tokenizer)
    with_tokens = [family for family in fitting if family in CONTROL_TOKENS]
    if seen.has_tools and WITH_TOOLS not in with_tokens:
        raise ModelError(
            "the tokenizer has no chat template, the rows have tools, and the tokenizer lacks the tokens of "
            f"{WITH_TOOLS}, whose template writes tools",
            where="model.chat_template",
            hint="write a recipe with model.chat_template: FILE.jinja, or with model.chat_template: chatml and "
            "model.new_tokens: [{token: '<|im_start|>', special: true}, {token: '<|im_end|>', special: true}]",
        )
    if with_tokens:
        tokens = " and ".join(CONTROL_TOKENS[with_tokens[0]][:2])
        return with_tokens[0], f", but {tokens}"
    if not fitting:
        raise ModelError(
            "the tokenizer has neither a chat template nor an end token",
            where="model.chat_template",
            hint="write a recipe with model.chat_template: FILE.jinja",
        )
    family = OF_WORDS if seen.format in ("chat", "sharegpt") else ALPACA
    return family, " and no tokens for turns, which words mark"
