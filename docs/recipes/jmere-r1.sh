# JMERE-R1 with the paper's settings, which stand in docs/recipes/jmere-r1/*.json. launch.sh reads this file.
#
#   ./launch.sh jmere-r1 --model Qwen/Qwen2.5-VL-7B-Instruct --data DIR [options] [-- settings of the model programs]
#
#   --stage NAME           one stage alone; without it data, cot_sft, grpo, vote and the table in turn
#   --output DIR           runs/jmere-r1
#   --expert KIND:NAME     who writes the reasoning: openai:gpt-4o
#   --missing_images WHAT  posts without an image: stop, drop or blank
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

jmere_r1() {
    local model="" data="" output=runs/jmere-r1 expert=openai:gpt-4o missing=stop seed=0 stage="" more=()
    local recipes=$here/docs/recipes/jmere-r1
    while [ $# -gt 0 ]; do
        [ "$1" = -- ] && { shift; more=("$@"); break; }
        [ "$1" = --help ] && { sed -n '/^$/q; s/^# \{0,1\}//p' "$here/docs/recipes/jmere-r1.sh"; return; }
        [ $# -gt 1 ] || fail "jmere-r1: $1: no such option, or no value behind it"
        case $1 in
            --model) model=$2 ;; --data) data=$2 ;; --output) output=$2 ;; --expert) expert=$2 ;;
            --missing_images) missing=$2 ;; --seed) seed=$2 ;; --stage) stage=$2 ;;
            *) fail "jmere-r1: no option $1 (./launch.sh jmere-r1 --help)" ;;
        esac
        shift 2
    done
    if [ "$stage" != table ]; then
        [ -n "$data" ] || fail "jmere-r1: --data DIR expected, the dataset's folder"
        [ -n "$model" ] || [ "$stage" = data ] || fail "jmere-r1: --model expected, a checkpoint folder or hub name"
    fi
    mkdir -p "$output/test"
    local name
    case $stage in
        "") for name in data cot_sft grpo vote table; do jmere_stage $name; done ;;
        everything)
            for name in data cot_sft grpo vote zero_shot sft cot_sft_20 only_rl without_partial \
                {,cot_sft_}without_{score,repredict,both} groups table; do jmere_stage $name; done ;;
        *) jmere_stage "$stage" ;;
    esac
}

jmere_stage() { # the variables are jmere_r1's
    title "jmere-r1: $1"
    local size
    case $1 in
        data) jmere_data mp_cot ;;
        cot_sft) jmere_train cot_sft sft.train cot_sft "$model" --responses "$output/mp_cot.jsonl" ;;
        grpo) jmere_train grpo grpo.train grpo "$output/cot_sft/model" ;;
        vote) jmere_test grpo_vote "$output/grpo/model" --samples 100 ;;
        zero_shot) jmere_tests zero_shot "$model" --reasoning False ;;
        sft) jmere_train sft sft.train sft "$model" ;;
        cot_sft_20) jmere_train cot_sft_20 sft.train sft "$model" --responses "$output/mp_cot.jsonl" ;;
        only_rl) jmere_train only_rl grpo.train grpo "$model" ;;
        without_partial)
            jmere_train without_partial grpo.train grpo "$output/cot_sft/model" --reward_weights partial=0,format=0 ;;
        cot_sft_without_score | cot_sft_without_repredict | cot_sft_without_both)
            jmere_filtered "${1#cot_sft_}"
            jmere_train "$1" sft.train sft "$model" --responses "$output/mp_cot_${1#cot_sft_}.jsonl" ;;
        without_score | without_repredict | without_both)
            jmere_filtered "$1"
            jmere_train "warm_up_$1" sft.train cot_sft "$model" --responses "$output/mp_cot_$1.jsonl"
            jmere_train "$1" grpo.train grpo "$output/warm_up_$1/model" ;;
        groups) for size in 2 4 16; do
                jmere_train "groups_$size" grpo.train grpo "$output/cot_sft/model" --group_size $size
            done ;;
        table) one grpo.report.paper_table "$recipes/paper.json" --runs "$output/test" --output "$output/table" ;;
        *) fail "jmere-r1: no stage $1 (./launch.sh jmere-r1 --help names them)" ;;
    esac
}

jmere_data() { # name, settings: what the expert has answered once is asked for no second time, whichever the filters
    once "$output/$1" one sft.annotate --config "$recipes/data.json" --data "$data" --expert "$expert" --seed "$seed" \
        --missing_images "$missing" --output "$output/$1.jsonl" --responses "$output/mp_cot.responses.jsonl" "${@:2}"
}

jmere_filtered() {
    case $1 in
        without_score) jmere_data "mp_cot_$1" --score False ;;
        without_repredict) jmere_data "mp_cot_$1" --repredict False ;;
        without_both) jmere_data "mp_cot_$1" --repredict False --score False ;;
    esac
}

jmere_train() { # name, program, recipe, model, settings
    once "$output/$1" many "$2" --config "$recipes/$3.json" --model "$4" --data "$data" --seed "$seed" \
        --missing_images "$missing" --output "$output/$1" "${@:5}" "${more[@]}"
    local plain=()
    [ "$1" = sft ] && plain=(--reasoning False) # it has learned to answer at once
    jmere_tests "$1" "$output/$1/model" "${plain[@]}"
}

jmere_tests() {
    jmere_test "$@"
    jmere_test "$1_greedy" "${@:2}" --temperature 0
}

jmere_test() { # name, model, settings
    once "$output/test/$1" many grpo.evaluate --config "$recipes/test.json" --model "$2" --data "$data" --seed "$seed" \
        --missing_images "$missing" --output "$output/test/$1" "${@:3}" "${more[@]}"
}
