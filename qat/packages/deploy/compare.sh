# shellcheck shell=sh
# Comparing what the phone answers with what is expected, in codes; arrays are .npy, or their elements alone.

npy_data() { # FILE: where the elements of a .npy begin, in bytes
    # shellcheck disable=SC2046
    set -- $(od -A n -v -t u1 -N 12 "$1")
    [ "$#" -eq 12 ] && [ "$1 $2 $3 $4 $5 $6" = '147 78 85 77 80 89' ] || return 1
    if [ "$7" -eq 1 ]; then
        printf '%s' $((10 + $9 + 256 * ${10}))
    else
        printf '%s' $((12 + $9 + 256 * ${10} + 65536 * ${11}))
    fi
}

elements() { # FILE: its elements, of a .npy without the header
    if head_size=$(npy_data "$1"); then tail -c "+$((head_size + 1))" "$1"; else cat "$1"; fi
}

column() { # FILE TYPE: one number a line
    od -A n -v -t "$2" "$1" | awk '{ for (i = 1; i <= NF; i++) print $i }'
}

# compare LABEL EXPECTED FOUND DTYPE SCALE BOUND: prints the verdict; BOUND in codes of 8 bits, "-" only records
compare() {
    elements "$2" >"$WORK/expected"
    elements "$3" >"$WORK/found"
    expected_size=$(($(wc -c <"$WORK/expected")))
    found_size=$(($(wc -c <"$WORK/found")))
    bound=$6
    if cmp -s "$WORK/expected" "$WORK/found"; then
        verdict="equal, $expected_size bytes"
    elif [ "$expected_size" -ne "$found_size" ]; then
        verdict="WRONG: $found_size bytes in place of $expected_size"
        VERDICT=failed
    else
        step=1
        case $4 in
        int8) type=d1 ;;
        uint8) type=u1 ;;
        int16) type=d2 ;;
        uint16) type=u2 ;;
        int32) type=d4 ;;
        float32) type=f4 step=$5 ;;
        *) fail "$1 is of type $4, which cannot be compared" "make the package again" ;;
        esac
        case $bound,$4 in
        -,*) ;;
        *16) bound=$((bound * 256)) ;;
        esac
        column "$WORK/expected" "$type" >"$WORK/expected-column"
        column "$WORK/found" "$type" >"$WORK/found-column"
        verdict=$(paste "$WORK/expected-column" "$WORK/found-column" | awk -v step="$step" -v bound="$bound" '
            { apart = ($1 - $2) / step; if (apart < 0) apart = -apart; if (apart > worst) worst = apart
              if ($1 != $2) unequal++
              # neither order nor comparison holds for what is no number
              if ($1 != $2 && ($1 ~ /[nN]/ || $2 ~ /[nN]/)) worst = 1e30 }
            END { wrong = bound != "-" && worst > bound + 0.01
                  printf "%s%d of %d differ, by up to %.4g codes", (wrong ? "WRONG: " : ""), unequal, NR, worst
                  if (bound == "-") printf " (recorded; no bound is known)"
                  else if (!wrong) printf " (allowed: %g)", bound }')
        case $verdict in
        WRONG*) VERDICT=failed ;;
        esac
    fi
    say "output $1: $verdict"
    printf '%s\t%s\n' "$1" "$verdict" >>"$WORK/outputs"
}

machine_of() { # FILE: the machine of an ELF file; 183 is arm64, 164 is Hexagon
    od -A n -v -t u1 -N 20 "$1" | awk '{ for (i = 1; i <= NF; i++) b[++n] = $i }
        END { print (n == 20 && b[1] == 127 && b[2] == 69 ? b[19] + 256 * b[20] : "none") }'
}

samples_of() { # ARTIFACT: the numbers of its golden samples
    awk -F '\t' -v artifact="$1" '$1 == "input" && $2 == artifact && !seen[$5]++ { print $5 }' "$CONTENTS"
}
