"""What answers: trained weights of any kind, or a model as it is; several of them over one base that is loaded once."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from finetune.adapters import peft_bridge
from finetune.adapters.base import AdapterMethod
from finetune.adapters.soft_prompt import EmbeddedPromptMethod
from finetune.adapters.soft_prompt_model import EmbeddedPromptModel, PromptChoiceModel
from finetune.errors import RefusedError, UnsupportedError
from finetune.jobs.load.context import ModelSetup, TrainingContext
from finetune.jobs.load.model_ref import Kind, ModelRef
from finetune.jobs.load.trained_run import FineTunedRun
from finetune.jobs.load.training_record import (
    QuantizedRecord,
    TrainingRecord,
    check_same_quantized_weights,
    recorded_chat_template,
    refuse_other_base,
)
from finetune.models.fingerprint import fingerprint
from finetune.models.kernels.packing_check import prefix_sharing_blocker, use_packing_attention
from finetune.models.loading.dtype import autocast
from finetune.quantizers.choice import Quantizers
from finetune.recipe.load import load_recipe
from finetune.recipe.sections.model import Model
from finetune.recipe.sections.section import Section
from finetune.resolve import build
from finetune.run.checkpoints import read_checkpoint
from finetune.run.directory import RunDirectory
from finetune.run.events import EventHandler
from finetune.train.checkpoint import TRAINED

logger = logging.getLogger(__name__)

VERIFICATION_REPORTS = ("merge.json", "export.json")
"""Files of ours in a model's folder that say whether it was trained on conversations."""


@dataclass(frozen=True)
class LoadedAdapter:
    """Weights that were trained, not yet loaded.

    Attributes:
        method: What trained them.
        codes: What the base was quantized to, if it was.
        put_on: Puts them on the base, frozen.
        prompt_tokens: Places that they take in front of every row.
        weights: The folder of their files.
    """

    method: AdapterMethod
    codes: QuantizedRecord | None
    attach_to: Callable[[PreTrainedModel], nn.Module]
    prompt_tokens: int
    weights: Path


@dataclass(frozen=True)
class FineTunedModel:
    """Something that answers, not yet loaded.

    Attributes:
        label: What it is called.
        setup: Its base.
        trained: What goes on it; None for the base as it is.
        uses_chat_template: Whether prompts go through the chat template, as the rows of the training did.
    """

    label: str
    setup: ModelSetup
    trained: LoadedAdapter | None
    uses_chat_template: bool

    @classmethod
    def find(cls, named: ModelRef, on_event: EventHandler) -> FineTunedModel:
        """Find what a name means, and make sure that its base is the one that it was trained on.

        Raises:
            FinetuneError: It cannot be opened, or its base is another one now.
        """
        match named.kind:
            case Kind.RUN:
                return _of_run(named, on_event)
            case Kind.CHECKPOINT:
                return _of_checkpoint(named, on_event)
            case Kind.WEIGHTS:
                return _from_weights(named, on_event)
            case Kind.MODEL:
                return _of_model(named, on_event)

    @property
    def untuned(self) -> FineTunedModel:
        """The base by itself."""
        return FineTunedModel("base", self.setup, None, self.uses_chat_template)

    @property
    def prompt_tokens(self) -> int:
        """Places that what was trained takes in front of every row."""
        return self.trained.prompt_tokens if self.trained else 0

    @property
    def has_embedded_prompt(self) -> bool:
        """Whether it is a prompt of embeddings, of which several go into one batch."""
        return self.trained is not None and isinstance(self.trained.method, EmbeddedPromptMethod)


def _of_run(named: ModelRef, on_event: EventHandler) -> FineTunedModel:
    run = FineTunedRun.open(RunDirectory.open(named.path), on_event)
    return _with_record(named.label, run.context, run.context.method, run.record, run.weights)


def _from_weights(named: ModelRef, on_event: EventHandler) -> FineTunedModel:
    """The base is found as the record names it, wherever the folder lies now."""
    record = TrainingRecord.read(named.path)
    if record.adapter.trains_base:  # a whole model
        section = record.model.model_copy(update={"name": str(named.path), "revision": None})
        setup = ModelSetup.find(section, on_event, precision=record.precision, trains_base=True)
        return FineTunedModel(named.label, setup, None, record.uses_chat_template)
    quantizers = Quantizers(record.quantization, record.modules)
    setup = ModelSetup.find(record.model, on_event, quantizers, record.precision)
    method = build(record.adapter, record.modules, setup.tokenizer)
    record.refuse_others(named.path, setup.folder, method)
    return _with_record(named.label, setup, method, record, named.path)


def _with_record(
    label: str, setup: ModelSetup, method: AdapterMethod, record: TrainingRecord, weights: Path
) -> FineTunedModel:
    def attach_to(base: PreTrainedModel) -> nn.Module:
        return method.load(base, weights)

    trained = LoadedAdapter(method, record.quantized_base, attach_to, record.adapter.prompt_tokens, weights)
    return FineTunedModel(label, setup, trained, record.uses_chat_template)


def _of_checkpoint(named: ModelRef, on_event: EventHandler) -> FineTunedModel:
    checkpoint = read_checkpoint(named.path)
    facts = checkpoint.facts
    recipe = load_recipe(named.path / RunDirectory(named.path).recipe.name).recipe
    context = TrainingContext.of(recipe, on_event)
    refuse_other_base(facts["base"], context.folder)

    def attach_to(base: PreTrainedModel) -> nn.Module:
        context.seed()
        model: nn.Module = context.method.attach(base, facts["total_steps"])
        context.method.initialize(model, context.folder.weight)
        context.method.restore(model, load_file(named.path / TRAINED))
        peft_bridge.store_as_base(model)
        return model.requires_grad_(False)

    codes = facts["quantized_base"] and QuantizedRecord(device=facts["device"], fingerprint=facts["quantized_base"])
    trained = LoadedAdapter(context.method, codes, attach_to, recipe.adapter.prompt_tokens, named.path)
    return FineTunedModel(named.label, context, trained, recorded_chat_template(facts))


def _of_model(named: ModelRef, on_event: EventHandler) -> FineTunedModel:
    section = Model.model_validate({"name": named.given}, context={"folder": Path.cwd()})
    setup = ModelSetup.find(section, on_event)
    told = _from_verification_report(named.path)
    return FineTunedModel(named.label, setup, None, bool(setup.tokenizer.chat_template) if told is None else told)


def _from_verification_report(folder: Path) -> bool | None:
    """What a file of ours says in the folder of a model that a run became; None where there is none."""
    for name in VERIFICATION_REPORTS:
        with suppress(OSError, ValueError):
            verification = json.loads((folder / name).read_text(encoding="utf-8"))
            if isinstance(verification, dict) and isinstance(told := recorded_chat_template(verification), bool):
                return told
    return None


class SharedBase:
    """One base in memory, and what is put on it by turns.

    Args:
        finetuned: What is to answer, all over the same base; it is loaded here.
        on_event: Told of every phase.

    Attributes:
        finetuned: As given.

    Raises:
        RefusedError: Their bases are not the same, or not quantized to the codes of the training.
        UnsupportedError: One has no adapter that could be put on a base and taken off.
    """

    def __init__(self, finetuned: Sequence[FineTunedModel], on_event: EventHandler) -> None:
        _refuse_other_bases(finetuned)
        self.finetuned = list(finetuned)
        self._base = finetuned[0].setup.load_base(on_event)
        for each in finetuned:
            if each.trained is not None:
                check_same_quantized_weights(each.trained.codes, each.setup, self._base)
        self._on_it: tuple[LoadedAdapter, nn.Module] | None = None

    def model(self, number: int) -> nn.Module:
        """The model of one; what was on the base before is taken off."""
        trained = self.finetuned[number].trained
        if self._on_it is not None:
            before, model = self._on_it
            if before is trained:
                return model
            self._base, self._on_it = before.method.detach(model), None
        if trained is None:
            base: nn.Module = self._base  # transformers has no types
            return base
        model = trained.attach_to(self._base)
        self._on_it = (trained, model)
        return model

    def supports_prefix_sharing(self, number: int) -> bool:
        """Whether one computes once what rows in one line begin with alike; its attention may become that which can.

        A prompt that was trained stands before every row, which none then has in common with another.
        """
        finetuned = self.finetuned[number]
        self.model(number)
        return not finetuned.prompt_tokens and finetuned.setup.section.attention == "auto" and self._shares_prefixes

    @cached_property
    def _shares_prefixes(self) -> bool:
        """Of the base, with whatever adapter is on it: those change each token by itself."""
        try:
            setup = self.finetuned[0].setup
            with autocast(setup.accelerator.device, setup.compute_dtype):
                use_packing_attention(self._base, may_choose=True)
                objection = prefix_sharing_blocker(self._base)
        except UnsupportedError as error:
            objection = str(error)
        if objection:
            logger.info("what rows begin with alike is computed for each: %s", objection)
        return objection is None

    def with_prompts(self, numbers: Sequence[int]) -> PromptChoiceModel:
        """One model for several that are prompts of embeddings, in this order."""
        prompted = [self.model(number) for number in numbers]  # the base stays as it is, so all of them hold
        assert all(isinstance(model, EmbeddedPromptModel) for model in prompted)
        return PromptChoiceModel([model for model in prompted if isinstance(model, EmbeddedPromptModel)])


def _refuse_other_bases(finetuned: Sequence[FineTunedModel]) -> None:
    first = finetuned[0]
    for other in finetuned[1:]:
        ours, theirs = _base_facts(first), _base_facts(other)
        both = [key for key in ours if key in theirs]
        if differing := [f"{key} {theirs[key]} and not {ours[key]}" for key in both if ours[key] != theirs[key]]:
            raise RefusedError(
                f"it stands on another base than {first.label}: {', '.join(differing)}",
                where=other.label,
                hint="answer together with what stands on one base, stored in one way; the rest by itself",
            )
    replacing = next((each for each in finetuned if each.trained and each.trained.method.section.trains_base), None)
    if replacing and any(each.trained for each in finetuned if each is not replacing):
        raise UnsupportedError(
            "it has changed the base's own weights, so that no other adapter can go on them",
            where=replacing.label,
            hint="let it answer by itself",
        )


def _base_facts(finetuned: FineTunedModel) -> dict[str, str]:
    """What must be the same for two to answer over one base as each does over its own."""
    setup = finetuned.setup
    quantizers = setup.quantizers
    facts = {
        "fingerprint": fingerprint(setup.folder.path)[:12],
        "quantization": _in_words(quantizers.section),
        "quantization of single layers": "; ".join(
            f"{rule.match}: {_in_words(rule.quantization)}" for rule in quantizers.modules if rule.quantization
        ),
        "type": str(setup.weight_dtype).removeprefix("torch."),
        "computing in": str(setup.compute_dtype).removeprefix("torch."),
        "attention": setup.section.attention,
    }
    codes = finetuned.trained and finetuned.trained.codes
    return {**facts, "codes": codes.fingerprint[:12]} if codes else facts


def _in_words(section: Section) -> str:
    return " ".join(f"{key}={value}" for key, value in section.model_dump().items())
