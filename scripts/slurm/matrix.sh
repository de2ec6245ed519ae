#!/usr/bin/env bash
# A matrix on a Slurm cluster: an array task for each branch, then the cards.
#
# usage: matrix.sh [SBATCH OPTIONS] -- MODEL -o REPO (--preset NAME | --plan FILE) [MATRIX OPTIONS]
#
#   matrix.sh --gres=gpu:1 --time=1:00:00 -- meta-llama/Llama-2-7b-hf -o /shared/Llama-2-7B-GPTQ --preset llama-2
#
# REPO lies on a file system that all nodes see. A task that is killed or requeued goes on where it stopped, since the
# same command does; one that fails leaves its branch absent, and submitting again makes what is missing. GPTQ names the
# program (gptq). Prints the ids of the array and of the job that assembles.
set -euo pipefail

options=()
while [ $# -gt 0 ] && [ "$1" != "--" ]; do
  options+=("$1")
  shift
done
[ $# -gt 1 ] || { sed -n '2,10p' "$0" && exit 2; }
shift
gptq=${GPTQ:-gptq}
arguments=$(printf ' %q' "$@")

mapfile -t branches < <("$gptq" matrix "$@" --dry-run --json | sed -n 's/^ *"branch": "\(.*\)",$/\1/p')
[ ${#branches[@]} -gt 0 ] || { echo "error: no branch in the plan" >&2 && exit 2; }
# The repository and its plan are there before tasks meet in it. Exit code 1: its branches are not.
"$gptq" matrix "$@" --assemble 2>/dev/null || [ $? = 1 ]

array=$(
  sbatch --parsable --requeue --open-mode=append --job-name=gptq-matrix "${options[@]}" \
    --array="0-$((${#branches[@]} - 1))" <<SCRIPT
#!/usr/bin/env bash
branches=($(printf ' %q' "${branches[@]}"))
exec $gptq matrix$arguments --only "\${branches[\$SLURM_ARRAY_TASK_ID]}"
SCRIPT
)
# After any end: the card tells what is there, and the exit code whether that is all.
assemble=$(
  sbatch --parsable --requeue --open-mode=append --job-name=gptq-cards "${options[@]}" \
    --dependency="afterany:$array" <<SCRIPT
#!/usr/bin/env bash
exec $gptq matrix$arguments --assemble
SCRIPT
)
echo "array $array, cards $assemble"
