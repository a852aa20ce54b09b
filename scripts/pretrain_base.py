"""Make the embedded default: pretrain `configs/quickstart/base`, and write the rows of the task finetuned on top.

    OMP_NUM_THREADS=2 python scripts/pretrain_base.py              # 10 minutes on 2 shared cores
    OMP_NUM_THREADS=2 python scripts/pretrain_base.py --check      # again, and compare with the files that are here
    python scripts/pretrain_base.py --check --text-only            # tokenizer and rows only: 15 seconds

A Llama of 0.98 M weights reads 83,200 generated chats (5.9 M tokens) once. On the same kind of processor with the
same number of threads the bytes repeat; another processor adds in another order and gives other weights as good.
"""

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch
from quickstart_text import Message, chats, heldout_questions, record_rows
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HOME = Path(__file__).resolve().parent.parent / "configs" / "quickstart"
SPECIALS = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
PAD, END, ASSISTANT = 0, 1, 4  # their ids
VOCAB_SIZE = 1024
NUM_STEPS, BATCH_SIZE, LEARNING_RATE = 2600, 32, 3e-3
USER_WEIGHT = 0.1  # of a token the user says: enough to learn the language, too little to drown the answers
NUM_TRAIN_ROWS, NUM_HELDOUT_ROWS = 2400, 200
CHATS_SEED, TRAIN_SEED, HELDOUT_SEED, QUESTIONS_SEED, MODEL_SEED = range(5)

# Qwen2's: words with the space before them, digits one by one. Converters (GGUF among them) know it.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = """\
{%- for message in messages %}
    {%- if message['role'] not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('unknown role ' + message['role'] + ': this template knows system, user and assistant') }}
    {%- endif %}
    {{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""
Row = tuple[list[int], list[float]]  # token ids, and how much each token weighs in the loss


def train_tokenizer(conversations: list[list[Message]]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCAB_SIZE` pieces: every input has a spelling, every piece a row of the embedding."""
    core = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([message["content"] for chat in conversations for message in chat], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=SPECIALS[PAD],
        eos_token=SPECIALS[END],
        additional_special_tokens=SPECIALS[2:],
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerFast, conversations: list[list[Message]]) -> list[Row]:
    """Token ids and loss weights: 1 for what the assistant says, end of turn included, `USER_WEIGHT` for the rest."""
    texts = ["".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in chat) for chat in conversations]
    rows = []
    for encoding in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False):
        weights, weight = [], USER_WEIGHT
        for token in encoding.ids:
            weights.append(weight)
            weight = 1.0 if token == ASSISTANT else USER_WEIGHT if token == END else weight
        rows.append((encoding.ids, weights))
    return rows


def batches(rows: list[Row]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Ids (B, T) int64 and weights (B, T) float32, padded at the end; of every 16 batches, like lengths together."""
    for start in range(0, len(rows), 16 * BATCH_SIZE):
        pool = sorted(rows[start : start + 16 * BATCH_SIZE], key=lambda row: len(row[0]))
        groups = [pool[i : i + BATCH_SIZE] for i in range(0, len(pool), BATCH_SIZE)]
        Random(start).shuffle(groups)
        for group in groups:
            width = -(-len(group[-1][0]) // 16) * 16  # few widths: every new one costs oneDNN a compilation
            ids = [row[0] + [PAD] * (width - len(row[0])) for row in group]
            weights = [row[1] + [0.0] * (width - len(row[1])) for row in group]
            yield torch.tensor(ids), torch.tensor(weights)


def new_model() -> LlamaForCausalLM:
    """The untrained Llama, float32. Widths are multiples of 64, the block of NF4."""
    torch.manual_seed(MODEL_SEED)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(config)


def build_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the rest: in a trial 3.1 nats after 100 steps for 3.5."""
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    outer = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(inner, lr=LEARNING_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(outer, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)]


def rate(step: int) -> float:
    """The learning rate of a step: up over 40 steps, down in a straight line over the last 40%."""
    return LEARNING_RATE * min(1.0, (step + 1) / 40, (NUM_STEPS - step) / (0.4 * NUM_STEPS))


def pretrain(model: LlamaForCausalLM, rows: list[Row]) -> None:
    """One pass over the rows, in bfloat16 over float32 weights."""
    optimizers, started = build_optimizers(model), time.time()
    model.train()
    for step, (ids, weights) in enumerate(batches(rows)):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        logits, labels, weights = logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), weights[:, 1:].flatten()
        losses = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
        loss = (losses * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            nats, seconds = losses[weights == 1].mean().item(), time.time() - started
            print(f"step {step + 1}/{NUM_STEPS}  answers {nats:.4f} nats a token  {seconds:.0f} s", flush=True)


@torch.no_grad()
def answers(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[list[Message]]) -> list[str]:
    """The greedy answer to each conversation, all of them in one batch padded at the start."""
    model.eval()
    texts = [tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) for prompt in prompts]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    out = model.generate(
        input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=80, do_sample=False
    )
    return tokenizer.batch_decode(out[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def write_json(path: Path, value: object) -> None:
    """`value` as indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_text(home: Path) -> tuple[PreTrainedTokenizerFast, list[list[Message]]]:
    """Write everything but the weights; returns the tokenizer and the pretraining text."""
    conversations = chats(CHATS_SEED, NUM_STEPS * BATCH_SIZE)
    tokenizer = train_tokenizer(conversations[:20000])
    tokenizer.save_pretrained(home / "base")
    settings = json.loads((home / "base" / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that older readers know too
    write_json(home / "base" / "tokenizer_config.json", settings)
    for name, rows in {
        "train.jsonl": record_rows(TRAIN_SEED, NUM_TRAIN_ROWS),
        "heldout.jsonl": record_rows(HELDOUT_SEED, NUM_HELDOUT_ROWS, new=True),
    }.items():
        (home / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tokenizer, conversations


def make(home: Path, text_only: bool) -> None:
    """Write the embedded default to the folder `home`."""
    (home / "base").mkdir(parents=True, exist_ok=True)
    tokenizer, conversations = write_text(home)
    if text_only:
        return
    model = new_model()
    print(f"{sum(p.numel() for p in model.parameters()):,} weights, {torch.get_num_threads()} threads", flush=True)
    pretrain(model, encode(tokenizer, conversations))
    model.to(torch.bfloat16).save_pretrained(home / "base")
    write_json(home / "base" / "generation_config.json", {"eos_token_id": END, "pad_token_id": PAD})
    prompts, expected = zip(*heldout_questions(QUESTIONS_SEED, 300), strict=True)
    right = sum(a == b for a, b in zip(answers(model, tokenizer, list(prompts)), expected, strict=True))
    print(f"held-out questions answered: {right} of {len(expected)}")


def main() -> int:
    """Make the files, or with --check make them elsewhere and compare; returns 1 where one differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing here: compare with the files that are here")
    parser.add_argument("--text-only", action="store_true", help="tokenizer and rows, no weights")
    parser.add_argument("--out", type=Path, default=HOME, help="folder to write to (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) if args.check else args.out
        make(made, args.text_only)
        different = 0
        for path in sorted(p for p in made.rglob("*") if p.is_file() and p.name != "README.md"):
            here = args.out / path.relative_to(made)
            same = here.is_file() and here.read_bytes() == path.read_bytes()
            different += not same
            print(hashlib.sha256(path.read_bytes()).hexdigest(), here.relative_to(args.out), "" if same else "DIFFERS")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
