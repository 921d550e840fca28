#!/bin/sh
# The libraries that Mooncake's CPU wheel loads and that pip cannot bring. Installs them when it may, else says how.
set -u

missing=""
need() { # library, Debian package
    ldconfig -p 2>/dev/null | grep -q "$1" || /sbin/ldconfig -p 2>/dev/null | grep -q "$1" || missing="$missing $2"
}
need libibverbs.so.1 libibverbs1
need libnuma.so.1 libnuma1
need libcurl.so.4 libcurl4
[ -z "$missing" ] && exit 0

install="apt-get update && apt-get install -y --no-install-recommends$missing"
if ! command -v apt-get >/dev/null 2>&1; then
    echo "Mooncake needs these libraries (Debian names):$missing" >&2
    exit 1
fi
if [ "$(id -u)" -ne 0 ]; then
    echo "Mooncake needs system libraries. Run this, then try again:" >&2
    echo "    sudo sh -c '$install'" >&2
    exit 1
fi
echo "installing system libraries:$missing"
DEBIAN_FRONTEND=noninteractive sh -c "$install" >/dev/null && exit 0
echo "could not install them; run: $install" >&2
exit 1
