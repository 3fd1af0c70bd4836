# shellcheck shell=bash
# Functions of the launchers, to be sourced. A launcher runs in the repository's root, wherever it is called from, and
# copies its output to a file in logs/. The exit code is the run's: 0 done, 1 failed, 2 bad input, 75 stopped with
# everything saved. DRY_RUN=1 prints the command without running it.

ROOT="$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)"
if [[ -z "${PYTHON:-}" ]]; then
  PYTHON=python3
  if [[ -x "$ROOT/.venv/bin/python" ]]; then
    PYTHON="$ROOT/.venv/bin/python"
  fi
fi
# hide PyTorch's warnings about sockets that do not answer yet: the run itself reports a failure
export TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}"

# launch NAME COMMAND...: run the command, and exit with its exit code.
launch() {
  local name="$1" log
  shift
  cd "$ROOT" || exit
  if [[ "${DRY_RUN:-0}" == 1 ]]; then
    printf '%q ' "$@"
    printf '\n'
    exit 0
  fi
  mkdir -p logs
  log="logs/$name-$(date +%Y%m%d-%H%M%S)-$$.log"
  echo "log: $ROOT/$log"
  # tee must ignore the signals that stop a run, so that the log is complete
  exec "$@" > >(trap '' HUP INT TERM && exec tee "$log") 2>&1
}
