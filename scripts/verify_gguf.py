"""Our GGUF files in real llama.cpp: tokens, logits, greedy text and chat against transformers, adapters against PEFT.

    bash scripts/verify_gguf.sh [MODEL]...

Runs tiny random models of every architecture, the quickstart's base, and the model folders named; needs llama_cpp, and
compares with llama.cpp's own converter where CONVERTER names its folder. Prints a table; exit code 1 where something
disagrees. The last output is in docs/gguf.md.
"""

from __future__ import annotations

import os
import stat
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for the tiny models that the tests use

import llama_cpp

from qlora_cli.export.gguf import write_gguf, write_lora_gguf
from scripts.verify_gguf_converter import check_converter
from scripts.verify_gguf_weights import with_weights_of
from tests.export.gguf_models import CASES, QUICKSTART, write_lora, write_model

TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")
KL = {"f32": 1e-9, "f16": 1e-5, "bf16": 5e-4, "q8_0": 5e-3, "q4_0": 5e-3, "q4_k_m": 0.1, "q6_k": 0.05}
"""Mean KL in nats that is allowed against the file's own weights in float32: two to three times what was measured.

Left is what ggml does to activations: it rounds them to the file's type, to Q8_0 or Q8_K before blocks. A q4_0 file is
0.03 to 0.4 away from its model by rounding alone, so weights that are slightly others are beyond the limit. The model
of the K-quants is wider and its predictions more peaked: 1.7 and 0.2 away.
"""
LOGITS_F32, LOGITS_GELU = 2e-5, 1e-3
"""Largest difference of a logit over the largest logit, in F32 files. ggml's GELU, Gemma's, is a table in F16."""
TEXTS = [
    "Hello world",
    " two  spaces and\ttabs\n\n\nlines \n end ",
    "It's 2026, they'll've paid $1,234.56 (7%)! DON'T",
    "naïve café Straße ÅÄÖ ñ déjà-vu",
    "你好，世界。こんにちは 안녕하세요 привет مرحبا",
    "emoji 🙂👩‍👩‍👧‍👦 and ∑ƒ(x)≠∅",
    "def f(x):\n    return {'a': [1, 22, 333, 4444]}\n\n# done\n",
    "<|user|>What is it?<|end|><|assistant|>It is on the day.<|end|>",
    "a<|end|> b <|end|>  c",
    "",
]
PROMPT = "Hello, what is the world in the day of 2026? It's a long day, and then another one in the end."


@dataclass
class Row:
    """One file compared: with its own weights in transformers, and with the model that it was made of (rounding)."""

    model: str
    file: str
    tokens: str
    logits: float
    kl: float
    rounding: float
    text: str
    ok: bool


def load(path: Path, lora: Path | None = None) -> llama_cpp.Llama:
    """A file in llama.cpp, computing and caching in float32 as far as the file's type allows."""
    return llama_cpp.Llama(
        str(path),
        n_ctx=256,
        n_threads=1,
        logits_all=True,
        verbose=False,
        use_mmap=False,
        flash_attn=False,
        type_k=0,
        type_v=0,
        lora_path=str(lora) if lora else None,
    )


def same_tokens(llama: llama_cpp.Llama, tokenizer: Any, begin: str) -> tuple[int, list[str]]:
    """How many texts get the same ids, and the others. begin: put before each text."""
    wrong = []
    for text in (begin + text for text in TEXTS):
        ours = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        theirs = llama.tokenize(text.encode(), add_bos=False, special=True)
        if ours != theirs:
            wrong.append(f"{text!r}: transformers {ours[:24]}, llama.cpp {theirs[:24]}")
    return len(TEXTS) - len(wrong), wrong


def logits_apart(llama: llama_cpp.Llama, model: Any, ids: list[int]) -> tuple[float, float]:
    """Largest difference of a logit over the largest logit, and the mean KL in nats, over the positions of `ids`."""
    llama.reset()
    llama.eval(ids)
    theirs = torch.from_numpy(np.array(llama.scores[: len(ids)])).double()
    with torch.no_grad():
        ours = model(torch.tensor([ids])).logits[0].double()
    kl = torch.nn.functional.kl_div(theirs.log_softmax(-1), ours.log_softmax(-1), log_target=True, reduction="none")
    return ((theirs - ours).abs().max() / ours.abs().max()).item(), kl.sum(-1).mean().item()


def greedy(llama: llama_cpp.Llama, ids: list[int], count: int) -> list[int]:
    """llama.cpp's most probable continuation, without stopping."""
    llama.reset()
    llama.eval(ids)
    made: list[int] = []
    for _ in range(count):
        made.append(int(np.argmax(llama.scores[llama.n_tokens - 1])))
        llama.eval([made[-1]])
    return made


def greedy_reference(model: Any, ids: list[int], count: int) -> list[int]:
    """The same with transformers."""
    made = list(ids)
    for _ in range(count):
        with torch.no_grad():
            made.append(int(model(torch.tensor([made])).logits[0, -1].argmax()))
    return made[len(ids) :]


def chat_agrees(llama: llama_cpp.Llama, model: Any, tokenizer: Any) -> bool:
    """Whether a conversation through the template in the file gives the prompt ids and the answer of ours."""
    messages = [{"role": "user", "content": "What is the day?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    llama.reset()
    llama.create_chat_completion(messages, temperature=0.0, max_tokens=12, repeat_penalty=1.0)
    seen = llama.input_ids[: llama.n_tokens].tolist()  # the prompt, then the answer up to a stop token
    return len(seen) > len(ids) and seen == [*ids, *greedy_reference(model, ids, 24)][: len(seen)]


def is_near(name: str, file_type: str, apart: float, kl: float) -> bool:
    """Whether the predictions of a file are within its limits."""
    gelu = name.startswith("gemma")
    if file_type == "f32" and apart > (LOGITS_GELU if gelu else LOGITS_F32):
        return False
    return kl <= (1e-6 if gelu and file_type == "f32" else KL[file_type])


def check_model(name: str, folder: Path, work: Path, rows: list[Row]) -> None:
    """All types of one folder."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    ids = tokenizer.backend_tokenizer.encode(PROMPT, add_special_tokens=False).ids[:100]
    for file_type in TYPES:
        out = work / f"{name}-{file_type}.gguf"
        notes: list[str] = []
        write_gguf(folder, out, file_type, notes.append)
        if file_type == "f32":
            print("".join(f"  {name}: {note}\n" for note in notes), end="", file=sys.stderr)
        llama = load(out)
        in_template = any("set for the chat template" in note for note in notes)  # whose text begins with BOS
        same, wrong = same_tokens(llama, tokenizer, tokenizer.bos_token if in_template else "")
        print("".join(f"  {name}: {line}\n" for line in wrong), end="", file=sys.stderr)
        apart, kl = logits_apart(llama, with_weights_of(out, folder, model), ids)
        rounding = logits_apart(llama, model, ids)[1]
        words = "-"
        if file_type == "f32":
            agreed = greedy(llama, ids, 24) == greedy_reference(model, ids, 24)
            if agreed and tokenizer.chat_template:
                words = "and chat" if chat_agrees(llama, model, tokenizer) else "CHAT DIFFERS"
            words = ("same " + words).removesuffix(" -") if agreed else "DIFFERS"
        ok = not wrong and is_near(name, file_type, apart, kl) and "DIFFERS" not in words
        rows.append(Row(name, file_type, f"{same}/{len(TEXTS)}", apart, kl, rounding, words, ok))
        llama.close()


def check_lora(name: str, work: Path, rows: list[Row]) -> None:
    """A LoRA file on the F32 base against PEFT."""
    base, adapter = work / name, work / f"{name}-adapter"
    peft = write_lora(name, adapter, use_rslora=True, rank_pattern={"q_proj": 8}, alpha_pattern={"up_proj": 16})
    ids = AutoTokenizer.from_pretrained(base).backend_tokenizer.encode(PROMPT, add_special_tokens=False).ids[:100]
    out = work / f"{name}-lora.gguf"
    write_lora_gguf(adapter, base, out, "f32", lambda note: None)
    llama = load(work / f"{name}-f32.gguf", out)
    apart, kl = logits_apart(llama, peft, ids)
    agreed = greedy(llama, ids, 24) == greedy_reference(peft, ids, 24)
    with torch.no_grad(), peft.disable_adapter():
        moved = logits_apart(llama, peft, ids)[0]
    ok = is_near(name, "f32", apart, kl) and agreed and moved > 1e-2
    rows.append(Row(name, "LoRA f32", "-", apart, kl, kl, "same" if agreed else "DIFFERS", ok))
    llama.close()


def check_k_quants(work: Path, rows: list[Row]) -> None:
    """K-quants by the function that llama-quantize calls, under that name on PATH."""
    tool = work / "bin" / "llama-quantize"
    tool.parent.mkdir()
    tool.write_text(
        f"#!{sys.executable}\nimport sys, llama_cpp\np = llama_cpp.llama_model_quantize_default_params()\n"
        "p.ftype = getattr(llama_cpp, 'LLAMA_FTYPE_MOSTLY_' + sys.argv[3])\np.nthread = 1\n"
        "names = [a.encode() for a in sys.argv[1:3]]\nsys.exit(llama_cpp.llama_model_quantize(*names, p))\n"
    )
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    os.environ["PATH"] = f"{tool.parent}{os.pathsep}{os.environ['PATH']}"
    folder = write_model("llama-2", work / "wide", hidden_size=256)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    ids = AutoTokenizer.from_pretrained(folder).backend_tokenizer.encode(PROMPT, add_special_tokens=False).ids[:100]
    for file_type in ("q4_k_m", "q6_k"):
        out = work / f"wide-{file_type}.gguf"
        facts = write_gguf(folder, out, file_type, lambda note: None)
        print(f"  {file_type}: {facts}", file=sys.stderr)
        llama = load(out)
        apart, kl = logits_apart(llama, with_weights_of(out, folder, model), ids)
        rounding = logits_apart(llama, model, ids)[1]
        limit = 0.15 if file_type == "q4_k_m" else 0.03
        ok = max(facts["error"].values()) < limit and is_near("llama-2", file_type, apart, kl)
        rows.append(Row("llama-2, 256 wide", file_type, "-", apart, kl, rounding, "-", ok))
        llama.close()


def table(rows: list[Row]) -> str:
    """Rows as Markdown."""
    head = ("model", "file", "tokens", "logits apart", "mean KL", "KL of rounding", "greedy text", "")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        figures = f"{row.logits:.1e} | {row.kl:.1e} | {row.rounding:.1e} | {row.text}"
        lines.append(f"| {row.model} | {row.file} | {row.tokens} | {figures} | {'ok' if row.ok else 'FAILED'} |")
    return "\n".join(lines)


def main(models: list[str]) -> int:
    """Check the tiny models, the quickstart's base and `models`; 1 where one disagrees."""
    started = time.perf_counter()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    rows: list[Row] = []
    apart: list[str] = []
    converter = Path(os.environ["CONVERTER"]) if os.environ.get("CONVERTER") else None
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        named = {name: work / name for name in CASES} | {"quickstart": QUICKSTART}
        named |= {Path(path).name: Path(path) for path in models}
        for name, path in named.items():
            if name in CASES:
                write_model(name, path)
            check_model(name, path, work, rows)
            if name in CASES:
                check_lora(name, work, rows)
            if converter:
                apart += check_converter(name, path, work, converter)
        check_k_quants(work, rows)
    failed = [row for row in rows if not row.ok]
    print(f"llama-cpp-python {llama_cpp.__version__}, {time.perf_counter() - started:.0f} s\n\n{table(rows)}")
    if converter:
        print("\nllama.cpp's converter on the same folders writes otherwise:\n")
        print("\n".join(f"- {line}" for line in apart) or "- nothing")
    print(f"\n{len(rows) - len(failed)} of {len(rows)} agree", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
