#!/usr/bin/env bash
# Puts NVIDIA's run-time compiler (NVRTC 13.0, from PyPI; no GPU and no toolkit needed) into the folder $1, unless it is there.
set -euo pipefail
folder=$1
library=$folder/nvidia/cu13/lib/libnvrtc.so.13
[[ -f $library ]] && exit 0
mkdir -p "$folder"
python3 -m pip install --quiet --disable-pip-version-check --no-deps --target "$folder" nvidia-cuda-nvrtc==13.0.88
[[ -f $library ]]
