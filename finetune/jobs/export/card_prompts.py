"""The section of a model card about the form of prompts."""

from __future__ import annotations

from finetune.data.chat_template import ChatTemplate
from finetune.data.documents import Message
from finetune.errors import BadRow, ModelError
from finetune.jobs.load.trained_run import FineTunedRun

INSTRUCTION, INPUT = "{instruction}", "{input}"


def prompt_forms(trained: FineTunedRun) -> list[tuple[str, str]]:
    """The forms of a run's prompts: each a sentence, and the text that the model gets; empty for plain text.

    Args:
        trained: The run.
    """
    if not trained.record.uses_chat_template:
        return [("The model was trained on plain text, without a chat template: it continues a text.", "")]
    template = ChatTemplate(trained.context.tokenizer)
    plain = _rendered(template, Message("user", INSTRUCTION))
    forms = []
    if plain:
        forms.append(("A message of the user as the model gets it; chat_template.jinja renders it:", plain))
    joined = template.joined([Message("user", INSTRUCTION, input=INPUT)])[0].content
    with_input = _rendered(template, Message("user", INSTRUCTION, input=INPUT))
    if with_input and template.has_inputs:
        forms += [("An instruction with an input is one message:", joined), ("The model gets it as:", with_input)]
    return forms


def _rendered(template: ChatTemplate, message: Message) -> str | None:
    """The prompt of one message; None where the template refuses it."""
    try:
        return template.render([message], "the model card", generation_prompt=True)
    except (BadRow, ModelError):
        return None
