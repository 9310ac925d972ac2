"""The form of prompts that `ft init` writes into a recipe: chosen by what the tokenizer has, with the reason."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from finetune.data.chat_template import ChatTemplate
from finetune.data.inspect import DatasetSummary
from finetune.errors import ModelError
from finetune.models.chat_templates.families import CONTROL_TOKENS, families_for
from finetune.models.loading.template_settings import set_template
from finetune.recipe.sections.data import ConversationSource, InstructionSource
from finetune.recipe.sections.prompt_text import ALPACA

WITH_TOOLS = "chatml"
"""The family whose template has tools and calls."""

OF_WORDS = "vicuna"
"""The family for turns that are marked by words."""


@dataclass(frozen=True)
class PromptForm:
    """A form of prompts.

    Attributes:
        why: What was chosen, and the reason.
        source_template: `template` of the source; None where the recipe does not set it.
        chat_template: `model.chat_template`; None where the recipe does not set it.
    """

    why: str
    source_template: str | None = None
    chat_template: str | None = None

    def applied_to(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Set the chat template of a tokenizer as the recipe will."""
        set_template(tokenizer, self.source_template or self.chat_template, {})

    def in_source(self, seen: DatasetSummary) -> DatasetSummary:
        """The summary of a data set with the source as the recipe will have it."""
        if self.source_template is None:
            return seen
        source = seen.source.model_copy(update={"template": self.source_template})
        return DatasetSummary(**{**vars(seen), "source": source})


def choose_form(seen: DatasetSummary, tokenizer: PreTrainedTokenizerBase) -> PromptForm | None:
    """The form of prompts for a data set and a tokenizer; None for rows that need no chat template.

    Raises:
        ModelError: The tokenizer has no chat template, and no family of templates fits it and the rows.
    """
    source = seen.source
    if not isinstance(source, ConversationSource) or seen.format == "completion":
        return None
    if tokenizer.chat_template:
        return _own_form(seen, tokenizer)
    base = "the tokenizer has no chat template (a base)"
    if isinstance(source, InstructionSource) and tokenizer.eos_token:
        return PromptForm(
            f"prompts in Alpaca's wording (template: {ALPACA}): {base}, and the rows are instructions", ALPACA
        )
    family, reason = _family(seen, tokenizer)
    return PromptForm(f"prompts in the form of {family} (model.chat_template): {base}{reason}", None, family)


def _own_form(seen: DatasetSummary, tokenizer: PreTrainedTokenizerBase) -> PromptForm:
    """The form of a tokenizer with a chat template: that template, unless the rows have tools and it has none."""
    lacks_tools = seen.has_tools and not ChatTemplate(tokenizer).mentions("tools")
    if lacks_tools and WITH_TOOLS in families_for(tokenizer):
        return PromptForm(
            f"prompts in the form of {WITH_TOOLS} (model.chat_template): the rows have tools, which the model's own "
            "chat template leaves out",
            None,
            WITH_TOOLS,
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
