/* decide_shim.c - the decisions of bpf/include/decide.h as functions of a library, for tests to call. */
#include <linux/types.h>

#include "decide.h"

int call_outbound_size(void) { return sizeof(struct outbound); }
int call_decide_outbound(const struct outbound *out, const struct settings_value *s) { return decide_outbound(out, s); }
int call_authorizes(const struct authorized_value *e, const struct workload_value *w) { return authorizes(e, w); }
int call_inbound_bypassed(const struct workload_value *w, const struct settings_value *s, __u64 now)
{
	return inbound_bypassed(w, s, now);
}
int call_in_range(const struct address *a, const struct cluster_range *r) { return address_in_range(a, r); }
int call_in_cluster(const struct address *a, const struct settings_value *s) { return address_in_cluster(a, s); }
int call_is_loopback(const struct address *a) { return address_is_loopback(a); }
int call_is_any(const struct address *a) { return address_is_any(a); }
int call_is4(const struct address *a) { return address_is4(a); }
int call_equal(const struct address *a, const struct address *b) { return address_equal(a, b); }
int call_heartbeat_stopped(const struct settings_value *s, __u64 now) { return heartbeat_stopped(s, now); }
void call_effective_target(const struct address *t, const struct address *s, struct address *out)
{
	*out = effective_target(t, s);
}
void call_loopback_for(const struct address *a, struct address *out) { *out = loopback_for(a); }
int call_agreed_acceleration(__u32 ours, __u32 theirs, __u32 can) { return agreed_acceleration(ours, theirs, can); }
int call_is_same_node(const struct workload_value *w) { return is_same_node(w); }
int call_judge(const struct verdict_value *v, __u64 generation) { return judge(v, generation); }
int call_progress_size(void) { return sizeof(struct progress); }
int call_native_is_gone(const struct progress *p) { return native_is_gone(p); }
int call_redirection_size(void) { return sizeof(struct redirection); }
int call_decide_redirect(const struct redirection *r) { return decide_redirect(r); }
__u32 call_redirect_high(__u32 wanted, __u32 rcvbuf) { return redirect_high(wanted, rcvbuf); }
int call_agent_is_silent(const struct settings_value *s, __u64 now) { return agent_is_silent(s, now); }
