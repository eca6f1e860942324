#!/usr/bin/env bash
# The end of `make demo`: validates the newest checkpoint beside its teacher, exports its LoRA, says where everything is.
set -euo pipefail
dmdtrain=$1 run=$2
ckpt=$(ls -d "$run"/checkpoints/step-* | sort | tail -n 1)
samples="$run/side_by_side"
lora="$run/student_lora.safetensors"
rm -rf "$samples" "$lora" "$run/student_lora_scheduler" # of an earlier demo
"$dmdtrain" validate --ckpt "$ckpt" --compare-teacher --teacher-steps 40 --count 16 --out "$samples"
"$dmdtrain" export-lora --ckpt "$ckpt" --out "$lora"
echo
echo "teacher and student side by side:"
echo "  videos         $samples/*.mp4"
echo "  contact sheet  $samples/contact_sheet.png"
echo "  numbers        $samples/results.json"
echo "  LoRA           $lora"
