/* compat.h - byte order and context access, each quirk with its reason. No map access, no decisions.
 *
 * bcc rewrites pointer dereferences in the main text of a program (it would make `sk->family` a
 * probe_read, which cgroup programs may not call) but not in headers: so contexts and sockets are read here.
 */
#ifndef AMBIENT_COMPAT_H
#define AMBIENT_COMPAT_H

#include "decide.h"

#define FAMILY_INET 2
#define FAMILY_INET6 10
#define PROTOCOL_TCP 6
#define PROTOCOL_UDP 17
/* enum of include/net/tcp_states.h */
#define STATE_FIN_WAIT2 5
#define STATE_TIME_WAIT 6
#define STATE_CLOSE 7
#define STATE_CLOSE_WAIT 8
#define STATE_LAST_ACK 9
#define STATE_CLOSING 11

/* Each word of a context is read by itself: merged into wider reads by the compiler, the verifier refuses them. */
#define WORD(field) (*(volatile __u32 *)&(field))

/* bpf_sock_addr.user_port: network order in the low 16 bits of a word. */
static __always_inline __u16 sockaddr_port(struct bpf_sock_addr *ctx)
{
	return swap16((__u16)ctx->user_port);
}

static __always_inline struct address sockaddr_target4(struct bpf_sock_addr *ctx)
{
	return address_of4(ctx->user_ip4);
}

static __always_inline struct address sockaddr_target6(struct bpf_sock_addr *ctx)
{
	return address_of6(WORD(ctx->user_ip6[0]), WORD(ctx->user_ip6[1]), WORD(ctx->user_ip6[2]), WORD(ctx->user_ip6[3]));
}

static __always_inline void sockaddr_set4(struct bpf_sock_addr *ctx, const struct address *target, __u16 port)
{
	ctx->user_ip4 = address_word(target, 3);
	ctx->user_port = swap16(port);
}

static __always_inline void sockaddr_set6(struct bpf_sock_addr *ctx, const struct address *target, __u16 port)
{
	ctx->user_ip6[0] = address_word(target, 0);
	ctx->user_ip6[1] = address_word(target, 1);
	ctx->user_ip6[2] = address_word(target, 2);
	ctx->user_ip6[3] = address_word(target, 3);
	ctx->user_port = swap16(port);
}

/* The local address of a socket before or after connect: :: while unbound. */
static __always_inline struct address sock_source(struct bpf_sock *sk)
{
	if (sk->family == FAMILY_INET6)
		return address_of6(WORD(sk->src_ip6[0]), WORD(sk->src_ip6[1]), WORD(sk->src_ip6[2]), WORD(sk->src_ip6[3]));
	return address_of4(sk->src_ip4);
}

/* Host order; 0 while unbound. */
static __always_inline __u16 sock_source_port(struct bpf_sock *sk)
{
	return sk->src_port;
}

static __always_inline struct bpf_sock *sockaddr_sock(struct bpf_sock_addr *ctx)
{
	return ctx->sk;
}

static __always_inline struct bpf_sock *sockops_sock(struct bpf_sock_ops *ctx)
{
	return ctx->sk;
}

/* One end of a connection, `local` or `remote`, of a bpf_sock_ops, sk_msg_md or bpf_sk_lookup: their fields have the same
 * names. A dual-stack socket reports mapped addresses in the IPv6 ones. */
#define END_ADDRESS(ctx, end) \
	((ctx)->family == FAMILY_INET6 ? address_of6(WORD((ctx)->end##_ip6[0]), WORD((ctx)->end##_ip6[1]), \
						     WORD((ctx)->end##_ip6[2]), WORD((ctx)->end##_ip6[3])) \
				       : address_of4((ctx)->end##_ip4))

static __always_inline struct tuple_key tuple_of(struct address local, struct address remote, __u16 local_port, __u16 remote_port)
{
	struct tuple_key key = {};

	key.local = local;
	key.remote = remote;
	key.local_port = local_port;
	key.remote_port = remote_port;
	return key;
}

/* bpf_sock_ops and sk_msg_md: local_port is host order, remote_port network order in the high half of a word. */
static __always_inline struct tuple_key sockops_tuple(struct bpf_sock_ops *ctx)
{
	return tuple_of(END_ADDRESS(ctx, local), END_ADDRESS(ctx, remote), ctx->local_port, (__u16)swap32(ctx->remote_port));
}

static __always_inline struct tuple_key msg_tuple(struct sk_msg_md *ctx)
{
	return tuple_of(END_ADDRESS(ctx, local), END_ADDRESS(ctx, remote), ctx->local_port, (__u16)swap32(ctx->remote_port));
}

/* bpf_sk_lookup: local_port is host order; remote_port is network order in a word whose width of access
 * changed in 5.18: the low half of a 4-byte read holds it in both. */
static __always_inline struct tuple_key lookup_tuple(struct bpf_sk_lookup *ctx)
{
	return tuple_of(END_ADDRESS(ctx, local), END_ADDRESS(ctx, remote), ctx->local_port, swap16((__u16)ctx->remote_port));
}

#endif
