#!/usr/bin/env bash
# Runs the whole test suite: environment, lint, tests. Arguments go to pytest, for example `./test.sh -k captions`.
set -euo pipefail
cd "$(dirname "$0")"
source tools/environment.sh
prepare_environment requirements.txt requirements-dev.txt
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
.venv/bin/ruff check .
exec .venv/bin/python -m pytest -n 2 --dist worksteal -q "$@"
