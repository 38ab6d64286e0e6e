/* puppet.c - an application whose every system call is dictated: one command a line on stdin, one answer a line.
 *
 * It uses plain sockets and knows nothing of the mesh. Answers: "ok ..." or "err NUMBER". Sockets are numbered
 * slots. Every wait is bounded (5 s by socket timeouts, 60 s for the process as a whole); it dies with its parent.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#ifndef SO_COOKIE
#define SO_COOKIE 57
#endif

static int slots[64];
static int families[64];

static socklen_t address(int family, const char *ip, int port, struct sockaddr_storage *out)
{
	memset(out, 0, sizeof(*out));
	if (family == AF_INET) {
		struct sockaddr_in *sin = (void *)out;
		sin->sin_family = AF_INET;
		sin->sin_port = htons(port);
		if (inet_pton(AF_INET, ip, &sin->sin_addr) != 1)
			exit(3);
		return sizeof(*sin);
	}
	struct sockaddr_in6 *sin6 = (void *)out;
	sin6->sin6_family = AF_INET6;
	sin6->sin6_port = htons(port);
	if (inet_pton(AF_INET6, ip, &sin6->sin6_addr) != 1)
		exit(3);
	return sizeof(*sin6);
}

static void answer(int result)
{
	if (result < 0)
		printf("err %d\n", errno);
	else
		printf("ok %d\n", result);
}

static void answer_address(int result, const struct sockaddr_storage *from, const char *text)
{
	char ip[INET6_ADDRSTRLEN] = "-";
	int port = 0;

	if (result < 0) {
		printf("err %d\n", errno);
		return;
	}
	if (from->ss_family == AF_INET) {
		inet_ntop(AF_INET, &((struct sockaddr_in *)from)->sin_addr, ip, sizeof(ip));
		port = ntohs(((struct sockaddr_in *)from)->sin_port);
	} else if (from->ss_family == AF_INET6) {
		inet_ntop(AF_INET6, &((struct sockaddr_in6 *)from)->sin6_addr, ip, sizeof(ip));
		port = ntohs(((struct sockaddr_in6 *)from)->sin6_port);
	}
	printf("ok %s %d %s\n", ip, port, text);
}

static void keep(int slot, int fd, int family)
{
	struct timeval limit = {.tv_sec = 5};

	if (fd >= 0) {
		slots[slot] = fd;
		families[slot] = family;
		setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
		setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit));
	}
}

int main(void)
{
	char line[512], word[32], ip[128], text[128];
	int slot, a, b, c;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	signal(SIGPIPE, SIG_IGN);
	alarm(60);
	setvbuf(stdout, NULL, _IOLBF, 0);
	while (fgets(line, sizeof(line), stdin)) {
		struct sockaddr_storage where;
		socklen_t length = sizeof(where);
		char buffer[256] = "";
		int fd, family;

		if (sscanf(line, "%31s %d", word, &slot) != 2 || slot < 0 || slot >= 64)
			return 2;
		fd = slots[slot];
		family = families[slot];
		memset(&where, 0, sizeof(where));
		if (sscanf(line, "tcp %d %d", &slot, &a) == 2) {
			fd = socket(a, SOCK_STREAM | SOCK_CLOEXEC, 0);
			keep(slot, fd, a);
			answer(fd);
		} else if (sscanf(line, "udp %d %d", &slot, &a) == 2) {
			fd = socket(a, SOCK_DGRAM | SOCK_CLOEXEC, 0);
			keep(slot, fd, a);
			answer(fd);
		} else if (sscanf(line, "mptcp %d %d", &slot, &a) == 2) {
			fd = socket(a, SOCK_STREAM | SOCK_CLOEXEC, 262);
			keep(slot, fd, a);
			answer(fd);
		} else if (sscanf(line, "option %d %d %d %d", &slot, &a, &b, &c) == 4) {
			answer(setsockopt(fd, a, b, &c, sizeof(c)));
		} else if (sscanf(line, "bind %d %127s %d", &slot, ip, &a) == 3) {
			length = address(family, ip, a, &where);
			answer(bind(fd, (void *)&where, length));
		} else if (sscanf(line, "connect %d %127s %d", &slot, ip, &a) == 3) {
			length = address(family, ip, a, &where);
			answer(connect(fd, (void *)&where, length));
		} else if (sscanf(line, "nonblocking_connect %d %127s %d", &slot, ip, &a) == 3) {
			length = address(family, ip, a, &where);
			struct timeval none = {.tv_usec = 1};
			struct timeval limit = {.tv_sec = 5};
			setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &none, sizeof(none));
			int result = connect(fd, (void *)&where, length);
			int why = errno;
			setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit));
			errno = why;
			answer(result);
		} else if (!strcmp(word, "unspec")) {
			struct sockaddr none = {.sa_family = AF_UNSPEC};
			answer(connect(fd, &none, sizeof(none)));
		} else if (sscanf(line, "fastopen %d %127s %d %127s", &slot, ip, &a, text) == 4) {
			length = address(family, ip, a, &where);
			answer(sendto(fd, text, strlen(text), MSG_FASTOPEN, (void *)&where, length));
		} else if (sscanf(line, "sendto %d %127s %d %127s", &slot, ip, &a, text) == 4) {
			length = address(family, ip, a, &where);
			answer(sendto(fd, text, strlen(text), 0, (void *)&where, length));
		} else if (sscanf(line, "send %d %127s", &slot, text) == 2) {
			answer(send(fd, text, strlen(text), 0));
		} else if (!strcmp(word, "recv")) {
			int got = recv(fd, buffer, sizeof(buffer) - 1, 0);
			answer_address(got, &where, buffer);
		} else if (!strcmp(word, "recvfrom")) {
			int got = recvfrom(fd, buffer, sizeof(buffer) - 1, 0, (void *)&where, &length);
			answer_address(got, &where, buffer);
		} else if (sscanf(line, "listen %d %d", &slot, &a) == 2) {
			answer(listen(fd, a));
		} else if (sscanf(line, "accept %d %d", &slot, &a) == 2) {
			int got = accept4(fd, (void *)&where, &length, SOCK_CLOEXEC);
			keep(a, got, family);
			answer_address(got, &where, "");
		} else if (!strcmp(word, "name")) {
			answer_address(getsockname(fd, (void *)&where, &length), &where, "");
		} else if (!strcmp(word, "peer")) {
			answer_address(getpeername(fd, (void *)&where, &length), &where, "");
		} else if (!strcmp(word, "error")) {
			int value = 0;
			socklen_t size = sizeof(value);
			int result = getsockopt(fd, SOL_SOCKET, SO_ERROR, &value, &size);
			answer(result < 0 ? result : value);
		} else if (sscanf(line, "poll %d %d", &slot, &a) == 2) {
			struct pollfd one = {.fd = fd, .events = a};
			int result = poll(&one, 1, 5000);
			answer(result < 0 ? result : one.revents);
		} else if (sscanf(line, "shutdown %d %d", &slot, &a) == 2) {
			answer(shutdown(fd, a));
		} else if (!strcmp(word, "reset")) {
			struct linger now = {.l_onoff = 1};
			setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof(now));
			answer(close(fd));
		} else if (!strcmp(word, "close")) {
			answer(close(fd));
		} else {
			return 2;
		}
	}
	return 0;
}
