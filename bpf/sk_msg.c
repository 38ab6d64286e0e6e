/* sk_msg.c - on `sockets`: each message of a socket in it goes natively, or straight into the receiver's socket.
 *
 * Runs under the sender's socket lock. Native is always right; redirecting is right only if it keeps order and
 * bounds. ARCHITECTURE.md gives the argument; decide_redirect() is the decision. Never refuses a message.
 */

static __always_inline int go_native(struct flow_end *mine, __u64 now)
{
	if (mine->state == FLOW_REDIRECT) {
		mine->state = FLOW_NATIVE;
		mine->switches += 1;
	}
	mine->last_native_ns = now;
	return SK_PASS;
}

/* If the receiver consumed all, what is redirected now is queued after the call that read the last of it: both need its
 * lock. Whoever has that now would have to be waited for. */
static __always_inline int is_native_gone(struct flow_end *mine, const struct flow_end *peer)
{
	struct progress tcp = {};

	tcp.written = read32(mine->sock, OFF_TCP_WRITE_SEQ);
	tcp.consumed = read32(peer->sock, OFF_TCP_COPIED_SEQ);
	if (tcp.consumed != tcp.written)
		return 0;
	tcp.reading = read32(peer->sock, OFF_SOCK_OWNED) != 0;
	tcp.seen = peer->seen_seq;
	tcp.numbered = (mine->flags & END_NUMBERED) != 0;
	if (!tcp.numbered) {
		tcp.acknowledged = read32(mine->sock, OFF_TCP_SND_UNA);
		tcp.arrived = read32(peer->sock, OFF_TCP_RCV_NXT);
		if (is_numbered(&tcp))
			__sync_fetch_and_add(&mine->flags, END_NUMBERED);
	}
	return native_is_gone(&tcp);
}

int sk_msg(struct sk_msg_md *ctx)
{
	struct tuple_key own = msg_tuple(ctx);
	struct tuple_key theirs = other_end(&own);
	struct redirection seen = {};
	struct receiver receiver = {};
	struct settings_value *now = current_settings();
	struct flow_value *flow;
	struct flow_end *mine, *peer;
	__u64 sender = msg_sock(ctx);
	int file, serving;

	/* The server has the smaller port nearly always. */
	serving = own.local_port < own.remote_port;
	flow = serving ? flows.lookup(&own) : flows.lookup(&theirs);
	if (!flow) {
		serving = !serving;
		flow = serving ? flows.lookup(&own) : flows.lookup(&theirs);
	}
	if (!flow || !now || !sender)
		return SK_PASS;
	mine = serving ? &flow->server : &flow->client;
	peer = serving ? &flow->client : &flow->server;
	/* A socket that was disconnected stays in the sockhash, and in another namespace may have these addresses too: what
	 * is written of a flow is written by its own two sockets. */
	if (mine->sock != sender || !sock_is(sender, mine->cookie))
		return SK_PASS;
	seen.now_ns = bpf_ktime_get_ns();
	if (!(now->acceleration & CAN_REDIRECT) || (now->acceleration & DRAINING) ||
	    mine->state == FLOW_BLOCKING || peer->state == FLOW_BLOCKING ||
	    !(mine->sighting & END_INSERTED) || !(peer->sighting & END_INSERTED) || !msg_may_send(ctx) ||
	    (peer->flags & END_CLOSED) || sock_zerocopy(sender))
		return go_native(mine, seen.now_ns);

	read_receiver(peer->sock, &receiver);
	file = receiver_file(&receiver);
	seen.edge = receiver_waits(&receiver) == WAITS_SHORT;
	seen.size = msg_size(ctx);
	seen.state = mine->state;
	seen.last_native_ns = mine->last_native_ns;
	seen.receiver_ready = file == FILE_NONBLOCKING;
	seen.rmem = receiver.rmem;
	seen.forward = receiver.forward;
	seen.high = redirect_high(now->high_bytes, receiver.rcvbuf);
	if (seen.state == FLOW_NATIVE)
		seen.native_gone = is_native_gone(mine, peer);
	else
		seen.native_gone = read32(sender, OFF_TCP_WRITE_SEQ) == peer->seen_seq;
	if (seen.forward < (__s32)seen.size)
		seen.pressed = sock_pressed(peer->sock, seen.size);
	/* Only now is what was read known to be the receiver's. */
	if (!sock_is(peer->sock, peer->cookie))
		return go_native(mine, seen.now_ns);
	if (file == FILE_BLOCKS) {
		go_native(mine, seen.now_ns);
		mine->state = FLOW_BLOCKING;
		count(REASON_REDIRECT_BLOCKING);
		return SK_PASS;
	}
	if (!seen.rmem)
		mine->queued_messages = 0;
	seen.queued_messages = mine->queued_messages;
	if (!decide_redirect(&seen)) {
		if (seen.state == FLOW_REDIRECT && redirect_full(&seen))
			count(REASON_REDIRECT_HIGH);
		if (seen.pressed)
			count(REASON_REDIRECT_PRESSED);
		if (seen.edge)
			count(REASON_REDIRECT_EDGE);
		return go_native(mine, seen.now_ns);
	}
	if (sockets.msg_redirect_hash(ctx, &theirs, BPF_F_INGRESS) != SK_PASS)
		return go_native(mine, seen.now_ns);
	if (seen.state == FLOW_NATIVE) {
		peer->seen_seq = read32(sender, OFF_TCP_WRITE_SEQ);
		mine->state = FLOW_REDIRECT;
		mine->switches += 1;
	}
	mine->queued_messages += 1;
	mine->redirect_messages += 1;
	mine->redirect_bytes += seen.size;
	return SK_PASS;
}
