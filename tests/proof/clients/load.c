/* load.c - steady load whose every connection is counted, and the server for it.
 *
 *   load serve PORT                     echo what comes, until killed
 *   load drive ADDRESS PORT RATE KEPT   RATE new connections a second, and KEPT connections with ten requests a second
 *
 * A new connection sends 16 bytes, must get them back, half-closes, and must see the end and no reset. Each belongs to
 * the window in which it began. Commands on standard input, one a line:
 *
 *   mark              begin a window
 *   kill PID SIGNAL   begin a window and signal a process: the window's clock starts with the kill
 *   report            print the window as one JSON line; "before": what had begun earlier and failed since
 *   wait COUNT MS     report as soon as COUNT connections of the window succeeded or it is so old
 *   finish            begin no more connections, and print the last report when all have ended
 *
 * Times are in milliseconds since the window's begin; "first_ok" is the first success among its connections.
 */
#include "net.h"
#include <poll.h>

#define CONNECTIONS_MAX 8192
#define TIMEOUT_US 10000000
#define KEPT_PERIOD_US 100000
#define LIFETIME_S 240

enum state { FREE, CONNECTING, ASKED, ENDING, IDLE };

struct connection {
	int fd, window, kept, got;
	enum state state;
	uint64_t begun, due, nonce[2], answer[2];
};

struct outcome {
	unsigned long started, ok, refused, reset, timeout, ended, wrong, other;
	uint64_t begun, first_ok, slowest;
	int last_errno;
};

static struct connection connections[CONNECTIONS_MAX];
static struct outcome now_, before; /* of the current window, and of what began before it */
static int window_, epoll_, finishing, open_count, kept_wanted, kept_open;
static unsigned long wait_count;
static uint64_t wait_until; /* 0: nobody waits */
static unsigned long kept_requests, kept_lost, kept_opened;
static uint64_t kept_slowest, serial;
static struct sockaddr_storage target;
static socklen_t target_length;

static unsigned long failures(const struct outcome *o)
{
	return o->refused + o->reset + o->timeout + o->ended + o->wrong + o->other;
}

static void watch(struct connection *c, int operation, uint32_t events)
{
	struct epoll_event event = { .events = events, .data.ptr = c };

	if (epoll_ctl(epoll_, operation, c->fd, &event))
		die("epoll_ctl");
}

static void release(struct connection *c)
{
	close(c->fd);
	c->state = FREE;
	if (c->kept)
		kept_open--;
	else
		open_count--;
}

/* error: an errno, 0 for an end that came too early, -1 for other bytes than were sent, ETIMEDOUT for ours */
static void fail(struct connection *c, int error)
{
	struct outcome *o = c->window == window_ ? &now_ : &before;

	if (c->kept) {
		kept_lost++;
		fprintf(stderr, "kept connection lost after %llu ms: %d %s\n",
			(unsigned long long)(now_us() - c->begun) / 1000, error, error > 0 ? strerror(error) : "");
	} else if (error == ECONNREFUSED) {
		o->refused++;
	} else if (error == ECONNRESET || error == EPIPE) {
		o->reset++;
	} else if (error == ETIMEDOUT) {
		o->timeout++;
	} else if (error == 0) {
		o->ended++;
	} else if (error < 0) {
		o->wrong++;
	} else {
		o->other++;
	}
	o->last_errno = error;
	release(c);
}

static void begin(int kept)
{
	struct connection *c = NULL;

	for (int i = 0; i < CONNECTIONS_MAX && !c; i++)
		if (connections[i].state == FREE)
			c = &connections[i];
	if (!c)
		return;
	memset(c, 0, sizeof(*c));
	c->fd = socket(target.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	if (c->fd < 0)
		die("socket");
	c->kept = kept;
	c->window = window_;
	c->begun = now_us();
	c->due = c->begun + TIMEOUT_US;
	c->state = CONNECTING;
	if (kept) {
		kept_open++;
		kept_opened++;
	} else {
		open_count++;
		now_.started++;
	}
	if (connect(c->fd, (struct sockaddr *)&target, target_length) && errno != EINPROGRESS) {
		fail(c, errno);
		return;
	}
	watch(c, EPOLL_CTL_ADD, EPOLLOUT);
}

static void ask(struct connection *c)
{
	c->nonce[0] = mix(++serial);
	c->nonce[1] = mix(~serial);
	c->got = 0;
	if (send(c->fd, c->nonce, sizeof(c->nonce), MSG_NOSIGNAL) != sizeof(c->nonce)) {
		fail(c, errno);
		return;
	}
	if (c->state == IDLE)
		c->begun = now_us();
	c->due = now_us() + TIMEOUT_US;
	c->state = ASKED;
	watch(c, EPOLL_CTL_MOD, EPOLLIN);
}

static void answered(struct connection *c)
{
	uint64_t now = now_us(), took = now - c->begun;

	if (c->kept) {
		kept_requests++;
		if (took > kept_slowest)
			kept_slowest = took;
		c->state = IDLE;
		c->due = now + KEPT_PERIOD_US;
		return;
	}
	if (c->window == window_) {
		if (!now_.first_ok)
			now_.first_ok = now - now_.begun;
		if (took > now_.slowest)
			now_.slowest = took;
	}
	c->state = ENDING;
	shutdown(c->fd, SHUT_WR);
}

static void readable(struct connection *c)
{
	char more;
	ssize_t count;

	if (c->state == ASKED) {
		count = recv(c->fd, (char *)c->answer + c->got, sizeof(c->answer) - c->got, 0);
		if (count <= 0) {
			if (count == 0 || errno != EAGAIN)
				fail(c, count ? errno : 0);
			return;
		}
		c->got += count;
		if (c->got < (int)sizeof(c->answer))
			return;
		if (memcmp(c->answer, c->nonce, sizeof(c->nonce)))
			fail(c, -1);
		else
			answered(c);
		return;
	}
	count = recv(c->fd, &more, 1, 0);
	if (count < 0 && errno == EAGAIN)
		return;
	if (c->state == ENDING && count == 0) {
		(c->window == window_ ? &now_ : &before)->ok++;
		release(c);
		return;
	}
	fail(c, count < 0 ? errno : count ? -1 : 0);
}

static void writable(struct connection *c)
{
	int error = 0;
	socklen_t length = sizeof(error);

	getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &length);
	if (error)
		fail(c, error);
	else
		ask(c);
}

static void mark(void)
{
	window_++;
	memset(&now_, 0, sizeof(now_));
	memset(&before, 0, sizeof(before));
	now_.begun = now_us();
	kept_slowest = 0;
}

static void report(void)
{
	printf("{\"since\": %.1f, \"started\": %lu, \"ok\": %lu, \"failed\": %lu, \"refused\": %lu, \"reset\": %lu, "
	       "\"timeout\": %lu, \"ended\": %lu, \"wrong\": %lu, \"other\": %lu, \"errno\": %d, \"first_ok\": %.1f, "
	       "\"slowest\": %.1f, \"open\": %d, \"begun_at\": %.6f, "
	       "\"before\": {\"ok\": %lu, \"failed\": %lu, \"refused\": %lu, \"reset\": %lu, \"timeout\": %lu}, "
	       "\"kept\": {\"open\": %d, \"opened\": %lu, \"requests\": %lu, \"lost\": %lu, \"slowest\": %.1f}}\n",
	       (now_us() - now_.begun) / 1e3, now_.started, now_.ok, failures(&now_), now_.refused, now_.reset,
	       now_.timeout, now_.ended, now_.wrong, now_.other, now_.last_errno, now_.first_ok / 1e3,
	       now_.slowest / 1e3, open_count, now_.begun / 1e6, before.ok, failures(&before), before.refused,
	       before.reset, before.timeout, kept_open, kept_opened, kept_requests, kept_lost, kept_slowest / 1e3);
}

static void obey(const char *line)
{
	int pid, number;

	if (!strncmp(line, "mark", 4)) {
		mark();
	} else if (sscanf(line, "kill %d %d", &pid, &number) == 2) {
		mark();
		if (kill(pid, number))
			die("kill");
	} else if (!strncmp(line, "report", 6)) {
		report();
	} else if (sscanf(line, "wait %lu %d", &wait_count, &number) == 2) {
		wait_until = now_.begun + (uint64_t)number * 1000;
	} else if (!strncmp(line, "finish", 6)) {
		finishing = 1;
	} else {
		fprintf(stderr, "no command: %s\n", line);
		exit(3);
	}
}

static void overdue(uint64_t now)
{
	for (int i = 0; i < CONNECTIONS_MAX; i++) {
		struct connection *c = &connections[i];
		if (c->state == FREE || c->due > now)
			continue;
		if (c->state != IDLE)
			fail(c, ETIMEDOUT);
		else if (finishing)
			release(c);
		else
			ask(c);
	}
}

static int drive(double rate)
{
	struct epoll_event events[256];
	uint64_t next = now_us(), pause = (uint64_t)(1e6 / rate);
	struct epoll_event input = { .events = EPOLLIN };

	epoll_ = epoll_create1(EPOLL_CLOEXEC);
	fcntl(0, F_SETFL, O_NONBLOCK);
	if (epoll_ctl(epoll_, EPOLL_CTL_ADD, 0, &input))
		die("standard input");
	mark();
	while (!finishing || open_count || kept_open) {
		int count = epoll_wait(epoll_, events, 256, 2);
		for (int i = 0; i < count; i++) {
			struct connection *c = events[i].data.ptr;
			if (!c) {
				if (!commands(obey))
					return 0;
			} else if (c->state == CONNECTING) {
				writable(c);
			} else if (c->state != FREE) {
				readable(c);
			}
		}
		uint64_t now = now_us();
		overdue(now);
		if (wait_until && (now_.ok >= wait_count || now >= wait_until)) {
			wait_until = 0;
			report();
		}
		if (now > next + 1000000)
			next = now; /* we were stopped: no burst afterwards */
		while (!finishing && next <= now) {
			next += pause;
			begin(0);
		}
		while (!finishing && kept_open < kept_wanted)
			begin(1);
	}
	report();
	return 0;
}

static __attribute__((noreturn)) void serve(int port)
{
	struct epoll_event events[256], event = { .events = EPOLLIN };
	char data[65536];
	int listener = listen_on(port), poller = epoll_create1(EPOLL_CLOEXEC);

	event.data.fd = listener;
	epoll_ctl(poller, EPOLL_CTL_ADD, listener, &event);
	for (;;) {
		int count = epoll_wait(poller, events, 256, -1);
		for (int i = 0; i < count; i++) {
			int fd = events[i].data.fd;
			if (fd == listener) {
				while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
					event.data.fd = fd;
					epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event);
				}
				continue;
			}
			ssize_t got = recv(fd, data, sizeof(data), 0);
			if (got < 0 && errno == EAGAIN)
				continue;
			if (got <= 0 || send(fd, data, got, MSG_NOSIGNAL) != got)
				close(fd);
		}
	}
}

int main(int count, char **words)
{
	if (count == 3 && !strcmp(words[1], "serve")) {
		signal(SIGPIPE, SIG_IGN);
		serve(atoi(words[2]));
	}
	if (count == 6 && !strcmp(words[1], "drive")) {
		begin_process(LIFETIME_S);
		target_length = parse_address(words[2], atoi(words[3]), &target);
		kept_wanted = atoi(words[5]);
		return drive(atof(words[4]));
	}
	fprintf(stderr, "usage: load serve PORT | load drive ADDRESS PORT RATE KEPT\n");
	return 2;
}
