#!/bin/sh
# Keeps sprite-agent running where there is no service manager: supervise.sh serve --repo ... --listen ...
#
# Starts it again when it ends by itself, after 1 s at first and 30 s at most; what it has to finish it finishes
# by itself. TERM and INT are passed on, once for a drain, twice to end at once; then this ends too. HUP is passed on.
set -u
[ $# -gt 0 ] || { echo "usage: supervise.sh serve --repo ... --listen ..." >&2; exit 64; }
agent=${SPRITE_AGENT:-sprite-agent}
stopping=
pause=1
child=

forward() {
    stopping=yes
    [ -z "$child" ] || kill -TERM "$child" 2>/dev/null
}
reload() {
    [ -z "$child" ] || kill -HUP "$child" 2>/dev/null
}
trap forward TERM INT
trap reload HUP

while [ -z "$stopping" ]; do
    began=$(date +%s)
    "$agent" "$@" &
    child=$!
    code=0
    wait "$child" || code=$?
    # A signal ends the wait, not the agent.
    while kill -0 "$child" 2>/dev/null; do
        code=0
        wait "$child" || code=$?
    done
    child=
    [ -z "$stopping" ] || break
    # Called wrongly: starting it again will not help.
    [ "$code" -ne 64 ] || exit 64
    [ $(($(date +%s) - began)) -lt 60 ] || pause=1
    echo "supervise: sprite-agent ended with $code; starting it again in $pause s" >&2
    sleep "$pause" &
    child=$!
    wait "$child"
    child=
    pause=$((pause * 2))
    [ "$pause" -le 30 ] || pause=30
done
exit "$code"
