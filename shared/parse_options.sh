# shellcheck shell=bash
# Command-line options for bash scripts. Set every option as a variable with its default first, then
#
#     . shared/parse_options.sh
#
# and `--stop-stage 2` or `--stop-stage=2` sets stop_stage. --help (or -h) prints the comment at the head of the
# calling script. An unknown option, a missing value, or a value other than true or false where the default is one of
# them is an error. What follows the options, or `--`, stays in "$@".

_option_error() {
  echo "$0: $* (--help lists the options)" >&2
  exit 1
}

while [ $# -gt 0 ]; do
  case "$1" in
    --help | -h)
      sed -n -e 1d -e '/^#/!q' -e 's/^# \{0,1\}//p' "$0"
      exit 0
      ;;
    --)
      shift
      break
      ;;
    --*=*)
      _option=${1%%=*}
      _value=${1#*=}
      shift
      ;;
    --*)
      _option=$1
      case "${2-}" in --*) set -- "$1" ;; esac
      [ $# -ge 2 ] || _option_error "option $1 needs a value"
      _value=$2
      shift 2
      ;;
    -?*) _option_error "unknown option $1: options begin with --" ;;
    *) break ;;
  esac

  _name=$(printf '%s' "${_option#--}" | tr - _)
  case "$_name" in
    '' | [!a-z]* | *[!a-z0-9_]*) _option_error "unknown option $_option" ;;
  esac
  [ -n "${!_name+set}" ] || _option_error "unknown option $_option"
  case "${!_name}" in
    true | false)
      case "$_value" in
        true | false) ;;
        *) _option_error "option $_option is '$_value', expected true or false" ;;
      esac
      ;;
  esac
  printf -v "$_name" '%s' "$_value"
done
unset -v _option _value _name
unset -f _option_error
