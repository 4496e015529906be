#!/bin/bash
# A training run on Slurm that puts itself back into the queue until it is done.
#
#     OUTPUT_DIR=/shared/runs/cat OUTPUT_NAME=cat sbatch examples/slurm.sh --config_file cat.toml
#
# One task for each GPU, on as many computers as you like. All of them need to see the same folders. With
# SCRIPT=lumina_train.py in front the model itself is trained, and not a LoRA.
#SBATCH --job-name=lumina
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -u
: "${OUTPUT_DIR:?where the network and the states go}" "${OUTPUT_NAME:?what the network is called}"
PYTHON=${PYTHON:-.venv/bin/python}
SCRIPT=${SCRIPT:-lumina_train_network.py}

# B:USR1@300 above sends this script, and nothing else, a signal five minutes before the time is up. It is
# passed on as a file: a signal would have to reach every task, through whatever has started it.
out_of_time=
ask_to_stop() {
    out_of_time=yes
    touch "$OUTPUT_DIR/$OUTPUT_NAME.stop"
}
trap ask_to_stop USR1

# With a master named, the tasks of srun become one run. Another job on the same computer has another port.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

srun --kill-on-bad-exit=1 "$PYTHON" "$SCRIPT" "$@" \
    --output_dir "$OUTPUT_DIR" --output_name "$OUTPUT_NAME" --save_state --resume latest &
training=$!
wait "$training"
code=$?
while kill -0 "$training" 2> /dev/null; do # the signal ended the waiting, not the training
    wait "$training"
    code=$?
done

# 75: stopped, and can go on. A launcher in between, like accelerate or torchrun, makes it 1.
if [[ $code -eq 75 || (-n $out_of_time && $code -ne 0) ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
