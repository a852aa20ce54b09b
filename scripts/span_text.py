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


def kinds_of_words() -> list[list[str]]:
    """The vocabulary in groups of words that can stand for each other; the last holds all others."""
    groups = [NAMES, COLOURS, THINGS, LOOKS, *SITES.values(), [*SITES], TIMES, ["a", "the"]]
    groups = [sorted(word.lower() for word in group) for group in groups]
    return [*groups, sorted(set(vocabulary()) - {word for group in groups for word in group})]


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
    """Facts with a person, a kind of thing and a site each of their own; colours and looks are shared."""
    kinds = random.sample(THINGS, number)
    sites = random.sample(PLACES, number)
    names: list[str] = []
    for kind in kinds:
        names.append(random.choice([name for name in NAMES if is_new(name, kind) == new and name not in names]))
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
    facts = draw_facts(random, random.randint(2, 5), new=False)
    known = random.randint(1, 2)
    opening = " ".join(fact.fill(random.choice(OPENINGS)) for fact in facts[:known])
    sentences = [fact.fill(random.choice(TOLD)) for fact in facts]
    sentences[known:] = [one.replace(" the ", " a ").replace("The ", "A ") for one in sentences[known:]]
    sentences += [other(random) for _ in range(random.randint(0, 1))]
    random.shuffle(sentences)
    return opening, " ".join(sentences)


def question_row(random: Random, index: int, new: bool) -> dict[str, Any]:
    """A row as SQuAD has them: a story of 1 to 10 facts and some other sentences, and a question about one fact."""
    facts = draw_facts(random, random.randint(1, 10), new)
    told = [(fact, fact.fill(random.choice(TOLD))) for fact in facts]
    sentences = [sentence for _, sentence in told] + [other(random) for _ in range(random.randint(0, 3))]
    random.shuffle(sentences)
    fact, sentence = random.choice(told)
    kind = random.choice(list(ASKED))
    question, answer = map(fact.fill, ASKED[kind])
    context = " ".join(sentences)
    found = re.search(rf"\b{answer}\b", sentence, re.IGNORECASE)
    assert found is not None, "the sentence holds the answer"
    start = context.index(sentence) + found.start()
    text = context[start : start + len(answer)]
    answers = {"text": [text], "answer_start": [start]}
    return {"id": f"{kind}-{index}", "context": context, "question": question, "answers": answers}
