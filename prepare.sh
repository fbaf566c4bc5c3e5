#!/usr/bin/env bash
# Prepare a corpus: shar shards of train, dev and test, a tokenizer, and a data config that lists them.
#
#   ./prepare.sh                                                # synthetic speech in many languages, needs no download
#   ./prepare.sh --corpus tusom2021 --source ../tusom2021       # real speech, from a copy of its repository
#   ./prepare.sh --corpus tsv --source recordings.tsv           # your own: audio, text[, language, speaker, split, id]
#   ./prepare.sh --corpus ipapack --source /data/ipapack        # IPAPack++, used in place
#
# Stages (one that is done is not done again):
#   0  locate or fetch the source
#   1  write the shards (ipapack: check them, list them in the data config)
#   2  write the tokenizer and the data config
#   3  read every set once: hours, languages, and what the training filters leave out
#
# Options:
#   --corpus NAME         espeak (default), tusom2021, tsv or ipapack
#   --source PATH         tusom2021: copy of the repository (default: git clone); tsv: the table; ipapack: the folder of
#                         shards (default: download)
#   --output DIR          where to write (default: data/CORPUS)
#   --stage N             first stage to run (default: 0)
#   --stop-stage N        last stage to run (default: 3)
#   --force true          do stages that are done again; replace shards that were made with other options
#   --jobs N              processes (default: all cores)
#   --hours H             espeak: hours of speech
#   --languages A,B,...   espeak: languages, by code
#   --seed N              espeak: another seed makes other speech
#   --phones FILE         table of phones for the tokenizer (default: zipformer_crctc/phones.txt)
#   --filters NAME        limits for training sets: published, or alignable (drop only what CTC cannot align; for single
#                         words). Default: published; alignable for tusom2021
#   --repository NAMES    tusom2021: git address to clone; ipapack: data sets of the hub, comma-separated
#   --default-config FILE a copy of the data config where the programs look when none is named, unless another one is
#                         there (default: data/shar.yaml; empty for none)
#   --make-default true   replace the one that is there

set -euo pipefail

corpus=espeak
source=
output=
stage=0
stop_stage=3
force=false
jobs=
hours=
languages=
seed=
phones=
filters=
repository=
default_config=data/shar.yaml
make_default=false

here=$(cd "$(dirname "$0")" && pwd)
. "$here/shared/parse_options.sh"

log() {
  echo "$(date +%H:%M:%S) prepare.sh: $*"
}

problems=()

problem() {
  problems+=("$*")
}

only_for() { # option, its value, corpora
  local option=$1 value=$2
  shift 2
  [ -z "$value" ] && return
  case " $* " in
    *" $corpus "*) ;;
    *) problem "$option is an option of --corpus $*, not of $corpus" ;;
  esac
}

check_options() {
  [ $# -eq 0 ] || problem "unexpected argument '$1'"
  case "$corpus" in
    espeak | tusom2021 | tsv | ipapack) ;;
    *) problem "--corpus is '$corpus', expected espeak, tusom2021, tsv or ipapack" ;;
  esac
  [[ $stage =~ ^[0-3]$ ]] || problem "--stage is '$stage', expected 0 to 3"
  [[ $stop_stage =~ ^[0-3]$ ]] || problem "--stop-stage is '$stop_stage', expected 0 to 3"
  [[ $jobs =~ ^([1-9][0-9]*)?$ ]] || problem "--jobs is '$jobs', expected a whole number above 0"
  [[ $seed =~ ^([0-9]+)?$ ]] || problem "--seed is '$seed', expected a whole number"
  [[ $hours =~ ^([0-9]*\.?[0-9]+)?$ && ! $hours =~ ^[0.]+$ ]] ||
    problem "--hours is '$hours', expected a number above 0"
  [[ $filters =~ ^(published|alignable)?$ ]] || problem "--filters is '$filters', expected published or alignable"
  only_for --source "$source" tusom2021 tsv ipapack
  only_for --hours "$hours" espeak
  only_for --languages "$languages" espeak
  only_for --seed "$seed" espeak
  only_for --repository "$repository" tusom2021 ipapack
  [ "$corpus" != tsv ] || [ -n "$source" ] || problem "--corpus tsv needs --source, a table with the columns audio and text"
  [ -z "$source" ] || [ -e "$source" ] || problem "--source $source does not exist"
  [ -z "$source" ] || [ -z "$repository" ] || problem "--source and --repository exclude each other"
  [ -z "$phones" ] || [ -f "$phones" ] || problem "--phones $phones does not exist"
  if [ ${#problems[@]} -gt 0 ]; then
    printf 'prepare.sh: %s\n' "${problems[@]}" >&2
    exit 1
  fi
}

from_here() { # a path of the caller's, as seen from the repository's root
  case "$1" in
    '' | /*) echo "$1" ;;
    *) if [ "$PWD" = "$here" ]; then echo "$1"; else echo "$PWD/$1"; fi ;;
  esac
}

check_options "$@"
source=$(from_here "$source")
output=$(from_here "$output")
phones=$(from_here "$phones")
cd "$here"
: "${output:=data/$corpus}"
: "${jobs:=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)}"
if [ -z "$filters" ]; then
  filters=published
  [ "$corpus" != tusom2021 ] || filters=alignable
fi
if [ -x .venv/bin/python ]; then
  python=$PWD/.venv/bin/python
else
  python=${PYTHON:-python3}
fi
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
data_config=$output/data.yaml

# Options as arguments for the Python programs; absent where the option was not given.
phones_option=()
[ -z "$phones" ] || phones_option=(--phones "$phones")

full_path() {
  echo "$(cd "$(dirname "$1")" && pwd -P)/$(basename "$1")"
}

# A stage leaves a marker with the options that decide about its result.
shards_signature() {
  local text="corpus=$corpus" name
  [ -z "$source" ] || text="$text source=$(full_path "$source")"
  for name in repository hours languages seed; do
    [ -z "${!name}" ] || text="$text $name=${!name}"
  done
  [ "$corpus" != tsv ] || text="$text table=$(cksum <"$source" | tr ' ' -)"
  # Of tsv and tusom2021, rows without a known phone are left out; of ipapack, stage 1 writes the limits.
  case "$corpus" in
    tusom2021 | tsv) [ -z "$phones" ] || text="$text phones=$(cksum <"$phones" | tr ' ' -)" ;;
    ipapack) text="$text filters=$filters" ;;
  esac
  echo "$text"
}

is_done() { # stage number, signature
  [ "$force" = false ] && [ -f "$output/.done/stage-$1" ] && [ "$(cat "$output/.done/stage-$1")" = "$2" ]
}

run_stage() { # stage number, what it does, signature, function
  local number=$1 title=$2 signature=$3 later
  if [ "$number" -lt "$stage" ] || [ "$number" -gt "$stop_stage" ]; then
    return
  fi
  if is_done "$number" "$signature"; then
    log "stage $number: $title: done before"
    return
  fi
  log "stage $number: $title"
  for later in 0 1 2 3; do
    [ "$later" -lt "$number" ] || rm -f "$output/.done/stage-$later"
  done
  "$4"
  mkdir -p "$output/.done"
  echo "$signature" >"$output/.done/stage-$number"
}

check_output() { # refuse before any work what would replace shards that are wanted
  local marker=$output/.done/stage-1
  if [ "$stage" -gt 1 ] || [ "$stop_stage" -lt 1 ] || [ "$force" = true ] || [ "$corpus" = ipapack ]; then
    return
  fi
  if [ -f "$marker" ] && [ "$(cat "$marker")" != "$shards" ]; then
    {
      echo "prepare.sh: $output was made with other options:"
      echo "  then: $(cat "$marker")"
      echo "  now:  $shards"
      echo "Write to another folder with --output, or replace it with --force true."
    } >&2
    exit 1
  fi
  if [ ! -d "$output/.done" ] && [ -n "$(list_shards)" ]; then
    {
      echo "prepare.sh: $output holds shards that prepare.sh did not make, which would be replaced."
      echo "Write to another folder with --output, or replace them with --force true."
    } >&2
    exit 1
  fi
}

list_shards() {
  local split
  for split in train dev test; do
    [ ! -d "$output/$split" ] ||
      find "$output/$split" -maxdepth 1 \( -name 'cuts.[0-9]*.jsonl.gz' -o -name 'recording.[0-9]*.tar' \)
  done
}

check_packages() {
  "$python" - <<'END' || exit 1
import sys
from importlib.util import find_spec

missing = [name for name in ("torch", "numpy", "sentencepiece", "soundfile", "soxr", "yaml", "tqdm") if not find_spec(name)]
if sys.version_info < (3, 10) or missing:
    sys.exit(
        f"prepare.sh: {sys.executable} (Python {sys.version.split()[0]}) lacks {', '.join(missing) or 'version 3.10'}: "
        "run ./run.sh, which makes the environment .venv, or name an interpreter with the packages of requirements.txt "
        "in the variable PYTHON"
    )
END
}

locate() {
  case "$corpus" in
    espeak) log "espeak needs no source" ;;
    tusom2021) if [ -n "$source" ]; then log "source: $source"; else clone_tusom2021; fi ;;
    tsv) log "source: $source" ;;
    ipapack) if [ -n "$source" ]; then log "source: $source"; else download_ipapack; fi ;;
  esac
}

clone_tusom2021() {
  local address=${repository:-https://github.com/dmort27/tusom2021} clone=$output/source
  mkdir -p "$output"
  rm -rf "$clone.part" "$clone"
  if ! GIT_TERMINAL_PROMPT=0 git clone --quiet --depth 1 "$address" "$clone.part"; then
    echo "prepare.sh: could not clone $address: without a network, copy the repository and give --source DIR" >&2
    exit 1
  fi
  mv "$clone.part" "$clone"
  log "cloned $address to $clone"
}

download_ipapack() {
  local names=()
  [ -z "$repository" ] || names=(--repositories "$repository")
  "$python" -m local.download_ipapack --output "$output/download" --jobs "$jobs" ${names[@]+"${names[@]}"}
}

write_shards() {
  local options=() started=$output/.done/started
  # Shards of a run that broke off are kept if they were made with the same options (espeak goes on from there).
  if [ "$corpus" != ipapack ] && { [ "$force" = true ] || [ "$(cat "$started" 2>/dev/null)" != "$shards" ]; }; then
    list_shards | while IFS= read -r file; do rm -f "$file"; done
  fi
  mkdir -p "$output/.done"
  echo "$shards" >"$started"
  case "$corpus" in
    espeak)
      [ -z "$hours" ] || options+=(--hours "$hours")
      [ -z "$languages" ] || options+=(--languages "$languages")
      [ -z "$seed" ] || options+=(--seed "$seed")
      "$python" -m local.prepare_espeak --output "$output" --jobs "$jobs" ${options[@]+"${options[@]}"}
      ;;
    tusom2021 | tsv)
      "$python" -m "local.prepare_$corpus" --source "${source:-$output/source}" --output "$output" --jobs "$jobs" \
        ${phones_option[@]+"${phones_option[@]}"}
      ;;
    ipapack)
      "$python" -m local.prepare_ipapack --source "${source:-$output/download}" --data-config "$data_config" \
        --filters "$filters"
      ;;
  esac
}

write_lang_and_config() {
  local sets=(--corpus "$corpus" --output "$output" --filters "$filters") default=()
  # The config of ipapack is written with its sets, and may have been edited since.
  [ "$corpus" != ipapack ] || sets=()
  [ -z "$default_config" ] || default=(--default "$default_config" --make-default "$make_default")
  "$python" -m local.prepare_lang --output "$output/lang" ${phones_option[@]+"${phones_option[@]}"}
  "$python" -m local.write_data_config --data-config "$data_config" ${sets[@]+"${sets[@]}"} \
    ${default[@]+"${default[@]}"}
}

report_sets() {
  "$python" -m local.report_sets --data-config "$data_config" --jobs "$jobs" ${phones_option[@]+"${phones_option[@]}"}
}

shards=$(shards_signature)
check_packages
check_output
run_stage 0 "source of $corpus" "corpus=$corpus source=${source:+$(full_path "$source")} repository=$repository" locate
run_stage 1 "shards of $corpus in $output" "$shards" write_shards
# Somebody may have removed the copy at the default place.
[ -z "$default_config" ] || [ -e "$default_config" ] || rm -f "$output/.done/stage-2"
run_stage 2 "tokenizer and data config" \
  "$shards phones=$phones filters=$filters default=$default_config make_default=$make_default" write_lang_and_config
run_stage 3 "sets" "$shards phones=$phones filters=$filters" report_sets
log "data config: $data_config"
