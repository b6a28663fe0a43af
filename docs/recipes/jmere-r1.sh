# JMERE-R1 with the paper's settings, which stand in docs/recipes/jmere-r1/*.json. launch.sh reads this file.
#
#   ./launch.sh jmere-r1 --model Qwen/Qwen2.5-VL-7B-Instruct --data DIR [options] [-- settings of the model programs]
#
#   --stage NAME[,NAME…]   these stages alone; without it data, cot_sft, grpo, vote and the table in turn
#   --output DIR           runs/jmere-r1
#   --expert KIND:NAME     who writes the reasoning: openai:gpt-4o (the default), local:CHECKPOINT, file:JSONL
#   --template FILE        the prompt that the expert gets, instead of the built-in one
#   --missing_images WHAT  posts without an image: stop, drop or blank
#   --recipe NAME|DIR      another folder of settings; of those that it does not have the paper's hold
#   --seed N               0
#
# What was done is not done again: <result>.done holds the command that made it; it and <result> are removed to repeat it.
# What was cut off goes on from its last checkpoint with the same line.
#
# Stages; each trained model is tested at temperature 0.8, greedily beside it:
#   data  cot_sft  grpo                  JMERE-R1: the reasoning data, 5 epochs of SFT on it, GRPO
#   vote                                 majority of 100 samples of what grpo trained
#   zero_shot  sft  cot_sft_20  only_rl  the baselines; SFT for 20 epochs, on answers alone or with reasoning
#   without_partial                      grpo with the accuracy reward alone
#   without_score  without_repredict  without_both
#                                        data without a filter, cot_sft and grpo on it; with cot_sft_ before the
#                                        name: 20 epochs of SFT on it
#   groups                               grpo with G = 2, 4, 16
#   table                                all that was tested beside the paper's figures
#   everything                           all of these

main="data cot_sft grpo vote table"
all="data cot_sft grpo vote zero_shot sft cot_sft_20 only_rl without_partial without_score without_repredict without_both"
all+=" cot_sft_without_score cot_sft_without_repredict cot_sft_without_both groups table"
greedily_too=yes

run_stage() {
    local size
    weights_of cot_sft
    local start=("${weights[@]}")
    case $1 in
        data)
            title "reasoning data: several candidates each, the re-prediction filter, the score filter"
            filtered "" ;;
        cot_sft) title "stage 1: SFT on the reasoning"; cot_sft cot_sft cot_sft ;;
        grpo) title "stage 2: GRPO"; train grpo grpo.train grpo test "${start[@]}" ;;
        vote)
            title "majority of 100 samples"
            weights_of grpo
            run test/grpo_vote grpo.evaluate test "${weights[@]}" --samples 100 ;;
        zero_shot) title "zero-shot"; evaluate zero_shot answer --model "$model" ;;
        sft) title "baseline: SFT on the answers alone, 20 epochs"; train sft sft.train sft answer --model "$model" ;;
        cot_sft_20) title "baseline: SFT on the reasoning, 20 epochs"; cot_sft cot_sft_20 sft ;;
        only_rl) title "baseline: GRPO alone"; train only_rl grpo.train grpo test --model "$model" ;;
        without_partial)
            title "ablation: the accuracy reward alone"
            train without_partial grpo.train grpo test "${start[@]}" --reward_weights partial=0,format=0 ;;
        without_*)
            title "ablation: the data $1"
            filtered "_$1"
            run "warm_up_$1" sft.train cot_sft --model "$model" --responses "$output/mp_cot_$1.jsonl"
            weights_of "warm_up_$1"
            train "$1" grpo.train grpo test "${weights[@]}" ;;
        cot_sft_without_*)
            title "ablation: SFT on the data ${1#cot_sft_}, 20 epochs"
            filtered "${1#cot_sft}"
            cot_sft "$1" sft "${1#cot_sft}" ;;
        groups)
            for size in 2 4 16; do
                title "ablation: groups of $size"
                train "groups_$size" grpo.train grpo test "${start[@]}" --group_size $size
            done ;;
        table) table ;;
    esac
}

cot_sft() { # name, the recipe's file, which data
    train "$1" sft.train "$2" test --model "$model" --responses "$output/mp_cot${3:-}.jsonl"
}

filtered() { # which data: what the expert has answered once is asked for no second time, whichever the filters
    local filters=()
    case $1 in
        _without_score) filters=(--score False) ;;
        _without_repredict) filters=(--repredict False) ;;
        _without_both) filters=(--repredict False --score False) ;;
    esac
    reasoning "mp_cot$1" --responses "$output/mp_cot.responses.jsonl" "${filters[@]}"
}
