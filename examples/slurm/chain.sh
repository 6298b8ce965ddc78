#!/bin/bash
# Pre-training in two stages, fine-tuning, conversion: four jobs, each after the one before, and one that raises the
# alarm. Edit the names, or give them:
#
#   STAGE1=stage1.yaml STAGE2=stage2.yaml FINE_TUNING=fine_tuning.yaml EXPORT=/data/models/mine \
#     examples/slurm/chain.sh --nodes 16 --time 24:00:00 [--print]
#
# Submit the chain again after a failure: what has finished is skipped. Options go to tools/launch.py. A stage that
# needs another size is submitted alone: tools/launch.py stage.yaml --nodes 4 --after JOB.
set -euo pipefail

: "${STAGE1:=stage1.yaml}"             # pre-training, first mixture
: "${STAGE2:=stage2.yaml}"             # the same output_dir, with a stage appended to data.stages and more num_steps
: "${FINE_TUNING:=fine_tuning.yaml}"   # another output_dir
: "${EXPORT:=}"                        # a folder for the model in Hugging Face's form; empty: do not convert

cd "$(dirname "$0")/../.."
exec "${PYTHON:-python}" tools/launch.py "$STAGE1" "$STAGE2" "$FINE_TUNING" ${EXPORT:+--convert-to "$EXPORT"} "$@"
