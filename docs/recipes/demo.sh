# The whole pipeline on the embedded example, minutes on two cores: a small world, a scripted expert, and a tiny random
# Qwen2.5-VL, which learns to see and to read on the way. Or GRPO alone on a pretrained text model. launch.sh reads this file.
#
#   ./launch.sh demo [options]
#
#   --task more|jmere|text  more: objects and entities, docs/recipes/more-demo; jmere: posts, docs/recipes/jmere-demo;
#                           text: puzzles, docs/recipes/text-demo
#   --model MODEL           text: a folder or hub name, as HuggingFaceTB/SmolLM2-135M-Instruct
#   --seed N                0; another seed in the same folder begins anew
#   --output DIR            runs/demo, runs/demo-jmere, runs/demo-text
#
# What was done is not done again, what was cut off goes on. results.json and report.html hold what came of it.

demo() {
    task=more model="" seed=0 output=""
    options "--task --model --seed --output" "$@"
    [[ $seed =~ ^[0-9]+$ ]] || fail "--seed $seed: expected a whole number"
    local world stages sft grpo train
    case $task in
        text) [ -n "$model" ] || fail "--model expected: a pretrained text model, as HuggingFaceTB/SmolLM2-135M-Instruct"
            : "${output:=runs/demo-text}" ;;
        more) : "${output:=runs/demo}"; stages="data zero_shot stage_1 split stage_2" sft=stage_1 grpo=stage_2 train=3200 ;;
        jmere) : "${output:=runs/demo-jmere}"; stages="data zero_shot cot_sft grpo" sft=cot_sft grpo=grpo train=4800 ;;
        *) fail "--task $task: expected more, jmere or text" ;;
    esac
    world=$output/world
    mkdir -p "$output"
    [ "$(cat "$output/seed" 2>/dev/null)" = "$seed" ] || rm -rf "$output"/*.done "$output"/test/*.done "$output"/*/checkpoints
    echo "$seed" >"$output/seed"
    if [ "$task" = text ]; then text_demo; return; fi
    title "the embedded example: a small world, a scripted expert, a tiny random Qwen2.5-VL"
    once "$world" one data.toy --task "$task" --output "$world" --seed "$seed" --train $train --valid 200 --test 800
    . "$here/docs/recipes/$task-r1.sh"
    greedily_too=""
    pipeline --model "$world/model" --data "$world/${task^^}" --expert "file:$world/expert.jsonl" --output "$output" \
        --seed "$seed" --recipe "$here/docs/recipes/$task-demo" --stage "$stages"
    title "result"
    set -- "$output/test/zero_shot" "$output/test/$sft" "$output/test/$grpo"
    one grpo.compare zero_shot="$1" sft="$2" grpo="$3" --output "$output/results.json"
    one grpo.report "$output/$sft" "$output/$grpo" "$@" --output "$output/report.html"
}

text_demo() {
    local model=$model main="before grpo" all="before grpo" greedily_too=yes
    title "puzzles in words, made from the seed"
    once "$world" one data.toy --task text --output "$world" --seed "$seed" --train 2000 --valid 40 --test 200
    run_stage() {
        case $1 in
            before) title "before: drawn at temperature 1, and greedily"; evaluate before test --model "$model" ;;
            grpo) title "GRPO alone"; train grpo grpo.train grpo test --model "$model" ;;
        esac
    }
    pipeline --model "$model" --data "$world/TEXT" --output "$output" --seed "$seed" --recipe "$here/docs/recipes/text-demo"
    title "result"
    set -- "$output"/test/{before,grpo,before_greedy,grpo_greedy}
    one grpo.compare before="$1" grpo="$2" before_greedy="$3" grpo_greedy="$4" --output "$output/results.json"
    one grpo.report "$output/grpo" "$@" --output "$output/report.html"
}
