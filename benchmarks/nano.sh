#!/usr/bin/env bash
# One piece of the nano study on a GPU machine without network:  bash benchmarks/nano.sh [flag of `study nano` ...]
#
# Goes on from what earlier pieces left on the machine, and packs what is finished:  tar xzf nano.tgz -C runs
#
#   DATA     the token files, which `study nano --part prepare` makes elsewhere    runs/nano-data
#   OUT      where nano.tgz and the log go               .
#   PYTHON   the interpreter                             python3; a package that is missing there can be put on PYTHONPATH
#   PIECE    seconds of training                         480
#   KEPT     results and checkpoints between pieces      /tmp/nano
set -uo pipefail
cd "$(dirname "$0")/.."
: "${DATA:=runs/nano-data}" "${OUT:=.}" "${PYTHON:=python3}" "${PIECE:=480}" "${KEPT:=/tmp/nano}"
export PYTHONUNBUFFERED=1
mkdir -p "$KEPT/nano"
# Ctrl-C lets a run that is late write its checkpoint.
timeout --signal=INT --kill-after=30 $((PIECE + 60)) "$PYTHON" -m kimi_linear.cli.main study nano --data "$DATA" \
  --folder "$KEPT/nano" --seconds-budget "$PIECE" "$@" 2>&1 | tee "$OUT/nano.log"
status=${PIPESTATUS[0]}
tar czf "$OUT/nano.tgz" -C "$KEPT" --exclude=training nano
exit "$status"
