#!/usr/bin/env bash
# How near plans are to a cluster on this machine: profiles it, predicts, keeps the predictions, replays, and writes the table
# for docs/planner.md. Takes 75 minutes (DIVISIONS=1+1:local: 25), and 5 more for each replay that is repeated; nothing else should
# run meanwhile.
#
#   bench/validate.sh MODEL TRACE [FOLDER]
#
# REQUESTS (300), LENGTHS (1/32), SLO, DIVISIONS, REPEAT (of the profile's points, 5), RUNS (2) and AGAIN (replays that may be repeated,
# 3) can be set in the environment.
set -euo pipefail
model=${1:?a model file} trace=${2:?a trace} out=${3:-validation}
# The longest prompts take some seconds alone: a bound near that would ask for next to no load where one node computes them all.
slo=${SLO:-ttft_p90=8s,tpot_p90=150ms}

cargo build --release --locked -p baton
baton=target/release/baton
mkdir -p "$out"
if [ ! -f "$out/profile.json" ]; then
  "$baton" profile --model "$model" --threads 1 --neighbours 1 --repeat "${REPEAT:-5}" --out "$out/profile.json"
fi
question=(--profile "$out/profile.json" --trace "$trace" --lengths "${LENGTHS:-1/32}" --requests "${REQUESTS:-300}" --slo "$slo")
validate=("$baton" validate --model "$model" --threads 1 "${question[@]}" --divisions "${DIVISIONS:-1+1,1+1:local,0+2}" --runs "${RUNS:-2}" --again "${AGAIN:-3}" --out "$out")
"${validate[@]}" --predict-only
sha256sum "$out/predictions.json" | tee "$out/predictions.sha256"
"${validate[@]}" || echo "some figures are farther off than is promised"
"$baton" plan "${question[@]}" --budget 2 || true
