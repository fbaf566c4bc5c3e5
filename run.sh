#!/usr/bin/env bash
# From nothing to a table of error rates: environment, data, training, decoding.
#
#   ./run.sh                                              # synthetic speech in many languages
#   ./run.sh --corpus tusom2021 --source ../tusom2021     # real speech, from a copy of its repository
#   ./run.sh --corpus tsv --source recordings.tsv         # your own recordings
#
# Options:
#   --corpus NAME      espeak (default), tusom2021 or tsv
#   --source PATH      where the corpus is, see prepare.sh
#   --hours H          espeak: hours of speech to train on
#   --steps N          batches to train for (default: as many as suit the corpus)
#   --processes N      training processes (default: one for each GPU, else one that uses all cores)
#   --data DIR         where the data go (default: data/CORPUS)
#   --exp-dir DIR      where checkpoints and results go (default: exp/CORPUS)
#   --also FOLDERS     comma list of further shar folders to decode, such as data/tusom2021/dev
#   --stage N          first stage: 1 data, 2 training, 3 decoding (default: 1)
#   --stop-stage N     last stage (default: 3)

set -euo pipefail
cd "$(dirname "$0")"

corpus=espeak
source=
hours=
steps=
processes=
data=
exp_dir=
also=
stage=1
stop_stage=3
. shared/parse_options.sh

case "$corpus" in
  espeak | tusom2021 | tsv) ;;
  *) echo "run.sh: --corpus is '$corpus', expected espeak, tusom2021 or tsv" >&2; exit 1 ;;
esac
: "${data:=data/$corpus}" "${exp_dir:=exp/$corpus}"

. shared/environment.sh

if [ "$stage" -le 1 ] && [ "$stop_stage" -ge 1 ]; then
  options=()
  [ -z "$source" ] || options+=(--source "$source")
  [ -z "$hours" ] || options+=(--hours "$hours")
  ./prepare.sh --corpus "$corpus" --output "$data" --default-config '' ${options[@]+"${options[@]}"}
fi

if [ "$stage" -le 2 ] && [ "$stop_stage" -ge 2 ]; then
  if [ -z "$processes" ]; then
    processes=$(python -c 'import torch; print(torch.cuda.device_count() or 1)')
  fi
  # Small batches: a short run gains more from many updates. Utterances of espeak and tusom2021 are at most 10 s long.
  max_duration=20
  [ "$corpus" != tsv ] || max_duration=24
  # Few recordings are soon learnt by heart: more variety, and CR-CTC for most of the run, but not before plain CTC has
  # found phones in all of them, or that may be late or never. Hours of clean synthetic speech are not: plain CTC, whose
  # batches take half the time.
  case "$corpus" in
    espeak) : "${steps:=4200}"; options=(--plain-ctc-batches "$steps") ;;
    tusom2021) : "${steps:=8000}"; options=(--speed-perturbation 0.1 --plain-ctc-batches 1600) ;;
    tsv) options=(--speed-perturbation 0.1 --plain-ctc-batches 1600) ;;
  esac
  python zipformer_crctc/train.py --preset tiny --data-config "$data/data.yaml" --exp-dir "$exp_dir" \
    --world-size "$processes" --max-duration "$max_duration" ${steps:+--num-steps "$steps"} "${options[@]}"
fi

if [ "$stage" -le 3 ] && [ "$stop_stage" -ge 3 ]; then
  python zipformer_crctc/decode.py --exp-dir "$exp_dir" --iter 1000000 --avg 2 --max-duration 60 --num-workers 1 \
    --data-config "$data/data.yaml" --test-sets "dev,test${also:+,$also}"
fi
