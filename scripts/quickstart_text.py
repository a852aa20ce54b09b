"""The text of the embedded default: little scenes, chats about them, and the record task built on top.

`chats(seed, num_chats)` is the pretraining text of `configs/quickstart/base`: a sentence and questions about
it answered in words, copying, quoting, numbers, days. It holds no JSON record. `record_rows` is the
finetuning task: one sentence in, one JSON record out. Nothing is downloaded, and the same seed gives the same text.

People, things and places of the training text are drawn from lists and, so that the model must read rather than
remember, also invented. The names, things and places called NEW are in no training text of either stage; every
held-out row is about a person of NEW_NAMES.
"""

import json
from dataclasses import dataclass
from random import Random

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}

words = str.split  # a list of words reads best as text

KNOWN_NAMES = words("""
    Adam Agnes Alice Amir Anna Anton Aria Arthur Astrid Aylin Ben Bianca Boris Bruno Camille Carlos Celia Chen Clara
    Daniel Daria David Diego Dora Edgar Elena Elif Emil Emma Erik Esther Eva Farid Felix Fiona Frank Freya Gabriel
    Gita Grace Greta Hana Hannah Hassan Hector Helen Hugo Ida Igor Ines Irene Isaac Ivan Jack Jana Jonas Jorge Julia
    Kai Karin Karl Kenji Kofi Lars Laura Lena Leo Liam Lina Lucia Luis Maja Marco Maria Marta Max Mia Milan Mira
    Nadia Nils Nina Noah Nora Oliver Olga Omar Oscar Paula Pedro Peter Priya Rafael Rania Rosa Ruth Sara Simon Sofia
    Stefan Sven Tanja Tara Teresa Thomas Tim Tom Uma Vera Victor Walter Yara Yusuf Zoe
""")
NEW_NAMES = words("""
    Abel Alma Andrea Aurelio Basil Beatrix Bodil Carmen Casper Dalia Delphine Dmitri Edith Elias Emilia Fatima
    Florian Gideon Gloria Harald Henrik Imani Ismael Jasmin Joachim Katarina Konrad Leonora Linus Lorenzo Magnus
    Malin Manuel Matilda Miriam Naomi Nikolai Odette Osman Pamela Pascal Quentin Ramona Raul Renata Roland Sabine
    Salma Samir Selma Serena Silas Tamar Theodor Ulrich Valentin Viola Wanda Xavier Yolanda
""")
ITEMS = words("""
    apples baskets bells bicycles boats books bottles boxes brushes buckets candles carpets chairs clocks coats cups
    doors drums flags flowers glasses gloves hats kites knives lamps letters maps mirrors pens pillows pipes plates
    pots ribbons ropes shirts shoes spoons stamps stones tables tents tickets tiles toys umbrellas vases wheels
    windows
""")
NEW_ITEMS = words("anchors bananas candies feathers lanterns melons needles parrots saddles trumpets")
COLORS = words("black blue brown golden gray green orange pink purple red silver white yellow")
PLACES = words("""
    Accra Athens Bergen Berlin Bogota Boston Cairo Chicago Cusco Dakar Delhi Dublin Geneva Hanoi Havana Istanbul
    Kyoto Lagos Lima Lisbon London Lyon Madrid Malmo Mumbai Munich Nairobi Naples Oslo Paris Porto Prague Quito Riga
    Rome Seoul Seville Stockholm Sydney Tallinn Tokyo Toronto Tunis Vienna Warsaw Zagreb
""")
NEW_PLACES = words("Antwerp Bucharest Helsinki Marseille Montreal Palermo Salzburg Zurich")
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
NUMBERS = words("""
    two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
    nineteen twenty
""")  # NUMBERS[0] is 2
VERBS = {  # past and participle: plain form
    "bought": "buy", "borrowed": "borrow", "built": "build", "cleaned": "clean", "counted": "count", "found": "find",
    "lost": "lose", "made": "make", "moved": "move", "ordered": "order", "packed": "pack", "painted": "paint",
    "repaired": "repair", "sent": "send", "sold": "sell", "washed": "wash",
}  # fmt: skip
STARTS = ["", *words("b br c ch d dr f g gr h j k kl l m n p pr qu r s sh st t th tr v w y z")]
VOWELS = words("a a e e i i o o u ai ea ia ie io ou y")
CLOSES = [*[""] * 9, *words("d f k l m n nd ng r rn s sk ss st t th x")]
GLYPHS = "äöüßéèñçøåłşğıőčžАБВдеяΑΒΩπλ中文日本語한국어עברעربي€£¥§°±→✓🙂🚀🍎"
ODD_WORDS = words("action color count day item key list name null number place true false value what when where who")
NOT_SAID = "not said"
LONG_ANSWERS = "Answer in a sentence."


@dataclass(frozen=True)
class Scene:
    """Who did what: the facts of one sentence. `color`, `place` and `day` are None where the sentence does not say."""

    who: str
    past: str
    count: str  # as written: "7" or "seven"
    item: str
    color: str | None
    place: str | None
    day: str | None

    @property
    def things(self) -> str:
        """The counted things with their color: "red lamps"."""
        return f"{self.color} {self.item}" if self.color else self.item


def digits(count: str) -> str:
    """Returns "7" for "seven" and for "7"."""
    return count if count.isdigit() else str(NUMBERS.index(count) + 2)


def invented(rng: Random, close: str = "") -> str:
    """A word of one to three syllables that nobody knows, in small letters, ending in `close`."""
    while True:
        num_syllables = rng.choice((1, 2, 2, 2, 3))
        word = "".join(rng.choice(part) for _ in range(num_syllables) for part in (STARTS, VOWELS, CLOSES)) + close
        if 2 < len(word) < 11 and word not in NEW_ITEMS and word.capitalize() not in [*NEW_NAMES, *NEW_PLACES]:
            return word


def random_scene(rng: Random, new: bool = False, listed: float = 0.8) -> Scene:
    """A scene of the training text or, with `new`, one about a person whom no training text knows.

    `listed` is the share of things and places that are on the lists; the others are invented or, with `new`, new.
    """
    if new:
        who, item, place = rng.choice(NEW_NAMES), rng.choice(NEW_ITEMS), rng.choice(NEW_PLACES)
    else:
        who, item, place = invented(rng).capitalize(), invented(rng, "s"), invented(rng).capitalize()
    if not new and rng.random() < 0.5:
        who = rng.choice(KNOWN_NAMES)
    if rng.random() < listed:
        item = rng.choice(ITEMS)
    if rng.random() < listed:
        place = rng.choice(PLACES)
    number = rng.choice(NUMBERS) if rng.random() < 0.5 else str(rng.randint(2, 20 if rng.random() < 0.5 else 99))
    return Scene(
        who=who,
        past=rng.choice(list(VERBS)),
        count=number,
        item=item,
        color=rng.choice(COLORS) if rng.random() < 0.7 else None,
        place=place if rng.random() < 0.8 else None,
        day=rng.choice(DAYS) if rng.random() < 0.75 else None,
    )


def sentence(scene: Scene, rng: Random) -> str:
    """One English sentence that says every fact of the scene; place and day stand before or after the rest."""
    if rng.random() < 0.7:
        core = f"{scene.who} {scene.past} {scene.count} {scene.things}"
    else:
        core = f"{scene.count} {scene.things} were {scene.past} by {scene.who}"
    circumstances = [f"in {scene.place}"] if scene.place else []
    circumstances += [f"on {scene.day}"] if scene.day else []
    rng.shuffle(circumstances)
    cut = rng.choice((0, 0, 1, 2))
    before, after = circumstances[:cut], circumstances[cut:]
    text = (" ".join(before) + ", " if before else "") + " ".join([core, *after]) + "."
    return text[0].upper() + text[1:]


def questions(scene: Scene) -> list[tuple[str, str, str]]:
    """Every question about a scene with its short answer and its answer as a sentence."""
    who, past, item, plain = scene.who, scene.past, scene.item, VERBS[scene.past]
    number, color = digits(scene.count), scene.color or NOT_SAID
    where = f"{past} them in {scene.place}" if scene.place else "does not say"
    when = f"{past} them on {scene.day}" if scene.day else "does not say"
    return [
        (f"Who {past} the {item}?", who, f"{who} {past} the {item}."),
        (f"What did {who} {plain}?", item, f"{who} {past} {item}."),
        (f"How many {item} did {who} {plain}?", scene.count, f"{who} {past} {scene.count} {item}."),
        (f"How many {item}, in digits?", number, f"There were {number} {item}."),
        (f"What color were the {item}?", color, f"They were {color}."),
        (f"Where did {who} {plain} the {item}?", scene.place or NOT_SAID, f"{who} {where}."),
        (f"When did {who} {plain} the {item}?", scene.day or NOT_SAID, f"{who} {when}."),
        (f"What happened to the {item}?", past, f"They were {past} by {who}."),
        (f"What did {who} do?", f"{plain} {item}", f"{who} {past} {scene.count} {scene.things}."),
    ]


def say(*turns: str, system: str = "") -> list[Message]:
    """The turns of user and assistant, one after the other, under a system message where there is one."""
    head = [{"role": "system", "content": system}] if system else []
    return head + [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def story(rng: Random, new: bool = False) -> tuple[str, list[tuple[str, str, str]]]:
    """A sentence, and every question about it in a random order."""
    scene = random_scene(rng, new)
    asked = questions(scene)
    rng.shuffle(asked)
    return sentence(scene, rng), asked


def story_chat(rng: Random) -> list[Message]:
    """A sentence and questions about it, answered shortly, or in sentences where the system message asks for them."""
    text, asked = story(rng)
    style = rng.choice(("", "", "", "Answer shortly.", LONG_ANSWERS))
    turns: list[str] = []
    for question, short, long in asked[: rng.choice((3, 4, 5))]:
        turns += [question, long if style == LONG_ANSWERS else short]
    return say(f"{text} {turns[0]}", *turns[1:], system=style)


def odd_text(rng: Random) -> str:
    """A string that no sentence holds, to be copied: words out of order, punctuation, now and then any script."""
    kind = rng.random()
    if kind < 0.4:
        known = [*ODD_WORDS, *ITEMS, *COLORS, *PLACES, *DAYS, *NUMBERS, *VERBS.values(), *map(str, range(100))]
        chosen = [invented(rng) if rng.random() < 0.5 else rng.choice(known) for _ in range(rng.randint(1, 5))]
        return rng.choice((" ", ", ", ": ", ' "', '" ', '", "', '": "', "/", "-")).join(chosen)
    if kind < 0.9:
        return "".join(chr(rng.randint(33, 126)) for _ in range(rng.randint(1, 8)))
    return "".join(rng.choice(GLYPHS) for _ in range(rng.randint(1, 3)))


def copy_chat(rng: Random) -> list[Message]:
    """Two things to repeat or to put between quotes."""
    turns: list[str] = []
    for _ in range(2):
        text = odd_text(rng) if rng.random() < 0.7 else sentence(random_scene(rng), rng)
        turns += [f"Repeat: {text}", text] if rng.random() < 0.6 else [f"Quote: {text}", f'"{text}"']
    return say(*turns)


def fact_chat(rng: Random) -> list[Message]:
    """What needs no story: numbers in words and digits, the order of days, the plain form of a verb."""
    turns: list[str] = []
    for _ in range(3):
        word, past, day = rng.choice(NUMBERS), rng.choice(list(VERBS)), rng.randrange(7)
        turns += rng.choice((
            (f"Write {word} in digits.", digits(word)),
            (f"Write {digits(word)} in words.", word),
            (f"Which day comes after {DAYS[day]}?", DAYS[(day + 1) % 7]),
            (f"Which day comes before {DAYS[day]}?", DAYS[(day - 1) % 7]),
            (f"Plain form of {past}?", VERBS[past]),
        ))  # fmt: skip
    return say(*turns)


def small_talk(rng: Random) -> list[Message]:
    """A greeting, so that the first thing that anyone types gets an answer."""
    hello = rng.choice(("Hello", "Hello!", "Hi", "Hi!", "Good morning.", "Who are you?", "What can you do?"))
    return say(hello, "I am a very small model. Tell me who did what, and ask me about it.")


def chats(seed: int, num_chats: int) -> list[list[Message]]:
    """The pretraining text: `num_chats` conversations."""
    rng = Random(seed)
    kinds = [story_chat] * 75 + [copy_chat] * 19 + [fact_chat] * 5 + [small_talk]
    return [rng.choice(kinds)(rng) for _ in range(num_chats)]


def heldout_questions(seed: int, num_questions: int) -> list[tuple[list[Message], str]]:
    """Sentences about new people, each with a question and its short answer: what the base can do already."""
    rng = Random(seed)
    drawn = (story(rng, new=True) for _ in range(num_questions))
    return [(say(f"{text} {asked[0][0]}"), asked[0][1]) for text, asked in drawn]


def record(scene: Scene) -> str:
    """The scene as a line of JSON: the plain form of the verb, the count as a number, null for what is not said.

    In the order of the sentence: with the color after the item, half of the seeds learn it too late.
    """
    facts = {"who": scene.who, "action": VERBS[scene.past], "count": int(digits(scene.count)), "color": scene.color}
    return json.dumps(facts | {"item": scene.item, "place": scene.place, "day": scene.day})


def record_rows(seed: int, num_rows: int, new: bool = False) -> list[dict[str, list[Message]]]:
    """Rows of the finetuning task, no sentence twice; with `new`, the held-out ones.

    More words are invented in the training rows than are new in the held-out ones, lest the adapter learn the lists.
    """
    rng, rows = Random(seed), {}
    while len(rows) < num_rows:
        scene = random_scene(rng, new, listed=0.8 if new else 0.4)
        text = sentence(scene, rng)
        rows.setdefault(text, {"messages": say(f"Record: {text}", record(scene))})
    return list(rows.values())
