/* enrol.c - tc ingress on the interface of a pod that wants `redirect`: puts its sockets into `sockets`.
 *
 * Only a socket whose application has read a native byte while its descriptor was O_NONBLOCK, as seen before and
 * after: a blocking recv() of a socket in a sockhash may fail with EAGAIN. And only if somebody was seen to wait for it
 * in a way that takes a short read for no more than it is; who never waits may begin to in another way. That is known
 * only after accept(), so not in sock_ops, and a packet that arrives is the next occasion. Never touches the packet.
 */

#define TC_NEXT -1 /* TC_ACT_UNSPEC and TCX_NEXT: what else is attached decides */

static __always_inline void look(struct __sk_buff *skb, struct tuple_key *key, struct flow_end *end,
				 const struct flow_end *other, struct bpf_sock_tuple *tuple, __u32 length, __u64 now)
{
	struct receiver receiver = {};
	struct bpf_sock *sk;
	__u64 sock;
	__u32 consumed;
	int file, waits, error;

	end->lookups += 1;
	end->seen_ns = now;
	sk = bpf_sk_lookup_tcp(skb, tuple, length, BPF_F_CURRENT_NETNS, 0);
	if (!sk)
		return;
	sock = sock_address(sk);
	if (found_state(sk) != STATE_ESTABLISHED || !sock_is(sock, end->cookie))
		goto out;
	read_receiver(sock, &receiver);
	file = receiver_file(&receiver);
	if (sock_zerocopy(sock)) {
		end->sighting |= END_ZEROCOPY;
		count(REASON_REDIRECT_ZEROCOPY);
		goto out;
	}
	if (file != FILE_NONBLOCKING) {
		end->sighting &= ~(END_NONBLOCK | END_READY);
		goto out;
	}
	waits = receiver_waits(&receiver);
	if (waits == WAITS_SHORT) {
		/* Such a socket could only send by redirection, and pays for being in a sockhash: FIONREAD, by which nginx
		 * knows that there is more to read, does not count native bytes there on some kernels. */
		end->sighting |= END_EDGE;
		count(REASON_REDIRECT_EDGE);
		goto out;
	}
	if (waits == WAITS_INPUT)
		end->sighting |= END_WAITED;
	consumed = read32(sock, OFF_TCP_COPIED_SEQ);
	if (!(end->sighting & END_NONBLOCK)) {
		end->sighting |= END_NONBLOCK;
		end->seen_seq = consumed;
	} else if (consumed != end->seen_seq && end->sighting & END_WAITED) {
		struct hashed_value *mark = hashed.sk_storage_get(sk, 0, 0);

		/* Of an earlier connection: it may hold what it never read of that one. */
		if (mark)
			goto out;
		/* Both or none: alone in a sockhash it would pay for each message and gain nothing. */
		end->sighting |= END_READY;
		if (!(other->sighting & END_READY))
			goto out;
		mark = hashed.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
		if (!mark)
			goto out;
		mark->since_ns = now;
		error = sockets.insert(key, sk);
		if (error) {
			/* Busy: it is in a sockhash already. Another processor was faster, and the mark is its, too. */
			if (error != -EBUSY)
				hashed.sk_storage_delete(sk);
			goto out;
		}
		/* Whoever reads now may still be in the call of before: sk_msg waits for a byte read after this. */
		end->seen_seq = read32(sock, OFF_TCP_COPIED_SEQ);
		end->sock = sock;
		end->sighting |= END_INSERTED;
		count(REASON_REDIRECT_INSERTED);
	}
out:
	bpf_sk_release(sk);
}

int enrol(struct __sk_buff *skb)
{
	struct bpf_sock_tuple tuple = {};
	struct tuple_key own = {}, theirs;
	struct settings_value *settings;
	struct flow_value *flow;
	struct flow_end *end, *other;
	__u32 length;
	__u64 now;

	length = packet_tuple(skb, &own, &tuple);
	if (!length)
		return TC_NEXT;
	theirs = other_end(&own);
	flow = flows.lookup(&own);
	if (flow) {
		end = &flow->server;
		other = &flow->client;
	} else {
		flow = flows.lookup(&theirs);
		if (!flow)
			return TC_NEXT;
		end = &flow->client;
		other = &flow->server;
	}
	if (flow->acceleration != ACCELERATION_REDIRECT || end->sighting & END_INSERTED ||
	    (end->sighting | other->sighting) & (END_ZEROCOPY | END_EDGE) || end->lookups >= LOOKS_MAX || !end->cookie)
		return TC_NEXT;
	now = bpf_ktime_get_ns();
	if (end->sighting & END_READY) {
		if (!(other->sighting & END_READY))
			return TC_NEXT; /* until then there is nothing to look for */
	} else if (end->lookups >= LOOKS_AT_ONCE && now - end->seen_ns < LOOK_NS) {
		return TC_NEXT;
	}
	settings = current_settings();
	if (!settings || !(settings->acceleration & CAN_REDIRECT) || settings->acceleration & DRAINING)
		return TC_NEXT;
	/* The compiler must see both lengths as constants. */
	if (length == sizeof(tuple.ipv4))
		look(skb, &own, end, other, &tuple, sizeof(tuple.ipv4), now);
	else
		look(skb, &own, end, other, &tuple, sizeof(tuple.ipv6), now);
	return TC_NEXT;
}
