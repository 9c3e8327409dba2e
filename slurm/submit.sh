#!/bin/bash
# Submit a whole reproduction:  slurm/submit.sh ROOT [options of sbatch, e.g. --partition=gpu]
# ROOT/jobs is written by  papermill nbs/reproduce.ipynb OUT.ipynb -p where slurm -p preset paper -p data_root PATH
# Submit it again at any time: what is done is passed over, what was interrupted continues.
set -euo pipefail
root=${1:?usage: slurm/submit.sh ROOT [options of sbatch]}; shift
here=$(cd "$(dirname "$0")" && pwd)
last=$(($(grep -c '' "$root/jobs/train.txt") - 1))

prepare=$(sbatch --parsable "$@" "$here/notebook.sbatch" "$root" prepare)
train=$(sbatch --parsable "$@" --array="0-$last" --dependency="afterok:${prepare%%;*}" "$here/train.sbatch" "$root")
# each evaluation after its own training; the report after all of them, whatever became of them
evaluate=$(sbatch --parsable "$@" --array="0-$last" --dependency="aftercorr:${train%%;*}" "$here/evaluate.sbatch" "$root")
report=$(sbatch --parsable "$@" --dependency="afterany:${evaluate%%;*}" "$here/notebook.sbatch" "$root" report)
echo "prepare ${prepare%%;*}, train ${train%%;*}, evaluate ${evaluate%%;*}, report ${report%%;*}: squeue --me"
