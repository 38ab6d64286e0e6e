/* ambient-cni: the CNI plugin on the node. Forwards its environment and input to the agent, prints the answer.
 *
 * Static and shell-free, because a node has no interpreter to count on. It knows only this much: VERSION is
 * answered here; STATUS, GC and DEL succeed without an agent (the agent reconciles when it is back); ADD and
 * CHECK without an agent fail with code 11 ("try again later"), so a pod of the mesh never starts uncaptured;
 * pods of the system namespace pass, or the mesh could not start itself.
 *
 * Wire (RUN_DIR/cni.sock): one JSON object {"env": {...}, "stdin": "..."}, half-close; the answer is
 * {"code": N, "stdout": "..."}.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define INPUT_MAX (1024 * 1024)
#define ANSWER_MAX (4 * INPUT_MAX)
#define ANSWER_TIMEOUT_MS 25000
#define RUN_DIR_DEFAULT "/run/ambient"
#define SYSTEM_NAMESPACE_DEFAULT "ambient-system"
#define DEPTH_MAX 64

static const char *const forwarded[] = {
	"CNI_COMMAND", "CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS", "CNI_PATH", "CNI_NETNS_OVERRIDE",
};

/* --- a growing buffer */

struct buffer {
	char *data;
	size_t used, size;
};

static void put(struct buffer *b, const char *text, size_t length)
{
	if (b->used + length + 1 > b->size) {
		size_t size = (b->used + length + 1) * 2;
		char *data = realloc(b->data, size);
		if (!data)
			_exit(1);
		b->data = data;
		b->size = size;
	}
	memcpy(b->data + b->used, text, length);
	b->used += length;
	b->data[b->used] = 0;
}

static void put_text(struct buffer *b, const char *text)
{
	put(b, text, strlen(text));
}

/* Bytes above 0x7f go out as they are: JSON is UTF-8, and the agent refuses what is not. */
static void put_string(struct buffer *b, const char *text, size_t length)
{
	put(b, "\"", 1);
	for (size_t i = 0; i < length; i++) {
		unsigned char c = (unsigned char)text[i];
		if (c == '"' || c == '\\') {
			char pair[2] = { '\\', (char)c };
			put(b, pair, 2);
		} else if (c < 0x20 || c == 0x7f) {
			char code[8];
			snprintf(code, sizeof(code), "\\u%04x", c);
			put(b, code, 6);
		} else {
			put(b, (const char *)&text[i], 1);
		}
	}
	put(b, "\"", 1);
}

/* --- the little JSON reading that is needed: one value of the outermost object */

static const char *skip_space(const char *p, const char *end)
{
	while (p < end && (*p == ' ' || *p == '\t' || *p == '\n' || *p == '\r'))
		p++;
	return p;
}

/* From an opening quote to behind the closing one; NULL if there is none. */
static const char *skip_string(const char *p, const char *end)
{
	for (p++; p < end; p++) {
		if (*p == '\\')
			p++;
		else if (*p == '"')
			return p + 1;
	}
	return NULL;
}

static const char *skip_value(const char *p, const char *end)
{
	int depth = 0;
	const char *start = p;

	while (p < end) {
		if (*p == '"') {
			p = skip_string(p, end);
			if (!p)
				return NULL;
		} else if (*p == '{' || *p == '[') {
			if (++depth > DEPTH_MAX)
				return NULL;
			p++;
		} else if (*p == '}' || *p == ']') {
			if (depth == 0)
				return p > start ? p : NULL;
			depth--;
			p++;
		} else if (depth == 0 && (*p == ',' || *p == ' ' || *p == '\n' || *p == '\t' || *p == '\r')) {
			return p > start ? p : NULL;
		} else {
			p++;
			if (depth == 0)
				continue;
		}
		if (depth == 0)
			return p;
	}
	return depth == 0 && p > start ? p : NULL;
}

/* The text of the value under a key of the outermost object; the length is 0 if it is not there. */
static size_t find_value(const char *p, const char *end, const char *key, const char **value)
{
	p = skip_space(p, end);
	if (p >= end || *p != '{')
		return 0;
	p = skip_space(p + 1, end);
	while (p < end && *p == '"') {
		const char *name = p + 1, *after = skip_string(p, end);
		if (!after)
			return 0;
		size_t length = (size_t)(after - 1 - name);
		p = skip_space(after, end);
		if (p >= end || *p != ':')
			return 0;
		p = skip_space(p + 1, end);
		const char *stop = skip_value(p, end);
		if (!stop)
			return 0;
		if (length == strlen(key) && memcmp(name, key, length) == 0) {
			*value = p;
			return (size_t)(stop - p);
		}
		p = skip_space(stop, end);
		if (p >= end || *p != ',')
			return 0;
		p = skip_space(p + 1, end);
	}
	return 0;
}

static int hex4(const char *p, const char *end, unsigned *code)
{
	*code = 0;
	if (end - p < 4)
		return 0;
	for (int i = 0; i < 4; i++) {
		char c = p[i];
		unsigned digit = c >= '0' && c <= '9' ? (unsigned)(c - '0')
			: c >= 'a' && c <= 'f' ? (unsigned)(c - 'a' + 10)
			: c >= 'A' && c <= 'F' ? (unsigned)(c - 'A' + 10) : 16;
		if (digit == 16)
			return 0;
		*code = *code * 16 + digit;
	}
	return 1;
}

static void put_utf8(struct buffer *b, unsigned c)
{
	char out[4];
	size_t n;

	if (c < 0x80) {
		out[0] = (char)c, n = 1;
	} else if (c < 0x800) {
		out[0] = (char)(0xc0 | c >> 6), out[1] = (char)(0x80 | (c & 0x3f)), n = 2;
	} else if (c < 0x10000) {
		out[0] = (char)(0xe0 | c >> 12), out[1] = (char)(0x80 | (c >> 6 & 0x3f));
		out[2] = (char)(0x80 | (c & 0x3f)), n = 3;
	} else {
		out[0] = (char)(0xf0 | c >> 18), out[1] = (char)(0x80 | (c >> 12 & 0x3f));
		out[2] = (char)(0x80 | (c >> 6 & 0x3f)), out[3] = (char)(0x80 | (c & 0x3f)), n = 4;
	}
	put(b, out, n);
}

/* A quoted JSON string into plain bytes. Returns 0 if it is not one. */
static int unquote(struct buffer *b, const char *p, size_t length)
{
	const char *end = p + length;

	if (length < 2 || *p != '"' || end[-1] != '"')
		return 0;
	end--;
	put(b, "", 0);
	for (p++; p < end; p++) {
		if (*p != '\\') {
			put(b, p, 1);
			continue;
		}
		if (++p >= end)
			return 0;
		unsigned code, low;
		switch (*p) {
		case '"': case '\\': case '/': put(b, p, 1); break;
		case 'b': put(b, "\b", 1); break;
		case 'f': put(b, "\f", 1); break;
		case 'n': put(b, "\n", 1); break;
		case 'r': put(b, "\r", 1); break;
		case 't': put(b, "\t", 1); break;
		case 'u':
			if (!hex4(p + 1, end, &code))
				return 0;
			p += 4;
			if (code >= 0xd800 && code < 0xdc00 && end - p > 6 && p[1] == '\\' && p[2] == 'u' &&
			    hex4(p + 3, end, &low) && low >= 0xdc00 && low < 0xe000) {
				code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
				p += 6;
			}
			put_utf8(b, code);
			break;
		default:
			return 0;
		}
	}
	return 1;
}

/* A string value of the netconf, or the default. */
static char *setting(const struct buffer *input, const char *key, const char *fallback)
{
	const char *value;
	size_t length = find_value(input->data, input->data + input->used, key, &value);
	struct buffer text = { 0 };

	if (length && unquote(&text, value, length) && text.used && !memchr(text.data, 0, text.used))
		return text.data;
	free(text.data);
	return strdup(fallback);
}

/* --- answers given without the agent */

static void write_all(int fd, const char *data, size_t length)
{
	while (length) {
		ssize_t n = write(fd, data, length);
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			_exit(1);
		data += n;
		length -= (size_t)n;
	}
}

static void put_version(struct buffer *b, const struct buffer *input)
{
	const char *value;
	size_t length = find_value(input->data, input->data + input->used, "cniVersion", &value);

	if (length && *value == '"')
		put(b, value, length);
	else
		put_text(b, "\"1.1.0\"");
}

static int fail(const struct buffer *input, int code, const char *message, const char *detail)
{
	struct buffer b = { 0 };

	put_text(&b, "{\"cniVersion\":");
	put_version(&b, input);
	char number[32];
	snprintf(number, sizeof(number), ",\"code\":%d,\"msg\":", code);
	put_text(&b, number);
	put_string(&b, message, strlen(message));
	put_text(&b, ",\"details\":");
	put_string(&b, detail, strlen(detail));
	put_text(&b, "}\n");
	write_all(1, b.data, b.used);
	return 1;
}

/* ADD and CHECK of what the mesh leaves alone: the previous plugin's result is the answer. */
static int pass(const struct buffer *input, const char *command)
{
	const char *value;
	size_t length;

	if (strcmp(command, "ADD") != 0)
		return 0;
	length = find_value(input->data, input->data + input->used, "prevResult", &value);
	if (!length)
		return fail(input, 7, "ambient-cni must come after another plugin in the list", "prevResult is missing");
	write_all(1, value, length);
	write_all(1, "\n", 1);
	return 0;
}

static int version(const struct buffer *input)
{
	struct buffer b = { 0 };

	put_text(&b, "{\"cniVersion\":");
	put_version(&b, input);
	put_text(&b, ",\"supportedVersions\":[\"0.3.1\",\"0.4.0\",\"1.0.0\",\"1.1.0\"]}\n");
	write_all(1, b.data, b.used);
	return 0;
}

static int without_agent(const struct buffer *input, const char *command, const char *why)
{
	if (strcmp(command, "ADD") == 0 || strcmp(command, "CHECK") == 0)
		return fail(input, 11, "the ambient agent of this node does not answer; it is being restarted", why);
	return 0;
}

/* Whether CNI_ARGS (K=V;K=V) says that the pod is in this namespace. */
static int pod_is_in(const char *namespace)
{
	const char *args = getenv("CNI_ARGS"), *key = "K8S_POD_NAMESPACE=";

	while (args && *args) {
		size_t length = strcspn(args, ";");
		if (strncmp(args, key, strlen(key)) == 0)
			return length - strlen(key) == strlen(namespace) &&
			       memcmp(args + strlen(key), namespace, strlen(namespace)) == 0;
		args += length + (args[length] == ';');
	}
	return 0;
}

/* --- the agent */

static long long now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000LL + t.tv_nsec / 1000000;
}

static int wait_for(int fd, short events, long long deadline)
{
	for (;;) {
		long long left = deadline - now_ms();
		struct pollfd p = { .fd = fd, .events = events };
		if (left <= 0)
			return 0;
		int n = poll(&p, 1, (int)left);
		if (n > 0)
			return 1;
		if (n < 0 && errno != EINTR)
			return 0;
	}
}

/* Returns NULL when the whole answer is in, else why not. */
static const char *ask(const char *run_dir, const struct buffer *request, struct buffer *answer)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	long long deadline = now_ms() + ANSWER_TIMEOUT_MS;
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

	if (fd < 0)
		return strerror(errno);
	if ((size_t)snprintf(address.sun_path, sizeof(address.sun_path), "%s/cni.sock", run_dir) >= sizeof(address.sun_path))
		return "runDir is too long";
	if (connect(fd, (struct sockaddr *)&address, sizeof(address)) != 0)
		return strerror(errno);
	for (size_t sent = 0; sent < request->used;) {
		ssize_t n = send(fd, request->data + sent, request->used - sent, MSG_NOSIGNAL);
		if (n > 0)
			sent += (size_t)n;
		else if (errno != EAGAIN && errno != EINTR)
			return strerror(errno);
		else if (!wait_for(fd, POLLOUT, deadline))
			return "no answer in time";
	}
	shutdown(fd, SHUT_WR);
	for (;;) {
		char chunk[16384];
		ssize_t n = recv(fd, chunk, sizeof(chunk), 0);
		if (n == 0)
			break;
		if (n > 0) {
			if (answer->used + (size_t)n > ANSWER_MAX)
				return "the answer is too long";
			put(answer, chunk, (size_t)n);
		} else if (errno != EAGAIN && errno != EINTR) {
			return strerror(errno);
		} else if (!wait_for(fd, POLLIN, deadline)) {
			return "no answer in time";
		}
	}
	close(fd);
	return answer->used ? NULL : "the connection was closed without an answer";
}

static int forward(const struct buffer *input, const char *command)
{
	struct buffer request = { 0 }, answer = { 0 }, out = { 0 };
	int first = 1;

	put_text(&request, "{\"env\":{");
	for (size_t i = 0; i < sizeof(forwarded) / sizeof(*forwarded); i++) {
		const char *value = getenv(forwarded[i]);
		if (!value)
			continue;
		if (!first)
			put_text(&request, ",");
		first = 0;
		put_string(&request, forwarded[i], strlen(forwarded[i]));
		put_text(&request, ":");
		put_string(&request, value, strlen(value));
	}
	put_text(&request, "},\"stdin\":");
	put_string(&request, input->data, input->used);
	put_text(&request, "}");

	char *run_dir = setting(input, "runDir", RUN_DIR_DEFAULT);
	const char *why = ask(run_dir, &request, &answer);
	if (why)
		return without_agent(input, command, why);

	const char *code_text, *stdout_text;
	const char *end = answer.data + answer.used;
	size_t code_length = find_value(answer.data, end, "code", &code_text);
	size_t stdout_length = find_value(answer.data, end, "stdout", &stdout_text);
	if (!code_length || !stdout_length || !unquote(&out, stdout_text, stdout_length))
		return without_agent(input, command, "the answer cannot be read");
	char *stop;
	long code = strtol(code_text, &stop, 10);
	if (stop == code_text || code < 0 || code > 255)
		return without_agent(input, command, "the answer cannot be read");
	write_all(1, out.data, out.used);
	return (int)code;
}

int main(void)
{
	const char *command = getenv("CNI_COMMAND");
	struct buffer input = { 0 };
	char chunk[16384];
	ssize_t n;

	signal(SIGPIPE, SIG_IGN);
	put(&input, "", 0);
	while ((n = read(0, chunk, sizeof(chunk))) != 0) {
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			break;
		if (input.used + (size_t)n > INPUT_MAX) {
			struct buffer none = { 0 };
			put(&none, "", 0);
			return fail(&none, 7, "the network configuration exceeds 1 MiB", "");
		}
		put(&input, chunk, (size_t)n);
	}
	if (!command || !*command)
		return fail(&input, 4, "CNI_COMMAND is not set", "ambient-cni is run by a container runtime");
	if (strcmp(command, "VERSION") == 0)
		return version(&input);
	if (strcmp(command, "STATUS") == 0)
		return 0; /* failing it would make the whole node NotReady, the mesh's own pods included */
	if (strcmp(command, "ADD") != 0 && strcmp(command, "DEL") != 0 && strcmp(command, "CHECK") != 0 &&
	    strcmp(command, "GC") != 0)
		return fail(&input, 4, "unknown CNI_COMMAND", command);
	char *system_namespace = setting(&input, "systemNamespace", SYSTEM_NAMESPACE_DEFAULT);
	if (pod_is_in(system_namespace))
		return pass(&input, command);
	return forward(&input, command);
}
