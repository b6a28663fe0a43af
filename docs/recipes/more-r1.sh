# MORE-R1 with the paper's settings, which stand in docs/recipes/more-r1/*.json. launch.sh reads this file.
#
#   ./launch.sh more-r1 --model Qwen/Qwen2.5-VL-7B-Instruct --data DIR [options] [-- settings of the model programs]
#
#   --stage NAME[,NAME…]   these stages alone; without it check, data, stage_1, split, stage_2 and the table in turn
#   --output DIR           runs/more-r1
#   --expert KIND:NAME     who writes the reasoning: openai:gpt-4o (the default), local:CHECKPOINT, file:JSONL
#   --template FILE        the prompt that the expert gets, instead of the built-in one
#   --missing_images WHAT  samples without an image: stop, drop or blank
#   --recipe DIR           another folder of settings
#   --seed N               0
#
# What was done is not done again: <result>.done holds the command that made it; it and <result> are removed to repeat it.
# What was cut off goes on from its last checkpoint with the same line.
#
# Stages; each trained model is tested:
#   check                               counts of the dataset, missing images, bad boxes
#   data                                a quarter of each label drawn, the expert's reasoning, filtered
#   stage_1  split  stage_2             cold start; what it answers rightly is easy, the rest hard; GRPO
#   zero_shot  label_only  label_only_25  the baselines: untrained; SFT on bare labels of all samples, of the quarter
#   raw  gamma_1  gamma_0               stage 2 with all samples in every epoch, always 1:1, hard samples only
#   table                               all that was tested beside the paper's figures
#   everything                          all of these

more_r1() {
    local model="" data="" output=runs/more-r1 expert=openai:gpt-4o missing=stop seed=0 more=() template=() stage
    local recipe=$here/docs/recipes/more-r1 stages=check,data,stage_1,split,stage_2,table
    local all=check,data,zero_shot,label_only,label_only_25,stage_1,split,stage_2,raw,gamma_1,gamma_0,table
    while [ $# -gt 0 ]; do
        [ "$1" = -- ] && { shift; more=("$@"); break; }
        [ "$1" = --help ] && { sed -n '/^$/q; s/^# \{0,1\}//p' "$here/docs/recipes/more-r1.sh"; return; }
        [ $# -gt 1 ] || fail "more-r1: $1: no such option, or no value behind it"
        case $1 in
            --model) model=$2 ;; --data) data=$2 ;; --output) output=$2 ;; --expert) expert=$2 ;; --recipe) recipe=$2 ;;
            --template) template=(--template "$2") ;; --missing_images) missing=$2 ;; --seed) seed=$2 ;; --stage) stages=$2 ;;
            *) fail "more-r1: no option $1 (./launch.sh more-r1 --help)" ;;
        esac
        shift 2
    done
    [ "$stages" != everything ] || stages=$all
    for stage in ${stages//,/ }; do # all of it before anything is run and paid for
        [[ ,$all, = *,$stage,* ]] || fail "more-r1: no stage $stage (./launch.sh more-r1 --help names them)"
        [ -n "$data" ] || [ "$stage" = table ] || fail "more-r1: --data DIR expected, the dataset's folder"
        case $stage in
            check | data | table) ;;
            *) [ -n "$model" ] || fail "more-r1: --model expected, a checkpoint folder or hub name" ;;
        esac
    done
    mkdir -p "$output/test"
    for stage in ${stages//,/ }; do more_stage "$stage"; done
}

more_stage() { # the variables are more_r1's
    local cold=$output/cold_start start=$output/stage_1/model
    case $1 in
        check)
            title "the dataset: counts, missing images, bad boxes"
            one data.more --check "$data" || [ "$missing" != stop ] ||
                fail "more-r1: the dataset is not as it should be" ;;
        data)
            title "cold-start data: a quarter of each label, the expert's reasoning, filtered"
            once "$cold" one sft.annotate --config "$recipe/data.json" --data "$data" --expert "$expert" \
                --seed "$seed" --missing_images "$missing" --output "$cold.jsonl" "${template[@]}" ;;
        zero_shot)
            title "zero-shot"
            more_test zero_shot "$model" answer ;;
        label_only)
            title "baseline: SFT on the labels alone"
            more_run label_only sft.train label_only --model "$model"
            more_test label_only "$output/label_only/model" answer ;;
        label_only_25)
            title "baseline: SFT on the labels alone, of the quarter that the cold start draws"
            needs "$cold.drawn.json" data
            more_run label_only_25 sft.train label_only --model "$model" --samples "$cold.drawn.json"
            more_test label_only_25 "$output/label_only_25/model" answer ;;
        stage_1)
            title "stage 1: supervised cold start"
            needs "$cold.jsonl" data
            more_run stage_1 sft.train stage_1 --model "$model" --responses "$cold.jsonl"
            more_test stage_1 "$start" test ;;
        split)
            title "the split: what stage 1 answers rightly of the other three quarters is easy"
            needs "$output/stage_1.done" stage_1
            more_run split grpo.evaluate test --model "$start" --split train --exclude "$cold.drawn.json" ;;
        stage_2) more_grpo stage_2 "GRPO with progressive sample mixing" ;;
        raw) more_grpo raw "ablation: all samples in every epoch" --mixing raw ;;
        gamma_1) more_grpo gamma_1 "ablation: always as many easy samples as hard ones" --decay 1 ;;
        gamma_0) more_grpo gamma_0 "ablation: hard samples only" --decay 0 ;;
        table)
            title "result"
            one grpo.report.paper_table "$recipe/paper.json" --runs "$output/test" --output "$output/table" ;;
    esac
}

needs() { # what a stage starts from, the stage that makes it
    [ -e "$1" ] || fail "more-r1: $1 is not there yet; --stage $2 makes it"
}

more_grpo() { # name, what it is, settings
    title "stage 2: $2"
    needs "$output/split.done" split
    more_run "$1" grpo.train stage_2 --model "$start" --predictions "$output/split/predictions.jsonl" "${@:3}"
    more_test "$1" "$output/$1/model" test
}

more_test() { # name, model, recipe
    more_run "test/$1" grpo.evaluate "$3" --model "$2"
}

more_run() { # folder of the result, program, recipe, settings
    once "$output/$1" many "$2" --config "$recipe/$3.json" --data "$data" --seed "$seed" --missing_images "$missing" \
        --output "$output/$1" "${@:4}" "${more[@]}"
}
