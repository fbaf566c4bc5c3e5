#!/usr/bin/env bash
# A noisy-student round: train teachers on half of a corpus, let them label the other half and synthetic speech, train
# a student on the first half and the labels, and compare the phone error rates on dev before and after.
#
#   local/noisy_student.sh --source ../tusom2021                # from a copy of its repository
#   local/noisy_student.sh --source ../tusom2021 --steps 20 --blank-penalty 10    # all stages, quickly
#
# Stages: 1 data, 2 teachers, 3 pseudo-labels, 4 student, 5 decoding and comparison.
#
# Options:
#   --source PATH         copy of the repository of tusom2021 (default: git clone)
#   --espeak-hours H      hours of synthetic speech to label as well; 0 for none (default: 0.5)
#   --languages A,B,...   espeak: languages, by code (default: all)
#   --steps N             batches to train each model for (default: 5000)
#   --teachers N          teachers, which differ in their seed; two or more (default: 2)
#   --keep-percent P      labels that are kept, in percent of each corpus: the best by agreement (default: 70)
#   --blank-penalty X     nats taken off the blank in labelling (default: 0)
#   --max-duration S      seconds of audio in a batch (default: 20)
#   --scale X             weight of the pseudo-labelled batches in the student's loss (default: 0.5)
#   --processes N         training processes (default: one for each GPU, else one that uses all cores)
#   --data DIR            where the data go (default: data/noisy_student)
#   --exp-dir DIR         where checkpoints, labels and results go (default: exp/noisy_student)
#   --stage N             first stage (default: 1)
#   --stop-stage N        last stage (default: 5)
#
# Teachers and student see the same number of labelled batches, of the same size; a step of the student has a
# pseudo-labelled batch besides. "Before" is the first teacher.

set -euo pipefail
cd "$(dirname "$0")/.."

source=
espeak_hours=0.5
languages=
steps=5000
teachers=2
keep_percent=70
blank_penalty=0
max_duration=20
scale=0.5
processes=
data=data/noisy_student
exp_dir=exp/noisy_student
stage=1
stop_stage=5
. shared/parse_options.sh

whole='^[1-9][0-9]*$'
for option in steps teachers; do
  [[ ${!option} =~ $whole ]] || { echo "noisy_student.sh: --$option is '${!option}', expected a whole number" >&2; exit 1; }
done
[ "$teachers" -ge 2 ] || { echo "noisy_student.sh: --teachers is $teachers: agreement needs two or more" >&2; exit 1; }

. shared/environment.sh
: "${processes:=$(python -c 'import torch; print(torch.cuda.device_count() or 1)')}"

corpora=(tusom2021)
case "$espeak_hours" in 0 | 0.0) ;; *) corpora+=(espeak) ;; esac
declare -A unlabelled=([tusom2021]=$data/halves/2 [espeak]=$data/espeak/train)
suffix=iter-1000000-avg-2-use-averaged-model

runs() { # stage number
  [ "$stage" -le "$1" ] && [ "$stop_stage" -ge "$1" ]
}

write_config() { # file, pseudo-labelled folders
  local file=$1 folder
  shift
  {
    echo "train: [$(realpath "$data/halves/1")]"
    echo "dev: {tusom2021-dev: $(realpath "$data/tusom2021/dev")}"
    echo "unsup:"
    for folder; do echo "  - $(realpath "$folder")"; done
    # Single words: only what CTC cannot align is left out.
    echo "filters: &words {min_duration: null, max_duration: null, min_tokens: 1, frame_share: 1.0}"
    echo "unsup_filters: *words"
  } >"$file"
}

train() { # name, data config, further flags
  local name=$1 config=$2 plain=800
  shift 2
  # As run.sh does for few recordings: more variety, and CR-CTC for most of the run.
  [ "$steps" -ge 2000 ] || plain=$((steps * 2 / 5))
  python zipformer_crctc/train.py --preset tiny --data-config "$config" --exp-dir "$exp_dir/$name" --num-steps "$steps" \
    --world-size "$processes" --max-duration "$max_duration" --speed-perturbation 0.1 --plain-ctc-batches "$plain" "$@"
}

if runs 1; then
  options=(--default-config '')
  ./prepare.sh --corpus tusom2021 --output "$data/tusom2021" ${source:+--source "$source"} "${options[@]}"
  python -m local.split_shar --source "$data/tusom2021/train" --output "$data/halves"
  if [ ${#corpora[@]} -gt 1 ]; then
    ./prepare.sh --corpus espeak --output "$data/espeak" --hours "$espeak_hours" ${languages:+--languages "$languages"} \
      "${options[@]}"
  fi
  write_config "$data/teacher.yaml"
fi

if runs 2; then
  for teacher in $(seq "$teachers"); do
    train "teacher-$teacher" "$data/teacher.yaml" --seed "$teacher"
  done
fi

if runs 3; then
  models=$(seq -s , -f "$exp_dir/teacher-%g@1000000" "$teachers")
  for corpus in "${corpora[@]}"; do
    python zipformer_crctc/pseudo_label.py --source "${unlabelled[$corpus]}" --output-dir "$exp_dir/pseudo/$corpus" \
      --checkpoints "$models" --avg 2 --keep-percent "$keep_percent" --per-phone True --blank-penalty "$blank_penalty" \
      --max-duration 60 --num-workers 1
  done
fi

if runs 4; then
  labelled=()
  for corpus in "${corpora[@]}"; do labelled+=("$exp_dir/pseudo/$corpus/shar"); done
  write_config "$exp_dir/student.yaml" "${labelled[@]}"
  train student "$exp_dir/student.yaml" --seed 1 --use-unsup-cr-ctc True --unsup-cr-ctc-loss-scale "$scale"
fi

if runs 5; then
  for name in teacher-1 student; do
    python zipformer_crctc/decode.py --exp-dir "$exp_dir/$name" --iter 1000000 --avg 2 --max-duration 60 --num-workers 1 \
      --data-config "$data/teacher.yaml" --test-sets dev
  done
  python zipformer_crctc/report.py "$exp_dir/teacher-1/ctc-greedy-search" "$exp_dir/student/ctc-greedy-search" \
    --suffix "$suffix" --other-suffix "$suffix" --names before,after --output "$exp_dir/report.html"
  sed '/^## /,$d' "$exp_dir/report.md"
fi
