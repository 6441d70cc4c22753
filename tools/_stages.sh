# Sourced by quickstart.sh: shows and logs stages, and skips those whose results exist. The sourcing
# script sets OUT (a directory) and STAGES (their number), then calls open_output and the stages.
# shellcheck shell=bash

# redo is set while a finished result that has changed is made again.
number=0 stage='' child='' redo=''

# open_output : create OUT and its folders, and wait until no other quickstart uses it.
open_output() {
  mkdir -p "$OUT/logs" "$OUT/.stages" || die "$OUT: cannot be written; give another OUT"
  # Every process started here holds the lock, including those that outlive a killed quickstart.
  exec 9>"$OUT/.stages/lock"
  local locked=0
  if command -v flock >/dev/null; then flock --nonblock 9 2>/dev/null || locked=$?; fi
  # Other codes come from file systems without locks.
  if [ "$locked" = 1 ]; then
    echo "another quickstart is still running in $OUT; waiting for it to end"
    flock 9
  fi
  # Tools draw their bars on this terminal, although their output goes into a log.
  if [ -t 1 ]; then
    { CALM_TERMINAL=$(tty <&4) && export CALM_TERMINAL || CALM_TERMINAL=''; } 4>&1
  fi
  trap 'stop 130' INT
  trap 'stop 143' TERM HUP
}

# Hash of the contents of files, whatever their directory; a missing file changes the hash as well.
hash_of() {
  local file
  for file in "$@"; do
    printf '%s\n' "${file##*/}"
    cat "$file" 2>/dev/null || echo missing
  done | sha256sum | cut -d' ' -f1
}

# Hash of all files under directories, wherever the directories are.
hash_under() {
  local folder
  for folder in "$@"; do
    (cd "$folder" 2>/dev/null && find . -type f -print0 | LC_ALL=C sort -z | xargs -0 -r sha256sum) || true
  done | sha256sum | cut -d' ' -f1
}

# always NAME : run the function NAME, a stage that decides itself what has to be done.
always() {
  stage=$1 number=$((number + 1))
  echo "[$number/$STAGES] $stage ..."
  "$stage"
}

# forget NAME : make the next run_stage of NAME run it again.
forget() {
  rm -f "$OUT/.stages/$1"
}

# run_stage NAME RESULTS INPUT... : run the function NAME, unless its results (directories under
# OUT) are unchanged since it made them from the same contents of the input files.
run_stage() {
  local name=$1 results=() folder inputs started=$SECONDS
  for folder in $2; do results+=("$OUT/$folder"); done
  shift 2
  number=$((number + 1)) stage=$name
  local stamp=$OUT/.stages/$name
  inputs=$(hash_of "$@")
  if [ "$(cat "$stamp" 2>/dev/null)" = "$inputs $(hash_under "${results[@]}")" ]; then
    echo "[$number/$STAGES] $name: already there"
    return
  fi
  echo "[$number/$STAGES] $name ..."
  redo=''
  if [ -e "$stamp" ] && [ "$(cut -d' ' -f1 "$stamp")" != "$inputs" ]; then
    set_aside "${results[@]}"
  elif [ -e "$stamp" ] && [ "$(cat "$stamp")" != "$inputs unfinished" ]; then
    echo "    its result has changed or is damaged; making it again"
    redo=1
  fi
  echo "$inputs unfinished" >"$stamp"
  "$name"
  echo "$inputs $(hash_under "${results[@]}")" >"$stamp"
  echo "[$number/$STAGES] $name: done in $((SECONDS - started)) s"
}

set_aside() {
  local path target number
  for path in "$@"; do
    [ -e "$path" ] || continue
    path=${path%/checkpoints}
    target=$OUT/previous/${path#"$OUT/"} number=1
    while [ -e "$target" ]; do target=$OUT/previous/${path#"$OUT/"}.$((number += 1)); done
    mkdir -p "$(dirname "$target")"
    mv "$path" "$target"
    echo "    its inputs have changed; the previous result is now $target"
  done
}

# Filter a log for display: for a training, the last step and one every ten seconds; no warnings
# from libraries (a second, indented line quotes their code). Paths under OUT are shown relative to
# it. On a terminal the tools draw their bars themselves; each line overwrites the bar.
show() {
  local line step shown=-10 after_warning='' over=''
  [ -z "${CALM_TERMINAL:-}" ] || over=$'\r\e[K'
  while IFS= read -r line; do
    case $line in
      *Warning:* | *WARNING* | *'] [INFO] '* | [WI][0-9][0-9][0-9][0-9]' '*)
        after_warning=1
        continue
        ;;
      *SKIPPED*) ;;
      'step '[0-9]*/*'  loss '*)
        step=${line#step } step=${step%% *}
        if [ "${step%/*}" != "${step#*/}" ] && [ $((SECONDS - shown)) -lt 10 ]; then continue; fi
        shown=$SECONDS
        ;;
      ' '*) [ -z "$after_warning" ] || continue ;;
      '') continue ;;
      'error: '*)
        printf '%s%s\n' "$over" "$line" >&2
        continue
        ;;
    esac
    after_warning=''
    printf '%s    %s\n' "$over" "${line//"$OUT/"/}"
  done
}

# Run a command with its output in OUT/logs/STAGE.log and, filtered, on the terminal.
logged() {
  local log=$OUT/logs/$stage.log code=0 view
  printf '$ %s\n' "$*" >>"$log"
  exec 3> >(tee -a "$log" | show)
  view=$!
  # In the background, so that this script can handle a signal at once.
  "$@" >&3 2>&1 </dev/null &
  child=$!
  wait "$child" || code=$?
  child=''
  exec 3>&-
  wait "$view" || true
  if [ "$code" != 0 ]; then
    echo "stage $stage failed with exit code $code; its complete output is in $log" >&2
    exit "$code"
  fi
}

stop() {
  trap - INT TERM HUP
  echo "stopped in stage ${stage:-(none)}; run the same command again to continue" >&2
  if [ -n "$child" ]; then
    kill "$child" 2>/dev/null || true
    wait "$child" 2>/dev/null || true
  fi
  exit "$1"
}
