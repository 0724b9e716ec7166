#!/bin/sh
# Gives the browser tests a Chromium where that needs no questions; elsewhere says why they will be skipped.
set -u

has_chromium() {
    for name in chromium chromium-browser google-chrome google-chrome-stable; do
        command -v "$name" >/dev/null && return 0
    done
    for app in "Google Chrome" Chromium; do
        [ -x "/Applications/$app.app/Contents/MacOS/$app" ] && return 0
    done
    return 1
}

has_chromium && exit 0
if ! command -v apt-get >/dev/null; then
    reason="there is no apt-get to install it with: install Chromium or Google Chrome yourself"
elif [ "$(id -u)" -ne 0 ]; then
    reason="only root may install it: run 'sudo apt-get install chromium'"
else
    echo "installing Chromium for the browser tests"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends chromium >/dev/null
    has_chromium && exit 0
    reason="'apt-get install chromium' failed, see above"
fi
echo "*** THE BROWSER TESTS WILL BE SKIPPED: no Chromium found, and $reason ***" >&2
