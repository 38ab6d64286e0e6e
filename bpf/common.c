/* common.c - what several hooks do with the maps. The loader puts all .c files into one text, this first:
 * bcc turns map methods into calls only there, and one text is compiled once and shares its maps. */
#include <uapi/linux/bpf.h>
#include <uapi/linux/in.h>
#include <uapi/linux/in6.h>

#include "layout.h"
#include "decide.h"
#include "compat.h"
#include "redirect.h"
#include "maps.h"

#define REFUSE 0 /* the system call fails with EPERM */
#define LET 1

static __always_inline void count(__u32 reason)
{
	__u64 *value = counters.lookup(&reason);

	if (value)
		*value += 1; /* per CPU, and these programs do not nest */
}

static __always_inline struct settings_value *current_settings(void)
{
	__u32 zero = 0;

	return settings.lookup(&zero);
}

/* Keys of authorized and origins name addresses, and in a namespace of its own anybody may have any address. */
static __always_inline int is_here(__u64 entry_netns, __u64 netns)
{
	return !entry_netns || entry_netns == netns;
}

/* Whether the calling process is in one of the cgroups or below one. */
static __always_inline int current_in(const __u64 *cgroups, int length)
{
	if (!cgroups[0])
		return 0;
	for (int level = 1; level <= CGROUP_LEVELS_MAX; level++) {
		__u64 id = bpf_get_current_ancestor_cgroup_id(level);

		if (!id)
			return 0;
		for (int index = 0; index < length; index++)
			if (cgroups[index] == id)
				return 1;
	}
	return 0;
}

/* Decide on a connect or datagram of an enrolled pod; fills the record that `pending` will hold. */
static __always_inline enum reason outbound(struct pending_value *record, struct enrolled_value *pod, __u8 stream)
{
	struct outbound out = {};
	struct service_key vip = {};
	struct workload_value *workload;
	struct settings_value *now = current_settings();

	out.target = record->original;
	out.port = record->original_port;
	out.stream = stream;
	out.enrolled_flags = pod->flags;
	out.now_ns = bpf_ktime_get_ns();
	record->source = pod->workload;

	workload = workloads.lookup(&out.target);
	if (workload) {
		out.workload_known = 1;
		out.workload_flags = workload->flags;
		record->workload = workload->workload;
		record->generation = workload->generation;
	}
	vip.vip = out.target;
	vip.port = out.port;
	if (services.lookup(&vip))
		out.service_known = 1;
	if (!now) {
		struct settings_value none = {};

		return decide_outbound(&out, &none);
	}
	out.exempt = current_in(now->exempt_cgroups, EXEMPT_CGROUPS_MAX);
	out.in_cluster = address_in_cluster(&out.target, now);
	return decide_outbound(&out, now);
}
