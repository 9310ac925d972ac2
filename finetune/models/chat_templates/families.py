"""The families of `model.chat_template`, and which of them a tokenizer has the control tokens for.

The files hold no beginning of text: where the tokenizer or the base's own template begins texts with that token, the
template does too, so that a conversation begins as the texts of the earlier training did.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files

from transformers import PreTrainedTokenizerBase

from finetune.errors import ModelError
from finetune.models.chat_templates.prompt_text import as_chat_template
from finetune.recipe.sections.model import TEMPLATE_FAMILIES
from finetune.recipe.sections.prompt_text import PromptText

CONTROL_TOKENS: dict[str, tuple[str, ...]] = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
}
"""The tokens of each family that must be in the vocabulary. The other families mark turns by words, and end answers
with the tokenizer's end token."""


def families_for(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The families whose tokens the tokenizer has."""
    return [family for family in TEMPLATE_FAMILIES if not _missing(family, tokenizer)]


def family_template(family: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The template of a family, with the beginning of text where this tokenizer has one.

    Raises:
        ModelError: Control tokens of the family are no tokens of the tokenizer.
    """
    if missing := _missing(family, tokenizer):
        fitting = families_for(tokenizer)
        added = ", ".join(f"{{token: '{token}', special: true}}" for token in missing)
        raise ModelError(
            f"the tokenizer lacks {', '.join(missing)}, which the templates of {family} write",
            where=f"model.chat_template: {family}",
            hint=(f"families for this tokenizer: {', '.join(fitting)}; or " if fitting else "")
            + "name a template file"
            + (f", or add them: model.new_tokens: [{added}]" if family in CONTROL_TOKENS else ""),
        )
    source = files(__package__).joinpath(f"{family}.jinja").read_text(encoding="utf-8").rstrip("\n")
    return "{{- bos_token }}\n" + source if _begins_texts(family, tokenizer) else source


def text_template(prompt: PromptText, tokenizer: PreTrainedTokenizerBase) -> str:
    """The template of a text with placeholders, with the beginning of text where this tokenizer has one.

    Raises:
        ModelError: The tokenizer has no end token, which ends answers.
    """
    if not tokenizer.eos_token:
        raise ModelError(
            "the tokenizer lacks an end token, which ends the answers of a text template",
            where="data.train: template",
            hint="name the token in the model's tokenizer_config.json: eos_token",
        )
    source = as_chat_template(prompt)
    return "{{- bos_token }}\n" + source if _begins_texts("", tokenizer) else source


def _missing(family: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    if family not in CONTROL_TOKENS:
        return [] if tokenizer.eos_token else ["an end token"]
    return [token for token in CONTROL_TOKENS[family] if tokenizer.tokenize(token) != [token]]


def _begins_texts(family: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer or the base's own template begins texts with a token that is no part of a turn."""
    bos, template = tokenizer.bos_token_id, tokenizer.chat_template
    if bos is None or tokenizer.bos_token in CONTROL_TOKENS.get(family, ()):
        return False
    sources = template.values() if isinstance(template, Mapping) else [template or ""]
    return list(tokenizer("a")["input_ids"])[:1] == [bos] or any("bos_token" in source for source in sources)
