// SPDX-License-Identifier: MIT OR GPL-2.0
/*
 * USB devices of Linux: listed for the domain, and handed to it one interface at a time when it claims them.
 *
 * Nothing is registered with Linux before the domain first asks for USB, and our driver matches no device by itself.
 * Completion handlers run in interrupt context: they only queue what is over, and raise the domain's signal.
 */
#include "shim.h"

#if IS_ENABLED(CONFIG_USB)

#include <linux/bitmap.h>
#include <linux/kref.h>
#include <linux/list.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/notifier.h>
#include <linux/pm_runtime.h>
#include <linux/scatterlist.h>
#include <linux/sched.h>
#include <linux/slab.h>
#include <linux/spinlock.h>
#include <linux/string.h>
#include <linux/usb.h>

#define AK_FLIGHTS_MAX 256	/* transfers in flight on a device */
#define AK_GFP (GFP_KERNEL | __GFP_NOWARN | __GFP_RETRY_MAYFAIL)

struct ak_endpoint {
	u16 owner;	/* 1 + number of the claimed interface; 0: none of ours */
	u8 type;
	u8 interval;
};

/* A device, from plugging in until it is both unplugged and closed. */
struct ak_usb {
	struct list_head node;
	struct kref kref;
	struct usb_device *udev;
	struct ak_usb_info info;	/* what never changes of it */
	struct mutex submitting;
	/* By interface number, changed while the device is locked: */
	DECLARE_BITMAP(claimed, 256);
	DECLARE_BITMAP(taken, 256);	/* from a driver of Linux, which gets it back */
	/* Under ak_usb_lock: */
	bool gone, open, shut;
	const void *signal;
	struct ak_endpoint endpoints[32];	/* by number, IN from 16 on */
	struct list_head flying, over, spare;
	unsigned int flights;
};

/* A URB and what it is about. One that is over is used again; all are freed when the device is closed. */
struct ak_flight {
	struct list_head node;
	struct ak_usb *device;
	struct urb *urb;
	void *cookie;
	const struct ak_usb_part *parts;
	u32 count;
	void *bounce;	/* instead of the parts, if Linux cannot do DMA there */
	u64 tag;
	u16 owner;
	unsigned int pins;	/* somebody cancels it: it must not become another transfer */
	u8 setup[8];
};

static DEFINE_SPINLOCK(ak_usb_lock);
static LIST_HEAD(ak_usb_devices);
static u64 ak_usb_last_id;
static atomic_t ak_usb_held;	/* devices and transfers that are not freed yet, so that unloading can tell */
static const void *ak_usb_watcher;

/* ---- which devices there are ---- */

static void ak_usb_free(struct kref *kref)
{
	struct ak_usb *d = container_of(kref, struct ak_usb, kref);

	usb_put_dev(d->udev);
	kfree(d);
	atomic_dec(&ak_usb_held);
}

static void ak_usb_put(struct ak_usb *d)
{
	kref_put(&d->kref, ak_usb_free);
}

static struct ak_usb *ak_usb_find(u64 id, bool open)
{
	struct ak_usb *d, *found = NULL;

	spin_lock_irq(&ak_usb_lock);
	list_for_each_entry(d, &ak_usb_devices, node)
		if (d->info.id == id && (!open || (d->open && !d->shut))) {
			kref_get(&d->kref);
			found = d;
			break;
		}
	spin_unlock_irq(&ak_usb_lock);
	return found;
}

static bool ak_usb_gone(struct ak_usb *d)
{
	return READ_ONCE(d->gone) || d->udev->state == USB_STATE_NOTATTACHED;
}

/* ak_usb_lock is held. */
static void ak_usb_raise(struct ak_usb *d)
{
	if (d->signal)
		ak_rust_raise(d->signal);
}

/* The device is locked, so it cannot be unplugged meanwhile. */
static void ak_usb_add(struct usb_device *udev)
{
	struct ak_usb *d = kzalloc(sizeof(*d), GFP_KERNEL), *other;
	struct usb_device *at;

	if (!d)
		return;	/* it is not shown, as if it were not plugged in */
	atomic_inc(&ak_usb_held);
	kref_init(&d->kref);
	mutex_init(&d->submitting);
	INIT_LIST_HEAD(&d->flying);
	INIT_LIST_HEAD(&d->over);
	INIT_LIST_HEAD(&d->spare);
	d->udev = usb_get_dev(udev);
	d->info.bus = udev->bus->busnum;
	d->info.address = udev->devnum;
	d->info.speed = udev->speed;
	d->info.depth = min_t(u8, udev->level, ARRAY_SIZE(d->info.ports));
	for (at = udev; at->parent; at = at->parent)
		if (at->level <= ARRAY_SIZE(d->info.ports))
			d->info.ports[at->level - 1] = at->portnum;
	spin_lock_irq(&ak_usb_lock);
	list_for_each_entry(other, &ak_usb_devices, node)
		if (other->udev == udev && !other->gone) {
			spin_unlock_irq(&ak_usb_lock);
			ak_usb_put(d);
			return;
		}
	d->info.id = ++ak_usb_last_id;
	list_add_tail(&d->node, &ak_usb_devices);
	spin_unlock_irq(&ak_usb_lock);
}

static void ak_usb_remove(struct usb_device *udev)
{
	struct ak_usb *d, *found = NULL;

	spin_lock_irq(&ak_usb_lock);
	list_for_each_entry(d, &ak_usb_devices, node)
		if (d->udev == udev && !d->gone) {
			d->gone = true;
			ak_usb_raise(d);
			if (!d->open) {
				list_del(&d->node);
				found = d;
			}
			break;
		}
	spin_unlock_irq(&ak_usb_lock);
	if (found)
		ak_usb_put(found);
}

static int ak_usb_notified(struct notifier_block *block, unsigned long what, void *data)
{
	if (what == USB_DEVICE_ADD)
		ak_usb_add(data);
	else if (what == USB_DEVICE_REMOVE)
		ak_usb_remove(data);
	else
		return NOTIFY_DONE;
	spin_lock_irq(&ak_usb_lock);
	if (ak_usb_watcher)
		ak_rust_raise(ak_usb_watcher);
	spin_unlock_irq(&ak_usb_lock);
	return NOTIFY_OK;
}

static struct notifier_block ak_usb_notifier = { .notifier_call = ak_usb_notified };

static int ak_usb_meet(struct usb_device *udev, void *data)
{
	usb_lock_device(udev);
	if (udev->state != USB_STATE_NOTATTACHED)
		ak_usb_add(udev);
	usb_unlock_device(udev);
	return 0;
}

/* ---- transfers ---- */

static u32 ak_usb_status(struct ak_usb *d, int status)
{
	switch (status) {
	case 0:
		return AK_USB_DONE;
	case -EPIPE:
		return AK_USB_STALL;
	case -EOVERFLOW:
		return AK_USB_OVERFLOW;
	case -ENOENT:
	case -ECONNRESET:
		return AK_USB_CANCELLED;
	case -ENODEV:
	case -ESHUTDOWN:
		/* Also when the interface is taken away from us. */
		return ak_usb_gone(d) ? AK_USB_GONE : AK_USB_CANCELLED;
	default:
		return AK_USB_ERROR;
	}
}

/* Context: interrupt. */
static void ak_usb_complete(struct urb *urb)
{
	struct ak_flight *f = urb->context;
	unsigned long flags;

	spin_lock_irqsave(&ak_usb_lock, flags);
	list_move_tail(&f->node, &f->device->over);
	ak_usb_raise(f->device);
	spin_unlock_irqrestore(&ak_usb_lock, flags);
}

/*
 * A transfer under way of `owner` (0: of any) and with `*tag` (NULL: with any), kept from becoming another until
 * ak_flight_unpin(). NULL: there is none.
 */
static struct ak_flight *ak_flight_pin(struct ak_usb *d, u16 owner, const u64 *tag)
{
	struct ak_flight *f, *found = NULL;

	spin_lock_irq(&ak_usb_lock);
	list_for_each_entry(f, &d->flying, node)
		if ((!owner || f->owner == owner) && (!tag || f->tag == *tag)) {
			f->pins++;
			found = f;
			break;
		}
	spin_unlock_irq(&ak_usb_lock);
	return found;
}

static void ak_flight_unpin(struct ak_flight *f)
{
	spin_lock_irq(&ak_usb_lock);
	f->pins--;
	spin_unlock_irq(&ak_usb_lock);
}

/* Cancels the transfers of one owner, or all, and waits until they are over. */
static void ak_usb_kill(struct ak_usb *d, u16 owner)
{
	struct ak_flight *f;
	unsigned int most = AK_FLIGHTS_MAX;

	/* Whoever is between its check and its URB. */
	mutex_lock(&d->submitting);
	mutex_unlock(&d->submitting);
	do {
		f = ak_flight_pin(d, owner, NULL);
		if (f) {
			usb_kill_urb(f->urb);
			ak_flight_unpin(f);
		}
	} while (f && --most);
}

static struct ak_flight *ak_flight_make(struct ak_usb *d)
{
	struct ak_flight *f = kzalloc(sizeof(*f), AK_GFP);

	if (!f)
		return NULL;
	f->urb = usb_alloc_urb(0, AK_GFP);
	if (!f->urb) {
		kfree(f);
		return NULL;
	}
	atomic_inc(&ak_usb_held);
	f->device = d;
	d->flights++;
	return f;
}

/* The memory that is ours of its data. */
static void ak_flight_forget(struct ak_flight *f)
{
	kfree(f->urb->sg);
	f->urb->sg = NULL;
	f->urb->num_sgs = 0;
	kfree(f->bounce);
	f->bounce = NULL;
}

static void ak_flights_free(struct list_head *flights)
{
	struct ak_flight *f, *next;

	list_for_each_entry_safe(f, next, flights, node) {
		/* Who cancels it just now looks at it once more. */
		while (READ_ONCE(f->pins))
			schedule_timeout_uninterruptible(1);
		/* Waits until its completion handler has returned: its text may be about to go. */
		usb_kill_urb(f->urb);
		ak_flight_forget(f);
		usb_free_urb(f->urb);
		kfree(f);
		atomic_dec(&ak_usb_held);
	}
	INIT_LIST_HEAD(flights);
}

/* Whether that transfer may be, and, other than for control, on which endpoint; ak_usb_lock is held. */
static int ak_usb_check(struct ak_usb *d, const struct ak_usb_transfer *t, struct ak_endpoint *endpoint)
{
	static const u8 types[] = { USB_ENDPOINT_XFER_CONTROL, USB_ENDPOINT_XFER_BULK, USB_ENDPOINT_XFER_INT };
	struct ak_flight *f;

	if (!d->open || d->shut)
		return -ENOENT;
	if (ak_usb_gone(d))
		return -ENODEV;
	list_for_each_entry(f, &d->flying, node)
		if (f->tag == t->tag)
			return -EINVAL;
	if (t->kind >= ARRAY_SIZE(types) || t->len > INT_MAX)
		return -EINVAL;
	if (t->kind == AK_USB_CONTROL)
		return t->endpoint || (t->setup[6] | t->setup[7] << 8) != t->len ? -EINVAL : 0;
	if (t->endpoint & 0x70)
		return -EINVAL;
	*endpoint = d->endpoints[(t->endpoint & 15) + (t->endpoint & USB_DIR_IN ? 16 : 0)];
	return endpoint->owner && endpoint->type == types[t->kind] ? 0 : -EINVAL;
}

/* Whether the controller reaches the parts where they are. The heap gives other memory only when there is none in one piece. */
static bool ak_usb_reaches(struct ak_usb *d, const struct ak_usb_transfer *t)
{
	struct usb_bus *bus = d->udev->bus;
	u32 i;

	for (i = 0; i < t->count; i++)
		if (!t->parts[i].len || is_vmalloc_addr(t->parts[i].data))
			return false;
	if (t->count == 1)
		return true;
	if (t->kind != AK_USB_BULK || t->count > bus->sg_tablesize)
		return false;
	for (i = 0; i + 1 < t->count; i++)
		/* A multiple of every packet size there is, for controllers that end a packet with a part. */
		if (!bus->no_sg_constraint && t->parts[i].len % 1024)
			return false;
	return true;
}

static int ak_usb_buffer(struct ak_flight *f, const struct ak_usb_transfer *t, bool in)
{
	struct scatterlist *sg;
	void *to;
	u32 i;

	f->parts = t->parts;
	f->count = t->count;
	if (!t->len)
		return 0;
	if (ak_usb_reaches(f->device, t)) {
		if (t->count == 1)
			return 0;
		sg = kmalloc_array(t->count, sizeof(*sg), AK_GFP);
		if (!sg)
			return -ENOMEM;
		sg_init_table(sg, t->count);
		for (i = 0; i < t->count; i++)
			sg_set_buf(&sg[i], t->parts[i].data, t->parts[i].len);
		f->urb->sg = sg;
		f->urb->num_sgs = t->count;
		return 0;
	}
	f->bounce = kmalloc(t->len, AK_GFP);
	if (!f->bounce)
		return -ENOMEM;
	for (i = 0, to = f->bounce; !in && i < t->count; to += t->parts[i++].len)
		memcpy(to, t->parts[i].data, t->parts[i].len);
	return 0;
}

/* What was received, if it is not where it belongs. */
static void ak_usb_unbounce(struct ak_flight *f)
{
	size_t rest = min(f->urb->actual_length, f->urb->transfer_buffer_length), len;
	void *from = f->bounce;
	u32 i;

	if (!f->bounce || !usb_urb_dir_in(f->urb))
		return;
	for (i = 0; i < f->count; i++, from += len, rest -= len) {
		len = min(rest, f->parts[i].len);
		memcpy(f->parts[i].data, from, len);
	}
}

static void ak_usb_fill(struct ak_flight *f, const struct ak_usb_transfer *t, const struct ak_endpoint *endpoint)
{
	struct usb_device *udev = f->device->udev;
	void *data = f->bounce ?: t->len && t->count == 1 ? t->parts[0].data : NULL;
	u8 number = t->endpoint & 15;
	bool in = t->endpoint & USB_DIR_IN;
	unsigned int pipe;

	switch (t->kind) {
	case AK_USB_CONTROL:
		memcpy(f->setup, t->setup, sizeof(f->setup));
		/* Without data the status stage goes IN, which makes it an OUT transfer (USB 2.0, 8.5.3). */
		in = (t->setup[0] & USB_DIR_IN) && t->len;
		pipe = in ? usb_rcvctrlpipe(udev, 0) : usb_sndctrlpipe(udev, 0);
		usb_fill_control_urb(f->urb, udev, pipe, f->setup, data, t->len, ak_usb_complete, f);
		break;
	case AK_USB_BULK:
		pipe = in ? usb_rcvbulkpipe(udev, number) : usb_sndbulkpipe(udev, number);
		usb_fill_bulk_urb(f->urb, udev, pipe, data, t->len, ak_usb_complete, f);
		break;
	default:
		pipe = in ? usb_rcvintpipe(udev, number) : usb_sndintpipe(udev, number);
		usb_fill_int_urb(f->urb, udev, pipe, data, t->len, ak_usb_complete, f, endpoint->interval);
	}
	f->urb->transfer_flags = t->zero_packet && !in && t->kind != AK_USB_CONTROL ? URB_ZERO_PACKET : 0;
	f->cookie = t->cookie;
	f->tag = t->tag;
	f->owner = endpoint->owner;
}

/* d->submitting is held. */
static int ak_usb_start_transfer(struct ak_usb *d, const struct ak_usb_transfer *t)
{
	bool in = t->kind == AK_USB_CONTROL ? t->setup[0] & USB_DIR_IN : t->endpoint & USB_DIR_IN;
	struct ak_endpoint endpoint = {};
	struct ak_flight *f = NULL, *spare;
	int error;

	spin_lock_irq(&ak_usb_lock);
	error = ak_usb_check(d, t, &endpoint);
	if (!error)
		list_for_each_entry(spare, &d->spare, node)
			if (!spare->pins) {
				list_del(&spare->node);
				f = spare;
				break;
			}
	spin_unlock_irq(&ak_usb_lock);
	if (error)
		return error;
	if (!f) {
		if (d->flights >= AK_FLIGHTS_MAX)
			return -EAGAIN;
		f = ak_flight_make(d);
		if (!f)
			return -ENOMEM;
	}
	error = ak_usb_buffer(f, t, in);
	if (!error)
		ak_usb_fill(f, t, &endpoint);
	spin_lock_irq(&ak_usb_lock);
	list_add_tail(&f->node, error ? &d->spare : &d->flying);
	spin_unlock_irq(&ak_usb_lock);
	if (error)
		return error;
	error = usb_submit_urb(f->urb, AK_GFP);
	if (!error)
		return 0;
	ak_flight_forget(f);
	spin_lock_irq(&ak_usb_lock);
	list_move_tail(&f->node, &d->spare);
	spin_unlock_irq(&ak_usb_lock);
	switch (error) {
	case -ENOENT:	/* not in this alternate setting */
	case -EBADR:
	case -EMSGSIZE:
		return -EINVAL;
	case -ESHUTDOWN:
		return -ENODEV;
	case -EAGAIN:	/* no room to map it for DMA */
		return -ENOMEM;
	default:
		return error;
	}
}

int ak_usb_submit(u64 id, const struct ak_usb_transfer *t)
{
	struct ak_usb *d;
	int error;

	ak_check_alive();
	d = ak_usb_find(id, true);
	if (!d)
		return -ENOENT;
	mutex_lock(&d->submitting);
	error = ak_usb_start_transfer(d, t);
	mutex_unlock(&d->submitting);
	ak_usb_put(d);
	return error;
}

void ak_usb_cancel(u64 id, u64 tag)
{
	struct ak_usb *d = ak_usb_find(id, true);
	struct ak_flight *f;

	if (!d)
		return;
	f = ak_flight_pin(d, 0, &tag);
	if (f) {
		usb_unlink_urb(f->urb);
		ak_flight_unpin(f);
	}
	ak_usb_put(d);
}

/* Also while it is being shut. */
void *ak_usb_reap(u64 id, struct ak_usb_over *over)
{
	struct ak_usb *d = ak_usb_find(id, false);
	struct ak_flight *f;
	void *cookie = NULL;

	if (!d)
		return NULL;
	spin_lock_irq(&ak_usb_lock);
	f = list_first_entry_or_null(&d->over, struct ak_flight, node);
	if (f)
		list_del(&f->node);
	spin_unlock_irq(&ak_usb_lock);
	if (f) {
		over->actual = f->urb->actual_length;
		over->status = ak_usb_status(d, f->urb->status);
		ak_usb_unbounce(f);
		ak_flight_forget(f);
		cookie = f->cookie;
		spin_lock_irq(&ak_usb_lock);
		list_add_tail(&f->node, &d->spare);
		spin_unlock_irq(&ak_usb_lock);
	}
	ak_usb_put(d);
	return cookie;
}

/* ---- interfaces ---- */

static void ak_usb_forget_endpoints(struct ak_usb *d, u16 owner)
{
	int i;

	for (i = 0; i < ARRAY_SIZE(d->endpoints); i++)
		if (d->endpoints[i].owner == owner)
			d->endpoints[i].owner = 0;
}

static int ak_usb_probe(struct usb_interface *intf, const struct usb_device_id *id)
{
	return -ENODEV;
}

/* The interface is taken from us: unplugged, or given back by ourselves. Nothing of it is in flight any more. */
static void ak_usb_disconnect(struct usb_interface *intf)
{
	struct ak_usb *d = usb_get_intfdata(intf);
	u8 number = intf->altsetting->desc.bInterfaceNumber;

	spin_lock_irq(&ak_usb_lock);
	clear_bit(number, d->claimed);
	ak_usb_forget_endpoints(d, number + 1);
	ak_usb_raise(d);
	spin_unlock_irq(&ak_usb_lock);
}

static int ak_usb_pre_reset(struct usb_interface *intf)
{
	ak_usb_kill(usb_get_intfdata(intf), intf->altsetting->desc.bInterfaceNumber + 1);
	return 0;
}

static int ak_usb_post_reset(struct usb_interface *intf)
{
	return 0;
}

static struct usb_driver ak_usb_driver = {
	.name = KBUILD_MODNAME,
	.probe = ak_usb_probe,
	.disconnect = ak_usb_disconnect,
	.pre_reset = ak_usb_pre_reset,
	.post_reset = ak_usb_post_reset,
	.no_dynamic_id = 1,
};

static bool ak_usb_ours(struct usb_interface *intf)
{
	return intf->dev.driver && to_usb_driver(intf->dev.driver) == &ak_usb_driver;
}

/* The endpoints of a claimed interface in its current setting; the device is locked. */
static void ak_usb_learn(struct ak_usb *d, struct usb_interface *intf)
{
	struct usb_host_interface *now = intf->cur_altsetting;
	u16 owner = now->desc.bInterfaceNumber + 1;
	int i;

	spin_lock_irq(&ak_usb_lock);
	ak_usb_forget_endpoints(d, owner);
	for (i = 0; i < now->desc.bNumEndpoints; i++) {
		const struct usb_endpoint_descriptor *desc = &now->endpoint[i].desc;

		d->endpoints[usb_endpoint_num(desc) + (usb_endpoint_dir_in(desc) ? 16 : 0)] = (struct ak_endpoint){
			.owner = owner,
			.type = usb_endpoint_type(desc),
			.interval = desc->bInterval,
		};
	}
	spin_unlock_irq(&ak_usb_lock);
}

/* The device is locked. */
static int ak_usb_take(struct ak_usb *d, u8 number)
{
	struct usb_interface *intf;
	int error;

	if (ak_usb_gone(d))
		return -ENODEV;
	intf = usb_ifnum_to_if(d->udev, number);
	if (!intf)
		return -EINVAL;
	if (ak_usb_ours(intf))
		return 0;
	if (!intf->authorized)
		return -EPERM;
	if (intf->dev.driver) {
		const char *name = intf->dev.driver->name;

		/* A program that has it through usbfs, and what is plugged in behind a hub, are not ours to disturb. */
		if (!strcmp(name, "usbfs") || !strcmp(name, "hub"))
			return -EBUSY;
		usb_driver_release_interface(to_usb_driver(intf->dev.driver), intf);
		set_bit(number, d->taken);
	}
	error = usb_driver_claim_interface(&ak_usb_driver, intf, d);
	if (error)
		return error;
	set_bit(number, d->claimed);
	ak_usb_learn(d, intf);
	return 0;
}

static void ak_usb_give_back(struct ak_usb *d, u8 number)
{
	struct usb_interface *intf;

	spin_lock_irq(&ak_usb_lock);
	ak_usb_forget_endpoints(d, number + 1);
	spin_unlock_irq(&ak_usb_lock);
	ak_usb_kill(d, number + 1);
	usb_lock_device(d->udev);
	intf = test_bit(number, d->claimed) ? usb_ifnum_to_if(d->udev, number) : NULL;
	if (intf && ak_usb_ours(intf)) {
		usb_driver_release_interface(&ak_usb_driver, intf);
		if (test_and_clear_bit(number, d->taken) && !ak_usb_gone(d) && !intf->dev.driver)
			/* Fails if the driver is not there any more. */
			(void)!device_attach(&intf->dev);
	}
	usb_unlock_device(d->udev);
}

int ak_usb_claim(u64 id, u32 interface)
{
	struct ak_usb *d;
	int error;

	ak_check_alive();
	d = ak_usb_find(id, true);
	if (!d)
		return -ENOENT;
	usb_lock_device(d->udev);
	error = interface > U8_MAX ? -EINVAL : ak_usb_take(d, interface);
	usb_unlock_device(d->udev);
	ak_usb_put(d);
	return error;
}

void ak_usb_release(u64 id, u32 interface)
{
	struct ak_usb *d;

	ak_check_alive();
	d = ak_usb_find(id, true);
	if (!d)
		return;
	if (interface <= U8_MAX)
		ak_usb_give_back(d, interface);
	ak_usb_put(d);
}

int ak_usb_set_alternate(u64 id, u32 interface, u32 alternate)
{
	struct usb_interface *intf;
	struct ak_usb *d;
	int error;

	ak_check_alive();
	d = ak_usb_find(id, true);
	if (!d)
		return -ENOENT;
	usb_lock_device(d->udev);
	if (ak_usb_gone(d)) {
		error = -ENODEV;
	} else if (interface > U8_MAX || !test_bit(interface, d->claimed)) {
		error = -EINVAL;
	} else {
		error = usb_set_interface(d->udev, interface, alternate);
		intf = usb_ifnum_to_if(d->udev, interface);
		if (intf)
			ak_usb_learn(d, intf);
	}
	usb_unlock_device(d->udev);
	ak_usb_put(d);
	return error;
}

int ak_usb_clear_halt(u64 id, u32 endpoint)
{
	u8 number = endpoint & 15, in = endpoint & USB_DIR_IN;
	struct ak_usb *d;
	int error;
	bool known;

	ak_check_alive();
	d = ak_usb_find(id, true);
	if (!d)
		return -ENOENT;
	spin_lock_irq(&ak_usb_lock);
	known = d->endpoints[number + (in ? 16 : 0)].owner && !(endpoint & ~0x8f);
	spin_unlock_irq(&ak_usb_lock);
	if (ak_usb_gone(d))
		error = -ENODEV;
	else if (!known)
		error = -EINVAL;
	else
		error = usb_clear_halt(d->udev, in ? usb_rcvbulkpipe(d->udev, number) : usb_sndbulkpipe(d->udev, number));
	ak_usb_put(d);
	return error;
}

/* ---- devices ---- */

int ak_usb_configure(u64 id, u32 value)
{
	struct usb_host_config *now;
	struct ak_usb *d;
	int error;

	ak_check_alive();
	d = ak_usb_find(id, true);
	if (!d)
		return -ENOENT;
	usb_lock_device(d->udev);
	now = d->udev->actconfig;
	if (ak_usb_gone(d))
		error = -ENODEV;
	else if (!bitmap_empty(d->claimed, 256))
		error = -EBUSY;
	else if ((now ? now->desc.bConfigurationValue : 0) == value)
		error = 0;
	else
		error = usb_set_configuration(d->udev, value ?: -1);
	usb_unlock_device(d->udev);
	ak_usb_put(d);
	return error;
}

int ak_usb_reset(u64 id)
{
	struct usb_interface *intf;
	struct ak_usb *d;
	unsigned int number;
	int error;

	ak_check_alive();
	d = ak_usb_find(id, true);
	if (!d)
		return -ENOENT;
	ak_usb_kill(d, 0);
	usb_lock_device(d->udev);
	error = ak_usb_gone(d) ? -ENODEV : usb_reset_device(d->udev);
	/* Linux brings alternate settings back, too; the contract does not. */
	for_each_set_bit(number, d->claimed, 256) {
		intf = error ? NULL : usb_ifnum_to_if(d->udev, number);
		if (intf && intf->cur_altsetting->desc.bAlternateSetting)
			error = usb_set_interface(d->udev, number, 0);
		if (intf)
			ak_usb_learn(d, intf);
	}
	usb_unlock_device(d->udev);
	ak_usb_put(d);
	return error;
}

ssize_t ak_usb_descriptors(u64 id, void *buf, size_t len)
{
	struct usb_device *udev;
	struct ak_usb *d;
	ssize_t size;
	int i;

	ak_check_alive();
	d = ak_usb_find(id, false);
	if (!d)
		return -ENOENT;
	udev = d->udev;
	usb_lock_device(udev);
	size = sizeof(udev->descriptor);
	for (i = 0; udev->config && udev->rawdescriptors && i < udev->descriptor.bNumConfigurations; i++)
		size += le16_to_cpu(udev->config[i].desc.wTotalLength);
	if (ak_usb_gone(d)) {
		size = -ENODEV;
	} else if (size > len) {
		size = -EOVERFLOW;
	} else {
		memcpy(buf, &udev->descriptor, sizeof(udev->descriptor));
		buf += sizeof(udev->descriptor);
		for (i = 0; udev->config && udev->rawdescriptors && i < udev->descriptor.bNumConfigurations; i++) {
			u16 total = le16_to_cpu(udev->config[i].desc.wTotalLength);

			if (udev->rawdescriptors[i])
				memcpy(buf, udev->rawdescriptors[i], total);
			buf += total;
		}
	}
	usb_unlock_device(udev);
	ak_usb_put(d);
	return size;
}

int ak_usb_open(u64 id, const void *signal)
{
	struct ak_usb *d;
	int error = 0;

	ak_check_alive();
	d = ak_usb_find(id, false);
	if (!d)
		return -ENOENT;
	spin_lock_irq(&ak_usb_lock);
	if (d->gone) {
		error = -ENODEV;
	} else if (d->open) {
		error = -EBUSY;
	} else {
		d->open = true;
		d->signal = signal;
	}
	spin_unlock_irq(&ak_usb_lock);
	if (!error) {
		/* What does not wake up shows in its transfers. */
		pm_runtime_get_sync(&d->udev->dev);
		return 0;	/* the reference is given up with ak_usb_close() */
	}
	ak_usb_put(d);
	return error;
}

/* Context: the domain's thread, or, if that is dead, rmmod. */
static void ak_usb_stop_using(struct ak_usb *d)
{
	unsigned int number;

	ak_usb_kill(d, 0);
	for_each_set_bit(number, d->claimed, 256)
		ak_usb_give_back(d, number);
	ak_usb_kill(d, 0);
	pm_runtime_mark_last_busy(&d->udev->dev);
	pm_runtime_put_sync_autosuspend(&d->udev->dev);
}

int ak_usb_shut(u64 id)
{
	struct ak_usb *d;
	bool first;

	ak_check_alive();
	d = ak_usb_find(id, true);
	if (!d)
		return -ENOENT;
	spin_lock_irq(&ak_usb_lock);
	first = !d->shut;
	d->shut = true;
	spin_unlock_irq(&ak_usb_lock);
	if (first)
		ak_usb_stop_using(d);
	ak_usb_put(d);
	return first ? 0 : -ENOENT;
}

const void *ak_usb_close(u64 id)
{
	struct ak_usb *d = ak_usb_find(id, false);
	const void *signal;
	LIST_HEAD(flights);
	bool gone;

	if (!d)
		return NULL;
	spin_lock_irq(&ak_usb_lock);
	signal = d->signal;
	d->signal = NULL;
	list_splice_init(&d->over, &flights);
	list_splice_init(&d->spare, &flights);
	spin_unlock_irq(&ak_usb_lock);
	/* From now on it can be opened anew. */
	ak_flights_free(&flights);
	spin_lock_irq(&ak_usb_lock);
	d->flights = 0;
	d->open = d->shut = false;
	bitmap_zero(d->taken, 256);
	gone = d->gone;
	if (gone)
		list_del(&d->node);
	spin_unlock_irq(&ak_usb_lock);
	if (gone)
		ak_usb_put(d);	/* the list's */
	ak_usb_put(d);	/* ak_usb_open()'s */
	ak_usb_put(d);
	return signal;
}

size_t ak_usb_list(struct ak_usb_info *list, size_t room)
{
	struct usb_host_config *now;
	struct ak_usb *d;
	size_t count = 0;

	spin_lock_irq(&ak_usb_lock);
	list_for_each_entry(d, &ak_usb_devices, node) {
		if (ak_usb_gone(d))
			continue;
		if (count < room) {
			list[count] = d->info;
			now = READ_ONCE(d->udev->actconfig);
			list[count].configuration = now ? now->desc.bConfigurationValue : 0;
		}
		count++;
	}
	spin_unlock_irq(&ak_usb_lock);
	return count;
}

const void *ak_usb_watch(const void *signal)
{
	const void *old;

	spin_lock_irq(&ak_usb_lock);
	old = ak_usb_watcher;
	ak_usb_watcher = signal;
	spin_unlock_irq(&ak_usb_lock);
	return old;
}

/* ---- start and end ---- */

u32 ak_usb_present(void)
{
	return 1;
}

static DEFINE_MUTEX(ak_usb_starting);
static bool ak_usb_started;

int ak_usb_start(void)
{
	int error = 0;

	ak_check_alive();
	mutex_lock(&ak_usb_starting);
	if (!ak_usb_started) {
		error = usb_register(&ak_usb_driver);
		if (!error) {
			ak_usb_started = true;
			usb_register_notify(&ak_usb_notifier);
			usb_for_each_dev(NULL, ak_usb_meet);
		}
	}
	mutex_unlock(&ak_usb_starting);
	return error;
}

void ak_usb_end(void)
{
	struct ak_usb *d, *next;

	if (!ak_usb_started)
		return;
	usb_unregister_notify(&ak_usb_notifier);
	/* What a domain that died has left open. Nobody else uses the list any more. */
	list_for_each_entry_safe(d, next, &ak_usb_devices, node) {
		if (d->open) {
			if (!d->shut)
				ak_usb_stop_using(d);
			ak_usb_close(d->info.id);
		}
	}
	usb_deregister(&ak_usb_driver);
	list_for_each_entry_safe(d, next, &ak_usb_devices, node) {
		list_del(&d->node);
		ak_usb_put(d);
	}
	if (atomic_read(&ak_usb_held))
		pr_warn("left behind: %d USB devices and transfers\n", atomic_read(&ak_usb_held));
}

#else /* CONFIG_USB: this kernel has no USB */

u32 ak_usb_present(void)
{
	return 0;
}

int ak_usb_start(void)
{
	return -EOPNOTSUPP;
}

void ak_usb_end(void)
{
}

const void *ak_usb_watch(const void *signal)
{
	return signal;
}

size_t ak_usb_list(struct ak_usb_info *list, size_t room)
{
	return 0;
}

ssize_t ak_usb_descriptors(u64 id, void *buf, size_t len)
{
	return -ENOENT;
}

int ak_usb_open(u64 id, const void *signal)
{
	return -ENOENT;
}

int ak_usb_shut(u64 id)
{
	return -ENOENT;
}

const void *ak_usb_close(u64 id)
{
	return NULL;
}

int ak_usb_configure(u64 id, u32 value)
{
	return -ENOENT;
}

int ak_usb_claim(u64 id, u32 interface)
{
	return -ENOENT;
}

void ak_usb_release(u64 id, u32 interface)
{
}

int ak_usb_set_alternate(u64 id, u32 interface, u32 alternate)
{
	return -ENOENT;
}

int ak_usb_clear_halt(u64 id, u32 endpoint)
{
	return -ENOENT;
}

int ak_usb_reset(u64 id)
{
	return -ENOENT;
}

int ak_usb_submit(u64 id, const struct ak_usb_transfer *transfer)
{
	return -ENOENT;
}

void ak_usb_cancel(u64 id, u64 tag)
{
}

void *ak_usb_reap(u64 id, struct ak_usb_over *over)
{
	return NULL;
}

#endif
