// SPDX-License-Identifier: MIT OR GPL-2.0
/* Disks: block devices and files of the host. */
#include "shim.h"
#include <linux/bio.h>
#include <linux/blkdev.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/mm.h>
#include <linux/sched.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/vmalloc.h>

#define AK_DISKS_MAX 16
#define AK_FILE_SECTOR 512

struct ak_disk {
	struct block_device *bdev;	/* or */
	struct file *file;
	void *handle;			/* what closes bdev */
	struct ak_disk_info info;
};

static struct ak_disk ak_disks[AK_DISKS_MAX];
static u32 ak_disks_open_count;

/* Opening a block device changed its shape twice between our two kernels. */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 9, 0)
static int ak_bdev_open(struct ak_disk *disk, const char *path)
{
	blk_mode_t mode = disk->info.read_only ? BLK_OPEN_READ : BLK_OPEN_READ | BLK_OPEN_WRITE;
	struct file *file = bdev_file_open_by_path(path, mode, disk->info.read_only ? NULL : disk, NULL);

	if (IS_ERR(file))
		return PTR_ERR(file);
	disk->handle = file;
	disk->bdev = file_bdev(file);
	return 0;
}

static void ak_bdev_close(struct ak_disk *disk)
{
	bdev_fput(disk->handle);
}
#elif LINUX_VERSION_CODE < KERNEL_VERSION(6, 5, 0)
static fmode_t ak_bdev_mode(const struct ak_disk *disk)
{
	return disk->info.read_only ? FMODE_READ : FMODE_READ | FMODE_WRITE | FMODE_EXCL;
}

static int ak_bdev_open(struct ak_disk *disk, const char *path)
{
	struct block_device *bdev = blkdev_get_by_path(path, ak_bdev_mode(disk), disk);

	if (IS_ERR(bdev))
		return PTR_ERR(bdev);
	disk->bdev = bdev;
	return 0;
}

static void ak_bdev_close(struct ak_disk *disk)
{
	blkdev_put(disk->bdev, ak_bdev_mode(disk));
}
#else
#error "the block device calls of Linux 6.5 to 6.8 are not known here: use 6.1 to 6.4, or 6.9 and newer"
#endif

static int ak_disk_open(struct ak_disk *disk, const char *path)
{
	struct ak_disk_info *info = &disk->info;
	struct file *file = filp_open(path, (info->read_only ? O_RDONLY : O_RDWR) | O_LARGEFILE, 0);
	umode_t mode;
	int error;

	if (IS_ERR(file))
		return PTR_ERR(file);
	mode = file_inode(file)->i_mode;
	if (S_ISREG(mode)) {
		disk->file = file;
		info->sector_size = AK_FILE_SECTOR;
		info->sectors = i_size_read(file_inode(file)) / AK_FILE_SECTOR;
		return 0;
	}
	fput(file);
	if (!S_ISBLK(mode))
		return -ENOTBLK;
	error = ak_bdev_open(disk, path);
	if (error)
		return error;
	info->sector_size = bdev_logical_block_size(disk->bdev);
	info->sectors = bdev_nr_bytes(disk->bdev) / info->sector_size;
	if (bdev_read_only(disk->bdev) && !info->read_only) {
		ak_bdev_close(disk);
		return -EROFS;
	}
	return 0;
}

int ak_disks_open(char *list)
{
	char *text, *rest, *path;
	int error = 0;

	if (!list)
		return 0;
	text = rest = kstrdup(list, GFP_KERNEL);
	if (!text)
		return -ENOMEM;
	while ((path = strsep(&rest, ",")) && !error) {
		struct ak_disk *disk = &ak_disks[ak_disks_open_count];
		char *mode = strrchr(path, ':');

		if (ak_disks_open_count == AK_DISKS_MAX) {
			pr_err("more than %u disks\n", AK_DISKS_MAX);
			error = -EINVAL;
			break;
		}
		disk->info.read_only = 1;
		if (mode && !strcmp(mode, ":rw"))
			disk->info.read_only = 0;
		if (mode && (!strcmp(mode, ":rw") || !strcmp(mode, ":ro")))
			*mode = 0;
		error = ak_disk_open(disk, path);
		if (error)
			pr_err("disk %s cannot be opened %s: %pe\n", path,
			       disk->info.read_only ? "for reading" : "for writing", ERR_PTR(error));
		else
			ak_disks_open_count++;
	}
	kfree(text);
	return error;
}

void ak_disks_close(void)
{
	while (ak_disks_open_count) {
		struct ak_disk *disk = &ak_disks[--ak_disks_open_count];

		if (disk->file)
			filp_close(disk->file, NULL);
		else
			ak_bdev_close(disk);
	}
}

u32 ak_disk_count(void)
{
	return ak_disks_open_count;
}

int ak_disk_info(u32 index, struct ak_disk_info *info)
{
	if (index >= ak_disks_open_count)
		return -ENOENT;
	*info = ak_disks[index].info;
	return 0;
}

/* One bio over `len` bytes of page-backed kernel memory, 512-aligned. */
static int ak_bio(struct ak_disk *disk, u64 byte, void *buf, size_t len, blk_opf_t op)
{
	unsigned int pages = DIV_ROUND_UP(offset_in_page(buf) + len, PAGE_SIZE);
	struct bio *bio = bio_alloc(disk->bdev, pages, op, GFP_KERNEL);
	int error;

	bio->bi_iter.bi_sector = byte >> SECTOR_SHIFT;
	while (len) {
		size_t part = min_t(size_t, len, PAGE_SIZE - offset_in_page(buf));
		struct page *page = is_vmalloc_addr(buf) ? vmalloc_to_page(buf) : virt_to_page(buf);

		if (bio_add_page(bio, page, part, offset_in_page(buf)) != part) {
			bio_put(bio);
			return -EIO;
		}
		buf += part;
		len -= part;
	}
	error = submit_bio_wait(bio);
	bio_put(bio);
	return error;
}

#define AK_BIO_BYTES ((BIO_MAX_VECS - 1) * PAGE_SIZE)
#define AK_BOUNCE_BYTES (16 * PAGE_SIZE)

static int ak_bdev_rw(struct ak_disk *disk, u64 byte, void *buf, size_t len, bool write)
{
	bool direct = IS_ALIGNED((unsigned long)buf, SECTOR_SIZE);
	size_t step = direct ? AK_BIO_BYTES : AK_BOUNCE_BYTES;
	blk_opf_t op = write ? REQ_OP_WRITE | REQ_SYNC | REQ_IDLE : REQ_OP_READ;
	void *bounce = NULL;
	int error = 0;

	if (!direct) {
		bounce = kmalloc(min_t(size_t, roundup_pow_of_two(len), AK_BOUNCE_BYTES), GFP_KERNEL);
		if (!bounce)
			return -ENOMEM;
	}
	while (len && !error) {
		size_t part = min_t(size_t, len, step);

		if (direct) {
			error = ak_bio(disk, byte, buf, part, op);
		} else {
			if (write)
				memcpy(bounce, buf, part);
			error = ak_bio(disk, byte, bounce, part, op);
			if (!write && !error)
				memcpy(buf, bounce, part);
		}
		buf += part;
		byte += part;
		len -= part;
	}
	kfree(bounce);
	return error;
}

static int ak_file_rw(struct ak_disk *disk, loff_t byte, void *buf, size_t len, bool write)
{
	while (len) {
		ssize_t n = write ? kernel_write(disk->file, buf, len, &byte) : kernel_read(disk->file, buf, len, &byte);

		if (n <= 0)
			return n ? n : -EIO;	/* the file became shorter */
		buf += n;
		len -= n;
	}
	return 0;
}

static int ak_disk_rw(u32 index, u64 sector, void *buf, size_t len, bool write)
{
	struct ak_disk *disk = &ak_disks[index];
	struct ak_disk_info *info = &disk->info;
	u64 byte;

	ak_check_alive();
	if (index >= ak_disks_open_count)
		return -ENOENT;
	if (len % info->sector_size || sector > info->sectors || len / info->sector_size > info->sectors - sector)
		return -EINVAL;
	if (write && info->read_only)
		return -EROFS;
	byte = sector * info->sector_size;
	return disk->file ? ak_file_rw(disk, byte, buf, len, write) : ak_bdev_rw(disk, byte, buf, len, write);
}

int ak_disk_read(u32 index, u64 sector, void *buf, size_t len)
{
	return ak_disk_rw(index, sector, buf, len, false);
}

int ak_disk_write(u32 index, u64 sector, const void *buf, size_t len)
{
	return ak_disk_rw(index, sector, (void *)buf, len, true);
}

int ak_disk_flush(u32 index)
{
	struct ak_disk *disk = &ak_disks[index];

	ak_check_alive();
	if (index >= ak_disks_open_count)
		return -ENOENT;
	if (disk->info.read_only)
		return 0;
	return disk->file ? vfs_fsync(disk->file, 0) : blkdev_issue_flush(disk->bdev);
}
