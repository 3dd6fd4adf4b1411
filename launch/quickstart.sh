#!/usr/bin/env bash
# From nothing to a small model that talks, on a CPU: bash launch/quickstart.sh [--gin.NAME=VALUE]
# Makes .venv, prepares a corpus of dialogues, trains a tokenizer and a small Llama, and shows what
# it learned. Run again, it resumes, or shows the results once more. Everything that it writes is in
# .venv, data/ and runs/quickstart (MODEL_DIR).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/environment.sh

make_environment .venv demo
export PATH="$PWD/.venv/bin:$PATH"
run=runs/quickstart.gin
model_dir=${MODEL_DIR:-runs/quickstart}
SECONDS=0

say() { printf '\n== %s (%s s)\n' "$1" "$SECONDS"; }

say "corpus, tokenizer, tokens"
t5x_lite data prepare --gin_file "$run" "$@"
say "training"
t5x_lite train --gin_file "$run" --model_dir "$model_dir" "$@"
say "loss on held-out text, beside unigram and bigram models"
t5x_lite eval --model_dir "$model_dir" --baselines
say "continuations"
t5x_lite generate --model_dir "$model_dir" --temperature 0.8 --max_tokens 40 \
  --prompt "Hi! How are you?" --prompt "What do you do for fun?" --prompt "I love" < /dev/null
say "loss curve"
t5x_lite plot --model_dir "$model_dir"
say "done"
