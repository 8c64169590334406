#!/bin/sh
# Stands in for protoc while etcd-client's build script runs, so that a fresh clone builds without protoc: it copies the
# descriptor set that is checked in beside it to the path after -o. tests/tests/descriptors.rs makes that file again.
set -eu
here=$(dirname "$0")
while [ $# -gt 0 ]; do
    case "$1" in
        --version) echo "libprotoc 30.0"; exit 0 ;;
        -o) cp "$here/descriptors.binpb" "$2"; exit 0 ;;
        --descriptor_set_out=*) cp "$here/descriptors.binpb" "${1#*=}"; exit 0 ;;
    esac
    shift
done
echo "protoc.sh only serves etcd-client's descriptor set: call it with -o FILE" >&2
exit 1
