"""`ft explain plan`: what each number of a memory plan is, how it is computed, and what lowers it."""

from __future__ import annotations

import shutil
import textwrap
from dataclasses import asdict, dataclass

from ..output import show_json, show_result


@dataclass(frozen=True)
class Explained:
    """A number of `ft plan`.

    Attributes:
        what: What it is, and how it is computed.
        lowered_by: Settings that lower it; empty where none does.
    """

    what: str
    lowered_by: str = ""


NUMBERS = {
    "device": Explained("The device, and its memory: of this machine, or of the GPU named by --gpu or --fit."),
    "processes": Explained("Processes of the run on one machine. All memory is that of one of them."),
    "parameters": Explained(
        "Parameters of model and adapter by their shapes, tied ones once; a quantized weight counts by its elements. "
        "Trainable are those with a gradient."
    ),
    "rows": Explained(
        "Training rows after the validation split; their tokens in one epoch, without padding, and the target tokens "
        "of all steps."
    ),
    "shared": Explained(
        "Tokens in a prefix that neighbouring rows of a pass have in common, computed once; counted in a sample of "
        "the run's steps."
    ),
    "steps": Explained(
        "Optimizer steps of the run, and in one epoch. The largest pass is the micro-batch of most computed tokens, "
        "with padding.",
        "training.micro_batch_size, training.batching, data.max_length",
    ),
    "template": Explained("The recipe's settings for the chat template."),
    "libraries": Explained(
        "Memory of this process before the base is loaded, and the buffers of matmul libraries (measured); on a GPU "
        "the CUDA context and the workspaces of its libraries."
    ),
    "weights": Explained(
        "Parameters and buffers of the base in the dtype in which they are stored: 4 bytes a parameter in float32, 2 "
        "in bfloat16, about half a byte in 4 bits with their scales. Full fine-tuning stores float32 unless "
        "model.dtype says otherwise. On a CPU, pages of the files that stay mapped count too.",
        "quantization, model.dtype, distributed.strategy: fsdp",
    ),
    "adapter": Explained("Parameters and buffers that the method adds.", "adapter.r, adapter.target_modules"),
    "gradients": Explained(
        "One number for each trainable parameter, in its dtype; they are kept from one micro-batch to the next.",
        "an adapter in place of full fine-tuning, model.dtype",
    ),
    "optimizer": Explained(
        "Moments of the optimizer: two numbers for each trainable parameter with AdamW, 4 bytes each, or 1 byte each "
        "in 8 bits; and what the method keeps itself, such as the importance of AdaLoRA. Paged states leave the GPU "
        "when its memory is short.",
        "optimizer.name: adamw_8bit, paged_adamw_8bit, sgd or lion",
    ),
    "communication": Explained("Buffers of all-gather and reduce-scatter with several processes."),
    "activations": Explained(
        "What the largest pass allocates beside the logits at its peak: tensors saved for backward, temporaries, and "
        "dequantized weights. Traced without data through two and through three blocks; each further block costs "
        "their difference. With float32 weights and a 16-bit compute dtype, 16-bit copies of the weights are saved, "
        "too: 2 bytes a parameter.",
        "training.gradient_checkpointing, training.micro_batch_size, data.max_length, model.dtype: bfloat16",
    ),
    "logits": Explained(
        "Logits and their gradients at that peak: the output head computes them chunk by chunk, so that this does not"
        " grow with the row."
    ),
    "fragmentation": Explained(
        "Memory that the allocator holds and cannot reuse: a fixed share of activations and logits, measured on the "
        "CPU."
    ),
    "one step": Explained("The sum of all parts above: the peak of training."),
    "loading": Explained(
        "Peak while the base loads: libraries and weights, the largest tensor that is read or quantized, and with "
        "fsdp the whole block that is sharded."
    ),
    "evaluating": Explained(
        "Peak while the validation loss is computed: everything but gradients and activations, and a forward pass "
        "over the longest validation rows.",
        "evaluation.batch_size, data.max_length",
    ),
    "pinned": Explained("Host memory for block inputs that are offloaded from a GPU, in powers of two."),
    "estimated peak memory": Explained(
        "The largest of one step, loading and evaluating. The run fits if it is at most the memory of the device; "
        "paged optimizer states need not fit."
    ),
    "estimated time": Explained(
        "FLOPs of all steps, counted by tracing, over the speed of matmuls of the run's shapes: measured here on a "
        "CPU, the stated speed of a GPU. The first step of a GPU, validation and checkpoints come on top."
    ),
}


def show_plan_explained(as_json: bool) -> None:
    """Print the numbers of `ft plan`, a paragraph each."""
    if as_json:
        show_json({name: asdict(each) for name, each in NUMBERS.items()})
        return
    width = min(100, shutil.get_terminal_size().columns)
    lines = ["numbers of ft plan, from top to bottom; settings that lower them are keys of the recipe", ""]
    for name, each in NUMBERS.items():
        lines += [name, *textwrap.wrap(each.what, width - 2, initial_indent="  ", subsequent_indent="  ")]
        if each.lowered_by:
            text = f"lowered by: {each.lowered_by}"
            lines += textwrap.wrap(text, width - 2, initial_indent="  ", subsequent_indent="    ")
    show_result("\n".join(lines))
