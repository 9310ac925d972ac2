"""Fine-tuned models that generate: trained weights of any kind, or a plain model; several share one loaded base."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from finetune.adapters import peft_bridge
from finetune.adapters.base import AdapterMethod
from finetune.adapters.soft_prompt import EmbeddedPromptMethod
from finetune.adapters.soft_prompt_model import EmbeddedPromptModel, PromptChoiceModel
from finetune.errors import EnvironmentFault, RefusedError, UnsupportedError
from finetune.jobs.load.base_record import BaseRecord
from finetune.jobs.load.context import ModelSetup, TrainingContext
from finetune.jobs.load.model_ref import Kind, ModelRef
from finetune.jobs.load.trained_run import FineTunedRun, in_dtype
from finetune.jobs.load.training_record import (
    QuantizedRecord,
    TrainingRecord,
    check_same_quantized_weights,
    kept_with_checkpoint,
    recorded_chat_template,
    recorded_date,
    recorded_ends,
    recorded_tokens,
)
from finetune.models.fingerprint import fingerprint
from finetune.models.kernels.packing_check import prefix_sharing_blocker, use_packing_attention
from finetune.models.loading.dtype import PRECISION, autocast, dtype_name
from finetune.models.loading.load import KeptTokenizer
from finetune.models.loading.new_tokens import keep_as_tokens
from finetune.quantizers.choice import Quantizers
from finetune.recipe.load import load_recipe
from finetune.recipe.sections.model import Dtype, Model
from finetune.recipe.sections.section import Section
from finetune.resolve import build
from finetune.run.checkpoints import read_checkpoint
from finetune.run.directory import RunDirectory
from finetune.run.events import EventHandler
from finetune.run.verification_report import VerificationReport, read_verification_report
from finetune.train.checkpoint import TRAINED

logger = logging.getLogger(__name__)

VERIFICATION_REPORTS = ("merge.json", "export.json")
"""Files that `ft merge` and `ft export` write to a model's folder; they record whether it uses the chat template."""


@dataclass(frozen=True)
class LoadedAdapter:
    """Trained weights and the function that attaches them to a loaded base.

    Attributes:
        method: The adapter method.
        codes: Record of the quantized base; None if it was not quantized.
        attach_to: Attaches the weights, frozen, to a base; returns the model.
        prompt_tokens: Soft prompt tokens before each row.
        weights: Folder of the weights.
    """

    method: AdapterMethod
    codes: QuantizedRecord | None
    attach_to: Callable[[PreTrainedModel], nn.Module]
    prompt_tokens: int
    weights: Path


@dataclass(frozen=True)
class FineTunedModel:
    """A model that can generate, not loaded yet.

    Attributes:
        label: Its short name.
        setup: Its base.
        trained: Its adapter; None for the base alone.
        uses_chat_template: Whether prompts are rendered by the chat template, as the training rows were.
        answer_ends: Ids that end an answer, beside those of tokenizer and model: the ends of the training.
    """

    label: str
    setup: ModelSetup
    trained: LoadedAdapter | None
    uses_chat_template: bool
    answer_ends: tuple[int, ...] = ()

    @classmethod
    def find(cls, named: ModelRef, on_event: EventHandler, dtype: Dtype | None = None) -> FineTunedModel:
        """Open a reference, and check that its base is the one of the training.

        Args:
            named: The reference.
            on_event: Receives a `Phase`.
            dtype: To compute in, in place of the type of the training, or of the one that suits the device.

        Raises:
            FinetuneError: It cannot be opened, or its base has changed.
        """
        find = {
            Kind.RUN: _of_run,
            Kind.CHECKPOINT: _of_checkpoint,
            Kind.WEIGHTS: _from_weights,
            Kind.MODEL: _of_model,
        }
        try:
            found = find[named.kind](named, on_event, dtype)
        except EnvironmentFault as fault:
            if fault.where == PRECISION:  # the run has it, or the option
                fault.where, fault.hint = "--dtype", "choose float32 or bfloat16"
            raise
        if (today := found.setup.kept_date) not in (None, date.today()):
            logger.info("the chat template writes a date: %s, that of the training", today)
        return found

    @property
    def untuned(self) -> FineTunedModel:
        """The base alone."""
        return FineTunedModel("base", self.setup, None, self.uses_chat_template, self.answer_ends)

    @property
    def generation_dtype(self) -> torch.dtype:
        """The type that it generates in: no autocast, so that float32 weights generate in float32."""
        is_full = self.setup.compute_dtype is torch.float32
        return torch.float32 if is_full else self.setup.weight_dtype

    def note_generation_dtype(self) -> None:
        """Log the type that it generates in."""
        name = dtype_name(self.generation_dtype)
        logger.info("computing in %s%s", name, "" if name == "float32" else " (--dtype float32: full precision)")

    @property
    def prompt_tokens(self) -> int:
        """Soft prompt tokens before each row."""
        return self.trained.prompt_tokens if self.trained else 0

    @property
    def has_embedded_prompt(self) -> bool:
        """Whether it is a soft prompt of embeddings; one batch can mix rows of several such prompts."""
        return self.trained is not None and isinstance(self.trained.method, EmbeddedPromptMethod)


def _of_run(named: ModelRef, on_event: EventHandler, dtype: Dtype | None) -> FineTunedModel:
    run = FineTunedRun.open(RunDirectory.open(named.path), on_event, dtype)
    return _with_record(named.label, run.context, run.context.method, run.record, run.weights)


def _from_weights(named: ModelRef, on_event: EventHandler, dtype: Dtype | None) -> FineTunedModel:
    """The model of a folder of weights, over the base that its record names."""
    record = TrainingRecord.read(named.path)
    if dtype is not None:
        section = record.model.model_copy(update={"dtype": dtype})
        record = record.model_copy(update={"model": section, "precision": dtype})
    if record.adapter.trains_base:  # the folder holds a full model
        section = record.model.model_copy(update={"name": str(named.path), "revision": None, "new_tokens": None})
        kept = record.kept(named.path)
        setup = ModelSetup.find(section, on_event, precision=record.precision, trains_base=True, kept=kept)
        keep_as_tokens(setup.tokenizer, record.named_tokens)
        return FineTunedModel(named.label, setup, None, record.uses_chat_template, tuple(record.answer_ends))
    quantizers = Quantizers(record.quantization, record.modules)
    setup = ModelSetup.find(record.model, on_event, quantizers, record.precision, kept=record.kept(named.path))
    keep_as_tokens(setup.tokenizer, record.named_tokens)
    method = build(record.adapter, record.modules, setup.tokenizer)
    record.refuse_others(named.path, setup.folder, method)
    return _with_record(named.label, setup, method, record, named.path)


def _with_record(
    label: str, setup: ModelSetup, method: AdapterMethod, record: TrainingRecord, weights: Path
) -> FineTunedModel:
    def attach_to(base: PreTrainedModel) -> nn.Module:
        return method.load(base, weights)

    trained = LoadedAdapter(method, record.quantized_base, attach_to, record.adapter.prompt_tokens, weights)
    return FineTunedModel(label, setup, trained, record.uses_chat_template, tuple(record.answer_ends))


def _of_checkpoint(named: ModelRef, on_event: EventHandler, dtype: Dtype | None) -> FineTunedModel:
    checkpoint = read_checkpoint(named.path)
    checkpoint.refuse_lack_of("base", "total_steps", "quantized_base", "device")
    facts = checkpoint.facts
    recipe = in_dtype(load_recipe(named.path / RunDirectory(named.path).recipe.name).recipe, dtype)
    context = TrainingContext.of(recipe, on_event, kept=kept_with_checkpoint(checkpoint))
    record = BaseRecord.from_facts(context.folder, facts)
    record.refuse_other(context.folder, recipe.distributed.strategy == "fsdp")

    def attach_to(base: PreTrainedModel) -> nn.Module:
        # As in training: PEFT draws the same values that PiSSA/OLoRA's difference was taken from.
        context.seed()
        model: nn.Module = context.method.attach(base, facts["total_steps"])
        context.method.initialize(model, context.folder.weight)
        context.method.restore(model, peft_bridge.read_trained(named.path / TRAINED))
        peft_bridge.store_as_base(model)
        return model.requires_grad_(False)

    fingerprinted = facts["quantized_base"]
    codes = QuantizedRecord(device=facts["device"], fingerprint=fingerprinted) if fingerprinted else None
    trained = LoadedAdapter(context.method, codes, attach_to, recipe.adapter.prompt_tokens, named.path)
    uses_chat_template = bool(recorded_chat_template(facts))
    return FineTunedModel(named.label, context, trained, uses_chat_template, recorded_ends(facts))


def _of_model(named: ModelRef, on_event: EventHandler, dtype: Dtype | None) -> FineTunedModel:
    written = {"name": named.given, "dtype": dtype or "auto"}
    section = Model.model_validate(written, context={"folder": Path.cwd()})
    report = _verification_report(named.path)
    kept = KeptTokenizer(today=recorded_date(report))
    setup = ModelSetup.find(section, on_event, precision=dtype or "auto", kept=kept)
    keep_as_tokens(setup.tokenizer, recorded_tokens(report))
    recorded = recorded_chat_template(report)
    uses_template = bool(setup.tokenizer.chat_template) if recorded is None else recorded
    return FineTunedModel(named.label, setup, None, uses_template, recorded_ends(report))


def _verification_report(folder: Path) -> VerificationReport:
    """The report of a merged or exported model; empty for any other model."""
    reports = (read_verification_report(folder / name) for name in VERIFICATION_REPORTS)
    return next((report for report in reports if recorded_chat_template(report) is not None), VerificationReport())


class SharedBase:
    """One loaded base, to which the adapters of several models are attached in turn.

    It has two states: the bare base, or the base with one adapter attached. `model` detaches the adapter of another
    model before it attaches the wanted one, so a model that it returned is valid until the next call.

    Args:
        finetuned: Models over the same base, which is loaded here.
        on_event: Receives a `Phase`.

    Attributes:
        finetuned: The same models.

    Raises:
        RefusedError: Their bases differ, or the quantized base differs from that of the training.
        UnsupportedError: A model replaces the base's own weights, so no other adapter can share it.
    """

    def __init__(self, finetuned: Sequence[FineTunedModel], on_event: EventHandler) -> None:
        _refuse_other_bases(finetuned)
        self.finetuned = list(finetuned)
        self._base = finetuned[0].setup.load_base(on_event)
        for each in finetuned:
            if each.trained is not None:
                check_same_quantized_weights(each.trained.codes, each.setup, self._base)
        self._attached: tuple[LoadedAdapter, nn.Module] | None = None  # None: the base is bare

    def model(self, number: int) -> nn.Module:
        """The model of this number, after another model's adapter is detached."""
        trained = self.finetuned[number].trained
        if self._attached is not None:
            before, model = self._attached
            if before is trained:
                return model
            self._base, self._attached = before.method.detach(model), None
        if trained is None:
            base: nn.Module = self._base  # transformers has no types
            return base
        model = trained.attach_to(self._base)
        self._attached = (trained, model)
        return model

    def supports_prefix_sharing(self, number: int) -> bool:
        """Whether a model can compute a shared prefix of packed rows once; may change its attention implementation.

        A model with a soft prompt cannot: the prompt stands before each row, so packed rows share no prefix.
        """
        finetuned = self.finetuned[number]
        self.model(number)
        return not finetuned.prompt_tokens and finetuned.setup.section.attention == "auto" and self._shares_prefixes

    @cached_property
    def _shares_prefixes(self) -> bool:
        """The same for the base, with any adapter: adapters change each token independently of the others."""
        try:
            setup = self.finetuned[0].setup
            with autocast(setup.accelerator.device, setup.compute_dtype):
                use_packing_attention(self._base, may_choose=True)
                objection = prefix_sharing_blocker(self._base)
        except UnsupportedError as error:
            objection = str(error)
        if objection:
            logger.info("shared prefixes are computed for each row: %s", objection)
        return objection is None

    def with_prompts(self, numbers: Sequence[int]) -> PromptChoiceModel:
        """One model for several soft prompts of embeddings, in this order."""
        # Soft prompts leave the base unchanged, so all of these models stay valid together.
        prompted = [self.model(number) for number in numbers]
        assert all(isinstance(model, EmbeddedPromptModel) for model in prompted)
        return PromptChoiceModel([model for model in prompted if isinstance(model, EmbeddedPromptModel)])


def _refuse_other_bases(finetuned: Sequence[FineTunedModel]) -> None:
    first = finetuned[0]
    for other in finetuned[1:]:
        ours, theirs = _base_facts(first), _base_facts(other)
        both = [key for key in ours if key in theirs]
        if differing := [f"{key} {theirs[key]} and not {ours[key]}" for key in both if ours[key] != theirs[key]]:
            raise RefusedError(
                f"its base differs from that of {first.label}: {', '.join(differing)}",
                where=other.label,
                hint="name models over one base, stored in one way (--dtype sets the type), or run them separately",
            )
    replacing = next((each for each in finetuned if each.trained and each.trained.method.section.trains_base), None)
    if replacing and any(each.trained for each in finetuned if each is not replacing):
        raise UnsupportedError(
            "it replaces the base's own weights, so no other adapter can share the base",
            where=replacing.label,
            hint="run it separately",
        )


def _base_facts(finetuned: FineTunedModel) -> dict[str, str]:
    """Properties of a base that models must agree on to share it."""
    setup = finetuned.setup
    quantizers = setup.quantizers
    facts = {
        "fingerprint": fingerprint(setup.folder.path)[:12],
        "quantization": _summary(quantizers.section),
        "quantization of single layers": "; ".join(
            f"{rule.match}: {_summary(rule.quantization)}" for rule in quantizers.modules if rule.quantization
        ),
        "type": dtype_name(setup.weight_dtype),
        "computing in": dtype_name(setup.compute_dtype),
        "attention": setup.section.attention,
        "rows of new tokens": str(setup.folder.new_rows and setup.folder.new_rows.trained),
    }
    codes = finetuned.trained and finetuned.trained.codes
    return {**facts, "codes": codes.fingerprint[:12]} if codes else facts


def _summary(section: Section) -> str:
    return " ".join(f"{key}={value}" for key, value in section.model_dump().items())
