#!/usr/bin/env bash
# GPU tests and every GPU benchmark in one command, for a machine without network:  bash benchmarks/gpu.sh [part ...]
#
# Parts: tests (pytest -m gpu), the name of a script in benchmarks/ops, such as kda, or of another one with its folder, such as
# model/train_speed. None: tests, then every script in benchmarks/ops but tune, which is for changing the kernels' table of
# configurations. Words after a colon go to the script:  bash benchmarks/gpu.sh tests 'kda: --mode forward --shapes targets' kda_decode
#
#   OUT      where logs and pages go        benchmarks/results
#   PYTHON   the interpreter                python3; a package that is missing there can be put on PYTHONPATH
#   SECONDS_EACH  time for one part         540
#   TUNED    what the baselines' autotuning found on such a GPU before: tuned.tgz of an earlier OUT    none
#
# A part that fails or runs out of time does not stop the others, and leaves what it had written; the status is then 1.
set -uo pipefail
cd "$(dirname "$0")/.."
: "${OUT:=benchmarks/results}" "${PYTHON:=python3}" "${SECONDS_EACH:=540}"
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} # for processes that tests start; not installed here
mkdir -p "$OUT"
# fla times its candidates for a minute or two at each new shape; what it chose lies in Triton's cache.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$HOME/.triton/cache} TRITON_CACHE_AUTOTUNING=1
mkdir -p "$TRITON_CACHE_DIR"
[ -z "${TUNED:-}" ] || tar xzf "$TUNED" -C "$TRITON_CACHE_DIR" || exit 2
log="$OUT/gpu.log"
: >"$log"
stamp=$(mktemp)
trap 'rm -f "$stamp"' EXIT

scripts() { # those that measure on a GPU: files with a main part and no cpu in their name
  grep -l '__name__ == "__main__"' benchmarks/ops/[a-z]*.py | while read -r file; do
    name=$(basename "$file" .py)
    case $name in *_cpu | shapes) ;; *) echo "$name" ;; esac
  done
}

collect() { # pages that scripts wrote to their own folder, and what autotuning found
  [ "$OUT" -ef benchmarks/results ] && return
  find benchmarks/results -type f -newer "$stamp" -exec cp {} "$OUT/" \;
  (cd "$TRITON_CACHE_DIR" && find . -name '*.autotune.json' -print0 | tar czf - --null -T -) >"$OUT/tuned.tgz"
}

failed=()
run() { # run NAME COMMAND...
  local name=$1 start=$SECONDS status
  shift
  echo "== $name: $*" | tee -a "$log"
  timeout --kill-after=10 "$SECONDS_EACH" "$@" 2>&1 | tee -a "$log"
  status=${PIPESTATUS[0]}
  collect
  [ "$status" = 0 ] || failed+=("$name (status $status$([ "$status" = 124 ] && echo ", out of time"))")
  echo "== $name: $((SECONDS - start)) s, status $status" | tee -a "$log"
}

"$PYTHON" - <<'END' 2>&1 | tee -a "$log"
import sys, torch
print("Python", sys.version.split()[0], "torch", torch.__version__, "CUDA", torch.version.cuda)
if not torch.cuda.is_available():
    sys.exit("gpu.sh: expected a CUDA device, torch sees none; on a CPU run: make test, make bench")
print(torch.cuda.get_device_name(), torch.cuda.get_device_capability())
END
[ "${PIPESTATUS[0]}" = 0 ] || exit 2

mapfile -t every < <(scripts)
parts=("$@")
if [ $# = 0 ]; then
  parts=(tests)
  for name in "${every[@]}"; do [ "$name" = tune ] || parts+=("$name"); done
fi
for part in "${parts[@]}"; do
  name=${part%%:*}
  words=()
  [ "$name" = "$part" ] || read -ra words <<<"${part#*:}"
  if [ "$name" = tests ]; then
    # pytest-benchmark, where it is installed, warns beside xdist, and a warning is an error here.
    run tests "$PYTHON" -m pytest -m gpu -q -p no:benchmark -p no:cacheprovider tests "${words[@]}"
  elif [[ " ${every[*]} " == *" $name "* ]]; then
    run "$name" "$PYTHON" -m "benchmarks.ops.$name" "${words[@]}"
  elif [[ $name == */* && -f benchmarks/$name.py ]]; then
    run "$name" "$PYTHON" -m "benchmarks.${name//\//.}" "${words[@]}"
  else
    echo "gpu.sh: expected tests, a script with its folder, or one of ${every[*]}, got $name" | tee -a "$log" >&2
    failed+=("$name (no such part)")
  fi
done
[ ${#failed[@]} = 0 ] && { echo "== all parts passed" | tee -a "$log"; exit 0; }
printf '== failed: %s\n' "${failed[@]}" | tee -a "$log"
exit 1
