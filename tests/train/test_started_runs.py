"""Runs whose start changed the base: it is stored once, used bit for bit, and no other will do."""

from __future__ import annotations

import json
import re
import resource
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import qlora_cli.quant.plugin  # noqa: F401 (teaches transformers the packed layers)
from qlora_cli import commands, merging
from qlora_cli.display import QuietReport
from qlora_cli.errors import Exit, UserError
from qlora_cli.model.adapter import load_adapter
from qlora_cli.model.base import load_base, readable_bytes
from qlora_cli.model.whole_folder import content_name, fault
from qlora_cli.quant.packed import PackedLayer
from qlora_cli.recipe import Recipe, dump_recipe
from qlora_cli.train import session
from qlora_cli.train.base import recipe_of_base
from qlora_cli.train.run import Run
from tests.tiny import write_tiny_gpt2, write_tiny_model
from tests.train.test_processes import train as launch

IDS = torch.arange(3, 67)[None]


class Kind(NamedTuple):
    """A kind of start: sections of its recipe, and the model that it is for."""

    quantization: dict[str, Any]
    adapter: dict[str, Any]
    model: str = "llama"


INT2 = Kind({"data_type": "int2"}, {"init": "loftq"})

KINDS = {
    "loftq, int2": INT2,
    "loftq, nf4": Kind({"data_type": "nf4", "double_quant": False}, {"init": "loftq", "use_rslora": True}),
    "loftq, calibrated": Kind(
        {"data_type": "int4", "zero_point": True},
        {"init": "loftq", "loftq": {"calibration": 4, "order": "svd_first"}},
    ),
    "loftq, mixed": Kind(
        {"data_type": "int2", "overrides": {"*.1.*": "nf4", "*.c_proj": "none"}},
        {"init": "loftq", "r": 100},
        "gpt2",
    ),
    "loftq, tied with its embedding": Kind({"data_type": "int2", "embeddings": "int4"}, {"init": "loftq"}, "tied"),
    "pissa, nf4": Kind({"data_type": "nf4"}, {"init": "pissa", "modules_to_save": ["lm_head"]}),
    "pissa, unquantised": Kind({"data_type": "none"}, {"init": "pissa"}),
    "olora, int2": Kind({"data_type": "int2"}, {"init": "olora"}),
}


class Report(QuietReport):
    """Keeps what is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def say(self, text: str) -> None:
        self.told.append(text)


@dataclass
class Bench:
    """Recipes on tiny models, and runs of them that are trained once."""

    root: Path
    models: dict[str, Path]
    rows: Path
    done: dict[str, Run] = field(default_factory=dict)
    told: dict[str, list[str]] = field(default_factory=dict)

    def recipe(self, kind: Kind, folder: Path, **sections: dict[str, Any]) -> Recipe:
        """The kind's recipe for a run in a folder; sections are merged over it."""
        values: dict[str, Any] = {
            "model": {"name_or_path": str(self.models[kind.model])},
            "quantization": {"compute_dtype": "float32", **kind.quantization},
            "adapter": {"r": 4, "alpha": 8, **kind.adapter},
            "data": {
                "train": [{"path": str(self.rows)}],
                "eval": [{"path": str(self.rows.with_name("heldout.jsonl"))}],
            },
            "training": {
                "max_steps": 4,
                "micro_batch_size": 4,
                "gradient_accumulation_steps": 1,
                "optimizer": "adamw",
                "learning_rate": 1e-2,
                "logging_steps": 1,
                "seed": 7,
            },
            "evaluation": {"max_new_tokens": 2},
            "output_dir": str(folder),
        }
        values["data"]["max_length"] = 256
        for name, section in sections.items():
            values[name] = {**values[name], **section}
        return Recipe.model_validate(values)

    def whole(self, name: str = "loftq, int2") -> Run:
        """A run of a kind that was never stopped."""
        if name not in self.done:
            folder = self.root / f"whole{len(self.done)}"
            self.told[name] = train(self.recipe(KINDS[name], folder))
            self.done[name] = Run(folder)
        return self.done[name]

    def copy(self, folder: Path, name: str = "loftq, int2") -> tuple[Run, Recipe]:
        """A whole run and its recipe in a place of its own: for the run it is as if it had been moved."""
        return Run(shutil.copytree(self.whole(name).folder, folder)), self.recipe(KINDS[name], folder)


@pytest.fixture(scope="module")
def bench(tiny_model: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    root = tmp_path_factory.mktemp("started")
    tied = write_tiny_model(root / "tied", tie_word_embeddings=True)
    return Bench(root, {"llama": tiny_model, "gpt2": write_tiny_gpt2(root / "gpt2"), "tied": tied}, rows_file)


def train(recipe: Recipe, pause_at: int | None = None) -> list[str]:
    """What is told by `qlora train`."""
    report = Report()
    commands.train(recipe, b"", report, main_process=True, resume="auto", pause_at=pause_at)
    return report.told


def evaluate(recipe: Recipe, adapter: Path | None = None, baseline: bool = False) -> dict[str, float]:
    """Losses by model."""
    found = commands.evaluate(recipe, Report(), commands.Wanted(adapter, baseline, again=True))
    return {name: figures["loss"] for name, figures in found["models"].items()}


def merge(run: Run, recipe: Recipe, out: Path | None = None) -> dict[str, Any]:
    return merging.merge(run.folder, recipe, Report(), merging.Wanted(out, dtype="float32"))["merges"][0]


def base_of(run: Run) -> Path:
    """The one base in a run."""
    (folder,) = run.base.iterdir()
    return folder


def weights(run: Run) -> bytes:
    return (run.adapter / "adapter_model.safetensors").read_bytes()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(IDS).logits


@pytest.mark.parametrize("name", KINDS)
def test_a_started_run_is_resumed_measured_and_merged(name, bench, tmp_path):
    whole, halves = bench.whole(name), Run(tmp_path / "halves")
    recipe = bench.recipe(KINDS[name], halves.folder)
    train(recipe, pause_at=2)
    made = (base_of(halves) / "model.safetensors").stat()
    again = train(recipe)
    assert weights(halves) == weights(whole)
    assert base_of(halves).name == base_of(whole).name == content_name(base_of(whole))
    assert fault(base_of(halves)) == ""
    assert (base_of(halves) / "model.safetensors").stat() == made, "it was made twice"
    assert not any("will be stored" in line for line in again)

    losses = [json.loads(line)["loss"] for line in whole.metrics.read_text().splitlines() if '"loss"' in line]
    assert losses[-1] < losses[0]
    measured = evaluate(recipe, baseline=True)
    assert measured["adapter"] < measured["start"]
    merged = merge(halves, recipe)
    assert merged["same_base"]
    assert merged["certificate"]["max_abs"] < 1e-3
    assert "quantization_config" not in json.loads((halves.folder / "merged" / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(halves.folder / "merged")
    assert not any(isinstance(module, PackedLayer) for module in model.modules())
    _base, own = loaded(recipe, halves)
    torch.testing.assert_close(logits(model), logits(own), rtol=0, atol=1e-3)


def loaded(recipe: Recipe, run: Run) -> tuple[Any, Any]:
    """The run's base, and the model with its adapter, as eval and merge load them."""
    base = load_base(recipe_of_base(recipe, run), torch.device("cpu"))
    return base, load_adapter(base, run.adapter)


@pytest.mark.parametrize("name", KINDS)
def test_the_base_and_its_size_are_told_before_the_start_is_computed(name, bench):
    run = bench.whole(name)
    told = bench.told[name]
    (at,) = (number for number, line in enumerate(told) if "of weights will be stored in" in line)
    size = sum(t.numel() * t.element_size() for t in load_file(base_of(run) / "model.safetensors").values())
    said = re.search(r"base +([\d.]+ \w+) of weights will be stored in (.*)", told[at])
    assert said is not None
    assert said[2].startswith(str(run.base))
    units = {"B": 1, "kB": 1000, "MB": 10**6}
    number, unit = said[1].split()
    assert float(number) * units[unit] == pytest.approx(size, rel=0.02), readable_bytes(size)
    table = [line for line in told if re.match(rf"{KINDS[name].adapter['init']} +\d+/\d+ ", line)]
    assert len(table) == (8 if KINDS[name].model == "gpt2" else 14)
    assert at < told.index(table[0])
    assert told.index(f"base     {base_of(run)}") > told.index(table[-1])


@pytest.mark.parametrize("name", ["loftq, int2", "loftq, tied with its embedding", "pissa, unquantised"])
def test_plain_peft_on_the_stored_base_gives_the_same_logits(name, bench):
    run = bench.whole(name)
    _base, ours = loaded(bench.recipe(KINDS[name], run.folder), run)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_of(run)), run.adapter)
    assert torch.equal(logits(plain), logits(ours))
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(run.adapter)), logits(ours))
    assert f"it belongs to `{base_of(run)}` and to no other" in (run.adapter / "README.md").read_text()


def test_the_table_is_kept_in_the_base_with_what_it_was_made_of(bench):
    record = json.loads((base_of(bench.whole()) / "start.json").read_text())
    assert record["table"][0]["module"] == "model.layers.0.self_attn.q_proj"
    assert all(line["after"] < line["before"] for line in record["table"])
    assert record["made_from"]["adapter"]["init"] == "loftq"
    assert record["made_from"]["files"].keys() >= {"model.safetensors", "config.json", "tokenizer.json"}


def test_an_adapter_is_refused_on_any_other_base(bench, tmp_path, tiny_model):
    run, start = bench.whole(), base_of(bench.whole()) / "loftq_init"
    orphan = Path(shutil.copytree(start, tmp_path / "loftq_init"))
    others = {
        "the original model": bench.recipe(Kind({"data_type": "int2"}, {}), tmp_path / "plain"),
        "another run's base": bench.recipe(KINDS["loftq, nf4"], bench.whole("loftq, nf4").folder),
    }
    for name, recipe in others.items():
        for adapter in (run.adapter, start):
            with pytest.raises(UserError, match=rf"was trained on {base_of(run)}, and .*other weights") as error:
                evaluate(recipe, adapter)
            assert error.value.code == Exit.REFUSED, name
        with pytest.raises(UserError, match="the start that lay in a stored base, and is not in it any more") as error:
            evaluate(recipe, orphan)
        assert error.value.code == Exit.REFUSED
    continued = bench.recipe(
        Kind({"data_type": "int2"}, {"r": 16, "alpha": 32, "from": str(run.adapter)}), tmp_path / "x"
    )
    with pytest.raises(UserError, match=f"was trained on {base_of(run)}"):
        train(continued)


def test_the_original_weights_and_the_original_base_are_exit_3_on_the_command_line(bench, qlora, tmp_path):
    run = bench.whole()
    ended = qlora("merge", run.folder, "--base", "original", "--out", tmp_path / "out")
    assert ended.code == Exit.REFUSED
    assert "is what the adapter was trained on; the weights as published are others" in ended.err
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(bench.recipe(Kind({"data_type": "int2"}, {}), tmp_path / "plain")))
    ended = qlora("eval", path, "--adapter", run.adapter)
    assert ended.code == Exit.REFUSED
    assert str(base_of(run)) in ended.err


def test_a_moved_run_is_measured_merged_and_resumed(bench, tmp_path):
    whole = bench.whole()
    recipe = bench.recipe(INT2, tmp_path / "first")
    train(recipe, pause_at=2)
    (tmp_path / "first").rename(tmp_path / "second")
    recipe, run = bench.recipe(INT2, tmp_path / "second"), Run(tmp_path / "second")
    train(recipe)
    assert weights(run) == weights(whole)
    assert base_of(run).name == base_of(whole).name
    run.folder.rename(tmp_path / "third")
    recipe, run = bench.recipe(INT2, tmp_path / "third"), Run(tmp_path / "third")
    assert evaluate(recipe) == evaluate(bench.recipe(INT2, whole.folder))
    assert merge(run, recipe)["same_base"]


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda base: flip_a_byte(base / "model.safetensors"), r"model\.safetensors has changed since it was written"),
        (lambda base: flip_a_byte(base / "loftq_init/adapter_model.safetensors"), r"loftq_init/adapter_model.*changed"),
        (lambda base: (base / "tokenizer_config.json").open("a").write(" "), r"tokenizer_config\.json has .* bytes"),
        (lambda base: (base / "manifest.json").unlink(), r"manifest\.json is missing"),
        (shutil.rmtree, r"is not there, and the run was trained on it"),
    ],
)
def test_a_damaged_base_is_refused_by_every_verb(harm, told, bench, tmp_path):
    run, recipe = bench.copy(tmp_path / "run")
    base = base_of(run)
    harm(base)
    shutil.rmtree(run.adapter, ignore_errors=True)  # it has checkpoints
    message = rf"{base}: {told}.* no other base fits its adapters"
    for verb in (train, lambda recipe: evaluate(recipe, run.checkpoints / "step-000004")):
        with pytest.raises(UserError, match=message):
            verb(recipe)
    shutil.copytree(bench.whole().adapter, run.adapter)
    with pytest.raises(UserError, match=message):
        merge(run, recipe)


def test_a_base_under_the_name_of_another_is_refused(bench, tmp_path):
    """Its manifest verifies: what tells it is the name, which is that of other content."""
    run, recipe = bench.copy(tmp_path / "run")
    base = base_of(run)
    shutil.rmtree(base)
    shutil.copytree(base_of(bench.whole("loftq, nf4")), base)
    for verb in (evaluate, lambda recipe: merge(run, recipe)):
        with pytest.raises(UserError, match=f"{base.name}: quantization") as error:
            verb(recipe)
        assert error.value.code == Exit.REFUSED
    shutil.rmtree(run.adapter)
    with pytest.raises(UserError, match=r"run\.json: the base model has changed|quantization"):
        train(recipe)


def test_a_damaged_newest_checkpoint_does_not_hide_the_base(bench, tmp_path):
    recipe, run = bench.recipe(INT2, tmp_path / "run", training={"save_steps": 1}), Run(tmp_path / "run")
    train(recipe, pause_at=2)
    assert len([*run.checkpoints.iterdir()]) == 2
    config = run.checkpoints / "step-000002" / "adapter_config.json"
    config.write_text(config.read_text().replace(base_of(run).name, "f" * 64))
    told = train(recipe)
    assert any("step-000002 is damaged" in line for line in told)
    assert not any("will be stored" in line for line in told)
    assert weights(run) == weights(bench.whole())


def killed(*_: Any) -> None:
    """What comes behind the making of the base."""
    raise KeyboardInterrupt


def test_a_run_killed_behind_its_base_goes_on_with_it_and_another_recipe_makes_its_own(bench, tmp_path, monkeypatch):
    recipe, run = bench.recipe(INT2, tmp_path / "run"), Run(tmp_path / "run")
    other = bench.recipe(INT2, tmp_path / "run", adapter={"r": 2})
    with monkeypatch.context() as patch:
        patch.setattr(session, "load_base", killed)
        for one in (recipe, other):
            with pytest.raises(KeyboardInterrupt):
                train(one)
    assert not run.checkpoints.exists()
    made = {base: (base / "model.safetensors").stat() for base in run.base.iterdir()}
    assert len(made) == 2
    told = train(recipe)
    assert {base: (base / "model.safetensors").stat() for base in run.base.iterdir()} == made
    assert not any("will be stored" in line for line in told)
    assert weights(run) == weights(bench.whole())
    assert evaluate(recipe) == evaluate(bench.recipe(INT2, bench.whole().folder))


def test_the_start_of_a_stored_base_can_be_continued_in_another_run(bench, tmp_path):
    """And what is trained from it is refused elsewhere, also where the base has a name of its own."""
    base = Path(shutil.copytree(base_of(bench.whole()), tmp_path / "my base"))
    kind = Kind({}, {"r": 16, "alpha": 32, "from": str(base / "loftq_init")})
    recipe = bench.recipe(kind, tmp_path / "run", model={"name_or_path": str(base)})
    assert not any("will be stored" in line for line in train(recipe))
    run = Run(tmp_path / "run")
    assert weights(run) == weights(bench.whole()), "it is the same start"
    assert not run.base.exists()
    assert merge(run, recipe)["certificate"]["max_abs"] < 1e-3
    with pytest.raises(UserError, match=f"was trained on {base}") as error:
        evaluate(bench.recipe(Kind({"data_type": "int2"}, {}), tmp_path / "plain"), run.adapter)
    assert error.value.code == Exit.REFUSED
    other, own = evaluate(bench.recipe(INT2, bench.whole().folder), run.adapter), evaluate(recipe)
    assert [*other.values()] == [*own.values()], "it is the same base"


@pytest.mark.parametrize("name", ["loftq, int2", "pissa, unquantised"])
def test_a_stored_base_is_not_quantised_again_nor_started_again(name, bench, tmp_path):
    base = {"name_or_path": str(base_of(bench.whole(name)))}
    if "int2" in name:
        stored_again = bench.recipe(Kind({"data_type": "int4"}, {}), tmp_path / "a", model=base)
        with pytest.raises(
            UserError, match=r"quantization\.data_type: int4 has no effect: .* is stored quantised already"
        ):
            train(stored_again)
    kind = Kind({"data_type": "nf4"}, {"init": "loftq"})
    with pytest.raises(UserError, match=r"adapter\.init: loftq needs the unquantised weights: .* is stored quantised"):
        train(bench.recipe(kind, tmp_path / "b", model=base))


def test_a_disk_that_is_full_while_the_base_is_stored_is_a_message_and_leaves_nothing(bench, tmp_path):
    bench.whole()  # the rows are prepared
    recipe, run = bench.recipe(INT2, tmp_path / "run"), Run(tmp_path / "run")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match=r"run/base/.*: cannot be written: .*File too large.*bytes free") as error:
            train(recipe)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.code == Exit.FAILED
    assert [*run.base.iterdir()] == []
    train(recipe)
    assert weights(run) == weights(bench.whole())


def test_a_disk_without_room_for_the_base_is_a_message_before_the_work(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _place: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    run = Run(tmp_path / "run")
    with pytest.raises(
        UserError, match=r"run/base: [\d,]+ bytes are needed for the stored base and 1,000 are free"
    ) as error:
        train(bench.recipe(INT2, run.folder))
    assert error.value.code == Exit.FAILED
    assert [*run.base.iterdir()] == []


MODULE = "model.layers.1.mlp.up_proj"


def damaged_model(bench: Bench, folder: Path, harm: Callable[[dict[str, Tensor]], None]) -> Path:
    """The tiny model with other tensors."""
    shutil.copytree(bench.models["llama"], folder)
    tensors = load_file(folder / "model.safetensors")
    harm(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("name", ["loftq, int2", "pissa, unquantised"])
def test_a_weight_that_is_not_finite_is_named_with_its_file_and_nothing_is_stored(name, bench, tmp_path):
    model = damaged_model(bench, tmp_path / "model", lambda tensors: tensors[f"{MODULE}.weight"][3].fill_(torch.nan))
    recipe = bench.recipe(KINDS[name], tmp_path / "run", model={"name_or_path": str(model)})
    with pytest.raises(UserError, match=rf"{model}/model\.safetensors: {MODULE}\.weight: holds NaN or infinity"):
        train(recipe)
    assert [*(tmp_path / "run" / "base").iterdir()] == []


def test_a_weight_of_no_whole_blocks_is_named_with_its_file(bench, tmp_path):
    model = write_tiny_model(tmp_path / "model", intermediate_size=100)
    kind = Kind({"data_type": "int2", "block_size": 512}, {"init": "loftq"})
    named = rf"{model}/model\.safetensors: model\.layers\.0\.mlp\.gate_proj\.weight: has 6,400 values, .*no multiple of"
    with pytest.raises(UserError, match=named):
        train(bench.recipe(kind, tmp_path / "run", model={"name_or_path": str(model)}))


def test_a_truncated_shard_is_named(bench, tmp_path):
    model = Path(shutil.copytree(bench.models["llama"], tmp_path / "model"))
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match=rf"{file}: damaged or cut short"):
        train(bench.recipe(INT2, tmp_path / "run", model={"name_or_path": str(model)}))


def test_two_processes_train_on_the_base_that_the_first_of_them_stored(bench, tmp_path):
    run = Run(tmp_path / "pair")
    pair = bench.recipe(INT2, run.folder, training={"micro_batch_size": 2})
    done = launch(pair, tmp_path, 2)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("will be stored in") == 1, "both processes make it"
    assert base_of(run).name == base_of(bench.whole()).name, "another base than one process makes"
    ours, theirs = (load_file(one.adapter / "adapter_model.safetensors") for one in (run, bench.whole()))
    start = load_file(base_of(run) / "loftq_init" / "adapter_model.safetensors")
    difference = torch.cat([(ours[name] - theirs[name]).flatten() for name in ours]).norm()
    update = torch.cat([(theirs[name] - start[name]).flatten() for name in ours]).norm()
    assert difference < 1e-3 * update
