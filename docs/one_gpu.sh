#!/usr/bin/env bash
# The paper's experiment on one GPU (or on a patient processor), stage after stage: MFT, RARL, exams.
# It goes as far as MINUTES allow and stops at a checkpoint with exit status 75; the same line goes on
# from there, so that a leased or preemptible machine does. What it makes: data/WORLD-mft,
# data/WORLD-rarl (adapters), runs/one-gpu (logs), data/WORLD-exams (records, rollouts).
#
#   DATA=FOLDER [WORLD=small] [MINUTES=9] [EXAMS=500] [ROWS=4] docs/one_gpu.sh
#
# DATA holds the datasets under their hub ids; without it they come from the hub, and so does the
# base model, unless it lies in data/ under its own. ROWS are learned from at a time, instead of the
# recipe's number; they must divide the rows of its step, or the step would be another one.
set -euo pipefail
cd "$(dirname "$0")/.."
world=${WORLD:-small} work=runs/one-gpu end=$(($(date +%s) + 60 * ${MINUTES:-1000000}))
python=$(command -v .venv/bin/python || command -v python3)

roi() { # one command, within what is left of the minutes
    left=$(((end - $(date +%s)) / 60))
    "$python" -m roi_lib "$@" --world "$world" ${DATA:+--data "$DATA"} --minutes $((left > 0 ? left : 0))
}

[ -d "data/$world-mft" ] || roi train mft ${ROWS:+--rows-at-once "$ROWS"} --work $work/mft
[ -d "data/$world-rarl" ] || roi train rarl ${ROWS:+--rows-at-once "$ROWS"} --papers 100 --work $work/rarl
roi exam --exams "${EXAMS:-500}" --log $work/exams --save "data/$world-exams" \
    --methods base,plan_and_solve,least_to_most,mft,mft_greedy_knapsack,mft_greedy_knapsack_charged,rarl
