"""Stories of who put what where, and the questions that they answer: the text of pretrain_encoder.py and study_span.py.

Pairs of a person and a kind of thing are either told or new: a story holds only pairs of one of the two, so that what
is asked about new ones cannot have been learnt by heart.
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
REPEATED = (
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
    lists = [*NAMES, *COLOURS, *THINGS, *PLACES, *LOOKS, *OTHERS, *TIMES, *TOLD, *REPEATED]
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


def is_new(name: str, thing: str) -> bool:
    """Whether the pair is kept for held-out stories: one in five."""
    return (NAMES.index(name) + 2 * THINGS.index(thing)) % 5 == 0


def draw_facts(random: Random, number: int, new: bool) -> list[Fact]:
    """Facts that can be mistaken for each other: few names, kinds of things and places, no thing twice, no place."""
    few = max(2, number // 2)
    names = random.sample(NAMES, few)
    kinds = [kind for kind in THINGS if any(is_new(name, kind) == new for name in names)]
    kinds = random.sample(kinds, min(few, len(kinds)))
    pairs = [(name, kind) for name in names for kind in kinds if is_new(name, kind) == new]
    things = random.sample([f"{colour} {kind}" for colour in COLOURS for kind in kinds], number)
    sites = random.sample(PLACES, few)
    places = random.sample([site.format(look) for site in sites for look in LOOKS], number)
    owners = [random.choice([name for name, kind in pairs if kind == thing.split()[1]]) for thing in things]
    return [Fact(*fact) for fact in zip(owners, things, places, strict=True)]


def other(random: Random) -> str:
    """A sentence that tells nothing of any thing."""
    return random.choice(OTHERS).format(random.choice(TIMES))


def document(random: Random) -> list[str]:
    """The sentences of a text in which most facts are told and some are repeated in other words, in any order."""
    facts = draw_facts(random, random.randint(2, 4), new=False)
    sentences = [fact.fill(random.choice(TOLD)) for fact in facts]
    sentences += [random.choice(facts).fill(random.choice(REPEATED)) for _ in range(random.randint(2, 3))]
    sentences += [other(random) for _ in range(random.randint(0, 1))]
    random.shuffle(sentences)
    return sentences


def question_row(random: Random, index: int, new: bool) -> dict[str, Any]:
    """A row as SQuAD has them: a story of 3 to 14 facts and some other sentences, and a question about one fact."""
    facts = draw_facts(random, random.randint(3, 14), new)
    told = [(fact, fact.fill(random.choice(TOLD))) for fact in facts]
    sentences = [sentence for _, sentence in told] + [other(random) for _ in range(random.randint(0, 3))]
    random.shuffle(sentences)
    fact, sentence = random.choice(told)
    kind = random.choice(list(ASKED))
    question, answer = map(fact.fill, ASKED[kind])
    context = " ".join(sentences)
    start = context.index(sentence) + sentence.lower().index(answer.lower())
    text = context[start : start + len(answer)]
    answers = {"text": [text], "answer_start": [start]}
    return {"id": f"{kind}-{index}", "context": context, "question": question, "answers": answers}
