#!/bin/sh
# deploy.sh: looks at the phone, decides, says why, and puts this package on it. Made by qat; docs/deploy.md explains it.
#
# POSIX sh; on the phone the commands of Android's toybox. Nothing outside of the run directory is written or removed
# there: files go to a directory beside it, which takes its place when all have arrived.
# shellcheck shell=sh

set -u
LC_ALL=C
export LC_ALL
HERE=$(cd "$(dirname "$0")" && pwd) || exit 2
CONTENTS=$HERE/deploy/contents.tsv
ADB=${ADB:-adb}
TAB=$(printf '\t')
NEWLINE='
'
SERIAL=${ANDROID_SERIAL:-}
BASE=/data/local/tmp
MODE=install
JSON=no
STAGE=
MARK=.qat-package
VERDICT=

usage() {
    cat <<END
usage: ./deploy.sh [-s SERIAL] [--dry-run | --run] [--dir DIR] [--json]

Probes the phone, decides what of this package it needs, says why, and pushes it to DIR/$RUN_NAME.

  -s SERIAL   the phone, where several are connected (default: ANDROID_SERIAL)
  --dry-run   probes and decides, and says what would be pushed and run; the phone is not changed
  --run       runs the golden inputs as well, and compares the answers with the expected codes
  --dir DIR   where the run directory is made on the phone (default: /data/local/tmp)
  --json      says everything on standard error, and the outcome as JSON on standard output

Environment: ADB (path of adb)$FAMILY_ENVIRONMENT
Exit status: 0 done; 1 an answer was not the expected one, or the run failed; 2 the phone, the package or the command
line does not do, in one line with its mend.
END
}

# --- saying -----------------------------------------------------------------------------------------------------------

say() {
    if [ "$JSON" = yes ]; then printf '%s\n' "$*" >&2; else printf '%s\n' "$*"; fi
}

# decide WHAT VALUE WHY
decide() {
    say "$1: $2 ($3)"
    printf '%s\t%s\t%s\n' "$1" "$2" "$3" >>"$WORK/decisions"
}

hint() {
    say "note: $*"
    printf '%s\n' "$*" >>"$WORK/hints"
}

# fail CAUSE MEND: nothing is left on the phone, see the trap
fail() {
    printf 'deploy.sh: %s; %s\n' "$1" "$2" >&2
    if [ "$JSON" = yes ]; then printf '%s; %s\n' "$1" "$2" >"$WORK/error"; fi
    exit 2
}

quoted() { # as a JSON string
    printf '"%s"' "$(printf '%s' "$1" | tr '\n\t' '  ' | tr -d '\000-\037' | sed 's/\\/\\\\/g; s/"/\\"/g')"
}

json_lines() { # FILE: an array of strings
    separator=
    printf '['
    if [ -f "$1" ]; then
        while IFS= read -r line; do
            printf '%s%s' "$separator" "$(quoted "$line")"
            separator=', '
        done <"$1"
    fi
    printf ']'
}

json_rows() { # FILE KEY...: an array of objects from lines with tabs
    table=$1
    shift
    separator=
    printf '['
    if [ -f "$table" ]; then
        while IFS= read -r line; do
            printf '%s{' "$separator"
            separator=', '
            comma=
            for key in "$@"; do
                printf '%s"%s": %s' "$comma" "$key" "$(quoted "${line%%"$TAB"*}")"
                line=${line#*"$TAB"}
                comma=', '
            done
            printf '}'
        done <"$table"
    fi
    printf ']'
}

print_json() { # STATUS
    printf '{"status": %s, "package": %s, "phone": %s, "decisions": ' "$1" "$(quoted "$NAME")" "$(quoted "$SERIAL")"
    json_rows "$WORK/decisions" what value why
    printf ', "push": '
    json_rows "$WORK/push" file as mode
    printf ', "outputs": '
    json_rows "$WORK/outputs" output verdict
    printf ', "hints": '
    json_lines "$WORK/hints"
    printf ', "error": '
    json_lines "$WORK/error"
    printf '}\n'
}

# --- the phone --------------------------------------------------------------------------------------------------------

adb_() {
    if [ -n "$SERIAL" ]; then "$ADB" -s "$SERIAL" "$@" </dev/null; else "$ADB" "$@" </dev/null; fi
}

# phone COMMAND: runs it there; its output is in ANSWER, its exit status is returned. adb before Android 7 gives no
# status back and ends lines with \r\n, so the status travels in the text.
phone() {
    ANSWER=$(adb_ shell "{ $1; } 2>&1; echo \"qat-status:\$?\"" 2>"$WORK/adb-error" | tr -d '\r')
    case $ANSWER in
    *qat-status:[0-9]*) ;;
    *)
        PHONE_LOST=yes
        fail "the phone $SERIAL does not answer any more ($(first_line "$WORK/adb-error"))" \
            "connect it again, and run this again"
        ;;
    esac
    phone_status=${ANSWER##*qat-status:}
    ANSWER=${ANSWER%qat-status:*}
    ANSWER=${ANSWER%"$NEWLINE"}
    return "$phone_status"
}

read_properties() { # all at once: each call of adb takes its time
    phone "for name in ro.product.manufacturer ro.product.model ro.product.cpu.abilist ro.product.cpu.abi \
        ro.build.version.release ro.build.version.sdk ro.board.platform ro.soc.model ro.boot.secureboot; do
        printf '%s=%s\\n' \$name \"\$(getprop \$name)\"; done"
    printf '%s\n' "$ANSWER" >"$WORK/properties"
}

property() { # NAME: its value is in ANSWER, empty where there is none
    ANSWER=$(sed -n "s/^$1=//p" "$WORK/properties")
}

first_line() {
    if [ -s "$1" ]; then sed -n '1{s/[[:space:]]*$//;p;}' "$1"; else printf 'no cause told'; fi
}

for_phone() { # a path in quotes of the phone's shell
    printf "'%s'" "$(printf '%s' "$1" | sed "s/'/'\\\\''/g")"
}

find_phone() {
    command -v "$ADB" >/dev/null 2>&1 ||
        fail "there is no adb ($ADB)" "install Android's platform-tools, or set ADB to the path of adb"
    "$ADB" devices </dev/null >"$WORK/devices" 2>"$WORK/adb-error" ||
        fail "adb does not work ($(first_line "$WORK/adb-error"))" "try adb kill-server, then run this again"
    tr -d '\r' <"$WORK/devices" | awk -F '\t' 'NF >= 2 { print $1 "\t" $2 }' >"$WORK/phones"
    connected=$(awk -F '\t' '{ printf "%s%s", (NR > 1 ? ", " : ""), $1 }' "$WORK/phones")
    [ -n "$connected" ] ||
        fail "no phone is connected" "connect one by USB with USB debugging allowed, or use adb connect HOST"
    if [ -z "$SERIAL" ]; then
        case $connected in
        *,*) fail "several phones are connected: $connected" "choose one with -s SERIAL" ;;
        esac
        SERIAL=$connected
    fi
    state=$(awk -F '\t' -v wanted="$SERIAL" '$1 == wanted { print $2 }' "$WORK/phones")
    case $state in
    device) ;;
    '') fail "no phone with the serial $SERIAL is connected" "choose one of these with -s: $connected" ;;
    unauthorized | authorizing)
        fail "the phone $SERIAL is locked for this computer ($state)" \
            "unlock its screen and allow USB debugging in the dialog, then run this again"
        ;;
    offline) fail "the phone $SERIAL is offline" "connect it again, or try adb reconnect, then run this again" ;;
    'no permissions'*)
        fail "this computer may not use the phone $SERIAL ($state)" "install the udev rules of Android, or run adb as root"
        ;;
    *) fail "the phone $SERIAL is in the state $state" "boot it into Android, then run this again" ;;
    esac
}

look_at_phone() {
    read_properties
    property ro.product.manufacturer
    maker=$ANSWER
    property ro.product.model
    decide phone "$SERIAL" "${maker:-maker unknown}, ${ANSWER:-model unknown}"
    property ro.product.cpu.abilist
    [ -n "$ANSWER" ] || property ro.product.cpu.abi
    case ,$ANSWER, in
    *,arm64-v8a,*) decide abi arm64-v8a "of $ANSWER" ;;
    *) fail "the phone $SERIAL runs no arm64-v8a programs (it has ${ANSWER:-no ABI})" "use a phone with 64-bit Android" ;;
    esac
    property ro.build.version.release
    release=$ANSWER
    property ro.build.version.sdk
    # "8.1.0" is 8; previews have letters, and their number comes from the API level
    ANDROID=${release%%.*}
    case $ANDROID in
    '' | *[!0-9]*)
        case $ANSWER in
        3[3-9]) ANDROID=$((ANSWER - 20)) ;;
        31 | 32) ANDROID=12 ;;
        2[89] | 30) ANDROID=$((ANSWER - 19)) ;;
        26 | 27) ANDROID=8 ;;
        *) fail "the Android version of the phone $SERIAL is not known (${release:-none}, API ${ANSWER:-none})" \
            "this needs ro.build.version.release or .sdk" ;;
        esac
        ;;
    esac
    decide android "$ANDROID" "ro.build.version.release is ${release:-empty}, API level ${ANSWER:-unknown}"
}

# --- pushing ----------------------------------------------------------------------------------------------------------

will_push() { # FILE AS [x]
    [ -f "$1" ] || fail "$1 is missing" "the package is not whole: copy or make it again"
    printf '%s\t%s\t%s\n' "$1" "$2" "${3:--}" >>"$WORK/push"
}

push_golden() { # ARTIFACT: its golden inputs, and the answers only stay here
    while IFS="$TAB" read -r kind artifact file rest; do
        if [ "$kind" = input ] && [ "$artifact" = "$1" ]; then will_push "$HERE/$file" "$file"; fi
    done <"$CONTENTS"
}

check_storage() {
    need=0
    while IFS="$TAB" read -r file as mode; do
        size=$(($(wc -c <"$file")))
        need=$((need + (size + 1023) / 1024))
        printf '%s ./%s\n' "$size" "$as" >>"$WORK/wanted-sizes"
    done <"$WORK/push"
    phone "df -k $(for_phone "$BASE")" || true
    free=$(printf '%s\n' "$ANSWER" | awk 'NF >= 4 { free = $(NF - 2) } END { print free }')
    case $free in
    '' | *[!0-9]*) hint "free space below $BASE is not known: the phone's df says no number of KiB" ;;
    *)
        # a package that is replaced lies there until the new one has arrived
        [ "$free" -ge $((need + 1024)) ] ||
            fail "the phone has $free KiB left below $BASE and the package needs $need" "free some space on it"
        decide storage "$free KiB" "$need KiB are needed below $BASE"
        ;;
    esac
}

# Only what this script itself has made is ever removed.
remove_stage() {
    case $STAGE in
    "$BASE/$RUN_NAME".part-*) phone "rm -rf $(for_phone "$STAGE")" ;;
    esac
}

check_place() {
    place=$(for_phone "$BASE") ours=$(for_phone "$REMOTE")
    phone "if [ ! -d $place ] || [ ! -w $place ]; then echo closed
        elif [ -e $ours ] && [ ! -f $ours/$MARK ]; then echo foreign; fi" || true
    case $ANSWER in
    closed) fail "$BASE is no directory of the phone that adb may write" "choose another with --dir" ;;
    foreign) fail "$REMOTE on the phone is no package of qat" "choose another place with --dir; it was not touched" ;;
    esac
}

install() {
    stage=$(for_phone "$REMOTE.part-$$") ours=$(for_phone "$REMOTE") old=$(for_phone "$REMOTE.old-$$")
    cut -f 2 "$WORK/push" | sed -n 's,/[^/]*$,,p' | sort -u >"$WORK/folders"
    folders=
    while IFS= read -r folder; do folders="$folders $stage/$(for_phone "$folder")"; done <"$WORK/folders"
    phone "mkdir $stage" || fail "cannot make $REMOTE.part-$$ on the phone ($(one_line))" "choose another place with --dir"
    STAGE=$REMOTE.part-$$
    phone "touch $stage/$MARK${folders:+ && mkdir -p$folders}" ||
        fail "cannot make directories in $STAGE on the phone ($(one_line))" "free some space on it"
    programs=
    while IFS="$TAB" read -r file as mode; do
        adb_ push "$file" "$STAGE/$as" >"$WORK/push-log" 2>&1 ||
            fail "pushing $as failed ($(tail -n 1 "$WORK/push-log" | tr -d '\r'))" "check the cable and the phone's storage"
        if [ "$mode" = x ]; then programs="$programs && chmod 755 $(for_phone "$STAGE/$as")"; fi
    done <"$WORK/push"
    check_sizes
    phone "true$programs && if [ -e $ours ]; then mv $ours $old; fi &&
        { mv $stage $ours || { [ ! -e $old ] || mv $old $ours; false; }; } && rm -rf $old" ||
        fail "cannot rename $STAGE to $REMOTE ($(one_line))" "see adb shell ls $BASE"
    STAGE=
    say "installed: $REMOTE"
}

# an old adb says nothing of a push that was cut short
check_sizes() {
    phone "cd $stage && find . -type f | while read -r f; do echo \"\$(wc -c <\"\$f\") \$f\"; done" || true
    printf '%s\n' "$ANSWER" >"$WORK/sizes"
    if ! grep -q '^ *[0-9]' "$WORK/sizes"; then
        hint "the sizes of what has arrived are not known: the phone has no find or no wc"
        return
    fi
    cut_short=$(awk '
        { size = $1; sub(/^ *[0-9]+ \.\//, "") }
        FNR == NR { arrived[$0] = size; next }
        !($0 in arrived) { arrived[$0] = "none" }
        arrived[$0] != size { print $0 " arrived with " arrived[$0] " of " size " bytes"; exit }' \
        "$WORK/sizes" "$WORK/wanted-sizes")
    [ -z "$cut_short" ] || fail "$cut_short" "check the cable and the phone's storage"
}

one_line() {
    printf '%s' "${ANSWER:-no cause told}" | tr '\n' ' ' | sed 's/ *$//'
}

# --- the way through --------------------------------------------------------------------------------------------------

finish() {
    status=$?
    trap - EXIT
    trap '' HUP INT TERM
    if [ -n "$STAGE" ]; then
        if [ "${PHONE_LOST:-no}" = yes ] || ! (remove_stage) 2>/dev/null; then
            say "note: $STAGE may have been left on the phone; remove it with adb shell rm -rf $STAGE"
        fi
    fi
    if [ "$JSON" = yes ]; then print_json "$status"; fi
    rm -rf "$WORK"
    exit "$status"
}

main() {
    NAME=$(awk -F '\t' '$1 == "package" { print $2 }' "$CONTENTS" 2>/dev/null)
    RUN_NAME=qat-$NAME
    WORK=$(mktemp -d "${TMPDIR:-/tmp}/qat-deploy.XXXXXX") || exit 2
    trap finish EXIT
    trap 'exit 130' HUP INT TERM
    while [ "$#" -gt 0 ]; do
        case $1 in
        -s | --dir)
            [ "$#" -ge 2 ] || fail "$1 has no value" "see ./deploy.sh --help"
            if [ "$1" = -s ]; then SERIAL=$2; else BASE=${2%/}; fi
            shift
            ;;
        --dry-run) MODE=dry-run ;;
        --run) MODE=run ;;
        --json) JSON=yes ;;
        -h | --help)
            usage
            exit 0
            ;;
        *) fail "$1 is no option" "see ./deploy.sh --help" ;;
        esac
        shift
    done
    [ -n "$NAME" ] || fail "$CONTENTS is missing or damaged" "the package is not whole: copy or make it again"
    case $BASE in
    /*) ;;
    *) fail "--dir $BASE is no absolute path" "give one, such as /data/local/tmp" ;;
    esac
    REMOTE=$BASE/$RUN_NAME
    find_phone
    look_at_phone
    family_decide
    if [ "$MODE" = run ]; then family_can_run; fi
    check_place
    check_storage
    if [ "$MODE" = dry-run ]; then
        while IFS="$TAB" read -r file as mode; do
            say "would push: $file -> $REMOTE/$as"
        done <"$WORK/push"
        family_commands
        say "dry run: the phone was not changed"
        return 0
    fi
    install
    family_commands
    if [ "$MODE" = run ]; then
        family_run
        if [ -n "$VERDICT" ]; then
            say "the phone's answers are not the expected ones"
            return 1
        fi
    fi
}
