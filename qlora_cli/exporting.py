"""`qlora export`: a finished run, a model folder or an adapter, in the form that its destination reads."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlora_cli.errors import Exit, UserError
from qlora_cli.evaluation import digest_of, refuse_damaged
from qlora_cli.export.peft_folder import check_base_name
from qlora_cli.export.push import check_push, push
from qlora_cli.export.source import Order, Source, places_in, refuse_place
from qlora_cli.export.table import EXPORTERS, Exporter, exporter_of
from qlora_cli.model.adapter import WEIGHTS
from qlora_cli.model.continued import CONFIG
from qlora_cli.model.source import read_json
from qlora_cli.recipe import load_recipe
from qlora_cli.train.run import Run, date_of, read_facts

RECORD = "merge.json"
MODEL_CONFIG = "config.json"


@dataclass(frozen=True)
class Wanted:
    """What `qlora export` was asked for.

    to: a name of EXPORTERS. out: None for RUN/export/TO. file_type: of a GGUF. merged: another folder than RUN/merged.
    base_name: what an adapter's base is called for others. push: USER/REPO. force: whatever the certificate says.
    """

    to: str
    out: Path | None = None
    file_type: str | None = None
    merged: Path | None = None
    base_name: str | None = None
    push: str | None = None
    private: bool = True
    force: bool = False


def export(target: Path, wanted: Wanted, say: Callable[[str], None]) -> dict[str, Any]:
    """Writes what `wanted` says of the run, model or adapter in `target`, then pushes it where that is asked for.

    Returns what was written, with notes and the commands to run next. Raises UserError before anything is written.
    """
    exporter = exporter_of(wanted.to)
    refuse_needless(wanted, exporter)
    if wanted.base_name is not None:
        check_base_name(wanted.base_name)
    token = check_push(wanted.push) if wanted.push else None
    source, notes = source_of(target, exporter, wanted)
    out = place_of(target, wanted, exporter)
    if wanted.push and exporter.names_base:
        refuse_unnamed_base(source, wanted)
    refuse_place(out, source.inputs)
    order = Order(out, type_of(wanted, exporter), wanted.base_name, say)
    facts = exporter.write(source, order)
    result = {
        "to": wanted.to,
        "from": str(source.folder),
        "out": str(out),
        "files": files_in(out),
        **facts.told,
        "notes": [*notes, *facts.notes],
        "commands": [*facts.commands],
    }
    if token and wanted.push:
        result["push"] = push(out, wanted.push, wanted.private, token)
    return result


def refuse_needless(wanted: Wanted, exporter: Exporter) -> None:
    """Refuses options that say nothing of what is exported."""
    useless = {
        "--type": wanted.file_type is not None and not exporter.file_type,
        "--merged": wanted.merged is not None and exporter.needs != "merged",
        "--base-name": wanted.base_name is not None and not exporter.names_base,
    }
    for option in (option for option, given in useless.items() if given):
        raise UserError(option, f"says nothing of --to {wanted.to}", "leave it out")


def refuse_unnamed_base(source: Source, wanted: Wanted) -> None:
    """Refuses to push an adapter whose base is a folder of this machine: nobody else could load it."""
    base = wanted.base_name or source.base or ""
    if os.path.isabs(base) or os.path.isdir(base):
        what = f"the adapter's base is a folder of this machine ({base})"
        raise UserError("--push", what, "name it by its hub id: --base-name USER/MODEL", Exit.USAGE)


def source_of(target: Path, exporter: Exporter, wanted: Wanted) -> tuple[Source, list[str]]:
    """What is exported of `target`, and notes on it. Raises UserError where that is not there, or not to be trusted."""
    if (target / "resolved.yaml").is_file():
        return source_of_run(Run(target), exporter, wanted)
    kinds = {"merged": (MODEL_CONFIG, "a model folder"), "adapter": (CONFIG, "a PEFT folder")}
    file, kind = kinds[exporter.needs]
    if wanted.merged is not None:
        raise UserError("--merged", f"{target} is no run folder", "name the merged folder itself")
    if not (target / file).is_file():
        what = f"neither a run folder nor {kind} (no {file})" if target.is_dir() else "no such folder"
        raise UserError(target, what, f"name a finished run, or {kind}, for --to {wanted.to}")
    source = Source(target, name_of(target), inputs=(target,), places=(str(target.absolute()), os.getcwd()))
    if exporter.needs == "merged":
        return source, [*certified(target, None, wanted.force), *unknown_of(target)]
    refuse_damaged(target)
    return with_base(source), []


def source_of_run(run: Run, exporter: Exporter, wanted: Wanted) -> tuple[Source, list[str]]:
    """The merged model or the adapter of a run, with what the recipe says of it."""
    facts = read_facts(run)
    if facts is None or not run.adapter.exists():
        raise UserError(run.folder, "no finished run there (no adapter/)", "run `qlora train` to its end first")
    refuse_damaged(run.adapter)
    refuse_incomplete(run.adapter)
    recipe = load_recipe(run.resolved)
    base = facts.get("base")
    base_folder = base.get("folder") if isinstance(base, dict) else None
    merged = wanted.merged or run.folder / "merged"
    folder = merged if exporter.needs == "merged" else run.adapter
    source = Source(
        folder,
        name_of(run.folder),
        base_folder=Path(base_folder) if isinstance(base_folder, str) else None,
        stored=recipe.quantization.data_type,
        template_kwargs=dict(recipe.data.chat_template_kwargs),
        today=date_of(run),
        inputs=(run.adapter, run.checkpoints, run.base, merged),
        rows=tuple(recipe.data.train),
        places=(str(run.folder.absolute()), os.getcwd(), *places_in(facts), *places_in(recipe.model_dump(mode="json"))),
    )
    if exporter.needs == "adapter":
        return with_base(source), []
    if not (merged / MODEL_CONFIG).is_file():
        where = f"--merged {merged}" if wanted.merged else merged
        raise UserError(where, "no merged model there", f"run `qlora merge {run.folder}` first")
    return source, certified(merged, run.adapter, wanted.force)


def with_base(source: Source) -> Source:
    """An adapter with the base that it names."""
    path = source.folder / CONFIG
    named = read_json(path, "a PEFT adapter folder needs it").get("base_model_name_or_path")
    if named is not None and not isinstance(named, str):
        raise UserError(path, "base_model_name_or_path is no text", "write the base's hub id or folder there")
    return replace(source, base=named or None, places=(*source.places, *places_in(named)))


def unknown_of(merged: Path) -> list[str]:
    """A note on a merged folder that is exported by itself and has a template: its run knows more of that."""
    if not (merged / RECORD).is_file() or not (merged / "chat_template.jinja").is_file():
        return []
    adapter = read_json(merged / RECORD, "qlora merge writes it").get("adapter")
    run = Path(adapter).parent if isinstance(adapter, str) else "RUN"
    what = "data.chat_template_kwargs and the date of its run are not known of a folder by itself"
    return [f"{what}: `qlora export {shlex.quote(str(run))} --merged {shlex.quote(str(merged))}` takes them along"]


def refuse_incomplete(adapter: Path) -> None:
    """Refuses an adapter folder without weights or config."""
    for name in (WEIGHTS, CONFIG):
        if not (adapter / name).is_file():
            todo = "train again, or take the adapter out of the newest checkpoint"
            raise UserError(adapter, f"no {name} there", todo)


def certified(merged: Path, adapter: Path | None, force: bool) -> list[str]:
    """Notes on what is known of a merged folder. Raises UserError (exit 3) where its certificate did not hold.

    adapter: that of the run, of which the folder must be; None where it is exported by itself.
    """
    path = merged / RECORD
    if not path.is_file():
        return [] if adapter is None else [f"{merged} has no {RECORD}: nothing says that it is of this run"]
    record = read_json(path, "qlora merge writes it")
    if adapter is not None and record.get("adapter_digest", "") != digest_of(adapter):
        what = f"was merged from another adapter than {adapter}"
        raise UserError(merged, what, "run `qlora merge` again, or name another folder with --merged", Exit.REFUSED)
    certificate = record.get("certificate")
    if certificate is None:
        return ["the merge was not verified: it has no certificate"]
    if isinstance(certificate, dict) and certificate.get("held", 0) is None and record.get("base") == "merged":
        return [f"quantised to {record.get('dtype')}, which has no limit: merge.json says what it costs"]
    if not isinstance(certificate, dict) or not isinstance(certificate.get("held"), bool):
        raise UserError(path, "damaged: its certificate does not say whether it held", "run `qlora merge` again")
    if certificate["held"]:
        return []
    if not force:
        what = f"its certificate did not hold: it differs too much from the unmerged model ({path})"
        raise UserError(merged, what, "merge again, or export it all the same with --force", Exit.REFUSED)
    return ["the certificate of the merge did not hold: the model differs too much from the unmerged one"]


def place_of(target: Path, wanted: Wanted, exporter: Exporter) -> Path:
    """Where the export goes: --out, or RUN/export/TO. Raises UserError where neither says."""
    file = exporter.file.format(file_type=type_of(wanted, exporter))
    if wanted.out is not None:
        if file and wanted.out.suffix != ".gguf":
            raise UserError(
                f"--out {wanted.out}", f"--to {wanted.to} makes a file", "give it a name that ends in .gguf"
            )
        return wanted.out
    if not (target / "resolved.yaml").is_file():
        raise UserError("--out", f"{target} is no run folder, which would have a place", "name the new place")
    folder = target / "export" / wanted.to
    return folder / file if file else folder


def type_of(wanted: Wanted, exporter: Exporter) -> str:
    """The GGUF's type by its name in FILE_TYPES; Q8_0 is q8_0."""
    return (wanted.file_type or exporter.file_type).lower()


def files_in(out: Path) -> dict[str, int]:
    """The exported files, by name, with their sizes in bytes."""
    paths = sorted(out.rglob("*")) if out.is_dir() else [out]
    return {str(path.relative_to(out) if out.is_dir() else path.name): path.stat().st_size for path in paths}


def name_of(folder: Path) -> str:
    """What servers call a model: the folder's name, in letters that they take."""
    return re.sub(r"[^a-z0-9._-]+", "-", folder.resolve().name.lower()).strip("-._") or "model"


__all__ = ["EXPORTERS", "Wanted", "export"]
