#!/bin/bash
# sbatch --nodes=2 --gpus-per-node=4 recipes/clusters/slurm.sh recipe.yaml runs/mine
#
# One launcher per machine and one process per GPU. Two minutes before its time limit the job saves and exits with 75.
# Only then it is requeued: any other error would occur again.
#SBATCH --job-name=ft
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -u
recipe=$1 run=$2
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))

# In the background, so that this shell hears signals while it waits; Slurm sends USR1 to the step itself.
srun --kill-on-bad-exit=0 ft train "$recipe" --run-dir "$run" --resume auto \
    --processes "${SLURM_GPUS_ON_NODE:-1}" --nodes "$SLURM_NNODES" --rendezvous "$first:$port" &
step=$!
trap 'kill -TERM "$step"' TERM
wait "$step"
code=$?
while kill -0 "$step" 2>/dev/null; do # the wait ended with a signal to this shell: the step is still saving
    wait "$step"
    code=$?
done
if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
