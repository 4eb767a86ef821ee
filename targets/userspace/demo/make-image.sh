#!/bin/sh
# Makes site.ext4, which the demo serves, from the directory site/. The same input gives the same bytes.
#
# usage: ./make-image.sh        (needs mkfs.ext4, of e2fsprogs 1.47 or newer)
set -eu
cd "$(dirname "$0")"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -a site "$work/site"
# 2026-11-21 12:00 UTC, for files and for the superblock.
find "$work/site" -exec touch -h -d @1795262400 {} +
chmod -R u=rwX,go=rX "$work/site"

# Debian's default features, but for a journal: a read-only image has no use for one, and it would be most of its size.
E2FSPROGS_FAKE_TIME=1795262400 mkfs.ext4 -q -F -b 1024 -I 256 -N 64 -m 0 -O ^has_journal,^resize_inode \
    -L demo -U 6b1f6a0e-2d51-4d35-9a4c-3f1b5a2e9d10 -E hash_seed=6b1f6a0e-2d51-4d35-9a4c-3f1b5a2e9d11,root_owner=0:0 \
    -d "$work/site" "$work/site.ext4" 512k
# Times that mkfs.ext4 takes from the copy and that cannot be set there.
(cd "$work/site" && find . -printf '%P\n') | while read -r path; do
    for field in atime ctime crtime; do
        echo "set_inode_field /$path $field 20261121120000"
        echo "set_inode_field /$path ${field}_extra 0"
    done
done >"$work/times"
echo 'rmdir /lost+found' >>"$work/times"
E2FSPROGS_FAKE_TIME=1795262400 TZ=UTC debugfs -w -f "$work/times" "$work/site.ext4" >"$work/log" 2>&1
e2fsck -fn "$work/site.ext4" >/dev/null 2>&1
mv "$work/site.ext4" site.ext4
ls -l site.ext4
