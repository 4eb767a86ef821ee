//! The vfs component: mounts, path walk, ext4, FAT, tmpfs, block cache, partitions.
