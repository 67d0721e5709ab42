# shellcheck shell=sh
# ARM CPU: the native runner and its plan. Which kernels run is decided on the phone by the runner itself.

# shellcheck disable=SC2034
FAMILY_ENVIRONMENT=', QAT_RUN (a built runner)'

family_decide() {
    PLAN=$(awk -F '\t' '$1 == "artifact" && $3 == "plan" { print $2; exit }' "$CONTENTS")
    RUNNER=$(awk -F '\t' '$1 == "runner" { print $2; exit }' "$CONTENTS")
    [ -n "$PLAN" ] || fail "this package has no plan for the native runner" \
        "use model.onnx or model.tflite with their runtimes; README.md says why it has none"
    phone "cat /proc/cpuinfo" || ANSWER=
    features=$(printf '%s\n' "$ANSWER" | awk -F ':' '/^Features/ { print $2; exit }')
    case " $features " in
    *' i8mm '*) decide kernels i8mm "i8mm is among the features in /proc/cpuinfo" ;;
    *' asimddp '*) decide kernels "dot product" "asimddp is among the features in /proc/cpuinfo, i8mm is not" ;;
    *' asimd '*) decide kernels "plain NEON" "neither asimddp nor i8mm is among the features in /proc/cpuinfo" ;;
    *) hint "/proc/cpuinfo lists no features: the runner asks the kernel itself when it starts" ;;
    esac
    if [ -n "${QAT_RUN:-}" ]; then
        RUNNER_FILE=$QAT_RUN
        why="QAT_RUN names it"
    elif [ -n "$RUNNER" ]; then
        RUNNER_FILE=$HERE/$RUNNER
        why="built into the package"
    else
        fail "this package has no built runner" "build it as README.md says, and set QAT_RUN to it"
    fi
    [ -f "$RUNNER_FILE" ] || fail "there is no runner $RUNNER_FILE" "build it as README.md says, and set QAT_RUN to it"
    [ "$(machine_of "$RUNNER_FILE")" = 183 ] ||
        fail "the runner $RUNNER_FILE is no program for arm64" "build it with the Android NDK or aarch64-linux-gnu-g++"
    decide runner "$RUNNER_FILE" "$why"
    will_push "$RUNNER_FILE" qat_run x
    will_push "$HERE/$PLAN" "$PLAN"
    push_golden "$PLAN"
}

family_can_run() { :; }

command_of() { # SAMPLE: what runs it is in COMMAND
    COMMAND="cd $(for_phone "$REMOTE") && mkdir -p answers && ./qat_run $(for_phone "$PLAN")"
    while IFS="$TAB" read -r kind artifact file tensor sample rest; do
        if [ "$artifact" = "$PLAN" ] && [ "${sample:-}" = "$1" ]; then
            case $kind in
            input) COMMAND="$COMMAND --input $(for_phone "$file")" ;;
            output) COMMAND="$COMMAND --output $(for_phone "answers/$1-${file##*/}")" ;;
            esac
        fi
    done <"$CONTENTS"
}

family_commands() {
    first=$(samples_of "$PLAN" | sed -n 1p)
    command_of "$first"
    say "to run it: adb -s $SERIAL shell \"$COMMAND\""
}

family_run() {
    for number in $(samples_of "$PLAN"); do
        command_of "$number"
        repeat=
        if [ "$number" = "$(samples_of "$PLAN" | sed -n 1p)" ]; then repeat='--repeat 20'; fi
        if phone "$COMMAND $repeat"; then
            say "$(printf '%s' "$ANSWER" | sed "s/^/  /")"
        else
            VERDICT=failed
            cause=
            if [ "$phone_status" -eq 132 ]; then cause=" (illegal instruction: kernels were chosen that this processor lacks)"; fi
            say "sample $number: the runner ended with status $phone_status$cause: $(one_line)"
            continue
        fi
        while IFS="$TAB" read -r kind artifact file tensor sample dtype scale rest; do
            if [ "$kind" = output ] && [ "$artifact" = "$PLAN" ] && [ "$sample" = "$number" ]; then
                adb_ pull "$REMOTE/answers/$number-${file##*/}" "$WORK/answer" >"$WORK/pull-log" 2>&1 ||
                    fail "pulling the answer $tensor failed ($(first_line "$WORK/pull-log"))" "run this again"
                compare "$tensor of sample $number" "$HERE/$file" "$WORK/answer" "$dtype" "$scale" 0
            fi
        done <"$CONTENTS"
    done
}
