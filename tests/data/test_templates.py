"""Every chat template of shared/data: the trained tokens are the answers and their stop tokens, or a reason is given.

The check is independent of how spans are found: every message has a text of its own, and the trained tokens, decoded,
must be exactly the answers with what the template is known to write around them.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from qlora_cli.data.chat import Chat, load_chat, render_row
from qlora_cli.data.encode import IGNORE_INDEX, encode, encode_prompt
from qlora_cli.data.formats import Conversation, Message, assistant, user
from qlora_cli.errors import UserError

SHARED = Path(__file__).parents[3] / "shared/data"
TEMPLATES = sorted(SHARED.glob("templates/*/*.jinja")) + sorted(SHARED.glob("templates/*/chat_templates/*.jinja"))
TOKENIZERS = {
    "smollm2": SHARED / "tokenizers/smollm2-135m-instruct/tokenizer.json",
    "gpt2": SHARED / "tokenizers/gpt2/tokenizer.json",
    "tinystories": SHARED / "weights/tinystories-656k-hf/tokenizer.json",
    "stories": SHARED / "weights/stories260k-hf/tokenizer.json",
}
pytestmark = pytest.mark.skipif(not TEMPLATES, reason=f"no templates in {SHARED}")

SYSTEM: Message = {"role": "system", "content": "Rules alpha"}
TURNS = [user("Asks beta"), assistant("Says gamma"), user("Asks delta"), assistant("Says epsilon")]
CONVERSATIONS = {
    "one turn": TURNS[:2],
    "with a system text": [SYSTEM, *TURNS[:2]],
    "two turns": TURNS,
    "two turns with a system text": [SYSTEM, *TURNS],
    "white space outside": [user("  Asks beta\n"), assistant("\n Says gamma \n\n")],
    "emoji": [user("Asks beta 🤗"), assistant("Says gamma 👩‍👩‍👧 é")],
    "equal texts": [user("yes"), assistant("yes"), user("yes"), assistant("yes")],
    "empty texts": [user(""), assistant("")],
}
STOPS = (
    *("</s>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|END_OF_TURN_TOKEN|>", "<|eot|>", "<turn|>"),
    *("[|endofturn|]", "<|end_of_text|>", "<|endoftext|>", "<｜end▁of▁sentence｜>", "<|end_of_turn|>"),
)
BEFORE = ("</think>", "<|START_RESPONSE|>")  # what a template writes between its generation prompt and the text
AFTER = ("<|END_RESPONSE|>",)  # and between the text and the stop token
NO_STOP = {"jamba", "llava", "amberchat", "chatqa", "falcon-instruct", "solar-instruct"}
OTHER_PROMPT = {"gemma4", "gemma4_unified"}  # they need enable_thinking


def template_text(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    indented = "chujiezheng" in str(path) and path.stem not in ("qwen2.5-instruct", "granite-3.0-instruct")
    return text.replace("    ", "").replace("\n", "") if indented else text


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    path = TOKENIZERS[request.param]
    if not path.exists():
        pytest.skip(f"no {path}")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path), bos_token="<s>", eos_token="</s>")
    headers = ["<|im_start|>", "<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>"]
    tokenizer.add_special_tokens({"additional_special_tokens": [*STOPS, *headers]})
    return tokenizer


def chat_of(path: Path, tokenizer: PreTrainedTokenizerFast) -> Chat:
    tokenizer.chat_template = template_text(path)
    return load_chat(None, tokenizer, frozenset(tokenizer.convert_tokens_to_ids(list(STOPS))))


def answers_in(run: list[int], chat: Chat) -> list[str]:
    """The texts of a run of trained tokens: one for each stop token, without what the template writes around them."""
    ends = [at for at, token in enumerate(run) if token in chat.stops.values()]
    assert ends, "an answer without its stop token"
    assert ends[-1] == len(run) - 1
    texts = []
    for begin, end in zip([0, *(end + 1 for end in ends)], ends, strict=False):
        text = chat.tokenizer.decode(run[begin:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for written in BEFORE:
            text = text.removeprefix(written)
        for written in AFTER:
            text = text.removesuffix(written)
        texts.append(text.strip())
    return texts


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: f"{path.parts[-2]}/{path.stem}")
def test_a_template_is_proven_or_refused(path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    chat = chat_of(path, tokenizer)
    proven, reasons = set(), []
    for name, messages in CONVERSATIONS.items():
        try:
            (example,) = encode([render_row(Conversation(messages), chat, "data.jsonl:7")], chat)
        except UserError as error:
            reasons.append(str(error))
            continue
        proven.add(name)
        runs = [list(run) for kept, run in groupby(example.labels, IGNORE_INDEX.__ne__) if kept]
        found = [text for run in runs for text in answers_in(run, chat)]
        expected = [message["content"].strip() for message in messages if message["role"] == "assistant"]
        assert found == expected or "<unk>" in found[0], name  # tinystories' vocabulary has no emoji
        first = [message["role"] for message in messages].index("assistant")
        assert encode_prompt(messages[:first], chat) == example.input_ids[: example.num_prompt]
    assert all(reason.startswith("data.jsonl:7: the tokenizer's chat template ") for reason in reasons)
    assert ("one turn" in proven) == (path.stem not in NO_STOP | OTHER_PROMPT)
    if path.stem in NO_STOP | OTHER_PROMPT:
        assert not proven


@pytest.mark.parametrize("stem", ["chatml", "llama3", "gemma3", "phi_3", "mistral_v1", "deepseek_v3", "command_a"])
def test_the_known_templates_prove_every_kind_of_conversation(stem: str, tokenizer: PreTrainedTokenizerFast) -> None:
    (path,) = [path for path in TEMPLATES if path.stem == stem and "axolotl" in path.parts]
    chat = chat_of(path, tokenizer)
    for messages in CONVERSATIONS.values():
        assert render_row(Conversation(messages), chat, "").spans
