/* redirect.h - what the helpers do not tell of a socket, read from the kernel's own structures.
 *
 * OFF_* are offsets in bytes of the running kernel, taken from its BTF by the loader (ambient/io/btf.py) and never from
 * headers; without them REDIRECT_OFFSETS is 0 and nothing is read. A pointer from `flows` counts only while the
 * socket's skc_cookie is the one kept beside it. struct sock is type-stable under RCU, where programs run: memory read
 * before a check that succeeds belonged to that very socket, because cookies are never used again.
 */
#ifndef AMBIENT_REDIRECT_H
#define AMBIENT_REDIRECT_H

#include "compat.h"

#define FILE_NONBLOCK 04000 /* O_NONBLOCK of asm-generic: x86, arm64, riscv, s390, powerpc */
#define STATE_ESTABLISHED 1
#define LOOK_NS 20000000ull /* between looks at a socket that was looked at LOOKS_AT_ONCE times */
#define LOOKS_AT_ONCE 64
#define LOOKS_MAX 1024 /* then the flow stays native for good */

static __always_inline __u32 read32(__u64 base, __u32 offset)
{
	__u32 value = 0;

	bpf_probe_read_kernel(&value, sizeof(value), (void *)(base + offset));
	return value;
}

static __always_inline __u64 read64(__u64 base, __u32 offset)
{
	__u64 value = 0;

	bpf_probe_read_kernel(&value, sizeof(value), (void *)(base + offset));
	return value;
}

/* Fields that lie near each other are read at once: a call of the helper costs more than the bytes between. NEAR_MAX
 * bounds the stack; where a kernel has them farther apart each is read by itself. */
#define NEAR_MAX 200
#define LOWER(a, b) ((a) < (b) ? (a) : (b))
#define HIGHER(a, b) ((a) > (b) ? (a) : (b))

/* Two words of 8 and of `size` bytes. */
static __always_inline void read_two(__u64 base, __u32 first, __u64 *word, __u32 second, void *other, __u32 size)
{
	__u32 low = LOWER(first, second), span = HIGHER(first + 8, second + size) - low;

	if (span <= 64) {
		__u8 near[64];

		bpf_probe_read_kernel(near, span, (void *)(base + low));
		__builtin_memcpy(word, near + first - low, 8);
		__builtin_memcpy(other, near + second - low, size);
	} else {
		*word = read64(base, first);
		bpf_probe_read_kernel(other, size, (void *)(base + second));
	}
}

/* A socket pointer as a number: the verifier allows no arithmetic on the pointer itself. */
static __always_inline __u64 sock_address(struct bpf_sock *sk)
{
	__u64 number = 0;

	bpf_probe_read_kernel(&number, sizeof(number), &sk);
	return number;
}

static __always_inline int sock_is(__u64 sock, __u64 cookie)
{
	return sock && cookie && read64(sock, OFF_SOCK_COOKIE) == cookie;
}

#define MEMCG_PAGES 64 /* charged at a time at least */

#define FILE_NONE 0
#define FILE_BLOCKS 1
#define FILE_NONBLOCKING 2

/* What is asked of a receiver for each message. */
struct receiver {
	__u64 file;    /* 0 before accept() and after close() */
	__u64 queue;   /* of those who wait for it */
	__u32 rmem;
	__u32 rcvbuf;
	__s32 forward;
};

#define RECEIVER_LOW \
	LOWER(LOWER(LOWER(OFF_SOCK_RMEM, OFF_SOCK_RCVBUF), LOWER(OFF_SOCK_WQ, OFF_SOCK_SOCKET)), OFF_SOCK_FORWARD)
#define RECEIVER_HIGH \
	HIGHER(HIGHER(HIGHER(OFF_SOCK_RMEM, OFF_SOCK_RCVBUF) + 4, HIGHER(OFF_SOCK_WQ, OFF_SOCK_SOCKET) + 8), OFF_SOCK_FORWARD + 4)
#define RECEIVER_SPAN (RECEIVER_HIGH - RECEIVER_LOW)

static __always_inline void read_receiver(__u64 sock, struct receiver *out)
{
	__u64 sk_socket = 0;

	if (RECEIVER_SPAN <= NEAR_MAX) {
		__u8 near[NEAR_MAX];

		bpf_probe_read_kernel(near, RECEIVER_SPAN, (void *)(sock + RECEIVER_LOW));
		__builtin_memcpy(&sk_socket, near + OFF_SOCK_SOCKET - RECEIVER_LOW, 8);
		__builtin_memcpy(&out->queue, near + OFF_SOCK_WQ - RECEIVER_LOW, 8);
		__builtin_memcpy(&out->rmem, near + OFF_SOCK_RMEM - RECEIVER_LOW, 4);
		__builtin_memcpy(&out->rcvbuf, near + OFF_SOCK_RCVBUF - RECEIVER_LOW, 4);
		__builtin_memcpy(&out->forward, near + OFF_SOCK_FORWARD - RECEIVER_LOW, 4);
	} else {
		sk_socket = read64(sock, OFF_SOCK_SOCKET);
		out->queue = read64(sock, OFF_SOCK_WQ);
		out->rmem = read32(sock, OFF_SOCK_RMEM);
		out->rcvbuf = read32(sock, OFF_SOCK_RCVBUF);
		out->forward = read32(sock, OFF_SOCK_FORWARD);
	}
	out->file = sk_socket ? read64(sk_socket, OFF_SOCKET_FILE) : 0;
}

/* How the application's descriptor is set. */
static __always_inline int receiver_file(const struct receiver *socket)
{
	if (!socket->file)
		return FILE_NONE;
	return read32(socket->file, OFF_FILE_FLAGS) & FILE_NONBLOCK ? FILE_NONBLOCKING : FILE_BLOCKS;
}

static __always_inline int sock_zerocopy(__u64 sock)
{
	return (read64(sock, OFF_SOCK_FLAGS) >> SOCK_FLAG_ZEROCOPY) & 1;
}

#define EPOLL_IN 1u
#define EPOLL_RDHUP 0x2000u
#define EPOLL_EDGE 0x80000000u
#define WAITERS_MAX 4
#define WAITS_INPUT 1 /* somebody waits for input as often as there is some */
#define WAITS_SHORT 2 /* somebody may take a short read for more than it says */

/* Who waits for the socket. By edges a short read means that it is empty, and with RDHUP (HAProxy) that it has ended;
 * with native bytes behind redirected ones both is wrong. A waiter of another kind (poll, select) is no eppoll_entry: what is
 * read of it means nothing, and it counts as epoll's only if it leads to the socket's own file. */
static __always_inline int receiver_waits(const struct receiver *socket)
{
	__u64 queue = socket->queue, async = 0, head, node = 0;
	int found = 0;

	if (!queue)
		return WAITS_SHORT;
	read_two(queue, OFF_WQ_ASYNC, &async, OFF_WQ_HEAD, &node, sizeof(node));
	if (async)
		return WAITS_SHORT;
	head = queue + OFF_WQ_HEAD;
#pragma unroll
	for (int index = 0; index < WAITERS_MAX; index++) {
		__u64 item = 0, next = 0, file = 0;
		__u32 events = 0;

		if (!node || node == head)
			return found;
		read_two(node - OFF_EPOLL_ENTRY, OFF_EPOLL_BASE, &item, OFF_EPOLL_ENTRY, &next, sizeof(next));
		read_two(item, OFF_EPITEM_FILE, &file, OFF_EPITEM_EVENTS, &events, sizeof(events));
		if (file != socket->file)
			events = EPOLL_IN;
		if (events & (EPOLL_EDGE | EPOLL_RDHUP))
			return WAITS_SHORT;
		if (events & EPOLL_IN)
			found = WAITS_INPUT;
		node = next;
	}
	return node != head ? WAITS_SHORT : found;
}

#ifdef OFF_MEMCG_MEMORY
#define MEMCG_LEVELS_MAX 16

/* Whether a charge would leave less than an eighth of memory.max of a v2 group or of one above it. A charge beyond the
 * limit is not just refused: the kernel looks for a process of the group to kill first, which native bytes that arrive
 * never make it do. The eighth is for what the group's own processes do. */
static __always_inline int memcg_is_full(__u64 group, __u64 pages)
{
	__u64 limit, counter = group + OFF_MEMCG_MEMORY;

#pragma unroll
	for (int level = 0; level < MEMCG_LEVELS_MAX; level++) {
		if (!counter)
			return 0;
		limit = read64(counter, OFF_COUNTER_MAX);
		if (read64(counter, OFF_COUNTER_USAGE) + pages > limit - limit / 8)
			return 1;
		counter = read64(counter, OFF_COUNTER_PARENT);
	}
	return counter != 0;
}
#endif

/* Whether memory for a socket may be refused: the protocol's limits, or those of its cgroup. */
static __always_inline int sock_pressed(__u64 sock, __u32 size)
{
	__u64 counter, prot = read64(sock, OFF_SOCK_PROT);

	counter = read64(prot, OFF_PROTO_PRESSURE);
	if (counter && read64(counter, 0))
		return 1;
#ifdef OFF_MEMCG_PRESSURE
	{
		__u64 group = read64(sock, OFF_SOCK_MEMCG), pages = MEMCG_PAGES + size / 4096;

		if (!group)
			return 0;
		if ((__s64)(read64(group, OFF_MEMCG_PRESSURE) - bpf_jiffies64()) > 0)
			return 1;
#ifdef OFF_MEMCG_MEMORY
		if (memcg_is_full(group, pages))
			return 1;
#endif
#ifdef OFF_MEMCG_TCP_PRESSURE
		if (read32(group, OFF_MEMCG_TCP_PRESSURE))
			return 1;
		/* The first charge beyond a v1 limit fails before it says so. */
		if (read32(group, OFF_MEMCG_TCP_ACTIVE) & 0xff &&
		    read64(group, OFF_MEMCG_TCP_USAGE) + pages > read64(group, OFF_MEMCG_TCP_MAX))
			return 1;
#endif
	}
#endif
	return 0;
}

static __always_inline __u64 msg_sock(struct sk_msg_md *ctx)
{
	return ctx->sk ? sock_address(ctx->sk) : 0;
}

/* Whether TCP would take the message: after its FIN, a reset or an abort it refuses, which redirection would not. */
static __always_inline int msg_may_send(struct sk_msg_md *ctx)
{
	__u32 state = ctx->sk ? ctx->sk->state : 0;

	return state == STATE_ESTABLISHED || state == STATE_CLOSE_WAIT;
}

static __always_inline __u32 msg_size(struct sk_msg_md *ctx)
{
	return ctx->size;
}

/* The state of a socket the tc program found. */
static __always_inline __u32 found_state(struct bpf_sock *sk)
{
	return sk->state;
}

#define ETHERNET_BYTES 14
#define IP4_BYTES 20
#define IP6_BYTES 40
#define ETHERTYPE_IP4 0x0800
#define ETHERTYPE_IP6 0x86dd

static __always_inline __u16 half_at(const __u8 *bytes)
{
	return *(const __u16 *)bytes;
}

static __always_inline __u32 word_at(const __u8 *bytes)
{
	return *(const __u32 *)bytes;
}

/* Both forms of the addresses of a TCP packet that arrives; the length of the second, 0 if it is not one. With options or
 * extension headers, or with headers outside the linear part, it is left alone: such a flow stays native. */
static __always_inline __u32 packet_tuple(struct __sk_buff *skb, struct tuple_key *key, struct bpf_sock_tuple *tuple)
{
	const __u8 *ip = (const __u8 *)(long)skb->data + ETHERNET_BYTES, *end = (const __u8 *)(long)skb->data_end, *tcp;
	__u32 protocol = swap16((__u16)skb->protocol), length;

	if (protocol == ETHERTYPE_IP4) {
		tcp = ip + IP4_BYTES;
		if (tcp + 4 > end || ip[0] != 0x45 || ip[9] != PROTOCOL_TCP)
			return 0;
		tuple->ipv4.saddr = word_at(ip + 12);
		tuple->ipv4.daddr = word_at(ip + 16);
		tuple->ipv4.sport = half_at(tcp);
		tuple->ipv4.dport = half_at(tcp + 2);
		key->remote = address_of4(tuple->ipv4.saddr);
		key->local = address_of4(tuple->ipv4.daddr);
		length = sizeof(tuple->ipv4);
	} else if (protocol == ETHERTYPE_IP6) {
		tcp = ip + IP6_BYTES;
		if (tcp + 4 > end || ip[6] != PROTOCOL_TCP)
			return 0;
		for (int word = 0; word < 4; word++) {
			tuple->ipv6.saddr[word] = word_at(ip + 8 + 4 * word);
			tuple->ipv6.daddr[word] = word_at(ip + 24 + 4 * word);
		}
		tuple->ipv6.sport = half_at(tcp);
		tuple->ipv6.dport = half_at(tcp + 2);
		key->remote = address_of6(tuple->ipv6.saddr[0], tuple->ipv6.saddr[1], tuple->ipv6.saddr[2], tuple->ipv6.saddr[3]);
		key->local = address_of6(tuple->ipv6.daddr[0], tuple->ipv6.daddr[1], tuple->ipv6.daddr[2], tuple->ipv6.daddr[3]);
		length = sizeof(tuple->ipv6);
	} else {
		return 0;
	}
	key->remote_port = swap16(half_at(tcp));
	key->local_port = swap16(half_at(tcp + 2));
	return length;
}

static __always_inline struct bpf_sock *sockopt_sock(struct bpf_sockopt *ctx)
{
	return ctx->sk;
}

#endif
