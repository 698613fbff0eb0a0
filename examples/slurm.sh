#!/bin/bash
# The paper profile on a cluster: one job of the array for each model, each on one GPU.
#
#   make setup-gpu && make plan PROFILE=paper     what will be fetched and how long it takes
#   sbatch examples/slurm.sh                      from the project's root
#   make reproduce PROFILE=paper                  when all are done: nothing is left but tables, figures and notebooks
#
# A job that hits its time limit can be submitted again: it goes on where it was stopped. Nodes without a network need the
# models and data in the cache beforehand (HF_HOME on a shared disk); `make doctor PROFILE=paper` says which models are not.

#SBATCH --job-name=shedder
#SBATCH --array=0-4
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%A-%a.log

set -euo pipefail

models=(mamba-2.8b mamba2-2.7b zamba2-2.7b hymba-1.5b falcon-mamba-7b)
model=${models[$SLURM_ARRAY_TASK_ID]}

# The Python that make takes: of the conda environment where that is active when the job is submitted, else of .venv.
bin=.venv/bin
if [ "${CONDA_DEFAULT_ENV:-}" = mamba-shedder ]; then bin=$CONDA_PREFIX/bin; fi

# Each job has its own folder, since all would write the same tables and notebooks at the end. Records of one model never
# collide with another's, and what a job that failed or was stopped has finished is kept too.
trap 'if [ -d "runs/slurm/$model/paper" ]; then cp -ru "runs/slurm/$model/paper" runs/; fi' EXIT
"$bin/python" -m shedder_utils run --profile paper --models "$model" --output "runs/slurm/$model"
