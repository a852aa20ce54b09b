#!/usr/bin/env bash
# The whole line on a fresh machine: install, finetune a small model, measure it before and after, merge it.
#
#   bash scripts/quickstart.sh
#
# Nothing but the packages is downloaded. Run it again at any time: it installs, trains and merges only what is missing.
# scripts/lib/environment.sh says how to choose the Python and the place of the environment.

source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"

if [[ $# -gt 0 ]]; then
  printf 'quickstart.sh takes no arguments, found: %s. For another recipe: %s/bin/qlora train RECIPE\n' "$*" "$VENV" >&2
  exit 2
fi
run=runs/quickstart
environment ""

step "train: configs/quickstart.yaml" \
  "Run the same command again: it goes on from the last checkpoint. To begin anew: rm -r $run"
"$VENV/bin/qlora" train configs/quickstart.yaml

step "evaluate: held-out data, before and after" \
  "The trained adapter is safe. Run the same command again; to begin anew: rm -r $run"
"$VENV/bin/qlora" eval "$run" --baseline

if [[ ! -e $run/merged/merge.json ]]; then
  step "merge: the adapter into the weights" \
    "The trained adapter is safe. Run the same command again: it goes on with what is whole."
  "$VENV/bin/qlora" merge "$run"
fi

cat <<END

The merged model is $run/merged, a plain transformers folder.
Next, your own model and data:
  source $VENV/bin/activate
  qlora init my.yaml --model HuggingFaceTB/SmolLM2-135M-Instruct --data rows.jsonl
  qlora train my.yaml
More recipes: configs/. Every key: docs/recipe.md.
END
