#!/bin/bash
# Runs the servers of a rollout node, or its part of a server that spans nodes, until the last process ends.
set -uo pipefail

main() { # a function, so that bash reads the whole file first: the file may change while it runs
    trap "" USR1 # only the trainer handles USR1, and it still needs its servers
    # A trainer that receives TERM during a step needs its servers too, so a server does not end at once.
    trap 'touch "$RUN_DIR/servers/asked_to_stop"' TERM
    read -ra heads <<<"$SERVER_HEADS"
    for ((i = 0; i < SERVERS_PER_NODE; i++)); do
        gpus=$(seq -s, $((i * NODE_GPUS)) $((i * NODE_GPUS + NODE_GPUS - 1)))
        # shellcheck disable=SC2086
        CUDA_VISIBLE_DEVICES=$gpus "$SERVER_PYTHON" -m megatron_selfdistill.engines.vllm.server.serve --hf-config="$HF_CONFIG" \
            --host="$SERVER_HOST" --port=$((SERVER_PORT + i)) --tensor-parallel-size="$SERVER_GPUS" \
            --nnodes="$SERVER_NODES" --node-rank=$((SLURM_NODEID % SERVER_NODES)) \
            --master-addr="${heads[SLURM_NODEID / SERVER_NODES]}" --master-port=$((SERVER_PORT + 8)) $SERVER_ARGS &
    done
    while [ -n "$(jobs -rp)" ]; do wait; done
    exit
}

main
