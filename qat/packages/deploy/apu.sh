# shellcheck shell=sh
# MediaTek APU: which of MediaTek's libraries the phone needs, and the .tflite file for it.

# shellcheck disable=SC2034
FAMILY_ENVIRONMENT=',
APU_LIBRARY_ROOT (third_party/apu of a MACE checkout, for phones with Android 11 and earlier; "none" to push the model alone),
BENCHMARK_MODEL (TFLite'\''s benchmark_model for Android on arm64, for --run), BENCHMARK_ARGS (default: --use_nnapi=true)'

find_soc() {
    property ro.board.platform
    SOC=$(printf '%s' "$ANSWER" | tr '[:upper:]' '[:lower:]')
    why="ro.board.platform is ${ANSWER:-empty}"
    case $SOC in
    mt[0-9]*) ;;
    *)
        property ro.soc.model
        model=$(printf '%s' "$ANSWER" | tr '[:upper:]' '[:lower:]')
        case $model in
        mt[0-9]*)
            SOC=$model
            why="$why, ro.soc.model is $ANSWER"
            ;;
        *) fail "the phone $SERIAL has no MediaTek SoC ($why, ro.soc.model is ${ANSWER:-empty})" \
            "use a phone with a Dimensity or Helio, or the package for its own processor" ;;
        esac
        ;;
    esac
    # mt6983z/cza and the like
    SOC=$(printf '%s' "$SOC" | sed 's/^\(mt[0-9]*\).*/\1/')
    decide soc "$SOC" "$why"
}

choose_set() {
    if [ "$ANDROID" -le 10 ]; then
        case $SOC in
        mt67*) SET=v1 ;;
        *) SET=v2 ;;
        esac
    elif [ "$ANDROID" -eq 11 ]; then
        case $SOC in
        mt689* | mt6877) SET=v4 ;;
        *) SET=v3 ;;
        esac
    else
        SET=v4
    fi
    decide "library set" "$SET" "Android $ANDROID on $SOC"
}

find_adapter() {
    phone "for name in libneuronusdk_adapter.mtk.so libneuron_adapter_mgvi.so libneuron_adapter.so; do
        for folder in /vendor/lib64 /system_ext/lib64 /system/system_ext/lib64 /system/lib64 /vendor/lib64/$SOC /vendor/lib64/mt6xxx; do
            if [ -e \$folder/\$name ]; then echo \$folder/\$name; fi; done; done"
    ADAPTER=$(printf '%s\n' "$ANSWER" | sed -n 1p)
    [ -n "$ADAPTER" ] ||
        fail "the phone has none of MediaTek's adapters (libneuronusdk_adapter.mtk.so, libneuron_adapter_mgvi.so, libneuron_adapter.so)" \
            "its maker has left NeuroPilot out: run the model on its CPU with the ARM CPU package"
    decide adapter "$ADAPTER" "the first of the three names that the phone has; nothing of it is pushed"
}

library() { # FILE AS: pushed if it is there
    if [ ! -f "$1" ]; then return 1; fi
    will_push "$1" "$2"
    names="$names $2"
}

push_libraries() {
    if [ "${APU_LIBRARY_ROOT:-}" = none ]; then
        decide libraries none "APU_LIBRARY_ROOT is none: the model then reaches the APU through NNAPI only"
        return
    fi
    [ -n "${APU_LIBRARY_ROOT:-}" ] ||
        fail "library set $SET is no part of this phone, and APU_LIBRARY_ROOT names no folder with it" \
            "set it to third_party/apu of a MACE checkout, or to none to push the model alone, for NNAPI"
    names=
    case $SET in
    v1 | v2)
        part=android_Q/mt68xx
        if [ "$SET" = v1 ]; then part=android_Q/mt67xx; fi
        folder=$APU_LIBRARY_ROOT/$part
        library "$folder/$SOC/libapu-frontend.so" libapu-frontend.so ||
            library "$folder/libapu-frontend.so" libapu-frontend.so ||
            fail "$folder has no libapu-frontend.so" "set APU_LIBRARY_ROOT to third_party/apu of a MACE checkout"
        library "$folder/$SOC/libapu-platform.so" libapu-platform.so ||
            fail "$folder has no libapu-platform.so for $SOC" "MACE has one for mt6779, mt6785, mt6853, mt6873 and mt6885; with APU_LIBRARY_ROOT=none the model goes through NNAPI"
        ;;
    v3)
        folder=$APU_LIBRARY_ROOT/android_R
        for name in libapu-apuwareapusys.mtk.so libapu-apuwareutils.mtk.so libapu-apuwarexrp.mtk.so libapu-frontend.so libapu-platform.so; do
            case $SOC,$name in
            mt6785,libapu-apuwareapusys.mtk.so) continue ;;
            esac
            library "$folder/$name" "$name" ||
                fail "$folder has no $name" "set APU_LIBRARY_ROOT to third_party/apu of a MACE checkout"
        done
        ;;
    esac
    decide libraries "${names# }" "set $SET of $folder; found through LD_LIBRARY_PATH, /vendor/lib64 is not touched"
}

choose_model() {
    MODEL=$(awk -F '\t' -v option="soc_model=$SOC" \
        '$1 == "artifact" && $3 == "neuron" && index("," $4 ",", "," option ",") { print $2; exit }' "$CONTENTS")
    if [ -n "$MODEL" ] && [ "$SET" = v4 ]; then
        decide model "$MODEL" "compiled for $SOC"
    else
        MODEL=$(awk -F '\t' '$1 == "artifact" && $3 == "tflite" { print $2; exit }' "$CONTENTS")
        [ -n "$MODEL" ] || fail "the package has no .tflite for $SOC" "make it for the target apu"
        decide model "$MODEL" "the phone compiles it itself"
    fi
    will_push "$HERE/$MODEL" "$MODEL"
}

look_at_device() {
    phone "for d in /dev/vpu /dev/apusys; do
        if [ -e \$d ]; then if test -r \$d && test -w \$d; then echo \$d open; else echo \$d closed; fi; fi; done" || true
    printf '%s\n' "$ANSWER" >"$WORK/devices-of-apu"
    while read -r device state; do
        if [ "$state" = closed ]; then
            hint "adb's shell may not open $device: a program run from it falls back to the CPU or stops; an application of the system, or adb root, may open it"
        fi
    done <"$WORK/devices-of-apu"
}

family_decide() {
    find_soc
    choose_set
    if [ "$SET" = v4 ]; then find_adapter; else push_libraries; fi
    choose_model
    look_at_device
    if [ -n "${BENCHMARK_MODEL:-}" ]; then will_push "$BENCHMARK_MODEL" benchmark_model x; fi
    if [ -n "${BENCHMARK_MODEL:-}" ]; then
        while IFS="$TAB" read -r kind artifact file tensor sample rest; do
            if [ "$kind" = input ] && [ "$artifact" = "$MODEL" ]; then
                elements "$HERE/$file" >"$WORK/input-$sample-${file##*/}"
                will_push "$WORK/input-$sample-${file##*/}" "inputs/$sample-${file##*/}.raw"
            fi
        done <"$CONTENTS"
    else
        push_golden "$MODEL"
    fi
}

family_can_run() {
    [ -n "${BENCHMARK_MODEL:-}" ] ||
        fail "--run needs BENCHMARK_MODEL: this package has no program that runs a .tflite" \
            "set it to TFLite's benchmark_model for Android on arm64, or leave --run out"
}

command_of() { # SAMPLE: benchmark_model writes all outputs to one file, one after the other
    values=
    while IFS="$TAB" read -r kind artifact file tensor sample dtype scale shape rest; do
        if [ "$kind" = input ] && [ "$artifact" = "$MODEL" ] && [ "$sample" = "$1" ]; then
            layers="${values:+$layers,}$tensor"
            shapes="${values:+$shapes:}$shape"
            values="$values${values:+,}$tensor:inputs/$sample-${file##*/}.raw"
        fi
    done <"$CONTENTS"
    COMMAND="cd $(for_phone "$REMOTE") && LD_LIBRARY_PATH=\$PWD:/vendor/lib64 ./benchmark_model --graph=$(for_phone "$MODEL")"
    COMMAND="$COMMAND ${BENCHMARK_ARGS:---use_nnapi=true} --input_layer=$(for_phone "$layers")"
    COMMAND="$COMMAND --input_layer_shape=$shapes --input_layer_value_files=$(for_phone "$values") --output_filepath=answer-$1"
}

family_commands() {
    if [ -n "${BENCHMARK_MODEL:-}" ]; then
        command_of "$(samples_of "$MODEL" | sed -n 1p)"
        say "to run it: adb -s $SERIAL shell \"$COMMAND\""
    else
        say "to run it: LiteRT with NeuroPilot's delegate or NNAPI, on $REMOTE/$MODEL"
    fi
}

family_run() {
    for number in $(samples_of "$MODEL"); do
        command_of "$number"
        if ! phone "$COMMAND"; then
            VERDICT=failed
            say "sample $number: benchmark_model ended with status $phone_status: $(printf '%s\n' "$ANSWER" | tail -n 2 | tr '\n' ' ')"
            continue
        fi
        say "$(printf '%s\n' "$ANSWER" | grep -i 'inference timings' | sed 's/^/  /')"
        adb_ pull "$REMOTE/answer-$number" "$WORK/answer" >"$WORK/pull-log" 2>&1 ||
            fail "pulling the answer of sample $number failed ($(first_line "$WORK/pull-log"))" "run this again"
        offset=1
        while IFS="$TAB" read -r kind artifact file tensor sample dtype scale rest; do
            if [ "$kind" = output ] && [ "$artifact" = "$MODEL" ] && [ "$sample" = "$number" ]; then
                elements "$HERE/$file" >"$WORK/part"
                size=$(($(wc -c <"$WORK/part")))
                tail -c "+$offset" "$WORK/answer" | head -c "$size" >"$WORK/answer-part"
                offset=$((offset + size))
                # how an APU rounds is not published, so nothing is demanded of it
                compare "$tensor of sample $number" "$HERE/$file" "$WORK/answer-part" "$dtype" "$scale" -
            fi
        done <"$CONTENTS"
    done
}
