#!/usr/bin/env bash
# Trains on every GPU of this machine (on the CPU where there is none) and hands all arguments on to sft.py:
#
#   bash sft.sh                                                    # the embedded demo
#   CATEGORY=Industrial_and_Scientific bash sft.sh                 # files of data/amazon, named after the category
#   CATEGORY=Toys DATA_DIR=/data/toys BASE_MODEL=Qwen/Qwen2.5-0.5B bash sft.sh --freeze_LLM True --num_epochs 5
#   CATEGORY=Toys BATCH_SIZE=1024 MICRO_BATCH_SIZE=16 bash sft.sh  # eight large GPUs
#
# Every flag of sft.py is an environment variable here, in capitals; an argument wins over it. What is not set keeps
# sft.py's default, but for the base model, and the files and the output folder that CATEGORY names. On several nodes set
# NNODES, NODE_RANK and MASTER_ADDR (and MASTER_PORT) on each.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}

# ---- processes: one per GPU that this shell may see, one on a CPU
if [ -z "${NPROC_PER_NODE:-}" ]; then
  if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
    NPROC_PER_NODE=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .)
  elif [ -z "${CUDA_VISIBLE_DEVICES+set}" ] && command -v nvidia-smi >/dev/null 2>&1; then
    NPROC_PER_NODE=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
  fi
fi
NPROC_PER_NODE=${NPROC_PER_NODE:-1}
[ "$NPROC_PER_NODE" -ge 1 ] || NPROC_PER_NODE=1
NNODES=${NNODES:-1}
WORLD=$((NPROC_PER_NODE * NNODES))

given() { local name=$1 argument; shift; for argument; do [[ $argument != "--$name" && $argument != "--$name="* ]] || return 0; done; return 1; }
asks_for_help() { given help "$@" || [[ " $* " == *" -h "* ]]; }

# ---- what is trained on
CATEGORY=${CATEGORY:-}
if [ -z "$CATEGORY" ] && [ -z "${TRAIN_FILE:-}" ] && ! given train_file "$@" && ! given category "$@" && ! asks_for_help "$@"; then
  DEMO=1 DEMO_DIR=${DEMO_DIR:-output/demo/data}
  "$PYTHON" -m sid_sft.demo "$DEMO_DIR"
  BASE_MODEL=${BASE_MODEL:-$DEMO_DIR/base}
  TRAIN_FILE=$DEMO_DIR/shop.train.csv EVAL_FILE=$DEMO_DIR/shop.valid.csv
  SID_INDEX_PATH=$DEMO_DIR/shop.index.json ITEM_META_PATH=$DEMO_DIR/shop.item.json
  CATEGORY=kitchen OUTPUT_DIR=${OUTPUT_DIR:-output/demo/run}
  FREEZE_LLM=${FREEZE_LLM:-True} NUM_EPOCHS=${NUM_EPOCHS:-20} MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-16}
  BATCH_SIZE=${BATCH_SIZE:-$((32 * WORLD))}
  given save_steps "$@" || EVAL_STEPS=${EVAL_STEPS:-${SAVE_STEPS:-0.1}}  # saving follows evaluating, or the other way
fi
BASE_MODEL=${BASE_MODEL:-Qwen/Qwen2.5-0.5B}
OUTPUT_DIR=${OUTPUT_DIR:-output/${CATEGORY:-run}}
if [ -n "$CATEGORY" ]; then
  FILES=${DATA_DIR:-data/amazon}/$CATEGORY
  TRAIN_FILE=${TRAIN_FILE:-$FILES.train.csv} EVAL_FILE=${EVAL_FILE-$FILES.valid.csv}
  SID_INDEX_PATH=${SID_INDEX_PATH:-$FILES.index.json} ITEM_META_PATH=${ITEM_META_PATH-$FILES.item.json}
fi

# ---- a variable becomes a flag unless the same flag was given as an argument
arguments=()
for flag in base_model train_file eval_file sid_index_path item_meta_path preference_file output_dir category tasks \
  prompts chat_template sample eval_sample eval_recommendation metric_for_best_model max_left_out cutoff_len freeze_LLM \
  frozen_prefix lora_rank lora_alpha lora_learning_rate load_in_8bit load_in_4bit train_from_scratch num_epochs \
  max_steps batch_size micro_batch_size auto_micro_batch fsdp gradient_checkpointing learning_rate weight_decay \
  lr_scheduler_type warmup_steps group_by_length group_users prefix_cache_gb prefix_cache_in seed bf16 logging_steps \
  eval_steps save_steps early_stopping_patience resume_from_checkpoint allow_changed report_to wandb_project \
  wandb_run_name push_to_hub hub_private trust_remote_code cache_dir num_proc check; do
  variable=${flag^^}
  [ -z "${!variable:-}" ] || given "$flag" "$@" || arguments+=("--$flag" "${!variable}")
done

if [ "$WORLD" -eq 1 ]; then
  launch=("$PYTHON")
elif [ "$NNODES" -eq 1 ]; then
  launch=("$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$NPROC_PER_NODE")
else
  launch=("$PYTHON" -m torch.distributed.run --nproc_per_node "$NPROC_PER_NODE" --nnodes "$NNODES"
    --node_rank "${NODE_RANK:-0}" --master_addr "${MASTER_ADDR:?set it to the address of node 0}"
    --master_port "${MASTER_PORT:-29500}")
fi
if [ -z "${DEMO:-}" ] || given check "$@" || given output_dir "$@"; then
  exec "${launch[@]}" sft.py "${arguments[@]}" "$@"
fi
# ---- the demo ends with what its model recommends, beside recommenders that need no model
"${launch[@]}" sft.py "${arguments[@]}" "$@"
exec "${launch[@]}" evaluate.py --base_model "$OUTPUT_DIR/final_checkpoint" --test_file "$DEMO_DIR/shop.test.csv" \
  --train_file "$TRAIN_FILE" --sid_index_path "$SID_INDEX_PATH" --item_meta_path "$ITEM_META_PATH" --examples 3
