#!/usr/bin/env bash
# The pipelines as a person types them. Each command takes --help.
#
#   ./launch.sh setup                     make .venv and install pinned dependencies; every other command does it too
#   ./launch.sh demo [--task more|jmere|text --model MODEL] [--seed N] [--output DIR]
#                                         the whole pipeline on the embedded example, minutes on two cores; text: GRPO
#                                         alone on a pretrained text model
#   ./launch.sh more-r1 --model MODEL --data DIR [--output DIR] [--expert KIND:NAME] [--stage NAME[,NAME…]] …
#                                         MORE-R1 with the paper's settings, see docs/recipes/more-r1.sh; a stage that
#                                         is done is skipped
#   ./launch.sh jmere-r1 --model MODEL --data DIR [--stage NAME[,NAME…]] …
#                                         JMERE-R1 with the paper's settings, see docs/recipes/jmere-r1.sh; likewise
#   ./launch.sh check [--json FILE] [--rates FILE]
#                                         two minutes on this machine's own device before a long run: every fast path
#                                         against its plain form, a run and its resume, memory, rates. An issue begins
#                                         with what it says
#   ./launch.sh test [pytest arguments]   the tests but those that are heavy; -m heavy: these alone; -h lists pytest's own
#                                         arguments. PROCESSES of them share the files, where none is named
#
# PYTHON=/path/to/python ./launch.sh …    use that interpreter as it is and install nothing
# PROCESSES=N ./launch.sh …               number of processes (default: one a GPU, two without any)
# RESTARTS=N ./launch.sh …                start all processes again, from the last checkpoint, when one has died (default: 0)
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# Our modules before those of the folder that this is started from, which python -m would search first.
export PYTHONSAFEPATH=1 PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}:$PWD
# Nothing here needs a hub unless a hub name is given as --model.
export TOKENIZERS_PARALLELISM=false
# Told to stop, a run finishes its step and writes a checkpoint; torchrun's own 30 seconds may not do (older ones do not ask).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}

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
    OMP_NUM_THREADS=$threads "$python" -m grpo.runtime.launch --nproc-per-node "$processes" \
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

usage() { # of the command: its recipe's first comment, or its lines above
    local recipe=$here/docs/recipes/$command.sh
    if [ -e "$recipe" ]; then
        sed -n '/^$/q; s/^# \{0,1\}//p' "$recipe"
    else
        awk -v name="./launch.sh $command " '/^#   [.]/ { on = index($0, name) } /^#$/ { on = 0 } on { print substr($0, 5) }' "$here/launch.sh"
    fi
}

nearest() { # word, what there is: that which begins with it, or else has most letters in common with it
    local word=$1 best="" most=-99 name i rest shared
    for name in "${@:2}"; do
        rest=$name shared=$((-${#name}))
        for ((i = 0; i < ${#word}; i++)); do
            [[ $rest != *"${word:i:1}"* ]] || { shared=$((shared + 2)); rest=${rest/"${word:i:1}"/}; }
        done
        [[ $name != "$word"* ]] || shared=99
        [ "$shared" -le "$most" ] || { most=$shared; best=$name; }
    done
    echo "$best"
}

# What a recipe is written in.
# docs/recipes/NAME.sh begins with its usage and sets `all`, its stages; `main`, those that run when none is asked for;
# and `run_stage NAME`, which runs one, most often as a line of the functions below. NAME/*.json hold the settings.

options() { # the options that there are, the words: --name VALUE becomes the variable $name, what is behind -- `more`
    local known=$1
    shift
    while [ $# -gt 0 ]; do
        [ "$1" != -- ] || { more=("${@:2}"); break; }
        [[ " $known " = *" $1 "* ]] || fail "$command: no option $1; did you mean $(nearest "$1" $known)? (./launch.sh $command --help)"
        [ $# -gt 1 ] || fail "$command: $1: no value behind it"
        printf -v "${1#--}" %s "$2"
        shift 2
    done
}

pipeline() { # the command line of a recipe's
    model="" data="" output=runs/$command expert=openai:gpt-4o template="" missing_images=stop seed=0 stage=$main more=()
    recipe=$here/docs/recipes/$command
    options "--model --data --output --expert --template --missing_images --recipe --seed --stage" "$@"
    [[ -d $recipe || $recipe == */* ]] || named_recipe
    [ -d "$recipe" ] || fail "$command: --recipe $recipe: no such folder"
    [ "$stage" != everything ] || stage=$all
    run_stages ${stage//,/ }
}

named_recipe() { # the name of a folder beside the paper's
    local known
    known=$(cd "$here/docs/recipes" && echo */ | tr -d /)
    [[ " $known " = *" $recipe "* ]] || fail "$command: --recipe $recipe: neither a folder nor one of $known"
    recipe=$here/docs/recipes/$recipe
}

settings() { # a file of the recipe's; what its folder does not have is the paper's
    local file=$recipe/$1.json
    [ -e "$file" ] || [ ! -e "$here/docs/recipes/$command/$1.json" ] || file=$here/docs/recipes/$command/$1.json
    echo "$file"
}

run_stages() {
    local name
    for name; do # all of it before anything is run and paid for
        [[ " $all " = *" $name "* ]] ||
            fail "$command: no stage $name; did you mean $(nearest "$name" $all)? (./launch.sh $command --help)"
        [ -n "$data" ] || [ "$name" = table ] || fail "$command: --data DIR expected, the dataset's folder"
        [ -n "$model" ] || [[ " check data table " = *" $name "* ]] ||
            fail "$command: --model expected, a checkpoint folder or hub name"
    done
    mkdir -p "$output/test"
    for name; do run_stage "$name"; done
}

needs() { # what a stage starts from, the stage that makes it
    [ -e "$1" ] || fail "$command: $1 is not there yet; --stage $2 makes it"
}

reasoning() { # name of the data, settings: the expert's, filtered
    once "$output/$1" one sft.annotate --config "$(settings data)" --data "$data" --expert "$expert" --seed "$seed" \
        --missing_images "$missing_images" --output "$output/$1.jsonl" ${template:+--template "$template"} "${@:2}"
}

run() { # folder of the result, program, the recipe's file, settings
    once "$output/$1" many "$2" --config "$(settings "$3")" --data "$data" --seed "$seed" \
        --missing_images "$missing_images" --output "$output/$1" "${@:4}" "${more[@]}"
}

train() { # name, program, the recipe's file, that of its test, settings: trained and tested
    run "$1" "$2" "$3" "${@:5}"
    weights_of "$1"
    evaluate "$1" "$4" "${weights[@]}"
}

weights_of() { # stage: `weights` names what it has trained, a checkpoint or --model's adapter. Merged into a checkpoint
    # and rounded to bfloat16, as frozen weights are, most of an adapter's update would be lost.
    weights=(--model "$output/$1/model")
    [ ! -d "$output/$1/adapter" ] || weights=(--model "$model" --adapter "$output/$1/adapter")
}

evaluate() { # name of what is tested, the recipe's file, which weights
    run "test/$1" grpo.evaluate "$2" "${@:3}"
    [ -z "${greedily_too:-}" ] || run "test/$1_greedy" grpo.evaluate "$2" "${@:3}" --temperature 0
}

table() {
    title "result"
    one grpo.report.paper_table "$(settings paper)" --runs "$output/test" --output "$output/table"
}

processes_and_threads() {
    # a power of two, so that the demo's 16 prompts a rollout divide
    processes=${PROCESSES:-$("$python" -c 'import torch; n = torch.cuda.device_count() or 2; print(1 << min(n, 16).bit_length() - 1)')}
    threads=$(( $(nproc) / processes )); [ "$threads" -ge 1 ] || threads=1
}

side_by_side() { # pytest's arguments: how its two processes share the tests, where neither a file nor a look inside is asked for
    [[ " $*" != *" tests/"* && " $* " != *" -s "* && " $*" != *" --pdb"* ]] && "$python" -c 'import xdist' 2>/dev/null &&
        echo "-n ${PROCESSES:-2} --dist worksteal"
}

commands="setup demo more-r1 jmere-r1 check test"
command=${1:-}; [ $# -gt 0 ] && shift
[[ " $commands " != *" $command "* || " $* " != *" --help "* ]] || { usage; exit; }
case $command in
    setup) setup; echo "ready: $python" ;;
    demo) setup; processes_and_threads; . "$here/docs/recipes/demo.sh"; demo "$@" ;;
    more-r1 | jmere-r1) setup; processes_and_threads; . "$here/docs/recipes/$command.sh"; pipeline "$@" ;;
    check)
        setup
        PROCESSES=${PROCESSES:-$("$python" -c 'import torch; print(torch.cuda.device_count() or 1)')}
        processes_and_threads
        if [ "$processes" -gt 1 ]; then many benchmarks.check "$@"; else one benchmarks.check "$@"; fi ;;
    test) setup; cd "$here"; unset PYTHONSAFEPATH; "$python" -m pytest $(side_by_side "$@") "$@" ;;
    "" | -h | --help | help) sed -n '2,22p' "$here/launch.sh" | cut -c3-; [ -n "$command" ] || exit 2 ;;
    *) fail "no command $command; did you mean ./launch.sh $(nearest "$command" $commands)?" ;;
esac
