# The whole pipeline on the embedded example, minutes on two cores: a small world, a scripted expert, and a tiny random
# Qwen2.5-VL, which learns to see and to read on the way. launch.sh reads this file.
#
#   ./launch.sh demo [options]
#
#   --task more|jmere      more: objects and entities, docs/recipes/more-demo; jmere: posts, docs/recipes/jmere-demo
#   --seed N               0; another seed in the same folder begins anew
#   --output DIR           runs/demo, or runs/demo-jmere
#
# What was done is not done again, what was cut off goes on. results.json and report.html hold what came of it.

demo() {
    task=more seed=0 output=""
    options "--task --seed --output" "$@"
    [[ $seed =~ ^[0-9]+$ ]] || fail "--seed $seed: expected a whole number"
    [ "$task" = more ] || [ "$task" = jmere ] || fail "--task $task: expected more or jmere"
    local world stages sft grpo
    case $task in
        more) : "${output:=runs/demo}"; stages="data zero_shot stage_1 split stage_2" sft=stage_1 grpo=stage_2 ;;
        jmere) : "${output:=runs/demo-jmere}"; stages="data zero_shot cot_sft grpo" sft=cot_sft grpo=grpo ;;
    esac
    world=$output/world
    mkdir -p "$output"
    [ "$(cat "$output/seed" 2>/dev/null)" = "$seed" ] || rm -rf "$output"/*.done "$output"/test/*.done "$output"/*/checkpoints
    echo "$seed" >"$output/seed"
    title "the embedded example: a small world, a scripted expert, a tiny random Qwen2.5-VL"
    once "$world" one data.toy --task "$task" --output "$world" --seed "$seed" --train 4800 --valid 200 --test 800
    . "$here/docs/recipes/$task-r1.sh"
    greedily_too=""
    pipeline --model "$world/model" --data "$world/${task^^}" --expert "file:$world/expert.jsonl" --output "$output" \
        --seed "$seed" --recipe "$here/docs/recipes/$task-demo" --stage "$stages"
    title "result"
    set -- "$output/test/zero_shot" "$output/test/$sft" "$output/test/$grpo"
    one grpo.compare zero_shot="$1" sft="$2" grpo="$3" --output "$output/results.json"
    one grpo.report "$output/$sft" "$output/$grpo" "$@" --output "$output/report.html"
}
