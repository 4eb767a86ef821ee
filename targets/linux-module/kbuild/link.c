// SPDX-License-Identifier: MIT OR GPL-2.0
/*
 * Links: a network interface of Linux each, whose other end is the domain's.
 *
 * Linux transmits in softirq context: the packet is only queued, and the domain's signal raised. What the domain sends
 * is queued too, and Linux takes it by NAPI, so that it is merged (GRO) and bounded.
 */
#include "shim.h"
#include <linux/etherdevice.h>
#include <linux/netdevice.h>
#include <linux/sched.h>
#include <linux/skbuff.h>
#include <linux/spinlock.h>

#define AK_LINKS_MAX 8
#define AK_QUEUE 1024	/* frames in each direction */
#define AK_EARLY 16	/* frames kept until the interface is up: the first DHCP request should not be lost */

struct ak_link {
	struct net_device *dev;
	struct napi_struct napi;
	struct sk_buff_head to_domain;	/* its lock guards `signal`, too */
	struct sk_buff_head to_linux;
	const void *signal;		/* NULL: closed */
	bool blocked;			/* the domain waits for room in to_linux */
	u8 mac[ETH_ALEN];		/* the domain's */
};

static struct ak_link *ak_links[AK_LINKS_MAX];
static u32 ak_links_count;

static netdev_tx_t ak_start_xmit(struct sk_buff *skb, struct net_device *dev)
{
	struct ak_link *link = netdev_priv(dev);
	unsigned int len = skb->len;
	unsigned long flags;

	skb_tx_timestamp(skb);
	skb_orphan(skb);
	nf_reset_ct(skb);
	spin_lock_irqsave(&link->to_domain.lock, flags);
	if (!link->signal) {
		spin_unlock_irqrestore(&link->to_domain.lock, flags);
		dev_core_stats_tx_dropped_inc(dev);
		kfree_skb(skb);
		return NETDEV_TX_OK;
	}
	__skb_queue_tail(&link->to_domain, skb);
	if (skb_queue_len(&link->to_domain) >= AK_QUEUE)
		netif_stop_queue(dev);
	ak_rust_raise(link->signal);
	spin_unlock_irqrestore(&link->to_domain.lock, flags);
	dev_sw_netstats_tx_add(dev, 1, len);
	return NETDEV_TX_OK;
}

/* Room for the domain to send. */
static void ak_unblock(struct ak_link *link)
{
	unsigned long flags;

	spin_lock_irqsave(&link->to_domain.lock, flags);
	if (link->blocked) {
		link->blocked = false;
		if (link->signal)
			ak_rust_raise(link->signal);
	}
	spin_unlock_irqrestore(&link->to_domain.lock, flags);
}

static int ak_poll(struct napi_struct *napi, int budget)
{
	struct ak_link *link = container_of(napi, struct ak_link, napi);
	struct sk_buff *skb;
	int done = 0;

	while (done < budget && (skb = skb_dequeue(&link->to_linux))) {
		napi_gro_receive(napi, skb);
		done++;
	}
	if (READ_ONCE(link->blocked) && skb_queue_len_lockless(&link->to_linux) < AK_QUEUE / 2)
		ak_unblock(link);
	if (done < budget && napi_complete_done(napi, done) && !skb_queue_empty_lockless(&link->to_linux))
		napi_schedule(napi);
	return done;
}

static int ak_open(struct net_device *dev)
{
	struct ak_link *link = netdev_priv(dev);

	napi_enable(&link->napi);
	netif_start_queue(dev);
	local_bh_disable();
	napi_schedule(&link->napi);
	local_bh_enable();
	return 0;
}

static int ak_stop(struct net_device *dev)
{
	struct ak_link *link = netdev_priv(dev);

	netif_stop_queue(dev);
	napi_disable(&link->napi);
	skb_queue_purge(&link->to_linux);
	skb_queue_purge(&link->to_domain);
	ak_unblock(link);
	return 0;
}

static const struct net_device_ops ak_netdev_ops = {
	.ndo_open = ak_open,
	.ndo_stop = ak_stop,
	.ndo_start_xmit = ak_start_xmit,
	.ndo_get_stats64 = dev_get_tstats64,
	.ndo_set_mac_address = eth_mac_addr,
	.ndo_validate_addr = eth_validate_addr,
};

u32 ak_link_count(void)
{
	return ak_links_count;
}

int ak_link_open(u32 index, const void *signal, struct ak_link_info *info)
{
	struct ak_link *link;
	int error = -EBUSY;

	ak_check_alive();
	if (index >= ak_links_count)
		return -ENOENT;
	link = ak_links[index];
	spin_lock_irq(&link->to_domain.lock);
	if (!link->signal) {
		link->signal = signal;
		error = 0;
	}
	spin_unlock_irq(&link->to_domain.lock);
	if (error)
		return error;
	memcpy(info->mac, link->mac, ETH_ALEN);
	info->mtu = link->dev->mtu;
	return 0;
}

const void *ak_link_close(u32 index)
{
	struct ak_link *link;
	const void *signal;

	if (index >= ak_links_count)
		return NULL;
	link = ak_links[index];
	spin_lock_irq(&link->to_domain.lock);
	signal = link->signal;
	link->signal = NULL;
	spin_unlock_irq(&link->to_domain.lock);
	skb_queue_purge(&link->to_domain);
	return signal;
}

int ak_link_send(u32 index, const void *frame, size_t len)
{
	struct ak_link *link;
	struct net_device *dev;
	struct sk_buff *skb;

	ak_check_alive();
	if (index >= ak_links_count)
		return -ENOENT;
	link = ak_links[index];
	dev = link->dev;
	if (len < ETH_HLEN || len > READ_ONCE(dev->mtu) + ETH_HLEN)
		return -EINVAL;
	if (!netif_running(dev) && skb_queue_len_lockless(&link->to_linux) >= AK_EARLY) {
		dev_core_stats_rx_dropped_inc(dev);
		return 0;
	}
	if (skb_queue_len_lockless(&link->to_linux) >= AK_QUEUE) {
		WRITE_ONCE(link->blocked, true);
		/* Pairs with the lock in ak_unblock(): either it sees the flag, or we the room. */
		smp_mb();
		if (skb_queue_len_lockless(&link->to_linux) >= AK_QUEUE / 2)
			return -EAGAIN;
	}
	skb = netdev_alloc_skb_ip_align(dev, len);
	if (!skb) {
		dev_core_stats_rx_dropped_inc(dev);
		return 0;
	}
	skb_put_data(skb, frame, len);
	skb->protocol = eth_type_trans(skb, dev);
	/* It comes from memory, as on the loopback interface. */
	skb->ip_summed = CHECKSUM_UNNECESSARY;
	dev_sw_netstats_rx_add(dev, len);
	skb_queue_tail(&link->to_linux, skb);
	if (netif_running(dev)) {
		local_bh_disable();
		napi_schedule(&link->napi);
		local_bh_enable();
	}
	cond_resched();
	return 0;
}

ssize_t ak_link_receive(u32 index, void *buf, size_t len)
{
	struct ak_link *link;
	struct sk_buff *skb;
	ssize_t size;

	ak_check_alive();
	if (index >= ak_links_count)
		return -ENOENT;
	link = ak_links[index];
	spin_lock_irq(&link->to_domain.lock);
	skb = __skb_dequeue(&link->to_domain);
	if (netif_queue_stopped(link->dev) && netif_running(link->dev) &&
	    skb_queue_len(&link->to_domain) < AK_QUEUE / 2)
		netif_wake_queue(link->dev);
	spin_unlock_irq(&link->to_domain.lock);
	if (!skb)
		return -EAGAIN;
	size = skb->len;
	if (size > len)
		size = -EOVERFLOW;
	else if (skb_copy_bits(skb, 0, buf, size))
		size = -EIO;
	if (size < 0)
		dev_core_stats_tx_dropped_inc(link->dev);
	consume_skb(skb);
	cond_resched();
	return size;
}

static int ak_link_register(u32 index, unsigned int mtu)
{
	struct net_device *dev = alloc_etherdev(sizeof(struct ak_link));
	struct ak_link *link;
	int error;

	if (!dev)
		return -ENOMEM;
	link = netdev_priv(dev);
	link->dev = dev;
	skb_queue_head_init(&link->to_domain);
	skb_queue_head_init(&link->to_linux);
	snprintf(dev->name, IFNAMSIZ, "ak%u", index);
	dev->netdev_ops = &ak_netdev_ops;
	dev->min_mtu = 576;
	dev->max_mtu = mtu;
	dev->mtu = mtu;
	eth_hw_addr_random(dev);
	eth_random_addr(link->mac);
	dev->tstats = netdev_alloc_pcpu_stats(struct pcpu_sw_netstats);
	if (!dev->tstats) {
		free_netdev(dev);
		return -ENOMEM;
	}
	netif_napi_add(dev, &link->napi, ak_poll);
	error = register_netdev(dev);
	if (error) {
		pr_err("interface %s cannot be registered: %pe\n", dev->name, ERR_PTR(error));
		netif_napi_del(&link->napi);
		free_percpu(dev->tstats);
		free_netdev(dev);
		return error;
	}
	ak_links[index] = link;
	return 0;
}

int ak_links_register(unsigned int count, unsigned int mtu)
{
	int error = 0;

	if (count > AK_LINKS_MAX || mtu < 576 || mtu > 65521) {
		pr_err("links must be 0 to %u, mtu 576 to 65521\n", AK_LINKS_MAX);
		return -EINVAL;
	}
	while (ak_links_count < count && !error) {
		error = ak_link_register(ak_links_count, mtu);
		if (!error)
			ak_links_count++;
	}
	return error;
}

void ak_links_unregister(void)
{
	while (ak_links_count) {
		struct ak_link *link = ak_links[--ak_links_count];
		struct net_device *dev = link->dev;

		/* A domain that died has not closed it; its threads are gone. */
		link->signal = NULL;
		unregister_netdev(dev);
		netif_napi_del(&link->napi);
		skb_queue_purge(&link->to_domain);
		skb_queue_purge(&link->to_linux);
		free_percpu(dev->tstats);
		free_netdev(dev);
	}
}
