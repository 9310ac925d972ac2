"""Answers by vLLM, with the tokens, ends, limits and settings of our own generation. Imported on demand."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from finetune.errors import EnvironmentFault, UnsupportedError, UsageError
from finetune.evaluation.engine import Generator, OnAnswers
from finetune.evaluation.generation import AnswerDecoder, Sampling, end_tokens, up_to
from finetune.models.loading.dtype import dtype_name
from finetune.models.loading.load import generation_settings
from finetune.run.events import EventHandler, Phase, ignore
from finetune.storage.cache import cache_folder

VLLM_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # standard output is for results
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # other processes may run on this machine
}
"""Environment variables that vLLM reads at its import, unless the user has set them."""

LEAST_ROOM = 2048
"""First `max_model_len`, unless the context length of the model is shorter."""

CPU_CACHE_BYTES = 4 << 30
"""KV cache of vLLM on a CPU. The memory is allocated as rows need it."""

GPU_SHARE = 0.9
"""Fraction of the free GPU memory that vLLM allocates at its start, weights included."""

IDLE_SETTINGS = {
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "num_beams": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "sequence_bias": None,
    "guidance_scale": 1.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "watermarking_config": None,
}
"""Generation settings that transformers applies and vLLM lacks, with the value that has no effect."""

TOP_K = 50
"""The default of transformers."""


class VllmGenerator(Generator):
    """A model that vLLM loads at the first call.

    Args:
        label: Its name in messages.
        folder: Its files: config.json, safetensors, tokenizer.
        tokenizer: Decodes; its end token ends an answer.
        dtype: Of weights and computation.
        device: "cpu" or "cuda".
        positions: Context length of the model in tokens; None if unknown.
        adapter: Folder of a LoRA adapter in PEFT's format.
        rank: The --max-lora-rank that the adapter needs.
        answer_ends: Further ids that end an answer: those of the training.
        on_event: Receives the phase of loading.

    Raises:
        UsageError: vLLM is not installed.
        UnsupportedError: The model has a generation setting that vLLM lacks.
    """

    def __init__(
        self,
        label: str,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase,
        dtype: torch.dtype,
        device: str,
        positions: int | None,
        adapter: Path | None = None,
        rank: int | None = None,
        answer_ends: Sequence[int] = (),
        on_event: EventHandler = ignore,
    ) -> None:
        os.environ |= {**VLLM_ENVIRONMENT, "VLLM_CACHE_ROOT": str(cache_folder() / "vllm"), **os.environ}
        try:
            import vllm
        except ModuleNotFoundError as error:
            raise UsageError(
                f"the package {error.name} is missing",
                where="--engine vllm",
                hint="install vLLM into an environment of its own and ft into that, as the README says under "
                "--engine vllm; or leave --engine out",
            ) from error
        self.name = f"vLLM {vllm.__version__}"
        self.label, self.folder, self.tokenizer, self.device = label, folder, tokenizer, device
        self.dtype, self.positions, self.adapter, self.rank = dtype, positions, adapter, rank
        self.settings = generation_settings(folder)
        self.ends = end_tokens(self.settings, tokenizer, answer_ends)
        _refuse_what_vllm_lacks(self.settings, label)
        self._on_event = on_event
        self._engine: Any = None
        self._room = 0

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, on_answers: OnAnswers) -> None:
        """See the base class."""
        from vllm.lora.request import LoRARequest

        engine = self._loaded(max(map(len, prompts)) + sampling.max_new_tokens)
        on_answers({})
        parameters = self.parameters(sampling)
        # vLLM batches by itself: all requests are queued at once, and finish in any order.
        adapter = LoRARequest("trained", 1, str(self.adapter)) if self.adapter else None
        with _faults_of_vllm("does not answer", self.label):
            for index, prompt in enumerate(prompts):
                engine.add_request(str(index), {"prompt_token_ids": list(prompt)}, parameters, lora_request=adapter)
        while engine.has_unfinished_requests():
            with _faults_of_vllm("stopped", self.label):
                done = [each for each in engine.step() if each.finished]
            if done:
                on_answers({int(each.request_id): self._text(each.outputs[0].token_ids, sampling) for each in done})

    def close(self) -> None:
        """Shut down vLLM's processes, which hold the model."""
        if self._engine is not None:
            self._engine.engine_core.shutdown()
            self._engine, self._room = None, 0

    def parameters(self, sampling: Sampling) -> Any:
        """The parameters of vLLM for what transformers does with `sampling` and the model's own settings."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        settings = self.settings
        sampled: dict[str, Any] = {}
        if sampling.temperature:
            sampled = {
                "top_p": sampling.top_p,
                "top_k": TOP_K if settings.top_k is None else settings.top_k,
                "min_p": settings.min_p or 0.0,
                "seed": sampling.seed,
            }
        return SamplingParams(
            temperature=sampling.temperature,
            max_tokens=sampling.max_new_tokens,
            stop=list(sampling.stops),
            stop_token_ids=self.ends,
            ignore_eos=True,  # stop_token_ids has all of them
            repetition_penalty=settings.repetition_penalty or 1.0,
            # vLLM has no `suppress_tokens`; -100 is the lowest bias that it accepts.
            logit_bias=dict.fromkeys(settings.suppress_tokens or (), -100.0) or None,
            detokenize=bool(sampling.stops),
            skip_special_tokens=not sampling.keeps_control_tokens,  # of the text in which vLLM looks for stops
            output_kind=RequestOutputKind.FINAL_ONLY,
            **sampled,
        )

    def _text(self, ids: Sequence[int], sampling: Sampling) -> str:
        """The answer, decoded here: vLLM's own text ends at the stop string that is first in the list."""
        decoder = AnswerDecoder(self.tokenizer, self.ends, sampling.keeps_control_tokens)
        return up_to(decoder.text(ids), sampling.stops)

    def _loaded(self, length: int) -> Any:
        """The engine for rows of `length` tokens.

        Loaded again for longer rows: memory may not suffice for the full context length.
        """
        if length > self._room:
            self.close()
            room = max(LEAST_ROOM, 1 << (length - 1).bit_length())  # the next power of 2: few loads
            room = room if self.positions is None else max(length, min(room, self.positions))
            self._engine, self._room = self._load(room), room
        return self._engine

    def _load(self, room: int) -> Any:
        from vllm import EngineArgs, LLMEngine

        self._on_event(Phase(f"loading {self.label} into vLLM"))
        lora = {"enable_lora": True, "max_lora_rank": self.rank, "max_loras": 1} if self.adapter else {}
        with _faults_of_vllm("does not load the model", self.label):
            return LLMEngine.from_engine_args(
                EngineArgs(
                    model=str(self.folder),
                    dtype=dtype_name(self.dtype),
                    max_model_len=room,
                    load_format="safetensors",
                    trust_remote_code=False,
                    generation_config="vllm",  # no file: the settings are in the parameters
                    disable_log_stats=True,
                    use_tqdm_on_load=False,
                    **lora,
                    **self._memory(),
                )
            )

    def _memory(self) -> dict[str, Any]:
        if self.device == "cpu":
            return {"kv_cache_memory_bytes": CPU_CACHE_BYTES, "enforce_eager": True}  # compiling takes a minute
        # vLLM's setting is a fraction of the total memory: scaled to what other processes leave free.
        free, total = torch.cuda.mem_get_info()
        return {"gpu_memory_utilization": GPU_SHARE * free / total}


def _refuse_what_vllm_lacks(settings: GenerationConfig, label: str) -> None:
    for name, without_effect in IDLE_SETTINGS.items():
        if getattr(settings, name, None) not in (None, without_effect):
            raise UnsupportedError(
                f"its generation settings have {name}, which vLLM lacks", where=label, hint="leave --engine out"
            )


@contextmanager
def _faults_of_vllm(what: str, label: str) -> Iterator[None]:
    """Turns any exception of vLLM into an `EnvironmentFault`: they have no common class."""
    try:
        yield
    except Exception as error:
        raise EnvironmentFault(
            f"vLLM {what}: {(str(error).strip().splitlines() or [type(error).__name__])[0]}",
            where=label,
            hint="see its output above; leave --engine out to generate with ft",
        ) from error
