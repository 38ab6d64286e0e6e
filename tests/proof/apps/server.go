// An HTTP server of Go's standard library, as anybody writes it.
//
//	GET /bytes/N    N bytes of a stream that everybody can compute
//	POST /digest    how many bytes came, and their SHA-256
package main

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"log"
	"net/http"
	"strconv"
	"strings"
)

// SHA-256 of 0, 1, 2, ... as big-endian numbers, one after the other.
type stream struct {
	next uint64
	rest []byte
}

func (s *stream) Read(out []byte) (int, error) {
	filled := 0
	for filled < len(out) {
		if len(s.rest) == 0 {
			var number [8]byte
			binary.BigEndian.PutUint64(number[:], s.next)
			block := sha256.Sum256(number[:])
			s.next, s.rest = s.next+1, block[:]
		}
		count := copy(out[filled:], s.rest)
		s.rest = s.rest[count:]
		filled += count
	}
	return filled, nil
}

func main() {
	http.HandleFunc("/bytes/", func(out http.ResponseWriter, in *http.Request) {
		count, err := strconv.ParseInt(strings.TrimPrefix(in.URL.Path, "/bytes/"), 10, 64)
		if err != nil {
			http.Error(out, err.Error(), http.StatusBadRequest)
			return
		}
		out.Header().Set("Content-Length", strconv.FormatInt(count, 10))
		io.CopyN(out, &stream{}, count)
	})
	http.HandleFunc("/digest", func(out http.ResponseWriter, in *http.Request) {
		digest := sha256.New()
		count, err := io.Copy(digest, in.Body)
		if err != nil {
			http.Error(out, err.Error(), http.StatusBadRequest)
			return
		}
		fmt.Fprintf(out, "%d %x\n", count, digest.Sum(nil))
	})
	log.Fatal(http.ListenAndServe(":8080", nil))
}
