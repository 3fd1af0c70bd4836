# shellcheck shell=bash
# What the launchers share, to be sourced: they work in the repository's root, wherever they are called from; what is printed also goes to a
# file in logs/; the exit code is the run's own (0 done, 1 failed, 2 bad input, 75 stopped with everything saved). DRY_RUN=1 prints the command.

ROOT="$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)"
if [[ -z "${PYTHON:-}" ]]; then
  PYTHON=python3
  if [[ -x "$ROOT/.venv/bin/python" ]]; then
    PYTHON="$ROOT/.venv/bin/python"
  fi
fi
# torch's own account of sockets that do not answer yet, with C++ stack traces: a failure is told by the run
export TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}"

# launch NAME COMMAND...: ends this shell with the command's exit code.
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
  # the signals that stop a run must not end the log before the run has saved
  exec "$@" > >(trap '' HUP INT TERM && exec tee "$log") 2>&1
}
