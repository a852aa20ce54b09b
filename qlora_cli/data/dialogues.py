"""The formats of dialogues that are written as one text, with a mark before every turn.

With a chat template the turns are a conversation. Without one the text is encoded verbatim and each answer is trained
from behind its mark up to the white space before the next one, the last up to the end. (QLoRA trained the human's
turns too: qlora.py, format_dataset; data.train_on gives that.) A human's last turn stays and is not trained.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from qlora_cli.data.conversations import Conversation, Plain, assistant, system, user
from qlora_cli.data.rows import Row, text_of
from qlora_cli.errors import UserError


class Marks(NamedTuple):
    """What stands before a turn: `pattern` matches either mark, its group `answer` the one of the assistant."""

    pattern: re.Pattern[str]
    answer: str


GUANACO = Marks(re.compile("### (?:Human|(?P<answer>Assistant)):"), "### Assistant:")
ANTHROPIC = Marks(re.compile("\n\n(?:Human|(?P<answer>Assistant)):"), "\n\nAssistant:")
OIG = Marks(re.compile("(?:^|\n)<(?:human|(?P<answer>bot))>:"), "\n<bot>:")  # ^: at the beginning of the text alone


def oasst(row: Row, where: str) -> Conversation:
    """{text: "### Human: ...### Assistant: ..."} (timdettmers/openassistant-guanaco), or {input, output} with an input
    that ends in "### Assistant:" (artidoro/qlora, oa_questions.jsonl), of which the output alone is trained.
    """
    if row.get("input") is None or row.get("output") is None:
        return read_dialogue(text_of(row, "text", where), GUANACO, where)
    prompt, output = text_of(row, "input", where), text_of(row, "output", where)
    if not prompt.rstrip().endswith(GUANACO.answer):
        raise UserError(where, f"input does not end with {GUANACO.answer!r}", "set format: input_output")
    turns = read_dialogue(prompt, GUANACO, where).messages[:-1]
    space = "" if prompt[-1:].isspace() or output[:1].isspace() else " "
    trained = (*(False for _ in turns), True)
    return Conversation([*turns, assistant(output)], trained, plain=Plain.of(prompt, space + output))


def hh_rlhf(row: Row, where: str) -> Conversation:
    """{chosen: "\\n\\nHuman: ...\\n\\nAssistant: ...", rejected?} of Anthropic/hh-rlhf; chosen is read, as in QLoRA."""
    return read_dialogue(text_of(row, "chosen", where), ANTHROPIC, where)


def chip2(row: Row, where: str) -> Conversation:
    """{text: "<human>: ...\\n<bot>: ..."} of laion/OIG, unified_chip2.jsonl."""
    return read_dialogue(text_of(row, "text", where), OIG, where)


def read_dialogue(text: str, marks: Marks, where: str) -> Conversation:
    """The turns between the marks, without outer white space; what precedes the first mark is the system's."""
    found = list(marks.pattern.finditer(text))
    if not any(mark["answer"] for mark in found):
        todo = "remove the row, or set the format that its text has"
        raise UserError(where, f"holds no turn of the assistant, which begins with {marks.answer!r}", todo)
    preamble = text[: found[0].start()].strip()
    turns, pieces, begin = [system(preamble)] if preamble else [], [], 0
    for mark, end in zip(found, [*(mark.start() for mark in found[1:]), len(text)], strict=True):
        content = text[mark.end() : end]
        turns.append((assistant if mark["answer"] else user)(content.strip()))
        stop = end if mark is found[-1] else mark.end() + len(content.rstrip())
        if mark["answer"] and (content.strip() or mark is found[-1]):  # an empty answer at the end trains to stop
            pieces += [(text[begin : mark.end()], False), (text[mark.end() : stop], True)]
            begin = stop
    return Conversation(turns, plain=Plain((*pieces, (text[begin:], False))))
