#!/usr/bin/env bash
# The pipelines as a person types them.
#
#   ./launch.sh setup                     make .venv and install pinned dependencies; every other command does it too
#   ./launch.sh demo [--task more|jmere] [--seed N] [--output DIR]
#                                         the whole pipeline on the embedded example, minutes on two cores
#   ./launch.sh more-r1 --model MODEL --data DIR [--output DIR] [--expert KIND:NAME] [--stage NAME[,NAME…]] …
#                                         MORE-R1 with the paper's settings, see docs/recipes/more-r1.sh; a stage that
#                                         is done is skipped
#   ./launch.sh jmere-r1 --model MODEL --data DIR [--stage NAME] …
#                                         JMERE-R1 with the paper's settings, see docs/recipes/jmere-r1.sh; likewise
#   ./launch.sh test [pytest arguments]   the tests
#
# PYTHON=/path/to/python ./launch.sh …    use that interpreter as it is and install nothing
# PROCESSES=N ./launch.sh …               number of processes (default: one a GPU, two without any)
# RESTARTS=N ./launch.sh …                start all processes again, from the last checkpoint, when one has died (default: 0)
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}
# Nothing here needs a hub unless a hub name is given as --model.
export TOKENIZERS_PARALLELISM=false

fail() { echo "error: $*" >&2; exit 2; }

setup() {
    if [ -n "${PYTHON:-}" ]; then
        python=$(command -v "$PYTHON") || fail "PYTHON=$PYTHON: not an interpreter"
        python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
        return
    fi
    python=$here/.venv/bin/python
    local wanted
    wanted=$(cat "$here/setup.py" "$here/constraints.txt" | cksum)
    [ "$(cat "$here/.venv/ready" 2>/dev/null)" = "$wanted" ] && return
    command -v python3 >/dev/null || fail "python3: not found; Python 3.11 or newer is needed"
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "python3 is $(python3 -V 2>&1); Python 3.11 or newer is needed (PYTHON=… names another one)"
    echo "installing into $here/.venv"
    rm -f "$here/.venv/ready"
    python3 -m venv "$here/.venv" || fail "python3 -m venv failed (Debian: apt install python3-venv)"
    # One install with the constraints: a torch that some other package asked for first would be another build.
    "$python" -m pip install --quiet --disable-pip-version-check -c "$here/constraints.txt" -e "$here[test]"
    echo "$wanted" >"$here/.venv/ready"
}

many() { # a module under torchrun
    OMP_NUM_THREADS=$threads "$python" -m torch.distributed.run --nproc-per-node "$processes" \
        --max-restarts "${RESTARTS:-0}" --rdzv-backend c10d --rdzv-endpoint localhost:0 -m "$@"
}

one() { OMP_NUM_THREADS=$(nproc) "$python" -m "$@"; }

once() { # result, command: not again where <result>.done holds this very command
    local mark=$1.done result=$1
    shift
    if [ -e "$mark" ]; then
        [ "$(cat "$mark")" = "$*" ] ||
            fail "$mark: found $(cat "$mark"); expected $*; remove it and $result to do it again, or choose another --output"
        echo "done before, skipped: $mark"
        return
    fi
    "$@"
    echo "$*" >"$mark"
}

title() { printf '\n\033[1m── %s\033[0m\n' "$*"; }

. "$here/docs/recipes/more-r1.sh"

# What the demo sets apart from the papers' settings: it is a thousandth of their size and learns from nothing.
stage_1="--train_vision True --batch_size 32 --learning_rate 2e-3"

demo() {
    local seed=0 output="" task=more
    while [ $# -gt 0 ]; do
        [ $# -gt 1 ] || fail "demo: no option $1, or no value behind it; it takes --task, --seed and --output"
        case $1 in
            --task) task=$2 ;; --seed) seed=$2 ;; --output) output=$2 ;;
            *) fail "demo: no option $1; it takes --task, --seed and --output" ;;
        esac
        shift 2
    done
    [[ $seed =~ ^[0-9]+$ ]] || fail "--seed $seed: expected a whole number"
    [ "$task" = more ] || [ "$task" = jmere ] || fail "--task $task: expected more or jmere"
    [ -n "$output" ] || { output=runs/demo; [ "$task" = more ] || output=runs/demo-jmere; }
    mkdir -p "$output"
    # another seed in the same folder begins anew
    [ "$(cat "$output/seed" 2>/dev/null)" = "$seed" ] ||
        rm -rf "$output"/*.done "$output"/test/*.done "$output"/stage_?/checkpoints
    echo "$seed" >"$output/seed"
    local world=$output/world settings="--task $task --seed $seed --max_completion_tokens 96"
    "demo_$task"
}

results() { # the folders of three evaluations: before, after stage 1, after stage 2
    title "result"
    one grpo.compare zero_shot="$1" sft="$2" grpo="$3" --output "$output/results.json"
    one grpo.report "$output/stage_1" "$output/stage_2" "$@" --output "$output/report.html"
}

demo_more() { # the variables of these two are demo's
    title "the embedded example: a small MORE-like world, a scripted expert, a tiny random Qwen2.5-VL"
    once "$world" one data.toy --output "$world" --seed "$seed" --train 4800 --valid 200 --test 800
    more_r1 --model "$world/model" --data "$world/MORE" --expert "file:$world/expert.jsonl" --output "$output" \
        --seed "$seed" --recipe "$here/docs/recipes/more-demo" --stage data,zero_shot,stage_1,split,stage_2
    results "$output/test/zero_shot" "$output/test/stage_1" "$output/test/stage_2"
}

demo_jmere() {
    local data=$world/JMERE
    title "the embedded example: small JMERE-like posts, a scripted expert, a tiny random Qwen2.5-VL"
    once "$world" one data.toy --task jmere --output "$world" --seed "$seed" --train 4800 --valid 200 --test 800
    title "reasoning data for half of the posts: three candidates each, the re-prediction filter, the score filter"
    once "$output/mp_cot" one sft.annotate --task jmere --data "$data" --split train --fraction 0.5 --seed "$seed" \
        --candidates 3 --repredict True --score True --expert "file:$world/expert.jsonl" --output "$output/mp_cot.jsonl"
    title "zero-shot"
    once "$output/zero_shot" many grpo.evaluate $settings --model "$world/model" --data "$data" \
        --output "$output/zero_shot" --reasoning False --max_completion_tokens 16
    title "stage 1: SFT on the reasoning (the whole tiny model: its vision encoder knows nothing yet)"
    once "$output/stage_1" many sft.train $settings $stage_1 --epochs 7 --validate_every 7 --valid_split val \
        --model "$world/model" --data "$data" --responses "$output/mp_cot.jsonl" --output "$output/stage_1"
    once "$output/sft" many grpo.evaluate $settings --model "$output/stage_1/model" --data "$data" --output "$output/sft"
    title "stage 2: GRPO, one update a rollout, no clip"
    once "$output/stage_2" many grpo.train $settings --objective jmere-r1 --learning_rate 2e-4 --max_rollouts 100 \
        --validate_every 20 --valid_split val --rollout_log_every 5 --model "$output/stage_1/model" --data "$data" --output "$output/stage_2"
    once "$output/grpo" many grpo.evaluate $settings --model "$output/stage_2/model" --data "$data" --output "$output/grpo"
    results "$output/zero_shot" "$output/sft" "$output/grpo"
}

processes_and_threads() {
    # a power of two, so that the demo's 16 prompts a rollout divide
    processes=${PROCESSES:-$("$python" -c 'import torch; n = torch.cuda.device_count() or 2; print(1 << min(n, 16).bit_length() - 1)')}
    threads=$(( $(nproc) / processes )); [ "$threads" -ge 1 ] || threads=1
}

command=${1:-}; [ $# -gt 0 ] && shift
case $command in
    setup) setup; echo "ready: $python" ;;
    demo) setup; processes_and_threads; demo "$@" ;;
    more-r1) setup; processes_and_threads; more_r1 "$@" ;;
    jmere-r1) setup; processes_and_threads; . "$here/docs/recipes/jmere-r1.sh"; jmere_r1 "$@" ;;
    test) setup; cd "$here"; OMP_NUM_THREADS=$(nproc) "$python" -m pytest "$@" ;;
    *) sed -n '2,16p' "$here/launch.sh" | cut -c3-; exit 2 ;;
esac
