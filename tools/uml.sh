#!/usr/bin/env bash
# Unpacks a kernel that runs as an ordinary program, and a 9p server, into build/uml: for the tests of 9p and vsock on
# machines whose own kernel has neither. Nothing is installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ -x build/uml/usr/bin/linux.uml && -x build/uml/usr/sbin/diod ]]; then exit 0; fi
mkdir -p build/uml/packages
cd build/uml/packages
apt-get -qq -o APT::Sandbox::User=root download user-mode-linux diod libwrap0 liblua5.1-0 libmunge2
for package in *.deb; do dpkg-deb -x "$package" ..; done
rm -f -- *.deb
