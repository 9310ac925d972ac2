"""`ft chat`: a conversation with a model in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from finetune.errors import FinetuneError
from finetune.run.signals import Interruption, StopRequested

from .event_log import event_handler
from .options import MODEL_REF, Dtype, MaxNewTokens, Quiet, Seed, System, Temperature, TopP
from .output import exit_immediately, show_error, show_note
from .prompts import read_line, stdin_is_terminal, streamed_answer

if TYPE_CHECKING:
    from finetune.jobs.infer.chat import Chat

COMMANDS = """\
/clear        start again with the same system message
/system TEXT  set the system message; without TEXT, remove it
/exit         leave (also Ctrl-D); Ctrl-C stops an answer"""


def chat(
    name: Annotated[str, typer.Argument(metavar="RUN", help=f"{MODEL_REF}.")],
    system: System = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    dtype: Dtype = None,
    quiet: Quiet = False,
) -> None:
    """Chat with a run or a model."""
    from finetune.jobs.load.model_ref import resolve_model_refs

    (found,) = resolve_model_refs([name])
    with event_handler(quiet, as_json=False) as on_event:
        from finetune.evaluation.generation import Sampling
        from finetune.jobs.infer.chat import Chat

        sampling = Sampling(max_new_tokens, temperature, top_p, seed)
        talk = Chat.open(found, system, sampling, on_event, dtype.value if dtype else None)
    if stdin_is_terminal():
        show_note(COMMANDS)
    while (line := read_line("> ")) is not None:
        word, _, rest = line.strip().partition(" ")
        match word:
            case "":
                continue
            case "/exit":
                break
            case "/clear":
                talk.clear()
            case "/system":
                talk.system = rest.strip() or None
            case _ if word.startswith("/"):
                show_note(COMMANDS)
            case _:
                _answer_turn(talk, line)


def _answer_turn(talk: Chat, text: str) -> None:
    """Answer one turn. After an error the conversation continues without this turn.

    Ctrl-C is polled between two pieces: a KeyboardInterrupt raised at any point could be swallowed by library code
    that catches every exception.
    """
    interruption = Interruption()
    try:
        with interruption.listening(exit_immediately), interruption.deferred(), streamed_answer() as show_piece:

            def show_or_stop(piece: str) -> None:
                show_piece(piece)
                interruption.poll()

            talk.say(text, show_or_stop)
    except FinetuneError as error:
        show_error(error)
    except StopRequested:
        show_note("stopped")
