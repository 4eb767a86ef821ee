// SPDX-License-Identifier: MIT OR GPL-2.0
/* Loading and unloading, parameters, console. */
#include "shim.h"
#include <linux/completion.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/mutex.h>
#include <linux/printk.h>
#include <linux/random.h>
#include <linux/slab.h>
#include <linux/spinlock.h>
#include <linux/string.h>

#define AK_CONFIG_MAX (1 << 20)

/* ---- module parameters ---- */

/* charp takes 1,024 bytes only. */
static int ak_text_set(const char *value, const struct kernel_param *param)
{
	char **text = param->arg;

	kfree(*text);
	*text = kstrdup(value, GFP_KERNEL);
	return *text ? 0 : -ENOMEM;
}

static int ak_text_get(char *buffer, const struct kernel_param *param)
{
	char **text = param->arg;

	return scnprintf(buffer, PAGE_SIZE, "%s\n", *text ? *text : "");
}

static void ak_text_free(void *arg)
{
	char **text = arg;

	kfree(*text);
	*text = NULL;
}

static const struct kernel_param_ops ak_text_ops = {
	.set = ak_text_set,
	.get = ak_text_get,
	.free = ak_text_free,
};

static char *ak_config;
module_param_cb(config, &ak_text_ops, &ak_config, 0444);
MODULE_PARM_DESC(config, "configuration as one JSON document without spaces between tokens");

static char *ak_config_file;
module_param_cb(config_file, &ak_text_ops, &ak_config_file, 0444);
MODULE_PARM_DESC(config_file, "file with the configuration, instead of config");

static char *ak_disk;
module_param_cb(disk, &ak_text_ops, &ak_disk, 0444);
MODULE_PARM_DESC(disk, "block devices or files that become disk0, disk1...: PATH or PATH:rw, separated by commas");

static unsigned int ak_links = 1;
module_param_named(links, ak_links, uint, 0444);
MODULE_PARM_DESC(links, "how many network interfaces ak0, ak1... to make (0 to 8, default 1)");

static unsigned int ak_mtu = 1500;
module_param_named(mtu, ak_mtu, uint, 0444);
MODULE_PARM_DESC(mtu, "largest IP packet of those interfaces in bytes (576 to 65521, default 1500)");

unsigned int ak_memory_mb;
module_param_named(memory, ak_memory_mb, uint, 0444);
MODULE_PARM_DESC(memory, "how much memory to use for buffers and caches, in MiB (default: a quarter of all)");

/* ---- state ---- */

static DECLARE_COMPLETION(ak_start_done);
static int ak_start_error;
static atomic_t ak_app_status = ATOMIC_INIT(-1);

static int ak_status_get(char *buffer, const struct kernel_param *param)
{
	int dead = atomic_read(&ak_dead), app = atomic_read(&ak_app_status);

	if (dead)
		return scnprintf(buffer, PAGE_SIZE, "dead %d\n", dead & 0xff);
	if (app >= 0)
		return scnprintf(buffer, PAGE_SIZE, "ended %d\n", app);
	return scnprintf(buffer, PAGE_SIZE, completion_done(&ak_start_done) ? "running\n" : "starting\n");
}

static const struct kernel_param_ops ak_status_ops = { .get = ak_status_get };
module_param_cb(status, &ak_status_ops, NULL, 0444);
MODULE_PARM_DESC(status, "to be read only: starting, running, ended STATUS (the application), dead STATUS (the domain)");

void ak_started(int error)
{
	ak_start_error = error;
	complete_all(&ak_start_done);
}

void ak_stopped_early(void)
{
	if (!completion_done(&ak_start_done))
		ak_started(-ENODEV);
}

void ak_app_ended(u32 status)
{
	atomic_set(&ak_app_status, status);
}

ssize_t ak_param(const char *key, size_t key_len, void *buf, size_t len)
{
	size_t size;

	if (key_len != 6 || memcmp(key, "config", 6) || !ak_config)
		return -ENOENT;
	size = strlen(ak_config);
	if (size > len)
		return -EOVERFLOW;
	memcpy(buf, ak_config, size);
	return size;
}

static int ak_config_read(void)
{
	struct file *file;
	loff_t pos = 0;
	ssize_t size;
	char *text;

	if (!ak_config_file)
		return 0;
	if (ak_config) {
		pr_err("give config or config_file, not both\n");
		return -EINVAL;
	}
	file = filp_open(ak_config_file, O_RDONLY, 0);
	if (IS_ERR(file)) {
		pr_err("config_file %s cannot be opened: %pe\n", ak_config_file, file);
		return PTR_ERR(file);
	}
	size = i_size_read(file_inode(file));
	text = size <= AK_CONFIG_MAX ? kzalloc(size + 1, GFP_KERNEL) : NULL;
	if (text)
		size = kernel_read(file, text, size, &pos);
	else
		size = -EFBIG;
	fput(file);
	if (size < 0) {
		pr_err("config_file %s cannot be read: %pe\n", ak_config_file, ERR_PTR(size));
		kfree(text);
		return size;
	}
	ak_config = text;
	return 0;
}

/* ---- console: whole lines go to the kernel log ---- */

static DEFINE_SPINLOCK(ak_line_lock);
static char ak_line[900];	/* the log cuts records at about 1,000 bytes */
static size_t ak_line_len;

static void ak_line_end(void)
{
	pr_info("%.*s\n", (int)ak_line_len, ak_line);
	ak_line_len = 0;
}

void ak_console(const char *text, size_t len)
{
	unsigned long flags;
	size_t i;

	spin_lock_irqsave(&ak_line_lock, flags);
	for (i = 0; i < len; i++) {
		if (text[i] == '\n') {
			ak_line_end();
			continue;
		}
		if (ak_line_len == sizeof(ak_line))
			ak_line_end();
		ak_line[ak_line_len++] = text[i];
	}
	spin_unlock_irqrestore(&ak_line_lock, flags);
}

int ak_random(void *buf, size_t len)
{
	ak_check_alive();
	if (wait_for_random_bytes())
		return -EAGAIN;
	get_random_bytes(buf, len);
	return 0;
}

/* ---- load and unload ---- */

static void ak_close_all(void)
{
	ak_usb_end();
	ak_links_unregister();
	ak_disks_close();
	if (ak_line_len)
		ak_line_end();
	ak_heap_report();
	ak_channel_free();
}

static int __init ak_init(void)
{
	static const struct ak_abi abi = {
		.magic = AK_ABI_MAGIC,
		.version = AK_ABI_VERSION,
		.abi_size = sizeof(struct ak_abi),
		.disk_info_size = sizeof(struct ak_disk_info),
		.link_info_size = sizeof(struct ak_link_info),
		.page_size = PAGE_SIZE,
		.usb_info_size = sizeof(struct ak_usb_info),
		.usb_transfer_size = sizeof(struct ak_usb_transfer),
		.usb_over_size = sizeof(struct ak_usb_over),
	};
	int error = ak_rust_check(&abi);

	if (error) {
		pr_err("the C and the Rust half are of different versions: build the module anew\n");
		return error;
	}
	ak_park_init();
	ak_heap_init();
	error = ak_config_read();
	if (!error)
		error = ak_disks_open(ak_disk);
	if (!error)
		error = ak_links_register(ak_links, ak_mtu);
	if (!error)
		error = ak_threads_start();
	if (error) {
		ak_close_all();
		return error;
	}
	/* In steps, so that the hung-task watchdog has nothing to say. */
	while (!wait_for_completion_timeout(&ak_start_done, HZ))
		;
	if (ak_start_error) {
		/* Nothing has started, or the domain died on the way: what there is ends by itself. */
		ak_threads_end();
		ak_close_all();
		return ak_start_error;
	}
	return 0;
}

static void __exit ak_fini(void)
{
	ak_rust_stop();
	ak_threads_end();
	ak_close_all();
}

module_init(ak_init);
module_exit(ak_fini);
MODULE_LICENSE("Dual MIT/GPL");
MODULE_AUTHOR("The anykernel authors");
MODULE_DESCRIPTION("Drivers, file systems and a network stack in Rust, as a domain of kernel threads");
