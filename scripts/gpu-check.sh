#!/usr/bin/env bash
# The whole GPU check: correctness, the Llama-2-7B shape, perplexity of every setting, other runtimes.
#
# usage: gpu-check.sh pack FOLDER     builds here (--features cuda, no GPU needed) and collects what the check needs
#        gpu-check.sh run FOLDER      runs it, on a machine with an NVIDIA GPU; FOLDER as packed; works in $WORK (/tmp/gpu-check)
#
# run does more where more is there: MODEL (a float model folder) with WINDOWS (safetensors, input_ids) and TEST (text) for
# the perplexity rows; GPTQModel importable by python3 for its own reading of our files (of those rows, and of files/* on the
# token ids of ids.txt, a sequence a line); compute-sanitizer on the PATH; PLAN (of a matrix of MODEL), git with git-lfs.
# LAMBADA (a file of its passages).
# MATRIX picks among the ways of the matrix step: one exact abreast shared two four (default: all).
# STEPS picks among: tests sanitizer linears text theirs seven variants long bytes matrix six rows loads formats (default: all).
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)

executable() { # of a test target
  cd "$here" && cargo test --release --locked "$@" --no-run 2>&1 | sed -n 's/.*Executable.*(\(.*\))/\1/p'
}

pack() {
  local folder=$1 target=${CARGO_TARGET_DIR:-$here/target}
  mkdir -p "$folder"
  (cd "$here" && cargo build --release --locked --workspace --features gptq-cli/cuda)
  (cd "$here" && cargo build --release --locked -p gptq-kernels --features cuda --examples)
  local tests whole
  tests=$(executable -p gptq-quantizer --features cuda --test device)
  whole=$(executable -p gptq-cli --features cuda --test integration)
  cp "$target/release/gptq" "$target"/release/examples/gpu_{speed,linear} "$folder/"
  cp "$(executable -p gptq-kernels --features cuda --test packed_device)" "$folder/packed_tests"
  cp "$(executable -p gptq-kernels --features cuda --test text_device)" "$folder/text_tests"
  cp "$(executable -p gptq-kernels --features cuda --test activation_store_device)" "$folder/store_tests"
  cp "$(executable -p gptq-kernels --features cuda --test backward_device)" "$folder/backward_tests"
  cp "$(executable -p gptq-inference --features cuda --test runner_device)" "$folder/runner_tests"
  cp "$tests" "$folder/device_tests"
  cp "$whole" "$folder/whole_tests"
  cp -r "$here/tests/fixtures" "$folder/fixtures"
  strip "$folder"/{gptq,gpu_speed,gpu_linear,{device,packed,text,store,backward,runner,whole}_tests}
  cp "$0" "$here"/scripts/peer_*.py "$folder/"
  echo "packed $(du -sh "$folder" | cut -f1) into $folder"
}

section() { printf '\n== %s (%d s)\n' "$1" "$SECONDS"; }
last() { tr '\r' '\n' | grep -vE '^(blocks|bytes): |^/.*: [0-9]+/[0-9]+ after' | tail -"$1"; }
wanted() { [[ " ${STEPS:-tests sanitizer linears text theirs seven variants long bytes matrix six rows loads formats} " == *" $1 "* ]]; }

quantize() { # NAME MODEL ARGS...: one line of figures
  local name=$1 model=$2
  shift 2
  local begin=$EPOCHREALTIME
  if timeout 300 ./gptq quantize "$model" -o "out/$name" --device cuda:0 "$@" >"log/$name" 2>&1; then
    printf '%-12s %6.1f s wall; %s; %s\n' "$name" "$(awk "BEGIN { print $EPOCHREALTIME - $begin }")" \
      "$(tr '\r' '\n' <"log/$name" | grep 'linears in')" "$(grep 'output error' "log/$name")"
  else
    printf '%-12s FAILED: ' "$name"
    tr '\r' '\n' <"log/$name" | tail -2
  fi
}

watched() { # like quantize, with the most that nvidia-smi ever shows as used
  nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits -lms 100 >log/used &
  local watcher=$!
  quantize "$@"
  kill $watcher
  echo "             nvidia-smi: at most $(sort -n log/used | tail -1) MiB used on the GPU"
}

logits() { # NAME DEVICE FOLDER...: expected-NAME-N.safetensors in each, one for each line of ids.txt
  local name=$1 device=$2
  shift 2
  for folder in "$@"; do
    local at=0
    while read -r ids; do
      echo "$folder --write $folder/expected-$name-$((at++)).safetensors --device $device --ids $ids"
    done <ids.txt
  done | RAYON_NUM_THREADS=2 xargs -L 1 -P 6 ./gptq verify >log/logits 2>&1 || tail -2 log/logits
}

matrix() { # NAME DEVICES ARGS...: seconds, and a hash of all branches; the repository goes
  local name=$1 devices=$2 begin=$EPOCHREALTIME
  shift 2
  # shellcheck disable=SC2086
  if SOURCE_DATE_EPOCH=0 timeout 400 ./gptq matrix seven -o "out/$name" --preset long-context $ids --evaluate none \
    --device "$devices" "$@" >"log/matrix-$name" 2>&1; then
    printf '%-8s %6.1f s on %s; branches %s\n' "$name" "$(awk "BEGIN { print $EPOCHREALTIME - $begin }")" "$devices" \
      "$(cat "out/$name"/refs/heads/* | sha256sum | cut -c1-16)"
  else
    printf '%-8s FAILED: ' "$name"
    tr '\r' '\n' <"log/matrix-$name" | tail -2
  fi
  rm -rf "out/$name"
}

run() {
  local failed=""
  local work=${WORK:-/tmp/gpu-check}
  mkdir -p "$work/out" "$work/log"
  cp -r "$1"/. "$work/"
  cd "$work"
  chmod +x gptq gpu_* ./*_tests
  section "machine"
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  ./gptq doctor
  if wanted tests; then
    section "GPU against the processor"
    # What fails is said at the end: the rest is worth its time all the same.
    timeout 120 ./device_tests --test-threads=1 2>&1 | tail -7 || failed="$failed device_tests"
    timeout 120 ./packed_tests --test-threads=1 2>&1 | tail -7 || failed="$failed packed_tests"
    timeout 120 ./text_tests --test-threads=1 2>&1 | tail -7 || failed="$failed text_tests"
    timeout 120 ./store_tests --test-threads=1 2>&1 | tail -8 || failed="$failed store_tests"
    timeout 300 ./backward_tests --test-threads=1 --nocapture 2>&1 |
      grep -E '^FAIL|^test|allowed$| ms$| MB|skipped|panicked|result' || failed="$failed backward_tests"
    GPTQ_FIXTURES=$PWD/fixtures timeout 120 ./runner_tests --test-threads=1 --nocapture 2>&1 |
      grep -E '^test|mean|skipped|panicked|result' || failed="$failed runner_tests"
    GPTQ_COMMAND=$PWD/gptq timeout 200 ./whole_tests pipeline::gpu --test-threads=1 2>&1 | tail -20 || failed="$failed whole_tests"
  fi
  if wanted sanitizer && command -v compute-sanitizer >/dev/null; then
    section "compute-sanitizer"
    for size in "172 43" "11008 43"; do
      for tool in memcheck racecheck; do
        # shellcheck disable=SC2086
        echo "$tool, K N = $size: $(timeout ${SANITIZER_SECONDS:-100} compute-sanitizer --tool $tool \
          ./gpu_speed $size 0 1 2>&1 | grep -E 'SUMMARY|Error|ERROR|hazard|Invalid|sweep' | sort | uniq -c | head -6 | tr '\n' ';')"
      done
    done
    for test in the_shapes many_outputs portable; do
      echo "memcheck, packed_tests $test: $(timeout ${SANITIZER_SECONDS:-100} compute-sanitizer --tool memcheck \
        ./packed_tests "$test" 2>&1 | grep -E 'SUMMARY|test result|Invalid' | sort | uniq -c | head -6 | tr '\n' ';')"
    done
    echo "memcheck, text_tests: $(timeout ${SANITIZER_SECONDS:-100} compute-sanitizer --tool memcheck ./text_tests 2>&1 |
      grep -E 'SUMMARY|test result|Invalid' | sort | uniq -c | head -6 | tr '\n' ';')"
  fi
  if wanted linears; then
    section "packed products, microseconds by rows"
    timeout 120 ./gpu_linear
  fi
  local ids="--dataset ids.safetensors --samples 128 --seq-len 2048"
  if wanted text; then
    section "text of a Llama-2-7B shape, 4-bit g128"
    ./gptq synth --shape llama-2-7b -o seven --calibration text.safetensors --samples 166 --seq-len 2048 2>&1 | last 1
    for order in "" --desc-act; do
      # shellcheck disable=SC2086
      quantize "text$order" seven --dataset text.safetensors --samples 128 --seq-len 2048 $order
      for setting in "2048 1" "512 16" "512 64"; do
        set -- $setting
        timeout 100 ./gptq eval "out/text$order" --dataset text.safetensors --max-windows 1 --device cuda:0 --speed \
          --speed-prompt "$1" --speed-batch "$2" --speed-tokens 128 2>&1 | grep '^out.*tokens/s'
      done
    done
    local begin=$EPOCHREALTIME
    timeout 100 ./gptq eval out/text --dataset text.safetensors --device cuda:0 2>/dev/null | last 1
    echo "166 windows of 2048 tokens scored in $(awk "BEGIN { print $EPOCHREALTIME - $begin }") s"
    if python3 -c 'import gptqmodel' 2>/dev/null; then
      timeout 300 python3 peer_speed.py out/text 2>log/peer_speed | grep RESULT || tail -3 log/peer_speed
    fi
    rm -rf seven out/text*
  fi
  if wanted theirs && [ -n "${MODEL:-}" ] && python3 -c 'import gptqmodel' 2>/dev/null; then
    section "checkpoints that GPTQModel writes, in its runtime and in ours"
    timeout 400 python3 peer_quantize.py "$MODEL" "$WINDOWS" out/theirs \
      '4-64-act={"bits":4,"group_size":64,"desc_act":true,"sym":true}' \
      '4-64-asym-v2={"bits":4,"group_size":64,"desc_act":true,"sym":false,"format":"gptq_v2"}' \
      '8-64={"bits":8,"group_size":64,"desc_act":false,"sym":true}' \
      '3-64={"bits":3,"group_size":64,"desc_act":false,"sym":true}' 2>log/theirs | grep RESULT || tail -3 log/theirs
    timeout 200 python3 peer_perplexity.py "$TEST" out/theirs/* 2>/dev/null | grep RESULT || true
    timeout 200 ./gptq eval "$MODEL" out/theirs/* --dataset "$TEST" --device cuda:0 ${LAMBADA:+--lambada "$LAMBADA"} --speed 2>&1 | last 16
  fi
  if wanted seven; then
    section "Llama-2-7B shape, 32 blocks, 128 x 2048 tokens, 4-bit g128"
    ./gptq synth --shape llama-2-7b -o seven --calibration ids.safetensors --samples 128 --seq-len 2048 2>&1 | last 1
    sync
    # shellcheck disable=SC2086
    watched natural seven $ids --profile
    sed -n '/^products/,$p' log/natural
    for setting in ${SEVEN:-}; do # e.g. "--desc-act --gpu-memory=6GB"
      # shellcheck disable=SC2086
      watched "seven$setting" seven $ids "$setting"
    done
    rm -rf out/* seven
  fi
  if wanted variants; then
    section "the same shape, 8 blocks"
    ./gptq synth --shape llama-2-7b --layers 8 -o eight --calibration ids.safetensors --samples 128 --seq-len 2048 2>&1 | last 1
    sync
    # shellcheck disable=SC2086
    for setting in "" "--desc-act" "--gpu-memory 6GB" "--bits 8" "--bits 3" "--group-size 32" "--group-size none"; do
      watched "8x${setting// /_}" eight $ids $setting
    done
    if wanted bytes; then
      # shellcheck disable=SC2086
      quantize again eight $ids
      cat out/8x/*.safetensors | sha256sum
      cat out/again/*.safetensors | sha256sum
    fi
    rm -rf out/* eight
  fi
  if wanted long; then
    section "16 x 32768 tokens, linear rope factor 8, 4 blocks; then 128 x 2048"
    ./gptq synth --shape llama-2-7b-32k --layers 4 -o long --calibration long.safetensors --samples 16 --seq-len 32768 2>&1 | last 1
    [ -e ids.safetensors ] || ./gptq synth --shape llama-2-7b --layers 1 -o one --calibration ids.safetensors --samples 128 --seq-len 2048 2>&1 | last 1
    sync
    watched long long --dataset long.safetensors --samples 16 --seq-len 32768 --profile
    sed -n '/^| load/,/^| measure/p' log/long
    # shellcheck disable=SC2086
    watched short long $ids --profile
    sed -n '/^| load/,/^| measure/p' log/short
    rm -rf out/* long one
  fi
  if wanted matrix; then
    section "Llama-2-7B shape, six branches of the long-context preset with 128 x 2048 tokens"
    ./gptq synth --shape llama-2-7b -o seven --calibration ids.safetensors --samples 128 --seq-len 2048 2>&1 | last 1
    sync
    nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits -i 0 -lms 100 >log/used &
    local watcher=$!
    for way in ${MATRIX:-one exact abreast shared two four}; do
      case $way in
        one) matrix one cuda:0 --only main ;;
        exact) matrix exact cuda:0 ;;
        abreast) matrix abreast cuda:0,cuda:0 ;;
        shared) matrix shared cuda:0 --shared-hessian ;;
        two) if nvidia-smi -L | grep -q "GPU 1"; then matrix two cuda:0,cuda:1; fi ;;
        four) if nvidia-smi -L | grep -q "GPU 1"; then matrix four cuda:0,cuda:0,cuda:1,cuda:1; fi ;;
      esac
    done
    kill $watcher
    echo "nvidia-smi: at most $(sort -n log/used | tail -1) MiB used on the first GPU"
    rm -rf out/* seven
  fi
  if wanted six && [ -n "${MODEL:-}" ] && [ -n "${PLAN:-}" ]; then
    section "$PLAN of $MODEL, exact and with shared Hessians"
    for mode in "" --shared-hessian; do
      timeout 300 ./gptq matrix "$MODEL" -o "out/six$mode" --plan "$PLAN" --dataset "$WINDOWS" --samples 128 --seq-len 2048 \
        --evaluate "$TEST" --device cuda:0 $mode >"log/six$mode" 2>&1 || tail -2 "log/six$mode"
      echo "six $mode"
      tr '\r' '\n' <"log/six$mode" | grep -o '^[^ ]*: perplexity .*' || true
    done
    # As a newcomer does it: stock git and git-lfs, then the runtimes.
    local branch=gptq-4bit-64g-actorder_True
    if git lfs version && git clone -q --single-branch --branch $branch out/six out/clone; then
      ./gptq verify out/clone --write out/logits.safetensors --ids 1,2,3 --device cuda:0 2>&1 | last 1
      ./gptq eval out/clone --dataset "$TEST" --device cuda:0 2>/dev/null | tail -1
      python3 peer_perplexity.py "$TEST" out/clone 2>/dev/null | grep RESULT || true
      if [ -e card_lines.py ]; then timeout 120 python3 card_lines.py out/clone 2>&1 | tail -3; fi
    fi
  fi
  if wanted rows && [ -n "${MODEL:-}" ]; then
    section "perplexity rows of $MODEL"
    local calibration="--dataset $WINDOWS --samples 128 --seq-len 2048"
    row() { # NAME ARGS...
      local name=$1
      shift
      # shellcheck disable=SC2086
      quantize "$name" "$MODEL" $calibration "$@"
    }
    row 8-64-act --bits 8 --group-size 64 --desc-act
    row 4-32-act --bits 4 --group-size 32 --desc-act
    row 4-64-act --bits 4 --group-size 64 --desc-act
    row 4-64 --bits 4 --group-size 64
    row 4-64-act-asym --bits 4 --group-size 64 --desc-act --asym
    row 4-none-act --bits 4 --group-size none --desc-act
    row 3-64 --bits 3 --group-size 64
    row 3-64-act --bits 3 --group-size 64 --desc-act
    row 2-64-act --bits 2 --group-size 64 --desc-act
    # shellcheck disable=SC2086
    timeout 200 ./gptq eval "$MODEL" ${EVAL:-out/[2-8]-*} --dataset "$TEST" --device cuda:0 2>/dev/null | sed -n '/| kind |/,/^$/p'
  fi
  if wanted loads && python3 -c 'import gptqmodel' 2>/dev/null; then
    section "the same files read by GPTQModel"
    timeout 300 python3 peer_perplexity.py "$TEST" out/[2-8]-* 2>/dev/null | grep RESULT || true
  fi
  if wanted formats && compgen -G "files/*" >/dev/null && python3 -c 'import gptqmodel' 2>/dev/null; then
    section "files of every format in GPTQModel, against our logits"
    logits f32 cpu files/*
    logits f16 cuda:0 files/2b-*
    find files -mindepth 1 -maxdepth 1 | sort | timeout 200 xargs -n 6 -P 6 python3 peer_loads.py TORCH 2>/dev/null | grep RESULT || true
  fi
  section "end"
  [ -z "$failed" ] || { echo "failed:$failed"; exit 1; }
}

case "${1:-}" in
  pack | run) "$1" "${2:?FOLDER}" ;;
  *) sed -n '2,12p' "$0" && exit 2 ;;
esac
