/* load.h - what the load generator's server and clients agree on.
 *
 * A connection begins with eight bytes from the client: what ('E', 'S' or 'C'), three zeros, and the size of a message in
 * the machine's byte order. A stream begins with WARM bytes that are echoed one by one, as a protocol that greets does (only
 * sockets whose application has read something are redirected), is zeros from there on, and ends with a one. What begins
 * with a G instead is HTTP: each empty line is answered with ten bytes, as nginx is told to.
 */
#ifndef AMBIENT_LOAD_H
#define AMBIENT_LOAD_H

#include <stdint.h>

#define MESSAGE_MAX (1 << 20)
#define CONNECTIONS_MAX 16384
#define WARM 64

struct header {
	uint8_t what, pad[3];
	uint32_t size;
};

/* Say what failed and errno, and exit. */
void fail(const char *what);

/* load_server.c: answer on the port, for ever. */
void serve(int port);

#endif
