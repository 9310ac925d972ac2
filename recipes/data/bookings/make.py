"""Write the bookings data set: short messages of restaurant guests, and each as one line of JSON.

A seeded generator builds the messages from parts, so the files are reproducible bit for bit. Validation messages use
names and remarks that no training message has, and half of them a sentence that none has either.

The same messages, one question about each, are a question-answering data set.

    python make.py        writes train.jsonl, validation.jsonl and both for questions beside this file
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SEED = 20
TRAIN_ROWS = 224
HELD_OUT_ROWS = 48
SYSTEM = "Extract the booking as JSON with the keys name, day, time, guests."

Conversation = dict[str, list[dict[str, str]]]


@dataclass(frozen=True)
class Parts:
    """Parts of messages; `{name}`, `{day}`, `{time}` and `{guests}` are filled in."""

    first_names: list[str]
    last_names: list[str]
    sentences: list[str]
    remarks: list[str]


def words(text: str) -> list[str]:
    """The words of a text, so that long lists of names stay readable."""
    return text.split()


TRAIN = Parts(
    first_names=words(
        "Abel Adele Ahmed Aisha Alba Anders Anton Arjun Astrid Aylin Bea Boris Brigid Bruno Callum Casper Cecilia "
        "Chidi Chloé Clara Dalia Daniel Darius Diego Dora Edith Elena Elif Erik Esther Ethan Ewa Fatima Femi Finn "
        "Freya Gabriel Gemma Goran Greta Gustav Hana Harriet Hedda Henry Hugo Ida Imran Ines Isaac Ivan Jaya Joanna "
        "Jonas José Judith Jun Kamal Karim Katya Kenji Kofi Lars Laura Leila Leo Lotte Lucia Magnus Malik Marco Maria "
        "Martha Mei Milan Minh Miriam Nadia Neil Nils Nina Olga Omar Oscar Otto Paul Petra Pierre Priya Quentin Ravi "
        "Rosa Ruben Ruth Samir Samuel Selma Simon Stella Sven Tara Theo Tilda Tom Tuan Ugo Ursula Vera Viktor Vivian "
        "Wanda Wei William Xenia Yann Yasmin Yuki Yusuf Zainab Zoë"
    ),
    last_names=words(
        "Abbott Adeyemi Ali Baker Berg Bianchi Carter Castillo Castro Chen Costa Demir Dorsey Dubois Duarte Ekman "
        "Evans Farouk Fischer Fontana Garcia Gupta Haddad Hansen Horvat Hughes Ito Ivanov Jansen Jensen Keller Khan "
        "Kowalski Kruger Larsson Lee Lind Lopes Marino Meyer Moreau Moyo Murphy Müller Navarro Nguyen Novak O'Brien "
        "Okafor Olsen Park Patel Petrov Peña Popov Rahman Reyes Rossi Sato Sharma Silva Singh Stone Takeda Tanaka "
        "Taylor Torres Ueda Usman Varga Virtanen Weber Wong Wright Yilmaz Young Zhou Zimmer"
    ),
    sentences=[
        "This is {name}, could we have a table for {guests} on {day} at {time}?",
        "Hi, I'd like to book for {guests} people, {day} {time}, under the name {name}.",
        "Good morning! {name} here. Is there room for {guests} of us this {day} around {time}?",
        "Please reserve a table on {day}, {time}, for {guests}. My name is {name}.",
        "We are {guests} and would love to come at {time} on {day}. Name: {name}.",
        "A table for {guests} at {time} please, on {day}. It's for {name}.",
        "Hello, could you put {name} down for {day}? We'd be {guests}, arriving at {time}.",
        "{day} at {time}, {guests} guests, the booking goes on {name}.",
        "My boss {name} wants to eat with you on {day}, {guests} in the party, and {time} would be perfect.",
        "Do you still have something free on {day} at {time}? There are {guests} of us. Thanks, {name}",
        "I'm calling for {name}: {guests} seats, {time}, on {day}.",
        "Can {name} get a table at {time}? It would be for {guests}, this coming {day}.",
        "Booking request from {name}. Day: {day}. Time: {time}. Number of guests: {guests}.",
        "We'd like to celebrate with you on {day}; the {guests} of us come at {time}. Write it down as {name}.",
        "Hey there, {guests} hungry people would show up {day} at {time}. {name} is the name.",
        "For {day} I need a table for {guests}. We have a meeting before, so {time} please. Regards, {name}",
        "yo, table for {guests} on {day}, {time}? cheers, {name}",
        "Dear team, our client {name} will dine with you on {day} at {time}, a group of {guests}.",
        "At {time} on {day} the {guests} of us would be at your door. I'm {name}.",
        "{name}, {guests} persons, {day}, {time}. Please confirm.",
        "My friends and I make {guests}. Can we come by {day} at {time}? You can call me {name}.",
        "Is {time} still possible on {day}? I would need {guests} seats, and my name is {name}.",
        "Sorry to write so late! {name} again, we need {guests} places on {day} at {time}.",
        "I promised my mother a treat on {day}. Make it {time}, {guests} of us, booked as {name}, please.",
        "{guests} adults on {day}, {time}. Reservation name {name}. Thank you!",
        "Would you keep a corner for {guests}? {day}, {time}, and the name to note is {name}.",
        "We are a club and meet on {day}. Expect {guests} members at {time}; {name} pays the bill.",
        "From: {name}. Hello, may we come on {day}, at about {time}? We would be {guests}.",
        "Let me have your nicest table at {time}, {day}, for {guests}, name of {name}.",
        "Just the {guests} of us this time, {name} speaking, {day} at {time} as discussed.",
        "{name} asks for a table on {day}: {guests} covers, {time} sharp.",
        "We land on {day} and will be starving by {time}, {guests} travellers. Look for {name}.",
    ],
    remarks=[
        "One of us is vegetarian.",
        "By the window if you can.",
        "Last time the soup was wonderful.",
        "We'll bring a dog.",
        "No need to call back.",
        "It's a birthday, so maybe a candle?",
        "My number ends in 47.",
        "We came with 12 colleagues in May and loved it.",
        "Is the terrace open?",
        "We have to leave after 2 hours.",
        "Sunday was full, sadly.",
        "Our train gets in at 11:40.",
        "Anton at the bar knows us.",
        "Two high chairs would help.",
        "We can't do Thursday.",
    ],
)

HELD_OUT = Parts(
    first_names=words(
        "Noah Amara Hiroshi Sofia Liam Zara Emil Carmen Rahul Ingrid Mateo Yara Felix Nora Søren Thandi Anh Pilar"
    ),
    last_names=words(
        "Brandt Mensah Suzuki Ferrari Walsh Aziz Holm Vega Kapoor Dahl Ortiz Nasser Vogel Quinn Núñez Pham Dlamini "
        "Bauer"
    ),
    sentences=[
        "Would {time} on {day} work for {guests}? The name's {name}.",
        "{name} would like to join you for a meal on {day}, a party of {guests}, at {time}.",
        "Save us a spot: {guests} people, {time}, {day}. Ask for {name} if anything changes.",
        "On {day} my family and I, {guests} in total, want to eat at your place at {time}. {name}",
        "Table wanted! {day}, {time}, {guests} chairs, for {name}.",
        "It's {name} again. Same as always, {guests} of us, but this time on {day} at {time}.",
        "Any chance of squeezing in {guests} on {day}? {time} suits us best. Many thanks, {name}",
        "Greetings from {name}! Our {day} plan: arrive at {time}, {guests} heads, lots of pasta.",
        "I hope you are open on {day}, because {guests} of us plan to visit at {time}. {name} is who booked.",
        "Kindly note a reservation in the name of {name} for {guests} diners, {time}, {day}.",
        "After the concert on {day} we want something warm, {time}, all {guests} of us. Sign it {name}.",
        "The usual table please, it's {name}: {day}, {guests} plates, {time}.",
    ],
    remarks=[
        "Somewhere quiet would be nice.",
        "We parked at number 9 last time.",
        "See you soon!",
        "My aunt can't eat nuts.",
        "On Tuesday nobody picked up.",
        "Robin told us about you.",
    ],
)

QUESTIONS = {
    "name": ["Under what name is the booking?", "Who is the table for?", "What is the guest called?"],
    "day": ["On which day do they want to come?", "Which day of the week is it for?", "What day is asked for?"],
    "time": ["At what time will they arrive?", "When should the table be ready?", "What time is asked for?"],
    "guests": ["How many guests are there?", "For how many people is the table?", "How large is the party?"],
}
"""For each key of a booking, ways to ask for it; the last one is asked of validation messages only."""

REMARKED = 0.6  # of the messages end with a remark
SHORT_DAYS = 0.15  # of the messages write the day with three letters

DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight", 9: "nine"}
HOURS = [12, 13, 17, 18, 19, 20, 21]


def time_of_day(draw: random.Random) -> tuple[str, str]:
    """A time as a guest writes it, and as `HH:MM`."""
    hour, minute = draw.choice(HOURS), draw.choice([0, 15, 30, 45])
    separator = draw.choice([":", ":", ".", "h"])
    return f"{hour}{separator}{minute:02}", f"{hour}:{minute:02}"


def conversation(sentence: str, parts: Parts, draw: random.Random) -> Conversation:
    """What is asked for, the guest's message, the JSON."""
    name = f"{draw.choice(parts.first_names)} {draw.choice(parts.last_names)}"
    day, guests = draw.choice(DAYS), draw.choice(list(NUMBERS))
    written_time, time = time_of_day(draw)
    message = sentence.format(
        name=name,
        day=day[:3] if draw.random() < SHORT_DAYS else day,
        time=written_time,
        guests=draw.choice([str(guests), NUMBERS[guests]]),
    )
    message = message[0].upper() + message[1:]
    if draw.random() < REMARKED:
        stop = "" if message[-1] in ".!?" else "."
        message += f"{stop} {draw.choice([remark for remark in parts.remarks if day not in remark])}"
    booking = {"name": name, "day": day, "time": time, "guests": guests}
    return {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": message},
            {"role": "assistant", "content": json.dumps(booking, ensure_ascii=False)},
        ]
    }


def conversations(count: int, sentences: list[str], parts: Parts, draw: random.Random) -> list[Conversation]:
    """That many conversations with different messages, which use the sentences equally often, in mixed order."""
    rows: dict[str, Conversation] = {}
    while len(rows) < count:
        row = conversation(sentences[len(rows) % len(sentences)], parts, draw)
        rows.setdefault(row["messages"][1]["content"], row)
    mixed = list(rows.values())
    draw.shuffle(mixed)
    return mixed


def question(row: Conversation, asked: slice, draw: random.Random) -> dict[str, str | list[str]]:
    """A question about the guest's message of a conversation, asked in one of the ways that `asked` picks."""
    _, message, answer = (turn["content"] for turn in row["messages"])
    key, value = draw.choice(list(json.loads(answer).items()))
    return {"context": message, "question": draw.choice(QUESTIONS[key][asked]), "answers": [str(value)]}


def main() -> None:
    """Write all files."""
    draw = random.Random(SEED)
    known, new = draw.sample(TRAIN.sentences, HELD_OUT_ROWS // 2), HELD_OUT.sentences
    held_out_sentences = [sentence for pair in zip(known, new + new, strict=True) for sentence in pair]
    train = conversations(TRAIN_ROWS, TRAIN.sentences, TRAIN, draw)
    held_out = conversations(HELD_OUT_ROWS, held_out_sentences, HELD_OUT, draw)
    files: dict[str, Sequence[Mapping[str, object]]] = {
        "train.jsonl": train,
        "validation.jsonl": held_out,
        "questions-train.jsonl": [question(row, slice(2), draw) for row in train],
        "questions-validation.jsonl": [question(row, slice(2, None), draw) for row in held_out],
    }
    for file, rows in files.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        Path(__file__).with_name(file).write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
