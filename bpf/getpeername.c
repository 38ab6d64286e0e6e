/* getpeername.c - cgroup/getpeername4 and 6 at the pods' cgroup: the peer the application believes in.
 *
 * On a connection it made: the address it dialled, not ztunnel's listener or an endpoint. On one that ztunnel delivered: the true
 * client. accept() takes its address from here too. Never fails: without a record the kernel's answer stands.
 */

static __always_inline int shown_peer(struct bpf_sock_addr *ctx, const struct address *peer, struct address *shown,
				      __u16 *port)
{
	struct tuple_key key = {};
	struct origin_value *origin;
	struct pending_value *made = pending.sk_storage_get(ctx->sk, 0, 0);

	if (made && made->remote_port == sockaddr_port(ctx) && address_equal(&made->remote, peer)) {
		*shown = made->original;
		*port = made->original_port;
		return 1;
	}
	key.local = sock_source(sockaddr_sock(ctx));
	key.local_port = sock_source_port(sockaddr_sock(ctx));
	key.remote = *peer;
	key.remote_port = sockaddr_port(ctx);
	origin = origins.lookup(&key);
	if (!origin || !is_here(origin->netns, bpf_get_netns_cookie(ctx)))
		return 0;
	*shown = origin->client;
	*port = origin->client_port;
	return 1;
}

int getpeername4(struct bpf_sock_addr *ctx)
{
	struct address peer = sockaddr_target4(ctx);
	struct address shown = {};
	__u16 port = 0;

	if (shown_peer(ctx, &peer, &shown, &port) && address_is4(&shown))
		sockaddr_set4(ctx, &shown, port);
	return LET;
}

int getpeername6(struct bpf_sock_addr *ctx)
{
	struct address peer = sockaddr_target6(ctx);
	struct address shown = {};
	__u16 port = 0;

	if (shown_peer(ctx, &peer, &shown, &port))
		sockaddr_set6(ctx, &shown, port);
	return LET;
}
