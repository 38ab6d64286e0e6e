// A TCP proxy as Go's own examples write it: io.Copy from one connection to the other, which is splice() on Linux.
//
//	proxy ADDRESS:PORT    listens on :8080
package main

import (
	"io"
	"log"
	"net"
	"os"
	"sync"
)

func forward(to, from *net.TCPConn, both *sync.WaitGroup) {
	defer both.Done()
	if _, err := io.Copy(to, from); err != nil {
		log.Print(err)
	}
	to.CloseWrite()
}

func serve(client *net.TCPConn) {
	defer client.Close()
	server, err := net.Dial("tcp", os.Args[1])
	if err != nil {
		log.Print(err)
		return
	}
	defer server.Close()
	var both sync.WaitGroup
	both.Add(2)
	go forward(server.(*net.TCPConn), client, &both)
	go forward(client, server.(*net.TCPConn), &both)
	both.Wait()
}

func main() {
	listener, err := net.Listen("tcp", ":8080")
	if err != nil {
		log.Fatal(err)
	}
	for {
		client, err := listener.Accept()
		if err != nil {
			log.Fatal(err)
		}
		go serve(client.(*net.TCPConn))
	}
}
