#!/usr/bin/env bash
# From a clean clone to an adapter that two processes have trained and the PEFT library has read: no GPU needed.
#
#   bash launch/quickstart.sh [setting=value ...]       RANKS=2 processes; settings as for launch/train.py
#
# A second call finds what the first has made: the environment, the model and data, and the checkpoint it resumes from.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/env.sh

RANKS=${RANKS:-2}
output=outputs/quickstart
for setting in "$@"; do
    [[ $setting == output_dir=* ]] && output=${setting#output_dir=}
done

d9d_lora_python demo

say "Model and data: SmolLM2-135M-Instruct and TREC questions, in .cache/demo"
"$PYTHON" -m d9d_lora.demo fetch --dir .cache/demo

threads=$(($(cores) / RANKS))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
# After a worker has died, gloo cannot meet again in the store that the dead one shared: torchrun's restarts would all fail.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

[[ -e $output/checkpoints/latest ]] && say "$output holds $(cat "$output/checkpoints/latest"): the run resumes there"
say "Training: $RANKS processes of $OMP_NUM_THREADS threads, into $output"
"$PYTHON" -m torch.distributed.run --nproc-per-node "$RANKS" --rdzv-backend c10d --rdzv-endpoint localhost:0 \
    launch/train.py experiment=quickstart output_dir="$output" "$@"

# The merged model is replaced only where the note beside it says that this script made it.
adapter_sum=$(cksum <"$output/adapter/adapter_model.safetensors")
note=$output/merged.of
if [[ -e $output/merged && ! -e $note ]]; then
    fail "$output/merged was not made by this script. Move it away, and call again."
elif [[ -e $output/merged && $(cat "$note") == "$adapter_sum" ]]; then
    say "Merging: $output/merged is of this adapter already"
else
    say "Merging the adapter into the base, file to file"
    rm -rf "$output/merged"
    echo "$adapter_sum" >"$note"
    "$PYTHON" launch/merge.py adapter="$output/adapter" model.path=.cache/demo/smollm2 output="$output/merged"
fi

say "Proof: the PEFT library, this package and the merged model, side by side"
"$PYTHON" -m d9d_lora.demo verify --run "$output"

say "Done. The adapter, for PEFT and everything that reads its format: $output/adapter"
cat <<EOT
   merged model              $output/merged
   checkpoints, to resume    $output/checkpoints
   every number of the run   $output/metrics.jsonl, report.png, and tb/ for TensorBoard
   ask it something          $PYTHON launch/generate.py model.path=.cache/demo/smollm2 adapter=$output/adapter \\
                               max_new_tokens=8 prompt=\$'Question: Who wrote Hamlet ?\\nAnswer type:'
EOT
