#!/usr/bin/env bash
# Trains a harvested run on all GPUs of a SLURM job, and goes on in the next job where the time of this one is over.
#   sbatch --nodes 8 --gpus-per-node 8 --time 4:00:00 scripts/slurm_train.sh runs/wide [flags of saeql train]
# 180 s before the end SLURM sends SIGUSR1: ranks finish their step, write a checkpoint and stop, the job is queued again.
# LAUNCHER=srun starts the ranks without torchrun (one task a GPU); SAEQL_PYTHON names the Python of every node.
#SBATCH --job-name=saeql-train
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@180
set -uo pipefail
run=${1:?usage: sbatch scripts/slurm_train.sh RUN [flags of saeql train]}
shift
python=${SAEQL_PYTHON:-python}
gpus=${SLURM_GPUS_ON_NODE:-1}
train=(-m saeql.pipelines train "$run" --resume "$@")

if [[ ${LAUNCHER:-torchrun} == srun ]]; then
  srun --ntasks-per-node="$gpus" "$python" "${train[@]}"
else
  host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  # a port below those that Linux gives to outgoing connections, from 32768 on
  # torchrun passes the signal on to its ranks, and gives them the time that SLURM gives
  srun "$python" -m torch.distributed.run --nnodes "$SLURM_NNODES" --nproc-per-node "$gpus" \
    --rdzv-backend c10d --rdzv-endpoint "$host:$((20000 + SLURM_JOB_ID % 12000))" \
    --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout 150 "${train[@]}"
fi
code=$?

# torchrun ends with 1 whatever its ranks end with: stopped.json says that they stopped because they were asked to
if [[ $code -eq 75 || ($code -ne 0 && -e $run/stopped.json) ]]; then
  scontrol requeue "$SLURM_JOB_ID"
  exit 75
fi
exit "$code"
