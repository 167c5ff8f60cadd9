#!/bin/sh
# Builds the guest's kernel from Debian's source package: build.sh OUTPUT WORKDIR.
# OUTPUT becomes an uncompressed PVH kernel with all drivers built in, for
# 'caissond guest build --kernel OUTPUT'. Nothing is installed; WORKDIR keeps the source and objects.
set -eu
package=linux-source-6.12
output=$(realpath -m "$1")
work=$(realpath -m "$2")
config=$(realpath "$(dirname "$0")/config")

for tool in gcc make bc bison flex xz dpkg-deb apt-get; do
	command -v "$tool" >/dev/null || missing="${missing-} $tool"
done
[ -e /usr/include/gelf.h ] || missing="${missing-} gelf.h"
if [ -n "${missing-}" ]; then
	echo "missing:$missing; run 'apt-get install build-essential bc bison flex libelf-dev xz-utils'" >&2
	exit 1
fi

mkdir -p "$work" "$(dirname "$output")"
cd "$work"
version=$(apt-cache show --no-all-versions "$package" | sed -n 's/^Version: //p')
if [ "$(cat version 2>/dev/null)" != "$version" ]; then
	rm -rf "$package" ./*.deb
	echo "downloading $package $version (150 MB)"
	apt-get -o APT::Sandbox::User=root -qq download "$package=$version"
	dpkg-deb --fsys-tarfile "$package"_*.deb | tar -xO "./usr/src/$package.tar.xz" | tar -xJ
	rm ./*.deb
	echo "$version" >version
fi

cd "$package"
# The same source, configuration and compiler give the same kernel.
export KBUILD_BUILD_TIMESTAMP='1970-01-01 00:00:00 UTC' KBUILD_BUILD_USER=caisson KBUILD_BUILD_HOST=caisson
make -s KCONFIG_ALLCONFIG="$config" allnoconfig
# Kconfig drops what it can't satisfy without a word.
grep '^CONFIG_' "$config" | while read -r line; do
	case $line in
	*=n) ! grep -q "^${line%n}" .config || echo "$line" ;;
	*) grep -qxF "$line" .config || echo "$line" ;;
	esac
done >unmet
if [ -s unmet ]; then
	echo "the kernel's configuration does not take:" >&2
	cat unmet >&2
	exit 1
fi
echo "compiling Linux $version (minutes)"
make -s -j"$(nproc)" vmlinux
strip -o "$output.tmp" vmlinux
mv "$output.tmp" "$output"
echo "kernel in $output"
