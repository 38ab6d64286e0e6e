/* setsockopt.c - cgroup/setsockopt at the pods' cgroup: refuses on a socket that is, or was, in `sockets` what kernels get
 * wrong there.
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
	if ((ctx->level == LEVEL_TCP && ctx->optname == OPTION_ULP) ||
	    (ctx->level == LEVEL_SOCKET && ctx->optname == OPTION_ZEROCOPY)) {
		if (sockopt_sock(ctx) && hashed.sk_storage_get(sockopt_sock(ctx), 0, 0)) {
			count(REASON_REDIRECT_OPTION);
			return REFUSE;
		}
	}
	ctx->optlen = 0; /* the caller's own value, however long */
	return LET;
}
