# Sourced by quickstart.sh and test.sh: makes .venv and installs requirement files, once per content of those files.
# Usage: prepare_environment requirements.txt [more.txt ...]

prepare_environment() {
  if [ ! -x .venv/bin/python ]; then
    echo "Making .venv ..."
    "${PYTHON:-python3}" -m venv .venv
  fi
  local stamp=".venv/.installed-$(cat "$@" | .venv/bin/python -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest()[:16])')"
  if [ ! -f "$stamp" ]; then
    echo "Installing $* ..."
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "torch==2.13.0"  # first, so that nothing pulls another
    local file
    for file in "$@"; do
      .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$file"
    done
    touch "$stamp"
  fi
}
