# shellcheck shell=sh
# Hexagon: which DSP the phone has, which of the package's files are for it, and how its libraries may be loaded.

# shellcheck disable=SC2034
FAMILY_ENVIRONMENT=',
QNN_SDK_ROOT (Qualcomm'\''s SDK) or QNN_LIB_DIR (one folder with its libraries for the phone),
TESTSIG (the phone'\''s test signature, for DSPs before SM8250),
QAT_DSP (V68 ... V81: what to take for a SoC that deploy/soc.tsv does not list)'

row_of() { # COLUMN VALUE: the line of deploy/soc.tsv
    awk -F '\t' -v column="$1" -v value="$2" '!/^#/ && $column == value { print; exit }' "$HERE/deploy/soc.tsv"
}

find_dsp() {
    SOC=
    for place in /sys/devices/soc0/soc_id /sys/devices/system/soc/soc0/id; do
        if phone "cat $place" && [ -n "$ANSWER" ]; then
            SOC=$(printf '%s' "$ANSWER" | tr -d ' \n')
            break
        fi
    done
    property ro.soc.model
    model=$ANSWER
    row=
    if [ -n "$SOC" ]; then row=$(row_of 1 "$SOC"); fi
    if [ -n "$row" ]; then
        why="soc_id $SOC in $place"
    elif [ -n "$model" ]; then
        # SM8550-AC and the like are SM8550
        row=$(row_of 2 "${model%%-*}")
        why="soc_id ${SOC:-unreadable} is not in deploy/soc.tsv, but ro.soc.model is $model"
    fi
    if [ -n "${QAT_DSP:-}" ]; then
        row=$(awk -F '\t' -v dsp="$QAT_DSP" '!/^#/ && $3 == dsp { print; exit }' "$HERE/deploy/soc.tsv")
        [ -n "$row" ] || fail "QAT_DSP is $QAT_DSP, which deploy/soc.tsv does not know" "use V68, V69, V73, V75, V79 or V81"
        why="QAT_DSP says so"
    fi
    if [ -z "$row" ]; then
        property ro.board.platform
        [ -n "$SOC" ] ||
            fail "the phone shows no soc_id of Qualcomm's (ro.board.platform is ${ANSWER:-empty})" \
                "use a phone with a Snapdragon, or the package for its own processor"
        fail "soc_id $SOC (ro.soc.model ${model:-empty}, ro.board.platform ${ANSWER:-empty}) is not in deploy/soc.tsv" \
            "set QAT_DSP to its Hexagon, V68 to V81, if you know it"
    fi
    IFS="$TAB" read -r _ soc_name DSP BACKEND domain SIGNING source <<END
$row
END
    decide soc "$soc_name" "$why"
    case $BACKEND in
    htp) decide dsp "HTP $DSP" "$domain, $source" ;;
    dsp) decide dsp "DSP $DSP" "$domain, $source; it has no HTP" ;;
    *) fail "$soc_name (soc_id $SOC) has a Hexagon $DSP that Qualcomm's libraries no longer serve" "use a phone of 2018 or later, or the ARM CPU package" ;;
    esac
}

choose_artifact() {
    ONNX=$(awk -F '\t' '$1 == "artifact" && $3 == "onnx" { print $2; exit }' "$CONTENTS")
    CONTEXT=
    if [ "$BACKEND" = htp ]; then
        CONTEXT=$(awk -F '\t' -v option="htp_arch=${DSP#V}" \
            '$1 == "artifact" && $3 == "qnn-context" && index("," $4 ",", "," option ",") { print $2; exit }' "$CONTENTS")
    fi
    if [ -n "$CONTEXT" ]; then
        ARTIFACT=$CONTEXT
        decide model "$CONTEXT" "compiled for $DSP"
    else
        ARTIFACT=$ONNX
        [ -n "$ONNX" ] || fail "the package has no model for $DSP" "make it for the target hexagon-v${DSP#V} as well"
        if [ "$BACKEND" = htp ]; then
            decide model "$ONNX" "the package has no context binary for $DSP: the phone compiles it at its first session"
        else
            decide model "$ONNX" "DSPs before the HTP have no context binaries"
        fi
    fi
    will_push "$HERE/$ARTIFACT" "$ARTIFACT"
    while IFS="$TAB" read -r kind artifact file rest; do
        if [ "$kind" = file ] && [ "$artifact" = "$ARTIFACT" ]; then will_push "$HERE/$file" "$file"; fi
    done <"$CONTENTS"
}

choose_domain() {
    case $SIGNING in
    unsigned)
        decide "process domain" unsigned "$soc_name takes libraries that are not signed, as SM8250 and all later ones do"
        return
        ;;
    esac
    property ro.boot.secureboot
    secure=$ANSWER
    if [ "$SIGNING" = try ]; then
        if [ "$secure" = 0 ] && [ -n "${TESTSIG:-}" ]; then
            decide "process domain" "unsigned, else signed" \
                "some firmware of $soc_name refuses libraries that are not signed; TESTSIG goes along for it"
            will_push "$TESTSIG" "${TESTSIG##*/}"
        else
            decide "process domain" unsigned "new firmware of $soc_name takes libraries that are not signed"
            hint "if loading the skel fails, the firmware is an old one: that needs ro.boot.secureboot 0 (it is ${secure:-empty}) and TESTSIG"
        fi
        return
    fi
    [ "$secure" = 0 ] ||
        fail "$soc_name loads signed libraries only, and this phone takes no test signature (ro.boot.secureboot is ${secure:-empty}, not 0)" \
            "use SM8250 or later, a development phone, or the ARM CPU package"
    [ -n "${TESTSIG:-}" ] ||
        fail "$soc_name loads signed libraries only, and TESTSIG names no test signature" \
            "make one with tools/scripts/testsig.py of the Hexagon SDK for the phone $SERIAL, and set TESTSIG to that file"
    [ -f "$TESTSIG" ] || fail "there is no test signature $TESTSIG" "set TESTSIG to the file that testsig.py has made"
    decide "process domain" signed "ro.boot.secureboot is 0, and TESTSIG signs for this phone"
    will_push "$TESTSIG" "${TESTSIG##*/}"
}

find_library() { # NAME MACHINE: its path is in LIBRARY
    LIBRARY=
    for folder in ${QNN_SDK_ROOT:+"$QNN_SDK_ROOT/lib/aarch64-android"} \
        ${QNN_SDK_ROOT:+"$QNN_SDK_ROOT/lib/hexagon-v${DSP#V}/unsigned"} \
        ${QNN_LIB_DIR:+"$QNN_LIB_DIR"} ${QNN_LIB_DIR:+"$QNN_LIB_DIR/jni/arm64-v8a"}; do
        if [ -f "$folder/$1" ]; then
            LIBRARY=$folder/$1
            break
        fi
    done
    [ -n "$LIBRARY" ] || return 1
    [ "$(machine_of "$LIBRARY")" = "$2" ] ||
        fail "$LIBRARY is not for this phone (its ELF machine is $(machine_of "$LIBRARY"), not $2)" \
            "take the libraries for aarch64-android and hexagon, not those of this computer"
}

choose_libraries() {
    if [ -z "${QNN_SDK_ROOT:-}${QNN_LIB_DIR:-}" ]; then
        fail "the phone's QNN libraries are not known here: neither QNN_SDK_ROOT nor QNN_LIB_DIR is set" \
            "set QNN_SDK_ROOT to Qualcomm's AI Runtime SDK, or QNN_LIB_DIR to the unpacked qnn-runtime .aar that onnxruntime-qnn needs on Android"
    fi
    # ELF machines: 183 is arm64, 164 is Hexagon
    if [ "$BACKEND" = htp ]; then
        set -- libQnnHtp.so 183 "libQnnHtp${DSP}Stub.so" 183 "libQnnHtp${DSP}Skel.so" 164 libQnnSystem.so 183
        if [ -z "$CONTEXT" ]; then set -- "$@" libQnnHtpPrepare.so 183; fi
    else
        set -- libQnnDsp.so 183 "libQnnDsp${DSP}Stub.so" 183 "libQnnDsp${DSP}Skel.so" 164 libQnnSystem.so 183
    fi
    names=
    while [ "$#" -gt 0 ]; do
        find_library "$1" "$2" ||
            fail "$1 is neither below QNN_SDK_ROOT (${QNN_SDK_ROOT:-unset}) nor in QNN_LIB_DIR (${QNN_LIB_DIR:-unset})" \
                "install a version of the SDK that serves $DSP"
        will_push "$LIBRARY" "$1"
        names="$names $1"
        shift 2
    done
    decide libraries "${names# }" "stub and skel are those of $DSP; the skel is found through ADSP_LIBRARY_PATH"
    NET_RUN=
    if [ -n "$CONTEXT" ] && [ -f "${QNN_SDK_ROOT:-}/bin/aarch64-android/qnn-net-run" ]; then
        NET_RUN=$QNN_SDK_ROOT/bin/aarch64-android/qnn-net-run
        will_push "$NET_RUN" qnn-net-run x
    fi
    cat >"$WORK/run.sh" <<'END'
#!/system/bin/sh
# runs a program with this directory's libraries, on the phone: sh run.sh ./program ...
cd "${0%/*}" || exit 1
export LD_LIBRARY_PATH="$PWD:/vendor/lib64"
export ADSP_LIBRARY_PATH="$PWD;/vendor/lib/rfsa/adsp;/vendor/dsp/cdsp;/vendor/dsp;/dsp"
exec "$@"
END
    will_push "$WORK/run.sh" run.sh x
}

family_decide() {
    find_dsp
    choose_artifact
    choose_domain
    # without it nothing on the phone reaches the DSP
    if ! phone "ls /vendor/lib64/libcdsprpc.so /system/vendor/lib64/libcdsprpc.so /system/lib64/libcdsprpc.so 2>/dev/null" &&
        [ -z "$ANSWER" ]; then
        hint "libcdsprpc.so is not seen in the phone's library directories: if it is missing, programs cannot reach the DSP"
    fi
    choose_libraries
    push_raw
}

# qnn-net-run reads plain elements: the golden inputs without their headers, and a list of them
push_raw() {
    if [ -z "$NET_RUN" ]; then
        push_golden "$ARTIFACT"
        return
    fi
    NATIVE_IN='' NATIVE_OUT=''
    inputs=$(awk -F '\t' -v artifact="$ARTIFACT" '$1 == "input" && $2 == artifact { seen[$4] = 1 } END { for (t in seen) n++; print n + 0 }' "$CONTENTS")
    : >"$WORK/inputs.txt"
    for number in $(samples_of "$ARTIFACT"); do
        row=
        index=0
        while IFS="$TAB" read -r kind artifact file tensor sample dtype rest; do
            if [ "$artifact" != "$ARTIFACT" ] || [ "${sample:-}" != "$number" ]; then continue; fi
            if [ "$kind" = output ]; then
                [ "$dtype" = float32 ] || NATIVE_OUT=--use_native_output_files
                continue
            fi
            [ "$dtype" = float32 ] || NATIVE_IN=--use_native_input_files
            elements "$HERE/$file" >"$WORK/$number-$index.raw"
            will_push "$WORK/$number-$index.raw" "inputs/$number-$index.raw"
            name=
            if [ "$inputs" -gt 1 ]; then name="$tensor:="; fi
            row="$row${row:+ }${name}inputs/$number-$index.raw"
            index=$((index + 1))
        done <"$CONTENTS"
        printf '%s\n' "$row" >>"$WORK/inputs.txt"
    done
    will_push "$WORK/inputs.txt" inputs.txt
    binary=$(awk -F '\t' -v artifact="$ARTIFACT" '$1 == "file" && $2 == artifact && $3 ~ /[.]bin$/ { print $3; exit }' "$CONTENTS")
    COMMAND="sh $(for_phone "$REMOTE/run.sh") ./qnn-net-run --backend libQnnHtp.so --retrieve_context $(for_phone "$binary")"
    COMMAND="$COMMAND --input_list inputs.txt --output_dir answers $NATIVE_IN $NATIVE_OUT"
}

family_can_run() {
    [ -n "$NET_RUN" ] || fail "--run needs a context binary for $DSP in the package, and qnn-net-run of QNN_SDK_ROOT" \
        "leave --run out, and run $ARTIFACT from an application with onnxruntime-qnn"
}

family_commands() {
    if [ -n "$NET_RUN" ]; then
        say "to run it: adb -s $SERIAL shell \"$COMMAND\""
    else
        say "to run it: ONNX Runtime with the QNN execution provider, backend_path libQnn$([ "$BACKEND" = htp ] && echo Htp || echo Dsp).so, started by $REMOTE/run.sh"
    fi
}

family_run() {
    if ! phone "$COMMAND"; then
        VERDICT=failed
        say "qnn-net-run ended with status $phone_status: $(printf '%s\n' "$ANSWER" | tail -n 3 | tr '\n' ' ')"
        return
    fi
    adb_ pull "$REMOTE/answers" "$WORK/answers" >"$WORK/pull-log" 2>&1 ||
        fail "pulling the answers failed ($(first_line "$WORK/pull-log"))" "run this again"
    result=0
    for number in $(samples_of "$ARTIFACT"); do
        while IFS="$TAB" read -r kind artifact file tensor sample dtype scale rest; do
            if [ "$kind" = output ] && [ "$artifact" = "$ARTIFACT" ] && [ "$sample" = "$number" ]; then
                found=
                for candidate in "$WORK/answers/Result_$result/$tensor.raw" "$WORK/answers/Result_$result/${tensor}_native.raw"; do
                    if [ -f "$candidate" ]; then found=$candidate; fi
                done
                if [ -z "$found" ]; then # the compiler may have renamed it, which is of no matter where there is one
                    set -- "$WORK/answers/Result_$result"/*.raw
                    if [ "$#" -ne 1 ] || [ ! -f "$1" ]; then
                        fail "qnn-net-run wrote no answer $tensor of sample $number" "see the names in $REMOTE/answers/Result_$result"
                    fi
                    found=$1
                fi
                compare "$tensor of sample $number" "$HERE/$file" "$found" "$dtype" "$scale" 1
            fi
        done <"$CONTENTS"
        result=$((result + 1))
    done
}
