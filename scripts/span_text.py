"""Stories of who put what where, and the questions that they answer: the text of pretrain_encoder.py and study_span.py.

A story that is asked about tells one fact among sentences that tell none. The kind of the question decides the answer:
a person, a thing or a place. Held-out stories hold words that finetuning never shows, whose kind is known from
pretraining alone.
"""

from __future__ import annotations

import re
from random import Random
from typing import Any, NamedTuple

words = str.split  # a list of words reads best as text

NAMES = words("""
    Anna Ben Clara David Emma Frank Grace Henry Ida Jack Kate Leo Maria Noah Olga Paul Rosa Sam Tina Victor Wanda Yusuf
    Zoe Carl
""")
COLOURS = words("red blue green yellow black white brown purple")
THINGS = words("""
    ball book key lamp cup hat box shoe coat spoon map coin clock brush rope drum kite candle mirror bottle
""")
LOOKS = words("old small large dark quiet narrow new broken")
SITES = {
    "in": words("kitchen garden cellar drawer car shed attic library"),
    "under": words("table bed bridge tree stairs carpet"),
    "behind": words("door sofa curtain fence wall"),
    "on": words("shelf roof bench chair boat"),
}
PLACES = [f"{where} the {{}} {site}" for where, sites in SITES.items() for site in sites]
OTHERS = (
    "It rained all {}.",
    "The sun was warm that {}.",
    "Nobody said a word that {}.",
    "The dog slept all {}.",
    "A bell rang in the {}.",
    "The {} was long and cold.",
    "Everyone was tired that {}.",
    "It was a windy {}.",
)
TIMES = words("morning afternoon evening night day")

TOLD = (
    "{name} put the {thing} {place}.",
    "{name} left the {thing} {place}.",
    "The {thing} was put {place} by {name}.",
)
OPENINGS = (
    "Where did {name} put the {thing}?",
    "Who put the {thing} {place}?",
    "What did {name} put {place}?",
    "Where did {name} put the {thing}? {Place}.",
    "Who put the {thing} {place}? {name}.",
    "What did {name} put {place}? The {thing}.",
    "The {thing} is {place}, where {name} left it.",
    "{name} remembered that the {thing} was {place}.",
)
ASKED = {
    "where": ("Where did {name} put the {thing}?", "{place}"),
    "who": ("Who put the {thing} {place}?", "{name}"),
    "what": ("What did {name} put {place}?", "the {thing}"),
}


def vocabulary() -> list[str]:
    """Every word of the stories and the questions, in lower case."""
    lists = [*NAMES, *COLOURS, *THINGS, *PLACES, *LOOKS, *OTHERS, *TIMES, *TOLD, *OPENINGS]
    asked = [question for question, _ in ASKED.values()]
    return sorted(set(re.findall("[a-z]+", re.sub(r"{\w*}", " ", " ".join([*lists, *asked])).lower())))


class Fact(NamedTuple):
    """Who put what where: 'Anna', 'red ball', 'in the old kitchen'."""

    name: str
    thing: str
    place: str

    def fill(self, template: str) -> str:
        """The template with the fact's words."""
        return template.format(**self._asdict(), Place=self.place.capitalize())


def draw_facts(random: Random, number: int) -> list[Fact]:
    """Facts with a person, a kind of thing and a site each of their own; colours and looks are shared."""
    names, kinds, sites = (random.sample(each, number) for each in (NAMES, THINGS, PLACES))
    things = [f"{random.choice(COLOURS)} {kind}" for kind in kinds]
    places = [site.format(random.choice(LOOKS)) for site in sites]
    return [Fact(*fact) for fact in zip(names, things, places, strict=True)]


def other(random: Random) -> str:
    """A sentence that tells nothing of any thing."""
    return random.choice(OTHERS).format(random.choice(TIMES))


def document(random: Random) -> tuple[str, str]:
    """An opening that asks or tells of one fact or two, and a story that tells these and others.

    Of what the opening is about the story says "the", of all else "a", as one does of what is known and what is new.
    """
    facts = draw_facts(random, random.randint(2, 5))
    known = random.randint(1, 2)
    opening = " ".join(fact.fill(random.choice(OPENINGS)) for fact in facts[:known])
    sentences = [fact.fill(random.choice(TOLD)) for fact in facts]
    sentences[known:] = [one.replace(" the ", " a ").replace("The ", "A ") for one in sentences[known:]]
    sentences += [other(random) for _ in range(random.randint(0, 1))]
    random.shuffle(sentences)
    return opening, " ".join(sentences)


def asked_fact(random: Random, new: bool) -> Fact:
    """A fact of every second person, thing and place: held-out stories hold those that finetuning never shows."""
    half = slice(int(new), None, 2)
    place = random.choice(PLACES[half]).format(random.choice(LOOKS))
    return Fact(random.choice(NAMES[half]), f"{random.choice(COLOURS)} {random.choice(THINGS[half])}", place)


def question_row(random: Random, index: int, new: bool) -> dict[str, Any]:
    """A row as SQuAD has them: a story of one fact among up to 16 other sentences, and a question about the fact.

    new: of the words that finetuning never shows, so that what kind they are of is known from pretraining alone.
    """
    fact = asked_fact(random, new)
    sentence = fact.fill(random.choice(TOLD))
    sentences = [sentence, *(other(random) for _ in range(random.randint(0, 16)))]
    random.shuffle(sentences)
    kind = random.choice(list(ASKED))
    question, answer = map(fact.fill, ASKED[kind])
    context = " ".join(sentences)
    found = re.search(rf"\b{answer}\b", sentence, re.IGNORECASE)
    assert found is not None, "the sentence holds the answer"
    start = context.index(sentence) + found.start()
    answers = {"text": [context[start : start + len(answer)]], "answer_start": [start]}
    return {"id": f"{kind}-{index}", "context": context, "question": question, "answers": answers}
