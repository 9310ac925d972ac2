"""Write the trattoria data sets: small made-up rows for the guides, one kind for each task.

A seeded generator builds them from parts, so the files are reproducible bit for bit. Validation questions and messages
are worded differently from all training rows.

    python make.py        writes all files beside this one
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

SEED = 21
FOLDER = Path(__file__).parent

Row = dict[str, Any]


def words(text: str) -> list[str]:
    """The words of a text, so that long lists of names stay readable."""
    return text.split()


NAMES = words(
    "Abel Adele Aisha Anders Arjun Astrid Bea Bruno Carmen Chidi Clara Dalia Diego Dora Elena Emil Esther Fatima Felix "
    "Freya Gemma Goran Greta Hana Henry Hugo Ida Imran Ines Ivan Jaya Jonas Judith Kamal Katya Kenji Kofi Lars Leila "
    "Lotte Lucia Malik Marta Mei Milan Miriam Nadia Nils Nora Olga Omar Oscar Petra Pilar Priya Quentin Ravi Rosa "
    "Ruben Samir Selma Simon Stella Sven Tara Theo Tilda Ugo Vera Viktor Wanda Wei Xenia Yann Yuki Yusuf Zainab Zara"
)
SURNAMES = words(
    "Abbott Berg Bianchi Carter Castro Chen Costa Demir Dubois Ekman Evans Fischer Garcia Gupta Hansen Horvat Ito "
    "Jansen Keller Khan Larsson Lee Lopes Marino Moreau Murphy Nguyen Novak Okafor Park Patel Petrov Reyes Rossi Sato "
    "Silva Singh Stone Tanaka Torres Usman Varga Weber Wong Yilmaz Zhou"
)
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
TIMES = [f"{hour}:{minute:02}" for hour in (12, 13, 18, 19, 20, 21) for minute in (0, 15, 30, 45)]
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight"}

# Chat: facts about the restaurant. The last wording of each question occurs in validation conversations only.
HOUSE = "You answer guests of the Trattoria Luna in one or two short sentences."
ANSWERS: Sequence[tuple[str, Sequence[str]]] = [
    (
        "We open at noon and at six in the evening, every day but Monday.",
        [
            "When are you open?",
            "What are your opening hours?",
            "At what time do you open?",
            "From when on can we come?",
        ],
    ),
    (
        "You find us at 7 Mill Lane, two minutes from the old bridge.",
        ["Where are you?", "What is your address?", "How do I find you?", "Which street is the restaurant in?"],
    ),
    (
        "Well-behaved dogs are welcome on the terrace, and there is water for them.",
        ["May I bring my dog?", "Are dogs allowed?", "Can our dog come along?", "What about our dog?"],
    ),
    (
        "There is a car park behind the house, free for guests.",
        ["Where can I park?", "Is there parking?", "Do you have a car park?", "Where do I leave the car?"],
    ),
    (
        "A third of the menu is vegetarian, and the kitchen cooks vegan if you tell us when you book.",
        [
            "Do you have vegetarian food?",
            "Is there something vegan?",
            "What can vegetarians eat?",
            "I eat no meat. Do you?",
        ],
    ),
    (
        "We take cash and all cards, and we split the bill if you like.",
        ["Can I pay by card?", "Do you take cards?", "How can we pay?", "Is it cash only?"],
    ),
    (
        "Our pasta is made every morning, and the ravioli are what people come back for.",
        ["What do you recommend?", "What is good here?", "What should I order?", "What do guests like best?"],
    ),
    (
        "We have high chairs, a children's menu and crayons.",
        [
            "Do you have a high chair?",
            "Is there a children's menu?",
            "Are children welcome?",
            "We have a toddler. Is that fine?",
        ],
    ),
    (
        "For more than ten guests please call us: 555 0134.",
        [
            "Can we come with twelve?",
            "Do you take groups?",
            "We are fifteen. Is that possible?",
            "Is a party of eleven fine?",
        ],
    ),
    (
        "Yes: there is a ramp at the side door, and the tables near it have room for a wheelchair.",
        [
            "Is there a ramp?",
            "Can I come in a wheelchair?",
            "Is the house accessible?",
            "My mother can't climb stairs. Can she come?",
        ],
    ),
    (
        "Tell us about allergies when you book: the kitchen writes every ingredient down.",
        [
            "I am allergic to nuts.",
            "Is your food free of gluten?",
            "Can you cook without milk?",
            "My son can't eat eggs. Can you help?",
        ],
    ),
    (
        "We keep a table for fifteen minutes; call us if you are late.",
        [
            "What if we are late?",
            "How long do you keep a table?",
            "Our train may be late.",
            "We may not make it in time.",
        ],
    ),
]
OPENINGS = ["", "Hello! ", "Good evening. ", "Hi, quick question: "]
THANKS = [("Thank you!", "You are welcome. We look forward to you."), ("Great, thanks.", "See you soon.")]

# Classification: guests' messages by what they want.
KINDS: dict[str, Sequence[str]] = {
    "booking": [
        "Could we have a table for {guests} on {day} at {time}? {name}",
        "Please put {name} down for {day}, {time}, {guests} people.",
        "{guests} of us would like to eat with you on {day}. {time} would be fine. {name}",
        "Do you have room for {guests} on {day} around {time}? It's {name}.",
        "I'd love to come by on {day} with {guests} friends, say {time}. Yours, {name}",
    ],
    "cancellation": [
        "{name} here. We can't come on {day} after all.",
        "Please cancel our table for {guests} on {day}. {name}",
        "Sorry, we have to call {day} off. The name was {name}.",
        "My plans have changed: no table for {name} on {day}, please.",
        "We are ill, so {day} at {time} is off. Best, {name}",
    ],
    "question": [
        "Is there a vegan menu on {day}? {name}",
        "Where do I park if I come at {time}? {name}",
        "Can you tell me whether the terrace is open on {day}?",
        "Do you take cards? We are {guests}, so it may be a long bill.",
        "How late does the kitchen work on {day}? {name}",
    ],
    "complaint": [
        "We waited {guests} hours for our soup on {day}. {name}",
        "The fish on {day} was cold, and nobody cared. {name}",
        "{name} again: the bill on {day} was wrong, once more.",
        "I have never met such an unfriendly waiter as on {day}. {name}",
        "Our table at {time} was next to the bins. Not good enough.",
    ],
    "praise": [
        "What a wonderful evening on {day}! Thank you, {name}",
        "The ravioli on {day} were the best I ever had. {name}",
        "{guests} happy people say thank you for {day}. {name}",
        "Please tell the chef that {name} is still dreaming of the dessert.",
        "So kind of you to light a candle for us on {day}. {name}",
    ],
}
"""For each label five wordings; the last one occurs in validation messages only."""

# Tools: a table is looked for, and the answer says what was found.
ASSISTANT = "You book tables for the Trattoria Luna."
FIND_TABLE = {
    "type": "function",
    "function": {
        "name": "find_table",
        "description": "Look for a free table.",
        "parameters": {
            "type": "object",
            "properties": {
                "day": {"type": "string", "enum": DAYS},
                "time": {"type": "string", "description": "HH:MM"},
                "guests": {"type": "integer"},
            },
            "required": ["day", "time", "guests"],
        },
    },
}
WISHES = [
    "Is there a table for {guests} on {day} at {time}?",
    "We are {guests} and would come on {day}, {time}.",
    "Anything free on {day} at {time}? There are {guests} of us.",
    "{day} at {time} for {guests}, please.",
    "Could you fit {guests} of us in at {time} on {day}?",
]
"""The last wording occurs in validation conversations only."""

# Continued pre-training: a house's own words, which a base has never seen.
DISHES = words(
    "Lunetta Brodina Salvora Ombretta Cascinata Fornella Rivanza Melizza Tordina Verbella Castalda Nocciara Pergolina "
    "Fiumetta Granolla Alborina Stradella Marizza Corvetta Pinarola"
)
BASES = ["hand-cut pasta", "toasted barley", "chestnut dumplings", "thin polenta", "rye gnocchi"]
PARTNERS = ["brown butter and sage", "slow lamb", "smoked trout", "braised fennel", "mountain cheese", "wild mushrooms"]
LASTS = ["a spoon of lemon oil", "roasted walnuts", "pickled onion", "a pinch of dried mint", "grated horseradish"]
MANNERS = [
    "{dish} is what the house calls {base} with {partner}. It is finished with {last}.",
    "Whoever orders {dish} gets {base}, tossed with {partner} in the pan, and {last} at the table.",
    "On the card since the first spring: {dish}, {base} under {partner}. The cook adds {last} when the plate is warm.",
    "A {dish} never waits. The {base} goes into the pan when the guests sit down, {partner} follows, then {last}.",
    "New cooks begin with {dish}: {base}, {partner}, {last}, in that order and in no other.",
    "{dish} goes well with a light red. Its {base} carries {partner}, and {last} keeps it fresh.",
]

# Long context: a day's letters in one prompt, and a question about a single one of them.
LETTERS = [
    "{name} would like a table for {guests} on {day} at {time}.",
    "A table for {guests}, {day}, {time}, in the name of {name}, please.",
    "{name} and company, {guests} in all, will be with you on {day} at {time}.",
]
LETTERS_A_DAY = 100


def conversations(count: int, held_out: bool, draw: random.Random) -> Iterator[Row]:
    """Chats of one or two questions, sometimes with thanks at the end."""
    for _ in range(count):
        messages = [{"role": "system", "content": HOUSE}]
        for turn, (answer, questions) in enumerate(draw.sample(ANSWERS, draw.choice([1, 2, 2]))):
            question = questions[-1] if held_out else draw.choice(questions[:-1])
            opening = draw.choice(OPENINGS) if not turn else ""
            messages.append({"role": "user", "content": opening + question})
            messages.append({"role": "assistant", "content": answer})
        if draw.random() < 0.3:
            thanks, reply = draw.choice(THANKS)
            messages += [{"role": "user", "content": thanks}, {"role": "assistant", "content": reply}]
        yield {"messages": messages}


def labelled(count: int, held_out: bool, draw: random.Random) -> Iterator[Row]:
    """Different messages of guests, every label equally often, in mixed order."""
    rows: dict[str, str] = {}
    while len(rows) < count:
        label = list(KINDS)[len(rows) % len(KINDS)]
        wordings = KINDS[label]
        wording = wordings[-1] if held_out else draw.choice(wordings[:-1])
        rows.setdefault(wording.format(**_wish(draw)), label)
    mixed = [{"text": text, "label": label} for text, label in rows.items()]
    draw.shuffle(mixed)
    yield from mixed


def bookings(count: int, held_out: bool, draw: random.Random) -> Iterator[Row]:
    """A wish, the call of the tool, what it found, and the answer."""
    for index in range(count):
        wish = _wish(draw)
        arguments = {"day": wish["day"], "time": wish["time"], "guests": wish["number"]}
        other = draw.choice([time for time in TIMES if time != wish["time"]])
        found = {"free": True} if draw.random() < 0.6 else {"free": False, "next": other}
        said = {key: wish[key] for key in ("day", "time", "guests")}
        answer = (
            "Yes, there is a table for {guests} on {day} at {time}. Shall I book it?".format(**said)
            if found["free"]
            else f"There is nothing free on {wish['day']} at {wish['time']}, but {other} is possible. Book that?"
        )
        call = {"name": "find_table", "arguments": arguments}
        call_id = f"call{index}"
        messages = [
            {"role": "system", "content": ASSISTANT},
            {"role": "user", "content": (WISHES[-1] if held_out else draw.choice(WISHES[:-1])).format(**said)},
            {"role": "assistant", "content": "", "tool_calls": [{"id": call_id, "type": "function", "function": call}]},
            {"role": "tool", "tool_call_id": call_id, "content": json.dumps(found)},
            {"role": "assistant", "content": answer},
        ]
        yield {"messages": messages, "tools": [FIND_TABLE]}


def handbook(draw: random.Random) -> str:
    """Paragraphs on the dishes: each dish is the same everywhere, told in several ways."""
    paragraphs = []
    for dish in DISHES:
        parts = {"dish": dish, "base": draw.choice(BASES), "partner": draw.choice(PARTNERS), "last": draw.choice(LASTS)}
        paragraphs += [manner.format(**parts) for manner in MANNERS]
    draw.shuffle(paragraphs)
    return "\n\n".join(paragraphs) + "\n"


def mailboxes(count: int, draw: random.Random) -> Iterator[Row]:
    """A day's letters, and for when and how many one of the guests wants to come."""
    for _ in range(count):
        senders = draw.sample([f"{name} {surname}" for name in NAMES for surname in SURNAMES], LETTERS_A_DAY)
        wishes = [{**_wish(draw), "name": sender} for sender in senders]
        letters = [draw.choice(LETTERS).format(**wish) for wish in wishes]
        asked = draw.choice(wishes)
        yield {
            "context": "\n".join(letters),
            "question": f"For which day, what time and how many guests does {asked['name']} want a table?",
            "answers": [f"{asked['day']}, {asked['time']}, {asked['guests']}"],
        }


def _wish(draw: random.Random) -> dict[str, Any]:
    number = draw.choice(list(NUMBERS))
    return {
        "name": f"{draw.choice(NAMES)} {draw.choice(SURNAMES)}",
        "day": draw.choice(DAYS),
        "time": draw.choice(TIMES),
        "guests": NUMBERS[number],
        "number": number,
    }


def files() -> dict[str, str]:
    """What each file holds, each from a draw of its own."""
    rows = {
        "chat-train.jsonl": conversations(160, False, _draw("chat-train")),
        "chat-validation.jsonl": conversations(32, True, _draw("chat-validation")),
        "kinds-train.csv": labelled(200, False, _draw("kinds-train")),
        "kinds-validation.csv": labelled(40, True, _draw("kinds-validation")),
        "tools-train.jsonl": bookings(120, False, _draw("tools-train")),
        "tools-validation.jsonl": bookings(24, True, _draw("tools-validation")),
        "mailbox-train.jsonl": mailboxes(16, _draw("mailbox-train")),
        "mailbox-validation.jsonl": mailboxes(4, _draw("mailbox-validation")),
    }
    made = {name: _as_csv(found) if name.endswith(".csv") else _as_jsonl(found) for name, found in rows.items()}
    return {**made, "handbook.txt": handbook(_draw("handbook"))}


def _draw(name: str) -> random.Random:
    return random.Random(f"{SEED} {name}")


def _as_jsonl(rows: Iterator[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _as_csv(rows: Iterator[Row]) -> str:
    lines: list[str] = []
    writer = csv.DictWriter(_Lines(lines), fieldnames=["text", "label"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return "".join(lines)


class _Lines:
    """A file that is a list of lines."""

    def __init__(self, lines: list[str]) -> None:
        self.write = lines.append


def main() -> None:
    """Write all files."""
    for name, content in files().items():
        (FOLDER / name).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
