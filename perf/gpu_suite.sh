#!/bin/sh
# The GPU suite from a checkout where millrace is not installed: Python needs torch and triton.
#   sh perf/gpu_suite.sh --out DIR [--only PART ...] [--commit HASH]
set -eu
cd "$(dirname "$0")/.."
links=build/typing/millrace
mkdir -p "$links"
for part in engine scheduler kernels perf client; do
    ln -sfn "../../../$part" "$links/$part"
done
ln -sfn ../../../proto/millrace/v1 "$links/v1"
# -P: the folder `kernels` here must not be found under that name, which is another package's.
PYTHONPATH="$PWD/build/typing${PYTHONPATH:+:$PYTHONPATH}" \
    exec "${PYTHON:-python3}" -P -u -m millrace.perf.gpu_suite "$@"
