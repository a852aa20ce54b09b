"""Keys that make no sense together: each rule refuses, at the offending key, and lets its neighbours pass."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_cli.errors import UserErrors
from qlora_cli.recipe import Recipe, dump_recipe, load_recipe, rules
from qlora_cli.recipe.load import check
from qlora_cli.recipe.located_yaml import Located, parse_yaml
from qlora_cli.recipe.problems import Problem
from qlora_cli.recipe.rules import RULES, broken_rules

BROKEN = [
    ("model: {added_tokens: ['<a>', '<b>', '<a>']}", "model.added_tokens", "'<a>' is named twice"),
    (
        "{model: {added_tokens: ['<a>']}, quantization: {embeddings: nf4}}",
        "model.added_tokens",
        "`added_tokens` with `embeddings: nf4`, and their rows are trained",
    ),
    (
        "training: {layer_kernels: liger, torch_compile: true}",
        "training.layer_kernels",
        "`layer_kernels: liger` beside `torch_compile: true`",
    ),
    ("data: {source_max_length: 16}", "data.source_max_length", "`source_max_length: 16` without `target_max_length`"),
    ("data: {target_max_length: 16}", "data.target_max_length", "`target_max_length: 16` without `source_max_length`"),
    (
        "data: {source_max_length: 16, target_max_length: 512, max_length: 100}",
        "data.max_length",
        "`max_length: 100` beside `source_max_length` and `target_max_length`",
    ),
    (
        "quantization: {data_type: int8, double_quant: false}",
        "quantization.double_quant",
        "`double_quant: false` has no effect with `data_type: int8`",
    ),
    (
        "quantization: {data_type: none, block_size: 128}",
        "quantization.block_size",
        "`block_size: 128` has no effect with `data_type: none`",
    ),
    (
        "quantization: {data_type: none, skip_modules: [v_proj]}",
        "quantization.skip_modules",
        "`skip_modules: ['v_proj']` has no effect with `data_type: none`",
    ),
    (
        "quantization: {data_type: int8, overrides: {'*.q_proj': nf4}}",
        "quantization.overrides",
        "`overrides` beside `data_type: int8`, which cannot be mixed",
    ),
    (
        "quantization: {data_type: int8, embeddings: nf4}",
        "quantization.embeddings",
        "`embeddings: nf4` beside `data_type: int8`, which cannot be mixed",
    ),
    (
        "quantization: {data_type: none, overrides: {'*': none}}",
        "quantization.overrides",
        "`overrides` that are none, as `data_type` is",
    ),
    (
        "quantization: {zero_point: true}",
        "quantization.zero_point",
        "`zero_point: true` has no effect with `data_type: nf4`",
    ),
    (
        "quantization: {data_type: nf2, clip: absmax}",
        "quantization.clip",
        "`clip: 'absmax'` has no effect with `data_type: nf2`",
    ),
    ("output_dir: ~/runs/x", "output_dir", "`~` is not expanded in '~/runs/x'"),
    ("adapter: {from: ~/adapter}", "adapter.from", "`~` is not expanded in '~/adapter'"),
    (
        "quantization: {outlier_threshold: 0}",
        "quantization.outlier_threshold",
        "`outlier_threshold: 0.0` has no effect with `data_type: nf4`",
    ),
    ("adapter: {from: run/adapter, r: 8}", "adapter.r", "`r: 8` beside `from: run/adapter`"),
    ("adapter: {from: run/adapter, use_dora: true}", "adapter.use_dora", "`use_dora: true` beside `from: run/adapter`"),
    ("adapter: {from: a, target_modules: [q_proj]}", "adapter.target_modules", "`target_modules: ['q_proj']` beside"),
    ("adapter: {from: a, loftq: {iterations: 2}}", "adapter.loftq", "`loftq: {iterations: 2, "),
    (
        "adapter: {use_dora: true}\nquantization: {data_type: int8}",
        "adapter.use_dora",
        "`use_dora: true` with `data_type: int8` is not available yet",
    ),
    (
        "training: {memory: lean}\nquantization: {data_type: int8}",
        "training.memory",
        "`memory: lean` beside `quantization.data_type: int8`, whose layers cannot be streamed",
    ),
    (
        "training: {memory: lean}\nadapter: {use_dora: true}",
        "training.memory",
        "`memory: lean` beside `adapter.use_dora`, for which PEFT reads the layers by itself",
    ),
    (
        "adapter: {loftq: {iterations: 1}}",
        "adapter.loftq.iterations",
        "`iterations: 1` has no effect with `init: default`",
    ),
    (
        "adapter: {init: pissa, loftq: {order: svd_first}}",
        "adapter.loftq.order",
        "`order: svd_first` has no effect with `init: pissa`",
    ),
    (
        "adapter: {init: olora, loftq: {calibration: 8}}",
        "adapter.loftq.calibration",
        "`calibration: 8` has no effect with `init: olora`",
    ),
    ("adapter: {from: run/adapter, init: loftq}", "adapter.init", "`init: 'loftq'` beside `from: run/adapter`"),
    (
        "adapter: {init: pissa, use_dora: true}",
        "adapter.init",
        "`init: pissa` with `use_dora: true` is not available yet",
    ),
    (
        "adapter: {init: loftq}\nquantization: {data_type: none}",
        "adapter.init",
        "`init: loftq` with `data_type: none`: nothing is lost",
    ),
    (
        "adapter: {init: loftq, loftq: {calibration: 8}}\ntraining: {max_steps: 5}\n"
        "data: {train: [{path: a.jsonl, streaming: true}]}",
        "adapter.loftq.calibration",
        "`calibration: 8` with `streaming: true` is not available yet",
    ),
    (
        "adapter: {init: loftq}\nquantization: {data_type: int8, outlier_threshold: 5}",
        "quantization.outlier_threshold",
        "`outlier_threshold: 5.0` has no effect with `init: loftq`",
    ),
    (
        "training: {warmup_steps: 0, warmup_ratio: 0.1}",
        "training.warmup_ratio",
        "`warmup_ratio: 0.1` beside `warmup_steps: 0`",
    ),
    (
        "training: {lr_scheduler: constant, min_lr_ratio: 0.1}",
        "training.min_lr_ratio",
        "`min_lr_ratio: 0.1` has no effect with `lr_scheduler: constant`",
    ),
    ("data: {eval: [{path: e.jsonl}], eval_fraction: 0.1}", "data.eval_fraction", "`eval_fraction: 0.1` beside `eval`"),
    (
        "data: {eval: [{path: e.jsonl}, {path: ./rows.jsonl, split: x}]}",
        "data.eval[1].path",
        "'./rows.jsonl' is held out here and trained on in `data.train[0]`",
    ),
    (
        "data: {train: [{path: org/set}], eval: [{path: org/set, split: train}]}",
        "data.eval[0].path",
        "'org/set' is held out here and trained on in `data.train[0]`",
    ),
    ("training: {eval_steps: 50}", "training.eval_steps", "`eval_steps: 50` has no effect without `data.eval`"),
    (
        "data: {train: [{path: a.csv, format: text, template: {prompt: a, completion: b}}]}",
        "data.train[0].format",
        "`format: text` beside `template`",
    ),
    (
        "data: {train: [{path: a.jsonl, streaming: true}]}",
        "data.train[0].streaming",
        "`streaming: true` without `training.max_steps`",
    ),
    (
        "data: {train: [{path: a.jsonl}, {path: b.jsonl, streaming: true}]}\ntraining: {max_steps: 5}",
        "data.train[1].streaming",
        "`streaming: true` beside a source without it",
    ),
    (
        "data: {train: [{path: a.jsonl, streaming: true}], eval_fraction: 0.1}\ntraining: {max_steps: 5}",
        "data.train[0].streaming",
        "`streaming: true` beside `data.eval_fraction`",
    ),
    (
        "data: {eval: [{path: org/held, streaming: true}]}",
        "data.eval[0].streaming",
        "`streaming: true` without `limit`",
    ),
    (
        "data: {eval: [{path: held.jsonl, weight: 2}]}",
        "data.eval[0].weight",
        "`weight: 2` has no effect on held-out data",
    ),
    (
        "data: {chat_template_kwargs: {messages: []}}",
        "data.chat_template_kwargs.messages",
        "`messages` is given to every chat template by us",
    ),
    ("model: {num_labels: 3}", "model.num_labels", "`num_labels: 3` has no effect with `task: causal_lm`"),
    (
        "model: {task: question_answering, labels: [a, b]}",
        "model.labels",
        "`labels: ['a', 'b']` has no effect with `task: question_answering`",
    ),
    (
        "model: {task: sequence_classification}",
        "model.task",
        "`task: sequence_classification` without its classes",
    ),
    (
        "model: {task: sequence_classification, labels: [a, b], num_labels: 2}",
        "model.num_labels",
        "`num_labels: 2` beside `labels`",
    ),
    *(
        (
            f"model: {{task: sequence_classification, labels: {labels}}}",
            "model.labels",
            f"{shown} are not two different classes or more",
        )
        for labels, shown in (("[a]", "['a']"), ("[a, b, a]", "['a', 'b', 'a']"))
    ),
    (
        "data: {train: [{path: a.jsonl, format: squad}]}",
        "data.train[0].format",
        "`format: squad` is not for `task: causal_lm`",
    ),
    (
        "model: {task: seq2seq_lm}\ndata: {train: [{path: a.jsonl, format: messages}]}",
        "data.train[0].format",
        "`format: messages` is not for `task: seq2seq_lm`",
    ),
    (
        "model: {task: question_answering}\ndata: {train: [{path: a, template: {prompt: a, completion: b}}]}",
        "data.train[0].template",
        "`template` cannot say where an answer stands",
    ),
    (
        "model: {task: seq2seq_lm}\ndata: {train: [{path: a, template: {prompt: a, pair: b, completion: c}}]}",
        "data.train[0].template.pair",
        "`pair` has no effect with `task: seq2seq_lm`",
    ),
    (
        "model: {task: seq2seq_lm}\ndata: {eval: [{path: a, template: {prompt: a, completion: c, chat: true}}]}",
        "data.eval[0].template.chat",
        "`chat: true` has no effect with `task: seq2seq_lm`",
    ),
    (
        "model: {task: seq2seq_lm}\ndata: {packing: true}",
        "data.packing",
        "`packing: true` has no effect with `task: seq2seq_lm`",
    ),
    (
        "model: {task: question_answering}\ndata: {train_on: all}",
        "data.train_on",
        "`train_on: 'all'` has no effect with `task: question_answering`",
    ),
    (
        "model: {task: seq2seq_lm}\ndata: {chat_template: a.jinja}",
        "data.chat_template",
        "`chat_template: 'a.jinja'` has no effect with `task: seq2seq_lm`",
    ),
    (
        "model: {task: seq2seq_lm}\nadapter: {init: loftq, loftq: {calibration: 8}}",
        "adapter.loftq.calibration",
        "`calibration: 8` with `task: seq2seq_lm` is not available yet",
    ),
    (
        "model: {task: question_answering}\ndata: {source_max_length: 9, target_max_length: 9}",
        ["data.source_max_length", "data.target_max_length"],
        "`source_max_length: 9` has no effect with `task: question_answering`",
    ),
    ("data: {doc_stride: 9}", "data.doc_stride", "`doc_stride: 9` has no effect with `task: causal_lm`"),
    (
        "model: {task: question_answering}\ndata: {on_long_row: skip}",
        "data.on_long_row",
        "`on_long_row: 'skip'` has no effect with `task: question_answering`: long contexts are read in windows",
    ),
    (
        "evaluation: {max_answer_length: 9}",
        "evaluation.max_answer_length",
        "`max_answer_length: 9` has no effect with `task: causal_lm`",
    ),
    (
        "model: {task: sequence_classification, num_labels: 1}\nevaluation: {num_beams: 4}",
        "evaluation.num_beams",
        "`num_beams: 4` has no effect with `task: sequence_classification`",
    ),
    (
        "model: {task: seq2seq_lm}\nevaluation: {suites: [{suite: loss, data: [{path: a, format: squad}]}]}",
        "evaluation.suites[0].data[0].format",
        "`format: squad` is not for `task: seq2seq_lm`",
    ),
    *(
        (f"evaluation: {{suites: [{suites}]}}", f"evaluation.suites{where}", what)
        for suites, where, what in (
            ("{suite: squad}", "[0].suite", "`suite: squad` cannot measure `task: causal_lm`"),
            ("{suite: loss}, {suite: loss}", "[1].suite", "two suites are named 'loss'"),
            ("{suite: loss, name: a}, {suite: generate, name: a}", "[1].name", "two suites are named 'a'"),
            ("{suite: loss, name: a/b}", "[0].name", "`name: 'a/b'` is no name of a file"),
            ("{suite: loss, metrics: [rouge1]}", "[0].metrics", "`metrics` has no effect on `suite: loss`"),
            ("{suite: choice}", "[0].suite", "`suite: choice` without `data`"),
            ("{suite: lm_eval}", "[0].suite", "`suite: lm_eval` without `tasks`"),
            ("{suite: generate, metrics: [regex]}", "[0].metrics", "the metric `regex` and `pattern` go together"),
            (
                "{suite: choice, data: [{path: a}], shots_from: b}",
                "[0].shots_from",
                "`shots_from` has no effect with `shots: 0`",
            ),
            (
                "{suite: loss, data: [{path: held.jsonl, streaming: true, limit: 9}]}",
                "[0].data[0].streaming",
                "`streaming: true` has no effect on held-out files",
            ),
            (
                "{suite: choice, data: [{path: a, format: alpaca}]}",
                "[0].data[0].format",
                "`format` has no effect on `suite: choice`",
            ),
            (
                "{suite: choice, data: [{path: a, template: {prompt: a, completion: b}}]}",
                "[0].data[0].template",
                "`template` has no effect on `suite: choice`",
            ),
            (
                "{suite: loss, data: [{path: a}, {path: b, weight: 2}]}",
                "[0].data[1].weight",
                "`weight: 2` has no effect on held-out data",
            ),
            (
                "{suite: loss, data: [{path: org/held, streaming: true}]}",
                "[0].data[0].streaming",
                "`streaming: true` without `limit`",
            ),
            (
                "{suite: loss, data: [{path: a, format: text, template: {prompt: a, completion: b}}]}",
                "[0].data[0].format",
                "`format: text` beside `template`",
            ),
            (
                "{suite: generate, data: [{path: ./rows.jsonl}]}",
                "[0].data[0].path",
                "'./rows.jsonl' is held out here and trained on in `data.train[0]`",
            ),
        )
    ),
    *(
        (
            f"evaluation: {{suites: {suites}, during_training: [losses]}}",
            "evaluation.during_training[0]",
            "'losses' is no suite",
        )
        for suites in ("[{suite: loss}]", "[]")
    ),
    *(
        (
            f"evaluation: {{suites: [{{suite: loss}}], {name}: 9}}",
            f"evaluation.{name}",
            f"`{name}: 9` has no effect without a `suite: generate`",
        )
        for name in ("max_new_tokens", "num_beams", "no_repeat_ngram_size")
    ),
    (
        "evaluation: {suites: [{suite: generate, metrics: [rogue1]}]}",
        "evaluation.suites[0].metrics[0]",
        "'rogue1' is no metric of these answers",
    ),
    (
        "evaluation: {suites: [{suite: generate, metrics: [regex], pattern: '(['}]}",
        "evaluation.suites[0].pattern",
        "'([' is no regular expression",
    ),
    (
        "model: {task: sequence_classification, num_labels: 3}\n"
        "evaluation: {suites: [{suite: classify, metrics: [accuracy, f1]}]}",
        "evaluation.suites[0].metrics[1]",
        "`f1` is of two classes, not 3",
    ),
    (
        "evaluation: {length_penalty: 2.0}",
        "evaluation.length_penalty",
        "`length_penalty: 2.0` has no effect with `num_beams: 1`",
    ),
    (
        "model: {task: question_answering}\nevaluation: {suites: [{suite: loss}], max_answer_length: 9}",
        "evaluation.max_answer_length",
        "`max_answer_length: 9` has no effect without a `suite: squad`",
    ),
    (
        "model: {task: sequence_classification, num_labels: 2}\n"
        "evaluation: {suites: [{suite: classify, metrics: [regex]}]}",
        "evaluation.suites[0].metrics",
        "the metric `regex` is for `suite: generate`",
    ),
    (
        "evaluation: {best_metric: loss.loss}",
        "evaluation.best_metric",
        "`best_metric: loss.loss`, and nothing is measured in training",
    ),
    (
        "evaluation: {early_stopping_patience: 3}",
        "evaluation.early_stopping_patience",
        "`early_stopping_patience: 3` has no effect without `best_metric`",
    ),
]

SOUND = [
    "model: {added_tokens: ['<a>', '<b>']}",
    "quantization: {data_type: none, embeddings: nf4, block_size: 128, double_quant: false}",
    "quantization: {embeddings: int4, zero_point: true}",
    "quantization: {data_type: int4, zero_point: true, clip: 2sigma}",
    "quantization: {data_type: nf4, overrides: {'*.q_proj': int2}, clip: search}",
    "quantization: {data_type: none, overrides: {'*.q_proj': nf2}, block_size: 32, skip_modules: [lm_head, v_proj]}",
    "data: {source_max_length: 16, target_max_length: 512}",
    "data: {source_max_length: 16, target_max_length: 512, max_length: 2048}",
    "data: {train: [{path: org/set}], eval: [{path: org/set}]}",
    "data: {train: [{path: org/set, name: a}], eval: [{path: org/set, name: b, split: train}]}",
    "data: {train: [{path: a.jsonl}, {path: a.jsonl}], eval: [{path: b.jsonl}]}",
    "quantization: {data_type: int8, outlier_threshold: 0}",
    "quantization: {data_type: int8, double_quant: true, compute_dtype: float32}",
    "quantization: {double_quant: false}",
    "adapter: {use_dora: true, r: 8}",
    "adapter: {from: run/adapter}",
    "adapter: {layers: [0, 1], target_modules: all-linear}",
    "adapter: {layers: [0, 1], target_modules: [q_proj]}",
    "adapter: {init: loftq, loftq: {iterations: 1}}",
    "adapter: {init: loftq, loftq: {order: svd_first, calibration: 8}}",
    "adapter: {init: loftq}\nquantization: {data_type: none, overrides: {'*.q_proj': int2}}",
    "adapter: {init: pissa}\nquantization: {data_type: none}",
    "adapter: {init: olora}\nquantization: {data_type: int8, block_size: 32, double_quant: false}",
    "adapter: {init: loftq}\ntraining: {max_steps: 5}\ndata: {train: [{path: a.jsonl, streaming: true}]}",
    "training: {max_steps: 10, epochs: 1}",
    "training: {memory: offload}\nadapter: {use_dora: true}\nquantization: {data_type: none}",
    "training: {memory: lean}\nadapter: {init: loftq}\nquantization: {data_type: int8}",
    "training: {warmup_steps: 10, warmup_ratio: 0.03}",
    "training: {lr_scheduler: linear, min_lr_ratio: 0.1}",
    "training: {max_steps: 5}\ndata: {train: [{path: a.jsonl, streaming: true}]}",
    "training: {eval_steps: 50}\ndata: {eval_fraction: 0.1}",
    "data: {train: [{path: data, split: train}], eval: [{path: data, split: test}]}",
    "data: {chat_template_kwargs: {enable_thinking: true}}",
    "model: {task: sequence_classification, labels: [no, yes]}\ndata: {train: [{path: a.tsv, format: classification}]}",
    "model: {task: sequence_classification, num_labels: 1}\n"
    "data: {train: [{path: a, template: {prompt: a, pair: b, completion: c}}]}",
    "model: {task: seq2seq_lm}\ndata: {source_max_length: 9, target_max_length: 9, on_long_row: skip}\n"
    "evaluation: {num_beams: 4, max_new_tokens: 9}",
    "model: {task: seq2seq_lm}\ndata: {train: [{path: a, template: {prompt: a, completion: c}}], packing: false}",
    "model: {task: question_answering}\ndata: {doc_stride: 9, max_length: 384}\nevaluation: {max_answer_length: 9}",
    "model: {task: seq2seq_lm}\nevaluation: {suites: [{suite: loss, data: [{path: a, format: source_target}]}]}",
    "evaluation: {suites: [{suite: loss}, {suite: generate, data: [{path: a, format: alpaca}]}], num_beams: 4}",
    "evaluation: {during_training: [generate], max_new_tokens: 9}",
    "model: {task: question_answering}\nevaluation: {suites: [{suite: squad}], max_answer_length: 9}",
    "evaluation: {suites: [{suite: loss, data: [{path: org/held, streaming: true, limit: 9}]}]}",
    "data: {eval_fraction: 0.1}\n"
    "evaluation: {suites: [{suite: loss}, {suite: choice, data: [{path: a}], shots: 5, shots_from: b}],"
    " during_training: [loss], best_metric: loss.loss, early_stopping_patience: 3}",
]


def recipe_of(text: str) -> Recipe:
    values, _ = parse_yaml(text, Located("test"))
    values.setdefault("model", {}).setdefault("name_or_path", "base")
    values.setdefault("data", {}).setdefault("train", [{"path": "rows.jsonl"}])
    recipe, _ = check(values)
    assert recipe is not None, text
    return recipe


@pytest.mark.parametrize(("text", "where", "what"), BROKEN)
def test_a_combination_without_sense_is_refused_at_its_key(text: str, where: str | list[str], what: str):
    problems = list(broken_rules(recipe_of(text)))
    paths = ["".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in one.path) for one in problems]
    assert paths == [f".{one}" for one in ([where] if isinstance(where, str) else where)]
    assert problems[0].what.startswith(what)
    assert problems[0].todo


@pytest.mark.parametrize("text", SOUND)
def test_what_makes_sense_passes(text: str):
    assert not list(broken_rules(recipe_of(text)))


def test_every_rule_is_broken_by_one_of_these_and_documented():
    for rule in RULES:
        assert rule.__doc__, rule.__name__
        assert any(list(rule(recipe_of(text))) for text, _, _ in BROKEN), rule.__name__


@pytest.mark.parametrize("text", SOUND)
def test_no_rule_is_broken_by_writing_the_defaults_out(text: str, tmp_path: Path):
    """resolved.yaml has every key in it."""
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_recipe(recipe_of(text)))
    assert load_recipe(path) == recipe_of(text)


def test_the_problem_points_at_the_line_of_the_key(tmp_path: Path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "model: {name_or_path: b}\ndata: {train: [{path: x}]}\ntraining:\n  warmup_steps: 5\n  warmup_ratio: 0.5\n"
    )
    with pytest.raises(UserErrors, match=r"r.yaml:5:3: `warmup_ratio: 0.5` beside .* Keep one of the two\."):
        load_recipe(path)


def test_a_rule_says_nothing_of_a_value_that_is_already_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def ours(recipe: Recipe) -> Iterator[Problem]:
        yield Problem(("training", "on_nonfinite"), "`on_nonfinite: skip` is not wanted", "Delete it")

    monkeypatch.setattr(rules, "RULES", (*RULES, ours))
    path = tmp_path / "r.yaml"
    path.write_text("model: {name_or_path: b}\ndata: {train: [{path: x}]}\ntraining: {on_nonfinite: skip}\n")
    with pytest.raises(UserErrors) as caught:
        load_recipe(path)
    assert len(caught.value.problems) == 1
    assert "not available yet" in caught.value.what
