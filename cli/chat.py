"""`ft chat`: a conversation in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from finetune.errors import FinetuneError
from finetune.run.signals import Interruption, StopRequested

from . import console
from .options import ANSWERS, MaxNewTokens, Quiet, Seed, System, Temperature, TopP

if TYPE_CHECKING:
    from finetune.jobs.infer.chat import Chat

COMMANDS = """\
/clear        begin again, with the same system message
/system TEXT  set the system message; without TEXT, take it away
/exit         leave, as Ctrl-D does; Ctrl-C stops an answer"""


def chat(
    name: Annotated[str, typer.Argument(metavar="RUN", help=f"{ANSWERS}.")],
    system: System = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Talk with a run or a model, turn by turn."""
    from finetune.jobs.load.model_ref import resolve_model_refs

    (found,) = resolve_model_refs([name])
    with console.reporting(quiet, as_json=False) as report:
        from finetune.evaluation.generation import Sampling
        from finetune.jobs.infer.chat import Chat

        talk = Chat.open(found, system, Sampling(max_new_tokens, temperature, top_p, seed), report)
    if console.is_asked():
        console.show_note(COMMANDS)
    while (line := console.read_line("> ")) is not None:
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
                console.show_note(COMMANDS)
            case _:
                _say(talk, line)


def _say(talk: Chat, text: str) -> None:
    """One turn; what went wrong is told, and the conversation goes on without it.

    Ctrl-C is looked for between two pieces: raised anywhere, it could be lost in code that forgives every exception.
    """
    interruption = Interruption()
    try:
        with interruption.listening(console.exit_immediately), console.words() as tell:

            def tell_or_stop(piece: str) -> None:
                tell(piece)
                interruption.poll()

            talk.say(text, tell_or_stop)
    except FinetuneError as error:
        console.show_error(error)
    except StopRequested:
        console.show_note("stopped")
