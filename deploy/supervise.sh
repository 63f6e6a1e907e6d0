#!/bin/sh
# Keeps sprite-agent running where there is no service manager: supervise.sh serve --repo ... --listen ...
#
# Starts it again when it ends by itself, after 1 s at first and 30 s at most; what it has to finish it finishes
# by itself. TERM and INT are passed on, once for a drain, twice to end at once; then this ends too. HUP is passed on.
set -u
[ $# -gt 0 ] || { echo "usage: supervise.sh serve --repo ... --listen ..." >&2; exit 64; }
agent=${SPRITE_AGENT:-sprite-agent}
# Ctrl-C goes to all of a terminal's group: told by it and by us, the agent would end at once. So it has a session.
own=$(command -v setsid) || own=
stopping=
told=
pause=1
child=
code=0

forward() {
    stopping=yes
    [ -z "$child" ] || tell
}
tell() {
    told=yes
    kill -TERM "$child" 2>/dev/null
}
started() {
    child=$1
    # A signal that came just before had nobody to be passed on to, and is lost until this has become the program.
    [ -z "$stopping" ] || [ -n "$told" ] || { sleep 1; [ -n "$told" ] || tell; }
}
reload() {
    [ -z "$child" ] || kill -HUP "$child" 2>/dev/null
}
trap forward TERM INT
trap reload HUP

while began=$(date +%s) && [ -z "$stopping" ]; do
    $own "$agent" "$@" &
    started $!
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
    started $!
    wait "$child"
    child=
    pause=$((pause * 2))
    [ "$pause" -le 30 ] || pause=30
done
exit "$code"
