# MORE-R1 with the paper's settings, which stand in docs/recipes/more-r1/*.json. launch.sh reads this file.
#
#   ./launch.sh more-r1 --model Qwen/Qwen2.5-VL-7B-Instruct --data DIR [options] [-- settings of the model programs]
#
#   --stage NAME[,NAME…]   these stages alone; without it check, data, stage_1, split, stage_2 and the table in turn
#   --output DIR           runs/more-r1
#   --expert KIND:NAME     who writes the reasoning: openai:gpt-4o (the default), local:CHECKPOINT, file:JSONL
#   --template FILE        the prompt that the expert gets, instead of the built-in one
#   --missing_images WHAT  samples without an image: stop, drop or blank
#   --recipe NAME|DIR      other settings than the paper's, which hold where the folder has no such file: more-r1-24gb
#                          (3B, an adapter, one 24-GB card), more-r1-80gb (7B, an adapter, one 80-GB card),
#                          more-r1-2x80gb (7B, all weights, two of them), or a folder of yours
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

main="check data stage_1 split stage_2 table"
all="check data zero_shot label_only label_only_25 stage_1 split stage_2 raw gamma_1 gamma_0 table"

run_stage() {
    local cold=$output/cold_start
    case $1 in
        check)
            title "the dataset: counts, missing images, bad boxes"
            one data.more --check "$data" || [ "$missing_images" != stop ] ||
                fail "$command: the dataset is not as it should be" ;;
        data)
            title "cold-start data: a drawn part of each label, the expert's reasoning, filtered"
            reasoning cold_start ;;
        zero_shot) title "zero-shot"; evaluate zero_shot answer --model "$model" ;;
        label_only)
            title "baseline: SFT on the labels alone"
            train label_only sft.train label_only answer --model "$model" ;;
        label_only_25)
            title "baseline: SFT on the labels alone, of the quarter that the cold start draws"
            needs "$cold.drawn.json" data
            train label_only_25 sft.train label_only answer --model "$model" --samples "$cold.drawn.json" ;;
        stage_1)
            title "stage 1: supervised cold start"
            needs "$cold.jsonl" data
            train stage_1 sft.train stage_1 test --model "$model" --responses "$cold.jsonl" ;;
        split)
            title "the split: what stage 1 answers rightly of the other samples is easy"
            needs "$output/stage_1.done" stage_1
            weights_of stage_1
            run split grpo.evaluate test "${weights[@]}" --split train --exclude "$cold.drawn.json" ;;
        stage_2) stage_2 stage_2 "GRPO with progressive sample mixing" ;;
        raw) stage_2 raw "ablation: all samples in every epoch" --mixing raw ;;
        gamma_1) stage_2 gamma_1 "ablation: always as many easy samples as hard ones" --decay 1 ;;
        gamma_0) stage_2 gamma_0 "ablation: hard samples only" --decay 0 ;;
        table) table ;;
    esac
}

stage_2() { # name, what it is, settings
    title "stage 2: $2"
    needs "$output/split.done" split
    weights_of stage_1
    train "$1" grpo.train stage_2 test "${weights[@]}" --predictions "$output/split/predictions.jsonl" "${@:3}"
}
