"""What a run takes its template, its date and its ends from: told before it trains."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from finetune.models.loading.load import generation_settings, named_ends
from finetune.models.loading.model_files import ModelFolder
from finetune.models.loading.template_settings import writes_date
from finetune.recipe.recipe import Recipe

logger = logging.getLogger(__name__)


def template_line(recipe: Recipe) -> str | None:
    """The recipe's settings for the chat template in one line; None where the base's is used as it is."""
    arguments = recipe.data.template_arguments
    parts = [_named(recipe)] if recipe.chat_template else []
    if arguments:
        values = ", ".join(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in arguments.items())
        parts.append(f"{values} (data.template_arguments)")
    return "; ".join(parts) or None


def _named(recipe: Recipe) -> str:
    if recipe.model.chat_template:
        return f"{recipe.model.chat_template} (model.chat_template)"
    source = next(each for each in recipe.data.sources if each.prompt_text is not None)
    text = source.prompt_text if isinstance(source.prompt_text, str) else "a text"
    return f"{text} (template of {source.place})"


def report_template(folder: ModelFolder, tokenizer: PreTrainedTokenizerBase, answer_ends: Iterable[int]) -> None:
    """Log the date that a run keeps, and ends of its answers that the base's generation settings do not name."""
    if writes_date(tokenizer):
        logger.info("the chat template writes today's date; this run keeps %s", tokenizer.today)
    named = named_ends(generation_settings(folder.path))
    for end in answer_ends:
        if end not in named:
            logger.info(
                "rows end answers with %s (%d), which the base's generation settings do not name; ft records it as an "
                "end",
                tokenizer.convert_ids_to_tokens(end),
                end,
            )
