# shellcheck shell=bash
# Sourced by the scripts that start runs elsewhere: one-line errors, and --dry_run.
#   usage              prints the comment at the head of the script
#   fail WORDS         one line on stderr, exit status 2
#   parse NAMES -- ARGUMENTS
#                      sets a variable for each "--name value" of NAMES, and dry_run and help; what
#                      follows a lone "--" goes to the array `rest`
#   need NAMES         fails where one of these variables is empty
#   run COMMAND        runs it; under --dry_run prints it instead
dry_run='' rest=()

usage() { sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0"; }

fail() {
  echo "$(basename "$0"): error: $*; see --help." >&2
  exit 2
}

parse() {
  local known=" $1" option  # not the names of the variables that are set
  shift 2
  while [ $# -gt 0 ]; do
    option=${1#--}
    case $1 in
      --help | -h)
        usage
        exit 0
        ;;
      --dry_run) dry_run=1 ;;
      --)
        shift
        rest=("$@")
        return
        ;;
      --*)
        [ "$known" != " " ] || fail "no option $1; what \`t5x_lite train\` gets stands after --"
        [[ "$known " == *" $option "* ]] || fail "no option $1; there are${known// / --}"
        [ $# -gt 1 ] && [[ $2 != --* ]] || fail "$1 needs a value"
        printf -v "$option" %s "$2"
        shift
        ;;
      *) fail "'$1' is no option; what \`t5x_lite train\` gets stands after --" ;;
    esac
    shift
  done
}

need() {
  local option
  for option in "$@"; do
    [ -n "${!option}" ] || fail "--$option is missing"
  done
}

need_count() {
  [[ ${!1} =~ ^[1-9][0-9]*$ ]] || fail "--$1 ${!1} must be a whole number of at least 1"
}

need_train_options() {
  local words=" ${rest[*]-} "
  [[ $words == *" --gin_file"* ]] || fail "nothing to train: add -- --gin_file FILE --model_dir DIR"
  [[ $words == *" --model_dir"* ]] || fail "--model_dir is missing after --"
}

# The arguments as one string that a shell splits into the same ones again.
quoted() {
  local word text=''
  for word in "$@"; do
    # Plain words stay readable.
    [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    text+="$word "
  done
  echo "${text% }"
}

run() {
  if [ -n "$dry_run" ]; then
    quoted "$@"
  else
    "$@"
  fi
}
