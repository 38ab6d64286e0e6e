/* setsockopt.c - cgroup/setsockopt at the pods' cgroup: refuses on a socket in `sockets` what kernels get wrong there.
 *
 * TCP_ULP (kernel TLS over a sockhash corrupts or worse on some kernels) and SO_ZEROCOPY (its completions never come).
 * EPERM; applications take both as not available and go on. Everything else passes untouched.
 */

#define LEVEL_SOCKET 1
#define LEVEL_TCP 6
#define OPTION_ZEROCOPY 60
#define OPTION_ULP 31

int setsockopt(struct bpf_sockopt *ctx)
{
	struct tuple_key own, theirs;
	struct flow_value *flow;
	struct flow_end *end;

	if (!(ctx->level == LEVEL_TCP && ctx->optname == OPTION_ULP) &&
	    !(ctx->level == LEVEL_SOCKET && ctx->optname == OPTION_ZEROCOPY)) {
		ctx->optlen = 0; /* the caller's own value, however long */
		return LET;
	}
	own = sockopt_tuple(ctx);
	theirs = other_end(&own);
	flow = flows.lookup(&own);
	if (flow) {
		end = &flow->server;
	} else {
		flow = flows.lookup(&theirs);
		if (!flow)
			goto untouched;
		end = &flow->client;
	}
	if (end->sighting & END_INSERTED) {
		count(REASON_REDIRECT_OPTION);
		return REFUSE;
	}
untouched:
	ctx->optlen = 0;
	return LET;
}
