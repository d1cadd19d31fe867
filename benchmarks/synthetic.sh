#!/usr/bin/env bash
# One piece of the paper's synthetic tasks on a GPU machine without network:  bash benchmarks/synthetic.sh [flag of `study synthetic` ...]
#
# Goes on from the cells in RESULTS and from what earlier pieces left on the machine or in FROM, and packs results and checkpoints:
# unpack the results with  tar xzf synthetic.tgz --strip-components 1 -C benchmarks/results/synthetic
#
#   OUT      where synthetic.tgz, checkpoints.tgz.* and the log go    .
#   RESULTS  finished cells; other settings, another folder  benchmarks/results/synthetic
#   FROM     OUT of an earlier piece on another machine         none
#   PYTHON   the interpreter                            python3; a package that is missing there can be put on PYTHONPATH
#   PIECE    seconds of training                        480
#   KEPT     results and checkpoints between pieces     /tmp/synthetic
set -uo pipefail
cd "$(dirname "$0")/.."
: "${OUT:=.}" "${RESULTS:=benchmarks/results/synthetic}" "${PYTHON:=python3}" "${PIECE:=480}" "${KEPT:=/tmp/synthetic}"
export PYTHONUNBUFFERED=1 CUDA_DEVICE_MAX_CONNECTIONS=32 # with fewer queues, streams wait for each other
mkdir -p "$KEPT/synthetic" "$KEPT/checkpoints" "$RESULTS"
[ -z "${FROM:-}" ] || cat "$FROM"/checkpoints.tgz.* | tar xz -C "$KEPT" || exit 2
cp -n "$RESULTS"/*.json "$KEPT/synthetic/" 2>/dev/null
# Ctrl-C lets a run that is late write its checkpoints.
timeout --signal=INT --kill-after=30 $((PIECE + 45)) "$PYTHON" -m kimi_linear.cli.main study synthetic --folder "$KEPT/synthetic" \
  --checkpoints "$KEPT/checkpoints" --seconds-budget "$PIECE" "$@" 2>&1 | tee "$OUT/synthetic.log"
status=${PIPESTATUS[0]}
tar czf "$OUT/synthetic.tgz" -C "$KEPT" synthetic
tar cz -C "$KEPT" checkpoints | split -b 15M - "$OUT/checkpoints.tgz." # small enough to be sent one by one
exit "$status"
