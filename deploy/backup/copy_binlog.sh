#!/bin/sh
# Copies MariaDB's binary log into this folder as it is written: copy_binlog.sh FILE-OF-OPTIONS [SECONDS]
#
# mariadb-binlog never ends on a connection that broke silently. So beside it something asks, by another connection,
# where the log ends. Once the copy has that SECONDS later, systemd is told that the unit is active. If the copy has not,
# and does not even grow, or if the server does not respond, mariadb-binlog is ended, and its unit starts it again.
set -eu
options=--defaults-extra-file=$1 seconds=${2:-30}
newest=$(ls | tail -n 1)

{
    trap 'kill $$' EXIT
    while end=$(timeout "$seconds" mariadb "$options" --batch --skip-column-names --execute "SHOW MASTER STATUS"); do
        set -- $end
        sleep "$seconds"
        if [ "$(stat --format=%s "$1" || echo 0)" -ge "$2" ]; then
            systemd-notify --ready
        elif [ -z "$(find . -newermt "$seconds seconds ago")" ]; then
            break
        fi
    done
    echo "The copy stands still, or the server does not respond." >&2
} &
exec mariadb-binlog "$options" --read-from-remote-server --raw --stop-never "$newest"
