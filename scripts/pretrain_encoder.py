"""Pretrain a small BERT on masked words of generated stories: the base of scripts/study_span.py.

    OMP_NUM_THREADS=2 python scripts/pretrain_encoder.py OUT [--steps 400]

OUT becomes a folder as `BertForMaskedLM.save_pretrained` writes it, with a WordPiece tokenizer of the stories' words
and of single letters. 15% of the words are to be guessed: of these 80% stand as [MASK], 10% as another word and 10% as
they are (Devlin et al. 2019, section 3.1).
"""

from __future__ import annotations

import argparse
import string
import time
from pathlib import Path
from random import Random

import torch
from span_text import document, vocabulary
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
MASK = SPECIALS.index("[MASK]")
NUM_STEPS, BATCH_SIZE, LEARNING_RATE = 400, 48, 4e-3
MAX_LENGTH = 128
MASKED, AS_MASK, AS_ANOTHER = 0.15, 0.8, 0.1
TEXT_SEED, HELDOUT_SEED, MODEL_SEED = range(3)


def new_tokenizer() -> PreTrainedTokenizerFast:
    """BERT's, lower-cased: each word of the stories is a piece; other words are spelled in letters."""
    letters = [*string.ascii_lowercase, *string.digits]
    words = [word for word in vocabulary() if len(word) > 1]
    pieces = [*SPECIALS, *string.punctuation, *letters, *(f"##{letter}" for letter in letters), *words]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    core = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    special = [(name, vocab[name]) for name in ("[CLS]", "[SEP]")]
    core.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", special)
    names = {f"{name[1:-1].lower()}_token": name for name in SPECIALS}
    reads = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=MAX_LENGTH, model_input_names=reads, **names)


def new_model(vocab_size: int) -> BertForMaskedLM:
    """The untrained BERT, float32. Widths are multiples of 64, the block of NF4."""
    torch.manual_seed(MODEL_SEED)
    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertForMaskedLM(config)
    # sinusoids (Vaswani et al. 2017), then trained on: so few steps do not teach random ones what stands side by side
    at = torch.arange(MAX_LENGTH).unsqueeze(1) * 1e4 ** (-torch.arange(0, 1, 2 / config.hidden_size))
    waves = torch.cat([at.sin(), at.cos()], dim=1)
    model.bert.embeddings.position_embeddings.weight.data = waves * (config.initializer_range / waves.std())
    return model


def read_batch(tokenizer: PreTrainedTokenizerFast, random: Random) -> dict[str, Tensor]:
    """input_ids, token_type_ids and attention_mask (B, T): openings, each with its story."""
    pairs = [document(random) for _ in range(BATCH_SIZE)]
    options = {"padding": True, "pad_to_multiple_of": 16, "truncation": True, "max_length": MAX_LENGTH}
    return dict(tokenizer(pairs, return_tensors="pt", **options))


class Masking:
    """Hides words of a batch."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.generator, self.num_words = torch.Generator().manual_seed(seed), len(tokenizer)

    def hide(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The ids with hidden words, and where words are to be guessed: (B, T) int64 and bool."""
        draws, kinds = (torch.rand(ids.shape, generator=self.generator) for _ in range(2))
        chosen = (draws < MASKED) & (ids >= len(SPECIALS))
        another = torch.randint(len(SPECIALS), self.num_words, ids.shape, generator=self.generator)
        hidden = torch.where(kinds < AS_MASK, MASK, torch.where(kinds < AS_MASK + AS_ANOTHER, another, ids))
        return torch.where(chosen, hidden, ids), chosen


def guesses(model: BertForMaskedLM, batch: dict[str, Tensor], masking: Masking) -> tuple[Tensor, Tensor]:
    """Logits (N, V) of the masked words of a batch, and the words (N,). The head sees no other positions."""
    ids = batch["input_ids"]
    hidden, chosen = masking.hide(ids)
    with torch.autocast("cpu", torch.bfloat16):
        states = model.bert(**{**batch, "input_ids": hidden}).last_hidden_state
        return model.cls(states[chosen]).float(), ids[chosen]


def build_optimizers(model: BertForMaskedLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the rest, as scripts/pretrain_base.py."""
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layer." in name]
    outer = [p for name, p in model.named_parameters() if p.ndim != 2 or ".layer." not in name]
    muon = torch.optim.Muon(inner, lr=LEARNING_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(outer, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)]


def pretrain(model: BertForMaskedLM, tokenizer: PreTrainedTokenizerFast, num_steps: int) -> None:
    """Reads `num_steps` batches of new stories; the rate rises over 40 steps and falls over the last half."""
    optimizers, started = build_optimizers(model), time.perf_counter()
    random, masking = Random(TEXT_SEED), Masking(tokenizer, TEXT_SEED)
    model.train()
    for step in range(num_steps):
        logits, words = guesses(model, read_batch(tokenizer, random), masking)
        loss = cross_entropy(logits, words)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 40, (num_steps - step) / (0.5 * num_steps))
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            right, seconds = (logits.argmax(-1) == words).float().mean(), time.perf_counter() - started
            print(f"step {step + 1}/{num_steps}  {loss:.3f} nats  {right:.3f} right  {seconds:.0f} s", flush=True)


@torch.no_grad()
def masked_accuracy(model: BertForMaskedLM, tokenizer: PreTrainedTokenizerFast, num_batches: int = 20) -> float:
    """The share of masked words of stories from another seed that are guessed right."""
    random, masking = Random(HELDOUT_SEED), Masking(tokenizer, HELDOUT_SEED)
    model.eval()
    found = [guesses(model, read_batch(tokenizer, random), masking) for _ in range(num_batches)]
    return torch.cat([logits.argmax(-1) == words for logits, words in found]).float().mean().item()


def write_encoder(out: Path, num_steps: int) -> float:
    """Writes the model and its tokenizer to `out`; returns the masked accuracy. No step: the random weights."""
    tokenizer = new_tokenizer()
    model = new_model(len(tokenizer))
    pretrain(model, tokenizer, num_steps)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return masked_accuracy(model, tokenizer)


def main() -> None:
    """Pretrains and says how many masked words of other stories are guessed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help="batches; 0: random weights")
    options = parser.parse_args()
    print(f"masked words guessed right: {write_encoder(options.out, options.steps):.3f}")


if __name__ == "__main__":
    main()
